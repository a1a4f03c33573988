"""qmoe.merge beside PEFT's own merging, from 16-bit and from converted checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM
from zoo import logits

import qmoe
from qmoe.checkpoints.files import open_checkpoint
from qmoe.cli.main import main
from qmoe.experts.quantized import quantized_modules
from qmoe.tools import merge as tool
from qmoe_convert.convert import convert

peft = pytest.importorskip("peft")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FAMILIES = ["qwen3_moe", "gpt_oss"]  # the Hub has one expert by expert, the other transposed


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tmp_path_factory) -> Path:
    """A 16-bit checkpoint (in fp32), converted ones, and an adapter that PEFT trained on it."""
    return make_folders(request.param, tmp_path_factory.mktemp(request.param))


def make_folders(family: str, folder: Path) -> Path:
    model = zoo.build(family)
    model.save_pretrained(folder / "plain")
    (folder / "plain" / "LICENSE").write_text("ours", encoding="utf-8")
    for weights in ("int8", "fp8"):
        convert(folder / "plain", folder / weights, weights=weights)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        target_parameters=EXPERTS,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folders("gpt_oss", tmp_path_factory.mktemp("gpt_oss"))


def adapted(model: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, folder / "adapter").eval()


def load(path: Path) -> Any:
    return qmoe.load(path, device="cpu")


def test_into_16_bit(folders: Path, tmp_path: Path) -> None:
    out = qmoe.merge(folders / "plain", folders / "adapter", tmp_path / "out")
    assert out == tmp_path / "out" and [p.name for p in tmp_path.iterdir()] == ["out"]
    expected = logits(adapted(load(folders / "plain"), folders))
    found = AutoModelForCausalLM.from_pretrained(out).eval()
    assert not quantized_modules(found)
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-5)
    assert (out / "LICENSE").read_text(encoding="utf-8") == "ours"
    assert set(open_checkpoint(out)) == set(open_checkpoint(folders / "plain"))


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_into_a_converted_checkpoint(folders: Path, tmp_path: Path, weights: str) -> None:
    """In 16 bit, the same as PEFT on the weights that the 8-bit ones stand for."""
    out = qmoe.merge(str(folders / weights), str(folders / "adapter"), str(tmp_path / "out"))
    ours = adapted(load(folders / weights), folders)
    torch.testing.assert_close(logits(load(out)), logits(ours), rtol=1e-4, atol=1e-5)
    assert set(open_checkpoint(out)) == set(open_checkpoint(folders / "plain"))


@pytest.mark.parametrize("source", ["plain", "int8"])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_quantized_again(folders: Path, tmp_path: Path, source: str, weights: Any) -> None:
    out = qmoe.merge(folders / source, folders / "adapter", tmp_path / "out", weights=weights)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = load(out)
    assert {experts.weights for experts in quantized_modules(found).values()} == {weights}
    merged = adapted(
        qmoe.unpatch(load(folders / source)) if source == "int8" else load(folders / source),
        folders,
    ).merge_and_unload()
    expected = logits(qmoe.patch(merged, weights))
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_was_trained_on_8_bit(folders: Path, tmp_path: Path) -> None:
    model = adapted(load(folders / "int8"), folders)
    model.save_pretrained(tmp_path / "adapter")
    out = qmoe.merge(folders / "int8", tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(logits(load(out)), logits(model), rtol=1e-4, atol=1e-5)


def test_16_bit_dtypes_stay(tmp_path: Path) -> None:
    folder = make_folders("qwen3_moe", tmp_path)
    model = zoo.build("qwen3_moe").to(torch.bfloat16)
    model.save_pretrained(folder / "bf16")
    out = qmoe.merge(folder / "bf16", folder / "adapter", tmp_path / "out")
    found = load(out)
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    expected = logits(adapted(load(folder / "bf16"), folder)).float()
    assert (logits(found).float() - expected).norm() < 0.02 * expected.norm()


class TestRefusals:
    def refuse(self, folder: Path, error: type[Exception], match: str, **changes: Any) -> None:
        arguments = dict(
            checkpoint=folder / "plain", adapter=folder / "adapter", output=folder / "out"
        )
        before = sorted(folder.rglob("*"))
        with pytest.raises(error, match=match) as caught:
            qmoe.merge(**arguments | changes)
        assert "\n" not in str(caught.value)
        assert sorted(folder.rglob("*")) == before

    def test_folders(self, folder: Path) -> None:
        self.refuse(folder, FileNotFoundError, "nowhere: no such", checkpoint=folder / "nowhere")
        self.refuse(folder, FileNotFoundError, "nowhere: no such", adapter=folder / "nowhere")
        self.refuse(folder, FileNotFoundError, "x: no such folder", output=folder / "x" / "y")
        self.refuse(folder, FileExistsError, "int8 exists", output=folder / "int8")
        self.refuse(folder, ValueError, "adapter_config.json", adapter=folder / "plain")
        self.refuse(folder, ValueError, r"weights='int4'.*'int8' and 'fp8'", weights="int4")
        self.refuse(folder, ValueError, "config.json", checkpoint=folder / "adapter")

    def test_one_of_several_adapters(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder / "adapter", tmp_path / "several" / "mine")
        match = "give one of those in it: mine"
        self.refuse(folder, ValueError, match, adapter=tmp_path / "several")

    @pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
    def test_a_weight_that_is_two(self, module: str, tmp_path: Path) -> None:
        """A sum in the embedding would be in the output layer as well."""
        from peft import LoraConfig, get_peft_model

        model = zoo.build("gpt_oss")
        model.config.tie_word_embeddings = True
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.save_pretrained(tmp_path / "plain")
        config = LoraConfig(target_modules=["q_proj", module], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
        match = "adapts one of .*embed_tokens.weight.* and .*lm_head.weight.*, which are one"
        self.refuse(tmp_path, ValueError, match)

    @pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
    def test_tokens_of_a_weight_that_is_two(self, module: str, tmp_path: Path) -> None:
        """PEFT lets the output layer follow the embedding, and not the other way round."""
        model = zoo.build("gpt_oss")
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(tmp_path / "plain")
        config = peft.LoraConfig(
            target_modules=["q_proj"],
            trainable_token_indices={module: [1, 2]},
            init_lora_weights=False,
        )
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter.normal_()
        expected = logits(model.eval())
        model.save_pretrained(tmp_path / "adapter")
        if module == "lm_head":
            self.refuse(tmp_path, ValueError, "adapts one of .*lm_head.weight.*, which are one")
            return
        out = qmoe.merge(tmp_path / "plain", tmp_path / "adapter", tmp_path / "out")
        torch.testing.assert_close(logits(load(out)), expected, rtol=1e-3, atol=1e-4)

    def test_repeated_layers(self, tmp_path: Path) -> None:
        model = zoo.build("qwen3_moe")
        model.save_pretrained(tmp_path / "plain")
        config = peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]])
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
        self.refuse(tmp_path, ValueError, "it repeats layers")

    def test_a_scale_that_is_no_number(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder / "adapter", tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_config.json"
        changed = json.loads(file.read_text(encoding="utf-8")) | {"lora_alpha": "x"}
        file.write_text(json.dumps(changed), encoding="utf-8")
        self.refuse(folder, ValueError, "does not fit", adapter=tmp_path / "adapter")

    def test_another_models_adapter(self, folder: Path, tmp_path: Path) -> None:
        other = make_folders("qwen3_moe", tmp_path)
        self.refuse(folder, ValueError, "does not fit GptOss.*size", adapter=other / "adapter")

    def test_tensors_that_are_missing(self, folder: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        broken = tmp_path / "adapter"
        shutil.copytree(folder / "adapter", broken)
        file = broken / "adapter_model.safetensors"
        tensors = load_file(file)
        first = next(name for name in tensors if "experts" in name)
        save_file({n: t for n, t in tensors.items() if n != first}, file)
        self.refuse(folder, ValueError, "1 of its tensors are missing and 0", adapter=broken)
        save_file(tensors | {first.replace("layers.0", "layers.9"): tensors[first].clone()}, file)
        self.refuse(folder, ValueError, "0 .* missing and 1 belong to nothing", adapter=broken)
        save_file(tensors | {first: tensors[first] * float("nan")}, file)
        self.refuse(folder, ValueError, "NaNs detected", adapter=broken)
        file.write_bytes(b"nonsense")
        self.refuse(folder, ValueError, "adapter_model.safetensors: cannot be read", adapter=broken)
        file.unlink()
        self.refuse(folder, ValueError, "adapter_model", adapter=broken)
        (broken / "adapter_config.json").write_text("{", encoding="utf-8")
        self.refuse(folder, ValueError, str(broken), adapter=broken)

    def test_another_kind(self, folder: Path, tmp_path: Path) -> None:
        broken = tmp_path / "adapter"
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(broken)
        self.refuse(folder, ValueError, "kind IA3; LORA can be merged", adapter=broken)

    def test_without_peft(self, folder: Path, monkeypatch) -> None:
        monkeypatch.setattr(tool, "find_spec", lambda name: None)
        self.refuse(folder, ValueError, "needs PEFT.*pip install peft")

    def test_a_full_disk(self, folder: Path, monkeypatch) -> None:
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        self.refuse(folder, OSError, "has 1 kB free.*make room")

    def test_an_interrupt(self, folder: Path, monkeypatch) -> None:
        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        before = sorted(folder.rglob("*"))
        monkeypatch.setattr(tool, "_merged", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qmoe.merge(folder / "plain", folder / "adapter", folder / "out")
        assert sorted(folder.rglob("*")) == before


class TestCommand:
    def test_it_merges(self, folder: Path, tmp_path: Path, capsys) -> None:
        out = tmp_path / "out"
        arguments = ["merge", str(folder / "int8"), str(folder / "adapter"), "-o", str(out)]
        assert main([*arguments, "--weights", "fp8", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["out"] == str(out) and document["weights"] == "fp8"
        assert document["bytes"] == sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
        assert {e.weights for e in quantized_modules(load(out)).values()} == {"fp8"}

    @pytest.mark.parametrize(
        ("change", "code", "message"),
        [
            ({2: "plain"}, 3, "no adapter"),
            ({1: "nowhere"}, 3, "no such folder"),
            ({4: "int8"}, 2, "int8 exists"),
            ({3: "--weights"}, 2, "weights"),
        ],
    )
    def test_mistakes(self, folder: Path, capsys, change, code: int, message: str) -> None:
        arguments = ["merge", str(folder / "plain"), str(folder / "adapter"), "-o"]
        arguments.append(str(folder / "out"))
        for place, value in change.items():
            arguments[place] = value if value.startswith("-") else str(folder / value)
        assert main(arguments) == code
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "Traceback" not in error
        assert not (folder / "out").exists()
