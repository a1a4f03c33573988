"""Kernels in place of a model's small pieces, while qmoe runs the model.

transformers writes a norm as eight launches and a router as five. In a decode step, where each
works on a few thousand numbers, launches are most of the time. Here are the pieces that have one
kernel each, found in a model by what they are and checked by a probe: a piece that does not give
what the model's own gives stays as it is. Nothing is left behind: outside of `Substitutions.active`
the model is its own.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from qmoe.decoding.kv_cache import DecodeCache
from qmoe.experts.quantized import quantized_modules
from qmoe_kernels.attention import decode_attention
from qmoe_kernels.linear import linear
from qmoe_kernels.norm import rms_norm
from qmoe_kernels.rope import rotate
from qmoe_kernels.router import GroupScore, RouterSpec, Scoring, select_experts

# In the order in which docs/generate.md adds one to the other.
SUBSTITUTIONS = ("attention", "norms", "rotary", "router", "qkv", "linears")

_ATTENTION = "qmoe"
_ROTARY_NAMES = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")
# An attribute, and what takes its place.
Place = tuple[Any, str, Any]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # as torch.nn.functional.linear


class UnknownAttention(NotImplementedError):
    """A model's attention is more than qmoe's computes."""


class Substitutions:
    """What can be substituted in a model.

    Attributes:
        attention: whether decode steps use qmoe's attention, and need no mask.
    """

    def __init__(self, model: Any, names: Iterable[str] = SUBSTITUTIONS) -> None:
        """Find the pieces of ``model`` that have a kernel.

        Args:
            model: a causal language model of transformers, on one device.
            names: of `SUBSTITUTIONS`, those that are wanted.

        Raises:
            ValueError: a name that is none of them.
        """
        names = set(names)
        if unknown := names - set(SUBSTITUTIONS):
            raise ValueError(
                f"no substitution {', '.join(sorted(unknown))}; "
                f"there are {', '.join(SUBSTITUTIONS)}"
            )
        configs = (model.config, model.config.get_text_config())
        self.configs = {id(config): config for config in configs}.values()
        self.attention = "attention" in names and has_attention_interface(model)
        self.places: list[Place] = []
        with torch.no_grad():
            product: Product = linear if "linears" in names else F.linear
            if "norms" in names:
                self.places += _norms(model)
            if "rotary" in names:
                self.places += _rotary(model)
            if "router" in names:
                self.places += _routers(model, product)
            if "linears" in names:
                self.places += _linears(model)
            if "qkv" in names:
                self.places += _merged_products(model, product)
        # Merged products are linears too: the later of two substitutes counts.
        self.places = list({(id(o), name): (o, name, s) for o, name, s in self.places}.values())

    @contextmanager
    def active(self, cache: DecodeCache) -> Iterator[None]:
        """Run the model with its substitutes; with qmoe's attention where ``cache`` decodes."""
        places = list(self.places)
        if self.attention and cache.decoding:
            places += [(c, "_attn_implementation_internal", _ATTENTION) for c in self.configs]
        before = [vars(owner).get(name, _ABSENT) for owner, name, _ in places]
        _running.cache = cache
        try:
            for owner, name, substitute in places:
                setattr(owner, name, substitute)
            yield
        finally:
            _running.cache = None
            for (owner, name, _), value in zip(places, before, strict=True):
                if value is _ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)


_ABSENT = object()
_running = threading.local()


def _draw(*shape: int, dtype: torch.dtype) -> Tensor:
    """The same random numbers each time, on the CPU.

    Probes compare there, where pieces are plain torch: on a GPU each would compile a kernel.
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal up to two units in the last place of the largest value of a row."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    bound = 2 * torch.finfo(found.dtype).eps * expected.abs().amax(-1, keepdim=True)
    return bool(((found - expected).abs() <= bound).all())


def _kind(module: nn.Module) -> tuple[object, ...]:
    """What modules have in common of which one probe tells about all."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    sizes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors)
    numbers = ((k, v) for k, v in vars(module).items() if isinstance(v, bool | int | float | str))
    return type(module), sizes, tuple(sorted(numbers))


def _has_own_forward(module: nn.Module) -> bool:
    """Return whether ``module`` runs as its class says: no hook of accelerate, no patch."""
    return "forward" not in vars(module)


# ---- attention ---------------------------------------------------------------------------------


def has_attention_interface(model: Any) -> bool:
    """Return whether the model's attention can be any function of transformers' interface."""
    config = model.config.get_text_config()
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        # Chunks are known to masks only.
        and getattr(config, "attention_chunk_size", None) is None
    )


def _attention(
    module: nn.Module,
    query: Tensor,  # (rows, num_heads, 1, head_dim)
    key: Tensor,  # (rows, num_kv_heads, length, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One new token's attention over the columns that the running cache has filled."""
    # Switches and sizes are for masks and outputs; a tensor or a factor would change the result.
    others = {k: v for k, v in others.items() if k not in ("position_ids", "dropout")}
    meant = [k for k, v in others.items() if isinstance(v, Tensor | float)]
    if meant or attention_mask is not None:
        raise UnknownAttention(
            f"{type(module).__name__} calls attention with {', '.join(meant) or 'a mask'}"
        )
    cache: DecodeCache = _running.cache
    output = decode_attention(
        query[:, :, 0],
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache.start,
        cache.end,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        sinks=s_aux,
        softcap=softcap,
        early=True,  # start and end are written between steps only
    )
    return output[:, None], None  # (rows, 1, num_heads, value_dim)


# transformers makes no masks for an implementation that has no function for them.
AttentionInterface.register(_ATTENTION, _attention)


# ---- norms -------------------------------------------------------------------------------------


def _norms(model: nn.Module) -> list[Place]:
    found: dict[tuple[object, ...], Norm | None] = {}
    places: list[Place] = []
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm") or not _has_own_forward(module):
            continue
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 1 or weight.dtype != getattr(model, "dtype", None):
            continue
        kind = _kind(module)
        if kind not in found:
            found[kind] = _norm_formula(module)
        if (formula := found[kind]) is not None:
            places.append((module, "forward", _norm_substitute(module, formula)))
    return places


Norm = Callable[[Tensor, Tensor], Tensor]  # of hidden states and a weight


def _norm_formula(norm: Any) -> Norm | None:
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if epsilon is None:
        return None
    x = _draw(4, len(norm.weight), dtype=norm.weight.dtype)
    weight = 1 + 0.3 * _draw(len(norm.weight), dtype=norm.weight.dtype)
    try:
        expected = torch.func.functional_call(norm, {"weight": weight}, (x,))
    except (TypeError, RuntimeError):  # it takes or has more than hidden states and a weight
        return None
    candidates: list[Norm] = [
        partial(rms_norm, epsilon=epsilon),
        partial(rms_norm, epsilon=epsilon, round_before_weight=False),
        partial(rms_norm, epsilon=epsilon, round_before_weight=False, weight_offset=1.0),
    ]
    found = [candidate(x, weight) for candidate in candidates]
    errors = [float((ours - expected).abs().sum()) for ours in found]
    best = errors.index(min(errors))
    return candidates[best] if _close(found[best], expected) else None


def _norm_substitute(norm: Any, formula: Norm) -> Callable[[Tensor], Tensor]:
    return lambda hidden_states: formula(hidden_states, norm.weight)


# ---- rotary embeddings -------------------------------------------------------------------------


def _rotary(model: Any) -> list[Place]:
    named = dict(model.named_modules())
    embeddings = [m for name, m in named.items() if name.endswith("rotary_emb")]
    if not embeddings:
        return []
    families = {
        type(m).__module__ for m in named.values() if type(m).__name__.endswith("Attention")
    }
    places: list[Place] = []
    for family in sorted(families):
        module = sys.modules[family]
        for name in _ROTARY_NAMES:
            original = getattr(module, name, None)
            if original is None:
                continue
            for half_angles in (False, True):
                form = partial(
                    rotate, interleaved=name.endswith("interleave"), half_angles=half_angles
                )
                if _rotates_alike(original, form, embeddings[0], model):
                    places.append((module, name, _rotary_substitute(original, form)))
                    break
    return places


Rotation = Callable[..., tuple[Tensor, Tensor]]


def _rotary_substitute(original: Rotation, form: Rotation) -> Rotation:
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:  # else another axis to broadcast over
            with suppress(ValueError):  # sizes that no head of the probe had
                return form(q, k, cos, sin)
        return original(q, k, cos, sin, *args, **kwargs)

    return rotary


def _rotates_alike(original: Rotation, form: Rotation, embedding: Any, model: Any) -> bool:
    positions = torch.tensor([[1, 5, 70], [0, 2, 3]], device=model.device)
    try:
        # Of the hidden states only dtype and device count here.
        tables = embedding(_draw(2, 3, 8, dtype=model.dtype).to(model.device), positions)
        cos, sin = (table.cpu() for table in tables)
    except (TypeError, ValueError, AttributeError):  # tables by kind of layer, or of several axes
        return False
    config = model.config.get_text_config()
    sizes = {cos.shape[-1], 2 * cos.shape[-1], getattr(config, "head_dim", None) or cos.shape[-1]}
    known = False
    for size in sorted(sizes):
        q = _draw(2, 3, 4, size, dtype=model.dtype).transpose(1, 2)
        k = _draw(2, 3, 2, size, dtype=model.dtype).transpose(1, 2)
        try:
            expected, found = original(q, k, cos, sin), form(q, k, cos, sin)
        except (RuntimeError, ValueError):  # not a size that the model has
            continue
        if not all(map(_close, found, expected)):
            return False
        known = True
    return known


# ---- routers -----------------------------------------------------------------------------------


def _routers(model: nn.Module, product: Product) -> list[Place]:
    found: dict[tuple[object, ...], RouterFormula | None] = {}
    places: list[Place] = []
    for name, experts in quantized_modules(model).items():
        block = model.get_submodule(name.rpartition(".")[0])
        for router in block.modules():
            weight = getattr(router, "weight", None)
            if (
                "Router" not in type(router).__name__
                or not _has_own_forward(router)
                or weight is None
                or weight.shape != (experts.num_experts, experts.layout.hidden_size)
            ):
                continue
            kind = _kind(router)
            if kind not in found:
                found[kind] = _router_formula(router)
            if (formula := found[kind]) is not None:
                places.append((router, "forward", _router_substitute(router, formula, product)))
    return places


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


def _router_logits(
    router: Any, product: Product, precision: torch.dtype, hidden_states: Tensor
) -> Tensor:
    bias = getattr(router, "bias", None)
    return product(
        hidden_states.reshape(-1, router.weight.shape[1]).to(precision),
        router.weight.to(precision),
        None if bias is None else bias.to(precision),
    )


def _correction(router: Any) -> Tensor | None:
    correction = getattr(router, "e_score_correction_bias", None)
    return None if correction is None else correction.detach().flatten()


def _router_formula(router: Any) -> RouterFormula | None:
    weight, top_k = router.weight, getattr(router, "top_k", None)
    x = _draw(64, weight.shape[1], dtype=weight.dtype).to(weight.device)
    try:
        outputs = router(x)
    except (TypeError, RuntimeError):
        return None
    if not isinstance(top_k, int) or not isinstance(outputs, tuple) or len(outputs) != 3:
        return None
    kinds = tuple(_kind_of_output(t, top_k, weight.shape[0]) for t in outputs)
    if sorted(kinds) != ["ids", "logits", "weights"]:
        return None
    expected = {kind: output.cpu() for kind, output in zip(kinds, outputs, strict=True)}
    logits, dtype = expected["logits"], expected["weights"].dtype
    correction = _correction(router)
    added = None if correction is None else correction.cpu()
    for precision in (weight.dtype, torch.float32):
        # By what the router itself calls: another order of sums would hide which it is.
        found = _router_logits(router, F.linear, precision, x)
        if torch.equal(found.float().cpu(), logits.float()):
            break
    else:
        return None
    for spec in _router_specs(router, top_k):
        ids, weights = select_experts(logits, spec, added, dtype)
        if _same_choice(ids, weights, expected["ids"], expected["weights"]):
            return RouterFormula(spec, precision, dtype, kinds)
    return None


def _router_substitute(
    router: Any, formula: RouterFormula, product: Product
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    correction = _correction(router)
    if formula.precision != router.weight.dtype:
        # `linear` reads weights before the kernel ahead of it has ended, which would be the one
        # that converts them.
        product = F.linear

    def forward(hidden_states: Tensor) -> tuple[Tensor, ...]:
        logits = _router_logits(router, product, formula.precision, hidden_states)
        ids, weights = select_experts(logits, formula.spec, correction, formula.dtype)
        made = {"logits": logits, "weights": weights, "ids": ids}
        return tuple(made[kind] for kind in formula.outputs)

    return forward


def _kind_of_output(output: Tensor, top_k: int, num_experts: int) -> str:
    if output.ndim != 2:
        return "unknown"
    if not output.is_floating_point():
        return "ids"
    # Where a token takes all experts the two look the same, and nothing is substituted.
    return {num_experts: "logits", top_k: "weights"}.get(output.shape[1], "unknown")


def _router_specs(router: Any, top_k: int) -> Iterator[RouterSpec]:
    plain = RouterSpec(top_k, scaling_factor=float(getattr(router, "routed_scaling_factor", 1.0)))
    groups = getattr(router, "num_group", getattr(router, "n_group", None)) or 1
    in_groups = replace(
        plain, num_groups=groups, topk_groups=getattr(router, "topk_group", None) or groups
    )
    scores: tuple[GroupScore, ...] = ("top2", "max") if groups > 1 else ("max",)
    for scoring in get_args(Scoring):
        for normalize, group_score in product((True, False), scores):
            yield replace(in_groups, scoring=scoring, normalize=normalize, group_score=group_score)


def _same_choice(ids: Tensor, weights: Tensor, own_ids: Tensor, own_weights: Tensor) -> bool:
    order, own_order = ids.argsort(-1), own_ids.argsort(-1)
    same = (ids.gather(1, order) == own_ids.gather(1, own_order)).all(-1)
    # Of two experts whose logits are equal after rounding either may be chosen.
    if same.float().mean() < 0.9:
        return False
    return _close(weights.gather(1, order)[same], own_weights.gather(1, own_order)[same])


# ---- products ----------------------------------------------------------------------------------


def _linears(model: nn.Module) -> list[Place]:
    def substitute(module: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: linear(x, module.weight, module.bias)

    return [(m, "forward", substitute(m)) for m in model.modules() if _is_plain_linear(m)]


def _merged_products(model: nn.Module, product: Product) -> list[Place]:
    places: list[Place] = []
    for module in model.modules():
        linears = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        if all(map(_is_plain_linear, linears)) and _fit_together(linears):
            places += _merge(linears, product)
    if places and torch.cuda.is_initialized():
        # Where the parts were is too small for what was merged, and nobody's memory by now.
        torch.cuda.empty_cache()
    return places


def _is_plain_linear(module: Any) -> bool:
    return type(module) is nn.Linear and _has_own_forward(module)


def _fit_together(linears: Sequence[Any]) -> bool:
    def described(linear: Any) -> tuple[object, ...]:
        weight = linear.weight
        return linear.in_features, linear.bias is None, weight.dtype, weight.device

    return len(set(map(described, linears))) == 1


def _merge(linears: Sequence[Any], product: Product) -> list[Place]:
    """Let the first of ``linears`` compute for all of them, and the others hand out their part.

    Their weights become parts of one tensor, and take no more memory than before.
    """
    weight = _as_one([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else _as_one([linear.bias for linear in linears])
    sizes = [linear.out_features for linear in linears]
    computed: dict[int, tuple[Tensor, Tensor]] = {}  # by number of linear: input, part of output

    def first(x: Tensor) -> Tensor:
        parts = product(x, weight, bias).split(sizes, dim=-1)
        computed.update((i, (x, part)) for i, part in enumerate(parts[1:], 1))
        return parts[0]

    def other(i: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            of, part = computed.pop(i, (None, None))
            if of is not x or part is None:  # asked for other rows than the first was
                return product(x, linears[i].weight, linears[i].bias)
            return part

        return forward

    return [(linear, "forward", first if i == 0 else other(i)) for i, linear in enumerate(linears)]


def _as_one(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One tensor of all rows, of which the parameters become views, if they are not already."""
    first = parameters[0].detach()
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    together = True
    for parameter in parameters:
        together &= (
            parameter.is_contiguous()
            and parameter.untyped_storage().data_ptr() == storage
            and parameter.storage_offset() == offset
        )
        offset += parameter.numel()
    if together:
        shape = (sum(map(len, parameters)), *first.shape[1:])
        return first.as_strided(shape, first.stride())
    merged = torch.cat([p.detach() for p in parameters])
    parts = merged.split([len(p) for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return merged
