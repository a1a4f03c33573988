"""The launches of a layer, in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qmoe_kernels.activations import Activation
from qmoe_kernels.gemv import launch_gemv
from qmoe_kernels.grouped_gemm import launch_grouped_gemm
from qmoe_kernels.heuristic import heuristic_tile, heuristic_tiles
from qmoe_kernels.hopper_gemm import hopper_fused_moe, hopper_supports
from qmoe_kernels.routing import ExpertRouting
from qmoe_kernels.rows import launch_quantize_rows, launch_weighted_sum
from qmoe_kernels.tiles import LayerShape, LayerTiles
from qmoe_kernels.tuning import choose_tiles


def fused_moe_triton(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_proj_scale: torch.Tensor | None,
    gate_up_proj_bias: torch.Tensor | None,
    down_proj: torch.Tensor,
    down_proj_scale: torch.Tensor | None,
    down_proj_bias: torch.Tensor | None,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    expert_to_slot: torch.Tensor | None,
    activation: Activation,
    num_experts: int,
    *,
    activations: torch.dtype | None = None,
    two_level_sums: bool = False,
    tiles: LayerTiles | None = None,
) -> torch.Tensor:
    """Run the kernels of `qmoe_kernels.fused_moe`; arguments and result as there, but for these.

    Args:
        activations: int8 or float8_e4m3fn, the dtype of the weights: rows are quantized before
            each product; None: they stay as they are.
        tiles: instead of `choose_tiles`'s.
    """
    num_tokens, top_k = topk_ids.shape
    num_pairs = num_tokens * top_k
    hidden_size = down_proj.shape[1]
    intermediate_size = gate_up_proj.shape[1] // (2 if activation.gated else 1)
    shape = LayerShape(num_experts, top_k, hidden_size, intermediate_size, activation.gated)
    x_dtype = activations or hidden_states.dtype
    if tiles is None:
        tiles = choose_tiles(shape, num_tokens, gate_up_proj.dtype, x_dtype, hidden_states.device)
    hidden_states, topk_ids, topk_weights, expert_to_slot = _contiguous(
        hidden_states, topk_ids, topk_weights, expert_to_slot
    )
    gate_up_proj_scale, gate_up_proj_bias, down_proj_scale, down_proj_bias = _contiguous(
        gate_up_proj_scale, gate_up_proj_bias, down_proj_scale, down_proj_bias
    )
    if tiles.tma:
        weights = (gate_up_proj, gate_up_proj_scale, down_proj, down_proj_scale)
        if not two_level_sums and hopper_supports(
            hidden_states, *weights, topk_ids, activation, num_experts, activations=activations
        ):
            return hopper_fused_moe(
                hidden_states,
                gate_up_proj,
                gate_up_proj_scale,
                gate_up_proj_bias,
                down_proj,
                down_proj_scale,
                down_proj_bias,
                topk_ids,
                topk_weights,
                expert_to_slot,
                activation,
                num_experts,
                activations=activations,
                block_m=tiles.gate_up.block_m,
                num_stages=tiles.gate_up.num_stages,
            )
        tiles = heuristic_tiles(shape, num_tokens, gate_up_proj.dtype, x_dtype)
    hidden = hidden_states.new_empty(num_pairs, intermediate_size)
    if tiles.gate_up.block_m == 1:
        if activations is not None:
            raise ValueError(f"{tiles}: without tensor cores rows stay as they are, not 8 bits")
        launch_gemv(
            hidden_states,
            gate_up_proj,
            gate_up_proj_scale,
            gate_up_proj_bias,
            topk_ids,
            None,
            num_experts,
            expert_to_slot,
            hidden,
            tiles.gate_up,
            activation=activation,
            next_weight=down_proj,
            dependent=False,
        )
        summed = topk_weights is not None
        out_rows = num_tokens if summed else num_pairs
        new_rows = hidden_states.new_empty if summed else hidden_states.new_zeros
        out = launch_gemv(
            hidden,
            down_proj,
            down_proj_scale,
            down_proj_bias,
            topk_ids,
            topk_weights,
            num_experts,
            expert_to_slot,
            new_rows(out_rows, hidden_size),
            tiles.down,
            per_pair=True,
            dependent=summed,
        )
        return out if summed else out.view(num_tokens, top_k, hidden_size)

    # Rows of skipped ids are written by nobody: zeros if the caller sees them, never read
    # otherwise. Before the kernels, each of which starts while the one before it ends.
    new_rows = hidden_states.new_zeros if topk_weights is None else hidden_states.new_empty
    out = new_rows(num_pairs, hidden_size)
    routing = ExpertRouting.from_topk_ids(topk_ids, num_experts) if tiles.sort else None
    x, x_scale = hidden_states, None
    if activations is not None:
        x, x_scale = launch_quantize_rows(x, activations, dependent=tiles.sort, early=True)
    launch_grouped_gemm(
        x,
        gate_up_proj,
        gate_up_proj_scale,
        gate_up_proj_bias,
        topk_ids,
        num_experts,
        routing,
        expert_to_slot,
        hidden,
        tiles.gate_up,
        x_scale=x_scale,
        activation=activation,
        two_level_sums=two_level_sums,
        pairs_per_row=top_k,
    )
    x_scale = None
    if activations is not None:
        hidden, x_scale = launch_quantize_rows(hidden, activations, dependent=True)
    rows = launch_grouped_gemm(
        hidden,
        down_proj,
        down_proj_scale,
        down_proj_bias,
        topk_ids,
        num_experts,
        routing,
        expert_to_slot,
        out,
        tiles.down,
        x_scale=x_scale,
        two_level_sums=two_level_sums,
        scatter=tiles.sort,
        prefetch=tiles.down.block_m <= 32,
    ).view(num_tokens, top_k, hidden_size)
    if topk_weights is None:
        return rows
    return launch_weighted_sum(rows, topk_weights, topk_ids, num_experts, dependent=True)


def _contiguous(*tensors: torch.Tensor | None) -> Iterator[Any]:
    """Copy what kernels index without strides, if it has some.

    Before the first kernel: one that starts early does not wait for a copy, if that is what runs
    just before it.
    """
    return (None if t is None else t.contiguous() for t in tensors)


def grouped_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    topk_ids: torch.Tensor,
    expert_to_slot: torch.Tensor | None,
    num_experts: int,
    *,
    activations: torch.dtype | None = None,
) -> torch.Tensor:
    """Run the kernel of `qmoe_kernels.grouped_linear`; ``activations`` as in `fused_moe_triton`."""
    num_tokens, top_k = topk_ids.shape
    num_pairs = num_tokens * top_k
    out = x.new_zeros(num_pairs, weight.shape[1])
    pairs_per_row = top_k if x.ndim == 2 else 1
    x, topk_ids, expert_to_slot, scale, bias = _contiguous(
        x.flatten(0, -2), topk_ids, expert_to_slot, scale, bias
    )
    x_scale = None
    routing = ExpertRouting.from_topk_ids(topk_ids, num_experts)
    if activations is not None:
        x, x_scale = launch_quantize_rows(x, activations, dependent=True, early=True)
    rows = launch_grouped_gemm(
        x,
        weight,
        scale,
        bias,
        topk_ids,
        num_experts,
        routing,
        expert_to_slot,
        out,
        heuristic_tile(num_pairs / num_experts, weight.dtype, x.dtype),
        x_scale=x_scale,
        pairs_per_row=pairs_per_row,
        scatter=True,
    )
    return rows.view(num_tokens, top_k, weight.shape[1])
