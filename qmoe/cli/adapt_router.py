"""``qmoe adapt-router``: let the routers of a converted model learn from its original."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qmoe.checkpoints.hub import check_place
from qmoe.cli.output import Debug, Json, grouped, print_json, quiet, readable_size
from qmoe.exits import interruptible
from qmoe.progress import progress

if TYPE_CHECKING:
    from qmoe.tools.adapt_router import Adapted


@dataclass(frozen=True)
class Learning:
    """How routers learn, as :func:`qmoe.tools.adapt_router.adapt_router` takes it."""

    window: Annotated[int, typer.Option(min=2, help="Tokens that are read in one piece.")] = 512
    steps: Annotated[int, typer.Option(min=1, help="Of the optimizer.")] = 200
    batch: Annotated[int, typer.Option(min=1, help="Windows of a step.")] = 8
    lr: Annotated[float, typer.Option(min=0, max=1, help="The highest learning rate.")] = 5e-4
    layers: Annotated[
        float,
        typer.Option(min=0, help="Weight of each layer's output in the loss; 0: logits alone."),
    ] = 0.0
    seed: Annotated[
        int, typer.Option(min=0, max=2**64 - 1, help="Of the order of the text's windows.")
    ] = 0
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Of what is not quantized, and of the teacher; auto: as it is stored."),
    ] = "auto"
    teacher_memory: Annotated[
        str | None,
        typer.Option(
            callback=readable_size,
            help="The teacher's weights may take so much of the device; the others are read from "
            "disk as it runs.",
            show_default="what is free",
        ),
    ] = None


@grouped
def adapt_router(
    converted: Annotated[
        str, typer.Argument(help="A converted model's folder or Hub id.", metavar="CONVERTED")
    ],
    teacher: Annotated[
        str, typer.Option(metavar="SOURCE", help="The 16-bit model that it was converted from.")
    ],
    data: Annotated[
        list[Path],
        typer.Option(help="Text in UTF-8, of which the last tenth is held out; repeatable."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    learning: Learning,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Train a converted model's routers, and nothing else, to say what its original says.

    OUT is complete or absent.
    """
    check_place(converted)
    check_place(teacher)
    for file in data:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; --data takes text in UTF-8")
    if os.path.lexists(out) and not resume:
        raise typer.BadParameter(f"{out} exists; choose another folder")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder; create it first")

    from qmoe.tools.adapt_router import adapt_router as run

    quiet()
    with interruptible("go on with --resume"), progress() as bars:

        def say(line: str) -> None:
            if not json_output:
                bars.print(line, sys.stderr)

        try:
            adapted = run(
                converted,
                out,
                teacher=teacher,
                data=data,
                **asdict(learning),
                resume=resume,
                progress=bars.update,
                say=say,
            )
        except FileExistsError as error:
            raise typer.BadParameter(str(error)) from None
    if json_output:
        print_json({**asdict(adapted), "won_back": adapted.won_back})
    else:
        print("\n".join(_lines(adapted)))


def _lines(adapted: Adapted) -> list[str]:
    a = adapted
    lines = [
        f"{a.out}: routers of {a.weights} weights, {a.steps} steps, {a.seconds:.0f} s",
        f"held out   {a.held_out_windows} windows of {a.window} tokens",
        f"KL         {a.before.kl:.5f} -> {a.after.kl:.5f}",
        f"perplexity {a.before.perplexity:.4f} -> {a.after.perplexity:.4f}, the teacher's is "
        f"{a.teacher_perplexity:.4f}"
        + ("" if a.won_back is None else f": {a.won_back:.0%} of the loss won back"),
    ]
    if a.after.step == 0:
        lines.append("no state was better than the start: the routers are as they were")
    return lines
