"""Tiles by rule, for what no table holds."""

from __future__ import annotations

import torch

from qmoe_kernels.tiles import LayerShape, LayerTiles, TileConfig

# Up to here a program finds its rows among all pairs faster than a launch sorts them.
UNSORTED_PAIRS = 128


def heuristic_tiles(
    shape: LayerShape, num_tokens: int, weights: torch.dtype, activations: torch.dtype
) -> LayerTiles:
    """Choose by the mean number of rows per expert; fits 99 KiB of shared memory.

    Args:
        shape: of the layer.
        num_tokens: in this call.
        weights, activations: dtypes of the products' operands.
    """
    num_pairs = num_tokens * shape.top_k
    if num_tokens == 1 and activations.itemsize > 1:
        gemv = TileConfig(1, 16, 512, num_warps=4, num_stages=2)
        return LayerTiles(gemv, gemv, sort=False)
    rows = num_pairs / shape.num_experts
    return LayerTiles(
        heuristic_tile(rows, weights, activations, gated=shape.gated),
        heuristic_tile(rows, weights, activations, gated=False),
        sort=num_pairs > UNSORTED_PAIRS,
    )


def heuristic_tile(
    rows: float, weights: torch.dtype, activations: torch.dtype, *, gated: bool
) -> TileConfig:
    """Choose one product's tile for so many rows per expert, on average."""
    if activations == torch.float32:  # ieee products use no tensor cores, and registers are few
        return TileConfig(16 if rows <= 16 else 32, 32, 32, num_warps=4, num_stages=2)
    wide = 64 if weights.itemsize == 1 else 32
    if rows <= 16:
        return TileConfig(16, 128, 2 * wide, num_warps=4, num_stages=3)
    if rows <= 48:
        return TileConfig(32, 128, 2 * wide, num_warps=4, num_stages=3)
    if rows <= 96:
        return TileConfig(64, 128, wide, num_warps=4, num_stages=3)
    return TileConfig(128, 128, wide, num_warps=8, num_stages=3, tail_m=32)
