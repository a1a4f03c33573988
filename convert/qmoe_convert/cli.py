"""The command ``convert-checkpoint``. How it ends, and exit codes: :mod:`qmoe.exits`.

torch and transformers take seconds to import, so this happens after arguments and paths are
checked.
"""

from __future__ import annotations

import errno
import gc
import json as json_module
import os
import sys
import time
import warnings as python_warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qmoe.checkpoints.hub import check_place, check_revision
from qmoe.exits import UNUSABLE, USAGE, interruptible, run
from qmoe.progress import redraws
from qmoe.sizes import format_size, parse_size
from qmoe_convert import ConversionError, read_ahead, why_full

if TYPE_CHECKING:
    from qmoe_convert.report import Report

# Without a terminal, a line of progress now and then.
SECONDS_BETWEEN_LINES = 5.0

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes longer to import than all the rest of --help
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from qmoe import __version__

        print(f"convert-checkpoint {__version__}")
        raise typer.Exit


def _readable_size(size: str) -> str:
    try:
        parse_size(size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return size


@app.command()
def command(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the checkpoint.")],
    out: Annotated[str, typer.Option("-o", "--out", help="Folder to write.")],
    weights: Annotated[
        Literal["int8", "fp8"],
        typer.Option(help="8-bit format of the experts, scaled per output channel."),
    ] = "int8",
    format: Annotated[
        Literal["auto", "compressed-tensors", "qmoe"],
        typer.Option(help="auto: compressed-tensors if experts are stored one by one, else qmoe."),
    ] = "auto",
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Leave experts modules that match as they are."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(callback=_readable_size, help="Largest file to write.")
    ] = "5GB",
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="Where to quantize; the bytes are the same."),
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that read and quantize.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read headers only and print the plan.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace OUT if it is ours or empty, and, without --resume, start afresh.",
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Read everything again and compare it with the source.")
    ] = True,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the result to this repository.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print nothing but one JSON object on stdout.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Convert the experts of a Mixture-of-Experts checkpoint to INT8 or FP8.

    OUT is complete or absent. Exit codes: 0 done, 2 wrong usage, 3 not converted, 4 verification
    failed, 129 hung up, 130 interrupted, 143 terminated.
    """
    check_place(model)
    check_revision(model, revision)
    if not out:
        raise ValueError("--out is empty; give the folder to write")
    if not dry_run:
        if os.path.lexists(out) and not (resume or overwrite):
            raise FileExistsError(f"{out} exists; choose another folder or use --overwrite")
        _check_writable(Path(out))
        with suppress(OSError):  # what is wrong is said later
            read_ahead(file for file in sorted(Path(model).glob("*.safetensors")) if file.is_file())
    # Warnings of libraries are about their own use, not about the checkpoint.
    python_warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    convert = _imported()

    note = "" if dry_run else "go on with --resume"
    with interruptible(note), _progress(show=not (json or dry_run)) as progress:
        report = convert(
            model,
            out,
            weights=weights,
            format=format,
            ignore=ignore or (),
            max_shard_size=max_shard_size,
            device=device,
            workers=workers,
            dry_run=dry_run,
            resume=resume,
            overwrite=overwrite,
            verify=verify,
            push_to_hub=push_to_hub,
            revision=revision,
            progress=progress,
        )
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if json:
        print(json_module.dumps({"dry_run": dry_run, **report.to_dict()}, indent=2))
    else:
        print(describe_plan(report) if dry_run else describe_result(report))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, with the process's own arguments if none are given.

    Returns:
        the exit code.
    """
    # Refused arguments of convert() are wrong usage, what stands in OUT's way as well.
    codes = {
        ConversionError: UNUSABLE,
        FileExistsError: USAGE,
        ValueError: USAGE,
        OSError: UNUSABLE,
    }
    return run(app, "convert-checkpoint", arguments, codes)


def _check_writable(out: Path) -> None:
    """Refuse a folder that cannot be made, before anything is read.

    Permissions do not tell: /proc and a read-only disk let nobody make anything.
    """
    import tempfile

    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder; create it first")
    try:
        with interruptible():
            tempfile.TemporaryDirectory(prefix=".qmoe-", dir=out.absolute().parent).cleanup()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = why_full(out.absolute()) if full else error.strerror
        raise OSError(f"{out}: cannot be made ({why}); choose another folder with -o") from None


def _imported() -> Callable[..., Report]:
    """Import the converter.

    Imports make a million objects that all stay: to look for garbage among them takes a quarter of
    their time, and later some of each search.
    """
    gc.disable()
    try:
        from qmoe_convert.convert import convert
    finally:
        gc.freeze()
        gc.enable()
    return convert


# What people see


@contextmanager
def _progress(show: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar with bytes, rate and time left; lines if stderr is no terminal."""
    if not show:
        yield None
    elif not redraws(sys.stderr):
        yield _Lines()
    else:
        from qmoe.progress import progress

        with progress(unit="bytes") as bars:
            yield bars.update


class _Lines:
    """Progress as plain lines on stderr, at most one every few seconds and one at the end."""

    def __init__(self) -> None:
        self.stage = ""
        self.start = self.last = time.monotonic()
        self.first_done = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.start, self.last, self.first_done = stage, now, now, done
        if now - self.last < SECONDS_BETWEEN_LINES and done < total:
            return
        self.last = now
        rate = (done - self.first_done) / max(now - self.start, 1e-3)
        left = (total - done) / rate if rate else 0.0
        print(
            f"{stage}: {format_size(done)} of {format_size(total)}, {format_size(rate)}/s, "
            f"{left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def describe_plan(report: Report) -> str:
    """The plan of a dry run, for people."""
    kept = f"{report.num_kept} tensors copied"
    if report.num_dequantized:
        kept += f", {report.num_dequantized} brought back to 16 bit"
    if report.skipped_modules:
        kept += f"; experts modules {_some(report.skipped_modules)}"
    rows = [
        ("format", f"{report.format}, {report.weights} per output channel"),
        ("quantize", f"{len(report.quantized_modules)} experts modules: "
                     f"{_some(report.quantized_modules)}"),
        ("keep", kept),
        ("size", f"{format_size(report.source_bytes)} -> {format_size(report.output_bytes)} "
                 f"in {len(report.shards)} file{'s' if len(report.shards) > 1 else ''}, "
                 f"{report.bits_per_weight:.2f} bits per quantized weight"),
        ("read by", report.readers),
        ("memory", f"about {format_size(report.peak_memory_bytes)} at most"),
        ("write", f"{report.out} (nothing was written: --dry-run)"),
    ]  # fmt: skip
    return "\n".join(f"{name:<9} {text}" for name, text in rows)


def describe_result(report: Report) -> str:
    """What a conversion did, for people."""
    from qmoe.checkpoints.schema import summarize_errors

    lines = [
        f"{report.out}: {report.format}, {report.weights}, in {report.seconds:.1f} s"
        + (", verified" if report.verified else ", not verified"),
        f"size      {format_size(report.source_bytes)} -> {format_size(report.output_bytes)}, "
        f"{report.bits_per_weight:.2f} bits per quantized weight",
        "relative error of the quantized weights:",
    ]
    lines += [
        f"  {projection:<12} median {found['median']:.3%}, worst {found['worst']:.3%} "
        f"({found['worst_module']})"
        for projection, found in summarize_errors(report.errors).items()
    ]
    lines.append(f"read by   {report.readers}")
    return "\n".join(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} ... {names[-1]}"
