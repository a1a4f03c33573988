"""The example that fine-tunes the shipped model: a few steps, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import qmoe
from qmoe.experts.quantized import quantized_modules

peft = pytest.importorskip("peft")
EXAMPLES = Path(__file__).parents[2] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    spec = importlib.util.spec_from_file_location("finetune", EXAMPLES / "finetune.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments])
    module.main()


def test_it_learns_and_its_adapter_can_be_merged(tmp_path: Path, monkeypatch, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The experts stay in 8 bit. Everything else learns.\n" * 400, encoding="utf-8")
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    run(monkeypatch, "--text", str(text), "--out", str(adapter), "--steps", "8", "--rank", "4")
    output = capsys.readouterr().out
    before, after = map(float, re.findall(r"([\d.]+) (?:before|after)", output))
    assert after < 0.7 * before
    names = peft.load_peft_weights(str(adapter), device="cpu")
    assert sum(".experts." in name for name in names) == 6 * 2 * 2
    tiny = EXAMPLES / "tiny-moe"
    assert f"qmoe merge {tiny} {adapter} -o MERGED --weights int8" in output
    qmoe.merge(tiny, adapter, merged, weights="int8")
    assert len(quantized_modules(qmoe.load(merged, device="cpu"))) == 6
