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

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

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
        ValueError: an unknown name, a field that the named function has no use for, a limit that
            is negative or NaN, or a softcap that is not a positive finite number.
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
        caps = [cap for cap in (self.gate_softcap, self.up_softcap) if cap is not None]
        limit_fits = self.limit is None or self.limit >= 0  # which NaN is not
        if not (limit_fits and all(0 < cap < math.inf for cap in caps)):
            raise ValueError(f"{self}: a limit is at least 0, a softcap positive and finite")

    @property
    def fields(self) -> tuple[Any, ...]:
        """What operators of torch, which take no classes, are given in its place."""
        shape = self.name, self.gated, self.alpha, self.up_shift, self.limit, self.limit_after
        return *shape, self.gate_softcap, self.up_softcap

    @classmethod
    def of(cls, *fields: Any) -> Activation:
        """From `fields`."""
        return cls(*fields)


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


def apply_with_gradient(
    activation: Activation, gate_up: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply`, and the gradient of its input, in fp32.

    Args:
        activation: which one.
        gate_up: as `apply` has it.
        gradient: (..., intermediate_size), of the output.

    Returns:
        (..., intermediate_size), and the gradient, which has the shape of ``gate_up``.
    """
    a, gradient = activation, gradient.float()
    if not a.gated:
        out, slope = _function_with_slope(a, gate_up.float())
        return out, gradient * slope
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate_slope = up_slope = None
    if a.limit is not None:
        up_slope = up.abs() <= a.limit
        up = up.clamp(-a.limit, a.limit)
        if not a.limit_after:
            gate_slope = gate <= a.limit
            gate = gate.clamp(max=a.limit)
    gate, slope = _function_with_slope(a, gate)
    if a.limit is not None and a.limit_after:
        gate_slope = gate <= a.limit
        gate = gate.clamp(max=a.limit)
    if gate_slope is not None:
        slope = slope * gate_slope
    of_up = gradient * gate
    if a.up_softcap is not None:
        tanh = torch.tanh(up / a.up_softcap)
        of_up, up = of_up * (1 - tanh * tanh), a.up_softcap * tanh
    if up_slope is not None:
        of_up = of_up * up_slope
    up = up + a.up_shift
    return gate * up, torch.cat((gradient * up * slope, of_up), -1)


def _function_with_slope(a: Activation, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if a.name == "gelu":
        normal = 0.5 * (1 + torch.erf(x * 0.5**0.5))
        return x * normal, normal + x * torch.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    if a.name == "gelu_tanh":
        c = (2 / math.pi) ** 0.5
        tanh = torch.tanh(c * (x + 0.044715 * x**3))
        inner = c * (1 + 3 * 0.044715 * x * x)
        return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner
    if a.name == "relu":
        return F.relu(x), (x > 0).float()
    if a.name == "relu2":
        return F.relu(x).square(), 2 * F.relu(x)
    sigmoid = torch.sigmoid(a.alpha * x)
    linear, slope = x, torch.ones_like(x)
    if a.gate_softcap is not None:
        tanh = torch.tanh(x / a.gate_softcap)
        linear, slope = a.gate_softcap * tanh, 1 - tanh * tanh
    return linear * sigmoid, slope * sigmoid + linear * a.alpha * sigmoid * (1 - sigmoid)


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
    def gradient_triton(
        gate,  # fp32; the whole input without a gate
        up,  # fp32; not read without a gate
        gradient,  # fp32, of the output
        ACTIVATION: tl.constexpr,  # an `Activation`
    ):
        """`apply_with_gradient` on fp32 registers: the output, and gradients of gate and up."""
        NAME: tl.constexpr = ACTIVATION.name
        GATED: tl.constexpr = ACTIVATION.gated
        ALPHA: tl.constexpr = ACTIVATION.alpha
        UP_SHIFT: tl.constexpr = ACTIVATION.up_shift
        LIMIT: tl.constexpr = ACTIVATION.limit
        LIMIT_AFTER: tl.constexpr = ACTIVATION.limit_after
        GATE_SOFTCAP: tl.constexpr = ACTIVATION.gate_softcap
        UP_SOFTCAP: tl.constexpr = ACTIVATION.up_softcap
        x = gate
        if GATED and LIMIT is not None and not LIMIT_AFTER:
            x = _clamp_max(gate, LIMIT)
        if NAME == "silu":
            sigmoid = tl.sigmoid(ALPHA * x)
            linear = x
            slope = sigmoid
            if GATE_SOFTCAP is not None:
                tanh = _tanh(x / GATE_SOFTCAP)
                linear = GATE_SOFTCAP * tanh
                slope = (1.0 - tanh * tanh) * sigmoid
            out = linear * sigmoid
            slope += out * ALPHA * (1.0 - sigmoid)
        elif NAME == "gelu":
            normal = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
            out = x * normal
            slope = normal + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
        elif NAME == "gelu_tanh":
            tanh = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
            inner = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
            out = 0.5 * x * (1.0 + tanh)
            slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner
        elif NAME == "relu":
            out = _clamp_min_zero(x)
            slope = tl.where(x > 0.0, 1.0, 0.0)
        else:
            tl.static_assert(NAME == "relu2")
            out = _clamp_min_zero(x)
            slope = 2.0 * out
            out = out * out
        of_up = gradient
        if GATED:
            if LIMIT is not None:
                if LIMIT_AFTER:
                    slope = tl.where(out <= LIMIT, slope, 0.0)
                    out = _clamp_max(out, LIMIT)
                else:
                    slope = tl.where(gate <= LIMIT, slope, 0.0)
            of_up = gradient * out
            if LIMIT is not None:
                of_up = tl.where(tl.abs(up) <= LIMIT, of_up, 0.0)
                up = _clamp_max(-_clamp_max(-up, LIMIT), LIMIT)
            if UP_SOFTCAP is not None:
                bent = _tanh(up / UP_SOFTCAP)
                of_up *= 1.0 - bent * bent
                up = UP_SOFTCAP * bent
            up = up + UP_SHIFT
            out = out * up
            gradient = gradient * up
        return out, gradient * slope, of_up

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
