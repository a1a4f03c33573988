"""What pictures of all benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
SKY, PINK, BLACK = "#56B4E9", "#CC79A7", "#000000"


def tidy(axis: Axes) -> None:
    """Draw a faint grid behind, and no frame."""
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Any, title: str, path: Path, *sections: dict[str, Any]) -> None:
    """Write a figure with a title, and when and of which commit it was measured; close it."""
    figure.suptitle(title, fontsize=11)
    measured = dict.fromkeys(f"{s['date']}, commit {s['commit']}" for s in sections)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    note = "measured " + " and ".join(measured)
    figure.text(0.995, 0.005, note, ha="right", va="bottom", fontsize=7, color=GREY)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
