"""Draw traces, replay them as the published figures were measured, and search for parameters."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from benchmarks.routing.published import Published
from qmoe.traces.drift import Drift, drifting_trace
from qmoe.traces.replay import Replay, replay_curve
from qmoe.traces.trace import RoutingTrace

HIGHEST_STEP, LOWEST_STEP = 0.4, 0.01


def beginning(trace: RoutingTrace, num_tokens: int) -> RoutingTrace:
    """The first tokens of a trace."""
    return RoutingTrace(
        trace.topk_ids[:num_tokens], trace.num_experts, trace.page_bytes, trace.metadata
    )


def replay_shares(trace: RoutingTrace, shares: Sequence[float], *, warmup: int = 0) -> list[Replay]:
    """Replay LRU in one pool for all layers that holds these shares of all experts."""
    slots = [round(share * trace.num_pages) for share in shares]
    return replay_curve(trace, slots, ["lru"], warmup=warmup)


def hit_rates(trace: RoutingTrace, shares: Sequence[float], *, warmup: int = 0) -> list[float]:
    """Hit rates of `replay_shares`."""
    return [replay.hit_rate for replay in replay_shares(trace, shares, warmup=warmup)]


def hit_rates_by_layer(trace: RoutingTrace, shares: Sequence[float]) -> list[list[float]]:
    """Hit rates where every layer has a pool of its own: for each share, of each layer."""
    rates = []
    for layer in range(trace.num_layers):
        ids = trace.topk_ids[:, layer : layer + 1]
        rates.append(hit_rates(RoutingTrace(ids, trace.num_experts, (0,)), shares))
    return [list(of_share) for of_share in zip(*rates, strict=True)]


def hot_share(trace: RoutingTrace, num_hot: int) -> float:
    """Of what the second half of a trace uses, the share of the first half's favourites."""
    half = trace.num_tokens // 2
    before = beginning(trace, half).popularity()
    after = trace.popularity() - before
    hot = before.topk(num_hot).indices
    return float(after.gather(1, hot).sum() / after.sum())


def deviations(model: Published, trace: RoutingTrace) -> list[float]:
    """What a trace of twice the published length has more than is published, in points.

    Hit rates over as many tokens as were decoded, from an empty cache; hit rates over as many again
    behind them; and, where it is known, the share of the first half's favourites.
    """
    shares, published = list(model.hit_rates), list(model.hit_rates.values())
    cold = beginning(trace, model.num_tokens)
    found = hit_rates(cold, shares) + hit_rates(trace, shares, warmup=model.num_tokens)
    expected = published * 2
    if model.hot is not None:
        found.append(hot_share(cold, model.hot[0]))
        expected.append(model.hot[1])
    return [100 * (a - b) for a, b in zip(found, expected, strict=True)]


def fit(model: Published, evaluations: int, num_layers: int, seed: int) -> tuple[Drift, float]:
    """Search for the parameters whose traces are nearest to what is published.

    Steps are drawn around the best point so far: longer ones after a success, shorter ones after a
    failure. All points see the same random numbers.

    Returns:
        the parameters, and the largest deviation on this search's trace, in points.
    """
    random_ = random.Random(seed)

    def draw(drift: Drift) -> list[float]:
        shape = (num_layers, model.num_experts, model.top_k)
        trace = drifting_trace(2 * model.num_tokens, *shape, drift, seed=seed)
        return [abs(points) for points in deviations(model, trace)]

    def cost(points: list[float]) -> float:
        return max(points) + 0.02 * sum(points)

    best = model.start
    points = draw(best)
    step = HIGHEST_STEP
    for _ in range(evaluations):
        tried = Drift(
            round(best.skew * math.exp(step * random_.gauss(0, 1)), 2),
            round(best.spread * math.exp(step * random_.gauss(0, 1)), 2),
            round(max(best.period * math.exp(step * random_.gauss(0, 1)), 1), 1),
        )
        if cost(found := draw(tried)) < cost(points):
            best, points, step = tried, found, min(step * 1.5, HIGHEST_STEP)
        else:
            step = step * 0.93 if step > LOWEST_STEP else HIGHEST_STEP / 2
    return best, max(points)
