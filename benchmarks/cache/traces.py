"""The routing that is replayed: three traces of the benchmark's own, or one that was recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.model import Shape
from benchmarks.routing import published
from qmoe.sizes import format_size
from qmoe.traces.drift import drifting_trace
from qmoe.traces.trace import NONE, RoutingTrace, synthetic_trace, tile_trace

RECORDED = Path(__file__).parents[1] / "data" / "tiny_moe_routing.safetensors"
ROWS = 16  # an intermediate size is a multiple of them


def own_traces(shape: Shape, num_tokens: int) -> dict[str, RoutingTrace]:
    """By name: one that hits as often as Qwen3-30B-A3B, and two that are harder."""
    size = {"page_bytes": shape.page_bytes}
    recorded = RoutingTrace.load(RECORDED)
    return {
        "fitted": fitted_trace(shape, num_tokens),
        "synthetic": synthetic_trace(num_tokens, *shape.routing, **size),
        "recorded": tile_trace(recorded, *shape.routing, num_tokens=num_tokens, **size),
    }


def fitted_trace(shape: Shape, num_tokens: int) -> RoutingTrace:
    """One that hits as often as Qwen3-30B-A3B."""
    drift = published.fitted(published.QWEN3_30B_A3B)
    return drifting_trace(num_tokens, *shape.routing, drift, page_bytes=shape.page_bytes)


def read_trace(path: Path, num_tokens: int) -> RoutingTrace:
    """The last tokens of what ``qmoe generate --record-routing`` wrote: prompts come first in it.

    Raises:
        ValueError: no such file, no trace, too short a one, or one in which a token has fewer
            experts than others.
    """
    trace = RoutingTrace.load(path)
    if trace.num_tokens < num_tokens:
        raise ValueError(
            f"{path}: {trace.num_tokens} tokens, and --warmup and --tokens ask for {num_tokens}"
        )
    last = trace.topk_ids[-num_tokens:]
    if bool((last == NONE).any()):
        raise ValueError(
            f"{path}: some tokens have fewer than {trace.top_k} experts with weights in a layer; "
            f"in this benchmark's model all have {trace.top_k}"
        )
    return replace(trace, topk_ids=last)


def shape_of(trace: RoutingTrace, shape: Shape, smallest: float, device: torch.device) -> Shape:
    """The benchmark's model with the layers, the experts and the pages that a trace is of.

    Args:
        trace: what is to be replayed.
        shape: everything else.
        smallest: share of the experts that the smallest cache holds.
        device: where all experts have to fit, to be compared with.

    Raises:
        ValueError: a model that cannot be built so, or that does not fit.
    """
    layers = f"{trace.num_layers} layers of {trace.num_experts} experts, top-{trace.top_k}"
    sizes = sorted(set(trace.page_bytes))
    intermediate_size, rest = divmod(sizes[0], 3 * shape.hidden_size)
    if len(sizes) > 1 or rest or not intermediate_size or intermediate_size % ROWS:
        said = " to ".join(format_size(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
        raise ValueError(
            f"pages of {said}: this benchmark takes pages of one size, a multiple of "
            f"{3 * shape.hidden_size * ROWS} bytes"
        )
    if int(smallest * trace.num_pages) < trace.top_k:
        raise ValueError(
            f"{layers}: {smallest:.1%} of {trace.num_pages} experts are fewer than a token needs"
        )
    needed = trace.num_pages * sizes[0]
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        if needed > there:
            raise ValueError(
                f"{layers} take {format_size(needed)}, and the GPU, where all of them are for "
                f"comparison, has {format_size(there)}"
            )
    return replace(
        shape,
        num_hidden_layers=trace.num_layers,
        num_experts=trace.num_experts,
        num_experts_per_tok=trace.top_k,
        moe_intermediate_size=intermediate_size,
    )
