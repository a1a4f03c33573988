"""``qmoe inspect``: what a checkpoint holds."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from qmoe.checkpoints.hub import check_place
from qmoe.cli.output import Debug, Json, print_json, print_table
from qmoe.exits import printable
from qmoe.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from qmoe.checkpoints.inspection import Inspection


def inspect(
    path: Annotated[str, typer.Argument(help="A model's folder or Hub id.", metavar="PATH")],
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Print what a checkpoint holds, from its config and headers; no weight is read."""
    check_place(path)

    from qmoe.checkpoints.inspection import inspect_checkpoint

    inspection = inspect_checkpoint(path)
    if json_output:
        print_json(dataclasses.asdict(inspection))
    else:
        print_table(_inspection_table(inspection))


def _inspection_table(inspection: Inspection) -> Table:
    from rich.table import Table

    i = inspection
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()

    def row(name: str, value: object) -> None:
        table.add_row(name, printable(str(value)))

    row("checkpoint", i.path)
    row("architecture", i.architecture)
    if i.source is not None:
        row("converted from", i.source)
    layers = "unknown" if i.num_layers is None else i.num_layers
    if i.dense:
        row("layers", layers)
        row("experts", "none: a dense model, qmoe has nothing to quantize in it")
    else:
        row("layers", f"{layers}, {i.expert_layers} with experts")
        row("experts per layer", " or ".join(map(str, i.num_experts)))
        row("experts per token", "unknown" if i.top_k is None else i.top_k)
    row("format", i.format)
    row("files", i.shards)
    row("on disk", format_size(i.expert_bytes + i.rest_bytes))
    if not i.dense:
        row("  experts", format_size(i.expert_bytes))
        row("  rest", format_size(i.rest_bytes))
    row("in memory", "unknown" if i.memory_bytes is None else format_size(i.memory_bytes))
    if i.bits_per_expert_weight is not None:
        row("bits per expert weight", f"{i.bits_per_expert_weight:.2f}")
    for projection, error in (i.errors or {}).items():
        row(
            f"error of {projection}",
            f"median {error['median']:.3%}, worst {error['worst']:.3%} in {error['worst_module']}",
        )
    return table
