"""The module that takes the place of a model's experts: 8-bit weights, same call, same output."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.nn.modules.module import register_module_module_registration_hook

from qmoe.checkpoints.schema import BIAS_SUFFIX, QUANTIZED_SUFFIX, SCALE_SUFFIX
from qmoe.experts.gate import apply_own_gate, identify_activation
from qmoe.experts.layout import ExpertsLayout, describe, kept_modules
from qmoe.experts.llama4 import WeightedInputMoe
from qmoe.experts.low_rank import LowRank, activate, combine
from qmoe.experts.pages import LayerPages
from qmoe.parallel.group import RankGroup
from qmoe.parallel.share import Share
from qmoe_kernels import Activation, QuantizedRows, fused_moe, grouped_linear, weighted_sum
from qmoe_kernels.experts import Experts, Projection
from qmoe_kernels.fused_moe import EIGHT_BIT_ROWS, check_activations, row_format
from qmoe_kernels.low_rank import adapted_moe, adapted_moe_supports
from qmoe_kernels.quantization import STORAGE_DTYPE, WeightFormat, dequantize, quantize

if TYPE_CHECKING:
    from qmoe.paging.expert_cache import ExpertCache

# Where a module keeps what was registered on it: torch's own names.
_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)


@dataclass
class Change:
    """A change of all layers of a model, shared by the experts modules that it has reached.

    Attributes:
        what: the function to call again: ``"qmoe.patch"``.
        finished: whether it has reached all of them. Until then nothing runs and nothing is saved.
    """

    what: str
    finished: bool = False

    def check_finished(self) -> None:
        """Raise RuntimeError if the change was cut off."""
        if not self.finished:
            raise RuntimeError(
                f"{self.what} was cut off before it had done all layers of this model; "
                f"call {self.what} again to finish it, or load the model again"
            )


class _SpreadExperts(torch.autograd.Function):
    """The output of experts on several ranks, which does not know what it was made of."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        raise RuntimeError(
            "experts on several ranks have no gradient; load the model without expert_parallel to "
            "train beside them"
        )


class QuantizedExperts(nn.Module):
    """Experts of one layer with INT8 or FP8 weights and one fp32 scale per output channel.

    Takes the place of a transformers experts module and is called as that is:
    ``experts(hidden_states, top_k_index, top_k_weights)``. Whatever experts implementation the
    model's config names, this module computes with qmoe's kernels.

    Parameters (canonical, see `qmoe.experts.layout`; ``up`` is ``gate_up_proj`` or ``up_proj``)::

        {up}_q          (num_experts, 2 * intermediate_size, hidden_size) int8 | float8_e4m3fn
        {up}_scale      (num_experts, 2 * intermediate_size) fp32
        {up}_bias       (num_experts, 2 * intermediate_size) 16 bit, where the model has biases
        down_proj_q     (num_experts, hidden_size, intermediate_size) int8 | float8_e4m3fn
        down_proj_scale (num_experts, hidden_size) fp32
        down_proj_bias  (num_experts, hidden_size) 16 bit, where the model has biases

    A *paged* module has no ``*_q`` parameters: its weights are pages of an expert cache, and only
    those that tokens are routed to are on the device.

    A module with a *share* holds the experts of one rank alone: its parameters and pages count
    those, and ids are the layer's.

    Attributes:
        weights: ``"int8"`` or ``"fp8"``.
        activations: what the products take, see :func:`qmoe_kernels.fused_moe`.
        layout: how the model's own module stores its experts, as many as are held here.
        num_experts: of the layer, those of other ranks included.
        share: this rank's experts, where others hold the rest; None where all are here.
        activation: the nonlinearity, or None where the module's own gate is called between the
        products.
        compute_dtype: of the module's own weights; `.to(dtype)` changes it.
        paged: the cache that holds the weights and the layer's index in it; None where they are
        parameters.
        change: the change that made this module or is about to undo it, if any.
        source: the model's own module, without its weights once this one is installed.
    """

    source: nn.Module

    def __init__(
        self,
        source: nn.Module,
        weights: WeightFormat,
        activations: str = "auto",
        *,
        paged: bool = False,
        share: Share | None = None,
    ) -> None:
        """Describe ``source`` and take over what is registered on it; parameters are meta.

        Args:
            source: a model's experts module; unchanged until :func:`install`. It is kept so that
                :meth:`restore` can give it back.
            weights: ``"int8"`` or ``"fp8"``.
            activations: see :func:`qmoe_kernels.fused_moe`.
            paged: leave the weights out; :meth:`page` or :meth:`unpage` brings them.
            share: hold these experts alone. Everything that counts experts is left out then;
                :meth:`take_share` brings scales and biases, and the weights come as to a paged one.

        Raises:
            ValueError: no experts module, or activations that these weights do not go with.
        """
        super().__init__()
        check_activations(activations, weights)
        layout = describe(source)
        if layout is None:
            raise ValueError(f"{type(source).__name__} is no experts module that qmoe knows")
        self.layout = layout if share is None else replace(layout, num_experts=share.count)
        self.share = share
        self.weights = weights
        self.activations = activations
        self.paged: tuple[ExpertCache, int] | None = None
        self.change: Change | None = None
        self.num_experts = layout.num_experts
        self.activation = identify_activation(source, layout)
        self.compute_dtype = source.get_parameter(layout.sources["down_proj"][0]).dtype
        for name in kept_modules(source):
            self.add_module(name, getattr(source, name))
        for projection in layout.projections:
            shape = layout.shape(projection)
            if paged or share is not None:
                self.register_parameter(projection + QUANTIZED_SUFFIX, None)
            else:
                self._register(projection + QUANTIZED_SUFFIX, shape, STORAGE_DTYPE[weights])
            if share is None:
                self._register(projection + SCALE_SUFFIX, shape[:2], torch.float32)
            else:
                self.register_parameter(projection + SCALE_SUFFIX, None)
        for bias in layout.biases:
            (name,) = layout.sources[bias]
            if share is None:
                self._register(bias, layout.shape(bias), source.get_parameter(name).dtype)
            else:
                self.register_parameter(bias, None)
        # Not a submodule: only its class, config and gate are still wanted, not its weights.
        self.__dict__["source"] = source
        # The same dictionaries: a handle removes its hook from here, and `source` has them again.
        self.__dict__.update({hooks: vars(source)[hooks] for hooks in _HOOKS})
        self.training = source.training
        self._is_hf_initialized = True  # nothing here is ever drawn at random

    def _register(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        empty = torch.empty(shape, dtype=dtype, device="meta")
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    @classmethod
    @torch.no_grad()
    def quantized_from(
        cls,
        source: nn.Module,
        weights: WeightFormat,
        activations: str = "auto",
        *,
        name: str = "experts",
    ) -> QuantizedExperts:
        """Quantize the weights of ``source`` where they are.

        Args:
            source: a model's experts module with real weights; unchanged until :func:`install`.
            weights: ``"int8"`` or ``"fp8"``.
            activations: see :func:`qmoe_kernels.fused_moe`.
            name: the module's name, for errors.

        Raises:
            ValueError: a weight holds NaN or infinity.
        """
        layout = describe(source)
        if layout is None:
            raise ValueError(
                f"{name}: {type(source).__name__} is no experts module that qmoe knows"
            )
        tensors: dict[str, torch.Tensor] = {}
        for projection in layout.projections:
            canonical = layout.canonical(
                projection, [source.get_parameter(n) for n in layout.sources[projection]]
            )
            q, scale = quantize(canonical, weights, name=f"{name}.{projection}")
            tensors[projection + QUANTIZED_SUFFIX] = q
            tensors[projection + SCALE_SUFFIX] = scale
        for bias in layout.biases:
            tensors[bias] = layout.canonical(
                bias, [source.get_parameter(n).detach() for n in layout.sources[bias]]
            )
        experts = cls(source, weights, activations)
        for key, tensor in tensors.items():
            setattr(experts, key, nn.Parameter(tensor, requires_grad=False))
        return experts

    @torch.no_grad()
    def restore(self, dtype: torch.dtype) -> nn.Module:
        """Give the model's own module back, with the dequantized weights in ``dtype``."""
        source = self.source
        quantized = dict(zip(self.layout.projections, self.quantized_weights(), strict=True))
        for projection, names in self.layout.sources.items():
            if projection.endswith(BIAS_SUFFIX):
                canonical = getattr(self, projection).to(dtype)
            else:
                scale = getattr(self, projection + SCALE_SUFFIX)
                canonical = dequantize(quantized[projection].to(scale.device), scale, dtype)
            for name, tensor in zip(names, self.layout.restore(projection, canonical), strict=True):
                owner, _, leaf = name.rpartition(".")
                setattr(source.get_submodule(owner), leaf, nn.Parameter(tensor))
        source.training, source._is_full_backward_hook = self.training, self._is_full_backward_hook
        return source

    def empty_source(self) -> None:
        """Let go of the 16-bit weights; this module has taken their place."""
        for names in self.layout.sources.values():
            for name in names:
                owner, _, leaf = name.rpartition(".")
                setattr(self.source.get_submodule(owner), leaf, None)

    # ---- weights -------------------------------------------------------------------------------

    def quantized_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The 8-bit weights of both projections, all experts, where they are.

        Returns:
            (num_experts, rows, columns) each: the parameters, or views of the pages in host memory.

        Raises:
            ValueError: the module was made without weights, and none were brought yet.
        """
        if self.paged is not None:
            cache, layer = self.paged
            return cache.host.weights(layer)
        return self._resident_weights()

    def _resident_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.has_weights:
            raise ValueError(
                f"{type(self.source).__name__} has no weights: loading or paging them was cut off; "
                "load the model again"
            )
        first, second = (getattr(self, p + QUANTIZED_SUFFIX) for p in self.layout.projections)
        return first, second

    @property
    def has_weights(self) -> bool:
        """Whether the 8-bit weights are parameters of the module."""
        weights = (getattr(self, p + QUANTIZED_SUFFIX) for p in self.layout.projections)
        return all(weight is not None for weight in weights)

    def drop_weights(self) -> None:
        """Let go of the weights that are parameters; pages hold them now."""
        for projection in self.layout.projections:
            setattr(self, projection + QUANTIZED_SUFFIX, None)

    def take_share(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the scales and biases of this rank's experts, by their names here."""
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def layer_pages(self, name: str) -> LayerPages:
        """What this module's pages look like.

        Args:
            name: of the module in its model, for messages.
        """
        return layer_pages(name, self.layout, self.weights)

    def page(self, cache: ExpertCache, layer: int) -> None:
        """Compute with the pages of a cache from now on; the weights as parameters are dropped."""
        # Always one of both is there: an interrupt or another thread may come in between.
        self.paged = (cache, layer)
        self.drop_weights()

    def unpage(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Take the weights as parameters from now on, and let go of the cache.

        Args:
            gate_up, down: (num_experts, rows, columns) in the storage dtype.
        """
        for projection, weight in zip(self.layout.projections, (gate_up, down), strict=True):
            parameter = nn.Parameter(weight, requires_grad=False)
            setattr(self, projection + QUANTIZED_SUFFIX, parameter)
        self.paged = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the quantized weights and their scales, wherever they are."""
        weights = sum(math.prod(self.layout.shape(p)) for p in self.layout.projections)
        return weights + sum(
            getattr(self, p + SCALE_SUFFIX).nbytes for p in self.layout.projections
        )

    def check_usable(self) -> None:
        """Raise RuntimeError if a change of the model was cut off."""
        if self.change is not None:
            self.change.check_finished()

    # ---- adapters ------------------------------------------------------------------------------

    # PEFT wraps a module for each of its parameters that is adapted. It asks for their names, then
    # for shape, dtype and device; `qmoe.experts.adapters` has what happens next.

    @property
    def adaptable(self) -> tuple[str, ...]:
        """The weights of the model's own module that adapters can be put on, in its order."""
        if self.layout.flat:  # they are another module's
            return ()
        return tuple(name for name in self.source._parameters if name in self.layout.projections)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As torch has it; PEFT, where it looks for what is to be adapted, gets `adaptable` too.

        Only there: whoever else walks over a module's own parameters wants what it really has.
        """
        found = super().named_parameters(prefix, recurse, remove_duplicate)
        if recurse or sys._getframe(1).f_code.co_name != "_inject_parameters":
            return found
        own = dict(found)
        prefix += "." if prefix else ""
        return iter([*own.items(), *((prefix + n, getattr(self, n)) for n in self.adaptable)])

    @property
    def gate_up_proj(self) -> nn.Parameter:
        """Shape, dtype and device of the model's own weight; its values are NaN."""
        return self._stand_in("gate_up_proj")

    @property
    def up_proj(self) -> nn.Parameter:
        """As ``gate_up_proj``, where experts have no gate."""
        return self._stand_in("up_proj")

    @property
    def down_proj(self) -> nn.Parameter:
        """As ``gate_up_proj``."""
        return self._stand_in("down_proj")

    @property
    def is_transposed(self) -> bool:
        """What the model's own module says of itself, as PEFT asks for it."""
        return getattr(self.source, "is_transposed", False)

    def _stand_in(self, name: str) -> nn.Parameter:
        if name not in self.adaptable:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        shape = self.layout.shape(name)
        (like,) = self.layout.restore(name, torch.empty(shape, device="meta"))
        device = next(p for p in self._parameters.values() if p is not None).device
        nan = torch.full((), math.nan, dtype=self.compute_dtype, device=device)
        return nn.Parameter(nan.expand(like.shape), requires_grad=False)

    # ---- state ---------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.check_usable()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.share is not None:
            if self.down_proj_scale is not None:  # loading looks at names before it brings values
                raise ValueError(_spread("state_dict", prefix.removesuffix(".")))
            return
        if self.paged is None:
            if not self.down_proj_scale.is_meta:
                self.quantized_weights()  # raises where they were lost or never loaded
            return
        for name, weight in zip(self.layout.projections, self.quantized_weights(), strict=True):
            # Copies: pages interleave the two projections, and files want each by itself.
            destination[prefix + name + QUANTIZED_SUFFIX] = weight.contiguous()

    def check_state(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Refuse tensors that are no weights of this module in its form; nothing is copied.

        Args:
            state_dict: as of ``load_state_dict``; may lack tensors.
            prefix: of this module's names in it.

        Raises:
            ValueError: 16-bit experts, another format, other sizes, or any weights at all while
                this module is paged.
            RuntimeError: a change of the model was cut off.
        """
        self.check_usable()
        if self.share is not None:
            raise ValueError(_spread("load_state_dict", prefix.removesuffix(".")))
        own = dict(self.named_parameters())
        kept = tuple(f"{prefix}{child}." for child in kept_modules(self.source))
        for key, tensor in state_dict.items():
            if not key.startswith(prefix) or key.startswith(kept):
                continue
            mine = own.get(key.removeprefix(prefix))
            if self.paged is not None:
                why = "these experts are paged; load it into a model without hbm_budget"
            elif mine is None:
                why = f"these experts are {self.weights}; convert or patch that model the same way"
            elif (mine.dtype.itemsize == 1 or tensor.dtype.itemsize == 1) and (
                mine.dtype != tensor.dtype
            ):
                why = f"these experts are {self.weights}; it must hold {mine.dtype}"
            elif mine.shape != tensor.shape:
                why = f"it must have the shape {list(mine.shape)}"
            else:
                continue
            raise ValueError(
                f"load_state_dict: {key} is {tensor.dtype} of shape {list(tensor.shape)}; {why}"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- the layer -----------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapters: Sequence[LowRank] = (),
    ) -> torch.Tensor:
        """Apply each token's experts and sum their outputs, weighted.

        Args:
            hidden_states: (..., hidden_size); leading dimensions are flattened to num_tokens.
            top_k_index: (num_tokens, top_k) int; ``num_experts`` and above mean no expert (expert
                parallelism's sentinel) or, in a model that has them, an identity expert.
            top_k_weights: (num_tokens, top_k)
            adapters: what is added to weights, see `qmoe.experts.adapters`.

        Returns:
            as hidden_states

        Raises:
            RuntimeError: a change of the model was cut off.
            RankFailed: another rank failed or is gone.
        """
        self.check_usable()
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, shape[-1])
        routed = (hidden_states, top_k_index, top_k_weights)
        if self.share is None:
            output = self._own_experts(*routed, adapters)
        else:
            assert not adapters, "refused where they are put on"
            with torch.no_grad():
                output = self.share.run(
                    *routed, self._own_experts, partial(self._flying_format, hidden_states)
                )
            output = _SpreadExperts.apply(output, *routed)
        if self.layout.num_identity_experts:
            identity = top_k_weights * (top_k_index >= self.num_experts)
            output = output + hidden_states * identity.sum(-1, keepdim=True).to(output.dtype)
        return output.view(shape)

    def _own_experts(
        self,
        hidden_states: torch.Tensor | QuantizedRows,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        adapters: Sequence[LowRank] = (),
    ) -> torch.Tensor:
        """The sum over the experts that are here; ids count from the first of them."""
        norm = getattr(self, "post_expert_norm", None)
        if norm is None:
            return self._fused_moe(hidden_states, topk_ids, topk_weights, adapters)
        rows = self._fused_moe(hidden_states, topk_ids, None, adapters)
        # A norm need not leave the zeros of a skipped id zero.
        return weighted_sum(norm(rows), self._without_skipped(topk_weights, topk_ids))

    def _without_skipped(self, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        skipped = (topk_ids < 0) | (topk_ids >= self.layout.num_experts)
        return topk_weights.masked_fill(skipped, 0)

    def _fused_moe(
        self,
        hidden_states: torch.Tensor | QuantizedRows,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        adapters: Sequence[LowRank] = (),
    ) -> torch.Tensor:
        compute = partial(self._adapted if adapters else self._compute, hidden_states)
        if adapters:
            compute = partial(compute, adapters=adapters)
        while True:
            paged = self.paged
            try:
                if paged is None:
                    return compute(*self._resident_weights(), None, topk_ids, topk_weights)
                cache, layer = paged
                # The host knows no adapters and no 8-bit rows: without rows it computes none of
                # the misses.
                plain = isinstance(hidden_states, torch.Tensor) and not adapters
                shared = hidden_states if plain else None
                return cache.run(layer, topk_ids, topk_weights, compute, shared)
            except ValueError:
                if self.paged is paged:
                    raise
                # Another thread has just paged the model, or made it resident.

    def _compute(
        self,
        hidden_states: torch.Tensor | QuantizedRows,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        expert_to_slot: torch.Tensor | None,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
    ) -> torch.Tensor:
        up = self.layout.up_name
        # Rows that are in 8 bits already stay so.
        plain = isinstance(hidden_states, torch.Tensor)
        activations = self._row_format(topk_ids.numel()) if plain else "auto"
        activation: Activation | Callable[[torch.Tensor], torch.Tensor]
        activation = self._own_gate if self.activation is None else self.activation
        return fused_moe(
            hidden_states,
            up_proj,
            getattr(self, up + SCALE_SUFFIX),
            down_proj,
            self.down_proj_scale,
            topk_ids,
            topk_weights,
            activation=activation,
            activations=activations,
            gate_up_proj_bias=getattr(self, up + BIAS_SUFFIX, None),
            down_proj_bias=getattr(self, "down_proj_bias", None),
            expert_to_slot=expert_to_slot,
        )

    def _adapted(
        self,
        hidden_states: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        expert_to_slot: torch.Tensor | None,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor | None,
        *,
        adapters: Sequence[LowRank],
    ) -> torch.Tensor:
        """What `_compute` does, with what adapters add to each product."""
        activations = self._row_format(topk_ids.numel())
        if activations == "auto" and any(adapter.is_learning for adapter in adapters):
            activations = "bf16"  # also before the first layer that learns, whose rows do not
        names = self.layout.projections
        up, down = (
            Projection(
                weight,
                getattr(self, name + SCALE_SUFFIX),
                getattr(self, name + BIAS_SUFFIX, None),
                expert_to_slot,
            )
            for name, weight in zip(names, (up_proj, down_proj), strict=True)
        )
        ranks = [sum(a.rank for a in adapters if a.projection == name) for name in names]
        if self.activation is not None and adapted_moe_supports(hidden_states, *ranks):
            return adapted_moe(
                hidden_states,
                Experts(up, down, self.activation),
                topk_ids,
                topk_weights,
                *(combine(adapters, name) for name in names),
                activations=activations,
            )

        def project(x: torch.Tensor, name: str, projection: Projection) -> torch.Tensor:
            rows = grouped_linear(
                x,
                projection.weight,
                projection.scale,
                topk_ids,
                activations=activations,
                bias=projection.bias,
                expert_to_slot=expert_to_slot,
            )
            for adapter in adapters:
                if adapter.projection == name:
                    rows = rows + adapter(x, topk_ids)
            return rows

        up_rows = project(hidden_states, names[0], up)
        activation = self.activation
        hidden = self._own_gate(up_rows) if activation is None else activate(activation, up_rows)
        rows = project(hidden.to(hidden_states.dtype), names[1], down)
        if topk_weights is None:
            return rows
        return weighted_sum(rows, self._without_skipped(topk_weights, topk_ids))

    def _row_format(self, num_pairs: int) -> str:
        """What the products take of so many pairs: what they would with all experts in one place.

        In training mode rows stay as they are: a checkpointed layer runs without gradients first.
        Most pairs are other ranks', so that a count of this rank's experts alone would quantize
        rows where they are too few.
        """
        if self.activations == "auto":
            # Ranks have no gradients, and must not differ in what they exchange.
            few = num_pairs < EIGHT_BIT_ROWS * self.num_experts
            as_they_are = self.training if self.share is None else few
            return "bf16" if as_they_are else "auto"
        return self.activations

    def _flying_format(self, rows: torch.Tensor, num_pairs: int) -> WeightFormat | None:
        """What rows fly in to other ranks: what the products take, unless they are few.

        Of what is the same on every rank.
        """
        if num_pairs < EIGHT_BIT_ROWS * self.num_experts:
            return None
        return row_format(
            self._row_format(num_pairs),
            num_pairs,
            self.num_experts,
            dtype=rows.dtype,
            weights=STORAGE_DTYPE[self.weights],
            device=rows.device,
        )

    def _own_gate(self, up: torch.Tensor) -> torch.Tensor:
        return apply_own_gate(self.source, self.layout, up)

    def check_move(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Raise ValueError if ``fn``, given to ``_apply``, would move paged experts."""
        if self.paged is None:
            return
        device = self.paged[0].device
        to = fn(torch.empty(0, device=device)).device
        if to != device:
            raise ValueError(
                f"the experts are paged on {device} and cannot move to {to}; "
                f"load the model with device={str(to)!r} instead"
            )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # ``model.half()`` and ``model.to(dtype)`` would turn FP8 weights and fp32 scales into
        # something else; here they only move.
        names = (p + s for p in self.layout.projections for s in (QUANTIZED_SUFFIX, SCALE_SUFFIX))
        fixed = {id(getattr(self, name)) for name in names}

        self.check_move(fn)
        like = next((p for p in self._parameters.values() if p is not None), None)
        empty = torch.empty(
            0, dtype=self.compute_dtype, device=None if like is None else like.device
        )
        self.compute_dtype = fn(empty).dtype

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            cast = moved.dtype != tensor.dtype
            if cast and id(tensor) in fixed:
                moved = tensor.to(moved.device)
            if moved is not tensor and not tensor.is_inference():
                increment_version(tensor)  # torch does not, and the host may have a copy of it
            return moved

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        layout = self.layout
        return (
            f"{layout.num_experts} experts, hidden_size={layout.hidden_size}, "
            f"intermediate_size={layout.intermediate_size}, weights={self.weights}"
            + (f", {self.num_experts} on all ranks" if self.share is not None else "")
            + (", paged" if self.paged is not None else "")
        )


def _adopt(module: nn.Module, name: str, inside: nn.Module | None) -> None:
    """Let PEFT's wrappers of parameters know 8-bit experts that they are put around."""
    cls = type(module)
    if name != "base_layer" or (cls.__module__, cls.__name__) != _PEFTS_WRAPPER:
        return
    while inside is not None and "base_layer" in inside._modules:
        inside = inside._modules["base_layer"]
    if isinstance(inside, QuantizedExperts):
        from qmoe.experts.adapters import ParamWrapper  # needs PEFT, which is there by now

        ParamWrapper.check(inside, vars(module)["parameter_name"])
        module.__class__ = ParamWrapper


_PEFTS_WRAPPER = ("peft.tuners.lora.layer", "ParamWrapper")
register_module_module_registration_hook(_adopt)


def _spread(what: str, name: str) -> str:
    return (
        f"{what}: this rank holds only its own experts of {name or 'this model'}; load the "
        "checkpoint without expert_parallel"
    )


def layer_pages(name: str, layout: ExpertsLayout, weights: WeightFormat) -> LayerPages:
    """The pages that an experts module has, or is going to have once it is quantized."""
    up, down = (layout.shape(projection) for projection in layout.projections)
    return LayerPages(
        name,
        layout.num_experts,
        STORAGE_DTYPE[weights],
        gate_up=(up[1], up[2]),
        down=(down[1], down[2]),
    )


def quantized_modules(model: nn.Module) -> dict[str, QuantizedExperts]:
    """The quantized experts modules of ``model``, by name, in the order in which it has them."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedExperts)}


def group_of(model: nn.Module) -> RankGroup | None:
    """The ranks that hold the model's experts between them; None where all are here."""
    experts = next((m for m in model.modules() if isinstance(m, QuantizedExperts)), None)
    return None if experts is None or experts.share is None else experts.share.group


def check_replaceable(model: nn.Module, name: str, layout: ExpertsLayout) -> None:
    """Refuse experts on which something stands that 8-bit ones cannot take over.

    Raises:
        ValueError: a forward method of their own, or hooks on inputs that they no longer get.
    """
    modules = [model.get_submodule(name)]
    if layout.dense:
        if any(vars(modules[0])[hooks] for hooks in _HOOKS if hooks.startswith("_forward")):
            raise ValueError(
                f"{name} has forward hooks on inputs that 8-bit experts do not get; remove them"
            )
        modules.append(model.get_submodule(name.rpartition(".")[0]))
    for module in modules:
        # accelerate's hooks replace `forward` too; those of the blocks around serve as well.
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{name}: {type(module).__name__} has a forward method of its own instead of its "
                "class's, which 8-bit experts cannot call; remove it"
            )


def install(model: nn.Module, name: str, experts: nn.Module) -> None:
    """Put quantized experts, or the model's own back, where ``model`` has its module ``name``.

    One assignment changes the model; what the quantized ones stand in for then loses its weights.
    """
    parent, _, leaf = name.rpartition(".")
    block = model.get_submodule(parent)
    if isinstance(experts, QuantizedExperts) and experts.layout.dense:
        model.set_submodule(parent, WeightedInputMoe(block, experts))
    elif isinstance(block, WeightedInputMoe):
        model.set_submodule(parent, block.restore(experts))
    else:
        setattr(block, leaf, experts)
    if isinstance(experts, QuantizedExperts):
        experts.empty_source()
