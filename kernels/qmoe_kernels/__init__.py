"""Quantized Mixture-of-Experts layers: formats, reference and Triton kernels."""

from qmoe_kernels import gradients as _gradients  # noqa: F401 (operators learn theirs there)
from qmoe_kernels.activations import Activation
from qmoe_kernels.fused_moe import (
    fused_moe,
    grouped_linear,
    quantize_activations,
    weighted_sum,
)
from qmoe_kernels.quantization import (
    QuantizedRows,
    dequantize,
    quantize,
    relative_error,
)
from qmoe_kernels.routing import ExpertRouting

__all__ = [
    "Activation",
    "ExpertRouting",
    "QuantizedRows",
    "dequantize",
    "fused_moe",
    "grouped_linear",
    "quantize",
    "quantize_activations",
    "relative_error",
    "weighted_sum",
]
