"""The kernels of `gradients`: products with transposed weights, and what lies between them.

All rows are in the order of sorted pairs (see `ExpertRouting`) until the last product scatters
them. An 8-bit weight is read as it lies and widened on its way to the tensor cores; its scales,
which belong to what is summed over here, have been multiplied into the rows: over the largest of
their expert, since in fp16 they would vanish, which the sums are multiplied by. On Hopper products
are those of `qmoe_kernels.hopper_gemm`, as in the forward pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from qmoe_kernels.activations import gradient_triton
from qmoe_kernels.experts import Experts, Projection
from qmoe_kernels.grouped_gemm import GROUP_M, launch_grouped_gemm
from qmoe_kernels.heuristic import heuristic_tile, narrow_block
from qmoe_kernels.hopper_gemm import hopper_supports, launch_hopper_gemm, launch_sort_rows
from qmoe_kernels.launching import COMPILED, is_widened_fp8, weight_bits
from qmoe_kernels.routing import ExpertRouting
from qmoe_kernels.rows import launch_quantize_rows, launch_weighted_sum
from qmoe_kernels.tiles import LayerTiles, TileConfig
from qmoe_kernels.tuning import choose_tiles
from qmoe_kernels.widening import widen_weights

# An expert's largest scale is taken to be no smaller, so that zeros have an inverse.
SMALLEST_LARGEST = tl.constexpr(torch.finfo(torch.float32).tiny)


def fused_moe_backward_triton(
    gradient: Tensor,  # (num_tokens, hidden_size), or (num_tokens, top_k, hidden_size)
    hidden_states: Tensor,  # (num_tokens, hidden_size)
    experts: Experts,
    topk_ids: Tensor,  # (num_tokens, top_k)
    topk_weights: Tensor | None,  # (num_tokens, top_k)
    *,
    tiles: LayerTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernels of `qmoe::fused_moe_backward`; arguments and result as there.

    Args:
        tiles: what the forward pass would run with, instead of `choose_tiles`'s. Where it is
            Hopper's kernels (``tma``), so it is here, for all three products, with the same tile.
    """
    num_tokens, top_k = topk_ids.shape
    num_experts, hidden_size = experts.num_experts, experts.hidden_size
    # Copies before kernels: see `qmoe_kernels.layer`.
    experts, hidden_states = experts.contiguous(), hidden_states.contiguous()
    gate_up, down = experts.gate_up, experts.down
    topk_ids, gradient = topk_ids.contiguous(), gradient.contiguous()
    largest_up, largest_down = largest_scale(gate_up), largest_scale(down)
    hopper_tile = choose_hopper_tile(hidden_states, experts, topk_ids, tiles)
    tile = hopper_tile or sorted_tile(topk_ids, gate_up, hidden_states.dtype)
    routing = ExpertRouting.from_topk_ids(topk_ids, num_experts, block_m=tile.block_m)

    up_rows = launch_up(hidden_states, gate_up, topk_ids, routing, tile, hopper_tile is not None)
    # Of a token's weight; the down bias counts for it as well.
    of_weights = gradient.new_empty(num_tokens, top_k, dtype=torch.float32)
    rows = launch_scale_rows(
        gradient.flatten(0, -2),
        down,
        largest_down,
        topk_ids,
        routing,
        1 if gradient.ndim == 3 else top_k,
        None if topk_weights is None else of_weights,
    )
    rows = launch_transposed(rows, down, largest_down, routing, hopper_tile)
    rows = launch_activation_gradient(
        up_rows,
        rows,
        experts,
        largest_up,
        topk_ids,
        topk_weights,
        routing,
        None if topk_weights is None else of_weights,
    )
    del up_rows  # room for what follows
    rows = launch_transposed(rows, gate_up, largest_up, routing, hopper_tile, scatter=True)
    of_hidden = launch_weighted_sum(
        rows.view(num_tokens, top_k, hidden_size),
        None,
        topk_ids,
        num_experts,
        dependent=hopper_tile is not None,
    )
    if topk_weights is None:
        return of_hidden, of_weights.new_empty(0)
    return of_hidden, of_weights.to(topk_weights.dtype)


def grouped_linear_backward_triton(
    gradient: Tensor,  # (num_tokens, top_k, out_features)
    x: Tensor | None,  # (num_tokens, in_features), or (num_tokens, top_k, in_features)
    projection: Projection,
    topk_ids: Tensor,  # (num_tokens, top_k)
    per_pair: bool,
    of_x: bool,
) -> tuple[Tensor, Tensor]:
    """Run the kernels of `qmoe::grouped_linear_backward`; arguments and result as there."""
    num_tokens, top_k = topk_ids.shape
    projection, topk_ids = projection.contiguous(), topk_ids.contiguous()
    weight, flat = projection.weight, gradient.contiguous().flatten(0, 1)
    tile = sorted_tile(topk_ids, projection, gradient.dtype)
    routing = ExpertRouting.from_topk_ids(topk_ids, projection.num_experts, block_m=tile.block_m)
    of_rows, of_weight = flat.new_empty(0, weight.shape[2]), weight.new_empty(0)
    if x is not None:
        x = x.contiguous().flatten(0, -2)
        of_weight = launch_weight_gradient(flat, x, weight, routing, 1 if per_pair else top_k)
    if of_x:
        largest = largest_scale(projection)
        if largest is not None:
            flat = launch_scale_rows(flat, projection, largest, topk_ids, routing, 1)
        of_rows = launch_transposed_gemm(
            flat,
            projection,
            largest,
            routing,
            gather=largest is None,
            scatter=True,
            fill=per_pair,
        ).view(num_tokens, top_k, weight.shape[2])
        if not per_pair:
            of_rows = launch_weighted_sum(of_rows, None, topk_ids, projection.num_experts)
    return of_rows, of_weight


def largest_scale(projection: Projection) -> Tensor | None:
    """(num_experts,) fp32: the largest scale of each expert; None without scales."""
    if projection.scale is None:
        return None
    return torch.linalg.vector_norm(projection.scale, torch.inf, dim=1)


def choose_hopper_tile(
    hidden_states: Tensor,
    experts: Experts,
    topk_ids: Tensor,
    tiles: LayerTiles | None,
    activations: torch.dtype | None = None,
) -> TileConfig | None:
    """The tile of Hopper's kernels, where they are to be taken and can be.

    Args:
        activations: what rows are quantized to, or None.
    """
    if tiles is None:
        num_tokens, top_k = topk_ids.shape
        shape = experts.layer_shape(top_k)
        dtypes = (experts.gate_up.weight.dtype, activations or hidden_states.dtype)
        tiles = choose_tiles(shape, num_tokens, *dtypes, hidden_states.device)
    if tiles.tma and hopper_supports(hidden_states, experts, topk_ids, activations=activations):
        return tiles.gate_up
    return None


def sorted_tile(topk_ids: Tensor, projection: Projection, dtype: torch.dtype) -> TileConfig:
    """A tile for sorted pairs elsewhere, of at least 16 rows: tensor cores have no fewer."""
    rows = topk_ids.numel() / projection.num_experts
    tile = heuristic_tile(rows, projection.weight.dtype, dtype)
    return replace(tile, block_m=max(16, tile.block_m))


def launch_up(
    hidden_states: Tensor,  # (num_tokens, hidden_size)
    gate_up: Projection,
    topk_ids: Tensor,
    routing: ExpertRouting,
    tile: TileConfig,
    hopper: bool,
    activations: torch.dtype | None = None,
) -> Tensor:
    """What goes into the activation, (num_pairs, channels) by sorted pairs.

    For the place after the launches of ``routing``.

    Args:
        hopper: take `qmoe_kernels.hopper_gemm`, where `hopper_supports` the layer.
        activations: what rows are quantized to before, or None.
    """
    top_k, channels = topk_ids.shape[1], gate_up.weight.shape[1]
    x, x_scale = hidden_states, None
    out = x.new_empty(topk_ids.numel(), channels)
    if not hopper:
        if activations is not None:
            x, x_scale = launch_quantize_rows(x, activations, dependent=True, early=True)
        return launch_grouped_gemm(
            x, gate_up, topk_ids, routing, out, tile, x_scale=x_scale, pairs_per_row=top_k
        )
    assert routing.tiles is not None and routing.positions is not None
    if activations is None:
        widen = gate_up.weight.itemsize == 1
        x = launch_sort_rows(x, routing.positions, top_k, permute=widen)
    else:
        x, x_scale = launch_quantize_rows(
            x, activations, places=routing.positions, dependent=True, early=True
        )
    return launch_hopper_gemm(
        x, gate_up, routing, routing.tiles, out, tile, out_features=channels, x_scale=x_scale
    )


def launch_transposed(
    x: Tensor,  # (num_pairs, out_features), by sorted pairs, relative scales multiplied in
    projection: Projection,
    largest: Tensor | None,
    routing: ExpertRouting,
    hopper_tile: TileConfig | None,
    *,
    scatter: bool = False,
) -> Tensor:
    """Do what `launch_transposed_gemm` does, with Hopper's kernel where there is a tile for it."""
    if hopper_tile is None:
        return launch_transposed_gemm(x, projection, largest, routing, scatter=scatter)
    assert routing.tiles is not None
    in_features = projection.weight.shape[2]
    return launch_hopper_gemm(
        x,
        projection,
        routing,
        routing.tiles,
        x.new_empty(x.shape[0], in_features),
        hopper_tile,
        out_features=in_features,
        scatter=scatter,
        transposed=True,
        expert_scale=largest,
    )


# ---- products ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["max_tiles_m"])
def transposed_gemm_kernel(
    x_ptr,  # (num_pairs, N), by sorted pairs, or by pairs if GATHER
    weight_ptr,  # (num_slots, N, K)
    out_ptr,  # (num_pairs, K)
    ids_ptr,  # (num_pairs,) int32, sorted pairs
    tiles_ptr,  # (max_tiles_m + 1, 4) int32, see ExpertRouting
    largest_ptr,  # (num_experts,) fp32, or None
    max_tiles_m,
    N,
    K,
    stride_weight_slot,
    stride_weight_n,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    FP8: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # along the sum
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out = x @ W for each expert's rows.

    Grid: (min(GROUP_M, max_tiles_m) * cdiv(K, BLOCK_K), cdiv(max_tiles_m, GROUP_M)).
    """
    group_m = tl.minimum(max_tiles_m - tl.program_id(1) * GROUP_M, GROUP_M)
    tile_m = tl.program_id(0) % group_m + tl.program_id(1) * GROUP_M
    tile_k = tl.program_id(0) // group_m
    if tile_k * BLOCK_K >= K:  # of a last group that is smaller
        return
    num_rows = tl.load(tiles_ptr + 4 * tile_m + 3)
    if num_rows <= 0:
        return
    slot = tl.load(tiles_ptr + 4 * tile_m + 1).to(tl.int64)
    first = tl.load(tiles_ptr + 4 * tile_m + 2)
    order = tl.arange(0, BLOCK_M)
    rows = first + tl.minimum(order, num_rows - 1)
    channels = tl.arange(0, BLOCK_N)
    columns = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = columns < K
    x_rows = rows
    if GATHER:
        x_rows = tl.load(ids_ptr + rows)
    # int64: rows times their length pass 2**31.
    x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * N + channels[None, :]
    weight_ptrs = weight_ptr + slot * stride_weight_slot
    weight_ptrs += channels.to(tl.int64)[:, None] * stride_weight_n + columns[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        left = channels < N - n
        x = tl.load(x_ptrs, mask=left[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=left[:, None] & inside[None, :], other=0)
        weight = widen_weights(weight, x.dtype, FP8, ASM)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        x_ptrs += BLOCK_N
        weight_ptrs += BLOCK_N * stride_weight_n
    if largest_ptr is not None:
        largest = tl.load(largest_ptr + tl.load(tiles_ptr + 4 * tile_m))
        if FP8:
            largest *= 256.0  # what widen_weights left out
        acc = acc * largest
    if SCATTER:
        rows = tl.load(ids_ptr + rows)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :]
    mask = (order < num_rows)[:, None] & inside[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch_transposed_gemm(
    x: Tensor,  # (num_pairs, out_features), relative scales multiplied in
    projection: Projection,
    largest: Tensor | None,
    routing: ExpertRouting,
    *,
    gather: bool = False,
    scatter: bool = False,
    fill: bool = False,
) -> Tensor:
    """Multiply rows by their experts' transposed weights.

    Args:
        largest: see `largest_scale`.
        routing: with tiles.
        gather: rows of ``x`` are in the order of pairs instead of the sorted order.
        scatter: write in the order of pairs instead of the sorted order.
        fill: write zeros for pairs without an expert, whose rows are anything otherwise.

    Returns:
        (num_pairs, in_features) in the dtype of ``x``.
    """
    weight = projection.weight
    _, out_features, in_features = weight.shape
    new = x.new_zeros if fill else x.new_empty
    out = new(x.shape[0], in_features)
    assert routing.tiles is not None and routing.block_m is not None
    max_tiles_m, block_m = routing.tiles.shape[0] - 1, routing.block_m
    if out.numel() == 0:
        return out
    if x.dtype == torch.float32:
        block_n, block_k, num_warps = 32, 64, 8
    else:
        block_n, block_k, num_warps = 64, 128, 8 if block_m > 64 else 4
    if projection.scale is None:  # 8-bit weights are widened four at a time
        block_n, block_k = narrow_block(block_n, out_features), narrow_block(block_k, in_features)
    grid = (
        min(GROUP_M, max_tiles_m) * triton.cdiv(in_features, block_k),
        triton.cdiv(max_tiles_m, GROUP_M),
    )
    transposed_gemm_kernel[grid](
        x,
        weight_bits(weight, x),
        out,
        routing.sorted_pair_ids,
        routing.tiles,
        largest,
        max_tiles_m,
        out_features,
        in_features,
        weight.stride(0),
        weight.stride(1),
        GATHER=gather,
        SCATTER=scatter,
        FP8=is_widened_fp8(weight, x),
        ASM=COMPILED,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=GROUP_M,
        num_warps=num_warps,
        num_stages=2 if x.dtype == torch.float32 else 3,
    )
    return out


@triton.jit
def weight_gradient_kernel(
    gradient_ptr,  # (num_pairs, N)
    x_ptr,  # (num_pairs / PAIRS_PER_ROW, K), or (num_pairs, K) by sorted pairs
    out_ptr,  # (num_experts, N, K)
    sorted_ptr,  # (num_pairs,) int32
    offsets_ptr,  # (num_experts + 1,) int32
    N,
    K,
    SORTED: tl.constexpr,  # gradients are by sorted pairs
    PAIRS_PER_ROW: tl.constexpr,  # 0: rows of x are by sorted pairs
    BLOCK_PAIRS: tl.constexpr,  # along the sum
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (cdiv(N, BLOCK_N) * cdiv(K, BLOCK_K), num_experts). out[e] = gradient_e^T @ x_e."""
    expert = tl.program_id(1)
    tiles_k = tl.cdiv(K, BLOCK_K)
    channels = tl.program_id(0) // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    is_channel, is_column = channels < N, columns < K
    first = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    order = tl.arange(0, BLOCK_PAIRS)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(first, end, BLOCK_PAIRS):
        inside = order < end - start
        # int64: pairs times their rows' length pass 2**31.
        positions = (start + order).to(tl.int64)
        pairs = tl.load(sorted_ptr + positions, mask=inside, other=0).to(tl.int64)
        gradient_rows = pairs
        if SORTED:
            gradient_rows = positions
        x_rows = positions
        if PAIRS_PER_ROW > 0:
            x_rows = pairs // PAIRS_PER_ROW
        gradient = tl.load(
            gradient_ptr + gradient_rows[None, :] * N + channels[:, None],
            mask=inside[None, :] & is_channel[:, None],
            other=0.0,
        )
        x = tl.load(
            x_ptr + x_rows[:, None] * K + columns[None, :],
            mask=inside[:, None] & is_column[None, :],
            other=0.0,
        )
        acc = tl.dot(gradient, x, acc, input_precision="ieee")
    out_ptrs = out_ptr + expert.to(tl.int64) * N * K + channels.to(tl.int64)[:, None] * K
    mask = is_channel[:, None] & is_column[None, :]
    tl.store(out_ptrs + columns[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch_weight_gradient(
    gradient: Tensor,  # (num_pairs, out_features)
    x: Tensor,  # (num_pairs / pairs_per_row, in_features)
    weight: Tensor,  # (num_experts, out_features, in_features)
    routing: ExpertRouting,
    pairs_per_row: int | None,
    *,
    sorted_gradient: bool = False,
) -> Tensor:
    """Sum each expert's outer products of gradients and rows, zeros for one without pairs.

    Args:
        weight: for its shape and dtype.
        pairs_per_row: row ``pair // pairs_per_row`` of ``x`` belongs to a pair; None says that
            rows of ``x`` are in the order of sorted pairs.
        sorted_gradient: ``gradient`` is in that order, too, rather than in the order of pairs.

    Returns:
        (num_experts, out_features, in_features) in the dtype of ``weight``.
    """
    num_experts, out_features, in_features = weight.shape
    out = weight.new_empty(num_experts, out_features, in_features)
    if out.numel() == 0:
        return out
    most, block_pairs = (64, 16) if x.dtype == torch.float32 else (128, 32)
    block_n, block_k = narrow_block(most, out_features), narrow_block(most, in_features)
    if block_n + block_k <= 160:  # thin: nothing but reading takes time
        block_pairs *= 2
    tiles = triton.cdiv(out_features, block_n) * triton.cdiv(in_features, block_k)
    weight_gradient_kernel[(tiles, num_experts)](
        gradient,
        x,
        out,
        routing.sorted_pair_ids,
        routing.expert_offsets,
        out_features,
        in_features,
        SORTED=sorted_gradient,
        PAIRS_PER_ROW=pairs_per_row or 0,
        BLOCK_PAIRS=block_pairs,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=8 if block_n * block_k > 8192 else 4,
        num_stages=2 if x.dtype == torch.float32 else 3,
    )
    return out


# ---- rows --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_experts"])
def scale_rows_kernel(
    gradient_ptr,  # (num_pairs / PAIRS_PER_ROW, N)
    scale_ptr,  # (num_experts, N) fp32, or None
    largest_ptr,  # (num_experts,) fp32, or None
    bias_ptr,  # (num_experts, N), or None
    ids_ptr,  # (num_pairs,), topk_ids
    sorted_ptr,  # (num_pairs,) int32
    out_ptr,  # (num_pairs, N)
    sums_ptr,  # (num_pairs,) fp32: of gradient times bias, or None
    num_experts,
    N,
    PAIRS_PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (num_pairs,). Rows by sorted pairs, times the relative scales of their experts."""
    position = tl.program_id(0).to(tl.int64)
    pair = tl.load(sorted_ptr + position)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    row = (pair // PAIRS_PER_ROW).to(tl.int64)
    if scale_ptr is not None:
        over = 1.0 / tl.maximum(tl.load(largest_ptr + expert), SMALLEST_LARGEST)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < N
        y = tl.load(gradient_ptr + row * N + columns, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + expert * N + columns, mask=mask, other=0.0)
            total += y * bias.to(tl.float32)
        if scale_ptr is not None:
            y *= tl.load(scale_ptr + expert * N + columns, mask=mask, other=0.0) * over
        tl.store(out_ptr + position * N + columns, y.to(out_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None and bias_ptr is not None:
        tl.store(sums_ptr + pair, tl.sum(total, 0))


def launch_scale_rows(
    gradient: Tensor,  # (num_rows, out_features)
    projection: Projection,
    largest: Tensor | None,
    topk_ids: Tensor,
    routing: ExpertRouting,
    pairs_per_row: int,
    sums: Tensor | None = None,  # (num_tokens, top_k) fp32
    *,
    block: int = 2048,
) -> Tensor:
    """(num_pairs, out_features) by sorted pairs: each pair's gradient times its expert's scales.

    Args:
        largest: see `largest_scale`: scales are taken over it.
        pairs_per_row: as many pairs share a row of ``gradient``.
        sums: gets each pair's gradient times its expert's bias, if there is one.
        block: columns at once, at most; a power of two.
    """
    num_pairs, out_features = topk_ids.numel(), gradient.shape[1]
    out = gradient.new_empty(num_pairs, out_features)
    if out.numel():
        scale_rows_kernel[(num_pairs,)](
            gradient,
            projection.scale,
            largest,
            projection.bias,
            topk_ids,
            routing.sorted_pair_ids,
            out,
            sums,
            projection.num_experts,
            out_features,
            PAIRS_PER_ROW=pairs_per_row,
            BLOCK=min(block, triton.next_power_of_2(out_features)),
        )
    return out


@triton.jit(do_not_specialize=["num_experts"])
def activation_gradient_kernel(
    up_ptr,  # (num_pairs, N or 2 * N): what goes into the activation
    gradient_ptr,  # (num_pairs, N): of its output, without the token's weight
    out_ptr,  # (num_pairs, N or 2 * N)
    scale_ptr,  # (num_experts, N or 2 * N) fp32, or None
    largest_ptr,  # (num_experts,) fp32, or None
    ids_ptr,  # (num_pairs,), topk_ids
    weights_ptr,  # (num_pairs,), topk_weights, or None
    sorted_ptr,  # (num_pairs,) int32
    sums_ptr,  # (num_pairs,) fp32, in the order of pairs, or None
    num_experts,
    N,
    ADD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (num_pairs,). ``sums`` gets gradient times output, added to what it has if ADD."""
    GATED: tl.constexpr = ACTIVATION.gated
    position = tl.program_id(0).to(tl.int64)
    pair = tl.load(sorted_ptr + position)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        if sums_ptr is not None:
            tl.store(sums_ptr + pair, 0.0)
        return
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + pair).to(tl.float32)
    channels = N
    if GATED:
        channels = 2 * N
    if scale_ptr is not None:
        over = 1.0 / tl.maximum(tl.load(largest_ptr + expert), SMALLEST_LARGEST)
    row = position * channels
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < N
        gate = tl.load(up_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(up_ptr + row + N + columns, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(gradient_ptr + position * N + columns, mask=mask, other=0.0).to(tl.float32)
        value, of_gate, of_up = gradient_triton(gate, up, y * weight, ACTIVATION)
        total += tl.where(mask, y * value, 0.0)
        scales = scale_ptr
        if scale_ptr is not None:
            scales = scale_ptr + expert * channels
            of_gate *= tl.load(scales + columns, mask=mask, other=0.0) * over
        tl.store(out_ptr + row + columns, of_gate.to(out_ptr.dtype.element_ty), mask=mask)
        if GATED:
            if scale_ptr is not None:
                of_up *= tl.load(scales + N + columns, mask=mask, other=0.0) * over
            tl.store(out_ptr + row + N + columns, of_up.to(out_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        of_weight = tl.sum(total, 0)
        if ADD:
            of_weight += tl.load(sums_ptr + pair)
        tl.store(sums_ptr + pair, of_weight)


def launch_activation_gradient(
    up: Tensor,  # (num_pairs, channels)
    gradient: Tensor,  # (num_pairs, intermediate_size)
    experts: Experts,
    largest: Tensor | None,  # of gate_up
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    routing: ExpertRouting,
    sums: Tensor | None,  # (num_tokens, top_k) fp32
    *,
    block: int = 1024,
) -> Tensor:
    """(num_pairs, channels) by sorted pairs: gradients before the activation, times scales.

    Args:
        sums: gets gradients of ``topk_weights``; with a down bias it has those of the bias so far.
        block: columns at once, at most; a power of two.
    """
    num_pairs, size = gradient.shape
    out = torch.empty_like(up)
    if out.numel():
        activation_gradient_kernel[(num_pairs,)](
            up,
            gradient,
            out,
            experts.gate_up.scale,
            largest,
            topk_ids,
            None if topk_weights is None else topk_weights.contiguous(),
            routing.sorted_pair_ids,
            sums,
            len(routing.expert_offsets) - 1,
            size,
            ADD=experts.down.bias is not None,
            ACTIVATION=experts.activation,
            BLOCK=min(block, triton.next_power_of_2(size)),
        )
    return out
