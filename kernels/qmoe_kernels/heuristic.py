"""Tiles by rule, for what no table holds."""

from __future__ import annotations

import torch

from qmoe_kernels.tiles import LayerShape, LayerTiles, TileConfig

# Up to here a program finds its rows among all pairs faster than a launch sorts them.
UNSORTED_PAIRS = 128


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
    if num_tokens == 1 and activations.itemsize > 1:
        experts = 1 << (shape.top_k - 1).bit_length()
        gate_up = TileConfig(1, 8, 256, num_warps=2, num_stages=4)
        block_n = max(1, 32 // experts)
        # Two stages of all experts' weights and rows. 256 columns are too many where more than 16
        # experts have fp32 weights.
        column_bytes = experts * (block_n * weights.itemsize + activations.itemsize)
        block_k = 256 if 2 * 256 * column_bytes <= 99 << 10 else 128
        down = TileConfig(1, block_n, block_k, num_warps=4, num_stages=3)
        return LayerTiles(gate_up, down, sort=False)
    rows = num_pairs / shape.num_experts
    if hopper and rows >= (48 if activations.itemsize == 1 else 24):
        block_m = 64 if rows < 48 else 128 if rows < 400 else 256
        # 3 stages of 8-bit rows leave room for two programs; 256 rows take all registers anyway.
        num_stages = 3 if activations.itemsize == 1 and block_m < 256 else 4
        tail_m = block_m // 2 if block_m > 64 else 0
        return hopper_tiles(block_m, activations, num_stages, tail_m)
    tile = heuristic_tile(rows, weights, activations)
    return LayerTiles(tile, tile, sort=num_pairs > UNSORTED_PAIRS)


def hopper_tiles(
    block_m: int, activations: torch.dtype, num_stages: int = 4, tail_m: int = 0
) -> LayerTiles:
    """Tiles for `qmoe_kernels.hopper_gemm`, of which some numbers are given."""
    tile = TileConfig(block_m, 128, 128 // activations.itemsize, 8, num_stages, tail_m)
    return LayerTiles(tile, tile, sort=True, tma=True)


def heuristic_tile(rows: float, weights: torch.dtype, activations: torch.dtype) -> TileConfig:
    """Choose one product's tile for so many rows per expert, on average."""
    if activations == torch.float32:  # ieee products use no tensor cores, and registers are few
        return TileConfig(16 if rows <= 16 else 32, 32, 32, num_warps=4, num_stages=2)
    if activations.itemsize == 1:
        if rows <= 40:
            return TileConfig(16 if rows <= 10 else 32, 128, 128, num_warps=4, num_stages=4)
        if rows <= 80:
            return TileConfig(64, 128, 128, num_warps=4, num_stages=3)
        return TileConfig(128, 128, 128, num_warps=8, num_stages=3, tail_m=32)
    # In elements of the rows, of 16 bits, as weights may have.
    block_k = 128 if weights.itemsize == 1 else 64
    if rows <= 8:
        return TileConfig(8, 64, 2 * block_k, num_warps=4, num_stages=3)
    if rows <= 40:
        return TileConfig(16 if rows <= 20 else 32, 64, block_k, num_warps=2, num_stages=4)
    if rows <= 80:
        return TileConfig(64, 128, 64, num_warps=4, num_stages=3)
    return TileConfig(128, 128, 32, num_warps=8, num_stages=4, tail_m=32)
