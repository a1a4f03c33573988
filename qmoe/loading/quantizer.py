"""What ``from_pretrained`` and ``save_pretrained`` need: two quantizers, registered on import.

- ``qmoe``: our own format (:mod:`qmoe.checkpoints.schema`), and quantizing on load.
- ``compressed-tensors``: transformers' own quantizer, taught to keep experts with INT8 or FP8
  weights and per-channel scales in 8 bit. Without the ``compressed-tensors`` package it loads
  checkpoints of which only the experts are quantized.

transformers maps checkpoint names to a model's parameters by a list of *conversions*; an experts
converter merges one tensor per expert into a stacked parameter. Conversions run in reverse when a
model is saved.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)
from transformers.quantizers import auto
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import is_compressed_tensors_available
from transformers.utils.logging import is_progress_bar_enabled
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from qmoe.checkpoints.files import StoredTensor, read_header
from qmoe.checkpoints.schema import (
    COMPRESSED_TENSORS,
    FORMAT_VERSION,
    QMOE,
    QUANTIZED_SUFFIX,
    SCALE_SUFFIX,
    qmoe_config,
)
from qmoe.experts.layout import ExpertsLayout, find_experts
from qmoe.experts.quantized import QuantizedExperts, install, quantized_modules
from qmoe.loading.pages import choose_device, load_pages, page_quantized
from qmoe.paging.model import budget_for, pages_of
from qmoe.paging.options import PagingOptions
from qmoe_kernels.fused_moe import check_activations
from qmoe_kernels.quantization import STORAGE_DTYPE, WeightFormat

_WEIGHTS_BY_HEADER_DTYPE: dict[str, WeightFormat] = {"I8": "int8", "F8_E4M3": "fp8"}


class QmoeConfig(QuantizationConfigMixin):
    """How a model's experts are quantized; goes into ``config.json`` as ``quantization_config``.

    Args:
        weights: ``"int8"`` or ``"fp8"`` (e4m3fn), one fp32 scale per output channel.
        activations: what the experts' products take, see :func:`qmoe_kernels.fused_moe`. A choice
            of this run: not written to disk.
        modules_to_not_convert: full names of experts modules that stay in 16 bit.
        hbm_budget: page the experts within so much device memory, see :func:`qmoe.load`; a choice
            of this run like the three that follow. Without a ``device_map``, the model then goes to
            the GPU where there is one.
        context: see :func:`qmoe.load`.
        batch_size: see :func:`qmoe.load`.
        format_version: of the file format.

    Raises:
        ValueError: an unknown value, or a format version that this qmoe does not read.

    Example:
        >>> import qmoe
        >>> qmoe.QmoeConfig(weights="fp8").to_dict()["quant_method"]
        'qmoe'
    """

    def __init__(
        self,
        weights: WeightFormat = "int8",
        *,
        activations: str = "auto",
        modules_to_not_convert: list[str] | None = None,
        hbm_budget: str | int | float | None = None,
        context: int | None = None,
        batch_size: int = 1,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise ValueError(f"QmoeConfig: unknown option {sorted(unknown)[0]!r}")
        if weights not in STORAGE_DTYPE:
            raise ValueError(
                f"weights={weights!r}; use one of {', '.join(map(repr, STORAGE_DTYPE))}"
            )
        check_activations(activations)
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has qmoe format version {format_version}; "
                f"this qmoe reads version {FORMAT_VERSION}"
            )
        self.quant_method = QMOE
        self.weights = weights
        self.activations = activations
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.format_version = format_version
        self.paging: PagingOptions | None = None
        if hbm_budget is not None:
            self.paging = PagingOptions(hbm_budget, context, batch_size)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What holds for a checkpoint that is quantized already, whose own config says the rest."""
        chosen = {"activations": self.activations, "paging": self.paging}
        return {name: value for name, value in chosen.items() if value not in ("auto", None)}

    def to_dict(self) -> dict[str, Any]:
        """As :func:`qmoe.checkpoints.schema.qmoe_config`."""
        return qmoe_config(self.weights, self.modules_to_not_convert)


class _ExpertsQuantizer(HfQuantizer):
    """What both quantizers share: a model whose experts are :class:`QuantizedExperts`."""

    requires_calibration = False
    quantization_config: Any
    pre_quantized: bool
    paged = False  # kept up to date by qmoe.paging.model
    layouts: dict[str, ExpertsLayout]
    device: torch.device
    # What the headers say of pages, see load_pages.
    stored: dict[str, list[StoredTensor]]

    @property
    def paging(self) -> PagingOptions | None:
        """What was asked for, if the experts are to be paged."""
        return getattr(self.quantization_config, "paging", None)

    def update_device_map(self, device_map: Any) -> Any:
        device_map = super().update_device_map(device_map)
        if self.paging is None:
            return device_map
        self.device = _only_device(device_map)
        # Experts that are yet to be quantized would not fit.
        return {"": self.device if self.pre_quantized else torch.device("cpu")}

    def preprocess_model(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        super().preprocess_model(model, *args, **kwargs)
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        for pattern, dtype in model._get_dtype_plan(kwargs.get("dtype")).items():
            matches = re.compile(pattern.replace("*", ".*")).search
            self.dtypes.update(dict.fromkeys(filter(matches, self.dtypes), dtype))

    def _leave_out_pages(self, model: PreTrainedModel) -> None:
        """Let transformers pass over the tensors that are pages: neither read nor warned of."""
        patterns = {
            rf"\.{projection}{QUANTIZED_SUFFIX}$"
            for experts in quantized_modules(model).values()
            for projection in experts.layout.projections
        }
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, *patterns}

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        if not hasattr(HfQuantizer, "get_new_dtype"):
            _cast_renamed(model, self.dtypes)
        result = super().postprocess_model(model, **kwargs)
        if self.paging is not None and self.pre_quantized:
            progress = is_progress_bar_enabled()
            load_pages(model, self.stored, self.paging, self.device, progress=progress)
        elif self.paging is not None:
            layers = pages_of(quantized_modules(model))
            budget = budget_for(model, layers, self.paging, self.device)
            page_quantized(model, budget, self.device)
        self.pre_quantized = True
        return result

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        # Layers of a paged model run between pieces that are compiled; transformers' own choice of
        # CUDA graphs for these would take the cache's tables for values that do not change.
        return not self.paged

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        return restore_experts(model, dtype)


class QmoeQuantizer(_ExpertsQuantizer):
    """Loads checkpoints in the ``qmoe`` format, and quantizes 16-bit ones on load."""

    quantization_config: QmoeConfig

    def mark(self, model: PreTrainedModel) -> None:
        """Let transformers know that ``model`` is quantized, and how."""
        model.hf_quantizer = self
        model.config.quantization_config = self.quantization_config
        model.quantization_method = QMOE
        model.is_quantized = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        layouts = find_experts(model)
        unknown = set(self.quantization_config.modules_to_not_convert) - layouts.keys()
        if unknown:
            raise ValueError(
                f"modules_to_not_convert names {sorted(unknown)[0]!r}, "
                f"which is no experts module of {type(model).__name__}"
            )
        self.layouts = {
            name: layout
            for name, layout in layouts.items()
            if name not in self.quantization_config.modules_to_not_convert
        }
        self.kept = layouts.keys() - self.layouts.keys()
        if not self.pre_quantized:
            return
        config = self.quantization_config
        for name in self.layouts:
            source = model.get_submodule(name)
            experts = QuantizedExperts(
                source, config.weights, config.activations, paged=self.paging is not None
            )
            install(model, name, experts)
        files = kwargs.get("checkpoint_files")
        if files:
            self._read_headers(model, files)
        if self.paging is not None:
            if not files:
                raise ValueError("hbm_budget needs a checkpoint's files; load it from a folder")
            self._leave_out_pages(model)

    def _read_headers(self, model: PreTrainedModel, files: Iterable[str]) -> None:
        pages = {
            f"{name}.{projection}{QUANTIZED_SUFFIX}": layout.shape(projection)
            for name, layout in self.layouts.items()
            for projection in layout.projections
        }
        rename = _Renamer(model, pages)
        found = {rename(key): tensor for key, tensor in _headers(files).items()}
        expected = [f"{n}.{p}" for n in self.layouts for p in model.get_submodule(n).state_dict()]
        for parameter in (*expected, *pages):
            if parameter not in found:
                raise ValueError(
                    f"{parameter} is in none of the checkpoint's files; convert it again"
                )
        self.stored = {}
        for parameter, shape in pages.items():
            stored = found[parameter]
            self.stored[parameter.removesuffix(QUANTIZED_SUFFIX)] = [stored]
            _check_stored(stored, self.quantization_config.weights, shape)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            config = self.quantization_config
            quantize_experts(model, self.layouts, config.weights, config.activations)
        return model

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], *args: Any
    ) -> list[WeightTransform]:
        if not self.pre_quantized:
            return weight_conversions
        return _for_kept_experts(weight_conversions, self.layouts, self.kept)


class _CompressedTensorsExperts(_ExpertsQuantizer):
    """Keeps per-channel INT8 and FP8 experts of a compressed-tensors checkpoint in 8 bit.

    Which experts are quantized is read off the files: a converter's names and ``ignore`` patterns
    are written against one version of a model's module names, the tensors are what there is.
    """

    quantized: dict[str, WeightFormat]
    kept: set[str]
    needs_package: list[str]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.quantized, self.layouts, self.kept, self.needs_package = {}, {}, set(), []
        self.stored = {}
        files = kwargs.get("checkpoint_files")
        if not files or getattr(self.quantization_config, "dequantize", False):
            self.needs_package = ["the request to dequantize"]
        else:
            self._read_headers(model, files)
        paged = self.paging is not None
        for name, weights in self.quantized.items():
            experts = QuantizedExperts(model.get_submodule(name), weights, paged=paged)
            install(model, name, experts)
        if paged:
            self._leave_out_pages(model)
        if self.needs_package:
            super()._process_model_before_weight_loading(model, **kwargs)

    def _read_headers(self, model: PreTrainedModel, files: Iterable[str]) -> None:
        headers = _headers(files)
        try:
            layouts = find_experts(model)
        except ValueError:
            layouts = {}  # dense, or experts that only the package can load
        projections = {name: layout.projections for name, layout in layouts.items()}
        rename = _Renamer(model)
        found: dict[str, dict[tuple[int, int], StoredTensor]] = defaultdict(dict)
        for key in headers:
            if not key.endswith(".weight_scale"):
                if key.endswith((".weight_packed", ".weight_zero_point", ".weight_global_scale")):
                    self.needs_package.append(key)
                continue
            weight = headers.get(key.removesuffix("_scale"))
            target, part = rename.with_part(key.removesuffix("_scale"))
            name, _, projection = target.rpartition(".")
            weights = _format_per_channel(weight, headers[key])
            if weight is None or weights is None or projection not in projections.get(name, ()):
                self.needs_package.append(key)
                continue
            found[target][_expert_of(key), part] = weight
            if self.quantized.setdefault(name, weights) != weights:
                raise ValueError(
                    f"{weight.file}: {weight.name} is {weight.dtype}, other experts are not"
                )
        self.layouts = {name: layouts[name] for name in self.quantized}
        self.kept = layouts.keys() - self.quantized.keys()
        for name, layout in self.layouts.items():
            for projection in layout.projections:
                tensors = found[f"{name}.{projection}"]
                parts = 2 if projection == "gate_up_proj" else 1
                expected = list(product(range(layout.num_experts), range(parts)))
                if sorted(tensors) != expected:
                    raise ValueError(
                        f"{name}.{projection}: the checkpoint has {len(tensors)} "
                        f"quantized tensors for it instead of {len(expected)}"
                    )
                self.stored[f"{name}.{projection}"] = [tensors[place] for place in expected]
                if self.paging is not None:
                    _, rows, columns = layout.shape(projection)
                    for tensor in tensors.values():
                        _check_stored(tensor, self.quantized[name], (rows // parts, columns))

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], *args: Any
    ) -> list[WeightTransform]:
        ours: list[WeightTransform] = []
        rest: list[WeightTransform] = []
        for conversion in weight_conversions:
            if not _converts_experts(conversion, self.layouts):
                rest.append(conversion)
                continue
            sources = conversion._original_source_patterns
            targets = conversion._original_target_patterns
            for operation in conversion.operations if self.paging is not None else ():
                if not isinstance(operation, (MergeModulelist, Concatenate)):
                    raise ValueError(
                        f"hbm_budget: {sources[0]} is not stored as it is computed with "
                        f"({type(operation).__name__}); load it without hbm_budget"
                    )
            # The scales come first: until transformers 5.21, `weight` also matches `weight_scale`.
            ours.insert(
                0,
                _copy(
                    conversion,
                    [source + "_scale" for source in sources],
                    [target + SCALE_SUFFIX for target in targets],
                    [MergeScales()],
                ),
            )
            ours.append(
                _copy(
                    conversion,
                    sources,
                    [target + QUANTIZED_SUFFIX for target in targets],
                    conversion.operations,
                )
            )
        kept = _for_kept_experts(weight_conversions, self.layouts, self.kept, scoped_only=True)
        if self.needs_package:
            rest = super().update_weight_conversions(rest, *args)
        return kept + ours + rest


class CompressedTensorsQuantizer(_CompressedTensorsExperts, CompressedTensorsHfQuantizer):
    """With the package: dense Linears and other schemes are its own."""

    def __init__(self, quantization_config: CompressedTensorsConfig, **kwargs: Any) -> None:
        CompressedTensorsHfQuantizer.__init__(self, quantization_config, **kwargs)


class _PackageMissing(HfQuantizer):
    """Stands where transformers' quantizer would, if its package were installed."""

    needs_package: list[str]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        raise ImportError(
            f"this checkpoint has more than 8-bit experts ({self.needs_package[0]}); "
            "`pip install compressed-tensors` to load it"
        )


class ExpertsOnlyCompressedTensorsQuantizer(_CompressedTensorsExperts, _PackageMissing):
    """Without the package: only the experts may be quantized."""


class ExpertsOnlyCompressedTensorsConfig(QuantizationConfigMixin):
    """A compressed-tensors configuration as it stands in ``config.json``, unparsed."""

    def __init__(self, **raw: Any) -> None:
        self.quant_method = COMPRESSED_TENSORS
        self.raw = {"quant_method": COMPRESSED_TENSORS, **raw}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> QuantizationConfigMixin:
        """The package's own configuration where the package is there, else the plain dictionary."""
        names = {field.name for field in dataclasses.fields(PagingOptions)}
        asked = {name: value for name, value in config_dict.items() if name in names}
        raw = {name: value for name, value in config_dict.items() if name not in names}
        config: Any = cls(**raw)
        if is_compressed_tensors_available():
            config = CompressedTensorsConfig.from_dict(raw, **kwargs)
        if asked.get("hbm_budget") is not None:
            config.paging = PagingOptions(**asked)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that it was made from."""
        return dict(self.raw)


def _compressed_tensors_quantizer(config: QuantizationConfigMixin, **kwargs: Any) -> HfQuantizer:
    if isinstance(config, CompressedTensorsConfig):
        return CompressedTensorsQuantizer(config, **kwargs)
    return ExpertsOnlyCompressedTensorsQuantizer(config, **kwargs)


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


def quantize_experts(
    model: PreTrainedModel,
    layouts: Mapping[str, ExpertsLayout],
    weights: WeightFormat,
    activations: str,
) -> None:
    """Quantize the experts of ``layouts`` in place, layer by layer.

    Raises:
        ValueError: an expert's weights are offloaded, or hold NaN or infinity; nothing is changed.
    """
    for name, layout in layouts.items():
        module = model.get_submodule(name)
        for source in (s for p in layout.projections for s in layout.sources[p]):
            weight = module.get_parameter(source)
            if weight.is_meta:
                raise ValueError(
                    f"{name}.{source} is offloaded; load the model without offloading, "
                    "or convert the checkpoint with convert-checkpoint"
                )
            by_expert = weight.detach()
            if layout.flat:
                by_expert = by_expert.unflatten(0, (layout.num_experts, -1))
            for expert, values in enumerate(by_expert[: layout.num_experts]):
                # Both carry NaN and infinity along; a mask would be the size of the weight.
                if not torch.stack((values.amax(), values.amin())).isfinite().all():
                    raise ValueError(
                        f"{name}.{source}[{expert}] holds NaN or infinity; it cannot be quantized"
                    )
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    kept = find_experts(model).keys() - layouts.keys()
    conversions = _for_kept_experts(conversions, layouts, kept)
    for name in layouts:
        source_module = model.get_submodule(name)
        experts = QuantizedExperts.quantized_from(source_module, weights, activations, name=name)
        install(model, name, experts)
    model._weight_conversions = conversions


def restore_experts(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Put a model's own experts modules back; see :func:`qmoe.unpatch`."""
    modules = quantized_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} is not patched; there is nothing to restore")
    for name, experts in modules.items():
        if any(parameter.is_meta for parameter in experts.parameters()):
            raise ValueError(
                f"{name} is offloaded; load the model without offloading to restore its experts"
            )
    layouts = {name: experts.layout for name, experts in modules.items()}
    conversions = [
        conversion
        for conversion in getattr(model, "_weight_conversions", None) or []
        if not _converts_experts(conversion, layouts, (QUANTIZED_SUFFIX, SCALE_SUFFIX))
    ]
    for name, experts in modules.items():
        install(model, name, experts.restore(dtype or model.dtype))
    paging = vars(model).pop("qmoe_paging", None)
    if paging is not None and paging.cache is not None:
        paging.cache.close()
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [
        *conversions,
        *(conversion for conversion in mapping if _converts_experts(conversion, layouts)),
    ]
    return model


def _cast_renamed(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give 16- and 32-bit parameters and buffers the dtype that was asked for.

    Until transformers 5.21, a tensor of a quantized checkpoint that has another name in memory
    keeps the dtype it has on disk.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        dtype = dtypes.get(name, tensor.dtype)
        if tensor.is_meta or not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            continue
        tensor.data = tensor.data.to(dtype)


def _converts_experts(
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


def _for_kept_experts(
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
        if not _converts_experts(conversion, layouts):
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
        _copy(
            conversion,
            [head + source for source in sources],
            [head + target for target in targets],
            conversion.operations,
        )
    ]


def _copy(
    conversion: WeightConverter,
    sources: list[str],
    targets: list[str],
    operations: list[ConversionOps],
) -> WeightConverter:
    copy = WeightConverter(list(sources), list(targets), operations=list(operations))
    copy.scope_prefix = conversion.scope_prefix
    copy.base_model_prefix = conversion.base_model_prefix
    return copy


class _Renamer:
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


def _expert_of(key: str) -> int:
    """The expert's number in the name of one of its tensors; -1 if there is none."""
    return int(next((part for part in reversed(key.split(".")) if part.isdigit()), -1))


def _check_stored(stored: StoredTensor, weights: WeightFormat, shape: tuple[int, ...]) -> None:
    if stored.torch_dtype != STORAGE_DTYPE[weights] or stored.shape != shape:
        raise ValueError(
            f"{stored.file}: {stored.name} is {stored.dtype} of shape {list(stored.shape)} "
            f"instead of {weights} of shape {list(shape)}; convert it again"
        )


def _only_device(device_map: Any) -> torch.device:
    """The one device that a paged model runs on."""
    if device_map is None or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return choose_device("auto")
    devices = set(device_map.values())
    if len(devices) > 1 or "disk" in devices:
        raise ValueError(
            f"device_map={device_map!r}: with hbm_budget a model runs on one device; "
            "give device_map='cuda' or one GPU's name"
        )
    return choose_device(devices.pop())


def _format_per_channel(weight: StoredTensor | None, scale: StoredTensor) -> WeightFormat | None:
    """The weight format of a matrix with one scale per row; None if it is anything else."""
    if weight is None or len(weight.shape) != 2:
        return None
    rows = weight.shape[0]
    return (
        _WEIGHTS_BY_HEADER_DTYPE.get(weight.dtype) if scale.shape in ((rows, 1), (rows,)) else None
    )


def _headers(files: Iterable[str]) -> dict[str, StoredTensor]:
    """Every tensor of these files, from their headers."""
    return {name: t for file in files for name, t in read_header(Path(file)).items()}


# Lets a QmoeConfig that is given to from_pretrained add to the one in a checkpoint.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (QmoeConfig,)
AUTO_QUANTIZATION_CONFIG_MAPPING[QMOE] = QmoeConfig
AUTO_QUANTIZER_MAPPING[QMOE] = QmoeQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[COMPRESSED_TENSORS] = ExpertsOnlyCompressedTensorsConfig
AUTO_QUANTIZER_MAPPING[COMPRESSED_TENSORS] = _compressed_tensors_quantizer
