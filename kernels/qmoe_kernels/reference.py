"""The plain loop over tokens and experts, in fp64: what everything else is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qmoe_kernels import activations as _activations
from qmoe_kernels.activations import SWIGLU, Activation
from qmoe_kernels.quantization import WeightFormat, dequantize, quantize_rows


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
    activations: WeightFormat | None = None,
) -> torch.Tensor:
    """Compute what `qmoe_kernels.fused_moe` does, in fp64 but for an `Activation` (fp32).

    Args:
        activations: what rows are quantized to before each product; None: nothing.

    Returns:
        (num_tokens, hidden_size), or (num_tokens, top_k, hidden_size) without ``topk_weights``;
        fp64.
    """
    gate_up = grouped_linear_reference(
        hidden_states,
        gate_up_proj,
        gate_up_proj_scale,
        topk_ids,
        bias=gate_up_proj_bias,
        expert_to_slot=expert_to_slot,
        activations=activations,
    )
    if isinstance(activation, Activation):
        hidden = _activations.apply(activation, gate_up)
    else:
        hidden = activation(gate_up)
    rows = grouped_linear_reference(
        hidden,
        down_proj,
        down_proj_scale,
        topk_ids,
        bias=down_proj_bias,
        expert_to_slot=expert_to_slot,
        activations=activations,
    )
    if topk_weights is None:
        return rows
    per_expert = (down_proj_scale, expert_to_slot, down_proj)
    num_experts = next(t.shape[0] for t in per_expert if t is not None)
    skipped = (topk_ids < 0) | (topk_ids >= num_experts)
    weights = topk_weights.double().masked_fill(skipped, 0.0)  # NaN times zero would be NaN
    return (rows * weights.unsqueeze(-1)).sum(1)


def grouped_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    topk_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    expert_to_slot: torch.Tensor | None = None,
    activations: WeightFormat | None = None,
) -> torch.Tensor:
    """Compute what `qmoe_kernels.grouped_linear` does; ``activations`` as above.

    Returns:
        (num_tokens, top_k, out_features) fp64.
    """
    per_expert = next((t for t in (scale, expert_to_slot) if t is not None), weight)
    num_experts = per_expert.shape[0]
    if activations is not None:
        x = dequantize(*quantize_rows(x, activations), torch.float64)
    rows = x.new_zeros(*topk_ids.shape, weight.shape[1], dtype=torch.float64)
    for token, ids in enumerate(topk_ids.tolist()):
        for k, expert in enumerate(ids):
            if not 0 <= expert < num_experts:
                continue
            w = weight[expert if expert_to_slot is None else int(expert_to_slot[expert])]
            w = w.double() if scale is None else dequantize(w, scale[expert], torch.float64)
            y = w @ (x[token] if x.ndim == 2 else x[token, k]).double()
            rows[token, k] = y if bias is None else y + bias[expert].double()
    return rows
