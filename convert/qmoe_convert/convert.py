"""Convert the experts of a checkpoint to INT8 or FP8, shard by shard: map, plan, write, verify.

Headers give a plan of every byte that will be written (`qmoe_convert.plan`), workers make its
pieces (`qmoe_convert.write`), and everything is read again (`qmoe_convert.verify`).

Work goes to ``OUT.partial``; at the end it is given its name, so OUT is complete or absent
(`qmoe_convert.output`).
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from qmoe.checkpoints.files import CheckpointError, FileVersion, StoredTensor, open_checkpoint
from qmoe.checkpoints.hub import check_revision, why_no_place
from qmoe.sizes import parse_size
from qmoe_convert import ConversionError, SourceError, one_line, read_ahead, why_full
from qmoe_convert.hub import check_name, check_rights, upload
from qmoe_convert.journal import choices, fingerprints
from qmoe_convert.mapping import map_checkpoint
from qmoe_convert.output import Output
from qmoe_convert.plan import Options, Plan, make_plan
from qmoe_convert.report import Report
from qmoe_convert.small_files import DOWNLOADED, warnings_about
from qmoe_convert.verify import verify_shards
from qmoe_convert.workers import Progress
from qmoe_convert.write import rest_bytes, write_rest, write_shards
from qmoe_kernels.quantization import WeightFormat

FORMATS = ("auto", "compressed-tensors", "qmoe")
WEIGHTS = ("int8", "fp8")


def convert(
    model: str | Path,
    out: str | Path,
    *,
    weights: str = "int8",
    format: str = "auto",
    ignore: str | Sequence[str] = (),
    max_shard_size: str | int = "5GB",
    device: str = "auto",
    workers: int | None = None,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    push_to_hub: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert the experts of a Hugging Face checkpoint to 8 bit; every other tensor is copied.

    Args:
        model: a local folder or a Hub id.
        out: the folder to write; it must not exist. It is locked for the whole run.
        weights: ``"int8"`` or ``"fp8"``, per output channel.
        format: ``"compressed-tensors"`` where the checkpoint stores each expert by itself,
            ``"qmoe"`` for all models; ``"auto"`` takes the former where it can.
        ignore: regular expressions, or one; experts modules that it finds stay as they are.
        max_shard_size: as ``"5GB"`` or in bytes.
        device: where weights are quantized, ``"auto"``, ``"cpu"`` or ``"cuda"``; same bytes.
        workers: threads that read and quantize; by default one per core, at most 8.
        dry_run: only read headers and return what would be written.
        resume: go on with a run that was interrupted; the result is the same to the byte. A shard
            that is whole is kept if it was not touched since, or has the same SHA-256.
        overwrite: replace ``out`` if it is empty or what an earlier conversion wrote, and start an
            interrupted run afresh; with ``resume``, go on with it and replace ``out`` at the end.
        verify: read everything that was written and compare it with the source.
        push_to_hub: repository to upload to afterwards; whether that may be is asked before.
        revision: of a Hub id.
        progress: called from time to time with (stage, bytes done, bytes in all).

    Returns:
        Sizes, errors and warnings.

    Raises:
        ConversionError: the input cannot be converted, another process writes ``out``, or writing
            failed. ``out`` is untouched.
        FileExistsError: ``out`` is there, or what an interrupted run left.
        VerificationError: what was written is not what it should be.
        ValueError: an option has no such value.

    Example::

        report = convert("Qwen/Qwen3-30B-A3B", "qwen3-int8", weights="int8")
        print(report.bits_per_weight, report.worst_error)
    """
    start = time.monotonic()
    progress = progress or (lambda stage, done, total: None)
    output = Output(Path(out), progress)
    options = _check_options(output, weights, format, ignore, max_shard_size, device, workers)
    if push_to_hub is not None:
        check_name(push_to_hub)
    with _explained(output.out), nullcontext() if dry_run else output.held():
        if not dry_run:
            output.open(resume=resume, overwrite=overwrite)
            push_to_hub = push_to_hub and check_rights(push_to_hub)
        folder, source_name = find_source(model, revision)
        source = _Source.open(folder, source_name)
        output.check_apart(folder, source.versions)
        plan = make_plan(map_checkpoint(folder, source.tensors), source.tensors, options)
        plan.report.warnings += warnings_about(folder)
        if not dry_run:
            _convert(plan, source, output, options, progress, resume=resume, verify=verify)
            if push_to_hub is not None:
                upload(output.out, push_to_hub)
    plan.report.seconds = time.monotonic() - start
    return plan.report


@dataclass(frozen=True)
class _Source:
    """The checkpoint that is read: its folder, and the name that the manifest gives it.

    Attributes:
        tensors: every tensor's place.
        config: config.json.
        versions: of every file that decides what is written.
    """

    folder: Path
    name: str
    tensors: dict[str, StoredTensor]
    config: bytes
    versions: dict[Path, FileVersion]

    @classmethod
    def open(cls, folder: Path, name: str) -> _Source:
        file = folder / "config.json"
        versions = {file: FileVersion.of(file)} if file.is_file() else {}
        config = file.read_bytes() if file.is_file() else b""  # map_checkpoint says what is wrong
        tensors = open_checkpoint(folder)
        versions |= {tensor.file: tensor.version for tensor in tensors.values() if tensor.version}
        read_ahead(versions)
        return cls(folder, name, tensors, config, versions)

    def check(self) -> None:
        """Refuse what was made of it if it changed meanwhile.

        Raises:
            CheckpointError: a file is not what it was.
        """
        for file, version in self.versions.items():
            version.check(file)


def _convert(
    plan: Plan,
    source: _Source,
    output: Output,
    options: Options,
    progress: Progress,
    *,
    resume: bool,
    verify: bool,
) -> None:
    """Write what is planned, or what of it an interrupted run has not, and publish it."""
    journal, report = output.journal, plan.report
    shards = fingerprints(plan, source.tensors, source.config, source.name)
    asked = choices(plan, options, source.name)
    if output.published:
        journal.keep(plan, asked, shards, output.out)
    else:
        if resume:
            journal.keep(plan, asked, shards, output.new)
        journal.options = asked
        todo = [s.nbytes for s in plan.shards if not resume or s.name not in journal.shards]
        output.begin(sum(todo) + rest_bytes(plan, source.folder), resume=resume)
        try:
            write_shards(plan, source.tensors, output, shards, options, progress)
            write_rest(plan, output, source.folder, source.name)
            if verify:
                verify_shards(plan, source.tensors, output, options, progress)
            source.check()
        except (SourceError, CheckpointError):
            if not journal.shards:  # nothing to go on with
                output.clean()
            raise
        output.publish()
    report.errors = journal.errors(plan)
    report.verified = all(entry.verified for entry in journal.shards.values())
    try:
        output.clean()
    except OSError as error:
        report.warnings.append(f"{output.work}: cannot be removed ({error.strerror}); remove it")


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Say in one line what is wrong with a file."""
    try:
        yield
    except CheckpointError as error:
        raise SourceError(str(error)) from None
    except FileExistsError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        # Of a copy that fails for want of room, the second is the one written.
        name = (full and error.filename2) or error.filename or out
        if full:
            text = f"{why_full(Path(name))}, then go on with --resume"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            text = f"no permission ({error.strerror}); change the folder or its permissions"
        else:
            text = str(error.strerror or error)
        raise ConversionError(f"{name}: {text}") from None


def _check_options(
    output: Output,
    weights: str,
    format: str,
    ignore: str | Sequence[str],
    max_shard_size: str | int,
    device: str,
    workers: int | None,
) -> Options:
    for name, value, allowed in (
        ("weights", weights, WEIGHTS),
        ("format", format, FORMATS),
        ("device", device, ("auto", "cpu", "cuda")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}; {', '.join(allowed)} work")
    ignore = [ignore] if isinstance(ignore, str) else ignore
    for pattern in ignore:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"ignore: {pattern!r} is not a regular expression: {error}") from None
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}; at least 1 is needed")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch finds no GPU; use 'cpu'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return Options(
        str(output.out),
        cast(WeightFormat, weights),
        format,
        tuple(ignore),
        parse_size(max_shard_size),
        torch.device(device),
        workers or min(cores, 8),
    )


# Source and target


def find_source(model: str | Path, revision: str | None) -> tuple[Path, str]:
    """The folder of a local or Hub checkpoint, and the name that the manifest gives it."""
    text = str(model)
    if why := why_no_place(text, hub=not isinstance(model, Path)):
        raise ConversionError(why)
    check_revision(model, revision)
    folder = Path(model)
    if folder.is_dir():
        return folder, folder.resolve().name
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(text, revision=revision, allow_patterns=list(DOWNLOADED))
    except Exception as error:  # no such repository, no access, no network: the Hub's many errors
        raise ConversionError(
            f"{text}: no such folder, and it cannot be had from the Hub: {one_line(error)}"
        ) from None
    return Path(snapshot), text
