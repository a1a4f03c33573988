"""Search for the tiles that run a layer fastest: what to try, and in which order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any, Literal

import torch

from qmoe_kernels.heuristic import heuristic_tiles, hopper_tiles
from qmoe_kernels.tile_tables import OPERANDS, LayerKind
from qmoe_kernels.tiles import LayerTiles, TileConfig
from qmoe_kernels.tuning import choose_tiles

Effort = Literal["quick", "full"]

# Of one program, on the GPUs with the most (compute capability 9.0 and 10.0).
SHARED_MEMORY = 227 * 1024
# 32-bit registers of a thread that accumulators and widened weights may take; it has 255.
REGISTERS = 176
# Between these numbers of pairs, sorting them first is tried as well as not sorting them. Fewer
# are never sorted and more always.
FEWEST_SORTED, MOST_UNSORTED = 64, 256

# Seconds to replay a candidate for, and to compare the best few for.
SCREENING, FINAL = 0.02, 0.08
FINALISTS = 2
# By which a short measurement may be too long.
NOISE = 1.03

# When each step of a search is to end.
SHARES = {"layers": 1.0, "gate_up": 0.5, "down": 0.95, "sort": 1.0}

BYTES = {"int8": 1, "fp8": 1, "bf16": 2}

# block_n, bytes of weights along k, warps, stages. Likely ones first.
_FEW_ROWS = (
    (128, 128, 4, 4),
    (64, 256, 4, 4),
    (128, 256, 8, 3),
    (64, 128, 4, 6),
    (128, 128, 4, 6),
    (64, 256, 4, 5),
    (128, 128, 8, 4),
    (128, 256, 4, 3),
    (256, 128, 8, 4),
    (64, 128, 4, 4),
    (64, 512, 4, 3),
    (128, 256, 8, 4),
    (64, 128, 2, 5),
    (64, 128, 2, 4),
    (64, 256, 8, 4),
    (64, 512, 8, 3),
    (32, 512, 4, 3),
)
# With 16-bit rows and weights to widen: two warps multiply by instructions that take rows of
# weights as threads hold them, four take wgmma, for which bytes are shuffled.
_FEW_ROWS_WIDE = (
    (64, 128, 2, 4),
    (64, 128, 2, 3),
    (32, 256, 2, 4),
    (32, 256, 4, 4),
    (32, 128, 2, 5),
)
# block_n, bytes of rows along k, warps, stages.
_MANY_ROWS = (
    (128, 128, 8, 4),
    (128, 128, 4, 4),
    (128, 128, 8, 3),
    (256, 128, 8, 3),
    (128, 256, 8, 3),
    (256, 128, 8, 4),
    (128, 128, 4, 3),
    (64, 128, 4, 4),
)
# block_n, bytes of weights along k, warps, stages; for one token, without tensor cores.
_GEMV = (
    (8, 256, 2, 4),
    (8, 512, 2, 3),
    (8, 512, 2, 4),
    (4, 512, 1, 3),
    (8, 256, 1, 4),
    (16, 256, 2, 4),
    (8, 256, 2, 6),
    (16, 512, 4, 3),
    (16, 256, 4, 3),
    (4, 1024, 2, 3),
    (8, 1024, 4, 3),
    (4, 2048, 4, 3),
    (2, 1024, 1, 4),
    (2, 2048, 2, 3),
)
# The same where a program has all experts of a token: block_n times that number, rounded up.
_GEMV_SUM = (
    (32, 256, 4, 3),
    (32, 256, 4, 4),
    (32, 128, 4, 4),
    (16, 512, 4, 3),
    (16, 256, 2, 4),
    (16, 256, 4, 4),
    (16, 512, 2, 3),
    (8, 512, 2, 3),
    (16, 128, 2, 4),
    (64, 128, 4, 4),
    (32, 256, 8, 3),
    (8, 1024, 4, 3),
    (16, 1024, 8, 3),
)


# Of Hopper's own kernel: block_m, tail_m, stages, and between which mean numbers of rows per expert
# it is tried. Two programs run at a time with up to 128 rows.
_HOPPER = (
    (16, 0, 4, 0, 24),
    (16, 0, 6, 0, 24),
    (32, 16, 4, 2, 48),
    (32, 16, 6, 2, 48),
    (64, 16, 4, 4, 160),
    (64, 16, 6, 4, 160),
    (64, 32, 4, 16, 160),
    (128, 16, 4, 12, math.inf),
    (128, 32, 4, 24, math.inf),
    (128, 64, 3, 40, math.inf),
    (128, 64, 4, 40, math.inf),
    (256, 64, 4, 120, math.inf),
    (256, 128, 3, 200, math.inf),
    (256, 128, 4, 200, math.inf),
)


@dataclass(frozen=True)
class Cell:
    """What tiles are sought for: a kind of layer at a number of tokens."""

    kind: LayerKind
    num_tokens: int

    @property
    def num_pairs(self) -> int:
        return self.num_tokens * self.kind.shape.top_k

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of weights and activations."""
        dtypes = {name: dtype for dtype, name in reversed(OPERANDS.items())}
        return dtypes[self.kind.weights], dtypes[self.kind.activations]

    def baseline(self, device: torch.device) -> LayerTiles:
        """Return what `fused_moe` runs with now, by a device's table or without."""
        return choose_tiles(self.kind.shape, self.num_tokens, *self.dtypes, device)

    def __str__(self) -> str:
        kind = self.kind
        return f"{kind.weights} weights, {kind.activations} activations, {self.num_tokens} tokens"


@dataclass(frozen=True)
class Candidates:
    """Tiles to try for one kernel: ``layers`` as they are, then each product's for itself."""

    start: LayerTiles
    gate_up: Sequence[TileConfig]
    down: Sequence[TileConfig]
    sort: Sequence[bool]
    layers: Sequence[LayerTiles] = ()

    def pairs(self) -> list[LayerTiles]:
        """Return layers' tiles that hold every candidate, ``start`` first: what to compile."""
        starts = [changed(self.start, "sort", sort) for sort in (self.start.sort, *self.sort)]
        both = [LayerTiles(tile, tile, True) for tile in (*self.gate_up, *self.down)]
        if not self.start.sort:
            number = max(len(self.gate_up), len(self.down))
            both = [
                LayerTiles(
                    self.gate_up[min(i, len(self.gate_up) - 1)],
                    self.down[min(i, len(self.down) - 1)],
                    False,
                )
                for i in range(number)
            ]
        return [tiles for tiles in dict.fromkeys([*starts, *self.layers, *both]) if tiles]

    def without(self, broken: Collection[LayerTiles]) -> Candidates:
        """Return what is left if such layers don't compile: each tile that one of `pairs` has."""
        working = [tiles for tiles in self.pairs() if tiles not in broken]
        gate_up, down = (
            {getattr(tiles, name) for tiles in working} for name in ("gate_up", "down")
        )
        return replace(
            self,
            gate_up=[tile for tile in self.gate_up if tile in gate_up],
            down=[tile for tile in self.down if tile in down],
            layers=[tiles for tiles in self.layers if tiles in working],
        )


def changed(tiles: LayerTiles, step: str, option: Any) -> LayerTiles | None:
    """Return ``tiles`` with one thing changed; None if sorted pairs keep that from working.

    A first product's tile of another block_m is both products' then.
    """
    if step == "layers":
        return option
    if step == "sort":
        return tiles.sorted() if option and not tiles.sort else replace(tiles, sort=option)
    if tiles.sort and option.block_m != tiles.gate_up.block_m:
        return LayerTiles(option, option, True) if step == "gate_up" else None
    return replace(tiles, **{step: option})


def candidates(cell: Cell, effort: Effort = "quick", *, hopper: bool = False) -> list[Candidates]:
    """Return what to try: with tensor cores, without them for few tokens, and by TMA.

    All of them fit in 227 KiB of shared memory and in registers, by this estimate: every stage
    holds a tile of weights and one of rows, a sum is one register, and so are two widened 16-bit
    weights.

    Args:
        cell: what is tuned.
        effort: ``"quick"``, a dozen or two for each product, or ``"full"``, some hundred.
        hopper: whether the kernels of `qmoe_kernels.hopper_gemm` are among them.
    """
    shape = cell.kind.shape
    up_rows = shape.intermediate_size * (2 if shape.gated else 1)
    sizes = ((up_rows, shape.hidden_size), (shape.hidden_size, shape.intermediate_size))
    heuristic = heuristic_tiles(shape, cell.num_tokens, *cell.dtypes)
    found = []
    for gemv in (False, True):
        # Without tensor cores every pair reads its expert's weights: no expert may have many.
        likely = cell.num_tokens <= 4 and cell.num_pairs < 0.3 * shape.num_experts
        likely |= cell.num_tokens == 1 or heuristic.gate_up.block_m == 1
        if gemv and (BYTES[cell.kind.activations] == 1 or not likely):
            continue
        gate_up, down = (
            [tile for tile in options if _fits_product(tile, *size)] or options[:1]
            for options, size in zip(_options(cell, gemv, effort), sizes, strict=True)
        )
        start = heuristic
        if (heuristic.gate_up.block_m == 1) != gemv:
            start = LayerTiles(gate_up[0], down[0], sort=False)
        unsorted = cell.num_pairs < FEWEST_SORTED or gemv
        sort = [False] if unsorted else [True]
        if not unsorted and cell.num_pairs <= MOST_UNSORTED:
            sort = [False, True]
        found.append(Candidates(start, gate_up, down, sort))
    if hopper and cell.num_tokens > 1:
        layers = hopper_candidates(cell)
        found.append(Candidates(layers[0], (), (), (), layers))
    return found


def hopper_candidates(cell: Cell) -> list[LayerTiles]:
    """Return tiles of `qmoe_kernels.hopper_gemm` to try, by the mean number of rows per expert."""
    mean = cell.num_pairs / cell.kind.shape.num_experts
    return [
        hopper_tiles(block_m, cell.dtypes[1], num_stages, tail_m)
        for block_m, tail_m, num_stages, least, most in _HOPPER
        if least <= mean <= most
    ]


def shared_memory(tile: TileConfig, kind: LayerKind) -> int:
    """Estimate a program's bytes of shared memory; the kernel without tensor cores takes little."""
    if tile.block_m == 1:
        return 0
    columns = tile.block_n * BYTES[kind.weights] + tile.block_m * BYTES[kind.activations]
    return tile.num_stages * tile.block_k * columns


def registers(tile: TileConfig, kind: LayerKind) -> float:
    """Estimate a thread's 32-bit registers for sums and widened weights."""
    threads = 32 * tile.num_warps
    if tile.block_m == 1:  # a sum for each weight, and what is loaded of the next ones
        return tile.block_n * tile.block_k * (1 + BYTES[kind.weights] / 4) / threads
    widened = BYTES[kind.weights] < BYTES[kind.activations]
    weights = tile.block_n * tile.block_k / 2 if widened else 0
    return (tile.block_m * tile.block_n + weights) / threads


def _fits_product(tile: TileConfig, out_features: int, in_features: int) -> bool:
    """Whether less than half of a tile lies beyond the matrix."""
    return tile.block_n < 2 * out_features and tile.block_k < 2 * in_features


def _fits(tile: TileConfig, kind: LayerKind) -> bool:
    most = 96 if tile.block_m == 1 else REGISTERS
    return shared_memory(tile, kind) <= SHARED_MEMORY and registers(tile, kind) <= most


def _options(cell: Cell, gemv: bool, effort: Effort) -> tuple[list[TileConfig], list[TileConfig]]:
    """Tiles of either product."""
    if gemv:
        experts = 1 << (cell.kind.shape.top_k - 1).bit_length()
        return _gemv(cell.kind, effort, 1), _gemv(cell.kind, effort, experts)
    options = _tensor_core(cell, effort)
    return options, options


def _gemv(kind: LayerKind, effort: Effort, experts: int) -> list[TileConfig]:
    """Tiles of programs that read so many ``experts`` at a time."""
    width = BYTES[kind.weights]
    grid: list[tuple[int, ...]] = list(_GEMV if experts == 1 else _GEMV_SUM)
    if effort == "full":
        grid += product((4, 8, 16, 32, 64), (128, 256, 512, 1024), (1, 2, 4, 8), (2, 3, 4, 5))
    tiles = [TileConfig(1, max(1, n // experts), k // width, w, s) for n, k, w, s in grid]
    fits = (tile for tile in dict.fromkeys(tiles) if _fits(_of_experts(tile, experts), kind))
    return list(fits)


def _of_experts(tile: TileConfig, experts: int) -> TileConfig:
    """The tile as large as all that a program of so many experts reads."""
    return replace(tile, block_n=tile.block_n * experts)


def _tensor_core(cell: Cell, effort: Effort) -> list[TileConfig]:
    rows = cell.num_pairs / cell.kind.shape.num_experts
    # Twice as many: some experts get more than the mean, and what a tile has too much costs less
    # than a second one.
    block_m = next((size for size in (8, 16, 32, 64) if 2 * rows <= size), 128)
    others = {8: (16,), 16: (8, 32), 32: (16, 64), 64: (32, 128), 128: (64, 256)}[block_m]
    few = rows < 32
    width = BYTES[cell.kind.weights if few else cell.kind.activations]
    grid = [(n, size // width, warps, stages) for n, size, warps, stages in _FEW_ROWS]
    if not few:
        grid = [(n, size // width, warps, stages) for n, size, warps, stages in _MANY_ROWS]
    tiles = [TileConfig(block_m, *sizes) for sizes in grid]
    tiles += [TileConfig(m, *sizes) for m in others for sizes in grid[:3]]
    if BYTES[cell.kind.weights] < BYTES[cell.kind.activations] and 4 <= rows < 64:
        wide = [TileConfig(m, *sizes) for m in (block_m, *others[:1]) for sizes in _FEW_ROWS_WIDE]
        tiles = wide + tiles[: len(tiles) - 8]
    if not few:  # where the last rows of an expert are few
        tiles += [
            TileConfig(block_m, *sizes, tail_m=tail) for sizes in grid[:2] for tail in (16, 32)
        ]
    if effort == "full":
        tiles += [TileConfig(*sizes) for sizes in _full_grid(few)]
    fitting = [tile for tile in dict.fromkeys(tiles) if _fits(tile, cell.kind)]
    return [tile for tile in fitting if tile.tail_m < tile.block_m]


def _full_grid(few: bool) -> chain[tuple[int, ...]]:
    if few:
        return chain(
            product((8, 16, 32), (32, 64, 128, 256), (64, 128, 256, 512), (2, 4, 8), range(2, 7))
        )
    block_m, block_n = (32, 64, 128, 256), (64, 128, 256)
    return chain(product(block_m, block_n, (64, 128), (4, 8), (3, 4, 5), (0, 16, 32)))


# Microseconds of a layer with these tiles, replayed for so many seconds; None if they don't work,
# or are slower by far than the number of microseconds that comes last, if one does.
Measure = Callable[[LayerTiles, float, "float | None"], "float | None"]


@dataclass(frozen=True)
class Found:
    """The outcome of a search: the best tiles, and how much was tried.

    Attributes:
        tiles: the best.
        microseconds: with them.
        baseline_microseconds: with the baseline.
        num_tried: tiles that were measured.
        num_skipped: tiles that don't work, or were slower by far.
        out_of_time: whether some were not tried at all.
    """

    tiles: LayerTiles
    microseconds: float
    baseline_microseconds: float
    num_tried: int
    num_skipped: int
    out_of_time: bool


def search(
    cell: Cell,
    options: Sequence[Candidates],
    measure: Measure,
    *,
    baseline: LayerTiles,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Find the best tiles by coordinate descent: gate_up, then down, then sorting.

    Every candidate is replayed for a short time, and the best few of each step again for longer
    beside the best so far.

    Args:
        cell: what is tuned.
        options: from `candidates`.
        measure: times a layer.
        baseline: what runs now; measured first, and kept if nothing is faster.
        seconds: start no measurement after so long, but for the baseline's; steps share it.
        clock: in seconds.

    Raises:
        ValueError: the baseline does not work.
    """
    began = clock()
    first = measure(baseline, FINAL, None)
    if first is None:
        raise ValueError(f"{cell}: what runs now does not work: {baseline}")
    times: dict[LayerTiles, float | None] = {baseline: first}
    best, best_time = baseline, first
    out_of_time = False
    for index, kernel in enumerate(options):
        here, here_time = kernel.start, first
        if kernel.start != baseline:
            timed = measure(kernel.start, FINAL, best_time)
            times[kernel.start] = timed
            here_time = float("inf") if timed is None else timed
        for step, share in SHARES.items():
            until = began + seconds * (index + share) / len(options)
            screened: list[tuple[float, LayerTiles]] = []
            for option in getattr(kernel, step):
                tiles = changed(here, step, option)
                if tiles is None or tiles in times:
                    continue
                if clock() > until:
                    out_of_time = True
                    break
                bound = min(here_time, best_time)
                times[tiles] = timed = measure(tiles, SCREENING, bound)
                if timed is not None:
                    screened.append((timed, tiles))
            screened.sort(key=lambda pair: pair[0])
            for screening, tiles in screened[:FINALISTS]:
                if screening > NOISE * here_time:
                    break
                timed = measure(tiles, FINAL, None)
                if timed is not None and timed < here_time:
                    here, here_time = tiles, timed
        if here_time < best_time:
            best, best_time = here, here_time
    skipped = sum(timed is None for timed in times.values())
    return Found(best, best_time, first, len(times), skipped, out_of_time)
