"""Models whose experts are paged: from a budget to an expert cache, and live changes of both.

A model keeps what it was given in one attribute, ``model.qmoe_paging``.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qmoe.checkpoints.inspection import find_top_k
from qmoe.experts.guard import guard_of
from qmoe.experts.pages import LayerPages
from qmoe.experts.quantized import QuantizedExperts, quantized_modules
from qmoe.paging.budget import Budget, divide_budget, parse_budget
from qmoe.paging.expert_cache import ExpertCache
from qmoe.paging.footprint import measure
from qmoe.paging.frame_store import FrameStore
from qmoe.paging.host_store import HostStore, PageRead
from qmoe.paging.options import PagingOptions
from qmoe.paging.sharing import calibrate, sharing_of
from qmoe.paging.stats import CacheStats

# Tokens per sequence where nobody said how many; less where the model takes less.
DEFAULT_CONTEXT = 8192


@dataclass(frozen=True)
class Paging:
    """What a model was given; ``cache`` is None where everything is resident.

    Attributes:
        misses, host_memory: see :class:`PagingOptions`.
    """

    budget: Budget
    device: torch.device
    cache: ExpertCache | None
    misses: str = "link"
    host_memory: str | int | None = None

    @classmethod
    def of(
        cls,
        options: PagingOptions,
        budget: Budget,
        device: torch.device,
        cache: ExpertCache | None,
    ) -> Paging:
        """What was asked for, and what came of it."""
        return cls(budget, device, cache, options.misses, options.host_memory)


def budget_for(
    model: Any, layers: Sequence[LayerPages], options: PagingOptions, device: torch.device | str
) -> Budget:
    """Divide a budget of device memory for ``model``; nothing is changed.

    Args:
        model: on one device, not necessarily ``device``; its experts may be quantized, not yet
            quantized, paged, or without their weights.
        layers: pages of its experts modules, named as these are.
        options: the budget, and what it must hold. On the CPU the machine's memory stands for the
            device's.
        device: where the model is going to run.

    Raises:
        ValueError: a budget that is no size, is more than is free, or is too small; a context that
            the model does not take.
    """
    device = torch.device(device)
    context = options.context
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        context = min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    elif limit is not None and context > limit:
        raise ValueError(f"context={context}: {type(model).__name__} takes {limit} tokens at most")
    footprint = measure(model, layers, device)
    total, free = _memory(device)
    return divide_budget(
        layers,
        footprint.top_k,
        total=parse_budget(options.hbm_budget, total, free + _held(model, device)),
        resident=footprint.resident,
        kv_cache=footprint.kv_cache(context, options.batch_size),
        workspace=lambda chunk: footprint.workspace(chunk, context, options.batch_size),
        context=context,
        batch_size=options.batch_size,
    )


def page_experts(
    model: nn.Module,
    store: HostStore | FrameStore,
    budget: Budget,
    device: torch.device | str,
    options: PagingOptions,
) -> None:
    """Let a model on ``device`` take its experts from ``store``, whose layers are its experts'.

    Raises:
        ValueError: the host is to take misses, and cannot compute these experts; the model is as it
            was.
        torch.OutOfMemoryError: the slots do not fit; the model is as it was.
    """
    modules = quantized_modules(model)
    assert [layer.name for layer in store.layers] == list(modules)
    device = torch.device(device)
    with _changing(model):
        cache = ExpertCache(
            store, device, num_slots=budget.num_slots, num_staging=budget.num_staging
        )
        cache.share_misses(sharing_of(cache, modules, options.misses))
        for layer, experts in enumerate(modules.values()):
            experts.page(cache, layer)
        _remember(model, Paging.of(options, budget, device, cache))
        _calibrate(model, cache, modules, options.misses)


def keep_resident(
    model: nn.Module, budget: Budget, device: torch.device | str, options: PagingOptions
) -> None:
    """Remember the budget of a model that has all of its weights on ``device``."""
    with _changing(model):
        _remember(model, Paging.of(options, budget, torch.device(device), None))


@contextmanager
def _changing(model: nn.Module) -> Iterator[None]:
    """Nothing of the model is queued meanwhile, and what is made is fit for training code too."""
    with (
        guard_of(model).changing("qmoe.resize", live=True),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


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
    misses: str | None = None,
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
        misses: who serves experts that are not on the device, see :func:`qmoe.load`; by default as
            before.

    Returns:
        How the budget is spent.

    Raises:
        ValueError: the model is not quantized by qmoe, the budget cannot work, or host memory is
            too short for the pages. The model is then as it was.
        RuntimeError: patching the model was cut off.
        torch.OutOfMemoryError: something else has taken the memory since. The model is as it was,
            or has fewer slots where it does not fit any more; the message says how many.

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
    for experts in modules.values():
        experts.check_usable()
    with _changing(model):
        before: Paging | None = getattr(model, "qmoe_paging", None)
        if before is not None:
            context = context or before.budget.context
            batch_size = batch_size or before.budget.batch_size
            misses = misses or before.misses
        device = before.device if before is not None else next(model.parameters()).device
        layers = pages_of(modules)
        host_memory = None if before is None else before.host_memory
        options = PagingOptions(hbm_budget, context, batch_size or 1, misses or "link", host_memory)
        for experts in modules.values():
            options.check_activations(experts.activations)
        budget = budget_for(model, layers, options, device)
        if not budget.all_resident and not _caches(modules) and bounds(options, layers):
            raise ValueError(
                f"host_memory={host_memory!r} leaves experts in the checkpoint's files, and this "
                "model has all of them on the device; load it again with the smaller budget"
            )
        _synchronize(device)  # steps that are queued still use the weights and slots
        caches = _caches(modules)
        if budget.all_resident:
            _make_resident(modules)
            _remember(model, Paging.of(options, budget, device, None))
        elif len(caches) == 1 and all(experts.paged for experts in modules.values()):
            (cache,) = caches
            sharing = cache.sharing
            if before is None or options.misses != before.misses or sharing is None:
                sharing = sharing_of(cache, modules, options.misses)
            cache.resize(budget.num_slots, budget.num_staging)
            cache.share_misses(sharing)
            _remember(model, Paging.of(options, budget, device, cache))
            _calibrate(model, cache, modules, options.misses)
        else:
            _make_paged(model, modules, layers, budget, device, options)
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


def check_answers(model: nn.Module) -> None:
    """Raise RuntimeError if the host left out what it was to compute of a model's steps.

    For results that were waited for and are about to be given out.
    """
    paging: Paging | None = getattr(model, "qmoe_paging", None)
    if paging is not None and paging.cache is not None:
        paging.cache.check_answers()


def pages_of(modules: Mapping[str, QuantizedExperts]) -> list[LayerPages]:
    """What the pages of each module look like, in the modules' order."""
    return [experts.layer_pages(name) for name, experts in modules.items()]


def _calibrate(
    model: Any, cache: ExpertCache, modules: Mapping[str, QuantizedExperts], misses: str
) -> None:
    if cache.sharing is not None:
        top_k = find_top_k(model.config.to_dict()) or 1
        calibrate(cache, modules, misses, top_k=top_k, dtype=model.dtype)


# ---- between resident and paged ----------------------------------------------------------------
# A layer computes with its pages or with its parameters, and both give the same bits: wherever an
# error or an interrupt strikes, each layer has one of them. A cache is closed once none uses it.


def _caches(modules: Mapping[str, QuantizedExperts]) -> set[ExpertCache]:
    """The cache that the modules take their experts from: none, or one."""
    return {experts.paged[0] for experts in modules.values() if experts.paged is not None}


def _make_resident(modules: Mapping[str, QuantizedExperts]) -> None:
    caches = {cache: (cache.num_slots, cache.num_staging) for cache in _caches(modules)}
    before = [(experts, experts.paged) for experts in modules.values()]
    try:
        for cache in caches:
            cache.resize(1, 0)  # make room
        _unpage(modules.values())
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold weights that came in vain
        for experts, paged in before:
            if paged is not None:
                experts.page(*paged)
        for cache, (num_slots, num_staging) in caches.items():
            cache.resize(max(1, num_slots), num_staging)
        raise
    for cache in caches:
        cache.close()


def _make_paged(
    model: nn.Module,
    modules: Mapping[str, QuantizedExperts],
    layers: Sequence[LayerPages],
    budget: Budget,
    device: torch.device,
    options: PagingOptions,
) -> None:
    store = _store_of(modules, layers, device)
    try:
        # One slot until the weights have made room for the others.
        cache = ExpertCache(store, device, num_slots=1, num_staging=0)
    except BaseException:
        store.close()
        raise
    try:
        cache.share_misses(sharing_of(cache, modules, options.misses))
        for layer, experts in enumerate(modules.values()):
            experts.page(cache, layer)
        cache.resize(budget.num_slots, budget.num_staging)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        try:
            _unpage(modules.values())
        except torch.OutOfMemoryError as another:
            traceback.clear_frames(another.__traceback__)
            for layer, experts in enumerate(modules.values()):
                experts.page(cache, layer)
            _remember(model, Paging.of(options, budget, device, cache))
            raise torch.OutOfMemoryError(
                f"{device} has no memory for {budget.num_slots} slots, nor for the weights as they "
                f"were; {type(model).__name__} is paged with {cache.num_slots} slots now, free "
                "some memory and call qmoe.resize"
            ) from None
        cache.close()
        raise
    _remember(model, Paging.of(options, budget, device, cache))
    _calibrate(model, cache, modules, options.misses)


def _unpage(modules: Iterable[QuantizedExperts]) -> None:
    """Give paged modules parameters with what their pages hold, where their scales are."""
    for experts in modules:
        if experts.paged is None:
            continue
        cache, layer = experts.paged
        device = experts.down_proj_scale.device
        pages = cache.host.layers[layer]
        weights = [
            torch.empty(pages.num_experts, *shape, dtype=pages.dtype, device=device)
            for shape in (pages.gate_up, pages.down)
        ]
        expert = 0
        for piece in cache.host.pieces(layer, 0, pages.num_experts):
            for weight, sources in zip(weights, pages.views(piece), strict=True):
                # One by one, each copy is contiguous on both sides.
                for i, source in enumerate(sources):
                    weight[expert + i].copy_(source, non_blocking=True)
            expert += len(piece)
        _synchronize(cache.device)  # a thread that runs the layer on another stream finds them
        experts.unpage(*weights)


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


def bounds(options: PagingOptions, layers: Sequence[LayerPages]) -> bool:
    """Whether the host memory that was asked for does not hold all pages."""
    needed = sum(layer.num_experts * layer.page_stride for layer in layers)
    return options.host_bytes is not None and options.host_bytes < needed


def frame_store(
    model: Any,
    layers: Sequence[LayerPages],
    reads: Sequence[PageRead],
    device: torch.device,
    options: PagingOptions,
    *,
    progress: bool = False,
) -> FrameStore:
    """The host memory that was asked for, for pages that ``device`` is going to read.

    Raises:
        ValueError: see :class:`FrameStore`.
    """
    on_gpu, bound = device.type == "cuda", options.host_bytes
    assert bound is not None
    at_a_time = (find_top_k(model.config.to_dict()) or 1) * options.batch_size
    least = max(min(at_a_time, layer.num_experts) for layer in layers)
    with torch.cuda.device(device) if on_gpu else nullcontext():
        return FrameStore(layers, reads, bound, least, pin=on_gpu, progress=progress)


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
        _synchronize(device)
    except BaseException:
        store.close()
        raise
    return store


# ---- memory of a device ------------------------------------------------------------------------


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    cached = sum(cache.num_bytes for cache in _caches(quantized_modules(model)))
    return cached + sum(t.nbytes for t in tensors if t.is_cuda and t.device.index == index)
