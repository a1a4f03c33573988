"""The launches of a layer, in order.

Copies come before the kernels. A kernel that starts early, while the one before it ends, has not
waited for a copy that was made just before it, and may read what the copy is yet to write.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qmoe_kernels.experts import Experts, Projection
from qmoe_kernels.gemv import launch_gemv
from qmoe_kernels.grouped_gemm import launch_grouped_gemm
from qmoe_kernels.heuristic import heuristic_tile, heuristic_tiles, narrow_block
from qmoe_kernels.hopper_gemm import hopper_fused_moe, hopper_supports
from qmoe_kernels.quantization import QuantizedRows
from qmoe_kernels.routing import ExpertRouting
from qmoe_kernels.rows import launch_quantize_rows, launch_weighted_sum
from qmoe_kernels.tiles import LayerTiles
from qmoe_kernels.tuning import choose_tiles


def fused_moe_triton(
    hidden_states: Tensor | QuantizedRows,  # (num_tokens, hidden_size)
    experts: Experts,
    topk_ids: Tensor,  # (num_tokens, top_k)
    topk_weights: Tensor | None,  # (num_tokens, top_k)
    *,
    activations: torch.dtype | None = None,
    two_level_sums: bool = False,
    tiles: LayerTiles | None = None,
) -> Tensor:
    """Run the kernels of `qmoe_kernels.fused_moe`; arguments and result as there, but for these.

    Args:
        activations: int8 or float8_e4m3fn, the dtype of the weights: rows are quantized before
            each product, but for `QuantizedRows`, which are quantized before the second alone;
            None: they stay as they are.
        tiles: instead of `choose_tiles`'s.
    """
    num_tokens, top_k = topk_ids.shape
    shape = experts.layer_shape(top_k)
    dtypes = (experts.gate_up.weight.dtype, activations or hidden_states.dtype)
    if tiles is None:
        tiles = choose_tiles(shape, num_tokens, *dtypes, hidden_states.device)
    experts = experts.contiguous()
    topk_ids = topk_ids.contiguous()
    if isinstance(hidden_states, Tensor):
        hidden_states = hidden_states.contiguous()
    if topk_weights is not None:
        topk_weights = topk_weights.contiguous()
    arguments = (hidden_states, experts, topk_ids, topk_weights)
    if tiles.tma:
        if not two_level_sums and hopper_supports(
            hidden_states, experts, topk_ids, activations=activations
        ):
            return hopper_fused_moe(*arguments, tiles.gate_up, activations=activations)
        tiles = heuristic_tiles(shape, num_tokens, *dtypes)
    if tiles.gate_up.block_m > 1:
        return _by_grouped_gemm(*arguments, tiles, activations, two_level_sums)
    if activations is not None:
        raise ValueError(f"{tiles}: without tensor cores rows stay as they are, not 8 bits")
    assert isinstance(hidden_states, Tensor), "8-bit rows come with activations"
    return _by_gemv(hidden_states, experts, topk_ids, topk_weights, tiles)


def _by_gemv(
    hidden_states: Tensor,
    experts: Experts,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    tiles: LayerTiles,
) -> Tensor:
    """Two launches; the second one sums over a token's experts."""
    num_tokens, top_k = topk_ids.shape
    # Slots were changed by a kernel that is still ending, or by nobody: see `paging.admit`.
    paged = experts.gate_up.expert_to_slot is not None
    hidden = hidden_states.new_empty(num_tokens * top_k, experts.intermediate_size)
    launch_gemv(
        hidden_states,
        experts.gate_up,
        topk_ids,
        hidden,
        tiles.gate_up,
        activation=experts.activation,
        next_weight=experts.down.weight,
        dependent=paged,
        wait_first=paged,
    )
    summed = topk_weights is not None
    num_rows = num_tokens if summed else num_tokens * top_k
    out = hidden_states.new_empty(num_rows, experts.hidden_size)
    launch_gemv(
        hidden,
        experts.down,
        topk_ids,
        out,
        tiles.down,
        topk_weights=topk_weights,
        per_pair=True,
    )
    return out if summed else out.view(num_tokens, top_k, experts.hidden_size)


def _by_grouped_gemm(
    hidden_states: Tensor | QuantizedRows,
    experts: Experts,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    tiles: LayerTiles,
    activations: torch.dtype | None,
    two_level_sums: bool,
) -> Tensor:
    """Both products by tensor cores, rows quantized before each of them if they are to be."""
    num_tokens, top_k = topk_ids.shape
    num_pairs = num_tokens * top_k
    like: Any = {"dtype": hidden_states.dtype, "device": hidden_states.device}
    hidden = torch.empty(num_pairs, experts.intermediate_size, **like)
    # Rows of skipped ids are written by nobody: zeros if the caller sees them, never read
    # otherwise. Before the kernels, each of which starts while the one before it ends.
    new_rows = torch.zeros if topk_weights is None else torch.empty
    out = new_rows(num_pairs, experts.hidden_size, **like)
    routing = None
    if tiles.sort:
        routing = ExpertRouting.from_topk_ids(
            topk_ids,
            experts.num_experts,
            block_m=tiles.gate_up.block_m,
            expert_to_slot=experts.gate_up.expert_to_slot,
        )
    x, x_scale = _rows_of_product(hidden_states, activations, tiles.sort)
    launch_grouped_gemm(
        x,
        experts.gate_up,
        topk_ids,
        routing,
        hidden,
        tiles.gate_up,
        x_scale=x_scale,
        activation=experts.activation,
        two_level_sums=two_level_sums,
        pairs_per_row=top_k,
    )
    x_scale = None
    if activations is not None:
        hidden, x_scale = launch_quantize_rows(hidden, activations, dependent=True)
    rows = launch_grouped_gemm(
        hidden,
        experts.down,
        topk_ids,
        routing,
        out,
        tiles.down,
        x_scale=x_scale,
        two_level_sums=two_level_sums,
        scatter=tiles.sort,
        prefetch=tiles.down.block_m <= 32,
    ).view(num_tokens, top_k, experts.hidden_size)
    if topk_weights is None:
        return rows
    return launch_weighted_sum(rows, topk_weights, topk_ids, experts.num_experts, dependent=True)


def _rows_of_product(
    x: Tensor | QuantizedRows, activations: torch.dtype | None, dependent: bool
) -> tuple[Tensor, Tensor | None]:
    """Rows as the first product takes them, and their scales if they are in 8 bits."""
    if isinstance(x, QuantizedRows):
        return x.q, x.scale
    if activations is None:
        return x, None
    return launch_quantize_rows(x, activations, dependent=dependent, early=True)


def grouped_linear_triton(
    x: Tensor | QuantizedRows,
    projection: Projection,
    topk_ids: Tensor,
    *,
    activations: torch.dtype | None = None,
) -> Tensor:
    """Run the kernel of `qmoe_kernels.grouped_linear`; ``activations`` as in `fused_moe_triton`."""
    num_tokens, top_k = topk_ids.shape
    num_pairs = num_tokens * top_k
    out = torch.zeros(num_pairs, projection.weight.shape[1], dtype=x.dtype, device=x.device)
    pairs_per_row = top_k if len(x.shape) == 2 else 1
    projection, topk_ids = projection.contiguous(), topk_ids.contiguous()
    if isinstance(x, Tensor):
        x = x.flatten(0, -2).contiguous()
    rows_dtype = activations or x.dtype
    num_experts = projection.num_experts
    tile = heuristic_tile(num_pairs / num_experts, projection.weight.dtype, rows_dtype)
    if projection.scale is None:  # 8-bit weights are widened four at a time
        _, out_features, in_features = projection.weight.shape
        tile = replace(
            tile,
            block_n=narrow_block(tile.block_n, out_features),
            block_k=narrow_block(tile.block_k, in_features),
        )
    routing = ExpertRouting.from_topk_ids(
        topk_ids,
        num_experts,
        block_m=tile.block_m,
        expert_to_slot=projection.expert_to_slot,
    )
    rows, x_scale = _rows_of_product(x, activations, True)
    rows = launch_grouped_gemm(
        rows,
        projection,
        topk_ids,
        routing,
        out,
        tile,
        x_scale=x_scale,
        pairs_per_row=pairs_per_row,
        scatter=True,
    )
    return rows.view(num_tokens, top_k, projection.weight.shape[1])
