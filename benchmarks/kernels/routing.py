"""Section routing: sorting pairs by expert, and routers, by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels.layers import draw_inputs
from benchmarks.kernels.sections import Bench
from qmoe_kernels.router import RouterSpec, select_experts
from qmoe_kernels.routing import ExpertRouting
from qmoe_kernels.tiles import LayerShape

NUM_CALLS = 32
BLOCK_M = 16  # rows of a tile


def run_routing(bench: Bench) -> None:
    """Microseconds in a CUDA graph.

    ``sort``: `ExpertRouting.from_topk_ids`; ``tiles``: the same, with a layer's tiles. ``select``:
    `select_experts` from logits. ``router``: the router's product and `select_experts`;
    ``transformers``: its router, product included.
    """
    bench.results.begin("routing")
    for name, shape in bench.shapes.items():
        router, spec = make_router(name, shape, bench.device)
        for num_tokens in bench.tokens:
            count = NUM_CALLS if bench.device.type == "cuda" else 2
            inputs = draw_inputs(shape, num_tokens, bench.device, count=count)
            found = calls(router, spec, shape.num_experts, inputs)
            cell: dict[str, Any] = {"shape": name, "tokens": num_tokens}
            cell["router_name"] = type(router).__name__
            error = disagreement(found["router"][0](), found["transformers"][0]())
            cell["largest_difference"] = round(error, 5)
            if not error < 0.02:  # transformers rounds weights to bf16
                raise AssertionError(f"select_experts and {cell['router_name']} differ by {error}")
            for what, made in found.items():
                cell[f"{what}_us"] = bench.replayed(made)
            bench.results.add("cells", cell)


def make_router(name: str, shape: LayerShape, device: torch.device) -> tuple[nn.Module, RouterSpec]:
    """Return transformers' router with random weights, and ours that does the same.

    DeepSeek-V3's for ``"dsv3"`` (sigmoid, groups), else Qwen3-MoE's (softmax).
    """
    from transformers import DeepseekV3Config, Qwen3MoeConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    sizes = {"hidden_size": shape.hidden_size, "num_experts_per_tok": shape.top_k}
    if name == "dsv3":
        config = DeepseekV3Config(n_routed_experts=shape.num_experts, **sizes)
        router: nn.Module = DeepseekV3TopkRouter(config)
        spec = RouterSpec(
            shape.top_k,
            "sigmoid",
            scaling_factor=config.routed_scaling_factor,
            num_groups=config.n_group,
            topk_groups=config.topk_group,
            group_score="top2",
        )
    else:
        config = Qwen3MoeConfig(num_experts=shape.num_experts, norm_topk_prob=True, **sizes)
        router, spec = Qwen3MoeTopKRouter(config), RouterSpec(shape.top_k)
    router = router.to(device=device, dtype=torch.bfloat16).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(3)
    weight: Any = router.weight
    weight.normal_(std=shape.hidden_size**-0.5, generator=generator)
    return router, spec


def calls(
    router: Any, spec: RouterSpec, num_experts: int, inputs: Any
) -> dict[str, list[Callable[[], Any]]]:
    """One call of each kind for each input; the last two return ids and weights."""
    # As transformers does: DeepSeek-V3's product is in fp32.
    dtype = torch.float32 if spec.scoring == "sigmoid" else torch.bfloat16
    bias = getattr(router, "e_score_correction_bias", None)

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        return select_experts(logits_of(x), spec, bias)

    def logits_of(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.to(dtype), router.weight.to(dtype))

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        _, weights, ids = router(x)
        return ids, weights

    found: dict[str, list[Callable[[], Any]]] = {}
    for one in inputs:
        x, logits = one.hidden_states, logits_of(one.hidden_states)
        for what, call in (
            ("sort", lambda ids=one.topk_ids: ExpertRouting.from_topk_ids(ids, num_experts)),
            (
                "tiles",
                lambda ids=one.topk_ids: ExpertRouting.from_topk_ids(
                    ids, num_experts, block_m=BLOCK_M
                ),
            ),
            ("select", lambda logits=logits: select_experts(logits, spec, bias)),
            ("router", lambda x=x: ours(x)),
            ("transformers", lambda x=x: theirs(x)),
        ):
            found.setdefault(what, []).append(call)
    return found


def disagreement(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Largest difference of weights, best first: which of two equal experts is free."""
    a, b = (weights.float().sort(-1).values for _, weights in (one, other))
    return float((a - b).abs().max() / b.abs().max())
