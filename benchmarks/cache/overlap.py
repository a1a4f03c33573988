"""Section overlap: does it pay to compute with the experts that are there while others fly?"""

from __future__ import annotations

import torch

from benchmarks.cache.harness import Benchmark
from benchmarks.model import as_graph, percentiles, time_each
from qmoe.experts.pages import LayerPages
from qmoe.paging.expert_cache import ExpertCache
from qmoe.paging.host_store import HostStore
from qmoe_kernels import fused_moe

NUM_LAYERS, NUM_STEPS = 8, 4
CAPACITY = 0.75  # of the pages that are routed to at all
NUM_TOKENS = (1, 4, 8, 16, 32)


def run_overlap(bench: Benchmark) -> None:
    """Microseconds of one layer, in a CUDA graph of several steps through several layers.

    Routing is drawn with the popularity of a Zipf law of exponent 1, anew for every step and layer.
    """
    shape, device, results = bench.shape, bench.device, bench.results
    num_experts, hidden_size = shape.num_experts, shape.hidden_size
    intermediate_size = shape.moe_intermediate_size
    up, down = (2 * intermediate_size, hidden_size), (hidden_size, intermediate_size)
    layers = [LayerPages(str(i), num_experts, torch.int8, up, down) for i in range(NUM_LAYERS)]
    store = HostStore(layers, pin=device.type == "cuda")
    for i in range(NUM_LAYERS):
        store.pages(i).copy_(
            torch.randint(0, 256, store.pages(i).shape, dtype=torch.uint8, device=device)
        )
    scales = [torch.full((num_experts, rows), 2e-4, device=device) for rows, _ in (up, down)]
    cache = ExpertCache(store, device, num_slots=num_experts, num_staging=0)
    generator = torch.Generator().manual_seed(0)
    popularity = 1 / torch.arange(1.0, num_experts + 1)
    results.set(layers=NUM_LAYERS, steps=NUM_STEPS)
    for num_tokens in NUM_TOKENS:
        size = (num_tokens, shape.num_experts_per_tok)
        x = torch.randn(num_tokens, hidden_size, device=device, dtype=torch.bfloat16)
        weights = torch.rand(size, device=device)
        ids = [
            torch.multinomial(popularity.expand(num_tokens, -1), size[1], generator=generator).to(
                device
            )
            for _ in range(NUM_STEPS * NUM_LAYERS)
        ]

        used = {
            (i % NUM_LAYERS, e) for i, chosen in enumerate(ids) for e in chosen.flatten().tolist()
        }
        most = max(len(chosen.unique()) for chosen in ids)
        cache.resize(max(most, int(CAPACITY * len(used))), 0)

        def compute(gate_up, down, slots, ids, weights, x=x):
            return fused_moe(
                x, gate_up, scales[0], down, scales[1], ids, weights, expert_to_slot=slots
            )

        def steps(x=x, ids=ids, weights=weights, compute=compute):
            for i, layer_ids in enumerate(ids):
                cache.run(i % NUM_LAYERS, layer_ids, weights, compute)

        for overlap in (False, True):
            cache.overlap = overlap
            steps()
            run = as_graph(steps, device)
            run()
            before = cache.read_counters()
            each, _ = time_each(run, 6, device)
            after = cache.read_counters()
            count = 6 * len(ids)
            results.add(
                "cells",
                {
                    "num_tokens": num_tokens,
                    "overlap": overlap,
                    "num_slots": cache.num_slots,
                    "hits": round((after.hits - before.hits) / count, 2),
                    "misses": round((after.misses - before.misses) / count, 2),
                    "us": percentiles([1e3 * ms / len(ids) for ms in each], 2),
                },
            )
    cache.close()
