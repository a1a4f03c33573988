"""The benchmark of ranks runs in its tiny configuration; nothing here looks at times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import torch

from benchmarks import parallel
from benchmarks.parallel import SECTIONS, _hidden, draw, targets, work

torch.set_num_threads(1)


def sections(rank: int, folder: Path) -> None:
    for section in SECTIONS:
        work(section, True, folder / f"{section}.json")


def test_every_section_runs_on_ranks(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parallel, "LAYER_TARGETS", {"tiny": 1.6})
    found = {section: {"cells": []} for section in SECTIONS}
    for size in (1, 2):
        assert ranks.run(size, sections, tmp_path) == [None] * size
        for section in SECTIONS:
            found[section]["cells"] += json.loads((tmp_path / f"{section}.json").read_text())
    assert {cell["ranks"] for section in SECTIONS for cell in found[section]["cells"]} == {1, 2}
    ways = {"one", "same", "own", "own, two parts"}
    assert {cell["how"] for cell in found["layer"]["cells"]} == ways
    assert {cell["how"] for cell in found["model"]["cells"] if "how" in cell} == ways - {
        "own, two parts"
    }
    whats = [target["what"] for target in targets(found)]
    assert whats == ["decode, 1 texts, two GPUs over one", "prefill, two GPUs over one"]
    pytest.importorskip("matplotlib")
    about = {"machine": {"gpu": None, "cpu": "any"}, "date": "today", "commit": "none"}
    for cell in found["trace"]["cells"]:
        assert cell["hidden"] is None and cell["spans"] == [], "there is no GPU"
        cell["spans"] = [[0.0, 4.0, "a product"], [3.0, 2.0, "ncclDevKernel_AllGather"]]
    draw({"sections": {name: found[name] | about for name in ("layer", "trace")}}, tmp_path)
    assert (tmp_path / "parallel.png").stat().st_size
    assert (tmp_path / "parallel_trace.png").stat().st_size


def test_what_is_hidden_is_what_runs_beside_something_else() -> None:
    spans = [[0.0, 4.0, "a product"], [3.0, 4.0, "nccl"], [5.0, 1.0, "another"], [9.0, 4.0, "nccl"]]
    assert _hidden(spans) == 2 / 8
    assert _hidden(spans[:1]) is None
