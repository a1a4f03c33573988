"""What a model's experts compute between their two products, found by trying it.

The kernels know some activations; which of them a module computes is measured on the module
itself. A gate that is none of them is called as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import torch
from torch import nn

from qmoe.experts.layout import ExpertsLayout
from qmoe_kernels import Activation
from qmoe_kernels.activations import ActivationName
from qmoe_kernels.activations import apply as apply_activation


def identify_activation(module: nn.Module, layout: ExpertsLayout) -> Activation | None:
    """Find the :class:`Activation` that computes what the module computes between its products.

    The module's own gate is evaluated on the CPU over a grid that reaches past every clamp, and
    compared with each candidate, so a match is a measurement and not a guess from a class name.

    Returns:
        None if the module computes something else; its own gate must then be called.
    """
    grid = torch.linspace(-30, 30, 121, device="cpu", dtype=torch.float32)
    beyond = [sign * 2 * limit for limit in _limits(module) for sign in (-1, 1) if limit > 15]
    grid = torch.cat((grid, torch.tensor(beyond, device="cpu", dtype=torch.float32)))
    if layout.gated:
        gate, up = (t.flatten() for t in torch.meshgrid(grid, grid, indexing="ij"))
        canonical = torch.stack((gate, up), dim=1)  # (points, 2): intermediate_size 1
    else:
        canonical = grid[:, None]
    with torch.no_grad():
        expected = apply_own_gate(module, layout, canonical)
        for activation in candidates(module, layout.gated):
            if torch.allclose(
                apply_activation(activation, canonical), expected, rtol=1e-5, atol=1e-6
            ):
                return activation
    return None


def apply_own_gate(module: nn.Module, layout: ExpertsLayout, up: torch.Tensor) -> torch.Tensor:
    """Call the module's own nonlinearity on canonical rows.

    Args:
        up: (rows, 2 * intermediate_size), gate then up; or (rows, intermediate_size) without a
        gate.

    Returns:
        (rows, intermediate_size)
    """
    owner: Any = module.mlp if layout.flat else module
    function = next(
        (f for n in ("act_fn", "activation_fn") if (f := getattr(owner, n, None)) is not None), None
    )
    if not layout.gated:
        assert function is not None
        return function(up)
    if hasattr(owner, "_apply_gate"):
        if layout.interleaved:
            up = torch.stack(up.chunk(2, dim=-1), dim=-1).flatten(-2)
        return owner._apply_gate(up)
    if function is None:
        raise ValueError(
            f"{type(module).__name__} has neither _apply_gate nor act_fn; "
            "qmoe cannot tell what its experts compute"
        )
    gate, linear = up.chunk(2, dim=-1)
    return function(gate) * linear


def candidates(module: nn.Module, gated: bool) -> Iterator[Activation]:
    """Every activation that the module's own numbers allow, simplest first."""
    names = get_args(ActivationName)
    numbers = _numbers(module)
    alphas = [1.0, 1.702, *(v for k, v in numbers.items() if "alpha" in k)]
    yield from (Activation(name, gated) for name in names)
    yield from (Activation("silu", gated, alpha) for alpha in alphas[1:])
    if not gated:
        return
    for limit, limit_after in product(_limits(module), (False, True)):
        yield from (Activation(n, limit=limit, limit_after=limit_after) for n in names)
        for alpha in alphas:
            yield Activation("silu", True, alpha, 1.0, limit, limit_after)
    function = getattr(module, "act_fn", None)
    softcaps = (getattr(function, name, None) for name in ("gate_softcap", "up_softcap"))
    values = [getattr(softcap, "softcap", None) for softcap in softcaps]
    gate, up = (v if v is not None and 0 < v < float("inf") else None for v in values)
    if gate or up:
        yield Activation("silu", gate_softcap=gate, up_softcap=up)


def _numbers(module: nn.Module) -> dict[str, float]:
    return {k: float(v) for k, v in vars(module).items() if isinstance(v, (int, float))}


def _limits(module: nn.Module) -> list[float]:
    numbers = _numbers(module).items()
    return [v for k, v in numbers if "limit" in k and 0 < v < float("inf")]
