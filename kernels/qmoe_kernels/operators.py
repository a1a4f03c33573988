"""Operators of torch, known to torch.compile, whose calls cost the host little.

``torch.library.custom_op`` does the same and checks with each call that no output shares memory
with an input, which took longer than all of an operator's launches; tests check it here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.library import Library, infer_schema, register_autograd, register_fake

NAMESPACE = "qmoe"
_LIBRARY = Library(NAMESPACE, "FRAGMENT")


class Operator:
    """A function of tensors and constants that is also ``torch.ops.qmoe.<name>``."""

    def __init__(self, name: str, function: Callable[..., Any], device_type: str | None) -> None:
        self.name = f"{NAMESPACE}::{name}"
        _LIBRARY.define(name + infer_schema(function, mutates_args=()))
        key = "CompositeExplicitAutograd" if device_type is None else device_type.upper()
        if device_type == "cpu":
            function = _without_autocast(function)
        _LIBRARY.impl(name, function, key)
        self._gradient: Callable[..., Any] | None = None
        self._keeps: Callable[..., Sequence[Any]] = _everything
        register_autograd(self.name, self._backward, setup_context=self._remember, lib=_LIBRARY)
        self._overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: Any) -> Any:
        """Run the operator on the device of its arguments.

        Raises:
            RuntimeError: within forward-mode differentiation, where it would lose the tangents.
        """
        if forward_ad._current_level >= 0:
            raise RuntimeError(f"{self.name} has no forward-mode derivative, only a gradient")
        return self._overload(*args)

    def register_kernel(self, device_type: str) -> Callable[[Callable[..., Any]], None]:
        """Take the decorated function for tensors on another type of device."""

        def register(function: Callable[..., Any]) -> None:
            _LIBRARY.impl(self.name.partition("::")[2], function, device_type.upper())

        return register

    def register_gradient(
        self, *, keeps: Callable[..., Sequence[Any]] | None = None
    ) -> Callable[[Callable[..., Any]], None]:
        """Take the decorated function for gradients.

        It is called with the output's gradient, with a bool for each of the operator's arguments
        (whether it requires a gradient), and with what was kept. It returns gradients of
        the first arguments, None where there is none. It is made of operators.

        Args:
            keeps: from the operator's arguments to what is kept of them, tensors and constants;
                None keeps them all.
        """

        def register(function: Callable[..., Any]) -> None:
            self._gradient = function
            self._keeps = keeps or _everything

        return register

    def _remember(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        """Keep what `_backward` needs: tensors only where somebody computes a gradient of them."""
        if self._gradient is not None:
            kept = self._keeps(*inputs)
            ctx.save_for_backward(*(value for value in kept if isinstance(value, torch.Tensor)))
            ctx.qmoe_kept = [
                (True, None) if isinstance(value, torch.Tensor) else (False, value)
                for value in kept
            ]
        ctx.qmoe_shapes = [
            list(value.shape) if isinstance(value, torch.Tensor) and value.requires_grad else None
            for value in inputs
        ]

    def _backward(self, ctx: Any, *gradients: Any) -> Any:
        (gradient, *_) = (g for g in gradients if g is not None)
        found: tuple[Any, ...] = ()
        if self._gradient is not None:
            tensors = iter(ctx.saved_tensors)
            kept = [next(tensors) if is_tensor else value for is_tensor, value in ctx.qmoe_kept]
            found = self._gradient(gradient, ctx.needs_input_grad, *kept)
        # torch.compile follows this where gradients are on, though nobody may ever ask for them:
        # so an operator raises, when it runs.
        return tuple(
            None
            if shape is None
            else found[i]
            if i < len(found) and found[i] is not None
            else torch.ops.qmoe.no_gradient(gradient, shape, self.name)
            for i, shape in enumerate(ctx.qmoe_shapes)
        )

    def register_fake(self, function: Callable[..., Any]) -> None:
        """Take the decorated function for tensors without memory: shapes and dtypes."""
        register_fake(self.name, function, lib=_LIBRARY)


def _everything(*arguments: Any) -> Sequence[Any]:
    return arguments


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is: what it multiplies has the dtype that it was given."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return function(*args)
        with torch.autocast("cpu", enabled=False):
            return function(*args)

    return run


def _raise_no_gradient(gradient: torch.Tensor, shape: Sequence[int], name: str) -> torch.Tensor:
    if name.endswith("_backward"):
        raise RuntimeError(f"{name} has no gradient: there are no second derivatives of experts")
    raise RuntimeError(
        f"{name} has no gradient of this: experts stay as they are, and adapters learn beside "
        "them; qmoe.unpatch(model) gives back a model whose experts can be trained"
    )


_LIBRARY.define("no_gradient(Tensor gradient, SymInt[] shape, str name) -> Tensor")
_LIBRARY.impl("no_gradient", _raise_no_gradient, "CompositeExplicitAutograd")
register_fake(
    f"{NAMESPACE}::no_gradient",
    lambda gradient, shape, name: gradient.new_empty(shape),
    lib=_LIBRARY,
)


def operator(name: str, device_type: str | None = None) -> Callable[[Callable[..., Any]], Operator]:
    """Make the decorated function an operator that changes none of its arguments.

    Args:
        name: within `NAMESPACE`.
        device_type: that the function is for; None for any.
    """
    return lambda function: Operator(name, function, device_type)
