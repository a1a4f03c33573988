"""What a user asks for who wants experts to be paged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PagingOptions:
    """A choice of one run; never written to disk.

    Attributes:
        hbm_budget: what the model may take of its device, see :func:`qmoe.load`.
        context: tokens per sequence that it must hold, new ones included; None: 8192, or all that
            the model takes.
        batch_size: sequences at a time.
    """

    hbm_budget: str | int | float
    context: int | None = None
    batch_size: int = 1
