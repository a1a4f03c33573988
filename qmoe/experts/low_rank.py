"""What a LoRA adapter adds to one projection of a layer's experts, without a weight of its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qmoe_kernels import Activation, grouped_linear
from qmoe_kernels.activations import apply, apply_with_gradient
from qmoe_kernels.low_rank import Factors


@dataclass(frozen=True)
class LowRank:
    """A product ``scaling * (out_factor[e] @ in_factor[e])``, added to an expert's weight.

    Attributes:
        projection: which one, by its canonical name (see `qmoe.experts.layout`).
        in_factor: (num_experts, rank, in_features) float.
        out_factor: (num_experts, out_features, rank) float.
        scaling: of the product.
    """

    projection: str
    in_factor: torch.Tensor
    out_factor: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Of the product."""
        return self.in_factor.shape[1]

    @property
    def is_learning(self) -> bool:
        """Whether somebody may ask for a gradient of it."""
        factors = (self.in_factor, self.out_factor)
        return torch.is_grad_enabled() and any(f.requires_grad for f in factors)

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """What is added to the projection's output: two thin products, in the dtype of the rows.

        Args:
            x: (num_tokens, in_features) or (num_tokens, top_k, in_features) bf16 | fp16 | fp32
            topk_ids: (num_tokens, top_k) int; zeros where an id is no expert's.

        Returns:
            (num_tokens, top_k, out_features) in the dtype of ``x``.
        """
        # Cast at each use, as PEFT does: who learns has fp32, and changes it in place.
        in_factor, out_factor = (
            factor.to(x.dtype, memory_format=torch.contiguous_format).contiguous()
            for factor in (self.in_factor, self.out_factor)
        )
        rows = grouped_linear(x, in_factor, None, topk_ids) * self.scaling
        return grouped_linear(rows, out_factor, None, topk_ids)


def combine(adapters: Sequence[LowRank], projection: str) -> Factors | None:
    """All that is added to one projection, as one product of a rank that is the sum of theirs.

    Returns:
        None where there is nothing.
    """
    own = [adapter for adapter in adapters if adapter.projection == projection]
    if not own:
        return None
    if len(own) == 1:
        return Factors(own[0].in_factor, own[0].out_factor, own[0].scaling)
    return Factors(
        torch.cat([adapter.in_factor for adapter in own], dim=1),
        torch.cat([adapter.out_factor * adapter.scaling for adapter in own], dim=2),
        1.0,
    )


def activate(activation: Activation, up: torch.Tensor) -> torch.Tensor:
    """`qmoe_kernels.activations.apply`, which keeps its rows alone for the gradient."""
    return _Activate.apply(up, activation) if up.requires_grad else apply(activation, up)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.activation = activation
        ctx.save_for_backward(up)
        return apply(activation, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (up,) = ctx.saved_tensors
        return apply_with_gradient(ctx.activation, up, gradient)[1].to(up.dtype), None
