"""How a model stores its experts, read off the module itself, and the canonical form.

Models differ: weights transposed or not, gate and up rows concatenated or interleaved, biases, no
gate at all, three flat matrices (DBRX).  :func:`find_experts` describes each experts module of a
model by an :class:`ExpertsLayout`, which brings its tensors to the one form that kernels, cache and
files know, and back.  Modules are recognized by their attributes, not by their class, since third
parties swap classes.

Canonical, per layer::

    gate_up_proj  (num_experts, 2 * intermediate_size, hidden_size)   gate rows, then up rows
    up_proj       (num_experts, intermediate_size, hidden_size)       instead, without a gate
    down_proj     (num_experts, hidden_size, intermediate_size)

Nothing here reads a weight's value, so a model on the meta device is described as well as a real
one.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

# Experts that are no 3-D weights behind one call; refused by name rather than left in 16 bit
# silently.
UNSUPPORTED_CLASSES = {
    "JetMoeParallelExperts": "jetmoe",
    "SwitchTransformersExperts": "switch_transformers",
    "NllbMoeExperts": "nllb_moe",
}


@dataclass(frozen=True)
class ExpertsLayout:
    """One experts module: its sizes, and where and how it keeps its weights.

    Attributes:
        num_experts: experts that have weights.
        hidden_size: input and output features of an expert.
        intermediate_size: features between its two products.
        gated: whether the first product has gate rows.
        sources: canonical projection -> the module's own parameter names, relative to the module.
        transposed: the module stores (in, out).
        interleaved: gate and up rows alternate.
        num_identity_experts: ids past ``num_experts`` that return their input (LongCat's zero
        experts).
        flat: the module stores (num_experts * intermediate_size, hidden_size) matrices (DBRX).
        dense: the module takes every token for every expert, weighted beforehand (Llama 4).
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    sources: dict[str, tuple[str, ...]]
    transposed: bool = False
    interleaved: bool = False
    num_identity_experts: int = 0
    flat: bool = False
    dense: bool = False

    @property
    def up_name(self) -> str:
        """The canonical name of the first projection: ``gate_up_proj`` or ``up_proj``."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def projections(self) -> tuple[str, str]:
        """The canonical names of the two quantized projections."""
        return self.up_name, "down_proj"

    @property
    def biases(self) -> tuple[str, ...]:
        """The canonical names of the biases, if the experts have any."""
        return tuple(name for name in self.sources if name.endswith("_bias"))

    def shape(self, projection: str) -> tuple[int, ...]:
        """The canonical shape of a projection or a bias, all experts."""
        rows = self.hidden_size
        columns: int | None = self.intermediate_size
        if projection.startswith(self.up_name):
            rows = self.intermediate_size * (2 if self.gated else 1)
            columns = self.hidden_size
        if projection.endswith("_bias"):
            return (self.num_experts, rows)
        assert columns is not None
        return (self.num_experts, rows, columns)

    def canonical(self, projection: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Bring a projection or bias of some experts to its canonical form.

        Args:
            projection: a key of ``sources``.
            tensors: the module's tensors in the order of ``sources[projection]``, either whole or a
                slice of experts along dim 0 (for flat storage: whole multiples of an expert's
                rows).

        Returns:
            (experts, out_features, in_features) or, for a bias, (experts, out_features);
            contiguous. A view of the input where that is already canonical.
        """
        if self.flat:
            parts = [t.unflatten(0, (-1, self.intermediate_size)) for t in tensors]
            merged = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            # DBRX multiplies by w2 untransposed: (intermediate, hidden), so its K is the rows.
            return (merged if projection == self.up_name else merged.transpose(1, 2)).contiguous()
        (tensor,) = tensors
        tensor = tensor[: self.num_experts]  # LongCat has unused rows for its identity experts
        if self.transposed and not projection.endswith("_bias"):
            tensor = tensor.transpose(1, 2)
        if self.interleaved and projection.startswith(self.up_name):
            # Not torch.cat: autocast refuses factors in another 16-bit dtype than its own.
            tensor = tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return tensor.contiguous()

    def canonical_factors(
        self, projection: str, left: torch.Tensor, right: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bring two factors, whose product is added to a projection, to the canonical form.

        Args:
            projection: a key of ``sources``, of a module that stores it as one 3-D tensor.
            left, right: (experts, rows, rank) and (experts, rank, columns) of the module's own
                tensor.

        Returns:
            (num_experts, out_features, rank) and (num_experts, rank, in_features), whose product is
            that of `canonical` of the product.
        """
        outer, inner = (right, left.transpose(1, 2)) if self.transposed else (left, right)
        return self.canonical(projection, [outer]), inner[: self.num_experts]

    def restore(self, projection: str, canonical: torch.Tensor) -> list[torch.Tensor]:
        """Undo :meth:`canonical` for all experts: the tensors of ``sources[projection]``."""
        if self.flat:
            if projection == "down_proj":
                return [canonical.transpose(1, 2).flatten(0, 1).contiguous()]
            return [half.flatten(0, 1).contiguous() for half in canonical.chunk(2, dim=1)]
        tensor = canonical
        if self.interleaved and projection.startswith(self.up_name):
            tensor = torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)
        if self.transposed and not projection.endswith("_bias"):
            tensor = tensor.transpose(1, 2)
        if self.num_identity_experts and projection == self.up_name:
            unused = tensor.new_zeros(self.num_identity_experts, *tensor.shape[1:])
            tensor = torch.cat((tensor, unused))
        return [tensor.contiguous()]


def find_experts(model: nn.Module) -> dict[str, ExpertsLayout]:
    """Describe every experts module of ``model`` by its name.

    Args:
        model: any model; meta tensors suffice.

    Raises:
        ValueError: the model has no experts, has experts that qmoe does not support (named), ties
            them, has an adapter on them, or an experts module holds a parameter that no layout
            accounts for.
    """
    layouts: dict[str, ExpertsLayout] = {}
    for name, module in model.named_modules():
        family = UNSUPPORTED_CLASSES.get(type(module).__name__)
        if family is not None:
            raise ValueError(
                f"{type(model).__name__}: {family} keeps its experts as {type(module).__name__} "
                f"({name}), which qmoe does not support; docs/models.md lists what works"
            )
        layout = describe(module)
        if layout is None:
            _check_not_taken_apart(name, module)
        else:
            _check_no_adapter(name, module)
            _check_all_parameters_accounted_for(name, module, layout)
            layouts[name] = layout
    if not layouts:
        raise ValueError(
            f"{type(model).__name__} holds no experts that qmoe can quantize; "
            "it takes Mixture-of-Experts models, docs/models.md lists them"
        )
    _check_not_tied(model, layouts)
    return layouts


def describe(module: nn.Module) -> ExpertsLayout | None:
    """The layout of one module, or None if it is no experts module."""
    down = _weight(module, "down_proj")
    if down is not None and down.ndim == 3:
        return _describe_fused(module, down)
    mlp = module._modules.get("mlp")
    if mlp is not None and {"w1", "v1", "w2"} <= mlp._parameters.keys():
        return _describe_flat(module, mlp)
    return None


def _weight(module: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter of the module's own, also one that torch computes by a parametrization."""
    if parametrize.is_parametrized(module, name):
        return getattr(module, name)
    return module._parameters.get(name)


def _describe_fused(module: nn.Module, down: torch.Tensor) -> ExpertsLayout | None:
    ups = {name: _weight(module, name) for name in ("gate_up_proj", "up_proj")}
    up_name, up = next(((n, w) for n, w in ups.items() if w is not None), ("", None))
    if up is None or up.ndim != 3:
        return None
    inputs = list(inspect.signature(type(module).forward).parameters)[1:]
    # Routed experts take ids and weights of the experts, or (Llama 4) weighted tokens alone. Shared
    # experts that lie in one tensor as well (Inkling) run for every token and stay in 16 bit.
    if len(inputs) == 2:
        return None
    gated = up_name == "gate_up_proj"
    # With a gate the shapes alone tell: (2I, H) and (H, I) against (H, 2I) and (I, H).
    transposed = up.shape[1] == down.shape[2] if gated else getattr(module, "is_transposed", False)
    hidden, intermediate = (
        (down.shape[2], down.shape[1]) if transposed else (down.shape[1], down.shape[2])
    )
    num_experts = down.shape[0]
    sources: dict[str, tuple[str, ...]] = {up_name: (up_name,), "down_proj": ("down_proj",)}
    for projection in (up_name, "down_proj"):
        if module._parameters.get(f"{projection}_bias") is not None:
            sources[f"{projection}_bias"] = (f"{projection}_bias",)
    return ExpertsLayout(
        num_experts=num_experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        gated=gated,
        sources=sources,
        transposed=bool(transposed),
        interleaved=gated and not getattr(module, "is_concatenated", True),
        num_identity_experts=up.shape[0] - num_experts,
        dense=inputs == ["hidden_states"],
    )


def _describe_flat(module: nn.Module, mlp: nn.Module) -> ExpertsLayout:
    w1 = mlp._parameters["w1"]
    num_experts = module.num_experts
    assert w1 is not None and isinstance(num_experts, int)
    return ExpertsLayout(
        num_experts=num_experts,
        hidden_size=w1.shape[1],
        intermediate_size=w1.shape[0] // num_experts,
        gated=True,
        sources={"gate_up_proj": ("mlp.w1", "mlp.v1"), "down_proj": ("mlp.w2",)},
        flat=True,
    )


def _check_not_taken_apart(name: str, module: nn.Module) -> None:
    """Refuse experts of which one projection has been replaced, by `weight_norm` for instance."""
    for projection, other in (("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj")):
        parameter = module._parameters.get(projection)
        if parameter is not None and parameter.ndim == 3 and hasattr(module, other):
            raise ValueError(
                f"{name}.{other} is no parameter of {type(module).__name__} any more; undo what "
                "took it apart (weight_norm, a parametrization) first"
            )


def _check_all_parameters_accounted_for(
    name: str, module: nn.Module, layout: ExpertsLayout
) -> None:
    known = {source for sources in layout.sources.values() for source in sources}
    kept = tuple(f"{child}." for child in kept_modules(module))
    for parameter, _ in (*module.named_parameters(), *module.named_buffers()):
        if parameter not in known and not parameter.startswith(kept):
            raise ValueError(
                f"{name}.{parameter}: an unknown parameter of {type(module).__name__}; "
                "quantizing around it could be silently wrong"
            )


def _check_no_adapter(name: str, module: nn.Module) -> None:
    # PEFT keeps what it wraps as `base_layer`, and computes a parameter by a parametrization.
    if name.rpartition(".")[2] == "base_layer" or parametrize.is_parametrized(module):
        raise ValueError(
            f"{name.replace('.base_layer', '')} has an adapter on its experts, which would get "
            "lost; put it on when they are in 8 bit, or merge it into the model first "
            "(model.merge_and_unload() of PEFT)"
        )


def _check_not_tied(model: nn.Module, layouts: dict[str, ExpertsLayout]) -> None:
    """Refuse experts that stand in two places: quantizing one of them would untie them."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        layout = layouts.get(name) or describe(module)
        for source in (s for sources in layout.sources.values() for s in sources) if layout else ():
            parameter = f"{name}.{source}"
            owner = tied.get(parameter) or owners.setdefault(
                id(module.get_parameter(source)), parameter
            )
            if owner != parameter:
                raise ValueError(
                    f"{type(model).__name__} ties its experts ({parameter} is {owner}), "
                    "which qmoe does not support; docs/models.md lists what works"
                )


def kept_modules(module: nn.Module) -> tuple[str, ...]:
    """Children of an experts module that stay in 16 bit and keep their names."""
    return ("post_expert_norm",) if getattr(module, "has_post_expert_norm", False) else ()
