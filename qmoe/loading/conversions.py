"""From a checkpoint's names to a model's parameters: conversions of transformers, ours and its own.

transformers maps checkpoint names to parameters by a list of *conversions*; an experts converter
merges one tensor per expert into a stacked parameter. Conversions run in reverse when a model is
saved.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from qmoe.checkpoints.schema import QUANTIZED_SUFFIX, SCALE_SUFFIX
from qmoe.experts.layout import ExpertsLayout


class MergeScales(ConversionOps):
    """One [out, 1] or [out] scale per expert and source -> (num_experts, rows) fp32, and back."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        parts = [
            torch.stack([scale.flatten().float() for scale in input_dict[source]])
            for source in source_patterns
        ]
        return {target_patterns[0]: torch.cat(parts, dim=1)}

    @property
    def reverse_op(self) -> SplitScales:
        return SplitScales()


class SplitScales(ConversionOps):
    """Undo :class:`MergeScales`."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        (scale,) = input_dict.values()
        scale = scale[0] if isinstance(scale, list) else scale
        return {
            target.replace("*", str(expert)): part[expert, :, None].contiguous()
            for target, part in zip(
                target_patterns, scale.chunk(len(target_patterns), dim=1), strict=True
            )
            for expert in range(scale.shape[0])
        }

    @property
    def reverse_op(self) -> MergeScales:
        return MergeScales()


def quantized_conversions(
    model: nn.Module, layouts: Mapping[str, ExpertsLayout], kept: Iterable[str]
) -> list[WeightTransform]:
    """The conversions of a loaded model whose experts of ``layouts`` were quantized.

    Args:
        model: as loaded, or as made from a configuration.
        layouts: the experts modules in 8 bit.
        kept: names of those that stay in 16 bit.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # As transformers saves what it has not loaded: without the prefixes that it never saw.
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in mapping if type(c).__name__ != "PrefixChange"]
    return for_kept_experts(conversions, layouts, kept)


def restored_conversions(
    model: PreTrainedModel, layouts: Mapping[str, ExpertsLayout]
) -> list[WeightTransform]:
    """The conversions of a model whose experts are its own again."""
    rest = [
        conversion
        for conversion in getattr(model, "_weight_conversions", None) or []
        if not converts_experts(conversion, layouts, (QUANTIZED_SUFFIX, SCALE_SUFFIX))
    ]
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    return rest + [conversion for conversion in mapping if converts_experts(conversion, layouts)]


def converts_experts(
    conversion: WeightTransform,
    layouts: Mapping[str, ExpertsLayout],
    suffixes: tuple[str, ...] = ("",),
) -> bool:
    """Whether a conversion yields a weight or bias of one of these experts modules."""
    if not isinstance(conversion, WeightConverter):
        return False
    prefix = f"{conversion.scope_prefix}." if conversion.scope_prefix else ""
    patterns = [
        re.compile(f"{re.escape(target.lstrip('^'))}$") for target in conversion.target_patterns
    ]
    return any(
        pattern.search(f"{name}.{source}{suffix}") and f"{name}.".find(prefix) >= 0
        for name, layout in layouts.items()
        for sources in layout.sources.values()
        for source in sources
        for suffix in suffixes
        for pattern in patterns
    )


def for_kept_experts(
    conversions: list[WeightTransform],
    layouts: Mapping[str, ExpertsLayout],
    kept: Iterable[str],
    *,
    scoped_only: bool = False,
) -> list[WeightTransform]:
    """Experts converters narrowed to the modules that stay in 16 bit; the others unchanged.

    One converter serves every layer. Where some layers are quantized and some are not, it must not
    touch the names of those that are.
    """
    narrowed: list[WeightTransform] = []
    for conversion in conversions:
        if not converts_experts(conversion, layouts):
            if not scoped_only:
                narrowed.append(conversion)
            continue
        for name in sorted(kept):
            narrowed.extend(_narrow(conversion, name))
    return narrowed


def _narrow(conversion: WeightConverter, name: str) -> list[WeightConverter]:
    """The same converter for the one experts module ``name``."""
    targets = conversion._original_target_patterns
    stem = targets[0].rpartition(".")[0]
    if not name.endswith(stem):
        return []
    head = name.removesuffix(stem)
    if conversion.scope_prefix:
        head = head.removeprefix(f"{conversion.scope_prefix}.")
    sources = conversion._original_source_patterns
    return [
        copy_for(
            conversion,
            [head + source for source in sources],
            [head + target for target in targets],
            conversion.operations,
        )
    ]


def copy_for(
    conversion: WeightConverter,
    sources: list[str],
    targets: list[str],
    operations: list[ConversionOps],
) -> WeightConverter:
    copy = WeightConverter(list(sources), list(targets), operations=list(operations))
    copy.scope_prefix = conversion.scope_prefix
    copy.base_model_prefix = conversion.base_model_prefix
    return copy


class Renamer:
    """Checkpoint name -> the model's parameter that it is loaded into."""

    def __init__(self, model: PreTrainedModel, pages: Iterable[str] = ()) -> None:
        conversions = get_model_conversion_mapping(model)
        self.renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self.converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self.prefix = model.base_model_prefix
        self.parameters = {**dict.fromkeys(pages, True), **model.state_dict()}

    def __call__(self, key: str) -> str:
        return self.with_part(key)[0]

    def with_part(self, key: str) -> tuple[str, int]:
        """The parameter, and which of the tensors that are merged into it ``key`` is."""
        if key in self.parameters:
            return key, 0
        target, pattern = rename_source_key(
            key, self.renamings, self.converters, self.prefix, self.parameters
        )
        sources = (converter.source_patterns for converter in self.converters)
        return target, next((s.index(pattern) for s in sources if pattern in s), 0)


def expert_of(key: str) -> int:
    """The expert's number in the name of one of its tensors; -1 if there is none."""
    return int(next((part for part in reversed(key.split(".")) if part.isdigit()), -1))
