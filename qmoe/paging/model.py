"""Models whose experts are paged: from a budget to an expert cache, and live changes of both.

A model keeps what it was given in one attribute, ``model.qmoe_paging``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qmoe.experts.guard import guard_of
from qmoe.experts.pages import LayerPages
from qmoe.experts.quantized import QuantizedExperts, quantized_modules
from qmoe.paging.budget import Budget, parse_budget, plan
from qmoe.paging.expert_cache import ExpertCache, Predictor
from qmoe.paging.footprint import measure
from qmoe.paging.host_store import HostStore
from qmoe.paging.stats import CacheStats

# Tokens per sequence where nobody said how many; less where the model takes less.
DEFAULT_CONTEXT = 8192

# Where routers keep what is added to their scores only to choose experts by.
_SELECTION_BIASES = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class Paging:
    """What a model was given; ``cache`` is None where everything is resident."""

    budget: Budget
    device: torch.device
    cache: ExpertCache | None
    prefetch: bool = False


def plan_budget(
    model: Any,
    layer_pages: Sequence[LayerPages],
    hbm_budget: str | int | float,
    device: torch.device | str,
    context: int | None = None,
    batch_size: int = 1,
) -> Budget:
    """Divide a budget of device memory for ``model``; nothing is changed.

    Args:
        model: on one device, not necessarily ``device``; its experts may be quantized, not yet
            quantized, paged, or without their weights.
        layer_pages: of its experts modules, named as these are.
        hbm_budget: see :func:`qmoe.paging.budget.parse_budget`. On the CPU the machine's memory
            stands for the device's.
        device: where the model is going to run.
        context: tokens per sequence, new ones included; by default 8192, or all that the model
            takes.
        batch_size: sequences at a time.

    Raises:
        ValueError: a budget that is no size, is more than is free, or is too small; a context that
            the model does not take.
    """
    device = torch.device(device)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        context = min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    elif limit is not None and context > limit:
        raise ValueError(f"context={context}: {type(model).__name__} takes {limit} tokens at most")
    footprint = measure(model, layer_pages, device)
    total, free = _memory(device)
    return plan(
        layer_pages,
        footprint.top_k,
        total=parse_budget(hbm_budget, total, free + _held(model, device)),
        resident=footprint.resident,
        kv_cache=footprint.kv_cache(context, batch_size),
        workspace=lambda chunk: footprint.workspace(chunk, context, batch_size),
        context=context,
        batch_size=batch_size,
    )


def page_experts(
    model: nn.Module,
    store: HostStore,
    budget: Budget,
    device: torch.device | str,
    *,
    prefetch: bool = False,
) -> None:
    """Let a model on ``device`` take its experts from ``store``, whose layers are its experts'.

    Raises:
        torch.OutOfMemoryError: the slots do not fit; the model is as it was.
    """
    device = torch.device(device)
    modules = quantized_modules(model)
    assert [layer.name for layer in store.layers] == list(modules)
    # One slot until the weights that were resident, if any, have made room for the others.
    cache = ExpertCache(
        store,
        device,
        num_slots=1,
        num_staging=0,
        prefetch=prefetch,
        predictors=predictors(model),
    )
    had_weights = all(p is not None for m in modules.values() for p in m._parameters.values())
    for layer, experts in enumerate(modules.values()):
        experts.page(cache, layer)
    try:
        cache.resize(budget.num_slots, budget.num_staging)
    except BaseException:
        if had_weights:
            _unpage(modules.values(), cache)
        raise
    _remember(model, Paging(budget, device, cache, prefetch))


def keep_resident(model: nn.Module, budget: Budget, device: torch.device | str) -> None:
    """Remember the budget of a model that has all of its weights on ``device``."""
    _remember(model, Paging(budget, torch.device(device), None))


def _remember(model: Any, paging: Paging) -> None:
    model.qmoe_paging = paging
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.paged = paging.cache is not None


def resize(
    model: Any,
    *,
    hbm_budget: str | int | float,
    context: int | None = None,
    batch_size: int | None = None,
) -> Budget:
    """Give a model another budget, live: between two steps of a generation, for instance.

    A model that fits becomes resident, and its pages in host memory are freed; one that no longer
    fits is paged, and they are made from its weights. Its output stays the same, bit for bit. CUDA
    graphs that were captured with it must be captured again.

    Args:
        model: quantized by qmoe.
        hbm_budget: see :func:`qmoe.load`.
        context: tokens per sequence; by default as before.
        batch_size: sequences at a time; by default as before.

    Returns:
        How the budget is spent.

    Raises:
        ValueError: the model is not quantized by qmoe, the budget cannot work, or host memory is
            too short for the pages. The model is then as it was.
        torch.OutOfMemoryError: something else has taken the memory since; the same holds.

    Example:
        >>> import qmoe
        >>> model = qmoe.load("examples/tiny-moe", weights="int8", device="cpu")
        >>> qmoe.resize(model, hbm_budget="4GiB", context=256).all_resident
        True
    """
    modules = quantized_modules(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no experts that qmoe quantized; call qmoe.patch(model) "
            "first"
        )
    before: Paging | None = getattr(model, "qmoe_paging", None)
    if before is not None:
        context = context or before.budget.context
        batch_size = batch_size or before.budget.batch_size
    device = before.device if before is not None else next(model.parameters()).device
    layers = pages_of(modules)
    guard_of(model).release()  # they would count as memory that something else has
    guard_of(model).version += 1
    budget = plan_budget(model, layers, hbm_budget, device, context, batch_size or 1)
    cache = before.cache if before is not None else None
    prefetch = before.prefetch if before is not None else False
    if cache is not None and budget.all_resident:
        _make_resident(modules, cache)
        cache = None
    elif cache is not None:
        cache.resize(budget.num_slots, budget.num_staging)
    elif not budget.all_resident:
        store = _store_of(modules, layers, device)
        try:
            page_experts(model, store, budget, device, prefetch=prefetch)
        except BaseException:
            store.close()
            raise
        return budget
    _remember(model, Paging(budget, device, cache, prefetch))
    return budget


def stats(model: nn.Module) -> CacheStats:
    """What a paged model's expert cache did so far, without waiting for what is being computed.

    Raises:
        ValueError: the model is not paged.
    """
    paging: Paging | None = getattr(model, "qmoe_paging", None)
    if paging is None or paging.cache is None:
        state = "resident: all of its experts are on the device, nothing is copied or counted"
        if not quantized_modules(model):
            state = "not quantized by qmoe"
        raise ValueError(f"{type(model).__name__} is {state}")
    return paging.cache.read_counters()


def pages_of(modules: Mapping[str, QuantizedExperts]) -> list[LayerPages]:
    """What the pages of each module look like, in the modules' order."""
    return [experts.layer_pages(name) for name, experts in modules.items()]


# ---- between resident and paged ----------------------------------------------------------------


def _unpage(modules: Iterable[QuantizedExperts], cache: ExpertCache) -> None:
    """Give modules parameters with what their pages hold, where their scales are."""
    for layer, experts in enumerate(modules):
        weights = []
        device = experts.down_proj_scale.device
        for pages in cache.host.weights(layer):
            weight = torch.empty(pages.shape, dtype=pages.dtype, device=device)
            # One by one, each copy is contiguous on both sides.
            for target, source in zip(weight, pages, strict=True):
                target.copy_(source, non_blocking=True)
            weights.append(weight)
        experts.unpage(*weights)
    if cache.device.type == "cuda":
        torch.cuda.synchronize(cache.device)  # the pages may go now


def _make_resident(modules: Mapping[str, QuantizedExperts], cache: ExpertCache) -> None:
    num_slots, num_staging = cache.num_slots, cache.num_staging
    cache.resize(1, 0)  # make room first
    try:
        _unpage(modules.values(), cache)
    except BaseException:
        for layer, experts in enumerate(modules.values()):
            experts.page(cache, layer)
        cache.resize(num_slots, num_staging)
        raise
    cache.close()


def host_store(
    layers: Sequence[LayerPages], device: torch.device, *, progress: bool = False
) -> HostStore:
    """Host memory for pages that ``device`` is going to read, pinned if that is a GPU.

    Raises:
        ValueError: see :class:`HostStore`.
    """
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else nullcontext():
        return HostStore(layers, pin=on_gpu, progress=progress)


def fill_layer(store: HostStore, layer: int, experts: QuantizedExperts) -> None:
    """Copy the weights that a module holds into its pages; copies from a GPU are only queued."""
    for pages, weights in zip(store.weights(layer), experts.quantized_weights(), strict=True):
        # One by one, each copy is contiguous on both sides.
        for target, source in zip(pages, weights.detach(), strict=True):
            target.copy_(source, non_blocking=True)


def _store_of(
    modules: Mapping[str, QuantizedExperts], layers: Sequence[LayerPages], device: torch.device
) -> HostStore:
    """A host store filled with the weights that modules have on ``device``."""
    store = host_store(layers, device)
    try:
        for layer, experts in enumerate(modules.values()):
            fill_layer(store, layer, experts)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except BaseException:
        store.close()
        raise
    return store


# ---- memory of a device ------------------------------------------------------------------------


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a device, and what of it nobody holds."""
    if device.type != "cuda":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    free, total = torch.cuda.mem_get_info(device)
    # What torch's allocator keeps for later is free as well.
    return total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _held(model: nn.Module, device: torch.device) -> int:
    """Bytes that the model holds on a device already; on the CPU nothing counts as taken."""
    if device.type != "cuda":
        return 0
    index = device.index if device.index is not None else torch.cuda.current_device()
    tensors = (*model.parameters(), *model.buffers())
    paging: Paging | None = getattr(model, "qmoe_paging", None)
    cached = 0 if paging is None or paging.cache is None else paging.cache.memory.nbytes
    return cached + sum(t.nbytes for t in tensors if t.is_cuda and t.device.index == index)


# ---- prediction --------------------------------------------------------------------------------


def predictors(model: nn.Module) -> list[Predictor | None]:
    """For each experts module, what proposes the experts of the next one.

    A proposal is what the next layer's router makes of the hidden states that go into this layer's
    experts, (num_tokens, hidden_size) -> (num_tokens, top_k): a hint, ids of identity experts
    included. None where the next router is unlike those that are known, and for the last module.
    """
    names = list(quantized_modules(model))
    return [*(_predictor(model, following) for following in names[1:]), None]


def _predictor(model: Any, name: str) -> Predictor | None:
    experts: QuantizedExperts = model.get_submodule(name)
    layout = experts.layout
    block = model.get_submodule(name.rpartition(".")[0])
    shape = (layout.num_experts + layout.num_identity_experts, layout.hidden_size)
    inside = set(experts.modules())
    router = next(
        (
            module
            for module in block.modules()
            if module not in inside
            and (weight := module._parameters.get("weight")) is not None
            and tuple(weight.shape) == shape
        ),
        None,
    )
    if router is None or layout.dense:
        return None
    bias = next(
        (
            tensor
            for module in block.modules()
            for tensor in (getattr(module, bias, None) for bias in _SELECTION_BIASES)
            if isinstance(tensor, torch.Tensor) and tensor.numel() == shape[0]
        ),
        None,
    )
    counts = [
        getattr(m, n, None) for n in ("top_k", "num_experts_per_tok") for m in (router, block)
    ]
    counts.append(getattr(model.config.get_text_config(), "num_experts_per_tok", None))
    top_k = next((count for count in counts if isinstance(count, int)), None)
    if top_k is None:
        return None

    def predict(hidden_states: torch.Tensor) -> torch.Tensor:
        weight = router.weight
        scores = F.linear(hidden_states.to(weight.dtype), weight, getattr(router, "bias", None))
        if bias is not None:
            scores = scores.sigmoid() + bias.view(-1)
        return scores.topk(top_k, dim=-1).indices

    return torch.no_grad()(predict)
