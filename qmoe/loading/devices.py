"""Which device a model goes to."""

from __future__ import annotations

import os
from typing import Any

import torch


def choose_device(device: str | int | torch.device) -> torch.device:
    """The device that is meant, a GPU with its index; ``"auto"`` is the GPU where there is one.

    Raises:
        ValueError: no torch device, or a GPU where there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device={device!r} is no torch device; use 'auto', 'cpu' or 'cuda'"
        ) from None
    if chosen.type != "cuda":
        return chosen
    if not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: this machine has no CUDA GPU; use 'cpu'")
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    return torch.device("cuda", index)


def choose_own_device(device: str | int | torch.device) -> torch.device:
    """The device of one rank among several of a host, which becomes this process's current one.

    Without an index a GPU is the one that torchrun numbers this process by.

    Raises:
        ValueError: see :func:`choose_device`; or a host with fewer GPUs than ranks.
    """
    if device in ("auto", "cuda") and torch.cuda.is_available():
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise ValueError(
                f"this host has {count} GPUs, and torchrun started at least {local + 1} ranks on "
                f"it; start it with --nproc-per-node {count}, or give device='cpu'"
            )
        device = f"cuda:{local}"
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def only_device(device_map: Any) -> torch.device:
    """The one device of a transformers ``device_map``, for a model whose experts are paged.

    Raises:
        ValueError: it names several devices, or the disk.
    """
    if device_map is None or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return choose_device("auto")
    devices = set(device_map.values())
    if len(devices) > 1 or "disk" in devices:
        raise ValueError(
            f"device_map={device_map!r}: with a budget a model runs on one device; "
            "give device_map='cuda' or one GPU's name"
        )
    return choose_device(devices.pop())
