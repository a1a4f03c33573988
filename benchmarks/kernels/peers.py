"""What others compute a layer with: torch's grouped products, transformers, vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels.layers import Input
from qmoe_kernels import quantize
from qmoe_kernels.routing import ExpertRouting
from qmoe_kernels.tiles import LayerShape
from qmoe_kernels.timing import LayerWeights, expert_elements

Calls = list[Callable[[], Tensor]]
Prepare = Callable[[LayerShape, Sequence[LayerWeights], Sequence[Input]], Calls]

GATHERED_BYTES = 10e9  # batched_mm copies the weights of every pair
PEER_ERROR = 0.1  # of a layer, with 8-bit activations too: enough to see a wrong layout


@dataclass(frozen=True)
class Peer:
    """One way to compute a layer.

    Attributes:
        weights: that it takes.
        prepare: gives a call for each input; inputs are brought to its form before.
        whole_layer: False: the two products alone, without routing, activation and sum.
        graph: fits into a CUDA graph.
        gathers: copies the weights of every pair.
    """

    weights: str
    prepare: Prepare
    whole_layer: bool = True
    graph: bool = True
    gathers: bool = False

    def reason_to_skip(self, shape: LayerShape, num_tokens: int) -> str | None:
        """Say why this takes too long or too much memory."""
        nbytes = num_tokens * shape.top_k * 2 * expert_elements(shape)
        if self.gathers and nbytes > GATHERED_BYTES:
            return f"it would copy {nbytes / 1e9:.0f} GB of weights"
        return None


def grouped_mm(shape: LayerShape, layers: Sequence[LayerWeights], inputs: Sequence[Input]) -> Calls:
    """``torch._grouped_mm`` in bf16, rows sorted beforehand."""

    def call(layer: LayerWeights, x: Tensor, hidden: Tensor, ends: Tensor) -> Tensor:
        torch._grouped_mm(x, layer.gate_up_proj.transpose(-2, -1), offs=ends)
        return torch._grouped_mm(hidden, layer.down_proj.transpose(-2, -1), offs=ends)

    calls: Calls = []
    for i, one in enumerate(inputs):
        args = (layers[i % len(layers)], *_sorted_rows(shape, one))
        calls.append(lambda args=args: call(*args))
    return calls


def scaled_grouped_mm(
    shape: LayerShape, layers: Sequence[LayerWeights], inputs: Sequence[Input]
) -> Calls:
    """``torch._scaled_grouped_mm`` in FP8, rows sorted and quantized beforehand."""

    def product(x: Any, weight: Tensor, scale: Tensor | None, ends: Tensor) -> Tensor:
        return torch._scaled_grouped_mm(
            x[0],
            weight.transpose(-2, -1),
            x[1],
            scale,
            offs=ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def call(layer: LayerWeights, x: Any, hidden: Any, ends: Tensor) -> Tensor:
        product(x, layer.gate_up_proj, layer.gate_up_proj_scale, ends)
        return product(hidden, layer.down_proj, layer.down_proj_scale, ends)

    calls: Calls = []
    for i, one in enumerate(inputs):
        x, hidden, ends = _sorted_rows(shape, one)
        args = (layers[i % len(layers)], quantize(x, "fp8"), quantize(hidden, "fp8"), ends)
        calls.append(lambda args=args: call(*args))
    return calls


def transformers_experts(implementation: str) -> Prepare:
    """Qwen3-MoE's experts module, by one of the implementations of transformers."""

    def prepare(
        shape: LayerShape, layers: Sequence[LayerWeights], inputs: Sequence[Input]
    ) -> Calls:
        modules = [experts_module(shape, layer, implementation) for layer in layers]

        @torch.no_grad()
        def call(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return module(x, ids, weights)

        calls: Calls = []
        for i, one in enumerate(inputs):
            weights = one.topk_weights.to(one.hidden_states.dtype)  # as the model's router does
            args = (modules[i % len(modules)], one.hidden_states, one.topk_ids, weights)
            calls.append(lambda args=args: call(*args))
        return calls

    return prepare


def experts_module(shape: LayerShape, layer: LayerWeights, implementation: str) -> nn.Module:
    """Give weights to a ``Qwen3MoeExperts``."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = nn.Parameter(layer.gate_up_proj, requires_grad=False)
    module.down_proj = nn.Parameter(layer.down_proj, requires_grad=False)
    return module


def vllm_experts(config: str | None, **arguments: Any) -> Prepare:
    """vLLM's ``fused_experts``: Triton, with the tiles that it has for the GPU.

    Args:
        config: of ``vllm.model_executor.layers.fused_moe.config``, the function that makes the
            quantization's; None for bf16.
        arguments: that it takes beside the scales.
    """

    def prepare(
        shape: LayerShape, layers: Sequence[LayerWeights], inputs: Sequence[Input]
    ) -> Calls:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.fused_moe import config as configs
        from vllm.model_executor.layers.fused_moe import fused_experts

        quantized: list[dict[str, Any]] = []
        for layer in layers:
            if config is None:
                quantized.append({})
                continue
            up, down = layer.gate_up_proj_scale, layer.down_proj_scale
            assert up is not None and down is not None
            scales = {"w1_scale": up.unsqueeze(-1), "w2_scale": down.unsqueeze(-1)}
            made = getattr(configs, config)(**scales, **arguments)
            quantized.append({"quant_config": made})

        def call(i: int, one: Input, ids: Tensor) -> Tensor:
            layer = layers[i]
            with set_current_vllm_config(VllmConfig()):
                return fused_experts(
                    one.hidden_states,
                    layer.gate_up_proj,
                    layer.down_proj,
                    one.topk_weights,
                    ids,
                    **quantized[i],
                )

        calls: Calls = []
        for i, one in enumerate(inputs):
            args = (i % len(layers), one, one.topk_ids.to(torch.int32))
            calls.append(lambda args=args: call(*args))
        return calls

    return prepare


def peers() -> dict[str, Peer]:
    """All that can be imported, by name."""
    found = {
        "torch grouped_mm bf16": Peer("bf16", grouped_mm, whole_layer=False),
        "torch scaled_grouped_mm fp8": Peer("fp8", scaled_grouped_mm, whole_layer=False),
        "transformers eager": Peer("bf16", transformers_experts("eager"), graph=False),
        "transformers batched_mm": Peer("bf16", transformers_experts("batched_mm"), gathers=True),
        "transformers grouped_mm": Peer("bf16", transformers_experts("grouped_mm")),
    }
    try:
        import vllm  # noqa: F401
    except ImportError:
        return found
    per_token = {"per_act_token_quant": True}
    zero_points: dict[str, Any] = {"w1_zp": None, "w2_zp": None}
    fp8 = {**per_token, "per_out_ch_quant": True}
    int8 = {**per_token, "a1_scale": None, "a2_scale": None}
    return found | {
        "vLLM Triton bf16": Peer("bf16", vllm_experts(None)),
        "vLLM Triton int8 W8A16": Peer(
            "int8", vllm_experts("int8_w8a16_moe_quant_config", **zero_points)
        ),
        "vLLM Triton int8 W8A8": Peer("int8", vllm_experts("int8_w8a8_moe_quant_config", **int8)),
        "vLLM Triton fp8 W8A8": Peer("fp8", vllm_experts("fp8_w8a8_moe_quant_config", **fp8)),
    }


def _sorted_rows(shape: LayerShape, one: Input) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the two products, one row for each pair, and where each expert's rows end."""
    routing = ExpertRouting.from_topk_ids(one.topk_ids, shape.num_experts)
    x = one.hidden_states[routing.sorted_token_ids]
    hidden = torch.randn(len(x), shape.intermediate_size, device=x.device).to(x.dtype)
    return x, hidden, routing.expert_offsets[1:].to(torch.int32).clone()
