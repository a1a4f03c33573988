"""inspect_checkpoint(): what a checkpoint holds, from its config and its headers alone.

No weight is read. Experts are recognized by their stored names (a path component ``experts``) or,
in families that stack them elsewhere, by a 3-D tensor whose first dimension is the config's expert
count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmoe.checkpoints.files import (
    TORCH_DTYPES,
    CheckpointError,
    StoredTensor,
    check_config,
    first_line,
    open_checkpoint,
    read_json,
)
from qmoe.checkpoints.hub import why_no_place
from qmoe.checkpoints.schema import (
    COMPRESSED_TENSORS,
    MANIFEST_NAME,
    QMOE,
    Manifest,
    format_of,
    read_manifest,
    summarize_errors,
)

_EXPERT_NAME = re.compile(r"^(?P<module>(?:.*\.)?experts)\.(?:(?:expert_)?(?P<index>\d+)\.)?.+$")
# What lies beside an expert's weights and is none: scales, zero points, shapes, biases.
_NO_WEIGHT = re.compile(r"(scale|scales|scale_inv|bias|zero_point|weight_shape|g_idx|qzeros)$")
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "moe_k",
)
_CONFIG_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds; sizes in bytes.

    Attributes:
        path: folder or Hub id.
        architecture: as config.json names it.
        num_layers: hidden layers, None where the config does not tell.
        expert_layers: layers with experts; 0 for a dense model.
        num_experts: experts per layer, one number for each that occurs; empty for a dense model.
        top_k: experts per token, None where the config does not tell.
        format: how the experts are stored, such as ``bf16`` or ``compressed-tensors int8 per
            channel``.
        shards: number of safetensors files.
        expert_weights: how many weights the experts have.
        expert_bytes: on disk, scales and biases included.
        rest_bytes: everything else on disk.
        memory_bytes: held after ``qmoe.load``, without KV cache and activations; None where
            transformers decides (other quantization methods).
        bits_per_expert_weight: expert_bytes * 8 / expert_weights; None for a dense model.
        errors: relative error of the experts from the converter's manifest, {projection: {"median",
            "worst", "worst_module"}}; None without a manifest.
        source: what it was converted from, from the manifest.
    """

    path: str
    architecture: str
    num_layers: int | None
    expert_layers: int
    num_experts: list[int]
    top_k: int | None
    format: str
    shards: int
    expert_weights: int
    expert_bytes: int
    rest_bytes: int
    memory_bytes: int | None
    bits_per_expert_weight: float | None
    errors: dict[str, dict[str, Any]] | None
    source: str | None

    @property
    def dense(self) -> bool:
        """Whether the model has no experts at all."""
        return not self.expert_layers


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Read what a checkpoint holds from its config and headers.

    Args:
        path: a local folder, or a Hub id, of which only config, manifest and headers are fetched.

    Raises:
        ValueError: no such checkpoint, no safetensors in it, or a file that is broken; one line
            that names the file.
    """
    if why := why_no_place(path):
        raise ValueError(why)
    folder = Path(path)
    if folder.is_dir():
        manifest = read_manifest(folder)
        # The weights first: a folder without any may be an adapter's, and says so.
        tensors = list(open_checkpoint(folder).values())
        config = read_json(folder / "config.json")
        return _describe(str(path), config, tensors, manifest)
    return _inspect_hub(str(path))


def _inspect_hub(repo: str) -> Inspection:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        config_file = Path(hf_hub_download(repo, "config.json"))
        config = read_json(config_file)
        tensors = _cached_tensors(config_file.parent)
        if tensors is None:
            tensors = [
                StoredTensor(name, Path(file), t.dtype, tuple(t.shape), start, stop - start)
                for file, metadata in get_safetensors_metadata(repo).files_metadata.items()
                for name, t in metadata.tensors.items()
                for start, stop in [t.data_offsets]
            ]
        try:
            manifest = Manifest.read(Path(hf_hub_download(repo, MANIFEST_NAME)).parent)
        except EntryNotFoundError:
            manifest = None
    except ValueError:
        raise
    except Exception as error:  # the Hub's and the network's errors have no common base
        raise ValueError(f"{repo}: cannot be read from the Hub ({first_line(error)})") from error
    return _describe(repo, config, tensors, manifest)


def _cached_tensors(snapshot: Path) -> list[StoredTensor] | None:
    """What a snapshot in the Hub's cache holds; None where it was not downloaded, or in part."""
    try:
        return list(open_checkpoint(snapshot).values())
    except CheckpointError:
        return None


def _describe(
    path: str,
    config: dict[str, Any],
    tensors: list[StoredTensor],
    manifest: Manifest | None,
) -> Inspection:
    check_config(Path(path) / "config.json", config, {tensor.name: tensor for tensor in tensors})
    try:
        return _describe_config(path, config, tensors, manifest)
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"{path}: config.json cannot be understood ({error}); download it again"
        ) from error


def _describe_config(
    path: str,
    config: dict[str, Any],
    tensors: list[StoredTensor],
    manifest: Manifest | None,
) -> Inspection:
    text = _text_config(config)
    quantization = config.get("quantization_config") or text.get("quantization_config") or {}
    num_experts = _first(_sizes(text), _NUM_EXPERTS)
    modules, experts = _named_experts(tensors, num_experts)
    if not experts and num_experts and num_experts > 1:
        modules, experts = _stacked_experts(tensors, num_experts)
    if modules:
        check_top_k(path, config, max(modules.values()) + _num_identity_experts(text))
    weights = [t for t in experts if not _NO_WEIGHT.search(t.name)]
    expert_weights = sum(_num_weights(t, quantization) for t in weights)
    expert_bytes = sum(t.nbytes for t in experts)
    memory_bytes = None
    if _is_ours(quantization):
        names = {t.name for t in experts}
        memory_bytes = _memory_bytes(tensors, names, _loaded_bits(config, text))
    return Inspection(
        path=path,
        architecture=_architecture(config),
        num_layers=_first(text, ["num_hidden_layers"]),
        expert_layers=len(modules),
        num_experts=sorted(set(modules.values())),
        top_k=find_top_k(config) if modules else None,
        format=_format(quantization, weights or tensors),
        shards=len({t.file for t in tensors}),
        expert_weights=expert_weights,
        expert_bytes=expert_bytes,
        rest_bytes=sum(t.nbytes for t in tensors) - expert_bytes,
        memory_bytes=memory_bytes,
        bits_per_expert_weight=expert_bytes * 8 / expert_weights if expert_weights else None,
        errors=summarize_errors(manifest.errors) if manifest else None,
        source=manifest.source if manifest else None,
    )


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    name = str(names[0] if isinstance(names, list) and names else config.get("model_type"))
    return name if name.isprintable() and name != "None" else "unknown"


def find_top_k(config: dict[str, Any]) -> int | None:
    """Experts per token, by a model's config; None where it does not tell."""
    return _first(_sizes(_text_config(config)), _TOP_K)


def check_top_k(path: str | Path, config: dict[str, Any], num_experts: int | None = None) -> None:
    """Refuse a config that sends a token to more experts than a layer has, or to none.

    Args:
        path: the checkpoint's, for the message.
        config: as JSON.
        num_experts: of a layer, those that return their input included; None: as the config says.

    Raises:
        CheckpointError: with both numbers.
    """
    text, top_k = _text_config(config), find_top_k(config)
    if num_experts is None:
        num_experts = (_first(_sizes(text), _NUM_EXPERTS) or 0) + _num_identity_experts(text)
        if num_experts <= 1:  # so says a dense model, and has the others' default for the rest
            return
    if top_k is not None and top_k < 1:
        raise CheckpointError(
            f"{path}: config.json sends a token to {top_k} experts; check that it belongs to "
            "these weights"
        )
    if top_k is not None and top_k > num_experts:
        raise CheckpointError(
            f"{path}: config.json sends a token to {top_k} experts, and a layer has {num_experts}; "
            "check that it belongs to these weights"
        )


def _num_identity_experts(text: dict[str, Any]) -> int:
    return _first(text, ["zero_expert_num"]) or 0  # LongCat's


def _sizes(text: dict[str, Any]) -> dict[str, Any]:
    return {**(text.get("ffn_config") or {}), **text}  # DBRX keeps them apart


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model."""
    for key in ("text_config", "thinker_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            return _text_config(config[key])
    return config


def _first(config: dict[str, Any], names: Iterable[str]) -> int | None:
    values = (config.get(name) for name in names)
    # A list is one number per layer (Ernie VL: per modality).
    flat = (v[0] if isinstance(v, list) and v else v for v in values)
    return next((v for v in flat if isinstance(v, int)), None)


def _named_experts(
    tensors: list[StoredTensor], num_experts: int | None
) -> tuple[dict[str, int], list[StoredTensor]]:
    """Experts modules with their number of experts, and their tensors, by the tensors' names."""
    modules: dict[str, int] = {}
    experts = []
    for tensor in tensors:
        match = _EXPERT_NAME.match(tensor.name)
        if match is None:
            continue
        experts.append(tensor)
        if match["index"] is not None:
            count = int(match["index"]) + 1
        elif len(tensor.shape) >= 2 and not _NO_WEIGHT.search(tensor.name):
            # Flat storage (DBRX) has all experts' rows in one matrix.
            count = tensor.shape[0] if len(tensor.shape) >= 3 else num_experts or 1
        else:
            count = 0
        modules[match["module"]] = max(modules.get(match["module"], 0), count)
    return modules, experts


def _stacked_experts(
    tensors: list[StoredTensor], num_experts: int
) -> tuple[dict[str, int], list[StoredTensor]]:
    """The same by the tensors' shapes."""
    experts = [t for t in tensors if len(t.shape) == 3 and t.shape[0] == num_experts]
    stems = [t.name.removesuffix(".weight").rpartition(".")[0] for t in experts]
    return dict.fromkeys(stems, num_experts), experts


def _bits(dtype: str) -> int:
    """Bits of an element, by safetensors' name of the dtype."""
    if dtype in TORCH_DTYPES:
        return 8 * TORCH_DTYPES[dtype].itemsize
    return 4 if dtype == "F4" else 8


def _num_weights(tensor: StoredTensor, quantization: dict[str, Any]) -> int:
    """Weights that a tensor stands for: some formats pack several into one element."""
    if tensor.name.endswith("_blocks"):  # MXFP4: two in a byte
        return tensor.numel * 2
    if tensor.name.endswith(("weight_packed", "qweight")):
        bits = quantization.get("bits") or next(
            (g["weights"]["num_bits"] for g in quantization.get("config_groups", {}).values()), 4
        )
        return tensor.numel * (_bits(tensor.dtype) // bits)
    return tensor.numel


def _format(quantization: dict[str, Any], weights: list[StoredTensor]) -> str:
    method = format_of(quantization)
    if method == QMOE:
        return f"{QMOE} {quantization.get('weights')} per channel"
    if method == COMPRESSED_TENSORS:
        return f"{method} {_scheme(quantization)}"
    if method is not None:
        return str(method)
    return " and ".join(sorted({t.dtype.lower() for t in weights})) or "empty"


def _scheme(quantization: dict[str, Any]) -> str:
    """How compressed-tensors stores weights, such as ``int8 per channel``."""
    groups: dict[str, Any] = quantization.get("config_groups") or {}
    group: dict[str, Any] = next((g["weights"] for g in groups.values() if g.get("weights")), {})
    kind = {"int": "int", "float": "fp"}.get(group.get("type", ""), "")
    return f"{kind}{group.get('num_bits', '')} per {group.get('strategy')}"


def _is_ours(quantization: dict[str, Any]) -> bool:
    """Whether qmoe, and not transformers, decides what memory the weights take."""
    method = format_of(quantization)
    if method == COMPRESSED_TENSORS:
        return _scheme(quantization) in ("int8 per channel", "fp8 per channel")
    return method in (None, QMOE)


def _loaded_bits(config: dict[str, Any], text: dict[str, Any]) -> int | None:
    """Bits of the dtype that 16-bit and 32-bit weights are loaded in, where the config tells."""
    names = [str(c.get(key)) for c in (config, text) for key in ("dtype", "torch_dtype")]
    return next((_CONFIG_BITS[name] for name in names if name in _CONFIG_BITS), None)


def _memory_bytes(tensors: list[StoredTensor], experts: set[str], loaded_bits: int | None) -> int:
    total = 0
    for tensor in tensors:
        bits = _bits(tensor.dtype)
        if tensor.name in experts and tensor.name.endswith("scale"):
            bits = 32  # held in fp32 whatever is stored
        elif bits in (16, 32) and not tensor.dtype.startswith(("I", "U")):
            bits = loaded_bits or bits
        total += tensor.numel * bits // 8
    return total
