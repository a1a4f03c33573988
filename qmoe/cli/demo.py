"""``qmoe demo``: one model in 16 bit, INT8 and FP8, side by side."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmoe.cli.output import Debug, Json, print_json, print_table, quiet
from qmoe.exits import interruptible
from qmoe.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from qmoe.tools.demo import Demo


def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Another 16-bit model's folder.", show_default="examples/tiny-moe"),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; repeatable.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="At most so many for each prompt.")
    ] = 48,
    out: Annotated[
        Path | None,
        typer.Option(help="Keep the converted models here.", show_default="a temporary folder"),
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Convert the shipped model to INT8 and FP8, and set both beside the original."""
    if model is not None and not model.is_dir():
        raise FileNotFoundError(f"{model}: no such folder")

    from qmoe.tools.demo import run_demo

    quiet()
    with interruptible():
        result = run_demo(
            model,
            prompts=prompt or None,
            max_new_tokens=max_new_tokens,
            out=out,
            progress=lambda message: print(message, file=sys.stderr, flush=True),
        )
    if json_output:
        print_json(dataclasses.asdict(result))
    else:
        print_table(_demo_table(result))


def _demo_table(result: Demo) -> Table:
    from rich.table import Table

    table = Table(title=f"{result.model}: 16 bit, INT8, FP8", title_justify="left", show_lines=True)
    table.add_column("", style="bold")
    for variant in result.variants:
        table.add_column(variant.name, ratio=1)

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    variants = result.variants
    row("on disk", [format_size(v.disk_bytes) for v in variants])
    row("experts in memory", [format_size(v.expert_bytes) for v in variants])
    row("bits per expert weight", [f"{v.bits_per_expert_weight:.2f}" for v in variants])
    row(
        f"perplexity\n({result.perplexity_tokens} tokens,\nwindows of {result.window})",
        [f"{v.perplexity:.4f} ({v.perplexity_change:+.2%})" for v in variants],
    )
    row("decode tokens/s", [f"{v.decode_tokens_per_second or 0:.0f}" for v in variants])
    for index, prompt in enumerate(result.prompts):
        row(prompt.rstrip(), [v.texts[index] for v in variants])
    return table
