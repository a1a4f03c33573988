"""Sections of others' decoding: transformers' on qmoe's model, in bf16, compiled; vLLM's engine."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.generate.bench import Benchmark
from qmoe.checkpoints.schema import compressed_tensors_config

ON_INT8 = "transformers generate, INT8 experts"
GROUPED, EAGER = "transformers grouped_mm, bf16", "transformers eager, bf16"
STATIC = "transformers static cache, compiled, bf16"
VLLM = {"int8": "vLLM, INT8", "fp8": "vLLM, FP8"}


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


def run_vllm(bench: Benchmark) -> None:
    """Tokens per second of vLLM's engine on the same shape, experts and rows in 8 bits.

    ``QMOE_VLLM`` may name a folder that vLLM was installed into (``pip install --target``).
    """
    sizes = bench.sizes
    paths = [os.environ[name] for name in ("QMOE_VLLM", "PYTHONPATH") if name in os.environ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for weights, path in VLLM.items():
        config = bench.shape.config().to_dict()
        request = {
            "config": config | {"architectures": ["Qwen3MoeForCausalLM"]},
            "quantization": compressed_tensors_config(weights, []),
            "batches": sizes.batches,
            "prompt": sizes.prompt,
            "new": sizes.new,
            "prefills": sizes.prefills,
            "repeats": sizes.repeats,
        }
        answer = subprocess.run(
            [sys.executable, "-m", "benchmarks.generate.vllm_engine", json.dumps(request)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(answer.stdout.splitlines()[-1])
        bench.results.set(version=found["version"], **{f"{weights}_start_s": found["start_s"]})
        for key in ("cells", "prefill"):
            for cell in found[key]:
                bench.results.add(key, {"path": path, **cell})
