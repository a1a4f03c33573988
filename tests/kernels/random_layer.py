"""Random MoE layers, and how close to the fp64 reference a result has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch

from qmoe_kernels import Activation, fused_moe, quantize
from qmoe_kernels.experts import Experts, Projection
from qmoe_kernels.quantization import STORAGE_DTYPE
from qmoe_kernels.reference import fused_moe_reference
from qmoe_kernels.tiles import LayerTiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# The interpreter multiplies bf16 tiles wrongly.
TRITON_DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")

# Relative Frobenius error. The reference reads the same quantized weights, so what remains is the
# rounding of activations: fp32 sums of some thousand products; about four roundings to 11 (8) bits.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@dataclass
class Layer:
    """One layer, its input and its routing: the arguments of `fused_moe`."""

    hidden_states: torch.Tensor
    gate_up_proj: torch.Tensor
    gate_up_proj_scale: torch.Tensor | None
    down_proj: torch.Tensor
    down_proj_scale: torch.Tensor | None
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor | None
    gate_up_proj_bias: torch.Tensor | None = None
    down_proj_bias: torch.Tensor | None = None
    expert_to_slot: torch.Tensor | None = None
    activation: Activation | Callable[[torch.Tensor], torch.Tensor] = Activation()  # noqa: RUF009

    @property
    def num_experts(self) -> int:
        per_expert = (self.gate_up_proj_scale, self.expert_to_slot, self.gate_up_proj)
        return next(t.shape[0] for t in per_expert if t is not None)

    def to(self, device: torch.device | str) -> Layer:
        tensors = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **tensors)

    def tokens(self, some: slice | torch.Tensor) -> Layer:
        """Return the layer with some of its tokens."""
        return replace(
            self,
            hidden_states=self.hidden_states[some],
            topk_ids=self.topk_ids[some],
            topk_weights=None if self.topk_weights is None else self.topk_weights[some],
        )

    def quantized(self, weights: str) -> Layer:
        """Return the layer with its weights, which are floats, in 8 bits."""
        gate_up_proj, gate_up_proj_scale = quantize(self.gate_up_proj, weights)
        down_proj, down_proj_scale = quantize(self.down_proj, weights)
        return replace(
            self,
            gate_up_proj=gate_up_proj,
            gate_up_proj_scale=gate_up_proj_scale,
            down_proj=down_proj,
            down_proj_scale=down_proj_scale,
        )

    def arguments(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def experts(self) -> Experts:
        assert isinstance(self.activation, Activation)
        slots = self.expert_to_slot
        return Experts(
            Projection(self.gate_up_proj, self.gate_up_proj_scale, self.gate_up_proj_bias, slots),
            Projection(self.down_proj, self.down_proj_scale, self.down_proj_bias, slots),
            self.activation,
        )

    def fused_moe(self, *, activations: str = "bf16") -> torch.Tensor:
        skip_without_fp8(self.hidden_states.device, activations)
        return fused_moe(**self.arguments(), activations=activations)

    def triton(
        self,
        *,
        activations: str | None = None,
        two_level_sums: bool = False,
        tiles: LayerTiles | None = None,
    ) -> torch.Tensor:
        """Launch the Triton kernels, in the interpreter where there is no GPU."""
        from qmoe_kernels.layer import fused_moe_triton

        skip_without_fp8(DEVICE, activations)
        layer = self.to(DEVICE)
        return fused_moe_triton(
            layer.hidden_states,
            layer.experts(),
            layer.topk_ids,
            layer.topk_weights,
            activations=None if activations is None else STORAGE_DTYPE[activations],
            two_level_sums=two_level_sums,
            tiles=tiles,
        )

    def reference(self, *, activations: str | None = None) -> torch.Tensor:
        return fused_moe_reference(**self.to("cpu").arguments(), activations=activations)


def random_layer(
    *,
    num_tokens: int = 7,
    num_experts: int = 6,
    top_k: int = 2,
    hidden_size: int = 40,
    intermediate_size: int = 24,
    weights: str | None = "int8",
    dtype: torch.dtype = torch.float32,
    activation: Activation | Callable[[torch.Tensor], torch.Tensor] = Activation(),  # noqa: B008
    bias: bool = False,
    seed: int = 0,
) -> Layer:
    """Draw a layer; ``weights`` None keeps them in ``dtype``. Ids of a token differ."""
    torch.manual_seed(seed)
    gated = not isinstance(activation, Activation) or activation.gated
    rows = intermediate_size * (2 if gated else 1)
    gate_up_proj = torch.randn(num_experts, rows, hidden_size) * hidden_size**-0.5
    down_proj = torch.randn(num_experts, hidden_size, intermediate_size) * intermediate_size**-0.5
    topk_weights, topk_ids = torch.rand(num_tokens, num_experts).topk(top_k)
    layer = Layer(
        torch.randn(num_tokens, hidden_size).to(dtype),
        gate_up_proj if weights else gate_up_proj.to(dtype),
        None,
        down_proj if weights else down_proj.to(dtype),
        None,
        topk_ids,
        topk_weights,
        gate_up_proj_bias=torch.randn(num_experts, rows).to(dtype) if bias else None,
        down_proj_bias=torch.randn(num_experts, hidden_size).to(dtype) if bias else None,
        activation=activation,
    )
    return layer.quantized(weights) if weights else layer


def skip_without_fp8(device: torch.device, activations: str | None) -> None:
    """Skip a test of FP8 products on a GPU that has none."""
    on_gpu = activations == "fp8" and device.type == "cuda"
    if on_gpu and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("needs compute capability 8.9")


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare with the reference; a NaN in ``actual`` fails."""
    assert actual.shape == expected.shape
    error = relative_error(actual, expected)
    assert error < TOLERANCE[actual.dtype], f"relative error {error:.2e}"


def assert_close_quantized(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare fp32 results of products whose rows were quantized; on a CPU as `assert_close`.

    A GPU divides with another last bit, and a number half-way between two of the format's may then
    become the other one. Wrong products are off by more.
    """
    if actual.device.type == "cpu":
        return assert_close(actual, expected)
    assert actual.shape == expected.shape
    error = relative_error(actual, expected)
    assert error < 1e-2, f"relative error {error:.2e}"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to ``expected``, Frobenius, in fp64."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
