"""One MoE layer after its router: gate_up -> activation -> down -> weighted sum.

Three operators of torch, with fakes, for torch.compile and CUDA graphs:

``qmoe::fused_moe``       the layer
``qmoe::grouped_linear``  one of its two products, for a gate that is not among `Activation`'s
``qmoe::weighted_sum``    the sum over a token's experts

On the CPU they are the native loops of `cpu` for few rows of an expert and torch's matrix product
for many, and touch the weights of routed experts only; on a GPU they are the Triton kernels of
`grouped_gemm`. No result depends on the order in which threads ran, and no GPU
path reads a device value on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from qmoe_kernels import activations as _activations
from qmoe_kernels import cpu
from qmoe_kernels.activations import SWIGLU, Activation
from qmoe_kernels.experts import Experts, Projection
from qmoe_kernels.operators import operator
from qmoe_kernels.quantization import (
    FORMAT_OF,
    STORAGE_DTYPE,
    QuantizedRows,
    WeightFormat,
    quantize_rows,
    widen,
)
from qmoe_kernels.routing import ExpertRouting

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# From so many rows per expert on, products of 8-bit rows are quicker. Times of 16-bit rows over
# theirs, eight models' layers on an H200 (``benchmarks/results/kernel_tiles.json``): 1.00 to 1.05
# at 4 rows, 1.02 to 1.16 at 8 to 10 (once 0.98, at 13), 1.15 to 1.33 at 16, 1.26 to 2.1 from 64 on.
EIGHT_BIT_ROWS = 8


def fused_moe(
    hidden_states: Tensor | QuantizedRows,  # (num_tokens, hidden_size) bf16 | fp16 | fp32 | 8 bits
    gate_up_proj: Tensor,  # (num_slots, 2 * intermediate_size, hidden_size) int8 | e4m3fn | float
    gate_up_proj_scale: Tensor | None,  # (num_experts, 2 * intermediate_size) fp32
    down_proj: Tensor,  # (num_slots, hidden_size, intermediate_size) int8 | e4m3fn | float
    down_proj_scale: Tensor | None,  # (num_experts, hidden_size) fp32
    topk_ids: Tensor,  # (num_tokens, top_k) int32 | int64
    topk_weights: Tensor | None,  # (num_tokens, top_k) float
    *,
    activation: Activation | Callable[[Tensor], Tensor] = SWIGLU,
    activations: str = "auto",
    two_level_sums: bool = False,
    gate_up_proj_bias: Tensor | None = None,  # (num_experts, 2 * intermediate_size) float
    down_proj_bias: Tensor | None = None,  # (num_experts, hidden_size) float
    expert_to_slot: Tensor | None = None,  # (num_experts,) int32
) -> Tensor:
    """Run the routed experts of one layer and sum them by their weights.

    For each token ``x`` with experts ``e`` and weights ``w``:
    ``sum_k w_k * (down_proj[e_k] @ activation(gate_up_proj[e_k] @ x))``. Products accumulate in
    fp32; scales and biases are applied to the fp32 sums; the sum over ``k`` runs in fp32 in the
    order of ``topk_ids``, so that equal inputs give equal bits.

    Weights of dtype int8 or float8_e4m3fn need a scale; 16- and 32-bit weights take none and have
    the dtype of ``hidden_states``. A weight's last dimension is contiguous; its other strides are
    free.

    Args:
        hidden_states, gate_up_proj, gate_up_proj_scale, down_proj, down_proj_scale: see the
            signature. Without a gate ``gate_up_proj`` has ``intermediate_size`` rows.
        topk_ids: ids outside [0, num_experts) contribute nothing, whatever their weights are.
        topk_weights: None returns the experts' outputs one by one, zeros where an id is skipped;
            see `weighted_sum`.
        activation: an `Activation`, or a callable from rows ``(..., 2 * intermediate_size)`` to
            ``(..., intermediate_size)`` that treats each row by itself.
        activations: what the products take. ``"bf16"``: rows as they are, in the dtype of
            ``hidden_states``. ``"int8"``, ``"fp8"``: rows quantized to the weights' dtype with a
            scale each, by `quantize_rows`, before either product. ``"auto"``: 16-bit rows in 8 bits
            where that is quicker, which is from `EIGHT_BIT_ROWS` pairs per expert on, on average,
            on a GPU; all others as they are, and all where gradients are recorded. Rows that
            `quantize_activations` has quantized already go into the first product as they are, and
            the second one takes their format too; ``"auto"`` or that format are for them.
        two_level_sums: where FP8 meets FP8. Hopper's tensor cores keep some 14 bits of such sums;
            true adds up to fp32 every 64 products, which takes longer. Other products and devices
            are exact enough as they are; an ``activation`` that is a callable goes without.
        gate_up_proj_bias, down_proj_bias: added after the scale.
        expert_to_slot: where in ``gate_up_proj`` and ``down_proj`` an expert's weights are;
            scales and biases stay indexed by expert. Every routed expert must have a slot: on
            a GPU the output of one whose slot is negative is NaN.

    Returns:
        (num_tokens, hidden_size), or (num_tokens, top_k, hidden_size) without ``topk_weights``,
        in the dtype of ``hidden_states``, which `QuantizedRows` name.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or activations that the weights or
            the GPU cannot be multiplied with; on a CPU a routed expert without a slot, too.
    """
    gate_up = Projection(gate_up_proj, gate_up_proj_scale, gate_up_proj_bias, expert_to_slot)
    down = Projection(down_proj, down_proj_scale, down_proj_bias, expert_to_slot)
    rows, rows_scale, dtype = _parts(hidden_states)
    recorded = _is_recorded(rows, topk_weights)
    activations = check_layer(
        hidden_states,
        gate_up,
        down,
        topk_ids,
        topk_weights,
        activation=activation,
        activations=activations,
        recorded=recorded,
    )
    if isinstance(activation, Activation):
        return _fused_moe(
            rows,
            gate_up_proj,
            gate_up_proj_scale,
            gate_up_proj_bias,
            down_proj,
            down_proj_scale,
            down_proj_bias,
            topk_ids,
            topk_weights,
            expert_to_slot,
            *activation.fields,
            activations,
            two_level_sums,
            rows_scale,
            dtype,
        )
    up_rows = _grouped_linear(
        rows,
        gate_up_proj,
        gate_up_proj_scale,
        gate_up_proj_bias,
        topk_ids,
        expert_to_slot,
        activations,
        rows_scale,
        dtype,
    )
    hidden = activation(up_rows).to(dtype)
    if hidden.shape[-1] != down_proj.shape[-1]:
        raise ValueError(
            f"the activation returned rows of {hidden.shape[-1]}; down_proj takes "
            f"{down_proj.shape[-1]}"
        )
    rows = _grouped_linear(
        hidden,
        down_proj,
        down_proj_scale,
        down_proj_bias,
        topk_ids,
        expert_to_slot,
        activations,
        None,
        None,
    )
    if topk_weights is None:
        return rows
    return _weighted_sum(rows, _routed_weights(topk_weights, topk_ids, down.num_experts))


def grouped_linear(
    x: Tensor,  # (num_tokens, in_features) or (num_tokens, top_k, in_features) bf16 | fp16 | fp32
    weight: Tensor,  # (num_slots, out_features, in_features) int8 | e4m3fn | float
    scale: Tensor | None,  # (num_experts, out_features) fp32
    topk_ids: Tensor,  # (num_tokens, top_k) int32 | int64
    *,
    activations: str = "auto",
    bias: Tensor | None = None,  # (num_experts, out_features) float
    expert_to_slot: Tensor | None = None,  # (num_experts,) int32
) -> Tensor:
    """Return ``weight[topk_ids[t, k]] @ x[t]`` (or ``@ x[t, k]``) for every token and expert.

    ``x`` has a gradient, and so has a ``weight`` without a scale: zeros for experts without tokens.

    Args:
        x, weight, scale, topk_ids, bias, expert_to_slot: see the signature.
        activations: as `fused_moe` has it.

    Returns:
        (num_tokens, top_k, out_features) in the dtype of ``x``; zeros where an id is skipped.

    Raises:
        ValueError: as `fused_moe`.
    """
    if isinstance(x, QuantizedRows):
        raise ValueError("x: rows that are in 8 bits already are for fused_moe; give a tensor")
    _check_activations(activations, weight)
    _check_hidden_states(x, topk_ids, per_pair=True)
    if activations == "auto" and _is_recorded(x):
        activations = "bf16"
    projection = Projection(weight, scale, bias, expert_to_slot)
    _check_projection("weight", projection, x, x.shape[-1])
    arguments = (x, weight, scale, bias, topk_ids, expert_to_slot, activations)
    return _grouped_linear(*arguments, None, None)


def quantize_activations(x: Tensor, to: WeightFormat) -> QuantizedRows:
    """Quantize rows as `fused_moe` does before its first product, to the same bits.

    Args:
        x: (num_rows, in_features) bf16, fp16 or fp32.
        to: ``"int8"`` or ``"fp8"``.

    Raises:
        ValueError: an unknown format, one that the GPU does not multiply, or no rows.
    """
    if to not in STORAGE_DTYPE:
        raise ValueError(f"rows cannot be quantized to {to!r}; 'int8' and 'fp8' work")
    if x.ndim != 2 or x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"rows are {x.dtype} of shape {tuple(x.shape)}; expected bf16, fp16 or fp32 "
            "(num_rows, in_features)"
        )
    _check_device(to, x.device)
    if x.device.type != "cuda":
        return QuantizedRows(*quantize_rows(x, to), x.dtype)
    from qmoe_kernels.rows import launch_quantize_rows

    with torch.cuda.device(x.device):
        q = launch_quantize_rows(x.detach().contiguous(), STORAGE_DTYPE[to], dependent=False)
    return QuantizedRows(*q, x.dtype)


def weighted_sum(
    rows: Tensor,  # (num_tokens, top_k, hidden_size) bf16 | fp16 | fp32
    topk_weights: Tensor,  # (num_tokens, top_k) float
) -> Tensor:
    """Sum the rows of each token by its weights: in fp32, first expert to last.

    Returns:
        (num_tokens, hidden_size) in the dtype of ``rows``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if rows.ndim != 3 or rows.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"rows are {rows.dtype} of shape {tuple(rows.shape)}; "
            "expected bf16, fp16 or fp32 (num_tokens, top_k, hidden_size)"
        )
    _check_topk_weights(topk_weights, tuple(rows.shape[:2]), rows.device)
    return _weighted_sum(rows, topk_weights)


def check_activations(activations: str, weights: str | None = None) -> None:
    """Raise ValueError unless ``activations`` is one that works, with these ``weights`` if given.

    Args:
        activations: see `fused_moe`.
        weights: ``"int8"`` or ``"fp8"``.
    """
    if activations not in ("auto", "bf16", *STORAGE_DTYPE):
        raise ValueError(
            f"unknown activations {activations!r}; 'auto', 'bf16', 'int8' and 'fp8' work"
        )
    if activations in STORAGE_DTYPE and weights not in (None, activations):
        raise ValueError(
            f"activations={activations!r} with {weights} weights; 8-bit activations need weights "
            "of their own format: 'auto' and 'bf16' work with any"
        )


def _check_activations(activations: str, weight: Tensor) -> None:
    check_activations(activations, FORMAT_OF.get(weight.dtype, str(weight.dtype)))
    _check_device(activations, weight.device)


def _check_device(activations: str, device: torch.device) -> None:
    if activations == "fp8" and device.type == "cuda" and not _multiplies_fp8(device):
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"activations='fp8': {name} multiplies no FP8; 'auto' and 'bf16' work there"
        )


def _parts(hidden_states: Tensor | QuantizedRows) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """What operators take: the rows, their scales, and the dtype of what is made of them."""
    if isinstance(hidden_states, QuantizedRows):
        return hidden_states.q.contiguous(), hidden_states.scale.contiguous(), hidden_states.dtype
    return hidden_states, None, hidden_states.dtype


def _format_of_rows(rows: QuantizedRows, activations: str) -> WeightFormat:
    found = FORMAT_OF[rows.q.dtype]
    if activations not in ("auto", found):
        raise ValueError(
            f"activations={activations!r} with rows that are in 8 bits already; 'auto' and "
            f"{found!r} work"
        )
    return found


def _is_recorded(*tensors: Tensor | None) -> bool:
    """Whether somebody may ask for gradients, which are those of rows that are not quantized."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _multiplies_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


def row_format(
    activations: str,
    num_pairs: int,
    num_experts: int,
    *,
    dtype: torch.dtype,
    weights: torch.dtype,
    device: torch.device,
) -> WeightFormat | None:
    """What rows are quantized to before a product, or None.

    Args:
        activations: as `fused_moe` has it.
        num_pairs, num_experts: of the product.
        dtype, weights: of rows and of weights.
        device: of both.
    """
    if activations == "bf16":
        return None
    if activations == "auto":
        # Who takes fp32 wants its digits.
        few = num_pairs < EIGHT_BIT_ROWS * num_experts
        if device.type != "cuda" or few or dtype == torch.float32:
            return None
        found = FORMAT_OF.get(weights)
        return None if found == "fp8" and not _multiplies_fp8(device) else found
    return cast(WeightFormat, activations)


def _row_format(
    activations: str, projection: Projection, num_pairs: int, dtype: torch.dtype
) -> WeightFormat | None:
    weight, num_experts = projection.weight, projection.num_experts
    like: Any = {"dtype": dtype, "weights": weight.dtype, "device": weight.device}
    return row_format(activations, num_pairs, num_experts, **like)


# ---- operators ---------------------------------------------------------------------------------


@operator("fused_moe", "cpu")
def _fused_moe(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    gate_up_proj_scale: Tensor | None,
    gate_up_proj_bias: Tensor | None,
    down_proj: Tensor,
    down_proj_scale: Tensor | None,
    down_proj_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    expert_to_slot: Tensor | None,
    name: str,
    gated: bool,
    alpha: float,
    up_shift: float,
    limit: float | None,
    limit_after: bool,
    gate_softcap: float | None,
    up_softcap: float | None,
    activations: str,
    two_level_sums: bool,
    rows_scale: Tensor | None,  # of rows that are in 8 bits
    rows_dtype: torch.dtype | None,  # before they were; None: that of hidden_states
) -> Tensor:
    dtype = rows_dtype or hidden_states.dtype
    activation = Activation.of(
        name, gated, alpha, up_shift, limit, limit_after, gate_softcap, up_softcap
    )
    num_tokens, top_k = topk_ids.shape
    gate_up = Projection(gate_up_proj, gate_up_proj_scale, gate_up_proj_bias, expert_to_slot)
    down = Projection(down_proj, down_proj_scale, down_proj_bias, expert_to_slot)
    to = _row_format(activations, gate_up, num_tokens * top_k, dtype)
    experts = Experts(gate_up, down, activation)
    if cpu.available(gate_up_proj, down_proj):
        rows, left = _native_layer(
            hidden_states, rows_scale, experts, topk_ids, topk_weights, to, dtype
        )
        if not left and topk_weights is not None:
            return rows
        many = _with_tensors(left, topk_ids)
    else:
        rows = hidden_states.new_zeros(topk_ids.numel(), down_proj.shape[1], dtype=torch.float32)
        many = _routed_experts(topk_ids, gate_up, down)
    if many:
        up_linear, down_linear = _CPULinear(gate_up, to), _CPULinear(down, to)
    for expert, slot, pairs in many:
        x, x_scale = _rows_at(pairs // top_k, hidden_states, rows_scale)
        hidden = _activations.apply(activation, up_linear(x, expert, slot, x_scale))
        hidden = hidden.to(dtype)
        rows[pairs] = down_linear(hidden, expert, slot).to(hidden.dtype).to(rows.dtype)
    rows = rows.view(num_tokens, top_k, down_proj.shape[1])
    if topk_weights is None:
        return rows.to(dtype)
    return _weighted_sum_cpu(rows, topk_weights, topk_ids, gate_up.num_experts, dtype=dtype)


@_fused_moe.register_fake
def _(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    gate_up_proj_scale: Tensor | None,
    gate_up_proj_bias: Tensor | None,
    down_proj: Tensor,
    down_proj_scale: Tensor | None,
    down_proj_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    *rest: Any,
) -> Tensor:
    num_tokens, top_k = topk_ids.shape
    shape = (num_tokens, top_k) if topk_weights is None else (num_tokens,)
    dtype = rest[-1] or hidden_states.dtype
    return hidden_states.new_empty(*shape, down_proj.shape[1], dtype=dtype)


@operator("grouped_linear", "cpu")
def _grouped_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    topk_ids: Tensor,
    expert_to_slot: Tensor | None,
    activations: str,
    rows_scale: Tensor | None,  # as `_fused_moe` has them
    rows_dtype: torch.dtype | None,
) -> Tensor:
    num_tokens, top_k = topk_ids.shape
    pairs_per_row = top_k if x.ndim == 2 else 1
    dtype, x = rows_dtype or x.dtype, x.flatten(0, -2)
    projection = Projection(weight, scale, bias, expert_to_slot)
    to = _row_format(activations, projection, num_tokens * top_k, dtype)
    if cpu.available(weight):
        native = _native_rows(x, to, rows_scale)
        rows, left = cpu.layer(*native, topk_ids, projection, dtype=dtype)
        rows, many = rows.to(dtype), _with_tensors(left, topk_ids)
    else:
        rows = x.new_zeros(topk_ids.numel(), weight.shape[1], dtype=dtype)
        many = _routed_experts(topk_ids, projection)
    linear = _CPULinear(projection, to)
    for expert, slot, pairs in many:
        found, x_scale = _rows_at(pairs // pairs_per_row, x, rows_scale)
        rows[pairs] = linear(found, expert, slot, x_scale).to(dtype)
    return rows.view(num_tokens, top_k, weight.shape[1])


@_grouped_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    topk_ids: Tensor,
    expert_to_slot: Tensor | None,
    activations: str,
    rows_scale: Tensor | None,
    rows_dtype: torch.dtype | None,
) -> Tensor:
    return x.new_empty(*topk_ids.shape, weight.shape[1], dtype=rows_dtype or x.dtype)


@operator("weighted_sum", "cpu")
def _weighted_sum(rows: Tensor, topk_weights: Tensor) -> Tensor:
    return _weighted_sum_cpu(rows, topk_weights, dtype=rows.dtype)


@_weighted_sum.register_fake
def _(rows: Tensor, topk_weights: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], rows.shape[2])


# ---- GPU ---------------------------------------------------------------------------------------


@_fused_moe.register_kernel("cuda")
def _(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    gate_up_proj_scale: Tensor | None,
    gate_up_proj_bias: Tensor | None,
    down_proj: Tensor,
    down_proj_scale: Tensor | None,
    down_proj_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    expert_to_slot: Tensor | None,
    *rest: Any,
) -> Tensor:
    # Here, so that a CPU needs no Triton.
    from qmoe_kernels.layer import fused_moe_triton

    *activation, activations, two_level_sums, rows_scale, rows_dtype = rest
    dtype = rows_dtype or hidden_states.dtype
    gate_up = Projection(gate_up_proj, gate_up_proj_scale, gate_up_proj_bias, expert_to_slot)
    down = Projection(down_proj, down_proj_scale, down_proj_bias, expert_to_slot)
    to = _row_format(activations, gate_up, topk_ids.numel(), dtype)
    with torch.cuda.device(hidden_states.device):
        return fused_moe_triton(
            _whole(hidden_states, rows_scale, dtype),
            Experts(gate_up, down, Activation(*activation)),
            topk_ids,
            topk_weights,
            activations=None if to is None else STORAGE_DTYPE[to],
            two_level_sums=two_level_sums,
        )


@_grouped_linear.register_kernel("cuda")
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    topk_ids: Tensor,
    expert_to_slot: Tensor | None,
    activations: str,
    rows_scale: Tensor | None,
    rows_dtype: torch.dtype | None,
) -> Tensor:
    from qmoe_kernels.layer import grouped_linear_triton

    projection = Projection(weight, scale, bias, expert_to_slot)
    rows = _whole(x, rows_scale, rows_dtype or x.dtype)
    to = _row_format(activations, projection, topk_ids.numel(), rows.dtype)
    dtype = None if to is None else STORAGE_DTYPE[to]
    with torch.cuda.device(x.device):
        return grouped_linear_triton(rows, projection, topk_ids, activations=dtype)


@_weighted_sum.register_kernel("cuda")
def _(rows: Tensor, topk_weights: Tensor) -> Tensor:
    from qmoe_kernels.rows import launch_weighted_sum

    with torch.cuda.device(rows.device):
        return launch_weighted_sum(rows, topk_weights)


def _whole(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor | QuantizedRows:
    """What `_parts` took apart."""
    return x if scale is None else QuantizedRows(x, scale, dtype)


# ---- CPU ---------------------------------------------------------------------------------------


def _native_layer(
    x: Tensor,
    x_scale: Tensor | None,
    experts: Experts,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    to: WeightFormat | None,
    dtype: torch.dtype,
) -> tuple[Tensor, list[tuple[int, int, list[int]]]]:
    """What the native loops do of a layer, as `cpu.layer` returns it."""
    gate_up, down, activation = experts.gate_up, experts.down, experts.activation
    if to is None:
        return cpu.layer(x, None, topk_ids, gate_up, activation, down, topk_weights, dtype=dtype)
    native = _native_rows(x, to, x_scale)
    hidden, _ = cpu.layer(*native, topk_ids, gate_up, activation, dtype=dtype)
    rows, left = cpu.layer(*_native_rows(hidden, to), topk_ids, down, dtype=dtype)
    if left or topk_weights is None:
        return rows, left
    rows = rows.view(*topk_ids.shape, down.weight.shape[1])
    total = _weighted_sum_cpu(rows, topk_weights, topk_ids, gate_up.num_experts, dtype=dtype)
    return total, left


def _with_tensors(
    routed: Iterable[tuple[int, int, list[int]]], topk_ids: Tensor
) -> list[tuple[int, int, Tensor]]:
    return [
        (expert, slot, topk_ids.new_tensor(pairs, dtype=torch.int64))
        for expert, slot, pairs in routed
    ]


def _native_rows(
    x: Tensor, to: WeightFormat | None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Rows as `cpu.layer` takes them, and their scales if they are quantized on the way.

    Args:
        scale: of rows that are quantized already.
    """
    if to is None:
        return x, None
    if scale is None:
        x, scale = quantize_rows(x, to)
    return widen(x, out=torch.empty_like(x, dtype=torch.float32)), scale


def _rows_at(places: Tensor, x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Some rows, and their scales where they are in 8 bits."""
    return x[places], None if scale is None else scale[places]


class _CPULinear:
    """One projection of every expert by torch's matrix product, which widens a weight once.

    Of bf16 rows in bf16, where the processor multiplies it: 8-bit numbers are exact in it, sums
    are rounded to it. In fp32 else.
    """

    def __init__(self, projection: Projection, row_format: WeightFormat | None) -> None:
        self.projection, self.row_format = projection, row_format
        self.scratch: dict[torch.dtype, Tensor] = {}

    def __call__(self, x: Tensor, expert: int, slot: int, x_scale: Tensor | None = None) -> Tensor:
        """(num_rows, in_features) -> (num_rows, out_features) fp32; scales of 8-bit rows."""
        weight = self.projection.weight[slot]
        x, x_scale = _native_rows(x, self.row_format, x_scale)
        if x.dtype == torch.bfloat16 and cpu.multiplies_bf16() and cpu.available(weight):
            y = (x @ cpu.widen(weight, out=self._scratch(weight, x.dtype)).t()).float()
        else:
            if weight.dtype != torch.float32:
                weight = widen(weight, out=self._scratch(weight, torch.float32))
            y = x.float() @ weight.t()
        if self.projection.scale is not None:
            y = y.mul_(self.projection.scale[expert])
        if x_scale is not None:
            y = y.mul_(x_scale[:, None])
        bias = self.projection.bias
        return y if bias is None else y.add_(bias[expert])

    def transposed(self, y: Tensor, expert: int, slot: int) -> Tensor:
        """(num_rows, out_features) fp32 -> (num_rows, in_features) fp32, as gradients want it."""
        weight = self.projection.weight[slot]
        if self.projection.scale is not None:
            y = y * self.projection.scale[expert]
        if weight.dtype != torch.float32:
            weight = widen(weight, out=self._scratch(weight, torch.float32))
        return y @ weight

    def _scratch(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for a widened weight, the same for all: fresh memory costs as much as widening."""
        if dtype not in self.scratch:
            self.scratch[dtype] = torch.empty_like(
                weight, dtype=dtype, memory_format=torch.contiguous_format
            )
        return self.scratch[dtype]


def _routed_experts(
    topk_ids: Tensor, projection: Projection, *others: Projection
) -> list[tuple[int, int, Tensor]]:
    """(expert, slot, its pairs) of every expert that a token is routed to, in order."""
    num_slots = min(len(p.weight) for p in (projection, *others))
    routing = ExpertRouting.from_topk_ids(topk_ids, projection.num_experts)
    offsets = routing.expert_offsets.tolist()
    slots = range(projection.num_experts)
    if projection.expert_to_slot is not None:
        slots = projection.expert_to_slot.tolist()
    found = []
    for expert, slot in enumerate(slots):
        start, end = offsets[expert], offsets[expert + 1]
        if start == end:
            continue
        if not 0 <= slot < num_slots:
            raise cpu.missing_slot(expert, slot, num_slots)
        found.append((expert, slot, routing.sorted_pair_ids[start:end].long()))
    return found


def _routed_weights(topk_weights: Tensor, topk_ids: Tensor, num_experts: int) -> Tensor:
    """Return the weights with zeros, which NaN times zero is not, where an id is skipped."""
    return topk_weights.masked_fill((topk_ids < 0) | (topk_ids >= num_experts), 0.0)


def _weighted_sum_cpu(
    rows: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor | None = None,
    num_experts: int = 0,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """As `cpu.weighted_sum`."""
    if cpu.native.address_of("weighted_sum") is not None:
        return cpu.weighted_sum(rows, topk_weights, topk_ids, num_experts, dtype=dtype)
    if topk_ids is not None:
        topk_weights = _routed_weights(topk_weights, topk_ids, num_experts)
    total = rows.new_zeros(rows.shape[0], rows.shape[2], dtype=torch.float32)
    for k in range(rows.shape[1]):
        total.addcmul_(rows[:, k].float(), topk_weights[:, k, None].float())
    return total.to(dtype)


# ---- validation --------------------------------------------------------------------------------


def check_layer(
    hidden_states: Tensor | QuantizedRows,
    gate_up: Projection,
    down: Projection,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    *,
    activation: Activation | Callable[[Tensor], Tensor],
    activations: str,
    recorded: bool,
) -> str:
    """Check arguments as `fused_moe` has them, and decide what some ``"auto"`` means.

    Args:
        recorded: whether somebody may ask for gradients.

    Returns:
        ``activations``, or what ``"auto"`` means: ``"bf16"`` where rows must stay as they are,
        their format where they are quantized already.

    Raises:
        ValueError: as `fused_moe`.
    """
    _check_activations(activations, gate_up.weight)
    _check_hidden_states(hidden_states, topk_ids)
    mixed = gate_up.weight.dtype != down.weight.dtype
    if isinstance(hidden_states, QuantizedRows):
        activations = _format_of_rows(hidden_states, activations)
        _check_activations(activations, gate_up.weight)
    elif activations == "auto" and (mixed or recorded):
        activations = "bf16"
    _check_activations(activations, down.weight)
    num_rows = _check_projection("gate_up_proj", gate_up, hidden_states, hidden_states.shape[-1])
    in_features = None
    if isinstance(activation, Activation):
        if activation.gated and num_rows % 2:
            raise ValueError(
                f"gate_up_proj has {num_rows} rows, an odd number; a gated activation needs gate "
                "rows and as many up rows"
            )
        in_features = num_rows // 2 if activation.gated else num_rows
    _check_projection("down_proj", down, hidden_states, in_features)
    if down.weight.shape[0] != gate_up.weight.shape[0]:
        raise ValueError(
            f"down_proj holds {down.weight.shape[0]} experts and gate_up_proj "
            f"{gate_up.weight.shape[0]}; they must agree"
        )
    if down.weight.shape[1] != hidden_states.shape[-1]:
        raise ValueError(
            f"down_proj has {down.weight.shape[1]} rows; hidden_states has rows of "
            f"{hidden_states.shape[-1]}"
        )
    if topk_weights is not None:
        _check_topk_weights(topk_weights, tuple(topk_ids.shape), hidden_states.device)
    return activations


def _check_hidden_states(
    x: Tensor | QuantizedRows, topk_ids: Tensor, *, per_pair: bool = False
) -> None:
    if isinstance(x, QuantizedRows):
        _check_quantized_rows(x)
    if topk_ids.ndim != 2 or topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"topk_ids are {topk_ids.dtype} of shape {tuple(topk_ids.shape)}; "
            "expected int32 or int64 (num_tokens, top_k)"
        )
    num_tokens, top_k = topk_ids.shape
    shapes = [(num_tokens,), (num_tokens, top_k)] if per_pair else [(num_tokens,)]
    if x.dtype not in FLOAT_DTYPES or tuple(x.shape[:-1]) not in shapes:
        raise ValueError(
            f"hidden_states are {x.dtype} of shape {tuple(x.shape)} with topk_ids of shape "
            f"{tuple(topk_ids.shape)}; expected bf16, fp16 or fp32 ({num_tokens}, hidden_size)"
        )
    if topk_ids.device != x.device:
        raise ValueError(f"topk_ids are on {topk_ids.device}, hidden_states on {x.device}")


def _check_quantized_rows(rows: QuantizedRows) -> None:
    q, scale = rows.q, rows.scale
    if q.dtype not in FORMAT_OF or q.ndim != 2:
        raise ValueError(
            f"8-bit rows are {q.dtype} of shape {tuple(q.shape)}; expected int8 or float8_e4m3fn "
            "(num_tokens, hidden_size)"
        )
    if scale.dtype != torch.float32 or scale.shape != q.shape[:1] or scale.device != q.device:
        raise ValueError(
            f"scales of 8-bit rows are {scale.dtype} of shape {tuple(scale.shape)} on "
            f"{scale.device}; expected float32 ({len(q)},) on {q.device}"
        )


def _check_topk_weights(topk_weights: Tensor, rows: tuple[int, ...], device: torch.device) -> None:
    if tuple(topk_weights.shape) != rows or not topk_weights.is_floating_point():
        raise ValueError(
            f"topk_weights are {topk_weights.dtype} of shape {tuple(topk_weights.shape)}; "
            f"expected a float tensor of shape {rows}"
        )
    if topk_weights.device != device:
        raise ValueError(f"topk_weights are on {topk_weights.device}, hidden_states on {device}")


def _check_projection(
    name: str, projection: Projection, x: Tensor | QuantizedRows, in_features: int | None
) -> int:
    """Check a projection against the rows ``x`` that it meets and return its out_features."""
    weight, scale, bias = projection.weight, projection.scale, projection.bias
    expert_to_slot = projection.expert_to_slot
    if weight.ndim != 3 or (in_features is not None and weight.shape[-1] != in_features):
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}; expected (num_experts, rows, "
            f"{'in_features' if in_features is None else in_features})"
        )
    if weight.stride(-1) != 1 and weight.shape[-1] > 1:
        raise ValueError(
            f"{name} has strides {weight.stride()}; its last dimension must be contiguous"
        )
    quantized = weight.dtype in STORAGE_DTYPE.values()
    if not quantized and weight.dtype != x.dtype:
        raise ValueError(
            f"{name} is {weight.dtype}; int8, float8_e4m3fn and the dtype of hidden_states "
            f"({x.dtype}) work"
        )
    if quantized != (scale is not None):
        raise ValueError(
            f"{name} is {weight.dtype} and {name}_scale is {'missing' if quantized else 'given'}; "
            "8-bit weights need a scale, others take none"
        )
    num_experts = projection.num_experts
    shape = (num_experts, weight.shape[1])
    if scale is not None and (tuple(scale.shape) != shape or scale.dtype != torch.float32):
        raise ValueError(
            f"{name}_scale is {scale.dtype} of shape {tuple(scale.shape)}; expected float32 {shape}"
        )
    if bias is not None and (tuple(bias.shape) != shape or not bias.is_floating_point()):
        raise ValueError(
            f"{name}_bias is {bias.dtype} of shape {tuple(bias.shape)}; expected a float tensor "
            f"{shape}"
        )
    if expert_to_slot is None:
        if weight.shape[0] != num_experts:
            raise ValueError(
                f"{name} holds {weight.shape[0]} experts and {name}_scale {num_experts}; "
                "without expert_to_slot they must agree"
            )
    elif tuple(expert_to_slot.shape) != (num_experts,) or expert_to_slot.dtype != torch.int32:
        raise ValueError(
            f"expert_to_slot is {expert_to_slot.dtype} of shape {tuple(expert_to_slot.shape)}; "
            f"expected int32 ({num_experts},)"
        )
    for tensor in (weight, scale, bias, expert_to_slot):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: a tensor on {tensor.device}, hidden_states on {x.device}")
    return weight.shape[1]
