"""Routers: softmax or sigmoid, top-k, normalization; five launches and more, here one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product as pairs
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmoe.decoding.pieces.linear import Product
from qmoe.decoding.pieces.probe import close, draw, kind_of, runs_as_its_class, try_out
from qmoe.decoding.shadow import Forward
from qmoe.experts.quantized import quantized_modules
from qmoe_kernels.router import GroupScore, RouterSpec, Scoring, select_experts

_PROBED = 64  # hidden states that are tried


def find_routers(model: nn.Module, product: Product) -> dict[nn.Module, Forward]:
    """The routers before quantized experts, and what computes the same.

    Args:
        product: what multiplies with their weights.
    """
    formulas: dict[tuple[object, ...], RouterFormula | None] = {}
    found: dict[nn.Module, Forward] = {}
    for name, experts in quantized_modules(model).items():
        # PEFT's wrappers of experts are between these and their block.
        block = model.get_submodule(name.replace(".base_layer", "").rpartition(".")[0])
        for router in block.modules():
            weight: Any = getattr(router, "weight", None)
            if (
                "Router" not in type(router).__name__
                or not runs_as_its_class(router)
                or type(weight) is not nn.Parameter
                or weight.shape != (experts.num_experts, experts.layout.hidden_size)
            ):
                continue
            kind = kind_of(router)
            if kind not in formulas:
                formulas[kind] = _formula(router)
            if (formula := formulas[kind]) is not None:
                found[router] = _forward(router, formula, product)
    return found


@dataclass(frozen=True)
class RouterFormula:
    """What a router does, and how it says so.

    Attributes:
        spec: how it chooses.
        precision: that it multiplies in.
        dtype: of its weights.
        outputs: what it returns, in order: ``"logits"``, ``"weights"`` and ``"ids"``.
    """

    spec: RouterSpec
    precision: torch.dtype
    dtype: torch.dtype
    outputs: tuple[str, ...]


def _logits(router: Any, product: Product, precision: torch.dtype, hidden_states: Tensor) -> Tensor:
    bias = getattr(router, "bias", None)
    return product(
        hidden_states.reshape(-1, router.weight.shape[1]).to(precision),
        router.weight.to(precision),
        None if bias is None else bias.to(precision),
    )


def _correction(router: Any) -> Tensor | None:
    correction = getattr(router, "e_score_correction_bias", None)
    return None if correction is None else correction.detach().flatten()


def _formula(router: Any) -> RouterFormula | None:
    """What holds for the router's own numbers, and for drawn ones.

    With its own (zeros, say) a router can look like one that scores in another way, and the formula
    is used for all routers of its kind. Drawn ones are to tell these apart; roundings do not count.
    """
    own = list(_formulas(try_out(router), same=0.9, units=2))
    drawn = _formulas(_with_drawn_numbers(router), same=0.5, units=32)
    return next((formula for formula in drawn if formula in own), None)


def _formulas(router: Any, *, same: float, units: int) -> Iterator[RouterFormula]:
    """What computes as ``router`` does.

    Args:
        router: to be run.
        same: the share of tokens that must go to the same experts. Of two experts whose logits are
            equal after rounding either may be chosen.
        units: see `close`.
    """
    weight, top_k = router.weight, getattr(router, "top_k", None)
    x = draw(_PROBED, weight.shape[1], dtype=weight.dtype).to(weight.device)
    try:
        outputs = router.forward(x)
    except (TypeError, RuntimeError):
        return
    if not isinstance(top_k, int) or not isinstance(outputs, tuple) or len(outputs) != 3:
        return
    kinds = tuple(_kind_of_output(t, top_k, weight.shape[0]) for t in outputs)
    if sorted(kinds) != ["ids", "logits", "weights"]:
        return
    expected = {kind: output.cpu() for kind, output in zip(kinds, outputs, strict=True)}
    logits, dtype = expected["logits"], expected["weights"].dtype
    correction = _correction(router)
    added = None if correction is None else correction.cpu()
    # By what the router itself calls: another order of sums would hide which precision it is.
    precisions = [
        precision
        for precision in dict.fromkeys((weight.dtype, torch.float32))
        if torch.equal(_logits(router, F.linear, precision, x).float().cpu(), logits.float())
    ]
    for spec in _specs(router, top_k) if precisions else ():
        ids, weights = select_experts(logits, spec, added, dtype)
        alike = _same_choice(ids, expected["ids"])
        ours, own = (
            w.gather(1, i.argsort(-1))[alike]
            for w, i in ((weights, ids), (expected["weights"], expected["ids"]))
        )
        if alike.float().mean() >= same and close(ours, own, units):
            yield from (RouterFormula(spec, precision, dtype, kinds) for precision in precisions)


def _with_drawn_numbers(router: Any) -> Any:
    """A copy to be run, whose logits differ from expert to expert."""
    probe = try_out(router)
    for name in ("weight", "bias", "e_score_correction_bias"):
        for place in (probe._parameters, probe._buffers):
            own = place.get(name)
            if own is None:
                continue
            # Behind the numbers that the hidden states are.
            rows = draw(_PROBED + len(own), *own.shape[1:], dtype=torch.float32)[_PROBED:]
            spread = own.shape[1] ** -0.5 if name == "weight" else 0.1
            drawn = (rows * spread).to(own)
            if place is probe._parameters:
                drawn = nn.Parameter(drawn, requires_grad=False)
            place[name] = drawn
    return probe


def _forward(router: Any, formula: RouterFormula, product: Product) -> Forward:
    correction = _correction(router)
    if formula.precision != router.weight.dtype:
        # `linear` reads weights before the kernel ahead of it has ended, which would be the one
        # that converts them.
        product = F.linear

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, ...]:
        logits = _logits(self, product, formula.precision, hidden_states)
        ids, weights = select_experts(logits, formula.spec, correction, formula.dtype)
        made = {"logits": logits, "weights": weights, "ids": ids}
        return tuple(made[kind] for kind in formula.outputs)

    return forward


def _kind_of_output(output: Any, top_k: int, num_experts: int) -> str:
    if not isinstance(output, Tensor) or output.ndim != 2:
        return "unknown"
    if not output.is_floating_point():
        return "ids"
    # Where a token takes all experts the two look the same, and nothing is replaced.
    return {num_experts: "logits", top_k: "weights"}.get(output.shape[1], "unknown")


def _specs(router: Any, top_k: int) -> Iterator[RouterSpec]:
    plain = RouterSpec(top_k, scaling_factor=float(getattr(router, "routed_scaling_factor", 1.0)))
    groups = getattr(router, "num_group", getattr(router, "n_group", None)) or 1
    in_groups = replace(
        plain, num_groups=groups, topk_groups=getattr(router, "topk_group", None) or groups
    )
    scores: tuple[GroupScore, ...] = ("top2", "max") if groups > 1 else ("max",)
    for scoring in get_args(Scoring):
        for normalize, group_score in pairs((True, False), scores):
            yield replace(in_groups, scoring=scoring, normalize=normalize, group_score=group_score)


def _same_choice(ids: Tensor, own_ids: Tensor) -> Tensor:
    """(tokens,) bool: which of them go to the same experts."""
    return (ids.sort(-1)[0] == own_ids.sort(-1)[0]).all(-1)
