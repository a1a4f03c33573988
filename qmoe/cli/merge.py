"""``qmoe merge``: an adapter becomes a part of a checkpoint's weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from qmoe.cli.output import Debug, Json, print_json, quiet
from qmoe.exits import interruptible
from qmoe.sizes import format_size


def merge(
    checkpoint: Annotated[
        Path, typer.Argument(help="A model's folder, 16 bit or converted.", metavar="CHECKPOINT")
    ],
    adapter: Annotated[
        Path, typer.Argument(help="The folder of a LoRA adapter of PEFT.", metavar="ADAPTER")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    weights: Annotated[
        Literal["int8", "fp8"] | None,
        typer.Option(help="Quantize the merged experts.", show_default="16 bit"),
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint with an adapter merged into its weights.

    OUT is complete or absent. The model is loaded in 16 bit, on the CPU.
    """
    from qmoe.tools import merge as tool

    try:
        tool.check_arguments(checkpoint, adapter, out, weights)
    except FileExistsError as error:
        raise typer.BadParameter(str(error), param_hint="-o") from None
    quiet()
    with interruptible():
        tool.merge(
            checkpoint,
            adapter,
            out,
            weights=weights,
            progress=lambda message: print(message, file=sys.stderr, flush=True),
        )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if json_output:
        print_json({"out": str(out), "weights": weights, "bytes": size})
    else:
        print(f"{out}: {weights or '16 bit'}, {format_size(size)}")
