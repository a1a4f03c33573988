"""A shadow of a model: a copy of its module tree in which pieces can be replaced.

It shares parameters, buffers and hooks with the model, and has configurations and forwards of its
own. Whatever a shadow does or wherever it is cut off, the model is what it was, and other threads
can run it meanwhile. Modules below which nothing differs are shared as they are.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from qmoe.experts.guard import is_guard
from qmoe.experts.quantized import QuantizedExperts

# What takes the place of a module's forward: a function of the module and its arguments.
Forward = Callable[..., Any]


class Undecodable(ValueError):
    """A model that qmoe's loop cannot run; the message says why."""


class Shadow:
    """A copy of the module tree of a model, as far as it has to differ; called as the model is.

    Attributes:
        root: the copy of the model itself.
    """

    def __init__(
        self, model: Any, forwards: Mapping[nn.Module, Forward], attention: str | None = None
    ) -> None:
        """Copy.

        Args:
            model: a model of transformers; it is only read.
            forwards: the model's modules whose forward is replaced in the shadow.
            attention: of transformers' attention implementations, the shadow's; None for the
                model's.

        Raises:
            Undecodable: a forward was replaced by something that would lead back into the model.
        """
        self.forwards, self.attention = forwards, attention
        self.copies: dict[int, Any] = {}  # of modules and configurations, by the original's id
        self.kept: set[int] = set()  # modules that are shared as they are
        self.root: Any = self._copy(model, root=True)
        for original in model.modules():
            if id(original) in self.copies:
                self._refer_to_copies(original, self.copies[id(original)])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the shadow."""
        return self.root(*args, **kwargs)

    def __del__(self) -> None:
        # A module and its own forward hold each other; memory is to go at once.
        for own in self.copies.values():
            vars(own).pop("forward", None)

    def _copy_config(self, config: Any) -> None:
        if id(config) in self.copies:
            return
        own = self.copies[id(config)] = copy.copy(config)
        for name, value in vars(config).items():
            if isinstance(value, PretrainedConfig):
                self._copy_config(value)
                vars(own)[name] = self.copies[id(value)]
        if self.attention is not None:
            own._attn_implementation_internal = self.attention

    def _copy(self, module: nn.Module, *, root: bool = False) -> nn.Module:
        """The copy of a module, or the module itself where nothing differs below it."""
        if id(module) in self.kept:
            return module
        if id(module) in self.copies:
            copied: nn.Module = self.copies[id(module)]
            return copied
        if isinstance(module, QuantizedExperts):
            self.kept.add(id(module))
            return module
        children = {
            name: None if child is None else self._copy(child)
            for name, child in module._modules.copy().items()
        }
        # Copied at once: another thread may run the model, and set an attribute.
        attributes = vars(module).copy()
        configs = [v for v in attributes.values() if isinstance(v, PretrainedConfig)]
        for config in configs:
            self._copy_config(config)
        differs = (
            root
            or configs
            or module in self.forwards
            or any(child is not module._modules[name] for name, child in children.items())
        )
        if not differs:
            self.kept.add(id(module))
            return module
        own = module.__class__.__new__(module.__class__)
        vars(own).update({name: value for name, value in attributes.items() if not is_guard(name)})
        # A buffer that a forward replaces (rotary embeddings of a dynamic kind) is the shadow's.
        vars(own).update(_modules=children, _buffers=dict(module._buffers))
        vars(own).pop("_compiled_call_impl", None)  # it calls the original
        self.copies[id(module)] = own
        return own

    def _refer_to_copies(self, original: nn.Module, own: nn.Module) -> None:
        """Let attributes and forwards that lead to originals lead to their copies."""
        for name, value in vars(original).copy().items():
            if name not in ("_modules", "_parameters", "_buffers") and name in vars(own):
                vars(own)[name] = self._mapped(value)
        if original in self.forwards:
            vars(own)["forward"] = MethodType(self.forwards[original], own)
        elif (forward := replaced_forward(original)) is not None and _takes_cache(original):
            raise Undecodable(f"{type(original).__name__}.forward was replaced by {forward}")

    def _mapped(self, value: Any) -> Any:
        if isinstance(value, nn.Module | PretrainedConfig):
            return self.copies.get(id(value), value)
        if isinstance(value, MethodType) and id(value.__self__) in self.copies:
            return MethodType(value.__func__, self.copies[id(value.__self__)])
        if type(value) is functools.partial:
            mapped = functools.partial(value.func, *map(self._mapped, value.args), **value.keywords)
            vars(mapped).update(vars(value))
            return mapped
        if type(value) in (list, tuple) and any(isinstance(v, nn.Module) for v in value):
            return type(value)(map(self._mapped, value))
        if type(value) is dict and any(isinstance(v, nn.Module) for v in value.values()):
            return {key: self._mapped(v) for key, v in value.items()}
        return value


def replaced_forward(module: nn.Module) -> str | None:
    """What stands in the place of a module's forward, if that is a function of any kind.

    Methods of the module, and accelerate's partial functions of it, can be followed; others may
    hold on to anything.
    """
    forward = vars(module).get("forward")
    if forward is None or (isinstance(forward, MethodType) and forward.__self__ is module):
        return None
    if type(forward) is functools.partial and forward.args[:1] == (module,):
        return None
    return str(getattr(forward, "__qualname__", type(forward).__name__))


def _takes_cache(module: nn.Module) -> bool:
    """Whether a module, or one below it, is handed the cache of keys and values."""
    return any(
        "past_key_values" in inspect.signature(type(m).forward).parameters for m in module.modules()
    )
