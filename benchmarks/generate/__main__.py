"""Generating with Qwen3-30B-A3B's shape, random weights: ours, and transformers' own paths.

``python -m benchmarks.generate`` (``make bench-generate``) runs, on one GPU with 140 GB (``--only``
names some of them):

- *startup*: seconds from a loaded model to its first decoded token, with nothing compiled.
- *decode*: tokens per second of qmoe's loop on INT8 experts that are all resident, by batch, greedy
  and sampled, and by length of the prompt.
- *prefill*: tokens per second of long prompts.
- *breakdown*: what one captured decode step's time goes to, by kind of kernel.
- *host*: CPU time while decoding.
- *steps*: the captured step's time as qmoe's stand-ins for the model's pieces join one by one.
- *transformers_int8*: transformers' own loop and dynamic cache on the same model.
- *transformers*: the same in bf16, experts grouped and eager; and long prompts, grouped.
- *transformers_static*: a static cache, which transformers compiles for a minute; only on request.
- *vllm*: vLLM's engine with the same shape, where it is installed; only on request, and by itself,
  since it takes all of the GPU's memory.

Greedy tokens are compared with those of transformers' loop on the same model before anything is
timed. A decode step's time is that of a long call less that of one that reads the prompt and
decodes no further. Results go to ``benchmarks/results/generate.json`` as they come (sections that
are not run keep what they had), and ``--draw`` draws pictures beside it. ``--tiny`` runs all of it
on the CPU in seconds, to test this file; its times mean nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.generate.bench import TINY_SIZES, Benchmark, Sizes
from benchmarks.generate.breakdown import run_breakdown
from benchmarks.generate.peers import (
    run_transformers,
    run_transformers_int8,
    run_transformers_static,
    run_vllm,
)
from benchmarks.generate.sections import (
    run_decode,
    run_host,
    run_prefill,
    run_startup,
    run_steps,
)
from benchmarks.generate.targets import targets
from benchmarks.model import QWEN3_30B_A3B, TINY
from benchmarks.options import check, parser_of
from benchmarks.record import Results, facts, run_sections

RESULTS = Path(__file__).parents[1] / "results" / "generate.json"

SECTIONS: dict[str, Callable[[Benchmark], None]] = {
    "startup": run_startup,  # first: it wants a process in which nothing has run yet
    "decode": run_decode,
    "prefill": run_prefill,
    "breakdown": run_breakdown,
    "host": run_host,
    "steps": run_steps,
    "transformers_int8": run_transformers_int8,
    "transformers": run_transformers,
    "transformers_static": run_transformers_static,
    "vllm": run_vllm,
}
ON_REQUEST = {"transformers_static", "vllm"}


def main(arguments: list[str] | None = None) -> int:
    """Run sections; the number of those that failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = parser_of(__doc__, SECTIONS, RESULTS, ON_REQUEST)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no new cell after so long"
    )
    options = parser.parse_args(arguments)
    if options.draw:
        from benchmarks.generate.figures import draw

        draw(options.out)
        return 0
    only = check(parser, options, SECTIONS)
    device = torch.device("cpu" if options.tiny else "cuda")
    common = facts("generate", arguments, options.commit)
    results = Results("generate", options.out, common, targets, options.seconds)
    shape, sizes = (TINY, TINY_SIZES) if options.tiny else (QWEN3_30B_A3B, Sizes())
    bench = Benchmark(shape, sizes, device, results)
    chosen = {name: partial(run, bench) for name, run in SECTIONS.items() if name in only}
    with empty_compiler_caches():
        return run_sections(results, chosen)


@contextmanager
def empty_compiler_caches() -> Iterator[None]:
    """Have Triton and torch.compile find nothing that an earlier process has compiled."""
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="qmoe-benchmark-") as folder:
        for name in names:
            os.environ[name] = str(Path(folder) / name.lower())
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


if __name__ == "__main__":
    raise SystemExit(main())
