"""What a conversion did, in numbers."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Report:
    """What a conversion did, or, after a dry run, would do.

    Attributes:
        out: the new checkpoint.
        format: ``"compressed-tensors"`` or ``"qmoe"``.
        weights: ``"int8"`` or ``"fp8"``.
        readers: which programs read the new checkpoint, and how.
        source_bytes, output_bytes: of all tensors.
        bits_per_weight: of the quantized weights on disk, scales included.
        quantized_modules, skipped_modules: experts modules, by name.
        num_kept, num_dequantized: other tensors that were copied, and brought back to 16 bit.
        extra: kept tensors that the model has no place for.
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
    readers: str
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    quantized_modules: list[str]
    skipped_modules: list[str]
    num_kept: int
    num_dequantized: int
    extra: list[str]
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
