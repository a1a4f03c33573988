"""What quantization costs on the shipped model, whose router has learned."""

from __future__ import annotations

import pytest

import qmoe
from qmoe.generation import load_tokenizer
from qmoe.tools.demo import HELD_OUT, SHIPPED_MODEL
from qmoe.tools.perplexity import perplexity

WINDOW = 512


@pytest.fixture(scope="module")
def held_out() -> str:
    path = SHIPPED_MODEL / HELD_OUT
    if not path.is_file():
        pytest.fail(f"{path} is missing: run examples/train_tiny_moe.py, or check the clone")
    return path.read_text(encoding="utf-8")


def measure(text: str, weights: str | None) -> float:
    model = qmoe.load(SHIPPED_MODEL, device="cpu", weights=weights)
    return perplexity(
        model, load_tokenizer(str(SHIPPED_MODEL)), text, window=WINDOW, max_tokens=32 * WINDOW
    )


@pytest.fixture(scope="module")
def sixteen_bit(held_out: str) -> float:
    return measure(held_out, None)


@pytest.mark.parametrize(("weights", "allowed"), [("int8", 0.005), ("fp8", 0.02)])
def test_perplexity_stays(held_out: str, sixteen_bit: float, weights: str, allowed: float) -> None:
    assert abs(measure(held_out, weights) / sixteen_bit - 1) < allowed


def test_the_model_has_learned(held_out: str, sixteen_bit: float) -> None:
    """A fidelity figure means something only where there is something to lose."""
    vocabulary = len(load_tokenizer(str(SHIPPED_MODEL)))
    assert sixteen_bit < vocabulary / 20
