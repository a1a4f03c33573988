"""Modes, inputs and weights that are timed, and the exact result that outputs are compared with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.kernels.targets import ERROR_OVER_FORMATS
from qmoe_kernels import dequantize, fused_moe, quantize
from qmoe_kernels.quantization import STORAGE_DTYPE
from qmoe_kernels.tiles import LayerShape
from qmoe_kernels.timing import LayerWeights, num_calls, random_layer, random_routing

SAMPLED_TOKENS = 32
# A format's error e and a kernel's k are independent: sqrt(e**2 + k**2) is at most 1.2 * e, what
# is asked for, if k <= 0.663 * e. Rounding to bf16 what goes in between and out is no mistake.
ERROR_SHARE = (ERROR_OVER_FORMATS**2 - 1) ** 0.5
BF16_ERROR = 6e-3


@dataclass(frozen=True)
class Mode:
    """Which weights, and which ``activations`` of `fused_moe`."""

    weights: str
    activations: str

    @property
    def weight_bits(self) -> int:
        """16 or 8."""
        return 16 if self.weights == "bf16" else 8


MODES = {
    "int8-w8a16": Mode("int8", "bf16"),
    "fp8-w8a16": Mode("fp8", "bf16"),
    "int8-w8a8": Mode("int8", "int8"),
    "fp8-w8a8": Mode("fp8", "fp8"),
    "bf16": Mode("bf16", "bf16"),
    "auto": Mode("int8", "auto"),
    "fp8-auto": Mode("fp8", "auto"),
}


@dataclass(frozen=True)
class Input:
    """One call's own: hidden_states bf16, topk_ids int64, topk_weights fp32."""

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    @cached_property
    def active(self) -> int:
        """Experts that any token is routed to."""
        return len(self.topk_ids.unique())


def draw_inputs(
    shape: LayerShape,
    num_tokens: int,
    device: torch.device,
    *,
    count: int | None = None,
    skew: float = 0.0,
    among: int | None = None,
) -> list[Input]:
    """Draw inputs for the calls of one graph; the same ones for the same arguments."""
    generator = torch.Generator(device).manual_seed(num_tokens)
    if count is None:  # a CPU's times mean nothing
        count = num_calls(shape, num_tokens) if device.type == "cuda" else 2
    found = []
    for _ in range(count):
        ids, weights = random_routing(
            shape, num_tokens, skew=skew, among=among, device=device, generator=generator
        )
        hidden_states = torch.randn(
            num_tokens, shape.hidden_size, device=device, generator=generator
        )
        found.append(Input(hidden_states.to(torch.bfloat16), ids, weights))
    return found


def mean_active(inputs: Sequence[Input]) -> float:
    """Experts that are active in a call, on average."""
    return sum(one.active for one in inputs) / len(inputs)


def two_layers(shape: LayerShape, weights: str, device: torch.device) -> list[LayerWeights]:
    """Weights twice: calls that use them in turn find nothing of theirs in L2."""
    layer = random_layer(shape, weights, device, torch.Generator(device).manual_seed(0))
    return [layer, layer.clone()]


def run_layer(
    layer: LayerWeights, one: Input, activations: str, *, two_level_sums: bool = False
) -> Tensor:
    """Call `fused_moe`."""
    return fused_moe(
        one.hidden_states,
        layer.gate_up_proj,
        layer.gate_up_proj_scale,
        layer.down_proj,
        layer.down_proj_scale,
        one.topk_ids,
        one.topk_weights,
        activations=activations,
        two_level_sums=two_level_sums,
    )


def our_calls(
    layers: Sequence[LayerWeights],
    inputs: Sequence[Input],
    activations: str,
    *,
    two_level_sums: bool = False,
) -> list[Callable[[], Tensor]]:
    """One call for each input, with the layers in turn."""
    return [
        lambda layer=layer, one=one: run_layer(
            layer, one, activations, two_level_sums=two_level_sums
        )
        for layer, one in zip(cycle(layers), inputs, strict=False)
    ]


def compile_ahead(calls: Sequence[Callable[[], object]]) -> None:
    """Run calls in threads: their kernels compile side by side, since Triton's passes hold no lock.

    What fails here fails again where it is reported.
    """
    if not calls or not torch.cuda.is_available():
        return

    def attempt(call: Callable[[], object]) -> None:
        with suppress(Exception):
            call()

    attempt(calls[0])
    workers = min(16, os.cpu_count() or 1)
    # A thread that has synchronized has a CUDA context.
    with ThreadPoolExecutor(workers, initializer=torch.cuda.synchronize) as pool:
        list(pool.map(attempt, calls[1:]))
    torch.cuda.synchronize()


# ---- correctness -------------------------------------------------------------------------------


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN: an output that nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def sample(one: Input) -> tuple[Tensor, Input]:
    """Draw up to `SAMPLED_TOKENS` tokens: their rows, and the input that is left."""
    generator = torch.Generator(one.hidden_states.device).manual_seed(1)
    device = one.hidden_states.device
    rows = torch.randperm(len(one.topk_ids), generator=generator, device=device)
    rows = rows[:SAMPLED_TOKENS]
    return rows, Input(one.hidden_states[rows], one.topk_ids[rows], one.topk_weights[rows])


def exact_layer(layer: LayerWeights, one: Input, activations: str | None) -> Tensor:
    """Compute a layer in fp64 on the device, expert by expert.

    Args:
        layer: its weights; quantized ones are dequantized.
        one: input.
        activations: both products' inputs are first rounded to this format: ``"bf16"``, or
            ``"int8"`` or ``"fp8"`` per token; not at all if None.

    Returns:
        (num_tokens, hidden_size) fp64.
    """
    x = _operand(one.hidden_states, activations)
    result = torch.zeros_like(x)
    for expert in one.topk_ids.unique().tolist():
        token, k = (one.topk_ids == expert).nonzero(as_tuple=True)
        up = _weight(layer.gate_up_proj, layer.gate_up_proj_scale, expert)
        gate, up = (x[token] @ up.T).chunk(2, dim=-1)
        hidden = _operand(torch.nn.functional.silu(gate) * up, activations)
        down = _weight(layer.down_proj, layer.down_proj_scale, expert)
        weights = one.topk_weights[token, k].double().unsqueeze(-1)
        result.index_add_(0, token, weights * (hidden @ down.T))
    return result


def relative_error(out: Tensor, expected: Tensor) -> float:
    """``|out - expected| / |expected|``, Frobenius; NaN if there is one in ``out``."""
    return float((out.double() - expected).norm() / expected.norm())


def check(
    call: Callable[[], Tensor], rows: Tensor, expected: dict[str, Tensor], limit: dict[str, float]
) -> dict[str, float | str | bool]:
    """Run a call twice on poisoned memory and compare sampled rows.

    Args:
        call: returns (num_tokens, hidden_size).
        rows: that ``expected`` has.
        expected: what may come out, by the format of the activations; the nearest one counts.
        limit: of the relative error, likewise.

    Returns:
        ``error``, ``arithmetic`` (which one), and ``failed`` with a reason if it is one.
    """
    with poisoned():
        out, again = call(), call()
    errors = {name: relative_error(out[rows], value) for name, value in expected.items()}
    # A NaN is larger than everything.
    nearest = min(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    found: dict[str, float | str | bool] = {
        "error": round(errors[nearest], 5),
        "arithmetic": nearest,
    }
    if not bool(out.isfinite().all()):
        found["failed"] = "the output is not finite"
    elif not errors[nearest] <= limit[nearest]:
        found["failed"] = f"relative error {errors[nearest]:.3g}, over {limit[nearest]:.3g}"
    elif not torch.equal(out, again):
        found["failed"] = "the second run gave other bits"
    return found


class SmallLayer:
    """Few experts in a shape's sizes, whose fp32 weights are known: to measure formats with.

    Attributes:
        layer: quantized weights.
        whole: input of `run_layer`.
        rows, sampled: see `sample`.
        exact: (sampled tokens, hidden_size) fp64, nothing rounded.
    """

    def __init__(
        self, shape: LayerShape, weights: str, num_tokens: int, device: torch.device
    ) -> None:
        few = replace(shape, num_experts=min(4, shape.num_experts), top_k=min(2, shape.top_k))
        self.layer, unrounded = (
            random_layer(few, w, device, torch.Generator(device).manual_seed(2))
            for w in (weights, "fp32")
        )
        (self.whole,) = draw_inputs(few, num_tokens, device, count=1)
        self.rows, self.sampled = sample(self.whole)
        self.exact = exact_layer(unrounded, self.sampled, None)

    def run(self, activations: str) -> Tensor:
        """Call `fused_moe`."""
        return run_layer(self.layer, self.whole, activations)

    def error(self, activations: str) -> float:
        """Error of `fused_moe`."""
        with poisoned():
            out = self.run(activations)
        return relative_error(out[self.rows], self.exact)

    def format_error(self, activations: str) -> float:
        """Error of exact arithmetic on rounded weights and activations."""
        return relative_error(exact_layer(self.layer, self.sampled, activations), self.exact)


def kernel_limit(format_error: float) -> float:
    """Relative error that a kernel may add to exact arithmetic on rounded operands."""
    return max(BF16_ERROR, ERROR_SHARE * format_error)


def _operand(x: Tensor, activations: str | None) -> Tensor:
    if activations is None:
        return x.double()
    if activations == "bf16":
        return x.to(torch.bfloat16).double()
    assert activations in STORAGE_DTYPE
    return dequantize(*quantize(x.float(), activations), torch.float64)


def _weight(values: Tensor, scale: Tensor | None, expert: int) -> Tensor:
    if scale is None:
        return values[expert].double()
    return dequantize(values[expert], scale[expert], torch.float64)
