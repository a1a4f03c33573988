"""What stands in a model's configuration about its experts: two formats, and who owns it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import is_compressed_tensors_available
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from qmoe.checkpoints.schema import (
    COMPRESSED_TENSORS,
    FORMAT_VERSION,
    QMOE,
    format_of,
    qmoe_config,
)
from qmoe.paging.options import PagingOptions
from qmoe.parallel.group import RankGroup
from qmoe_kernels.fused_moe import check_activations
from qmoe_kernels.quantization import STORAGE_DTYPE, WeightFormat


class _ReadAsDict(QuantizationConfigMixin):
    """transformers reads the configuration of a checkpoint as a dictionary, before it is parsed."""

    def get(self, name: str, default: Any = None) -> Any:
        """The option ``name``, as of a dictionary."""
        return getattr(self, name, default)


class QmoeConfig(_ReadAsDict):
    """How a model's experts are quantized; goes into ``config.json`` as ``quantization_config``.

    Args:
        weights: ``"int8"`` or ``"fp8"`` (e4m3fn), one fp32 scale per output channel.
        activations: what the experts' products take, see :func:`qmoe_kernels.fused_moe`. A choice
            of this run: not written to disk.
        modules_to_not_convert: full names of experts modules that stay in 16 bit.
        paging: page the experts within so much device memory, see :func:`qmoe.load`; a choice of
            this run too. Without a ``device_map``, the model then goes to the GPU where there is
            one.
        group: the ranks that hold the experts between them, of a checkpoint that is quantized
            already; a choice of this run, which :func:`qmoe.load` makes, or ``distributed_config``.
        format_version: of the file format.

    Raises:
        ValueError: an unknown value, or a format version that this qmoe does not read.

    Example:
        >>> import qmoe
        >>> qmoe.QmoeConfig(weights="fp8").to_dict()["format"]
        'qmoe'
    """

    def __init__(
        self,
        weights: WeightFormat = "int8",
        *,
        activations: str = "auto",
        modules_to_not_convert: list[str] | None = None,
        paging: PagingOptions | None = None,
        group: RankGroup | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        for name in ("quant_method", "format", "config_groups"):  # as they stand on disk
            unknown.pop(name, None)
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
        self.paging = paging
        self.group = group

    def get_loading_attributes(self) -> dict[str, Any]:
        """What holds for a checkpoint that is quantized already, whose own config says the rest."""
        chosen = {"activations": self.activations, "paging": self.paging}
        return {name: value for name, value in chosen.items() if value not in ("auto", None)}

    def to_dict(self) -> dict[str, Any]:
        """As :func:`qmoe.checkpoints.schema.qmoe_config`."""
        return qmoe_config(self.weights, self.modules_to_not_convert)


class ExpertsOnlyCompressedTensorsConfig(_ReadAsDict):
    """A compressed-tensors configuration as it stands in ``config.json``, unparsed."""

    def __init__(self, **raw: Any) -> None:
        self.quant_method = COMPRESSED_TENSORS
        self.raw = {"quant_method": COMPRESSED_TENSORS, **raw}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> QuantizationConfigMixin:
        """Ours; or the package's own where the package is there, else the plain dictionary."""
        if format_of(config_dict) == QMOE:
            return QmoeConfig.from_dict(config_dict, **kwargs)
        raw = dict(config_dict)
        paging, group = raw.pop("paging", None), raw.pop("group", None)
        if "hbm_budget" in raw:
            raise ValueError(
                "hbm_budget is no option of a checkpoint; use paging=PagingOptions(...)"
            )
        config: Any = cls(**raw)
        if is_compressed_tensors_available():
            config = PackageCompressedTensorsConfig.from_dict(raw, **kwargs)
        config.paging, config.group = paging, group
        return config

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that it was made from."""
        return dict(self.raw)


class PackageCompressedTensorsConfig(CompressedTensorsConfig, _ReadAsDict):
    """The package's own configuration, which a model can be loaded with again."""


# transformers compares names of classes where one is given to from_pretrained.
PackageCompressedTensorsConfig.__name__ = CompressedTensorsConfig.__name__


def give_own_config(model: nn.Module) -> None:
    """Put copies of the configuration and its parts where a model's modules have them.

    Other models may have been made from the same object; what is written into the copy concerns
    this one alone.
    """
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    modules = list(model.modules())
    for module in model.modules():  # modules that others stand in for read it too
        for hidden in (vars(module).get("source"), vars(module).get("block")):
            modules += hidden.modules() if isinstance(hidden, nn.Module) else ()
    places = [
        (vars(module), name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, PreTrainedConfig) and id(value) in copies
    ]
    try:
        for attributes, name, value in places:
            attributes[name] = copies[id(value)]
    except BaseException:
        for attributes, name, value in places:
            attributes[name] = value
        raise
