"""Patch a loaded model in place: its experts go to 8 bit, layer by layer, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qmoe.experts.layout import find_experts
from qmoe.experts.quantized import layer_pages
from qmoe.loading.pages import choose_device, page_quantized
from qmoe.loading.quantizer import (
    QmoeConfig,
    QmoeQuantizer,
    quantize_experts,
    quantized_modules,
    restore_experts,
)
from qmoe.paging.model import budget_for
from qmoe.paging.options import PagingOptions
from qmoe_kernels.fused_moe import check_activations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qmoe_kernels.quantization import WeightFormat


def patch(
    model: PreTrainedModel,
    weights: WeightFormat = "int8",
    *,
    activations: str = "auto",
    hbm_budget: str | int | float | None = None,
    device: str | torch.device = "auto",
    context: int | None = None,
    batch_size: int = 1,
) -> PreTrainedModel:
    """Quantize the experts of a loaded model in place.

    Each layer's 16-bit weights are freed as soon as that layer is quantized, so the model never
    takes more memory than before plus one layer. Everything else of the model stays as it is; it
    can be saved with ``save_pretrained`` and loaded again after ``import qmoe``.

    Args:
        model: a transformers model in bf16, fp16 or fp32, on any device.
        weights: ``"int8"`` or ``"fp8"`` (e4m3fn), one scale per output channel.
        activations: what the experts' products take, see :func:`qmoe_kernels.fused_moe`.
        hbm_budget: with a model on the CPU: bring it to ``device`` and page its experts, see
            :func:`qmoe.load`.
        device: where to, with a budget: ``"auto"`` (the GPU where there is one) or a torch device.
        context: see :func:`qmoe.load`.
        batch_size: see :func:`qmoe.load`.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: the model is patched already, is quantized otherwise, has no experts, holds NaN
            or infinity in an expert's weight, or the budget cannot work. The model is then
            unchanged. Too little host memory, when the experts have been quantized: they then
            stay where they are, on the CPU.

    Example:
        >>> import qmoe
        >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
        >>> config = Qwen3MoeConfig(vocab_size=64, hidden_size=32, moe_intermediate_size=16,
        ...     num_hidden_layers=1, num_experts=4, num_experts_per_tok=2, num_attention_heads=2,
        ...     num_key_value_heads=1, head_dim=16)
        >>> model = qmoe.patch(Qwen3MoeForCausalLM(config), weights="fp8")
        >>> model.model.layers[0].mlp.experts
        QuantizedExperts(4 experts, hidden_size=32, intermediate_size=16, weights=fp8)
    """
    config = QmoeConfig(weights, activations=activations)
    check_activations(activations, weights)
    if quantized_modules(model):
        raise ValueError(
            f"{type(model).__name__} is patched already; call qmoe.unpatch(model) first"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        method = model.hf_quantizer.quantization_config.quant_method
        raise ValueError(
            f"{type(model).__name__} is quantized already ({getattr(method, 'value', method)}); "
            "qmoe.patch takes a bf16, fp16 or fp32 model"
        )
    layouts = find_experts(model)
    if hbm_budget is None:
        quantize_experts(model, layouts, weights, activations)
        QmoeQuantizer(config, pre_quantized=True).mark(model)
        return model
    on = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if on != {"cpu"}:
        raise ValueError(
            f"{type(model).__name__} is on {', '.join(sorted(on))}; hbm_budget takes a model on "
            "the CPU and brings it to the device itself"
        )
    target = choose_device(device)
    options = PagingOptions(hbm_budget, context, batch_size)
    layers = [layer_pages(name, layout, weights) for name, layout in layouts.items()]
    budget = budget_for(model, layers, options, target)
    quantize_experts(model, layouts, weights, activations)
    QmoeQuantizer(config, pre_quantized=True).mark(model)
    page_quantized(model, budget, target)
    return model


def unpatch(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Give a patched model its own experts modules back, with the dequantized weights.

    The weights are those that the 8-bit form stands for: what quantizing lost stays lost.

    Args:
        model: a model that :func:`patch` or ``from_pretrained`` gave quantized experts.
        dtype: of the restored weights; by default that of the rest of the model.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: the model is not patched, or its experts are offloaded.
    """
    restore_experts(model, dtype)
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer.remove_quantization_config(model)
    return model
