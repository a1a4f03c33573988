"""Which tensors of a checkpoint are expert weights, and how to read them.

The model is built on the meta device from the checkpoint's config, and every name goes through the
conversion mapping that ``from_pretrained`` uses.  No table of names is kept here.  This is the only
module of the converter that imports transformers; the mapping is private API, so everything that
touches it is here.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.compressed_tensors import get_experts_scheme
from transformers.quantizers.auto import AutoHfQuantizer

from qmoe.checkpoints.files import (
    DTYPE_NAMES,
    CheckpointError,
    StoredTensor,
    check_config,
    check_generation_config,
    check_mxfp4,
    ends_in_cut_block,
    read_json,
)
from qmoe.checkpoints.inspection import check_top_k
from qmoe.checkpoints.schema import QMOE, format_of
from qmoe.experts.layout import ExpertsLayout, find_experts
from qmoe_convert import ConversionError, SourceError, one_line
from qmoe_convert.shards import Reader, read_into
from qmoe_convert.workers import Restored

# Methods whose dequantizing conversions transformers has.
DEQUANTIZABLE = ("fp8", "mxfp4", "compressed-tensors")
_AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText)
# What weights are stored in that need no dequantizing.
_WEIGHT_DTYPES = ("BF16", "F16", "F32")


class MappingError(SourceError):
    """A checkpoint whose tensors cannot be told apart; the message names the tensor or file."""


@dataclass
class _Group:
    """What transformers makes a parameter of (several, if it splits): a transform, its inputs."""

    target: str
    transform: Any
    # source pattern -> checkpoint names, in the order in which experts are numbered
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def operations(self) -> list[Any]:
        return list(getattr(self.transform, "operations", ()))

    def leave_undequantized(self) -> None:
        """Drop what dequantizes: a checkpoint may hold some layers in 16 bit."""
        if any(hasattr(op, "hf_quantizer") for op in self.operations):
            self.transform = copy.copy(self.transform)
            self.transform.operations = [
                op for op in self.operations if not hasattr(op, "hf_quantizer")
            ]

    @property
    def names(self) -> list[str]:
        """All checkpoint names."""
        return [name for names in self.sources.values() for name in names]

    @property
    def targets(self) -> list[str]:
        """Every parameter that the transform yields."""
        first, *_ = patterns = self.transform.target_patterns
        return [self.target.replace(first, pattern) for pattern in patterns]

    @property
    def merges_experts(self) -> bool:
        """Whether each pattern has one tensor per expert, to be stacked along dimension 0."""
        return any(isinstance(op, MergeModulelist) and op.dim == 0 for op in self.operations)

    @property
    def keeps_experts_apart(self) -> bool:
        """Whether converting a slice of experts gives that slice of the converted tensor.

        True if every operation either stacks experts or leaves dimension 0 alone.
        """
        for op in self.operations:
            if isinstance(op, MergeModulelist) or hasattr(op, "hf_quantizer"):
                continue
            dims = [value for name, value in vars(op).items() if name in ("dim", "dim0", "dim1")]
            if not dims or any(dim in (0, -3) for dim in dims):
                return False
        return True

    def read(self, reader: Reader) -> dict[str, list[torch.Tensor]]:
        """Read all sources whole: source pattern -> tensors."""
        return {pattern: [reader.read(n) for n in ns] for pattern, ns in self.sources.items()}

    def read_experts(
        self, reader: Reader, first: int, last: int, rows: int = 1
    ) -> dict[str, list[torch.Tensor]]:
        """Read experts ``first`` to ``last`` (excluded), of ``rows`` rows if they are not apart."""
        if self.merges_experts:
            return {p: [reader.read(n) for n in ns[first:last]] for p, ns in self.sources.items()}
        some = slice(first * rows, last * rows)
        return {p: [reader.read(name, some)] for p, (name,) in self.sources.items()}

    def convert(
        self, tensors: dict[str, list[torch.Tensor]], model: Any
    ) -> dict[str, torch.Tensor]:
        """Run the transform: parameter name -> tensor, as transformers would load it."""
        transform = copy.copy(self.transform)
        transform.collected_tensors = tensors
        converted = transform.convert(self.target, model=model, config=model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in converted.items()}

    def dequantize(self, tensors: dict[str, list[torch.Tensor]], model: Any) -> dict[str, Any]:
        """Run only the dequantizing operations: weight pattern -> tensors."""
        for op in self.operations:
            if hasattr(op, "hf_quantizer"):
                tensors = op.convert(
                    tensors,
                    source_patterns=self.transform.source_patterns,
                    target_patterns=self.transform.target_patterns,
                    full_layer_name=self.target,
                    model=model,
                    config=model.config,
                    missing_keys=None,
                )
        return tensors


@dataclass
class Projection:
    """One projection, or bias, of one experts module, and how to read it from the checkpoint."""

    module: str
    name: str
    layout: ExpertsLayout
    groups: list[_Group]
    _parameters: list[str]
    _tensors: Mapping[str, StoredTensor]
    _model: Any

    @cached_property
    def source_names(self) -> list[str]:
        """Every checkpoint tensor that this projection is made of."""
        return [name for group in self.groups for name in group.names]

    @cached_property
    def dtype(self) -> str:
        """The float dtype of the weights before they are quantized, as safetensors names it."""
        if self.is_quantized:
            return DTYPE_NAMES[self._model.dtype]
        return self._tensors[self.source_names[0]].dtype

    @property
    def is_quantized(self) -> bool:
        """Whether the checkpoint holds this projection quantized already."""
        return any(hasattr(op, "hf_quantizer") for g in self.groups for op in g.operations) and any(
            not self._tensors[name].torch_dtype.is_floating_point
            or self._tensors[name].torch_dtype.itemsize == 1
            for name in self.source_names
        )

    @cached_property
    def sliceable(self) -> bool:
        """Whether some experts can be read without the others."""
        return all(group.keeps_experts_apart for group in self.groups)

    def source_bytes(self, num_experts: int) -> int:
        """Bytes that reading ``num_experts`` experts takes from disk."""
        total = sum(self._tensors[name].nbytes for name in self.source_names)
        share = num_experts if self.sliceable else self.layout.num_experts
        return -(-total * share // self.layout.num_experts) + 64 * len(self.source_names)

    def load(self, reader: Reader, first: int, last: int) -> torch.Tensor:
        """Read experts ``first`` to ``last`` (excluded) in canonical form.

        Returns:
            (last - first, out_features, in_features), or (last - first, out_features) for a bias.
        """
        layout, low, high = self.layout, first, last
        if not self.sliceable:
            low, high = 0, layout.num_experts
        rows = layout.intermediate_size if layout.flat else 1
        tensors = []
        for parameter, group in zip(self._parameters, self.groups, strict=True):
            read = group.read
            if group.keeps_experts_apart:
                read = partial(group.read_experts, first=low, last=high, rows=rows)
            tensors.append(group.convert(read(reader), self._model)[parameter])
        canonical = layout.canonical(self.name, tensors)
        expected = (high - low, *layout.shape(self.name)[1:])
        if tuple(canonical.shape) != expected:
            raise MappingError(
                f"{_and_more(self.source_names)}: make {self.module}.{self.name} of shape "
                f"{list(canonical.shape)}, the model expects {list(expected)}"
            )
        return canonical[first - low : last - low]

    @cached_property
    def parts(self) -> list[dict[str, tuple[int, int]]] | None:
        """For each expert, the stored 2-D weights whose rows make up the projection, in order.

        Name, without ``.weight``, -> shape. None if the checkpoint stores the projection
        otherwise: then a row of ours is not a row of theirs and the weight cannot be quantized
        under its own name.
        """
        layout = self.layout
        if layout.transposed or layout.interleaved or layout.flat or len(self.groups) != 1:
            return None
        (group,) = self.groups
        operations = [op for op in group.operations if not hasattr(op, "hf_quantizer")]
        if [(type(op), getattr(op, "dim", None)) for op in operations] not in (
            [(MergeModulelist, 0)],
            [(MergeModulelist, 0), (Concatenate, 1)],
        ):
            return None
        rows, columns = layout.shape(self.name)[1:]
        parts = []
        for names in zip(*group.sources.values(), strict=True):
            stems = list(dict.fromkeys(map(_stem, names)))
            if rows % len(stems):
                return None
            parts.append(dict.fromkeys(stems, (rows // len(stems), columns)))
        return parts

    def names_of(self, expert: int) -> list[str]:
        """The checkpoint tensors of one expert, for a projection that has ``parts``."""
        return [names[expert] for group in self.groups for names in group.sources.values()]

    def load_parts(self, reader: Reader, expert: int) -> list[torch.Tensor]:
        """Read one expert's weights in the order of ``parts``, dequantized if need be."""
        (group,) = self.groups
        dequantized = group.dequantize(group.read_experts(reader, expert, expert + 1), self._model)
        found = {_stem(group.sources[p][expert]): t[0] for p, t in dequantized.items()}
        assert self.parts is not None
        for name, expected in self.parts[expert].items():
            shape = tuple(found[name].shape) if name in found else None
            if shape != expected:
                raise MappingError(
                    f"{name}.weight: shape {None if shape is None else list(shape)}, "
                    f"the model expects {list(expected)}"
                )
        return [found[name] for name in self.parts[expert]]


@dataclass
class Experts:
    """One experts module: its projections and biases by canonical name."""

    module: str
    layout: ExpertsLayout
    projections: dict[str, Projection]

    @cached_property
    def source_names(self) -> list[str]:
        """Every checkpoint tensor of this module."""
        return list(dict.fromkeys(n for p in self.projections.values() for n in p.source_names))

    @property
    def stored_per_expert(self) -> bool:
        """Whether compressed-tensors can hold this module under the checkpoint's own names."""
        weights = [self.projections[name] for name in self.layout.projections]
        return not self.layout.biases and all(p.parts is not None for p in weights)

    @property
    def part_names(self) -> list[str]:
        """The experts' own Linear layers, if they are stored as such."""
        return [n for p in self.projections.values() for parts in p.parts or () for n in parts]

    def load_expert(self, reader: Reader, expert: int) -> list[torch.Tensor]:
        """Read one expert's weights, for a module that is stored per expert."""
        projections = [self.projections[name] for name in self.layout.projections]
        return [t for projection in projections for t in projection.load_parts(reader, expert)]

    def load_slice(self, reader: Reader, name: str, first: int, last: int) -> list[torch.Tensor]:
        """Read experts ``first`` to ``last`` (excluded) of a projection or bias, one tensor."""
        return [self.projections[name].load(reader, first, last)]

    def bias(self, name: str) -> Kept:
        """The bias ``name`` of all experts."""
        bias = self.projections[name]
        return Kept(
            f"{self.module}.{name}",
            bias.dtype,
            self.layout.shape(name),
            tuple(bias.source_names),
            partial(self.load_slice, name=name, first=0, last=self.layout.num_experts),
        )


@dataclass
class Kept:
    """A tensor that stays in 16 bit, made of ``source_names``; without ``load`` it is a copy."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source_names: tuple[str, ...]
    load: Callable[[Reader], Sequence[torch.Tensor]] | None = None


@dataclass
class CheckpointMapping:
    """What a checkpoint holds: its experts modules, and everything else."""

    folder: Path
    model_class: str
    experts: dict[str, Experts]
    # checkpoint names of tensors outside of experts modules
    others: list[str]
    # Linear layers and routers outside of experts modules, by the checkpoint's and by transformers'
    # names
    linear_names: list[str]
    # those of `others` that the model has no place for
    extra: list[str]
    warnings: list[str]
    _tensors: Mapping[str, StoredTensor]
    _group_of: dict[str, _Group]
    _quantizer: Any
    _model: Any

    def keep(self, skipped: Iterable[str]) -> list[Kept]:
        """What stays in 16 bit if the experts modules ``skipped`` do, in natural order."""
        names = [n for module in skipped for n in self.experts[module].source_names]
        names = natural_order([*self.others, *names])
        siblings: dict[str, list[str]] = defaultdict(list)
        for name in names:
            siblings[_stem(name)].append(name)
        kept: list[Kept] = []
        done: set[str] = set()
        for name in names:
            if name in done:
                continue
            stored, group = self._tensors[name], self._group_of.get(name)
            companions = [name]
            if self._quantizer is not None:
                companions = _companions(name, siblings[_stem(name)], group, self._tensors)
            done.update(companions)
            if len(companions) == 1:
                kept.append(Kept(name, stored.dtype, stored.shape, (name,)))
                continue
            with _explained(self.folder):
                kept.append(
                    _dequantized(companions, group, self._tensors, self._quantizer, self._model)
                )
        return kept


def map_checkpoint(folder: Path, tensors: Mapping[str, StoredTensor]) -> CheckpointMapping:
    """Sort a checkpoint's tensors into experts and others through transformers' conversion mapping.

    Args:
        folder: holds config.json.
        tensors: every tensor of the checkpoint; only names, shapes and dtypes are used.

    Raises:
        MappingError: no usable config, an unknown class or one that needs remote code, a model
            without experts, a tensor that is missing, or one whose dtype or shape the model does
            not take.
    """
    with _explained(folder):
        return _map_checkpoint(folder, tensors)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say in one line that a checkpoint is not what its config says, however that shows."""
    try:
        yield
    except (ConversionError, CheckpointError, OSError):
        raise
    except Exception as error:
        raise MappingError(
            f"{folder}: its config.json and its tensors do not go together "
            f"({type(error).__name__}: {one_line(error)}); download it again, or use another "
            "transformers"
        ) from error


def _map_checkpoint(folder: Path, tensors: Mapping[str, StoredTensor]) -> CheckpointMapping:
    # transformers' warnings are about loading, not about converting.
    check_mxfp4(tensors)
    with _building, _verbosity, _collector:
        transformers.logging.set_verbosity_error()
        gc.disable()  # of a model's code and modules nothing is garbage yet
        config = _load_config(folder, tensors)
        quantizer = _dequantizer(config, folder)
        said, plain = quantizer, not any(map(_is_quantized, tensors.values()))
        if plain:
            quantizer = None
        model = _build_meta_model(config, folder, tensors)
        try:
            layouts = find_experts(model)
        except ValueError as error:
            raise MappingError(f"{folder}: {error}") from None
        fewest = min(each.num_experts + each.num_identity_experts for each in layouts.values())
        check_top_k(folder, config.to_dict(), fewest)
        module_names = _linear_modules(model, config)
        transforms = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        if hasattr(quantizer, "compressor"):
            _complete_dequantization(transforms, quantizer)
        _keep_cut_blocks(transforms, quantizer)
    groups, unmapped = _group_by_target(model, transforms, tensors)
    # A parameter's own group comes before one that splits its sources over several.
    by_parameter = {target: group for group in groups for target in group.targets}
    by_parameter |= {group.target: group for group in groups}
    _check_nothing_missing(folder, model, by_parameter, unmapped)
    experts = {
        module: _map_experts(module, layout, by_parameter, tensors, model)
        for module, layout in layouts.items()
    }
    _check_tensors(experts, groups, tensors, model)

    group_of = {name: group for group in groups for name in group.names}
    # Experts that return their input have weights that no code reads.
    unused = tensors.keys() - group_of.keys() - set(unmapped)
    scales = [n for n in unmapped if quantizer is not None and _is_activation_scale(n)]
    claimed = {name for one in experts.values() for name in one.source_names}
    others = [n for n in tensors if n not in claimed and n not in unused and n not in scales]
    num_experts = {layout.num_experts for layout in layouts.values()}
    extra = [name for name in unmapped if name in others]
    return CheckpointMapping(
        folder=folder,
        model_class=type(model).__name__,
        experts=experts,
        others=others,
        linear_names=natural_order(
            _linear_names(others, tensors, group_of, model, num_experts) | module_names
        ),
        extra=extra,
        warnings=_warnings(said, plain, len(unused), scales, extra),
        _tensors=tensors,
        _group_of=group_of,
        _quantizer=quantizer,
        _model=model,
    )


def _map_experts(
    module: str,
    layout: ExpertsLayout,
    groups: dict[str, _Group],
    tensors: Mapping[str, StoredTensor],
    model: Any,
) -> Experts:
    projections = {}
    for name, relative in layout.sources.items():
        parameters = [f"{module}.{parameter}" for parameter in relative]
        for parameter in parameters:
            if parameter not in groups:
                raise MappingError(
                    f"the checkpoint holds no tensor for {parameter} of {type(model).__name__}; "
                    "a shard or an index entry is missing, download it again"
                )
        found = [groups[parameter] for parameter in parameters]
        for group in found:
            if layout.num_identity_experts and group.merges_experts:
                group.sources = {p: ns[: layout.num_experts] for p, ns in group.sources.items()}
            _check_complete(group, layout, tensors)
        projections[name] = Projection(module, name, layout, found, parameters, tensors, model)
    return Experts(module, layout, projections)


def _is_quantized(stored: StoredTensor) -> bool:
    """Whether a tensor is a quantized weight or what lies beside one."""
    return stored.dtype not in (*_WEIGHT_DTYPES, "F64", "I64", "BOOL") or "scale" in stored.name


def _warnings(
    quantizer: Any, plain: bool, num_unused: int, scales: list[str], unmapped: list[str]
) -> list[str]:
    """What the user should know about the checkpoint; ``plain``: no tensor of it is quantized."""
    warnings = []
    if num_unused:
        warnings.append(f"{num_unused} tensors of experts that return their input are left out")
    if quantizer is not None:
        method = quantizer.quantization_config.quant_method
        method = str(getattr(method, "value", method))
        warnings.append(
            f"config.json says that the checkpoint is quantized ({method}), and no tensor of it "
            "is: taken as it is"
            if plain
            else f"the checkpoint is quantized already ({method}): quantizing twice adds both "
            "errors; convert the 16-bit original if there is one. Its other layers are dequantized"
        )
    if scales:
        warnings.append(
            f"{_and_more(scales)} left out: activations are quantized by their own largest value"
        )
    if unmapped:
        warnings.append(f"transformers has no place for {_and_more(unmapped)}: kept as they are")
    return warnings


def _and_more(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


# The model


# transformers sets torch's default dtype while it builds a model. Of two builds that overlapped,
# the second would leave the dtype of the first as the default of the process.
_building = threading.Lock()
_verbosity = Restored(transformers.logging.get_verbosity, transformers.logging.set_verbosity)
_collector = Restored(gc.isenabled, lambda before: gc.enable() if before else gc.disable())


def _load_config(folder: Path, tensors: Mapping[str, StoredTensor]) -> Any:
    file = folder / "config.json"
    if not file.exists():
        raise MappingError(f"{file}: missing; a Hugging Face model folder has one")
    raw = read_json(file)
    check_generation_config(folder)
    check_config(file, raw, tensors)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise MappingError(f"{file}: model_type is no name; download it again")
    if model_type not in transformers.CONFIG_MAPPING:
        if "auto_map" in raw:
            raise MappingError(
                f"{file}: model type {model_type!r:.80} needs remote code, which never runs here; "
                "only classes of transformers itself are converted"
            )
        raise MappingError(
            f"{file}: transformers {transformers.__version__} does not know "
            f"model type {model_type!r:.80}; a newer version may"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises what its validators raise
        raise MappingError(f"{file}: transformers cannot use it: {one_line(error)}") from None


def _build_meta_model(config: Any, folder: Path, tensors: Mapping[str, StoredTensor]) -> Any:
    dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if not isinstance(dtype, torch.dtype):
        wide = [t.dtype for t in tensors.values() if t.dtype in _WEIGHT_DTYPES]
        common = max(set(wide), key=wide.count) if wide else "BF16"
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[common]
    try:
        with torch.device("meta"):
            # The class whose checkpoint it is comes before one that would load a part of it.
            for name in getattr(config, "architectures", None) or ():
                found: Any = getattr(transformers, name, None)
                if _is_model_class(found):
                    return found._from_config(config, dtype=dtype)
            for auto in _AUTO_CLASSES:
                if type(config) in auto._model_mapping:
                    return auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        raise MappingError(
            f"{folder / 'config.json'}: transformers cannot build the model: {one_line(error)}"
        ) from None
    raise MappingError(
        f"{folder / 'config.json'}: no class of transformers {transformers.__version__} generates "
        f"text with model type {config.model_type!r}"
    )


def _is_model_class(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel)


def _dequantizer(config: Any, folder: Path) -> Any:
    """transformers' quantizer for a checkpoint that is quantized already, told to dequantize."""
    # A multimodal model may say it of its language model alone.
    raw = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not raw:
        return None
    raw = dict(raw if isinstance(raw, dict) else raw.to_dict())
    method = str(format_of(raw))
    if method not in DEQUANTIZABLE:
        what = "was converted already" if method == QMOE else f"is quantized by {method!r}"
        raise MappingError(
            f"{folder / 'config.json'}: the checkpoint {what}; convert the 16-bit original "
            f"(of quantized inputs, {', '.join(DEQUANTIZABLE)} work)"
        )
    try:
        if method == "compressed-tensors":
            # Not through AutoHfQuantizer: `import qmoe` may have put its own class there.
            from transformers.quantizers.quantizer_compressed_tensors import (
                CompressedTensorsHfQuantizer,
            )

            parameters = {**raw, "dequantize": True}
            try:
                quantization_config = transformers.CompressedTensorsConfig(**parameters)
            except TypeError:
                del parameters["dequantize"]
                quantization_config = transformers.CompressedTensorsConfig(
                    **parameters, run_compressed=False
                )
            quantizer = CompressedTensorsHfQuantizer(quantization_config, pre_quantized=True)
        else:
            quantizer = AutoHfQuantizer.from_config({**raw, "dequantize": True}, pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except ImportError as error:
        raise MappingError(f"{folder}: {one_line(error)}") from None
    return quantizer


class _Decompress(ConversionOps):
    """Dequantizes what transformers has no operation of compressed-tensors for.

    transformers unpacks packed integers and multiplies FP8 by its scales; experts that are stored
    as plain INT8 it drops, and 5.17 has no operation for modules other than experts.
    compressed-tensors itself knows every format that it writes.
    """

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: Any, **unused: Any
    ) -> dict[str, list[torch.Tensor]]:
        from compressed_tensors.compressors import BaseCompressor

        config = self.hf_quantizer.compressor.quantization_config
        # The patterns of the conversion for any one module are the names below it.
        of_experts = any("." in pattern for pattern in input_dict)
        scheme = get_experts_scheme(config) if of_experts else _dense_scheme(config)
        compressor = BaseCompressor.get_value_from_registry(scheme.format or config.format)
        dtype = model.get_parameter(full_layer_name).dtype
        stems: dict[str, dict[str, list[torch.Tensor]]] = defaultdict(dict)
        first: dict[str, str] = {}  # of each stem, the pattern that names the result
        for pattern, tensors in input_dict.items():
            stem, _, leaf = pattern.rpartition(".")
            stems[stem][leaf.rstrip("$")] = tensors
            first.setdefault(stem, pattern)
        converted = {}
        for stem, leaves in stems.items():
            dequantized = []
            for stored in zip(*leaves.values(), strict=True):
                state = dict(zip(leaves, stored, strict=True))
                dequantized.append(compressor.decompress(state, scheme)["weight"].to(dtype))
            converted[first[stem]] = dequantized
        return converted


def _dense_scheme(config: Any) -> Any:
    """The first scheme that is not for experts alone, as newer transformers chooses."""
    schemes = list(config.config_groups.values())
    of_experts = [any(re.match("re:.*experts", t) for t in scheme.targets) for scheme in schemes]
    return schemes[of_experts.index(False) if False in of_experts else 0]


def _complete_dequantization(transforms: list[Any], quantizer: Any) -> None:
    """Put `_Decompress` where transformers' own operations would drop weights or refuse them."""
    config = quantizer.compressor.quantization_config
    scheme = get_experts_scheme(config)
    format = str(scheme.format or config.format)
    if "pack" not in format and scheme.weights.type != "float":
        transforms[:] = [_with_decompress(transform, quantizer) for transform in transforms]
    if not quantizer.get_weight_conversions():
        transforms += _any_module_conversions(quantizer)


def _with_decompress(transform: Any, quantizer: Any) -> Any:
    """The transform with `_Decompress` for transformers' operation, if it stacks experts."""
    operations = getattr(transform, "operations", [])
    if not any(isinstance(op, MergeModulelist) for op in operations):
        return transform
    transform.operations = [
        _Decompress(quantizer) if hasattr(op, "hf_quantizer") else op for op in operations
    ]
    # 5.17 takes every integer for a packed one, and would match no other.
    packed = [p for p in transform.source_patterns if p.endswith("_packed$")]
    if not packed:
        return transform
    sources = [p.replace("_packed$", "$") for p in packed] + transform.source_patterns
    return WeightConverter(sources, transform._original_target_patterns, transform.operations)


class _CutBlocks(ConversionOps):
    """Gives each row and column its own scale where an FP8 weight ends in a cut block."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer
        self.block: Sequence[int] = hf_quantizer.quantization_config.weight_block_size

    def convert(self, input_dict: dict[str, Any], **unused: Any) -> dict[str, Any]:
        by_name = {pattern.rstrip("$"): tensors for pattern, tensors in input_dict.items()}
        converted = dict(input_dict)
        for pattern, scales in input_dict.items():
            name = pattern.rstrip("$")
            weights = by_name.get(name.removesuffix("_scale_inv"))
            if name.endswith("_scale_inv") and weights is not None:
                converted[pattern] = [
                    self._spread(*pair) for pair in zip(weights, scales, strict=True)
                ]
        return converted

    def _spread(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        for dim, block in enumerate(self.block):
            both = weight.ndim == scale.ndim == 2
            if both and ends_in_cut_block(weight.shape[dim], scale.shape[dim], block):
                wide = scale.repeat_interleave(block, dim)
                scale = wide.narrow(dim, 0, weight.shape[dim])
        return scale


def _keep_cut_blocks(transforms: Iterable[Any], quantizer: Any) -> None:
    """Put `_CutBlocks` before what dequantizes FP8 blocks."""
    if not getattr(getattr(quantizer, "quantization_config", None), "weight_block_size", None):
        return
    for transform in transforms:
        operations = getattr(transform, "operations", [])
        ours = any(isinstance(op, _CutBlocks) for op in operations)
        if not ours and any(hasattr(op, "hf_quantizer") for op in operations):
            transform.operations = [_CutBlocks(quantizer), *operations]


def _any_module_conversions(quantizer: Any) -> list[Any]:
    """What the quantizer does for any module: its own conversions, or else `_Decompress`."""
    found: list[Any] = quantizer.get_weight_conversions()
    _keep_cut_blocks(found, quantizer)
    if found or not hasattr(quantizer, "compressor"):
        return found
    leaves = ("", "_packed", "_scale", "_shape", "_zero_point", "_global_scale")
    sources = [f"weight{leaf}$" for leaf in leaves]
    return [WeightConverter(sources, "weight", [_Decompress(quantizer)])]


# The names


def _group_by_target(
    model: Any, transforms: list[Any], tensors: Mapping[str, StoredTensor]
) -> tuple[list[_Group], list[str]]:
    """Do what loading does with names: the groups, and the names that belong to none."""
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    meta = model.state_dict()
    prefix = model.base_model_prefix
    groups: dict[str, _Group] = {}
    unmapped = []
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if target not in meta and name in meta:
            target, pattern = rename_source_key(name, [], [], prefix, meta)
        if target not in meta:
            unmapped.append(name)
            continue
        if target not in groups:
            transform = by_pattern[pattern] if pattern else WeightRenaming(name, target)
            groups[target] = _Group(target, transform)
        groups[target].sources.setdefault(pattern or name, []).append(name)
    for group in groups.values():
        if any(hasattr(op, "hf_quantizer") for op in group.operations):
            _check_scales(group, tensors)
        if all(tensors[name].dtype in _WEIGHT_DTYPES for name in group.names):
            group.leave_undequantized()
    return list(groups.values()), unmapped


def _check_scales(group: _Group, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise if a quantized weight has no scale, or one in 16 bit has some; both would be wrong."""
    scales = [n for n in group.names if "scale" in n and not _is_activation_scale(n)]
    for stored in map(tensors.__getitem__, group.names):
        if not stored.name.endswith("weight"):
            continue
        wide = stored.dtype in (*_WEIGHT_DTYPES, "F64")
        own = [scale for scale in scales if _stem(scale) == _stem(stored.name)]
        if not wide and not scales:
            raise MappingError(
                f"{stored.file}: {stored.name} is {stored.dtype}, and the checkpoint holds no "
                "scale for it that transformers would find; download it again"
            )
        if wide and own:
            raise MappingError(
                f"{stored.file}: {stored.name} is {stored.dtype}, and {own[0]} is beside it, "
                "which says that it is quantized; remove that, or download it again"
            )
        flat = [n for n in own if len(tensors[n].shape) == 1 and tensors[n].numel > 1]
        if flat and len(stored.shape) == 2:
            raise MappingError(
                f"{stored.file}: {flat[0]} has the shape {list(tensors[flat[0]].shape)}, and a "
                f"weight of shape {list(stored.shape)} may be scaled so by rows or by columns; "
                "give it two dimensions"
            )


def _check_complete(
    group: _Group, layout: ExpertsLayout, tensors: Mapping[str, StoredTensor]
) -> None:
    """Raise if a tensor of one expert is missing, naming it."""
    if not group.merges_experts:
        if group.keeps_experts_apart and any(len(names) != 1 for names in group.sources.values()):
            extra = next(names for names in group.sources.values() if len(names) != 1)
            raise MappingError(
                f"{extra[1]}: a second tensor for {group.target}, besides {extra[0]}"
            )
        return
    weights = {p: n for p, n in group.sources.items() if re.search(r"weight(_packed)?\$?$", p)}
    expected = [p for p in group.transform.source_patterns if re.search(r"\.weight\$?$", p)]
    if weights and not any("packed" in p for p in weights):
        for pattern in expected:
            if pattern not in weights:
                raise MappingError(
                    f"no tensor of the checkpoint matches {pattern} ({group.target})"
                )
    for names in group.sources.values():
        _check_numbering(names, layout.num_experts, tensors)


def _check_numbering(
    names: list[str], num_experts: int, tensors: Mapping[str, StoredTensor]
) -> None:
    split = [name.split(".") for name in names]
    position = next(
        (i for i, column in enumerate(zip(*split, strict=True)) if len(set(column)) > 1), None
    )
    if position is None:  # a single expert: nothing to compare its number with
        position = max(i for i, word in enumerate(split[0]) if word.isdigit())
    present = {words[position] for words in split}
    for expert in range(num_experts):
        if str(expert) not in present:
            missing = ".".join([*split[0][:position], str(expert), *split[0][position + 1 :]])
            raise MappingError(
                f"{tensors[names[0]].file.parent}: {missing} is missing; {len(names)} of "
                f"{num_experts} experts have that tensor, download the checkpoint again"
            )
    if len(names) != num_experts:
        extra = names[num_experts:]
        raise MappingError(
            f"{extra[0]}: {len(names)} experts in the checkpoint, {num_experts} in config.json"
        )


def _check_nothing_missing(
    folder: Path, model: Any, found: Mapping[str, _Group], unmapped: list[str]
) -> None:
    """Raise if a parameter has no tensor: its values would be random."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = [
        name
        for name, _ in model.named_parameters()
        if name not in found and name not in tied and not any(re.search(p, name) for p in optional)
    ]
    if missing:
        raise MappingError(
            f"{folder}: holds no tensor for {_and_more(missing)} of {type(model).__name__}"
            + (f", but {_and_more(unmapped)}, which it has no place for" if unmapped else "")
            + "; download it again, or check that config.json belongs to it"
        )


# Dtypes and shapes


class _Blank(Reader):
    """A reader of tensors without values: what comes of them has a shape and a dtype."""

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor on the meta device; a shape that is stored as a tensor is read."""
        stored = self.tensors[name]
        if name.endswith("weight_shape"):
            return torch.tensor(_stored_shape(stored))
        shape = stored.shape if rows is None else (rows.stop - rows.start, *stored.shape[1:])
        return torch.empty(shape, dtype=stored.torch_dtype, device="meta")


def _check_tensors(
    experts: Mapping[str, Experts],
    groups: Iterable[_Group],
    tensors: Mapping[str, StoredTensor],
    model: Any,
) -> None:
    """Raise if a tensor has a dtype or a shape that the model does not take, naming it."""
    for tensor in tensors.values():
        _ = tensor.torch_dtype  # which torch has to know, or nobody can read the file
    blank = _Blank(tensors)
    claimed: set[int] = set()
    for one in experts.values():
        for projection in one.projections.values():
            claimed.update(id(group) for group in projection.groups)
            _check_projection(projection, blank, tensors)
    meta = model.state_dict()
    for group in groups:
        if id(group) in claimed:
            continue
        expected = meta[group.target].dtype
        if expected.is_floating_point:
            _check_dtypes(group, tensors, (*_WEIGHT_DTYPES, "F64", DTYPE_NAMES[expected]))
        with _naming(group.names, tensors):
            for name, made in group.convert(group.read(blank), model).items():
                if name in meta and made.shape != meta[name].shape:
                    raise ValueError(f"the model expects {list(meta[name].shape)} for {name}")


def _check_projection(
    projection: Projection, blank: Reader, tensors: Mapping[str, StoredTensor]
) -> None:
    layout = projection.layout
    for group in projection.groups:
        _check_dtypes(group, tensors, _WEIGHT_DTYPES)
        for names in group.sources.values():
            # One converter may make experts of two sizes (Ernie VL), but not of two dtypes.
            found = Counter(
                (tensors[name].dtype, tensors[name].shape if projection.parts else ())
                for name in names
            )
            dtype, shape = found.most_common(1)[0][0]
            for stored in map(tensors.__getitem__, names):
                if stored.dtype != dtype and {stored.dtype, dtype} <= set(_WEIGHT_DTYPES):
                    raise MappingError(
                        f"{stored.file}: {stored.name} is {stored.dtype}, other experts' are "
                        f"{dtype}; save all of a layer's experts in one dtype"
                    )
                if (stored.dtype, stored.shape if projection.parts else ()) != (dtype, shape):
                    raise MappingError(
                        f"{stored.file}: {stored.name} is {stored.dtype} of shape "
                        f"{list(stored.shape)}, other experts' are {dtype}"
                        + (f" of shape {list(shape)}" if shape else "")
                        + "; download it again"
                    )
            shape = tensors[names[0]].shape
            rows = layout.num_experts * (layout.intermediate_size if layout.flat else 1)
            if group.keeps_experts_apart and not group.merges_experts and shape[:1] != (rows,):
                raise MappingError(
                    f"{tensors[names[0]].file}: {names[0]} has shape {list(shape)}, "
                    f"the model expects {rows} rows"
                )
    with _naming(projection.source_names, tensors):
        if projection.parts is not None:
            projection.load_parts(blank, 0)
        else:
            projection.load(blank, 0, layout.num_experts)


def _check_dtypes(
    group: _Group, tensors: Mapping[str, StoredTensor], allowed: Sequence[str]
) -> None:
    """Raise if a tensor that nothing dequantizes has another dtype than the ``allowed`` ones."""
    if any(hasattr(op, "hf_quantizer") for op in group.operations):
        return
    for stored in map(tensors.__getitem__, group.names):
        if stored.dtype not in allowed:
            raise MappingError(
                f"{stored.file}: {stored.name} is {stored.dtype}; weights must be BF16, F16 or "
                "F32, or config.json must say how they are quantized"
            )


@contextlib.contextmanager
def _naming(names: list[str], tensors: Mapping[str, StoredTensor]) -> Iterator[None]:
    """Name the tensors, and their shapes, that do not become what the model takes."""
    try:
        yield
    except MappingError:
        raise
    except NotImplementedError:  # an operation that needs values
        return
    except Exception as error:
        stored = tensors[names[0]]
        raise MappingError(
            f"{stored.file}: {_and_more(names)}, {stored.dtype} of shape {list(stored.shape)}: "
            f"{one_line(error)}; check that config.json belongs to these weights"
        ) from error


def _linear_names(
    others: list[str],
    tensors: Mapping[str, StoredTensor],
    group_of: dict[str, _Group],
    model: Any,
    num_experts: set[int],
) -> set[str]:
    """Linear layers and routers by the name under which the checkpoint stores them."""
    names = set()
    for name in others:
        stem, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "weight_packed"):
            continue
        group = group_of.get(name)
        if group is None:  # transformers ignores it, others may not: multi-token prediction, say
            if len(tensors[name].shape) == 2 and not re.search("embed|norm", name):
                names.add(stem)
            continue
        module = model.get_submodule(group.target.rpartition(".")[0])
        is_router = len(tensors[name].shape) == 2 and tensors[name].shape[0] in num_experts
        if isinstance(module, nn.Linear) or (is_router and not isinstance(module, nn.Embedding)):
            names.add(stem)
    return names


def _linear_modules(model: Any, config: Any) -> set[str]:
    """Linear layers by their names in transformers' modules, of each class that loads the model.

    A tied head is among them, which has no tensor of its own.
    """
    models = {type(model): model}
    for auto in _AUTO_CLASSES:
        # An Auto class may load a part of the checkpoint: a model's language model.
        if auto._model_mapping.get(type(config), type(model)) not in models:
            with torch.device("meta"):
                part = auto.from_config(config, dtype=model.dtype, trust_remote_code=False)
            models[type(part)] = part
    return {
        name
        for each in models.values()
        for name, module in each.named_modules()
        if isinstance(module, nn.Linear)
    }


# What stays in 16 bit

# Of activations. They are of no use once the weights are ours.
_ACTIVATION_SCALE = re.compile(
    r"(activation_scale|input_scale|output_scale|input_global_scale|input_zero_point)$"
)
# What quantizers put beside a weight, below the same module.
_COMPANION = re.compile(
    r"(weight|weight_packed|weight_scale|weight_scale_inv|weight_shape|weight_zero_point"
    r"|weight_global_scale|weight_g_idx|scale)$"
)


def _is_activation_scale(name: str) -> bool:
    return _ACTIVATION_SCALE.fullmatch(name.rpartition(".")[2]) is not None


def _companions(
    name: str, siblings: list[str], group: _Group | None, tensors: Mapping[str, StoredTensor]
) -> list[str]:
    """The tensors that are one quantized weight, ``name`` among them; or ``name`` alone."""
    if group is not None and _is_fused(group):
        return group.names
    members = [n for n in siblings if _COMPANION.fullmatch(n.rpartition(".")[2])]
    weight = next((n for n in members if n.endswith((".weight", ".weight_packed"))), None)
    if weight is None or name not in members or len(members) == 1:
        return [name]
    dtype = tensors[weight].torch_dtype
    return members if not dtype.is_floating_point or dtype.itemsize == 1 else [name]


def _is_fused(group: _Group) -> bool:
    """Whether the sources are one parameter of all experts, such as MXFP4's blocks and scales."""
    return not group.target.endswith(".weight") and not group.merges_experts


def _dequantized(
    names: list[str],
    group: _Group | None,
    tensors: Mapping[str, StoredTensor],
    quantizer: Any,
    model: Any,
) -> Kept:
    """A quantized weight, made of ``names``, brought back to the model's dtype."""
    leaves = {name.rpartition(".")[2]: name for name in names}
    fused = group is not None and _is_fused(group)
    if group is not None and fused:
        name, shape, weight = group.target, model.get_parameter(group.target).shape, group
    else:
        name, shape = f"{_stem(names[0])}.weight", _dense_shape(leaves, tensors)
        if group is not None and group.merges_experts:
            sources = {p: [n] for p, ns in group.sources.items() for n in ns if n in names}
            weight = _Group(group.target, group.transform, sources)
        else:
            weight = _any_linear(leaves, group, tensors, quantizer, model)

    def load(reader: Reader) -> list[torch.Tensor]:
        read = weight.read(reader)
        (found,) = (weight.convert if fused else weight.dequantize)(read, model).values()
        tensor = found[0] if isinstance(found, list) else found
        return [tensor.detach().to(model.dtype).contiguous()]

    return Kept(name, DTYPE_NAMES[model.dtype], tuple(shape), tuple(names), load)


def _any_linear(
    leaves: dict[str, str],
    group: _Group | None,
    tensors: Mapping[str, StoredTensor],
    quantizer: Any,
    model: Any,
) -> _Group:
    """The quantizer's conversion for any Linear, applied to the tensors of one: leaf -> name."""
    general = _any_module_conversions(quantizer)
    if not general:
        name = next(iter(leaves.values()))
        raise MappingError(
            f"{tensors[name].file}: {_stem(name)} is quantized, and transformers "
            f"{transformers.__version__} cannot dequantize it; a newer version may"
        )
    (converter,) = [c for c in general if any(p.rstrip("$") == "weight" for p in c.source_patterns)]
    patterns = {p.rstrip("$"): p for p in converter.source_patterns}
    patterns["scale"] = patterns.get("weight_scale_inv", "")  # DeepSeek V4's name for it
    # Any parameter of the model's dtype serves where this one has none of its own.
    target = group.target if group is not None else next(iter(model.state_dict()))
    sources = {patterns[k]: [name] for k, name in leaves.items() if patterns.get(k)}
    return _Group(target, converter, sources)


def _dense_shape(leaves: dict[str, str], tensors: Mapping[str, StoredTensor]) -> tuple[int, ...]:
    if "weight_shape" not in leaves:
        return tensors[leaves["weight"]].shape
    return _stored_shape(tensors[leaves["weight_shape"]])


def _stored_shape(stored: StoredTensor) -> tuple[int, ...]:
    """The shape that a tensor of two integers holds."""
    if stored.shape != (2,) or stored.torch_dtype not in (torch.int32, torch.int64):
        raise MappingError(
            f"{stored.file}: {stored.name} is {stored.dtype} of shape {list(stored.shape)}; "
            "a shape is two integers"
        )
    buffer = torch.empty(stored.nbytes, dtype=torch.uint8)
    read_into(stored.file, stored.offset, buffer)
    return tuple(buffer.view(stored.torch_dtype).tolist())


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def natural_order(names: Iterable[str]) -> list[str]:
    """Sort names as transformers does: numbers by value."""
    return sorted(names, key=dot_natural_key)
