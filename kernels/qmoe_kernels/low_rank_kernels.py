"""The kernels of `low_rank`: thin products, and the activation between the two large ones.

A factor lies as (num_experts, rank, features) here, whichever side of its product it is of; its
rows, as long as the rows that it meets, are the narrow dimension. So there are three products:

    shrink    low = scaling * rows @ factor^T     long rows to as many numbers as the rank
    expand    rows += low @ factor                and back
    gradient  factor = low^T @ rows               sums over an expert's pairs

The large products are those of a layer without adapters and of its gradient (`layer`,
`gradient_kernels`, on Hopper `hopper_gemm`), and all take one sort of the pairs. Rows between
products are in the order of sorted pairs, and each of these kernels works on a few rows of one
expert at a time: parts of the routing's tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qmoe_kernels.activations import Activation, apply_triton, gradient_triton
from qmoe_kernels.experts import Experts
from qmoe_kernels.gradient_kernels import (
    SMALLEST_LARGEST,
    choose_hopper_tile,
    largest_scale,
    launch_scale_rows,
    launch_transposed,
    launch_up,
    launch_weight_gradient,
    sorted_tile,
)
from qmoe_kernels.grouped_gemm import launch_grouped_gemm
from qmoe_kernels.heuristic import narrow_block
from qmoe_kernels.hopper_gemm import BLOCK_K_16, launch_hopper_gemm, padded
from qmoe_kernels.low_rank import Factors
from qmoe_kernels.routing import ExpertRouting
from qmoe_kernels.rows import launch_quantize_rows, launch_weighted_sum
from qmoe_kernels.tiles import LayerTiles

# Columns whose order changes among themselves, see `hopper_gemm`.
PERMUTED = tl.constexpr(BLOCK_K_16)


@dataclass(frozen=True)
class ThinFactors:
    """`Factors` as kernels take them.

    Attributes:
        inner: (num_experts, rank, in_features), contiguous, in the dtype of the rows.
        outer: (num_experts, rank, out_features), as well.
        scaling: of the product.
        factors: what they were made of.
    """

    inner: Tensor
    outer: Tensor
    scaling: float
    factors: Factors

    @classmethod
    def of(cls, factors: Factors | None, dtype: torch.dtype) -> ThinFactors | None:
        """Cast and copy what has to be; who learns has fp32, and changes it in place."""
        if factors is None:
            return None
        inner, outer = (
            factor.to(dtype, memory_format=torch.contiguous_format).contiguous()
            for factor in (factors.in_factor, factors.out_factor.transpose(1, 2))
        )
        return cls(inner, outer, factors.scaling, factors)

    @property
    def rank(self) -> int:
        return self.inner.shape[1]


def adapted_moe_triton(
    hidden_states: Tensor,  # (num_tokens, hidden_size)
    experts: Experts,
    topk_ids: Tensor,  # (num_tokens, top_k)
    topk_weights: Tensor | None,  # (num_tokens, top_k)
    up_factors: Factors | None,
    down_factors: Factors | None,
    *,
    activations: torch.dtype | None = None,
    tiles: LayerTiles | None = None,
) -> Tensor:
    """Run the kernels of `qmoe_kernels.low_rank.adapted_moe`; arguments and result as there.

    Args:
        activations, tiles: as `qmoe_kernels.layer.fused_moe_triton` has them. Of tiles, those of
            Hopper's kernels count (``tma``); for others there is a rule.
    """
    num_tokens, top_k = topk_ids.shape
    num_pairs, dtype = num_tokens * top_k, hidden_states.dtype
    # Copies before kernels: see `qmoe_kernels.layer`.
    experts, x, topk_ids = experts.contiguous(), hidden_states.contiguous(), topk_ids.contiguous()
    up, down = ThinFactors.of(up_factors, dtype), ThinFactors.of(down_factors, dtype)
    # Rows of skipped ids are written by nobody: zeros if the caller sees them.
    new_rows = x.new_zeros if topk_weights is None else x.new_empty
    out = new_rows(num_pairs, experts.hidden_size)
    hopper_tile = choose_hopper_tile(x, experts, topk_ids, tiles, activations)
    tile = hopper_tile or sorted_tile(topk_ids, experts.gate_up, activations or dtype)
    routing = ExpertRouting.from_topk_ids(
        topk_ids,
        experts.num_experts,
        block_m=tile.block_m,
        expert_to_slot=experts.gate_up.expert_to_slot,
    )
    hopper = hopper_tile is not None
    rows = launch_up(x, experts.gate_up, topk_ids, routing, tile, hopper, activations)
    low = None
    if up is not None:
        low = launch_shrink(x, up.inner, up.scaling, routing, pairs_per_row=top_k)
    widen = hopper and activations is None and experts.down.weight.itemsize == 1
    rows, low = launch_activation(rows, low, up, down, experts.activation, routing, permute=widen)
    x_scale = None
    if activations is not None:
        rows, x_scale = launch_quantize_rows(rows, activations, dependent=True)
    if hopper:
        assert routing.tiles is not None
        launch_hopper_gemm(
            rows,
            experts.down,
            routing,
            routing.tiles,
            out,
            tile,
            out_features=experts.hidden_size,
            x_scale=x_scale,
            scatter=True,
        )
    else:
        launch_grouped_gemm(
            rows, experts.down, topk_ids, routing, out, tile, x_scale=x_scale, scatter=True
        )
    if down is not None:
        launch_expand(low, down.outer, routing, out, scatter=True)
    out = out.view(num_tokens, top_k, experts.hidden_size)
    if topk_weights is None:
        return out
    return launch_weighted_sum(out, topk_weights, topk_ids, experts.num_experts)


def adapted_moe_backward_triton(
    gradient: Tensor,  # (num_tokens, hidden_size), or (num_tokens, top_k, hidden_size)
    hidden_states: Tensor,  # (num_tokens, hidden_size)
    experts: Experts,
    topk_ids: Tensor,  # (num_tokens, top_k)
    topk_weights: Tensor | None,  # (num_tokens, top_k)
    up_factors: Factors | None,
    down_factors: Factors | None,
    *,
    of_hidden: bool = True,
    of_factors: bool = True,
    tiles: LayerTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the kernels of `qmoe::adapted_moe_backward`; arguments and result as there.

    With the rows ``a = A @ x`` and ``b = B^T @ gradient`` of a projection,
    ``scaling * b`` meets ``A`` on the way to the gradient of ``x`` and ``x`` on the way to that of
    ``A``; ``scaling * a`` meets the gradient on the way to that of ``B``.

    Args:
        tiles: as `qmoe_kernels.gradient_kernels.fused_moe_backward_triton` has them.
    """
    num_tokens, top_k = topk_ids.shape
    num_experts, hidden_size = experts.num_experts, experts.hidden_size
    # Copies before kernels: see `qmoe_kernels.layer`.
    experts, x, topk_ids = experts.contiguous(), hidden_states.contiguous(), topk_ids.contiguous()
    up, down = (ThinFactors.of(factors, x.dtype) for factors in (up_factors, down_factors))
    pairs_per_row = 1 if gradient.ndim == 3 else top_k
    gradient = gradient.contiguous().flatten(0, -2)
    largest_up, largest_down = largest_scale(experts.gate_up), largest_scale(experts.down)
    # Of skipped ids there are none, and kernels know nothing of these.
    of_weights = None
    if topk_weights is not None:
        topk_weights = topk_weights.contiguous()
        of_weights = x.new_zeros(num_tokens, top_k, dtype=torch.float32)
    hopper_tile = choose_hopper_tile(x, experts, topk_ids, tiles)
    tile = hopper_tile or sorted_tile(topk_ids, experts.gate_up, x.dtype)
    routing = ExpertRouting.from_topk_ids(topk_ids, num_experts, block_m=tile.block_m)

    up_rows = launch_up(x, experts.gate_up, topk_ids, routing, tile, hopper_tile is not None)
    up_low = of_hidden_low = None
    if up is not None:
        up_low = launch_shrink(x, up.inner, up.scaling, routing, pairs_per_row=top_k)
    if down is not None:
        of_hidden_low = launch_shrink(
            gradient, down.outer, down.scaling, routing, pairs_per_row=pairs_per_row
        )
    rows = launch_scale_rows(
        gradient, experts.down, largest_down, topk_ids, routing, pairs_per_row, of_weights
    )
    rows = launch_transposed(rows, experts.down, largest_down, routing, hopper_tile)
    between = launch_activation_gradient(
        up_rows,
        rows,
        up_low,
        of_hidden_low,
        up,
        down,
        experts,
        largest_up,
        topk_weights,
        routing,
        of_weights,
        of_factors=of_factors,
    )
    del up_rows, rows  # room for what follows
    # Results of an operator share no memory.
    of_up, of_down = ((x.new_empty(0), x.new_empty(0)) for _ in range(2))
    if of_factors and up is not None:
        of_up = (
            _factor_gradient(between.up_low, x, up.factors.in_factor, routing, top_k),
            _factor_gradient(up_low, between.of_up, up.factors.out_factor.mT, routing).mT,
        )
    if of_factors and down is not None:
        in_factor, out_factor = down.factors.in_factor, down.factors.out_factor.mT
        of_down = (
            _factor_gradient(of_hidden_low, between.hidden, in_factor, routing),
            _factor_gradient(between.down_low, gradient, out_factor, routing, pairs_per_row).mT,
        )
    of_x = x.new_empty(0)
    if of_hidden:
        rows = launch_transposed(
            between.scaled, experts.gate_up, largest_up, routing, hopper_tile, scatter=True
        )
        if up is not None:
            launch_expand(between.up_low, up.inner, routing, rows, scatter=True)
        rows = rows.view(num_tokens, top_k, hidden_size)
        of_x = launch_weighted_sum(rows, None, topk_ids, num_experts)
    if topk_weights is None or of_weights is None:
        return of_x, x.new_empty(0), *of_up, *of_down
    return of_x, of_weights.to(topk_weights.dtype), *of_up, *of_down


def _factor_gradient(
    low: Tensor | None,  # (num_pairs, rank), by sorted pairs
    rows: Tensor | None,  # (num_rows, features)
    factor: Tensor,  # (num_experts, rank, features), for its shape and dtype
    routing: ExpertRouting,
    pairs_per_row: int | None = None,
) -> Tensor:
    """(num_experts, rank, features): see `launch_weight_gradient`."""
    assert low is not None and rows is not None
    return launch_weight_gradient(low, rows, factor, routing, pairs_per_row, sorted_gradient=True)


# ---- thin products -----------------------------------------------------------------------------


@triton.jit
def shrink_kernel(
    x_ptr,  # (num_pairs / PAIRS_PER_ROW, K)
    factor_ptr,  # (num_experts, RANK, K)
    out_ptr,  # (num_pairs, RANK), by sorted pairs
    sorted_ptr,  # (num_pairs,) int32
    tiles_ptr,  # (max_tiles + 1, 4) int32, see ExpertRouting
    scaling,
    K,
    RANK: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    TILE_M: tl.constexpr,  # the routing's block_m
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (max_tiles, cdiv(TILE_M, BLOCK_M)). out = scaling * x @ factor^T."""
    expert, first, num_rows = _load_part(tiles_ptr, TILE_M, BLOCK_M)
    if num_rows <= 0:
        return
    order = tl.arange(0, BLOCK_M)
    positions = (first + tl.minimum(order, num_rows - 1)).to(tl.int64)
    rows = tl.load(sorted_ptr + positions).to(tl.int64) // PAIRS_PER_ROW
    ranks, columns = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * K + columns[None, :]
    factor_ptrs = factor_ptr + expert * RANK * K + ranks[:, None] * K + columns[None, :]
    is_rank = (ranks < RANK)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = (columns < K - k)[None, :]
        x = tl.load(x_ptrs + k, mask=inside, other=0.0)
        factor = tl.load(factor_ptrs + k, mask=inside & is_rank, other=0.0)
        acc = tl.dot(x, tl.trans(factor), acc, input_precision="ieee")
    _store_low(out_ptr, acc * scaling, positions, order < num_rows, RANK, BLOCK_R)


@triton.jit
def expand_kernel(
    low_ptr,  # (num_pairs, RANK), by sorted pairs
    factor_ptr,  # (num_experts, RANK, N)
    out_ptr,  # (num_pairs, N)
    sorted_ptr,  # (num_pairs,) int32
    tiles_ptr,  # (max_tiles + 1, 4) int32, see ExpertRouting
    N,
    RANK: tl.constexpr,
    SCATTER: tl.constexpr,  # out is by pair, rather than by sorted position
    TILE_M: tl.constexpr,  # the routing's block_m
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (max_tiles, cdiv(TILE_M, BLOCK_M), cdiv(N, BLOCK_N)). out += low @ factor."""
    expert, first, num_rows = _load_part(tiles_ptr, TILE_M, BLOCK_M)
    if num_rows <= 0:
        return
    order = tl.arange(0, BLOCK_M)
    positions = (first + tl.minimum(order, num_rows - 1)).to(tl.int64)
    rows = positions
    if SCATTER:
        rows = tl.load(sorted_ptr + positions).to(tl.int64)
    low = _load_low(low_ptr, positions, RANK, BLOCK_R)
    columns = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = _load_factor(factor_ptr + expert * RANK * N, columns, columns < N, N, RANK, BLOCK_R)
    acc = tl.dot(low, factor, input_precision="ieee")
    out_ptrs = out_ptr + rows[:, None] * N + columns[None, :]
    mask = (order < num_rows)[:, None] & (columns < N)[None, :]
    acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_part(tiles_ptr, TILE_M: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert, first sorted position and number of rows of this program's part of a tile."""
    tile_ptr = tiles_ptr + 4 * tl.program_id(0)
    done = tl.program_id(1) * BLOCK_M
    # int64: experts times their factors may pass 2**31.
    expert = tl.load(tile_ptr).to(tl.int64)
    num_rows = tl.minimum(tl.load(tile_ptr + 3), TILE_M) - done
    return expert, tl.load(tile_ptr + 2) + done, tl.minimum(num_rows, BLOCK_M)


@triton.jit
def _load_low(ptr, positions, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """(BLOCK_M, BLOCK_R) of as many rows of RANK numbers, zeros beyond."""
    ranks = tl.arange(0, BLOCK_R)
    ptrs = ptr + positions[:, None] * RANK + ranks[None, :]
    return tl.load(ptrs, mask=(ranks < RANK)[None, :], other=0.0)


@triton.jit
def _store_low(ptr, low, positions, mask, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    ranks = tl.arange(0, BLOCK_R)
    ptrs = ptr + positions[:, None] * RANK + ranks[None, :]
    mask = mask[:, None] & (ranks < RANK)[None, :]
    tl.store(ptrs, low.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_factor(ptr, columns, inside, N, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """(BLOCK_R, columns) of one expert's factor (RANK, N), zeros beyond."""
    ranks = tl.arange(0, BLOCK_R)
    ptrs = ptr + ranks[:, None] * N + columns[None, :]
    return tl.load(ptrs, mask=(ranks < RANK)[:, None] & inside[None, :], other=0.0)


def launch_shrink(
    x: Tensor,  # (num_pairs / pairs_per_row, features)
    factor: Tensor,  # (num_experts, rank, features)
    scaling: float,
    routing: ExpertRouting,
    *,
    pairs_per_row: int,
) -> Tensor:
    """(num_pairs, rank) by sorted pairs: rows times their experts' factors, times ``scaling``.

    Args:
        routing: with tiles.
        pairs_per_row: row ``pair // pairs_per_row`` of ``x`` belongs to a pair.
    """
    _, rank, features = factor.shape
    num_pairs = routing.sorted_pair_ids.shape[0]
    out = x.new_empty(num_pairs, rank)
    if out.numel():
        assert routing.tiles is not None and routing.block_m is not None
        block_m, block_r = _blocks(routing.block_m, rank)
        block_k = 32 if x.itemsize == 4 else 128 if block_r <= 64 else 64
        shrink_kernel[_parts(routing, block_m)](
            x,
            factor,
            out,
            routing.sorted_pair_ids,
            routing.tiles,
            scaling,
            features,
            RANK=rank,
            PAIRS_PER_ROW=pairs_per_row,
            TILE_M=routing.block_m,
            BLOCK_M=block_m,
            BLOCK_R=block_r,
            BLOCK_K=narrow_block(block_k, features),
            num_warps=4,
            num_stages=2 if x.itemsize == 4 else 3,
        )
    return out


def launch_expand(
    low: Tensor | None,  # (num_pairs, rank), by sorted pairs
    factor: Tensor,  # (num_experts, rank, features)
    routing: ExpertRouting,
    out: Tensor,  # (num_pairs, features)
    *,
    scatter: bool = False,
) -> None:
    """Add ``low``, times their experts' factors, to the routed rows of ``out``.

    Args:
        routing: with tiles.
        scatter: ``out`` is in the order of pairs instead of the sorted order.
    """
    assert low is not None and routing.tiles is not None and routing.block_m is not None
    _, rank, features = factor.shape
    if out.numel():
        block_m, block_r = _blocks(routing.block_m, rank)
        block_n = narrow_block(16 if out.itemsize == 4 else 128, features)
        grid = (*_parts(routing, block_m), triton.cdiv(features, block_n))
        expand_kernel[grid](
            low,
            factor,
            out,
            routing.sorted_pair_ids,
            routing.tiles,
            features,
            RANK=rank,
            SCATTER=scatter,
            TILE_M=routing.block_m,
            BLOCK_M=block_m,
            BLOCK_R=block_r,
            BLOCK_N=block_n,
            num_warps=4,
        )


def _blocks(tile_m: int, rank: int) -> tuple[int, int]:
    """BLOCK_M and BLOCK_R: tensor cores have no fewer than 16 of each."""
    return max(16, min(32, tile_m)), max(16, triton.next_power_of_2(rank))


def _parts(routing: ExpertRouting, block_m: int) -> tuple[int, int]:
    assert routing.tiles is not None and routing.block_m is not None
    return routing.tiles.shape[0] - 1, triton.cdiv(routing.block_m, block_m)


# ---- the activation ----------------------------------------------------------------------------


@triton.jit
def activation_kernel(
    up_ptr,  # (num_pairs, N or 2 * N), by sorted pairs as all rows
    up_low_ptr,  # (num_pairs, UP_RANK), or None
    up_outer_ptr,  # (num_experts, UP_RANK, N or 2 * N), or None
    down_inner_ptr,  # (num_experts, DOWN_RANK, N), or None
    out_ptr,  # (num_pairs, stride_out)
    down_low_ptr,  # (num_pairs, DOWN_RANK), or None
    tiles_ptr,  # (max_tiles + 1, 4) int32, see ExpertRouting
    down_scaling,
    N,
    stride_out,
    UP_RANK: tl.constexpr,
    DOWN_RANK: tl.constexpr,
    PERMUTE: tl.constexpr,  # the order of columns of out is that of `hopper_gemm`
    ACTIVATION: tl.constexpr,
    TILE_M: tl.constexpr,  # the routing's block_m
    BLOCK_M: tl.constexpr,
    BLOCK_UP: tl.constexpr,  # at least UP_RANK
    BLOCK_DOWN: tl.constexpr,  # at least DOWN_RANK
    BLOCK_N: tl.constexpr,
):
    """Grid: (max_tiles, cdiv(TILE_M, BLOCK_M)).

    out = activation(up + up_low @ up_outer), down_low = down_scaling * out @ down_inner^T.
    """
    GATED: tl.constexpr = ACTIVATION.gated
    expert, first, num_rows = _load_part(tiles_ptr, TILE_M, BLOCK_M)
    if num_rows <= 0:
        return
    channels = N
    if GATED:
        channels = 2 * N
    order = tl.arange(0, BLOCK_M)
    positions = (first + tl.minimum(order, num_rows - 1)).to(tl.int64)
    exists = order < num_rows
    if up_low_ptr is not None:
        up_low = _load_low(up_low_ptr, positions, UP_RANK, BLOCK_UP)
        up_outer_ptr += expert * UP_RANK * channels
    if down_inner_ptr is not None:
        down_inner_ptr += expert * DOWN_RANK * N
        down_low = tl.zeros((BLOCK_M, BLOCK_DOWN), dtype=tl.float32)
    up_ptrs = up_ptr + positions[:, None] * channels
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = columns < N
        gate = tl.load(up_ptrs + columns[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        if up_low_ptr is not None:
            factor = _load_factor(up_outer_ptr, columns, inside, channels, UP_RANK, BLOCK_UP)
            gate = tl.dot(up_low, factor, gate, input_precision="ieee")
        up = gate
        if GATED:
            up = tl.load(up_ptrs + N + columns[None, :], mask=inside[None, :], other=0.0)
            up = up.to(tl.float32)
            if up_low_ptr is not None:
                factor = _load_factor(
                    up_outer_ptr + N, columns, inside, channels, UP_RANK, BLOCK_UP
                )
                up = tl.dot(up_low, factor, up, input_precision="ieee")
        hidden = apply_triton(gate, up, ACTIVATION)
        # Beyond N there may be columns of out, which meet weights that are zeros.
        hidden = tl.where(inside[None, :], hidden, 0.0).to(out_ptr.dtype.element_ty)
        if down_inner_ptr is not None:
            factor = _load_factor(down_inner_ptr, columns, inside, N, DOWN_RANK, BLOCK_DOWN)
            down_low = tl.dot(hidden, tl.trans(factor), down_low, input_precision="ieee")
        if PERMUTE:
            hidden = _permuted(hidden, BLOCK_M, BLOCK_N)
        out_ptrs = out_ptr + positions[:, None] * stride_out + columns[None, :]
        tl.store(out_ptrs, hidden, mask=exists[:, None] & (columns < stride_out)[None, :])
    if down_inner_ptr is not None:
        _store_low(down_low_ptr, down_low * down_scaling, positions, exists, DOWN_RANK, BLOCK_DOWN)


@triton.jit
def _permuted(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns in the order ``(j, h, t, e)`` of `hopper_gemm`, of ``(t, j, h, e)``."""
    x = tl.reshape(x, (BLOCK_M, BLOCK_N // PERMUTED, 4, PERMUTED // 8, 2))
    return tl.reshape(tl.permute(x, (0, 1, 3, 2, 4)), (BLOCK_M, BLOCK_N))


def launch_activation(
    up_rows: Tensor,  # (num_pairs, channels)
    up_low: Tensor | None,  # (num_pairs, rank), with ``up``
    up: ThinFactors | None,
    down: ThinFactors | None,
    activation: Activation,
    routing: ExpertRouting,
    *,
    permute: bool,
) -> tuple[Tensor, Tensor | None]:
    """Add the first projection's adapter, apply the activation, and shrink for the second one.

    Args:
        permute: columns in the order of `launch_sort_rows`, with zeros up to a multiple of 64.

    Returns:
        (num_pairs, intermediate_size) and, with ``down``, (num_pairs, rank).
    """
    num_pairs, channels = up_rows.shape
    size = channels // 2 if activation.gated else channels
    out = up_rows.new_empty(num_pairs, padded(size) if permute else size)
    low = None if down is None else up_rows.new_empty(num_pairs, down.rank)
    if out.numel():
        assert routing.tiles is not None and routing.block_m is not None
        block_m, block_up = _blocks(routing.block_m, up.rank if up else 1)
        _, block_down = _blocks(routing.block_m, down.rank if down else 1)
        activation_kernel[_parts(routing, block_m)](
            up_rows,
            up_low,
            None if up is None else up.outer,
            None if down is None else down.inner,
            out,
            low,
            routing.tiles,
            1.0 if down is None else down.scaling,
            size,
            out.shape[1],
            UP_RANK=up.rank if up else 1,
            DOWN_RANK=down.rank if down else 1,
            PERMUTE=permute,
            ACTIVATION=activation,
            TILE_M=routing.block_m,
            BLOCK_M=block_m,
            BLOCK_UP=block_up,
            BLOCK_DOWN=block_down,
            **_columns(out, 64, max(block_up, block_down)),
        )
    return out, low


@dataclass(frozen=True)
class Between:
    """What the two halves of a layer's backward pass share, by sorted pairs.

    Attributes:
        scaled: (num_pairs, channels) gradients before the activation, times relative scales.
        of_up: (num_pairs, channels) the same without scales; None if nobody asks for it.
        hidden: (num_pairs, intermediate_size) the activation's output times the token's weight;
            None if nobody asks for it.
        up_low: (num_pairs, rank) ``of_up`` shrunk by the first projection's outer factor.
        down_low: (num_pairs, rank) ``hidden`` shrunk by the second one's inner factor.
    """

    scaled: Tensor
    of_up: Tensor | None
    hidden: Tensor | None
    up_low: Tensor | None
    down_low: Tensor | None


@triton.jit
def activation_gradient_kernel(
    up_ptr,  # (num_pairs, N or 2 * N), by sorted pairs as all rows
    gradient_ptr,  # (num_pairs, N): of the activation's output, without the token's weight
    up_low_ptr,  # (num_pairs, UP_RANK), or None
    gradient_low_ptr,  # (num_pairs, DOWN_RANK), or None
    up_outer_ptr,  # (num_experts, UP_RANK, N or 2 * N), or None
    down_inner_ptr,  # (num_experts, DOWN_RANK, N), or None
    scaled_ptr,  # (num_pairs, N or 2 * N)
    of_up_ptr,  # (num_pairs, N or 2 * N), or None
    hidden_ptr,  # (num_pairs, N), or None
    of_up_low_ptr,  # (num_pairs, UP_RANK), or None
    down_low_ptr,  # (num_pairs, DOWN_RANK), or None
    scale_ptr,  # (num_experts, N or 2 * N) fp32, or None
    largest_ptr,  # (num_experts,) fp32, or None
    weights_ptr,  # (num_pairs,), topk_weights, or None
    sums_ptr,  # (num_pairs,) fp32, in the order of pairs, or None
    sorted_ptr,  # (num_pairs,) int32
    tiles_ptr,  # (max_tiles + 1, 4) int32, see ExpertRouting
    up_scaling,
    down_scaling,
    N,
    UP_RANK: tl.constexpr,
    DOWN_RANK: tl.constexpr,
    ADD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE_M: tl.constexpr,  # the routing's block_m
    BLOCK_M: tl.constexpr,
    BLOCK_UP: tl.constexpr,  # at least UP_RANK
    BLOCK_DOWN: tl.constexpr,  # at least DOWN_RANK
    BLOCK_N: tl.constexpr,
):
    """Grid: (max_tiles, cdiv(TILE_M, BLOCK_M)). What `Between` has.

    ``sums`` gets gradient times the activation's output, added to what it has if ADD.
    """
    GATED: tl.constexpr = ACTIVATION.gated
    expert, first, num_rows = _load_part(tiles_ptr, TILE_M, BLOCK_M)
    if num_rows <= 0:
        return
    channels = N
    if GATED:
        channels = 2 * N
    order = tl.arange(0, BLOCK_M)
    positions = (first + tl.minimum(order, num_rows - 1)).to(tl.int64)
    exists = order < num_rows
    pairs = tl.load(sorted_ptr + positions).to(tl.int64)
    weight = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + pairs).to(tl.float32)
    if scale_ptr is not None:
        over = 1.0 / tl.maximum(tl.load(largest_ptr + expert), SMALLEST_LARGEST)
        scale_ptr += expert * channels
    if up_low_ptr is not None:
        up_low = _load_low(up_low_ptr, positions, UP_RANK, BLOCK_UP)
        up_outer_ptr += expert * UP_RANK * channels
        of_up_low = tl.zeros((BLOCK_M, BLOCK_UP), dtype=tl.float32)
    if down_inner_ptr is not None:
        gradient_low = _load_low(gradient_low_ptr, positions, DOWN_RANK, BLOCK_DOWN)
        down_inner_ptr += expert * DOWN_RANK * N
        down_low = tl.zeros((BLOCK_M, BLOCK_DOWN), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    row = positions[:, None] * channels
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = columns < N
        mask = exists[:, None] & inside[None, :]
        narrow = positions[:, None] * N + columns[None, :]
        wide = row + columns[None, :]
        gate = tl.load(up_ptr + wide, mask=mask, other=0.0).to(tl.float32)
        if up_low_ptr is not None:
            of_gate_factor = _load_factor(
                up_outer_ptr, columns, inside, channels, UP_RANK, BLOCK_UP
            )
            gate = tl.dot(up_low, of_gate_factor, gate, input_precision="ieee")
        up = gate
        if GATED:
            up = tl.load(up_ptr + N + wide, mask=mask, other=0.0).to(tl.float32)
            if up_low_ptr is not None:
                of_up_factor = _load_factor(
                    up_outer_ptr + N, columns, inside, channels, UP_RANK, BLOCK_UP
                )
                up = tl.dot(up_low, of_up_factor, up, input_precision="ieee")
        y = tl.load(gradient_ptr + narrow, mask=mask, other=0.0).to(tl.float32)
        if down_inner_ptr is not None:
            factor = _load_factor(down_inner_ptr, columns, inside, N, DOWN_RANK, BLOCK_DOWN)
            y = tl.dot(gradient_low, factor, y, input_precision="ieee")
        hidden, of_gate, of_up = gradient_triton(gate, up, y * weight[:, None], ACTIVATION)
        total += tl.sum(tl.where(mask, y * hidden, 0.0), 1)
        if hidden_ptr is not None:
            weighted = (hidden * weight[:, None]).to(hidden_ptr.dtype.element_ty)
            tl.store(hidden_ptr + narrow, weighted, mask=mask)
            weighted = tl.where(mask, weighted, 0.0)
            down_low = tl.dot(weighted, tl.trans(factor), down_low, input_precision="ieee")
        dtype: tl.constexpr = scaled_ptr.dtype.element_ty
        of_gate = tl.where(mask, of_gate, 0.0)
        plain = of_gate.to(dtype)
        if up_low_ptr is not None:
            of_up_low = tl.dot(plain, tl.trans(of_gate_factor), of_up_low, input_precision="ieee")
        if of_up_ptr is not None:
            tl.store(of_up_ptr + wide, plain, mask=mask)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + columns, mask=inside, other=0.0) * over
            plain = (of_gate * scale[None, :]).to(dtype)
        tl.store(scaled_ptr + wide, plain, mask=mask)
        if GATED:
            of_up = tl.where(mask, of_up, 0.0)
            plain = of_up.to(dtype)
            if up_low_ptr is not None:
                of_up_low = tl.dot(plain, tl.trans(of_up_factor), of_up_low, input_precision="ieee")
            if of_up_ptr is not None:
                tl.store(of_up_ptr + N + wide, plain, mask=mask)
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + N + columns, mask=inside, other=0.0) * over
                plain = (of_up * scale[None, :]).to(dtype)
            tl.store(scaled_ptr + N + wide, plain, mask=mask)
    if up_low_ptr is not None:
        _store_low(of_up_low_ptr, of_up_low * up_scaling, positions, exists, UP_RANK, BLOCK_UP)
    if hidden_ptr is not None:
        _store_low(down_low_ptr, down_low * down_scaling, positions, exists, DOWN_RANK, BLOCK_DOWN)
    if sums_ptr is not None:
        if ADD:
            total += tl.load(sums_ptr + pairs)
        tl.store(sums_ptr + pairs, total, mask=exists)


def launch_activation_gradient(
    up_rows: Tensor,  # (num_pairs, channels)
    gradient: Tensor,  # (num_pairs, intermediate_size)
    up_low: Tensor | None,  # (num_pairs, rank), with ``up``
    gradient_low: Tensor | None,  # (num_pairs, rank), with ``down``
    up: ThinFactors | None,
    down: ThinFactors | None,
    experts: Experts,
    largest: Tensor | None,  # of gate_up
    topk_weights: Tensor | None,
    routing: ExpertRouting,
    sums: Tensor | None,  # (num_tokens, top_k) fp32
    *,
    of_factors: bool,
) -> Between:
    """Go back through the activation, with what adapters add before and after it.

    Args:
        up_low: rows shrunk by the first projection's inner factor.
        gradient_low: the output's gradients, shrunk by the second one's outer factor.
        sums: gets gradients of ``topk_weights``; with a down bias it has those of the bias so far.
        of_factors: whether the factors' gradients are asked for.
    """
    (num_pairs, channels), size = up_rows.shape, gradient.shape[1]
    scale = experts.gate_up.scale
    new, of_up, of_down = up_rows.new_empty, up and of_factors, down and of_factors
    between = Between(
        new(num_pairs, channels),
        new(num_pairs, channels) if of_up and scale is not None else None,
        new(num_pairs, size) if of_down else None,
        None if up is None else new(num_pairs, up.rank),
        new(num_pairs, down.rank) if down and of_factors else None,
    )
    if up_rows.numel():
        assert routing.tiles is not None and routing.block_m is not None
        block_m, block_up = _blocks(routing.block_m, up.rank if up else 1)
        _, block_down = _blocks(routing.block_m, down.rank if down else 1)
        activation_gradient_kernel[_parts(routing, block_m)](
            up_rows,
            gradient,
            up_low,
            gradient_low,
            None if up is None else up.outer,
            None if down is None else down.inner,
            between.scaled,
            between.of_up,
            between.hidden,
            between.up_low,
            between.down_low,
            scale,
            largest,
            topk_weights,
            sums,
            routing.sorted_pair_ids,
            routing.tiles,
            1.0 if up is None else up.scaling,
            1.0 if down is None else down.scaling,
            size,
            UP_RANK=up.rank if up else 1,
            DOWN_RANK=down.rank if down else 1,
            ADD=experts.down.bias is not None,
            ACTIVATION=experts.activation,
            TILE_M=routing.block_m,
            BLOCK_M=block_m,
            BLOCK_UP=block_up,
            BLOCK_DOWN=block_down,
            **_columns(gradient, 32, max(block_up, block_down)),
        )
    if of_up and scale is None:  # without scales they are the same
        between = replace(between, of_up=between.scaled)
    return between


def _columns(rows: Tensor, block_n: int, block_r: int) -> Any:
    """How an activation's columns are cut, and by how many warps: registers are what lacks."""
    high = block_r > 64
    if rows.itemsize == 4:  # ieee products use no tensor cores
        return {"BLOCK_N": 16 if high else 32, "num_warps": 8 if high else 4, "num_stages": 1}
    return {"BLOCK_N": block_n, "num_warps": 8 if high else 4, "num_stages": 1 if high else 2}
