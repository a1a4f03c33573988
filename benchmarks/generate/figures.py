"""Pictures of what the benchmark measured, drawn from its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.drawing import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, save, tidy
from benchmarks.generate.bench import OURS
from benchmarks.generate.peers import GROUPED, VLLM

Section = dict[str, Any]
PATHS = {
    OURS: ("qmoe, INT8 experts", BLUE),
    VLLM["int8"]: ("vLLM, INT8 experts", ORANGE),
    VLLM["fp8"]: ("vLLM, FP8 experts", RED),
    GROUPED: ("transformers, bf16, grouped_mm", GREY),
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
    measured = [sections[name] for name in ("decode", "vllm", "transformers") if name in sections]
    if measured:
        drawn.append(path.with_name(f"{path.stem}_decode.png"))
        decode(measured, drawn[-1])
    if sections.get("breakdown", {}).get("cells"):
        drawn.append(path.with_name(f"{path.stem}_breakdown.png"))
        breakdown(sections["breakdown"], drawn[-1])
    for picture in drawn:
        print(picture)
    return drawn


def decode_cells(sections: list[Section]) -> dict[str, dict[int, float]]:
    """Greedy tokens/s by batch of every path, on the shortest prompts."""
    cells = [cell for section in sections for cell in section.get("cells", [])]
    shortest = min(cell["prompt"] for cell in cells)
    found: dict[str, dict[int, float]] = {path: {} for path in PATHS}
    for cell in cells:
        if cell["prompt"] == shortest and cell["path"] in PATHS and not cell.get("sampled"):
            found[cell["path"]][cell["batch"]] = cell["tokens_per_s"]
    return {path: rates for path, rates in found.items() if rates}


def decode(sections: list[Section], path: Path) -> None:
    """Draw tokens/s, a panel of bars for each batch."""
    cells = decode_cells(sections)
    batches = sorted({batch for rates in cells.values() for batch in rates})
    figure, axes = plt.subplots(
        1, len(batches), figsize=(2.6 + 2.6 * len(batches), 2.8), sharey=True, squeeze=False
    )
    for axis, batch in zip(axes[0], batches, strict=True):
        there = [which for which in PATHS if batch in cells.get(which, {})]
        rates = [cells[which][batch] for which in there]
        labels, colours = zip(*(PATHS[which] for which in there), strict=True)
        bars = axis.barh(labels, rates, color=colours, height=0.7)
        axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=9)
        axis.set_title(f"{batch} text" + ("s at once" if batch > 1 else ""), fontsize=10)
        axis.margins(x=0.22)
        axis.set_xlabel("new tokens per second")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.locator_params(axis="x", nbins=4)
        tidy(axis)
    axes[0, 0].invert_yaxis()
    gpu = sections[0]["machine"]["gpu"] or "CPU"
    save(figure, f"Decoding with Qwen3-30B-A3B's shape on one {gpu}", path, *sections)


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
    title = f"A decode step by kind of kernel, Qwen3-30B-A3B's shape, {machine}"
    save(figure, title, path, section)


def _label(axis: Axes, bars: Any, cells: list[Section], widths: list[float], kind: str) -> None:
    longest = max(cell["ms"] for cell in cells)
    labels = [f"{width:.2g}" if width > LABELLED * longest else "" for width in widths]
    colour = BLACK if kind in ("gaps", "other", "routing") else "white"
    axis.bar_label(bars, labels, label_type="center", fontsize=8, color=colour)
