"""The cache's benchmark runs in its tiny configuration; nothing here looks at times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cache import __main__ as benchmark
from benchmarks.cache.decode import CAPACITIES

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
def test_the_cache_hits_what_lru_hits(
    results: tuple[Path, dict[str, Any]],
) -> None:
    cells = [c for c in results[1]["sections"]["decode"]["cells"] if c["variant"] == "plain"]
    assert {(c["trace"], c["capacity"]) for c in cells} == {
        (trace, capacity) for trace in ("synthetic", "recorded") for capacity in CAPACITIES
    }
    for cell in cells:
        # A step's experts are equally old; which of them goes first depends on their slots.
        assert cell["hit_rate"] == pytest.approx(cell["lru_hit_rate"], abs=0.1)
        assert cell["lru_hit_rate"] <= cell["belady_hit_rate"]
        assert cell["hits"] + cell["misses"] == 3 * 2 * 2  # tokens, layers, experts
        assert cell["missed_bytes"] * 3 == pytest.approx(cell["misses"] * 3 * 64 * 32, abs=2)
    assert {c["hit_rate"] for c in cells if c["capacity"] == 1} == {1.0}


@pytest.mark.slow
def test_pictures_are_drawn_from_the_file(results: tuple[Path, dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    out = results[0]
    assert benchmark.main(["--draw", f"--out={out}"]) == 0
    names = {picture.name for picture in out.parent.glob("*.png")}
    assert names == {f"cache_{n}.png" for n in ("retention", "time_per_token", "baselines")}


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


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--tiny"], "another --out"),
        (["--tiny", f"--out={tmp_path / 'x.json'}", "--only=gather,nothing"], "no section nothing"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(arguments)
        assert said in capsys.readouterr().err
