"""Time one MoE layer: random weights, random routing, replays of a CUDA graph.

Benchmarks and tuning share this, so that their microseconds mean the same. Nothing here checks
results: whoever times a layer compares its output first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from qmoe_kernels.quantization import STORAGE_DTYPE, quantize
from qmoe_kernels.tiles import LayerShape

FLOAT_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}

GRAPH_SECONDS = 0.004  # of one replay, about: long beside the gap between two replays
# Rough rates of a large GPU, to choose a number of calls with: bytes/s and operations/s.
_BYTES_PER_SECOND, _OPERATIONS_PER_SECOND = 4e12, 5e14


@dataclass(frozen=True)
class LayerWeights:
    """The experts of one layer, as `fused_moe` takes them.

    Attributes:
        gate_up_proj: (num_experts, 2 * intermediate_size, hidden_size) int8 | e4m3fn | float;
            intermediate_size rows without a gate.
        gate_up_proj_scale: (num_experts, 2 * intermediate_size) fp32; None for float weights.
        down_proj: (num_experts, hidden_size, intermediate_size), same dtype.
        down_proj_scale: (num_experts, hidden_size) fp32; None for float weights.
    """

    gate_up_proj: Tensor
    gate_up_proj_scale: Tensor | None
    down_proj: Tensor
    down_proj_scale: Tensor | None

    def clone(self) -> LayerWeights:
        """Return equal weights elsewhere in memory, as another layer's would be."""
        found = (getattr(self, field.name) for field in fields(self))
        return LayerWeights(*(t if t is None else t.clone() for t in found))


def expert_elements(shape: LayerShape) -> int:
    """Return the number of weights of one expert."""
    return (3 if shape.gated else 2) * shape.hidden_size * shape.intermediate_size


def random_layer(
    shape: LayerShape, weights: str, device: torch.device | str, generator: torch.Generator
) -> LayerWeights:
    """Draw normal weights, such that normal hidden states give outputs of order one.

    Drawn and quantized expert by expert: beyond the result, memory for one expert is needed.

    Args:
        shape: of the layer.
        weights: ``"int8"``, ``"fp8"`` (both per output channel), ``"bf16"`` or ``"fp32"``; of one
            draw, if ``generator`` is in the same state.
        device: where to draw.
        generator: on that device.

    Raises:
        ValueError: unknown weights.
    """
    dtype = (STORAGE_DTYPE | FLOAT_DTYPE).get(weights)
    if dtype is None:
        raise ValueError(f"unknown weights {weights!r}; 'int8', 'fp8', 'bf16' and 'fp32' work")
    up_rows = shape.intermediate_size * (2 if shape.gated else 1)
    found: list[Tensor | None] = []
    for rows, columns in (
        (up_rows, shape.hidden_size),
        (shape.hidden_size, shape.intermediate_size),
    ):
        size = (shape.num_experts, rows, columns)
        values = torch.empty(size, dtype=dtype, device=device)
        scale = None
        if weights in STORAGE_DTYPE:
            scale = torch.empty(size[:2], dtype=torch.float32, device=device)
        for expert in range(shape.num_experts):
            drawn = torch.randn(rows, columns, device=device, generator=generator)
            drawn.mul_(columns**-0.5)
            if scale is None:
                values[expert] = drawn
            else:
                values[expert], scale[expert] = quantize(drawn, weights)  # type: ignore[arg-type]
        found += [values, scale]
    gate_up_proj, gate_up_proj_scale, down_proj, down_proj_scale = found
    assert gate_up_proj is not None and down_proj is not None
    return LayerWeights(gate_up_proj, gate_up_proj_scale, down_proj, down_proj_scale)


def random_routing(
    shape: LayerShape,
    num_tokens: int,
    *,
    skew: float = 0.0,
    among: int | None = None,
    device: torch.device | str,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw each token's experts, all different, and their weights.

    The i-th most popular expert is drawn with probability proportional to ``i ** -skew`` (Zipf),
    without replacement: the ``top_k`` largest of log-probability plus Gumbel noise. Which expert
    is how popular is drawn anew by each call.

    Args:
        shape: of the layer.
        num_tokens: rows to draw.
        skew: Zipf's exponent; 0 is uniform.
        among: draw from only so many of the experts, themselves drawn; all if None.
        device: where to draw.
        generator: on that device.

    Returns:
        topk_ids (num_tokens, top_k) int64, and topk_weights (num_tokens, top_k) fp32, positive,
        each row's sum 1.

    Raises:
        ValueError: ``among`` is not from top_k to num_experts.
    """
    among = shape.num_experts if among is None else among
    if not shape.top_k <= among <= shape.num_experts:
        raise ValueError(
            f"among={among} of {shape.num_experts} experts; from top_k={shape.top_k} up works"
        )
    rank = torch.arange(1, among + 1, dtype=torch.float32, device=device)
    uniform = torch.rand(num_tokens, among, device=device, generator=generator)
    gumbel = -torch.log(-torch.log(uniform.clamp_(min=torch.finfo(torch.float32).tiny)))
    popularity = (gumbel - skew * rank.log()).topk(shape.top_k).indices
    experts = torch.randperm(shape.num_experts, device=device, generator=generator)
    topk_ids = experts[popularity]
    logits = torch.randn(num_tokens, shape.top_k, device=device, generator=generator)
    return topk_ids, logits.softmax(-1)


def num_calls(shape: LayerShape, num_tokens: int, weight_bytes: int = 1) -> int:
    """Return how many calls a graph takes: about `GRAPH_SECONDS`, from 3 to 128.

    Args:
        shape: of the layer.
        num_tokens: in a call.
        weight_bytes: of one weight.
    """
    pairs = num_tokens * shape.top_k
    expected = shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** num_tokens)
    seconds = expected * expert_elements(shape) * weight_bytes / _BYTES_PER_SECOND
    seconds += 2 * pairs * expert_elements(shape) / _OPERATIONS_PER_SECOND
    return max(3, min(128, round(GRAPH_SECONDS / seconds)))


def replay_microseconds(
    calls: Sequence[Callable[[], object]],
    *,
    seconds: float = 0.2,
    device: torch.device | str | None = None,
) -> float:
    """Return the device's microseconds per call: all calls in one CUDA graph, replayed.

    Each call is to have hidden states and routing of its own, and weights that are not in L2 any
    more (50 to 60 MB on an H200): a layer at 8 bits reads 38 MB for one token of Qwen3-30B-A3B's,
    so let calls in turn use two layers' weights (`LayerWeights.clone`), and draw as many routings
    as `num_calls` says. What calls return is dropped, and its memory is used again.

    Args:
        calls: every one is run once before, which compiles its kernels, and must then be fit for
            capture: no synchronization.
        seconds: to replay for, after a quarter of that as warm-up; at least 5 replays are timed.
        device: a CUDA device (the present one if None). On ``"cpu"``, and where there is no GPU,
            `eager_microseconds` does its best: what runs is tested so, its times mean nothing.

    Returns:
        the median over replays, divided by the number of calls.

    Raises:
        ValueError: no calls.
    """
    on = _device(device)
    if on.type != "cuda":
        return eager_microseconds(calls, seconds=seconds, device=on)
    _check(calls)
    with torch.cuda.device(on):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return _median(graph.replay, seconds, on) / len(calls)


def eager_microseconds(
    calls: Sequence[Callable[[], object]],
    *,
    seconds: float = 0.2,
    device: torch.device | str | None = None,
) -> float:
    """Return microseconds per call of calls launched one by one, waiting only after the last.

    For what no CUDA graph can hold, because it reads device values; and on a CPU.

    Args, Returns, Raises: as `replay_microseconds`.
    """
    _check(calls)

    def every() -> None:
        for call in calls:
            call()

    every()
    return _median(every, seconds, _device(device)) / len(calls)


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check(calls: Sequence[Callable[[], object]]) -> None:
    if not calls:
        raise ValueError("no calls to time")


def _median(function: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Microseconds of ``function``."""
    if device.type == "cpu":
        times: list[float] = []
        until = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < until:
            start = time.perf_counter()
            function()
            times.append(1e6 * (time.perf_counter() - start))
        return float(torch.tensor(times, dtype=torch.float64).median())
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    runs = 0
    while runs < 2 or time.perf_counter() - start < seconds / 4:  # clocks rise from idle
        function()
        torch.cuda.synchronize(device)
        runs += 1
    each = (time.perf_counter() - start) / runs
    repeats = max(5, min(1000, round(seconds / each)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize(device)
    elapsed = [1e3 * a.elapsed_time(b) for a, b in pairwise(events)]
    return float(torch.tensor(elapsed, dtype=torch.float64).median())
