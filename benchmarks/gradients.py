"""Gradients of one layer's experts, beside torch's own through bf16 weights.

``python -m benchmarks.gradients`` (``make bench-gradients``) times, for two models' layers on one
GPU: the forward pass of INT8 experts with 16-bit rows, and the whole of forward and backward pass;
the same of transformers' ``grouped_mm`` experts in bf16, whose weights are frozen as well. Memory
is the most that a pass takes above weights and inputs. Gradients are compared with those of the
dequantized weights before anything is timed. Results go to ``benchmarks/results/gradients.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.layers import Input, draw_inputs, relative_error, run_layer
from benchmarks.kernels.peers import experts_module
from benchmarks.kernels.shapes import SHAPES
from benchmarks.model import synchronize, time_each
from benchmarks.options import check, parser_of
from benchmarks.record import Results, facts, run_sections
from qmoe_kernels import dequantize
from qmoe_kernels.tiles import LayerShape
from qmoe_kernels.timing import LayerWeights, random_layer

RESULTS = Path(__file__).parent / "results" / "gradients.json"
SMALL = LayerShape(num_experts=6, top_k=2, hidden_size=64, intermediate_size=32)
MOST_BACKWARD = 2.2  # over the forward pass
MOST_DIFFERENT = 0.02  # relative Frobenius distance of bf16 gradients


def run(results: Results, tiny: bool) -> None:
    """Milliseconds and bytes by shape, number of tokens and who computes."""
    device = torch.device("cpu" if tiny else "cuda")
    shapes = {"tiny": SMALL} if tiny else {name: SHAPES[name] for name in ("qwen3", "dsv3")}
    for name, shape in shapes.items():
        layer = random_layer(shape, "int8", device, torch.Generator(device).manual_seed(0))
        wide = LayerWeights(
            dequantize(layer.gate_up_proj, layer.gate_up_proj_scale, torch.bfloat16), None,
            dequantize(layer.down_proj, layer.down_proj_scale, torch.bfloat16), None,
        )  # fmt: skip
        peer = experts_module(shape, wide, "grouped_mm")
        for tokens in (8,) if tiny else (512, 4096):
            (one,) = draw_inputs(shape, tokens, device, count=1)

            def ours(one: Input, layer: LayerWeights = layer) -> Tensor:
                return run_layer(layer, one, "bf16")

            def theirs(one: Input, peer: Any = peer) -> Tensor:
                weights = one.topk_weights.to(torch.bfloat16)
                output: Tensor = peer(one.hidden_states, one.topk_ids, weights)
                return output

            gradients = [_gradients(call, one) for call in (ours, theirs)]
            distance = max(relative_error(a, b.double()) for a, b in zip(*gradients, strict=True))
            if not distance < MOST_DIFFERENT:
                raise AssertionError(f"{name}, {tokens} tokens: gradients differ by {distance:.3f}")
            for what, call in (("qmoe int8", ours), ("grouped_mm bf16", theirs)):
                cell = {"shape": name, "tokens": tokens, "what": what, **_time(call, one, tiny)}
                results.add("cells", cell | {"distance": round(distance, 5)})


def _recorded(one: Input) -> Input:
    return Input(
        one.hidden_states.detach().requires_grad_(),
        one.topk_ids,
        one.topk_weights.detach().requires_grad_(),
    )


def _gradients(call: Callable[[Input], Tensor], one: Input) -> tuple[Tensor, ...]:
    recorded = _recorded(one)
    output = call(recorded)
    gradient = torch.ones_like(output)
    return torch.autograd.grad(output, [recorded.hidden_states, recorded.topk_weights], gradient)


def _time(call: Callable[[Input], Tensor], one: Input, tiny: bool) -> dict[str, Any]:
    device, repeats = one.hidden_states.device, 3 if tiny else 20

    @torch.no_grad()
    def forward() -> None:
        call(one)

    functions = {"forward": forward, "both": lambda: _gradients(call, one)}
    found = {}
    for what, function in functions.items():
        function()
        synchronize(device)
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
            found[f"{what}_bytes"] = torch.cuda.max_memory_allocated() - before
    # In turns, so that both run at the same clock: a GPU at its power limit slows down.
    turns = cycle(functions.values())
    each, _ = time_each(lambda: next(turns)(), 2 * repeats, device)
    for i, what in enumerate(functions):
        found[f"{what}_ms"] = round(median(each[i::2]), 4)
    return found | {"backward_ms": round(found["both_ms"] - found["forward_ms"], 4)}


def targets(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """What the backward pass has to reach, and did."""
    found = []
    cells = sections.get("layer", {}).get("cells", [])
    by_key = {(c["shape"], c["tokens"], c["what"]): c for c in cells}
    for (shape, tokens, what), cell in by_key.items():
        peer = by_key.get((shape, tokens, "grouped_mm bf16"))
        if tokens != 4096 or what != "qmoe int8" or peer is None:
            continue
        for name, measured, most in (
            ("backward over forward", cell["backward_ms"] / cell["forward_ms"], MOST_BACKWARD),
            ("both over grouped_mm", cell["both_ms"] / peer["both_ms"], 1.0),
            ("memory over grouped_mm", cell["both_bytes"] / peer["both_bytes"], 1.0),
        ):
            row = {"what": f"{shape}, {tokens} tokens: {name}", "target": most}
            found.append(row | {"measured": round(measured, 3), "met": measured <= most})
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 if it failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = parser_of(__doc__, ("layer",), RESULTS)
    options = parser.parse_args(arguments)
    if options.draw:
        parser.error("there is no picture of these")
    check(parser, options, ("layer",))
    common = facts("gradients", arguments, options.commit)
    results = Results("gradients", options.out, common, targets)
    return run_sections(results, {"layer": lambda: run(results, options.tiny)})


if __name__ == "__main__":
    sys.exit(main())
