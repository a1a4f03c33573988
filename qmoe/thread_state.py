"""What torch keeps for each thread, and how it is brought back after an interrupt."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _python_dispatch as dispatch


def thread_state() -> Callable[[], None]:
    """What brings a thread's gradient mode and its modes of torch back to what they are now.

    torch's own context managers do not where an interrupt finds them half entered or half left.
    """
    gradients, functions, dispatched = torch.is_grad_enabled(), function_modes(), _dispatch_modes()
    flags = {name: flag for name, flag in vars(dispatch).items() if name.startswith("_is_in_")}

    def restore() -> None:
        while len(function_modes()) > len(functions):
            torch._C._pop_torch_function_stack()
        for mode in functions[len(function_modes()) :]:
            torch._C._push_on_torch_function_stack(mode)
        while len(_dispatch_modes()) > len(dispatched):
            torch._C._pop_torch_dispatch_stack(None)
        if sys.exc_info()[0] is not None:  # all threads share these: let them alone otherwise
            vars(dispatch).update(flags)
        torch.set_grad_enabled(gradients)

    return restore


def function_modes() -> list[Any]:
    """This thread's torch-function modes, the outermost first."""
    depth = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(i) for i in range(depth)]


def _dispatch_modes() -> list[Any]:
    """This thread's torch-dispatch modes, the outermost first."""
    depth = torch._C._len_torch_dispatch_stack()
    return [torch._C._get_dispatch_stack_at(i) for i in range(depth)]
