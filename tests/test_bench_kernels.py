"""The kernels' benchmark runs in its tiny configuration; nothing here looks at times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import __main__ as benchmark
from benchmarks.kernels import layers, peers, sections, shapes, targets
from benchmarks.kernels.table import ratio_table, tables
from qmoe_kernels.tiles import LayerShape
from qmoe_kernels.timing import random_layer

torch.set_num_threads(1)
SMALL = LayerShape(num_experts=6, top_k=2, hidden_size=64, intermediate_size=32)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    failed = benchmark.main(["--tiny", f"--out={out}", "--commit=test", "--seconds=0", *arguments])
    return failed, json.loads(out.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("bench") / "kernels.json"
    failed, data = run(out, "--shapes=tiny", "--tokens=3,16")
    assert failed == 0
    return out, data


def test_every_section_runs(results: tuple[Path, dict[str, Any]]) -> None:
    found = results[1]["sections"]
    names = "ceilings, errors, latency.tiny, held_out.tiny, accumulation.tiny, skew.tiny, "
    names += "routing, layer, perplexity"
    assert ", ".join(found) == names
    assert all(0 < cell["levels_2_error"] < 0.1 for cell in found["accumulation.tiny"]["sums"])
    for section in found.values():
        assert "error" not in section
        assert section["commit"] == "test" and section["machine"]["torch"]
        assert section["command"].startswith("python -m benchmarks.kernels --tiny")
    cells = {(c["tokens"], c["mode"]): c for c in found["latency.tiny"]["cells"]}
    assert set(cells) == {(t, mode) for t in (3, 16) for mode in layers.MODES}
    for (tokens, _), cell in cells.items():
        assert cell["us"] > 0 and cell["error"] < 0.1
        assert 2 <= cell["active"] <= min(8, 2 * tokens)
    assert {c["what"] for c in found["layer"]["bars"]} == {
        "CPU", "GPU eager", "GPU grouped", "fused bf16", "fused int8", "fused fp8",
    }  # fmt: skip
    assert all(c["ratio"] > 0 for c in found["skew.tiny"]["skewed"])
    assert all(c["ratio"] < 1.5 for c in found["errors"]["errors"])


def test_transformers_computes_the_same_layer(results: tuple[Path, dict[str, Any]]) -> None:
    timed = [p for p in results[1]["sections"]["latency.tiny"]["peers"] if p["whole_layer"]]
    assert {p["peer"] for p in timed} >= {
        f"transformers {name}" for name in ("eager", "batched_mm", "grouped_mm")
    }
    assert all(p["error"] < 0.02 and p["us"] > 0 for p in timed)


def test_pictures_and_tables_come_from_the_file(results: tuple[Path, dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    out, data = results
    assert benchmark.main(["--draw", f"--out={out}"]) == 0
    assert {picture.name for picture in out.parent.glob("*.png")} == {
        "kernels_latency.png", "kernels_held_out.png", "kernels_layer.png",
    }  # fmt: skip
    text = "\n".join(tables(data["sections"]))
    assert (
        "int8-w8a16" in text
        and "FAILED" not in text
        and "skewed: tiny" in text
        and "held out" in text
    )


def test_sections_that_are_not_run_stay(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    run(out, "--only=ceilings", "--shapes=tiny")
    _, data = run(out, "--only=routing", "--shapes=odd", "--tokens=2")
    assert list(data["sections"]) == ["ceilings", "routing"]
    assert data["sections"]["ceilings"]["copy_tb_per_s"] > 0


def test_a_wrong_cell_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.run_layer

    def wrong(layer: Any, one: Any, activations: str, **options: bool) -> torch.Tensor:
        out = right(layer, one, activations)
        return out.fill_(float("nan")) if len(out) == 2 else out * 1.1

    monkeypatch.setattr(layers, "run_layer", wrong)
    arguments = ["--only=latency", "--shapes=tiny", "--tokens=2,4", "--modes=int8-w8a16"]
    failed, data = run(tmp_path / "kernels.json", *arguments)
    nan, off = data["sections"]["latency.tiny"]["cells"]
    assert failed == 2 and "us" not in nan and "us" not in off
    assert nan["failed"] == "the output is not finite"
    assert off["failed"].startswith("relative error 0.")
    text = "\n".join(tables(data["sections"]))
    assert text.count("FAILED tiny") == 2


def test_a_section_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setitem(benchmark.SECTIONS, "ceilings", broken)
    failed, data = run(
        tmp_path / "kernels.json", "--only=ceilings,routing", "--shapes=odd", "--tokens=2"
    )
    assert failed == 1
    assert len(data["sections"]["routing"]["cells"]) == 1
    assert "no such luck" in capsys.readouterr().err


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"--out={tmp_path / 'x.json'}"
    for arguments, said in (
        (["--tiny"], "another --out"),
        (["--tiny", out, "--only=latency,nothing"], "no section nothing"),
        (["--tiny", out, "--shapes=qwen3"], "no shape qwen3; there are tiny, odd"),
        (["--tiny", out, "--modes=int4"], "no mode int4"),
        (["--tiny", out, "--tokens=1,x"], "numbers with commas"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(arguments)
        assert said in capsys.readouterr().err


# ---- floors and targets ------------------------------------------------------------------------


def test_floors_are_bytes_and_operations_over_the_ceilings() -> None:
    qwen3 = shapes.SHAPES["qwen3"]
    # 8 experts of 3 * 2048 * 768 bytes; 64 * 8 pairs of twice as many operations.
    assert targets.floors(qwen3, 1, 8, 8, 16)[0] == pytest.approx(8 * 4.718592 / 4.5, rel=1e-6)
    assert targets.floors(qwen3, 1, 8, 16, 16)[0] == pytest.approx(16.8, abs=0.05)
    assert targets.floors(qwen3, 64, 125.5, 8, 16)[1] == pytest.approx(7.0, abs=0.05)
    mixtral = shapes.SHAPES["mixtral"]
    assert targets.floors(mixtral, 4096, 8, 8, 8) == pytest.approx((313, 2220), rel=2e-3)


def test_targets_of_cells() -> None:
    def target(name: str, tokens: int, floor: float, bits: int = 8) -> float | None:
        return targets.target_microseconds(name, tokens, floor, weight_bits=8, product_bits=bits)

    assert [target(name, 1, 8.4) for name in shapes.WITH_TARGETS] == [14, 90, 88]
    assert target("qwen3", 4, 31.2) == pytest.approx(1.3 * 31.2)
    assert target("qwen3", 16, 86.0) == pytest.approx(1.2 * 86.0)
    assert target("dsv3", 16, 1001) == 1017  # the best peer is under 1.08 floors
    assert target("mixtral", 16, 313) == pytest.approx(1.08 * 313)
    assert target("qwen3", 4096, 134) == pytest.approx(0.85 * 514)
    assert target("qwen3", 4096, 134, bits=16) == pytest.approx(1.05 * 762)
    assert target("tiny", 1, 1) is None and target("qwen3", 3, 1) is None
    assert targets.target_microseconds("qwen3", 1, 1, weight_bits=16, product_bits=16) is None


def test_which_targets_were_met() -> None:
    cell = {"shape": "qwen3", "tokens": 16, "target_us": 100.0}
    found = targets.targets(
        {
            "latency.qwen3": {
                "cells": [
                    cell | {"mode": "int8-w8a16", "us": 101.0},
                    cell | {"mode": "int8-w8a8", "us": 90.0},
                    cell | {"mode": "fp8-w8a8", "failed": "wrong"},
                ]
            },
            "skew.qwen3": {"skewed": [cell | {"mode": "auto", "ratio": 1.1}]},
            "errors": {"errors": [cell | {"mode": "int8-w8a8", "ratio": 1.3}]},
        }
    )
    assert {target["what"]: target["met"] for target in found} == {
        "qwen3, 16 tokens, int8-w8a16: us": False,
        "qwen3, 16 tokens, int8-w8a8: us": True,
        "qwen3, 16 tokens, int8-w8a16 over W8A8": False,
        "qwen3, 16 tokens, auto: skewed over uniform": True,
        "qwen3, 16 tokens, int8-w8a8: error over format's": False,
    }


def test_ratios_of_a_held_out_shape() -> None:
    def cell(what: str, name: str, us: float, tokens: int = 16) -> dict[str, Any]:
        return {"shape": "lfm2", "tokens": tokens, what: name, "us": us}

    section = {
        "cells": [
            cell("mode", "int8-w8a16", 100.0),
            cell("mode", "int8-w8a8", 80.0),
            cell("mode", "fp8-w8a16", 90.0),
            cell("mode", "auto", 100.0),  # the slower of the two
            cell("mode", "fp8-auto", 90.0),
            cell("mode", "bf16", 150.0),
            {"shape": "lfm2", "tokens": 16, "mode": "fp8-w8a8", "failed": "wrong"},
            cell("mode", "bf16", 10.0, tokens=1),
        ],
        "peers": [
            cell("peer", "torch scaled_grouped_mm fp8", 1.0),
            cell("peer", "vLLM Triton fp8 W8A8", 160.0),
            cell("peer", "vLLM Marlin int8 W8A16", 100.0),
            cell("peer", "vLLM Triton bf16", 120.0),
        ],
    }
    found = targets.targets({"held_out.lfm2": section, "latency.lfm2": section})
    assert [(t["what"], t["measured"], t["met"]) for t in found if "W8A8" not in t["what"]] == [
        ("lfm2, 16 tokens, best over vLLM's 8-bit", 0.8, True),
        ("lfm2, 16 tokens, int8 auto over best", 1.25, False),
        ("lfm2, 16 tokens, fp8 auto over best", 1.0, True),
        ("lfm2, 16 tokens, bf16 over vLLM's", 1.25, False),
    ]
    text = "\n".join(ratio_table([section]))
    assert "1.250 - of 1.03" in text and "0.800 +" in text
    assert targets.best_vllm(section, 16) == (100.0, "vLLM Marlin int8 W8A16")
    assert targets.best_vllm(section, 1) is None


def test_groups_of_shapes() -> None:
    assert set(shapes.WITH_TARGETS) == set(targets.PEER_MICROSECONDS)
    assert set(shapes.FITTED).isdisjoint(shapes.HELD_OUT)
    assert set(shapes.FITTED) | set(shapes.HELD_OUT) == set(shapes.SHAPES)


def test_table_of_peers_is_whole() -> None:
    for name, rows in targets.PEER_MICROSECONDS.items():
        assert name in shapes.SHAPES
        assert len(rows) == len(shapes.TOKENS)
        assert all(len(row) == len(targets.PEERS) for row in rows)
    assert targets.best_peer("qwen3", 1024) == ("torch scaled_grouped_mm fp8", 250)
    assert targets.best_peer("qwen3", 1024, targets.BF16_PEERS) == ("Triton bf16", 382)


# ---- inputs, checks, peers ---------------------------------------------------------------------


def test_exact_layer_is_the_reference() -> None:
    from qmoe_kernels.reference import fused_moe_reference

    layer = random_layer(SMALL, "int8", DEVICE, torch.Generator(DEVICE).manual_seed(0))
    (one,) = layers.draw_inputs(SMALL, 5, DEVICE, count=1)
    expected = fused_moe_reference(
        one.hidden_states, *vars(layer).values(), one.topk_ids, one.topk_weights
    )
    assert layers.relative_error(layers.exact_layer(layer, one, None), expected) < 1e-6
    errors = [
        layers.relative_error(layers.exact_layer(layer, one, a), expected)
        for a in ("bf16", "int8", "fp8")
    ]
    assert 1e-4 < errors[0] < 4e-3 < errors[1] < errors[2] < 0.1


def test_a_sample_is_of_the_same_tokens() -> None:
    (one,) = layers.draw_inputs(SMALL, 100, DEVICE, count=1)
    rows, few = layers.sample(one)
    assert len(rows.unique()) == len(few.topk_ids) == layers.SAMPLED_TOKENS
    assert torch.equal(few.hidden_states, one.hidden_states[rows])


def test_results_that_differ_from_run_to_run_fail() -> None:
    expected = torch.ones(2, 4, dtype=torch.float64)
    outs = iter([expected.float(), expected.float() * (1 + 1e-6)])
    found = layers.check(
        lambda: next(outs), torch.arange(2), {"bf16": expected, "int8": 2 * expected},
        {"bf16": 0.01, "int8": 0.01},
    )  # fmt: skip
    assert found["arithmetic"] == "bf16" and found["failed"] == "the second run gave other bits"


@pytest.mark.parametrize("num_tokens", [1, 4, 64, 1024])
def test_uniform_routing_has_as_many_active_experts(num_tokens: int) -> None:
    shape = shapes.SHAPES["qwen3"]
    skewed = layers.draw_inputs(shape, num_tokens, DEVICE, count=8, skew=1.0)
    active = layers.mean_active(skewed)
    among = sections.experts_to_draw_from(shape, num_tokens, active)
    uniform = layers.draw_inputs(shape, num_tokens, DEVICE, count=8, among=among)
    assert layers.mean_active(uniform) == pytest.approx(active, rel=0.1)


def test_peers_that_are_not_there_or_too_large() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError:
        assert not any(name.startswith("vLLM") for name in peers.peers())
    batched = peers.peers()["transformers batched_mm"]
    assert batched.reason_to_skip(shapes.SHAPES["qwen3"], 64) is None
    assert "19 GB of weights" in str(batched.reason_to_skip(shapes.SHAPES["qwen3"], 256))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_four_weights_in_one_integer(dtype: torch.dtype) -> None:
    weight = torch.randint(-127, 128, (6, 8)).to(dtype)
    packed = peers.four_in_one(weight)
    assert packed.shape == (2, 6) and packed.is_contiguous()
    for k in range(8):
        byte = (packed[k // 4] >> (8 * (k % 4))) & 255
        expected = (
            weight[:, k].int() + 128 if dtype == torch.int8 else weight[:, k].view(torch.uint8)
        )
        assert torch.equal(byte, expected.int())


def test_torch_grouped_products_multiply_an_experts_rows() -> None:
    layer = random_layer(SMALL, "bf16", DEVICE, torch.Generator(DEVICE).manual_seed(0))
    (one,) = layers.draw_inputs(SMALL, 5, DEVICE, count=1)
    x, hidden, ends = peers._sorted_rows(SMALL, one)
    assert ends.tolist()[-1] == len(x) == 10
    (call,) = peers.grouped_mm(SMALL, [layer], [one])
    assert call().shape == (10, 64)
    experts = one.topk_ids.flatten().sort(stable=True).values
    for row, expert in enumerate(experts.tolist()):
        assert row < ends[expert] and (expert == 0 or row >= ends[expert - 1])
    assert hidden.shape == (10, 32)
