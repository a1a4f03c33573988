"""Quantized Mixture-of-Experts inference for Hugging Face transformers.

Importing qmoe registers its formats with transformers: after ``import qmoe``,
``AutoModelForCausalLM.from_pretrained`` keeps converted experts in 8 bit.
"""

from qmoe.evaluation import perplexity
from qmoe.generation import (
    GenerationInterrupted,
    GenerationResult,
    GenerationStatistics,
    generate,
)
from qmoe.loading import load
from qmoe.patching import patch, unpatch
from qmoe.quantizer import QmoeConfig

__version__ = "0.1.0"

__all__ = [
    "GenerationInterrupted",
    "GenerationResult",
    "GenerationStatistics",
    "QmoeConfig",
    "__version__",
    "generate",
    "load",
    "patch",
    "perplexity",
    "unpatch",
]
