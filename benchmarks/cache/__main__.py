"""The expert cache in Qwen3-30B-A3B's shape: INT8 experts, batch 1, routing replayed from traces.

``python -m benchmarks.cache`` (``make bench-cache``) runs, on one GPU with 80 GB and a host with
100 GB of memory (``--only`` names some of them):

- *gather*: rate of the kernel that reads missing pages from pinned memory, beside
  ``cudaMemcpyAsync`` of the same pages, by number of pages and of thread blocks.
- *admission*: microseconds of one look-up, when everything hits and when it does not.
- *overlap*: microseconds of a layer that computes with the experts it has while the others fly,
  and of one that does not, by number of tokens.
- *decode*: milliseconds per token of a CUDA graph of the whole model, at six capacities, on a trace
  that hits as often as Qwen3-30B-A3B (`benchmarks.routing`) and on two that are harder: a synthetic
  one, and one recorded from the shipped model, tiled; beside the same graph with all experts
  resident, and claims, LRU and Belady replayed on the same tokens.
- *sharing*: the same with a share of the misses computed by the host, by ``--misses``: where misses
  were served, how long the GPU waited, and the share that was calibrated.
- *batches*: the same for as many texts at once as ``--batch`` says, each with a trace of its own.
- *calibration*: microseconds of a layer by its misses and by how many of them the host computes,
  by how much a worker claims at a time; of experts of the model's size, and of half of it.
- *prefill*: seconds for 8192 tokens with all experts on the host.
- *baselines*: a host-driven cache and qmoe's own, as eager forward passes.
- *offload*: accelerate's ``cpu_offload`` of the bf16 model.

Every section checks before it times: outputs of paged models equal those of the resident one bit
for bit. Results go to ``benchmarks/results/cache.json`` as they come (sections that are not run
keep what they had), and ``--draw`` draws pictures beside it. ``--tiny`` runs all of it on the CPU
in seconds, to test this file; its times mean nothing.

``--trace FILE`` replays the last tokens of what ``qmoe generate --record-routing`` wrote, in place
of the three traces. The model then has the layers, the experts and the size of pages that the file
says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.cache.baselines import run_baselines, run_offload
from benchmarks.cache.calibration import run_calibration
from benchmarks.cache.decode import CAPACITIES, run_decode
from benchmarks.cache.harness import Benchmark
from benchmarks.cache.kernels import run_admission, run_gather
from benchmarks.cache.overlap import run_overlap
from benchmarks.cache.prefill import run_prefill
from benchmarks.cache.sharing import run_batches, run_sharing
from benchmarks.cache.targets import targets
from benchmarks.cache.traces import own_traces, read_trace, shape_of
from benchmarks.model import QWEN3_30B_A3B, TINY, Shape
from benchmarks.options import check, parser_of
from benchmarks.record import Results, facts, run_sections
from qmoe.traces.trace import RoutingTrace

RESULTS = Path(__file__).parents[1] / "results" / "cache.json"

SECTIONS: dict[str, Callable[[Benchmark], None]] = {
    "gather": run_gather,
    "admission": run_admission,
    "overlap": run_overlap,
    "decode": run_decode,
    "sharing": run_sharing,
    "batches": run_batches,
    "calibration": run_calibration,
    "prefill": run_prefill,
    "baselines": run_baselines,
    "offload": run_offload,
}


def routing_of(
    parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device
) -> tuple[Shape, dict[str, RoutingTrace]]:
    """The model's shape, and traces by name; ends the process where a file cannot be replayed."""
    shape = TINY if options.tiny else QWEN3_30B_A3B
    num_tokens = options.warmup + options.tokens
    if options.trace is None:
        return shape, own_traces(shape, num_tokens)
    if options.out == parser.get_default("out"):
        parser.error("--trace replays routing of your own: give it another --out")
    try:
        trace = read_trace(options.trace, num_tokens)
    except ValueError as error:
        parser.error(str(error))
    try:
        shape = shape_of(trace, shape, min(CAPACITIES), device)
    except ValueError as error:
        parser.error(f"{options.trace}: {error}")
    return shape, {options.trace.stem: trace}


def main(arguments: list[str] | None = None) -> int:
    """Run sections; the number of those that failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = parser_of(__doc__, SECTIONS, RESULTS)
    parser.add_argument("--tokens", type=int, default=48, help="that are timed")
    parser.add_argument("--warmup", type=int, default=64, help="tokens of the trace before them")
    parser.add_argument("--context", type=int, default=1024, help="tokens read before")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the prefill")
    parser.add_argument(
        "--misses",
        default="link,host,auto",
        help="who serves them in the sections sharing and batches: link, host, auto",
    )
    parser.add_argument("--batch", default="8,32", help="texts at once in the section batches")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no new cell after so long"
    )
    parser.add_argument("--trace", type=Path, help="recorded routing, to replay nothing else")
    options = parser.parse_args(arguments)
    if options.draw:
        from benchmarks.cache.figures import draw

        draw(options.out)
        return 0
    only = check(parser, options, SECTIONS)
    device = torch.device("cpu" if options.tiny else "cuda")
    # cuDNN's attention does not repeat its own bits (docs/expert-cache.md), and bits are compared.
    torch.backends.cuda.enable_cudnn_sdp(False)
    shape, traces = routing_of(parser, options, device)
    common = facts("cache", arguments, options.commit)
    results = Results("cache", options.out, common, targets, options.seconds)
    bench = Benchmark(shape, device, results, options, traces)
    chosen = {name: partial(run, bench) for name, run in SECTIONS.items() if name in only}
    return run_sections(results, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
