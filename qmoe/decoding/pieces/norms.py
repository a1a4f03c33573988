"""RMSNorm: eight launches, here one, with the same roundings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.decoding.pieces.probe import close, draw, kind_of, runs_as_its_class, try_out
from qmoe.decoding.shadow import Forward
from qmoe_kernels.norm import rms_norm

Norm = Callable[[Tensor, Tensor], Tensor]  # of hidden states and a weight


def find_norms(model: nn.Module) -> dict[nn.Module, Forward]:
    """The RMS norms of ``model``, and what computes the same."""
    formulas: dict[tuple[object, ...], Norm | None] = {}
    found: dict[nn.Module, Forward] = {}
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm") or not runs_as_its_class(module):
            continue
        weight: Any = getattr(module, "weight", None)
        if (
            type(weight) is not nn.Parameter
            or weight.ndim != 1
            or weight.dtype != getattr(model, "dtype", None)
        ):
            continue
        kind = kind_of(module)
        if kind not in formulas:
            formulas[kind] = _formula(module)
        if (formula := formulas[kind]) is not None:
            found[module] = _forward(formula)
    return found


def _formula(norm: Any) -> Norm | None:
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if epsilon is None:
        return None
    x = draw(4, len(norm.weight), dtype=norm.weight.dtype)
    weight = 1 + 0.3 * draw(len(norm.weight), dtype=norm.weight.dtype)
    probe = try_out(norm)
    probe._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        expected = probe.forward(x)
    except (TypeError, RuntimeError):  # it takes or has more than hidden states and a weight
        return None
    candidates: list[Norm] = [
        partial(rms_norm, epsilon=epsilon),
        partial(rms_norm, epsilon=epsilon, round_before_weight=False),
        partial(rms_norm, epsilon=epsilon, round_before_weight=False, weight_offset=1.0),
    ]
    ours = [candidate(x, weight) for candidate in candidates]
    errors = [float((y - expected).abs().sum()) for y in ours]
    best = errors.index(min(errors))
    return candidates[best] if close(ours[best], expected) else None


def _forward(formula: Norm) -> Forward:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return formula(hidden_states, self.weight)

    return forward
