"""Every tile that the rule can choose fits in the shared memory of every GPU it is chosen for."""

from __future__ import annotations

import sys
from functools import cache

import pytest
import torch
from compiling import ARCHITECTURES, SHARED_MEMORY, run_compiler

from benchmarks.kernels.shapes import SHAPES
from qmoe_kernels.heuristic import heuristic_tiles
from qmoe_kernels.tile_search import shared_memory
from qmoe_kernels.tile_tables import OPERANDS, LayerKind
from qmoe_kernels.tiles import LayerShape, LayerTiles, TileConfig

# Experts, top-k, hidden size, intermediate size of real models.
MODELS = [
    (160, 6, 5120, 1536),  # DeepSeek-V2
    (64, 6, 2048, 1408),  # DeepSeek-V2-Lite, Moonlight
    (384, 8, 7168, 2048),  # Kimi K2
    (60, 4, 2048, 1408),  # Qwen1.5-MoE-A2.7B
    (64, 8, 3584, 2560),  # Qwen2-57B-A14B
    (128, 8, 4096, 1536),  # Qwen3-235B-A22B
    (160, 8, 5120, 1536),  # GLM-4.5
    (32, 2, 6144, 9216),  # MiniMax-Text-01
    (256, 8, 3072, 1536),  # MiniMax-M2
    (16, 4, 6144, 10752),  # DBRX
    (16, 2, 4096, 14336),  # Jamba-Mini
    (64, 8, 4096, 3072),  # Hunyuan-A13B
    (64, 8, 8192, 3584),  # ERNIE-4.5-300B-A47B
    (128, 6, 4096, 1408),  # dots.llm1
    (512, 12, 6144, 2048),  # LongCat-Flash
    (128, 4, 2880, 2880),  # gpt-oss-120b
    (128, 1, 5120, 8192),  # Llama-4-Maverick
    (8, 2, 6144, 16384),  # Mixtral-8x22B
    (256, 8, 2048, 512),  # Ling-mini-2.0, Qwen3.5-35B-A3B
    (32, 8, 1024, 512),  # Granite-3.1-1b-A400m
    (64, 6, 2560, 1664),  # Aria
    (512, 22, 1024, 2688),  # Nemotron-3-Super, whose experts have no gate
]
# Every number of tokens up to 64, then sixteen for each doubling.
TOKENS = [*range(1, 65), *(round(64 * 2 ** (step / 16)) for step in range(1, 129))]

BARRIERS = 1024  # bytes, more than those of TMA and of Blackwell's products take

INT8, FP8 = torch.int8, torch.float8_e4m3fn
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDE = [(weights, rows) for weights in (INT8, FP8) for rows in (BF16, FP16, FP32)]
PAIRS = [*WIDE, (INT8, INT8), (FP8, FP8), (BF16, BF16), (FP16, FP16), (FP32, FP32)]


@cache
def chosen(
    weights: torch.dtype, rows: torch.dtype, hopper: bool
) -> dict[tuple[TileConfig, int], LayerTiles]:
    """Every tile for these dtypes, with the number of experts whose weights its program reads.

    That is 1 but in the second product without tensor cores, which has all experts of a token.
    """
    found = {}
    for shape in (*SHAPES.values(), *(LayerShape(*sizes) for sizes in MODELS)):
        for num_tokens in TOKENS:
            tiles = heuristic_tiles(shape, num_tokens, weights, rows, hopper=hopper)
            found[tiles.gate_up, 1] = tiles
            experts = 1 << (shape.top_k - 1).bit_length() if tiles.down.block_m == 1 else 1
            found[tiles.down, experts] = tiles
    return found


def needed(tile: TileConfig, experts: int, weights: torch.dtype, rows: torch.dtype) -> int:
    """Bytes of shared memory, estimated from above."""
    if tile.block_m == 1:  # and a row of each expert; the last stage is in registers
        columns = experts * (tile.block_n * weights.itemsize + rows.itemsize)
        return (tile.num_stages - 1) * tile.block_k * columns
    if FP32 in (weights, rows):  # no name in tables
        columns = tile.block_n * max(weights.itemsize, 2) + tile.block_m * rows.itemsize
        return tile.num_stages * tile.block_k * columns
    kind = LayerKind(SHAPES["qwen3"], OPERANDS[weights], OPERANDS[rows])
    return shared_memory(tile, kind)


def runs_on(capability: int, weights: torch.dtype, rows: torch.dtype) -> bool:
    return capability >= 89 or rows != FP8


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_every_tile_fits(capability: int) -> None:
    limit = SHARED_MEMORY[capability] * 1024
    for weights, rows in PAIRS:
        if not runs_on(capability, weights, rows):
            continue
        # Hopper's own kernels hand some layers back: those with sums in two levels, for instance.
        for hopper in {False, capability == 90 and rows != FP32}:
            for (tile, experts), tiles in chosen(weights, rows, hopper).items():
                nbytes = needed(tile, experts, weights, rows)
                assert nbytes + BARRIERS <= limit, (weights, rows, tiles, nbytes)


# ---- the estimate, beside what the compiler takes ----------------------------------------------

COMPILE = """
import json
import torch
from compiling import compiling_for
from random_layer import random_layer

with compiling_for(CAPABILITY) as compiled:
    layer = random_layer(num_tokens=NUM_TOKENS, num_experts=32, top_k=TOP_K, hidden_size=1024,
                         intermediate_size=704, weights=WEIGHTS, dtype=torch.bfloat16)
    layer.triton(tiles=TILES, activations=ACTIVATIONS)
for kernel in compiled:
    if kernel.metadata.name in ("gemv_kernel", "grouped_gemm_kernel"):
        print(json.dumps(kernel.metadata.shared))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize(
    ("capability", "weights", "rows", "one_token"),
    [
        (80, INT8, BF16, False),
        (86, BF16, BF16, True),
        (90, INT8, INT8, False),
    ],
    ids=str,
)
def test_estimate_is_from_above(
    capability: int, weights: torch.dtype, rows: torch.dtype, one_token: bool
) -> None:
    """In both products of the layer whose tiles need most."""
    estimates = {
        (tiles, experts): [
            needed(tiles.gate_up, 1, weights, rows),
            needed(tiles.down, experts, weights, rows),
        ]
        for (_, experts), tiles in chosen(weights, rows, False).items()
        if (tiles.gate_up.block_m == 1) == one_token
    }
    (tiles, experts), most = max(estimates.items(), key=lambda item: max(item[1]))
    kernels = run_compiler(
        f"CAPABILITY, NUM_TOKENS, TOP_K = {capability}, {1 if one_token else 8}, {experts}\n"
        f"WEIGHTS = {OPERANDS[weights] if weights.itemsize == 1 else None!r}\n"
        f"ACTIVATIONS = {OPERANDS[rows] if rows.itemsize == 1 else None!r}\n"
        "from qmoe_kernels.tiles import LayerTiles, TileConfig\n"
        f"TILES = {tiles}\n{COMPILE}"
    )
    assert len(kernels) == 2
    for taken, estimate in zip(kernels, most, strict=True):
        assert 0 < taken <= estimate, tiles
