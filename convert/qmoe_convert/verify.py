"""Read a written shard again and compare it with the source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmoe.checkpoints.files import CheckpointError, StoredTensor, read_header
from qmoe.checkpoints.schema import Shard
from qmoe_convert.plan import Copy, Load, Piece, Quantize, Scales, ShardPlan
from qmoe_convert.shards import Reader, read_into, sha256_of
from qmoe_kernels.quantization import widen

# Rounding to nearest is off by at most half a step: of 1 for an integer; for e4m3fn, 2**-4 of the
# value, or half of its smallest subnormal, 2**-9. Both in units of the scale. The factor covers
# the fp32 arithmetic that finds the error.
HALF_STEP = {"int8": (0.0, 0.5), "fp8": (2.0**-4, 2.0**-10)}
SLACK = 1 + 2.0**-10
# Elements per block, so that a block stays in cache.
BLOCK = 1 << 17


class VerificationError(ValueError):
    """What was written is not what the source says; the message names the file and the tensor."""


@dataclass(frozen=True)
class _Checksum:
    """A piece of work beside the plan's own: hash the whole file."""

    source_bytes: int = 0
    cost: int = 0


InOrder = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def verify_shard(
    file: Path, plan: ShardPlan, expected: Shard, reader: Reader, weights: str, in_order: InOrder
) -> Iterator[int]:
    """Check one shard: size, checksum, header, every quantized and every copied value.

    Args:
        file: the shard.
        plan: what it should hold.
        expected: its size and checksum as the manifest has them.
        reader: of the source.
        weights: ``"int8"`` or ``"fp8"``.
        in_order: runs a function over items in worker threads.

    Yields:
        Source bytes compared since the last time.

    Raises:
        VerificationError: the first thing that differs.
    """
    try:
        header = read_header(file)
    except (CheckpointError, OSError) as error:
        raise VerificationError(f"{file}: cannot be read back ({error}); {REMEDY}") from None
    wanted = {(t.name, t.dtype, t.shape) for t in plan.tensors}
    if file.stat().st_size != expected.bytes:
        raise VerificationError(
            f"{file}: {file.stat().st_size} bytes, the manifest says {expected.bytes}; {REMEDY}"
        )
    if {(t.name, t.dtype, t.shape) for t in header.values()} != wanted:
        raise VerificationError(f"{file}: its header is not the planned one; {REMEDY}")
    written = Reader(header)

    def check(item: _Checksum | Piece) -> int:
        if isinstance(item, _Checksum):
            if sha256_of(file) != expected.sha256:
                raise VerificationError(f"{file}: SHA-256 differs from the manifest's; {REMEDY}")
        elif isinstance(item, Quantize):
            _check_quantized(file, item, reader, written, weights)
        elif not isinstance(item, Scales):
            _check_kept(file, item, reader, header)
        return item.source_bytes

    yield from in_order(check, [_Checksum(), *plan.pieces])


REMEDY = "the disk may be failing; write it again with --resume"


def _check_quantized(
    file: Path, piece: Quantize, reader: Reader, written: Reader, weights: str
) -> None:
    reader.reserve(piece.source_bytes)
    tensors = piece.load(reader)
    written.reserve(piece.source_bytes)
    for weight, source in zip(piece.weights, tensors, strict=True):
        if source.ndim == 3:
            rows = slice(weight.first_expert, weight.first_expert + source.shape[0])
            q = written.read(weight.quantized_name, rows).flatten(0, 1)
            scale = written.read(weight.scale_name, rows).flatten()
            source = source.flatten(0, 1)
        else:
            q = written.read(weight.quantized_name)
            scale = written.read(weight.scale_name).flatten()
        row = first_wrong_row(source, q, scale, weights)
        if row is not None:
            expert = weight.first_expert + row // (source.shape[0] // max(1, tensors[0].shape[0]))
            where = f", expert {expert}" if tensors[0].ndim == 3 else ""
            raise VerificationError(
                f"{file}: {weight.quantized_name}{where}: differs from the source by more than "
                f"{weights} rounds; {REMEDY}"
            )


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
    step = max(1, BLOCK // max(1, source.shape[1]))
    exact = torch.empty((step, source.shape[1]))
    close = torch.empty((step, source.shape[1]))
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


def _check_kept(
    file: Path, piece: Copy | Load, reader: Reader, header: dict[str, StoredTensor]
) -> None:
    if isinstance(piece, Copy):
        source, target = piece.source, header[piece.source.name]
        same = _bytes(source, piece.start, piece.stop).equal(
            _bytes(target, piece.start, piece.stop)
        )
        name = source.name
    else:
        reader.reserve(piece.source_bytes)
        expected = piece.load(reader).contiguous().view(-1).view(torch.uint8)
        target = header[piece.name]
        same = expected.equal(_bytes(target, 0, target.nbytes))
        name = piece.name
    if not same:
        raise VerificationError(f"{file}: {name} differs from the source; {REMEDY}")


def _bytes(tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    buffer = torch.empty(stop - start, dtype=torch.uint8)
    read_into(tensor.file, tensor.offset + start, buffer)
    return buffer
