"""record_routing(): write down which experts a model's tokens are routed to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qmoe.experts.layout import ExpertsLayout, describe
from qmoe.experts.quantized import QuantizedExperts, layer_pages
from qmoe.traces.trace import NONE, RoutingTrace

# On a GPU the smallest tensor takes 512 bytes: so many are joined to one.
_MANY = 512


class Recording:
    """What :func:`record_routing` has seen so far; grows while the model runs."""

    def __init__(self, layouts: Sequence[ExpertsLayout]) -> None:
        self._layouts = layouts
        # For each layer, what came one after the other: (num_tokens, k) each, on its device.
        self._topk_ids: list[list[torch.Tensor]] = [[] for _ in layouts]

    def trace(self, metadata: dict[str, str] | None = None) -> RoutingTrace:
        """Everything recorded so far; waits for the device.

        The tokens of a batch follow one another as the model lays them out, padding included.

        Raises:
            ValueError: nothing was recorded, or not the same number of tokens in every layer.
        """
        tokens = {sum(map(len, ids)) for ids in self._topk_ids}
        if tokens == {0}:
            raise ValueError("nothing was recorded: the model has not run")
        if len(tokens) > 1:
            raise ValueError(f"layers saw {min(tokens)} to {max(tokens)} tokens, not the same")
        (num_tokens,) = tokens
        top_k = max(ids.shape[1] for layer in self._topk_ids for ids in layer)
        joined = torch.full((num_tokens, len(self._topk_ids), top_k), NONE, dtype=torch.int16)
        for layer, parts in enumerate(self._topk_ids):
            ids = torch.cat(parts).cpu()
            joined[:, layer, : ids.shape[1]] = ids
        return RoutingTrace(
            joined,
            max(layout.num_experts for layout in self._layouts),
            tuple(layer_pages("", layout, "int8").page_bytes for layout in self._layouts),
            metadata or {},
        )

    def _forget_unfinished(self) -> None:
        """Take back what an interrupted pass left in the layers that it came to."""
        seen = [sum(map(len, ids)) for ids in self._topk_ids]
        if len(set(seen)) == 2 and seen == sorted(seen, reverse=True):
            for parts in filter(None, self._topk_ids):
                parts[:] = [torch.cat(parts)[: seen[-1]]]

    def _add(self, layer: int, topk_ids: torch.Tensor) -> None:
        """Keep a copy as int16; ids without a page (sentinels, identity experts) are `NONE`."""
        paged = (topk_ids >= 0) & (topk_ids < self._layouts[layer].num_experts)
        parts = self._topk_ids[layer]
        parts.append(torch.where(paged, topk_ids, NONE).to(torch.int16))
        if len(parts) == _MANY:
            parts[:] = [torch.cat(parts)]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Recording]:
    """Record the routing of everything that ``model`` runs inside the ``with`` block.

    Ids stay on the device until the trace is asked for, so that the model is not held up. If an
    exception ends the block, tokens that had not been through all layers are left out.

    Args:
        model: a transformers model with experts, quantized or not, paged or not.

    Raises:
        ValueError: the model has no experts, or ones that are called without ids (Llama 4 before
            ``qmoe.patch``).

    Example:
        >>> import qmoe
        >>> from transformers import AutoTokenizer
        >>> model = qmoe.load("examples/tiny-moe", weights="int8")
        >>> tokenizer = AutoTokenizer.from_pretrained("examples/tiny-moe")
        >>> with qmoe.record_routing(model) as recording:
        ...     _ = model(**tokenizer("import os", return_tensors="pt"))
        >>> recording.trace().topk_ids.shape
        torch.Size([2, 6, 2])
    """
    experts: list[tuple[nn.Module, ExpertsLayout]] = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            experts.append((module, module.layout))
        elif (layout := describe(module)) is not None:
            if layout.dense:
                raise ValueError(
                    f"{name}: {type(module).__name__} takes every token for every expert; "
                    "its routing can be recorded after qmoe.patch(model)"
                )
            experts.append((module, layout))
    if not experts:
        raise ValueError(f"{type(model).__name__} has no experts; there is no routing to record")
    recording = Recording([layout for _, layout in experts])
    hooks = [
        module.register_forward_pre_hook(_hook(recording, layer), with_kwargs=True)
        for layer, (module, _) in enumerate(experts)
    ]
    try:
        yield recording
    except BaseException:
        recording._forget_unfinished()
        raise
    finally:
        for hook in hooks:
            hook.remove()


def _hook(recording: Recording, layer: int) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Experts are called by position or by the names that transformers gives its own.
        recording._add(layer, args[1] if len(args) > 1 else kwargs["top_k_index"])

    return record
