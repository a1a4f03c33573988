"""Products of few rows, and three products with the same rows as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from qmoe.decoding.pieces.probe import has_hooks, runs_as_its_class
from qmoe.decoding.shadow import Forward
from qmoe_kernels.linear import linear

_LINEAR = nn.Linear.forward
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # as torch.nn.functional.linear


def product_of(few_rows: bool) -> Product:
    """What multiplies: qmoe's products of few rows, or cuBLAS alone."""
    return linear if few_rows else F.linear


def find_linears(model: nn.Module) -> dict[nn.Module, Forward]:
    """The plain Linears of ``model``."""
    return {module: _forward for module in model.modules() if is_plain_linear(module)}


def _forward(self: Any, x: Tensor) -> Tensor:
    return linear(x, self.weight, self.bias)


def is_plain_linear(module: Any) -> bool:
    """Whether ``module`` is a Linear that holds its weight as it is."""
    return (
        type(module) is nn.Linear
        and nn.Linear.forward is _LINEAR  # else somebody has put another there, for all of them
        and runs_as_its_class(module)
        and type(module.weight) is nn.Parameter
        and type(module.bias) in (nn.Parameter, type(None))
    )


def find_merged_products(model: nn.Module, product: Product) -> dict[nn.Module, Forward]:
    """Queries, keys and values whose weights lie side by side: the first computes all three."""
    found: dict[nn.Module, Forward] = {}
    for module in model.modules():
        linears = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        if all(map(is_plain_linear, linears)) and not any(map(has_hooks, linears)):
            found |= _merged(linears, product)
    return found


def _merged(linears: Sequence[Any], product: Product) -> dict[nn.Module, Forward]:
    """Let the first of ``linears`` compute for all of them, and the others hand out their part."""
    weight = _side_by_side([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = _side_by_side(biases) if len(biases) == len(linears) else None
    if weight is None or (biases and bias is None):
        return {}
    sizes = [linear.out_features for linear in linears]
    computed: dict[int, tuple[Tensor, Tensor]] = {}  # by number of linear: input, part of output

    def first(self: Any, x: Tensor) -> Tensor:
        parts = product(x, weight, bias).split(sizes, dim=-1)
        computed.update((i, (x, part)) for i, part in enumerate(parts[1:], 1))
        return parts[0]

    def other(i: int) -> Forward:
        def forward(self: Any, x: Tensor) -> Tensor:
            of, part = computed.pop(i, (None, None))
            if of is not x or part is None:  # asked for other rows than the first was
                return product(x, self.weight, self.bias)
            return part

        return forward

    return {linear: first if i == 0 else other(i) for i, linear in enumerate(linears)}


def _side_by_side(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """One tensor of all rows, where these lie one behind the other; None where they do not."""
    first = parameters[0].detach()
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for parameter in parameters:
        if (
            parameter.dtype != first.dtype
            or parameter.shape[1:] != first.shape[1:]
            or not parameter.is_contiguous()
            or parameter.untyped_storage().data_ptr() != storage
            or parameter.storage_offset() != offset
        ):
            return None
        offset += parameter.numel()
    return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())
