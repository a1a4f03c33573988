"""The benchmark of ranks runs in its tiny configuration; nothing here looks at times."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch

from benchmarks import parallel
from benchmarks.parallel import SECTIONS, draw, targets, work
from benchmarks.parallel_models import repeating_store
from qmoe.experts.pages import LayerPages

torch.set_num_threads(1)


def sections(rank: int, folder: Path) -> None:
    for section in SECTIONS:
        work(section, True, folder / f"{section}.json")


def test_every_section_runs_on_ranks(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parallel, "LAYER_TARGETS", {(2, "tiny", 8): 1.6})
    found = {section: {"cells": []} for section in SECTIONS}
    for size in (1, 2):
        assert ranks.run(size, sections, tmp_path) == [None] * size
        for section in SECTIONS:
            found[section]["cells"] += json.loads((tmp_path / f"{section}.json").read_text())
    assert {cell["ranks"] for section in SECTIONS for cell in found[section]["cells"]} == {1, 2}
    for section in ("layer", "model"):
        ways = {cell["how"] for cell in found[section]["cells"] if "how" in cell}
        assert ways == {"one", "same", "own"}
    exchanges = {(cell["what"], cell["how"]) for cell in found["exchange"]["cells"]}
    ways = {(w, how) for w in ("sum", "sum_and_scatter") for how in ("collective", "all-to-all")}
    assert exchanges == ways | {("gather", "collective"), ("gather in 8 bits", "collective")}
    whats = [target["what"] for target in targets(found)]
    assert "layer tiny, 8 tokens in all, bf16 rows, 2 GPUs over one" in whats
    assert sum("part of the exchange hidden" in what for what in whats) == 1
    assert {"decode, 1 texts, two GPUs over one", "prefill, two GPUs over one"} <= set(whats)
    assert sum("Qwen3-235B" in what for what in whats) == 2
    assert sum("over transformers" in what for what in whats) == 12
    for section in ("deepseek", "large", "transformers"):
        ways = {cell["how"] for cell in found[section]["cells"] if "how" in cell}
        assert ways == {"one", "same", "own"}
    assert all(
        {"products_us", "exchange_us", "hidden"} <= cell.keys()
        for cell in found["layer"]["cells"]
        if cell["ranks"] == 2
    )
    held = {(cell["ranks"], cell["held"]) for cell in found["large"]["cells"]}
    assert held == {(1, "paged"), (2, "resident")}
    by = {(c["what"], c["by"]) for c in found["transformers"]["cells"] if c["ranks"] == 2}
    ways = ("transformers", "qmoe in the same loop", "qmoe")
    assert by == {(what, way) for what in ("decode", "prefill") for way in ways}
    pytest.importorskip("matplotlib")
    about = {"machine": {"gpu": None, "cpu": "any"}, "date": "today", "commit": "none"}
    draw({"sections": {"layer": found["layer"] | about}}, tmp_path)
    assert (tmp_path / "parallel.png").stat().st_size


def test_products_that_run_beside_the_exchange_are_hidden() -> None:
    cells = [
        dict(ranks=1, shape="dsv3", tokens=32768, activations="auto", how="one", us=400.0),
        dict(ranks=4, shape="dsv3", tokens=32768, activations="auto", how="own", us=125.0)
        | dict(products_us=100.0, exchange_us=50.0, hidden=0.5),
        dict(ranks=4, shape="dsv3", tokens=32768, activations="auto", how="same", us=300.0)
        | dict(products_us=100.0, exchange_us=200.0, hidden=0.0),
    ]
    speed, hidden = targets({"layer": {"cells": cells}})
    assert (speed["measured"], speed["target"], speed["met"]) == (3.2, 3.0, True)
    assert (hidden["measured"], hidden["met"]) == (0.5, True)
    assert parallel._allowed(cells) == {1: 1.0, 4: 400 / (100 + 50)}


WRITES = """
import json, os, sys, time
from pathlib import Path
out = Path(sys.argv[1])
out.with_suffix(".pid").write_text(str(os.getpid()))
for n in (1, 2):
    out.with_suffix(".partial").write_text(json.dumps([{"cell": i} for i in range(n)]))
    out.with_suffix(".partial").replace(out)
    time.sleep(1)
time.sleep(60 * int(sys.argv[2]))
sys.exit(3)
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_cells_are_there_while_a_worker_runs_and_after_it_is_ended(tmp_path, hangs) -> None:
    out, found = tmp_path / "cells.json", []
    began = time.monotonic()
    command = [sys.executable, "-c", WRITES, str(out), str(int(hangs))]
    seen = []

    def add(cell) -> None:
        found.append(cell)
        seen.append(time.monotonic() - began)

    code = parallel._follow(command, out, 6 if hangs else 30, add)
    assert found == [{"cell": 0}, {"cell": 1}]
    assert seen[1] - seen[0] > 0.4  # the first did not wait for the second
    assert code == ("no result within 6 s" if hangs else 3)
    assert time.monotonic() - began < 25


def test_other_numbers_of_ranks_run_where_one_fails(monkeypatch) -> None:
    tried = []

    def follow(command, out, limit, add):
        tried.append(next(word for word in command if word.startswith("--nproc")))
        return 0 if tried[-1].endswith("4") else 1

    monkeypatch.setattr(parallel, "_follow", follow)
    results = parallel.Results("parallel", Path("unused"), {}, targets)
    with pytest.raises(RuntimeError, match="layer: 1 ranks ended with 1, 2 ranks ended with 1"):
        parallel.measure(results, "layer", [1, 2, 4], True)
    assert len(tried) == 3


def test_layers_share_pages_under_numbers_of_their_own() -> None:
    layers = [LayerPages(f"{i}", 3, torch.int8, gate_up=(8, 4), down=(4, 4)) for i in range(5)]
    store = repeating_store(layers, 2, torch.device("cpu"))
    try:
        assert store.first_page == (0, 3, 6, 9, 12)
        assert len(store.addresses) == 15
        assert not torch.equal(store.pages(0), store.pages(1))
        for layer in range(5):
            first = store.first_page[layer]
            pages = store.pages(layer)
            assert torch.equal(pages, store.pages(layer % 2))
            assert store.addresses[first] == pages.data_ptr() == store.pages(layer % 2).data_ptr()
    finally:
        store.close()
