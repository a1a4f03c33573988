"""The Triton kernels of an MoE layer and their launchers.

Grouped GEMM: for every expert ``e`` with rows ``X_e`` (tokens routed to it),

    Y_e = epilogue(X_e @ W_e^T),    epilogue(acc) = activation(acc * scale_e + bias_e)

Weights are int8, e4m3fn or the dtype of the rows. 8-bit weights become the rows' dtype in
registers on the way to the tensor cores, exactly; accumulation is fp32; the scale of an output
channel and the bias are applied to the sum. Layouts: rows (num_rows, K), weights (num_slots, N,
K), both K contiguous.

Pairs (token, expert) come sorted by expert, see `ExpertRouting`. Rows between the two products of
a layer lie in that order; the first product gathers tokens, the second scatters to the order of
``topk_ids``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qmoe_kernels.activations import Activation, apply_triton
from qmoe_kernels.routing import ExpertRouting


@dataclass(frozen=True)
class TileConfig:
    """Tile of one program: BLOCK_M rows of one expert, BLOCK_N channels, BLOCK_K per step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def choose_tile(
    num_pairs: int,
    num_experts: int,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    gated: bool,
) -> TileConfig:
    """Choose a tile by the mean number of rows per expert; a function of shapes and dtypes only.

    All of them fit in the 99 KiB of shared memory of the smaller GPUs.
    """
    rows = num_pairs / num_experts
    if x_dtype == torch.float32:  # ieee products use no tensor cores, and registers are few
        return TileConfig(16 if rows <= 16 else 32, 32, 32, num_warps=4, num_stages=2)
    block_n = 64 if gated else 128  # a gated tile has two accumulators
    small_k, large_k = (128, 64) if weight_dtype.itemsize == 1 else (64, 32)
    if rows <= 16:
        return TileConfig(16, block_n, small_k, num_warps=4, num_stages=3)
    if rows <= 48:
        return TileConfig(32, block_n, small_k, num_warps=4, num_stages=3)
    if rows <= 96:
        return TileConfig(64, block_n, large_k, num_warps=4, num_stages=3)
    return TileConfig(128, block_n, large_k, num_warps=8, num_stages=3)


# Not specialized: they vary with the number of tokens, which must not compile anything.
@triton.jit(do_not_specialize=["num_experts", "max_tiles_m", "pairs_per_row"])
def grouped_gemm_kernel(
    x_ptr,  # (num_tokens, K) if GATHER else (num_pairs, K)
    weight_ptr,  # (num_slots, N or 2 * N, K)
    scale_ptr,  # (num_experts, N or 2 * N) fp32 or None
    bias_ptr,  # (num_experts, N or 2 * N) or None
    out_ptr,  # (num_pairs, N)
    sorted_pair_ids_ptr,  # (num_pairs,) int32
    expert_offsets_ptr,  # (num_experts + 1,) int32
    expert_to_slot_ptr,  # (num_experts,) int32 or None
    num_experts,
    max_tiles_m,
    pairs_per_row,  # how many pairs share one row of x, if GATHER
    stride_x,
    stride_weight_slot,
    stride_weight_n,
    up_offset,  # from a gate row to its up row
    stride_out,
    N: tl.constexpr,  # out_features
    K: tl.constexpr,  # in_features
    GATHER: tl.constexpr,  # read x by token or pair, rather than by sorted position
    SCATTER: tl.constexpr,  # write out by pair, rather than by sorted position
    FP8: tl.constexpr,
    NAME: tl.constexpr,  # None: no activation; else Activation's fields
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    LIMIT: tl.constexpr,
    LIMIT_AFTER: tl.constexpr,
    GATE_SOFTCAP: tl.constexpr,
    UP_SOFTCAP: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,  # power of two, at least num_experts
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (max_tiles_m * cdiv(N, BLOCK_N),); programs beyond the routed tiles leave at once."""
    # Neighbouring programs share weights (same expert, same channels) and then rows: L2 serves
    # both.
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * tiles_n)
    group_m = tl.minimum(max_tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % group_m
    tile_n = (pid % (GROUP_M * tiles_n)) // group_m

    # Which expert tile_m belongs to, and which of its tiles it is.
    experts = tl.arange(0, EXPERTS_BLOCK)
    exists = experts < num_experts
    starts = tl.load(expert_offsets_ptr + experts, mask=exists, other=0)
    ends = tl.load(expert_offsets_ptr + experts + 1, mask=exists, other=0)
    tiles = tl.cdiv(ends - starts, BLOCK_M)
    last_tiles = tl.cumsum(tiles, 0)
    expert = tl.sum((last_tiles <= tile_m).to(tl.int32), 0)
    if expert >= EXPERTS_BLOCK:
        return
    this = experts == expert
    first_tile = tl.sum(tl.where(this, last_tiles - tiles, 0), 0)
    start = tl.sum(tl.where(this, starts, 0), 0)
    end = tl.sum(tl.where(this, ends, 0), 0)

    positions = start + (tile_m - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = positions < end
    pairs = positions
    if GATHER or SCATTER:
        pairs = tl.load(sorted_pair_ids_ptr + positions, mask=mask_m, other=0)
    x_rows = positions
    if GATHER:
        x_rows = pairs // pairs_per_row
    out_rows = positions
    if SCATTER:
        out_rows = pairs

    slot = expert
    if expert_to_slot_ptr is not None:
        slot = tl.load(expert_to_slot_ptr + expert)
    absent = slot < 0
    slot = tl.maximum(slot, 0)

    offsets_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_k = tl.arange(0, BLOCK_K)
    mask_n = offsets_n < N
    # int64: rows times their length, and slots times a page, pass 2**31.
    x_ptrs = x_ptr + x_rows.to(tl.int64)[None, :] * stride_x + offsets_k[:, None]
    weight_ptrs = (
        weight_ptr
        + slot.to(tl.int64) * stride_weight_slot
        + offsets_n.to(tl.int64)[:, None] * stride_weight_n
        + offsets_k[None, :]
    )

    # Transposed, (channels, rows): Hopper's tensor cores take their first operand from registers,
    # where weights have just been decoded, and rows come by the eight rather than by the
    # sixty-four.
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    acc_up = acc
    for k in range(0, K, BLOCK_K):
        mask_x = mask_m[None, :]
        mask_weight = mask_n[:, None]
        if K % BLOCK_K != 0:
            mask_k = offsets_k < K - k
            mask_x = mask_k[:, None] & mask_m[None, :]
            mask_weight = mask_n[:, None] & mask_k[None, :]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        weight = tl.load(weight_ptrs, mask=mask_weight, other=0)
        acc = tl.dot(_decode(weight, x.dtype, FP8), x, acc, input_precision="ieee")
        if GATED:
            weight = tl.load(weight_ptrs + up_offset, mask=mask_weight, other=0)
            acc_up = tl.dot(_decode(weight, x.dtype, FP8), x, acc_up, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    rows_per_expert = N
    if GATED:
        rows_per_expert = 2 * N
    channels = expert * rows_per_expert + offsets_n
    acc = _scale_and_bias(acc, scale_ptr, bias_ptr, channels, mask_n, FP8)
    if NAME is not None:
        if GATED:
            acc_up = _scale_and_bias(acc_up, scale_ptr, bias_ptr, channels + N, mask_n, FP8)
        acc = apply_triton(
            acc,
            acc_up,
            NAME,
            GATED,
            ALPHA,
            UP_SHIFT,
            LIMIT,
            LIMIT_AFTER,
            GATE_SOFTCAP,
            UP_SOFTCAP,
        )
    # Weights that are not there must not pass for some.
    acc = tl.where(absent, float("nan"), acc)
    out_ptrs = out_ptr + out_rows.to(tl.int64)[None, :] * stride_out + offsets_n[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])


@triton.jit
def _decode(weight, dtype: tl.constexpr, FP8: tl.constexpr):
    """Convert a tile of weights to ``dtype``; e4m3fn comes as int8 and leaves as 2**-8 of itself.

    The bits ``seeeemmm`` put into a half as ``s0eeeemmm0000000`` are the number times 2**-8,
    exactly and subnormals included (the biases are 7 and 15). No architecture needs an
    instruction for it.
    """
    if FP8:
        # Sign extension puts copies of the sign into bits 15 and 14; the mask clears bit 14.
        weight = (weight.to(tl.int16) << 7) & -0x4001
        weight = weight.to(tl.float16, bitcast=True)
    return weight.to(dtype)


@triton.jit
def _scale_and_bias(acc, scale_ptr, bias_ptr, channels, mask, FP8: tl.constexpr):
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channels, mask=mask, other=0.0)
        if FP8:
            scale = scale * 256.0  # what _decode left out
        acc = acc * scale[:, None]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels, mask=mask, other=0.0)
        acc = acc + bias.to(tl.float32)[:, None]
    return acc


# Not specialized: see above.
@triton.jit(do_not_specialize=["num_experts"])
def weighted_sum_kernel(
    rows_ptr,  # (num_tokens, TOP_K, hidden_size)
    topk_weights_ptr,  # (num_tokens, TOP_K)
    topk_ids_ptr,  # (num_tokens, TOP_K), or None: every row counts
    out_ptr,  # (num_tokens, hidden_size)
    num_experts,
    hidden_size,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (num_tokens, cdiv(hidden_size, BLOCK)). Rows of skipped ids are never read."""
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < hidden_size
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        mask_row = mask
        if topk_ids_ptr is not None:
            expert = tl.load(topk_ids_ptr + pair)
            mask_row = mask & (expert >= 0) & (expert < num_experts)
        row = tl.load(rows_ptr + pair * hidden_size + offsets, mask=mask_row, other=0.0)
        acc += row.to(tl.float32) * tl.load(topk_weights_ptr + pair).to(tl.float32)
    tl.store(out_ptr + token * hidden_size + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch_grouped_gemm(
    x: torch.Tensor,  # (num_rows, in_features)
    weight: torch.Tensor,  # (num_slots, rows, in_features)
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    routing: ExpertRouting,
    expert_to_slot: torch.Tensor | None,
    out: torch.Tensor,  # (num_pairs, out_features)
    *,
    activation: Activation | None = None,
    pairs_per_row: int | None = None,
    scatter: bool = False,
    tile: TileConfig | None = None,
) -> torch.Tensor:
    """Fill the routed rows of ``out`` and return it; the others are left as they are.

    Args:
        activation: fused into the epilogue.
        pairs_per_row: row ``pair // pairs_per_row`` of ``x`` belongs to a pair; None says that
            rows of ``x`` are in sorted order.
        scatter: write in the order of pairs instead of the sorted order.
        tile: instead of `choose_tile`'s.
    """
    num_pairs, out_features = out.shape
    if num_pairs == 0 or out_features == 0:
        return out
    num_experts = routing.expert_offsets.shape[0] - 1
    x = x.contiguous()
    gated = activation is not None and activation.gated
    tile = tile or choose_tile(num_pairs, num_experts, x.dtype, weight.dtype, gated)
    # Every expert but one may leave its last tile nearly empty.
    max_tiles_m = min(num_pairs, num_experts + max(0, num_pairs - num_experts) // tile.block_m)
    fp8 = weight.dtype == torch.float8_e4m3fn
    a = activation or Activation()
    grouped_gemm_kernel[(max_tiles_m * triton.cdiv(out_features, tile.block_n),)](
        x,
        weight.view(torch.int8) if fp8 else weight,
        None if scale is None else scale.contiguous(),
        None if bias is None else bias.contiguous(),
        out,
        routing.sorted_pair_ids,
        routing.expert_offsets,
        expert_to_slot,
        num_experts,
        max_tiles_m,
        pairs_per_row or 1,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        out_features * weight.stride(1),
        out.stride(0),
        N=out_features,
        K=x.shape[1],
        GATHER=pairs_per_row is not None,
        SCATTER=scatter,
        FP8=fp8,
        NAME=None if activation is None else a.name,
        GATED=gated,
        ALPHA=a.alpha,
        UP_SHIFT=a.up_shift,
        LIMIT=a.limit,
        LIMIT_AFTER=a.limit_after,
        GATE_SOFTCAP=a.gate_softcap,
        UP_SOFTCAP=a.up_softcap,
        EXPERTS_BLOCK=triton.next_power_of_2(num_experts),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=8,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def launch_weighted_sum(
    rows: torch.Tensor,  # (num_tokens, top_k, hidden_size)
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    num_experts: int = 0,
) -> torch.Tensor:
    """Sum rows by their weights, in fp32 and in order; with ``topk_ids``, those of experts only."""
    num_tokens, top_k, hidden_size = rows.shape
    out = rows.new_empty(num_tokens, hidden_size)
    if out.numel():
        block = min(1024, triton.next_power_of_2(hidden_size))
        weighted_sum_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
            rows.contiguous(),
            topk_weights.contiguous(),
            None if topk_ids is None else topk_ids.contiguous(),
            out,
            num_experts,
            hidden_size,
            TOP_K=top_k,
            BLOCK=block,
        )
    return out


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
) -> torch.Tensor:
    """Run the kernels of `qmoe_kernels.fused_moe`; arguments and result as there."""
    num_tokens, top_k = topk_ids.shape
    num_pairs = num_tokens * top_k
    routing = ExpertRouting.from_topk_ids(topk_ids, num_experts)
    intermediate_size = gate_up_proj.shape[1] // (2 if activation.gated else 1)
    hidden = launch_grouped_gemm(
        hidden_states,
        gate_up_proj,
        gate_up_proj_scale,
        gate_up_proj_bias,
        routing,
        expert_to_slot,
        hidden_states.new_empty(num_pairs, intermediate_size),
        activation=activation,
        pairs_per_row=top_k,
    )
    # Rows of skipped ids are written by nobody: zeros if the caller sees them, never read
    # otherwise.
    new_rows = hidden_states.new_zeros if topk_weights is None else hidden_states.new_empty
    rows = launch_grouped_gemm(
        hidden,
        down_proj,
        down_proj_scale,
        down_proj_bias,
        routing,
        expert_to_slot,
        new_rows(num_pairs, down_proj.shape[1]),
        scatter=True,
    ).view(num_tokens, top_k, down_proj.shape[1])
    if topk_weights is None:
        return rows
    return launch_weighted_sum(rows, topk_weights, topk_ids, num_experts)


def grouped_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    topk_ids: torch.Tensor,
    expert_to_slot: torch.Tensor | None,
    num_experts: int,
) -> torch.Tensor:
    """Run the kernel of `qmoe_kernels.grouped_linear`; arguments and result as there."""
    num_tokens, top_k = topk_ids.shape
    rows = launch_grouped_gemm(
        x.flatten(0, -2),
        weight,
        scale,
        bias,
        ExpertRouting.from_topk_ids(topk_ids, num_experts),
        expert_to_slot,
        x.new_zeros(num_tokens * top_k, weight.shape[1]),
        pairs_per_row=top_k if x.ndim == 2 else 1,
        scatter=True,
    )
    return rows.view(num_tokens, top_k, weight.shape[1])
