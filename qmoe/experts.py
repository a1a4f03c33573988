"""The module that takes the place of a model's experts: 8-bit weights, same call, same output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qmoe.format import BIAS_SUFFIX, QUANTIZED_SUFFIX, SCALE_SUFFIX
from qmoe.layout import apply_own_gate, describe, identify_activation, kept_modules
from qmoe_kernels import Activation, fused_moe, weighted_sum
from qmoe_kernels.quantization import STORAGE_DTYPE, WeightFormat, dequantize, quantize


class QuantizedExperts(nn.Module):
    """Experts of one layer with INT8 or FP8 weights and one fp32 scale per output channel.

    Takes the place of a transformers experts module and is called as that is:
    ``experts(hidden_states, top_k_index, top_k_weights)``. Whatever experts implementation the
    model's config names, this module computes with qmoe's kernels.

    Parameters (canonical, see :mod:`qmoe.layout`; ``up`` is ``gate_up_proj`` or ``up_proj``)::

        {up}_q          (num_experts, 2 * intermediate_size, hidden_size) int8 | float8_e4m3fn
        {up}_scale      (num_experts, 2 * intermediate_size) fp32
        {up}_bias       (num_experts, 2 * intermediate_size) 16 bit, where the model has biases
        down_proj_q     (num_experts, hidden_size, intermediate_size) int8 | float8_e4m3fn
        down_proj_scale (num_experts, hidden_size) fp32
        down_proj_bias  (num_experts, hidden_size) 16 bit, where the model has biases

    Attributes:
        weights: ``"int8"`` or ``"fp8"``.
        activations: what the products take, see :func:`qmoe_kernels.fused_moe`.
        layout: how the model's own module stores its experts.
        activation: the nonlinearity, or None where the module's own gate is called between the
        products.
    """

    def __init__(self, source: nn.Module, weights: WeightFormat, activations: str = "auto") -> None:
        """Describe ``source`` and take its place, with parameters on the meta device.

        Args:
            source: a model's experts module; its weights are dropped, the rest of it is kept so
                that :meth:`restore` can give it back.
            weights: ``"int8"`` or ``"fp8"``.
            activations: see :func:`qmoe_kernels.fused_moe`.
        """
        super().__init__()
        layout = describe(source)
        if layout is None:
            raise ValueError(f"{type(source).__name__} is no experts module that qmoe knows")
        self.layout = layout
        self.weights = weights
        self.activations = activations
        self.num_experts = layout.num_experts
        self.activation = identify_activation(source, layout)
        for name in kept_modules(source):
            self.add_module(name, getattr(source, name))
        for projection in layout.projections:
            shape = layout.shape(projection)
            self._register(projection + QUANTIZED_SUFFIX, shape, STORAGE_DTYPE[weights])
            self._register(projection + SCALE_SUFFIX, shape[:2], torch.float32)
        for bias in layout.biases:
            (name,) = layout.sources[bias]
            self._register(bias, layout.shape(bias), source.get_parameter(name).dtype)
        # Not a submodule: its weights are gone, only its class, config and gate are still wanted.
        self.__dict__["source"] = source
        for names in layout.sources.values():
            for name in names:
                owner, _, leaf = name.rpartition(".")
                setattr(source.get_submodule(owner), leaf, None)
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
            source: a model's experts module with real weights; emptied.
            weights: ``"int8"`` or ``"fp8"``.
            activations: see :func:`qmoe_kernels.fused_moe`.
            name: the module's name, for errors.

        Raises:
            ValueError: a weight holds NaN or infinity; ``source`` is untouched.
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
        source: nn.Module = self.source
        for projection, names in self.layout.sources.items():
            if projection.endswith(BIAS_SUFFIX):
                canonical = getattr(self, projection).to(dtype)
            else:
                canonical = dequantize(
                    getattr(self, projection + QUANTIZED_SUFFIX),
                    getattr(self, projection + SCALE_SUFFIX),
                    dtype,
                )
            for name, tensor in zip(names, self.layout.restore(projection, canonical), strict=True):
                owner, _, leaf = name.rpartition(".")
                setattr(source.get_submodule(owner), leaf, nn.Parameter(tensor))
        return source

    @property
    def num_bytes(self) -> int:
        """Bytes of the quantized weights and their scales."""
        return sum(parameter.nbytes for parameter in self._quantized())

    def _quantized(self) -> list[nn.Parameter]:
        suffixes = (QUANTIZED_SUFFIX, SCALE_SUFFIX)
        return [self.get_parameter(p + s) for p in self.layout.projections for s in suffixes]

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Apply each token's experts and sum their outputs, weighted.

        Args:
            hidden_states: (..., hidden_size); leading dimensions are flattened to num_tokens.
            top_k_index: (num_tokens, top_k) int; ``num_experts`` and above mean no expert (expert
                parallelism's sentinel) or, in a model that has them, an identity expert.
            top_k_weights: (num_tokens, top_k)

        Returns:
            as hidden_states
        """
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, shape[-1])
        norm = getattr(self, "post_expert_norm", None)
        output = self._fused_moe(hidden_states, top_k_index, None if norm else top_k_weights)
        if norm is not None:
            # A norm need not leave the zeros of a skipped id zero.
            routed = top_k_weights.masked_fill(top_k_index >= self.num_experts, 0)
            output = weighted_sum(norm(output), routed)
        if self.layout.num_identity_experts:
            identity = top_k_weights * (top_k_index >= self.num_experts)
            output = output + hidden_states * identity.sum(-1, keepdim=True).to(output.dtype)
        return output.view(shape)

    def _fused_moe(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor | None
    ) -> torch.Tensor:
        up = self.layout.up_name
        activation: Activation | Callable[[torch.Tensor], torch.Tensor]
        activation = self._own_gate if self.activation is None else self.activation
        return fused_moe(
            hidden_states,
            getattr(self, up + QUANTIZED_SUFFIX),
            getattr(self, up + SCALE_SUFFIX),
            self.down_proj_q,
            self.down_proj_scale,
            topk_ids,
            topk_weights,
            activation=activation,
            activations=self.activations,
            gate_up_proj_bias=getattr(self, up + BIAS_SUFFIX, None),
            down_proj_bias=getattr(self, "down_proj_bias", None),
        )

    def _own_gate(self, up: torch.Tensor) -> torch.Tensor:
        return apply_own_gate(self.source, self.layout, up)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # ``model.half()`` and ``model.to(dtype)`` would turn FP8 weights and fp32 scales into
        # something else; here they only move.
        fixed = {id(parameter) for parameter in self._quantized()}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            cast = moved.dtype != tensor.dtype
            return tensor.to(moved.device) if cast and id(tensor) in fixed else moved

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        layout = self.layout
        return (
            f"{layout.num_experts} experts, hidden_size={layout.hidden_size}, "
            f"intermediate_size={layout.intermediate_size}, weights={self.weights}"
        )


def install(model: nn.Module, name: str, experts: nn.Module) -> None:
    """Put quantized experts, or the model's own back, where ``model`` has its module ``name``."""
    model.set_submodule(name, experts)
    block = model.get_submodule(name.rpartition(".")[0])
    if isinstance(experts, QuantizedExperts) and experts.layout.dense:
        family = type(block)
        block.__class__ = type(f"Quantized{family.__name__}", (_WeightedInputMoe, family), {})
    elif isinstance(block, _WeightedInputMoe):
        block.__class__ = type(block).__bases__[1]


class _WeightedInputMoe(nn.Module):
    """A Llama 4 block that sends each token to its own experts only.

    transformers' block runs every expert on every token, zeroed where the router did not choose it,
    and weights the experts' input rather than their output. This one computes the same sum over the
    chosen experts alone.
    """

    hidden_dim: int
    router: nn.Module
    shared_expert: nn.Module
    experts: QuantizedExperts

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)  # (num_tokens, hidden_size)
        scores, router_logits = self.router(hidden_states)  # (num_tokens, num_experts)
        top_k = self.router.top_k
        topk_ids = torch.topk(router_logits, top_k, dim=1).indices
        topk_weights = scores.gather(1, topk_ids)
        routed = (hidden_states[:, None] * topk_weights[..., None]).flatten(0, 1)
        output = self.experts(
            routed, topk_ids.view(-1, 1), torch.ones_like(topk_weights).view(-1, 1)
        )
        output = output.unflatten(0, (-1, top_k)).sum(1)
        return output + self.shared_expert(hidden_states), router_logits
