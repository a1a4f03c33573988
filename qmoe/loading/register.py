"""Tell transformers of the formats that qmoe reads and writes."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

TYPE_CHECKING = False  # as typing's, which takes longer to import than all the rest
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import Any

# Where transformers keeps what it knows; whoever loads a model imports it.
REGISTRY = "transformers.quantizers.auto"


def register_when_needed() -> None:
    """Let ``from_pretrained`` find our quantizers; ``import qmoe`` calls it, and imports little.

    transformers takes seconds to import. Where it is not there yet, its registry is told as part of
    its own import, so nobody can use it before.
    """
    if not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())
    if REGISTRY in sys.modules:
        _register(import_module(REGISTRY))  # this waits if another thread is about to import it


class _RegistryFinder:
    """Finds the registry as Python does, and registers once it has run."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == REGISTRY else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            # The loader is this module's own.
            setattr(spec.loader, "exec_module", run_and_register)  # noqa: B010
        return spec


def _register(registry: Any) -> None:
    """Add our formats; to do it again changes nothing."""
    from qmoe.checkpoints.schema import COMPRESSED_TENSORS, QMOE
    from qmoe.loading.config import ExpertsOnlyCompressedTensorsConfig, QmoeConfig

    # Lets a QmoeConfig that is given to from_pretrained add to the one in a checkpoint.
    if QmoeConfig not in registry.LOADING_ATTRIBUTES_CONFIG_TYPES:
        registry.LOADING_ATTRIBUTES_CONFIG_TYPES += (QmoeConfig,)
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[QMOE] = QmoeConfig
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[COMPRESSED_TENSORS] = (
        ExpertsOnlyCompressedTensorsConfig
    )
    registry.AUTO_QUANTIZER_MAPPING[QMOE] = _qmoe_quantizer
    registry.AUTO_QUANTIZER_MAPPING[COMPRESSED_TENSORS] = _compressed_tensors_quantizer


# Imported when a model is loaded: they need what transformers may be in the middle of importing.


def _qmoe_quantizer(config: Any, **options: Any) -> Any:
    from qmoe.loading.quantizer import QmoeQuantizer

    return QmoeQuantizer(config, **options)


def _compressed_tensors_quantizer(config: Any, **options: Any) -> Any:
    from qmoe.loading.compressed_tensors import compressed_tensors_quantizer

    return compressed_tensors_quantizer(config, **options)
