"""Traces that hit as often as real models: a generator fitted to published hit rates.

``python -m benchmarks.routing`` (``make bench-routing``) needs no GPU and runs a section for each
model that something is published about. Each searches for the three parameters of
`qmoe.traces.drift.drifting_trace` and then looks how well they do with other random numbers than
those of the search:

- *seeds*: hit rates of several traces, with a cache that is empty at the start and with a warm one,
  with one pool for all layers and with one for each.
- *lengths*: hit rates by number of tokens.
- *curve*: hit rates by capacity, beside the traces that the cache's benchmark also replays.

The section *policies* replays these traces under every policy, and counts misses of a token: after
some that fill the cache, and after the first text has given way to another one like it.

Results go to ``benchmarks/results/routing.json``, from which the cache's benchmark takes the
parameters; ``--draw`` draws a picture beside it. ``--tiny`` runs all of it in seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import check_names, parser_of
from benchmarks.record import Results, facts, run_sections
from benchmarks.routing.fit import (
    beginning,
    deviations,
    fit,
    hit_rates,
    hit_rates_by_layer,
    hot_share,
)
from benchmarks.routing.published import MODELS, QWEN3_30B_A3B, RESULTS, Published, fitted
from qmoe.traces.drift import Drift, drifting_trace
from qmoe.traces.replay import replay_curve
from qmoe.traces.trace import RoutingTrace, synthetic_trace, tile_trace

RECORDED = Path(__file__).parents[1] / "data" / "tiny_moe_routing.safetensors"
POINTS = 2.0  # that a hit rate may be off by
SEARCH_SEED = 1000  # far from those that are reported
NUM_SEEDS = 8
POLICIES = "policies"
POLICY_SHARES = (1 / 4, 3 / 8, 1 / 2)
SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)


def run_model(model: Published, results: Results, options: Any) -> None:
    """Fit to one model and say what was reached."""
    if options.tiny:
        model = replace(model, num_layers=2)
    results.set(
        model=asdict(model) | {"hit_rates": [list(point) for point in model.hit_rates.items()]}
    )
    num_layers = options.layers or max(4, 3072 // model.num_experts)
    drift, worst = fit(model, options.evaluations, num_layers, SEARCH_SEED)
    results.set(
        drift=asdict(drift),
        search={
            "evaluations": options.evaluations,
            "num_layers": num_layers,
            "seed": SEARCH_SEED,
            "worst_points": round(worst, 2),
        },
    )
    for seed in range(2 if options.tiny else NUM_SEEDS):
        results.add("seeds", seed_cell(model, drift, seed))
    for doubling in range(-2, 2 if options.tiny else 4):
        num_tokens = round(model.num_tokens * 2.0**doubling)
        trace = drifting_trace(num_tokens, *model.routing, drift)
        cell = {
            "num_tokens": num_tokens,
            "hit_rates": rounded(hit_rates(trace, [*model.hit_rates])),
        }
        results.add("lengths", cell)
    for name, trace in curves(model, drift).items():
        cell = {"trace": name, "shares": SHARES, "hit_rates": rounded(hit_rates(trace, SHARES))}
        results.add("curve", cell)


def run_policies(results: Results, options: Any) -> None:
    """Misses a token under every policy, of the cache's traces and where the text changes."""
    model, warmup = QWEN3_30B_A3B, 200
    if options.tiny:
        model, warmup = replace(model, num_layers=2), 10
    drift = fitted(model)
    model = replace(model, num_tokens=3 * warmup)
    traces = {name: (trace, warmup) for name, trace in curves(model, drift).items()}
    following = drifting_trace(warmup, *model.routing, drift, seed=1)
    both = torch.cat([traces["fitted"][0].topk_ids, following.topk_ids])
    traces["another text"] = replace(following, topk_ids=both), model.num_tokens
    results.set(model=model.name, num_layers=model.num_layers, warmup_tokens=warmup)
    for name, (trace, first) in traces.items():
        for share in POLICY_SHARES:
            slots = round(share * trace.num_pages)
            found = replay_curve(trace, [slots], warmup=first)
            misses = {r.policy: round(sum(r.misses) / (trace.num_tokens - first), 1) for r in found}
            results.add("cells", {"trace": name, "share": share, "misses_per_token": misses})


def seed_cell(model: Published, drift: Drift, seed: int) -> dict[str, Any]:
    """Hit rates of one trace at the published capacities, and how far they are off."""
    shares = list(model.hit_rates)
    trace = drifting_trace(2 * model.num_tokens, *model.routing, drift, seed=seed)
    cold = beginning(trace, model.num_tokens)
    by_layer = hit_rates_by_layer(cold, shares)
    points = deviations(model, trace)
    cell = {
        "seed": seed,
        "cold": rounded(hit_rates(cold, shares)),
        "warm": rounded(hit_rates(trace, shares, warmup=model.num_tokens)),
        "pool_for_each_layer": rounded([sum(rates) / len(rates) for rates in by_layer]),
        "lowest_layer": rounded([min(rates) for rates in by_layer]),
        "highest_layer": rounded([max(rates) for rates in by_layer]),
        "reuse": round(float(cold.reuse().mean()), 4),
        "worst_points": round(max(map(abs, points)), 2),
    }
    if model.hot is not None:
        cell["hot_share"] = round(hot_share(cold, model.hot[0]), 4)
    return cell


def curves(model: Published, drift: Drift) -> dict[str, RoutingTrace]:
    """Traces of the published length by name: the fitted one, and where they fit the others."""
    found = {"fitted": drifting_trace(model.num_tokens, *model.routing, drift)}
    if model.name == QWEN3_30B_A3B.name:
        found["synthetic"] = synthetic_trace(model.num_tokens, *model.routing)
        recorded = RoutingTrace.load(RECORDED)
        found["recorded"] = tile_trace(recorded, *model.routing, num_tokens=model.num_tokens)
    return found


def rounded(rates: list[float]) -> list[float]:
    """To hundredths of a point."""
    return [round(rate, 4) for rate in rates]


def targets(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """How far any trace's hit rates are off what is published."""
    found = []
    for name, section in sections.items():
        if cells := section.get("seeds"):
            worst = max(cell["worst_points"] for cell in cells)
            what = f"{name}: points that a rate of any of {len(cells)} traces is off"
            met = worst <= POINTS
            found.append({"what": what, "target": POINTS, "measured": worst, "met": met})
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run sections; the number of those that failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sections = (*MODELS, POLICIES)
    parser = parser_of(__doc__, sections, RESULTS)
    parser.add_argument("--evaluations", type=int, default=80, help="of the search")
    parser.add_argument("--layers", type=int, help="that the search looks at")
    options = parser.parse_args(arguments)
    if options.draw:
        from benchmarks.routing.figures import draw

        print(draw(options.out))
        return 0
    only = options.only.split(",")
    check_names(parser, "section", only, sections)
    if options.tiny and options.out == RESULTS:
        parser.error("--tiny measures nothing worth keeping: give it another --out")
    torch.set_num_threads(1)  # tensors are small
    results = Results("routing", options.out, facts("routing", arguments, options.commit), targets)
    run: dict[str, Callable[[], None]] = {
        name: partial(run_model, model, results, options) for name, model in MODELS.items()
    }
    run[POLICIES] = partial(run_policies, results, options)
    chosen = {name: run[name] for name in only}
    return run_sections(results, chosen)


if __name__ == "__main__":
    sys.exit(main())
