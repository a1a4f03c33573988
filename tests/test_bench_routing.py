"""The fitted traces hit as often as is published, and the command that fits them runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.routing import __main__ as benchmark
from benchmarks.routing.fit import deviations, fit, hot_share
from benchmarks.routing.published import (
    MODELS,
    QWEN3_30B_A3B,
    QWEN38_FLASH_NEXT,
    Published,
    fitted,
)
from qmoe.traces.drift import Drift, drifting_trace
from qmoe.traces.replay import POLICIES
from qmoe.traces.trace import RoutingTrace

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("model", "num_layers"), [(QWEN3_30B_A3B, 48), (QWEN38_FLASH_NEXT, 7)], ids=list(MODELS)
)
def test_every_published_figure_is_reached(model: Published, num_layers: int) -> None:
    """From an empty cache, as published, and from a warm one; seed 0 is the benchmark's trace."""
    shape = (num_layers, model.num_experts, model.top_k)
    trace = drifting_trace(2 * model.num_tokens, *shape, fitted(model), seed=0)
    points = deviations(model, trace)
    assert len(points) == 2 * len(model.hit_rates) + (model.hot is not None)
    assert max(map(abs, points)) <= benchmark.POINTS, points


def test_what_was_written_down_is_what_is_published() -> None:
    """The file's models are those of the code, so that what was reached belongs to them."""
    sections = json.loads(benchmark.RESULTS.read_text())["sections"]
    assert list(sections) == [*MODELS, benchmark.POLICIES]
    for name, model in MODELS.items():
        section = sections[name]
        assert section["model"]["hit_rates"] == [list(point) for point in model.hit_rates.items()]
        assert section["model"]["source"] == model.source
        assert len(section["seeds"]) == benchmark.NUM_SEEDS
        assert all(cell["worst_points"] <= benchmark.POINTS for cell in section["seeds"])


def test_claims_miss_less_than_lru_wherever_it_was_written_down() -> None:
    section = json.loads(benchmark.RESULTS.read_text())["sections"][benchmark.POLICIES]
    for cell in section["cells"]:
        misses, change = cell["misses_per_token"], cell["trace"] == "another text"
        assert misses["claims"] < (1.1 if change else 0.98) * misses["lru"], cell


def test_deviations_are_hit_rates_less_what_is_published() -> None:
    """Two experts take turns, so that a cache of one misses always and one of two hits always."""
    ids = torch.tensor([0, 1] * 4, dtype=torch.int16).view(8, 1, 1)
    trace = RoutingTrace(ids, 4, (0,))
    model = Published("a model", "", 1, 4, 1, 4, {0.25: 0.1, 0.5: 0.4}, (1, 0.3), Drift(1, 1, 1))
    # Four tokens from an empty cache of two miss two times; later ones hit.
    expected = [-10, 50 - 40, -10, 100 - 40, 50 - 30]
    assert deviations(model, trace) == pytest.approx(expected)
    assert hot_share(trace, 1) == 0.5


def test_the_search_gets_nearer() -> None:
    model = Published("a model", "", 2, 16, 2, 60, {0.25: 0.6, 0.5: 0.8}, None, Drift(1, 1, 10))
    (_, before), (drift, after) = fit(model, 0, 2, seed=5), fit(model, 40, 2, seed=5)
    assert after < before / 2
    assert fit(model, 40, 2, seed=5) == (drift, after)


def test_the_command_runs_and_draws(tmp_path: Path) -> None:
    out = tmp_path / "routing.json"
    arguments = ["--tiny", f"--out={out}", "--commit=test", "--evaluations=1", "--layers=1"]
    assert benchmark.main([*arguments, f"--only={QWEN3_30B_A3B.name}"]) == 0
    section = json.loads(out.read_text())["sections"][QWEN3_30B_A3B.name]
    assert section["commit"] == "test" and len(section["seeds"]) == 2
    assert {cell["trace"] for cell in section["curve"]} == {"fitted", "synthetic", "recorded"}
    assert fitted(QWEN3_30B_A3B, out) == Drift(**section["drift"])
    assert benchmark.main([*arguments, "--only=policies"]) == 0
    cells = json.loads(out.read_text())["sections"]["policies"]["cells"]
    assert len(cells) == 4 * len(benchmark.POLICY_SHARES)
    for cell in cells:
        misses = cell["misses_per_token"]
        assert list(misses) == list(POLICIES) and misses["belady"] == min(misses.values())
    with pytest.raises(ValueError, match=r"nothing fitted to Qwen3\.8-Flash-Next; run python -m"):
        fitted(QWEN38_FLASH_NEXT, out)
    pytest.importorskip("matplotlib")
    assert benchmark.main(["--draw", f"--out={out}"]) == 0
    assert (tmp_path / "routing.png").stat().st_size > 10_000


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--tiny"], "another --out"), (["--only=x"], "no section x")):
        with pytest.raises(SystemExit):
            benchmark.main(arguments)
        assert said in capsys.readouterr().err
