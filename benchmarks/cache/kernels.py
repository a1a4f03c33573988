"""Sections gather and admission: the two kernels of paging, by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch

from benchmarks.cache.harness import Benchmark
from benchmarks.model import as_graph, percentiles, synchronize, time_each
from qmoe.experts.pages import LayerPages
from qmoe.paging.host_store import HostStore
from qmoe_kernels.paging import HITS, MISSES, CopyList, Residency, Transfer, admit, gather

NUM_PROGRAMS = (1, 2, 4, 6, 8, 12, 16, 32)


def run_gather(bench: Benchmark) -> None:
    """GB/s of `gather` and of cudaMemcpyAsync, in the same run, over the same pages.

    Each is timed in a queue of its like, and alone.
    """
    shape, device, results = bench.shape, bench.device, bench.results
    num_pages = shape.num_experts
    sizes = ((2 * shape.moe_intermediate_size, shape.hidden_size),)
    sizes += ((shape.hidden_size, shape.moe_intermediate_size),)
    layer = LayerPages("experts", num_pages, torch.int8, *sizes)
    store = HostStore([layer], pin=device.type == "cuda")
    pages = store.pages(0)
    pages.copy_(torch.randint(0, 256, pages.shape, dtype=torch.uint8, device=device))
    original, memory = pages.to(device), torch.empty_like(pages, device=device)
    transfer = Transfer(store.addresses.to(device), memory, layer.page_bytes)
    results.set(page_bytes=layer.page_bytes)

    def lists(count: int) -> Iterator[tuple[CopyList, list[int]]]:
        """Other pages and slots each time, so that no read comes from a cache."""
        made = []
        for start in range(0, num_pages, count):
            chosen = [(start + i) % num_pages for i in range(count)]
            ids = torch.tensor(chosen, dtype=torch.int32, device=device)
            number = torch.tensor([count], dtype=torch.int32, device=device)
            empty = CopyList.empty(count, device)
            copies = replace(empty, pages=ids, slots=num_pages - 1 - ids, count=number)
            made.append((copies, chosen))
        return cycle(made)

    def busy() -> None:
        if device.type == "cuda":  # launches queue up behind this, so that none is waited for
            torch.cuda._sleep(4_000_000)

    def time_copies(function: Callable[[], object], count: int) -> list[float]:
        repeats = max(4, min(64, 512 // count))
        function()
        synchronize(device)
        busy()
        each, _ = time_each(function, repeats, device, wait=False)
        return each

    for count in sorted({1, 2, 4, 8, min(32, num_pages), num_pages}):
        turns = lists(count)

        def memcpy(turns: Any = turns) -> None:
            _, chosen = next(turns)
            for page in chosen:
                memory[num_pages - 1 - page].copy_(pages[page], non_blocking=True)

        nbytes = count * layer.page_bytes
        copied = percentiles(time_copies(memcpy, count))
        copied_alone = percentiles(time_alone(memcpy, device))
        for num_programs in NUM_PROGRAMS if device.type == "cuda" else (0,):
            memory.zero_()

            def by_kernel(turns: Any = turns, num_programs: int = num_programs) -> None:
                todo, chosen = next(turns)
                if device.type == "cuda":
                    gather(transfer, todo, num_programs=num_programs)
                    return
                for page in chosen:
                    memory[num_pages - 1 - page] = pages[page]

            for _ in range(-(-num_pages // count)):
                by_kernel()
            synchronize(device)
            if not torch.equal(memory.flip(0), original):
                raise AssertionError(f"gather of {count} pages copied something else")
            kernel = percentiles(time_copies(by_kernel, count))
            kernel_alone = percentiles(time_alone(by_kernel, device))
            results.add(
                "cells",
                {
                    "pages": count,
                    "num_programs": num_programs,
                    "kernel_ms": kernel,
                    "memcpy_ms": copied,
                    "kernel_alone_ms": kernel_alone,
                    "memcpy_alone_ms": copied_alone,
                    "kernel_gb_per_s": round(nbytes / 1e6 / kernel["p50"], 2),
                    "memcpy_gb_per_s": round(nbytes / 1e6 / copied["p50"], 2),
                    "ratio": round(copied["p50"] / kernel["p50"], 4),
                    "ratio_alone": round(copied_alone["p50"] / kernel_alone["p50"], 4),
                },
            )
    store.close()


def time_alone(function: Callable[[], object], device: torch.device) -> list[float]:
    """Milliseconds of single runs from an idle device, as a graph of nothing else.

    A copy that follows another is set up while that one is under way; one in a decode step, where
    it waits for admission, is not.
    """
    run = as_graph(function, device)
    run()
    each = []
    for _ in range(30):
        each += time_each(run, 1, device)[0]
    return each


def run_admission(bench: Benchmark) -> None:
    """Microseconds of one `admit` of one token, many of them in one CUDA graph.

    Where everything hits, of the launch that also copies, as in a decode step.
    """
    shape, device, results = bench.shape, bench.device, bench.results
    layers, experts, top_k = shape.routing
    num_slots = shape.num_pages * 2 // 3  # 4096 of Qwen3-30B-A3B's 6144 pages
    stay = num_slots // experts

    def all_hit() -> Iterator[tuple[int, list[int]]]:
        for start in range(0, experts, top_k):
            for layer in range(stay):
                yield layer, list(range(start, start + top_k))

    def one_misses() -> Iterator[tuple[int, list[int]]]:
        for other in range(top_k - 1, experts):
            for layer in range(layers):
                yield layer, [*range(top_k - 1), other]

    def none_hits() -> Iterator[tuple[int, list[int]]]:
        for start in range(0, experts, top_k):
            for layer in range(layers):
                yield layer, list(range(start, start + top_k))

    for name, steps in (("0", all_hit), ("1", one_misses), ("top_k", none_hits)):
        residency = Residency.empty(shape.num_pages, num_slots, layers, device)
        copies = CopyList.empty(experts, device)
        todo = [(layer, torch.tensor([ids], device=device)) for layer, ids in steps()]

        def every(
            transfer: Transfer | None = None,
            todo: Any = todo,
            residency: Any = residency,
            copies: Any = copies,
        ) -> None:
            for layer, ids in todo:
                tables = residency, copies
                admit(ids, layer, layer * experts, experts, *tables, transfer=transfer)

        every()
        transfer = None
        if name == "0" and device.type == "cuda":  # from here on nothing is copied
            nowhere = torch.zeros(shape.num_pages, dtype=torch.int64, device=device)
            transfer = Transfer(nowhere, torch.empty(1, 128, dtype=torch.uint8, device=device), 128)
            every(transfer)  # compiles
        run = as_graph(partial(every, transfer), device)
        run()
        before = residency.counters.sum(0).tolist()
        each, _ = time_each(run, 5 if device.type == "cuda" else 1, device)
        after = residency.counters.sum(0).tolist()
        misses, hits = after[MISSES] - before[MISSES], after[HITS] - before[HITS]
        expected = {"0": 0, "1": 1, "top_k": top_k}[name]
        if misses * (top_k - expected) != hits * expected or misses + hits == 0:
            raise AssertionError(f"{misses} misses and {hits} hits; {expected} of {top_k} miss")
        results.add(
            "cells",
            {
                "misses": expected,
                "top_k": top_k,
                "num_slots": num_slots,
                "us": percentiles([1e3 * ms / len(todo) for ms in each]),
            },
        )
