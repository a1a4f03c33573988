"""Quantized Mixture-of-Experts inference for Hugging Face transformers.

Importing qmoe registers its formats with transformers: after ``import qmoe``,
``AutoModelForCausalLM.from_pretrained`` keeps converted experts in 8 bit. It imports neither torch
nor transformers; what is named here is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module

from qmoe.loading.register import register_when_needed as _register

TYPE_CHECKING = False  # as typing's, which takes longer to import than all the rest
if TYPE_CHECKING:
    from qmoe.decoding.decoder import release
    from qmoe.decoding.loop import decode
    from qmoe.generation import (
        GenerationInterrupted,
        GenerationResult,
        GenerationStatistics,
        generate,
    )
    from qmoe.loading.config import QmoeConfig
    from qmoe.loading.load import load
    from qmoe.loading.patch import patch, unpatch
    from qmoe.paging.model import resize, stats
    from qmoe.paging.options import PagingOptions
    from qmoe.parallel.failure import RankFailed
    from qmoe.tools.adapt_router import adapt_router
    from qmoe.tools.merge import merge
    from qmoe.tools.perplexity import perplexity
    from qmoe.traces.record import record_routing

__version__ = "0.1.0"

_register()

__all__ = [
    "GenerationInterrupted",
    "GenerationResult",
    "GenerationStatistics",
    "PagingOptions",
    "QmoeConfig",
    "RankFailed",
    "__version__",
    "adapt_router",
    "decode",
    "generate",
    "load",
    "merge",
    "patch",
    "perplexity",
    "record_routing",
    "release",
    "resize",
    "stats",
    "unpatch",
]

# Imported when asked for: torch and transformers take seconds, and whoever prints a version or
# mistypes a path does not need them.
_LAZY = {
    "GenerationInterrupted": "qmoe.generation",
    "GenerationResult": "qmoe.generation",
    "GenerationStatistics": "qmoe.generation",
    "PagingOptions": "qmoe.paging.options",
    "QmoeConfig": "qmoe.loading.config",
    "RankFailed": "qmoe.parallel.failure",
    "adapt_router": "qmoe.tools.adapt_router",
    "decode": "qmoe.decoding.loop",
    "generate": "qmoe.generation",
    "load": "qmoe.loading.load",
    "merge": "qmoe.tools.merge",
    "patch": "qmoe.loading.patch",
    "perplexity": "qmoe.tools.perplexity",
    "record_routing": "qmoe.traces.record",
    "release": "qmoe.decoding.decoder",
    "resize": "qmoe.paging.model",
    "stats": "qmoe.paging.model",
    "unpatch": "qmoe.loading.patch",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
