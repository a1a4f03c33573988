"""What ``from_pretrained`` and ``save_pretrained`` need: two quantizers, registered on import.

- ``qmoe``: our own format (:mod:`qmoe.format`), and quantizing on load.
- ``compressed-tensors``: transformers' own quantizer, taught to keep experts with INT8 or FP8
  weights and per-channel scales in 8 bit. Without the ``compressed-tensors`` package it loads
  checkpoints of which only the experts are quantized.

transformers maps checkpoint names to a model's parameters by a list of *conversions*; an experts
converter merges one tensor per expert into a stacked parameter. Conversions run in reverse when a
model is saved.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
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
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import is_compressed_tensors_available
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from qmoe.checkpoint import StoredTensor, read_header
from qmoe.experts import QuantizedExperts, install
from qmoe.format import (
    COMPRESSED_TENSORS,
    FORMAT_VERSION,
    QMOE,
    QUANTIZED_SUFFIX,
    SCALE_SUFFIX,
    qmoe_config,
)
from qmoe.layout import ExpertsLayout, find_experts
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

    def to_dict(self) -> dict[str, Any]:
        """As :func:`qmoe.format.qmoe_config`."""
        return qmoe_config(self.weights, self.modules_to_not_convert)


class _ExpertsQuantizer(HfQuantizer):
    """What both quantizers share: a model whose experts are :class:`QuantizedExperts`."""

    requires_calibration = False
    quantization_config: Any
    pre_quantized: bool

    def preprocess_model(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        super().preprocess_model(model, *args, **kwargs)
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        for pattern, dtype in model._get_dtype_plan(kwargs.get("dtype")).items():
            matches = re.compile(pattern.replace("*", ".*")).search
            self.dtypes.update(dict.fromkeys(filter(matches, self.dtypes), dtype))

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        if not hasattr(HfQuantizer, "get_new_dtype"):
            _cast_renamed(model, self.dtypes)
        return super().postprocess_model(model, **kwargs)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

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
        for name in self.layouts:
            config = self.quantization_config
            source = model.get_submodule(name)
            install(model, name, QuantizedExperts(source, config.weights, config.activations))
        files = kwargs.get("checkpoint_files")
        if files:
            found = _targets(model, files)
            for name in self.layouts:
                for parameter, _ in model.get_submodule(name).named_parameters():
                    if f"{name}.{parameter}" not in found:
                        raise ValueError(
                            f"{name}.{parameter} is in none of the checkpoint's files; "
                            "convert it again"
                        )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            config = self.quantization_config
            quantize_experts(model, self.layouts, config.weights, config.activations)
            self.pre_quantized = True
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
    layouts: dict[str, ExpertsLayout]
    kept: set[str]
    needs_package: list[str]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.quantized, self.layouts, self.kept, self.needs_package = {}, {}, set(), []
        files = kwargs.get("checkpoint_files")
        if not files or getattr(self.quantization_config, "dequantize", False):
            self.needs_package = ["the request to dequantize"]
        else:
            self._read_headers(model, files)
        for name, weights in self.quantized.items():
            install(model, name, QuantizedExperts(model.get_submodule(name), weights))
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
        counts: Counter[str] = Counter()
        for key in headers:
            if not key.endswith(".weight_scale"):
                if key.endswith((".weight_packed", ".weight_zero_point", ".weight_global_scale")):
                    self.needs_package.append(key)
                continue
            weight = headers.get(key.removesuffix("_scale"))
            target = rename(key.removesuffix("_scale"))
            name, _, projection = target.rpartition(".")
            weights = _format_per_channel(weight, headers[key])
            if weight is None or weights is None or projection not in projections.get(name, ()):
                self.needs_package.append(key)
                continue
            counts[target] += 1
            if self.quantized.setdefault(name, weights) != weights:
                raise ValueError(
                    f"{weight.file}: {weight.name} is {weight.dtype}, other experts are not"
                )
        self.layouts = {name: layouts[name] for name in self.quantized}
        self.kept = layouts.keys() - self.quantized.keys()
        for name, layout in self.layouts.items():
            for projection in layout.projections:
                parts = 2 if projection == "gate_up_proj" else 1
                if counts[f"{name}.{projection}"] != parts * layout.num_experts:
                    raise ValueError(
                        f"{name}.{projection}: the checkpoint has {counts[f'{name}.{projection}']} "
                        f"quantized tensors for it instead of {parts * layout.num_experts}"
                    )

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
        if is_compressed_tensors_available():
            return CompressedTensorsConfig.from_dict(config_dict, **kwargs)
        return cls(**config_dict)

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
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [
        *conversions,
        *(conversion for conversion in mapping if _converts_experts(conversion, layouts)),
    ]
    return model


def quantized_modules(model: nn.Module) -> dict[str, QuantizedExperts]:
    """The quantized experts modules of ``model``, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedExperts)}


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

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self.renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self.converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self.prefix = model.base_model_prefix
        self.parameters = model.state_dict()

    def __call__(self, key: str) -> str:
        if key in self.parameters:
            return key
        target, _ = rename_source_key(
            key, self.renamings, self.converters, self.prefix, self.parameters
        )
        return target


def _targets(model: PreTrainedModel, files: Iterable[str]) -> set[str]:
    rename = _Renamer(model)
    return {rename(key) for key in _headers(files)}


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


AUTO_QUANTIZATION_CONFIG_MAPPING[QMOE] = QmoeConfig
AUTO_QUANTIZER_MAPPING[QMOE] = QmoeQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[COMPRESSED_TENSORS] = ExpertsOnlyCompressedTensorsConfig
AUTO_QUANTIZER_MAPPING[COMPRESSED_TENSORS] = _compressed_tensors_quantizer
