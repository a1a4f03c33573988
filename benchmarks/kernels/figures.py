"""Pictures of what the benchmark measured, drawn from its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.drawing import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, save, tidy
from benchmarks.kernels.targets import BF16_PEERS, PEER_MICROSECONDS, PEERS, SHAPES, best_peer

MODE_STYLES = {
    "bf16": ("bf16 weights", ORANGE, "^", "-"),
    "int8-w8a16": ("INT8 weights, bf16 activations", SKY, "o", "-"),
    "int8-w8a8": ("INT8 weights and activations", BLUE, "s", "-"),
    "fp8-w8a16": ("FP8 weights, bf16 activations", PINK, "o", "-"),
    "fp8-w8a8": ("FP8 weights and activations", RED, "s", "-"),
}
BARS = {
    "CPU": ("CPU, transformers, bf16", GREY),
    "GPU eager": ("GPU, transformers eager, bf16", GREY),
    "GPU grouped": ("GPU, transformers grouped_mm, bf16", GREY),
    "fused bf16": ("GPU, fused, bf16", ORANGE),
    "fused int8": ("GPU, fused, INT8", BLUE),
    "fused fp8": ("GPU, fused, FP8", RED),
}
Section = dict[str, Any]


def draw(path: Path) -> list[Path]:
    """Draw what ``path`` holds beside it, as far as it has been measured; the pictures' paths."""
    sections = json.loads(path.read_text())["sections"]
    drawn = []
    measured = [s for n, s in sections.items() if n.startswith("latency.") and s.get("cells")]
    if measured:
        drawn.append(path.with_name(f"{path.stem}_latency.png"))
        latency(measured, drawn[-1])
    if sections.get("layer", {}).get("bars"):
        drawn.append(path.with_name(f"{path.stem}_layer.png"))
        layer(sections["layer"], drawn[-1])
    for picture in drawn:
        print(picture)
    return drawn


def latency(sections: list[Section], path: Path) -> None:
    """Draw microseconds by tokens on log axes, with floors and peers, a panel for each shape."""
    order = list(SHAPES)
    sections.sort(key=lambda s: (*order, s["cells"][0]["shape"]).index(s["cells"][0]["shape"]))
    figure, axes = plt.subplots(1, len(sections), figsize=(5.2 * len(sections), 5.6), squeeze=False)
    for axis, section in zip(axes[0], sections, strict=True):
        _latency_panel(axis, section)
    axes[0, 0].set_ylabel("µs per layer")
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = 4 if len(sections) > 1 else 2
    rows = -(-len(handles) // columns)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=columns,
        fontsize=8,
        frameon=False,
    )
    gpu = sections[0]["machine"]["gpu"] or "CPU"
    figure.suptitle(
        f"One MoE layer, {gpu}: CUDA-graph replay, cold L2, uniform routing", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.08 + 0.01 * rows)
    plt.close(figure)


def _latency_panel(axis: Axes, section: Section) -> None:
    shape = section["cells"][0]["shape"]
    by_mode: dict[str, list[Section]] = {}
    for cell in sorted(section["cells"], key=lambda c: c["tokens"]):
        by_mode.setdefault(cell["mode"], []).append(cell)
    tokens = sorted({cell["tokens"] for cell in section["cells"]})
    _floor_lines(axis, by_mode)
    if shape in PEER_MICROSECONDS:
        for among, label, style in (
            (
                tuple(p for p in PEERS if p not in BF16_PEERS),
                "best 8-bit peer of vLLM 0.26 and torch 2.11",
                "--",
            ),
            (BF16_PEERS, "best bf16 peer of vLLM 0.26 and torch 2.11", ":"),
        ):
            best = [best_peer(shape, t, among)[1] for t in tokens]
            axis.plot(tokens, best, ls=style, marker="x", ms=4, lw=1.2, c=GREEN, label=label)
    grouped = [
        (p["tokens"], p["us"])
        for p in sorted(section.get("peers", []), key=lambda p: p["tokens"])
        if p["peer"] == "transformers grouped_mm" and "us" in p
    ]
    if grouped:
        axis.plot(
            *zip(*grouped, strict=True),
            c=GREY,
            marker="v",
            ms=4,
            lw=1.2,
            label="transformers grouped_mm, bf16",
        )
    for mode, (label, colour, marker, style) in MODE_STYLES.items():
        timed = [(c["tokens"], c["us"]) for c in by_mode.get(mode, []) if "us" in c]
        if timed:
            x, y = zip(*timed, strict=True)
            axis.plot(x, y, c=colour, marker=marker, ls=style, ms=4, lw=1.6, label=label)
    axis.set_xscale("log", base=4)
    axis.set_yscale("log")
    axis.set_xticks(tokens, [str(t) for t in tokens])
    axis.minorticks_off()
    axis.set_xlabel("tokens")
    sizes = section.get("shape", {})
    title = shape
    if sizes:
        title += (
            f": {sizes['num_experts']} experts, top-{sizes['top_k']}, "
            f"hidden {sizes['hidden_size']}, intermediate {sizes['intermediate_size']}"
        )
    axis.set_title(title, fontsize=9)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    tidy(axis)


def _floor_lines(axis: Axes, by_mode: dict[str, list[Section]]) -> None:
    """Memory's floor at 8 bits and arithmetic's at 16 and 8."""
    for modes, key, style, label in (
        (
            ("int8-w8a16", "fp8-w8a16", "int8-w8a8", "fp8-w8a8"),
            "floor_us",
            "-",
            "floor: memory, 8 bit",
        ),
        (("int8-w8a16", "fp8-w8a16", "bf16"), "flop_us", "--", "floor: arithmetic, 16 bit"),
        (("int8-w8a8", "fp8-w8a8"), "flop_us", ":", "floor: arithmetic, 8 bit"),
    ):
        cells = next((by_mode[m] for m in modes if m in by_mode), None)
        if cells is None:
            continue
        if key == "flop_us":  # only where it comes near the other one
            cells = [c for c in cells if c["flop_us"] > 0.1 * c["floor_us"]]
        if cells:
            x, y = [c["tokens"] for c in cells], [c[key] for c in cells]
            axis.plot(x, y, c=BLACK, ls=style, lw=1, label=label)


def layer(section: Section, path: Path) -> None:
    """Draw one layer's time on a log scale, a panel for each number of tokens."""
    tokens = sorted({bar["tokens"] for bar in section["bars"]})
    times = {(bar["what"], bar["tokens"]): bar["us"] for bar in section["bars"]}
    figure, axes = plt.subplots(
        1, len(tokens), figsize=(2.4 + 3.4 * len(tokens), 3.0), sharey=True, squeeze=False
    )
    for axis, num_tokens in zip(axes[0], tokens, strict=True):
        rows = [(*BARS[w], times.get((w, num_tokens), float("nan"))) for w in BARS]
        bars = axis.barh([r[0] for r in rows], [r[2] for r in rows], color=[r[1] for r in rows])
        labels = ["" if us != us else _duration(us) for _, _, us in rows]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.set_xscale("log")
        low, high = min(times.values()), max(times.values())
        axis.set_xlim(low / 2, high * 8)
        axis.set_title(f"{num_tokens} token" + "s" * (num_tokens > 1), fontsize=10)
        axis.set_xlabel("time of one layer, log scale")
        axis.xaxis.set_major_formatter(lambda value, _: _duration(value))
        axis.minorticks_off()
        axis.tick_params(axis="x", labelsize=8)
        tidy(axis)
    axes[0, 0].invert_yaxis()
    machine = section["machine"]
    save(figure, f"One MoE layer of {section['shape']}'s shape, {machine['gpu'] or 'CPU'}", path)


def _duration(us: float) -> str:
    for unit, factor in (("s", 1e6), ("ms", 1e3)):
        if us >= factor:
            return f"{us / factor:.3g} {unit}"
    return f"{us:.3g} µs"
