from __future__ import annotations

import math

import pytest
import torch

from qmoe.traces.drift import Drift, drifting_trace
from qmoe.traces.replay import replay

EVEN = Drift(skew=0, spread=0, period=1)


def test_without_skew_and_spread_all_experts_are_alike():
    trace = drifting_trace(4000, 2, 16, 4, EVEN)
    assert trace.popularity() == pytest.approx(1000, rel=0.12)
    assert trace.reuse() == pytest.approx(torch.full((2,), 4 / 16).double(), abs=0.02)


def test_skew_lasts_and_spread_passes():
    """A lasting favourite is one in both halves of a trace; a momentary one only in one."""

    def alike(drift: Drift) -> float:
        halves = drifting_trace(6000, 1, 64, 4, drift).topk_ids.long().view(2, -1)
        counts = torch.stack([half.bincount(minlength=64) for half in halves])
        return float(torch.corrcoef(counts.double())[0, 1])

    assert alike(Drift(skew=4, spread=0, period=1)) > 0.95
    assert abs(alike(Drift(skew=0, spread=4, period=30))) < 0.4
    assert alike(Drift(skew=0, spread=4, period=math.inf)) > 0.95


def test_weights_are_those_of_the_docstring():
    """With one expert for a token, shares are proportional to weights."""
    counts = drifting_trace(40000, 1, 8, 1, Drift(skew=2, spread=0, period=1)).popularity()[0]
    expected = torch.exp(-2 * torch.arange(8.0) / 8)
    shares = counts.sort(descending=True).values / counts.sum()
    assert shares == pytest.approx((expected / expected.sum()).float(), rel=0.05)


def test_longer_periods_hit_more():
    rates = [
        replay(drifting_trace(600, 2, 64, 4, Drift(1, 6, period)), 32, warmup=200).hit_rate
        for period in (5, 40, 400)
    ]
    assert rates == sorted(rates) and rates[2] - rates[0] > 0.1


def test_experts_of_a_token_differ_and_largest_comes_first():
    trace = drifting_trace(500, 3, 16, 8, Drift(6, 3, 20))
    ids = trace.topk_ids.sort(-1).values
    assert (ids[..., 1:] > ids[..., :-1]).all()
    # The favourite is more often first than last.
    favourite = trace.popularity().argmax(1)
    found = trace.topk_ids == favourite[:, None]
    assert (found[..., 0].sum(0) > 2 * found[..., -1].sum(0)).all()


def test_a_seed_gives_the_same_trace_and_a_shorter_one_its_beginning():
    drift = Drift(2, 3, 10)
    first, same, other = (drifting_trace(9, 2, 16, 4, drift, seed=s).topk_ids for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(drifting_trace(5, 2, 16, 4, drift, seed=1).topk_ids, first[:5])


def test_refuses_what_cannot_be():
    for values in ((-1, 1, 2), (1, -1, 2), (1, 1, 0.5), (math.nan, 1, 2), (1, math.inf, 2)):
        with pytest.raises(ValueError, match="at least 1 token"):
            Drift(*values)
    with pytest.raises(ValueError, match="top_k=17"):
        drifting_trace(5, 2, 16, 17, EVEN)
