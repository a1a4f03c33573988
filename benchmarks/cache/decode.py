"""Section decode: one token after the other, as CUDA graphs, by capacity."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cache.harness import Benchmark
from benchmarks.model import percentiles, time_each
from qmoe.paging.stats import CacheStats
from qmoe.traces.replay import Policy, Replay, replay_curve
from qmoe.traces.trace import RoutingTrace

CAPACITIES = (0.25, 0.5, 0.375, 0.125, 0.75, 1.0)
OVERLAP_CAPACITIES = (0.25, 0.375, 0.5)
# Whether a layer computes with the experts that it has while the others fly.
VARIANTS = {"plain": False, "overlap": True}


def run_decode(bench: Benchmark) -> None:
    """Milliseconds per token by capacity, trace and variant, beside the resident model."""
    results, decoder, shape = bench.results, bench.decoder, bench.shape
    bench.residents.enter()
    results.set(
        model=str(shape),
        traces={name: trace.metadata.get("source", "") for name, trace in bench.traces.items()},
        context=bench.context,
        tokens=bench.num_tokens,
        warmup_tokens=bench.num_warmup,
        sweep_tokens=bench.first - bench.num_warmup,
        graph=bench.device.type == "cuda",
        num_pages=shape.num_pages,
        page_bytes=shape.page_bytes,
        host_store=bench.store_facts,
        link_gb_per_s=bench.link,
    )
    check_bits(bench)
    replayed = replay_window(bench)
    results.log("claims, LRU and Belady replayed")
    resident = {}
    bench.residents.enter()
    decoder.capture()
    for name, trace in bench.traces.items():
        bench.replay.load(trace)
        each, total = decoder.time(bench.first, bench.num_tokens)
        resident[name] = total / bench.num_tokens
        results.add("resident", {"trace": name, **time_cell(each, total)})

    cache = bench.cache
    bench.residents.leave(cache)
    for capacity in CAPACITIES:
        decoder.release()
        cache.resize(bench.num_slots(capacity), shape.num_experts_per_tok)
        for variant, cache.overlap in VARIANTS.items():
            if cache.overlap and capacity not in OVERLAP_CAPACITIES:
                continue
            decoder.capture()
            for name, trace in bench.traces.items():
                each, total, counts = time_paged(bench, trace)
                claims, lru, belady = replayed[name][capacity]
                ms = total / bench.num_tokens
                link_ms = counts["missed_bytes"] / 1e6 / bench.link["layer"]
                cell = {
                    "trace": name,
                    "capacity": capacity,
                    "variant": variant,
                    **time_cell(each, total),
                    "retention": round(resident[name] / ms, 4),
                    "resident_ms": round(resident[name], 4),
                    "link_ms": round(link_ms, 4),
                    "ratio": round(ms / (resident[name] + link_ms), 4),
                    **counts,
                    "replayed_hit_rate": claims,
                    "lru_hit_rate": lru,
                    "belady_hit_rate": belady,
                }
                results.add("cells", cell)
    # As a budget that holds everything does: the cache is gone.
    decoder.release()
    bench.residents.enter()
    decoder.capture()
    for name, trace in bench.traces.items():
        bench.replay.load(trace)
        each, total = decoder.time(bench.first, bench.num_tokens)
        cell = {"trace": name, **time_cell(each, total)}
        results.add("resident_again", cell | {"retention": round(resident[name] / cell["ms"], 4)})
    decoder.release()


def time_paged(
    bench: Benchmark, trace: RoutingTrace
) -> tuple[list[float], float, dict[str, float]]:
    """Milliseconds of each timed token and of all of them, and what the cache counted meanwhile."""
    decoder = bench.decoder
    bench.replay.load(trace)
    bench.cache.forget()  # claims of the trace before
    decoder.reset()
    for _ in range(bench.first):
        decoder.advance()
    before = bench.counters()
    each, total = time_each(decoder.advance, bench.num_tokens, bench.device)
    return each, total, count(before, bench.counters(), bench.num_tokens)


def time_cell(each: list[float], total: float) -> dict[str, Any]:
    """Milliseconds per token: the mean, percentiles, and tokens per second."""
    ms = total / len(each)
    return {
        "ms": round(ms, 4),
        "ms_percentiles": percentiles(each),
        "tokens_per_s": round(1e3 / ms, 2),
    }


def count(before: CacheStats, after: CacheStats, num_tokens: int) -> dict[str, float]:
    """What happened between two readings of the counters; bytes per token."""

    def grown(name: str) -> int:
        return sum(getattr(layer, name) for layer in after.layers) - sum(
            getattr(layer, name) for layer in before.layers
        )

    hits, misses = grown("hits"), grown("misses")
    missed = sum(
        (new.misses - old.misses) * size
        for new, old, size in zip(after.layers, before.layers, after.page_bytes, strict=True)
    )
    return {
        "hits": hits,
        "misses": misses,
        "hit_rate": round(hits / max(hits + misses, 1), 4),
        "missed_bytes": round(missed / num_tokens),
        "copied_bytes": round((after.bytes - before.bytes) / num_tokens),
    }


def replay_window(bench: Benchmark) -> dict[str, dict[float, tuple[float, ...]]]:
    """Hit rates of claims, LRU and Belady over the timed tokens, by trace and capacity.

    All also see the tokens before. What they hit there is taken off; for Belady that is the most
    that any policy could have hit there, so what is left is at most what it hits afterwards.
    """
    rates: dict[str, dict[float, tuple[float, ...]]] = {}
    slots = [bench.num_slots(capacity) for capacity in CAPACITIES]
    for name, trace in bench.traces.items():
        before = RoutingTrace(trace.topk_ids[: bench.first], trace.num_experts, trace.page_bytes)
        found = []
        policies: tuple[Policy, ...] = ("claims", "lru", "belady")
        for policy in policies:
            pairs = zip(
                replay_curve(trace, slots, [policy]),
                replay_curve(before, slots, [policy]),
                strict=True,
            )
            found.append([_hit_rate_after(*pair) for pair in pairs])
        rates[name] = dict(zip(CAPACITIES, zip(*found, strict=True), strict=True))
    return rates


def _hit_rate_after(whole: Replay, part: Replay) -> float:
    hits = sum(whole.hits) - sum(part.hits)
    misses = sum(whole.misses) - sum(part.misses)
    return round(hits / (hits + misses), 4)


def check_bits(bench: Benchmark, num_tokens: int = 4) -> None:
    """Logits of the paged model equal those of the resident one, eagerly and by graph.

    Raises:
        AssertionError: they do not.
    """
    decoder, cache = bench.decoder, bench.cache
    bench.replay.load(sweepless(bench.first_trace, bench))
    for graph in (False, True):
        decoder.release()
        bench.residents.enter()
        if graph:
            decoder.capture()
        expected = decoder.logits_of(num_tokens)
        if not expected.isfinite().all() or not expected.any():
            raise AssertionError("the resident model's logits are not what they should be")
        decoder.release()
        bench.residents.leave(cache)
        for variant, cache.overlap in VARIANTS.items():
            # The smallest pool that works: everything is evicted all the time.
            for num_slots in (bench.shape.cycle, bench.num_slots(0.5)):
                decoder.release()
                cache.resize(num_slots, bench.shape.num_experts_per_tok)
                if graph:
                    decoder.capture()
                equal = torch.equal(decoder.logits_of(num_tokens), expected)
                bench.results.add(
                    "bit_for_bit",
                    {
                        "graph": graph and bench.device.type == "cuda",
                        "variant": variant,
                        "num_slots": num_slots,
                        "tokens": num_tokens,
                        "equal": equal,
                    },
                )
                if not equal:
                    raise AssertionError("paged logits differ from resident ones")
    decoder.release()


def sweepless(trace: RoutingTrace, bench: Benchmark) -> RoutingTrace:
    """The same trace with its sweep at the end."""
    start = bench.first - bench.num_warmup
    return RoutingTrace(trace.topk_ids.roll(-start, 0), trace.num_experts, trace.page_bytes)
