"""An MoE layer for many tokens on Hopper: grouped GEMM with TMA and asynchronous tensor cores.

The contract is that of the sorted products of `qmoe_kernels.grouped_gemm`, weights of 8 bits, rows
of 16 bits (converted weights go from registers into the tensor cores) or of the weights' dtype.
What differs is how data moves: Triton's own pipelines compute addresses and convert weights
between two products; here TMA brings tiles, and weights of the next tile are converted while the
tensor cores multiply this one. Rows lie sorted in memory before each product, since TMA gathers
none.

Order of K for 16-bit rows: a thread of a quad feeds ``wgmma`` with columns 2t, 2t+1, 2t+8, 2t+9 of
every 16. It had better read neighbouring bytes of weights. So within every `BLOCK_K_16` columns,
column ``(t, j, h, e)`` (4, BLOCK_K_16 / 16, 2, 2) of rows lies at ``(j, h, t, e)``, and weights lie
as they are: thread t's quarter of the columns are then its operands, of one step after another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qmoe_kernels.activations import Activation, apply_triton
from qmoe_kernels.decoding import decode_weights
from qmoe_kernels.launching import activation_constants, has_dependent_launch, launch_options
from qmoe_kernels.quantization import FORMAT_OF, LARGEST, SMALLEST_SCALE
from qmoe_kernels.routing import ExpertRouting
from qmoe_kernels.rows import launch_quantize_rows, launch_weighted_sum, round_to
from qmoe_kernels.tuning import is_hopper

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


@triton.jit(do_not_specialize=["num_pairs", "num_experts", "max_tiles"])
def tile_table_kernel(
    expert_offsets_ptr,  # (num_experts + 1,) int32
    sorted_pair_ids_ptr,  # (num_pairs,) int32
    expert_to_slot_ptr,  # (num_experts,) int32, or None
    table_ptr,  # (max_tiles + 1, 4) int32: expert, slot, first sorted position, rows from there on
    positions_ptr,  # (num_pairs,) int32: where sorted_pair_ids has a pair
    num_pairs,
    num_experts,
    max_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,  # power of two, at least num_experts
    BLOCK_TILES: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Cut every expert's rows into tiles of BLOCK_M; the table's last row says how many they are.

    Grid: (cdiv(max_tiles + 1, BLOCK_TILES) + cdiv(num_pairs, BLOCK_PAIRS),), the second kind of
    which inverts sorted_pair_ids.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    table_programs = tl.cdiv(max_tiles + 1, BLOCK_TILES)
    if pid >= table_programs:
        positions = (pid - table_programs) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
        mask = positions < num_pairs
        pairs = tl.load(sorted_pair_ids_ptr + positions, mask=mask, other=0)
        tl.store(positions_ptr + pairs, positions, mask=mask)
        return
    tiles = pid * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    experts = tl.arange(0, BLOCK_EXPERTS)
    exists = experts < num_experts
    starts = tl.load(expert_offsets_ptr + experts, mask=exists, other=0)
    ends = tl.load(expert_offsets_ptr + experts + 1, mask=exists, other=0)
    counts = tl.cdiv(ends - starts, BLOCK_M)
    before = tl.cumsum(counts, 0)[None, :] <= tiles[:, None]
    expert = tl.sum(before.to(tl.int32), 1)
    first_tile = tl.sum(tl.where(before, counts[None, :], 0), 1)
    inside = expert < num_experts
    start = tl.load(expert_offsets_ptr + expert, mask=inside, other=0)
    end = tl.load(expert_offsets_ptr + expert + 1, mask=inside, other=0)
    slot = expert
    if expert_to_slot_ptr is not None:
        slot = tl.load(expert_to_slot_ptr + expert, mask=inside, other=0)
    first = start + (tiles - first_tile) * BLOCK_M
    last = tiles == max_tiles
    mask = tiles <= max_tiles
    tl.store(table_ptr + 4 * tiles, tl.where(last, tl.sum(counts, 0), expert), mask=mask)
    tl.store(table_ptr + 4 * tiles + 1, slot, mask=mask)
    tl.store(table_ptr + 4 * tiles + 2, first, mask=mask)
    tl.store(table_ptr + 4 * tiles + 3, end - first, mask=mask)


@triton.jit
def sort_rows_kernel(
    x_ptr,  # (num_tokens, words) int32
    positions_ptr,  # (num_tokens, TOP_K) int32
    out_ptr,  # (num_tokens * TOP_K, out_words) int32, sorted
    words,
    out_words,
    TOP_K: tl.constexpr,
    GROUP: tl.constexpr,  # words whose order changes among themselves
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (num_tokens, cdiv(out_words, BLOCK)). Rows of tokens to where pairs are, tails zero.

    A word is two numbers of 16 bits, in the order ``(t, j, h)``: that of the module's docstring.
    """
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * words + offsets, mask=offsets < words, other=0)
    x = tl.reshape(x, (BLOCK // GROUP, 4, GROUP // 4))
    x = tl.reshape(tl.permute(x, (0, 2, 1)), (BLOCK,))
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for k in tl.static_range(TOP_K):
        position = tl.load(positions_ptr + token * TOP_K + k).to(tl.int64)
        tl.store(out_ptr + position * out_words + offsets, x, mask=offsets < out_words)


@triton.jit(do_not_specialize=["num_tokens"])
def quantize_sorted_rows_kernel(
    x_ptr,  # (num_tokens, K)
    positions_ptr,  # (num_tokens, TOP_K) int32
    out_ptr,  # (num_tokens * TOP_K, K) int8 | e4m3fn, sorted
    scale_ptr,  # (num_tokens * TOP_K,) fp32, sorted
    num_tokens,
    K,
    LARGEST_VALUE: tl.constexpr,  # 127 or 448
    SMALLEST: tl.constexpr,  # a scale is not below
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,  # tokens per program
    BLOCK: tl.constexpr,  # power of two, at least K
    PDL: tl.constexpr,
):
    """Grid: (cdiv(num_tokens, ROWS),). `quantize_rows_kernel`, each row to where its pairs are."""
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    exists = tokens < num_tokens
    mask = exists[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * K + columns[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    # A maximum passes over NaN, a sum does not.
    scale = tl.maximum(tl.max(tl.abs(x), 1) / LARGEST_VALUE, SMALLEST) + tl.sum(x * 0.0, 1)
    x = round_to(x * (1.0 / scale)[:, None], out_ptr.dtype.element_ty, LARGEST_VALUE)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for k in tl.static_range(TOP_K):
        positions = tl.load(positions_ptr + tokens * TOP_K + k, mask=exists, other=0)
        tl.store(scale_ptr + positions, scale, mask=exists)
        out_ptrs = out_ptr + positions.to(tl.int64)[:, None] * K + columns[None, :]
        tl.store(out_ptrs, x, mask=mask)


if gluon is not None:

    @gluon.constexpr_function
    def _register_bases(block_k):
        """A thread's bytes of a weight tile: a quarter of a row's columns, of rows i and i + 8."""
        bases = [[0, 1 << bit] for bit in range((block_k // 4).bit_length() - 1)]
        return [*bases, [8, 0]]

    @gluon.jit(do_not_specialize=["max_tiles"])
    def hopper_gemm_kernel(
        weight_desc,  # (slots, N, K), or (slots, N / 8, 2, 8, K) if GATED
        x_desc,  # (num_pairs, K), sorted
        x_scale_ptr,  # (num_pairs,) fp32, sorted, or None
        scale_ptr,  # (num_experts, N or 2 * N) fp32
        bias_ptr,  # (num_experts, N or 2 * N), or None
        out_ptr,  # (num_pairs, stride_out)
        table_ptr,  # (max_tiles + 1, 4) int32, see tile_table_kernel
        sorted_pair_ids_ptr,  # (num_pairs,) int32
        max_tiles,
        N,
        K,
        stride_out,
        SCATTER: gl.constexpr,  # write by pair, rather than by sorted position
        FP8: gl.constexpr,  # weights are e4m3fn, given as int8, and rows are wider
        NAME: gl.constexpr,  # None: no activation; else Activation's fields
        GATED: gl.constexpr,
        ALPHA: gl.constexpr,
        UP_SHIFT: gl.constexpr,
        LIMIT: gl.constexpr,
        LIMIT_AFTER: gl.constexpr,
        GATE_SOFTCAP: gl.constexpr,
        UP_SOFTCAP: gl.constexpr,
        PERMUTE: gl.constexpr,  # so many columns of out change places; 0: none do
        BLOCK_M: gl.constexpr,
        BLOCK_N: gl.constexpr,
        BLOCK_K: gl.constexpr,
        TAIL_M: gl.constexpr,  # an expert's last tile with no more rows is this high; or 0
        NUM_STAGES: gl.constexpr,
        GROUP_M: gl.constexpr,
    ):
        """Grid: (max_tiles * cdiv(channels, BLOCK_N),); programs without rows only wait.

        The kernel before this one must not have written the table or weights.
        """
        BLOCK_OUT: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
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
            x_desc.dtype, [NUM_STAGES, BLOCK_M, BLOCK_K], x_desc.layout
        )  # fmt: skip
        full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(NUM_STAGES):
            mbarrier.init(full.index(i), count=1)

        num_steps = gl.cdiv(K, BLOCK_K)
        for i in gl.static_range(NUM_STAGES - 1):
            _fetch_weights(
                weight_desc, x_desc, weights, full, slot, row_n, i, num_steps,
                GATED, BLOCK_K, NUM_STAGES,
            )  # fmt: skip
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
        for i in gl.static_range(NUM_STAGES - 1):
            _fetch_rows(x_desc, rows, full, first, i, num_steps, BLOCK_K, NUM_STAGES)
        if TAIL_M > 0:  # noqa: SIM102 (one is known when compiling)
            if num_rows <= TAIL_M:
                _tile(
                    weight_desc, x_desc, x_scale_ptr, scale_ptr, bias_ptr, out_ptr,
                    sorted_pair_ids_ptr, weights, rows, full, expert, slot, absent, first,
                    num_rows, row_n, num_steps, N, stride_out,
                    SCATTER, FP8, NAME, GATED, ALPHA, UP_SHIFT, LIMIT, LIMIT_AFTER, GATE_SOFTCAP,
                    UP_SOFTCAP, PERMUTE, TAIL_M, BLOCK_N, BLOCK_K, NUM_STAGES,
                )  # fmt: skip
                return
        _tile(
            weight_desc, x_desc, x_scale_ptr, scale_ptr, bias_ptr, out_ptr,
            sorted_pair_ids_ptr, weights, rows, full, expert, slot, absent, first,
            num_rows, row_n, num_steps, N, stride_out,
            SCATTER, FP8, NAME, GATED, ALPHA, UP_SHIFT, LIMIT, LIMIT_AFTER, GATE_SOFTCAP,
            UP_SOFTCAP, PERMUTE, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
        )  # fmt: skip

    @gluon.jit
    def _tile(
        weight_desc,
        x_desc,
        x_scale_ptr,
        scale_ptr,
        bias_ptr,
        out_ptr,
        sorted_pair_ids_ptr,
        weights,  # (NUM_STAGES, as weight_desc's box), shared
        rows,  # (NUM_STAGES, as x_desc's box), shared
        full,  # (NUM_STAGES, 1) barriers
        expert,
        slot,
        absent,
        first,
        num_rows,
        row_n,
        num_steps,
        N,
        stride_out,
        SCATTER: gl.constexpr,
        FP8: gl.constexpr,
        NAME: gl.constexpr,
        GATED: gl.constexpr,
        ALPHA: gl.constexpr,
        UP_SHIFT: gl.constexpr,
        LIMIT: gl.constexpr,
        LIMIT_AFTER: gl.constexpr,
        GATE_SOFTCAP: gl.constexpr,
        UP_SOFTCAP: gl.constexpr,
        PERMUTE: gl.constexpr,
        BLOCK_M: gl.constexpr,  # at most x_desc's
        BLOCK_N: gl.constexpr,
        BLOCK_K: gl.constexpr,
        NUM_STAGES: gl.constexpr,
    ):
        """One tile, transposed: (channels, rows). The first NUM_STAGES - 1 steps are on the way."""
        BLOCK_OUT: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
        # wgmma: 16 rows of weights per warp, and 32 bytes of rows at a time.
        X_BITS: gl.constexpr = x_desc.dtype.primitive_bitwidth
        INTEGER: gl.constexpr = x_desc.dtype == gl.int8
        # Triton knows no product of integers with 256 rows.
        MMA_M: gl.constexpr = 128 if INTEGER and BLOCK_M > 128 else BLOCK_M
        MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, MMA_M, 256 // X_BITS])
        if X_BITS == 8:
            acc = gl.zeros([BLOCK_N, BLOCK_M], gl.int32 if INTEGER else gl.float32, MMA)
            for step in range(num_steps):
                _wait_for(full, step, num_steps, NUM_STAGES)
                weight = _weight_tile(weights, step, BLOCK_N, BLOCK_K, NUM_STAGES)
                x = _row_tile(rows, step, BLOCK_M, BLOCK_K, NUM_STAGES)
                acc = warpgroup_mma(weight, x, acc, is_async=True)
                # This product may run on; the one before it is over, and so its stage is free.
                acc = warpgroup_mma_wait(1, deps=[acc])
                tl.debug_barrier()
                _fetch(
                    weight_desc, x_desc, weights, rows, full, slot, row_n, first,
                    step + NUM_STAGES - 1, num_steps, GATED, BLOCK_K, NUM_STAGES,
                )  # fmt: skip
        else:
            acc = warpgroup_mma_init(gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA))
            mbarrier.wait(full.index(0), 0)
            # Two steps at a time, because the tensor cores read one step's weights from their
            # registers while those of the next are being written.
            for pair in range(num_steps // 2):
                for odd in gl.static_range(2):
                    step = 2 * pair + odd
                    weight = _decoded_weights(
                        weights, step, x_desc.dtype, FP8, MMA, BLOCK_N, BLOCK_K, NUM_STAGES
                    )  # fmt: skip
                    # Early: a branch keeps the assembler from decoding after the wait for wgmma.
                    _wait_for(full, step + 1, num_steps, NUM_STAGES)
                    acc, weight = warpgroup_mma_wait(0, deps=[acc, weight])
                    x = _row_tile(rows, step, BLOCK_M, BLOCK_K, NUM_STAGES)
                    acc = warpgroup_mma(weight, x, acc, is_async=True)
                    tl.debug_barrier()
                    _fetch(
                        weight_desc, x_desc, weights, rows, full, slot, row_n, first,
                        step + NUM_STAGES - 1, num_steps, GATED, BLOCK_K, NUM_STAGES,
                    )  # fmt: skip
            acc = warpgroup_mma_wait(0, deps=[acc])
            if num_steps % 2 == 1:
                step = num_steps - 1
                weight = _decoded_weights(
                    weights, step, x_desc.dtype, FP8, MMA, BLOCK_N, BLOCK_K, NUM_STAGES
                )  # fmt: skip
                x = _row_tile(rows, step, BLOCK_M, BLOCK_K, NUM_STAGES)
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
            channels = gl.minimum(row_n + channels, N - 1) + halves * N
        else:
            channels = gl.minimum(row_n + tile_rows, N - 1)
        scale = gl.load(scale_ptr + expert * all_channels + channels)
        if FP8:
            scale = scale * 256.0  # what decode_weights left out
        acc = acc * gl.expand_dims(scale, 1)
        if x_scale_ptr is not None:
            tile_columns = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
            inside = tile_columns < num_rows
            x_scale = gl.load(x_scale_ptr + first + tile_columns, mask=inside, other=0.0)
            acc = acc * gl.expand_dims(x_scale, 0)
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + expert * all_channels + channels).to(gl.float32)
            acc = acc + gl.expand_dims(bias, 1)
        if NAME is not None:
            up = acc
            if GATED:
                acc = gl.reshape(acc, [BLOCK_N // (2 * GATE_ROWS), 2, GATE_ROWS, BLOCK_M])
                acc, up = gl.split(gl.permute(acc, [0, 2, 3, 1]))
                acc = gl.reshape(acc, [BLOCK_OUT, BLOCK_M])
                up = gl.reshape(up, [BLOCK_OUT, BLOCK_M])
            acc = apply_triton(
                acc, up, NAME, GATED, ALPHA, UP_SHIFT, LIMIT, LIMIT_AFTER, GATE_SOFTCAP, UP_SOFTCAP
            )  # fmt: skip
        # Weights that are not there must not pass for some.
        out = gl.where(absent, float("nan"), acc).to(out_ptr.dtype.element_ty)
        if PERMUTE > 0:
            out = gl.reshape(out, [BLOCK_OUT // PERMUTE, 4, PERMUTE // 16, 2, 2, BLOCK_M])
            out = gl.reshape(gl.permute(out, [0, 2, 3, 1, 4, 5]), [BLOCK_OUT, BLOCK_M])
        # Through shared memory, for 16 bytes of each row.
        STORE: gl.constexpr = gl.BlockedLayout(
            [8, 1], [BLOCK_OUT // 8, 256 // BLOCK_OUT], [1, 8], [0, 1]
        )  # fmt: skip
        out = gl.convert_layout(out, STORE)
        tile_columns = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, STORE))
        inside = tile_columns < num_rows
        out_rows = first + tile_columns
        if SCATTER:
            out_rows = gl.load(sorted_pair_ids_ptr + out_rows, mask=inside, other=0)
        columns = row_n + gl.arange(0, BLOCK_OUT, layout=gl.SliceLayout(1, STORE))
        if PERMUTE > 0:
            # What lies beyond N meets weights that are zeros, and must not be NaN.
            phase = columns % PERMUTE
            phase = phase // 2 % 4 * (PERMUTE // 4) + phase // 16 * 4 + phase // 8 % 2 * 2
            past = columns // PERMUTE * PERMUTE + phase + columns % 2 >= N
            out = gl.where(gl.expand_dims(past, 1), gl.zeros_like(out), out)
        # int64: rows times their length pass 2**31.
        offsets = gl.expand_dims(out_rows.to(gl.int64) * stride_out, 0)
        mask = gl.expand_dims(inside, 0) & gl.expand_dims(columns < stride_out, 1)
        gl.store(out_ptr + (offsets + gl.expand_dims(columns, 1)), out, mask=mask)

    @gluon.jit
    def _fetch(
        weight_desc,
        x_desc,
        weights,
        rows,
        full,
        slot,
        row_n,
        first,
        step,
        num_steps,
        GATED: gl.constexpr,
        BLOCK_K: gl.constexpr,
        NUM_STAGES: gl.constexpr,
    ):
        """Start to read the tiles of ``step``, if there is one; zeros beyond the tensors."""
        _fetch_weights(
            weight_desc, x_desc, weights, full, slot, row_n, step, num_steps,
            GATED, BLOCK_K, NUM_STAGES,
        )  # fmt: skip
        _fetch_rows(x_desc, rows, full, first, step, num_steps, BLOCK_K, NUM_STAGES)

    @gluon.jit
    def _fetch_weights(
        weight_desc,
        x_desc,
        weights,
        full,
        slot,
        row_n,
        step,
        num_steps,
        GATED: gl.constexpr,
        BLOCK_K: gl.constexpr,
        NUM_STAGES: gl.constexpr,
    ):
        """Start to read weights, and expect rows with them."""
        exists = step < num_steps
        stage = step % NUM_STAGES
        barrier = full.index(stage)
        num_bytes: gl.constexpr = weight_desc.block_type.nbytes + x_desc.block_type.nbytes
        mbarrier.expect(barrier, num_bytes, pred=exists)
        k = step * BLOCK_K
        tile = weights.index(stage)
        if GATED:
            # 8 rows of gates, 8 of the same ups, and so on.
            tma.async_copy_global_to_shared(
                weight_desc, [slot, row_n // GATE_ROWS, 0, 0, k], barrier, tile, pred=exists
            )  # fmt: skip
        else:
            tma.async_copy_global_to_shared(
                weight_desc, [slot, row_n, k], barrier, tile, pred=exists
            )  # fmt: skip

    @gluon.jit
    def _fetch_rows(
        x_desc,
        rows,
        full,
        first,
        step,
        num_steps,
        BLOCK_K: gl.constexpr,
        NUM_STAGES: gl.constexpr,
    ):
        stage = step % NUM_STAGES
        tma.async_copy_global_to_shared(
            x_desc, [first, step * BLOCK_K], full.index(stage), rows.index(stage),
            pred=step < num_steps,
        )  # fmt: skip

    @gluon.jit
    def _wait_for(full, step, num_steps, NUM_STAGES: gl.constexpr):
        """Wait until the tiles of ``step``, if there is one, have come."""
        stage = step % NUM_STAGES
        mbarrier.wait(full.index(stage), (step // NUM_STAGES) & 1, pred=step < num_steps)

    @gluon.jit
    def _weight_tile(
        weights,
        step,
        BLOCK_N: gl.constexpr,
        BLOCK_K: gl.constexpr,
        NUM_STAGES: gl.constexpr,
    ):
        # The boxes' leading dimensions have the bytes of BLOCK_N rows, one after another.
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout(BLOCK_K, 8, rank=2)
        return weights.index(step % NUM_STAGES)._reinterpret(
            weights.dtype, [BLOCK_N, BLOCK_K], LAYOUT
        )  # fmt: skip

    @gluon.jit
    def _row_tile(
        rows, step, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, NUM_STAGES: gl.constexpr
    ):
        tile = rows.index(step % NUM_STAGES)
        return tile._reinterpret(rows.dtype, [BLOCK_M, BLOCK_K], rows.layout).permute([1, 0])

    @gluon.jit
    def _decoded_weights(
        weights,
        step,
        dtype: gl.constexpr,
        FP8: gl.constexpr,
        MMA: gl.constexpr,
        BLOCK_N: gl.constexpr,
        BLOCK_K: gl.constexpr,
        NUM_STAGES: gl.constexpr,
    ):
        """A step's weights in registers, as wgmma's first operand."""
        LOADED: gl.constexpr = gl.DistributedLinearLayout(
            reg_bases=_register_bases(BLOCK_K),
            lane_bases=[[0, BLOCK_K // 4], [0, BLOCK_K // 2], [1, 0], [2, 0], [4, 0]],
            warp_bases=[[16, 0], [32, 0], [64, 0]],
            block_bases=[],
            shape=[BLOCK_N, BLOCK_K],
        )
        weight = _weight_tile(weights, step, BLOCK_N, BLOCK_K, NUM_STAGES).load(LOADED)
        weight = decode_weights(weight, dtype, FP8, True)
        weight = gl.reshape(weight, [BLOCK_N, 4, BLOCK_K // 16, 2, 2])
        weight = gl.reshape(gl.permute(weight, [0, 2, 3, 1, 4]), [BLOCK_N, BLOCK_K])
        return gl.convert_layout(weight, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


def hopper_supports(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_proj_scale: torch.Tensor | None,
    down_proj: torch.Tensor,
    down_proj_scale: torch.Tensor | None,
    topk_ids: torch.Tensor,
    activation: Activation,
    num_experts: int,
    *,
    activations: torch.dtype | None = None,
) -> bool:
    """Return whether `hopper_fused_moe` takes these, which are otherwise as it takes them."""
    weights = (gate_up_proj, down_proj)
    dtype = gate_up_proj.dtype
    return (
        gluon is not None
        and is_hopper(hidden_states.device)
        and hidden_states.dtype in (torch.bfloat16, torch.float16)
        and dtype in (torch.int8, torch.float8_e4m3fn)
        and activations in (None, dtype)
        and gate_up_proj_scale is not None
        and down_proj_scale is not None
        and topk_ids.numel() > 0
        and num_experts <= 2048
        # TMA's addresses and strides are multiples of 16 bytes; 8 rows of gates alternate with 8
        # of ups.
        and all(weight.shape[2] % 16 == 0 for weight in weights)
        and all(weight.data_ptr() % 16 == 0 and weight.stride(2) == 1 for weight in weights)
        and all(weight.stride(d) % 16 == 0 for weight in weights for d in (0, 1))
        and gate_up_proj.shape[1] % (2 * 8 if activation.gated else 1) == 0
    )


def launch_tile_table(
    routing: ExpertRouting, expert_to_slot: torch.Tensor | None, block_m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (max_tiles + 1, 4) int32 and (num_pairs,) int32, see `tile_table_kernel`."""
    num_pairs = routing.sorted_pair_ids.shape[0]
    num_experts = routing.expert_offsets.shape[0] - 1
    # Every expert but one may leave its last tile nearly empty.
    max_tiles = min(num_pairs, num_experts + max(0, num_pairs - num_experts) // block_m)
    table = routing.expert_offsets.new_empty(max_tiles + 1, 4)
    positions = torch.empty_like(routing.sorted_pair_ids)
    block_experts = max(32, triton.next_power_of_2(num_experts))
    block_tiles = max(1, min(32, 4096 // block_experts))
    block_pairs = 1024
    grid = triton.cdiv(max_tiles + 1, block_tiles) + triton.cdiv(num_pairs, block_pairs)
    tile_table_kernel[(grid,)](
        routing.expert_offsets,
        routing.sorted_pair_ids,
        expert_to_slot,
        table,
        positions,
        num_pairs,
        num_experts,
        max_tiles,
        BLOCK_M=block_m,
        BLOCK_EXPERTS=block_experts,
        BLOCK_TILES=block_tiles,
        BLOCK_PAIRS=block_pairs,
        PDL=has_dependent_launch(table.device),
        **launch_options(True, table.device),
    )
    return table, positions


def launch_sort_rows(x: torch.Tensor, positions: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return rows of ``x`` (num_tokens, K), 16 bits wide, K even, at their pairs' positions.

    K is in the order that the module's docstring says, padded with zeros. Like
    `launch_quantize_sorted_rows`, for a place after the kernel that wrote ``positions`` and did
    not write ``x``, which is contiguous.
    """
    num_tokens, in_features = x.shape
    width = triton.cdiv(in_features, BLOCK_K_16) * BLOCK_K_16
    out = x.new_empty(num_tokens * top_k, width)
    words, out_words = in_features // 2, width // 2
    block = max(BLOCK_K_16, min(1024, triton.next_power_of_2(out_words)))
    sort_rows_kernel[(num_tokens, triton.cdiv(out_words, block))](
        x.view(torch.int32),
        positions,
        out.view(torch.int32),
        words,
        out_words,
        TOP_K=top_k,
        GROUP=BLOCK_K_16 // 2,
        BLOCK=block,
        PDL=has_dependent_launch(x.device),
        **launch_options(True, x.device),
    )
    return out


def launch_quantize_sorted_rows(
    x: torch.Tensor, positions: torch.Tensor, top_k: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows of ``x`` (num_tokens, K) to int8 or e4m3fn, at their pairs' positions.

    Returns that, (num_tokens * top_k, K), and its scales.
    """
    num_tokens, in_features = x.shape
    out = x.new_empty(num_tokens * top_k, in_features, dtype=dtype)
    scale = x.new_empty(num_tokens * top_k, dtype=torch.float32)
    block = max(16, triton.next_power_of_2(in_features))
    rows = max(1, 2048 // block)
    quantize_sorted_rows_kernel[(triton.cdiv(num_tokens, rows),)](
        x,
        positions,
        out,
        scale,
        num_tokens,
        in_features,
        LARGEST_VALUE=LARGEST[FORMAT_OF[dtype]],
        SMALLEST=SMALLEST_SCALE,
        TOP_K=top_k,
        ROWS=rows,
        BLOCK=block,
        PDL=has_dependent_launch(x.device),
        num_warps=min(32, max(4, block // 1024)),
        **launch_options(True, x.device),
    )
    return out, scale


def launch_hopper_gemm(
    x: torch.Tensor,  # (num_pairs, K), sorted; 16-bit: launch_sort_rows's order of K, padded
    weight: torch.Tensor,  # (num_slots, rows, K)
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    routing: ExpertRouting,
    table: torch.Tensor,  # launch_tile_table's
    out: torch.Tensor,  # (num_pairs, at least out_features)
    *,
    block_m: int,
    num_stages: int,
    out_features: int,
    x_scale: torch.Tensor | None = None,
    activation: Activation | None = None,
    scatter: bool = False,
    permute: bool = False,
) -> torch.Tensor:
    """Fill the routed rows of ``out`` and return it; the others are left as they are.

    Args:
        block_m: rows of a tile, as of ``table``.
        num_stages: steps in flight and in use, at least 3, at most what fits.
        x_scale: (num_pairs,) fp32, sorted, for 8-bit rows.
        activation: fused into the epilogue.
        scatter: write in the order of pairs instead of the sorted order.
        permute: columns of ``out`` in the order of `launch_sort_rows`, zeros beyond
            ``out_features``.
    """
    gated = activation is not None and activation.gated
    num_slots, in_features = weight.shape[0], weight.shape[2]
    wide = x.element_size() == 2
    block_k = BLOCK_K_16 if wide else BLOCK_K_8
    # The epilogue's tile goes through shared memory as well, not more than two stages of it.
    stage_bytes = BLOCK_N * block_k + block_m * 128
    num_stages = max(3, min(num_stages, SHARED_MEMORY // stage_bytes))
    bits = weight.view(torch.int8) if wide else weight
    shape, box = [num_slots, out_features, in_features], [1, BLOCK_N, block_k]
    strides = list(weight.stride())
    if gated:
        half = out_features * strides[1]
        shape = [num_slots, out_features // 8, 2, 8, in_features]
        strides = [strides[0], 8 * strides[1], half, strides[1], 1]
        box = [1, BLOCK_N // 16, 2, 8, block_k]
    # Weights' inner boxes have block_k bytes, and rows' 128: the spans of their swizzles.
    weight_layout = gl.NVMMASharedLayout(block_k, 8, rank=len(box))
    x_layout = gl.NVMMASharedLayout(128, 8 * x.element_size(), rank=2)
    max_tiles = table.shape[0] - 1
    tiles_n = triton.cdiv(out_features * (2 if gated else 1), BLOCK_N)
    hopper_gemm_kernel[(max_tiles * tiles_n,)](
        TensorDescriptor(bits, shape, strides, box, weight_layout),
        TensorDescriptor(x, list(x.shape), list(x.stride()), [block_m, block_k], x_layout),
        x_scale,
        scale,
        bias,
        out,
        table,
        routing.sorted_pair_ids,
        max_tiles,
        out_features,
        in_features,
        out.stride(0),
        SCATTER=scatter,
        FP8=wide and weight.dtype == torch.float8_e4m3fn,
        **activation_constants(activation),
        PERMUTE=BLOCK_K_16 if permute else 0,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        BLOCK_K=block_k,
        TAIL_M=block_m // 2 if block_m > 64 else 0,
        NUM_STAGES=num_stages,
        GROUP_M=8,
        num_warps=8,
        # Two programs share the registers: one stores while the other multiplies.
        maxnreg=128 if block_m <= 128 else None,
        **launch_options(True, x.device),
    )
    return out


def hopper_fused_moe(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_proj_scale: torch.Tensor,
    gate_up_proj_bias: torch.Tensor | None,
    down_proj: torch.Tensor,
    down_proj_scale: torch.Tensor,
    down_proj_bias: torch.Tensor | None,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    expert_to_slot: torch.Tensor | None,
    activation: Activation,
    num_experts: int,
    *,
    activations: torch.dtype | None = None,
    block_m: int = 128,
    num_stages: int = 4,
) -> torch.Tensor:
    """Run a layer for which `hopper_supports` holds.

    Arguments and result as of `qmoe_kernels.layer.fused_moe_triton`, but for these.

    Args:
        block_m: rows of a tile: 64, 128 or 256.
        num_stages: steps in flight and in use, at least 3, at most what fits. One takes 128 bytes
            times block_m and 8 KiB more, 16 KiB with 8-bit rows, of shared memory. Two programs
            run at a time where each takes half of it: block_m=128 with 4 stages, or 3 with 8-bit
            rows.
    """
    num_tokens, top_k = topk_ids.shape
    num_pairs = num_tokens * top_k
    hidden_size = down_proj.shape[1]
    intermediate_size = gate_up_proj.shape[1] // (2 if activation.gated else 1)
    wide = activations is None
    # Rows of skipped ids are written by nobody: zeros if the caller sees them. Before the kernels,
    # each of which starts while the one before it ends.
    new_rows = hidden_states.new_zeros if topk_weights is None else hidden_states.new_empty
    out = new_rows(num_pairs, hidden_size)
    width = triton.cdiv(intermediate_size, BLOCK_K_16) * BLOCK_K_16 if wide else intermediate_size
    hidden = hidden_states.new_empty(num_pairs, width)

    routing = ExpertRouting.from_topk_ids(topk_ids, num_experts)
    table, positions = launch_tile_table(routing, expert_to_slot, block_m)
    x_scale = None
    if activations is None:
        x = launch_sort_rows(hidden_states, positions, top_k)
    else:
        x, x_scale = launch_quantize_sorted_rows(hidden_states, positions, top_k, activations)
    launch_hopper_gemm(
        x,
        gate_up_proj,
        gate_up_proj_scale,
        gate_up_proj_bias,
        routing,
        table,
        hidden,
        block_m=block_m,
        num_stages=num_stages,
        out_features=intermediate_size,
        x_scale=x_scale,
        activation=activation,
        permute=wide,
    )
    if activations is not None:
        hidden, x_scale = launch_quantize_rows(hidden, activations, dependent=True)
    rows = launch_hopper_gemm(
        hidden,
        down_proj,
        down_proj_scale,
        down_proj_bias,
        routing,
        table,
        out,
        block_m=block_m,
        num_stages=num_stages,
        out_features=hidden_size,
        x_scale=x_scale,
        scatter=True,
    ).view(num_tokens, top_k, hidden_size)
    if topk_weights is None:
        return rows
    return launch_weighted_sum(rows, topk_weights, topk_ids, num_experts, dependent=True)
