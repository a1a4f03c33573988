"""Pictures of what the benchmark measured, drawn from its JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.drawing import BLACK, BLUE, GREEN, GREY, ORANGE, RED, SKY, save, tidy
from benchmarks.kernels.shapes import SHAPES, TOKENS
from benchmarks.kernels.targets import best_of_ours, best_vllm

# INT8 alone: FP8 lies within a few per cent of it. From so many tokens on the two differ.
MODES = {
    "int8-w8a16": ("qmoe, INT8 weights, bf16 rows", SKY, "o", 1),
    "int8-w8a8": ("qmoe, INT8 weights, 8-bit rows", BLUE, "s", 64),
}
BARS = {
    "CPU": ("CPU, transformers, bf16", GREY),
    "GPU eager": ("GPU, transformers eager, bf16", GREY),
    "GPU grouped": ("GPU, transformers grouped_mm, bf16", GREY),
    "fused bf16": ("GPU, qmoe, bf16", ORANGE),
    "fused int8": ("GPU, qmoe, INT8", BLUE),
    "fused fp8": ("GPU, qmoe, FP8", RED),
}
Section = dict[str, Any]
Line = tuple[dict[int, float], str, str, str, str]  # us by tokens, label, colour, marker, style
Series = Callable[[Section], Iterator[Line]]


def draw(path: Path) -> list[Path]:
    """Draw what ``path`` holds beside it, as far as it has been measured; the pictures' paths."""
    sections = json.loads(path.read_text())["sections"]
    drawn = []
    for kind in ("latency", "held_out"):
        measured = [s for n, s in sections.items() if n.startswith(f"{kind}.") and s.get("cells")]
        if measured:
            drawn.append(path.with_name(f"{path.stem}_{kind}.png"))
            series = latency_series if kind == "latency" else held_out_series
            latency(measured, series, drawn[-1])
    if sections.get("layer", {}).get("bars"):
        drawn.append(path.with_name(f"{path.stem}_layer.png"))
        layer(sections["layer"], drawn[-1])
    for picture in drawn:
        print(picture)
    return drawn


def latency(sections: list[Section], series: Series, path: Path) -> None:
    """Draw time over what the hardware allows, by tokens, a panel for each shape."""
    order = list(SHAPES)
    sections.sort(key=lambda s: (*order, s["cells"][0]["shape"]).index(s["cells"][0]["shape"]))
    figure, axes = plt.subplots(
        1, len(sections), figsize=(1 + 3.4 * len(sections), 4.2), sharey=True, squeeze=False
    )
    for axis, section in zip(axes[0], sections, strict=True):
        _latency_panel(axis, section, series(section))
    axes[0, 0].set_ylabel("time / what the hardware allows")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False
    )
    gpu = sections[0]["machine"]["gpu"] or "CPU"
    title = f"One MoE layer, {gpu}: CUDA-graph replay, cold L2, uniform routing"
    save(figure, title, path, *sections)


def latency_series(section: Section) -> Iterator[Line]:
    """Yield what is drawn of a shape that has goals of its own."""
    grouped = [p for p in section.get("peers", []) if p["peer"] == "transformers grouped_mm"]
    times = {p["tokens"]: p["us"] for p in grouped if "us" in p}
    yield times, "transformers grouped_mm, bf16", GREY, "v", "-"
    yield _vllm(section, 8, GREEN)
    for mode, (label, colour, marker, first) in MODES.items():
        times = {t: us for t, us in _ours(section, mode).items() if t >= first}
        yield times, label, colour, marker, "-"


def held_out_series(section: Section) -> Iterator[Line]:
    """Yield what is drawn of a shape that the rule was not fitted on."""
    yield _vllm(section, 16, GREY)
    yield _vllm(section, 8, GREEN)
    yield _ours(section, "bf16"), "qmoe, bf16", ORANGE, "v", "-"
    best = {t: min(us) for t in _tokens(section) if (us := best_of_ours(section, t).values())}
    yield best, "qmoe, 8-bit weights: its best mode", SKY, "s", "-"
    yield _ours(section, "auto"), "qmoe, INT8 weights: auto", BLUE, ".", "-"


def _tokens(section: Section) -> list[int]:
    return sorted({cell["tokens"] for cell in section["cells"]})


def _ours(section: Section, mode: str) -> dict[int, float]:
    cells = (cell for cell in section["cells"] if cell["mode"] == mode and "us" in cell)
    return {cell["tokens"]: cell["us"] for cell in cells}


def _vllm(section: Section, bits: int, colour: str) -> Line:
    found = ((t, best_vllm(section, t, bits)) for t in _tokens(section))
    times = {t: best[0] for t, best in found if best is not None}
    version = section["machine"].get("vllm", "")
    what = "best 8-bit kernel" if bits == 8 else "kernel for bf16"
    return times, f"vLLM {version}: {what}", colour, "x", "--"


def _latency_panel(axis: Axes, section: Section, lines: Iterator[Line]) -> None:
    shape = section["cells"][0]["shape"]
    tokens = _tokens(section)
    # Bytes of the active experts in 8 bits, or all products in 8 bits, whichever takes longer; what
    # a test's small layer takes is rounded to nothing.
    eight_bit = {c["tokens"]: c for c in section["cells"] if c["mode"] == "int8-w8a8"}
    floor = {t: max(c["floor_us"], c["flop_us"], 0.01) for t, c in eight_bit.items()}
    axis.axhline(1, c=BLACK, lw=1, label="1: what memory or arithmetic in 8 bits allows")
    for times, label, colour, marker, style in lines:
        if times:
            y = [us / floor[t] for t, us in times.items()]
            axis.plot(list(times), y, c=colour, marker=marker, ls=style, ms=5, lw=1.6, label=label)
    axis.set_xscale("log", base=4)
    axis.set_yscale("log")
    ticks = [t for t in tokens if t in TOKENS] or tokens  # 512 would touch its neighbours
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.set_yticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"])
    axis.minorticks_off()
    axis.set_xlabel("tokens")
    sizes = section.get("shape", {})
    title = shape
    if sizes:
        title += (
            f": {sizes['num_experts']} experts, top-{sizes['top_k']},\n"
            f"hidden {sizes['hidden_size']}, intermediate {sizes['intermediate_size']}"
        )
    axis.set_title(title, fontsize=9)
    tidy(axis)


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
    title = f"One MoE layer of {section['shape']}'s shape, {machine['gpu'] or 'CPU'}"
    save(figure, title, path, section)


def _duration(us: float) -> str:
    for unit, factor in (("s", 1e6), ("ms", 1e3)):
        if us >= factor:
            return f"{us / factor:.3g} {unit}"
    return f"{us:.3g} µs"
