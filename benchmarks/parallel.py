"""Experts on several GPUs: what ranks exchange, one layer, and a whole model.

``python -m benchmarks.parallel`` (``make bench-parallel``) starts itself by torchrun with each of
``--ranks``, one GPU for a rank, and runs:

- *exchange*: microseconds of the layers' exchanges by size, several in a CUDA graph that is
  replayed; over peers' memory (*peers*), by NCCL (*collective*), and sums also of parts that the
  ranks exchange and add up themselves (*all-to-all*).
- *layer*: one layer of three models' shapes. *same*: all ranks have the same rows, and add up;
  *own*: each rank has its part of them, gathered and scattered, all at once or in parts, of which
  one's exchange runs beside another's products. With rows in 16 bits, and in 8 where that is the
  default. Compared with a layer of all experts on one GPU before it is timed.
- *model*: Qwen3-30B-A3B's shape, random weights in INT8: captured decode steps, few texts on every
  rank the same, many texts each rank's own part; and reading 8 and 32 prompts of 2048 tokens.

Results go to ``benchmarks/results/parallel.json`` as they come, and ``--draw`` draws them. Without
a GPU it runs with gloo; ``--tiny`` is for the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.shapes import SHAPES, WITH_TARGETS
from benchmarks.model import QWEN3_30B_A3B, TINY, as_graph, build_model, synchronize, time_each
from benchmarks.options import check_names, parser_of
from benchmarks.record import Results, facts, run_sections
from qmoe.decoding.step import DecodeStep, step_of
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
SECTIONS = ("exchange", "layer", "model")
OF_SEVERAL = ("exchange",)  # nothing to measure on one rank
REPEATS = 10  # in a graph: its launch takes as long as a small exchange
IN_PARTS = 4096  # tokens; where there are fewer, parts have been slower everywhere
LONG_MS = 5.0  # a call that is alone in its graph
SMALL = LayerShape(num_experts=6, top_k=2, hidden_size=64, intermediate_size=32)
MOST_DIFFERENT = 0.02  # relative Frobenius distance of bf16 outputs
# Speed-up by two ranks over one: of a layer of 4096 tokens, of decode by texts on each rank.
LAYER_TARGETS = {"qwen3": 1.6, "mixtral": 1.8, "dsv3": 1.8}
DECODE_TARGETS = {1: 1.0, 64: 1.6, 256: 1.7}


# ---- on each rank ------------------------------------------------------------------------------


class Worker:
    """What one rank measures; rank 0 writes it down."""

    def __init__(self, group: RankGroup, tiny: bool, out: Path) -> None:
        self.group, self.tiny, self.out = group, tiny, out
        self.device = group.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.cells: list[dict[str, Any]] = []

    def add(self, **cell: Any) -> None:
        """Note a cell."""
        self.cells.append({"ranks": self.group.size, **cell})
        if self.group.rank == 0:
            self.out.write_text(json.dumps(self.cells))

    def microseconds(self, function: Callable[[], object]) -> float:
        """Of a call, on the slowest rank: the median of replays of a graph of several."""
        for _ in range(2):
            function()
        synchronize(self.device)
        began = time.perf_counter()
        function()
        synchronize(self.device)
        # All ranks replay equally often.
        heard = self.group.exchange("one call", ms=1e3 * (time.perf_counter() - began))
        long = max(other["ms"] for other in heard) > LONG_MS
        calls = REPEATS if self.device.type == "cuda" and not long else 1
        replay = as_graph(lambda: [function() for _ in range(calls)], self.device)
        each, _ = time_each(replay, 3 if self.tiny else 30, self.device)
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
                    if how == "all-to-all" and not what.startswith("sum"):
                        continue
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
            for tokens in (4, 8) if self.tiny else (1, 64, 256, 1024, 4096, 32768):
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
            self.add(**about, how=how, us=self.microseconds(call), distance=distance)

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
            return self.group.sum(_experts(own, hidden, share.own_ids(ids), w, activations))

        ways = [("same", same, slice(None))]
        tokens = len(rows[0])
        if tokens % self.group.size == 0:
            count = tokens // self.group.size
            mine = slice(self.group.rank * count, (self.group.rank + 1) * count)
            my_rows = [tensor[mine] for tensor in rows]

            def in_8_bits(num_pairs: int) -> WeightFormat | None:
                like: Any = {"dtype": self.dtype, "weights": torch.int8, "device": self.device}
                return row_format(activations, num_pairs, shape.num_experts, **like)

            def scattered(parts: int) -> Tensor:
                options = {"parts": parts, "parts_from": 0.0}
                texts = OwnTexts(self.group, shape.top_k, lambda: False, **options)
                texts.rows = count
                return texts.run(
                    *my_rows,
                    lambda h, ids, w: _experts(own, h, share.own_ids(ids), w, activations),
                    in_8_bits,
                    shape.num_experts,
                )

            ways.append(("own", partial(scattered, 1), mine))
            if self.tiny or tokens >= IN_PARTS:
                ways += [(f"own, {n} parts", partial(scattered, n), mine) for n in (2, 4)]
        return ways

    def model(self) -> None:
        """Captured decode steps, and the reading of prompts."""
        shape = TINY if self.tiny else QWEN3_30B_A3B
        model = build_model(shape, self.device, "int8", self.group)
        top_k, size = shape.num_experts_per_tok, self.group.size
        for texts in (1, 2) if self.tiny else (1, 8, 64, 256, 1024):
            own = size > 1 and texts >= (2 if self.tiny else 64)
            rows = texts // size if own else texts
            step = step_of(model, rows, 64 if self.tiny else 512)
            ids = torch.arange(rows * 8, device=self.device).view(rows, 8) % shape.vocab_size
            positions = torch.arange(8, device=self.device).expand(rows, -1)
            rounds = OwnTexts(self.group, top_k, lambda: False)
            if own:
                self.group.own_texts = rounds
                rounds.rows = ids.numel()
            step.read(ids, torch.ones_like(ids), positions, None)
            rounds.rows = rows
            step.serve(rows if own else None)

            def advance(step: DecodeStep = step, rounds: OwnTexts = rounds) -> None:
                step.advance()
                if self.group.own_texts is not None:
                    rounds.goes_on(True)  # what hosts say beside each step

            for _ in range(4):
                advance()
            each, _ = time_each(advance, 3 if self.tiny else 100, self.device)
            self.group.own_texts = None
            how = "own" if own else "one" if size == 1 else "same"
            heard = self.group.exchange("a time", ms=median(each), trouble=step.trouble)
            ms, trouble = max(other["ms"] for other in heard), heard[0]["trouble"]
            self.add(what="decode", texts=texts, how=how, ms=round(ms, 3), trouble=trouble)
            del step, advance
        for texts, columns in ((8, 16),) if self.tiny else ((8, 2048), (32, 2048)):
            self._prefill(model, texts, columns)

    def _prefill(self, model: Any, texts: int, columns: int) -> None:
        rows, size = texts // self.group.size, self.group.size
        step = step_of(model, rows, columns + 8)
        ids = torch.arange(rows * columns, device=self.device).view(rows, columns)
        ids %= model.config.vocab_size
        positions = torch.arange(columns, device=self.device).expand(rows, -1)
        read = partial(step.read, ids, torch.ones_like(ids), positions, None)
        if size > 1:
            self.group.own_texts = OwnTexts(
                self.group, model.config.num_experts_per_tok, lambda: False
            )
            self.group.own_texts.rows = ids.numel()
        read()
        each, _ = time_each(read, 3, self.device)
        self.group.own_texts = None
        heard = self.group.exchange("a time", ms=median(each))
        ms = round(max(other["ms"] for other in heard), 3)
        self.add(what="prefill", texts=texts, columns=columns, ms=ms)


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


def work(section: str, tiny: bool, out: Path) -> None:
    """What torchrun starts: one section on one rank."""
    group = rank_group(True, choose_own_device("auto"))
    with group.together("benchmarks.parallel"), torch.no_grad():
        getattr(Worker(group, tiny, out), section)()


# ---- over numbers of ranks ---------------------------------------------------------------------


def measure(results: Results, section: str, ranks: list[int], tiny: bool) -> None:
    """Run a section with each number of ranks."""
    for size in ranks:
        if size == 1 and section in OF_SEVERAL:
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "cells.json"
            worker = [section, str(int(tiny)), str(out)]
            run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
            command = [sys.executable, *run, "-m", "benchmarks.parallel", "--worker", *worker]
            done = subprocess.run(command, env=_environment(), timeout=1800, check=False)
            for cell in json.loads(out.read_text()) if out.exists() else []:
                results.add("cells", cell)
            if done.returncode:
                raise RuntimeError(f"{section} with {size} ranks ended with {done.returncode}")


def _environment() -> dict[str, str]:
    root = Path(__file__).parents[1]
    paths = [str(root), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def targets(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """What two ranks have to reach over one, and did, the best of their ways."""
    found = []
    cells = sections.get("layer", {}).get("cells", [])
    best = _best(cells, ("shape", "tokens", "activations"), "us")
    for (ranks, shape, tokens, activations), us in best.items():
        one = best.get((1, shape, tokens, activations))
        if ranks == 2 and one is not None and tokens == 4096:
            what = f"layer {shape}, 4096 tokens in all, {activations} rows, two GPUs over one"
            found.append(_target(what, one / us, LAYER_TARGETS[shape]))
    cells = sections.get("model", {}).get("cells", [])
    steps = _best([c for c in cells if c["what"] == "decode"], ("texts",), "ms")
    for texts, least in DECODE_TARGETS.items():
        if {(1, texts), (2, texts)} <= steps.keys():
            what = f"decode, {texts} texts, two GPUs over one"
            found.append(_target(what, steps[1, texts] / steps[2, texts], least))
    prefill = _best([c for c in cells if c["what"] == "prefill"], ("texts",), "ms")
    if {(1, 8), (2, 8)} <= prefill.keys():
        found.append(_target("prefill, two GPUs over one", prefill[1, 8] / prefill[2, 8], 1.7))
    return found


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
    """Throughput of a layer of the most tokens over ranks."""
    from matplotlib import pyplot as plt

    from benchmarks.drawing import BLUE, GREEN, GREY, ORANGE, save, tidy

    section = data["sections"]["layer"]
    cells = section["cells"]
    most = max(cell["tokens"] for cell in cells)
    cells = [cell for cell in cells if cell["tokens"] == most and cell["how"] != "same"]
    activations = "auto" if any(cell["activations"] == "auto" for cell in cells) else "bf16"
    us = _best([c for c in cells if c["activations"] == activations], ("shape",), "us")
    shapes = list(dict.fromkeys(cell["shape"] for cell in cells))
    figure, axis = plt.subplots(figsize=(6, 3.6))
    sizes = sorted({cell["ranks"] for cell in cells})
    for shape, color in zip(shapes, (BLUE, ORANGE, GREEN), strict=False):
        reached = [
            (size, us[1, shape] / us[size, shape])
            for size in sizes
            if {(1, shape), (size, shape)} <= us.keys()
        ]
        axis.plot(*zip(*reached, strict=True), "o-", color=color, label=shape)
    axis.plot(sizes, sizes, "--", color=GREY, label="linear")
    axis.set_xticks(sizes)
    axis.set_xlabel("GPUs")
    axis.set_ylabel("throughput over one GPU")
    axis.set_ylim(0)
    axis.legend(fontsize=8)
    tidy(axis)
    where = section["machine"]["gpu"] or section["machine"]["cpu"]
    save(figure, f"One layer, {most} tokens in all ({where})", folder / "parallel.png", section)


def main(arguments: list[str] | None = None) -> int:
    """Run sections; the number of those that failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--worker"]:
        section, tiny, out = arguments[1:]
        work(section, tiny == "1", Path(out))
        return 0
    parser = parser_of(__doc__, SECTIONS, RESULTS)
    parser.add_argument("--ranks", help="with commas; default: 1 and powers of two up to all GPUs")
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
    sections = {name: partial(measure, results, name, ranks, options.tiny) for name in only}
    return run_sections(results, sections)


if __name__ == "__main__":
    sys.exit(main())
