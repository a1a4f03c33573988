"""Experts on several GPUs: what ranks exchange, one layer, and a whole model.

``python -m benchmarks.parallel`` (``make bench-parallel``) starts itself by torchrun with each of
``--ranks``, one GPU for a rank, and runs:

- *exchange*: microseconds of the layers' exchanges by size, several in a CUDA graph that is
  replayed; over peers' memory (*peers*), by NCCL (*collective*; sums of two ranks only), and sums
  of parts that the ranks exchange and add up themselves (*all-to-all*).
- *layer*: one layer of three models' shapes. *same*: all ranks have the same rows, and add up;
  *own*: each rank has its part of them, gathered and scattered. With rows in 16 bits, and in 8
  where that is the default. Compared with a layer of all experts on one GPU before it is timed.
  From 1024 tokens on also what its products take alone (``products_us``) and its exchanges alone
  (``exchange_us``), and how much of the exchanges runs beside the products (``hidden``).
- *model*: Qwen3-30B-A3B's shape, random weights in INT8: captured decode steps, few texts on every
  rank the same, many texts each rank's own part; and reading 8 and 32 prompts of 2048 tokens.
- *deepseek*: the same of DeepSeek-V3's shape, with 8 layers, all of which have experts.
- *large*: decode steps of Qwen3-235B-A22B's shape, resident on several ranks, paged on one. Its
  routing is a trace. The paged one's layers share the pages of 4 of them in host memory
  (``host_layers``): pages of all would take minutes to fill, and the bytes that are copied are as
  many.
- *transformers*: 8 layers of Qwen3-30B-A3B's shape, in 16 bits and spread by transformers, which
  runs kernel by kernel; beside qmoe's INT8 in the same loop with the same attention, and beside
  qmoe's captured step.

Results go to ``benchmarks/results/parallel.json`` as they come, also those of a run that is ended
later on; ``--draw`` draws them. ``--limit`` ends one section with one number of ranks that takes
longer; the others still run. Without a GPU it runs with gloo; ``--tiny`` is for the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.kernels.shapes import SHAPES, WITH_TARGETS
from benchmarks.model import as_graph, synchronize, time_each
from benchmarks.options import check_names, parser_of
from benchmarks.parallel_models import MODELS
from benchmarks.record import Results, facts, run_sections
from qmoe.loading.devices import choose_own_device
from qmoe.parallel.group import RankGroup, rank_group
from qmoe.parallel.share import Share, share_of
from qmoe.parallel.texts import OwnTexts
from qmoe_kernels import QuantizedRows, fused_moe
from qmoe_kernels.fused_moe import row_format
from qmoe_kernels.quantization import WeightFormat
from qmoe_kernels.tiles import LayerShape
from qmoe_kernels.timing import LayerWeights, random_layer

RESULTS = Path(__file__).parent / "results" / "parallel.json"
SECTIONS = ("exchange", "layer", *MODELS)
OF_SEVERAL = ("exchange",)  # nothing to measure on one rank
REPEATS = 10  # in a graph: its launch takes as long as a small exchange
LONG_MS = 5.0  # a call that is alone in its graph
MOST_MS = 300.0  # that all replays of a graph take, where five do not take longer
LIMIT = 600.0  # seconds for a section with one number of ranks
ENDING = 45.0  # seconds in which torchrun ends its ranks; it kills them itself after 30
TOKENS = (1, 64, 256, 1024, 4096, 32768)  # of a layer
APART_TOKENS = 1024  # from so many on a layer's products and exchanges are timed alone too
SMALL = LayerShape(num_experts=6, top_k=2, hidden_size=64, intermediate_size=32)
MOST_DIFFERENT = 0.02  # relative Frobenius distance of bf16 outputs
# Speed-up over one rank: of a layer by ranks, shape and tokens; of decode steps of two by texts.
LAYER_TARGETS = {
    (2, "qwen3", 4096): 1.6,
    (2, "mixtral", 4096): 1.8,
    (2, "dsv3", 4096): 1.8,
    (4, "dsv3", 32768): 3.0,
    (8, "dsv3", 32768): 5.5,
}
DECODE_TARGETS = {1: 1.0, 64: 1.6, 256: 1.7}
HIDDEN = 0.5  # the part of a layer's exchanges that is to run beside its products
DRAWN_TOKENS = (4096, 32768)


# ---- on each rank ------------------------------------------------------------------------------


class Worker:
    """What one rank measures; rank 0 writes it down."""

    def __init__(self, group: RankGroup, tiny: bool, out: Path, tokens: Sequence[int] = ()) -> None:
        self.group, self.tiny, self.out = group, tiny, out
        self.tokens = tokens or ((4, 8) if tiny else TOKENS)
        self.device = group.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.cells: list[dict[str, Any]] = []

    def add(self, **cell: Any) -> None:
        """Note a cell; whoever started this finds it at once."""
        self.cells.append({"ranks": self.group.size, **cell})
        if self.group.rank == 0:
            unfinished = self.out.with_suffix(".partial")
            unfinished.write_text(json.dumps(self.cells))
            unfinished.replace(self.out)

    def say(self, line: str) -> None:
        """Print a line, once."""
        if self.group.rank == 0:
            print(f"{self.group.size} ranks: {line}", flush=True)

    def microseconds(self, function: Callable[[], object], replays: int = 30) -> float:
        """Of a call, on the slowest rank: the median of replays of a graph of several."""
        for _ in range(2):
            function()
        synchronize(self.device)
        began = time.perf_counter()
        function()
        synchronize(self.device)
        # All ranks replay equally often.
        heard = self.group.exchange("one call", ms=1e3 * (time.perf_counter() - began))
        longest = max(other["ms"] for other in heard)
        calls = REPEATS if self.device.type == "cuda" and longest <= LONG_MS else 1
        replays = max(5, min(replays, int(MOST_MS / (calls * longest))))
        replay = as_graph(lambda: [function() for _ in range(calls)], self.device)
        each, _ = time_each(replay, 3 if self.tiny else replays, self.device)
        heard = self.group.exchange("a time", us=1e3 * median(each) / calls)
        return round(max(other["us"] for other in heard), 2)

    def exchange(self) -> None:
        """The layers' exchanges, by a rank's rows of 2048 numbers in the model's dtype."""
        peers, adds_parts = self.group.peers, self.group.adds_parts
        for num_rows in (1, 16) if self.tiny else (1, 16, 64, 256, 1024, 4096, 16384):
            rows = torch.zeros(num_rows, 2048, dtype=self.dtype, device=self.device)
            all_rows = rows.repeat(self.group.size, 1)
            ids = torch.zeros(num_rows, 8, dtype=torch.int64, device=self.device)
            routed = (rows, ids, torch.zeros(num_rows, 8, device=self.device), num_rows)
            takes = {
                "sum": peers is not None and peers.takes_sum(rows),
                "gather": peers is not None and peers.takes_gather(rows, ids, num_rows),
                "sum_and_scatter": peers is not None and peers.takes_sum(all_rows, scatter=True),
            }
            for what, function in (
                ("sum", partial(self.group.sum, rows)),
                ("gather", partial(self.group.gather, *routed)),
                ("gather in 8 bits", partial(self.group.gather, *routed, "int8")),
                ("sum_and_scatter", partial(self.group.sum_and_scatter, all_rows)),
            ):
                for how in ("peers", "collective", "all-to-all"):
                    if how == "peers" and not takes.get(what):
                        continue
                    is_sum = what.startswith("sum")
                    if how == "all-to-all" and not is_sum:
                        continue
                    if how == "collective" and is_sum and self.group.size > 2:
                        continue  # it would round more than once
                    self.group.peers = peers if how == "peers" else None
                    self.group.adds_parts = how == "all-to-all"
                    us = self.microseconds(function)
                    self.add(what=what, how=how, rows=num_rows, kib=rows.nbytes // 1024, us=us)
            self.group.peers, self.group.adds_parts = peers, adds_parts

    def layer(self) -> None:
        """One layer, by shape, tokens of all ranks together, and whose rows they are."""
        shapes = {"tiny": SMALL} if self.tiny else {name: SHAPES[name] for name in WITH_TARGETS}
        for name, shape in shapes.items():
            generator = torch.Generator(self.device).manual_seed(0)
            whole = random_layer(shape, "int8", self.device, generator)
            share = share_of(self.group, shape.num_experts, name)
            for tokens in self.tokens:
                for activations in ("bf16", "auto") if tokens >= 1024 else ("bf16",):
                    self._layer(name, shape, whole, share, tokens, activations)

    def _layer(
        self,
        name: str,
        shape: LayerShape,
        whole: LayerWeights,
        share: Share,
        tokens: int,
        activations: str,
    ) -> None:
        rows, about = (
            self._rows(shape, tokens),
            {"shape": name, "tokens": tokens, "activations": activations},
        )
        expected = _experts(whole, *rows, activations)
        if self.group.size == 1:
            us = self.microseconds(partial(_experts, whole, *rows, activations))
            self.add(**about, how="one", us=us)
            return
        for how, call, part in self._ways(shape, share, whole, rows, activations):
            distance = float((call() - expected[part]).norm() / expected[part].norm())
            if not distance < MOST_DIFFERENT:
                raise ValueError(f"{name}, {tokens} tokens, {how}: {distance:.3f} off")
            us = self.microseconds(call)
            apart = self._apart(call, us) if self.tiny or tokens >= APART_TOKENS else {}
            self.add(**about, how=how, us=us, **apart, distance=distance)

    def _apart(self, call: Callable[[], Tensor], us: float) -> dict[str, float]:
        """What a way of computing a layer consists of.

        Args:
            call: the way.
            us: microseconds that it takes.

        Returns:
            microseconds of its products alone, and of its exchanges alone, which then fly with what
            the products have left; and the part of the exchanges that runs beside the products.
        """
        noted: list[Any] = []

        def note(*given: Any) -> Tensor:
            noted.append((given, _experts(*given)))
            return noted[-1][1]

        with _instead_of_products(note):
            call()
        ((given, output),) = noted
        with _instead_of_products(lambda *_: output):
            exchange_us = self.microseconds(call, 10)
        products_us = self.microseconds(partial(_experts, *given), 10)
        hidden = round(1 - (us - products_us) / exchange_us, 3)
        return {"products_us": products_us, "exchange_us": exchange_us, "hidden": hidden}

    def _rows(self, shape: LayerShape, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(tokens)
        draw = partial(torch.rand, generator=generator, device=self.device)
        hidden = torch.randn(tokens, shape.hidden_size, generator=generator, device=self.device).to(
            self.dtype
        )
        weights, ids = draw(tokens, shape.num_experts).topk(shape.top_k)
        return hidden, ids, weights / weights.sum(-1, keepdim=True)

    def _ways(
        self,
        shape: LayerShape,
        share: Share,
        whole: LayerWeights,
        rows: tuple[Tensor, Tensor, Tensor],
        activations: str,
    ) -> list[tuple[str, Callable[[], Tensor], slice]]:
        """How ranks compute a layer, and which rows of its output this rank gets."""
        part = slice(share.first, share.first + share.count)
        own = LayerWeights(
            whole.gate_up_proj[part],
            _sliced(whole.gate_up_proj_scale, part),
            whole.down_proj[part],
            _sliced(whole.down_proj_scale, part),
        )

        def same() -> Tensor:
            hidden, ids, w = rows
            return self.group.sum(_products(own, hidden, share.own_ids(ids), w, activations))

        ways = [("same", same, slice(None))]
        tokens = len(rows[0])
        if tokens % self.group.size == 0:
            count = tokens // self.group.size
            mine = slice(self.group.rank * count, (self.group.rank + 1) * count)
            my_rows = [tensor[mine] for tensor in rows]

            def in_8_bits(num_pairs: int) -> WeightFormat | None:
                like: Any = {"dtype": self.dtype, "weights": torch.int8, "device": self.device}
                return row_format(activations, num_pairs, shape.num_experts, **like)

            def scattered() -> Tensor:
                texts = OwnTexts(self.group, shape.top_k, lambda: False)
                texts.rows = count
                return texts.run(
                    *my_rows,
                    lambda h, ids, w: _products(own, h, share.own_ids(ids), w, activations),
                    in_8_bits,
                )

            ways.append(("own", scattered, mine))
        return ways


def _experts(
    weights: LayerWeights,
    hidden: Tensor | QuantizedRows,
    ids: Tensor,
    topk_weights: Tensor,
    activations: str,
) -> Tensor:
    return fused_moe(
        hidden,
        weights.gate_up_proj,
        weights.gate_up_proj_scale,
        weights.down_proj,
        weights.down_proj_scale,
        ids,
        topk_weights,
        activations=activations,
    )


def _sliced(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]


# What runs in place of a layer's products while its parts are timed.
_instead: ContextVar[Callable[..., Tensor] | None] = ContextVar("_instead", default=None)


@contextmanager
def _instead_of_products(function: Callable[..., Tensor]) -> Iterator[None]:
    token = _instead.set(function)
    try:
        yield
    finally:
        _instead.reset(token)


def _products(*given: Any) -> Tensor:
    return (_instead.get() or _experts)(*given)


def work(section: str, tiny: bool, out: Path, tokens: Sequence[int] = ()) -> None:
    """What torchrun starts: one section on one rank."""
    device = choose_own_device("auto")
    if section == "transformers" and device.type == "cuda":
        # Its exchanges are those of the default group, which for qmoe alone needs no NCCL.
        dist.init_process_group("cpu:gloo,cuda:nccl")
    group = rank_group(True, device)
    with group.together("benchmarks.parallel"), torch.no_grad():
        worker = Worker(group, tiny, out, tokens)
        run = MODELS.get(section)
        if run is not None:
            run(worker)
        else:
            getattr(worker, section)()


# ---- over numbers of ranks ---------------------------------------------------------------------


def measure(
    results: Results,
    section: str,
    ranks: list[int],
    tiny: bool,
    limit: float = LIMIT,
    tokens: str = "",
) -> None:
    """Run a section with each number of ranks; what was measured is written down at once.

    Args:
        limit: seconds for one number of ranks.
        tokens: of *layer*, with commas; all where there are none.

    Raises:
        RuntimeError: some numbers of ranks failed; the others were measured all the same.
    """
    failed = []
    for size in ranks:
        if size == 1 and section in OF_SEVERAL:
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "cells.json"
            worker = [section, str(int(tiny)), str(out), tokens]
            run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
            command = [sys.executable, *run, "-m", "benchmarks.parallel", "--worker", *worker]
            code = _follow(command, out, limit, partial(results.add, "cells"))
        if code:
            failed.append(f"{size} ranks ended with {code}")
    if failed:
        raise RuntimeError(f"{section}: {', '.join(failed)}")


def _follow(
    command: list[str], out: Path, limit: float, add: Callable[[dict[str, Any]], None]
) -> int | str:
    """Run a command and hand on the cells that it writes; its exit status, or that it took long."""
    end, done = time.monotonic() + limit, 0
    # torchrun ends its ranks where it is asked to end, and would leave them where it is killed.
    with subprocess.Popen(command, env=_environment()) as process:
        code: int | str | None = None
        try:
            while code is None:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(0.5)
                if code is None and time.monotonic() > end:
                    code = f"no result within {limit:.0f} s"
                cells = json.loads(out.read_text()) if out.exists() else []
                for cell in cells[done:]:
                    add(cell)
                done = len(cells)
        finally:
            process.terminate()
            try:
                process.wait(ENDING)
            except subprocess.TimeoutExpired:
                process.kill()
    return code


def _environment() -> dict[str, str]:
    root = Path(__file__).parents[1]
    paths = [str(root), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def targets(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """What several ranks have to reach over one, and did, the best of their ways."""
    return [
        *_layer_targets(_cells(sections, "layer")),
        *_model_targets(_cells(sections, "model")),
        *_large_targets(_cells(sections, "large")),
        *_transformers_targets(_cells(sections, "transformers")),
    ]


def _layer_targets(cells: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    best = _best(cells, ("shape", "tokens", "activations"), "us")
    for (ranks, shape, tokens, activations), us in best.items():
        one = best.get((1, shape, tokens, activations))
        least = LAYER_TARGETS.get((ranks, shape, tokens))
        if one is not None and least is not None:
            what = f"layer {shape}, {tokens} tokens in all, {activations} rows"
            yield _target(f"{what}, {ranks} GPUs over one", one / us, least)
    for cell in cells:
        key = (cell["ranks"], cell["shape"], cell["tokens"])
        if key in LAYER_TARGETS and cell["us"] == best[(*key, cell["activations"])]:
            what = f"layer {cell['shape']}, {cell['tokens']} tokens in all"
            what = f"{what}, {cell['activations']} rows, {cell['ranks']} GPUs ({cell['how']})"
            if "hidden" in cell:
                yield _target(f"{what}: part of the exchange hidden", cell["hidden"], HIDDEN)


def _model_targets(cells: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    steps = _best(_of(cells, what="decode"), ("texts",), "ms")
    for texts, least in DECODE_TARGETS.items():
        if {(1, texts), (2, texts)} <= steps.keys():
            what = f"decode, {texts} texts, two GPUs over one"
            yield _target(what, steps[1, texts] / steps[2, texts], least)
    prefill = _best(_of(cells, what="prefill"), ("texts",), "ms")
    if {(1, 8), (2, 8)} <= prefill.keys():
        yield _target("prefill, two GPUs over one", prefill[1, 8] / prefill[2, 8], 1.7)


def _large_targets(cells: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    ms = _best(cells, ("texts",), "mean_ms")
    for ranks, texts in ms:
        if ranks > 1 and (1, texts) in ms:
            what = f"Qwen3-235B-A22B's shape, {texts} texts, resident on {ranks} GPUs over paged on"
            yield _target(f"{what} one", ms[1, texts] / ms[ranks, texts], 1.0)


def _transformers_targets(cells: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    ms = _best(cells, ("by", "what", "texts"), "ms")
    for ranks, by, what, texts in ms:
        theirs = ms.get((ranks, "transformers", what, texts))
        if by != "transformers" and theirs is not None:
            of = f"{what}, {texts} texts, {ranks} GPUs: {by} over transformers"
            yield _target(of, theirs / ms[ranks, by, what, texts], 1.0)


def _cells(sections: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = sections.get(name, {}).get("cells", [])
    return found


def _of(cells: list[dict[str, Any]], **about: Any) -> list[dict[str, Any]]:
    return [cell for cell in cells if cell.items() >= about.items()]


def _best(cells: list[dict[str, Any]], keys: tuple[str, ...], of: str) -> dict[Any, float]:
    """The least time by number of ranks and ``keys``."""
    found: dict[Any, float] = {}
    for cell in cells:
        key = (cell["ranks"], *(cell[name] for name in keys))
        found[key] = min(cell[of], found.get(key, cell[of]))
    return found


def _target(what: str, measured: float, least: float) -> dict[str, Any]:
    return {
        "what": what,
        "measured": round(measured, 2),
        "target": least,
        "met": measured >= least,
    }


def draw(data: dict[str, Any], folder: Path) -> None:
    """Throughput of a layer over ranks, for two numbers of tokens."""
    from matplotlib import pyplot as plt

    from benchmarks.drawing import BLUE, GREEN, GREY, ORANGE, save, tidy

    section = data["sections"]["layer"]
    tokens = [n for n in DRAWN_TOKENS if _of(section["cells"], tokens=n)]
    tokens = tokens or [max(cell["tokens"] for cell in section["cells"])]
    figure, axes = plt.subplots(
        1, len(tokens), figsize=(1.5 + 4.5 * len(tokens), 3.8), sharey=True, squeeze=False
    )
    sizes = sorted({cell["ranks"] for cell in section["cells"]})
    for axis, num_tokens in zip(axes[0], tokens, strict=True):
        cells = [c for c in _of(section["cells"], tokens=num_tokens) if c["how"] != "same"]
        activations = "auto" if _of(cells, activations="auto") else "bf16"
        cells = _of(cells, activations=activations)
        us = _best(cells, ("shape",), "us")
        shapes = list(dict.fromkeys(cell["shape"] for cell in cells))
        for shape, color in zip(shapes, (BLUE, ORANGE, GREEN), strict=False):
            there = [size for size in sizes if {(1, shape), (size, shape)} <= us.keys()]
            reached = [us[1, shape] / us[size, shape] for size in there]
            axis.plot(there, reached, "o-", color=color, label=shape)
            allowed = _allowed(_of(cells, shape=shape))
            axis.plot(*zip(*allowed.items(), strict=True), ":", color=color)
        axis.plot(sizes, sizes, "--", color=GREY, label="linear")
        axis.plot([], [], ":", color=GREY, label="with the exchange, none of it hidden")
        axis.set_title(f"{num_tokens} tokens in all", fontsize=10)
        axis.set_xticks(sizes)
        axis.set_xlabel("GPUs")
        axis.set_ylim(0)
        tidy(axis)
    axes[0][0].set_ylabel("throughput over one GPU")
    axes[0][0].legend(fontsize=8)
    where = section["machine"]["gpu"] or section["machine"]["cpu"]
    save(figure, f"One layer over ranks ({where})", folder / "parallel.png", section)


def _allowed(cells: list[dict[str, Any]]) -> dict[int, float]:
    """Throughput over one rank by ranks, had products no cost of being shared out: each rank takes
    its part of one rank's time, and its exchanges come on top.
    """
    one = _best(_of(cells, ranks=1), (), "us").get((1,))
    exchange = _best([cell for cell in cells if "exchange_us" in cell], (), "exchange_us")
    if one is None:
        return {}
    return {1: 1.0} | {size: one / (one / size + us) for (size,), us in sorted(exchange.items())}


def main(arguments: list[str] | None = None) -> int:
    """Run sections; the number of those that failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--worker"]:
        section, tiny, out, tokens = arguments[1:]
        work(section, tiny == "1", Path(out), [int(n) for n in tokens.split(",") if n])
        return 0
    parser = parser_of(__doc__, SECTIONS, RESULTS)
    parser.add_argument("--ranks", help="with commas; default: 1 and powers of two up to all GPUs")
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        help="seconds for one section with one number of ranks: %(default)s",
    )
    parser.add_argument("--tokens", default="", help="of layer, with commas; default: all")
    options = parser.parse_args(arguments)
    only = options.only.split(",")
    check_names(parser, "section", only, SECTIONS)
    results = Results(
        "parallel", options.out, facts("parallel", arguments, options.commit), targets
    )
    if options.draw:
        draw(results.data, options.out.parent)
        return 0
    count = torch.cuda.device_count() or 2
    ranks = [size for size in (1, 2, 4, 8) if size <= count]
    if options.ranks:
        ranks = [int(size) for size in options.ranks.split(",")]
    sections = {
        name: partial(measure, results, name, ranks, options.tiny, options.limit, options.tokens)
        for name in only
    }
    return run_sections(results, sections)


if __name__ == "__main__":
    sys.exit(main())
