"""The report on a trace, its pictures, and the command ``qmoe cache-report``."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import pytest
import torch

from qmoe.cli.main import main
from qmoe.traces.replay import POLICIES, replay
from qmoe.traces.report import _heat_map, _hit_rate, cache_report, draw_report
from qmoe.traces.trace import NONE, RoutingTrace, synthetic_trace

SHIPPED = (
    Path(__file__).resolve().parents[2] / "benchmarks" / "data" / "tiny_moe_routing.safetensors"
)
drawing = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="no matplotlib")


@pytest.fixture
def trace() -> RoutingTrace:
    return synthetic_trace(60, 3, 8, 2, page_bytes=1000)


@pytest.fixture
def file(trace, tmp_path) -> Path:
    trace.save(tmp_path / "trace.safetensors")
    return tmp_path / "trace.safetensors"


@pytest.fixture
def without_matplotlib(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )


class TestReport:
    def test_replays_every_capacity_under_every_policy(self, trace):
        report = cache_report(trace, ["12", "25%", "100%", "12"], warmup=10)
        assert [(r.policy, r.capacity) for r in report.replays] == [
            (policy, capacity) for policy in POLICIES for capacity in (6, 12, 24)
        ]
        for result in report.replays:
            alone = replay(trace, result.capacity, result.policy, warmup=10)
            assert result == alone
            assert report.missed_bytes_per_token(result) == sum(alone.misses) * 1000 / 50
        assert (report.num_pages, report.cycle) == (24, 6)
        assert report.reuse == trace.reuse().tolist()

    def test_the_eighths_that_one_step_fits_into(self, trace):
        assert [r.capacity for r in cache_report(trace).replays[:8]] == list(range(3, 25, 3))
        few = synthetic_trace(5, 1, 8, 3)
        assert [r.capacity for r in cache_report(few).replays[:6]] == [3, 4, 5, 6, 7, 8]

    @pytest.mark.parametrize(
        ("capacity", "message"),
        [
            ("many", r"capacity 'many': give pages \(768\) or a share of all 24 \(12.5%\)"),
            ("1e3", "capacity '1e3': give pages"),
            ("nan%", "capacity 'nan%': give pages"),
            ("inf%", "capacity 'inf%': give pages"),
            ("%", "capacity '%': give pages"),
            ("1", "'1': 1 pages; this trace takes 2 .* to 24"),
            ("-50%", "'-50%': -12 pages; this trace takes 2"),
            ("25", "'25': 25 pages; this trace takes 2"),
            ("200%", "'200%': 48 pages; this trace takes 2"),
        ],
    )
    def test_refuses_capacities_in_words(self, trace, capacity, message):
        with pytest.raises(ValueError, match=message):
            cache_report(trace, ["50%", capacity])


class TestPictures:
    @drawing
    def test_are_written(self, trace, tmp_path):
        folder = tmp_path / "a" / "b"
        assert draw_report(cache_report(trace), trace, folder) == [
            folder / "hit_rate.png",
            folder / "heat_map.png",
        ]
        for picture in folder.iterdir():
            data = picture.read_bytes()
            assert data.startswith(b"\x89PNG\r\n")
            width, height = struct.unpack(">II", data[16:24])
            assert width > 800 and height > 400

    @drawing
    def test_hit_rate_against_capacity(self, trace):
        report = cache_report(trace, ["25%", "50%", "100%"])
        axes = _hit_rate(report).axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel()) == (
            "capacity, % of 24 pages",
            "hit rate, %",
        )
        lines = {line.get_label(): line for line in axes.get_lines()}
        for policy, label in zip(POLICIES, ("claims", "LRU", "LFU", "Belady"), strict=True):
            rates = [100 * replay(trace, slots, policy).hit_rate for slots in (6, 12, 24)]
            assert lines[label].get_xdata() == pytest.approx([25, 50, 100])
            assert lines[label].get_ydata() == pytest.approx(rates)
        assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0
        assert axes.get_title(loc="left") == trace.metadata["source"]

    @drawing
    def test_heat_map_of_layers_and_experts(self):
        ids = torch.tensor([[[0, 1], [3, NONE]], [[0, 2], [3, 3]]]).short()
        figure = _heat_map(RoutingTrace(ids, 4, (1, 1)))
        axes, scale = figure.axes
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "layer")
        assert axes.images[0].get_array().tolist() == [[2, 1, 1, 0], [0, 0, 0, 4]]
        assert axes.images[0].get_clim() == (0, 4)
        assert "mean use" in scale.get_ylabel()

    @drawing
    def test_layers_without_experts_draw_too(self):
        ids = torch.full((2, 2, 1), NONE, dtype=torch.int16)
        assert not _heat_map(RoutingTrace(ids, 4, (1, 1))).axes[0].images[0].get_array().any()

    def test_need_matplotlib(self, trace, tmp_path, without_matplotlib):
        with pytest.raises(ValueError, match=r"pip install 'qmoe\[bench\]'"):
            draw_report(cache_report(trace), trace, tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestCommand:
    def test_prints_a_table(self, trace, file, capsys):
        assert main(["cache-report", str(file), "--capacity=25%", "--capacity=12"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("|")]
        rows = rows[3:]  # the heading has three lines
        assert [[cell.strip() for cell in row[:2]] for row in rows] == [
            ["25.0%", "6"],
            ["50.0%", "12"],
        ]
        for row, slots in zip(rows, (6, 12), strict=True):
            results = [replay(trace, slots, policy) for policy in POLICIES]
            assert [cell.strip() for cell in row[2:6]] == [f"{r.hit_rate:.1%}" for r in results]
            for cell, result in zip(row[6:], results, strict=True):
                number, unit = cell.split()
                kilobytes = float(number) / (1 if unit == "kB" else 1000)
                assert kilobytes == pytest.approx(sum(result.misses) / 60, rel=0.01)
        assert trace.metadata["source"] in out
        assert "60 tokens through 3 layers of 8 experts, top 2: one token asks for 6 pages" in out
        assert f"reuse: {float(trace.reuse().mean()):.1%}" in out

    def test_says_how_many_tokens_are_not_counted(self, tmp_path, capsys):
        plain = synthetic_trace(9, 2, 8, 2)
        plain.metadata.clear()
        plain.save(tmp_path / "plain.safetensors")
        assert main(["cache-report", str(tmp_path / "plain.safetensors"), "--warmup=3"]) == 0
        out = capsys.readouterr().out
        assert "the first 3 tokens are not counted" in out

    @drawing
    def test_draws(self, file, tmp_path, capsys):
        out = tmp_path / "pictures"
        assert main(["cache-report", str(file), f"--out={out}", "--capacity=50%"]) == 0
        names = ["hit_rate.png", "heat_map.png"]
        assert capsys.readouterr().out.splitlines()[-2:] == [str(out / name) for name in names]
        assert sorted(p.name for p in out.iterdir()) == sorted(names)
        assert main(["cache-report", str(file), f"--out={out}", "--capacity=9", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["pictures"] == [str(out / name) for name in names]

    def test_json_is_one_document(self, trace, file, capsys):
        arguments = ["--capacity=50%", "--warmup=20", "--json"]
        assert main(["cache-report", str(file), *arguments]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["num_tokens"], document["num_pages"], document["warmup"]) == (60, 24, 20)
        assert document["metadata"] == trace.metadata
        assert document["pictures"] == []
        assert [r["policy"] for r in document["replays"]] == list(POLICIES)
        for result in document["replays"]:
            alone = replay(trace, 12, result["policy"], warmup=20)
            assert (tuple(result["hits"]), tuple(result["misses"])) == (alone.hits, alone.misses)
            assert result["hit_rate"] == alone.hit_rate
            assert result["missed_bytes_per_token"] == alone.missed_bytes / 40

    def test_the_shipped_trace(self, capsys):
        assert main(["cache-report", str(SHIPPED), "--json", "--capacity=50%"]) == 0
        found = [r["hit_rate"] for r in json.loads(capsys.readouterr().out)["replays"]]
        claims, lru, lfu, belady = found
        assert lfu < lru < claims < belady
        assert 0.6 < lru < 0.8

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["{nowhere}"], 3, "no such file; record one with qmoe generate --record-routing"),
            (["{file}", "--capacity=many"], 3, "capacity 'many': give pages"),
            (["{file}", "--capacity=1"], 3, "this trace takes 2"),
            (["{file}", "--warmup=60"], 3, "warmup=60: from 0 to fewer than the trace's 60"),
            (["{file}", "--warmup=some"], 2, "'--warmup'"),
            pytest.param(["{file}", "--out={file}"], 3, "trace.safetensors", marks=drawing),
            ([], 2, "Missing argument 'TRACE'"),
        ],
    )
    def test_failures_are_one_line(self, file, tmp_path, capsys, arguments, code, message):
        names = {"file": file, "nowhere": tmp_path / "nowhere"}
        assert main(["cache-report", *(a.format(**names) for a in arguments)]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("qmoe: ") and message in err
        assert len(err.splitlines()) == 1

    def test_without_matplotlib(self, file, tmp_path, capsys, without_matplotlib):
        assert main(["cache-report", str(file), f"--out={tmp_path / 'out'}"]) == 3
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1 and "pip install 'qmoe[bench]'" in err
        assert main(["cache-report", str(file)]) == 0
