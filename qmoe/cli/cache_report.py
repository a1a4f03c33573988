"""``qmoe cache-report``: what caches of several sizes would have made of recorded routing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmoe.cli.output import Debug, Json, print_json, print_table
from qmoe.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from qmoe.traces.report import CacheReport


def cache_report(
    trace: Annotated[
        Path,
        typer.Argument(help="What qmoe generate --record-routing wrote.", metavar="TRACE"),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Draw hit_rate.png and heat_map.png into this folder.")
    ] = None,
    capacity: Annotated[
        list[str] | None,
        typer.Option(
            help="Of the cache: a share of all experts (12.5%) or a number of them; repeatable.",
            show_default="the eighths",
        ),
    ] = None,
    warmup: Annotated[
        int, typer.Option(min=0, help="So many tokens fill the cache before hits are counted.")
    ] = 0,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Replay recorded routing: hit rates of caches that evict by claims, LRU, LFU, Belady's rule.

    The expert cache evicts by claims.
    """
    if not trace.is_file():
        raise FileNotFoundError(
            f"{trace}: no such file; record one with qmoe generate --record-routing"
        )

    from qmoe.traces.report import cache_report as replay_trace
    from qmoe.traces.report import draw_report, require_matplotlib
    from qmoe.traces.trace import RoutingTrace

    if out is not None:
        require_matplotlib()
    recorded = RoutingTrace.load(trace)
    report = replay_trace(recorded, capacity, warmup=warmup)
    pictures = [] if out is None else list(map(str, draw_report(report, recorded, out)))
    if json_output:
        document = {"trace": str(trace), **dataclasses.asdict(report)}
        document["replays"] = [
            {
                **dataclasses.asdict(replay),
                "hit_rate": replay.hit_rate,
                "missed_bytes_per_token": report.missed_bytes_per_token(replay),
            }
            for replay in report.replays
        ]
        print_json({**document, "pictures": pictures})
    else:
        print_table(_cache_report_table(report))
        print("\n".join([*_routing_lines(report), *pictures]))


def _cache_report_table(report: CacheReport) -> Table:
    from rich.table import Table

    from qmoe.traces.replay import POLICIES
    from qmoe.traces.report import NAMES

    r = report
    table = Table(title=r.metadata.get("source") or None, title_justify="left")
    table.add_column("capacity", justify="right")
    table.add_column("pages", justify="right")
    for column in ("hit rate", "missed\n/token"):
        for policy in POLICIES:
            table.add_column(f"{NAMES[policy]}\n{column}", justify="right")
    by_capacity: dict[int, list[str]] = {}
    for cell in (
        lambda replay: f"{replay.hit_rate:.1%}",
        lambda replay: format_size(r.missed_bytes_per_token(replay)),
    ):
        for replay in r.replays:  # policies outermost
            by_capacity.setdefault(replay.capacity, []).append(cell(replay))
    for capacity, cells in by_capacity.items():
        table.add_row(f"{capacity / r.num_pages:.1%}", str(capacity), *cells)
    return table


def _routing_lines(report: CacheReport) -> list[str]:
    def shares(by_layer: list[float]) -> str:
        mean = sum(by_layer) / len(by_layer)
        return f"{mean:.1%} ({min(by_layer):.1%} to {max(by_layer):.1%} by layer)"

    r = report
    lines = [
        f"{r.num_tokens} tokens through {r.num_layers} layers of {r.num_experts} experts, top "
        f"{r.top_k}: one token asks for {r.cycle} pages",
        f"reuse: {shares(r.reuse)} of a token's experts were the token's before it",
    ]
    if r.warmup:
        lines.append(f"warm-up: the first {r.warmup} tokens are not counted in the table")
    return lines
