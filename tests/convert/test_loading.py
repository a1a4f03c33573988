"""The whole way: a checkpoint in the Hub's layout, converted, loaded, saved again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import qmoe
from qmoe.quantizer import quantized_modules

from .conftest import FAMILIES, PER_EXPERT

TOKENS = torch.arange(3, 15).view(2, 6)


def load(folder: Path):
    config = AutoConfig.from_pretrained(folder)
    causal = type(config) in AutoModelForCausalLM._model_mapping
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("family", "form"),
    [(family, "auto") for family in FAMILIES] + [(family, "qmoe") for family in PER_EXPERT],
)
def test_converted_is_patched(
    family: str, form: str, weights: str, source: Callable[..., Path], run: Callable
) -> None:
    """Converting a file and patching a loaded model are two ways to the same bits."""
    folder = source(family)
    expected = qmoe.patch(load(folder), weights)
    _, out = run(folder, weights=weights, format=form)
    loaded = load(out)
    assert quantized_modules(loaded).keys() == quantized_modules(expected).keys()
    for (name, ours), theirs in zip(
        loaded.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert ours.dtype == theirs.dtype and torch.equal(
            ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)
        ), name
    assert torch.equal(logits(loaded), logits(expected))
    loaded.save_pretrained(out.parent / "again")
    assert torch.equal(logits(load(out.parent / "again")), logits(loaded))


@pytest.mark.parametrize("form", ["compressed-tensors", "qmoe"])
def test_ignored_layers_load_in_16_bit(
    form: str, source: Callable[..., Path], run: Callable
) -> None:
    folder = source()
    _, out = run(folder, format=form, ignore=[r"layers\.0\."])
    loaded, original = load(out), load(folder)
    assert list(quantized_modules(loaded)) == ["model.layers.1.mlp.experts"]
    kept = loaded.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(kept, original.model.layers[0].mlp.experts.gate_up_proj)
