"""What is published about the routing of real models, and the traces that were fitted to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qmoe.traces.drift import Drift

RESULTS = Path(__file__).parents[1] / "results" / "routing.json"


@dataclass(frozen=True)
class Published:
    """Hit rates of a least recently used cache, measured by somebody on a real model's routing.

    Attributes:
        name: of the model.
        source: where the figures stand.
        num_layers, num_experts, top_k: layers that the cache was measured on, and their shape.
        num_tokens: that were decoded, with a cache that was empty at the start.
        hit_rates: by share of a layer's experts that the cache holds.
        hot: (n, share): the n experts that were used most in the first half of the tokens are this
            share of what the second half uses; None if nobody said.
        start: where the search for a fit begins.
    """

    name: str
    source: str
    num_layers: int
    num_experts: int
    top_k: int
    num_tokens: int
    hit_rates: dict[float, float]
    hot: tuple[int, float] | None
    start: Drift

    @property
    def routing(self) -> tuple[int, int, int]:
        """Layers, experts of a layer, experts of a token."""
        return self.num_layers, self.num_experts, self.top_k


# Its slots hold one of an expert's three matrices each: 24, 73, 146 and 244 of 384 in a layer.
QWEN3_30B_A3B = Published(
    name="Qwen3-30B-A3B",
    source="https://github.com/kekzl/imp/pull/1374",
    num_layers=48,
    num_experts=128,
    top_k=8,
    num_tokens=256,
    hit_rates={24 / 384: 0.366, 73 / 384: 0.741, 146 / 384: 0.894, 244 / 384: 0.962},
    hot=None,
    start=Drift(skew=7, spread=3, period=25),
)

# 54,000 records of one token in one of 28 layers: code, mathematics, prose, several languages.
QWEN38_FLASH_NEXT = Published(
    name="Qwen3.8-Flash-Next",
    source="https://github.com/ggml-org/llama.cpp/pull/27861",
    num_layers=28,
    num_experts=512,
    top_k=10,
    num_tokens=1929,
    hit_rates={64 / 512: 0.67, 128 / 512: 0.81},
    hot=(32, 0.10),
    start=Drift(skew=2, spread=12, period=40),
)

MODELS = {model.name: model for model in (QWEN3_30B_A3B, QWEN38_FLASH_NEXT)}


def fitted(model: Published, path: Path = RESULTS) -> Drift:
    """The parameters that ``python -m benchmarks.routing`` found for a model.

    Raises:
        ValueError: the file has none.
    """
    sections = json.loads(path.read_text())["sections"] if path.exists() else {}
    if "drift" not in sections.get(model.name, {}):
        raise ValueError(
            f"{path}: nothing fitted to {model.name}; run python -m benchmarks.routing"
        )
    return Drift(**sections[model.name]["drift"])
