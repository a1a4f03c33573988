"""Convert the experts of a checkpoint to INT8 or FP8, shard by shard: map, plan, write, verify.

Headers give a plan of every byte that will be written (`qmoe_convert.plan`), workers make its
pieces (`qmoe_convert.write`), and everything is read again (`qmoe_convert.verify`).

Work goes to ``OUT.partial``; at the end the folder is renamed, so OUT is complete or absent.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch

from qmoe.checkpoints.files import CheckpointError, StoredTensor, open_checkpoint
from qmoe.checkpoints.hub import is_hub_id
from qmoe.sizes import parse_size
from qmoe_convert import ConversionError, SourceError
from qmoe_convert.mapping import map_checkpoint
from qmoe_convert.plan import Options, make_plan
from qmoe_convert.report import Report
from qmoe_convert.shards import PARTIAL_SUFFIX
from qmoe_convert.small_files import DOWNLOADED, warnings_about
from qmoe_convert.verify import verify_shards
from qmoe_convert.workers import Progress
from qmoe_convert.write import (
    JOURNAL_NAME,
    Journal,
    fingerprint,
    remove,
    write_rest,
    write_shards,
)
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
        out: the folder to write; it must not exist.
        weights: ``"int8"`` or ``"fp8"``, per output channel.
        format: ``"compressed-tensors"`` where the checkpoint stores each expert by itself,
            ``"qmoe"`` for all models; ``"auto"`` takes the former where it can.
        ignore: regular expressions, or one; experts modules that it finds stay as they are.
        max_shard_size: as ``"5GB"`` or in bytes.
        device: where weights are quantized, ``"auto"``, ``"cpu"`` or ``"cuda"``; same bytes.
        workers: threads that read and quantize; by default one per core, at most 8.
        dry_run: only read headers and return what would be written.
        resume: go on with a run that was interrupted; the result is the same to the byte.
        overwrite: replace ``out``, and start an interrupted run afresh.
        verify: read everything that was written and compare it with the source.
        push_to_hub: repository to upload to afterwards.
        revision: of a Hub id.
        progress: called from time to time with (stage, bytes done, bytes in all).

    Returns:
        Sizes, errors and warnings.

    Raises:
        ConversionError: the input cannot be converted, or writing failed. ``out`` is untouched.
        VerificationError: what was written is not what it should be.
        ValueError: an option has no such value.

    Example::

        report = convert("Qwen/Qwen3-30B-A3B", "qwen3-int8", weights="int8")
        print(report.bits_per_weight, report.worst_error)
    """
    start = time.monotonic()
    out = Path(out)
    partial = out.with_name(out.name + PARTIAL_SUFFIX)
    options = _check_options(out, weights, format, ignore, max_shard_size, device, workers)
    if not dry_run:
        _check_target(out, partial, resume=resume, overwrite=overwrite)
    folder, source_name = _find_source(model, revision)
    _check_apart(folder, out, partial)
    with _explained():
        tensors = open_checkpoint(folder)
        _read_ahead(tensors)
        plan = make_plan(map_checkpoint(folder, tensors), tensors, options)
        plan.report.warnings += warnings_about(folder)
    if not dry_run:
        try:
            with _explained():
                if not resume:
                    remove(partial)
                journal = Journal(partial, fingerprint(plan, tensors, source_name))
                journal.open(plan)
                progress = progress or (lambda stage, done, total: None)
                write_shards(plan, tensors, journal, options, progress)
                write_rest(plan, journal, folder, source_name)
                if verify:
                    verify_shards(plan, tensors, journal, options, progress)
                _publish(partial, out)
        except SourceError:
            # The source has to change first, so there is nothing to go on with.
            remove(partial)
            raise
        plan.report.errors, plan.report.verified = journal.errors(plan), verify
        if push_to_hub is not None:
            _push(out, push_to_hub)
    plan.report.seconds = time.monotonic() - start
    return plan.report


@contextmanager
def _explained() -> Iterator[None]:
    """Say in one line what is wrong with a file."""
    try:
        yield
    except CheckpointError as error:
        raise SourceError(str(error)) from None
    except OSError as error:
        name = error.filename if error.filename is not None else "the output"
        if error.errno == errno.ENOSPC:
            text = "the disk is full; make room, then go on with --resume"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            text = f"no permission ({error.strerror}); change the folder or its permissions"
        else:
            text = str(error.strerror or error)
        raise ConversionError(f"{name}: {text}") from None


def _check_options(
    out: Path,
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
        str(out),
        cast(WeightFormat, weights),
        format,
        tuple(ignore),
        parse_size(max_shard_size),
        torch.device(device),
        workers or min(cores, 8),
    )


# Source and target


def _find_source(model: str | Path, revision: str | None) -> tuple[Path, str]:
    """The folder of a local or Hub checkpoint, and the name that the manifest gives it."""
    folder = Path(model)
    if folder.is_dir():
        return folder, folder.resolve().name
    text = str(model)
    if folder.exists():
        raise ConversionError(f"{text}: a file; give the folder that holds config.json")
    if isinstance(model, Path) or not is_hub_id(text):
        raise ConversionError(f"{text}: no such folder, and no Hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(text, revision=revision, allow_patterns=list(DOWNLOADED))
    except Exception as error:  # no such repository, no access, no network: the Hub's many errors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConversionError(
            f"{text}: no such folder, and it cannot be had from the Hub: {reason}"
        ) from None
    return Path(snapshot), text


def _check_target(out: Path, partial: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise FileExistsError(f"{out} exists; choose another folder or use --overwrite")
    if partial.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"{partial} is left from an interrupted run; use --resume to go on with it "
            "or --overwrite to start afresh"
        )
    if not out.parent.resolve().is_dir():
        raise ConversionError(f"{out.parent}: no such folder; create it first")


def _check_apart(folder: Path, out: Path, partial: Path) -> None:
    source = folder.resolve()
    for target in (out.resolve(), partial.resolve()):
        if target == source or target in source.parents:
            raise ConversionError(f"{out}: would replace the checkpoint that is read, {folder}")


def _read_ahead(tensors: dict[str, StoredTensor]) -> None:
    """Ask the disk for the first gigabytes while names are mapped."""
    if not hasattr(os, "posix_fadvise"):
        return
    left = 4 << 30
    for file in dict.fromkeys(tensor.file for tensor in tensors.values()):
        size = min(left, file.stat().st_size)
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
        left -= size
        if left <= 0:
            return


def _publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name; what stood there before goes only then."""
    (partial / JOURNAL_NAME).unlink(missing_ok=True)
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    replaced = out.with_name(out.name + ".replaced")
    if out.exists() or out.is_symlink():
        remove(replaced)
        out.rename(replaced)
    partial.rename(out)
    remove(replaced)
    _sync(out.parent)


def _sync(path: Path) -> None:
    """Make a file's contents, or a folder's entries, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _push(out: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=out)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConversionError(
            f"{out} is complete, but uploading it to {repository} failed: {reason}"
        ) from None
