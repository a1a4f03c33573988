"""``qmoe tune``: search the tiles that a kind of layer runs fastest with on this GPU."""

from __future__ import annotations

import os
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from qmoe.checkpoints.hub import check_place
from qmoe.cli.output import Json, grouped, print_json
from qmoe.exits import FAILED, INTERRUPTED, interruptible
from qmoe.progress import progress

if TYPE_CHECKING:
    from qmoe.tools.tune import Tuned, Tuning
    from qmoe_kernels.tile_search import Cell
    from qmoe_kernels.tiles import LayerShape


@dataclass(frozen=True)
class Layer:
    """The kind of layer."""

    experts: Annotated[int | None, typer.Option(min=1, help="Experts of the layer.")] = None
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts of a token.")] = None
    hidden_size: Annotated[int | None, typer.Option(min=1)] = None
    intermediate_size: Annotated[int | None, typer.Option(min=1, help="Of one expert.")] = None
    gate: Annotated[bool, typer.Option(help="Whether experts have a gate.")] = True
    model: Annotated[
        str | None,
        typer.Option(help="Instead: take it all from the config of a folder or Hub id."),
    ] = None

    def check(self) -> None:
        """Refuse sizes that are none."""
        sizes = (self.experts, self.top_k, self.hidden_size, self.intermediate_size)
        given = [size for size in sizes if size is not None]
        if len(given) != (4 if self.model is None else 0):
            raise typer.BadParameter(
                "give --model, or --experts, --top-k, --hidden-size and --intermediate-size"
            )
        if given and given[1] > given[0]:
            raise typer.BadParameter("--top-k is at most --experts")

    def shapes(self) -> list[LayerShape]:
        """The shapes of the layers."""
        from qmoe.tools.tune import model_shapes
        from qmoe_kernels.tiles import LayerShape

        if self.model is not None:
            return model_shapes(self.model)
        sizes = (self.experts, self.top_k, self.hidden_size, self.intermediate_size)
        return [LayerShape(*cast(tuple[int, int, int, int], sizes), self.gate)]


@dataclass(frozen=True)
class Operands:
    """What the layer multiplies."""

    weights: Annotated[str, typer.Option(help="Some of int8, fp8, bf16.")] = "int8,fp8"
    activations: Annotated[
        str, typer.Option(help="Some of bf16, int8, fp8; 8 bit only with the same weights.")
    ] = "bf16,int8,fp8"
    tokens: Annotated[str, typer.Option(help="Numbers of tokens.")] = "1,4,16,64,256,1024,4096"

    def cells(self, layer: Layer) -> list[Cell]:
        """A cell for each shape, each pair of operands and each number of tokens."""
        layer.check()
        if layer.model is not None:
            check_place(layer.model)
        pairs, counts = _operands(self.weights, self.activations), _token_counts(self.tokens)

        from qmoe_kernels.tile_search import Cell
        from qmoe_kernels.tile_tables import LayerKind

        return [
            Cell(LayerKind(shape, *pair), num_tokens)
            for shape in layer.shapes()
            for pair in pairs
            for num_tokens in counts
        ]


@dataclass(frozen=True)
class Search:
    """How long is searched, and where the outcome goes."""

    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the tables, made if missing.", show_default="$QMOE_CONFIGS"),
    ] = None
    effort: Annotated[
        Literal["quick", "full"], typer.Option(help="Dozens of candidates, or hundreds.")
    ] = "quick"
    seconds_per_cell: Annotated[
        float | None,
        typer.Option(min=0, help="To time for, at most.", show_default="10, or 120 for full"),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Processes that compile; 0 for none.", show_default="all cores but two"
        ),
    ] = None
    commit: Annotated[
        str | None, typer.Option(help="To write down.", show_default="what git says")
    ] = None

    def folder(self) -> Path:
        """Where the tables are."""
        folder = self.output or Path(os.environ.get("QMOE_CONFIGS", ""))
        if folder == Path():
            raise typer.BadParameter("give --output FOLDER, or set QMOE_CONFIGS to one")
        return folder


@grouped
def tune(
    layer: Layer,
    operands: Operands,
    search: Search,
    json_output: Json = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Say why tiles were skipped; show tracebacks.")
    ] = False,
) -> None:
    """Add a kind of layer to this GPU's table of tiles; Ctrl-C leaves what is finished in it."""
    folder, cells = search.folder(), operands.cells(layer)

    from qmoe.tools.tune import Tuning

    tuning = Tuning(
        folder, cells, search.effort, search.seconds_per_cell, search.workers, search.commit
    )
    gpu, path = tuning.table()
    started = time.monotonic()
    done, interrupted = _run(tuning, quiet=json_output, debug=debug)
    succeeded = sum(tuned.found is not None for tuned in done)
    if json_output:
        print_json({"table": str(path), "gpu": gpu, "cells": [asdict(tuned) for tuned in done]})
    else:
        print(f"{path}: {succeeded} cells in {time.monotonic() - started:.0f} s")
    if interrupted:
        print(
            f"qmoe: interrupted; {succeeded} of {len(cells)} cells are in {path}", file=sys.stderr
        )
        raise typer.Exit(interrupted)
    if succeeded < len(done):
        raise typer.Exit(FAILED)


def _run(tuning: Tuning, *, quiet: bool, debug: bool) -> tuple[list[Tuned], int]:
    """The cells that were tuned, each told as it comes; the exit code of an interrupt, or 0."""
    done: list[Tuned] = []
    try:
        with (
            interruptible(),
            progress("tuning", len(tuning.cells)) as bar,
            closing(tuning.run()) as cells,
        ):
            for tuned in cells:
                done.append(tuned)
                bar.advance()
                if not quiet:
                    bar.print(tuned.line(), sys.stdout)
                if debug or tuned.found is None:
                    for error in tuned.errors:
                        bar.print(f"  {' '.join(error.split())[:400]}", sys.stderr)
    except KeyboardInterrupt as interrupt:
        return done, getattr(interrupt, "exit_code", INTERRUPTED)
    return done, 0


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _operands(weights: str, activations: str) -> list[tuple[str, str]]:
    """Every pair that there are kernels for."""
    for option, text in (("weights", weights), ("activations", activations)):
        for word in _words(text):
            if word not in ("int8", "fp8", "bf16"):
                raise typer.BadParameter(f"--{option} {word}: int8, fp8 and bf16 work")
    pairs = [(w, a) for w in _words(weights) for a in _words(activations) if a in (w, "bf16")]
    if not pairs:
        raise typer.BadParameter(
            f"no kernel for --weights {weights!r} with --activations {activations!r}: bf16 goes "
            "with all weights, int8 and fp8 with the same"
        )
    return pairs


def _token_counts(text: str) -> list[int]:
    counts = []
    for word in _words(text):
        if not word.isdecimal() or not int(word):
            raise typer.BadParameter(f"--tokens {word}: positive numbers work, such as 1,16,256")
        counts.append(int(word))
    if not counts:
        raise typer.BadParameter("--tokens: give at least one number")
    return sorted(counts)
