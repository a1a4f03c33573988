"""The whole way: a checkpoint in the Hub's layout, converted, loaded, saved again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import qmoe
from qmoe.experts.quantized import quantized_modules
from qmoe.paging.budget import Budget
from qmoe.paging.model import stats

from .conftest import FAMILIES, PER_EXPERT, rewrite
from .conftest import load as tensors_of

TOKENS = torch.arange(3, 15).view(2, 6)
THREE_SLOTS = Budget(
    **dict.fromkeys(("total", "resident", "kv_cache", "workspace", "staging", "slots"), 0),
    context=64,
    batch_size=2,
    num_slots=3,
    num_staging=1,
    chunk=64,
    all_resident=False,
)


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


@pytest.mark.parametrize(
    ("family", "form"),
    [(family, "auto") for family in FAMILIES] + [(family, "qmoe") for family in PER_EXPERT],
)
def test_converted_is_paged(
    family: str, form: str, source: Callable[..., Path], run: Callable, monkeypatch
) -> None:
    """Pages filled from the shards hold what an ordinary load holds, with three slots as well."""
    _, out = run(source(family), weights="int8", format=form, max_shard_size=20_000)
    expected = load(out)
    monkeypatch.setattr("qmoe.loading.pages.budget_for", lambda *of: THREE_SLOTS)
    paged = qmoe.load(out, dtype="float32", device="cpu", hbm_budget="auto")
    assert stats(paged).num_slots == 3
    assert torch.equal(logits(paged), logits(expected))
    theirs, ours = expected.state_dict(), paged.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(
            ours[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
        ), name


@pytest.mark.parametrize("form", ["compressed-tensors", "qmoe"])
def test_ignored_layers_load_in_16_bit(
    form: str, source: Callable[..., Path], run: Callable, monkeypatch
) -> None:
    folder = source()
    _, out = run(folder, format=form, ignore=[r"layers\.0\."])
    loaded, original = load(out), load(folder)
    assert list(quantized_modules(loaded)) == ["model.layers.1.mlp.experts"]
    kept = loaded.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(kept, original.model.layers[0].mlp.experts.gate_up_proj)
    monkeypatch.setattr("qmoe.loading.pages.budget_for", lambda *of: THREE_SLOTS)
    paged = qmoe.load(out, dtype="float32", device="cpu", hbm_budget="auto")
    assert len(stats(paged).layers) == 1
    assert torch.equal(logits(paged), logits(loaded))


def test_layers_beyond_the_models(source: Callable[..., Path], run: Callable) -> None:
    """Of a config with fewer layers than the checkpoint has, convert warns; OUT loads."""
    folder = source(num_hidden_layers=3)
    rewrite(folder, tensors_of(folder), num_hidden_layers=2)
    report, out = run(folder)
    assert any("no place for model.layers.2" in warning for warning in report.warnings)
    loaded = qmoe.load(out, device="cpu", dtype="float32")
    assert torch.equal(logits(loaded), logits(qmoe.patch(load(folder), "int8")))
