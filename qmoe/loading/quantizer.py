"""What ``from_pretrained`` and ``save_pretrained`` need for models with 8-bit experts.

:class:`ExpertsQuantizer` is what our two quantizers share. :class:`QmoeQuantizer` is that of our
own format (:mod:`qmoe.checkpoints.schema`) and of quantizing on load.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.base import HfQuantizer
from transformers.utils.logging import is_progress_bar_enabled

from qmoe.checkpoints.files import FileVersion, StoredTensor, read_header
from qmoe.checkpoints.schema import QMOE, QUANTIZED_SUFFIX, SCALE_SUFFIX
from qmoe.experts.layout import ExpertsLayout, find_experts
from qmoe.experts.quantized import (
    Change,
    QuantizedExperts,
    layer_pages,
    quantized_modules,
)
from qmoe.loading.config import QmoeConfig, give_own_config
from qmoe.loading.conversions import (
    Renamer,
    converts_experts,
    expert_of,
    for_kept_experts,
    quantized_conversions,
)
from qmoe.loading.devices import only_device
from qmoe.loading.distributed import SpreadLoad, asks_for_ranks
from qmoe.loading.layers import restore_layers
from qmoe.loading.pages import load_pages, page_stored, refuse_bound
from qmoe.loading.protection import protect
from qmoe.loading.shares import (
    check_scales,
    check_spread,
    load_shares,
    shared_tensors,
)
from qmoe.loading.side_by_side import lay_side_by_side
from qmoe.loading.while_loading import ExpertsToQuantize, stand_in
from qmoe.paging.model import host_store
from qmoe.paging.options import PagingOptions
from qmoe.parallel.group import RankGroup, rank_group
from qmoe.parallel.share import share_of
from qmoe_kernels.quantization import STORAGE_DTYPE, WeightFormat


class ExpertsQuantizer(HfQuantizer):
    """What both quantizers share: a model whose experts are :class:`QuantizedExperts`."""

    requires_calibration = False
    quantization_config: Any
    pre_quantized: bool
    change: Change | None = None  # that is under way, see qmoe.loading.layers
    paged = False  # kept up to date by qmoe.paging.model
    layouts: dict[str, ExpertsLayout]
    kept: Collection[str]  # experts modules that stay in 16 bit
    to_quantize: ExpertsToQuantize | None = None  # while a 16-bit checkpoint is loaded
    device: torch.device
    device_map: Any = None  # as it was asked for
    spread_load: SpreadLoad | None = None  # while from_pretrained loads with a distributed_config
    # What the headers say of pages, see load_pages, and which files they were read from.
    stored: dict[str, list[StoredTensor]]
    versions: dict[Path, FileVersion | None]

    @property
    def paging(self) -> PagingOptions | None:
        """What was asked for, if the experts are to be paged."""
        return getattr(self.quantization_config, "paging", None)

    @property
    def group(self) -> RankGroup | None:
        """The ranks that hold the experts between them; None where all are here."""
        return getattr(self.quantization_config, "group", None)

    @property
    def reads_experts(self) -> bool:
        """Whether experts are read by us, rather than by transformers."""
        return self.paging is not None or self.group is not None

    def update_device_map(self, device_map: Any) -> Any:
        device_map = self.device_map = super().update_device_map(device_map)
        if not self.reads_experts:
            return device_map
        self.device = only_device(device_map)
        return {"": self.device}

    # transformers calls the first until 5.20 and the second from 5.18 on, once it knows where the
    # model goes and before it looks for files.
    def update_tp_plan(self, config: Any) -> Any:
        theirs = getattr(super(), "update_tp_plan", None)
        return self._spread_as_asked(config if theirs is None else theirs(config))

    def update_attn_implementation(self, config: Any) -> Any:
        theirs = getattr(super(), "update_attn_implementation", None)
        return self._spread_as_asked(config if theirs is None else theirs(config))

    def _spread_as_asked(self, config: Any) -> Any:
        """Begin to load on all ranks together if the configuration asks for it."""
        if not asks_for_ranks(config):
            return config
        if not self.pre_quantized:
            raise ValueError(
                "distributed_config: a rank reads its own experts from a converted checkpoint, and "
                "this quantizes while it loads; convert it with convert-checkpoint first"
            )
        del config.distributed_config
        self.device = only_device(self.device_map)
        self.quantization_config.group = rank_group(True, self.device)
        self.spread_load = SpreadLoad(self.quantization_config.group, self)
        return config

    def _hook(self) -> AbstractContextManager[None]:
        return nullcontext() if self.spread_load is None else self.spread_load.hook()

    def preprocess_model(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        with self._hook():
            if self.spread_load is not None:
                self.spread_load.leave_nothing_to_split(model)
            self._prepare(model, *args, **kwargs)

    def _prepare(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        self.versions = {}
        super().preprocess_model(model, *args, **kwargs)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        for pattern, dtype in model._get_dtype_plan(kwargs.get("dtype")).items():
            matches = re.compile(pattern.replace("*", ".*")).search
            self.dtypes.update(dict.fromkeys(filter(matches, self.dtypes), dtype))

    def _stand_in(self, model: PreTrainedModel, name: str, weights: WeightFormat) -> None:
        """Put experts without weights where the model, on the meta device, has its own."""
        source = model.get_submodule(name)
        activations = getattr(self.quantization_config, "activations", "auto")
        paged, share = self.paging is not None, None
        if self.group is not None:
            share = share_of(self.group, self.layouts[name].num_experts, name)
        experts = QuantizedExperts(source, weights, activations, paged=paged, share=share)
        stand_in(model, name, experts)

    def _leave_out_ours(self, model: PreTrainedModel) -> None:
        """Let transformers pass over the tensors that we read: neither read nor warned of."""
        if self.group is not None:
            check_spread(model, self.kept)
        patterns = {
            rf"\.{leaf}$"
            for experts in quantized_modules(model).values()
            for leaf, parameter in experts._parameters.items()
            if parameter is None
        }
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, *patterns}

    def _headers_of(self, files: Iterable[str]) -> dict[str, StoredTensor]:
        """Every tensor of these files, from their headers; the files are to stay what they are."""
        headers: dict[str, StoredTensor] = {}
        for file in map(Path, files):
            found = read_header(file)
            self.versions |= {tensor.file: tensor.version for tensor in found.values()}
            headers |= found
        return headers

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        try:
            with self._hook():
                result = self._finish(model, **kwargs)
                if self.spread_load is not None:
                    self.spread_load.finish(model)
            self.spread_load = None
            return result
        except BaseException:
            if self.to_quantize is not None and self.to_quantize.store is not None:
                self.to_quantize.store.close()
            raise

    def _finish(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        if self.to_quantize is not None:
            self.to_quantize.check_finished()
        _check_loaded(model, [*self.layouts, *self.kept], self.shapes)
        for file, version in self.versions.items():
            if version is not None:
                version.check(file)
        if not hasattr(HfQuantizer, "get_new_dtype"):
            _cast_renamed(model, self.dtypes)
        result = super().postprocess_model(model, **kwargs)
        progress = is_progress_bar_enabled()
        if self.group is not None:
            load_shares(model, self.stored, self.device)
        if self.reads_experts and self.pre_quantized:
            load_pages(model, self.stored, self.paging, self.device, progress=progress)
        elif self.paging is not None:
            assert self.to_quantize is not None and self.to_quantize.store is not None
            page_stored(model, self.to_quantize.store, self.paging, self.device)
        self.to_quantize = None
        self.pre_quantized = True
        if quantized_modules(model):
            protect(model)
            lay_side_by_side(model)
        return result

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        if self.change is not None:
            self.change.check_finished()  # `save_pretrained` asks before it writes anything
        if self.group is not None:
            raise ValueError(
                "save_pretrained: each rank holds only its own experts; load the checkpoint "
                "without expert_parallel to save it"
            )
        return True

    @property
    def is_trainable(self) -> bool:
        # Adapters learn beside experts that are all here, and stay as they are.
        return not self.paged and self.group is None

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
        files = kwargs.get("checkpoint_files")
        if not self.pre_quantized:
            if files:
                check_experts(model, layouts, self._headers_of(files))
            self._begin_to_quantize(model)
            return
        for name in self.layouts:
            self._stand_in(model, name, self.quantization_config.weights)
        if files:
            self._read_headers(model, files)
        if self.reads_experts:
            if not files:
                raise ValueError("hbm_budget needs a checkpoint's files; load it from a folder")
            self._leave_out_ours(model)

    def _begin_to_quantize(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        store = None
        if self.paging is not None:
            layers = [layer_pages(n, layout, config.weights) for n, layout in self.layouts.items()]
            refuse_bound(self.paging, type(model).__name__)
            with torch.device("cpu"):  # transformers makes everything else on meta here
                store = host_store(layers, self.device, progress=is_progress_bar_enabled())
        self.to_quantize = ExpertsToQuantize(
            model, self.layouts, config.weights, config.activations, store
        )

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        return self.to_quantize is not None and param_name in self.to_quantize.sources

    def get_quantize_ops(self) -> ExpertsToQuantize:
        assert self.to_quantize is not None
        return self.to_quantize

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Any) -> float:
        # transformers takes that much of a GPU in advance.
        if self.param_needs_quantization(model, param_name) and not param_name.endswith("_bias"):
            return 1 if self.paging is None else 0
        return super().param_element_size(model, param_name, param)

    def _read_headers(self, model: PreTrainedModel, files: Iterable[str]) -> None:
        pages = {
            f"{name}.{projection}{QUANTIZED_SUFFIX}": layout.shape(projection)
            for name, layout in self.layouts.items()
            for projection in layout.projections
        }
        # What a rank reads a part of.
        parts = {
            f"{name}.{leaf}": shape
            for name, layout in self.layouts.items()
            for leaf, shape in shared_tensors(layout).items()
            if self.group is not None
        }
        rename = Renamer(model, (*pages, *parts))
        found = {rename(key): tensor for key, tensor in self._headers_of(files).items()}
        expected = [f"{n}.{p}" for n in self.layouts for p in model.get_submodule(n).state_dict()]
        for parameter in (*expected, *pages, *parts):
            if parameter not in found:
                raise ValueError(
                    f"{parameter} is in none of the checkpoint's files; convert it again"
                )
        self.stored = {}
        for parameter, shape in pages.items():
            stored = found[parameter]
            self.stored[parameter.removesuffix(QUANTIZED_SUFFIX)] = [stored]
            check_stored(stored, self.quantization_config.weights, shape)
        for parameter, shape in parts.items():
            stored = found[parameter]
            self.stored[parameter] = [stored]
            _check_stored_shape(stored, shape)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        if self.to_quantize is None:
            return model
        model._weight_conversions = self.to_quantize.plain(model._weight_conversions)
        model._weight_conversions = quantized_conversions(model, self.layouts, self.kept)
        return model

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], *args: Any
    ) -> list[WeightTransform]:
        if self.to_quantize is not None:
            return self.to_quantize.keep_apart(weight_conversions)
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


def _check_stored_shape(stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise ValueError(
            f"{stored.file}: {stored.name} has the shape {list(stored.shape)} instead of "
            f"{list(shape)}; convert it again"
        )


def _check_loaded(
    model: PreTrainedModel, experts: Iterable[str], shapes: Mapping[str, torch.Size]
) -> None:
    """Refuse experts that were in no file or have no scales, and tensors of a wrong shape.

    transformers would fill the former with random numbers and only warn; the latter it takes as
    they are, until 5.21.
    """
    for name in experts:
        for leaf, parameter in model.get_submodule(name).named_parameters():
            if parameter.is_meta:
                continue
            if not getattr(parameter, "_is_hf_initialized", False):
                raise ValueError(
                    f"{name}.{leaf} is in none of the checkpoint's files; download it again, or "
                    "convert it again"
                )
            if leaf.endswith(SCALE_SUFFIX):
                check_scales(f"{name}.{leaf}", parameter)
    for name, parameter in model.named_parameters():
        if parameter.shape != shapes.get(name, parameter.shape):
            raise ValueError(
                f"{name}: the checkpoint has the shape {list(parameter.shape)} for it instead of "
                f"{list(shapes[name])}; its config.json is another model's"
            )


def check_experts(
    model: PreTrainedModel,
    layouts: Mapping[str, ExpertsLayout],
    headers: Mapping[str, StoredTensor],
) -> None:
    """Refuse a 16-bit checkpoint that lacks an expert or has one of another shape than the others.

    Headers alone are read, and the tensors are named as the checkpoint does.
    """
    rename = Renamer(model)
    found: dict[str, dict[int, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for key in headers:
        target, part = rename.with_part(key)
        found[target][part][expert_of(key)] = key
    missing = []
    split = [c for c in rename.converters if len(c.target_patterns) > 1]
    for name, layout in layouts.items():
        if any(converts_experts(conversion, {name: layout}) for conversion in split):
            continue  # which of several parameters a tensor goes to, its name does not tell
        for source in (s for sources in layout.sources.values() for s in sources):
            parts = found.get(f"{name}.{source}", {})
            if not parts:
                missing.append(f"{name}.{source}")
            for keys in parts.values():
                shapes = Counter(headers[key].shape for key in keys.values())
                common = max(shapes, key=shapes.__getitem__)
                for odd in (headers[key] for key in keys.values() if headers[key].shape != common):
                    raise ValueError(
                        f"{odd.file}: {odd.name} has the shape {list(odd.shape)}, other experts' "
                        f"is {list(common)}; download it again"
                    )
                first = next(iter(keys.values()))
                head, _, tail = re.split(r"(?<=\.)(\d+)(?=\.)(?!.*\.\d+\.)", first + ".")
                missing += [
                    f"{head}{expert}{tail}".rstrip(".")
                    for expert in range(layout.num_experts if len(keys) > 1 else 0)
                    if expert not in keys
                ]
    if missing:
        raise ValueError(f"{listed(missing)} in none of the checkpoint's files; download it again")


def listed(names: Collection[str]) -> str:
    """The first few of these names, how many more there are, and a verb."""
    first = sorted(names)[:3]
    more = len(names) - len(first)
    return (
        ", ".join(first)
        + (f" and {more} more" if more else "")
        + (" are" if len(names) > 1 else " is")
    )
