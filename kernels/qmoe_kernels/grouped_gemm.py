"""The Triton kernels of an MoE layer and their launchers.

Grouped GEMM: for every expert ``e`` with rows ``X_e`` (tokens routed to it),

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

import functools

import torch
import triton
import triton.language as tl

from qmoe_kernels.activations import Activation, apply_triton
from qmoe_kernels.heuristic import heuristic_tile, heuristic_tiles
from qmoe_kernels.quantization import LARGEST, SMALLEST_SCALE, STORAGE_DTYPE
from qmoe_kernels.routing import ExpertRouting
from qmoe_kernels.tiles import LayerShape, LayerTiles, TileConfig
from qmoe_kernels.tuning import choose_tiles

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
    """Grid: (max_tiles_m * cdiv(channels, BLOCK_N),); programs without rows leave at once.

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
            return
        rank = tl.cumsum((all_experts == expert).to(tl.int32), 0) - 1
        first = tl.sum(tl.where(ids == tile_m, rank, 0), 0)
        if first % BLOCK_M != 0:
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
        _prefetch(weight_ptr, prefetched.to(tl.int64) * stride_weight_n, K, PREFETCH_LINES)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

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
def _prefetch(ptr, offsets, length, LINES: tl.constexpr):
    """Bring LINES cache lines from each ``ptr + offsets`` on to L2, up to ``length`` elements."""
    LINE: tl.constexpr = 128 * 8 // ptr.dtype.element_ty.primitive_bitwidth
    lines = tl.minimum(tl.arange(0, LINES) * LINE, length - 1)
    ptrs = (ptr + offsets[:, None] + lines[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs], tl.int32, is_pure=False, pack=1
    )


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
        weight = _decode(weight, x.dtype, FP8, ASM)
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
            scale = scale * 256.0  # what _decode left out
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


@triton.jit
def _decode(weight, dtype: tl.constexpr, FP8: tl.constexpr, ASM: tl.constexpr):
    """Convert a tile of weights to ``dtype``; e4m3fn comes as int8 and leaves as 2**-8 of itself.

    The bits ``seeeemmm`` put into a half as ``s0eeeemmm0000000`` are the number times 2**-8,
    exactly and subnormals included (the biases are 7 and 15). No architecture needs an
    instruction for it. ASM does four values at a time, without the conversion instructions,
    which run at a quarter of the speed of others.
    """
    if weight.dtype == dtype:
        return weight
    if ASM and dtype == tl.bfloat16:
        if FP8:
            return tl.inline_asm_elementwise(
                _E4M3_TO_BF16, "=r,=r,r", [weight], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        return tl.inline_asm_elementwise(
            _INT8_TO_BF16, "=r,=r,r", [weight], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    if ASM and dtype == tl.float16:
        if FP8:
            return tl.inline_asm_elementwise(
                _E4M3_TO_FP16, "=r,=r,r", [weight], dtype=tl.float16, is_pure=True, pack=4
            )
        return tl.inline_asm_elementwise(
            _INT8_TO_FP16, "=r,=r,r", [weight], dtype=tl.float16, is_pure=True, pack=4
        )
    if FP8:
        # Sign extension puts copies of the sign into bits 15 and 14; the mask clears bit 14.
        weight = (weight.to(tl.int16) << 7) & -0x4001
        weight = weight.to(tl.float16, bitcast=True)
    return weight.to(dtype)


# Bytes b0..b3 to two pairs of halves. Digits of prmt's selector count from the lowest byte of the
# result; 0-3 are bytes of $2, 4-7 of the constant.

# 0x43 above the byte s_uuuuuuu: without s it is 128 + u, of which s alone takes 128 (s = 0) or,
# read as 0x4380, 256: u or u - 128.
_INT8_TO_BF16 = tl.constexpr("""{
.reg .b32 a, b, c, d, minus_one;
mov.b32 minus_one, 0xBF80BF80;
prmt.b32 a, $2, 0x43434343, 0x4140;
prmt.b32 b, $2, 0x43434343, 0x4342;
and.b32 c, a, 0xFF80FF80;
and.b32 d, b, 0xFF80FF80;
and.b32 a, a, 0xFF7FFF7F;
and.b32 b, b, 0xFF7FFF7F;
fma.rn.bf16x2 $0, c, minus_one, a;
fma.rn.bf16x2 $1, d, minus_one, b;
}""")

# s0000eeeemmm0000 is the number times 2**-120 (the biases are 7 and 127); times 2**112.
_E4M3_TO_BF16 = tl.constexpr("""{
.reg .b32 a, b, c, d, factor, zero;
mov.b32 factor, 0x77807780;
mov.b32 zero, 0x80008000;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.b32 c, a, 4;
shr.b32 d, b, 4;
and.b32 c, c, 0x07F007F0;
and.b32 d, d, 0x07F007F0;
lop3.b32 a, a, 0x80008000, c, 0xEA;
lop3.b32 b, b, 0x80008000, d, 0xEA;
fma.rn.bf16x2 $0, a, factor, zero;
fma.rn.bf16x2 $1, b, factor, zero;
}""")

# 0x64 above the byte with its sign flipped is 1024 + 128 + the number.
_INT8_TO_FP16 = tl.constexpr("""{
.reg .b32 a, b, c, offset, one;
mov.b32 offset, 0xE480E480;
mov.b32 one, 0x3C003C00;
xor.b32 c, $2, 0x80808080;
prmt.b32 a, c, 0x64646464, 0x4140;
prmt.b32 b, c, 0x64646464, 0x4342;
fma.rn.f16x2 $0, a, one, offset;
fma.rn.f16x2 $1, b, one, offset;
}""")

_E4M3_TO_FP16 = tl.constexpr("""{
.reg .b32 a, b, c, d;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.b32 c, a, 1;
shr.b32 d, b, 1;
and.b32 c, c, 0x3F803F80;
and.b32 d, d, 0x3F803F80;
lop3.b32 $0, a, 0x80008000, c, 0xEA;
lop3.b32 $1, b, 0x80008000, d, 0xEA;
}""")


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
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    LIMIT: tl.constexpr,
    LIMIT_AFTER: tl.constexpr,
    GATE_SOFTCAP: tl.constexpr,
    UP_SOFTCAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,  # per program
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Products of single rows, and with topk_weights_ptr their sum over a token's experts.

    Grid: (num_pairs / PAIRS, cdiv(channels, BLOCK_N)). Without tensor cores, of which one row
    would leave seven eighths idle. All experts of a program are read at the same time.

    The kernel before this one must not have written ids or slots.
    """
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    order = tl.arange(0, PAIRS_BLOCK)
    pairs = tl.program_id(0) * PAIRS + order
    expert = tl.load(topk_ids_ptr + pairs, mask=order < PAIRS, other=-1).to(tl.int32)
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
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((PAIRS_BLOCK, BLOCK_N, BLOCK_K), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        mask_k = mask
        if not EVEN_K:
            mask_k = mask & (offsets_k < K - k)[None, None, :]
        x = tl.load(x_ptrs + k, mask=mask_k, other=0.0)
        weight = tl.load(weight_ptrs + k, mask=mask_k, other=0.0)
        if weight.dtype == tl.int8:
            weight = _decode(weight, tl.float16, FP8, ASM)
        acc += weight.to(tl.float32) * x.to(tl.float32)
    if PREFETCH_LINES > 0:
        # What is left of this kernel leaves the memory idle.
        LINE: tl.constexpr = 128 * 8 // next_weight_ptr.dtype.element_ty.primitive_bitwidth
        start = slot * stride_next_slot + tl.program_id(1) * PREFETCH_LINES * LINE
        left = next_length - tl.program_id(1) * PREFETCH_LINES * LINE
        if left > 0:
            _prefetch(next_weight_ptr, start, left, PREFETCH_LINES)

    y = tl.sum(acc, 2)
    scale_rows = expert[:, None] * channels + rows[None, :]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + scale_rows)
        if FP8:
            scale = scale * 256.0  # what _decode left out
        y = y * scale
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + scale_rows).to(tl.float32)
    up = y
    if GATED:
        y, up = tl.split(tl.permute(tl.reshape(y, (PAIRS_BLOCK, 2, BLOCK_OUT)), (0, 2, 1)))
    if NAME is not None:
        y = apply_triton(
            y, up, NAME, GATED, ALPHA, UP_SHIFT, LIMIT, LIMIT_AFTER, GATE_SOFTCAP, UP_SOFTCAP
        )  # fmt: skip
    y = tl.where(absent[:, None], float("nan"), y).to(out_ptr.dtype.element_ty)
    exists = columns < N
    if topk_weights_ptr is None:
        out_ptrs = out_ptr + pairs.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(out_ptrs, y, mask=routed[:, None] & exists[None, :])
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
    PDL: tl.constexpr,
):
    """Grid: (num_tokens, cdiv(hidden_size, BLOCK)). Rows of skipped ids are never read."""
    if PDL:
        tl.extra.cuda.gdc_wait()
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
        weight = tl.load(topk_weights_ptr + pair).to(tl.float32)
        acc = tl.fma(row.to(tl.float32), tl.zeros_like(acc) + weight, acc)
    tl.store(out_ptr + token * hidden_size + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def quantize_rows_kernel(
    x_ptr,  # (num_rows, K)
    out_ptr,  # (num_rows, K) int8 | e4m3fn
    scale_ptr,  # (num_rows,) fp32
    num_rows,
    K,
    LARGEST_VALUE: tl.constexpr,  # 127 or 448
    SMALLEST: tl.constexpr,  # a scale is not below
    ROWS: tl.constexpr,  # per program
    BLOCK: tl.constexpr,  # power of two; rows that are longer are read twice
    EARLY: tl.constexpr,  # the kernel before this one did not write x
    PDL: tl.constexpr,
):
    """Grid: (cdiv(num_rows, ROWS),)."""
    if PDL and not EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    x_ptrs = x_ptr + rows[:, None] * K + columns[None, :]
    out_ptrs = out_ptr + rows[:, None] * K + columns[None, :]
    mask = (rows < num_rows)[:, None]
    x = tl.load(x_ptrs, mask=mask & (columns < K)[None, :], other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(x), 1)
    not_finite = tl.sum(x * 0.0, 1)
    for k in range(BLOCK, K, BLOCK):
        other = tl.load(x_ptrs + k, mask=mask & (columns < K - k)[None, :], other=0.0)
        absmax = tl.maximum(absmax, tl.max(tl.abs(other.to(tl.float32)), 1))
        not_finite += tl.sum(other.to(tl.float32) * 0.0, 1)
    # A maximum passes over NaN, a sum does not.
    scale = tl.maximum(absmax / LARGEST_VALUE, SMALLEST) + not_finite
    if PDL and EARLY:
        # What is written now may have been that kernel's memory.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(scale_ptr + rows, scale, mask=rows < num_rows)
    # Times the inverse: where that rounds another way than a division, it is by one unit of a
    # number half-way between two.
    inverse = (1.0 / scale)[:, None]
    x = _round_to(x * inverse, out_ptr.dtype.element_ty, LARGEST_VALUE)
    tl.store(out_ptrs, x, mask=mask & (columns < K)[None, :])
    for k in range(BLOCK, K, BLOCK):
        mask_k = mask & (columns < K - k)[None, :]
        other = tl.load(x_ptrs + k, mask=mask_k, other=0.0).to(tl.float32)
        other = _round_to(other * inverse, out_ptr.dtype.element_ty, LARGEST_VALUE)
        tl.store(out_ptrs + k, other, mask=mask_k)


@triton.jit
def _round_to(x, dtype: tl.constexpr, LARGEST_VALUE: tl.constexpr):
    x = tl.minimum(tl.maximum(x, -LARGEST_VALUE), LARGEST_VALUE)
    if dtype == tl.int8:
        # The sum is past 2**23, where fp32 has no fraction: rounded, half to even.
        x = (x + 12582912.0) - 12582912.0
    return x.to(dtype)


# Of the second product's weights, while the first one ends: a good part of a large GPU's L2.
PREFETCHED_BYTES = 16 << 20

# Inline assembly and programmatic launches are for devices, not for the interpreter.
COMPILED = isinstance(grouped_gemm_kernel, triton.JITFunction)


@functools.cache
def _has_dependent_launch(device: torch.device) -> bool:
    return COMPILED and torch.cuda.get_device_capability(device) >= (9, 0)


def _launch_options(dependent: bool, device: torch.device) -> dict[str, bool]:
    return {"launch_pdl": True} if dependent and _has_dependent_launch(device) else {}


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
    x = x.contiguous()
    gated = activation is not None and activation.gated
    max_tiles_m = num_pairs
    if routing is not None:
        # Every expert but one may leave its last tile nearly empty.
        extra = max(0, num_pairs - num_experts) // tile.block_m
        max_tiles_m = min(num_pairs, num_experts + extra)
    pdl = _has_dependent_launch(x.device)
    # Few: they bridge the microseconds between two kernels, and all have to stay in L2.
    lines = min(2, triton.cdiv(in_features * weight.element_size(), 128))
    grid = (max_tiles_m * triton.cdiv(out_features * (2 if gated else 1), tile.block_n),)
    grouped_gemm_kernel[grid](
        x,
        x_scale,
        _bits(weight, x),
        None if scale is None else scale.contiguous(),
        None if bias is None else bias.contiguous(),
        out,
        topk_ids.contiguous() if routing is None else routing.sorted_pair_ids,
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
        FP8=_is_decoded_fp8(weight, x),
        **_activation_constants(activation),
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
        **_launch_options(dependent, x.device),
    )
    return out


def launch_gemv(
    x: torch.Tensor,  # (num_tokens, in_features), or (num_pairs, in_features) if per_pair
    weight: torch.Tensor,  # (num_slots, rows, in_features)
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    num_experts: int,
    expert_to_slot: torch.Tensor | None,
    out: torch.Tensor,  # (num_pairs, out_features), or (num_tokens, out_features) if summed
    tile: TileConfig,
    *,
    activation: Activation | None = None,
    per_pair: bool = False,
    next_weight: torch.Tensor | None = None,
    dependent: bool = True,
) -> torch.Tensor:
    """Fill the routed rows of ``out`` and return it; with ``topk_weights``, sums over experts.

    ``next_weight`` (num_slots, ...) is what the next kernel reads: as much as L2 keeps of it is
    prefetched at the end of this one.
    """
    out_features = out.shape[1]
    if out.numel() == 0:
        return out
    in_features = x.shape[1]
    x = x.contiguous()
    gated = activation is not None and activation.gated
    pdl = _has_dependent_launch(x.device)
    tiles_n = triton.cdiv(out_features * (2 if gated else 1), tile.block_n)
    # Also where rows are not summed up: equal layouts of threads give equal bits.
    pairs = topk_ids.shape[1] if per_pair else 1
    next_bytes = 0
    if next_weight is not None and pdl:
        next_bytes = min(next_weight[0].nbytes, PREFETCHED_BYTES // topk_ids.numel())
    gemv_kernel[(topk_ids.numel() // pairs, tiles_n)](
        x,
        _bits(weight, x),
        None if scale is None else scale.contiguous(),
        None if bias is None else bias.contiguous(),
        out,
        topk_ids.contiguous(),
        None if topk_weights is None else topk_weights.contiguous(),
        expert_to_slot,
        None if next_weight is None else _bits(next_weight, x),
        num_experts,
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
        FP8=_is_decoded_fp8(weight, x),
        **_activation_constants(activation),
        EVEN_K=in_features % tile.block_k == 0,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        NUM_STAGES=tile.num_stages,
        PREFETCH_LINES=next_bytes
        and triton.next_power_of_2(triton.cdiv(next_bytes, 128 * tiles_n)),
        ASM=COMPILED,
        PDL=pdl,
        num_warps=tile.num_warps,
        **_launch_options(dependent, x.device),
    )
    return out


def _bits(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return weight.view(torch.int8) if _is_decoded_fp8(weight, x) else weight


def _is_decoded_fp8(weight: torch.Tensor, x: torch.Tensor) -> bool:
    return weight.dtype == torch.float8_e4m3fn and x.dtype != weight.dtype


def _activation_constants(activation: Activation | None) -> dict[str, object]:
    a = activation or Activation(gated=False)
    return {
        "NAME": None if activation is None else a.name,
        "GATED": a.gated,
        "ALPHA": a.alpha,
        "UP_SHIFT": a.up_shift,
        "LIMIT": a.limit,
        "LIMIT_AFTER": a.limit_after,
        "GATE_SOFTCAP": a.gate_softcap,
        "UP_SOFTCAP": a.up_softcap,
    }


def _block_ids(number: int) -> int:
    """A power of two, and few different ones: each compiles a kernel."""
    return next(size for size in (32, 128, 512, 2048) if number <= size)


def launch_quantize_rows(
    x: torch.Tensor, dtype: torch.dtype, *, dependent: bool, early: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x`` (num_rows, K) to int8 or e4m3fn; returns that and its scales.

    ``early``: the kernel before this one does not write ``x``, which is read without waiting.
    """
    x = x.contiguous()
    num_rows, in_features = x.shape
    out = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty(num_rows, dtype=torch.float32)
    if out.numel():
        block = min(16384, max(16, triton.next_power_of_2(in_features)))
        rows = max(1, 4096 // block)
        largest = next(LARGEST[name] for name, stored in STORAGE_DTYPE.items() if stored == dtype)
        quantize_rows_kernel[(triton.cdiv(num_rows, rows),)](
            x,
            out,
            scale,
            num_rows,
            in_features,
            LARGEST_VALUE=largest,
            SMALLEST=SMALLEST_SCALE,
            ROWS=rows,
            BLOCK=block,
            EARLY=early,
            PDL=_has_dependent_launch(x.device),
            num_warps=max(4, block // 1024),
            **_launch_options(dependent, x.device),
        )
    return out, scale


def launch_weighted_sum(
    rows: torch.Tensor,  # (num_tokens, top_k, hidden_size)
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    num_experts: int = 0,
    *,
    dependent: bool = False,
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
            PDL=_has_dependent_launch(rows.device),
            **_launch_options(dependent, rows.device),
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
    if tiles.tma and two_level_sums:
        tiles = heuristic_tiles(shape, num_tokens, gate_up_proj.dtype, x_dtype)
    if tiles.tma:
        # It has parts of this module.
        from qmoe_kernels import hopper_gemm

        weights = (gate_up_proj, gate_up_proj_scale, down_proj, down_proj_scale)
        if hopper_gemm.hopper_supports(
            hidden_states, *weights, topk_ids, activation, num_experts, activations=activations
        ):
            return hopper_gemm.hopper_fused_moe(
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
        dependent=tiles.sort or activations is not None,
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
    routing = ExpertRouting.from_topk_ids(topk_ids, num_experts)
    x, x_scale = x.flatten(0, -2), None
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
