"""Load a checkpoint, converted or not, from a folder or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qmoe.checkpoints.files import check_folder
from qmoe.checkpoints.hub import is_hub_id
from qmoe.checkpoints.schema import COMPRESSED_TENSORS, QMOE
from qmoe.experts.quantized import quantized_modules
from qmoe.loading.devices import choose_device
from qmoe.loading.patch import patch
from qmoe.paging.options import PagingOptions
from qmoe_kernels.fused_moe import check_activations
from qmoe_kernels.quantization import STORAGE_DTYPE

if TYPE_CHECKING:
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
    batch_size: int = 1,
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
        batch_size: sequences at a time that it must hold it of.

    Returns:
        The model, in evaluation mode, on ``device``.

    Raises:
        ValueError: no such folder or repository, an unknown device or dtype, a checkpoint that is
            quantized already while ``weights`` asks for it, activations that its weights do not go
            with, a budget that cannot work (with the smallest that does), or too little host
            memory.

    Example:
        >>> import qmoe
        >>> model = qmoe.load("examples/tiny-moe", weights="int8")
    """
    path_or_repo = str(path_or_repo)
    check_activations(activations, weights)
    device = choose_device(device)
    dtype = _choose_dtype(dtype)
    config = _read_config(path_or_repo, revision)
    # What is yet to be quantized need not fit on the device before it is paged.
    load_on = device
    if hbm_budget is not None and weights is None:
        _ask_for_paging(config, PagingOptions(hbm_budget, context, batch_size), path_or_repo)
    elif hbm_budget is not None:
        load_on = torch.device("cpu")
    model = _auto_class(config).from_pretrained(
        path_or_repo, config=config, dtype=dtype, device_map=load_on, revision=revision
    )
    if weights is None:
        _choose_activations(model, activations, path_or_repo)
        return model
    return patch(
        model,
        weights,
        activations=activations,
        hbm_budget=hbm_budget,
        device=device,
        context=context,
        batch_size=batch_size,
    )


def _choose_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A torch dtype for its name; ``"auto"`` stays."""
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is no torch dtype; use 'auto', 'bfloat16' or 'float16'")
    return named


def _read_config(path_or_repo: str, revision: str | None) -> PreTrainedConfig:
    if not Path(path_or_repo).is_dir() and not is_hub_id(path_or_repo):
        raise ValueError(f"{path_or_repo}: no such folder, and no Hub id of the form owner/name")
    if Path(path_or_repo).is_dir():
        check_folder(Path(path_or_repo))
    try:
        return AutoConfig.from_pretrained(path_or_repo, revision=revision)
    except OSError as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"{path_or_repo}: no model here ({first_line})") from None


def _auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that makes text with such a model."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def _ask_for_paging(config: PreTrainedConfig, options: PagingOptions, path_or_repo: str) -> None:
    """Let the quantizer of a checkpoint in 8 bit know that its experts are to be paged."""
    quantization: dict[str, Any] = (
        getattr(config, "quantization_config", None)
        or getattr(config.get_text_config(decoder=True), "quantization_config", None)
        or {}
    )
    method = quantization.get("quant_method")
    if method not in (QMOE, COMPRESSED_TENSORS):
        raise ValueError(
            f"{path_or_repo}: hbm_budget pages experts in 8 bit, and these are "
            + (f"quantized otherwise ({method})" if method else "not: add weights='int8'")
        )
    config.quantization_config = {**quantization, "paging": options}


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
