"""What a user asks for who wants experts to be paged."""

from __future__ import annotations

from dataclasses import dataclass

from qmoe.paging.budget import check_budget


@dataclass(frozen=True)
class PagingOptions:
    """A choice of one run; never written to disk.

    Attributes:
        hbm_budget: what the model may take of its device, see :func:`qmoe.load`.
        context: tokens per sequence that it must hold, new ones included; None: 8192, or all that
            the model takes.
        batch_size: sequences at a time.

    Raises:
        ValueError: a budget that is no size, or a context or batch size that is no number.
    """

    hbm_budget: str | int | float
    context: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_budget(self.hbm_budget)
        context = 1 if self.context is None else self.context
        for name, value in (("context", context), ("batch_size", self.batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}; must be a whole number, at least 1")


def paging_options(
    hbm_budget: str | int | float | None, context: int | None, batch_size: int | None
) -> PagingOptions | None:
    """What arguments ask for; None without a budget.

    Raises:
        ValueError: a wrong value, or one that would have no effect.
    """
    if hbm_budget is not None:
        return PagingOptions(hbm_budget, context, 1 if batch_size is None else batch_size)
    for name, value in (("context", context), ("batch_size", batch_size)):
        if value is not None:
            raise ValueError(f"{name}={value!r} has no effect without hbm_budget; drop it")
    return None
