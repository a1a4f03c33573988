"""Pictures of what the benchmark measured, drawn from its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.drawing import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, save, tidy
from benchmarks.generate.bench import OURS
from benchmarks.generate.peers import EAGER, GROUPED, ON_INT8, STATIC
from benchmarks.generate.targets import DECODE

Section = dict[str, Any]
PATHS = {
    (OURS, False): ("qmoe, INT8 experts", BLUE),
    (OURS, True): ("qmoe, INT8 experts, sampled", SKY),
    (STATIC, False): (STATIC, GREEN),
    (ON_INT8, False): (ON_INT8, PINK),
    (GROUPED, False): (GROUPED, ORANGE),
    (EAGER, False): (EAGER, GREY),
}
KIND_COLOURS = {
    "experts": BLUE,
    "routing": SKY,
    "attention": GREEN,
    "norms": PINK,
    "linear layers": ORANGE,
    "head": RED,
    "sampling": BLACK,
    "other": "#C9B28F",
    "gaps": "#DDDDDD",
}
LABELLED = 0.04  # of a step: smaller parts have no room for their time


def draw(path: Path) -> list[Path]:
    """Draw what ``path`` holds beside it, as far as it has been measured; the pictures' paths."""
    sections = json.loads(path.read_text())["sections"]
    drawn = []
    cells = decode_cells(sections)
    if cells:
        drawn.append(path.with_name(f"{path.stem}_decode.png"))
        decode(cells, machine_of(sections), drawn[-1])
    if sections.get("breakdown", {}).get("cells"):
        drawn.append(path.with_name(f"{path.stem}_breakdown.png"))
        breakdown(sections["breakdown"], drawn[-1])
    for picture in drawn:
        print(picture)
    return drawn


def machine_of(sections: dict[str, Section]) -> str:
    """The GPU of the first section that was measured."""
    return next(iter(sections.values()))["machine"]["gpu"] or "CPU"


def decode_cells(sections: dict[str, Section]) -> dict[tuple[str, bool], dict[int, float]]:
    """Tokens/s by batch of every path, on the shortest prompts."""
    names = ("decode", "transformers_int8", "transformers", "transformers_static")
    cells = [cell for name in names for cell in sections.get(name, {}).get("cells", [])]
    shortest = min((cell["prompt"] for cell in cells), default=0)
    found: dict[tuple[str, bool], dict[int, float]] = {}
    for cell in cells:
        if cell["prompt"] == shortest:
            path = (cell["path"], cell.get("sampled", False))
            found.setdefault(path, {})[cell["batch"]] = cell["tokens_per_s"]
    return found


def decode(cells: dict[tuple[str, bool], dict[int, float]], machine: str, path: Path) -> None:
    """Draw tokens/s on a log scale, a group of bars for each batch, targets as marks."""
    batches = sorted({batch for rates in cells.values() for batch in rates})
    paths = [p for p in PATHS if p in cells]
    width = 0.84 / len(paths)
    figure, axis = plt.subplots(figsize=(2.2 + 2.9 * len(batches), 4.6))
    for which in paths:
        label, colour = PATHS[which]
        x = []
        for batch in cells[which]:
            there = [p for p in paths if batch in cells[p]]
            place = there.index(which) - (len(there) - 1) / 2
            x.append(batches.index(batch) + place * width)
        bars = axis.bar(x, list(cells[which].values()), 0.94 * width, color=colour, label=label)
        labels = [f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}" for rate in cells[which].values()]
        axis.bar_label(bars, labels, padding=2, fontsize=7)
    label: str | None = "target"
    for x, batch in enumerate(batches):
        if batch in DECODE:
            axis.hlines(DECODE[batch], x - 0.46, x + 0.46, colors=RED, lw=1.4, label=label)
            label = None
    axis.set_yscale("log")
    low = min(rate for rates in cells.values() for rate in rates.values())
    axis.set_ylim(bottom=low / 2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_ylabel("new tokens per second, log scale")
    axis.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    tidy(axis)
    axis.legend(fontsize=8, loc="upper left", frameon=False)
    save(figure, f"Decoding, Qwen3-30B-A3B's shape, {machine}", path)


def breakdown(section: Section, path: Path) -> None:
    """Draw one decode step's time, a stacked bar for each batch."""
    cells = sorted(section["cells"], key=lambda cell: cell["batch"])
    figure, axis = plt.subplots(figsize=(10, 1.6 + 0.75 * len(cells)))
    rows = [f"batch {cell['batch']}" for cell in cells]
    left = [0.0] * len(cells)
    for kind, colour in KIND_COLOURS.items():
        widths = [cell["kinds_ms"][kind] for cell in cells]
        if any(widths):
            bars = axis.barh(rows, widths, left=left, color=colour, label=kind, height=0.62)
            _label(axis, bars, cells, widths, kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, cell in enumerate(cells):
        axis.text(cell["ms"], row, f"  {cell['ms']:.3g} ms", va="center", fontsize=9)
    axis.set_xlim(right=1.1 * max(left))
    axis.invert_yaxis()
    axis.set_xlabel("ms of one captured decode step")
    tidy(axis)
    axis.legend(ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False)
    machine = section["machine"]["gpu"] or "CPU"
    save(figure, f"A decode step by kind of kernel, Qwen3-30B-A3B's shape, {machine}", path)


def _label(axis: Axes, bars: Any, cells: list[Section], widths: list[float], kind: str) -> None:
    longest = max(cell["ms"] for cell in cells)
    labels = [f"{width:.2g}" if width > LABELLED * longest else "" for width in widths]
    colour = BLACK if kind in ("gaps", "other", "routing") else "white"
    axis.bar_label(bars, labels, label_type="center", fontsize=8, color=colour)
