"""Tiles by rule, for what no table holds."""

from __future__ import annotations

import torch

from qmoe_kernels.tiles import LayerShape, LayerTiles


def heuristic_tiles(
    shape: LayerShape, num_tokens: int, weights: torch.dtype, activations: torch.dtype
) -> LayerTiles:
    """Choose by the mean number of rows per expert; fits 99 KiB of shared memory."""
    raise NotImplementedError
