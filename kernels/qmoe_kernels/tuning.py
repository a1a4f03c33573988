"""Which tiles a layer runs with: a user's measured ones by GPU, shape and size, else the rule's.

Tables lie in the folder that the environment variable ``QMOE_CONFIGS`` names; ``qmoe tune`` writes
them. None is shipped: the rule is within some per cent of what a search finds. Nothing here
measures while a model runs.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from qmoe_kernels.heuristic import heuristic_tiles
from qmoe_kernels.tile_tables import OPERANDS, LayerKind, TileTable, table_path
from qmoe_kernels.tiles import LayerShape, LayerTiles

CONFIGS_VARIABLE = "QMOE_CONFIGS"

# A program that looks for its rows itself reads all pairs: not for more than this, twice as many
# as tuning tries, whatever the nearest measured number of tokens does.
MAX_UNSORTED_PAIRS = 512


def choose_tiles(
    shape: LayerShape,
    num_tokens: int,
    weights: torch.dtype,
    activations: torch.dtype,
    device: torch.device,
) -> LayerTiles:
    """Choose by what was measured, or by rows per expert.

    A function of its arguments, of the device's name and of its table, which is read once.

    Args:
        shape: of the layer.
        num_tokens: in this call.
        weights, activations: dtypes of the products' operands.
        device: whose table is read; without CUDA there is none.

    Raises:
        ValueError: a table is malformed, or QMOE_CONFIGS names no folder.
    """
    gpu = gpu_name(device)
    folder = os.environ.get(CONFIGS_VARIABLE)
    return _choose(shape, num_tokens, weights, activations, gpu, folder, is_hopper(device))


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Return whether a device has the instructions that `qmoe_kernels.hopper_gemm` consists of."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def gpu_name(device: torch.device) -> str | None:
    """Return what torch calls a GPU; None for another device."""
    if device.type != "cuda":
        return None
    return _gpu_name(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.lru_cache(maxsize=4096)
def _choose(
    shape: LayerShape,
    num_tokens: int,
    weights: torch.dtype,
    activations: torch.dtype,
    gpu: str | None,
    folder: str | None,
    hopper: bool,
) -> LayerTiles:
    if gpu is not None and num_tokens > 0 and {weights, activations} <= OPERANDS.keys():
        kind = LayerKind(shape, OPERANDS[weights], OPERANDS[activations])
        table = _table(gpu, folder)
        tiles = table.find(kind, num_tokens) if table else None
        if tiles is not None:
            many = num_tokens * shape.top_k > MAX_UNSORTED_PAIRS
            return tiles.sorted() if many and not tiles.sort else tiles
    hopper = hopper and activations.itemsize <= 2
    return heuristic_tiles(shape, num_tokens, weights, activations, hopper=hopper)


@functools.cache
def _table(gpu: str, folder: str | None) -> TileTable | None:
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise ValueError(f"{CONFIGS_VARIABLE}={folder}: no such folder")
    path = table_path(Path(folder), gpu)
    return TileTable.read(path) if path.exists() else None
