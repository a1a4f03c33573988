"""What ``from_pretrained`` and ``save_pretrained`` need for models with 8-bit experts.

:class:`ExpertsQuantizer` is what our two quantizers share. :class:`QmoeQuantizer` is that of our
own format (:mod:`qmoe.checkpoints.schema`) and of quantizing on load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.base import HfQuantizer
from transformers.utils.logging import is_progress_bar_enabled

from qmoe.checkpoints.files import StoredTensor, read_header
from qmoe.checkpoints.schema import QMOE, QUANTIZED_SUFFIX
from qmoe.experts.layout import ExpertsLayout, find_experts
from qmoe.experts.quantized import Change, QuantizedExperts, install, quantized_modules
from qmoe.loading.config import QmoeConfig, give_own_config
from qmoe.loading.conversions import Renamer, for_kept_experts
from qmoe.loading.devices import only_device
from qmoe.loading.layers import quantize_layers, restore_layers
from qmoe.loading.pages import load_pages, page_quantized
from qmoe.loading.protection import protect
from qmoe.loading.side_by_side import lay_side_by_side
from qmoe.paging.model import budget_for, pages_of
from qmoe.paging.options import PagingOptions
from qmoe_kernels.quantization import STORAGE_DTYPE, WeightFormat


class ExpertsQuantizer(HfQuantizer):
    """What both quantizers share: a model whose experts are :class:`QuantizedExperts`."""

    requires_calibration = False
    quantization_config: Any
    pre_quantized: bool
    change: Change | None = None  # that is under way, see qmoe.loading.layers
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
        self.device = only_device(device_map)
        # Experts that are yet to be quantized would not fit.
        return {"": self.device if self.pre_quantized else torch.device("cpu")}

    def preprocess_model(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        super().preprocess_model(model, *args, **kwargs)
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        for pattern, dtype in model._get_dtype_plan(kwargs.get("dtype")).items():
            matches = re.compile(pattern.replace("*", ".*")).search
            self.dtypes.update(dict.fromkeys(filter(matches, self.dtypes), dtype))

    def _stand_in(self, model: PreTrainedModel, name: str, weights: WeightFormat) -> None:
        """Put experts without weights where the model, on the meta device, has its own."""
        source = model.get_submodule(name)
        activations = getattr(self.quantization_config, "activations", "auto")
        paged = self.paging is not None
        install(model, name, QuantizedExperts(source, weights, activations, paged=paged))
        block = model.get_submodule(name.rpartition(".")[0])
        if not any(True for _ in (*block.parameters(False), *block.buffers(False))):
            # All that is left for it to initialize are the experts that it no longer has.
            block._is_hf_initialized = True

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
        if quantized_modules(model):
            protect(model)
            lay_side_by_side(model)
        return result

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        if self.change is not None:
            self.change.check_finished()  # `save_pretrained` asks before it writes anything
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
        return restore_layers(model, dtype)


class QmoeQuantizer(ExpertsQuantizer):
    """Loads checkpoints in the ``qmoe`` format, and quantizes 16-bit ones on load."""

    quantization_config: QmoeConfig

    def mark(self, model: PreTrainedModel) -> None:
        """Let transformers know that ``model`` is quantized, and how."""
        give_own_config(model)
        model.hf_quantizer = self
        model.config.quantization_config = self.quantization_config
        model.quantization_method = QMOE
        model.is_quantized = True
        protect(model)

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
            self._stand_in(model, name, self.quantization_config.weights)
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
        rename = Renamer(model, pages)
        found = {rename(key): tensor for key, tensor in headers_of(files).items()}
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
            check_stored(stored, self.quantization_config.weights, shape)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            config = self.quantization_config
            change = Change("qmoe.patch")
            quantize_layers(model, self.layouts, config.weights, config.activations, change)
            change.finished = True
        return model

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], *args: Any
    ) -> list[WeightTransform]:
        if not self.pre_quantized:
            return weight_conversions
        return for_kept_experts(weight_conversions, self.layouts, self.kept)


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


def check_stored(stored: StoredTensor, weights: WeightFormat, shape: tuple[int, ...]) -> None:
    if stored.torch_dtype != STORAGE_DTYPE[weights] or stored.shape != shape:
        raise ValueError(
            f"{stored.file}: {stored.name} is {stored.dtype} of shape {list(stored.shape)} "
            f"instead of {weights} of shape {list(shape)}; convert it again"
        )


def headers_of(files: Iterable[str]) -> dict[str, StoredTensor]:
    """Every tensor of these files, from their headers."""
    return {name: t for file in files for name, t in read_header(Path(file)).items()}
