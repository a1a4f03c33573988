"""The benchmark of adapters runs in its tiny configuration; nothing here looks at times."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("peft")
from benchmarks import lora


@pytest.fixture(autouse=True)
def one_thread():
    """Layers this small only lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_tiny(tmp_path) -> None:
    out = tmp_path / "lora.json"
    assert lora.main(["--tiny", f"--out={out}", "--commit=test", "--loss=pieces"]) == 0
    data = json.loads(out.read_text())
    shipped, large = (data["sections"][name] for name in ("shipped", "qwen3"))
    assert [cell["weights"] for cell in shipped["cells"]] == ["16 bit", "int8", "fp8"]
    assert all(cell["loss"] < cell["loss_before"] - 0.05 for cell in shipped["cells"])
    assert [target["met"] for target in data["targets"]] == [True, True]
    assert [(cell["what"], cell["factors"]) for cell in large["cells"]] == [
        ("qmoe int8", "bf16"),
        ("qmoe int8", "fp32"),
        ("PEFT bf16", "bf16"),
        ("PEFT bf16", "fp32"),
    ]
    assert len({cell["learning"] for cell in large["cells"]}) == 1
    assert large["loss"] == "pieces"


def test_a_loss_in_pieces_is_transformers_own() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    labels = torch.randint(0, 50, (2, 300))
    labels[0, :7] = -100
    for count in (None, torch.tensor(123)):
        seen = []
        for function in (ForCausalLMLoss, lora.loss_in_pieces):
            logits = torch.randn(2, 300, 50, generator=torch.Generator().manual_seed(1))
            loss = function(logits.requires_grad_(), labels, 50, num_items_in_batch=count)
            loss.backward()
            seen.append((loss.detach(), logits.grad))
        for a, b in zip(*seen, strict=True):
            torch.testing.assert_close(a, b)


def test_a_share_of_the_layers_is_no_target() -> None:
    cell = {"what": "qmoe int8", "factors": "bf16", "bytes": 1}
    assert lora.targets({"qwen3": {"layers": 2, "cells": [cell]}}) == []
    (target,) = lora.targets({"qwen3": {"layers": 48, "cells": [cell]}})
    assert target["met"]
