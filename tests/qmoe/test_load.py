"""qmoe.load says what a checkpoint lacks, and never makes it up."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel
from transformers.utils import logging

import qmoe
from qmoe.checkpoints.files import CheckpointError
from qmoe.checkpoints.inspection import inspect_checkpoint
from qmoe.checkpoints.schema import MANIFEST_NAME, QMOE, Manifest
from qmoe.cli.main import main
from qmoe.experts.quantized import quantized_modules
from qmoe.generation import load_tokenizer
from qmoe.loading import load
from qmoe_convert.convert import convert

Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
HOW = [{}, {"weights": "int8"}, {"weights": "fp8", "hbm_budget": "1GB"}]
ID_OF_HOW = ["16 bit", "quantized", "paged"]


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def quiet() -> Any:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def change(folder: Path, of_tensors: Callable[[Tensors], Tensors]) -> None:
    tensors = of_tensors(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not re.search(pattern, n)}


def narrower(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        n: t[..., :-1].clone() if re.search(pattern, n) else t for n, t in tensors.items()
    }


DAMAGE = {
    "v_proj and the last norm": (
        without(r"v_proj|model\.norm"),
        r"0\.self_attn\.v_proj.*and \d|norm",
    ),
    "a layer": (without(r"layers\.1\."), r"model\.layers\.1\.\S+, model\.layers\.1\."),
    "the embedding": (without("embed_tokens"), r"embed_tokens\.weight"),
    "an expert": (without(re.escape(EXPERT)), re.escape(EXPERT)),
    "a layer's experts": (without(r"1\.mlp\.experts"), r"1\.mlp\.experts\.(gate_up|down)_proj"),
    "another shape": (narrower(r"model\.norm"), r"model\.norm\.weight.*\[63\].* instead of \[64\]"),
    "one expert's shape": (narrower(re.escape(EXPERT)), rf"{re.escape(EXPERT)} has the shape \["),
    "all experts' shape": (narrower("experts.*down_proj"), r"experts\.down_proj.*, 31\] "),
    "scales that nobody multiplies by": (
        lambda tensors: {**tensors, f"{EXPERT}_scale": torch.ones(32, 1)},
        r"_scale is no part of the model",
    ),
    "too much": (
        lambda tensors: {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)},
        r"q_proj\.bias is no part of the model",
    ),
}


@pytest.mark.parametrize("options", HOW, ids=ID_OF_HOW)
@pytest.mark.parametrize(("of_tensors", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_tensors_that_do_not_fit_are_named(of_tensors, message, options, folder) -> None:
    change(folder, of_tensors)
    with pytest.raises(ValueError, match=message) as refusal:
        qmoe.load(folder, device="cpu", **options)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600


@pytest.mark.parametrize("part", ["scale", "q_proj"])
def test_a_converted_checkpoint_too(part, folder, tmp_path) -> None:
    qmoe.load(folder, device="cpu", weights="int8").save_pretrained(tmp_path / "int8")
    change(tmp_path / "int8", without(rf"layers\.1\..*{part}"))
    with pytest.raises(ValueError, match=rf"layers\.1\.\S*{part}.*convert"):
        qmoe.load(tmp_path / "int8", device="cpu")


@pytest.mark.parametrize("options", HOW, ids=ID_OF_HOW)
@pytest.mark.parametrize(
    "extra",
    [
        ("model.layers.2.eh_proj.weight", "model.layers.2.mlp.gate.weight"),
        ("mtp.layers.0.norm.weight",),
        ("model.layers.0.self_attn.k_proj.input_scale",),
    ],
    ids=["layer", "mtp", "scale"],
)
def test_what_looks_further_ahead_is_passed_over(extra, options, folder) -> None:
    change(folder, lambda tensors: tensors | {name: torch.ones(4) for name in extra})
    qmoe.load(folder, device="cpu", **options)


def test_what_a_conversion_kept_is_passed_over(folder) -> None:
    change(folder, lambda tensors: {**tensors, "model.layers.0.other": torch.ones(4)})
    with pytest.raises(ValueError, match=r"layers\.0\.other"):
        qmoe.load(folder, device="cpu")
    manifest = Manifest("int8", QMOE, "", "", {}, extra=["model.layers.0.other"])
    manifest.write(folder)
    qmoe.load(folder, device="cpu")


def test_a_converted_folder_with_other_scales_or_config_is_refused(tmp_path) -> None:
    out = tmp_path / "int8"
    convert(Path(__file__).parents[2] / "examples" / "tiny-moe", out, verify=False)
    (out / MANIFEST_NAME).unlink()  # which would say that the file is another one
    change(out, lambda tensors: {n: -t if "1.mlp.experts.3.up_proj.weight_scale" in n else t
                                 for n, t in tensors.items()})  # fmt: skip
    with pytest.raises(ValueError, match=r"1\.mlp\.experts\.gate_up_proj_scale holds a negative"):
        qmoe.load(out, device="cpu")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    for options in ({}, {"weights": "int8"}):
        # transformers 5.17 gives them the names that the model has after conversion.
        with pytest.raises(ValueError, match=r"_scale and \d+ more are no part of the model"):
            qmoe.load(out, device="cpu", **options)


@pytest.mark.parametrize("options", HOW, ids=ID_OF_HOW)
@pytest.mark.parametrize("what", ["truncated", "not a safetensors", "neither", "pickled"])
def test_files_that_cannot_be_read_are_named(what, options, folder) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    if what == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif what == "not a safetensors":
        file.write_bytes(b"\xff" * 99)
    else:
        file.rename(folder / ("pytorch_model.bin" if what == "pickled" else "elsewhere"))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}.*{what}"):
        qmoe.load(folder, device="cpu", **options)


def test_a_folder_has_no_revisions(folder) -> None:
    with pytest.raises(ValueError, match="revision='main' has no effect"):
        qmoe.load(folder, revision="main")


def test_a_generation_config_that_cannot_be_read_is_named(folder) -> None:
    (folder / "generation_config.json").write_text('{"eos_tok')
    with pytest.raises(ValueError, match=r"generation_config\.json: is not JSON"):
        qmoe.load(folder, device="cpu")
    with pytest.raises(ValueError, match=r"generation_config\.json: is not JSON"):
        convert(folder, folder.parent / "out")
    assert not list(folder.parent.glob("out*"))


@pytest.mark.parametrize("read", [qmoe.load, inspect_checkpoint])
def test_a_shard_of_another_size_than_the_manifest_says(read, folder, tmp_path) -> None:
    convert(folder, tmp_path / "out", verify=False)
    shard = tmp_path / "out" / "model.safetensors"
    size = shard.stat().st_size
    shard.write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=rf"bytes, and qmoe_manifest\.json says {size}; "):
        read(tmp_path / "out")


def test_an_index_without_metadata(model, tmp_path) -> None:
    """transformers ended in a KeyError."""
    model.save_pretrained(tmp_path, max_shard_size="50kB")
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    del raw["metadata"]
    index.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r'index\.json: lacks "metadata"'):
        qmoe.load(tmp_path)


def test_a_cast_leaves_scales_beside_8_bit_weights_alone(folder) -> None:
    """As a GPU's FP8 layers have them, where transformers does not widen a checkpoint's weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(torch.rand(2, 2), requires_grad=False)
    load._cast(model, torch.float16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"model.layers.0.self_attn.q_proj.weight_scale_inv"}
    assert layer.weight.dtype == torch.float8_e4m3fn


def test_a_folder_without_a_model(tmp_path, capsys) -> None:
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 3
    assert "holds no config.json, and neither" in capsys.readouterr().err


def test_the_command_ends_with_exit_code_3(folder, capsys) -> None:
    change(folder, without("v_proj"))
    assert main(["generate", str(folder), "--prompt", "a", "--device", "cpu"]) == 3
    assert "v_proj.weight" in capsys.readouterr().err


class TestPlainTransformers:
    """from_pretrained, in which qmoe has no say but through its quantizers."""

    def test_an_experts_module_that_is_in_no_file(self, folder, tmp_path) -> None:
        config = qmoe.QmoeConfig("int8", modules_to_not_convert=["model.layers.1.mlp.experts"])
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        model.save_pretrained(tmp_path / "int8")
        change(tmp_path / "int8", without(r"layers\.1\.mlp\.experts"))
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts.*none of the checkpoint's"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "int8")

    def test_the_shape_of_something_else(self, folder, tmp_path) -> None:
        qmoe.load(folder, device="cpu", weights="int8").save_pretrained(tmp_path / "int8")
        change(tmp_path / "int8", narrower(r"model\.norm"))
        with pytest.raises((ValueError, RuntimeError), match=r"model\.norm|mismatched"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "int8")

    def test_a_model_of_which_a_part_was_patched(self, model, tmp_path) -> None:
        whole = type(model)(model.config)
        qmoe.patch(whole.model)
        with pytest.raises(ValueError, match=r"cannot be saved: model\.layers\.0.*qmoe\.unpatch"):
            whole.save_pretrained(tmp_path)
        assert not any(tmp_path.iterdir())
        whole.model.save_pretrained(tmp_path / "part")
        qmoe.unpatch(whole.model)
        qmoe.patch(whole).save_pretrained(tmp_path / "whole")
        assert len(quantized_modules(qmoe.load(tmp_path / "whole", device="cpu"))) == 2

    def test_a_model_of_which_a_part_was_restored(self, model, tmp_path) -> None:
        """Its files would say 8 bit, and hold 16."""
        whole = qmoe.patch(type(model)(model.config))
        qmoe.unpatch(whole.model)
        with pytest.raises(ValueError, match=r"cannot be saved: its configuration.*qmoe\.patch on"):
            whole.save_pretrained(tmp_path)
        assert not any(tmp_path.iterdir())
        qmoe.patch(whole).save_pretrained(tmp_path / "whole")
        assert len(quantized_modules(qmoe.load(tmp_path / "whole", device="cpu"))) == 2
        qmoe.unpatch(whole).save_pretrained(tmp_path / "restored")


class TestInAUsersTerms:
    """One line that says what is wrong and what would work."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"context": 64}, "context=64 has no effect without hbm_budget"),
            ({"batch_size": 1}, "batch_size=1 has no effect without hbm_budget"),
            ({"hbm_budget": "1GB", "context": "8k"}, "context='8k'; must be a whole number"),
            ({"hbm_budget": "1GB", "batch_size": 0}, "batch_size=0; must be a whole number"),
            ({"hbm_budget": "much"}, "hbm_budget='much'; write a size"),
            ({"dtype": "int8"}, "dtype='int8' is no floating-point dtype of 16"),
        ],
    )
    def test_options(self, options, message, checkpoint) -> None:
        with pytest.raises(ValueError, match=message):
            qmoe.load(checkpoint, device="cpu", weights="int8", **options)

    def test_patch_refuses_what_it_would_ignore(self, model) -> None:
        for options in ({"context": 64}, {"batch_size": 2}, {"device": "cpu"}):
            with pytest.raises(ValueError, match="has no effect without hbm_budget"):
                qmoe.patch(model, **options)
        assert not quantized_modules(model)

    def test_a_model_that_makes_no_text(self, tmp_path) -> None:
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = BertConfig(**sizes, intermediate_size=8, vocab_size=8)
        BertModel(config).save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "vit"}))
        with pytest.raises(ValueError, match=r"type 'vit' makes no text") as refusal:
            qmoe.load(tmp_path, device="cpu")
        assert len(str(refusal.value)) < 300

    def test_a_checkpoint_without_a_tokenizer(self, folder) -> None:
        for file in folder.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(ValueError, match=r"no tokenizer here; put tokenizer\.json|no usable"):
            load_tokenizer(str(folder))
