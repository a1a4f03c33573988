"""Load a checkpoint, converted or not, from a folder or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qmoe.checkpoint import is_hub_id
from qmoe.patching import patch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qmoe_kernels.quantization import WeightFormat


def load(
    path_or_repo: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    weights: WeightFormat | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a model for generating text.

    Args:
        path_or_repo: a local folder, or a repository on the Hub.
        device: ``"auto"`` (the GPU where there is one, else the CPU) or any torch device.
        dtype: of everything that is not quantized: ``"auto"`` (the checkpoint's own), a torch dtype
            or its name.
        weights: None keeps the checkpoint as it is, 8 bit or 16 bit; ``"int8"`` or ``"fp8"``
            quantizes the experts of a 16-bit checkpoint on load.
        revision: branch, tag or commit on the Hub.

    Returns:
        The model, in evaluation mode, on ``device``.

    Raises:
        ValueError: no such folder or repository, an unknown device or dtype, or a checkpoint that
            is quantized already while ``weights`` asks for it.

    Example:
        >>> import qmoe
        >>> model = qmoe.load("examples/tiny-moe", weights="int8")
    """
    path_or_repo = str(path_or_repo)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device={device!r} is no torch device; use 'auto', 'cpu' or 'cuda'"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: this machine has no CUDA GPU; use 'cpu'")
    if isinstance(dtype, str) and dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise ValueError(
                f"dtype={dtype!r} is no torch dtype; use 'auto', 'bfloat16' or 'float16'"
            )
        dtype = named
    if not Path(path_or_repo).is_dir() and not is_hub_id(path_or_repo):
        raise ValueError(f"{path_or_repo}: no such folder, and no Hub id of the form owner/name")
    try:
        config = AutoConfig.from_pretrained(path_or_repo, revision=revision)
    except OSError as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"{path_or_repo}: no model here ({first_line})") from None
    auto = AutoModelForCausalLM
    if type(config) not in AutoModelForCausalLM._model_mapping:
        auto = AutoModelForImageTextToText
    model = auto.from_pretrained(
        path_or_repo, config=config, dtype=dtype, device_map=device, revision=revision
    )
    return model if weights is None else patch(model, weights)
