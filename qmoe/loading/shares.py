"""What a rank reads of a checkpoint whose experts are spread over ranks: its own, and no more."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from qmoe.checkpoints.files import CheckpointError, StoredTensor, open_file
from qmoe.checkpoints.schema import BIAS_SUFFIX, SCALE_SUFFIX
from qmoe.experts.layout import ExpertsLayout
from qmoe.experts.quantized import quantized_modules


def shared_tensors(layout: ExpertsLayout) -> dict[str, tuple[int, ...]]:
    """The scales and biases of a layer's experts, all of them, with their shapes."""
    scales = {p + SCALE_SUFFIX: layout.shape(p)[:2] for p in layout.projections}
    return scales | {bias: layout.shape(bias) for bias in layout.biases}


def load_shares(
    model: nn.Module, stored: Mapping[str, Sequence[StoredTensor]], device: torch.device
) -> None:
    """Read the scales and biases of this rank's experts.

    Args:
        model: its experts modules have shares, and nothing else yet.
        stored: ``{module}.{tensor}`` -> the tensors that, one behind the other, are all experts'.
        device: where they go.

    Raises:
        ValueError: a scale that cannot be one, or a file that has changed or cannot be read.
    """
    for name, experts in quantized_modules(model).items():
        tensors = {}
        for leaf, shape in shared_tensors(experts.layout).items():
            assert experts.share is not None
            # Of a module that was found by its tensors, biases may be in no file that is known.
            if f"{name}.{leaf}" not in stored:
                raise ValueError(
                    f"expert_parallel: {name}.{leaf} is stored in a way that cannot be read in "
                    "part; load it without expert_parallel"
                )
            part = read_part(
                stored[f"{name}.{leaf}"], experts.share.num_experts, experts.share.first, shape[0]
            )
            if leaf.endswith(BIAS_SUFFIX):
                part = part.to(getattr(model, "dtype", part.dtype))
            else:
                part = part.float()
                check_scales(f"{name}.{leaf}", part)
            tensors[leaf] = part.view(shape).to(device)
        experts.take_share(tensors)


def read_part(
    tensors: Sequence[StoredTensor], num_experts: int, first: int, count: int
) -> torch.Tensor:
    """Read some experts of what is stored one expert behind the other.

    Args:
        tensors: which hold, one behind the other, ``num_experts`` experts.
        num_experts, first, count: all of them, and those that are wanted.

    Returns:
        (count, elements of one expert) in the files' dtype.

    Raises:
        CheckpointError: a file that has changed or cannot be read.
    """
    size = sum(tensor.numel for tensor in tensors) // num_experts
    start, stop, position = first * size, (first + count) * size, 0
    parts = []
    for tensor in tensors:
        low, high = max(start, position), min(stop, position + tensor.numel)
        if low < high:
            parts.append(_read(tensor, low - position, high - position))
        position += tensor.numel
    return torch.cat(parts).view(count, size)


def _read(tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a tensor in a file."""
    itemsize = tensor.torch_dtype.itemsize
    buffer = bytearray((stop - start) * itemsize)
    with open_file(tensor.file) as stream:
        if tensor.version is not None:
            tensor.version.check(tensor.file, stream.fileno())
        stream.seek(tensor.offset + start * itemsize)
        target = memoryview(buffer)
        while target:
            num_read = stream.readinto(target)  # type: ignore[attr-defined]
            if not num_read:
                raise CheckpointError(f"{tensor.file}: ends in {tensor.name}; download it again")
            target = target[num_read:]
    return torch.frombuffer(buffer, dtype=tensor.torch_dtype)


def check_scales(name: str, scales: torch.Tensor) -> None:
    """Raise ValueError where a scale is none."""
    if not (scales.isfinite() & (scales >= 0)).all():
        raise ValueError(
            f"{name} holds a negative number, an infinity or NaN; download or convert the "
            "checkpoint again"
        )


def check_spread(model: nn.Module, kept: Collection[str]) -> None:
    """Refuse experts that every rank would hold whole.

    Args:
        kept: experts modules that stay in 16 bit.

    Raises:
        ValueError: there are some, or no others.
    """
    if kept:
        raise ValueError(
            f"expert_parallel: {sorted(kept)[0]} is not in 8 bit, so that every rank would hold "
            "all of it; convert the checkpoint with convert-checkpoint, all layers of it"
        )
    if not quantized_modules(model):
        raise ValueError(
            f"expert_parallel: {type(model).__name__} has no experts in 8 bit to spread over ranks"
        )
