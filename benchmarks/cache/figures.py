"""Pictures of what the benchmark measured, drawn from its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.drawing import BLUE, GREY, ORANGE, save, tidy

VARIANTS = {
    "plain": ("hits and misses together", BLUE, "o"),
    "overlap": ("hits compute first", ORANGE, "v"),
}
TITLES = {
    "synthetic": "Synthetic trace: Zipf 0.65, 40 % reuse",
    "recorded": "Trace of the shipped trained model, tiled",
}
Cell = dict[str, Any]


def draw(path: Path) -> list[Path]:
    """Draw what ``path`` holds beside it, as far as it has been measured; the pictures' paths."""
    data = json.loads(path.read_text())
    sections = data["sections"]
    drawn = []
    decode = sections.get("decode", {})
    if decode.get("cells"):
        for name, function in (("retention", retention), ("time_per_token", time_per_token)):
            drawn.append(path.with_name(f"{path.stem}_{name}.png"))
            function(decode, drawn[-1])
    if sections.get("baselines", {}).get("cells"):
        drawn.append(path.with_name(f"{path.stem}_baselines.png"))
        baselines(sections, drawn[-1])
    for picture in drawn:
        print(picture)
    return drawn


def by_trace(section: Cell) -> dict[str, dict[str, list[Cell]]]:
    """Cells by trace and variant, smallest capacity first."""
    found: dict[str, dict[str, list[Cell]]] = {}
    for cell in sorted(section["cells"], key=lambda c: c["capacity"]):
        found.setdefault(cell["trace"], {}).setdefault(cell["variant"], []).append(cell)
    return found


def subtitle(section: Cell) -> str:
    """Where it was measured."""
    machine = section["machine"]
    return (
        f"Qwen3-30B-A3B's shape, INT8 experts, batch 1, {machine['gpu']}, "
        f"pinned copies {section['link_gb_per_s']['layer']:.0f} GB/s"
    )


def retention(section: Cell, path: Path) -> None:
    """Tokens/s over resident tokens/s, and hit rates beside LRU and Belady, by capacity."""
    traces = by_trace(section)
    figure, axes = plt.subplots(
        2, len(traces), figsize=(5.2 * len(traces), 7), sharex=True, sharey="row", squeeze=False
    )
    for column, (trace, variants) in enumerate(traces.items()):
        top, bottom = axes[0, column], axes[1, column]
        for variant, cells in variants.items():
            label, colour, marker = VARIANTS[variant]
            x = [100 * cell["capacity"] for cell in cells]
            top.plot(
                x, [100 * c["retention"] for c in cells], marker, ls="-", c=colour, label=label
            )
        cells = variants["plain"]
        x = [100 * cell["capacity"] for cell in cells]
        rates = [100 * cell["belady_hit_rate"] for cell in cells]
        bottom.plot(x, rates, ls="--", c=GREY, marker="^", label="Belady (replayed)")
        rates = [100 * cell["lru_hit_rate"] for cell in cells]
        bottom.plot(x, rates, ls="-", c=GREY, marker="x", ms=9, label="LRU (replayed)")
        label, colour, marker = VARIANTS["plain"]
        rates = [100 * cell["hit_rate"] for cell in cells]
        bottom.plot(x, rates, marker, ls="", c=colour, label="measured")
        top.set_title(TITLES.get(trace, trace), fontsize=10)
        top.set_ylim(0, 105)
        bottom.set_ylim(0, 105)
        bottom.set_xlabel("capacity, % of all experts on the GPU")
        bottom.set_xticks([100 * cell["capacity"] for cell in cells])
        bottom.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("% of the resident model's tokens/s")
    axes[1, 0].set_ylabel("hits, % of experts asked for")
    axes[0, -1].legend(fontsize=8, loc="upper left")
    axes[1, -1].legend(fontsize=8, loc="lower right")
    save(figure, "Speed kept by capacity\n" + subtitle(section), path)


def time_per_token(section: Cell, path: Path) -> None:
    """Stacked, resident time and missed bytes over the link's rate; beside it what was measured."""
    traces = by_trace(section)
    figure, axes = plt.subplots(
        1, len(traces), figsize=(5.6 * len(traces), 4.4), sharey=True, squeeze=False
    )
    for axis, (trace, variants) in zip(axes[0], traces.items(), strict=True):
        cells = variants["plain"]
        width = 0.8 / (1 + len(variants))
        place = {cell["capacity"]: i for i, cell in enumerate(cells)}
        left = -0.4 + width / 2
        resident = [cell["resident_ms"] for cell in cells]
        link = [cell["link_ms"] for cell in cells]
        x = [i + left for i in place.values()]
        axis.bar(x, resident, width, color="#555555", label="all resident")
        axis.bar(x, link, width, bottom=resident, color="#BBBBBB", label="missed bytes / link rate")
        for turn, (variant, measured) in enumerate(variants.items(), start=1):
            label, colour, _ = VARIANTS[variant]
            x = [place[cell["capacity"]] + left + turn * width for cell in measured]
            bars = axis.bar(
                x,
                [cell["ms"] for cell in measured],
                width,
                color=colour,
                label=f"measured, {label}",
            )
            sums = {cell["capacity"]: cell["resident_ms"] + cell["link_ms"] for cell in cells}
            ratios = [f"{c['ms'] / sums[c['capacity']]:.2f}" for c in measured]
            axis.bar_label(bars, ratios, fontsize=6, rotation=90, padding=2)
        axis.set_xticks(range(len(cells)), [f"{100 * cell['capacity']:g}" for cell in cells])
        axis.set_xlabel("capacity, % of all experts on the GPU")
        axis.set_title(TITLES.get(trace, trace), fontsize=10)
        tidy(axis)
    axes[0, 0].set_ylabel("ms per token (above bars: share of the sum)")
    axes[0, 0].set_ylim(top=1.12 * axes[0, 0].get_ylim()[1])
    axes[0, -1].legend(fontsize=8)
    save(figure, "Time per token\n" + subtitle(section), path)


def baselines(sections: Cell, path: Path) -> None:
    """Tokens per second of other ways to run the model, on a log scale."""
    rows: list[tuple[str, float, str]] = []
    offload = sections.get("offload", {})
    if "tokens_per_s" in offload:
        rows.append(("accelerate cpu_offload, bf16", offload["tokens_per_s"], GREY))
    cells = [c for c in sections["baselines"]["cells"] if c["trace"] == "synthetic"]
    for cell in sorted(cells, key=lambda c: (c["capacity"], c["tokens_per_s"])):
        share = "" if cell["capacity"] == 1 else f", {100 * cell['capacity']:g} %"
        colour = BLUE if cell["name"].startswith("qmoe") else GREY
        rows.append((cell["name"] + share, cell["tokens_per_s"], colour))
    decode = sections.get("decode", {})
    for cell in sorted(decode.get("cells", []), key=lambda c: c["capacity"]):
        wanted = {c["capacity"] for c in cells} - {1.0}
        plain = cell["variant"] == "plain"
        if cell["trace"] == "synthetic" and cell["capacity"] in wanted and plain:
            name = f"qmoe, CUDA graph, {100 * cell['capacity']:g} %"
            rows.append((name, cell["tokens_per_s"], BLUE))
    for cell in decode.get("resident", []):
        if cell["trace"] == "synthetic":
            rows.append(("resident, CUDA graph", cell["tokens_per_s"], "#555555"))
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.34 * len(rows)))
    bars = axis.barh(
        [name for name, _, _ in rows],
        [rate for _, rate, _ in rows],
        color=[colour for _, _, colour in rows],
    )
    axis.bar_label(bars, [f"{rate:.3g}" for _, rate, _ in rows], padding=3, fontsize=8)
    axis.set_xscale("log")
    axis.margins(x=0.12)
    axis.invert_yaxis()
    axis.set_xlabel("tokens per second, log scale")
    tidy(axis)
    machine = sections["baselines"]["machine"]
    save(
        figure,
        (
            f"Ways to decode with Qwen3-30B-A3B's shape, batch 1, {machine['gpu']}\n"
            "synthetic trace; per cent: of all experts on the GPU"
        ),
        path,
    )
