"""What a routing trace says about caches: a table of hit rates and two pictures."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qmoe.traces.replay import Replay, replay_curve
from qmoe.traces.trace import RoutingTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HIT_RATE, HEAT_MAP = "hit_rate.png", "heat_map.png"
NAMES = {"claims": "claims", "lru": "LRU", "lfu": "LFU", "belady": "Belady"}


@dataclass(frozen=True)
class CacheReport:
    """How caches of several capacities would have served a trace.

    Attributes:
        num_tokens, num_layers, num_experts, top_k: the trace's shape.
        num_pages: of all layers.
        warmup: tokens that filled the cache before anything was counted.
        metadata: the trace's.
        reuse: for each layer, the share of a token's experts that the token before used too.
        replays: every capacity by the expert cache's claims, then under LRU, LFU and Belady.
    """

    num_tokens: int
    num_layers: int
    num_experts: int
    top_k: int
    num_pages: int
    warmup: int
    metadata: dict[str, str]
    reuse: list[float]
    replays: list[Replay]

    @property
    def cycle(self) -> int:
        """Pages that one token asks for: a cache of fewer has forgotten a layer when it returns."""
        return self.num_layers * self.top_k

    def missed_bytes_per_token(self, replay: Replay) -> float:
        """Bytes copied for one token, in the mean."""
        return replay.missed_bytes / (self.num_tokens - self.warmup)


def cache_report(
    trace: RoutingTrace, capacities: Sequence[str] | None = None, *, warmup: int = 0
) -> CacheReport:
    """Replay a trace under every policy.

    Args:
        trace: what was asked for.
        capacities: of the cache, in pages (``"768"``) or as a share of all pages (``"12.5%"``). By
            default the eighths, those too small for one step left out.
        warmup: the first so many tokens fill the cache and are not counted.

    Raises:
        ValueError: a capacity that is none, or that is too small for one step; a warm-up that
            leaves no tokens.
    """
    if capacities is None:
        eighths = (round(eighth / 8 * trace.num_pages) for eighth in range(1, 9))
        slots = [eighth for eighth in eighths if eighth >= trace.top_k]
    else:
        slots = [_slots(capacity, trace) for capacity in capacities]
    return CacheReport(
        num_tokens=trace.num_tokens,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        num_pages=trace.num_pages,
        warmup=warmup,
        metadata=trace.metadata,
        reuse=trace.reuse().tolist(),
        replays=replay_curve(trace, sorted(set(slots)), warmup=warmup),
    )


def _slots(capacity: str, trace: RoutingTrace) -> int:
    try:
        if capacity.endswith("%"):
            slots = round(float(capacity[:-1]) / 100 * trace.num_pages)
        else:
            slots = int(capacity)
    except (ValueError, OverflowError):
        raise ValueError(
            f"capacity {capacity!r}: give pages (768) or a share of all {trace.num_pages} (12.5%)"
        ) from None
    if not trace.top_k <= slots <= trace.num_pages:
        raise ValueError(
            f"capacity {capacity!r}: {slots} pages; this trace takes "
            f"{trace.top_k} (one token in one layer) to {trace.num_pages} (everything)"
        )
    return slots


def require_matplotlib() -> None:
    """Refuse to draw without matplotlib, in one line: a replay may take a while."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install 'qmoe[bench]', or leave --out away")


def draw_report(report: CacheReport, trace: RoutingTrace, folder: str | Path) -> list[Path]:
    """Draw hit rate against capacity, and how popular each expert of each layer is.

    Returns:
        the two files, ``hit_rate.png`` and ``heat_map.png`` in ``folder``.

    Raises:
        ValueError: matplotlib is not installed.
    """
    require_matplotlib()
    folder = Path(folder)
    figures = {HIT_RATE: _hit_rate(report), HEAT_MAP: _heat_map(trace)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in figures]


def _hit_rate(report: CacheReport) -> Figure:
    figure, axes = _axes((7.0, 4.6), report.metadata)
    share = 100 / report.num_pages
    colors = {
        "belady": "tab:green",
        "claims": "tab:red",
        "lru": "tab:blue",
        "lfu": "tab:orange",
    }
    for policy in colors:
        curve = [r for r in report.replays if r.policy == policy]
        axes.plot(
            [r.capacity * share for r in curve],
            [r.hit_rate * 100 for r in curve],
            color=colors[policy],
            marker="o",
            markersize=4,
            label=NAMES[policy],
        )
    axes.plot([0, 100], [0, 100], color="0.7", linewidth=1, linestyle="--", label="uniform routing")
    axes.axvline(report.cycle * share, color="0.5", linewidth=1, linestyle=":")
    axes.annotate(
        "one token's cycle",
        (report.cycle * share, 2),
        xytext=(4, 0),
        textcoords="offset points",
        color="0.4",
        fontsize=8,
    )
    axes.set(xlim=(0, 101), ylim=(0, 101))
    axes.set_xlabel(f"capacity, % of {report.num_pages} pages")
    axes.set_ylabel("hit rate, %")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right")
    return figure


def _heat_map(trace: RoutingTrace) -> Figure:
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    popularity = trace.popularity().double()  # (num_layers, num_experts)
    relative = popularity / popularity.mean(1, keepdim=True).clamp(min=1e-9)
    width = min(3.5 + trace.num_experts * 0.12, 12.0)
    height = min(1.8 + trace.num_layers * 0.16, 8.0)
    figure, axes = _axes((max(width, 6.0), max(height, 3.0)), trace.metadata)
    # Few experts are used far more than the others: a square root keeps the others apart.
    image = axes.imshow(
        relative.numpy(),
        aspect="auto",
        cmap="viridis",
        norm=PowerNorm(0.5, vmin=0),
        interpolation="nearest",
    )
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="use / mean use in the layer", pad=0.02)
    return figure


def _axes(size: tuple[float, float], metadata: dict[str, str]) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(metadata.get("source", ""), fontsize=9, color="0.3", loc="left")
    return figure, axes
