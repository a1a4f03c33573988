"""What an expert computes between its two products: the gate variants, in torch and in Triton.

A gated expert has rows ``gate`` and ``up``; all of the variants in use are one formula:

    gate' = min(gate, limit)        up' = clamp(up, -limit, limit)
    out   = f(gate') * (cap(up') + up_shift)

with ``f`` one of the named functions, ``silu(x) = x * sigmoid(alpha * x)``.  Variants:

- ``limit_after``: the gate's limit bounds ``f(gate)`` rather than ``gate`` (Step 3.7).
- ``gate_softcap``, ``up_softcap``: ``cap(x) = c * tanh(x / c)`` replaces the linear factor of
  silu's ``x * sigmoid(alpha * x)``, and ``up`` (Inkling 2).
- an expert without a gate computes ``f(up)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU path without it; the CPU needs none
    triton = None

ActivationName = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True)
class Activation:
    """One expert's nonlinearity; hashable, comparable, without tensors.

    Raises:
        ValueError: an unknown name, or a field that the named function has no use for.
    """

    name: ActivationName = "silu"
    gated: bool = True
    alpha: float = 1.0
    up_shift: float = 0.0
    limit: float | None = None
    limit_after: bool = False
    gate_softcap: float | None = None
    up_softcap: float | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(ActivationName):
            raise ValueError(
                f"unknown activation {self.name!r}; {', '.join(get_args(ActivationName))} work"
            )
        if self.name != "silu" and (self.alpha != 1.0 or self.gate_softcap is not None):
            raise ValueError(f"alpha and gate_softcap belong to silu, not to {self.name}")
        gate_only = (
            self.up_shift,
            self.limit,
            self.limit_after,
            self.gate_softcap,
            self.up_softcap,
        )
        if not self.gated and gate_only != (0.0, None, False, None, None):
            raise ValueError(f"{self}: up_shift, limits and softcaps need a gate")


SWIGLU = Activation()


def apply(activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
    """Apply ``activation`` in fp32 and return the dtype that came in.

    Args:
        activation: which one.
        gate_up: (..., 2 * intermediate_size), gate first; without a gate
            (..., intermediate_size).

    Returns:
        (..., intermediate_size).
    """
    a = activation
    if not a.gated:
        return _function(a, gate_up.float()).to(gate_up.dtype)
    gate, up = gate_up.float().chunk(2, dim=-1)
    if a.limit is not None:
        up = up.clamp(-a.limit, a.limit)
        gate = gate if a.limit_after else gate.clamp(max=a.limit)
    gate = _function(a, gate)
    if a.limit is not None and a.limit_after:
        gate = gate.clamp(max=a.limit)
    if a.up_softcap is not None:
        up = _softcap(up, a.up_softcap)
    if a.up_shift:
        up = up + a.up_shift
    return (gate * up).to(gate_up.dtype)


def _softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * torch.tanh(x / cap)


def _function(a: Activation, x: torch.Tensor) -> torch.Tensor:
    if a.name == "gelu":
        return F.gelu(x)
    if a.name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if a.name == "relu":
        return F.relu(x)
    if a.name == "relu2":
        return F.relu(x).square()
    if a.gate_softcap is not None:
        return _softcap(x, a.gate_softcap) * torch.sigmoid(a.alpha * x)
    return F.silu(x) if a.alpha == 1.0 else x * torch.sigmoid(a.alpha * x)


if triton is not None:

    @triton.jit
    def apply_triton(
        gate,  # fp32; the whole input without a gate
        up,  # fp32; not read without a gate
        ACTIVATION: tl.constexpr,  # an `Activation`
    ):
        """`apply` on fp32 registers."""
        NAME: tl.constexpr = ACTIVATION.name
        GATED: tl.constexpr = ACTIVATION.gated
        ALPHA: tl.constexpr = ACTIVATION.alpha
        UP_SHIFT: tl.constexpr = ACTIVATION.up_shift
        LIMIT: tl.constexpr = ACTIVATION.limit
        LIMIT_AFTER: tl.constexpr = ACTIVATION.limit_after
        GATE_SOFTCAP: tl.constexpr = ACTIVATION.gate_softcap
        UP_SOFTCAP: tl.constexpr = ACTIVATION.up_softcap
        if GATED and LIMIT is not None:
            up = _clamp_max(-_clamp_max(-up, LIMIT), LIMIT)
            if not LIMIT_AFTER:
                gate = _clamp_max(gate, LIMIT)
        if NAME == "silu":
            linear = gate
            if GATE_SOFTCAP is not None:
                linear = GATE_SOFTCAP * _tanh(gate / GATE_SOFTCAP)
            out = linear * tl.sigmoid(ALPHA * gate)
        elif NAME == "gelu":
            out = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
        elif NAME == "gelu_tanh":
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            out = 0.5 * gate * (1.0 + _tanh(inner))
        elif NAME == "relu":
            out = _clamp_min_zero(gate)
        else:
            tl.static_assert(NAME == "relu2")
            out = _clamp_min_zero(gate)
            out = out * out
        if GATED:
            if LIMIT is not None and LIMIT_AFTER:
                out = _clamp_max(out, LIMIT)
            if UP_SOFTCAP is not None:
                up = UP_SOFTCAP * _tanh(up / UP_SOFTCAP)
            out = out * (up + UP_SHIFT)
        return out

    @triton.jit
    def _tanh(x):
        # The interpreter has no tanh.
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0

    # NaN passes both, as it does torch's.
    @triton.jit
    def _clamp_max(x, limit):
        return tl.where(x > limit, limit, x)

    @triton.jit
    def _clamp_min_zero(x):
        return tl.where(x < 0.0, 0.0, x)
