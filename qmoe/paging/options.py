"""What a user asks for who wants experts to be paged."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec

from qmoe.paging.budget import check_budget
from qmoe.sizes import parse_size

# Who serves an expert that is not in a slot.
MISSES = ("link", "host", "auto")


@dataclass(frozen=True)
class PagingOptions:
    """A choice of one run; never written to disk.

    Attributes:
        hbm_budget: what the model may take of its device, see :func:`qmoe.load`.
        context: tokens per sequence that it must hold, new ones included; None: 8192, or all that
            the model takes.
        batch_size: sequences at a time.
        misses: who serves an expert that is not on the device. ``"link"``: its page is copied.
            ``"host"``: the host computes it, but for experts that come back soon. ``"auto"``: each
            does a share, as measured once. Other than ``"link"``, results depend within rounding
            on what was resident.
        host_memory: bytes of host memory that experts may take (``"16GiB"``, or a whole number);
            the others are read from the checkpoint's files when they are wanted. None: all are in
            host memory.

    Raises:
        ValueError: a budget or host memory that is no size, a context or batch size that is no
            number, or an unknown or impossible choice of who serves misses.
    """

    hbm_budget: str | int | float
    context: int | None = None
    batch_size: int = 1
    misses: str = "link"
    host_memory: str | int | None = None

    def __post_init__(self) -> None:
        check_budget(self.hbm_budget)
        context = 1 if self.context is None else self.context
        for name, value in (("context", context), ("batch_size", self.batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}; must be a whole number, at least 1")
        if self.host_memory is not None:
            try:
                parse_size(self.host_memory)
            except ValueError as error:
                raise ValueError(f"host_memory: {error}") from None
        if self.misses not in MISSES:
            raise ValueError(f"misses={self.misses!r}; use one of {', '.join(map(repr, MISSES))}")
        if self.misses == "host" and not sys.platform.startswith("linux"):
            raise ValueError(
                f"misses='host' needs Linux, and this is {sys.platform}; 'link' works here"
            )
        if self.misses == "host" and find_spec("numba") is None:
            raise ValueError("misses='host' needs numba, which is not installed; 'link' works")

    @property
    def host_bytes(self) -> int | None:
        """``host_memory`` in bytes."""
        return None if self.host_memory is None else parse_size(self.host_memory)

    def check_activations(self, activations: str) -> None:
        """Refuse products of 8-bit rows on the host.

        Raises:
            ValueError: the host is to take misses of experts whose rows are quantized.
        """
        if self.misses != "link" and activations in ("int8", "fp8"):
            raise ValueError(
                f"misses={self.misses!r} goes with activations='auto' or 'bf16', and they are "
                f"{activations!r}: the host's products take rows as they are"
            )


def paging_options(
    hbm_budget: str | int | float | None,
    context: int | None,
    batch_size: int | None,
    misses: str | None = None,
    host_memory: str | int | None = None,
) -> PagingOptions | None:
    """What arguments ask for; None without a budget.

    Raises:
        ValueError: a wrong value, or one that would have no effect.
    """
    if hbm_budget is not None:
        size = 1 if batch_size is None else batch_size
        misses = "link" if misses is None else misses
        return PagingOptions(hbm_budget, context, size, misses, host_memory)
    given = {"context": context, "batch_size": batch_size, "misses": misses}
    for name, value in {**given, "host_memory": host_memory}.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} has no effect without hbm_budget; drop it")
    return None
