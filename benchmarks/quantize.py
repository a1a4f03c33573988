"""How fast one core quantizes, and what its passes over a block cost.

``python benchmarks/quantize.py`` writes ``benchmarks/results/quantize.json``: GB of bf16 per second
for INT8 and FP8 over experts of Qwen3-30B-A3B's shape that are not in the cache, by block size, for
one thread, two threads and two processes; and the elements per second of each pass, and of some not
chosen, over one block of 128 Ki elements that is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qmoe_kernels import quantization
from qmoe_kernels.quantization import STORAGE_DTYPE, quantize, quantize_with_squares

RESULTS = Path(__file__).parent / "results" / "quantize.json"
ROWS, COLUMNS, EXPERTS = 768, 2048, 100


def best_seconds(function: Callable[[], object], repeats: int = 5) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def throughput(weights: str, block: int, threads: int, sampled_error: bool = True) -> float:
    """GB of bf16 per second, all threads together."""
    quantization.BLOCK_SIZE["cpu"] = block
    experts = [torch.randn(ROWS, COLUMNS).bfloat16() for _ in range(EXPERTS)]
    out = [torch.empty(ROWS, COLUMNS, dtype=STORAGE_DTYPE[weights]) for _ in range(EXPERTS)]

    def work(first: int) -> None:
        for expert in range(first, EXPERTS, threads):
            if sampled_error:
                quantize_with_squares(experts[expert], weights, out=out[expert])
            else:
                quantize(experts[expert], weights)

    def run() -> None:
        workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return sum(e.nbytes for e in experts) / 1e9 / best_seconds(run, 3)


def beside_another_process(weights: str, block: int) -> float:
    """GB of bf16 per second, two processes of one thread together."""
    command = [sys.executable, __file__, "--throughput", weights, str(block)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return sum(float(process.communicate()[0]) for process in running)


def passes() -> dict[str, float]:
    """Elements per nanosecond of torch's calls over one block in cache."""
    rows, count = 64, 64 * COLUMNS
    w = torch.randn(rows, COLUMNS).bfloat16()
    x, y = w.float(), torch.empty(rows, COLUMNS)
    bits = torch.empty(rows, COLUMNS, dtype=torch.int16)
    q = torch.empty(rows, COLUMNS, dtype=torch.int8)
    q8 = torch.empty(rows, COLUMNS, dtype=torch.float8_e4m3fn)
    scale = torch.rand(rows, 1) + 0.5
    zeros = torch.zeros(rows, dtype=torch.long)
    calls: dict[str, Callable[[], object]] = {
        "mask the sign (int16)": lambda: torch.bitwise_and(w.view(torch.int16), 0x7FFF, out=bits),
        "maximum (int16)": lambda: torch.amax(bits, -1),
        "widen (bf16 to fp32)": lambda: y.copy_(w),
        "divide": lambda: torch.div(x, scale, out=y),
        "round": lambda: torch.round(x, out=y),
        "narrow (fp32 to int8)": lambda: q.copy_(x),
        "narrow (fp32 to e4m3fn)": lambda: q8.copy_(x),
        "not chosen: maximum (bf16)": lambda: torch.amax(w, -1),
        "not chosen: aminmax (bf16)": lambda: torch.aminmax(w, dim=-1),
        "not chosen: infinity norm (bf16)": lambda: torch.linalg.vector_norm(w, torch.inf, -1),
        "not chosen: multiply": lambda: torch.mul(x, scale, out=y),
        "not chosen: quantize_per_channel": lambda: torch.quantize_per_channel(
            x, scale.view(-1).double(), zeros, 0, torch.qint8
        ),
    }

    def repeated(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: [call() for _ in range(30)]

    return {
        name: round(30 * count / 1e9 / best_seconds(repeated(call)), 2)
        for name, call in calls.items()
    }


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--throughput"]:
        print(throughput(sys.argv[2], int(sys.argv[3]), threads=1))
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from convert import commit, machine

    default = quantization.BLOCK_SIZE["cpu"]
    rows = []
    for weights in ("int8", "fp8"):
        for block in (1 << 16, 1 << 17, 1 << 18, 1 << 19):
            row = {
                "weights": weights,
                "block": block,
                "one_thread_without_error": throughput(weights, block, 1, sampled_error=False),
                "one_thread": throughput(weights, block, 1),
                "two_threads": throughput(weights, block, 2),
                "two_processes": beside_another_process(weights, block),
            }
            rows.append({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
            print(rows[-1], flush=True)
    results = {
        "benchmark": "quantize",
        "commit": commit(),
        "machine": machine(),
        "default_block": default,
        "gb_per_s": rows,
        "elements_per_ns": passes(),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["elements_per_ns"], indent=1))


if __name__ == "__main__":
    main()
