"""What others compute a layer with: torch's grouped products, transformers, vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
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
        compiles: its kernels are compiled when they are first called.
    """

    weights: str
    prepare: Prepare
    whole_layer: bool = True
    graph: bool = True
    gathers: bool = False
    compiles: bool = False

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
        from vllm.model_executor.layers.fused_moe import config as configs
        from vllm.model_executor.layers.fused_moe import fused_experts

        vllm_config()
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
            return fused_experts(
                one.hidden_states,
                layers[i].gate_up_proj,
                layers[i].down_proj,
                one.topk_weights,
                ids,
                **quantized[i],
            )

        return _with_int32_ids(call, len(layers), inputs)

    return prepare


def vllm_marlin(
    shape: LayerShape, layers: Sequence[LayerWeights], inputs: Sequence[Input]
) -> Calls:
    """vLLM's ``fused_marlin_moe``: CUDA, 8-bit weights in an order of their own, 16-bit rows."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_moe_permute_scales
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp8 import (
        fp8_fused_exponent_bias_into_scales,
    )
    from vllm.scalar_type import scalar_types

    vllm_config()
    fp8 = layers[0].gate_up_proj.dtype == torch.float8_e4m3fn
    kind = scalar_types.float8_e4m3fn if fp8 else scalar_types.uint8b128

    def repacked(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        out_features, in_features = weight.shape[1:]
        packed = torch.stack(
            [
                ops.gptq_marlin_repack(
                    four_in_one(one), no_order, in_features, out_features, num_bits=8
                )
                for one in weight
            ]
        )
        assert scale is not None
        scales = marlin_moe_permute_scales(
            scale.to(torch.bfloat16).unsqueeze(1), in_features, out_features, group_size=-1
        )
        return packed, fp8_fused_exponent_bias_into_scales(scales) if fp8 else scales

    no_order = torch.empty(0, dtype=torch.int32, device=layers[0].gate_up_proj.device)
    weights = [
        (
            *repacked(layer.gate_up_proj, layer.gate_up_proj_scale),
            *repacked(layer.down_proj, layer.down_proj_scale),
        )
        for layer in layers
    ]

    def call(i: int, one: Input, ids: Tensor) -> Tensor:
        up, up_scale, down, down_scale = weights[i]
        output = torch.empty_like(one.hidden_states)
        fused_marlin_moe(
            one.hidden_states,
            up,
            down,
            bias1=None,
            bias2=None,
            w1_scale=up_scale,
            w2_scale=down_scale,
            topk_weights=one.topk_weights,
            topk_ids=ids,
            quant_type_id=kind.id,
            moe_sum=lambda rows, summed, *_: ops.moe_sum(rows, summed),
            output=output,
        )
        return output

    return _with_int32_ids(call, len(layers), inputs)


def four_in_one(weight: Tensor) -> Tensor:
    """Pack weights as GPTQ does, which Marlin's kernel reorders.

    Args:
        weight: (out_features, in_features) int8 or float8_e4m3fn.

    Returns:
        (in_features / 4, out_features) int32: four neighbours along K, the first one lowest; int8
        as the byte that is larger by 128.
    """
    bits = weight.view(torch.uint8)
    if weight.dtype == torch.int8:
        bits = bits ^ 128
    return bits.contiguous().view(torch.int32).T.contiguous()


def vllm_cutlass(
    shape: LayerShape, layers: Sequence[LayerWeights], inputs: Sequence[Input]
) -> Calls:
    """vLLM's ``run_cutlass_moe_fp8``: FP8 rows, each with a scale, and a scale for each channel."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import run_cutlass_moe_fp8
    from vllm.model_executor.layers.fused_moe.moe_permute_unpermute import MoEPermuteScratch

    vllm_config()
    num_pairs, device = inputs[0].topk_ids.numel(), inputs[0].topk_ids.device
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    scratch = MoEPermuteScratch(
        max_num_tokens=len(inputs[0].topk_ids),
        topk=shape.top_k,
        num_experts=shape.num_experts,
        num_local_experts=shape.num_experts,
        device=device,
    )
    of_hidden, of_intermediate, of_both = (
        torch.full((shape.num_experts,), size, dtype=torch.int64, device=device)
        for size in (hidden, intermediate, 2 * intermediate)
    )
    scales = []
    for layer in layers:
        up, down = layer.gate_up_proj_scale, layer.down_proj_scale
        assert up is not None and down is not None
        scales.append((up.unsqueeze(-1), down.unsqueeze(-1)))

    def call(i: int, one: Input, ids: Tensor) -> Tensor:
        x, x_scale = ops.scaled_fp8_quant(one.hidden_states, use_per_token_if_dynamic=True)
        output = torch.empty_like(one.hidden_states)
        run_cutlass_moe_fp8(
            output,
            x,
            layers[i].gate_up_proj,
            layers[i].down_proj,
            ids,
            MoEActivation.SILU,
            shape.num_experts,
            expert_map=None,
            w1_scale=scales[i][0],
            w2_scale=scales[i][1],
            a1q_scale=x_scale,
            a2_scale=None,
            ab_strides1=of_hidden,
            ab_strides2=of_intermediate,
            c_strides1=of_both,
            c_strides2=of_hidden,
            workspace13=output.new_empty(num_pairs, max(2 * intermediate, hidden)),
            workspace2=output.new_empty(num_pairs, max(intermediate, hidden)),
            expert_num_tokens=None,
            out_dtype=output.dtype,
            per_act_token=True,
            per_out_ch=True,
            use_batched_format=False,
            topk_weights=one.topk_weights,
            permute_scratch=scratch,
        )
        return output

    return _with_int32_ids(call, len(layers), inputs)


@cache
def vllm_config() -> Any:
    """Make vLLM's default configuration this process's: its operators may ask for one.

    Returns:
        what would undo it, were it not kept here.
    """
    from vllm.config import VllmConfig, set_current_vllm_config

    entered = set_current_vllm_config(VllmConfig())
    entered.__enter__()
    return entered


def _with_int32_ids(
    call: Callable[[int, Input, Tensor], Tensor], num_layers: int, inputs: Sequence[Input]
) -> Calls:
    """One call for each input, with the layers in turn and ids as vLLM's kernels take them."""
    calls: Calls = []
    for i, one in enumerate(inputs):
        args = (i % num_layers, one, one.topk_ids.to(torch.int32))
        calls.append(lambda args=args: call(*args))
    return calls


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
    fp8 = {**per_token, "per_out_ch_quant": True}
    int8 = {**per_token, "a1_scale": None, "a2_scale": None}
    return found | {
        f"vLLM {name}": Peer(weights, prepare, compiles=name.startswith("Triton"))
        for name, weights, prepare in (
            ("Triton bf16", "bf16", vllm_experts(None)),
            ("Triton int8 W8A16", "int8", vllm_experts("int8_w8a16_moe_quant_config")),
            ("Triton int8 W8A8", "int8", vllm_experts("int8_w8a8_moe_quant_config", **int8)),
            ("Triton fp8 W8A8", "fp8", vllm_experts("fp8_w8a8_moe_quant_config", **fp8)),
            ("Marlin int8 W8A16", "int8", vllm_marlin),
            ("Marlin fp8 W8A16", "fp8", vllm_marlin),
            ("CUTLASS fp8 W8A8", "fp8", vllm_cutlass),
        )
    }


def _sorted_rows(shape: LayerShape, one: Input) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the two products, one row for each pair, and where each expert's rows end."""
    routing = ExpertRouting.from_topk_ids(one.topk_ids, shape.num_experts)
    x = one.hidden_states[routing.sorted_token_ids]
    hidden = torch.randn(len(x), shape.intermediate_size, device=x.device).to(x.dtype)
    return x, hidden, routing.expert_offsets[1:].to(torch.int32).clone()
