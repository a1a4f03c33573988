"""transformers' own compressed-tensors quantizer, taught to keep experts in 8 bit.

Experts with INT8 or FP8 weights and per-channel scales stay as they are. Without the
``compressed-tensors`` package, checkpoints load of which only the experts are quantized.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import product
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightTransform
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from qmoe.checkpoints.files import StoredTensor
from qmoe.checkpoints.schema import QUANTIZED_SUFFIX, SCALE_SUFFIX
from qmoe.experts.layout import find_experts
from qmoe.loading.conversions import (
    MergeScales,
    Renamer,
    converts_experts,
    copy_for,
    expert_of,
    for_kept_experts,
)
from qmoe.loading.quantizer import ExpertsQuantizer, check_stored
from qmoe_kernels.quantization import WeightFormat

_WEIGHTS_BY_HEADER_DTYPE: dict[str, WeightFormat] = {"I8": "int8", "F8_E4M3": "fp8"}


class _CompressedTensorsExperts(ExpertsQuantizer):
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
        for name, weights in self.quantized.items():
            self._stand_in(model, name, weights)
        if self.reads_experts:
            self._leave_out_ours(model)
        if self.needs_package:
            super()._process_model_before_weight_loading(model, **kwargs)

    def _read_headers(self, model: PreTrainedModel, files: Iterable[str]) -> None:
        headers = self._headers_of(files)
        try:
            layouts = find_experts(model)
        except ValueError:
            layouts = {}  # dense, or experts that only the package can load
        projections = {name: layout.projections for name, layout in layouts.items()}
        rename = Renamer(model)
        found: dict[str, dict[tuple[int, int], StoredTensor]] = defaultdict(dict)
        scales: dict[str, dict[tuple[int, int], StoredTensor]] = defaultdict(dict)
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
            found[target][expert_of(key), part] = weight
            scales[target][expert_of(key), part] = headers[key]
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
                target = f"{name}.{projection}"
                self.stored[target] = [tensors[place] for place in expected]
                self.stored[target + SCALE_SUFFIX] = [scales[target][p] for p in expected]
                if self.reads_experts:
                    _, rows, columns = layout.shape(projection)
                    for tensor in tensors.values():
                        check_stored(tensor, self.quantized[name], (rows // parts, columns))

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], *args: Any
    ) -> list[WeightTransform]:
        ours: list[WeightTransform] = []
        rest: list[WeightTransform] = []
        for conversion in weight_conversions:
            if not converts_experts(conversion, self.layouts):
                rest.append(conversion)
                continue
            sources = conversion._original_source_patterns
            targets = conversion._original_target_patterns
            for operation in conversion.operations if self.reads_experts else ():
                if not isinstance(operation, (MergeModulelist, Concatenate)):
                    option = "hbm_budget" if self.group is None else "expert_parallel"
                    raise ValueError(
                        f"{option}: {sources[0]} is not stored as it is computed with "
                        f"({type(operation).__name__}); load it without {option}"
                    )
            # The scales come first: until transformers 5.21, `weight` also matches `weight_scale`.
            ours.insert(
                0,
                copy_for(
                    conversion,
                    [source + "_scale" for source in sources],
                    [target + SCALE_SUFFIX for target in targets],
                    [MergeScales()],
                ),
            )
            ours.append(
                copy_for(
                    conversion,
                    sources,
                    [target + QUANTIZED_SUFFIX for target in targets],
                    conversion.operations,
                )
            )
        kept = for_kept_experts(weight_conversions, self.layouts, self.kept, scoped_only=True)
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


def compressed_tensors_quantizer(config: QuantizationConfigMixin, **kwargs: Any) -> HfQuantizer:
    if isinstance(config, CompressedTensorsConfig):
        return CompressedTensorsQuantizer(config, **kwargs)
    return ExpertsOnlyCompressedTensorsQuantizer(config, **kwargs)


def _format_per_channel(weight: StoredTensor | None, scale: StoredTensor) -> WeightFormat | None:
    """The weight format of a matrix with one scale per row; None if it is anything else."""
    if weight is None or len(weight.shape) != 2:
        return None
    rows = weight.shape[0]
    return (
        _WEIGHTS_BY_HEADER_DTYPE.get(weight.dtype) if scale.shape in ((rows, 1), (rows,)) else None
    )
