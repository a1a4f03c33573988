"""Load a checkpoint, converted or not, from a folder or the Hub."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import cached_file

from qmoe.checkpoints.files import (
    StoredTensor,
    check_folder,
    check_mxfp4,
    ends_in_cut_block,
    first_line,
    open_checkpoint,
)
from qmoe.checkpoints.hub import check_revision, why_no_place
from qmoe.checkpoints.inspection import check_top_k
from qmoe.checkpoints.schema import (
    COMPRESSED_TENSORS,
    MANIFEST_NAME,
    QMOE,
    QUANTIZED_SUFFIX,
    Manifest,
    format_of,
    read_manifest,
)
from qmoe.experts.layout import find_experts
from qmoe.experts.quantized import quantized_modules
from qmoe.loading.config import QmoeConfig
from qmoe.loading.conversions import Renamer
from qmoe.loading.devices import choose_device, choose_own_device
from qmoe.loading.pages import refuse_bound
from qmoe.loading.patch import patch
from qmoe.loading.quantizer import check_experts, listed
from qmoe.loading.spread import load_spread
from qmoe.paging.host_store import available_bytes
from qmoe.paging.options import PagingOptions, paging_options
from qmoe.parallel.group import RankGroup, rank_group
from qmoe.sizes import format_size
from qmoe_kernels.fused_moe import check_activations
from qmoe_kernels.quantization import STORAGE_DTYPE

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup
    from transformers import PreTrainedConfig, PreTrainedModel

    from qmoe_kernels.quantization import WeightFormat


def load(
    path_or_repo: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    weights: WeightFormat | None = None,
    activations: str = "auto",
    revision: str | None = None,
    hbm_budget: str | int | float | None = None,
    context: int | None = None,
    batch_size: int | None = None,
    misses: str | None = None,
    host_memory: str | int | None = None,
    expert_parallel: bool | ProcessGroup | DeviceMesh = False,
) -> PreTrainedModel:
    """Load a model for generating text.

    Args:
        path_or_repo: a local folder, or a repository on the Hub.
        device: ``"auto"`` (the GPU where there is one, else the CPU) or any torch device.
        dtype: of everything that is not quantized: ``"auto"`` (the checkpoint's own), a torch dtype
            or its name.
        weights: None keeps the checkpoint as it is, 8 bit or 16 bit; ``"int8"`` or ``"fp8"``
            quantizes the experts of a 16-bit checkpoint on load.
        activations: what the products of 8-bit experts take, see :func:`qmoe_kernels.fused_moe`.
        revision: branch, tag or commit on the Hub.
        hbm_budget: everything that the model may take of the device: ``"16GiB"``, bytes, a fraction
            of its memory (0.5 or ``"50%"``) or ``"auto"``. Experts that do not fit are paged from
            host memory; on the CPU that is simulated. None: everything is on the device.
        context: tokens per sequence that the budget must hold the KV cache of, new ones included;
            by default the model's own context, but at most 8192.
        batch_size: sequences at a time that it must hold it of; by default 1.
        misses: who serves an expert that is not on the device: ``"link"``, the default, copies it;
            ``"host"`` lets the processor compute it where it lies; ``"auto"`` shares misses
            between both as measured once. Only with ``"link"`` are results, bit for bit, those of a
            model that fits: else they depend, within rounding, on what was on the device.
        host_memory: what the paged experts may take of host memory: ``"16GiB"``, or bytes. Those
            beyond it stay in the checkpoint's files and are read when they are wanted, so that a
            model larger than host memory runs. None: all are in host memory. Takes a converted
            checkpoint, and files that stay where they are for as long as the model is used.
        expert_parallel: spread the experts over processes, each of which calls this: True for
            those that torchrun started, or a process group or a device mesh of one dimension. The
            rest of the model is whole on each. Takes a converted checkpoint; a budget is each
            process's own. See docs/expert-parallel.md.

    A 16-bit checkpoint is quantized while it is read: beside the 8-bit model, only the experts of
    one layer are in memory in 16 bit.

    Returns:
        The model, in evaluation mode, on ``device``.

    Raises:
        ValueError: no such folder or repository, or one whose model makes no text; a file that is
            missing or broken; weights that are missing, left over or of another shape than
            config.json says; an unknown device or dtype, a checkpoint that is quantized already
            while ``weights`` asks for it, activations that its weights do not go with, a budget
            that cannot work (with the smallest that does), ``context``, ``batch_size``, ``misses``
            or ``host_memory`` without one, misses that the host cannot serve, or too little host
            memory;
            ``expert_parallel`` for experts that are not in 8 bit on disk, in a process that
            torchrun did not start, or with fewer experts than ranks.
        RankFailed: with ``expert_parallel``, another rank failed or loads something else.

    Example:
        >>> import qmoe
        >>> model = qmoe.load("examples/tiny-moe", weights="int8")
    """
    path_or_repo = str(path_or_repo)
    check_activations(activations, weights)
    paging = paging_options(hbm_budget, context, batch_size, misses, host_memory)
    if paging is not None:
        paging.check_activations(activations)
    if expert_parallel is not False:
        device = choose_own_device(device)
        group = rank_group(expert_parallel, device)
    else:
        device, group = choose_device(device), None
    load_here = partial(
        _load,
        path_or_repo,
        device,
        _choose_dtype(dtype),
        activations=activations,
        weights=weights,
        revision=revision,
        paging=paging,
        group=group,
    )
    return load_here() if group is None else load_spread(group, load_here)


def load_partly(
    path_or_repo: str | Path,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    memory: int,
    folder: Path,
) -> PreTrainedModel:
    """Load a 16-bit model of which only a part is in memory; accelerate reads the rest as it runs.

    Args:
        path_or_repo: a local folder, or a repository on the Hub.
        device: where it runs, see :func:`load`.
        dtype: see :func:`load`.
        memory: bytes that weights may take of the device; on a GPU, what is left over waits in host
            memory as far as that goes.
        folder: for weights that lie otherwise in memory than in the checkpoint, stacked experts for
            one. As large as the model at most; must be there for as long as the model is used.

    Raises:
        ValueError: see :func:`load`; or a model that is quantized.
    """
    path_or_repo = str(path_or_repo)
    device = choose_device(device)
    config = _read_config(path_or_repo, None)
    method = format_of(_quantization(config))
    if method is not None:
        raise ValueError(
            f"{path_or_repo}: is quantized ({method}), and only models in 16 bit can be read "
            "from disk as they run; give it more memory, or take a 16-bit checkpoint"
        )
    places: dict[int | str, int] = {"cpu": memory}
    if device.type == "cuda":
        places = {device.index: memory, "cpu": int(0.9 * (available_bytes() or 0))}
    try:
        return _from_pretrained(
            path_or_repo,
            config,
            _choose_dtype(dtype),
            "auto",
            None,
            max_memory=places,
            offload_folder=folder,
        )
    except ValueError as error:
        if "offload the whole model" not in str(error):
            raise
        # Old releases of accelerate: their way to read all of a model from disk is another one.
        raise ValueError(
            f"{path_or_repo}: no module of it fits into {format_size(memory)}; give it more memory"
        ) from None


def skeleton(path_or_repo: str | Path) -> PreTrainedModel:
    """The model that a checkpoint is of, on the meta device: names and shapes; no weight is read.

    Experts are the model's own, whatever they are stored in.

    Raises:
        ValueError: see :func:`load`.
    """
    path_or_repo = str(path_or_repo)
    config = _read_config(path_or_repo, None)
    with torch.device("meta"):
        model: PreTrainedModel = _auto_class(config, path_or_repo).from_config(config)
    return model


def _load(
    path_or_repo: str,
    device: torch.device,
    dtype: str | torch.dtype,
    *,
    activations: str,
    weights: WeightFormat | None,
    revision: str | None,
    paging: PagingOptions | None,
    group: RankGroup | None,
) -> PreTrainedModel:
    """:func:`load`, once its arguments were looked at."""
    config = _read_config(path_or_repo, revision)
    method = format_of(_quantization(config))
    if group is not None:
        _ask_for_shares(config, group, path_or_repo, weights)
    if weights is None:
        if paging is not None:
            _ask_for_paging(config, paging, path_or_repo)
        model = _from_pretrained(path_or_repo, config, dtype, device, revision)
        _choose_activations(model, activations, path_or_repo)
        return model
    if method in (QMOE, COMPRESSED_TENSORS):
        raise ValueError(
            f"{path_or_repo}: is quantized already ({method}); leave weights={weights!r} out"
        )
    if paging is not None:
        refuse_bound(paging, path_or_repo)
    if method is None:
        quantization = QmoeConfig(weights, activations=activations, paging=paging)
        return _from_pretrained(path_or_repo, config, dtype, device, revision, quantization)
    # Quantized otherwise: transformers may widen it to 16 bit, which patch takes, or refuses.
    load_on = device if paging is None else torch.device("cpu")
    local = Path(path_or_repo).is_dir()
    if local:
        _check_scales(_check_files(path_or_repo, revision), config)
    model = _from_pretrained(path_or_repo, config, dtype, load_on, revision)
    if not local:
        _check_scales(_check_files(path_or_repo, revision), config)
    _check_widened(path_or_repo, model)
    if isinstance(dtype, torch.dtype):
        _cast(model, dtype)
    where: dict[str, Any] = {}
    if paging is not None:
        where = {"device": device, **asdict(paging)}
        del where["host_memory"]  # refused above
    return patch(model, weights, activations=activations, **where)


def _check_scales(headers: dict[str, StoredTensor], config: PreTrainedConfig) -> None:
    """Refuse what transformers reads wrongly: FP8 without scales, or in blocks that are cut."""
    check_mxfp4(headers)
    quantization = _quantization(config)
    block = quantization.get("weight_block_size")
    scaled = {
        stem
        for stem, _, name in (name.rpartition(".") for name in headers)
        if name.startswith(("scale", "weight_scale"))
    }
    for name, stored in headers.items():
        stem = name.removesuffix(".weight")
        if quantization and stem != name and stored.dtype == "F8_E4M3" and stem not in scaled:
            raise ValueError(
                f"{stored.file}: {name} is {stored.dtype}, and the checkpoint holds no scale for "
                "it; download it again"
            )
    for name, scale in headers.items():
        weight = headers.get(name.removesuffix("_scale_inv"))
        if weight is None or weight is scale or not block:
            continue
        for size, scales, rows in zip(weight.shape, scale.shape, block, strict=False):
            if ends_in_cut_block(size, scales, rows):
                raise ValueError(
                    f"{weight.file}: {weight.name} is of {size}, which is no multiple of its "
                    f"blocks of {rows}, and transformers would read it wrongly; convert it with "
                    "convert-checkpoint, which does not"
                )


def _check_widened(path_or_repo: str, model: PreTrainedModel) -> None:
    """Refuse a weight that is still in FP8: it had no scale that transformers found."""
    for name, parameter in model.named_parameters():
        narrow = parameter.is_floating_point() and parameter.dtype.itemsize == 1
        if narrow and parameter.device.type == "cpu":  # a GPU has layers for it, with scales
            raise ValueError(
                f"{path_or_repo}: {name} is {parameter.dtype}, and the checkpoint holds no scale "
                "for it that transformers finds; download it again"
            )


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give parameters the dtype asked for; of quantized checkpoints transformers only casts some.

    Those that are kept in fp32 whatever is asked for, by the model's own word, become that. Layers
    that keep their weights in 8 bit, as a GPU's may, keep the scales beside them as they are.
    """
    plan = {
        re.compile(pattern.replace("*", ".*")): kept
        for pattern, kept in model._get_dtype_plan(dtype).items()
    }
    for place, module in model.named_modules():
        own = module._parameters.items()
        found = {f"{place}.{name}": parameter for name, parameter in own if parameter is not None}
        if any(parameter.dtype.itemsize == 1 for parameter in found.values()):
            continue
        for name, parameter in found.items():
            if parameter.is_floating_point():
                kept = (kept for pattern, kept in plan.items() if pattern.search(name))
                parameter.data = parameter.data.to(next(kept, dtype))


def _choose_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A torch dtype for its name; ``"auto"`` stays."""
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is no torch dtype; use 'auto', 'bfloat16' or 'float16'")
    if not named.is_floating_point or named.itemsize == 1:
        raise ValueError(f"dtype={dtype!r} is no floating-point dtype of 16 bits or more")
    return named


def _read_config(path_or_repo: str, revision: str | None) -> PreTrainedConfig:
    if why := why_no_place(path_or_repo):
        raise ValueError(why)
    check_revision(path_or_repo, revision)
    if Path(path_or_repo).is_dir():
        read_manifest(Path(path_or_repo))
        check_folder(Path(path_or_repo))
    try:
        config = AutoConfig.from_pretrained(path_or_repo, revision=revision)
    except Exception as error:  # whatever a config.json may hold
        raise ValueError(f"{path_or_repo}: no model here ({first_line(error)})") from None
    check_top_k(path_or_repo, config.to_dict())
    return config


def _from_pretrained(
    path_or_repo: str,
    config: PreTrainedConfig,
    dtype: str | torch.dtype,
    device: torch.device | str,
    revision: str | None,
    quantization: QmoeConfig | None = None,
    **places: Any,
) -> PreTrainedModel:
    """The model, in which every weight is from the checkpoint.

    Raises:
        ValueError: a file is missing or broken, or the checkpoint and its config.json do not go
            together.
    """
    auto_class = _auto_class(config, path_or_repo)
    layouts = {}
    try:
        model, info = auto_class.from_pretrained(
            path_or_repo,
            config=config,
            dtype=dtype,
            device_map=device,
            revision=revision,
            use_safetensors=True,
            quantization_config=quantization,
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
            **places,
        )
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) or Path(path_or_repo).is_dir():
            _check_files(path_or_repo, revision)
        raise ValueError(
            f"{path_or_repo}: its weights cannot be read ({first_line(error)})"
        ) from None
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "conversion" not in str(error):
            raise
        with torch.device("meta"), suppress(ValueError):
            model = auto_class.from_config(config)
            layouts = find_experts(model)  # ValueError: a dense model
        headers = _check_files(path_or_repo, revision)
        if layouts:
            check_experts(model, layouts, headers)
        raise ValueError(
            f"{path_or_repo}: its tensors do not have the shapes that its config.json asks for; "
            "download it again"
        ) from None
    architectures = config.architectures or [type(model).__name__]
    _check_complete(path_or_repo, revision, model, architectures, info)
    return model


def _check_files(path_or_repo: str, revision: str | None) -> dict[str, StoredTensor]:
    """The headers of a checkpoint's files, or a CheckpointError that names the broken one."""
    config = _find_file(path_or_repo, "config.json", revision)
    return {} if config is None else open_checkpoint(config.parent)


def _find_file(path_or_repo: str, name: str, revision: str | None) -> Path | None:
    """A file of a folder or, of a repository, where it was downloaded to; None if it has none."""
    found = cached_file(
        path_or_repo,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _check_complete(
    path_or_repo: str,
    revision: str | None,
    model: PreTrainedModel,
    architectures: Collection[str],
    info: dict[str, Any],
) -> None:
    """Refuse a model with weights that are random, or a checkpoint with weights left over."""
    mismatched = {f"{n} {list(s)} instead of {list(e)}" for n, s, e in info["mismatched_keys"]}
    unexpected = set(info["unexpected_keys"])
    manifest = _find_file(path_or_repo, MANIFEST_NAME, revision) if unexpected else None
    if manifest is not None:  # whoever converted it was told of these
        extra = Manifest.read(manifest.parent).extra
        renamed = set(map(Renamer(model), extra))
        # Experts in layers beyond the model's go through the conversions of those in 8 bit.
        merged = {name + QUANTIZED_SUFFIX for name in renamed}
        unexpected -= {*extra, *renamed, *merged}
    for names, what in (
        (set(info["missing_keys"]), "missing; download or convert the checkpoint again"),
        (mismatched, "of another shape; config.json is another model's"),
        (
            _left_over(unexpected, model, architectures),
            "no part of the model that config.json describes",
        ),
    ):
        if names:
            raise ValueError(f"{path_or_repo}: {listed(names)} {what}")


def _left_over(names: set[str], model: PreTrainedModel, architectures: Collection[str]) -> set[str]:
    """Those of a checkpoint's further tensors that no part which nobody runs here explains.

    Such parts are layers that predict more than one token ahead, scales of quantized
    activations and caches, and all but the text model where that is loaded of one that reads
    images or sounds too.
    """
    modules = {name for name, _ in model.named_modules()}
    ahead = {_layer_of(name) for name in names if _AHEAD.search(name)} - {None}

    def explained(name: str) -> bool:
        if _layer_of(name) in ahead or re.search(r"\.(input|output|[kqv])_scale$", name):
            return True
        first = name.removeprefix("model.").partition(".")[0]
        other_part = first not in modules and f"model.{first}" not in modules
        return other_part and ("mtp" in first or type(model).__name__ not in architectures)

    return {name for name in names if not explained(name)}


# What layers have that predict more than one token ahead.
_AHEAD = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head|nextn\w*|mtp\w*)\.")


def _layer_of(name: str) -> str | None:
    match = re.match(r"(?:.*\.)?layers\.\d+\.", name)
    return None if match is None else match[0]


def _auto_class(config: PreTrainedConfig, path_or_repo: str) -> Any:
    """The class of transformers that makes text with such a model."""
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto_class._model_mapping:
            return auto_class
    raise ValueError(
        f"{path_or_repo}: a model of type {config.model_type!r} makes no text; "
        "docs/models.md lists those that do"
    )


def _quantization(config: PreTrainedConfig) -> dict[str, Any]:
    """What a checkpoint's configuration says of how it is quantized; empty if it is not."""
    return (
        getattr(config, "quantization_config", None)
        or getattr(config.get_text_config(decoder=True), "quantization_config", None)
        or {}
    )


def _ask_for_paging(config: PreTrainedConfig, options: PagingOptions, path_or_repo: str) -> None:
    """Let the quantizer of a checkpoint in 8 bit know that its experts are to be paged."""
    quantization = _quantization(config)
    method = format_of(quantization)
    if method not in (QMOE, COMPRESSED_TENSORS):
        raise ValueError(
            f"{path_or_repo}: hbm_budget pages experts in 8 bit, and these are "
            + (f"quantized otherwise ({method})" if method else "not: add weights='int8'")
        )
    config.quantization_config = {**quantization, "paging": options}


def _ask_for_shares(
    config: PreTrainedConfig, group: RankGroup, path_or_repo: str, weights: str | None
) -> None:
    """Let the quantizer of a checkpoint in 8 bit know that its experts are spread over ranks."""
    method = format_of(_quantization(config))
    if weights is not None or method not in (QMOE, COMPRESSED_TENSORS):
        how = (
            "weights=... quantizes while it loads" if weights else "these experts are not in 8 bit"
        )
        raise ValueError(
            f"{path_or_repo}: expert_parallel reads a rank's own experts from a converted "
            f"checkpoint, and {how}; convert it with convert-checkpoint first"
        )
    config.quantization_config = {**_quantization(config), "group": group}


def _choose_activations(model: PreTrainedModel, activations: str, path_or_repo: str) -> None:
    modules = quantized_modules(model).values()
    if not modules and activations in STORAGE_DTYPE:
        raise ValueError(
            f"{path_or_repo}: activations={activations!r} needs 8-bit experts, and these are not: "
            f"add weights={activations!r}"
        )
    for experts in modules:
        check_activations(activations, experts.weights)
        experts.activations = activations
