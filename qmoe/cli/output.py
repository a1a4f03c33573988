"""What the commands have in common: options of all, and how they print."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from qmoe.progress import redraws

if TYPE_CHECKING:
    from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]


def readable_size(size: str | None) -> str | None:
    """What an option that takes a size calls back: it is refused where it is none."""
    if size is not None:
        from qmoe.sizes import parse_size

        try:
            parse_size(size)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return size


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let options travel whole: a command's parameter may be a dataclass of options.

    typer sees each field as an option; the command gets the dataclass.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            kind = Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(kind=kind, annotation=hints[name]))
            continue
        options = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            default = Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                Parameter(
                    field.name,
                    Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=options[field.name],
                )
            )

    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def quiet() -> None:
    """Keep the libraries' remarks off stderr, which is for statistics and failures."""
    from qmoe.generation import hide_progress_bars

    for library in ("transformers", "accelerate"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if not redraws(sys.stderr):
        hide_progress_bars()


def print_json(document: dict[str, Any]) -> None:
    """Print one document for programs."""
    print(json.dumps(document, indent=2))  # ASCII: every terminal and pipe takes it


def print_table(table: Table) -> None:
    """Print a table for people, in characters that every terminal shows."""
    from rich.box import ASCII2
    from rich.console import Console

    table.box = ASCII2
    for column in table.columns:
        column.overflow = "fold"  # not an ellipsis
    # Not a terminal, or a dumb one (then rich wants a height too): rich would assume 80 columns.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    # What cells hold is text, not rich's markup.
    console = Console(width=width, height=25, markup=False, emoji=False, highlight=False)
    console.print(table)
