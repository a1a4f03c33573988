"""The command ``qmoe``: cache-report, demo, generate, inspect, tune.

Exit codes: 0; 2 usage; 3 input that cannot be used; 130 interrupted. A failure is one line on
stderr that says what to do; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qmoe.cli.cache_report import cache_report
from qmoe.cli.demo import demo
from qmoe.cli.generate import generate
from qmoe.cli.inspect import inspect
from qmoe.cli.output import FAILED, INTERRUPTED, UNUSABLE, USAGE
from qmoe.cli.tune import tune

app = typer.Typer(
    name="qmoe",
    help="Quantized Mixture-of-Experts inference for Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, inspect, cache_report, demo, tune):
    app.command()(command)
bench = typer.Typer()
bench.command("tune")(tune)
app.add_typer(bench, name="bench", hidden=True)  # what `qmoe tune` was called


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the process's own arguments where none are given.

    Returns:
        the exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return int(app(arguments, prog_name="qmoe", standalone_mode=False) or 0)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except Exception as error:
        if "--debug" in arguments:
            raise
        if hasattr(error, "format_message"):  # typer's usage errors; empty if help was printed
            message = error.format_message()
            return _fail(f"{message} (see qmoe --help)", USAGE) if message else USAGE
        if isinstance(error, (ValueError, OSError)):
            return _fail(str(error), UNUSABLE)
        return _fail(f"{type(error).__name__}: {error} (--debug shows where)", FAILED)


def _fail(message: str, code: int) -> int:
    print(f"qmoe: {' '.join(message.split())}", file=sys.stderr)
    return code


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


if __name__ == "__main__":
    sys.exit(main())
