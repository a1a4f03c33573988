"""Grouped GEMM in Triton: for every expert ``e`` with rows ``X_e`` (tokens routed to it),

    Y_e = epilogue(X_e @ W_e^T),    epilogue(acc) = activation(acc * row_scale * scale_e + bias_e)

Weights are int8, e4m3fn or the dtype of the rows; rows are 16 or 32 bits wide, or of the weights'
8-bit dtype with a scale each. 8-bit weights that meet wider rows become the rows' dtype in
registers on the way to the tensor cores, exactly. Sums are fp32 (int32 for int8 with int8); scales
and the bias are applied to the sum. Layouts: rows (num_rows, K), weights (num_slots, N, K), both K
contiguous.

A pair is one token with one of its experts. Few pairs stay in the order of ``topk_ids``, and each
program looks for its expert's rows itself; many are sorted by expert first, see `ExpertRouting`,
and lie in that order between the two products: the first one gathers tokens, the second scatters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qmoe_kernels.activations import Activation, apply_triton
from qmoe_kernels.decoding import decode_weights
from qmoe_kernels.launching import (
    COMPILED,
    activation_constants,
    has_dependent_launch,
    is_decoded_fp8,
    launch_options,
    prefetch,
    weight_bits,
)
from qmoe_kernels.routing import ExpertRouting
from qmoe_kernels.tiles import TileConfig

# Of 16 neighbouring rows in a tile of a gated product, 8 are gate channels and 8 the same up
# channels: a thread of the tensor cores' layout holds rows i and i + 8, so both meet there.
GATE_ROWS = tl.constexpr(8)


# Not specialized: they vary with the number of tokens, which must not compile anything.
@triton.jit(do_not_specialize=["num_pairs", "num_experts", "max_tiles_m", "pairs_per_row"])
def grouped_gemm_kernel(
    x_ptr,  # (num_rows, K)
    x_scale_ptr,  # (num_rows,) fp32, or None
    weight_ptr,  # (num_slots, N or 2 * N, K)
    scale_ptr,  # (num_experts, N or 2 * N) fp32, or None
    bias_ptr,  # (num_experts, N or 2 * N), or None
    out_ptr,  # (num_pairs, N)
    ids_ptr,  # (num_pairs,) int32: sorted pairs if SORTED, else topk_ids, any int
    expert_offsets_ptr,  # (num_experts + 1,) int32 if SORTED
    expert_to_slot_ptr,  # (num_experts,) int32, or None
    num_pairs,
    num_experts,
    max_tiles_m,
    pairs_per_row,  # how many pairs share one row of x, if GATHER
    N,  # out_features
    K,  # in_features
    stride_x,
    stride_weight_slot,
    stride_weight_n,
    SORTED: tl.constexpr,
    GATHER: tl.constexpr,  # read x by token or pair, rather than by sorted position
    SCATTER: tl.constexpr,  # write out by pair, rather than by sorted position
    FP8: tl.constexpr,  # weights are e4m3fn, given as int8, and rows are wider
    NAME: tl.constexpr,  # None: no activation; else Activation's fields
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    LIMIT: tl.constexpr,
    LIMIT_AFTER: tl.constexpr,
    GATE_SOFTCAP: tl.constexpr,
    UP_SOFTCAP: tl.constexpr,
    BLOCK_IDS: tl.constexpr,  # power of two, at least num_experts if SORTED, else num_pairs
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL_M: tl.constexpr,  # an expert's last tile with no more rows is this high
    GROUP_M: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    TWO_LEVEL: tl.constexpr,  # FP8 with FP8: sum up in fp32 what few products give
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (max_tiles_m * cdiv(channels, BLOCK_N),); programs without rows only wait.

    With GATED, channels are gate and up ones together, 2 * N.

    PREFETCH_LINES: ask for so many cache lines of each row of weights before waiting for the
    kernel before this one, which must not have written ids, offsets or slots.
    """
    if PDL and PREFETCH_LINES == 0:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Neighbouring programs share weights (same expert, same channels) and then rows: L2 serves
    # both.
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    tiles_n = tl.cdiv(N, BLOCK_OUT)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * tiles_n)
    group_m = tl.minimum(max_tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % group_m
    tile_n = (pid % (GROUP_M * tiles_n)) // group_m

    ids = tl.arange(0, BLOCK_IDS)
    if SORTED:
        # Which expert tile_m belongs to, and which of its tiles it is.
        exists = ids < num_experts
        starts = tl.load(expert_offsets_ptr + ids, mask=exists, other=0)
        ends = tl.load(expert_offsets_ptr + ids + 1, mask=exists, other=0)
        tiles = tl.cdiv(ends - starts, BLOCK_M)
        last_tiles = tl.cumsum(tiles, 0)
        expert = tl.sum((last_tiles <= tile_m).to(tl.int32), 0)
        if expert >= BLOCK_IDS:
            _wait_late(PREFETCH_LINES)
            return
        this = ids == expert
        first_tile = tl.sum(tl.where(this, last_tiles - tiles, 0), 0)
        first = tl.sum(tl.where(this, starts, 0), 0) + (tile_m - first_tile) * BLOCK_M
        num_rows = tl.sum(tl.where(this, ends, 0), 0) - first
    else:
        # Program tile_m has the rows of its pair's expert if the pair is that expert's first, or
        # its (BLOCK_M + 1)-th, and so on.
        all_experts = tl.load(ids_ptr + ids, mask=ids < num_pairs, other=-1).to(tl.int32)
        expert = tl.sum(tl.where(ids == tile_m, all_experts, 0), 0)
        if (expert < 0) | (expert >= num_experts):
            _wait_late(PREFETCH_LINES)
            return
        rank = tl.cumsum((all_experts == expert).to(tl.int32), 0) - 1
        first = tl.sum(tl.where(ids == tile_m, rank, 0), 0)
        if first % BLOCK_M != 0:
            _wait_late(PREFETCH_LINES)
            return
        # Pairs of other experts get a rank that nobody has.
        rank = tl.where(all_experts == expert, rank, -1)
        num_rows = tl.max(rank, 0) + 1 - first

    slot = expert
    if expert_to_slot_ptr is not None:
        slot = tl.load(expert_to_slot_ptr + expert)
    absent = slot < 0
    # int64: slots times a page pass 2**31.
    weight_ptr += tl.maximum(slot, 0).to(tl.int64) * stride_weight_slot
    channels = N
    if GATED:
        channels = 2 * N
    if scale_ptr is not None:
        scale_ptr += expert * channels
    if bias_ptr is not None:
        bias_ptr += expert * channels

    if PREFETCH_LINES > 0:
        prefetched = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
        prefetch(weight_ptr, prefetched.to(tl.int64) * stride_weight_n, K, PREFETCH_LINES)
    _wait_late(PREFETCH_LINES)

    if TAIL_M > 0:  # noqa: SIM102 (one is known when compiling)
        if num_rows <= TAIL_M:
            rows = tl.arange(0, TAIL_M)
            if SORTED:
                pairs = first + tl.minimum(rows, num_rows - 1)
            else:
                pairs = _pairs_of_ranks(rank, first + tl.minimum(rows, num_rows - 1), ids)
            _tile(
                x_ptr, x_scale_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, ids_ptr, pairs,
                rows < num_rows, tile_n, absent, pairs_per_row, N, K, stride_x, stride_weight_n,
                SORTED, GATHER, SCATTER, FP8, NAME, GATED, ALPHA, UP_SHIFT, LIMIT, LIMIT_AFTER,
                GATE_SOFTCAP, UP_SOFTCAP, EVEN_K, TAIL_M, BLOCK_N, BLOCK_K, TWO_LEVEL, ASM,
            )  # fmt: skip
            return
    rows = tl.arange(0, BLOCK_M)
    if SORTED:
        pairs = first + tl.minimum(rows, num_rows - 1)
    else:
        pairs = _pairs_of_ranks(rank, first + tl.minimum(rows, num_rows - 1), ids)
    _tile(
        x_ptr, x_scale_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, ids_ptr, pairs,
        rows < num_rows, tile_n, absent, pairs_per_row, N, K, stride_x, stride_weight_n,
        SORTED, GATHER, SCATTER, FP8, NAME, GATED, ALPHA, UP_SHIFT, LIMIT, LIMIT_AFTER,
        GATE_SOFTCAP, UP_SOFTCAP, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, TWO_LEVEL, ASM,
    )  # fmt: skip


@triton.jit
def _wait_late(PREFETCH_LINES: tl.constexpr):
    """Wait for the kernel before this one, unless that was done first thing.

    A program that has nothing to do waits as well: the launch must not end before that kernel.
    """
    if PREFETCH_LINES > 0:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _pairs_of_ranks(rank, wanted, ids):
    """Pairs whose rank among their expert's is ``wanted``."""
    return tl.sum(tl.where(rank[None, :] == wanted[:, None], ids[None, :], 0), 1)


@triton.jit
def _tile(
    x_ptr,
    x_scale_ptr,
    weight_ptr,  # of the expert, as scale_ptr and bias_ptr
    scale_ptr,
    bias_ptr,
    out_ptr,
    ids_ptr,
    positions,  # (BLOCK_M,) sorted positions if SORTED, else pairs; the last is repeated
    mask_m,  # (BLOCK_M,)
    tile_n,
    absent,
    pairs_per_row,
    N,
    K,
    stride_x,
    stride_weight_n,
    SORTED: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    FP8: tl.constexpr,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    LIMIT: tl.constexpr,
    LIMIT_AFTER: tl.constexpr,
    GATE_SOFTCAP: tl.constexpr,
    UP_SOFTCAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
    ASM: tl.constexpr,
):
    """One tile, transposed: (channels, rows).

    Hopper's tensor cores take their first operand from registers, where weights have just been
    decoded, and rows come by the eight rather than by the sixty-four. What lies beyond the rows
    or the channels reads the last one again, and is not stored.
    """
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    pairs = positions
    if SORTED and (GATHER or SCATTER):
        pairs = tl.load(ids_ptr + positions)
    x_rows = positions
    if GATHER:
        x_rows = pairs // pairs_per_row
    out_rows = positions
    if SCATTER:
        out_rows = pairs

    tile_rows = tl.arange(0, BLOCK_N)
    if GATED:
        halves = (tile_rows // GATE_ROWS) % 2
        channels = tile_rows // (2 * GATE_ROWS) * GATE_ROWS + tile_rows % GATE_ROWS
        channels = tl.minimum(tile_n * BLOCK_OUT + channels, N - 1) + halves * N
    else:
        channels = tl.minimum(tile_n * BLOCK_OUT + tile_rows, N - 1)

    offsets_k = tl.arange(0, BLOCK_K)
    # int64: rows times their length pass 2**31.
    x_ptrs = x_ptr + x_rows.to(tl.int64)[None, :] * stride_x + offsets_k[:, None]
    weight_ptrs = weight_ptr + channels.to(tl.int64)[:, None] * stride_weight_n + offsets_k[None, :]
    INTEGER: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if INTEGER else tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            mask_k = offsets_k < K - k
            x = tl.load(x_ptrs, mask=mask_k[:, None], other=0.0)
            weight = tl.load(weight_ptrs, mask=mask_k[None, :], other=0.0)
        weight = decode_weights(weight, x.dtype, FP8, ASM)
        if TWO_LEVEL:
            acc = tl.dot(weight, x, acc, max_num_imprecise_acc=32 if BLOCK_K == 32 else 64)
        else:
            acc = tl.dot(weight, x, acc, input_precision="ieee", out_dtype=acc.dtype)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    acc = acc.to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channels)
        if FP8:
            scale = scale * 256.0  # what decode_weights left out
        acc = acc * scale[:, None]
    if x_scale_ptr is not None:
        acc = acc * tl.load(x_scale_ptr + x_rows)[None, :]
    if bias_ptr is not None:
        acc = acc + tl.load(bias_ptr + channels).to(tl.float32)[:, None]
    if NAME is not None:
        up = acc
        if GATED:
            acc = tl.reshape(acc, (BLOCK_N // (2 * GATE_ROWS), 2, GATE_ROWS, BLOCK_M))
            acc, up = tl.split(tl.permute(acc, (0, 2, 3, 1)))
            acc = tl.reshape(acc, (BLOCK_OUT, BLOCK_M))
            up = tl.reshape(up, (BLOCK_OUT, BLOCK_M))
        acc = apply_triton(
            acc, up, NAME, GATED, ALPHA, UP_SHIFT, LIMIT, LIMIT_AFTER, GATE_SOFTCAP, UP_SOFTCAP
        )  # fmt: skip
    # Weights that are not there must not pass for some.
    acc = tl.where(absent, float("nan"), acc)
    columns = tile_n * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_ptrs = out_ptr + out_rows.to(tl.int64)[None, :] * N + columns[:, None]
    mask = (columns < N)[:, None] & mask_m[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch_grouped_gemm(
    x: torch.Tensor,  # (num_rows, in_features)
    weight: torch.Tensor,  # (num_slots, rows, in_features)
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    topk_ids: torch.Tensor,
    num_experts: int,
    routing: ExpertRouting | None,
    expert_to_slot: torch.Tensor | None,
    out: torch.Tensor,  # (num_pairs, out_features)
    tile: TileConfig,
    *,
    x_scale: torch.Tensor | None = None,  # (num_rows,)
    activation: Activation | None = None,
    two_level_sums: bool = False,
    pairs_per_row: int | None = None,
    scatter: bool = False,
    dependent: bool = True,
    prefetch: bool = False,
) -> torch.Tensor:
    """Fill the routed rows of ``out`` and return it; the others are left as they are.

    All tensors but weights are contiguous; see `qmoe_kernels.layer`.

    Args:
        routing: sorted pairs; None: programs look for their rows in ``topk_ids``, and rows of
            ``x`` and ``out`` are in the order of pairs.
        x_scale: where ``x`` has the weights' 8-bit dtype.
        activation: fused into the epilogue.
        two_level_sums: see `qmoe_kernels.fused_moe`.
        pairs_per_row: row ``pair // pairs_per_row`` of ``x`` belongs to a pair; None says that
            rows of ``x`` are in the order of sorted pairs.
        scatter: write in the order of pairs instead of the sorted order.
        dependent: start while the kernel before this one ends, where the GPU can; that kernel is
            to wait for its own predecessor before it lets this one start.
        prefetch: ask for weights before that kernel has ended; for few rows of products after the
            first.
    """
    num_pairs, out_features = out.shape
    if num_pairs == 0 or out_features == 0:
        return out
    in_features = x.shape[1]
    gated = activation is not None and activation.gated
    max_tiles_m = num_pairs
    if routing is not None:
        # Every expert but one may leave its last tile nearly empty.
        extra = max(0, num_pairs - num_experts) // tile.block_m
        max_tiles_m = min(num_pairs, num_experts + extra)
    pdl = has_dependent_launch(x.device)
    # Few: they bridge the microseconds between two kernels, and all have to stay in L2.
    lines = min(2, triton.cdiv(in_features * weight.element_size(), 128))
    grid = (max_tiles_m * triton.cdiv(out_features * (2 if gated else 1), tile.block_n),)
    grouped_gemm_kernel[grid](
        x,
        x_scale,
        weight_bits(weight, x),
        scale,
        bias,
        out,
        topk_ids if routing is None else routing.sorted_pair_ids,
        None if routing is None else routing.expert_offsets,
        expert_to_slot,
        num_pairs,
        num_experts,
        max_tiles_m,
        pairs_per_row or 1,
        out_features,
        in_features,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        SORTED=routing is not None,
        GATHER=pairs_per_row is not None,
        SCATTER=scatter,
        FP8=is_decoded_fp8(weight, x),
        **activation_constants(activation),
        BLOCK_IDS=_block_ids(num_experts if routing is not None else num_pairs),
        EVEN_K=in_features % tile.block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        TAIL_M=tile.tail_m,
        GROUP_M=8,
        PREFETCH_LINES=triton.next_power_of_2(lines) if prefetch and pdl else 0,
        TWO_LEVEL=two_level_sums and x.dtype == torch.float8_e4m3fn,
        ASM=COMPILED,
        PDL=pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(dependent, x.device),
    )
    return out


def _block_ids(number: int) -> int:
    """A power of two, and few different ones: each compiles a kernel."""
    few = (size for size in (32, 128, 512, 2048) if number <= size)
    return next(few, triton.next_power_of_2(number))
