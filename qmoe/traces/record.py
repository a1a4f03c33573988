"""record_routing(): write down which experts a model's tokens are routed to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qmoe.experts.layout import ExpertsLayout, describe
from qmoe.experts.quantized import QuantizedExperts, layer_pages
from qmoe.paging.expert_cache import Predictor
from qmoe.traces.trace import NONE, RoutingTrace

# On a GPU the smallest tensor takes 512 bytes: so many are joined to one.
_MANY = 512


class Recording:
    """What :func:`record_routing` has seen so far; grows while the model runs."""

    def __init__(self, layouts: Sequence[ExpertsLayout]) -> None:
        self._layouts = layouts
        # For each layer, what came one after the other: (num_tokens, k) each, on its device.
        self._topk_ids: list[list[torch.Tensor]] = [[] for _ in layouts]
        self._predicted_ids: list[list[torch.Tensor]] = [[] for _ in layouts]

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
        predicted = self._join(self._predicted_ids, max(tokens))
        return RoutingTrace(
            self._join(self._topk_ids, max(tokens)),
            max(layout.num_experts for layout in self._layouts),
            tuple(layer_pages("", layout, "int8").page_bytes for layout in self._layouts),
            predicted if any(self._predicted_ids) else None,
            metadata or {},
        )

    def _join(self, recorded: list[list[torch.Tensor]], num_tokens: int) -> torch.Tensor:
        """As RoutingTrace.topk_ids; rows and columns that are missing are `NONE`."""
        top_k = max(ids.shape[1] for layer in self._topk_ids for ids in layer)
        joined = torch.full((num_tokens, len(recorded), top_k), NONE, dtype=torch.int16)
        for layer, parts in enumerate(recorded):
            if parts:
                ids = torch.cat(parts).cpu()[:, :top_k]
                joined[:, layer, : ids.shape[1]] = ids
        return joined

    def _forget_unfinished(self) -> None:
        """Take back what an interrupted pass left in the layers that it came to."""
        seen = [sum(map(len, ids)) for ids in self._topk_ids]
        if len(set(seen)) == 2 and seen == sorted(seen, reverse=True):
            for parts in filter(None, (*self._topk_ids, *self._predicted_ids)):
                parts[:] = [torch.cat(parts)[: seen[-1]]]

    def _add(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        predictor: Predictor | None,
    ) -> None:
        if topk_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "record_routing: a captured CUDA graph cannot be recorded; run eagerly"
            )
        _append(self._topk_ids[layer], _with_pages(topk_ids, self._layouts[layer]))
        if predictor is not None:
            ids = predictor(hidden_states.reshape(-1, hidden_states.shape[-1]))
            _append(self._predicted_ids[layer + 1], _with_pages(ids, self._layouts[layer + 1]))


@contextmanager
def record_routing(
    model: nn.Module, *, predictors: Sequence[Predictor | None] | None = None
) -> Iterator[Recording]:
    """Record the routing of everything that ``model`` runs inside the ``with`` block.

    Ids stay on the device until the trace is asked for, so that the model is not held up. If an
    exception ends the block, tokens that had not been through all layers are left out.

    Args:
        model: a transformers model with experts, quantized or not, paged or not.
        predictors: for each experts module, what proposes the next one's experts; recorded beside
            the routing.

    Raises:
        ValueError: the model has no experts, or ones that are called without ids (Llama 4 before
            ``qmoe.patch``); not as many predictors as experts modules.

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
    if predictors is None:
        predictors = [None] * len(experts)
    if len(predictors) != len(experts):
        raise ValueError(f"{len(predictors)} predictors for {len(experts)} experts modules")
    known = [*predictors[:-1], None]  # nothing comes after the last
    hooks = [
        module.register_forward_pre_hook(_hook(recording, layer, predictor), with_kwargs=True)
        for layer, ((module, _), predictor) in enumerate(zip(experts, known, strict=True))
    ]
    try:
        yield recording
    except BaseException:
        recording._forget_unfinished()
        raise
    finally:
        for hook in hooks:
            hook.remove()


def _hook(recording: Recording, layer: int, predictor: Predictor | None) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Experts are called by position or by the names that transformers gives its own.
        called = {**dict(zip(("hidden_states", "top_k_index"), args, strict=False)), **kwargs}
        recording._add(layer, called["hidden_states"], called["top_k_index"], predictor)

    return record


def _append(parts: list[torch.Tensor], ids: torch.Tensor) -> None:
    parts.append(ids)
    if len(parts) == _MANY:
        parts[:] = [torch.cat(parts)]


def _with_pages(ids: torch.Tensor, layout: ExpertsLayout) -> torch.Tensor:
    """A copy as int16; ids that have no page (sentinels, identity experts) are `NONE`."""
    paged = (ids >= 0) & (ids < layout.num_experts)
    return torch.where(paged, ids, NONE).to(torch.int16)
