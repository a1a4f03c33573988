"""Tiles by rule, for what no table holds.

The numbers are read off ``benchmarks/results/kernel_tiles.json``: eight models' layers on an H200,
every tile at 1 to 4096 tokens (``python -m benchmarks.tiles``; ``--fit`` prints what each loses).
Few tokens of experts of a middle size come from ``kernel_tiles_few.json``, by the same program.
What decides is the mean number of rows per expert, and whether experts are large: then a program's
loop over K is long, and hides what comes before and after it.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch

from qmoe_kernels.tiles import LayerShape, LayerTiles, TileConfig

_T = TypeVar("_T")

# Up to here a program finds its rows among all pairs faster than a launch sorts them.
UNSORTED_PAIRS = 48

# Experts of one token that a program of the second product holds at most, without tensor cores.
MOST_AT_ONCE = 32

# hidden_size * intermediate_size up to which experts are small, and from which they are large.
SMALL, LARGE = 3_000_000, 8_000_000

# Rows per expert, on average, up to which a tile is chosen; then block_m, block_n, bytes along k
# (of rows of 8 bits, else of weights), warps, stages, tail_m. They fit 99 KiB of shared memory.
_Rule = tuple[tuple[float, tuple[int, ...]], ...]
_WIDE: _Rule = (  # 8-bit weights, 16-bit rows
    (6, (8, 64, 256, 4, 3)),
    (12, (16, 64, 128, 2, 4)),
    (18, (16, 64, 128, 2, 3)),
    (40, (32, 64, 128, 2, 3)),
    (80, (64, 128, 64, 4, 3)),
    (math.inf, (128, 128, 32, 8, 4, 32)),
)
_EIGHT_BIT: _Rule = (  # weights and rows
    (1.5, (8, 64, 256, 4, 4)),
    (12, (16, 128, 128, 4, 4)),
    (24, (32, 128, 128, 4, 4)),
    (80, (64, 128, 128, 4, 3)),
    (math.inf, (128, 128, 128, 8, 3, 32)),
)
_SIXTEEN_BIT: _Rule = (  # weights and rows
    (0.2, (8, 64, 256, 4, 3)),
    (3, (8, 64, 256, 4, 4)),
    (12, (16, 64, 256, 4, 4)),
    (24, (32, 128, 128, 4, 4)),
    (80, (64, 128, 128, 4, 3)),
    (math.inf, (128, 128, 64, 8, 4, 32)),
)
_FP32: _Rule = (  # rows: ieee products use no tensor cores, and registers are few
    (16, (16, 32, 32, 4, 2)),
    (math.inf, (32, 32, 32, 4, 2)),
)

# Where a program may take 227 KiB.
_ROOMY_SMALL_EIGHT_BIT: _Rule = (
    (0.35, (8, 128, 128, 4, 4)), (1.5, (8, 128, 256, 8, 3)), *_EIGHT_BIT[1:],
)  # fmt: skip
_ROOMY_LARGE_EIGHT_BIT: _Rule = (_EIGHT_BIT[0], (12, (16, 128, 256, 8, 3)), *_EIGHT_BIT[2:])
_ROOMY_SIXTEEN_BIT: _Rule = (*_SIXTEEN_BIT[:2], (12, (16, 128, 256, 8, 3)), *_SIXTEEN_BIT[3:])
# Hopper's own kernel: block_m, tail_m and stages. Large experts come last.
_Hopper = tuple[tuple[float, tuple[int, int, int] | None], ...]
_HOPPER_FROM_24: _Hopper = ((48, (64, 16, 6)), (96, (128, 64, 4)), (192, (128, 32, 4)))
_HOPPER_WIDE: tuple[_Hopper, _Hopper] = (
    ((24, None), *_HOPPER_FROM_24, (384, (128, 64, 4)), (math.inf, (256, 64, 4))),
    ((12, None), (24, (32, 16, 6)), *_HOPPER_FROM_24, (math.inf, (256, 64, 4))),
)
_HOPPER_EIGHT_BIT: tuple[_Hopper, _Hopper] = (
    ((48, None), (math.inf, (128, 64, 3))),
    ((24, None), (48, (64, 32, 4)), (192, (128, 64, 3)), (math.inf, (256, 64, 4))),
)
_HOPPER_SIXTEEN_BIT: _Hopper = (
    (24, None), (48, (64, 0, 4)), (384, (128, 64, 3)), (math.inf, (256, 64, 4)),
)  # fmt: skip


def heuristic_tiles(
    shape: LayerShape,
    num_tokens: int,
    weights: torch.dtype,
    activations: torch.dtype,
    *,
    hopper: bool = False,
) -> LayerTiles:
    """Choose by the mean number of rows per expert; fits 99 KiB of shared memory but on Hopper.

    Args:
        shape: of the layer.
        num_tokens: in this call.
        weights, activations: dtypes of the products' operands.
        hopper: whether the kernels of `qmoe_kernels.hopper_gemm` may be chosen.
    """
    num_pairs = num_tokens * shape.top_k
    experts = 1 << (shape.top_k - 1).bit_length()
    # Without tensor cores, unless many of a program's lanes would stand for no expert.
    padded = experts > 1.5 * shape.top_k and activations.itemsize == 2
    if num_tokens == 1 and activations.itemsize > 1 and not padded and experts <= MOST_AT_ONCE:
        return _one_token(shape, experts, weights)
    rows = num_pairs / shape.num_experts
    size = shape.hidden_size * shape.intermediate_size
    if hopper:
        found = _hopper_rule(rows, weights, activations, size >= LARGE)
        if found is not None:
            block_m, tail_m, num_stages = found
            return hopper_tiles(block_m, activations, num_stages, tail_m)
    sort = num_pairs > UNSORTED_PAIRS
    tile = heuristic_tile(rows, weights, activations, size=size, sort=sort, roomy=hopper)
    if num_tokens == 1 and activations.itemsize == 1:
        tile = TileConfig(8, 64, 256, 4, 4) if size >= LARGE else TileConfig(8, 64, 128, 4, 5)
    return LayerTiles(tile, tile, sort)


def hopper_tiles(
    block_m: int, activations: torch.dtype, num_stages: int = 4, tail_m: int = 0
) -> LayerTiles:
    """Tiles for `qmoe_kernels.hopper_gemm`, of which some numbers are given."""
    tile = TileConfig(block_m, 128, 128 // activations.itemsize, 8, num_stages, tail_m)
    return LayerTiles(tile, tile, sort=True, tma=True)


def heuristic_tile(
    rows: float,
    weights: torch.dtype,
    activations: torch.dtype,
    *,
    size: int = 0,
    sort: bool = True,
    roomy: bool = False,
) -> TileConfig:
    """Choose one product's tile for so many rows per expert, on average.

    Args:
        rows: per expert.
        weights, activations: dtypes of the product's operands.
        size: of an expert, hidden_size * intermediate_size.
        sort: whether pairs are sorted first.
        roomy: whether a program may take 227 KiB of shared memory rather than 99.
    """
    if activations == torch.float32:
        return TileConfig(*_first(_FP32, rows))
    width = weights.itemsize
    if activations.itemsize == 1:
        rule = _EIGHT_BIT
        if roomy and size <= SMALL:
            rule = _ROOMY_SMALL_EIGHT_BIT
        elif roomy and size >= LARGE:
            rule = _ROOMY_LARGE_EIGHT_BIT
    elif width == activations.itemsize:
        rule = _ROOMY_SIXTEEN_BIT if roomy else _SIXTEEN_BIT
    elif rows <= 0.35 and size <= SMALL and not sort:
        return TileConfig(8, 128, 128, num_warps=8, num_stages=4)
    else:
        rule = _WIDE
    block_m, block_n, nbytes, num_warps, num_stages, *tail_m = _first(rule, rows)
    if rule is _WIDE and rows <= 1.5 and not sort:
        num_stages += 1  # few programs: each has to keep more on its way
    return TileConfig(block_m, block_n, nbytes // width, num_warps, num_stages, *tail_m)


def narrow_block(block: int, size: int) -> int:
    """Return a block no wider than the dimension that it cuts: adapters are thin."""
    return min(block, max(16, 1 << (size - 1).bit_length()))


def _one_token(shape: LayerShape, experts: int, weights: torch.dtype) -> LayerTiles:
    """Tiles without tensor cores; ``experts``: of a program of the second product, with padding."""
    width, size = weights.itemsize, shape.hidden_size * shape.intermediate_size
    gate_up = TileConfig(1, 8, 256 // width, num_warps=2, num_stages=4)
    if shape.top_k >= 8 and SMALL < size < LARGE:
        gate_up = TileConfig(1, 8, 512 // width, num_warps=2, num_stages=3)
    elif shape.top_k >= 8:
        gate_up = TileConfig(1, 16, 256 // width, num_warps=2, num_stages=4)
    block_n, nbytes = (16, 512) if experts <= 4 else (32, 256)
    down = TileConfig(1, max(1, block_n // experts), nbytes // width, num_warps=4, num_stages=3)
    return LayerTiles(gate_up, down, sort=False)


def _hopper_rule(
    rows: float, weights: torch.dtype, activations: torch.dtype, large: bool
) -> tuple[int, int, int] | None:
    if activations.itemsize == 1:
        return _first(_HOPPER_EIGHT_BIT[large], rows)
    if weights.itemsize == 1:
        return _first(_HOPPER_WIDE[large], rows)
    return _first(_HOPPER_SIXTEEN_BIT, rows)


def _first(rule: tuple[tuple[float, _T], ...], rows: float) -> _T:
    return next(found for most, found in rule if rows <= most)
