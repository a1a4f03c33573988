"""Products of single rows: one token, or few that share no experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qmoe_kernels.activations import Activation, apply_triton
from qmoe_kernels.experts import Projection
from qmoe_kernels.launching import (
    COMPILED,
    has_dependent_launch,
    is_widened_fp8,
    launch_options,
    narrow,
    prefetch,
    weight_bits,
)
from qmoe_kernels.tiles import TileConfig
from qmoe_kernels.widening import widen_weights

# Of the second product's weights, while the first one ends: a good part of a large GPU's L2.
PREFETCHED_BYTES = 16 << 20


@triton.jit(do_not_specialize=["num_experts"])
def gemv_kernel(
    x_ptr,  # (num_tokens, K), or (num_pairs, K) if PER_PAIR
    weight_ptr,  # (num_slots, N or 2 * N, K)
    scale_ptr,  # (num_experts, N or 2 * N) fp32, or None
    bias_ptr,  # (num_experts, N or 2 * N), or None
    out_ptr,  # (num_pairs, N), or (num_tokens, N) with topk_weights_ptr
    topk_ids_ptr,  # (num_tokens, TOP_K)
    topk_weights_ptr,  # (num_tokens, TOP_K), or None
    expert_to_slot_ptr,  # (num_experts,) int32, or None
    next_weight_ptr,  # (num_slots, ...): the weights that are multiplied next
    num_experts,
    N,
    K,
    stride_x,
    stride_weight_slot,
    stride_weight_n,
    stride_next_slot,
    next_length,  # how much of a slot of the next weights is prefetched, by all programs
    TOP_K: tl.constexpr,
    PER_PAIR: tl.constexpr,
    PAIRS: tl.constexpr,  # per program
    PAIRS_BLOCK: tl.constexpr,  # power of two, at least PAIRS
    FP8: tl.constexpr,
    ACTIVATION: tl.constexpr,  # an Activation, or None
    EVEN_K: tl.constexpr,
    TILE: tl.constexpr,  # a TileConfig
    PREFETCH_LINES: tl.constexpr,  # per program
    ASM: tl.constexpr,
    WAIT_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Products of single rows, and with topk_weights_ptr their sum over a token's experts.

    Grid: (num_pairs / PAIRS, cdiv(channels, BLOCK_N)). Without tensor cores, of which one row
    would leave seven eighths idle. All experts of a program are read at the same time.

    The kernel before this one must not have written ids or slots, unless WAIT_FIRST.
    """
    if PDL and WAIT_FIRST:
        tl.extra.cuda.gdc_wait()
    GATED: tl.constexpr = ACTIVATION is not None and ACTIVATION.gated
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_K: tl.constexpr = TILE.block_k
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    order = tl.arange(0, PAIRS_BLOCK)
    pairs = tl.program_id(0) * PAIRS + order
    expert = narrow(tl.load(topk_ids_ptr + pairs, mask=order < PAIRS, other=-1))
    routed = (expert >= 0) & (expert < num_experts)
    expert = tl.where(routed, expert, 0)
    slot = expert
    if expert_to_slot_ptr is not None:
        slot = tl.load(expert_to_slot_ptr + expert)
    absent = slot < 0
    slot = tl.maximum(slot, 0).to(tl.int64)

    tile_rows = tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    if GATED:
        channels = 2 * N
        rows = tl.program_id(1) * BLOCK_OUT + tile_rows % BLOCK_OUT
        rows = tl.minimum(rows, N - 1) + tile_rows // BLOCK_OUT * N
    else:
        channels = N
        rows = tl.minimum(columns, N - 1)
    offsets_k = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + (
        (slot * stride_weight_slot)[:, None, None]
        + (rows.to(tl.int64) * stride_weight_n)[None, :, None]
        + offsets_k[None, None, :]
    )
    x_rows = pairs
    if not PER_PAIR:
        x_rows = pairs // TOP_K
    x_ptrs = x_ptr + (x_rows.to(tl.int64) * stride_x)[:, None, None] + offsets_k[None, None, :]
    mask = routed[:, None, None]
    if PDL:
        if not WAIT_FIRST:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((PAIRS_BLOCK, BLOCK_N, BLOCK_K), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=TILE.num_stages):
        mask_k = mask
        if not EVEN_K:
            mask_k = mask & (offsets_k < K - k)[None, None, :]
        x = tl.load(x_ptrs + k, mask=mask_k, other=0.0)
        weight = tl.load(weight_ptrs + k, mask=mask_k, other=0.0)
        if weight.dtype == tl.int8:
            weight = widen_weights(weight, tl.float16, FP8, ASM)
        acc += weight.to(tl.float32) * x.to(tl.float32)
    if PREFETCH_LINES > 0:
        # What is left of this kernel leaves the memory idle.
        LINE: tl.constexpr = 128 * 8 // next_weight_ptr.dtype.element_ty.primitive_bitwidth
        start = slot * stride_next_slot + tl.program_id(1) * PREFETCH_LINES * LINE
        left = next_length - tl.program_id(1) * PREFETCH_LINES * LINE
        if left > 0:
            prefetch(next_weight_ptr, start, left, PREFETCH_LINES)

    y = tl.sum(acc, 2)
    scale_rows = expert[:, None] * channels + rows[None, :]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + scale_rows)
        if FP8:
            scale = scale * 256.0  # what widen_weights left out
        y = y * scale
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + scale_rows).to(tl.float32)
    up = y
    if GATED:
        y, up = tl.split(tl.permute(tl.reshape(y, (PAIRS_BLOCK, 2, BLOCK_OUT)), (0, 2, 1)))
    if ACTIVATION is not None:
        y = apply_triton(y, up, ACTIVATION)
    y = tl.where(absent[:, None], float("nan"), y).to(out_ptr.dtype.element_ty)
    exists = columns < N
    if topk_weights_ptr is None:
        # Also of skipped ids: zeros, so that nobody fills memory before.
        y = tl.where(routed[:, None], y, 0.0)
        out_ptrs = out_ptr + pairs.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(out_ptrs, y, mask=(order < PAIRS)[:, None] & exists[None, :])
    else:
        # As weighted_sum_kernel does it, to the same bits: rounded, then in order.
        y = tl.where(routed[:, None], y.to(tl.float32), 0.0)
        weights = tl.load(topk_weights_ptr + pairs, mask=routed, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK_OUT,), dtype=tl.float32)
        for i in tl.static_range(PAIRS):
            this = order == i
            row = tl.sum(tl.where(this[:, None], y, 0.0), 0)
            weight = tl.sum(tl.where(this, weights, 0.0), 0)
            total = tl.fma(row, tl.zeros_like(total) + weight, total)
        total = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + tl.program_id(0).to(tl.int64) * N + columns, total, mask=exists)


def launch_gemv(
    x: torch.Tensor,  # (num_tokens, in_features), or (num_pairs, in_features) if per_pair
    projection: Projection,
    topk_ids: torch.Tensor,
    out: torch.Tensor,  # (num_pairs, out_features), or (num_tokens, out_features) if summed
    tile: TileConfig,
    *,
    topk_weights: torch.Tensor | None = None,
    activation: Activation | None = None,
    per_pair: bool = False,
    next_weight: torch.Tensor | None = None,
    dependent: bool = True,
    wait_first: bool = False,
) -> torch.Tensor:
    """Fill ``out``, with zeros for skipped ids; with ``topk_weights``, with sums over experts.

    All tensors but weights are contiguous; see `qmoe_kernels.layer`.

    ``next_weight`` (num_slots, ...) is what the next kernel reads: as much as L2 keeps of it is
    prefetched at the end of this one. ``dependent``: start while the kernel before this one ends;
    if that wrote ids or slots, ``wait_first``.
    """
    weight = projection.weight
    out_features = out.shape[1]
    if out.numel() == 0:
        return out
    in_features = x.shape[1]
    gated = activation is not None and activation.gated
    pdl = has_dependent_launch(x.device)
    tiles_n = triton.cdiv(out_features * (2 if gated else 1), tile.block_n)
    # Also where rows are not summed up: equal layouts of threads give equal bits.
    pairs = topk_ids.shape[1] if per_pair else 1
    next_bytes = 0
    if next_weight is not None and pdl:
        next_bytes = min(next_weight[0].nbytes, PREFETCHED_BYTES // topk_ids.numel())
    gemv_kernel[(topk_ids.numel() // pairs, tiles_n)](
        x,
        weight_bits(weight, x),
        projection.scale,
        projection.bias,
        out,
        topk_ids,
        topk_weights,
        projection.expert_to_slot,
        None if next_weight is None else weight_bits(next_weight, x),
        projection.num_experts,
        out_features,
        in_features,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        0 if next_weight is None else next_weight.stride(0),
        next_bytes // weight.element_size(),
        TOP_K=topk_ids.shape[1],
        PER_PAIR=per_pair,
        PAIRS=pairs,
        PAIRS_BLOCK=triton.next_power_of_2(pairs),
        FP8=is_widened_fp8(weight, x),
        ACTIVATION=activation,
        EVEN_K=in_features % tile.block_k == 0,
        TILE=tile,
        PREFETCH_LINES=next_bytes
        and triton.next_power_of_2(triton.cdiv(next_bytes, 128 * tiles_n)),
        ASM=COMPILED,
        WAIT_FIRST=wait_first,
        PDL=pdl,
        num_warps=tile.num_warps,
        **launch_options(dependent, x.device),
    )
    return out
