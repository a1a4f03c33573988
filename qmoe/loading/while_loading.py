"""Experts of a 16-bit checkpoint go to 8 bit while transformers loads them.

transformers hands over what it has read for one parameter, through its interface for quantizing
on load, and forgets it. A layer's projection is in memory twice for a moment, the model never is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightTransform,
)

from qmoe.checkpoints.schema import QUANTIZED_SUFFIX, SCALE_SUFFIX
from qmoe.experts.layout import ExpertsLayout
from qmoe.experts.quantized import QuantizedExperts, check_replaceable, install
from qmoe.loading.conversions import converts_experts, copy_for
from qmoe.paging.host_store import HostStore
from qmoe_kernels.quantization import WeightFormat, quantize

# What a checkpoint holds for one parameter: a tensor for each expert, from each source pattern in
# turn; or the parameter as it is in memory.
_Stored: TypeAlias = "list[list[Any]] | torch.Tensor"


class ExpertsToQuantize(ConversionOps):
    """The experts of a model on the meta device, and what of them has been quantized so far.

    Attributes:
        experts: module -> what takes its place as soon as all of its tensors are there.
        sources: parameter of the model -> its module and canonical name.
        store: where the 8-bit weights go that are to be paged; None: each stays on its device.
        error: what went wrong first. transformers would go on, and say something else at the end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layouts: Mapping[str, ExpertsLayout],
        weights: WeightFormat,
        activations: str,
        store: HostStore | None,
    ) -> None:
        self.model, self.layouts, self.weights, self.store = model, layouts, weights, store
        for name, layout in layouts.items():
            check_replaceable(model, name, layout)
        self.experts = {
            name: QuantizedExperts(
                model.get_submodule(name), weights, activations, paged=store is not None
            )
            for name in layouts
        }
        self.sources = {
            f"{name}.{source}": (name, canonical)
            for name, layout in layouts.items()
            for canonical, sources in layout.sources.items()
            for source in sources
        }
        self.error: Exception | None = None
        self._read: dict[str, _Stored] = {}  # until all sources of a projection are there
        self._tensors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in layouts}
        self._plain: dict[int, WeightTransform] = {}  # by the id of what we put in its place

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertsToQuantize:
        return self  # transformers copies a conversion, with its operations, for each parameter

    # ---- between transformers' conversions -----------------------------------------------------

    def keep_apart(self, conversions: list[WeightTransform]) -> list[WeightTransform]:
        """Conversions that leave one tensor per expert as it is, where they would merge them.

        Scales are per channel, so each can be quantized by itself, and only 8 bit are merged.
        """
        changed = []
        for conversion in conversions:
            if converts_experts(conversion, self.layouts) and _merges(conversion):
                operations = [_KeepApart(self, conversion.operations)]
                patterns = (
                    conversion._original_source_patterns,
                    conversion._original_target_patterns,
                )
                ours = copy_for(conversion, *patterns, operations)
                self._plain[id(ours)] = conversion
                conversion = ours
            changed.append(conversion)
        return changed

    def plain(self, conversions: list[WeightTransform]) -> list[WeightTransform]:
        """Undo :meth:`keep_apart`, for saving."""
        return [self._plain.get(id(conversion), conversion) for conversion in conversions]

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Quantize what transformers has read; what is not ours is given back to it."""
        if any("*" in key for key in input_dict):  # kept apart
            stored = [input_dict.pop(pattern, []) for pattern in source_patterns]
            found: dict[str, Any] = {full_layer_name: stored}
        else:
            found = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
            input_dict.clear()  # nobody else holds on to what is taken from `found`
        ready: dict[str, Any] = {}
        for parameter in list(found):
            value = found.pop(parameter)
            if parameter not in self.sources:
                ready[parameter] = value
                continue
            (missing_keys or set()).discard(parameter)
            try:
                if self.error is None:
                    ready |= self._take(parameter, value)
            except Exception as error:
                self.error = error
        return ready

    # ---- quantizing ----------------------------------------------------------------------------

    def _take(self, parameter: str, stored: _Stored) -> dict[str, nn.Parameter]:
        """Take what was read for one parameter.

        Returns:
            All parameters of the module if that was the last one, for transformers to place.
        """
        name, canonical = self.sources[parameter]
        layout = self.layouts[name]
        self._read[parameter] = stored
        del stored
        parameters = [f"{name}.{source}" for source in layout.sources[canonical]]
        if any(other not in self._read for other in parameters):
            return {}
        values = [self._read.pop(other) for other in parameters]
        if canonical in layout.biases:
            like = self.model.get_parameter(parameter)
            (bias,) = values
            if not isinstance(bias, torch.Tensor):
                bias = torch.stack([torch.cat(of_one) for of_one in zip(*bias, strict=True)])
            _check_shape(parameter, bias.shape, like.shape)
            self._tensors[name][canonical] = layout.canonical(canonical, [bias]).to(like.dtype)
        else:
            parts = [self._slices(p, v) for p, v in zip(parameters, values, strict=True)]
            del values
            self._quantize(name, canonical, parts)
        if self._tensors[name].keys() != _own_parameters(self.experts[name]):
            return {}
        stand_in(self.model, name, self.experts[name])
        return {
            f"{name}.{leaf}": nn.Parameter(tensor, requires_grad=False)
            for leaf, tensor in self._tensors.pop(name).items()
        }

    @torch.no_grad()
    def _quantize(
        self, name: str, projection: str, parts: list[Callable[[int], torch.Tensor]]
    ) -> None:
        layout = self.layouts[name]
        shape = layout.shape(projection)
        pages = None
        if self.store is not None:
            index = list(self.layouts).index(name)
            pages = self.store.weights(index)[layout.projections.index(projection)]
        for expert in range(layout.num_experts):
            canonical = layout.canonical(projection, [part(expert) for part in parts])
            what = f"{name}.{projection}[{expert}]"
            q, scale = quantize(canonical[0], self.weights, name=what)
            if expert == 0:
                scales = scale.new_empty(shape[:2])
                weight = pages if pages is not None else q.new_empty(shape)
            weight[expert].copy_(q)
            scales[expert].copy_(scale)
        self._tensors[name][projection + SCALE_SUFFIX] = scales
        if pages is None:
            self._tensors[name][projection + QUANTIZED_SUFFIX] = weight

    def _slices(self, parameter: str, stored: _Stored) -> Callable[[int], torch.Tensor]:
        """Expert -> its part of a parameter, as :meth:`ExpertsLayout.canonical` takes it."""
        like = self.model.get_parameter(parameter)
        if isinstance(stored, torch.Tensor):
            _check_shape(parameter, stored.shape, like.shape)
            layout = self.layouts[self.sources[parameter][0]]
            rows = layout.intermediate_size if layout.flat else 1
            return lambda expert: stored[expert * rows : (expert + 1) * rows].to(like.dtype)

        def take(expert: int) -> torch.Tensor:
            parts = [tensors[expert] for tensors in stored]
            for tensors in stored:
                tensors[expert] = None  # freed once it is quantized
            rows = sum(len(part) for part in parts)
            for part in parts:
                _check_shape(f"{parameter}[{expert}]", (rows, *part.shape[1:]), like.shape[1:])
            return torch.cat(parts)[None].to(like.dtype)

        for tensors in stored:
            if len(tensors) != len(like):
                raise ValueError(
                    f"{parameter}: the checkpoint has {len(tensors)} tensors for its {len(like)} "
                    "experts; download it again"
                )
        return take

    def check_finished(self) -> None:
        """Raise what went wrong.

        Raises:
            ValueError: a weight was not among what was read, holds NaN or infinity, or has another
                shape than the model's; or biases are offloaded to disk.
        """
        if self.error is not None:
            raise self.error
        devices: dict[str, Any] = getattr(self.model, "hf_device_map", {})
        for part in (part for part, device in devices.items() if device == "disk"):
            for name, layout in self.layouts.items():
                # transformers takes these from the checkpoint's file, in the order that they have
                # there; what we gave it lies idle.
                if layout.biases and f"{name}.".startswith(f"{part}." if part else ""):
                    raise ValueError(
                        f"{name} has biases and is offloaded to disk, which works for converted "
                        "checkpoints alone; convert it with convert-checkpoint"
                    )
        for name in self._tensors:
            raise ValueError(
                f"{name}: its weights are in none of the checkpoint's files, or only in part; "
                "download it again"
            )


def stand_in(model: PreTrainedModel, name: str, experts: QuantizedExperts) -> None:
    """Put experts that are yet to be loaded where a model on the meta device has its own."""
    install(model, name, experts)
    block = model.get_submodule(name.rpartition(".")[0])
    if not any(True for _ in (*block.parameters(False), *block.buffers(False))):
        # All that is left for it to initialize are the experts that it no longer has.
        block._is_hf_initialized = True


def _own_parameters(experts: QuantizedExperts) -> set[str]:
    return {name for name, _ in experts.named_parameters(recurse=False)}


class _KeepApart(ConversionOps):
    """Leaves tensors of experts that are to be quantized as they are; others are merged."""

    def __init__(self, experts: ExpertsToQuantize, operations: list[ConversionOps]) -> None:
        self.experts, self.operations = experts, operations

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        if full_layer_name in self.experts.sources:
            return input_dict
        for operation in self.operations:
            input_dict = operation.convert(input_dict, full_layer_name=full_layer_name, **kwargs)
        return input_dict


def _check_shape(what: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"{what}: the checkpoint has the shape {list(shape)} for it instead of "
            f"{list(expected)}; its config.json is another model's"
        )


def _merges(conversion: Any) -> bool:
    """Whether all that a converter does is stack experts, and the rows of gate and up."""
    merge, *others = conversion.operations
    return (
        type(merge) is MergeModulelist
        and merge.dim == 0
        and (not others or ([type(o) for o in others] == [Concatenate] and others[0].dim == 1))
        and len(conversion.target_patterns) == 1
        and all("*" in source for source in conversion._original_source_patterns)
    )
