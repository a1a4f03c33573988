"""Which tensors a kernel may be given."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether each one's address leads to its numbers; None counts as such.

    A subclass may say anything of itself: torchao's quantized weights have the shape and the dtype
    of what they stand for, and a null address. Torch's own operations know what to do with them.
    (Operators need not ask: torch lets a subclass answer before any kernel sees it.)
    """
    return all(t is None or type(t) in (Tensor, Parameter) for t in tensors)


def is_watched() -> bool:
    """Return whether something traces or transforms what this thread runs.

    It sees torch's operations, and not what is done with an address.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )
