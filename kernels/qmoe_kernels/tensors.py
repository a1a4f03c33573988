"""Which tensors a kernel may be given."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Parameter


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether each one's address leads to its numbers; None counts as such.

    A subclass may say anything of itself: torchao's quantized weights have the shape and the dtype
    of what they stand for, and a null address. Torch's own operations know what to do with them.
    (Operators need not ask: torch lets a subclass answer before any kernel sees it.)
    """
    return all(t is None or type(t) in (Tensor, Parameter) for t in tensors)
