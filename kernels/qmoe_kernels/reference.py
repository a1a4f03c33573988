"""The plain loop over tokens and experts, in fp64: what everything else is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qmoe_kernels import activations
from qmoe_kernels.activations import SWIGLU, Activation
from qmoe_kernels.quantization import dequantize


def fused_moe_reference(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_proj_scale: torch.Tensor | None,
    down_proj: torch.Tensor,
    down_proj_scale: torch.Tensor | None,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    *,
    activation: Activation | Callable[[torch.Tensor], torch.Tensor] = SWIGLU,
    gate_up_proj_bias: torch.Tensor | None = None,
    down_proj_bias: torch.Tensor | None = None,
    expert_to_slot: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute what `qmoe_kernels.fused_moe` does, in fp64 but for the activation (fp32).

    Returns:
        (num_tokens, hidden_size), or (num_tokens, top_k, hidden_size) without ``topk_weights``;
        fp64.
    """
    num_tokens, top_k = topk_ids.shape
    per_expert = next(
        (t for t in (gate_up_proj_scale, expert_to_slot) if t is not None), gate_up_proj
    )
    num_experts = per_expert.shape[0]
    rows = hidden_states.new_zeros(num_tokens, top_k, down_proj.shape[1], dtype=torch.float64)
    for token in range(num_tokens):
        for k, expert in enumerate(topk_ids[token].tolist()):
            if not 0 <= expert < num_experts:
                continue
            slot = expert if expert_to_slot is None else int(expert_to_slot[expert])
            x = hidden_states[token].double()
            gate_up = _linear(x, gate_up_proj[slot], gate_up_proj_scale, gate_up_proj_bias, expert)
            if isinstance(activation, Activation):
                hidden = activations.apply(activation, gate_up.float())
            else:
                hidden = activation(gate_up.float())
            rows[token, k] = _linear(
                hidden.double(), down_proj[slot], down_proj_scale, down_proj_bias, expert
            )
    if topk_weights is None:
        return rows
    return (rows * topk_weights.double().unsqueeze(-1)).sum(1)


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    expert: int,
) -> torch.Tensor:
    weight = weight.double() if scale is None else dequantize(weight, scale[expert], torch.float64)
    y = weight @ x
    return y if bias is None else y + bias[expert].double()
