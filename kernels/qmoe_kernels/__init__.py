"""Quantized Mixture-of-Experts layers: formats, reference and Triton kernels."""

from qmoe_kernels import gradients as _gradients  # noqa: F401 (operators learn theirs there)
from qmoe_kernels.activations import Activation
from qmoe_kernels.fused_moe import fused_moe, grouped_linear, weighted_sum
from qmoe_kernels.quantization import (
    dequantize,
    quantize,
    relative_error,
)
from qmoe_kernels.routing import ExpertRouting

__all__ = [
    "Activation",
    "ExpertRouting",
    "dequantize",
    "fused_moe",
    "grouped_linear",
    "quantize",
    "relative_error",
    "weighted_sum",
]
