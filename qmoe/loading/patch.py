"""Patch a loaded model in place: its experts go to 8 bit, layer by layer, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qmoe.experts.guard import guard_of
from qmoe.experts.quantized import layer_pages, quantized_modules
from qmoe.loading.config import QmoeConfig
from qmoe.loading.devices import choose_device
from qmoe.loading.layers import (
    cut_off_change,
    layers_to_quantize,
    quantize_layers,
    restore_layers,
)
from qmoe.loading.pages import page_quantized
from qmoe.loading.quantizer import QmoeQuantizer
from qmoe.loading.side_by_side import lay_side_by_side
from qmoe.paging.model import budget_for
from qmoe.paging.options import paging_options
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
    batch_size: int | None = None,
    misses: str | None = None,
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
        misses: see :func:`qmoe.load`.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: the model is patched already, is quantized otherwise, has no experts, holds NaN
            or infinity in an expert's weight, has something on its experts that 8-bit ones cannot
            take over (an adapter, a forward method), or the budget cannot work. The model is then
            unchanged. Too little host memory, when the experts have been quantized: they then
            stay where they are, on the CPU.
        RuntimeError: the model is generating text.

    Out of memory or Ctrl-C midway leaves some layers quantized. Such a model refuses to run or to
    be saved; call ``patch`` again to go on where it stopped, or load the model again.

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
    options = paging_options(hbm_budget, context, batch_size, misses)
    if options is not None:
        options.check_activations(activations)
    if options is None and device != "auto":
        raise ValueError(f"device={str(device)!r} has no effect without hbm_budget; drop it")
    with guard_of(model).changing("qmoe.patch"):
        _check_not_quantized(model)
        layouts = layers_to_quantize(model, weights)
        budget = None
        if options is not None:
            _check_on_cpu(model)
            target = choose_device(device)
            layers = [layer_pages(name, layout, weights) for name, layout in layouts.items()]
            budget = budget_for(model, layers, options, target)
        change = cut_off_change(model)
        quantizer = QmoeQuantizer(config, pre_quantized=True)
        quantizer.change = change
        try:
            model.hf_quantizer = quantizer  # refuses to save until the change is finished
            quantize_layers(model, layouts, weights, activations, change)
        except BaseException:
            if not quantized_modules(model):
                vars(model).pop("hf_quantizer", None)
            raise
        quantizer.mark(model)
        change.finished = True
        if budget is not None and options is not None:
            page_quantized(model, budget, target, options)
        lay_side_by_side(model)
    return model


def _check_not_quantized(model: PreTrainedModel) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or isinstance(quantizer, QmoeQuantizer):
        return
    method = quantizer.quantization_config.quant_method
    raise ValueError(
        f"{type(model).__name__} is quantized already ({getattr(method, 'value', method)}); "
        "qmoe.patch takes a bf16, fp16 or fp32 model"
    )


def _check_on_cpu(model: PreTrainedModel) -> None:
    on = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if on != {"cpu"}:
        raise ValueError(
            f"{type(model).__name__} is on {', '.join(sorted(on))}; hbm_budget takes a model on "
            "the CPU and brings it to the device itself"
        )


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
        RuntimeError: the model is generating text.

    Cut off midway, it is to be called again, as :func:`patch` is.
    """
    return restore_layers(model, dtype)
