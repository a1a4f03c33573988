"""What is measured: each function is a section of the benchmark."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.layers import (
    MODES,
    Input,
    Mode,
    SmallLayer,
    check,
    compile_ahead,
    draw_inputs,
    exact_layer,
    kernel_limit,
    mean_active,
    our_calls,
    relative_error,
    sample,
    two_layers,
)
from benchmarks.kernels.peers import PEER_ERROR, Peer, experts_module, peers
from benchmarks.kernels.targets import floors, target_microseconds
from benchmarks.record import Results
from qmoe_kernels import quantize
from qmoe_kernels.tiles import LayerShape
from qmoe_kernels.timing import LayerWeights, eager_microseconds, replay_microseconds

SKEWED_MODES = ("auto", "fp8-w8a8")
ERROR_TOKENS = (4, 512)
LAYER_TOKENS = (1, 16, 1024)
FEW = 4  # inputs, for what takes long

Calls = Sequence[Callable[[], Tensor]]
Cell = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What is asked for, and where results go."""

    shapes: dict[str, LayerShape]
    tokens: tuple[int, ...]
    modes: tuple[str, ...]
    seconds: float
    device: torch.device
    results: Results

    def replayed(self, calls: Calls) -> float:
        """Microseconds per call in a CUDA graph."""
        us = replay_microseconds(calls, seconds=self.seconds, device=self.device)
        return round(us, 2)

    def eager(self, calls: Calls) -> float:
        """Microseconds per call, launched one by one."""
        us = eager_microseconds(calls, seconds=self.seconds, device=self.device)
        return round(us, 2)


def free_memory() -> None:
    """Give back what nobody holds any more, graphs' memory too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- ceilings ----------------------------------------------------------------------------------


def run_ceilings(bench: Bench) -> None:
    """This machine's own: reading and copying memory, matrix products of 8192 cubed."""
    bench.results.begin("ceilings")
    gpu = bench.device.type == "cuda"
    nbytes, side = (1 << 32, 8192) if gpu else (1 << 20, 64)
    source = torch.randint(0, 2**31, (nbytes // 8,), device=bench.device)
    target = torch.empty_like(source)
    copied = bench.replayed([lambda: target.copy_(source)])
    read = bench.replayed([source.sum])
    bench.results.set(
        copy_tb_per_s=round(2 * nbytes / copied / 1e6, 3),
        read_by_torch_sum_tb_per_s=round(nbytes / read / 1e6, 3),
    )
    a, b = (torch.randn(side, side, device=bench.device) for _ in range(2))
    a16, b16 = a.to(torch.bfloat16), b.to(torch.bfloat16)
    products: dict[str, Callable[[], Tensor]] = {"bf16": lambda: a16 @ b16.T}
    if gpu:
        (a8, a_scale), (b8, b_scale) = quantize(a, "fp8"), quantize(b, "fp8")
        a_int8, b_int8 = quantize(a, "int8")[0], quantize(b, "int8")[0]
        products["int8"] = lambda: torch._int_mm(a_int8, b_int8.T)
        products["fp8"] = lambda: torch._scaled_mm(
            a8,
            b8.T,
            a_scale[:, None],
            b_scale[None],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    for name, product in products.items():
        us = bench.replayed([product])
        bench.results.set(**{f"{name}_tflop_per_s": round(2 * side**3 / us / 1e6, 1)})


# ---- errors ------------------------------------------------------------------------------------


def run_errors(bench: Bench) -> None:
    """Error of each mode on fp32 weights, over that of its format: a layer of few experts."""
    bench.results.begin("errors")
    for name, shape in bench.shapes.items():
        asked = {m: MODES[m] for m in bench.modes if MODES[m].activations != "auto"}
        for weights in ("int8", "fp8"):
            modes = {m: mode for m, mode in asked.items() if mode.weights == weights}
            smalls = [SmallLayer(shape, weights, t, bench.device) for t in ERROR_TOKENS]
            compile_ahead(
                [partial(s.run, mode.activations) for s in smalls for mode in modes.values()]
            )
            for mode_name, mode in modes.items():
                for small in smalls:
                    found = small.format_error(mode.activations), small.error(mode.activations)
                    cell: Cell = {"shape": name, "tokens": len(small.whole.topk_ids)}
                    cell |= {"mode": mode_name, "format_error": round(found[0], 5)}
                    cell |= {"error": round(found[1], 5), "ratio": round(found[1] / found[0], 3)}
                    bench.results.add("errors", cell)
            del smalls
            free_memory()


# ---- latency -----------------------------------------------------------------------------------


def run_latency(bench: Bench) -> None:
    """Every mode, and the peers that take the same weights: a section for each shape."""
    _time_shapes(bench, "latency", peers())


def run_held_out(bench: Bench) -> None:
    """The same of shapes that no rule was fitted on; of the peers, vLLM's kernels and torch's."""
    fast = {n: peer for n, peer in peers().items() if not n.startswith("transformers")}
    _time_shapes(bench, "held_out", fast)


def _time_shapes(bench: Bench, section: str, known: dict[str, Peer]) -> None:
    for name, shape in bench.shapes.items():
        bench.results.begin(f"{section}.{name}")
        bench.results.set(shape=vars(shape))
        for weights in ("int8", "fp8", "bf16"):
            modes = {m: MODES[m] for m in bench.modes if MODES[m].weights == weights}
            others = {n: peer for n, peer in known.items() if peer.weights == weights}
            _time_weights(bench, name, shape, weights, modes, others)
            free_memory()


def _time_weights(
    bench: Bench,
    name: str,
    shape: LayerShape,
    weights: str,
    modes: dict[str, Mode],
    others: dict[str, Peer],
) -> None:
    layers = two_layers(shape, weights, bench.device)
    inputs = {t: draw_inputs(shape, t, bench.device) for t in bench.tokens}
    _compile(bench, layers, inputs.values(), modes.values())
    compile_ahead(
        [
            lambda peer=peer, drawn=drawn: peer.prepare(shape, layers, drawn[:1])[0]()
            for peer in others.values()
            if peer.compiles
            for drawn in inputs.values()
        ]
    )
    for num_tokens, drawn in inputs.items():
        expected = Expected(shape, layers, drawn, bench.device)
        for mode_name, mode in modes.items():
            cell = {"shape": name, "tokens": num_tokens, "mode": mode_name}
            bench.results.add("cells", cell | time_mode(bench, name, mode, expected))
        for peer_name, peer in others.items():
            cell = {"shape": name, "tokens": num_tokens, "peer": peer_name}
            bench.results.add("peers", cell | time_peer(bench, peer, expected))


def _compile(bench: Bench, layers: Sequence[LayerWeights], drawn: Any, modes: Any) -> None:
    """Compile for every number of tokens and mode."""
    drawn, modes = list(drawn), list(modes)
    calls = [our_calls(layers, d[:1], mode.activations)[0] for d in drawn for mode in modes]
    compile_ahead(calls)
    bench.results.log("weights drawn, kernels compiled")


class Expected:
    """Inputs of one number of tokens, and what some rows of the first one's output are to be."""

    def __init__(
        self,
        shape: LayerShape,
        layers: Sequence[LayerWeights],
        inputs: Sequence[Input],
        device: torch.device,
    ) -> None:
        self.shape, self.layers, self.inputs, self.device = shape, layers, inputs, device
        self.rows, self.sampled = sample(inputs[0])
        self.known: dict[str, Tensor] = {}

    @property
    def num_tokens(self) -> int:
        """In a call."""
        return len(self.inputs[0].topk_ids)

    def of(self, arithmetic: str) -> Tensor:
        """(sampled tokens, hidden_size) fp64; see `exact_layer`."""
        if arithmetic not in self.known:
            self.known[arithmetic] = exact_layer(self.layers[0], self.sampled, arithmetic)
        return self.known[arithmetic]


@cache
def limit_of(shape: LayerShape, mode: Mode, device: torch.device) -> float:
    """Of the relative error to `exact_layer`."""
    small = SmallLayer(shape, mode.weights, 16, device)
    return kernel_limit(small.format_error(mode.activations))


def time_mode(bench: Bench, name: str, mode: Mode, expected: Expected) -> Cell:
    """Check one cell of ours and time it; with ``failed`` and without a time if the check fails."""
    shape, inputs = expected.shape, expected.inputs
    active = mean_active(inputs)
    cell: Cell = {"active": round(active, 1), "calls": len(inputs)}
    arithmetics = ["bf16", mode.weights] if mode.activations == "auto" else [mode.activations]
    try:
        calls = our_calls(expected.layers, inputs, mode.activations)
        cell |= check(
            calls[0],
            expected.rows,
            {a: expected.of(a) for a in arithmetics},
            {a: limit_of(shape, replace(mode, activations=a), bench.device) for a in arithmetics},
        )
        if "failed" not in cell:
            cell["us"] = bench.replayed(calls)
    except Exception as error:  # other cells still tell something
        cell["failed"] = f"{type(error).__name__}: {error}"
    product_bits = 8 if cell.get("arithmetic") in ("int8", "fp8") else 16
    t = expected.num_tokens
    floor, flop = floors(shape, t, active, mode.weight_bits, product_bits)
    # A mode that may choose is measured by the better of what it chooses from.
    asked_bits = 8 if mode.activations in ("auto", "int8", "fp8") else 16
    target = target_microseconds(
        name, t, floor, weight_bits=mode.weight_bits, product_bits=asked_bits
    )
    cell |= {"floor_us": round(floor, 2), "flop_us": round(flop, 2)}
    cell["target_us"] = None if target is None else round(target, 2)
    if "us" in cell:
        cell["share_of_floor"] = round(max(floor, flop) / cell["us"], 4)
    return cell


def time_peer(bench: Bench, peer: Peer, expected: Expected) -> Cell:
    """Time a peer, or say why not."""
    shape, inputs = expected.shape, expected.inputs
    cell: Cell = {"whole_layer": peer.whole_layer, "graph": peer.graph}
    reason = peer.reason_to_skip(shape, expected.num_tokens)
    if reason:
        return cell | {"skipped": reason}
    try:
        inputs = inputs[:FEW] if peer.gathers or not peer.graph else inputs
        calls = peer.prepare(shape, expected.layers, inputs)
        if peer.whole_layer:
            error = relative_error(calls[0]()[expected.rows], expected.of("bf16"))
            cell["error"] = round(error, 5)
            if not error < PEER_ERROR:
                return cell | {"failed": f"relative error {error:.3g}"}
        cell["us"] = bench.replayed(calls) if peer.graph else bench.eager(calls)
    except Exception as error:  # another version of what others wrote
        cell["failed"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return cell


# ---- sums of FP8 -------------------------------------------------------------------------------


def run_accumulation(bench: Bench) -> None:
    """What sums in two levels cost where FP8 meets FP8, and how much nearer they are."""
    for name, shape in bench.shapes.items():
        bench.results.begin(f"accumulation.{name}")
        layers = two_layers(shape, "fp8", bench.device)
        for num_tokens in bench.tokens[-2:]:
            drawn = draw_inputs(shape, num_tokens, bench.device)
            expected = Expected(shape, layers, drawn, bench.device)
            cell: Cell = {"shape": name, "tokens": num_tokens}
            for levels in (1, 2):
                calls = our_calls(layers, drawn, "fp8", two_level_sums=levels == 2)
                error = relative_error(calls[0]()[expected.rows], expected.of("fp8"))
                cell[f"levels_{levels}_error"] = round(error, 5)
                cell[f"levels_{levels}_us"] = bench.replayed(calls)
            bench.results.add("sums", cell)
        del layers
        free_memory()


# ---- skewed routing ----------------------------------------------------------------------------


def experts_to_draw_from(shape: LayerShape, num_tokens: int, active: float) -> int:
    """Return how many experts uniform routing draws from for so many to be active, on average."""
    for among in range(shape.top_k, shape.num_experts):
        if among * (1 - (1 - shape.top_k / among) ** num_tokens) >= active:
            return among
    return shape.num_experts


def run_skew(bench: Bench) -> None:
    """Zipf with exponent 1 over uniform routing with as many active experts."""
    for name, shape in bench.shapes.items():
        bench.results.begin(f"skew.{name}")
        for mode_name in SKEWED_MODES:
            if mode_name in bench.modes:
                _time_skew(bench, name, shape, mode_name)
                free_memory()


def _time_skew(bench: Bench, name: str, shape: LayerShape, mode_name: str) -> None:
    mode = MODES[mode_name]
    layers = two_layers(shape, mode.weights, bench.device)
    pairs = []
    for num_tokens in bench.tokens:
        skewed = draw_inputs(shape, num_tokens, bench.device, skew=1.0)
        among = experts_to_draw_from(shape, num_tokens, mean_active(skewed))
        pairs.append((skewed, draw_inputs(shape, num_tokens, bench.device, among=among)))
    _compile(bench, layers, [skewed for skewed, _ in pairs], [mode])
    for skewed, uniform in pairs:
        cells = [
            time_mode(bench, name, mode, Expected(shape, layers, drawn, bench.device))
            for drawn in (skewed, uniform)
        ]
        cell = {"shape": name, "tokens": len(skewed[0].topk_ids), "mode": mode_name}
        failed = [c["failed"] for c in cells if "failed" in c]
        if failed:
            bench.results.add("failed", cell | {"failed": failed[0]})
            continue
        for what, found in zip(("skewed", "uniform"), cells, strict=True):
            cell |= {f"{what}_us": found["us"], f"{what}_active": found["active"]}
        cell["ratio"] = round(cells[0]["us"] / cells[1]["us"], 4)
        bench.results.add("skewed", cell)


# ---- one layer, from the CPU to fused FP8 ------------------------------------------------------


def run_layer(bench: Bench) -> None:
    """One layer computed six ways: the picture that this field begins with."""
    name, shape = next(iter(bench.shapes.items()))
    bench.results.begin("layer")
    bench.results.set(shape=name)
    tokens = [t for t in LAYER_TOKENS if t in bench.tokens] or list(bench.tokens[:1])

    def add(what: str, num_tokens: int, us: float, **more: Any) -> None:
        bench.results.add("bars", {"what": what, "tokens": num_tokens, "us": us} | more)

    known = peers()
    for weights in ("bf16", "int8", "fp8"):
        layers = two_layers(shape, weights, bench.device)
        for num_tokens in tokens:
            inputs = draw_inputs(shape, num_tokens, bench.device)
            expected = Expected(shape, layers, inputs, bench.device)
            if weights == "bf16":
                for what, peer in (
                    ("GPU eager", known["transformers eager"]),
                    ("GPU grouped", known["transformers grouped_mm"]),
                ):
                    cell = time_peer(bench, peer, expected)
                    if "us" in cell:
                        add(what, num_tokens, cell["us"], graph=cell["graph"])
            ours = time_mode(bench, name, Mode(weights, "auto"), expected)
            if "us" in ours:
                add(f"fused {weights}", num_tokens, ours["us"], graph=True)
            else:
                bench.results.add("failed", {"what": weights, "failed": ours["failed"]})
        if weights == "bf16":
            _time_cpu(bench, shape, layers[0], tokens, add)
        del layers
        free_memory()


def _time_cpu(
    bench: Bench, shape: LayerShape, layer: LayerWeights, tokens: Sequence[int], add: Any
) -> None:
    """transformers on the host's processor in bf16, by the faster of its implementations."""
    cpu = torch.device("cpu")
    on_cpu = LayerWeights(layer.gate_up_proj.to(cpu), None, layer.down_proj.to(cpu), None)
    for num_tokens in tokens:
        inputs = draw_inputs(shape, num_tokens, cpu, count=1)
        found = {}
        for implementation in ("eager", "grouped_mm"):
            module = experts_module(shape, on_cpu, implementation)

            @torch.no_grad()
            def call(module: Any = module, one: Input = inputs[0]) -> Tensor:
                return module(one.hidden_states, one.topk_ids, one.topk_weights.to(torch.bfloat16))

            found[implementation] = eager_microseconds([call], seconds=bench.seconds, device=cpu)
        fastest = min(found, key=found.__getitem__)
        add("CPU", num_tokens, round(found[fastest], 1), implementation=fastest)
