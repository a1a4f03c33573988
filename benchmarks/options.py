"""The command line that benchmarks with sections have in common."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

import torch


def parser_of(
    description: str | None,
    sections: Collection[str],
    results: Path,
    on_request: Collection[str] = (),
) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have.

    Args:
        description: the benchmark's docstring, whose first line is shown.
        sections: that there are.
        results: where they are written if nothing else is said.
        on_request: sections that run only where they are named.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    default = ",".join(name for name in sections if name not in on_request)
    parser.add_argument("--only", default=default, help="sections, with commas: %(default)s")
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--draw", action="store_true", help="draw what --out holds, run nothing")
    parser.add_argument("--tiny", action="store_true", help="small sizes, as a test")
    parser.add_argument("--commit", help="to write down, where there is no git")
    return parser


def check(
    parser: argparse.ArgumentParser, options: argparse.Namespace, sections: Collection[str]
) -> list[str]:
    """As `check_sections`, for a benchmark that needs a GPU."""
    only = check_sections(parser, options, sections)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("this needs a GPU; --tiny runs on the CPU")
    return only


def check_sections(
    parser: argparse.ArgumentParser, options: argparse.Namespace, sections: Collection[str]
) -> list[str]:
    """The sections that were asked for; ends the process where options cannot be."""
    only: list[str] = options.only.split(",")
    check_names(parser, "section", only, sections)
    if options.tiny and options.out == parser.get_default("out"):
        parser.error("--tiny measures nothing worth keeping: give it another --out")
    return only


def check_names(
    parser: argparse.ArgumentParser, what: str, asked: Collection[str], there: Collection[str]
) -> None:
    """End the process if ``asked`` has names that are not ``there``."""
    if unknown := set(asked) - set(there):
        parser.error(f"no {what} {', '.join(sorted(unknown))}; there are {', '.join(there)}")
