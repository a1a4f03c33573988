"""From a checkpoint's shards, or a model's parameters, to where a budget has the experts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from torch import nn

from qmoe.checkpoints.files import StoredTensor
from qmoe.experts.pages import LayerPages
from qmoe.experts.quantized import quantized_modules
from qmoe.paging.budget import Budget
from qmoe.paging.frame_store import FrameStore
from qmoe.paging.host_store import HostStore, PageRead
from qmoe.paging.model import (
    bounds,
    budget_for,
    fill_layer,
    frame_store,
    host_store,
    keep_resident,
    page_experts,
    pages_of,
)
from qmoe.paging.options import PagingOptions
from qmoe.progress import progress as progress_bar


def load_pages(
    model: nn.Module,
    stored: Mapping[str, Sequence[StoredTensor]],
    options: PagingOptions | None,
    device: torch.device,
    *,
    progress: bool,
) -> None:
    """Read the experts of a model that is otherwise loaded: to host memory, or all to its device.

    Args:
        model: on ``device``, its experts without their 8-bit weights.
        stored: ``{module}.{projection}`` -> the tensors that, one behind the other, are its
            canonical form: one of all experts, or one or two (gate, up) per expert.
        options: the budget, and what it must hold; None: all goes to the device.
        device: where the model runs.
        progress: draw a progress bar if stderr is a terminal.

    Raises:
        ValueError: a budget or a bound of host memory that cannot work, too little host memory, or
            files that have changed.
    """
    modules = quantized_modules(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__}: hbm_budget pages 8-bit experts, and this checkpoint has none"
        )
    layers = pages_of(modules)
    budget = None if options is None else budget_for(model, layers, options, device)
    first = [0 if e.share is None else e.share.first for e in modules.values()]
    tensors = [
        [stored[f"{name}.{projection}"] for projection in experts.layout.projections]
        for name, experts in modules.items()
    ]
    if budget is None or budget.all_resident:
        with progress_bar("Loading experts", len(layers), show=progress) as bar:
            for pages, start, (gate_up, down) in zip(layers, first, tensors, strict=True):
                with closing(HostStore([pages], pin=False)) as one_layer:
                    one_layer.fill(page_reads(0, pages, gate_up, down, start))
                    weights = [w.to(device, copy=True).contiguous() for w in one_layer.weights(0)]
                modules[pages.name].unpage(*weights)
                bar.advance()
        if budget is not None and options is not None:
            keep_resident(model, budget, device, options)
        return
    assert options is not None  # there is a budget
    reads = [
        read
        for layer, (pages, start, (gate_up, down)) in enumerate(
            zip(layers, first, tensors, strict=True)
        )
        for read in page_reads(layer, pages, gate_up, down, start)
    ]
    store: HostStore | FrameStore
    if bounds(options, layers):
        store = frame_store(model, layers, reads, device, options, progress=progress)
    else:
        store = host_store(layers, device, progress=progress)
    try:
        if isinstance(store, HostStore):
            store.fill(reads, progress=progress)
        page_experts(model, store, budget, device, options)
    except BaseException:
        store.close()
        raise


def refuse_bound(options: PagingOptions, name: str) -> None:
    """Refuse to bound the host memory of experts that are quantized here.

    Raises:
        ValueError: a bound was asked for; says what to do.
    """
    if options.host_memory is not None:
        raise ValueError(
            f"{name}: host_memory={options.host_memory!r} leaves experts in the checkpoint's "
            "files, and these are not there in 8 bit; convert it with convert-checkpoint first"
        )


def page_stored(
    model: nn.Module, store: HostStore, options: PagingOptions, device: torch.device
) -> None:
    """Place experts that were quantized into ``store``, which is closed where it is not used.

    Args:
        model: on ``device``, its experts without their 8-bit weights.
        store: their pages.
        options: the budget, and what it must hold.
        device: where the model runs.

    Raises:
        ValueError: a budget that cannot work.
    """
    try:
        budget = budget_for(model, store.layers, options, device)
        if not budget.all_resident:
            page_experts(model, store, budget, device, options)
            return
        for layer, experts in enumerate(quantized_modules(model).values()):
            experts.unpage(*(w.to(device, copy=True).contiguous() for w in store.weights(layer)))
            store.empty(layer)
        keep_resident(model, budget, device, options)
    except BaseException:
        store.close()
        raise
    store.close()


def page_quantized(
    model: nn.Module, budget: Budget, device: torch.device, options: PagingOptions
) -> None:
    """Bring a model that was quantized on the CPU to ``device``, its experts as the budget says.

    Each layer's weights are freed as soon as its pages are filled.

    Raises:
        ValueError: too little host memory; the model is then as it was.
        torch.OutOfMemoryError: something else has taken the device's memory; the same holds.
    """
    if budget.all_resident:
        try:
            model.to(device)
        except BaseException:
            model.to("cpu")
            raise
        keep_resident(model, budget, device, options)
        return
    modules = quantized_modules(model)
    store = host_store(pages_of(modules), device)
    try:
        for layer, experts in enumerate(modules.values()):
            fill_layer(store, layer, experts)
            experts.drop_weights()
        model.to(device)
        page_experts(model, store, budget, device, options)
    except BaseException:
        # Where this fails too, modules stay without weights, and say so instead of computing.
        try:
            for layer, experts in enumerate(modules.values()):
                if experts.paged is not None or not experts.has_weights:
                    experts.unpage(*(weights.contiguous() for weights in store.weights(layer)))
            model.to("cpu")
        finally:
            store.close()
        raise


def page_reads(
    layer: int,
    pages: LayerPages,
    gate_up: Sequence[StoredTensor],
    down: Sequence[StoredTensor],
    first: int = 0,
) -> list[PageRead]:
    """The reads that fill the pages of one layer.

    Args:
        layer: its index in the host store.
        pages: its geometry.
        gate_up: the tensors that, one behind the other, are its (num_experts, rows, columns)
            weights.
        down: the same for the second projection.
        first: the expert that page 0 is of; tensors of experts that have no page are not read.
    """
    return [
        replace(read, expert=read.expert - first)
        for read in (
            *_reads(layer, 0, math.prod(pages.gate_up), gate_up),
            *_reads(layer, pages.down_offset, math.prod(pages.down), down),
        )
        if first <= read.expert < first + pages.num_experts
    ]


def _reads(
    layer: int,
    offset: int,
    expert_bytes: int,
    tensors: Sequence[StoredTensor],
) -> Iterator[PageRead]:
    position = 0  # in the weights of all experts
    for tensor in tensors:
        start, stop = position, position + tensor.nbytes
        while position < stop:
            expert, within = divmod(position, expert_bytes)
            nbytes = min(stop - position, expert_bytes - within)
            file_offset = tensor.offset + position - start
            yield PageRead(
                layer, expert, offset + within, tensor.file, file_offset, nbytes, tensor.version
            )
            position += nbytes
