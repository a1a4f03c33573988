from __future__ import annotations

import json
import shutil

import pytest

from qmoe.cli.main import main
from qmoe.tools import demo
from qmoe.tools.demo import run_demo

# bytes of the experts of the tiny checkpoint: two layers, eight experts, three projections
WEIGHTS = 2 * 8 * 3 * 64 * 32
CHANNELS = 2 * 8 * (2 * 32 + 64)


@pytest.fixture(scope="module")
def result(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "converted"
    told = []
    result = run_demo(
        checkpoint, prompts=["Hello"], max_new_tokens=8, out=out, progress=told.append
    )
    return result, out, told


def test_measures_three_variants(result):
    sixteen, int8, fp8 = result[0].variants
    assert [v.name for v in result[0].variants] == ["16 bit", "INT8", "FP8"]
    assert sixteen.expert_bytes == 2 * WEIGHTS
    assert int8.expert_bytes == fp8.expert_bytes == WEIGHTS + 4 * CHANNELS
    assert sixteen.bits_per_expert_weight == 16
    assert int8.bits_per_expert_weight == pytest.approx(8 + 32 * CHANNELS / WEIGHTS)
    assert sixteen.disk_bytes - int8.disk_bytes == WEIGHTS - 4 * CHANNELS


def test_perplexities_differ_and_are_close(result):
    sixteen, int8, fp8 = result[0].variants
    assert sixteen.perplexity_change == 0
    changes = [abs(variant.perplexity_change) for variant in (int8, fp8)]
    assert 0 < min(changes) < max(changes) < 0.2
    assert int8.perplexity == pytest.approx(sixteen.perplexity * (1 + int8.perplexity_change))


def test_texts_and_progress(result):
    assert result[0].perplexity_tokens == len(("Held out: naïve café, 東京. " * 100).encode())
    assert all(len(v.texts) == 1 and v.texts[0] for v in result[0].variants)
    assert len(result[2]) == 5


def test_out_keeps_the_models_and_is_not_overwritten(result, checkpoint):
    _, out, _ = result
    for weights in ("int8", "fp8"):
        assert (out / weights / "config.json").exists()
        assert (out / weights / "qmoe_manifest.json").exists()
    with pytest.raises(Exception, match=f"{out}/int8"):
        run_demo(checkpoint, prompts=["Hello"], out=out)


def test_the_command_prints_one_table(checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arguments = ["demo", "--model", str(checkpoint), "--prompt=Hel[b]lo", "--max-new-tokens=4"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for expected in ("16 bit", "INT8", "FP8", "perplexity", "tokens/s", "Hel[b]lo", "%"):
        assert expected in out
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_json_is_one_document(checkpoint, capsys):
    assert main(["demo", "--model", str(checkpoint), "--json", "--max-new-tokens=2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["variants"]) == 3
    assert document["prompts"] == list(demo.PROMPTS)


def test_the_shipped_model_is_found():
    assert (demo.SHIPPED_MODEL / demo.HELD_OUT).is_file()


def test_failures_say_what_to_do(checkpoint, tmp_path, capsys, monkeypatch):
    assert main(["demo", "--model", str(tmp_path)]) == 3
    assert "holds no config.json, and neither model.safetensors" in capsys.readouterr().err
    without_text = tmp_path / "without"
    shutil.copytree(checkpoint, without_text)
    (without_text / "heldout.txt").unlink()
    assert main(["demo", "--model", str(without_text)]) == 3
    assert "heldout.txt: not found" in capsys.readouterr().err
    monkeypatch.setattr(demo, "SHIPPED_MODEL", tmp_path / "absent")
    assert main(["demo"]) == 3
    assert "name another with --model" in capsys.readouterr().err
