"""The picture of what was fitted, drawn from the benchmark's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.drawing import BLACK, BLUE, GREEN, ORANGE, save, tidy

CURVES = {
    "fitted": ("fitted trace", BLUE, "-"),
    "synthetic": ("synthetic trace: Zipf 0.65, 40 % reuse", ORANGE, "--"),
    "recorded": ("shipped model's trace, tiled", GREEN, "-."),
}


def draw(path: Path) -> Path:
    """Draw hit rates over capacity of what ``path`` holds; the picture's path."""
    sections = json.loads(path.read_text())["sections"]
    sections = {name: section for name, section in sections.items() if "curve" in section}
    figure, axes = plt.subplots(
        1, len(sections), figsize=(5.4 * len(sections), 4.4), sharey=True, squeeze=False
    )
    for axis, (name, section) in zip(axes[0], sections.items(), strict=True):
        _draw_model(axis, name, section)
    axes[0, 0].set_ylabel("hits, % of experts asked for")
    picture = path.with_suffix(".png")
    save(figure, "Hit rates of LRU, from an empty cache", picture, *sections.values())
    return picture


def _draw_model(axis: Axes, name: str, section: dict[str, Any]) -> None:
    for cell in section["curve"]:
        label, color, style = CURVES[cell["trace"]]
        percent = [[100 * value for value in cell[key]] for key in ("shares", "hit_rates")]
        axis.plot(*percent, style, color=color, label=label)
    model = section["model"]
    percent = [
        [100 * value for value in values] for values in zip(*model["hit_rates"], strict=True)
    ]
    axis.plot(*percent, "o", color=BLACK, label="published", zorder=3)
    for x, y in zip(*percent, strict=True):
        axis.annotate(f"{y:.3g}", (x, y), xytext=(6, -11), textcoords="offset points", fontsize=8)
    shape = f"{model['num_experts']} experts, top-{model['top_k']}, {model['num_tokens']} tokens"
    axis.set_title(f"{name}: {shape}", fontsize=10)
    axis.set(xlim=(0, 101), ylim=(0, 102))
    axis.set_xlabel("capacity, % of all experts")
    axis.legend(fontsize=8, loc="lower right")
    tidy(axis)
