"""Section sharing: decode as in *decode*, with misses that the host computes a share of."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cache.decode import count, time_cell
from benchmarks.cache.harness import Benchmark
from benchmarks.model import experts_of, time_each
from qmoe.paging.sharing import calibrate, sharing_of
from qmoe.paging.stats import CacheStats
from qmoe.traces.trace import RoutingTrace

CAPACITIES = (0.25, 0.375, 0.5)
# Of logits, relative, in bf16: each of 48 layers rounds what the host and the link computed.
TOLERANCE = 0.05


def run_sharing(bench: Benchmark) -> None:
    """Milliseconds per token by capacity, trace and who serves misses, beside all resident."""
    results, decoder, cache = bench.results, bench.decoder, bench.cache
    modules, top_k = experts_of(bench.model), bench.shape.num_experts_per_tok
    bench.residents.enter()
    decoder.capture()
    resident = {}
    for name, trace in bench.traces.items():
        bench.replay.load(trace)
        each, total = decoder.time(bench.first, bench.num_tokens)
        resident[name] = total / bench.num_tokens
        results.add("resident", {"trace": name, **time_cell(each, total)})
    expected = decoder.logits_of(4)
    decoder.release()
    bench.residents.leave(cache)
    results.set(context=bench.context, tokens=bench.num_tokens, threads=torch.get_num_threads())
    try:
        for capacity in CAPACITIES:
            cache.resize(bench.num_slots(capacity), top_k)
            for misses in bench.misses:
                decoder.release()
                cache.share_misses(sharing_of(cache, modules, misses))
                calibrate(cache, modules, misses, top_k=top_k, dtype=bench.model.dtype)
                sharing = cache.sharing
                share = None if sharing is None else sharing.posts.share[: top_k + 1].tolist()
                decoder.capture()
                for name, trace in bench.traces.items():
                    cell = _cell(bench, trace, resident[name])
                    where = {"trace": name, "capacity": capacity, "served_by": misses}
                    results.add("cells", {**where, "share": share, **cell})
                _check_logits(bench, expected, misses)
    finally:
        decoder.release()
        cache.share_misses(None)


def _cell(bench: Benchmark, trace: RoutingTrace, resident_ms: float) -> dict[str, Any]:
    bench.replay.load(trace)
    bench.decoder.reset()
    for _ in range(bench.first):
        _advance(bench)
    before = bench.counters()
    each, total = time_each(lambda: _advance(bench), bench.num_tokens, bench.device)
    after = bench.counters()
    bench.cache.check_answers()
    return {
        **time_cell(each, total),
        "retention": round(resident_ms / (total / bench.num_tokens), 4),
        "resident_ms": round(resident_ms, 4),
        **count(before, after, bench.num_tokens),
        **_served(before, after, bench.num_tokens),
    }


def _advance(bench: Benchmark) -> None:
    """One token; the workers are woken as they are by `qmoe.generate`."""
    with bench.decoder.decode.alone():
        bench.decoder.advance()


def _served(before: CacheStats, after: CacheStats, num_tokens: int) -> dict[str, float]:
    waited = after.waited_seconds - before.waited_seconds
    return {
        "host_misses": after.host_misses - before.host_misses,
        "waited_ms_per_token": round(waited * 1e3 / num_tokens, 4),
    }


def _check_logits(bench: Benchmark, expected: torch.Tensor, misses: str) -> None:
    """Compare with the resident model: bits with the link alone, else within rounding.

    Raises:
        AssertionError: they are something else.
    """
    found = bench.decoder.logits_of(len(expected))
    bench.cache.check_answers()
    if bench.cache.sharing is None:
        right, off = torch.equal(found, expected), 0.0
    else:
        off = float((found.float() - expected.float()).norm() / expected.float().norm())
        right = off < TOLERANCE
    bench.results.add("checked", {"served_by": misses, "relative_error": off, "right": right})
    if not right:
        raise AssertionError(f"misses={misses!r}: logits differ from the resident model's ({off})")
