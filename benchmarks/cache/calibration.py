"""Section calibration: a layer by its misses, and by how many of them the host computes."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from benchmarks.cache.harness import Benchmark
from benchmarks.cache.model import fill_host_store
from benchmarks.model import Shape, build_model, experts_of
from qmoe.paging import sharing
from qmoe.paging.expert_cache import ExpertCache
from qmoe_kernels.cpu import workers

NUM_LAYERS = 6
# KiB of weights that a worker claims at a time.
ITEMS = (128, 64, 32, 16)


def run_calibration(bench: Benchmark) -> None:
    """Microseconds of a layer's call for one token, as ``misses="auto"`` measures them.

    With experts of the model's size, and of half of it: two halves, one of which the host computes
    and one of which is copied, are what splitting one expert between them would be.
    """
    chosen = workers.ITEM_BYTES
    bench.results.set(model=str(bench.shape), threads=torch.get_num_threads())
    for size in (bench.shape.moe_intermediate_size, bench.shape.moe_intermediate_size // 2):
        _run(bench, replace(bench.shape, num_hidden_layers=NUM_LAYERS, moe_intermediate_size=size))
    assert chosen == workers.ITEM_BYTES


def _run(bench: Benchmark, shape: Shape) -> None:
    model = build_model(shape, bench.device)
    store, _ = fill_host_store(model, bench.device)
    top_k = shape.num_experts_per_tok
    cache = ExpertCache(store, bench.device, num_slots=shape.num_pages // 2, num_staging=top_k)
    modules = experts_of(model)
    chosen = workers.ITEM_BYTES
    try:
        for layer, experts in enumerate(modules.values()):
            experts.page(cache, layer)
        for kib in ITEMS:
            workers.ITEM_BYTES = kib << 10
            cache.share_misses(sharing.sharing_of(cache, modules, "host"))
            times, _ = sharing._measure(cache, list(modules.values()), top_k, model.dtype)
            for (misses, host), seconds in times.items():
                where = {"intermediate_size": shape.moe_intermediate_size, "item_kib": kib}
                us = round(1e6 * seconds / sharing._LAYERS, 1)
                bench.results.add("cells", {**where, "misses": misses, "host": host, "us": us})
    finally:
        workers.ITEM_BYTES = chosen
        cache.close()
        del model, modules
        store.close()
        gc.collect()
