"""Sections sharing and batches: decode with misses that the host computes a share of."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cache.decode import count, time_cell
from benchmarks.cache.harness import Benchmark
from benchmarks.cache.model import Decoder, sweep
from benchmarks.model import experts_of, time_each
from qmoe.paging.sharing import calibrate, sharing_of
from qmoe.paging.stats import CacheStats
from qmoe.traces.trace import RoutingTrace

CAPACITIES = (0.25, 0.375, 0.5)
BATCH_CAPACITIES = (0.5, 0.25)  # the quicker one first
# Tokens that a batch reads before: together no more than these.
BATCH_CONTEXT = 4096
# Of logits, relative, in bf16: each of 48 layers rounds what the host and the link computed.
TOLERANCE = 0.05


def run_sharing(bench: Benchmark) -> None:
    """Milliseconds per token by capacity, trace and who serves misses, beside all resident."""
    results, decoder, cache = bench.results, bench.decoder, bench.cache
    cache.overlap = None  # as a model has it; other sections try both
    bench.residents.enter()
    decoder.capture()
    resident = {}
    for name, trace in bench.traces.items():
        resident[name] = _time_resident(bench, decoder, trace)
        results.add("resident", {"trace": name, **time_cell(*resident[name])})
    expected = decoder.logits_of(4)
    decoder.release()
    bench.residents.leave(cache)
    results.set(
        model=str(bench.shape),
        context=bench.context,
        tokens=bench.num_tokens,
        threads=torch.get_num_threads(),
        link_gb_per_s=bench.link,
        page_bytes=bench.shape.page_bytes,
    )
    try:
        for capacity in CAPACITIES:
            cache.resize(bench.num_slots(capacity), bench.shape.num_experts_per_tok)
            for misses in bench.misses:
                share = _serve(bench, decoder, misses)
                for name, trace in bench.traces.items():
                    cell = _cell(bench, decoder, resident[name], trace)
                    where = {"trace": name, "capacity": capacity, "served_by": misses}
                    results.add("cells", {**where, "share": share[0], **cell})
                _check_logits(bench, expected, misses)
    finally:
        decoder.release()
        cache.share_misses(None)


def run_batches(bench: Benchmark) -> None:
    """The same for several texts at once, each with a trace of its own."""
    results, cache = bench.results, bench.cache
    cache.overlap = None
    results.set(model=str(bench.shape), tokens=bench.num_tokens, threads=torch.get_num_threads())
    for batch in bench.batches:
        context = min(bench.context, max(1, BATCH_CONTEXT // batch))
        decoder = Decoder(bench.model, bench.replay, context, bench.replay.num_tokens, batch)
        traces = [sweep(trace) for trace in bench.texts(batch)]
        try:
            bench.residents.enter()
            bench.replay.load(*traces)
            decoder.capture()
            resident = _time_resident(bench, decoder, *traces)
            size = {"batch": batch, "context": context}
            results.add("resident", {**size, **_of_texts(time_cell(*resident), batch)})
            decoder.release()
            bench.residents.leave(cache)
            for capacity in BATCH_CAPACITIES:
                cache.resize(bench.num_slots(capacity), bench.shape.num_experts_per_tok)
                for misses in bench.misses:
                    share = _serve(bench, decoder, misses)
                    cell = _of_texts(_cell(bench, decoder, resident, *traces), batch)
                    where = {**size, "capacity": capacity, "served_by": misses}
                    results.add("cells", {**where, "share": share[1], **cell})
        finally:
            decoder.release()
            cache.share_misses(None)
            bench.replay.load(bench.first_trace)


def _serve(bench: Benchmark, decoder: Decoder, misses: str) -> list[list[int] | None]:
    """Capture a step whose misses are served so; the shares of calls of one and several tokens."""
    cache, modules, top_k = bench.cache, experts_of(bench.model), bench.shape.num_experts_per_tok
    decoder.release()
    cache.share_misses(sharing_of(cache, modules, misses))
    calibrate(cache, modules, misses, top_k=top_k, dtype=bench.model.dtype)
    sharing = cache.sharing
    shares = [None, None] if sharing is None else sharing.posts.share.tolist()
    decoder.capture()
    return [shares[0] and shares[0][: top_k + 1], shares[1]]


def _time_resident(
    bench: Benchmark, decoder: Decoder, *traces: RoutingTrace
) -> tuple[list[float], float]:
    bench.replay.load(*traces)
    return decoder.time(bench.first, bench.num_tokens)


def _of_texts(cell: dict[str, Any], batch: int) -> dict[str, Any]:
    """A cell whose tokens per second are those of all texts."""
    return {**cell, "tokens_per_s": round(1e3 * batch / cell["ms"], 2)}


def _cell(
    bench: Benchmark,
    decoder: Decoder,
    resident: tuple[list[float], float],
    *traces: RoutingTrace,
) -> dict[str, Any]:
    bench.replay.load(*traces)
    bench.cache.forget()  # claims of the traces before
    decoder.reset()
    for _ in range(bench.first):
        _advance(decoder)
    before = bench.counters()
    each, total = time_each(lambda: _advance(decoder), bench.num_tokens, bench.device)
    after = bench.counters()
    bench.cache.check_answers()
    resident_ms = resident[1] / bench.num_tokens
    return {
        **time_cell(each, total),
        "retention": round(resident_ms / (total / bench.num_tokens), 4),
        "resident_ms": round(resident_ms, 4),
        **count(before, after, bench.num_tokens),
        **_served(before, after, bench.num_tokens),
    }


def _advance(decoder: Decoder) -> None:
    """One token; the workers are woken as they are by `qmoe.generate`."""
    with decoder.decode.alone():
        decoder.advance()


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
