"""Which parameters of a model are its routers', and where a checkpoint keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.checkpoints.files import CheckpointError, StoredTensor, open_file
from qmoe.experts.layout import describe
from qmoe.experts.quantized import QuantizedExperts
from qmoe.loading.conversions import Renamer

# What every model of transformers calls the module that chooses experts; it lies beside them.
_NAMES = ("gate", "router")


def expert_blocks(model: nn.Module) -> list[str]:
    """The modules that hold experts, in 8 bit or not, and what routes to them, by name."""
    return [
        name.rpartition(".")[0]
        for name, module in model.named_modules()
        if isinstance(module, QuantizedExperts) or describe(module) is not None
    ]


def find_routers(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the modules that choose experts, by its name in the model.

    Raises:
        ValueError: experts without such a module beside them.
    """
    found: dict[str, nn.Parameter] = {}
    for block in expert_blocks(model):
        children = dict(model.get_submodule(block).named_children())
        names = [name for name in _NAMES if name in children]
        parameters = {
            ".".join(filter(None, (block, name, leaf))): parameter
            for name in names
            for leaf, parameter in children[name].named_parameters()
        }
        if not parameters:
            raise ValueError(
                f"{type(model).__name__}: {block} holds experts, but no module named "
                f"{' or '.join(_NAMES)} that chooses among them"
            )
        found |= parameters
    return found


def stored_routers(
    model: Any, routers: Mapping[str, nn.Parameter], tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Where each router's parameter lies in the checkpoint that the model was loaded from.

    Args:
        model: as loaded.
        routers: what :func:`find_routers` found in it.
        tensors: every tensor of the checkpoint.

    Raises:
        CheckpointError: a parameter that is not stored as it is in the model, value for value.
    """
    rename = Renamer(model)
    stored = {rename(name): tensor for name, tensor in tensors.items() if not _is_8_bit(tensor)}
    found = {}
    for name, parameter in routers.items():
        tensor = stored.get(name)
        if tensor is None or not _is_same(tensor, parameter):
            raise CheckpointError(
                f"{type(model).__name__}: the checkpoint does not store {name} as the model has "
                "it, so it could not be written back; routers of this model cannot be adapted"
            )
        found[name] = tensor
    return found


def read_tensor(stored: StoredTensor) -> Tensor:
    """The values of one tensor of a checkpoint."""
    with open_file(stored.file) as stream:
        stream.seek(stored.offset)
        data = bytearray(stream.read(stored.nbytes))
    return torch.frombuffer(data, dtype=stored.torch_dtype).view(stored.shape)


def _is_8_bit(stored: StoredTensor) -> bool:
    return stored.nbytes == stored.numel


def _is_same(stored: StoredTensor, parameter: Tensor) -> bool:
    if stored.shape != tuple(parameter.shape) or stored.dtype not in ("BF16", "F16", "F32"):
        return False
    return torch.equal(read_tensor(stored).to(parameter.dtype), parameter.detach().cpu())


class LayerOutputs:
    """The outputs of the blocks with experts in one forward pass, in the order of the layers."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []

    def take(self) -> list[Tensor]:
        """(rows, hidden_size) for each block since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def _add(self, module: nn.Module, args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        self._outputs.append(first.flatten(0, -2))


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[LayerOutputs]:
    """Keep the outputs of the blocks with experts while the model runs inside the ``with``."""
    kept = LayerOutputs()
    blocks = [model.get_submodule(name) for name in expert_blocks(model)]
    hooks = [block.register_forward_hook(kept._add) for block in blocks]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
