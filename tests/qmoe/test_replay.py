from __future__ import annotations

import itertools
import math
import time
from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe.traces.drift import Drift, drifting_trace
from qmoe.traces.replay import POLICIES, replay, replay_curve
from qmoe.traces.trace import NONE, RoutingTrace, synthetic_trace
from qmoe_kernels.paging import HITS, MISSES, CopyList, Residency, admit


@st.composite
def traces(draw, max_tokens=12, max_layers=3, max_experts=5):
    """Adversarial ones: repeats within a step, missing ids, empty steps."""
    tokens = draw(st.integers(1, max_tokens))
    layers = draw(st.integers(1, max_layers))
    experts = draw(st.integers(1, max_experts))
    top_k = draw(st.integers(1, 3))
    ids = draw(
        st.lists(
            st.integers(NONE, experts - 1),
            min_size=tokens * layers * top_k,
            max_size=tokens * layers * top_k,
        )
    )
    shape = (tokens, layers, top_k)
    return RoutingTrace(torch.tensor(ids).view(shape).short(), experts, (1000,) * layers)


def steps(trace):
    """(layer, distinct pages) of each step, in order."""
    for token in trace.topk_ids.tolist():
        for layer, ids in enumerate(token):
            yield layer, list(dict.fromkeys((layer, e) for e in ids if e != NONE))


def brute_force(trace, capacity, policy):
    """Hits and misses by layer, in the plainest way: look at every slot at every eviction."""
    everything = list(steps(trace))
    slots = [None] * capacity
    last_use, uses, earned = {}, {}, {}
    rate = Fraction(8)  # misses per step
    hits, misses = [0] * trace.num_layers, [0] * trace.num_layers
    for now, (layer, pages) in enumerate(everything):

        def next_use(page, now=now):
            for later in range(now + 1, len(everything)):
                if page in everything[later][1]:
                    return later
            return len(everything)

        def claim(page, next_use=next_use):
            if policy == "belady":
                return -next_use(page)
            if policy == "claims":
                return earned[page]
            return last_use[page] if policy == "lru" else (uses[page], last_use[page])

        missing = [page for page in pages if page not in slots]
        hits[layer] += len(pages) - len(missing)
        misses[layer] += len(missing)
        horizon = 64 * trace.num_layers
        if rough := Fraction(math.floor(rate * 1024), 1024):
            horizon = min(horizon, math.floor(2 * capacity / rough))
        rate = Fraction(math.floor((rate + (len(missing) - rate) / 512) * 65536), 65536)
        for page in missing:
            if None in slots:
                slot = slots.index(None)
            else:
                free = [s for s in range(capacity) if slots[s] not in pages]
                if policy in ("claims", "lru"):
                    began = now - trace.num_layers  # of the cycle
                    old = [s for s in free if last_use[slots[s]] <= began]
                    slot = min(free, key=lambda s: (-last_use[slots[s]], s))
                    free = old or [slot]
                slot = min(free, key=lambda s: (claim(slots[s]), s))
            slots[slot] = page
        for page in pages:
            # The clock is 1 in the first step.
            earned[page] = max(now + 1, (earned.get(page, 0) + now + 1 + horizon) // 2)
            last_use[page], uses[page] = now, uses.get(page, 0) + 1
    return tuple(hits), tuple(misses)


def fewest_misses(trace, capacity):
    """By trying every choice of victims at every step."""
    everything = [frozenset(pages) for _, pages in steps(trace)]

    @cache
    def best(step, resident):
        if step == len(everything):
            return 0
        wanted = everything[step]
        missing = len(wanted - resident)
        others = resident - wanted
        excess = max(len(others) + len(wanted) - capacity, 0)
        return missing + min(
            best(step + 1, (others - set(victims)) | wanted)
            for victims in itertools.combinations(sorted(others), excess)
        )

    return best(0, frozenset())


@settings(deadline=None, max_examples=150)
@given(traces(), st.integers(0, 8), st.sampled_from(POLICIES))
def test_equals_brute_force(trace, more, policy):
    capacity = trace.top_k + more
    result = replay(trace, capacity, policy)
    assert (result.hits, result.misses) == brute_force(trace, capacity, policy)
    assert result.missed_bytes == 1000 * sum(result.misses)


@settings(deadline=None, max_examples=80)
@given(traces(max_tokens=5, max_layers=2, max_experts=4), st.integers(0, 3))
def test_nothing_beats_belady(trace, more):
    capacity = trace.top_k + more
    assert sum(replay(trace, capacity, "belady").misses) == fewest_misses(trace, capacity)


@settings(deadline=None, max_examples=50)
@given(traces(), st.integers(0, 8))
def test_claims_are_what_the_cache_itself_does(trace, more):
    capacity = trace.top_k + more
    residency = Residency.empty(trace.num_pages, capacity, trace.num_layers, "cpu")
    copies = CopyList.empty(trace.num_experts, "cpu")
    for token in trace.topk_ids:
        for layer, ids in enumerate(token):
            first_page = layer * trace.num_experts
            admit(ids[None].long(), layer, first_page, trace.num_experts, residency, copies)
    result = replay(trace, capacity, "claims")
    assert list(result.hits) == residency.counters[:, HITS].tolist()
    assert list(result.misses) == residency.counters[:, MISSES].tolist()


def test_curves_rise_and_end_where_everything_fits():
    trace = synthetic_trace(80, 6, 16, 4)
    results = replay_curve(trace, [8, 24, 48, 96, 200])
    assert [(r.policy, r.capacity) for r in results] == [
        (policy, capacity) for policy in POLICIES for capacity in (8, 24, 48, 96, 200)
    ]
    first_uses = int(trace.popularity().gt(0).sum())
    for policy in POLICIES:
        curve = [r for r in results if r.policy == policy]
        rates = [r.hit_rate for r in curve]
        assert rates == sorted(rates)
        assert [sum(r.misses) for r in curve[3:]] == [first_uses] * 2
        assert all(sum(r.hits) + sum(r.misses) == 80 * 6 * 4 for r in curve)
    belady = [r.hit_rate for r in results if r.policy == "belady"]
    assert all(r.hit_rate <= best for r, best in zip(results, belady * 4, strict=True))


def test_claims_to_the_slot_on_many_tokens():
    """Long enough for claims that are far ahead of the clock."""
    trace = drifting_trace(150, 4, 16, 3, Drift(4, 3, 15), seed=3)
    for capacity in (10, 24, 40):
        residency = Residency.empty(trace.num_pages, capacity, trace.num_layers, "cpu")
        copies = CopyList.empty(trace.num_experts, "cpu")
        for token in trace.topk_ids:
            for layer, ids in enumerate(token):
                admit(ids[None].long(), layer, layer * 16, 16, residency, copies)
        result = replay(trace, capacity, "claims")
        assert list(result.hits) == residency.counters[:, HITS].tolist()
        ahead = residency.claims - residency.clock
        assert int(ahead.max()) > 5 or capacity == 10
        assert (result.hits, result.misses) == brute_force(trace, capacity, "claims")


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_claims_miss_less_than_lru_where_experts_have_favourites(share):
    trace = drifting_trace(400, 8, 64, 4, Drift(7, 3.4, 17), seed=1)
    results = replay_curve(trace, [int(share * 512)], ["claims", "lru", "belady"], warmup=100)
    claims, lru, belady = (sum(r.misses) for r in results)
    assert belady < claims < 0.97 * lru


def test_claims_follow_another_text():
    """After all layers' favourites have changed: not far behind LRU, and ahead of it again."""
    drift, shape = Drift(7, 3.4, 17), (8, 64, 4)
    texts = [drifting_trace(400, *shape, drift, seed=seed).topk_ids for seed in (1, 2)]
    trace = RoutingTrace(torch.cat(texts), 64, (1,) * 8)

    def misses(policy, first, last):
        part = RoutingTrace(trace.topk_ids[:last], 64, trace.page_bytes)
        return sum(replay(part, 256, policy, warmup=first).misses)

    assert misses("claims", 400, 600) < 1.12 * misses("lru", 400, 600)
    assert misses("claims", 600, 800) < misses("lru", 600, 800)


def test_lru_hits_what_fits_where_layers_want_more_than_that():
    trace = synthetic_trace(40, 6, 16, 4, reuse=1)
    # The slots of one layer are those that the others' misses go through.
    for layers in (3, 5):
        found = sum(replay(trace, layers * 4, "lru").hits)
        best = sum(replay(trace, layers * 4, "belady").hits)
        assert 39 * (layers - 1) * 4 <= found <= best
    assert sum(replay(trace, 6 * 4, "lru").misses) == 6 * 4


def test_warmup_is_not_counted():
    trace = synthetic_trace(30, 3, 8, 2)
    whole, late = replay(trace, 10), replay(trace, 10, warmup=20)
    head = RoutingTrace(trace.topk_ids[:20], 8, trace.page_bytes)
    early = replay(head, 10)
    for name in ("hits", "misses"):
        parts = zip(getattr(early, name), getattr(late, name), strict=True)
        assert tuple(map(sum, parts)) == getattr(whole, name)


def test_bytes_are_those_of_each_layers_pages():
    ids = torch.tensor([[[0], [1]], [[0], [0]], [[0], [1]]]).short()
    result = replay(RoutingTrace(ids, 2, (10, 300)), 9)
    assert (result.hits, result.misses, result.missed_bytes) == ((2, 1), (1, 2), 610)
    assert result.hit_rate == 0.5


def test_refuses_in_words():
    trace = synthetic_trace(5, 2, 8, 4)
    with pytest.raises(ValueError, match="capacity=3: one step needs 4 slots"):
        replay(trace, 3)
    with pytest.raises(
        ValueError, match="policy='fifo'; use one of 'claims', 'lru', 'lfu', 'belady'"
    ):
        replay(trace, 8, "fifo")
    with pytest.raises(ValueError, match="warmup=5"):
        replay(trace, 8, warmup=5)


def test_is_quick():
    trace = synthetic_trace(64, 48, 128, 8)
    started = time.process_time()
    replay_curve(trace, [768 * i for i in range(1, 9)])
    assert time.process_time() - started < 10  # an eighth of what a report replays
