"""One MoE layer: ours, and what others compute it with, in three models' shapes.

``python -m benchmarks.kernels`` (``make bench-kernels``) runs, on one GPU with 140 GB (``--only``
names some of them):

- *ceilings*: what this machine reads, copies and multiplies.
- *errors*: of every format on fp32 weights, and of our kernels over it.
- *latency*: microseconds of the whole layer, by tokens, of our modes, torch's grouped products
  (GEMMs alone), transformers' experts implementations and, where it is installed, vLLM's kernels:
  CUDA-graph replay, two layers' weights and many routings in turn, so that nothing is in L2.
- *held_out*: the same of shapes that the rule was not fitted on, without transformers.
- *accumulation*: FP8 sums in one level and in two: time and error.
- *skew*: Zipf-distributed routing over uniform routing with as many active experts.
- *routing*: sorting pairs by expert, by itself, and routers, fused and transformers' own.
- *layer*: one layer computed on the CPU, eagerly, grouped and fused.
- *perplexity*: of the shipped model, with rows of its experts' products in 16 bits and in 8.

Every cell is checked before it is timed: up to 32 tokens against fp64 on the same rounded operands,
on memory poisoned with NaN, twice for equal bits. One that fails has no time. Results go to
``benchmarks/results/kernels.json`` as they come (sections that are not run keep what they had), and
``--draw`` draws pictures beside it. ``--tiny`` runs all of it on small shapes, on a CPU too, to
test this file; its times mean nothing.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.kernels.accuracy import run_perplexity
from benchmarks.kernels.layers import MODES
from benchmarks.kernels.routing import run_routing
from benchmarks.kernels.sections import (
    Bench,
    run_accumulation,
    run_ceilings,
    run_errors,
    run_held_out,
    run_latency,
    run_layer,
    run_skew,
)
from benchmarks.kernels.shapes import HELD_OUT, HELD_OUT_TOKENS, SHAPES, TOKENS, WITH_TARGETS
from benchmarks.kernels.table import tables
from benchmarks.kernels.targets import targets
from benchmarks.options import check, check_names, parser_of
from benchmarks.record import Results, facts
from qmoe_kernels.tiles import LayerShape

RESULTS = Path(__file__).parents[1] / "results" / "kernels.json"
TINY_SHAPES = {
    "tiny": LayerShape(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32),
    "odd": LayerShape(num_experts=5, top_k=1, hidden_size=48, intermediate_size=16),
}
TINY_TOKENS = (1, 16)

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "ceilings": run_ceilings,
    "errors": run_errors,
    "latency": run_latency,
    "held_out": run_held_out,
    "accumulation": run_accumulation,
    "skew": run_skew,
    "routing": run_routing,
    "layer": run_layer,
    "perplexity": run_perplexity,
}


def main(arguments: list[str] | None = None) -> int:
    """Run sections; the number of those that failed, and of cells whose check did."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = parser_of(__doc__, SECTIONS, RESULTS)
    parser.add_argument(
        "--shapes",
        help=f"some of {','.join(SHAPES)}; if absent, {','.join(HELD_OUT)} in section held_out "
        f"and {','.join(WITH_TARGETS)} in the others",
    )
    parser.add_argument(
        "--tokens", help=f"{','.join(map(str, TOKENS))} if absent, held_out 512 too"
    )
    parser.add_argument("--modes", default=",".join(MODES), help="%(default)s")
    parser.add_argument("--seconds", type=float, default=0.1, help="of replays, per cell")
    options = parser.parse_args(arguments)
    if options.draw:
        from benchmarks.kernels.figures import draw

        draw(options.out)
        return 0
    known = TINY_SHAPES if options.tiny else SHAPES
    shapes = options.shapes.split(",") if options.shapes else []
    modes = options.modes.split(",")
    check_names(parser, "shape", shapes, known)
    check_names(parser, "mode", modes, MODES)
    tokens: tuple[int, ...] = ()
    if options.tokens:
        try:
            tokens = tuple(int(t) for t in options.tokens.split(","))
        except ValueError:
            parser.error(f"--tokens {options.tokens}: numbers with commas work")
    only = check(parser, options, SECTIONS)
    common = facts("kernels", arguments, options.commit)
    results = Results("kernels", options.out, common, targets)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failed = 0
    for name, run in SECTIONS.items():
        if name not in only:
            continue
        group, usual = (HELD_OUT, HELD_OUT_TOKENS) if name == "held_out" else (WITH_TARGETS, TOKENS)
        if options.tiny:
            group, usual = tuple(TINY_SHAPES), TINY_TOKENS
        chosen = {shape: known[shape] for shape in shapes or group}
        bench = Bench(chosen, tokens or usual, tuple(modes), options.seconds, device, results)
        started = time.monotonic()
        try:
            run(bench)
        except Exception as error:  # the other sections still tell something
            traceback.print_exc()
            results.set(error=f"{type(error).__name__}: {error}")
            failed += 1
        results.log(f"{name} took {time.monotonic() - started:.1f} s")
    sections = results.data["sections"]
    missed = [target for target in results.data["targets"] if not target["met"]]
    for target in missed:
        print(f"missed {target['what']}: {target['measured']} (target {target['target']})")
    for line in tables(sections):
        print(line)
    print(f"{len(missed)} of {len(results.data['targets'])} targets missed")
    failed += sum("failed" in cell for s in sections.values() for cell in s.get("cells", []))
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
