"""Section tuning: what a layer copies ahead, and how the gather kernel is laid out, by decode time.

Not run unless it is asked for: the answers are constants of `qmoe.paging.expert_cache` and
`qmoe_kernels.paging`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.cache.decode import time_paged
from benchmarks.cache.harness import Benchmark
from qmoe.paging import expert_cache
from qmoe_kernels import paging

PREFETCHED_PAGES = (0, 2, 3, 4, 6)
# Thread blocks, words of 8 bytes per block and turn, warps.
GATHERS = ((4, 4096, 16), (8, 2048, 16), (8, 4096, 16), (6, 4096, 16), (3, 8192, 16))
CAPACITIES = (0.25, 0.5)


def run_tuning(bench: Benchmark) -> None:
    """Milliseconds per token by pages prefetched, and by layout of the gather kernel."""
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
    chosen = (paging.GATHER_PROGRAMS, paging.GATHER_BLOCK, paging.GATHER_WARPS)
    for capacity in CAPACITIES:
        cache.resize(bench.num_slots(capacity), bench.shape.num_experts_per_tok)
        for pages in PREFETCHED_PAGES:
            _cells(bench, resident, capacity, pages, chosen)
        for gather in GATHERS if bench.device.type == "cuda" else ():
            _cells(bench, resident, capacity, 4, gather)
    decoder.release()
    cache.prefetch = False


def _cells(
    bench: Benchmark,
    resident: dict[str, float],
    capacity: float,
    pages: int,
    gather: tuple[int, int, int],
) -> None:
    decoder, cache = bench.decoder, bench.cache
    cache.prefetch = pages > 0
    with _constants(pages * bench.shape.page_bytes, gather):
        decoder.release()
        decoder.capture()
    for name, trace in bench.traces.items():
        _, total, counts = time_paged(bench, trace)
        cell: dict[str, Any] = {
            "trace": name,
            "capacity": capacity,
            "prefetched_pages": pages,
            "gather": gather,
            "ms": round(total / bench.num_tokens, 4),
            "resident_ms": round(resident[name], 4),
            **counts,
        }
        bench.results.add("cells", cell)


@contextmanager
def _constants(prefetched_bytes: int, gather: tuple[int, int, int]) -> Iterator[None]:
    """Other constants for a capture; graphs keep what they were captured with."""
    names = ("GATHER_PROGRAMS", "GATHER_BLOCK", "GATHER_WARPS")
    before = expert_cache.PREFETCHED_BYTES, [getattr(paging, name) for name in names]
    try:
        expert_cache.PREFETCHED_BYTES = prefetched_bytes
        for name, value in zip(names, gather, strict=True):
            setattr(paging, name, value)
        yield
    finally:
        expert_cache.PREFETCHED_BYTES = before[0]
        for name, value in zip(names, before[1], strict=True):
            setattr(paging, name, value)
