"""Read written shards again and compare them with the source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from qmoe.checkpoints.files import CheckpointError, StoredTensor, open_checkpoint, read_header
from qmoe.exits import UNVERIFIED
from qmoe_convert.output import Output
from qmoe_convert.plan import Options, Piece, Plan, Shard, scale_name
from qmoe_convert.shards import DIRECT_BYTES, BufferPool, Reader, read_past_cache
from qmoe_convert.workers import Progress, counting, in_order
from qmoe_kernels import cpu
from qmoe_kernels.quantization import STORAGE_DTYPE, widen

# Rounding to nearest is off by at most half a step: of 1 for an integer; for e4m3fn, 2**-4 of the
# value, or half of its smallest subnormal, 2**-9. Both in units of the scale. The factor covers
# the fp32 arithmetic that finds the error.
HALF_STEP = {"int8": (0.0, 0.5), "fp8": (2.0**-4, 2.0**-10)}
SLACK = 1 + 2.0**-10
# Elements per block, so that a block stays in cache.
BLOCK = 1 << 17
REMEDY = "the disk may be failing; write it again with --resume"


class VerificationError(ValueError):
    """What was written is not what the source says; the message names the file and the tensor."""

    exit_code = UNVERIFIED


def verify_shards(
    plan: Plan,
    tensors: dict[str, StoredTensor],
    output: Output,
    options: Options,
    progress: Progress,
) -> None:
    """Read every shard again: size, checksum, header, every quantized and every copied value.

    Shards that the journal calls verified were so by an interrupted run.

    Raises:
        VerificationError: something differs; the shard is struck from the journal, so that
            ``--resume`` writes it again.
    """
    reader, journal = Reader(tensors), output.journal
    todo = [shard for shard in plan.shards if not journal.shards[shard.name].verified]
    total = sum(piece.source_bytes for piece in plan.pieces)
    left = sum(piece.source_bytes for shard in todo for piece in shard.pieces)
    advance = counting(progress, "verify", total, done=total - left)
    for shard in todo:
        try:
            check = _Check(output.new / shard.name, shard, reader, options.weights)
            digest = hashlib.sha256(shard.header)
            with closing(in_order(check.part, check.parts, options.workers)) as checked:
                for part, (read, buffer) in zip(check.parts, checked, strict=True):
                    digest.update(memoryview(read.numpy()))
                    check.buffers.give(buffer)
                    advance(part.piece.source_bytes)
            if digest.hexdigest() != journal.shards[shard.name].sha256:
                raise VerificationError(
                    f"{check.file}: SHA-256 differs from the manifest's; {REMEDY}"
                )
        except VerificationError:
            journal.strike(shard.name)
            raise
        journal.shards[shard.name].verified = True
        journal.write()
    _check_index(plan, output)


def _check_index(plan: Plan, output: Output) -> None:
    """Open what was written as whoever loads it will."""
    try:
        found = open_checkpoint(output.new).keys()
    except CheckpointError as error:
        raise VerificationError(f"{error}; {REMEDY}") from None
    if found != {tensor.name for shard in plan.shards for tensor in shard.tensors}:
        raise VerificationError(f"{output.new}: its tensors are not the planned ones; {REMEDY}")


@dataclass(frozen=True)
class _Part:
    """A piece, and where it lies in its file: bytes ``start`` to ``stop``."""

    piece: Piece
    start: int
    stop: int

    @property
    def cost(self) -> int:
        """Bytes of memory that checking it takes."""
        return self.piece.cost + self.stop - self.start


class _Check:
    """Compares one shard with the source, part by part, in workers.

    Attributes:
        parts: all of the file behind its header, in order.
        buffers: that what is read lies in.
    """

    def __init__(self, file: Path, shard: Shard, reader: Reader, weights: str) -> None:
        self.file, self.reader, self.weights = file, reader, weights
        self.buffers = BufferPool()
        try:
            header, size = read_header(file), file.stat().st_size
            with file.open("rb") as stream:
                begins_as_planned = stream.read(len(shard.header)) == shard.header
        except (CheckpointError, OSError) as error:
            raise VerificationError(f"{file}: cannot be read back ({error}); {REMEDY}") from None
        if size != shard.nbytes:
            raise VerificationError(
                f"{file}: {size} bytes, the manifest says {shard.nbytes}; {REMEDY}"
            )
        if not begins_as_planned:
            raise VerificationError(f"{file}: its header is not the planned one; {REMEDY}")
        self.written = Reader(header)
        starts = [header[piece.tensors[0].name].offset + piece.start for piece in shard.pieces]
        self.parts = list(map(_Part, shard.pieces, starts, [*starts[1:], size]))

    def part(self, part: _Part) -> tuple[torch.Tensor, torch.Tensor]:
        """Check one part, and return what was read of it and the buffer that this lies in."""
        buffer = self.buffers.take(part.stop - part.start + 2 * DIRECT_BYTES)
        read = read_past_cache(self.file, part.start, part.stop, buffer)
        piece = part.piece
        if piece.load is not None:
            self.reader.reserve(piece.source_bytes)
            compare = self._quantized if piece.projections else self._kept
            compare(piece, piece.load(self.reader), read)
        return read, buffer

    def _quantized(self, piece: Piece, sources: Sequence[torch.Tensor], read: torch.Tensor) -> None:
        first = piece.first_expert
        sizes = [source.numel() for source in sources]
        for tensor, source, codes in zip(piece.tensors, sources, read.split(sizes), strict=True):
            rows = slice(first, first + len(source)) if source.ndim == 3 else None
            q = codes.view(STORAGE_DTYPE[self.weights]).view(source.shape).flatten(0, -2)
            scale = self.written.read(scale_name(tensor.name), rows).flatten()
            row = first_wrong_row(source.flatten(0, -2), q, scale, self.weights)
            if row is not None:
                where = f", expert {first + row // source.shape[-2]}" if rows else ""
                raise VerificationError(
                    f"{self.file}: {tensor.name}{where}: differs from the source by more than "
                    f"{self.weights} rounds; {REMEDY}"
                )

    def _kept(self, piece: Piece, sources: Sequence[torch.Tensor], read: torch.Tensor) -> None:
        (tensor,), (source,) = piece.tensors, sources
        if not source.contiguous().view(-1).view(torch.uint8).equal(read):
            raise VerificationError(f"{self.file}: {tensor.name} differs from the source; {REMEDY}")


def first_wrong_row(
    source: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, weights: str
) -> int | None:
    """The first row in which ``q * scale`` is further from ``source`` than rounding explains.

    Args:
        source: (rows, columns), any float dtype.
        q: (rows, columns), int8 or float8_e4m3fn.
        scale: (rows,) fp32.
        weights: ``"int8"`` or ``"fp8"``.
    """
    relative, absolute = HALF_STEP[weights]
    if cpu.narrows(source):
        wrong = cpu.wrong_rows(source, q, scale, relative * SLACK, absolute * SLACK).nonzero()
        return int(wrong[0]) if len(wrong) else None
    step = max(1, BLOCK // max(1, source.shape[1]))
    exact = torch.empty((step, source.shape[1]), dtype=torch.float32)
    close = torch.empty((step, source.shape[1]), dtype=torch.float32)
    for start in range(0, source.shape[0], step):
        rows = slice(start, start + step)
        count = len(scale[rows])
        w, e = exact[:count], close[:count]
        w.copy_(source[rows])
        widen(q[rows], out=e)
        e.mul_(scale[rows, None]).sub_(w).abs_()
        if relative:
            e.sub_(w.abs_().mul_(relative * SLACK))
        # NaN compares false with everything, so ask for what is right.
        right = (e.amax(1) <= absolute * SLACK * scale[rows]) & scale[rows].isfinite()
        if not right.all():
            return start + int((~right).nonzero()[0])
    return None
