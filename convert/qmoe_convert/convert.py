"""Convert the experts of a checkpoint to INT8 or FP8, shard by shard.

Headers give a plan of every byte that will be written (`qmoe_convert.plan`). Workers read and
quantize its pieces; the calling thread takes them in order, writes and hashes. Pieces in flight are
bounded in bytes, so memory does not depend on the checkpoint's size.

Work goes to ``OUT.partial``, with a journal of the shards that are whole; at the end the folder is
renamed, so OUT is complete or absent.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from qmoe.checkpoints.files import (
    INDEX_NAME,
    CheckpointError,
    StoredTensor,
    is_hub_id,
    open_checkpoint,
)
from qmoe.checkpoints.schema import (
    COMPRESSED_TENSORS,
    Manifest,
    Shard,
    compressed_tensors_config,
    qmoe_config,
)
from qmoe.sizes import format_size, parse_size
from qmoe_convert.plan import (
    Copy,
    Load,
    Piece,
    Plan,
    PlanError,
    Quantize,
    Scales,
    Weight,
    make_plan,
)
from qmoe_convert.shards import (
    PARTIAL_SUFFIX,
    BufferPool,
    Reader,
    ShardWriter,
    read_into,
)
from qmoe_convert.verify import VerificationError, verify_shard
from qmoe_kernels.quantization import STORAGE_DTYPE, WeightFormat, quantize_with_squares

JOURNAL_NAME = "journal.json"
FORMATS = ("auto", "compressed-tensors", "qmoe")
WEIGHTS = ("int8", "fp8")

# Bytes of memory that pieces in flight may take; one is always let in.
IN_FLIGHT_BYTES = 256 << 20
# What Python, torch and transformers take before the first piece is read.
BASELINE_BYTES = 600 << 20

# Small files that belong to a checkpoint; weights, code and whatever could run code do not.
COPIED_SUFFIXES = (
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".md",
    ".tiktoken",
    ".vocab",
    ".merges",
    ".spm",
)
COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY", "COPYING")
DOWNLOADED = ("*.safetensors", "*.json", *(f"*{s}" for s in COPIED_SUFFIXES), *COPIED_NAMES)

Progress = Callable[[str, int, int], None]
"""Called with the stage ("convert" or "verify"), source bytes done, and source bytes in all."""

T = TypeVar("T")


class ConversionError(ValueError):
    """A conversion that cannot be done or went wrong.

    The message is one line that names the file or tensor and says what to do.
    """


class _BadWeight(ConversionError):
    """A NaN or an infinity in the source."""


@dataclass
class Report:
    """What a conversion did, or, after a dry run, would do.

    Attributes:
        out: the new checkpoint.
        format: ``"compressed-tensors"`` or ``"qmoe"``.
        weights: ``"int8"`` or ``"fp8"``.
        source_bytes, output_bytes: of all tensors.
        bits_per_weight: of the quantized weights on disk, scales included.
        quantized_modules, skipped_modules: experts modules, by name.
        num_kept, num_dequantized: other tensors that were copied, and brought back to 16 bit.
        shards: file name -> bytes.
        peak_memory_bytes: an estimate from the plan.
        errors: experts module -> projection -> relative error (Frobenius) over every 16th row;
            empty after a dry run.
        warnings: what the user should know.
        verified: whether everything was read again and compared.
        seconds: wall time.
    """

    out: str
    format: str
    weights: str
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    quantized_modules: list[str]
    skipped_modules: list[str]
    num_kept: int
    num_dequantized: int
    shards: dict[str, int]
    peak_memory_bytes: int
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    verified: bool = False
    seconds: float = 0.0

    @property
    def worst_error(self) -> tuple[str, float]:
        """The tensor with the largest relative error, and that error."""
        named = [(f"{m}.{p}", e) for m, errors in self.errors.items() for p, e in errors.items()]
        return max(named, key=lambda pair: pair[1])

    @property
    def median_error(self) -> float:
        """The median relative error over layers and projections."""
        return statistics.median(e for errors in self.errors.values() for e in errors.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        result = asdict(self)
        if self.errors:
            name, error = self.worst_error
            result["worst_error"] = {"name": name, "error": error}
            result["median_error"] = self.median_error
        return result


def convert(
    model: str | Path,
    out: str | Path,
    *,
    weights: str = "int8",
    format: str = "auto",
    ignore: Sequence[str] = (),
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
        ignore: regular expressions; experts modules that one of them finds stay as they are.
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
    options = _check_options(weights, format, ignore, max_shard_size, device, workers)
    out = Path(out)
    partial = out.with_name(out.name + PARTIAL_SUFFIX)
    if not dry_run:
        _check_target(out, partial, resume=resume, overwrite=overwrite)
    folder, source_name = _find_source(model, revision)
    _check_apart(folder, out, partial)

    # transformers takes seconds to import: after everything that can fail without it.
    from qmoe_convert.mapping import MappingError, map_checkpoint

    try:
        tensors = open_checkpoint(folder)
        _read_ahead(tensors)
        mapping = map_checkpoint(folder, tensors)
        plan = make_plan(
            mapping,
            tensors,
            weights=weights,
            format=format,
            ignore=ignore,
            max_shard_size=options.max_shard_size,
        )
    except (CheckpointError, MappingError, PlanError) as error:
        raise ConversionError(str(error)) from None
    except OSError as error:
        raise ConversionError(_os_error(error)) from None

    report = Report(
        out=str(out),
        format=plan.format,
        weights=weights,
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        bits_per_weight=plan.bits_per_weight,
        quantized_modules=plan.quantized_modules,
        skipped_modules=plan.skipped_modules,
        num_kept=plan.num_kept,
        num_dequantized=plan.num_dequantized,
        shards={shard.name: shard.nbytes for shard in plan.shards},
        peak_memory_bytes=_peak_memory(plan, options.workers),
        warnings=plan.warnings,
    )
    if dry_run:
        report.seconds = time.monotonic() - start
        return report

    try:
        if not resume:
            _remove(partial)
        with _single_threaded_torch():
            job = _Job(folder, source_name, partial, plan, tensors, options, progress)
            job.write_shards()
            manifest = job.write_rest()
            report.errors = manifest.errors
            if verify:
                job.verify(manifest)
                report.verified = True
        _publish(partial, out)
    except (CheckpointError, MappingError, _BadWeight) as error:
        # The source has to change first, so there is nothing to go on with.
        _remove(partial)
        raise ConversionError(str(error)) from None
    except OSError as error:
        raise ConversionError(_os_error(error)) from None
    if push_to_hub is not None:
        _push(out, push_to_hub)
    report.seconds = time.monotonic() - start
    return report


@dataclass(frozen=True)
class _Options:
    weights: WeightFormat
    max_shard_size: int
    device: torch.device
    workers: int


def _check_options(
    weights: str,
    format: str,
    ignore: Sequence[str],
    max_shard_size: str | int,
    device: str,
    workers: int | None,
) -> _Options:
    import re

    for name, value, allowed in (
        ("weights", weights, WEIGHTS),
        ("format", format, FORMATS),
        ("device", device, ("auto", "cpu", "cuda")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}; {', '.join(allowed)} work")
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
    return _Options(
        cast(WeightFormat, weights),
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
    """Ask the disk for the first gigabytes while transformers is being imported."""
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
        _remove(replaced)
        out.rename(replaced)
    partial.rename(out)
    _remove(replaced)
    _sync(out.parent)


def _sync(path: Path) -> None:
    """Make a file's contents, or a folder's entries, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def _os_error(error: OSError) -> str:
    name = error.filename if error.filename is not None else "the output"
    if error.errno == errno.ENOSPC:
        return f"{name}: the disk is full; make room, then go on with --resume"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{name}: no permission ({error.strerror}); change the folder or its permissions"
    return f"{name}: {error.strerror or error}"


def _peak_memory(plan: Plan, workers: int) -> int:
    costs = [piece.cost for piece in plan.pieces]
    in_flight = min(sum(costs), max(IN_FLIGHT_BYTES, max(costs)))
    # A worker keeps the memory of its largest read.
    return BASELINE_BYTES + in_flight + workers * max(piece.source_bytes for piece in plan.pieces)


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """Workers are the parallelism; torch's own threads would fight over the same cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# The work


@dataclass
class _Made:
    """What a worker made of a piece."""

    # its bytes, and the buffer that they lie in, to be used again once they are written
    data: torch.Tensor | None = None
    buffer: torch.Tensor | None = None
    scales: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    # (module, projection, squared error, squared norm)
    squares: list[tuple[str, str, float, float]] = field(default_factory=list)


class _Journal:
    """The shards that are whole, on disk beside them; what `--resume` goes by."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.file = folder / JOURNAL_NAME
        self.fingerprint = fingerprint
        # shard -> {"sha256": ..., "squares": [[module, projection, error, norm], ...]}
        self.shards: dict[str, dict[str, Any]] = {}

    def read(self) -> None:
        """Take over what an earlier run finished.

        Raises:
            ConversionError: that run had another source or other options.
        """
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
            fingerprint, shards = stored["fingerprint"], dict(stored["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            return  # interrupted before the first shard was whole
        if fingerprint != self.fingerprint:
            raise ConversionError(
                f"{self.file.parent} was made from another source or with other options; "
                "start afresh with --overwrite"
            )
        self.shards = shards

    def write(self) -> None:
        """Replace the journal on disk in one step."""
        text = json.dumps({"fingerprint": self.fingerprint, "shards": self.shards})
        new = self.file.with_name(self.file.name + ".new")
        with new.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        new.rename(self.file)


class _Job:
    """One conversion under way."""

    def __init__(
        self,
        folder: Path,
        source_name: str,
        partial: Path,
        plan: Plan,
        tensors: dict[str, StoredTensor],
        options: _Options,
        progress: Progress | None,
    ) -> None:
        self.folder, self.source_name, self.partial = folder, source_name, partial
        self.plan, self.tensors, self.options = plan, tensors, options
        self.progress = progress or (lambda stage, done, total: None)
        self.reader = Reader(tensors)
        self.buffers = BufferPool()
        self.journal = _Journal(partial, _fingerprint(plan, tensors, source_name))

    def write_shards(self) -> None:
        """Write every shard that an earlier run has not."""
        self._open_partial()
        todo = [shard for shard in self.plan.shards if shard.name not in self.journal.shards]
        total = sum(piece.source_bytes for piece in self.plan.pieces)
        done = total - sum(piece.source_bytes for shard in todo for piece in shard.pieces)
        needed = sum(shard.nbytes for shard in todo)
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            raise ConversionError(
                f"{self.partial}: {format_size(needed)} are needed, {format_size(free)} are free; "
                "the disk is full, make room or choose another"
            )
        results = _in_order(
            self._make, [piece for shard in todo for piece in shard.pieces], self.options.workers
        )
        with _closing(results):
            for shard in todo:
                writer = ShardWriter(self.partial / shard.name, shard.nbytes)
                scales: dict[str, list[torch.Tensor]] = defaultdict(list)
                squares: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
                try:
                    with _naming(writer.partial):
                        writer.write(shard.header)
                        for piece in shard.pieces:
                            made = next(results)
                            if isinstance(piece, Scales):
                                writer.write(torch.cat(scales.pop(piece.name)))
                            elif made.data is not None:
                                writer.write(made.data)
                            if made.buffer is not None:
                                self.buffers.give(made.buffer)
                            for name, scale in made.scales:
                                # A copy: what a worker allocated and we keep would pin its heap.
                                scales[name].append(scale.clone())
                            for module, projection, error, norm in made.squares:
                                squares[module, projection][0] += error
                                squares[module, projection][1] += norm
                            done += piece.source_bytes
                            self.progress("convert", done, total)
                        sha256 = writer.finish()
                finally:
                    writer.close()
                self.journal.shards[shard.name] = {
                    "sha256": sha256,
                    "squares": [[*key, *sums] for key, sums in squares.items()],
                }
                self.journal.write()

    def write_rest(self) -> Manifest:
        """Write index, config, manifest and the small files of the source."""
        for file in self._small_files():
            target = self.partial / file.relative_to(self.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        index = self.plan.index()
        if index is not None:
            (self.partial / INDEX_NAME).write_text(index, encoding="utf-8")
        plan = self.plan
        if plan.format == COMPRESSED_TENSORS:
            quantization = compressed_tensors_config(plan.weights, plan.ignore)
        else:
            quantization = qmoe_config(plan.weights, plan.skipped_modules)
        source_config = (self.folder / "config.json").read_text(encoding="utf-8")
        config = with_quantization_config(source_config, quantization)
        (self.partial / "config.json").write_text(config, encoding="utf-8")

        from qmoe import __version__

        manifest = Manifest(
            weights=plan.weights,
            format=plan.format,
            source=self.source_name,
            qmoe_version=__version__,
            shards={
                s.name: Shard(self.journal.shards[s.name]["sha256"], s.nbytes) for s in plan.shards
            },
            errors=self._errors(),
        )
        manifest.write(self.partial)
        return manifest

    def verify(self, manifest: Manifest) -> None:
        """Read every shard again: checksums, headers, values.

        Raises:
            VerificationError: something differs; the shard is struck from the journal, so that
                ``--resume`` writes it again.
        """
        pieces = [piece for shard in self.plan.shards for piece in shard.pieces]
        total = sum(piece.source_bytes for piece in pieces)
        done = 0
        for shard in self.plan.shards:
            try:
                for piece_bytes in verify_shard(
                    self.partial / shard.name,
                    shard,
                    manifest.shards[shard.name],
                    self.reader,
                    self.options.weights,
                    lambda work, items: _in_order(work, items, self.options.workers),
                ):
                    done += piece_bytes
                    self.progress("verify", done, total)
            except VerificationError:
                del self.journal.shards[shard.name]
                self.journal.write()
                raise

    def _open_partial(self) -> None:
        if self.partial.exists():
            self.journal.read()
            if not self.journal.shards:
                shutil.rmtree(self.partial)
        self.partial.mkdir(exist_ok=True)
        keep = {JOURNAL_NAME, *self.journal.shards}
        for path in self.partial.iterdir():
            if path.name not in keep:
                _remove(path)
        for name in list(self.journal.shards):
            file = self.partial / name
            expected = next((s.nbytes for s in self.plan.shards if s.name == name), -1)
            if not file.exists() or file.stat().st_size != expected:
                del self.journal.shards[name]
        self.journal.write()

    def _make(self, piece: Piece) -> _Made:
        """Read and quantize; runs in a worker."""
        if isinstance(piece, Quantize):
            return self._quantize(piece)
        if isinstance(piece, Copy):
            buffer = self.buffers.take(piece.source_bytes)
            data = buffer[: piece.source_bytes]
            read_into(piece.source.file, piece.source.offset + piece.start, data)
            return _Made(data, buffer)
        if isinstance(piece, Load):
            self.reader.reserve(piece.source_bytes)
            return _Made(piece.load(self.reader))
        return _Made()

    def _quantize(self, piece: Quantize) -> _Made:
        self.reader.reserve(piece.source_bytes)
        tensors = piece.load(self.reader)
        total = sum(tensor.numel() for tensor in tensors)
        buffer = self.buffers.take(total)
        made = _Made(buffer[:total], buffer)
        device, weights = self.options.device, self.options.weights
        offset = 0
        for weight, tensor in zip(piece.weights, tensors, strict=True):
            out = buffer[offset : offset + tensor.numel()]
            out = out.view(STORAGE_DTYPE[weights]).view(tensor.shape)
            offset += tensor.numel()
            try:
                if device.type == "cpu":
                    _, scale, error, norm = quantize_with_squares(tensor, weights, out=out)
                else:
                    q, scale, error, norm = quantize_with_squares(tensor.to(device), weights)
                    out.copy_(q)
            except ValueError:
                raise _BadWeight(
                    f"{self.tensors[piece.source_names[0]].file.parent}: "
                    f"{_first_bad(weight, tensor)}; fix the checkpoint or keep its layer "
                    "in 16 bit with --ignore"
                ) from None
            made.scales.append((weight.scale_name, scale.cpu()))
            made.squares.append((weight.module, weight.projection, error, norm))
        return made

    def _errors(self) -> dict[str, dict[str, float]]:
        sums: dict[str, dict[str, list[float]]] = {m: {} for m in self.plan.quantized_modules}
        for shard in self.plan.shards:
            for module, projection, error, norm in self.journal.shards[shard.name]["squares"]:
                pair = sums[module].setdefault(projection, [0.0, 0.0])
                pair[0] += error
                pair[1] += norm
        # Five digits: more would depend on the order in which a device adds.
        return {
            module: {
                name: float(f"{math.sqrt(error / norm) if norm else 0.0:.5g}")
                for name, (error, norm) in projections.items()
            }
            for module, projections in sums.items()
        }

    def _small_files(self) -> list[Path]:
        found = [*self.folder.iterdir(), *self.folder.glob("additional_chat_templates/*.jinja")]
        return sorted(
            file
            for file in found
            if file.is_file()
            and (file.suffix in COPIED_SUFFIXES or file.name.startswith(COPIED_NAMES))
            and not file.name.endswith(".index.json")
            and not file.name.startswith(".")
            and file.name not in ("config.json", "qmoe_manifest.json")
        )


def _first_bad(weight: Weight, tensor: torch.Tensor) -> str:
    """Name the tensor, the expert and the row of the first NaN or infinity."""
    matrices = tensor if tensor.ndim == 3 else tensor[None]
    for i, matrix in enumerate(matrices):
        bad = ~matrix.isfinite().all(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            kind = "NaN" if bool(matrix[row].isnan().any()) else "infinity"
            return f"{kind} in {weight.name}, expert {weight.first_expert + i}, row {row}"
    return f"{weight.name} cannot be quantized"


def _in_order(work: Callable[[Any], T], items: Iterable[Any], workers: int) -> Iterator[T]:
    """Yield ``work(item)`` in order while workers are ahead by at most `IN_FLIGHT_BYTES`.

    Items have a ``cost`` in bytes; one is let in whatever it costs.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="qmoe-convert")
    waiting: deque[tuple[int, Future[T]]] = deque()
    in_flight = 0
    try:
        for item in items:
            while waiting and in_flight + item.cost > IN_FLIGHT_BYTES:
                cost, future = waiting.popleft()
                yield future.result()
                in_flight -= cost
            waiting.append((item.cost, pool.submit(work, item)))
            in_flight += item.cost
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        for _, future in waiting:
            future.cancel()
        pool.shutdown(wait=True)


@contextmanager
def _closing(results: Iterator[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        results.close()  # type: ignore[attr-defined]


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Give an OSError that names no file (a failed write does not) the file's name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


def _fingerprint(plan: Plan, tensors: dict[str, StoredTensor], source_name: str) -> str:
    """What decides the output's bytes: the plan, and the source files by size and time."""
    from qmoe import __version__

    digest = hashlib.sha256(f"{__version__} {source_name} {plan.digest()}".encode())
    for file in sorted({tensor.file for tensor in tensors.values()}):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def with_quantization_config(source: str, quantization: dict[str, Any]) -> str:
    """The text of a config.json with ``quantization_config`` set and everything else verbatim."""
    parsed = json.loads(source)
    if "quantization_config" in parsed:
        parsed["quantization_config"] = quantization
        return json.dumps(parsed, indent=2, ensure_ascii=False) + "\n"
    value = json.dumps(quantization, indent=2, ensure_ascii=False).replace("\n", "\n  ")
    body = source.rstrip()[:-1].rstrip()
    comma = "," if parsed else ""
    return f'{body}{comma}\n  "quantization_config": {value}\n}}\n'
