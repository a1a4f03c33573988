"""The processor: products with 8-bit experts, quantizing, decoding, beside how fast it reads.

``python -m benchmarks.cpu`` (``make bench-cpu``; ``--only`` names some sections, ``--threads`` some
numbers of threads) runs, with experts of Qwen3-30B-A3B's sizes:

- *candidates*: GB of weights per second of one token's products with many experts: ours in INT8 and
  FP8, other libraries' (`benchmarks.libraries`), and the rate at which the same threads read the
  same memory.
- *layer*: whole calls of `fused_moe` by number of tokens, and of torch without the native loops.
- *quantize*: GB of bf16 per second that threads of Python quantize and check.
- *start*: seconds that the first call of a process takes, with loops to compile and without.
- *decode*: tokens per second of a model of some layers in INT8 and, by transformers, in bf16.
- *llama*, where ``--node-modules`` says where it is (`benchmarks.llama_cpp`): tokens per second of
  the same shape in llama.cpp, in Q8_0, and with bf16 for all but the experts, as ours.

What is compared takes turns within a round, and ratios are medians of a round's ratios: a machine
that is busy with other things slows both. Results go to ``benchmarks/results/cpu.json`` as they
come, and ``--draw`` draws them beside it. Another machine's go to a file of their own (``--out``).
Where memory is in several NUMA nodes, ``numactl --cpunodebind=0 --membind=0`` keeps to one.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.libraries import FORMATS, kt_kernel_calls, torch_calls, torchao_calls
from benchmarks.llama_cpp import tokens_per_second, write_gguf
from benchmarks.model import QWEN3_30B_A3B, TINY, Shape, build_model, experts_of
from benchmarks.options import check_sections, parser_of
from benchmarks.record import Results, facts, run_sections
from qmoe_convert.verify import first_wrong_row
from qmoe_kernels import fused_moe, quantize
from qmoe_kernels.cpu import native
from qmoe_kernels.quantization import STORAGE_DTYPE, quantize_with_squares

RESULTS = Path(__file__).parent / "results" / "cpu.json"
SHAPE = QWEN3_30B_A3B
GOAL = 0.8  # of the rate of reading


class Weights:
    """Many experts of one layer, in memory of their own each."""

    def __init__(self, experts: int, tiny: bool) -> None:
        self.hidden, self.inner = (256, 128) if tiny else (SHAPE.hidden_size, 768)
        torch.manual_seed(0)
        self.experts, self.layers = experts, {}
        for weights in FORMATS:
            gate_up, up_scale = quantize(torch.randn(2 * self.inner, self.hidden), weights)
            down, down_scale = quantize(torch.randn(self.hidden, self.inner), weights)
            self.layers[weights] = [
                t.view(torch.int8 if t.itemsize == 1 else t.dtype)
                .repeat(experts, *(1,) * t.ndim)
                .view(t.dtype)
                for t in (gate_up, up_scale, down, down_scale)
            ]
        self.nbytes = experts * 3 * self.inner * self.hidden

    def call(self, weights: str, tokens: int, first: int, count: int) -> object:
        """One call of the layer: all tokens go to ``count`` experts from ``first`` on."""
        ids = torch.arange(first, first + count).expand(tokens, -1)
        gates = torch.full(ids.shape, 1 / count)
        x = torch.randn(tokens, self.hidden, dtype=torch.bfloat16)
        return fused_moe(x, *self.layers[weights], ids, gates)

    def sums(self) -> object:
        """Read the same memory and do nothing with it."""
        gate_up, _, down, _ = self.layers["int8"]
        return gate_up.view(torch.int64).sum(), down.view(torch.int64).sum()


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def rounds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, which take turns ``repeats`` times after one that does not count."""
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(seconds(call))
    return found


class Benchmark:
    """The sections, and what they share."""

    def __init__(self, results: Results, threads: list[int], options: Namespace) -> None:
        self.results, self.threads, self.tiny = results, threads, options.tiny
        self.node_modules: Path | None = options.node_modules
        self._layers: int | None = options.layers
        self.repeats = 2 if self.tiny else 15
        self._weights: Weights | None = None

    @property
    def weights(self) -> Weights:
        """Built when they are first asked for: 1.8 GB."""
        if self._weights is None:
            self._weights = Weights(8 if self.tiny else 192, self.tiny)
        return self._weights

    def candidates(self) -> None:
        """One token with all experts at once, so that nothing but memory counts."""
        w = self.weights
        sizes = (w.experts, w.hidden, w.inner)
        calls = {"read": w.sums, **torch_calls(w.layers["int8"]), **torchao_calls(*sizes)}
        for f in FORMATS:
            calls[f"ours {f}"] = partial(w.call, f, 1, 0, w.experts)
        for threads in self.threads:
            torch.set_num_threads(threads)
            with kt_kernel_calls(*sizes, threads) as more:
                found = rounds(calls | more, self.repeats)
            for name, times in found.items():
                ratios = [read / t for read, t in zip(found["read"], times, strict=True)]
                self.results.add(
                    "cells",
                    {
                        "threads": threads,
                        "what": name,
                        "gb_per_s": round(w.nbytes / 1e9 / statistics.median(times), 2),
                        "of_reading": round(statistics.median(ratios), 3),
                    },
                )

    def layer(self) -> None:
        """Calls as a model makes them, eight experts a token; torch alone beside them."""
        w, count = self.weights, 8
        for threads in self.threads:
            torch.set_num_threads(threads)
            for tokens in (1, 2, 4, 8, 32, 128):
                for f in FORMATS:

                    def calls(f: str = f, tokens: int = tokens) -> None:
                        for first in range(0, w.experts, count):
                            w.call(f, tokens, first, count)

                    found = rounds({"read": w.sums, "ours": calls}, max(2, self.repeats // 5))
                    with without_native():
                        alone = rounds({"torch": partial(w.call, f, tokens, 0, count)}, 2)
                    ours = statistics.median(found["ours"])
                    self.results.add(
                        "cells",
                        {
                            "threads": threads,
                            "weights": f,
                            "tokens": tokens,
                            "ms": round(1e3 * ours / (w.experts / count), 3),
                            "of_reading": round(statistics.median(found["read"]) / ours, 3),
                            "torch_ms": round(1e3 * min(alone["torch"]), 3),
                        },
                    )

    def quantize(self) -> None:
        """As the converter does: a thread of Python for each core, torch's own switched off."""
        count = 4 if self.tiny else 48
        rows = [torch.randn(768, 2048).bfloat16() for _ in range(count)]
        for threads in self.threads:
            for f in FORMATS:
                out = [torch.empty(r.shape, dtype=STORAGE_DTYPE[f]) for r in rows]
                scales = [quantize(r, f)[1] for r in rows]

                def quantizing(i: int, f: str = f, out: list[torch.Tensor] = out) -> None:
                    quantize_with_squares(rows[i], f, out=out[i])

                def checking(
                    i: int,
                    f: str = f,
                    out: list[torch.Tensor] = out,
                    scales: list[torch.Tensor] = scales,
                ) -> None:
                    first_wrong_row(rows[i], out[i], scales[i], f)

                for what, work in (("quantize", quantizing), ("verify", checking)):
                    cell = {"threads": threads, "weights": f, "what": what}
                    for name, switch in (("ours", None), ("torch", without_native())):
                        run = partial(in_threads, work, count, threads)
                        if switch is None:
                            best = min(rounds({name: run}, 3)[name])
                        else:
                            with switch:
                                best = min(rounds({name: run}, 3)[name])
                        cell[f"{name}_gb_per_s"] = round(
                            sum(r.nbytes for r in rows) / 1e9 / best, 2
                        )
                    self.results.add("cells", cell)

    def start(self) -> None:
        """What the first product of a process costs, above its imports."""
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"XDG_CACHE_HOME": folder}
            command = [sys.executable, "-c", FIRST_CALL]
            for what in ("compiled", "from the cache", "from the cache"):
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, check=True
                )
                self.results.add("cells", {"what": what, "seconds": float(done.stdout)})

    @property
    def shape(self) -> Shape:
        """The model's, with as many layers as fit twice, in bf16 and in INT8.

        Its vocabulary is as much smaller as it has fewer layers: shares are the whole model's.
        """
        if self.tiny:
            return TINY
        if self._layers is None:
            self._layers = max(2, min(SHAPE.num_hidden_layers, int(free_memory() / 4e9)))
        vocabulary = SHAPE.vocab_size * self._layers // SHAPE.num_hidden_layers
        return replace(SHAPE, num_hidden_layers=self._layers, vocab_size=vocabulary)

    def decode(self) -> None:
        """Greedy tokens after a prompt of 16, by qmoe in INT8 and by transformers in bf16."""
        shape = self.shape
        ids = torch.arange(16)[None] % shape.vocab_size
        models = {f: build_model(shape, torch.device("cpu"), f) for f in ("int8", "bf16")}
        for threads in self.threads:
            torch.set_num_threads(threads)

            times = {name: step_seconds(model, ids) for name, model in models.items()}
            self.results.add(
                "cells",
                {
                    "threads": threads,
                    "layers": shape.num_hidden_layers,
                    "int8_tokens_per_s": round(1 / times["int8"], 2),
                    "transformers_bf16_tokens_per_s": round(1 / times["bf16"], 2),
                    "ratio": round(times["bf16"] / times["int8"], 2),
                },
            )

    def llama(self) -> None:
        """Greedy tokens after a prompt of 16, by qmoe in INT8 and by llama.cpp."""
        assert self.node_modules is not None, "--node-modules says where node-llama-cpp is"
        shape = self.shape
        ids = torch.arange(16)[None] % shape.vocab_size
        model = build_model(shape, torch.device("cpu"), "int8")
        with tempfile.TemporaryDirectory() as folder:
            for dense in ("Q8_0", "BF16"):
                file = Path(folder) / "model.gguf"
                write_gguf(file, shape, dense)
                for threads in self.threads:
                    torch.set_num_threads(threads)
                    ours = 1 / step_seconds(model, ids)
                    release, theirs = tokens_per_second(self.node_modules, file, threads, 32)
                    cell = {"threads": threads, "layers": shape.num_hidden_layers}
                    cell |= {"llama_cpp": release, "dense": dense}
                    cell |= {"int8_tokens_per_s": round(ours, 2)}
                    cell |= {"llama_cpp_tokens_per_s": round(theirs, 2)}
                    self.results.add("cells", cell | {"ratio": round(ours / theirs, 2)})


def step_seconds(model: Any, ids: torch.Tensor) -> float:
    """Seconds of a token, decoded by qmoe if the experts are ours, by transformers if not."""
    import qmoe

    own = {"custom_generate": qmoe.decode} if experts_of(model) else {}

    def generate(tokens: int) -> None:
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        model.generate(ids, do_sample=False, **lengths, **own)

    found = rounds({"long": partial(generate, 33), "short": partial(generate, 1)}, 3)
    return (min(found["long"]) - min(found["short"])) / 32


def free_memory() -> int:
    """Bytes that this machine has left."""
    pages = os.sysconf("SC_AVPHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE")


FIRST_CALL = """
import time, torch
from qmoe_kernels import fused_moe
begin = time.perf_counter()
q, s = torch.ones(1, 16, 16, dtype=torch.int8), torch.ones(1, 16)
fused_moe(torch.ones(1, 16), q, s, q[:, :, :8], s, torch.zeros(1, 1, dtype=torch.int64),
          torch.ones(1, 1))
print(time.perf_counter() - begin)
"""


@contextmanager
def without_native() -> Any:
    """Torch alone, as on a machine without the native loops."""
    loaded = dict(native._loaded)
    native._loaded.update(dict.fromkeys(native.GROUPS))
    try:
        yield
    finally:
        native._loaded.clear()
        native._loaded.update(loaded)


def in_threads(work: Callable[[int], object], count: int, threads: int) -> None:
    """Run ``work(0)`` to ``work(count - 1)`` on threads of Python."""

    def some(first: int) -> None:
        torch.set_num_threads(1)
        for i in range(first, count, threads):
            work(i)

    running = [threading.Thread(target=some, args=(first,)) for first in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def targets(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """What the loops have to reach, and did."""
    found = []
    cells = sections.get("candidates", {}).get("cells", [])
    for cell in cells:
        if cell["what"].startswith("ours"):
            what = f"{cell['what'].removeprefix('ours ')}, {cell['threads']} threads, of reading"
            found.append(_target(what, cell["of_reading"], GOAL))
    for cell in sections.get("decode", {}).get("cells", []):
        what = f"decode over transformers bf16, {cell['threads']} threads"
        found.append(_target(what, cell["ratio"], 1.7))
    for cell in sections.get("llama", {}).get("cells", []):
        what = f"decode over llama.cpp, {cell['dense']} beside experts, {cell['threads']} threads"
        found.append(_target(what, cell["ratio"], 1.0))
    for cell, most in zip(
        sections.get("start", {}).get("cells", []), (3.0, 0.3, 0.3), strict=False
    ):
        met = cell["seconds"] <= most
        what = f"first call, {cell['what']}, s"
        found.append({"what": what, "measured": cell["seconds"], "target": most, "met": met})
    return found


def _target(what: str, measured: float, least: float) -> dict[str, Any]:
    return {"what": what, "measured": measured, "target": least, "met": measured >= least}


def draw(data: dict[str, Any], path: Path) -> None:
    """One picture: shares of the rate of reading, a panel for each number of threads."""
    from matplotlib import pyplot as plt

    from benchmarks.drawing import BLACK, BLUE, GREY, save, tidy

    section = data["sections"]["candidates"]
    cells = [cell for cell in section["cells"] if cell["what"] != "read"]
    names = sorted(
        {cell["what"] for cell in cells}, key=lambda what: (what.startswith("ours"), what)
    )
    threads = sorted({cell["threads"] for cell in cells})
    shares = {(cell["what"], cell["threads"]): cell["of_reading"] for cell in cells}
    size = (2 + 2.6 * len(threads), 1.2 + 0.28 * len(names))
    figure, axes = plt.subplots(1, len(threads), figsize=size, sharey=True, squeeze=False)
    colours = [BLUE if name.startswith("ours") else GREY for name in names]
    for axis, n in zip(axes[0], threads, strict=True):
        bars = axis.barh(names, [shares.get((name, n), 0) for name in names], color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.axvline(GOAL, color=BLACK, lw=1, ls="--")
        axis.set_xlim(0, 1.15)
        axis.set_title(f"{n} thread" + "s" * (n > 1), fontsize=10)
        axis.set_xlabel("of the rate of reading (- -: goal)", fontsize=9)
        tidy(axis)
    title = f"One token's products with 8-bit experts, {section['machine']['cpu']}"
    save(figure, title, path, section)


def main(arguments: list[str] | None = None) -> int:
    """Run sections; the number of those that failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    names = ("start", "candidates", "layer", "quantize", "decode", "llama")
    parser = parser_of(__doc__, names, RESULTS, on_request=("llama",))
    parser.add_argument("--node-modules", type=Path, help="a folder with node-llama-cpp")
    parser.add_argument("--threads", help="with commas; default: powers of two up to all cores")
    parser.add_argument("--layers", type=int, help="of decode's and llama's model; else by memory")
    options = parser.parse_args(arguments)
    only = check_sections(parser, options, names)
    common = facts("cpu", arguments, options.commit)
    results = Results("cpu", options.out, common, targets)
    if options.draw:
        draw(results.data, options.out.with_suffix(".png"))
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= (cores or 1)]
    if options.threads:
        threads = [int(n) for n in options.threads.split(",")]
    if "llama" in only and options.node_modules is None:
        parser.error("llama needs --node-modules, the folder that has node-llama-cpp")
    benchmark = Benchmark(results, threads, options)
    return run_sections(results, {name: getattr(benchmark, name) for name in only})


if __name__ == "__main__":
    sys.exit(main())
