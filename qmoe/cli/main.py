"""The command ``qmoe``. How it ends, and exit codes: :mod:`qmoe.exits`.

What a command needs of torch and transformers it imports when it runs, after its options and paths
are checked: help and mistakes answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from qmoe.cli.adapt_router import adapt_router
from qmoe.cli.cache_report import cache_report
from qmoe.cli.demo import demo
from qmoe.cli.generate import generate
from qmoe.cli.inspect import inspect
from qmoe.cli.merge import merge
from qmoe.cli.serve import serve
from qmoe.cli.tune import tune
from qmoe.exits import run

app = typer.Typer(
    name="qmoe",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes longer to import than all the rest of --help
)
for command in (generate, inspect, serve, merge, adapt_router, cache_report, demo, tune):
    app.command()(command)
bench = typer.Typer()
bench.command("tune")(tune)
app.add_typer(bench, name="bench", hidden=True)  # what `qmoe tune` was called


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the process's own arguments where none are given.

    Returns:
        the exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    return run(app, "qmoe", arguments or ["--help"])


def _print_version(wanted: bool) -> None:
    if wanted:
        from qmoe import __version__

        print(f"qmoe {__version__}")
        raise typer.Exit


@app.callback()
def _qmoe(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version.",
        ),
    ] = False,
) -> None:
    """Quantized Mixture-of-Experts inference for Hugging Face transformers."""
