"""The on-disk schema, read by the converter and by the loader.

Two formats, both safetensors shards beside the source's ``config.json`` with a
``quantization_config`` added:

``compressed-tensors``
    For families that the Hub stores per expert. Other programs read the same files, see
    :mod:`qmoe.checkpoints.readers`; names are the source's own, here those of most families::

        model.layers.N.mlp.experts.E.{gate,up,down}_proj.weight        int8 | fp8  [out, in]
        model.layers.N.mlp.experts.E.{gate,up,down}_proj.weight_scale  fp32        [out, 1]

``qmoe``
    For families that the Hub stores fused. Names are those of the model's own modules plus ``_q``,
    which no other loader mistakes for weights; every expert is canonical (gate rows, then up rows;
    K contiguous) whatever the source's layout. In each experts module::

        gate_up_proj_q      int8 | fp8  [experts, 2 * intermediate, hidden]
        gate_up_proj_scale  fp32        [experts, 2 * intermediate]
        gate_up_proj_bias   16 bit      [experts, 2 * intermediate]         where there are biases
        down_proj_q         int8 | fp8  [experts, hidden, intermediate]
        down_proj_scale     fp32        [experts, hidden]
        down_proj_bias      16 bit      [experts, hidden]                   where there are biases

    An expert without a gate has ``up_proj_*`` with ``intermediate`` rows in place of
    ``gate_up_proj_*``. fp8 is float8_e4m3fn throughout.

A manifest with one checksum per shard lies beside the shards in both.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qmoe.checkpoints.files import CheckpointError, read_json

QMOE = "qmoe"
COMPRESSED_TENSORS = "compressed-tensors"
FORMAT_VERSION = 1
NEEDS_QMOE = "import qmoe, then from_pretrained"  # short enough for an error to show it whole
MANIFEST_NAME = "qmoe_manifest.json"

QUANTIZED_SUFFIX = "_q"
SCALE_SUFFIX = "_scale"
BIAS_SUFFIX = "_bias"

# transformers multiplies an expert's 8-bit weights by their scales if the group that is "re:" and
# "experts" says float, and finds no weights at all if it says int. So INT8 files have a group for
# it alone. To everybody else it is a group without members: no module's name has a space in it.
_TRANSFORMERS_EXPERTS = {
    "targets": ["re:experts as transformers reads them"],
    "weights": {
        **{"num_bits": 8, "type": "float", "symmetric": True},
        **{"strategy": "channel", "dynamic": False},
    },
}


def compressed_tensors_config(weights: str, ignore: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a compressed-tensors checkpoint, per output channel.

    vLLM's INT8 and FP8 channel MoE both ask for dynamic per-token input activations, for the target
    ``Linear`` and for every other Linear by its full name in ``ignore``. transformers matches
    ``ignore`` with the names of its own modules, vLLM and SGLang with those of the checkpoint.

    Args:
        weights: ``"int8"`` or ``"fp8"``.
        ignore: the Linear layers that stay in 16 bit, by both names where they differ.
    """
    kind = {"int8": "int", "fp8": "float"}[weights]
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    groups: dict[str, Any] = {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**common, "strategy": "channel", "dynamic": False},
            "input_activations": {**common, "strategy": "token", "dynamic": True},
        }
    }
    if weights == "int8":
        groups["group_1"] = _TRANSFORMERS_EXPERTS
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    }


def format_of(quantization: Mapping[str, Any]) -> str | None:
    """The format that a ``quantization_config`` tells of.

    Returns:
        ``"qmoe"``, ``"compressed-tensors"``, another program's name for its own, or None.
    """
    if quantization.get("format") == QMOE:
        return QMOE
    method = quantization.get("quant_method")  # of files from before: QMOE
    return None if method is None else str(getattr(method, "value", method))


def qmoe_config(weights: str, modules_to_not_convert: list[str] | None = None) -> dict[str, Any]:
    """The ``quantization_config`` of a ``qmoe`` checkpoint.

    It calls itself compressed-tensors, with groups that are none: transformers without qmoe, vLLM
    and SGLang stop there and show the text. A method that transformers does not know it only
    warns of, and then runs with random experts.

    Args:
        weights: ``"int8"`` or ``"fp8"``.
        modules_to_not_convert: full names of experts modules that stay in 16 bit.
    """
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": QMOE,
        "config_groups": {QMOE: NEEDS_QMOE},
        "format_version": FORMAT_VERSION,
        "weights": weights,
        "modules_to_not_convert": list(modules_to_not_convert or []),
    }


@dataclass(frozen=True)
class Shard:
    """One safetensors file as the converter wrote it."""

    sha256: str
    bytes: int


@dataclass
class Manifest:
    """What was converted, from what, and the checksum of every shard."""

    weights: str
    format: str
    source: str
    qmoe_version: str
    shards: dict[str, Shard]
    # {experts module: {projection: relative Frobenius error over sampled rows}}
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    # {file beside the shards: SHA-256}, but for the manifest; what else is found is somebody else's
    files: dict[str, str] = field(default_factory=dict)
    # tensors that the model has no place for
    extra: list[str] = field(default_factory=list)
    # what `qmoe adapt-router` did to the routers; None where they are the source's
    routers: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write ``qmoe_manifest.json`` into ``folder``."""
        document = asdict(self)
        if self.routers is None:
            del document["routers"]
        text = json.dumps(document, indent=2, sort_keys=True) + "\n"
        (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``qmoe_manifest.json`` from ``folder``.

        Raises:
            ValueError: the file is missing, is no manifest or has another format version.
        """
        path = folder / MANIFEST_NAME
        if not path.exists():
            raise ValueError(f"{path}: not found; this folder was not written by qmoe")
        raw = read_json(path)
        try:
            shards = {name: Shard(**shard) for name, shard in raw.pop("shards").items()}
            manifest = cls(shards=shards, **raw)
            manifest._check_types()
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: not a qmoe manifest ({error!r:.200}); convert again"
            ) from None
        if manifest.format_version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format version {manifest.format_version!r:.40}; "
                f"this qmoe reads version {FORMAT_VERSION}"
            )
        return manifest

    def check_sizes(self, folder: Path) -> None:
        """Refuse shards in ``folder`` that have another size than was written; none is opened.

        Raises:
            CheckpointError: naming the file and both sizes.
        """
        for name, shard in self.shards.items():
            file = folder / name
            if file.is_file() and (size := file.stat().st_size) != shard.bytes:
                raise CheckpointError(
                    f"{file}: {size} bytes, and {MANIFEST_NAME} says {shard.bytes}; copy it or "
                    f"convert again, or remove {MANIFEST_NAME} if you changed the file"
                )

    def _check_types(self) -> None:
        """Raise TypeError where a manifest that somebody else wrote holds other types."""
        texts = [self.weights, self.format, self.source, self.qmoe_version]
        texts += [shard.sha256 for shard in self.shards.values()]
        texts += [*self.files.values(), *self.extra]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a text is missing")
        errors = [error for of_module in self.errors.values() for error in of_module.values()]
        if not all(isinstance(error, float | int) for error in errors):
            raise TypeError("errors are numbers")
        if not isinstance(self.routers, dict | None):
            raise TypeError("routers is an object")
        if not all(type(shard.bytes) is int for shard in self.shards.values()):
            raise TypeError("bytes are numbers")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder whose shards have the sizes that it says; None if there is none.

    Raises:
        ValueError: it is broken, or a shard has another size.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    manifest = Manifest.read(folder)
    manifest.check_sizes(folder)
    return manifest


def summarize_errors(errors: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """The median and the worst error of each projection.

    Args:
        errors: experts module -> projection -> relative error.

    Returns:
        projection -> ``{"median", "worst", "worst_module"}``.
    """
    by_projection: dict[str, dict[str, float]] = {}
    for module, of_module in errors.items():
        for projection, error in of_module.items():
            by_projection.setdefault(projection, {})[module] = error
    return {
        projection: {
            "median": statistics.median(found.values()),
            "worst": max(found.values()),
            "worst_module": max(found, key=lambda module: found[module]),
        }
        for projection, found in by_projection.items()
    }
