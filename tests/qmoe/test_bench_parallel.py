"""The benchmark of ranks runs in its tiny configuration; nothing here looks at times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import torch

from benchmarks import parallel
from benchmarks.parallel import SECTIONS, draw, targets, work

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
    for section in ("layer", "model"):
        ways = {cell["how"] for cell in found[section]["cells"] if "how" in cell}
        in_parts = {"own, 2 parts", "own, 4 parts"} if section == "layer" else set()
        assert ways == {"one", "same", "own", *in_parts}
    exchanges = {(cell["what"], cell["how"]) for cell in found["exchange"]["cells"]}
    ways = {(w, how) for w in ("sum", "sum_and_scatter") for how in ("collective", "all-to-all")}
    assert exchanges == ways | {("gather", "collective"), ("gather in 8 bits", "collective")}
    whats = [target["what"] for target in targets(found)]
    assert whats == ["decode, 1 texts, two GPUs over one", "prefill, two GPUs over one"]
    pytest.importorskip("matplotlib")
    about = {"machine": {"gpu": None, "cpu": "any"}, "date": "today", "commit": "none"}
    draw({"sections": {"layer": found["layer"] | about}}, tmp_path)
    assert (tmp_path / "parallel.png").stat().st_size
