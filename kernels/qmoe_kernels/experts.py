"""What a layer's kernels are given of its experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from qmoe_kernels.activations import Activation
from qmoe_kernels.tiles import LayerShape


@dataclass(frozen=True)
class Projection:
    """What the rows of every expert are multiplied by in one of a layer's two products.

    Attributes:
        weight: (num_slots, out_features, in_features) int8 | e4m3fn | float, in_features
            contiguous; other strides are free.
        scale: (num_experts, out_features) fp32, of 8-bit weights.
        bias: (num_experts, out_features) float.
        expert_to_slot: (num_experts,) int32; None: an expert's slot has its number.
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    expert_to_slot: Tensor | None = None

    @property
    def num_experts(self) -> int:
        for per_expert in (self.scale, self.expert_to_slot):
            if per_expert is not None:
                return per_expert.shape[0]
        return self.weight.shape[0]

    def contiguous(self) -> Projection:
        """Copy what kernels index without strides, if it has some: all but the weight.

        Before a layer's first kernel: one that starts early does not wait for a copy, if that is
        what runs just before it.
        """
        scale, bias, slots = (
            None if t is None else t.contiguous()
            for t in (self.scale, self.bias, self.expert_to_slot)
        )
        return replace(self, scale=scale, bias=bias, expert_to_slot=slots)


@dataclass(frozen=True)
class Experts:
    """All experts of a layer: ``down(activation(gate_up(x)))``."""

    gate_up: Projection
    down: Projection
    activation: Activation

    @property
    def num_experts(self) -> int:
        return self.gate_up.num_experts

    @property
    def hidden_size(self) -> int:
        return self.down.weight.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.gate_up.weight.shape[1] // (2 if self.activation.gated else 1)

    def layer_shape(self, top_k: int) -> LayerShape:
        """What tiles are chosen by."""
        sizes = (self.num_experts, top_k, self.hidden_size, self.intermediate_size)
        return LayerShape(*sizes, self.activation.gated)

    def contiguous(self) -> Experts:
        """See `Projection.contiguous`."""
        return replace(self, gate_up=self.gate_up.contiguous(), down=self.down.contiguous())
