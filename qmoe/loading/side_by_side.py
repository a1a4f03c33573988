"""The weights of q_proj, k_proj and v_proj as one tensor, so that decoding reads them in one go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack, to_dlpack

_NAMES = ("q_proj", "k_proj", "v_proj")


def lay_side_by_side(model: nn.Module) -> None:
    """Make the weights of each attention's three projections parts of one tensor.

    Names, values and shapes stay, and a state dict holds tensors that share nothing. Nothing takes
    more memory afterwards; meanwhile one layer's weights are there twice. Projections that are no
    plain `nn.Linear` of one input, share memory with others or are offloaded stay as they are, and
    so does everything where memory is short.
    """
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    owners = Counter(t.untyped_storage().data_ptr() for _, t in tensors if _is_plain(t))
    laid = False
    for module in model.modules():
        parameters = [_parameters(module._modules.get(name)) for name in _NAMES]
        if not all(parameters) or len({(len(p), p[0].shape[1]) for p in parameters}) > 1:
            continue
        groups = list(zip(*parameters, strict=True))  # weights, and biases where there are any
        if all(_can_be_one(group, owners) for group in groups):
            try:
                for group in groups:
                    _lay(group)
            except torch.OutOfMemoryError:
                break
            laid = True
            if separate not in module._state_dict_hooks.values():
                module._register_state_dict_hook(separate)
    if laid and torch.cuda.is_initialized():
        # Where the parts were is too small for what follows, and nobody's memory by now.
        torch.cuda.empty_cache()


def separate(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Give each tensor of a state dict a storage of its own, around the memory where it lies.

    safetensors refuses tensors that are parts of one storage, and accelerate drops all but one.
    """
    for key, tensor in state_dict.items():
        own = key.startswith(prefix) and type(tensor) is torch.Tensor and _is_plain(tensor)
        if own and tensor.untyped_storage().nbytes() > tensor.nbytes:
            state_dict[key] = from_dlpack(to_dlpack(tensor))


def _parameters(linear: Any) -> list[nn.Parameter]:
    """The weight and the bias of a plain linear; nothing of any other module."""
    if type(linear) is not nn.Linear or hasattr(linear, "_hf_hook"):
        return []
    return [p for p in (linear.weight, linear.bias) if p is not None]


def _can_be_one(group: Sequence[nn.Parameter], owners: Counter[int]) -> bool:
    first = group[0]
    return all(
        _is_plain(p)
        and (p.dtype, p.device) == (first.dtype, first.device)
        and not p.is_inference()
        and not (p.device.type == "cpu" and (p.is_shared() or p.is_pinned()))
        and p.is_contiguous()
        and p.untyped_storage().nbytes() == p.nbytes
        and owners[p.untyped_storage().data_ptr()] == 1
        for p in group
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is bytes of its own, and no subclass that computes them."""
    plain = type(tensor) in (nn.Parameter, torch.Tensor) and type(tensor.data) is torch.Tensor
    return plain and not tensor.is_meta and tensor.layout is torch.strided


@torch.no_grad()
def _lay(group: Sequence[nn.Parameter]) -> None:
    merged = torch.cat([p.detach() for p in group])
    for parameter, part in zip(group, merged.split([len(p) for p in group]), strict=True):
        parameter.data = part
