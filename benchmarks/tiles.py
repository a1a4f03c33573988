"""Time the tiles that a rule may choose, over shapes of many families, and say what a rule loses.

``python -m benchmarks.tiles`` times every candidate in every cell (shape, dtypes, tokens) of this
GPU and writes ``benchmarks/results/kernel_tiles.json``; ``--fit`` reads it and needs no GPU: for
each number of rows per expert it prints the candidates that lose least over all shapes, and what
`qmoe_kernels.heuristic` loses in each cell. The rule was written by hand from that print.

Both products have the same tile here. `qmoe tune` looks for each product's own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.shapes import FITTED, SHAPES
from benchmarks.record import facts
from qmoe_kernels.heuristic import heuristic_tiles
from qmoe_kernels.precompile import Precompiler, failures
from qmoe_kernels.tile_search import Cell, hopper_candidates
from qmoe_kernels.tile_tables import LayerKind
from qmoe_kernels.tile_timing import LayerTimer
from qmoe_kernels.tiles import LayerTiles, TileConfig

RESULTS = Path(__file__).parent / "results" / "kernel_tiles.json"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FEW_TOKENS = (1, 8, 64, 256, 1024)  # for FP8, whose kernels differ from INT8's in widening alone
MODES = {
    "int8-w8a16": ("int8", "bf16"),
    "int8-w8a8": ("int8", "int8"),
    "bf16": ("bf16", "bf16"),
    "fp8-w8a16": ("fp8", "bf16"),
    "fp8-w8a8": ("fp8", "fp8"),
}
# Rows per expert, on average, for which tiles of so many rows are timed.
WINDOWS = {8: (0, 12), 16: (1.5, 40), 32: (5, 80), 64: (12, 200), 128: (40, 1e9), 256: (150, 1e9)}
# block_n, bytes of weights (of rows, if these are 8 bits) along k, warps, stages.
WIDE = {
    8: ((64, 256, 4, 3), (64, 256, 4, 4), (128, 128, 8, 4), (128, 128, 4, 4), (64, 128, 4, 6)),
    16: ((64, 128, 2, 4), (64, 128, 2, 3), (128, 128, 4, 4), (64, 256, 4, 3), (64, 128, 4, 6)),
    32: ((64, 128, 2, 4), (64, 128, 2, 3), (64, 128, 4, 4), (128, 128, 4, 4)),
    64: ((128, 64, 4, 3), (64, 64, 4, 4)),
}
SAME = {
    8: ((64, 128, 4, 5), (64, 256, 4, 4), (128, 128, 4, 4), (128, 256, 8, 3)),
    16: ((128, 128, 4, 4), (64, 256, 4, 4), (128, 256, 8, 3), (64, 128, 4, 6)),
    32: ((64, 256, 4, 4), (128, 128, 4, 4), (128, 256, 8, 3)),
    64: ((128, 128, 4, 3), (128, 128, 4, 4), (128, 128, 8, 4)),
}
# block_n, bytes along k, warps, stages of one token's first and second product.
GEMV = (
    ((8, 256, 2, 4), (32, 256, 4, 3)),
    ((8, 512, 2, 3), (32, 256, 4, 3)),
    ((8, 256, 2, 4), (16, 512, 4, 3)),
    ((8, 256, 2, 4), (32, 256, 4, 4)),
    ((8, 256, 2, 4), (16, 1024, 8, 3)),
    ((8, 512, 2, 4), (16, 512, 4, 3)),
    ((16, 256, 2, 4), (32, 256, 4, 3)),
    ((4, 512, 1, 3), (16, 256, 2, 4)),
    ((16, 256, 2, 4), (32, 128, 4, 4)),
    ((16, 256, 2, 4), (64, 128, 4, 4)),
    ((8, 256, 2, 4), (32, 128, 2, 6)),
    ((16, 256, 4, 4), (64, 128, 8, 4)),
    ((8, 256, 1, 4), (32, 256, 4, 3)),
)
SORTED = (24, 512)  # numbers of pairs between which both ways are timed
SECONDS, COMPILING_SECONDS = 0.012, 240.0
KEPT = 1.35  # times up to so many times the best are written down


def cells(
    shapes: list[str], modes: list[str], numbers: tuple[int, ...] | None = None
) -> Iterator[tuple[str, str, list[Cell]]]:
    """Every shape with every mode: its name, the mode's, and its cells. INT8 comes first."""
    for weights in dict.fromkeys(MODES[mode][0] for mode in modes):
        for name in shapes:
            for mode in modes:
                if MODES[mode][0] != weights:
                    continue
                tokens = numbers or (FEW_TOKENS if weights == "fp8" else TOKENS)
                kind = LayerKind(SHAPES[name], *MODES[mode])
                yield name, mode, [Cell(kind, t) for t in tokens]


def options(cell: Cell) -> list[LayerTiles]:
    """Tiles to time in a cell."""
    weights, rows = cell.dtypes
    mean = cell.num_pairs / cell.kind.shape.num_experts
    found: list[LayerTiles] = []
    sorts = [cell.num_pairs > SORTED[0]]
    if SORTED[0] < cell.num_pairs <= SORTED[1]:
        sorts = [False, True]
    for block_m, (least, most) in WINDOWS.items():
        if not least <= mean <= most:
            continue
        table = WIDE if rows.itemsize > weights.itemsize else SAME
        for block_n, nbytes, warps, stages in table.get(block_m, ()):
            tile = TileConfig(block_m, block_n, nbytes // weights.itemsize, warps, stages)
            found += [LayerTiles(tile, tile, sort) for sort in sorts]
    if cell.num_tokens > 1:
        found += hopper_candidates(cell)
    if cell.num_tokens == 1 and rows.itemsize > 1:
        experts = 1 << (cell.kind.shape.top_k - 1).bit_length()
        for first, second in GEMV:
            (n, k, w, s), (n2, k2, w2, s2) = first, second
            gate_up = TileConfig(1, n, k // weights.itemsize, w, s)
            down = TileConfig(1, max(1, n2 // experts), k2 // weights.itemsize, w2, s2)
            found.append(LayerTiles(gate_up, down, sort=False))
    now = heuristic_tiles(cell.kind.shape, cell.num_tokens, weights, rows, hopper=True)
    return list(dict.fromkeys([now, *found]))


def label(tiles: LayerTiles) -> str:
    """Tiles in one word: block_m, block_n, block_k, warps, stages, tail_m."""

    def one(t: TileConfig) -> str:
        return f"{t.block_m}.{t.block_n}.{t.block_k}.{t.num_warps}.{t.num_stages}.{t.tail_m}"

    how = "tma" if tiles.tma else "sorted" if tiles.sort else "unsorted"
    both = one(tiles.gate_up)
    if tiles.down != tiles.gate_up:
        both += "+" + one(tiles.down)
    return f"{how}:{both}"


def measure(
    names: list[str],
    modes: list[str],
    numbers: tuple[int, ...] | None,
    workers: int,
    out: Path,
    common: dict,
) -> None:
    """Time all cells of these shapes, modes and numbers of tokens."""
    device = torch.device("cuda", torch.cuda.current_device())
    todo = list(cells(names, modes, numbers))
    started = time.monotonic()
    found: list[dict[str, Any]] = []
    with Precompiler(workers) as precompiler:
        # A tile's kernels are the same for all numbers of tokens, and mostly for all shapes.
        compiling: dict[Cell, dict[LayerTiles, Any]] = {}
        for _, _, some in todo:
            known: dict[LayerTiles, Any] = {}
            for cell in some:
                known |= precompiler.submit(cell, [t for t in options(cell) if t not in known])
                compiling[cell] = {t: known[t] for t in options(cell)}
        timers: dict[tuple[str, str], LayerTimer] = {}
        for name, mode, some in todo:
            key = name, MODES[mode][0]
            if key not in timers:
                timers.clear()  # first: there may be no room for both
                timers[key] = LayerTimer(SHAPES[name], key[1], device)
            for cell in some:
                broken = failures(compiling[cell], COMPILING_SECONDS)
                timer = timers[key]
                timed, errors = timer.cell(cell)
                times: dict[str, float] = {}
                best = None
                for tiles in options(cell):
                    if tiles in broken:
                        continue
                    us = timed(tiles, SECONDS, best)
                    if us is not None:
                        times[label(tiles)] = round(us, 2)
                        best = us if best is None else min(best, us)
                errors += [f"{label(tiles)}: {error}" for tiles, error in broken.items()]
                assert best is not None, errors
                kept = sorted((us, t) for t, us in times.items() if us <= KEPT * best)
                row: dict[str, Any] = {"shape": name, "mode": mode, "tokens": cell.num_tokens}
                row |= {"tried": len(times), "us": {t: us for us, t in kept}}
                if errors:
                    row["errors"] = [error[:200] for error in errors]
                found.append(row)
                line = ", ".join(f"{t} {us}" for us, t in kept[:3])
                passed = time.monotonic() - started
                print(f"[{passed:6.1f}] {name} {mode} {cell.num_tokens}: {line}", flush=True)
            write(out, {**common, "cells": found})


def write(out: Path, data: dict[str, Any]) -> None:
    """A line for each cell."""
    lines = ",\n".join("  " + json.dumps(row) for row in data["cells"])
    head = json.dumps({k: v for k, v in data.items() if k != "cells"}, indent=1)
    partial = out.with_suffix(".partial")
    partial.write_text(f'{head[:-2]},\n "cells": [\n{lines}\n ]\n}}\n')
    partial.replace(out)


def fit(out: Path) -> None:
    """Print what loses least by rows per expert, and what the rule loses."""
    data = json.loads(out.read_text())
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in data["cells"]:
        shape = SHAPES[row["shape"]]
        mean = row["tokens"] * shape.top_k / shape.num_experts
        kind = "one" if row["tokens"] == 1 else row["mode"]
        groups[kind, round(2 * math.log2(mean))].append({**row, "mean": mean})
    for (kind, bucket), rows in sorted(groups.items()):
        print(f"\n{kind}, about {2 ** (bucket / 2):.2f} rows an expert: {len(rows)} cells")
        labels = {t for row in rows for t in row["us"]}
        loss: dict[str, list[float]] = {}
        for t in labels:
            loss[t] = [row["us"].get(t, KEPT * min(row["us"].values())) / min(row["us"].values())
                       for row in rows]  # fmt: skip
        for t in sorted(labels, key=lambda t: (math.prod(loss[t]), t))[:6]:
            print(
                f"   {t}: mean {math.prod(loss[t]) ** (1 / len(rows)):.3f}, most {max(loss[t]):.2f}"
            )
    print("\nthe rule")
    for row in data["cells"]:
        shape, mode = SHAPES[row["shape"]], row["mode"]
        cell = Cell(LayerKind(shape, *MODES[mode]), row["tokens"])
        now = label(heuristic_tiles(shape, row["tokens"], *cell.dtypes, hopper=True))
        best = min(row["us"], key=row["us"].get)
        lost = row["us"].get(now, math.nan) / row["us"][best]
        if not lost <= 1.04:
            print(f"   {row['shape']} {mode} {row['tokens']}: {now} {lost:.2f} of {best}")


def main() -> None:
    """Parse options and do it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default=",".join(FITTED))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--tokens", help="with commas; default: those of each mode")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="to write down, where there is no git")
    parser.add_argument("--fit", action="store_true", help="read --out, time nothing")
    options_ = parser.parse_args()
    if options_.fit:
        fit(options_.out)
        return
    common = facts("tiles", sys.argv[1:], options_.commit)
    names, modes = options_.shapes.split(","), options_.modes.split(",")
    numbers = options_.tokens and tuple(int(number) for number in options_.tokens.split(","))
    measure(names, modes, numbers or None, options_.workers, options_.out, common)


if __name__ == "__main__":
    main()
