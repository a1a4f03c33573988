"""Grouped GEMM in Triton: for every expert ``e`` with rows ``X_e`` (tokens routed to it),

    Y_e = epilogue(X_e @ W_e^T),    epilogue(acc) = activation(acc * row_scale * scale_e + bias_e)

Weights are int8, e4m3fn or the dtype of the rows; rows are 16 or 32 bits wide, or of the weights'
8-bit dtype with a scale each. 8-bit weights that meet wider rows become the rows' dtype in
registers on the way to the tensor cores, exactly. Sums are fp32 (int32 for int8 with int8); scales
and the bias are applied to the sum. Layouts: rows (num_rows, K), weights (num_slots, N, K), both K
contiguous.

A pair is one token with one of its experts. Few pairs stay in the order of ``topk_ids``, and each
program looks for its expert's rows itself; many are sorted by expert and cut into tiles first, see
`ExpertRouting`, and lie in that order between the two products: the first one gathers tokens, the
second scatters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
from qmoe_kernels.routing import ExpertRouting
from qmoe_kernels.tiles import TileConfig
from qmoe_kernels.widening import widen_weights

# Of 16 neighbouring rows in a tile of a gated product, 8 are gate channels and 8 the same up
# channels: a thread of the tensor cores' layout holds rows i and i + 8, so both meet there.
GATE_ROWS = tl.constexpr(8)
# Neighbouring programs have the same channels of so many tiles of rows.
GROUP_M = 8


@dataclass(frozen=True)
class Product:
    """What a kernel is compiled for, its tile apart.

    Attributes:
        sorted: ids are pairs sorted by expert; else ``topk_ids``.
        gather: so many pairs share a row, which is read by pair; 0: by sorted position.
        scatter: rows are written by pair, rather than by sorted position.
        fp8: weights are e4m3fn, given as int8, and rows are wider.
        even_k: tiles divide K.
        align: a power of two that divides K and the strides. Loads are no wider.
        two_level: FP8 with FP8: sum up in fp32 what few products give.
        activation: fused into the epilogue, or None.
        asm: widen weights by inline assembly.
    """

    sorted: bool
    gather: int
    scatter: bool
    fp8: bool
    even_k: bool
    align: int
    two_level: bool
    activation: Activation | None
    asm: bool = COMPILED

    @property
    def gated(self) -> bool:
        return self.activation is not None and self.activation.gated


class Rows(NamedTuple):
    """What is multiplied, as `_tile` takes it."""

    ptr: Any  # (num_rows, K)
    scale_ptr: Any  # (num_rows,) fp32, or None
    stride: Any


class Weights(NamedTuple):
    """One expert's weights, as `_tile` takes them."""

    ptr: Any  # (N or 2 * N, K)
    scale_ptr: Any  # (N or 2 * N,) fp32, or None
    bias_ptr: Any  # (N or 2 * N,), or None
    stride: Any
    absent: Any  # they are not there


# Not specialized: they vary with the number of tokens, which must not compile anything.
@triton.jit(
    do_not_specialize=[
        "num_pairs",
        "num_experts",
        "max_tiles_m",
        "K",
        "stride_x",
        "stride_weight_slot",
        "stride_weight_n",
    ]
)
def grouped_gemm_kernel(
    x_ptr,  # (num_rows, K)
    x_scale_ptr,  # (num_rows,) fp32, or None
    weight_ptr,  # (num_slots, N or 2 * N, K)
    scale_ptr,  # (num_experts, N or 2 * N) fp32, or None
    bias_ptr,  # (num_experts, N or 2 * N), or None
    out_ptr,  # (num_pairs, N)
    ids_ptr,  # (num_pairs,) int32: sorted pairs if sorted, else topk_ids, any int
    tiles_ptr,  # (max_tiles_m + 1, 4) int32 if sorted, see ExpertRouting
    expert_to_slot_ptr,  # (num_experts,) int32, or None; not read if sorted
    num_pairs,
    num_experts,
    max_tiles_m,
    N,  # out_features
    K,  # in_features; this and the strides over PRODUCT.align
    stride_x,
    stride_weight_slot,
    stride_weight_n,
    PRODUCT: tl.constexpr,  # a Product
    TILE: tl.constexpr,  # a TileConfig
    BLOCK_IDS: tl.constexpr,  # power of two, at least num_pairs if not sorted
    GROUP_M: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (min(GROUP_M, max_tiles_m) * cdiv(channels, BLOCK_N), cdiv(max_tiles_m, GROUP_M)).

    Programs without rows only wait. With a gate, channels are gate and up ones together, 2 * N.

    PREFETCH_LINES: ask for so many cache lines of each row of weights before waiting for the
    kernel before this one, which must not have written ids, tiles or slots.
    """
    if PDL and PREFETCH_LINES == 0:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    K *= PRODUCT.align
    stride_x *= PRODUCT.align
    stride_weight_slot = stride_weight_slot.to(tl.int64) * PRODUCT.align
    stride_weight_n *= PRODUCT.align
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    TAIL_M: tl.constexpr = TILE.tail_m
    # Neighbouring programs share weights (same expert, same channels) and then rows: L2 serves
    # both.
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if PRODUCT.gated else BLOCK_N
    pid = tl.program_id(0)
    tile_m = pid % GROUP_M
    tile_n = pid // GROUP_M
    group_m = max_tiles_m - tl.program_id(1) * GROUP_M
    if group_m < GROUP_M:  # the last: a division takes as long as all else here
        tile_m = pid % group_m
        tile_n = pid // group_m
        if tile_n * BLOCK_OUT >= N:
            _wait_late(PREFETCH_LINES)
            return
    tile_m += tl.program_id(1) * GROUP_M

    if PRODUCT.sorted:
        expert, slot, first, num_rows = _load_tile(tiles_ptr + 4 * tile_m, PRODUCT.asm)
        if num_rows <= 0:
            _wait_late(PREFETCH_LINES)
            return
    else:
        # Program tile_m has the rows of its pair's expert if the pair is that expert's first, or
        # its (BLOCK_M + 1)-th, and so on.
        ids = tl.arange(0, BLOCK_IDS)
        all_experts = narrow(tl.load(ids_ptr + ids, mask=ids < num_pairs, other=-1))
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
    weight_ptr += tl.maximum(slot, 0) * stride_weight_slot
    channels = N
    if PRODUCT.gated:
        channels = 2 * N
    if scale_ptr is not None:
        scale_ptr += expert * channels
    if bias_ptr is not None:
        bias_ptr += expert * channels

    if PREFETCH_LINES > 0:
        prefetched = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
        prefetch(weight_ptr, prefetched.to(tl.int64) * stride_weight_n, K, PREFETCH_LINES)
    _wait_late(PREFETCH_LINES)

    x = Rows(x_ptr, x_scale_ptr, stride_x)
    weights = Weights(weight_ptr, scale_ptr, bias_ptr, stride_weight_n, absent)
    if TAIL_M > 0:  # noqa: SIM102 (one is known when compiling)
        if num_rows <= TAIL_M:
            rows = tl.arange(0, TAIL_M)
            if PRODUCT.sorted:
                pairs = first + tl.minimum(rows, num_rows - 1)
            else:
                pairs = _pairs_of_ranks(rank, first + tl.minimum(rows, num_rows - 1), ids)
            inside = rows < num_rows
            _tile(x, weights, out_ptr, ids_ptr, pairs, inside, tile_n, N, K, PRODUCT, TILE, TAIL_M)
            return
    rows = tl.arange(0, BLOCK_M)
    if PRODUCT.sorted:
        pairs = first + tl.minimum(rows, num_rows - 1)
    else:
        pairs = _pairs_of_ranks(rank, first + tl.minimum(rows, num_rows - 1), ids)
    inside = rows < num_rows
    _tile(x, weights, out_ptr, ids_ptr, pairs, inside, tile_n, N, K, PRODUCT, TILE, BLOCK_M)


@triton.jit
def _wait_late(PREFETCH_LINES: tl.constexpr):
    """Wait for the kernel before this one, unless that was done first thing.

    A program that has nothing to do waits as well: the launch must not end before that kernel.
    """
    if PREFETCH_LINES > 0:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _load_tile(ptr, ASM: tl.constexpr):
    """Four numbers that lie side by side, in one load: the compiler parts it at the next branch."""
    if ASM:
        return tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [ptr.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)


@triton.jit
def _pairs_of_ranks(rank, wanted, ids):
    """Pairs whose rank among their expert's is ``wanted``."""
    return tl.sum(tl.where(rank[None, :] == wanted[:, None], ids[None, :], 0), 1)


@triton.jit
def _tile(
    rows,  # Rows
    weights,  # Weights
    out_ptr,  # (num_pairs, N)
    ids_ptr,
    positions,  # (BLOCK_M,) sorted positions if sorted, else pairs; the last is repeated
    mask_m,  # (BLOCK_M,)
    tile_n,
    N,
    K,
    PRODUCT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # TILE's, or its tail's
):
    """One tile, transposed: (channels, rows).

    Hopper's tensor cores take their first operand from registers, where weights have just been
    widened, and rows come by the eight rather than by the sixty-four. What lies beyond the rows
    or the channels reads the last one again, and is not stored.
    """
    # Triton 3.6 hands on what is declared a constant, not a constant's attribute.
    ACTIVATION: tl.constexpr = PRODUCT.activation
    FP8: tl.constexpr = PRODUCT.fp8
    ASM: tl.constexpr = PRODUCT.asm
    GATED: tl.constexpr = PRODUCT.gated
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_K: tl.constexpr = TILE.block_k
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    pairs = positions
    if PRODUCT.sorted and (PRODUCT.gather > 0 or PRODUCT.scatter):
        pairs = tl.load(ids_ptr + positions)
    x_rows = positions
    if PRODUCT.gather > 0:
        x_rows = pairs // PRODUCT.gather
    out_rows = positions
    if PRODUCT.scatter:
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
    x_ptrs = rows.ptr + x_rows.to(tl.int64)[None, :] * rows.stride + offsets_k[:, None]
    weight_ptrs = weights.ptr + channels.to(tl.int64)[:, None] * weights.stride + offsets_k[None, :]
    INTEGER: tl.constexpr = rows.ptr.dtype.element_ty == tl.int8
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if INTEGER else tl.float32)
    for k in range(0, K, BLOCK_K):
        if PRODUCT.even_k:
            weight = tl.load(weight_ptrs)
            x = tl.load(x_ptrs)
        else:
            mask_k = offsets_k < K - k
            weight = tl.load(weight_ptrs, mask=mask_k[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=mask_k[:, None], other=0.0)
        weight = widen_weights(weight, x.dtype, FP8, ASM)
        if PRODUCT.two_level:
            acc = tl.dot(weight, x, acc, max_num_imprecise_acc=32 if BLOCK_K == 32 else 64)
        else:
            acc = tl.dot(weight, x, acc, input_precision="ieee", out_dtype=acc.dtype)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    acc = acc.to(tl.float32)
    if weights.scale_ptr is not None:
        scale = tl.load(weights.scale_ptr + channels)
        if FP8:
            scale = scale * 256.0  # what widen_weights left out
        acc = acc * scale[:, None]
    if rows.scale_ptr is not None:
        acc = acc * tl.load(rows.scale_ptr + x_rows)[None, :]
    if weights.bias_ptr is not None:
        acc = acc + tl.load(weights.bias_ptr + channels).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        up = acc
        if GATED:
            acc = tl.reshape(acc, (BLOCK_N // (2 * GATE_ROWS), 2, GATE_ROWS, BLOCK_M))
            acc, up = tl.split(tl.permute(acc, (0, 2, 3, 1)))
            acc = tl.reshape(acc, (BLOCK_OUT, BLOCK_M))
            up = tl.reshape(up, (BLOCK_OUT, BLOCK_M))
        acc = apply_triton(acc, up, ACTIVATION)
    # Weights that are not there must not pass for some.
    acc = tl.where(weights.absent, float("nan"), acc)
    columns = tile_n * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_ptrs = out_ptr + out_rows.to(tl.int64)[None, :] * N + columns[:, None]
    mask = (columns < N)[:, None] & mask_m[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch_grouped_gemm(
    x: torch.Tensor,  # (num_rows, in_features)
    projection: Projection,
    topk_ids: torch.Tensor,
    routing: ExpertRouting | None,
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
        routing: sorted pairs in tiles of the tile's block_m; None: programs look
            for their rows in ``topk_ids``, and rows of ``x`` and ``out`` are in the order of pairs.
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
    weight, num_experts = projection.weight, projection.num_experts
    in_features = x.shape[1]
    strides = (x.stride(0), weight.stride(0), weight.stride(1))
    align = math.gcd(16, in_features, *strides)
    if align * weight.element_size() < 4:
        # Too narrow for copies to shared memory: each number comes to a register of its own.
        tile = replace(tile, block_k=32)
    product = Product(
        sorted=routing is not None,
        gather=pairs_per_row or 0,
        scatter=scatter,
        fp8=is_widened_fp8(weight, x),
        even_k=in_features % tile.block_k == 0,
        align=align,
        two_level=two_level_sums and x.dtype == torch.float8_e4m3fn,
        activation=activation,
    )
    tiles, max_tiles_m = None, num_pairs
    if routing is not None:
        tiles = routing.tiles
        if tiles is None or routing.block_m != tile.block_m:
            raise ValueError(f"pairs are in tiles of {routing.block_m}; {tile} needs its block_m")
        max_tiles_m = tiles.shape[0] - 1
    pdl = has_dependent_launch(x.device)
    # Few: they bridge the microseconds between two kernels, and all have to stay in L2.
    lines = min(2, triton.cdiv(in_features * weight.element_size(), 128))
    tiles_n = triton.cdiv(out_features * (2 if product.gated else 1), tile.block_n)
    grid = (min(GROUP_M, max_tiles_m) * tiles_n, triton.cdiv(max_tiles_m, GROUP_M))
    grouped_gemm_kernel[grid](
        x,
        x_scale,
        weight_bits(weight, x),
        projection.scale,
        projection.bias,
        out,
        topk_ids if routing is None else routing.sorted_pair_ids,
        tiles,
        projection.expert_to_slot,
        num_pairs,
        num_experts,
        max_tiles_m,
        out_features,
        in_features // align,
        *(stride // align for stride in strides),
        PRODUCT=product,
        TILE=tile,
        BLOCK_IDS=_block_ids(num_pairs) if routing is None else 1,
        GROUP_M=GROUP_M,
        PREFETCH_LINES=triton.next_power_of_2(lines) if prefetch and pdl else 0,
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
