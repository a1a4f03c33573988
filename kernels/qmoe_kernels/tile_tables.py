"""Tables of measured tiles: JSON files, one per GPU, that a person can read and correct.

::

    {
      "gpu": "NVIDIA H200",
      "rows": [
        {
          "shape": {"num_experts": 128, "top_k": 8, ...},
          "weights": "int8",
          "activations": "bf16",
          "num_tokens": {
            "16": {
              "gate_up": {"block_m": 16, "block_n": 128, ...},
              "down": {...},
              "sort": false,
              "microseconds": 101.3,
              "baseline_microseconds": 112.0,
              "measured_with": {"torch": ..., "triton": ..., "commit": ..., "date": ...}
            }
          }
        }
      ]
    }
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from qmoe_kernels.quantization import FORMAT_OF
from qmoe_kernels.tiles import LayerShape, LayerTiles, TileConfig

_Sizes = TypeVar("_Sizes", LayerShape, TileConfig)

# What products take, by the name that rows have. fp16 shares bf16's rows: as many bytes, and the
# same rate of the tensor cores.
OPERANDS: dict[torch.dtype, str] = {
    **FORMAT_OF,
    torch.bfloat16: "bf16",
    torch.float16: "bf16",
}


@dataclass(frozen=True)
class LayerKind:
    """What a row of a table is for; weights and activations are names of `OPERANDS`."""

    shape: LayerShape
    weights: str
    activations: str


@dataclass(frozen=True)
class Measurement:
    """The best tiles found for one number of tokens, and how that is known.

    Attributes:
        tiles: the best.
        microseconds: of a whole layer with them.
        baseline_microseconds: of a whole layer with what ran before, in the same run.
        measured_with: torch, triton, commit, date.
    """

    tiles: LayerTiles
    microseconds: float
    baseline_microseconds: float
    measured_with: Mapping[str, str]


@dataclass
class TileTable:
    """What was measured on one GPU.

    Attributes:
        gpu: its name, as torch has it.
        rows: by kind of layer, then by number of tokens.
    """

    gpu: str
    rows: dict[LayerKind, dict[int, Measurement]]

    def find(self, kind: LayerKind, num_tokens: int) -> LayerTiles | None:
        """Return the tiles of the nearest number of tokens, on a log scale; of two, the larger's.

        Outside of what was measured, the nearest counts up to a factor of 2; else None.
        """
        row = self.rows.get(kind)
        if not row or not min(row) <= 2 * num_tokens or not num_tokens <= 2 * max(row):
            return None
        nearest = min(row, key=lambda n: (abs(math.log(n / num_tokens)), -n))
        return row[nearest].tiles

    @classmethod
    def read(cls, path: Path) -> TileTable:
        """Read a table.

        Raises:
            ValueError: it is no table, or a row of it is wrong; names file and row.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise ValueError(f"{path}: is not JSON ({error})") from None
        row = "the top"
        try:
            _check_keys(content, {"gpu", "rows"})
            table = cls(str(content["gpu"]), {})
            for index, stored in enumerate(content["rows"]):
                row = f"row {index}"
                _check_keys(stored, {"shape", "weights", "activations", "num_tokens"})
                for operand in ("weights", "activations"):
                    if stored[operand] not in OPERANDS.values():
                        raise ValueError(f"unknown {operand} {stored[operand]!r}")
                shape = sizes_from_dict(LayerShape, stored["shape"])
                kind = LayerKind(shape, stored["weights"], stored["activations"])
                if kind in table.rows:
                    raise ValueError("a second row for the same layer")
                table.rows[kind] = {}
                for num_tokens, cell in stored["num_tokens"].items():
                    row = f"row {index}, num_tokens {num_tokens}"
                    known = num_tokens.isascii() and num_tokens.isdecimal() and len(num_tokens) < 10
                    if not (known and int(num_tokens) > 0) or num_tokens.startswith("0"):
                        raise ValueError("is no number of tokens")
                    table.rows[kind][int(num_tokens)] = _measurement(cell)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {row}: {error}") from None
        return table

    def add(self, kind: LayerKind, num_tokens: int, measured: Measurement) -> None:
        """Put in a measurement, in the place of an older one if there is one."""
        self.rows.setdefault(kind, {})[num_tokens] = measured

    def write(self, path: Path) -> None:
        """Write the table; a reader sees the old one or the new one, whole."""
        rows = [
            {
                **asdict(kind),
                "num_tokens": {str(n): _as_dict(row[n]) for n in sorted(row)},
            }
            for kind, row in self.rows.items()
        ]
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(_format({"gpu": self.gpu, "rows": rows}) + "\n", encoding="utf-8")
        os.replace(partial, path)


def table_path(folder: Path, gpu: str) -> Path:
    """Where a folder has the table of a GPU."""
    return folder / (re.sub(r"[^\w.-]", "_", gpu) + ".json")


_TILES = {"gate_up", "down", "sort", "tma"}


def tiles_from_dict(stored: Any) -> LayerTiles:
    """Undo ``dataclasses.asdict``.

    Raises:
        ValueError: something is missing, unknown, or no size that works.
    """
    _check_keys(stored, _TILES, {"tma"})
    for name in ("sort", "tma"):
        if not isinstance(stored.get(name, False), bool):
            raise ValueError(f"{name} is {stored[name]!r}; true and false work")
    tiles = {}
    for product in ("gate_up", "down"):
        try:
            tiles[product] = sizes_from_dict(TileConfig, stored[product])
        except ValueError as error:
            raise ValueError(f"{product}: {error}") from None
    return LayerTiles(**{**stored, **tiles})


# What a size of a tile can be at most: far more fits no GPU's shared memory, or compiles for ever.
_MOST = {"block_m": 256, "block_n": 256, "block_k": 1024, "num_warps": 16, "num_stages": 8,
         "tail_m": 256}  # fmt: skip


def sizes_from_dict(cls: type[_Sizes], stored: Any) -> _Sizes:
    """Undo ``dataclasses.asdict`` of a shape or a tile.

    Raises:
        ValueError: something is missing, unknown, or no size that works.
    """
    known = fields(cls)
    _check_keys(stored, {f.name for f in known}, {f.name for f in known if f.default == 0})
    for name, value in stored.items():
        if name == "gated":
            if not isinstance(value, bool):
                raise ValueError(f"gated is {value!r}; true and false work")
            continue
        works = "a positive integer works"
        valid = type(value) is int and (value > 0 or (name == "tail_m" and value == 0))
        if name.startswith("block_") or name in ("num_warps", "tail_m"):
            works = "a power of two works"
            valid = valid and value & (value - 1) == 0
        if valid and value > (most := _MOST.get(name, 1 << 31)):
            works, valid = f"at most {most} works", False
        if not valid:
            raise ValueError(f"{name} is {repr(value)[:40]}; {works}")
    return cls(**stored)


def _measurement(stored: Any) -> Measurement:
    names = {"microseconds", "baseline_microseconds", "measured_with"}
    _check_keys(stored, names | _TILES, {"tma"})
    for name in ("microseconds", "baseline_microseconds"):
        value = stored[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{name} is {value!r}; a positive number works")
    found = tiles_from_dict({name: stored[name] for name in stored.keys() - names})
    return Measurement(found, **{name: stored[name] for name in names})


def _as_dict(measurement: Measurement) -> dict[str, Any]:
    stored = asdict(measurement)
    return {**stored.pop("tiles"), **stored}


def _check_keys(stored: Any, wanted: Set[str], optional: Set[str] = frozenset()) -> None:
    if not isinstance(stored, dict):
        raise ValueError(f"{stored!r} is no object with {', '.join(sorted(wanted))}")
    if missing := wanted - optional - stored.keys():
        raise ValueError(f"{', '.join(sorted(missing))} missing")
    if unknown := stored.keys() - wanted:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")


def _format(value: Any, indent: str = "") -> str:
    """JSON with what holds only numbers and words on one line."""
    deeper = indent + "  "
    if isinstance(value, dict) and any(isinstance(v, (dict, list)) for v in value.values()):
        lines = [f"{deeper}{json.dumps(k)}: {_format(v, deeper)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and value:
        lines = [deeper + _format(v, deeper) for v in value]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    return json.dumps(value)
