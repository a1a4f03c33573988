"""Tell transformers of the formats that qmoe reads and writes."""

from __future__ import annotations

from transformers.quantizers import auto

from qmoe.checkpoints.schema import COMPRESSED_TENSORS, QMOE
from qmoe.loading.compressed_tensors import compressed_tensors_quantizer
from qmoe.loading.config import ExpertsOnlyCompressedTensorsConfig, QmoeConfig
from qmoe.loading.quantizer import QmoeQuantizer


def register() -> None:
    """Let ``from_pretrained`` find our quantizers; ``import qmoe`` calls it."""
    # Lets a QmoeConfig that is given to from_pretrained add to the one in a checkpoint.
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (QmoeConfig,)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QMOE] = QmoeConfig
    auto.AUTO_QUANTIZER_MAPPING[QMOE] = QmoeQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[COMPRESSED_TENSORS] = ExpertsOnlyCompressedTensorsConfig
    auto.AUTO_QUANTIZER_MAPPING[COMPRESSED_TENSORS] = compressed_tensors_quantizer
