"""Section tuning: how the gather kernel is laid out, by decode time.

Not run unless it is asked for: the answers are constants of `qmoe_kernels.paging`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.cache.decode import time_paged
from benchmarks.cache.harness import Benchmark
from qmoe_kernels import paging

NAMES = ("GATHER_PROGRAMS", "GATHER_BLOCK", "GATHER_WARPS")
# Thread blocks, words of 8 bytes per block and turn, warps.
GATHERS = ((4, 4096, 16), (8, 2048, 16), (8, 4096, 16), (6, 4096, 16), (3, 8192, 16))
CAPACITIES = (0.25, 0.5)


def run_tuning(bench: Benchmark) -> None:
    """Milliseconds per token by layout of the gather kernel."""
    decoder, cache, results = bench.decoder, bench.cache, bench.results
    bench.residents.enter()
    decoder.capture()
    resident = {}
    for name, trace in bench.traces.items():
        bench.replay.load(trace)
        resident[name] = decoder.time(bench.first, bench.num_tokens)[1] / bench.num_tokens
    results.set(resident_ms=resident, link_gb_per_s=bench.link, tokens=bench.num_tokens)
    decoder.release()
    bench.residents.leave(cache)
    chosen = tuple(getattr(paging, name) for name in NAMES)
    for capacity in CAPACITIES:
        cache.resize(bench.num_slots(capacity), bench.shape.num_experts_per_tok)
        for gather in (chosen, *GATHERS) if bench.device.type == "cuda" else (chosen,):
            with _constants(gather):
                decoder.release()
                decoder.capture()
            for name, trace in bench.traces.items():
                _, total, counts = time_paged(bench, trace)
                cell: dict[str, Any] = {
                    "trace": name,
                    "capacity": capacity,
                    "gather": gather,
                    "ms": round(total / bench.num_tokens, 4),
                    "resident_ms": round(resident[name], 4),
                    **counts,
                }
                results.add("cells", cell)
    decoder.release()


@contextmanager
def _constants(gather: tuple[int, ...]) -> Iterator[None]:
    """Another layout for a capture; graphs keep what they were captured with."""
    before = [getattr(paging, name) for name in NAMES]
    try:
        for name, value in zip(NAMES, gather, strict=True):
            setattr(paging, name, value)
        yield
    finally:
        for name, value in zip(NAMES, before, strict=True):
            setattr(paging, name, value)
