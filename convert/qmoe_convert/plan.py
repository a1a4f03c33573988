"""What a conversion will write: every shard's tensors and bytes, decided from headers alone.

The size of an 8-bit tensor is known before its values are, so headers are written first and the
data follow in order. A shard's data are

1. the quantized weights, expert after expert: an expert's gate, up and down rows lie next to each
   other, so that they are one contiguous read (stored per expert, that is; fused tensors hold all
   experts of a projection one after the other);
2. everything else, widest items first, which keeps every tensor aligned: scales (fp32), then the
   16-bit tensors that are copied.

A :class:`Piece` is a run of these bytes that one worker makes in one go. Its size bounds memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from qmoe.checkpoints.files import SINGLE_NAME, TORCH_DTYPES, StoredTensor
from qmoe.checkpoints.readers import readers_of
from qmoe.checkpoints.schema import COMPRESSED_TENSORS, QMOE, QUANTIZED_SUFFIX, SCALE_SUFFIX
from qmoe_convert import ConversionError
from qmoe_convert.mapping import CheckpointMapping, Experts, Kept, natural_order
from qmoe_convert.report import Report
from qmoe_convert.shards import UNHASHED_BYTES, PlannedTensor, Reader, header_bytes
from qmoe_convert.workers import IN_FLIGHT_BYTES
from qmoe_kernels.quantization import WeightFormat

# Bytes of source that one piece reads, unless a single expert takes more.
PIECE_BYTES = 16 << 20
# What safetensors calls the dtypes of `qmoe_kernels.quantization.STORAGE_DTYPE`.
STORED_AS = {"int8": "I8", "fp8": "F8_E4M3"}
# What Python, torch and transformers take before the first piece is read.
BASELINE_BYTES = 600 << 20


class PlanError(ConversionError):
    """A conversion that cannot be done as asked; the message says why and what would work."""


@dataclass(frozen=True)
class Options:
    """What was asked for, checked: `qmoe_convert.convert.convert` explains each."""

    out: str
    weights: WeightFormat
    format: str
    ignore: tuple[str, ...]
    max_shard_size: int
    device: torch.device
    workers: int


@dataclass(frozen=True)
class Piece:
    """A run of a shard's bytes: one expert, some experts of a fused tensor, or a part of another.

    Attributes:
        tensors: what it fills, one after the other, from byte ``start`` of the first.
        load: reads what goes there, one tensor or more. None for scales, which the pieces that
            quantize leave behind.
        source_bytes: read from disk.
        cost: bytes of memory that making it takes.
        sources: the tensors of the checkpoint that it is made of.
        module, projections, first_expert: what is quantized, a projection for each of ``tensors``;
            no projections where what is loaded is written as it is.
    """

    tensors: tuple[PlannedTensor, ...]
    load: Callable[[Reader], Sequence[torch.Tensor]] | None
    source_bytes: int = 0
    cost: int = 0
    start: int = 0
    module: str = ""
    projections: tuple[str, ...] = ()
    first_expert: int = 0
    sources: tuple[str, ...] = ()


# Pieces whose tensors must share a shard, under the first of their names in the source.
Group = tuple[str, list[Piece]]


@dataclass(frozen=True)
class Shard:
    """One output file: the pieces that make its data, in order."""

    name: str
    pieces: list[Piece]

    @cached_property
    def tensors(self) -> list[PlannedTensor]:
        """What the file will hold, in order."""
        return [tensor for piece in self.pieces for tensor in _begun(piece)]

    @cached_property
    def header(self) -> bytes:
        """The bytes before the data."""
        return header_bytes(self.tensors)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will write; ``report`` says why, and how much it is."""

    report: Report
    shards: list[Shard]
    # Linear layers that stay in 16 bit, by full name
    ignore: list[str]

    @property
    def pieces(self) -> list[Piece]:
        """All pieces of all shards."""
        return [piece for shard in self.shards for piece in shard.pieces]

    def index(self) -> str | None:
        """The text of ``model.safetensors.index.json``; None for a single shard."""
        if len(self.shards) == 1:
            return None
        total = sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)
        weight_map = {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}
        ordered = {name: weight_map[name] for name in natural_order(weight_map)}
        index = {"metadata": {"total_size": total}, "weight_map": ordered}
        return json.dumps(index, indent=2) + "\n"


def make_plan(
    mapping: CheckpointMapping, tensors: dict[str, StoredTensor], options: Options
) -> Plan:
    """Decide what is written where.

    Args:
        mapping: what the checkpoint holds.
        tensors: its tensors' places.
        options: what was asked for.

    Raises:
        PlanError: nothing is left to quantize, or the format cannot hold this model.
    """
    chosen, skipped = _choose_modules(mapping, options.ignore)
    format = _choose_format(options.format, chosen, mapping.model_class)
    pieces_of = _per_expert if format == COMPRESSED_TENSORS else _fused
    groups = [
        g for experts in chosen.values() for g in pieces_of(experts, tensors, options.weights)
    ]
    quantized = [p for _, pieces in groups for p in pieces if p.projections or p.load is None]
    layouts = [experts.layout for experts in chosen.values()]
    num_weights = sum(math.prod(each.shape(name)) for each in layouts for name in each.projections)
    kept = mapping.keep(skipped)
    groups += [(natural_order(one.source_names)[0], _kept(one, tensors)) for one in kept]
    shards = _pack(groups, options.max_shard_size)
    _check_names(shards)

    warnings = list(mapping.warnings)
    if skipped:
        warnings.append(f"--ignore keeps {len(skipped)} of {len(mapping.experts)} experts modules")
    report = Report(
        out=options.out,
        format=format,
        weights=options.weights,
        readers=readers_of(format, mapping.model_class),
        source_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        output_bytes=sum(shard.nbytes for shard in shards),
        bits_per_weight=8 * _nbytes(quantized) / num_weights,
        quantized_modules=list(chosen),
        skipped_modules=skipped,
        num_kept=sum(one.load is None for one in kept),
        num_dequantized=sum(one.load is not None for one in kept),
        extra=mapping.extra,
        shards={shard.name: shard.nbytes for shard in shards},
        peak_memory_bytes=_peak_memory(shards, options.workers),
        warnings=warnings,
    )
    linears = {name for module in skipped for name in mapping.experts[module].part_names}
    return Plan(report, shards, natural_order(linears | set(mapping.linear_names)))


def _check_names(shards: Iterable[Shard]) -> None:
    """Raise if two tensors would have one name: a file can hold but one of them."""
    names: set[str] = set()
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if tensor.name in names:
            raise PlanError(
                f"{tensor.name}: the checkpoint holds a tensor of this name, which the quantized "
                "experts need for another; it is a rest of some quantization, take it out"
            )
        names.add(tensor.name)


def _peak_memory(shards: list[Shard], workers: int) -> int:
    pieces = [piece for shard in shards for piece in shard.pieces]
    costs = [piece.cost for piece in pieces]
    in_flight = min(sum(costs), max(IN_FLIGHT_BYTES, max(costs)))
    # A worker keeps the memory of its largest read.
    reads = workers * max(piece.source_bytes for piece in pieces)
    return BASELINE_BYTES + in_flight + UNHASHED_BYTES + reads


def _begun(piece: Piece) -> tuple[PlannedTensor, ...]:
    """The tensors whose first byte lies in ``piece``."""
    return () if piece.start else piece.tensors


def _nbytes(pieces: Iterable[Piece]) -> int:
    """Bytes of the tensors that ``pieces`` fill."""
    return sum(tensor.nbytes for piece in pieces for tensor in _begun(piece))


def _choose_modules(
    mapping: CheckpointMapping, ignore: Iterable[str]
) -> tuple[dict[str, Experts], list[str]]:
    """The experts modules to quantize, and the names of those that stay."""
    names = {module: (module, *e.source_names[:1]) for module, e in mapping.experts.items()}
    found: set[str] = set()
    for pattern in ignore:
        matches = {
            m for m, known_as in names.items() if any(re.search(pattern, n) for n in known_as)
        }
        if not matches:  # what it was to keep would be quantized
            raise PlanError(
                f"--ignore {pattern!r} finds no experts module; they are named like "
                f"{next(iter(names))}"
            )
        found |= matches
    skipped = [module for module in names if module in found]
    chosen = {module: e for module, e in mapping.experts.items() if module not in skipped}
    if not chosen:
        raise PlanError(
            f"--ignore leaves nothing to quantize: it matches all of {', '.join(skipped[:2])}"
            f"{' ...' if len(skipped) > 2 else ''}"
        )
    shared = {n for m in skipped for n in mapping.experts[m].source_names}
    for module, experts in chosen.items():
        if not shared.isdisjoint(experts.source_names):
            raise PlanError(
                f"{module} is stored together with modules that --ignore keeps; "
                "ignore both or neither"
            )
    return chosen, skipped


def _choose_format(format: str, chosen: dict[str, Experts], model_class: str) -> str:
    fused = next((m for m, experts in chosen.items() if not experts.stored_per_expert), None)
    if format == COMPRESSED_TENSORS and fused is not None:
        raise PlanError(
            f"{model_class} does not store {fused} expert by expert with rows as output channels, "
            "so compressed-tensors cannot hold it; use --format qmoe"
        )
    if format == "auto":
        return COMPRESSED_TENSORS if fused is None else QMOE
    return format


def scale_name(quantized_name: str) -> str:
    """The name of the scales of a quantized tensor."""
    return quantized_name.removesuffix(QUANTIZED_SUFFIX) + SCALE_SUFFIX


def _scales(quantized: PlannedTensor, shape: tuple[int, ...]) -> Piece:
    """The piece that writes the scales of ``quantized``."""
    name = scale_name(quantized.name)
    return Piece((PlannedTensor(name, "F32", shape, 4 * math.prod(shape)),), load=None)


def _per_expert(experts: Experts, tensors: dict[str, StoredTensor], weights: str) -> list[Group]:
    """A group for each expert: its weights under the names that they have in the source."""
    projections = [experts.projections[name] for name in experts.layout.projections]
    width = TORCH_DTYPES[projections[0].dtype].itemsize
    groups = []
    for expert in range(experts.layout.num_experts):
        quantized, of = [], []
        for projection in projections:
            assert projection.parts is not None
            for part, shape in projection.parts[expert].items():
                name = f"{part}.weight"
                quantized.append(PlannedTensor(name, STORED_AS[weights], shape, math.prod(shape)))
                of.append(projection.name)
        names = [name for projection in projections for name in projection.names_of(expert)]
        source_bytes = sum(tensors[name].nbytes for name in names)
        num_weights = sum(tensor.nbytes for tensor in quantized)
        dequantized = 2 * width * num_weights if projections[0].is_quantized else 0
        piece = Piece(
            tuple(quantized),
            partial(experts.load_expert, expert=expert),
            source_bytes,
            source_bytes + dequantized + num_weights,
            module=experts.module,
            projections=tuple(of),
            first_expert=expert,
            sources=tuple(names),
        )
        scales = [_scales(tensor, (tensor.shape[0], 1)) for tensor in quantized]
        groups.append((natural_order(names)[0], [piece, *scales]))
    return groups


def _fused(experts: Experts, tensors: dict[str, StoredTensor], weights: str) -> list[Group]:
    """A group for each projection: all of its experts in one tensor of canonical form."""
    order = natural_order(experts.source_names)[0]
    groups = []
    for name in experts.layout.projections:
        pieces = _fused_projection(experts, name, weights)
        if (bias := f"{name}_bias") in experts.layout.biases:
            pieces += _kept(experts.bias(bias), tensors)
        groups.append((order, pieces))
    return groups


def _fused_projection(experts: Experts, name: str, weights: str) -> list[Piece]:
    projection, num_experts = experts.projections[name], experts.layout.num_experts
    shape = experts.layout.shape(name)
    per_expert = math.prod(shape[1:])
    width = TORCH_DTYPES[projection.dtype].itemsize
    quantized = PlannedTensor(
        f"{experts.module}.{name}{QUANTIZED_SUFFIX}", STORED_AS[weights], shape, math.prod(shape)
    )
    step, sources = num_experts, tuple(projection.source_names)
    if projection.sliceable:
        step = max(1, min(step, PIECE_BYTES // max(1, projection.source_bytes(1))))
    pieces = []
    for first in range(0, num_experts, step):
        last = min(first + step, num_experts)
        source_bytes = projection.source_bytes(last - first)
        num_weights = (last - first) * per_expert
        pieces.append(
            Piece(
                (quantized,),
                partial(experts.load_slice, name=name, first=first, last=last),
                source_bytes,
                # read, merge, concatenate, bring to canonical form, quantize
                source_bytes + 3 * width * num_weights + num_weights,
                start=first * per_expert,
                module=experts.module,
                projections=(name,),
                first_expert=first,
                sources=sources,
            )
        )
    return [*pieces, _scales(quantized, shape[:2])]


def _kept(kept: Kept, tensors: dict[str, StoredTensor]) -> list[Piece]:
    """The pieces of a tensor that is copied or brought back to 16 bit."""
    source_bytes = sum(tensors[name].nbytes for name in kept.source_names)
    if kept.load is None:
        tensor = PlannedTensor(kept.name, kept.dtype, kept.shape, source_bytes)
        return [
            _copied(tensor, start, min(start + PIECE_BYTES, source_bytes))
            for start in range(0, max(1, source_bytes), PIECE_BYTES)
        ]
    nbytes = math.prod(kept.shape) * TORCH_DTYPES[kept.dtype].itemsize
    tensor = PlannedTensor(kept.name, kept.dtype, kept.shape, nbytes)
    # Dequantizing passes through two fp32 copies.
    cost = source_bytes + 8 * math.prod(kept.shape) + nbytes
    return [Piece((tensor,), kept.load, source_bytes, cost, sources=kept.source_names)]


def _copied(tensor: PlannedTensor, start: int, stop: int) -> Piece:
    """Bytes ``start`` to ``stop`` of a tensor, as they are in the source."""
    return Piece(
        (tensor,),
        lambda reader: [reader.read_bytes(tensor.name, start, stop)],
        source_bytes=stop - start,
        cost=stop - start,
        start=start,
        sources=(tensor.name,),
    )


def _pack(groups: list[Group], max_shard_size: int) -> list[Shard]:
    """Fill one shard after the other with groups in the source's natural order."""
    position = {name: i for i, name in enumerate(natural_order({name for name, _ in groups}))}
    groups = sorted(groups, key=lambda group: position[group[0]])
    contents: list[list[Piece]] = [[]]
    size = 0
    for _, pieces in groups:
        nbytes = _nbytes(pieces)
        if contents[-1] and size + nbytes > max_shard_size:
            contents.append([])
            size = 0
        contents[-1] += pieces
        size += nbytes
    count = len(contents)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = [SINGLE_NAME]
    return [Shard(name, _ordered(pieces)) for name, pieces in zip(names, contents, strict=True)]


def _ordered(pieces: list[Piece]) -> list[Piece]:
    """Quantized weights first, then everything else, widest items first."""
    return sorted(pieces, key=lambda p: (not p.projections, -p.tensors[0].itemsize))
