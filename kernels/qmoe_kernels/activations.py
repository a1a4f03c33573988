"""What an expert computes between its two products: the gate variants, in torch and in Triton.

A gated expert has rows ``gate`` and ``up``; all of the variants in use are one formula:

    gate' = min(gate, limit)                up' = clamp(up, -limit, limit)        (limit_after=False)
    out   = f(gate') * (cap(up') + up_shift)

with ``f`` one of the named functions, ``silu(x) = x * sigmoid(alpha * x)``.  Variants:

- ``limit_after``: the gate's limit bounds ``f(gate)`` rather than ``gate`` (Step 3.7).
- ``gate_softcap``, ``up_softcap``: ``cap(x) = c * tanh(x / c)`` replaces the linear factor of silu's
  ``x * sigmoid(x)``, and ``up`` (Inkling 2).
- an expert without a gate computes ``f(up)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Activation:
    """One expert's nonlinearity; hashable, comparable, without tensors."""

    name: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    gated: bool = True
    alpha: float = 1.0
    up_shift: float = 0.0
    limit: float | None = None
    limit_after: bool = False
    gate_softcap: float | None = None
    up_softcap: float | None = None
