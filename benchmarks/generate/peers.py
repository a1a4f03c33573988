"""Sections of transformers' own decoding: on qmoe's model, in bf16, and compiled."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.generate.bench import Benchmark

ON_INT8 = "transformers generate, INT8 experts"
GROUPED, EAGER = "transformers grouped_mm, bf16", "transformers eager, bf16"
STATIC = "transformers static cache, compiled, bf16"


def run_transformers_int8(bench: Benchmark) -> None:
    """Tokens per second of transformers' loop and cache on the model that qmoe has patched."""
    decode(bench, bench.int8, ON_INT8)


def run_transformers(bench: Benchmark) -> None:
    """Tokens per second of decoding and of prompts, as transformers computes experts in bf16."""
    model = bench.bf16
    for path, implementation in ((GROUPED, "grouped_mm"), (EAGER, "eager")):
        model.set_experts_implementation(implementation)
        decode(bench, model, path)
        if path == GROUPED:
            prefill(bench, model, path)


def run_transformers_static(bench: Benchmark) -> None:
    """Tokens per second with a static cache, which transformers compiles by itself on a GPU."""
    model = bench.bf16
    model.set_experts_implementation("grouped_mm")
    steps = bench.sizes.new
    batch = bench.sizes.batches[0]
    run = bench.run(model, batch, bench.sizes.prompt, cache_implementation="static")
    first = bench.seconds(run, 1 + steps)
    cell = bench.time_steps(run, steps, short=1).cell(batch, bench.sizes.prompt)
    bench.results.add("cells", {"path": STATIC, **cell, "first_call_s": round(first, 2)})


def decode(bench: Benchmark, model: Any, path: str) -> None:
    """Add a cell for each batch; of few steps, where one takes long."""
    for batch in bench.sizes.batches:
        run = bench.run(model, batch, bench.sizes.prompt)
        steps = bench.affordable_steps(run)
        timing = bench.time_steps(run, steps, short=1, repeats=1, warm=True)
        bench.results.add("cells", {"path": path, **timing.cell(batch, bench.sizes.prompt)})


def prefill(bench: Benchmark, model: Any, path: str) -> None:
    """Add a cell for each long prompt."""
    for length in bench.sizes.prefills:
        run = bench.run(model, 1, length)
        first, *later = [bench.seconds(run, 1) for _ in range(1 + bench.sizes.repeats)]
        bench.results.add(
            "prefill",
            {
                "path": path,
                "prompt": length,
                "first_ms": round(1e3 * first, 2),
                "ms": [round(1e3 * s, 2) for s in later],
                "tokens_per_s": round(length / statistics.median(later), 1),
            },
        )
