"""Gradients of a layer's experts, which stay as they are: of its rows and of the routing weights.

A single product, `qmoe_kernels.grouped_linear`, has a gradient of its weights as well where they
are not 8-bit ones: adapters of experts are such products.

With ``z = gate_up[e] @ x``, ``h = activation(z)`` and the gradient ``g`` of a token's output, a
pair of token and expert with weight ``w`` gives

    u = down[e]^T @ g          of h, up to the weight
    dw = u . h + g . bias      (the down bias counts for the output as well)
    dx = gate_up[e]^T @ (activation'(z) * w * u)

and a token's ``dx`` is the sum over its pairs. Weights are read as they lie; ``z`` is computed once
more rather than kept. Sums are fp32 and in one order, so that equal inputs give equal bits. Rows
that a product quantized are taken as if they had not been.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qmoe_kernels.activations import Activation, apply_with_gradient
from qmoe_kernels.experts import Experts, Projection
from qmoe_kernels.fused_moe import (
    _CPULinear,
    _fused_moe,
    _grouped_linear,
    _routed_experts,
    _weighted_sum,
)
from qmoe_kernels.operators import operator

PAGED = (
    "paged experts have no gradient, since their slots may hold others by then; load the model "
    "without hbm_budget to train beside them"
)


@_fused_moe.register_gradient()
def _(gradient: Tensor, _: tuple[bool, ...], *arguments: Any) -> tuple[Any, ...]:
    *tensors, expert_to_slot = arguments[:10]
    if expert_to_slot is not None:
        raise RuntimeError(PAGED)
    if arguments[20] is not None:
        raise RuntimeError("rows that came in 8 bits have no gradient; give rows as they were")
    of_hidden, of_weights = _fused_moe_backward(gradient, *tensors, *arguments[10:18])
    no_weights = arguments[8] is None
    return (of_hidden, *[None] * 7, None if no_weights else of_weights)


def _kept_of_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    topk_ids: Tensor,
    expert_to_slot: Tensor | None,
    *_: Any,
) -> tuple[Any, ...]:
    """Rows only for a gradient of the weights."""
    rows = x if weight.requires_grad and scale is None else None
    return rows, weight, scale, topk_ids, expert_to_slot, x.ndim == 3


@_grouped_linear.register_gradient(keeps=_kept_of_linear)
def _(
    gradient: Tensor,
    needed: tuple[bool, ...],
    rows: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    expert_to_slot: Tensor | None,
    per_pair: bool,
) -> tuple[Any, ...]:
    if expert_to_slot is not None:
        raise RuntimeError(PAGED)
    of_rows, of_weight = _grouped_linear_backward(
        gradient, rows, weight, scale, topk_ids, per_pair, needed[0]
    )
    return of_rows if needed[0] else None, None if rows is None else of_weight


@_weighted_sum.register_gradient()
def _(gradient: Tensor, _: tuple[bool, ...], rows: Tensor, topk_weights: Tensor) -> tuple[Any, ...]:
    of_rows = (gradient.unsqueeze(1).float() * topk_weights.unsqueeze(-1).float()).to(rows.dtype)
    of_weights = (gradient.unsqueeze(1).float() * rows.float()).sum(-1)
    return of_rows, of_weights.to(topk_weights.dtype)


@operator("fused_moe_backward", "cpu")
def _fused_moe_backward(
    gradient: Tensor,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    gate_up_proj_scale: Tensor | None,
    gate_up_proj_bias: Tensor | None,
    down_proj: Tensor,
    down_proj_scale: Tensor | None,
    down_proj_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    name: str,
    gated: bool,
    alpha: float,
    up_shift: float,
    limit: float | None,
    limit_after: bool,
    gate_softcap: float | None,
    up_softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states, and of routing weights (none of these: empty)."""
    activation = Activation.of(
        name, gated, alpha, up_shift, limit, limit_after, gate_softcap, up_softcap
    )
    top_k = topk_ids.shape[1]
    gate_up = Projection(gate_up_proj, gate_up_proj_scale, gate_up_proj_bias)
    down = Projection(down_proj, down_proj_scale, down_proj_bias)
    up_linear, down_linear = _CPULinear(gate_up, None), _CPULinear(down, None)
    num_pairs, hidden_size = topk_ids.numel(), hidden_states.shape[1]
    rows = hidden_states.new_zeros(num_pairs, hidden_size, dtype=torch.float32)
    of_weights = rows.new_zeros(num_pairs)
    weights = None if topk_weights is None else topk_weights.flatten().float()
    pairs_per_row = 1 if gradient.ndim == 3 else top_k
    gradient = gradient.flatten(0, -2)
    for expert, slot, pairs in _routed_experts(topk_ids, gate_up):
        y = gradient[pairs // pairs_per_row].float()
        before = up_linear(hidden_states[pairs // top_k], expert, slot)
        of_hidden = down_linear.transposed(y, expert, slot)
        weighted = of_hidden if weights is None else of_hidden * weights[pairs, None]
        hidden, of_before = apply_with_gradient(activation, before, weighted)
        if weights is not None:
            of_weights[pairs] = (of_hidden * hidden).sum(-1)
            if down.bias is not None:
                of_weights[pairs] += y @ down.bias[expert].float()
        rows[pairs] = up_linear.transposed(of_before, expert, slot)
    of_rows = rows.view(-1, top_k, hidden_size).sum(1).to(hidden_states.dtype)
    if topk_weights is None:
        return of_rows, of_weights.new_empty(0)
    return of_rows, of_weights.view(topk_ids.shape).to(topk_weights.dtype)


@_fused_moe_backward.register_fake
def _(
    gradient: Tensor,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    gate_up_proj_scale: Tensor | None,
    gate_up_proj_bias: Tensor | None,
    down_proj: Tensor,
    down_proj_scale: Tensor | None,
    down_proj_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor]:
    if topk_weights is None:
        return hidden_states.new_empty(hidden_states.shape), hidden_states.new_empty(
            0, dtype=torch.float32
        )
    return hidden_states.new_empty(hidden_states.shape), topk_weights.new_empty(topk_ids.shape)


@_fused_moe_backward.register_kernel("cuda")
def _(
    gradient: Tensor,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    gate_up_proj_scale: Tensor | None,
    gate_up_proj_bias: Tensor | None,
    down_proj: Tensor,
    down_proj_scale: Tensor | None,
    down_proj_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    *activation: Any,
) -> tuple[Tensor, Tensor]:
    from qmoe_kernels.gradient_kernels import fused_moe_backward_triton  # a CPU needs no Triton

    experts = Experts(
        Projection(gate_up_proj, gate_up_proj_scale, gate_up_proj_bias),
        Projection(down_proj, down_proj_scale, down_proj_bias),
        Activation(*activation),
    )
    with torch.cuda.device(hidden_states.device):
        return fused_moe_backward_triton(gradient, hidden_states, experts, topk_ids, topk_weights)


@operator("grouped_linear_backward", "cpu")
def _grouped_linear_backward(
    gradient: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    per_pair: bool,
    of_x: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and of weights, empty where they are not asked for.

    Args:
        x: None asks for no gradient of the weights.
        per_pair: whether rows are (num_tokens, top_k, in_features).
        of_x: whether their gradient is asked for.
    """
    projection, top_k = Projection(weight, scale), topk_ids.shape[1]
    of_rows = gradient.new_zeros(
        topk_ids.numel() if of_x else 0, weight.shape[2], dtype=torch.float32
    )
    of_weight = weight.new_zeros(0 if x is None else weight.shape)
    linear, flat = _CPULinear(projection, None), gradient.flatten(0, 1)
    for expert, slot, pairs in _routed_experts(topk_ids, projection):
        y = flat[pairs].float()
        if of_x:
            of_rows[pairs] = linear.transposed(y, expert, slot)
        if x is not None:
            rows = x.flatten(0, -2)[pairs if per_pair else pairs // top_k]
            of_weight[expert] = y.t() @ rows.float()
    if of_x:
        of_rows = of_rows.view(*topk_ids.shape, weight.shape[2])
        of_rows = of_rows if per_pair else of_rows.sum(1)
    return of_rows.to(gradient.dtype), of_weight


@_grouped_linear_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    per_pair: bool,
    of_x: bool,
) -> tuple[Tensor, Tensor]:
    shape = (topk_ids.shape if per_pair else topk_ids.shape[:1]) if of_x else (0,)
    of_rows = gradient.new_empty(*shape, weight.shape[2])
    return of_rows, weight.new_empty(0 if x is None else weight.shape)


@_grouped_linear_backward.register_kernel("cuda")
def _(
    gradient: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    per_pair: bool,
    of_x: bool,
) -> tuple[Tensor, Tensor]:
    from qmoe_kernels.gradient_kernels import grouped_linear_backward_triton

    with torch.cuda.device(gradient.device):
        return grouped_linear_backward_triton(
            gradient, x, Projection(weight, scale), topk_ids, per_pair, of_x
        )
