"""Write what a plan says: workers read and quantize its pieces, the calling thread writes them.

A journal of the shards that are whole lies beside them, so that an interrupted run can be gone on
with. Pieces in flight are bounded in bytes: memory does not depend on the checkpoint's size.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qmoe.checkpoints import schema
from qmoe.checkpoints.files import INDEX_NAME, StoredTensor
from qmoe_convert import SourceError
from qmoe_convert.card import CARD_NAME, model_card
from qmoe_convert.journal import Entry
from qmoe_convert.output import Output, files_in
from qmoe_convert.plan import Options, Piece, Plan, Shard, scale_name
from qmoe_convert.shards import BufferPool, Reader, ShardWriter, sha256_of
from qmoe_convert.small_files import copy_small_file, names_code, small_files
from qmoe_convert.workers import Progress, counting, in_order
from qmoe_kernels.quantization import STORAGE_DTYPE, quantize_with_squares


def write_shards(
    plan: Plan,
    tensors: dict[str, StoredTensor],
    output: Output,
    fingerprints: dict[str, str],
    options: Options,
    progress: Progress,
) -> None:
    """Write every shard of ``plan`` that the journal has not, from the source's ``tensors``."""
    journal = output.journal
    todo = [shard for shard in plan.shards if shard.name not in journal.shards]
    pieces = [piece for shard in todo for piece in shard.pieces]
    total = sum(piece.source_bytes for piece in plan.pieces)
    left = sum(piece.source_bytes for piece in pieces)
    advance = counting(progress, "convert", total, done=total - left)
    maker = _Maker(Reader(tensors), BufferPool(), options)
    with closing(in_order(maker.make, pieces, options.workers)) as results:
        for shard in todo:
            file = output.new / shard.name
            sha256, squares = _write_shard(file, shard, results, maker.buffers, advance)
            modified = file.stat().st_mtime_ns
            journal.shards[shard.name] = Entry(fingerprints[shard.name], sha256, modified, squares)
            journal.write()


@dataclass
class _Made:
    """What a worker made of a piece."""

    # its bytes, and the buffer that they lie in, to be used again once they are written
    data: list[torch.Tensor] = field(default_factory=list)
    buffer: torch.Tensor | None = None
    scales: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    # (module, projection, squared error, squared norm)
    squares: list[tuple[str, str, float, float]] = field(default_factory=list)


def _write_shard(
    file: Path,
    shard: Shard,
    results: Iterator[_Made],
    buffers: BufferPool,
    advance: Callable[[int], None],
) -> tuple[str, list[tuple[str, str, float, float]]]:
    """Write one file and return its SHA-256, and the squares that the journal keeps."""
    scales: dict[str, list[torch.Tensor]] = defaultdict(list)
    squares: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    with ShardWriter(file, shard.nbytes) as writer:
        writer.write(shard.header)
        for piece in shard.pieces:
            made = next(results)
            if piece.load is None:
                writer.write(torch.cat(scales.pop(piece.tensors[0].name)))
            for data in made.data:
                writer.write(data)
            if made.buffer is not None:
                writer.after(partial(buffers.give, made.buffer))
            for name, scale in made.scales:
                # A copy: what a worker allocated and we keep would pin its heap.
                scales[name].append(scale.clone())
            for module, projection, error, norm in made.squares:
                squares[module, projection][0] += error
                squares[module, projection][1] += norm
            advance(piece.source_bytes)
        sha256 = writer.finish()
    return sha256, [(*key, error, norm) for key, (error, norm) in squares.items()]


@dataclass(frozen=True)
class _Maker:
    """Makes pieces, in workers."""

    reader: Reader
    buffers: BufferPool
    options: Options

    def make(self, piece: Piece) -> _Made:
        """Read a piece, and quantize it if need be."""
        if piece.load is None:
            return _Made()
        if piece.projections:
            self.reader.reserve(piece.source_bytes)
            return self._quantize(piece, piece.load(self.reader))
        buffer = self.buffers.take(piece.source_bytes)
        self.reader.reserve(piece.source_bytes, buffer)
        return _Made(list(piece.load(self.reader)), buffer)

    def _quantize(self, piece: Piece, tensors: Sequence[torch.Tensor]) -> _Made:
        buffer = self.buffers.take(sum(tensor.numel() for tensor in tensors))
        made, offset = _Made(buffer=buffer), 0
        for planned, projection, tensor in zip(
            piece.tensors, piece.projections, tensors, strict=True
        ):
            out = buffer[offset : offset + tensor.numel()]
            out = out.view(STORAGE_DTYPE[self.options.weights]).view(tensor.shape)
            offset += tensor.numel()
            try:
                scale, error, norm = self._quantize_into(out, tensor)
            except ValueError:
                bad = _first_bad(planned.name, piece.first_expert, tensor)
                folder = next(iter(self.reader.tensors.values())).file.parent
                raise SourceError(
                    f"{folder}: {bad}; fix the checkpoint or keep its layer in 16 bit with "
                    "--ignore, then go on with --resume"
                ) from None
            made.data.append(out)
            made.scales.append((scale_name(planned.name), scale))
            made.squares.append((piece.module, projection, error, norm))
        return made

    def _quantize_into(
        self, out: torch.Tensor, tensor: torch.Tensor
    ) -> tuple[torch.Tensor, float, float]:
        """Fill ``out``; return the scales and the squares of error and norm."""
        device, weights = self.options.device, self.options.weights
        if device.type == "cpu":
            _, *rest = quantize_with_squares(tensor, weights, out=out)
        else:
            q, scale, *squares = quantize_with_squares(tensor.to(device), weights)
            out.copy_(q)
            rest = [scale.cpu(), *squares]
        return tuple(rest)


def _first_bad(name: str, first_expert: int, tensor: torch.Tensor) -> str:
    """Name the tensor, the expert and the row of the first NaN or infinity."""
    name = name.removesuffix(schema.QUANTIZED_SUFFIX)
    for i, matrix in enumerate(tensor if tensor.ndim == 3 else tensor[None]):
        bad = ~matrix.isfinite().all(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            kind = "NaN" if bool(matrix[row].isnan().any()) else "infinity"
            return f"{kind} in {name}, expert {first_expert + i}, row {row}"
    return f"{name} cannot be quantized"


def rest_bytes(plan: Plan, folder: Path) -> int:
    """About what `write_rest` writes."""
    copied = [file.stat().st_size for file in small_files(folder)]
    modules = len(plan.report.quantized_modules) + len(plan.shards) + len(plan.ignore)
    # A block of the disk for each file, lines of config and manifest, and some to spare.
    return sum(copied) + 4096 * len(copied) + len(plan.index() or "") + 400 * modules + (1 << 20)


def write_rest(plan: Plan, output: Output, folder: Path, source_name: str) -> None:
    """Write index, config and manifest, and copy the small files of the source ``folder``."""
    from qmoe import __version__

    for file in small_files(folder):
        target = output.new / file.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        copy_small_file(file, target)
    index = plan.index()
    if index is not None:
        (output.new / INDEX_NAME).write_text(index, encoding="utf-8")
    report = plan.report
    if report.format == schema.COMPRESSED_TENSORS:
        quantization = schema.compressed_tensors_config(report.weights, plan.ignore)
    else:
        quantization = schema.qmoe_config(report.weights, report.skipped_modules)
    source_config = (folder / "config.json").read_text(encoding="utf-8")
    config = with_quantization_config(source_config, quantization)
    (output.new / "config.json").write_text(config, encoding="utf-8")
    manifest = schema.Manifest(
        weights=report.weights,
        format=report.format,
        source=source_name,
        qmoe_version=__version__,
        shards={
            shard.name: schema.Shard(output.journal.shards[shard.name].sha256, shard.nbytes)
            for shard in plan.shards
        },
        errors=output.journal.errors(plan),
        extra=report.extra,
    )
    card = model_card(folder, report, manifest)
    (output.new / CARD_NAME).write_text(card, encoding="utf-8")
    manifest.files = {
        name: sha256_of(output.new / name)
        for name in sorted(file.relative_to(output.new).as_posix() for file in files_in(output.new))
        if name not in manifest.shards
    }
    manifest.write(output.new)


def with_quantization_config(source: str, quantization: dict[str, Any]) -> str:
    """The text of a config.json with ``quantization_config`` set and everything else verbatim.

    What says how the source was quantized goes, also of a part (``text_config``), and so does an
    ``auto_map`` of code that does not go along.
    """
    parsed = json.loads(source)
    if "quantization_config" in source or names_code(parsed):
        place = dict.fromkeys(parsed) | {"quantization_config": quantization}
        parsed = _without_quantization(parsed) | {"quantization_config": quantization}
        if names_code(parsed):
            del parsed["auto_map"]
        ordered = {key: parsed[key] for key in place if key in parsed}
        return json.dumps(ordered, indent=2) + "\n"
    value = json.dumps(quantization, indent=2, ensure_ascii=False).replace("\n", "\n  ")
    body = source.rstrip()[:-1].rstrip()
    comma = "," if parsed else ""
    return f'{body}{comma}\n  "quantization_config": {value}\n}}\n'


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }
