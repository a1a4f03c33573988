"""What the search for pieces shares: random numbers, comparison, and copies to try things on.

Probes compare on the CPU, where pieces are plain torch: on a GPU each would compile a kernel.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    """The same random numbers each time, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def close(found: Tensor, expected: Tensor, units: int = 2) -> bool:
    """Equal up to so many units in the last place of the largest value of a row."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    bound = units * torch.finfo(found.dtype).eps * expected.abs().amax(-1, keepdim=True)
    return bool(((found - expected).abs() <= bound).all())


def kind_of(module: nn.Module) -> tuple[object, ...]:
    """What modules have in common of which one probe tells about all."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    sizes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors)
    numbers = ((k, v) for k, v in vars(module).items() if isinstance(v, bool | int | float | str))
    return type(module), sizes, tuple(sorted(numbers))


def try_out(module: nn.Module) -> Any:
    """A copy of a module to be run: no hook fires, and what it stores is not the module's."""
    own = copy.copy(module)
    vars(own).update({name: OrderedDict() for name in _HOOKS})
    vars(own).update(_parameters=dict(module._parameters), _buffers=dict(module._buffers))
    vars(own)["_modules"] = {
        name: None if child is None else try_out(child) for name, child in module._modules.items()
    }
    return own


def runs_as_its_class(module: nn.Module) -> bool:
    """Whether ``module`` has the forward of its class: no hook of accelerate, no patch."""
    return "forward" not in vars(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what goes into ``module`` or comes out of it."""
    return any(getattr(module, name) for name in _HOOKS)
