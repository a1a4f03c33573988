"""From a router's logits to experts and their weights: the known routers as one operator.

Of a token's logits ``l`` (num_experts,), in fp32:

    scores  = softmax(l)  or  sigmoid(l)
    choice  = scores + correction_bias
    ids     = top_k of choice, among the experts of the topk_groups best groups
    weights = scores[ids] / (sum of scores[ids] + epsilon) * scaling_factor

A group's score is the largest of its choices, or the sum of the two largest. What a model leaves
out is neutral here: no bias, one group, no normalization, a factor of 1. Top-k first and softmax
over the chosen logits afterwards (gpt-oss, Granite) is softmax with normalization: the sum over
all experts cancels.

Of equal choices the lower id wins, which torch.topk does not promise. Softmax and sigmoid rise
with their logit: where neither a bias nor a sum enters, the choice is made by the logits
themselves, and no rounding can tie two of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qmoe_kernels.operators import operator

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU needs no Triton
    triton = None

Scoring = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]


@dataclass(frozen=True)
class RouterSpec:
    """What a router does with its logits; hashable, without tensors.

    Attributes:
        top_k: experts per token.
        scoring: ``"softmax"`` over all experts or ``"sigmoid"`` of each.
        normalize: whether a token's weights are divided by their sum.
        scaling_factor: of the weights, after normalization.
        epsilon: added to the sum that normalization divides by.
        num_groups: groups of as many consecutive experts.
        topk_groups: how many of them a token may choose from.
        group_score: ``"max"`` or ``"top2"``.

    Raises:
        ValueError: a name or a number that does not work.
    """

    top_k: int
    scoring: Scoring = "softmax"
    normalize: bool = True
    scaling_factor: float = 1.0
    epsilon: float = 1e-20
    num_groups: int = 1
    topk_groups: int = 1
    group_score: GroupScore = "max"

    def __post_init__(self) -> None:
        for name, value, works in (
            ("scoring", self.scoring, get_args(Scoring)),
            ("group_score", self.group_score, get_args(GroupScore)),
        ):
            if value not in works:
                raise ValueError(f"unknown {name} {value!r}; {' and '.join(works)} work")
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}; a token needs at least 1 expert")
        if not 1 <= self.topk_groups <= self.num_groups:
            raise ValueError(
                f"topk_groups={self.topk_groups} of num_groups={self.num_groups}; "
                "1 to num_groups work"
            )


def select_experts(
    router_logits: Tensor,  # (num_tokens, num_experts) bf16 | fp16 | fp32
    spec: RouterSpec,
    correction_bias: Tensor | None = None,  # (num_experts,) float
    weights_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts and weigh them; the module's docstring has the formula.

    One launch on a GPU, without a synchronization. Experts come in the order of their choice, the
    best first. A logit that is NaN makes weights NaN, but ids are distinct experts all the same.
    There is no gradient.

    Args:
        correction_bias: added for the choice only; weights are without it.
        weights_dtype: that weights, computed in fp32, are rounded to.

    Returns:
        topk_ids (num_tokens, top_k) int64 and topk_weights (num_tokens, top_k).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if router_logits.ndim != 2 or not router_logits.is_floating_point():
        raise ValueError(
            f"router_logits are {router_logits.dtype} of shape {tuple(router_logits.shape)}; "
            "expected a float tensor (num_tokens, num_experts)"
        )
    num_experts = router_logits.shape[1]
    if num_experts % spec.num_groups:
        raise ValueError(f"{num_experts} experts do not divide into {spec.num_groups} groups")
    group_size = num_experts // spec.num_groups
    if spec.top_k > group_size * spec.topk_groups:
        raise ValueError(
            f"top_k={spec.top_k} experts of {group_size * spec.topk_groups} to choose from; "
            "at most so many work"
        )
    if spec.group_score == "top2" and spec.num_groups > 1 and group_size < 2:
        raise ValueError(
            f"group_score='top2' needs groups of two experts or more, not {group_size}"
        )
    if correction_bias is not None and (
        correction_bias.shape != (num_experts,)
        or not correction_bias.is_floating_point()
        or correction_bias.device != router_logits.device
    ):
        raise ValueError(
            f"correction_bias is {correction_bias.dtype} of shape {tuple(correction_bias.shape)} "
            f"on {correction_bias.device}; expected a float tensor ({num_experts},) on "
            f"{router_logits.device}"
        )
    return _select_experts(
        router_logits,
        correction_bias,
        spec.top_k,
        spec.scoring,
        spec.normalize,
        spec.scaling_factor,
        spec.epsilon,
        spec.num_groups,
        spec.topk_groups,
        spec.group_score,
        weights_dtype,
    )


# ---- operator ----------------------------------------------------------------------------------


@operator("select_experts")
def _select_experts(
    router_logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    scoring: str,
    normalize: bool,
    scaling_factor: float,
    epsilon: float,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    weights_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    logits = router_logits.float()
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = logits if _by_logits(correction_bias, num_groups, group_score) else scores
    if correction_bias is not None:
        choice = choice + correction_bias.float()
    if num_groups > 1:
        of_group = choice.unflatten(-1, (num_groups, -1))
        best = of_group.topk(1 if group_score == "max" else 2, dim=-1).values.sum(-1)
        chosen = torch.zeros_like(best, dtype=torch.bool)
        chosen.scatter_(1, _first(best, topk_groups), True)
        choice = of_group.masked_fill(~chosen.unsqueeze(-1), -torch.inf).flatten(1)
    topk_ids = _first(choice, top_k)
    topk_weights = scores.gather(1, topk_ids)
    if normalize:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + epsilon)
    return topk_ids, (topk_weights * scaling_factor).to(weights_dtype)


def _first(values: Tensor, count: int) -> Tensor:
    """The indices of the largest values of each row, the lower one first where they are equal."""
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    return order[:, :count].contiguous()


def _by_logits(correction_bias: Tensor | None, num_groups: int, group_score: str) -> bool:
    return correction_bias is None and (num_groups == 1 or group_score == "max")


@_select_experts.register_fake
def _(
    router_logits: Tensor, correction_bias: Tensor | None, top_k: int, *others: object
) -> tuple[Tensor, Tensor]:
    shape = (router_logits.shape[0], top_k)
    weights_dtype = others[-1]
    assert isinstance(weights_dtype, torch.dtype)
    return (
        router_logits.new_empty(shape, dtype=torch.int64),
        router_logits.new_empty(shape, dtype=weights_dtype),
    )


if triton is not None:

    @_select_experts.register_kernel("cuda")
    def _(router_logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
        with torch.cuda.device(router_logits.device):
            return launch_select_experts(router_logits, *arguments)  # type: ignore[arg-type]


def launch_select_experts(
    router_logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    scoring: str,
    normalize: bool,
    scaling_factor: float,
    epsilon: float,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    weights_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Run `select_experts_kernel`; arguments and result as those of `select_experts`."""
    num_tokens, num_experts = router_logits.shape
    group_size = num_experts // num_groups
    topk_ids = router_logits.new_empty(num_tokens, top_k, dtype=torch.int64)
    topk_weights = router_logits.new_empty(num_tokens, top_k, dtype=weights_dtype)
    groups_block = triton.next_power_of_2(num_groups)
    group_block = triton.next_power_of_2(group_size)
    if num_tokens:
        select_experts_kernel[(num_tokens,)](
            router_logits.contiguous(),
            None if correction_bias is None else correction_bias.contiguous(),
            topk_ids,
            topk_weights,
            scaling_factor,
            epsilon,
            TOP_K=top_k,
            SIGMOID=scoring == "sigmoid",
            BY_LOGITS=_by_logits(correction_bias, num_groups, group_score),
            NORMALIZE=normalize,
            NUM_GROUPS=num_groups,
            GROUP_SIZE=group_size,
            TOPK_GROUPS=topk_groups,
            TOP2=group_score == "top2",
            TOP_K_BLOCK=triton.next_power_of_2(top_k),
            GROUPS_BLOCK=groups_block,
            GROUP_BLOCK=group_block,
            PDL=has_dependent_launch(router_logits.device),
            # Within one warp no step waits for another warp.
            num_warps=1 if groups_block * group_block <= 512 else 4,
            **launch_options(True, router_logits.device),
        )
    return topk_ids, topk_weights


if triton is not None:
    from qmoe_kernels.launching import has_dependent_launch, launch_options

    @triton.jit(
        do_not_specialize=["scaling_factor", "epsilon"],
        do_not_specialize_on_alignment=["logits_ptr"],  # some of a tensor's tokens
    )
    def select_experts_kernel(
        logits_ptr,  # (num_tokens, num_experts)
        bias_ptr,  # (num_experts,) or None
        topk_ids_ptr,  # (num_tokens, TOP_K) int64
        topk_weights_ptr,  # (num_tokens, TOP_K) float
        scaling_factor,
        epsilon,
        TOP_K: tl.constexpr,
        SIGMOID: tl.constexpr,  # else softmax
        BY_LOGITS: tl.constexpr,
        NORMALIZE: tl.constexpr,
        NUM_GROUPS: tl.constexpr,
        GROUP_SIZE: tl.constexpr,
        TOPK_GROUPS: tl.constexpr,
        TOP2: tl.constexpr,  # else max
        TOP_K_BLOCK: tl.constexpr,  # powers of two, at least as large
        GROUPS_BLOCK: tl.constexpr,
        GROUP_BLOCK: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """Grid: (num_tokens,). Experts lie in a tile (GROUPS_BLOCK, GROUP_BLOCK).

        Choices are compared as integers: the float's bits above, the id below in descending order,
        so that all differ, and a maximum names its expert.
        """
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        NEVER: tl.constexpr = -0x8000000000000000
        token = tl.program_id(0).to(tl.int64)
        logits_ptr += token * (NUM_GROUPS * GROUP_SIZE)

        groups = tl.arange(0, GROUPS_BLOCK)
        members = tl.arange(0, GROUP_BLOCK)
        experts = groups[:, None] * GROUP_SIZE + members[None, :]
        exists = (groups[:, None] < NUM_GROUPS) & (members[None, :] < GROUP_SIZE)
        logits = tl.load(logits_ptr + experts, mask=exists, other=-float("inf")).to(tl.float32)

        largest = 0.0
        total = 1.0
        if not SIGMOID:
            largest = tl.max(tl.max(logits, 1), 0)
            total = tl.sum(tl.sum(tl.exp(logits - largest), 1), 0)
        choice = logits
        if not BY_LOGITS:
            choice = _score(logits, largest, total, SIGMOID)
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + experts, mask=exists, other=0.0).to(tl.float32)
        keys = tl.where(exists, _key(choice, experts), NEVER)

        if TOPK_GROUPS < NUM_GROUPS:
            best = tl.max(keys, 1)
            group_score = _value(best)
            if TOP2:
                second = tl.max(tl.where(keys == best[:, None], NEVER, keys), 1)
                group_score += _value(second)
            group_keys = tl.where(groups < NUM_GROUPS, _key(group_score, groups), NEVER)
            chosen = groups < 0
            for _ in range(TOPK_GROUPS):
                best_group = tl.max(tl.where(chosen, NEVER, group_keys), 0)
                chosen = chosen | (group_keys == best_group)
            keys = tl.where(chosen[:, None], keys, NEVER)

        ranks = tl.arange(0, TOP_K_BLOCK)
        ids = tl.zeros((TOP_K_BLOCK,), dtype=tl.int64)
        for k in range(TOP_K):
            key = tl.max(tl.max(keys, 1), 0)
            ids = tl.where(ranks == k, 0xFFFFFFFF - (key & 0xFFFFFFFF), ids)
            keys = tl.where(keys == key, NEVER, keys)

        exists = ranks < TOP_K
        logits = tl.load(logits_ptr + ids, mask=exists, other=-float("inf")).to(tl.float32)
        weights = tl.where(exists, _score(logits, largest, total, SIGMOID), 0.0)
        if NORMALIZE:
            weights /= tl.sum(weights, 0) + epsilon
        tl.store(topk_ids_ptr + token * TOP_K + ranks, ids, mask=exists)
        weights = (weights * scaling_factor).to(topk_weights_ptr.dtype.element_ty)
        tl.store(topk_weights_ptr + token * TOP_K + ranks, weights, mask=exists)

    @triton.jit
    def _score(logits, largest, total, SIGMOID: tl.constexpr):
        if SIGMOID:
            return tl.sigmoid(logits)
        else:
            return tl.exp(logits - largest) / total

    @triton.jit
    def _key(x, index):
        """Integers in the order of ``x`` (fp32, NaN above all), then of descending ``index``."""
        # Zero has one key, whatever its sign. A NaN's sign is the hardware's, therefore none.
        x = tl.where(x == 0.0, 0.0, tl.where(x != x, float("nan"), x))
        bits = x.to(tl.int32, bitcast=True)
        # Of negative floats all bits but the sign run the other way.
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))

    @triton.jit
    def _value(key):
        """The ``x`` of a `_key`."""
        ordered = (key >> 32).to(tl.int32)
        return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
