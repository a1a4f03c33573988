"""What a conversion will write: every shard's tensors and bytes, decided from headers alone.

The size of an 8-bit tensor is known before its values are, so headers are written first and the
data follow in order.  A shard's data are

1. the quantized weights, expert after expert: an expert's gate, up and down rows lie next to each
   other, so that they are one contiguous read (stored per expert, that is; fused tensors hold all
   experts of a projection one after the other);
2. everything else, widest items first, which keeps every tensor aligned: scales (fp32), then the
   16-bit tensors that are copied.

A :class:`Piece` is a run of these bytes that one worker makes in one go.  Its size bounds memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from qmoe.checkpoints.files import SINGLE_NAME, TORCH_DTYPES, StoredTensor
from qmoe.checkpoints.schema import COMPRESSED_TENSORS, QMOE, QUANTIZED_SUFFIX, SCALE_SUFFIX
from qmoe_convert.mapping import CheckpointMapping, Experts, Kept, Projection, natural_order
from qmoe_convert.shards import PlannedTensor, Reader, header_bytes

# Bytes of source that one piece reads, unless a single expert takes more.
PIECE_BYTES = 16 << 20
# What safetensors calls the dtypes of `qmoe_kernels.quantization.STORAGE_DTYPE`.
STORED_AS = {"int8": "I8", "fp8": "F8_E4M3"}


class PlanError(ValueError):
    """A conversion that cannot be done as asked; the message says why and what would work."""


@dataclass(frozen=True)
class Weight:
    """One matrix to quantize, or a run of experts' matrices, and where its values go."""

    module: str
    projection: str
    # what errors call it, and the tensors that it is written to
    name: str
    quantized_name: str
    scale_name: str
    first_expert: int


@dataclass(frozen=True)
class Quantize:
    """Quantizes ``weights``; their 8-bit bytes come one after the other, their scales later."""

    weights: tuple[Weight, ...]
    load: Callable[[Reader], Sequence[torch.Tensor]]
    source_names: tuple[str, ...]
    source_bytes: int
    cost: int


@dataclass(frozen=True)
class Scales:
    """Writes the scales that the pieces before it have left."""

    name: str
    source_bytes: int = 0
    cost: int = 0


@dataclass(frozen=True)
class Copy:
    """Copies bytes ``start`` to ``stop`` of a tensor."""

    source: StoredTensor
    start: int
    stop: int

    @property
    def source_bytes(self) -> int:
        return self.stop - self.start

    cost = source_bytes


@dataclass(frozen=True)
class Load:
    """Writes one tensor that is neither quantized nor a copy: a bias, a dequantized layer."""

    name: str
    load: Callable[[Reader], torch.Tensor]
    source_bytes: int
    cost: int


Piece = Quantize | Scales | Copy | Load


@dataclass
class ShardPlan:
    """One output file: its tensors in order, and the pieces that make its data, in order."""

    name: str
    tensors: list[PlannedTensor]
    pieces: list[Piece]
    header: bytes

    @property
    def data_bytes(self) -> int:
        """Bytes after the header."""
        return self.tensors[-1].offset + self.tensors[-1].nbytes if self.tensors else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data_bytes


@dataclass
class Plan:
    """Everything that a conversion will write, and why."""

    format: str
    weights: str
    shards: list[ShardPlan]
    # experts modules that are quantized, and that stay as they are
    quantized_modules: list[str]
    skipped_modules: list[str]
    # Linear layers that stay in 16 bit, by full name
    ignore: list[str]
    # expert weights: how many, and their bytes in the output with scales
    num_weights: int
    weight_bytes: int
    num_kept: int
    num_dequantized: int
    source_bytes: int
    warnings: list[str] = field(default_factory=list)

    @property
    def output_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk per quantized weight, scales included."""
        return 8 * self.weight_bytes / self.num_weights

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
        return (
            json.dumps({"metadata": {"total_size": total}, "weight_map": ordered}, indent=2) + "\n"
        )

    def digest(self) -> str:
        """A hash of everything that will be written but the values."""
        digest = hashlib.sha256(f"{self.format} {self.weights}".encode())
        for shard in self.shards:
            digest.update(shard.name.encode() + shard.header)
        return digest.hexdigest()


@dataclass
class _Atom:
    """Tensors that must share a shard: one expert, one fused projection, or one kept tensor."""

    order: str
    quantized: list[tuple[str, str, tuple[int, ...], int]] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    # the rest of it: (name, dtype, shape, bytes, pieces)
    others: list[tuple[str, str, tuple[int, ...], int, list[Piece]]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(t[3] for t in self.quantized) + sum(t[3] for t in self.others)


def make_plan(
    mapping: CheckpointMapping,
    tensors: dict[str, StoredTensor],
    *,
    weights: str,
    format: str,
    ignore: Iterable[str],
    max_shard_size: int,
) -> Plan:
    """Decide what is written where.

    Args:
        mapping: what the checkpoint holds.
        tensors: its tensors' places.
        weights: ``"int8"`` or ``"fp8"``.
        format: ``"auto"``, ``"compressed-tensors"`` or ``"qmoe"``.
        ignore: regular expressions; experts modules whose name one of them finds stay as they are.
        max_shard_size: bytes; a single tensor may exceed it.

    Raises:
        PlanError: nothing is left to quantize, or the format cannot hold this model.
    """
    patterns = [re.compile(pattern) for pattern in ignore]
    skipped = [
        module
        for module, experts in mapping.experts.items()
        if any(p.search(n) for p in patterns for n in (module, *experts.source_names[:1]))
    ]
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
    _check_dtypes(chosen.values(), tensors)
    format = _choose_format(format, chosen, mapping.model_class)

    atoms = []
    for experts in chosen.values():
        make = _per_expert if format == COMPRESSED_TENSORS else _fused
        atoms += make(experts, tensors, weights)
    weight_bytes = sum(size for atom in atoms for *_, size in atom.quantized)
    weight_bytes += sum(
        size for atom in atoms for *_, size, own in atom.others if isinstance(own[0], Scales)
    )
    kept = mapping.keep(skipped)
    atoms += [_kept(one, tensors) for one in kept]
    position = {name: i for i, name in enumerate(natural_order({atom.order for atom in atoms}))}
    atoms.sort(key=lambda atom: position[atom.order])

    names = natural_order({*mapping.linear_names, *_linears_of(skipped, mapping, tensors)})
    warnings = list(mapping.warnings)
    if skipped:
        warnings.append(f"--ignore keeps {len(skipped)} of {len(mapping.experts)} experts modules")
    return Plan(
        format=format,
        weights=weights,
        shards=_pack(atoms, max_shard_size),
        quantized_modules=list(chosen),
        skipped_modules=skipped,
        ignore=names,
        num_weights=sum(
            math.prod(e.layout.shape(p)) for e in chosen.values() for p in e.layout.projections
        ),
        weight_bytes=weight_bytes,
        num_kept=sum(one.load is None for one in kept),
        num_dequantized=sum(one.load is not None for one in kept),
        source_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        warnings=warnings,
    )


def _check_dtypes(chosen: Iterable[Experts], tensors: dict[str, StoredTensor]) -> None:
    for experts in chosen:
        for name in experts.layout.projections:
            projection = experts.projections[name]
            if projection.dtype not in ("BF16", "F16", "F32") and not projection.is_quantized:
                tensor = tensors[projection.source_names[0]]
                raise PlanError(
                    f"{tensor.file}: {tensor.name} is {tensor.dtype}; "
                    "expert weights must be BF16, F16 or F32, or config.json must say how "
                    "they are quantized"
                )


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


def _per_expert(experts: Experts, tensors: dict[str, StoredTensor], weights: str) -> list[_Atom]:
    projections = [experts.projections[name] for name in experts.layout.projections]
    atoms = []
    for expert in range(experts.layout.num_experts):
        atom = _Atom(order="")
        targets = []
        for projection in projections:
            assert projection.parts is not None
            for part in projection.parts[expert]:
                name, scale = f"{part.name}.weight", f"{part.name}.weight{SCALE_SUFFIX}"
                rows, columns = part.shape
                atom.quantized.append((name, STORED_AS[weights], part.shape, rows * columns))
                atom.others.append((scale, "F32", (rows, 1), 4 * rows, [Scales(scale)]))
                targets.append(
                    Weight(
                        projection.module, projection.name, name, name, scale, first_expert=expert
                    )
                )
        names = tuple(n for p in projections for n in p.names_of(expert))
        source_bytes = sum(tensors[name].nbytes for name in names)
        num_weights = sum(size for *_, size in atom.quantized)
        width = TORCH_DTYPES[projections[0].dtype].itemsize
        dequantized = 2 * width * num_weights if projections[0].is_quantized else 0
        atom.order = natural_order(names)[0]
        atom.pieces = [
            Quantize(
                tuple(targets),
                _load_parts(projections, expert),
                names,
                source_bytes,
                source_bytes + dequantized + num_weights,
            )
        ]
        atoms.append(atom)
    return atoms


def _load_parts(
    projections: list[Projection], expert: int
) -> Callable[[Reader], Sequence[torch.Tensor]]:
    return lambda reader: [t for p in projections for t in p.load_parts(reader, expert)]


def _fused(experts: Experts, tensors: dict[str, StoredTensor], weights: str) -> list[_Atom]:
    layout = experts.layout
    order = natural_order(experts.source_names)[0]
    atoms = []
    for name in layout.projections:
        projection = experts.projections[name]
        shape = layout.shape(name)
        per_expert = math.prod(shape[1:])
        stored = f"{experts.module}.{name}"
        quantized, scale = stored + QUANTIZED_SUFFIX, stored + SCALE_SUFFIX
        atom = _Atom(order)
        atom.quantized = [(quantized, STORED_AS[weights], shape, math.prod(shape))]
        atom.others = [(scale, "F32", shape[:2], 4 * math.prod(shape[:2]), [Scales(scale)])]
        step = layout.num_experts
        if projection.sliceable:
            step = max(1, min(step, PIECE_BYTES // max(1, projection.source_bytes(1))))
        width = TORCH_DTYPES[projection.dtype].itemsize
        for first in range(0, layout.num_experts, step):
            last = min(first + step, layout.num_experts)
            source_bytes = projection.source_bytes(last - first)
            num_weights = (last - first) * per_expert
            weight = Weight(experts.module, name, stored, quantized, scale, first)
            atom.pieces.append(
                Quantize(
                    (weight,),
                    _load_slice(projection, first, last),
                    tuple(projection.source_names),
                    source_bytes,
                    # read, merge, concatenate, bring to canonical form, quantize
                    source_bytes + 3 * width * num_weights + num_weights,
                )
            )
        if name + "_bias" in layout.biases:
            atom.others.append(_bias(experts.projections[name + "_bias"], f"{stored}_bias"))
        atoms.append(atom)
    return atoms


def _load_slice(
    projection: Projection, first: int, last: int
) -> Callable[[Reader], Sequence[torch.Tensor]]:
    return lambda reader: [projection.load(reader, first, last)]


def _bias(projection: Projection, name: str) -> tuple[str, str, tuple[int, ...], int, list[Piece]]:
    shape, num_experts = projection.layout.shape(projection.name), projection.layout.num_experts
    nbytes = math.prod(shape) * TORCH_DTYPES[projection.dtype].itemsize
    source_bytes = projection.source_bytes(num_experts)
    piece = Load(
        name,
        lambda reader: projection.load(reader, 0, num_experts).clone(),
        source_bytes,
        source_bytes + 2 * nbytes,
    )
    return (name, projection.dtype, shape, nbytes, [piece])


def _kept(kept: Kept, tensors: dict[str, StoredTensor]) -> _Atom:
    sources = [tensors[name] for name in kept.source_names]
    source_bytes = sum(source.nbytes for source in sources)
    pieces: list[Piece]
    if kept.load is None:
        nbytes = source_bytes
        pieces = [
            Copy(sources[0], start, min(start + PIECE_BYTES, nbytes))
            for start in range(0, nbytes, PIECE_BYTES)
        ]
    else:
        nbytes = math.prod(kept.shape) * TORCH_DTYPES[kept.dtype].itemsize
        # Dequantizing passes through two fp32 copies.
        cost = source_bytes + 8 * math.prod(kept.shape) + nbytes
        pieces = [Load(kept.name, kept.load, source_bytes, cost)]
    atom = _Atom(natural_order(kept.source_names)[0])
    atom.others = [(kept.name, kept.dtype, kept.shape, nbytes, pieces)]
    return atom


def _linears_of(
    skipped: Iterable[str], mapping: CheckpointMapping, tensors: dict[str, StoredTensor]
) -> list[str]:
    """The experts' own Linear layers, of modules that stay as they are."""
    return [
        part.name
        for module in skipped
        for projection in mapping.experts[module].projections.values()
        for parts in projection.parts or ()
        for part in parts
    ]


def _pack(atoms: list[_Atom], max_shard_size: int) -> list[ShardPlan]:
    shards: list[list[_Atom]] = [[]]
    size = 0
    for atom in atoms:
        if shards[-1] and size + atom.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(atom)
        size += atom.nbytes
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = [SINGLE_NAME]
    return [_shard(name, members) for name, members in zip(names, shards, strict=True)]


def _shard(name: str, atoms: list[_Atom]) -> ShardPlan:
    planned: list[PlannedTensor] = []
    pieces: list[Piece] = []
    offset = 0

    def place(tensor: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        nonlocal offset
        planned.append(PlannedTensor(tensor, dtype, shape, offset, nbytes))
        offset += nbytes

    for atom in atoms:
        for quantized in atom.quantized:
            place(*quantized)
        pieces += atom.pieces
    leading = offset
    others = [other for atom in atoms for other in atom.others]
    others.sort(key=lambda o: -TORCH_DTYPES[o[1]].itemsize if o[1] in TORCH_DTYPES else 0)
    for tensor, dtype, shape, nbytes, own in others:
        place(tensor, dtype, shape, nbytes)
        pieces += own
    return ShardPlan(name, planned, pieces, header_bytes(planned, leading))
