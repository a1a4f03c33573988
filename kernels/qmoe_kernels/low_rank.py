"""One MoE layer on a GPU whose weights have low-rank products added: adapters of its experts.

With factors ``A`` (rank, in_features) and ``B`` (out_features, rank) of each expert and projection,

    y = weight[e] @ x + scaling * B[e] @ (A[e] @ x)

takes the place of ``weight[e] @ x`` in `qmoe_kernels.fused_moe`. One operator for the layer, one
for its gradients: of rows, of routing weights and of the factors. Pairs are sorted once in each.
Like a layer's own gradient, these compute once more what goes into the activation: a layer keeps
its input, its routing and the factors as they are. Factors are multiplied in the dtype of the
rows; sums are fp32 and in one order, and so are gradients of factors before they are rounded to
the factors' own dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qmoe_kernels.activations import Activation
from qmoe_kernels.experts import Experts, Projection
from qmoe_kernels.fused_moe import _is_recorded, _row_format, check_layer
from qmoe_kernels.gradients import PAGED
from qmoe_kernels.operators import operator
from qmoe_kernels.quantization import STORAGE_DTYPE

# A program holds as many columns at once of whatever it multiplies by a factor.
MOST_RANK = 128


class Factors(NamedTuple):
    """What is added to a projection's weights: ``scaling * (out_factor[e] @ in_factor[e])``.

    Attributes:
        in_factor: (num_experts, rank, in_features) float, at any strides.
        out_factor: (num_experts, out_features, rank) float, at any strides.
        scaling: of the product.
    """

    in_factor: Tensor
    out_factor: Tensor
    scaling: float


def adapted_moe_supports(hidden_states: Tensor, *ranks: int) -> bool:
    """Return whether `adapted_moe` takes these rows, with factors of these ranks.

    Elsewhere, on a CPU and with ranks above `MOST_RANK`, a layer is computed product by product.
    """
    return hidden_states.is_cuda and all(rank <= MOST_RANK for rank in ranks)


def adapted_moe(
    hidden_states: Tensor,  # (num_tokens, hidden_size) bf16 | fp16 | fp32
    experts: Experts,
    topk_ids: Tensor,  # (num_tokens, top_k) int32 | int64
    topk_weights: Tensor | None,  # (num_tokens, top_k) float
    up_factors: Factors | None,
    down_factors: Factors | None,
    *,
    activations: str = "auto",
) -> Tensor:
    """Do what `qmoe_kernels.fused_moe` does, with low-rank products added to the weights.

    There are gradients of ``hidden_states``, ``topk_weights`` and the factors.

    Args:
        experts: with one ``expert_to_slot`` for both projections, then without gradients, or none.
        up_factors, down_factors: of the two projections; None adds nothing.
        activations: what the products with ``experts`` take, see `fused_moe`. Factors meet rows as
            they are.

    Returns:
        As `fused_moe`.

    Raises:
        ValueError: as `fused_moe`; factors of other sizes, or what `adapted_moe_supports` does not.
    """
    gate_up, down, activation = experts.gate_up, experts.down, experts.activation
    if gate_up.expert_to_slot is not down.expert_to_slot:
        raise ValueError(
            "gate_up_proj and down_proj have not the same expert_to_slot; both projections of a "
            "layer are given one tensor, or none"
        )
    for name, projection, factors in (
        ("gate_up_proj", gate_up, up_factors),
        ("down_proj", down, down_factors),
    ):
        if factors is not None:
            _check_factors(name, projection, factors)
    ranks = [f.in_factor.shape[1] for f in (up_factors, down_factors) if f is not None]
    if not adapted_moe_supports(hidden_states, *ranks):
        raise ValueError(
            f"hidden_states are on {hidden_states.device}, ranks are {ranks}; adapted_moe runs on "
            f"a GPU, with ranks up to {MOST_RANK}: grouped_linear does single products elsewhere"
        )
    tensors = [
        *(up_factors[:2] if up_factors else (None, None)),
        *(down_factors[:2] if down_factors else (None, None)),
    ]
    recorded = _is_recorded(hidden_states, topk_weights, *tensors)
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
    return _adapted_moe(
        hidden_states,
        gate_up.weight,
        gate_up.scale,
        gate_up.bias,
        down.weight,
        down.scale,
        down.bias,
        topk_ids,
        topk_weights,
        gate_up.expert_to_slot,
        *tensors,
        up_factors.scaling if up_factors else 1.0,
        down_factors.scaling if down_factors else 1.0,
        *activation.fields,
        activations,
    )


def _check_factors(name: str, projection: Projection, factors: Factors) -> None:
    weight, num_experts = projection.weight, projection.num_experts
    rank = factors.in_factor.shape[1] if factors.in_factor.ndim == 3 else 0
    expected = ((num_experts, rank, weight.shape[2]), (num_experts, weight.shape[1], rank))
    for factor, shape in zip(factors[:2], expected, strict=True):
        fits = tuple(factor.shape) == shape and factor.is_floating_point()
        if not fits or factor.device != weight.device:
            raise ValueError(
                f"a factor of {name} is {factor.dtype} of shape {tuple(factor.shape)} on "
                f"{factor.device}; expected a float tensor {shape} on {weight.device}"
            )


@operator("adapted_moe")
def _adapted_moe(
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
    up_in: Tensor | None,
    up_out: Tensor | None,
    down_in: Tensor | None,
    down_out: Tensor | None,
    up_scaling: float,
    down_scaling: float,
    name: str,
    gated: bool,
    alpha: float,
    up_shift: float,
    limit: float | None,
    limit_after: bool,
    gate_softcap: float | None,
    up_softcap: float | None,
    activations: str,
) -> Tensor:
    from qmoe_kernels.low_rank_kernels import adapted_moe_triton  # a CPU needs no Triton

    gate_up = Projection(gate_up_proj, gate_up_proj_scale, gate_up_proj_bias, expert_to_slot)
    down = Projection(down_proj, down_proj_scale, down_proj_bias, expert_to_slot)
    activation = Activation.of(
        name, gated, alpha, up_shift, limit, limit_after, gate_softcap, up_softcap
    )
    to = _row_format(activations, gate_up, topk_ids.numel(), hidden_states.dtype)
    with torch.cuda.device_of(hidden_states):
        return adapted_moe_triton(
            hidden_states,
            Experts(gate_up, down, activation),
            topk_ids,
            topk_weights,
            _factors(up_in, up_out, up_scaling),
            _factors(down_in, down_out, down_scaling),
            activations=None if to is None else STORAGE_DTYPE[to],
        )


@_adapted_moe.register_fake
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
    *_: object,
) -> Tensor:
    num_tokens, top_k = topk_ids.shape
    shape = (num_tokens, top_k) if topk_weights is None else (num_tokens,)
    return hidden_states.new_empty(*shape, down_proj.shape[1])


@_adapted_moe.register_gradient()
def _(gradient: Tensor, needed: tuple[bool, ...], *arguments: Any) -> tuple[Any, ...]:
    *tensors, expert_to_slot = arguments[:10]
    if expert_to_slot is not None:
        raise RuntimeError(PAGED)
    found = _adapted_moe_backward(
        gradient, *tensors, *arguments[10:24], needed[0], any(needed[10:14])
    )
    of = [tensor if needs else None for tensor, needs in zip(found, _outputs(needed), strict=True)]
    return (of[0], *[None] * 7, of[1], None, *of[2:])


def _outputs(of_arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of something for each of the operator's arguments, those for what has a gradient."""
    return (of_arguments[0], of_arguments[8], *of_arguments[10:14])


@operator("adapted_moe_backward")
def _adapted_moe_backward(
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
    up_in: Tensor | None,
    up_out: Tensor | None,
    down_in: Tensor | None,
    down_out: Tensor | None,
    up_scaling: float,
    down_scaling: float,
    name: str,
    gated: bool,
    alpha: float,
    up_shift: float,
    limit: float | None,
    limit_after: bool,
    gate_softcap: float | None,
    up_softcap: float | None,
    of_hidden: bool,
    of_factors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden states, routing weights and the four factors.

    Empty where there is no such argument, or its gradient is not asked for.
    """
    from qmoe_kernels.low_rank_kernels import adapted_moe_backward_triton

    activation = Activation.of(
        name, gated, alpha, up_shift, limit, limit_after, gate_softcap, up_softcap
    )
    experts = Experts(
        Projection(gate_up_proj, gate_up_proj_scale, gate_up_proj_bias),
        Projection(down_proj, down_proj_scale, down_proj_bias),
        activation,
    )
    with torch.cuda.device_of(hidden_states):
        return adapted_moe_backward_triton(
            gradient,
            hidden_states,
            experts,
            topk_ids,
            topk_weights,
            _factors(up_in, up_out, up_scaling),
            _factors(down_in, down_out, down_scaling),
            of_hidden=of_hidden,
            of_factors=of_factors,
        )


@_adapted_moe_backward.register_fake
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
    up_in: Tensor | None,
    up_out: Tensor | None,
    down_in: Tensor | None,
    down_out: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, of_hidden, of_factors = rest

    def of(like: Tensor | None, is_outer: bool) -> Tensor:
        if like is None or not of_factors:
            return hidden_states.new_empty(0)
        if not is_outer:
            return like.new_empty(like.shape)
        num_experts, out_features, rank = like.shape
        return like.new_empty(num_experts, rank, out_features).transpose(1, 2)

    return (
        hidden_states.new_empty(hidden_states.shape if of_hidden else 0),
        hidden_states.new_empty(0)
        if topk_weights is None
        else topk_weights.new_empty(topk_ids.shape),
        of(up_in, False),
        of(up_out, True),
        of(down_in, False),
        of(down_out, True),
    )


def _factors(inner: Tensor | None, outer: Tensor | None, scaling: float) -> Factors | None:
    return None if inner is None or outer is None else Factors(inner, outer, scaling)
