"""A trial: the products of `qmoe_kernels.hopper_gemm`, with a warp that only asks for tiles.

The contract, the order of K and the epilogue are those of `launch_hopper_gemm`. What differs: one
warp (the producer) waits until a stage is empty and has TMA fill it; two warpgroups (the consumers)
wait until it is full, multiply, and say that it is empty. No barrier of a whole program is left in
the loop, and the producer goes on to a program's next tile while the consumers store this one.

A program works on tiles ``pid, pid + programs, ...``: with a program for each tile it is one tile.

Ways to share the work, `Schedule`:

- together: both consumers work on one tile, 64 of its 128 channels each.
- in turn: each has tiles of its own, of which one is multiplied while the other is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
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

from qmoe_kernels.activations import Activation, apply_triton
from qmoe_kernels.experts import Projection
from qmoe_kernels.launching import is_widened_fp8, launch_options, weight_bits
from qmoe_kernels.routing import ExpertRouting
from qmoe_kernels.tiles import TileConfig
from qmoe_kernels.widening import widen_weights

BLOCK_N = 128  # weight rows of a tile
BLOCK_K_16, BLOCK_K_8 = 64, 128  # columns of a tile, by the bits of rows: 128 bytes of rows
GATE_ROWS = tl.constexpr(8)  # as in grouped_gemm
SHARED_MEMORY = 227 << 10  # bytes that a program may take
STORED_ROWS = 64  # rows that a consumer brings through shared memory at a time


@dataclass(frozen=True)
class Schedule:
    """How programs and their warps share the work.

    Attributes:
        persistent: as many programs as run at a time; otherwise one for each tile.
        in_turn: see the module's docstring; for tiles of at most 128 rows.
        programs: on a multiprocessor at a time, 1 or 2.
        producer_registers: a multiple of 8.
    """

    persistent: bool = True
    in_turn: bool = False
    programs: int = 1
    producer_registers: int = 40


@dataclass(frozen=True)
class Specialized:
    """What a kernel is compiled for, its tile apart.

    Attributes:
        scatter, fp8, permute, activation: as `hopper_gemm.HopperProduct`.
        in_turn: as `Schedule`.
        group_m: tiles of rows that are neighbours in the order of tiles.
    """

    scatter: bool
    fp8: bool
    permute: int
    activation: Activation | None
    in_turn: bool
    group_m: int

    @property
    def gated(self) -> bool:
        return self.activation is not None and self.activation.gated

    @property
    def channels(self) -> int:
        """Weight rows of a consumer."""
        return BLOCK_N if self.in_turn else BLOCK_N // 2


class Stages(NamedTuple):
    """What a program reads, step by step, and the shared memory that it comes to."""

    weight_desc: Any
    x_desc: Any
    weights: Any  # (num_stages, as weight_desc's box)
    rows: Any  # (num_stages, as x_desc's box)
    full: Any  # (num_stages, 1) barriers
    empty: Any  # (num_stages, 1) barriers
    turn: Any  # (2, 1) barriers, one for each consumer
    num_steps: Any  # of each tile


class Work(NamedTuple):
    """Which tiles there are."""

    table_ptr: Any  # (max_tiles + 1, 4) int32, see hopper_gemm.tile_table_kernel
    num_tiles: Any  # of rows
    tiles_n: Any


class Place(NamedTuple):
    """Where a tile is."""

    expert: Any
    slot: Any
    absent: Any  # there is no slot
    first: Any  # sorted position
    num_rows: Any
    row_n: Any  # of weights; of gates alone, if gated


class Scales(NamedTuple):
    """What sums are multiplied by, and what is added."""

    rows_ptr: Any  # (num_pairs,) fp32, or None
    weights_ptr: Any  # (num_experts, N or 2 * N) fp32
    bias_ptr: Any  # (num_experts, N or 2 * N), or None


class Out(NamedTuple):
    """Where the result goes."""

    ptr: Any  # (num_pairs, stride)
    sorted_pair_ids_ptr: Any  # (num_pairs,) int32
    num_columns: Any
    stride: Any


@gluon.constexpr_function
def _register_bases(block_k, channels):
    """A thread's bytes of a weight tile: a quarter of a row's columns, of rows i and i + 8."""
    bases = [[0, 1 << bit] for bit in range((block_k // 4).bit_length() - 1)]
    return [*bases, [8, 0], *([[64, 0]] if channels == 128 else [])]


@gluon.jit(do_not_specialize=["max_tiles"])
def hopper_specialized_kernel(
    weight_desc,  # (slots, N, K), or (slots, N / 8, 2, 8, K) if gated
    x_desc,  # (num_pairs, K), sorted
    x_scale_ptr,  # (num_pairs,) fp32, sorted, or None
    scale_ptr,  # (num_experts, N or 2 * N) fp32
    bias_ptr,  # (num_experts, N or 2 * N), or None
    out_ptr,  # (num_pairs, stride_out)
    table_ptr,  # (max_tiles + 1, 4) int32, see hopper_gemm.tile_table_kernel
    sorted_pair_ids_ptr,  # (num_pairs,) int32
    max_tiles,
    N,
    K,
    stride_out,
    PRODUCT: gl.constexpr,  # a Specialized
    TILE: gl.constexpr,  # a TileConfig
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Grid: any; programs beyond the tiles only wait.

    The kernel before this one must not have written the table or weights.
    """
    BLOCK_OUT: gl.constexpr = TILE.block_n // 2 if PRODUCT.gated else TILE.block_n
    NUM_STAGES: gl.constexpr = TILE.num_stages
    work = Work(table_ptr, gl.load(table_ptr + 4 * max_tiles), gl.cdiv(N, BLOCK_OUT))
    if gl.program_id(0) >= work.num_tiles * work.tiles_n:
        # The launch must not end before the kernel that it follows.
        tl.extra.cuda.gdc_wait()
        return

    weights = gl.allocate_shared_memory(
        weight_desc.dtype,
        [NUM_STAGES] + weight_desc.block_type.shape,  # noqa: RUF005 (Triton unpacks no lists)
        weight_desc.layout,
    )
    rows = gl.allocate_shared_memory(
        x_desc.dtype, [NUM_STAGES, TILE.block_m, TILE.block_k], x_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1 if PRODUCT.in_turn else 2)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)

    num_steps = gl.cdiv(K, TILE.block_k)
    stages = Stages(weight_desc, x_desc, weights, rows, full, empty, turn, num_steps)
    scales = Scales(x_scale_ptr, scale_ptr, bias_ptr)
    out = Out(out_ptr, sorted_pair_ids_ptr, N, stride_out)
    gl.warp_specialize(
        [
            (_consume, (stages, work, scales, out, PRODUCT, TILE, gl.constexpr(0))),
            (_consume, (stages, work, scales, out, PRODUCT, TILE, gl.constexpr(1))),
            (_produce, (stages, work, PRODUCT, TILE)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _place(work, tile, PRODUCT: gl.constexpr, TILE: gl.constexpr):
    """Where the program's ``tile`` is, of num_tiles * tiles_n."""
    BLOCK_OUT: gl.constexpr = TILE.block_n // 2 if PRODUCT.gated else TILE.block_n
    GROUP_M: gl.constexpr = PRODUCT.group_m
    group_size = GROUP_M * work.tiles_n
    group = tile // group_size
    rest = tile % group_size
    group_m = gl.minimum(work.num_tiles - group * GROUP_M, GROUP_M)
    entry_ptr = work.table_ptr + 4 * (group * GROUP_M + rest % group_m)
    slot = gl.load(entry_ptr + 1)
    return Place(
        gl.load(entry_ptr),
        gl.maximum(slot, 0),
        slot < 0,
        gl.load(entry_ptr + 2),
        gl.load(entry_ptr + 3),
        rest // group_m * BLOCK_OUT,
    )


@gluon.jit
def _produce(stages, work, PRODUCT: gl.constexpr, TILE: gl.constexpr):
    """Ask for the tiles of every step of every tile, as stages become empty."""
    NUM_STAGES: gl.constexpr = TILE.num_stages
    num_steps = stages.num_steps
    tile = gl.program_id(0)
    place = _place(work, tile, PRODUCT, TILE)
    # Weights may be asked for before the kernel before this one has ended, rows may not.
    ahead = gl.minimum(num_steps, NUM_STAGES)
    for step in range(ahead):
        _fetch_weights(stages, place, step, step, PRODUCT, TILE)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    for step in range(ahead):
        _fetch_rows(stages, place, step, step, TILE)

    done = ahead  # steps of this tile that are on their way
    stage = ahead % NUM_STAGES
    phase = (ahead // NUM_STAGES) ^ 1  # of a barrier that has not been used: over at once
    while tile < work.num_tiles * work.tiles_n:
        for step in range(done, num_steps):
            mbarrier.wait(stages.empty.index(stage), phase)
            _fetch_weights(stages, place, step, stage, PRODUCT, TILE)
            _fetch_rows(stages, place, step, stage, TILE)
            stage, phase = _next(stage, phase, TILE)
        done = ahead * 0
        tile += gl.num_programs(0)
        # A place beyond the last one is not used; the table has a row there, the last one.
        place = _place(work, gl.minimum(tile, work.num_tiles * work.tiles_n - 1), PRODUCT, TILE)


@gluon.jit
def _next(stage, phase, TILE: gl.constexpr):
    """The stage after ``stage``, and the phase that its barriers are in."""
    last = stage == TILE.num_stages - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _fetch_weights(stages, place, step, stage, PRODUCT: gl.constexpr, TILE: gl.constexpr):
    """Start to read weights, and expect rows with them; zeros beyond the tensors."""
    desc = stages.weight_desc
    barrier = stages.full.index(stage)
    num_bytes: gl.constexpr = desc.block_type.nbytes + stages.x_desc.block_type.nbytes
    mbarrier.expect(barrier, num_bytes)
    k = step * TILE.block_k
    box = stages.weights.index(stage)
    if PRODUCT.gated:
        # 8 rows of gates, 8 of the same ups, and so on.
        tma.async_copy_global_to_shared(
            desc, [place.slot, place.row_n // GATE_ROWS, 0, 0, k], barrier, box
        )
    else:
        tma.async_copy_global_to_shared(desc, [place.slot, place.row_n, k], barrier, box)


@gluon.jit
def _fetch_rows(stages, place, step, stage, TILE: gl.constexpr):
    tma.async_copy_global_to_shared(
        stages.x_desc, [place.first, step * TILE.block_k], stages.full.index(stage),
        stages.rows.index(stage),
    )  # fmt: skip


@gluon.jit
def _consume(
    stages,
    work,
    scales,
    out,
    PRODUCT: gl.constexpr,
    TILE: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Multiply and store a consumer's part of every tile."""
    IN_TURN: gl.constexpr = PRODUCT.in_turn
    BLOCK_M: gl.constexpr = TILE.block_m
    TAIL_M: gl.constexpr = TILE.tail_m
    NUM_STAGES: gl.constexpr = TILE.num_stages
    tl.extra.cuda.gdc_wait()
    first: gl.constexpr = CONSUMER if IN_TURN else 0
    stride: gl.constexpr = 2 if IN_TURN else 1
    programs = gl.num_programs(0)
    step = first * stages.num_steps  # counted from the program's start
    turn = step * 0
    for tile in range(
        gl.program_id(0) + first * programs, work.num_tiles * work.tiles_n, stride * programs
    ):
        place = _place(work, tile, PRODUCT, TILE)
        stage = step % NUM_STAGES
        phase = (step // NUM_STAGES) & 1
        if IN_TURN:
            # The first consumer's first turn comes at once, being the phase before the barrier's.
            mbarrier.wait(stages.turn.index(CONSUMER), (turn ^ (1 - CONSUMER)) & 1)
        if TAIL_M > 0:
            if place.num_rows <= TAIL_M:
                _tile(stages, stage, phase, place, scales, out, PRODUCT, TILE, CONSUMER, TAIL_M)
            else:
                _tile(stages, stage, phase, place, scales, out, PRODUCT, TILE, CONSUMER, BLOCK_M)
        else:
            _tile(stages, stage, phase, place, scales, out, PRODUCT, TILE, CONSUMER, BLOCK_M)
        step += stride * stages.num_steps
        turn += 1


@gluon.jit
def _tile(
    stages,
    stage,
    phase,
    place,
    scales,
    out,
    PRODUCT: gl.constexpr,
    TILE: gl.constexpr,
    CONSUMER: gl.constexpr,
    BLOCK_M: gl.constexpr,  # TILE's, or its tail's
):
    """A consumer's part of a tile, transposed: (channels, rows)."""
    CHANNELS: gl.constexpr = PRODUCT.channels
    # wgmma: 16 rows of weights per warp, and 32 bytes of rows at a time.
    X_BITS: gl.constexpr = stages.x_desc.dtype.primitive_bitwidth
    INTEGER: gl.constexpr = stages.x_desc.dtype == gl.int8
    # Triton knows no product of integers with 256 rows.
    MMA_M: gl.constexpr = 128 if INTEGER and BLOCK_M > 128 else BLOCK_M
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MMA_M, 256 // X_BITS])
    if X_BITS == 8:
        acc = gl.zeros([CHANNELS, BLOCK_M], gl.int32 if INTEGER else gl.float32, MMA)
        before = stage
        for step in range(stages.num_steps):
            mbarrier.wait(stages.full.index(stage), phase)
            weight = _weight_tile(stages, stage, PRODUCT, TILE, CONSUMER)
            x = _row_tile(stages, stage, BLOCK_M, TILE)
            acc = warpgroup_mma(weight, x, acc, is_async=True)
            # This product may run on; the one before it is over, and so its stage is free.
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(stages.empty.index(before), pred=step > 0)
            before = stage
            stage, phase = _next(stage, phase, TILE)
        _hand_over(stages, PRODUCT, CONSUMER)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(stages.empty.index(before))
    else:
        acc = _widened_product(stages, stage, phase, PRODUCT, TILE, CONSUMER, BLOCK_M, MMA)
    _finish(acc, place, scales, out, PRODUCT, CONSUMER, BLOCK_M, MMA)


@gluon.jit
def _hand_over(stages, PRODUCT: gl.constexpr, CONSUMER: gl.constexpr):
    """The other consumer's turn: all that this one had to wait for has come."""
    if PRODUCT.in_turn:
        mbarrier.arrive(stages.turn.index(1 - CONSUMER))


@gluon.jit
def _widened_product(
    stages,
    stage,
    phase,
    PRODUCT: gl.constexpr,
    TILE: gl.constexpr,
    CONSUMER: gl.constexpr,
    BLOCK_M: gl.constexpr,
    MMA: gl.constexpr,
):
    """16-bit rows by weights that are widened while the tensor cores multiply the ones before."""
    num_steps = stages.num_steps
    CHANNELS: gl.constexpr = PRODUCT.channels
    acc = warpgroup_mma_init(gl.zeros([CHANNELS, BLOCK_M], gl.float32, MMA))
    before = stage
    mbarrier.wait(stages.full.index(stage), phase)
    # Two steps at a time, because the tensor cores read one step's weights from their registers
    # while those of the next are being written.
    for pair in range(num_steps // 2):
        for odd in gl.static_range(2):
            step = 2 * pair + odd
            weight = _wide_weights(stages, stage, PRODUCT, TILE, CONSUMER, MMA)
            after, after_phase = _next(stage, phase, TILE)
            # Early: a branch keeps the assembler from widening after the wait for wgmma.
            mbarrier.wait(stages.full.index(after), after_phase, pred=step + 1 < num_steps)
            acc, weight = warpgroup_mma_wait(0, deps=[acc, weight])
            x = _row_tile(stages, stage, BLOCK_M, TILE)
            acc = warpgroup_mma(weight, x, acc, is_async=True)
            mbarrier.arrive(stages.empty.index(before), pred=step > 0)
            before = stage
            stage = after
            phase = after_phase
    if num_steps % 2 == 0:
        _hand_over(stages, PRODUCT, CONSUMER)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(stages.empty.index(before), pred=num_steps > 1)
    if num_steps % 2 == 1:
        weight = _wide_weights(stages, stage, PRODUCT, TILE, CONSUMER, MMA)
        x = _row_tile(stages, stage, BLOCK_M, TILE)
        acc = warpgroup_mma(weight, x, acc, is_async=True)
        _hand_over(stages, PRODUCT, CONSUMER)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(stages.empty.index(stage))
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def _weight_tile(stages, stage, PRODUCT: gl.constexpr, TILE: gl.constexpr, CONSUMER: gl.constexpr):
    # The boxes' leading dimensions have the bytes of block_n rows, one after another.
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(TILE.block_k, 8, rank=2)
    CHANNELS: gl.constexpr = PRODUCT.channels
    PART: gl.constexpr = 0 if PRODUCT.in_turn else CONSUMER
    parts = stages.weights.index(stage)._reinterpret(
        stages.weights.dtype, [TILE.block_n // CHANNELS, CHANNELS, TILE.block_k], LAYOUT
    )
    return parts.index(PART)


@gluon.jit
def _row_tile(stages, stage, BLOCK_M: gl.constexpr, TILE: gl.constexpr):
    rows = stages.rows
    tile = rows.index(stage)
    return tile._reinterpret(rows.dtype, [BLOCK_M, TILE.block_k], rows.layout).permute([1, 0])


@gluon.jit
def _wide_weights(
    stages,
    stage,
    PRODUCT: gl.constexpr,
    TILE: gl.constexpr,
    CONSUMER: gl.constexpr,
    MMA: gl.constexpr,
):
    """A stage's weights in registers, as wgmma's first operand."""
    CHANNELS: gl.constexpr = PRODUCT.channels
    BLOCK_K: gl.constexpr = TILE.block_k
    FP8: gl.constexpr = PRODUCT.fp8
    LOADED: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=_register_bases(BLOCK_K, CHANNELS),
        lane_bases=[[0, BLOCK_K // 4], [0, BLOCK_K // 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[CHANNELS, BLOCK_K],
    )
    weight = _weight_tile(stages, stage, PRODUCT, TILE, CONSUMER).load(LOADED)
    weight = widen_weights(weight, stages.x_desc.dtype, FP8, True)
    weight = gl.reshape(weight, [CHANNELS, 4, BLOCK_K // 16, 2, 2])
    weight = gl.reshape(gl.permute(weight, [0, 2, 3, 1, 4]), [CHANNELS, BLOCK_K])
    return gl.convert_layout(weight, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _finish(
    acc,
    place,
    scales,
    out_place,  # Out
    PRODUCT: gl.constexpr,
    CONSUMER: gl.constexpr,
    BLOCK_M: gl.constexpr,
    MMA: gl.constexpr,
):
    """Scale sums, add the bias, apply the activation and store, some rows at a time."""
    ACTIVATION: gl.constexpr = PRODUCT.activation
    GATED: gl.constexpr = PRODUCT.gated
    PERMUTE: gl.constexpr = PRODUCT.permute
    CHANNELS: gl.constexpr = PRODUCT.channels
    BLOCK_OUT: gl.constexpr = CHANNELS // 2 if GATED else CHANNELS
    PART: gl.constexpr = 0 if PRODUCT.in_turn else CONSUMER
    N = out_place.num_columns
    row_n = place.row_n + PART * BLOCK_OUT
    acc = acc.to(gl.float32)
    tile_rows = gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, MMA))
    all_channels = N
    if GATED:
        all_channels = 2 * N
        halves = (tile_rows // GATE_ROWS) % 2
        channels = tile_rows // (2 * GATE_ROWS) * GATE_ROWS + tile_rows % GATE_ROWS
        channels = gl.minimum(row_n + channels, N - 1) + halves * N
    else:
        channels = gl.minimum(row_n + tile_rows, N - 1)
    scale = gl.load(scales.weights_ptr + place.expert * all_channels + channels)
    if PRODUCT.fp8:
        scale = scale * 256.0  # what widen_weights left out
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
            acc = gl.reshape(acc, [CHANNELS // (2 * GATE_ROWS), 2, GATE_ROWS, BLOCK_M])
            acc, up = gl.split(gl.permute(acc, [0, 2, 3, 1]))
            acc = gl.reshape(acc, [BLOCK_OUT, BLOCK_M])
            up = gl.reshape(up, [BLOCK_OUT, BLOCK_M])
        acc = apply_triton(acc, up, ACTIVATION)
    # Weights that are not there must not pass for some.
    out = gl.where(place.absent, float("nan"), acc).to(out_place.ptr.dtype.element_ty)
    if PERMUTE > 0:
        T: gl.constexpr = BLOCK_OUT * 4 // PERMUTE  # a part may have half of the quarters
        out = gl.reshape(out, [T, PERMUTE // 16, 2, 2, BLOCK_M])
        out = gl.reshape(gl.permute(out, [1, 2, 0, 3, 4]), [BLOCK_OUT, BLOCK_M])
    if BLOCK_M == 256:
        low, high = _halves(out, BLOCK_OUT, BLOCK_M)
        a, b = _halves(low, BLOCK_OUT, BLOCK_M // 2)
        c, d = _halves(high, BLOCK_OUT, BLOCK_M // 2)
        _store(a, 0, row_n, place, out_place, PRODUCT, PART)
        _store(b, 64, row_n, place, out_place, PRODUCT, PART)
        _store(c, 128, row_n, place, out_place, PRODUCT, PART)
        _store(d, 192, row_n, place, out_place, PRODUCT, PART)
    elif BLOCK_M == 128:
        low, high = _halves(out, BLOCK_OUT, BLOCK_M)
        _store(low, 0, row_n, place, out_place, PRODUCT, PART)
        _store(high, 64, row_n, place, out_place, PRODUCT, PART)
    else:
        _store(out, 0, row_n, place, out_place, PRODUCT, PART)


@gluon.jit
def _halves(tile, BLOCK_OUT: gl.constexpr, BLOCK_M: gl.constexpr):
    """The left and the right half of (BLOCK_OUT, BLOCK_M)."""
    return gl.split(gl.permute(gl.reshape(tile, [BLOCK_OUT, 2, BLOCK_M // 2]), [0, 2, 1]))


@gluon.jit
def _store(
    out,  # (BLOCK_OUT, rows)
    from_row: gl.constexpr,
    row_n,
    place,
    out_place,
    PRODUCT: gl.constexpr,
    PART: gl.constexpr,
):
    PERMUTE: gl.constexpr = PRODUCT.permute
    BLOCK_OUT: gl.constexpr = out.shape[0]
    ROWS: gl.constexpr = out.shape[1]
    N = out_place.num_columns
    # Through shared memory, for 16 bytes of each row.
    STORE: gl.constexpr = gl.BlockedLayout(
        [8, 1], [BLOCK_OUT // 8, 256 // BLOCK_OUT], [1, 4], [0, 1]
    )
    out = gl.convert_layout(out, STORE)
    tile_columns = from_row + gl.arange(0, ROWS, layout=gl.SliceLayout(0, STORE))
    inside = tile_columns < place.num_rows
    out_rows = place.first + tile_columns
    if PRODUCT.scatter:
        out_rows = gl.load(out_place.sorted_pair_ids_ptr + out_rows, mask=inside, other=0)
    columns = gl.arange(0, BLOCK_OUT, layout=gl.SliceLayout(1, STORE))
    if PERMUTE > 0:
        # (j, h, t, e): of t a part has T of 4.
        T: gl.constexpr = BLOCK_OUT * 4 // PERMUTE
        columns = place.row_n + columns // (2 * T) * 8 + PART * 2 * T + columns % (2 * T)
        # What lies beyond N meets weights that are zeros, and must not be NaN.
        phase = columns % PERMUTE
        phase = phase // 2 % 4 * (PERMUTE // 4) + phase // 16 * 4 + phase // 8 % 2 * 2
        past = columns // PERMUTE * PERMUTE + phase + columns % 2 >= N
        out = gl.where(gl.expand_dims(past, 1), gl.zeros_like(out), out)
    else:
        columns = row_n + columns
    # int64: rows times their length pass 2**31.
    offsets = gl.expand_dims(out_rows.to(gl.int64) * out_place.stride, 0)
    mask = gl.expand_dims(inside, 0) & gl.expand_dims(columns < out_place.stride, 1)
    gl.store(out_place.ptr + (offsets + gl.expand_dims(columns, 1)), out, mask=mask)


def launch_hopper_specialized(
    x: torch.Tensor,  # (num_pairs, K), sorted; 16-bit: launch_sort_rows's order of K, padded
    projection: Projection,  # with a scale
    routing: ExpertRouting,
    table: torch.Tensor,  # launch_tile_table's
    out: torch.Tensor,  # (num_pairs, at least out_features)
    tile: TileConfig,
    schedule: Schedule,
    *,
    out_features: int,
    x_scale: torch.Tensor | None = None,
    activation: Activation | None = None,
    scatter: bool = False,
    permute: bool = False,
    num_sms: int = 132,
    group_m: int = 8,
) -> torch.Tensor:
    """As `launch_hopper_gemm`, with a `Schedule`; block_m is 64, 128 or 256."""
    weight, block_m = projection.weight, tile.block_m
    num_slots, in_features = weight.shape[0], weight.shape[2]
    wide = x.element_size() == 2
    block_k = BLOCK_K_16 if wide else BLOCK_K_8
    product = Specialized(
        scatter=scatter,
        fp8=is_widened_fp8(weight, x),
        permute=BLOCK_K_16 if permute else 0,
        activation=activation,
        in_turn=schedule.in_turn,
        group_m=group_m,
    )
    # Beside the stages: what each consumer stores at a time, and barriers.
    out_bytes = 2 * product.channels * STORED_ROWS * out.element_size()
    if product.gated:
        out_bytes //= 2
    stage_bytes = BLOCK_N * block_k + block_m * 128
    room = ((SHARED_MEMORY + 1024) // schedule.programs - 2048 - out_bytes) // stage_bytes
    tile = TileConfig(
        block_m,
        BLOCK_N,
        block_k,
        num_warps=4,
        num_stages=max(2, min(tile.num_stages, room)),
        tail_m=block_m // 2 if block_m > 64 else 0,
    )
    shape, box = [num_slots, out_features, in_features], [1, BLOCK_N, block_k]
    strides = list(weight.stride())
    if product.gated:
        half = out_features * strides[1]
        shape = [num_slots, out_features // 8, 2, 8, in_features]
        strides = [strides[0], 8 * strides[1], half, strides[1], 1]
        box = [1, BLOCK_N // 16, 2, 8, block_k]
    # Weights' inner boxes have block_k bytes, and rows' 128: the spans of their swizzles.
    weight_layout = gl.NVMMASharedLayout(block_k, 8, rank=len(box))
    x_layout = gl.NVMMASharedLayout(128, 8 * x.element_size(), rank=2)
    max_tiles = table.shape[0] - 1
    tiles_n = triton.cdiv(out_features * (2 if product.gated else 1), BLOCK_N)
    grid = max_tiles * tiles_n
    if schedule.persistent:
        grid = min(grid, num_sms * schedule.programs)
    # Twelve warps, of which the producer's four, three idle, give registers to the others'.
    registers = 65536 // (schedule.programs * 12 * 32) // 8 * 8
    producer = min(schedule.producer_registers, registers)
    consumer = (3 * registers - producer) // 2 // 8 * 8
    hopper_specialized_kernel[(grid,)](
        TensorDescriptor(weight_bits(weight, x), shape, strides, box, weight_layout),
        TensorDescriptor(x, list(x.shape), list(x.stride()), [block_m, block_k], x_layout),
        x_scale,
        projection.scale,
        projection.bias,
        out,
        table,
        routing.sorted_pair_ids,
        max_tiles,
        out_features,
        in_features,
        out.stride(0),
        PRODUCT=product,
        TILE=tile,
        CONSUMER_REGISTERS=consumer,
        PRODUCER_REGISTERS=producer,
        num_warps=tile.num_warps,
        maxnreg=registers,
        **launch_options(True, x.device),
    )
    return out
