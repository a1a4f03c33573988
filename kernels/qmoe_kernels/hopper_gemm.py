"""An MoE layer for many tokens on Hopper: grouped GEMM with TMA and asynchronous tensor cores.

The contract is that of the sorted products of `qmoe_kernels.grouped_gemm`: weights of 8 bits, with
rows of 16 bits (converted weights go from registers into the tensor cores) or of the weights'
dtype; or both of 16 bits, of one dtype. What differs is how data moves: Triton's own pipelines
compute addresses and convert weights between two products; here TMA brings tiles, and weights of
the next tile are converted while the tensor cores multiply this one. Rows lie sorted in memory
before each product, since TMA gathers none.

Order of K where weights are converted: a thread of a quad feeds ``wgmma`` with columns 2t, 2t+1,
2t+8, 2t+9 of every 16. It had better read neighbouring bytes of weights. So within every
`BLOCK_K_16` columns, column ``(t, j, h, e)`` (4, BLOCK_K_16 / 16, 2, 2) of rows lies at
``(j, h, t, e)``, and weights lie as they are: thread t's quarter of the columns are then its
operands, of one step after another.

Gradients multiply by transposed weights, ``x_e @ W_e`` instead of ``x_e @ W_e^T``: the sum goes
along what the forward pass calls N, and K are the channels of the result. Rows then need no order
of their own. But neighbouring bytes of weights are neighbouring channels: a thread reads two
of them at a time, which change places with rows i and i + 8 of its first operand, and back in the
epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qmoe_kernels.activations import Activation, apply_triton
from qmoe_kernels.experts import Experts, Projection
from qmoe_kernels.launching import (
    has_dependent_launch,
    is_widened_fp8,
    launch_options,
    weight_bits,
)
from qmoe_kernels.quantization import QuantizedRows
from qmoe_kernels.routing import ExpertRouting
from qmoe_kernels.rows import launch_quantize_rows, launch_weighted_sum
from qmoe_kernels.tiles import TileConfig
from qmoe_kernels.tuning import is_hopper
from qmoe_kernels.widening import widen_weights, widen_words

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_init,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # Triton without Gluon
    gluon = None

BLOCK_N = 128  # weight rows of a tile: two warpgroups' 64
BLOCK_K_16, BLOCK_K_8 = 64, 128  # columns of a tile, by the bits of rows: 128 bytes of rows
GATE_ROWS = tl.constexpr(8)  # as in grouped_gemm
SHARED_MEMORY = 227 << 10  # bytes that a program may take
EPILOGUE_MEMORY = 16 << 10  # of them, at most, but where it may take that of the steps


@dataclass(frozen=True)
class HopperProduct:
    """What a kernel is compiled for, its tile apart.

    Attributes:
        scatter: rows are written by pair, rather than by sorted position.
        fp8: weights are e4m3fn, given as int8, and rows are wider.
        permute: so many columns of the result change places; 0: none do.
        activation: fused into the epilogue, or None.
        transposed: rows are multiplied by weights, rather than by weights transposed.
    """

    scatter: bool
    fp8: bool
    permute: int
    activation: Activation | None
    transposed: bool = False

    @property
    def gated(self) -> bool:
        return self.activation is not None and self.activation.gated


class Stages(NamedTuple):
    """What a program reads, step by step, and the shared memory that it comes to."""

    weight_desc: Any
    x_desc: Any
    weights: Any  # (num_stages, as weight_desc's box)
    rows: Any  # (num_stages, block_m, block_k)
    weights_full: Any  # (num_stages, 1) barriers
    rows_full: Any  # (num_stages, 1) barriers
    num_steps: Any


class Place(NamedTuple):
    """Where a program's tile is."""

    expert: Any
    slot: Any
    absent: Any  # there is no slot
    first: Any  # sorted position
    num_rows: Any
    row_n: Any  # of weights; of gates alone, if gated


class Scales(NamedTuple):
    """What sums are multiplied by, and what is added."""

    rows_ptr: Any  # (num_pairs,) fp32, or None
    weights_ptr: Any  # (num_experts, N or 2 * N) fp32, or None; (num_experts,) if transposed
    bias_ptr: Any  # (num_experts, N or 2 * N), or None


class Out(NamedTuple):
    """Where the result goes."""

    ptr: Any  # (num_pairs, stride)
    sorted_pair_ids_ptr: Any  # (num_pairs,) int32
    num_columns: Any
    stride: Any


@triton.jit
def sort_rows_kernel(
    x_ptr,  # (num_tokens, words) int32
    positions_ptr,  # (num_tokens, TOP_K) int32
    out_ptr,  # (num_tokens * TOP_K, out_words) int32, sorted
    scale_ptr,  # (num_tokens,) fp32, which go with their rows; or None
    out_scale_ptr,  # (num_tokens * TOP_K,) fp32, or None
    words,
    out_words,
    TOP_K: tl.constexpr,
    GROUP: tl.constexpr,  # words whose order changes among themselves; 0: none does
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (num_tokens, cdiv(out_words, BLOCK)). Rows of tokens to where pairs are, tails zero.

    A word is two numbers of 16 bits, in the order ``(t, j, h)``: that of the module's docstring;
    or four of 8 bits, whose order does not change.
    """
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * words + offsets, mask=offsets < words, other=0)
    if GROUP > 0:
        x = tl.reshape(x, (BLOCK // GROUP, 4, GROUP // 4))
        x = tl.reshape(tl.permute(x, (0, 2, 1)), (BLOCK,))
    scale = 0.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + token)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for k in tl.static_range(TOP_K):
        position = tl.load(positions_ptr + token * TOP_K + k).to(tl.int64)
        tl.store(out_ptr + position * out_words + offsets, x, mask=offsets < out_words)
        if scale_ptr is not None:  # all programs of a row write the same
            tl.store(out_scale_ptr + position, scale)


def tile_heights(block_m: int, tail_m: int) -> list[int]:
    """Return how many rows a program's tile may have: tail_m, twice that, ... block_m."""
    lowest = max(tail_m or block_m, block_m // 16)
    return [lowest << i for i in range((block_m // lowest).bit_length())]


if gluon is not None:

    @gluon.constexpr_function
    def _register_bases(block_k):
        """A thread's bytes of a weight tile: a quarter of a row's columns, of rows i and i + 8."""
        bases = [[0, 1 << bit] for bit in range((block_k // 4).bit_length() - 1)]
        return [*bases, [8, 0]]

    _heights = gluon.constexpr_function(tile_heights)

    @gluon.jit(do_not_specialize=["max_tiles"])
    def hopper_gemm_kernel(
        weight_desc,  # (slots, N, K); (slots, N / 8, 2, 8, K) if gated, (slots, K, N) if transposed
        x_desc,  # (num_pairs, K), sorted; its box has as many rows as the lowest tile
        x_desc_2,  # the same with boxes twice as high, ...
        x_desc_4,
        x_desc_8,
        x_desc_16,  # ... or None above block_m
        x_scale_ptr,  # (num_pairs,) fp32, sorted, or None
        scale_ptr,  # (num_experts, N or 2 * N) fp32, or None; (num_experts,) if transposed
        bias_ptr,  # (num_experts, N or 2 * N), or None
        out_ptr,  # (num_pairs, stride_out)
        table_ptr,  # (max_tiles + 1, 4) int32, see ExpertRouting
        sorted_pair_ids_ptr,  # (num_pairs,) int32
        max_tiles,
        N,
        K,
        stride_out,
        PRODUCT: gl.constexpr,  # a HopperProduct
        TILE: gl.constexpr,  # a TileConfig
        GROUP_M: gl.constexpr,
    ):
        """Grid: (max_tiles * cdiv(channels, block_n),); programs without rows only wait.

        The kernel before this one must not have written the table or weights.
        """
        BLOCK_OUT: gl.constexpr = TILE.block_n // 2 if PRODUCT.gated else TILE.block_n
        BLOCK_M: gl.constexpr = TILE.block_m
        NUM_STAGES: gl.constexpr = TILE.num_stages
        tiles_n = gl.cdiv(N, BLOCK_OUT)
        pid = gl.program_id(0)
        group = pid // (GROUP_M * tiles_n)
        group_m = gl.minimum(max_tiles - group * GROUP_M, GROUP_M)
        tile_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % group_m
        row_n = (pid % (GROUP_M * tiles_n)) // group_m * BLOCK_OUT

        if tile_m >= gl.load(table_ptr + 4 * max_tiles):
            # The launch must not end before the kernel that it follows.
            tl.extra.cuda.gdc_wait()
            return
        expert = gl.load(table_ptr + 4 * tile_m)
        slot = gl.load(table_ptr + 4 * tile_m + 1)
        first = gl.load(table_ptr + 4 * tile_m + 2)
        num_rows = gl.load(table_ptr + 4 * tile_m + 3)
        absent = slot < 0
        slot = gl.maximum(slot, 0)

        weights = gl.allocate_shared_memory(
            weight_desc.dtype,
            [NUM_STAGES] + weight_desc.block_type.shape,  # noqa: RUF005 (Triton unpacks no lists)
            weight_desc.layout,
        )
        rows = gl.allocate_shared_memory(
            x_desc.dtype, [NUM_STAGES, BLOCK_M, TILE.block_k], x_desc.layout
        )  # fmt: skip
        # Barriers of their own: Triton synchronizes all warps between two uses of the same.
        weights_full = gl.allocate_shared_memory(
            gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout()
        )  # fmt: skip
        rows_full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(NUM_STAGES):
            mbarrier.init(weights_full.index(i), count=1)
            mbarrier.init(rows_full.index(i), count=1)

        X_DESCS = (x_desc, x_desc_2, x_desc_4, x_desc_8, x_desc_16)
        num_steps = gl.cdiv(K, TILE.block_k)
        stages = Stages(weight_desc, x_desc, weights, rows, weights_full, rows_full, num_steps)
        place = Place(expert, slot, absent, first, num_rows, row_n)
        scales = Scales(x_scale_ptr, scale_ptr, bias_ptr)
        out = Out(out_ptr, sorted_pair_ids_ptr, N, stride_out)
        for i in gl.static_range(NUM_STAGES - 1):
            _expect_weights(stages, i, TILE)
        for i in gl.static_range(NUM_STAGES - 1):
            _fetch_weights(stages, place, i, PRODUCT, TILE)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
        # The lowest tile that has all rows: a high block costs nothing where experts have few rows,
        # and where they have many, weights are read once instead of several times.
        HEIGHTS: gl.constexpr = _heights(BLOCK_M, TILE.tail_m)
        for i in gl.static_range(len(HEIGHTS)):
            if (i == 0 or num_rows > HEIGHTS[i - 1]) and (
                i == len(HEIGHTS) - 1 or num_rows <= HEIGHTS[i]
            ):
                at_height = Stages(
                    weight_desc, X_DESCS[i], weights, rows, weights_full, rows_full, num_steps
                )
                _tile(at_height, place, scales, out, PRODUCT, TILE, HEIGHTS[i])

    @gluon.jit
    def _tile(
        stages,
        place,
        scales,
        out_place,  # Out
        PRODUCT: gl.constexpr,
        TILE: gl.constexpr,
        BLOCK_M: gl.constexpr,  # TILE's, or less
    ):
        """One tile, transposed: (channels, rows). Weights of its first steps are on the way."""
        # Triton 3.6 hands on what is declared a constant, not a constant's attribute.
        ACTIVATION: gl.constexpr = PRODUCT.activation
        GATED: gl.constexpr = PRODUCT.gated
        PERMUTE: gl.constexpr = PRODUCT.permute
        TRANSPOSED: gl.constexpr = PRODUCT.transposed
        BLOCK_N: gl.constexpr = TILE.block_n
        NUM_STAGES: gl.constexpr = TILE.num_stages
        BLOCK_OUT: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
        # wgmma: 16 rows of weights per warp, and 32 bytes of rows at a time.
        X_BITS: gl.constexpr = stages.x_desc.dtype.primitive_bitwidth
        WIDEN: gl.constexpr = stages.weight_desc.dtype.primitive_bitwidth < X_BITS
        INTEGER: gl.constexpr = stages.x_desc.dtype == gl.int8
        # Triton knows no product of integers with 256 rows.
        MMA_M: gl.constexpr = 128 if INTEGER and BLOCK_M > 128 else BLOCK_M
        MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, MMA_M, 256 // X_BITS])
        N = out_place.num_columns
        num_steps = stages.num_steps
        for i in gl.static_range(NUM_STAGES - 1):
            _expect_rows(stages, i, TILE)
        for i in gl.static_range(NUM_STAGES - 1):
            _fetch_rows(stages, place, i, TILE)
        if not WIDEN:
            acc = gl.zeros([BLOCK_N, BLOCK_M], gl.int32 if INTEGER else gl.float32, MMA)
            for step in range(num_steps):
                _wait_for(stages, step, TILE)
                weight = _weight_tile(stages, step, TILE, TRANSPOSED)
                if TRANSPOSED:
                    weight = weight.permute([1, 0])
                x = _rows_of(stages, step, BLOCK_M, TILE).permute([1, 0])
                acc = warpgroup_mma(weight, x, acc, is_async=True)
                # This product may run on; the one before it is over, and so its stage is free.
                acc = warpgroup_mma_wait(1, deps=[acc])
                _fetch(stages, place, step + NUM_STAGES - 1, PRODUCT, TILE)
        else:
            acc = warpgroup_mma_init(gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA))
            _wait_for(stages, 0, TILE)
            # Here once; or else Triton finds a need for it in every step.
            tl.debug_barrier()
            # Two steps at a time, because the tensor cores read one step's weights from their
            # registers while those of the next are being written.
            for pair in range(num_steps // 2):
                for odd in gl.static_range(2):
                    step = 2 * pair + odd
                    weight = _wide_weights(stages, step, PRODUCT, TILE, MMA)
                    # Early: a branch keeps the assembler from widening after the wait for wgmma.
                    _wait_for(stages, step + 1, TILE)
                    acc, weight = warpgroup_mma_wait(0, deps=[acc, weight])
                    x = _rows_of(stages, step, BLOCK_M, TILE).permute([1, 0])
                    acc = warpgroup_mma(weight, x, acc, is_async=True)
                    _fetch(stages, place, step + NUM_STAGES - 1, PRODUCT, TILE)
            acc = warpgroup_mma_wait(0, deps=[acc])
            if num_steps % 2 == 1:
                step = num_steps - 1
                weight = _wide_weights(stages, step, PRODUCT, TILE, MMA)
                x = _rows_of(stages, step, BLOCK_M, TILE).permute([1, 0])
                acc = warpgroup_mma(weight, x, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
        acc = warpgroup_mma_wait(0, deps=[acc])

        acc = acc.to(gl.float32)
        tile_rows = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
        all_channels = N
        if GATED:
            all_channels = 2 * N
            halves = (tile_rows // GATE_ROWS) % 2
            channels = tile_rows // (2 * GATE_ROWS) * GATE_ROWS + tile_rows % GATE_ROWS
            channels = gl.minimum(place.row_n + channels, N - 1) + halves * N
        else:
            channels = gl.minimum(place.row_n + tile_rows, N - 1)
        if scales.weights_ptr is not None:
            if TRANSPOSED:
                scale = gl.load(scales.weights_ptr + place.expert)
                if PRODUCT.fp8:
                    scale = scale * 256.0  # what widening left out
                acc = acc * scale
            else:
                scale = gl.load(scales.weights_ptr + place.expert * all_channels + channels)
                if PRODUCT.fp8:
                    scale = scale * 256.0
                acc = acc * gl.expand_dims(scale, 1)
        if scales.rows_ptr is not None:
            tile_columns = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
            inside = tile_columns < place.num_rows
            x_scale = gl.load(scales.rows_ptr + place.first + tile_columns, mask=inside, other=0.0)
            acc = acc * gl.expand_dims(x_scale, 0)
        if scales.bias_ptr is not None:
            bias = gl.load(scales.bias_ptr + place.expert * all_channels + channels)
            acc = acc + gl.expand_dims(bias.to(gl.float32), 1)
        if ACTIVATION is not None:
            up = acc
            if GATED:
                acc = gl.reshape(acc, [BLOCK_N // (2 * GATE_ROWS), 2, GATE_ROWS, BLOCK_M])
                acc, up = gl.split(gl.permute(acc, [0, 2, 3, 1]))
                acc = gl.reshape(acc, [BLOCK_OUT, BLOCK_M])
                up = gl.reshape(up, [BLOCK_OUT, BLOCK_M])
            acc = apply_triton(acc, up, ACTIVATION)
        # Weights that are not there must not pass for some.
        out = gl.where(place.absent, float("nan"), acc).to(out_place.ptr.dtype.element_ty)
        if TRANSPOSED and WIDEN:
            # Rows i and i + 8 of 16 are channels 2 * i and 2 * i + 1.
            out = gl.reshape(out, [BLOCK_OUT // 16, 2, 8, BLOCK_M])
            out = gl.reshape(gl.permute(out, [0, 2, 1, 3]), [BLOCK_OUT, BLOCK_M])
        if PERMUTE > 0:
            out = gl.reshape(out, [BLOCK_OUT // PERMUTE, 4, PERMUTE // 16, 2, 2, BLOCK_M])
            out = gl.reshape(gl.permute(out, [0, 2, 3, 1, 4, 5]), [BLOCK_OUT, BLOCK_M])
        # Through shared memory, for 16 bytes of each row.
        STORE: gl.constexpr = gl.BlockedLayout(
            [8, 1], [BLOCK_OUT // 8, 256 // BLOCK_OUT], [1, 8], [0, 1]
        )  # fmt: skip
        out = gl.convert_layout(out, STORE)
        tile_columns = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, STORE))
        inside = tile_columns < place.num_rows
        out_rows = place.first + tile_columns
        if PRODUCT.scatter:
            out_rows = gl.load(out_place.sorted_pair_ids_ptr + out_rows, mask=inside, other=0)
        columns = place.row_n + gl.arange(0, BLOCK_OUT, layout=gl.SliceLayout(1, STORE))
        if PERMUTE > 0:
            # What lies beyond N meets weights that are zeros, and must not be NaN.
            phase = columns % PERMUTE
            phase = phase // 2 % 4 * (PERMUTE // 4) + phase // 16 * 4 + phase // 8 % 2 * 2
            past = columns // PERMUTE * PERMUTE + phase + columns % 2 >= N
            out = gl.where(gl.expand_dims(past, 1), gl.zeros_like(out), out)
        # int64: rows times their length pass 2**31.
        offsets = gl.expand_dims(out_rows.to(gl.int64) * out_place.stride, 0)
        mask = gl.expand_dims(inside, 0) & gl.expand_dims(columns < out_place.stride, 1)
        gl.store(out_place.ptr + (offsets + gl.expand_dims(columns, 1)), out, mask=mask)

    @gluon.jit
    def _fetch(stages, place, step, PRODUCT: gl.constexpr, TILE: gl.constexpr):
        """Start to read the tiles of ``step``, if there is one; zeros beyond the tensors.

        For all warps, which have waited for the step before and are through with its tiles.
        """
        _expect_weights(stages, step, TILE)
        _expect_rows(stages, step, TILE)
        tl.debug_barrier()
        _fetch_weights(stages, place, step, PRODUCT, TILE)
        _fetch_rows(stages, place, step, TILE)

    @gluon.jit
    def _expect_weights(stages, step, TILE: gl.constexpr):
        num_bytes: gl.constexpr = stages.weight_desc.block_type.nbytes
        barrier = stages.weights_full.index(step % TILE.num_stages)
        mbarrier.expect(barrier, num_bytes, pred=step < stages.num_steps)

    @gluon.jit
    def _expect_rows(stages, step, TILE: gl.constexpr):
        num_bytes: gl.constexpr = stages.x_desc.block_type.nbytes
        barrier = stages.rows_full.index(step % TILE.num_stages)
        mbarrier.expect(barrier, num_bytes, pred=step < stages.num_steps)

    @gluon.jit
    def _fetch_weights(stages, place, step, PRODUCT: gl.constexpr, TILE: gl.constexpr):
        exists = step < stages.num_steps
        stage = step % TILE.num_stages
        barrier = stages.weights_full.index(stage)
        k = step * TILE.block_k
        tile = stages.weights.index(stage)
        if PRODUCT.gated:
            # 8 rows of gates, 8 of the same ups, and so on.
            tma.async_copy_global_to_shared(
                stages.weight_desc, [place.slot, place.row_n // GATE_ROWS, 0, 0, k],
                barrier, tile, pred=exists,
            )  # fmt: skip
        elif PRODUCT.transposed:
            tma.async_copy_global_to_shared(
                stages.weight_desc, [place.slot, k, place.row_n], barrier, tile, pred=exists
            )  # fmt: skip
        else:
            tma.async_copy_global_to_shared(
                stages.weight_desc, [place.slot, place.row_n, k], barrier, tile, pred=exists
            )  # fmt: skip

    @gluon.jit
    def _fetch_rows(stages, place, step, TILE: gl.constexpr):
        BLOCK_M: gl.constexpr = stages.x_desc.block_type.shape[0]
        tma.async_copy_global_to_shared(
            stages.x_desc, [place.first, step * TILE.block_k],
            stages.rows_full.index(step % TILE.num_stages),
            _rows_of(stages, step, BLOCK_M, TILE), pred=step < stages.num_steps,
        )  # fmt: skip

    @gluon.jit
    def _wait_for(stages, step, TILE: gl.constexpr):
        """Wait until the tiles of ``step``, if there is one, have come."""
        stage = step % TILE.num_stages
        phase = (step // TILE.num_stages) & 1
        exists = step < stages.num_steps
        mbarrier.wait(stages.weights_full.index(stage), phase, pred=exists)
        mbarrier.wait(stages.rows_full.index(stage), phase, pred=exists)

    @gluon.jit
    def _weight_tile(stages, step, TILE: gl.constexpr, TRANSPOSED: gl.constexpr):
        # The boxes' leading dimensions have the bytes of the tile's rows, one after another.
        BITS: gl.constexpr = stages.weights.dtype.primitive_bitwidth
        HEIGHT: gl.constexpr = TILE.block_k if TRANSPOSED else TILE.block_n
        WIDTH: gl.constexpr = TILE.block_n if TRANSPOSED else TILE.block_k
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, WIDTH * BITS // 8), BITS, rank=2)
        return stages.weights.index(step % TILE.num_stages)._reinterpret(
            stages.weights.dtype, [HEIGHT, WIDTH], LAYOUT
        )  # fmt: skip

    @gluon.jit
    def _rows_of(stages, step, BLOCK_M: gl.constexpr, TILE: gl.constexpr):
        tile = stages.rows.index(step % TILE.num_stages)
        return tile._reinterpret(stages.rows.dtype, [BLOCK_M, TILE.block_k], stages.rows.layout)

    @gluon.jit
    def _wide_weights(stages, step, PRODUCT: gl.constexpr, TILE: gl.constexpr, MMA: gl.constexpr):
        """A step's weights in registers, as wgmma's first operand."""
        BLOCK_N: gl.constexpr = TILE.block_n
        BLOCK_K: gl.constexpr = TILE.block_k
        FP8: gl.constexpr = PRODUCT.fp8
        OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
        if PRODUCT.transposed:
            # Words of two channels each; (sums, words).
            WORDS: gl.constexpr = gl.DistributedLinearLayout(
                reg_bases=[[1, 0], [8, 0], [16, 0], [32, 0]],
                lane_bases=[[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]],
                warp_bases=[[0, 8], [0, 16], [0, 32]],
                block_bases=[],
                shape=[BLOCK_K, BLOCK_N // 2],
            )
            WORD_TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
            words = stages.weights.index(step % TILE.num_stages)._reinterpret(
                gl.int16, [BLOCK_K, BLOCK_N // 2], WORD_TILE
            )  # fmt: skip
            even, odd = widen_words(words.load(WORDS), stages.x_desc.dtype, FP8)
            weight = gl.reshape(gl.join(even, odd), [BLOCK_K, BLOCK_N // 16, 8, 2])
            weight = gl.reshape(gl.permute(weight, [1, 3, 2, 0]), [BLOCK_N, BLOCK_K])
            return gl.convert_layout(weight, OPERAND, assert_trivial=True)
        LOADED: gl.constexpr = gl.DistributedLinearLayout(
            reg_bases=_register_bases(BLOCK_K),
            lane_bases=[[0, BLOCK_K // 4], [0, BLOCK_K // 2], [1, 0], [2, 0], [4, 0]],
            warp_bases=[[16, 0], [32, 0], [64, 0]],
            block_bases=[],
            shape=[BLOCK_N, BLOCK_K],
        )
        weight = _weight_tile(stages, step, TILE, False).load(LOADED)
        weight = widen_weights(weight, stages.x_desc.dtype, FP8, True)
        weight = gl.reshape(weight, [BLOCK_N, 4, BLOCK_K // 16, 2, 2])
        weight = gl.reshape(gl.permute(weight, [0, 2, 3, 1, 4]), [BLOCK_N, BLOCK_K])
        return gl.convert_layout(weight, OPERAND, assert_trivial=True)


def hopper_supports(
    hidden_states: torch.Tensor | QuantizedRows,
    experts: Experts,
    topk_ids: torch.Tensor,
    *,
    activations: torch.dtype | None = None,
) -> bool:
    """Return whether `hopper_fused_moe` takes these, which are otherwise as it takes them."""
    projections = (experts.gate_up, experts.down)
    weights = [projection.weight for projection in projections]
    dtype, size = weights[0].dtype, weights[0].itemsize
    return (
        gluon is not None
        and is_hopper(hidden_states.device)
        and hidden_states.dtype in (torch.bfloat16, torch.float16)
        and dtype in (torch.int8, torch.float8_e4m3fn, hidden_states.dtype)
        and activations in (None, dtype)
        and all(projection.scale is not None or size == 2 for projection in projections)
        and topk_ids.numel() > 0
        and experts.num_experts <= 2048
        # TMA's addresses and strides are multiples of 16 bytes; 8 rows of gates alternate with 8
        # of ups.
        and all(weight.shape[2] * size % 16 == 0 for weight in weights)
        and all(weight.data_ptr() % 16 == 0 and weight.stride(2) == 1 for weight in weights)
        and all(weight.stride(d) * size % 16 == 0 for weight in weights for d in (0, 1))
        and weights[0].shape[1] % (2 * 8 if experts.activation.gated else 1) == 0
    )


def padded(in_features: int) -> int:
    """Return the length of rows of which K's order changes."""
    return triton.cdiv(in_features, BLOCK_K_16) * BLOCK_K_16


def launch_sort_rows(
    x: torch.Tensor, positions: torch.Tensor, top_k: int, *, permute: bool
) -> torch.Tensor:
    """Return rows of ``x`` (num_tokens, K), 16 bits wide, K even, at their pairs' positions.

    ``permute``: K is in the order that the module's docstring says, padded with zeros. For a place
    after the kernel that wrote ``positions`` and did not write ``x``, which is contiguous.
    """
    return _sort_rows(x, None, positions, top_k, permute)[0]


def launch_sort_quantized_rows(
    rows: QuantizedRows, positions: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``rows`` at their pairs' positions, and their scales; K is a multiple of 4.

    For a place as `launch_sort_rows` is for.
    """
    x, scale = _sort_rows(rows.q, rows.scale, positions, top_k, False)
    assert scale is not None
    return x, scale


def _sort_rows(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    positions: torch.Tensor,
    top_k: int,
    permute: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    num_tokens, in_features = x.shape
    width = padded(in_features) if permute else in_features
    out = x.new_empty(num_tokens * top_k, width)
    out_scale = None if scale is None else scale.new_empty(num_tokens * top_k)
    words, out_words = (n * x.itemsize // 4 for n in (in_features, width))
    block = max(BLOCK_K_16, min(1024, triton.next_power_of_2(out_words)))
    sort_rows_kernel[(num_tokens, triton.cdiv(out_words, block))](
        x.view(torch.int32),
        positions,
        out.view(torch.int32),
        scale,
        out_scale,
        words,
        out_words,
        TOP_K=top_k,
        GROUP=BLOCK_K_16 // 2 if permute else 0,
        BLOCK=block,
        PDL=has_dependent_launch(x.device),
        **launch_options(True, x.device),
    )
    return out, out_scale


def launch_hopper_gemm(
    x: torch.Tensor,  # (num_pairs, K), sorted; wider than weights: launch_sort_rows's order of K
    projection: Projection,
    routing: ExpertRouting,
    table: torch.Tensor,  # the routing's tiles
    out: torch.Tensor,  # (num_pairs, at least out_features)
    tile: TileConfig,
    *,
    out_features: int,
    x_scale: torch.Tensor | None = None,
    activation: Activation | None = None,
    scatter: bool = False,
    permute: bool = False,
    transposed: bool = False,
    expert_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fill the routed rows of ``out`` and return it; the others are left as they are.

    Args:
        tile: see `hopper_fused_moe`; ``table`` was made with its block_m.
        x_scale: (num_pairs,) fp32, sorted, for 8-bit rows.
        activation: fused into the epilogue.
        scatter: write in the order of pairs instead of the sorted order.
        permute: columns of ``out`` in the order of `launch_sort_rows`, zeros beyond
            ``out_features``.
        transposed: multiply by weights instead of by weights transposed, and by ``expert_scale``
            instead of the projection's scale, without its bias. ``out_features`` are then the
            weights' in_features; rows of ``x`` have no order of their own.
        expert_scale: (num_experts,) fp32.
    """
    weight, block_m = projection.weight, tile.block_m
    num_slots, in_features = weight.shape[0], weight.shape[1 if transposed else 2]
    block_k = BLOCK_K_16 if x.itemsize == 2 else BLOCK_K_8
    product = HopperProduct(
        scatter=scatter,
        fp8=is_widened_fp8(weight, x),
        permute=BLOCK_K_16 if permute else 0,
        activation=activation,
        transposed=transposed,
    )
    stage_bytes = BLOCK_N * block_k * weight.itemsize + block_m * 128 + 16
    tile = TileConfig(
        block_m,
        BLOCK_N,
        block_k,
        num_warps=8,
        num_stages=max(3, min(tile.num_stages, (SHARED_MEMORY - EPILOGUE_MEMORY) // stage_bytes)),
        tail_m=tile.tail_m,
    )
    shape, box = [num_slots, out_features, in_features], [1, BLOCK_N, block_k]
    strides = list(weight.stride())
    width = block_k * weight.itemsize
    if transposed:
        shape, box = [num_slots, in_features, out_features], [1, block_k, BLOCK_N]
        width = 128  # also of numbers of 16 bits, whose box is twice as wide
    if product.gated:
        half = out_features * strides[1]
        shape = [num_slots, out_features // 8, 2, 8, in_features]
        strides = [strides[0], 8 * strides[1], half, strides[1], 1]
        box = [1, BLOCK_N // 16, 2, 8, block_k]
    # The inner boxes are 128 bytes wide, or 64 if weights are to be widened: so their swizzles.
    weight_layout = gl.NVMMASharedLayout(width, 8 * weight.itemsize, rank=len(box))
    x_layout = gl.NVMMASharedLayout(128, 8 * x.itemsize, rank=2)
    max_tiles = table.shape[0] - 1
    tiles_n = triton.cdiv(out_features * (2 if product.gated else 1), BLOCK_N)
    x_descs: list[Any] = [
        TensorDescriptor(x, list(x.shape), list(x.stride()), [height, block_k], x_layout)
        for height in tile_heights(block_m, tile.tail_m)
    ]
    hopper_gemm_kernel[(max_tiles * tiles_n,)](
        TensorDescriptor(weight_bits(weight, x), shape, strides, box, weight_layout),
        *(x_descs + [None] * 4)[:5],
        x_scale,
        expert_scale if transposed else projection.scale,
        None if transposed else projection.bias,
        out,
        table,
        routing.sorted_pair_ids,
        max_tiles,
        out_features,
        in_features,
        out.stride(0),
        PRODUCT=product,
        TILE=tile,
        GROUP_M=8,
        num_warps=tile.num_warps,
        # Two programs share the registers: one stores while the other multiplies.
        maxnreg=128 if block_m <= 128 else None,
        **launch_options(True, x.device),
    )
    return out


def hopper_fused_moe(
    hidden_states: torch.Tensor | QuantizedRows,
    experts: Experts,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    tile: TileConfig,
    *,
    activations: torch.dtype | None = None,
) -> torch.Tensor:
    """Run a layer for which `hopper_supports` holds.

    Arguments and result as of `qmoe_kernels.layer.fused_moe_triton`, all contiguous, but for:

    Args:
        tile: of both products. block_m is a power of two from 8 to 256: an expert's rows are cut
            into so many. A program's own tile is no higher than its rows need, of the heights
            tail_m, twice that, ... block_m (0: block_m alone), at most five; each of them is code
            of its own, in need of registers, and a tensor map for the launch to make. num_stages
            are the steps in flight and in use, at least 3, at most what fits: one takes 128 bytes
            times block_m and 8 KiB more, 16 KiB where weights are as wide as rows, of shared
            memory. Two programs run at a time where each takes half of it: block_m=128 with 4
            stages, or 3 of 16 KiB and more. The rest is given.
    """
    num_tokens, top_k = topk_ids.shape
    num_pairs = num_tokens * top_k
    widen = activations is None and experts.gate_up.weight.itemsize == 1
    # Rows of skipped ids are written by nobody: zeros if the caller sees them. Before the kernels,
    # each of which starts while the one before it ends.
    new_rows = torch.zeros if topk_weights is None else torch.empty
    like: Any = {"dtype": hidden_states.dtype, "device": hidden_states.device}
    out = new_rows(num_pairs, experts.hidden_size, **like)
    width = experts.intermediate_size
    hidden = torch.empty(num_pairs, padded(width) if widen else width, **like)

    routing = ExpertRouting.from_topk_ids(
        topk_ids,
        experts.num_experts,
        block_m=tile.block_m,
        expert_to_slot=experts.gate_up.expert_to_slot,
    )
    table, positions = routing.tiles, routing.positions
    assert table is not None and positions is not None
    x_scale = None
    if isinstance(hidden_states, QuantizedRows):
        x, x_scale = launch_sort_quantized_rows(hidden_states, positions, top_k)
    elif activations is None:
        x = launch_sort_rows(hidden_states, positions, top_k, permute=widen)
    else:
        x, x_scale = launch_quantize_rows(
            hidden_states, activations, places=positions, dependent=True, early=True
        )
    launch_hopper_gemm(
        x,
        experts.gate_up,
        routing,
        table,
        hidden,
        tile,
        out_features=experts.intermediate_size,
        x_scale=x_scale,
        activation=experts.activation,
        permute=widen,
    )
    if activations is not None:
        hidden, x_scale = launch_quantize_rows(hidden, activations, dependent=True)
    rows = launch_hopper_gemm(
        hidden,
        experts.down,
        routing,
        table,
        out,
        tile,
        out_features=experts.hidden_size,
        x_scale=x_scale,
        scatter=True,
    ).view(num_tokens, top_k, experts.hidden_size)
    if topk_weights is None:
        return rows
    return launch_weighted_sum(rows, topk_weights, topk_ids, experts.num_experts, dependent=True)
