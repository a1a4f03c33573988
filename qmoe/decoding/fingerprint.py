"""What a captured step of a model rests on, and whether it is still the same.

A CUDA graph has the addresses of tensors in it and everything that Python decided on the way: which
modules there are, their attributes and hooks, switches of adapters, values of configurations. A
`Fingerprint` holds all of it, and compares in about a millisecond for a model of 48 layers.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PretrainedConfig

from qmoe.decoding.shadow import replaced_forward
from qmoe.experts.guard import has_guard, is_guard

# Attributes that change without changing what a forward pass computes.
_IGNORED = ("warnings_issued", "_output_capturing_hooks_installed")
_GLOBAL_HOOKS = tuple(
    value for name, value in vars(torch_module).items() if name.startswith("_global_forward")
)
# What a module has beside that has no part in a forward pass without gradients.
_IRRELEVANT = {
    "_non_persistent_buffers_set",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    # in part again what the dictionaries of hooks hold
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
# A hook that does nothing until somebody asks transformers for hidden states or router logits.
_IDLE_HOOKS = "transformers.utils.output_capturing"


class Fingerprint:
    """What a model is.

    Attributes:
        devices: of its parameters.
        uncapturable: what runs at each step and may do anything, so that no graph may stand for
            it; None where there is no such thing.
    """

    RECORDING = "routing is being recorded"  # of uncapturable: what the user knows

    def __init__(self, model: nn.Module) -> None:
        """Take the fingerprint of ``model``."""
        # Not the model itself: who keeps its fingerprint would keep it alive.
        self._modules = list(model.modules())[1:]
        self._types = [type(module) for module in (model, *self._modules)]
        self._classes = list(set(self._types))
        self._others: list[tuple[Any, str]] = []
        # Guards are there by now: what is kept for a model is kept by its guard.
        self._guarded = [module for module in self._modules if has_guard(vars(module))]
        self._unguarded = [module for module in self._modules if not has_guard(vars(module))]
        self._values = self._attributes(model)
        self._containers: list[Any] = list(_GLOBAL_HOOKS)
        for module in (model, *self._modules):
            for name, value in vars(module).copy().items():
                if name not in _IRRELEVANT and not is_guard(name) and name not in _IGNORED:
                    self._collect(value, set())
        self._empty = [c for c in self._containers if not c]
        self._filled = [c for c in self._containers if c]
        self._contents = _contents(self._filled)
        tensors = [v for v in (*self._values, *self._contents) if isinstance(v, Tensor)]
        self._tensors = [tensor for tensor in tensors if _has_place(tensor)]
        self._places = _places(self._tensors)
        self._around = self._surroundings()
        self.devices = {t.device for t in tensors if isinstance(t, nn.Parameter)}
        self.uncapturable = self._find_uncapturable([model, *self._modules])

    def watch(self, others: Iterable[tuple[Any, str]]) -> None:
        """Compare more: attributes that are not the model's, by their owner and their name."""
        self._others += others
        self._around = self._surroundings()

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` is still what it was."""
        return (
            self._types == [type(model), *map(type, self._modules)]
            and _same(self._values, self._attributes(model))
            and not any(self._empty)
            and _same(self._contents, _contents(self._filled))
            and self._places == _places(self._tensors)
            and _same(self._around, self._surroundings())
        )

    def _attributes(self, model: nn.Module) -> list[Any]:
        values: list[Any] = []
        for module in (model, *self._guarded):
            # Copied at once: another thread may run the model, and set an attribute.
            attributes = vars(module).copy().items()
            values += [v for k, v in attributes if not is_guard(k) and k not in _IGNORED]
        for module in self._unguarded:
            values += vars(module).values()
        return values

    def _surroundings(self) -> list[Any]:
        """What is not in the model: its classes' functions, switches of torch."""
        functions = [getattr(cls, "forward", None) for cls in self._classes]
        others = [getattr(owner, name, None) for owner, name in self._others]
        switches = [
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ]
        return functions + others + switches

    def _find_uncapturable(self, modules: list[nn.Module]) -> str | None:
        """Name a hook or a replaced forward of a module: either may do something else each time."""
        if any(_GLOBAL_HOOKS):
            return "hooks of all modules"
        found = None
        for module in modules:
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                owner = getattr(hook, "__module__", None) or ""
                if owner.startswith("qmoe.traces."):
                    found = self.RECORDING
                elif owner != _IDLE_HOOKS and not owner.startswith("qmoe."):
                    return f"a hook on {type(module).__name__}, which may do anything at each step"
            if (forward := replaced_forward(module)) is not None:
                return (
                    f"{forward} in place of {type(module).__name__}.forward, which may do "
                    "anything at each step"
                )
        return found

    def _collect(self, value: Any, above: set[int]) -> None:
        """Note the containers in an attribute, and what is in these."""
        if isinstance(value, PretrainedConfig) or (
            dataclasses.is_dataclass(value)
            and not isinstance(value, type)
            and not type(value).__module__.startswith("qmoe.")
        ):
            value = vars(value)
        if not isinstance(value, dict | list | set) or id(value) in above:
            return
        self._containers.append(value)
        for item in list(value.values() if isinstance(value, dict) else value):
            if not isinstance(item, (nn.Module, Tensor, *_PLAIN)):
                self._collect(item, above | {id(value)})


def _contents(containers: list[Any]) -> list[Any]:
    contents: list[Any] = []
    for container in containers:
        contents += container.values() if isinstance(container, dict) else container
    return contents


def _places(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _has_place(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # a subclass of tensors that wraps others
        return False
    return True


def _same(before: list[Any], now: list[Any]) -> bool:
    """Whether all are the same objects, or the same plain values.

    Where an equal value took the place of one, ``before`` gets it: so it is the same next time.
    """
    if len(before) != len(now):
        return False
    if all(map(operator.is_, before, now)):
        return True
    for i, (old, new) in enumerate(zip(before, now, strict=True)):
        if old is not new:
            if not _equal(old, new):
                return False
            before[i] = new
    return True


def _equal(old: Any, new: Any) -> bool:
    if type(old) is not type(new):
        return False
    if isinstance(old, tuple):
        return len(old) == len(new) and all(
            a is b or _equal(a, b) for a, b in zip(old, new, strict=True)
        )
    return isinstance(old, _PLAIN) and bool(old == new)
