"""Pictures of what the benchmark measured, drawn from its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.drawing import BLUE, GREY, save, tidy
from benchmarks.model import QWEN3_30B_A3B

TITLES = {
    "fitted": "Trace that hits like Qwen3-30B-A3B",
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
    sharing = sections.get("sharing", {})
    if sharing.get("cells") and "link_gb_per_s" in sharing:  # older files do not say it
        drawn.append(path.with_name(f"{path.stem}_sources.png"))
        time_by_source(sharing, drawn[-1])
    if sections.get("baselines", {}).get("cells"):
        drawn.append(path.with_name(f"{path.stem}_baselines.png"))
        baselines(sections, drawn[-1])
    for picture in drawn:
        print(picture)
    return drawn


def by_trace(section: Cell) -> dict[str, list[Cell]]:
    """Cells by trace, smallest capacity first, where layers wait for all that they miss."""
    found: dict[str, list[Cell]] = {}
    for cell in sorted(section["cells"], key=lambda c: c["capacity"]):
        if cell["variant"] == "plain":
            found.setdefault(cell["trace"], []).append(cell)
    return found


def model_of(section: Cell) -> str:
    """What was run; older files do not say it."""
    return section.get("model", str(QWEN3_30B_A3B))


def subtitle(section: Cell) -> str:
    """Where it was measured."""
    machine = section["machine"]
    return (
        f"{model_of(section)}, INT8 experts, batch 1, {machine['gpu']}, "
        f"pinned copies {section['link_gb_per_s']['layer']:.0f} GB/s"
    )


def retention(section: Cell, path: Path) -> None:
    """Tokens/s over resident tokens/s, and hit rates beside the best possible, by capacity."""
    traces = by_trace(section)
    figure, axes = plt.subplots(
        2, len(traces), figsize=(5.2 * len(traces), 7), sharex=True, sharey="row", squeeze=False
    )
    for column, (trace, cells) in enumerate(traces.items()):
        top, bottom = axes[0, column], axes[1, column]
        x = [100 * cell["capacity"] for cell in cells]
        top.plot(x, [100 * cell["retention"] for cell in cells], "o-", c=BLUE)
        rates = [100 * cell["belady_hit_rate"] for cell in cells]
        bottom.plot(x, rates, "^--", c=GREY, label="best possible: future known (Belady)")
        rates = [100 * cell["hit_rate"] for cell in cells]
        bottom.plot(x, rates, "o-", c=BLUE, label="measured")
        top.set_title(TITLES.get(trace, trace), fontsize=10)
        top.set_ylim(0, 105)
        bottom.set_ylim(0, 105)
        bottom.set_xlabel("capacity, % of all experts on the GPU")
        bottom.set_xticks([100 * cell["capacity"] for cell in cells])
        bottom.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        tidy(top)
        tidy(bottom)
    axes[0, 0].set_ylabel("% of the resident model's tokens/s")
    axes[1, 0].set_ylabel("hits, % of experts asked for")
    axes[1, -1].legend(fontsize=8, loc="lower right")
    save(figure, "Speed kept by capacity\n" + subtitle(section), path, section)


def time_per_token(section: Cell, path: Path) -> None:
    """Stacked, resident time and missed bytes over the link's rate; beside it what was measured."""
    traces = by_trace(section)
    figure, axes = plt.subplots(
        1, len(traces), figsize=(5.6 * len(traces), 4.4), sharey=True, squeeze=False
    )
    for axis, (trace, cells) in zip(axes[0], traces.items(), strict=True):
        width = 0.4
        resident = [cell["resident_ms"] for cell in cells]
        link = [cell["link_ms"] for cell in cells]
        left = [place - width / 2 for place in range(len(cells))]
        axis.bar(left, resident, width, color="#555555", label="all experts on the GPU")
        axis.bar(left, link, width, bottom=resident, color="#BBBBBB", label="missed bytes / link")
        right = [place + width / 2 for place in range(len(cells))]
        times = [cell["ms"] for cell in cells]
        bars = axis.bar(right, times, width, color=BLUE, label="measured")
        sums = [a + b for a, b in zip(resident, link, strict=True)]
        ratios = [f"{ms / total:.2f}" for ms, total in zip(times, sums, strict=True)]
        axis.bar_label(bars, ratios, fontsize=8, padding=2)
        axis.set_xticks(range(len(cells)), [f"{100 * cell['capacity']:g}" for cell in cells])
        axis.set_xlabel("capacity, % of all experts on the GPU")
        axis.set_title(TITLES.get(trace, trace), fontsize=10)
        tidy(axis)
    axes[0, 0].set_ylabel("ms per token (above bars: over the grey sum)")
    axes[0, 0].set_ylim(top=1.12 * axes[0, 0].get_ylim()[1])
    axes[0, -1].legend(fontsize=8)
    save(figure, "Time per token\n" + subtitle(section), path, section)


def time_by_source(section: Cell, path: Path) -> None:
    """A token's milliseconds by who served its misses, and what they are made of.

    Stacked: the resident model's step, the time in which the GPU waited for the host, and the rest:
    copies that the layer waited for, and launches. A mark says how long the link copied in all,
    also beside the computation.
    """
    traces: dict[str, list[Cell]] = {}
    for cell in section["cells"]:
        traces.setdefault(cell["trace"], []).append(cell)
    figure, axes = plt.subplots(
        1, len(traces), figsize=(5.6 * len(traces), 4.4), sharey=True, squeeze=False
    )
    for axis, (trace, cells) in zip(axes[0], traces.items(), strict=True):
        places = range(len(cells))
        resident = [cell["resident_ms"] for cell in cells]
        waited = [cell["waited_ms_per_token"] for cell in cells]
        rest = [
            max(0.0, cell["ms"] - ms - host)
            for cell, ms, host in zip(cells, resident, waited, strict=True)
        ]
        axis.bar(places, resident, color="#555555", label="as with all experts on the GPU")
        axis.bar(places, waited, bottom=resident, color=GREY, label="waited for the host")
        below = [a + b for a, b in zip(resident, waited, strict=True)]
        bars = axis.bar(places, rest, bottom=below, color=BLUE, label="copies and launches")
        axis.bar_label(bars, [f"{cell['retention']:.0%}" for cell in cells], fontsize=8, padding=2)
        link = [cell["copied_bytes"] / 1e6 / section["link_gb_per_s"]["layer"] for cell in cells]
        axis.plot(places, link, "_", c="black", ms=14, label="the link copied for so long")
        names = [f"{cell['served_by']}\n{100 * cell['capacity']:g} %" for cell in cells]
        axis.set_xticks(places, names, fontsize=8)
        axis.set_title(TITLES.get(trace, trace), fontsize=10)
        tidy(axis)
    axes[0, 0].set_ylabel("ms per token (above bars: kept of the resident speed)")
    axes[0, 0].set_ylim(top=1.12 * axes[0, 0].get_ylim()[1])
    axes[0, -1].legend(fontsize=8)
    save(figure, "Time per token by who serves misses\n" + subtitle(section), path, section)


def baselines(sections: Cell, path: Path) -> None:
    """Tokens per second of other ways to run the model, on a log scale."""
    rows: list[tuple[str, float, str]] = []
    offload = sections.get("offload", {})
    if "tokens_per_s" in offload:
        rows.append(("accelerate cpu_offload, bf16", offload["tokens_per_s"], GREY))
    trace = sections["baselines"]["cells"][0]["trace"]
    cells = [c for c in sections["baselines"]["cells"] if c["trace"] == trace]
    for cell in sorted(cells, key=lambda c: (c["capacity"], c["tokens_per_s"])):
        share = "" if cell["capacity"] == 1 else f", {100 * cell['capacity']:g} %"
        colour = BLUE if cell["name"].startswith("qmoe") else GREY
        rows.append((cell["name"] + share, cell["tokens_per_s"], colour))
    decode = sections.get("decode", {})
    for cell in sorted(decode.get("cells", []), key=lambda c: c["capacity"]):
        wanted = {c["capacity"] for c in cells} - {1.0}
        plain = cell["variant"] == "plain"
        if cell["trace"] == trace and cell["capacity"] in wanted and plain:
            name = f"qmoe, CUDA graph, {100 * cell['capacity']:g} %"
            rows.append((name, cell["tokens_per_s"], BLUE))
    for cell in decode.get("resident", []):
        if cell["trace"] == trace:
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
            f"Ways to decode with {model_of(decode)}, batch 1, {machine['gpu']}\n"
            f"{trace} trace; per cent: of all experts on the GPU"
        ),
        path,
        *(sections[name] for name in ("decode", "baselines", "offload") if name in sections),
    )
