"""The processor's benchmark runs in its tiny configuration; nothing here looks at times."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import cpu


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(out: Path, *arguments: str) -> int:
    return cpu.main([f"--out={out}", "--commit=test", *arguments])


def test_products_at_each_number_of_threads_and_their_picture(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    assert run(out, "--tiny", "--only=candidates", "--threads=1,2") == 0
    section = json.loads(out.read_text())["sections"]["candidates"]
    assert section["machine"]["numa_nodes"] >= 1
    found = {(cell["what"], cell["threads"]) for cell in section["cells"]}
    needed = ("read", "ours int8", "ours fp8", "torch _weight_int8pack_mm")
    assert found >= {(what, threads) for what in needed for threads in (1, 2)}
    assert all(cell["gb_per_s"] > 0 and cell["of_reading"] > 0 for cell in section["cells"])
    pytest.importorskip("matplotlib")
    assert run(out, "--draw") == 0
    assert (tmp_path / "host.png").stat().st_size > 0


def test_a_section_leaves_the_others_of_its_file(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    out.write_text(json.dumps({"benchmark": "cpu", "sections": {"llama": {"cells": []}}}))
    assert run(out, "--tiny", "--only=quantize", "--threads=1") == 0
    assert list(json.loads(out.read_text())["sections"]) == ["llama", "quantize"]


def test_tiny_figures_are_not_written_over_measured_ones(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cpu.main(["--tiny", "--only=quantize"])
    assert "--out" in capsys.readouterr().err
