"""Section prefill: a long prompt with all experts on the host."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from benchmarks.cache.harness import Benchmark
from benchmarks.model import time_each


def run_prefill(bench: Benchmark, repeats: int = 2) -> None:
    """Seconds for a long prompt, by chunk and staging; everything resident, and on the host."""
    results, shape, model = bench.results, bench.shape, bench.model
    bench.replay.load(bench.first_trace)
    generator = torch.Generator(bench.device).manual_seed(2)
    input_ids = torch.randint(
        shape.vocab_size, (1, bench.prompt), device=bench.device, generator=generator
    )
    logits = torch.empty(0)

    @torch.no_grad()
    def read(chunk: int) -> None:
        nonlocal logits
        bench.replay.token.zero_()
        past = DynamicCache(config=model.config)
        for part in input_ids.split(chunk, dim=1):
            bench.replay.begin(part.shape[1])
            output = model(part, past_key_values=past, use_cache=True, logits_to_keep=1)
            bench.replay.end(part.shape[1])
        logits = output.logits

    bench.residents.enter()
    chunks = [bench.prompt >> i for i in range(3)]
    compute, expected = {}, {}
    for chunk in chunks:
        read(chunk)
        expected[chunk] = logits
        each, _ = time_each(lambda chunk=chunk: read(chunk), repeats, bench.device)
        compute[chunk] = min(each)
        results.add("resident", {"chunk": chunk, "ms": [round(ms, 2) for ms in each]})
    cache = bench.cache
    bench.residents.leave(cache)
    cache.overlap = False
    results.set(prompt=bench.prompt, link_gb_per_s=bench.link, num_slots=shape.cycle)
    cells = [(chunk, shape.num_experts) for chunk in chunks]
    cells += [(bench.prompt, shape.num_experts // 4), (bench.prompt, shape.num_experts_per_tok)]
    for chunk, num_staging in cells:
        cache.resize(shape.cycle, num_staging)
        read(chunk)
        equal = torch.equal(logits, expected[chunk])
        before = bench.counters()
        each, _ = time_each(lambda chunk=chunk: read(chunk), repeats, bench.device)
        nbytes = (bench.counters().bytes - before.bytes) / repeats
        link_ms = nbytes / 1e6 / bench.link["layer"]
        results.add(
            "cells",
            {
                "chunk": chunk,
                "num_staging": num_staging,
                "equal": equal,
                "ms": [round(ms, 2) for ms in each],
                "tokens_per_s": round(1e3 * bench.prompt / min(each), 1),
                "bytes": nbytes,
                "compute_ms": round(compute[chunk], 2),
                "link_ms": round(link_ms, 2),
                "ratio": round(min(each) / max(compute[chunk], link_ms), 4),
            },
        )
    if not all(cell["equal"] for cell in results.section["cells"]):
        raise AssertionError("logits of the paged model differ from the resident one's")
