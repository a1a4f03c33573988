"""The cache's benchmark runs in its tiny configuration; nothing here looks at times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.cache import __main__ as benchmark
from benchmarks.cache.decode import CAPACITIES
from benchmarks.cache.model import sweep
from benchmarks.cache.traces import shape_of
from benchmarks.model import QWEN3_30B_A3B
from qmoe.traces.replay import replay
from qmoe.traces.trace import NONE, synthetic_trace

torch.set_num_threads(1)
SMALL = ["--tokens=3", "--warmup=3", "--context=4", "--prompt=128"]


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    failed = benchmark.main(["--tiny", f"--out={out}", "--commit=test", *SMALL, *arguments])
    return failed, json.loads(out.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("bench") / "cache.json"
    failed, data = run(out)
    assert failed == 0
    return out, data


@pytest.mark.slow
def test_every_section_runs(results: tuple[Path, dict[str, Any]]) -> None:
    sections = results[1]["sections"]
    assert list(sections) == list(benchmark.SECTIONS)
    for section in sections.values():
        assert "error" not in section and "incomplete" not in section
        assert section["commit"] == "test" and section["machine"]["torch"]
    assert all(cell["equal"] for cell in sections["decode"]["bit_for_bit"])
    assert all(cell["equal"] for cell in sections["prefill"]["cells"])
    assert all(cell.get("equal", True) for cell in sections["baselines"]["cells"])


@pytest.mark.slow
def test_the_cache_hits_what_claims_hit_when_they_are_replayed(
    results: tuple[Path, dict[str, Any]],
) -> None:
    cells = [c for c in results[1]["sections"]["decode"]["cells"] if c["variant"] == "plain"]
    assert {(c["trace"], c["capacity"]) for c in cells} == {
        (trace, capacity)
        for trace in ("fitted", "synthetic", "recorded")
        for capacity in CAPACITIES
    }
    for cell in cells:
        assert cell["hit_rate"] == pytest.approx(cell["replayed_hit_rate"], abs=1e-4)
        assert cell["replayed_hit_rate"] <= cell["belady_hit_rate"]
        assert cell["hits"] + cell["misses"] == 3 * 2 * 2  # tokens, layers, experts
        assert cell["missed_bytes"] * 3 == pytest.approx(cell["misses"] * 3 * 64 * 32, abs=2)
    assert {c["hit_rate"] for c in cells if c["capacity"] == 1} == {1.0}


@pytest.mark.slow
def test_pictures_are_drawn_from_the_file(results: tuple[Path, dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    out = results[0]
    assert benchmark.main(["--draw", f"--out={out}"]) == 0
    names = {picture.name for picture in out.parent.glob("*.png")}
    drawn = ("retention", "time_per_token", "sources", "baselines")
    assert names == {f"cache_{n}.png" for n in drawn}


def test_a_section_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setitem(benchmark.SECTIONS, "gather", broken)
    failed, data = run(tmp_path / "cache.json", "--only=gather,admission")
    assert failed == 1
    assert data["sections"]["gather"]["error"] == "RuntimeError: no such luck"
    assert len(data["sections"]["admission"]["cells"]) == 3
    assert "no such luck" in capsys.readouterr().err


def test_when_time_is_up_what_was_measured_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "cache.json"
    _, data = run(out, "--only=admission")
    assert "incomplete" not in data["sections"]["admission"]
    _, data = run(out, "--only=gather", "--seconds=0")
    assert data["sections"]["gather"]["incomplete"]
    assert len(data["sections"]["gather"]["cells"]) == 1
    assert len(data["sections"]["admission"]["cells"]) == 3  # of the run before


def test_recorded_routing_is_replayed_as_it_is(tmp_path: Path) -> None:
    """In a model of the file's layers, experts and pages; of the text only the last tokens."""
    trace = synthetic_trace(40, 3, 8, 2, page_bytes=3 * 64 * 48, seed=5)
    trace.save(tmp_path / "mine.safetensors")
    out = tmp_path / "mine.json"
    failed, data = run(out, "--only=decode", f"--trace={tmp_path / 'mine.safetensors'}")
    assert failed == 0
    section = data["sections"]["decode"]
    assert section["model"] == "3 layers of 8 experts, top-2"
    assert section["traces"] == {"mine": "synthetic: zipf=0.65 reuse=0.4 seed=5"}
    assert (section["num_pages"], section["page_bytes"]) == (24, 3 * 64 * 48)
    assert {cell["trace"] for cell in section["cells"]} == {"mine"}
    whole = sweep(replace(trace, topk_ids=trace.topk_ids[-6:]))
    for cell in section["cells"]:
        if cell["capacity"] == 0.5:
            before = replace(whole, topk_ids=whole.topk_ids[:-3])
            hits = [sum(replay(part, 12).hits) for part in (whole, before)]
            assert cell["replayed_hit_rate"] == pytest.approx((hits[0] - hits[1]) / 18, abs=1e-4)
    pytest.importorskip("matplotlib")
    assert benchmark.main(["--draw", f"--out={out}"]) == 0


def test_routing_that_cannot_be_replayed_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = 3 * 64 * 32
    trace = synthetic_trace(40, 3, 16, 2, page_bytes=page)
    few = trace.topk_ids.clone()
    few[-1, 0, 1] = NONE
    cases = {
        "40 tokens, and --warmup and --tokens ask for 60": (trace, "--warmup=57"),
        "fewer than 2 experts": (replace(trace, topk_ids=few), ""),
        "pages of 6.15 kB to 12.3 kB": (replace(trace, page_bytes=(page, page, 2 * page)), ""),
        "pages of 100 B: this benchmark takes": (replace(trace, page_bytes=(100,) * 3), ""),
        "12.5% of 8 experts are fewer": (synthetic_trace(40, 1, 8, 2, page_bytes=page), ""),
    }
    path = tmp_path / "mine.safetensors"
    out = f"--out={tmp_path / 'mine.json'}"
    for said, (refused, *more) in cases.items():
        refused.save(path)
        with pytest.raises(SystemExit):
            run(tmp_path / "mine.json", f"--trace={path}", *filter(None, more))
        message = capsys.readouterr().err.splitlines()[-1]
        assert said in message and str(path) in message, message
    for arguments, said in (
        (["--tiny", f"--trace={path}"], "another --out"),
        ([f"--trace={tmp_path / 'no'}", "--tiny", out], "no such file"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(arguments)
        assert said in capsys.readouterr().err


def test_experts_that_the_gpu_cannot_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    page = QWEN3_30B_A3B.page_bytes
    trace = synthetic_trace(4, 48, 128, 8, page_bytes=page)
    memory = {"total_memory": 48 * 128 * page}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**memory))
    gpu = torch.device("cuda")
    assert shape_of(trace, QWEN3_30B_A3B, 0.125, gpu) == QWEN3_30B_A3B
    memory["total_memory"] -= 1
    with pytest.raises(ValueError, match=r"48 layers of 128 experts, top-8 take 29 GB"):
        shape_of(trace, QWEN3_30B_A3B, 0.125, gpu)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--tiny"], "another --out"),
        (["--tiny", f"--out={tmp_path / 'x.json'}", "--only=gather,nothing"], "no section nothing"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(arguments)
        assert said in capsys.readouterr().err
