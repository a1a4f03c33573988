"""Loading and saving through transformers: formats, device maps, partly converted models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo import build, logits

import qmoe
from qmoe.checkpoints.schema import compressed_tensors_config
from qmoe.experts.quantized import QuantizedExperts, quantized_modules
from qmoe_kernels.quantization import STORAGE_DTYPE, quantize


def names(folder: Path) -> set[str]:
    return {
        key
        for shard in folder.glob("*.safetensors")
        for key in safe_open(shard, "pt").keys()  # noqa: SIM118
    }


def compressed_tensors_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    weights: str,
    *,
    skip_layer: int | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> None:
    """What a compressed-tensors writer makes of a per-expert checkpoint."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if ".experts." in n]:
        if skip_layer is not None and f"layers.{skip_layer}." in name:
            continue
        q, scale = quantize(tensors[name], weights, name=name)
        tensors[name] = q
        tensors[f"{name}_scale"] = scale[:, None].to(scale_dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dense = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    if skip_layer is not None:
        dense.append(f"re:.*layers.{skip_layer}.*experts.*")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = compressed_tensors_config(weights, dense)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_a_patched_model_survives_saving_and_loading(family, weights, tmp_path) -> None:
    model = qmoe.patch(build(family), weights)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert any(name.endswith("down_proj_q") for name in names(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    for experts in quantized_modules(loaded).values():
        assert experts.down_proj_q.dtype == STORAGE_DTYPE[weights]
    loaded.save_pretrained(tmp_path / "again")
    assert names(tmp_path / "again") == names(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("package", [True, False], ids=["package", "no package"])
def test_compressed_tensors_experts_stay_in_8_bit(
    family, weights, package, tmp_path, monkeypatch
) -> None:
    if package:
        pytest.importorskip("compressed_tensors")
    else:
        monkeypatch.setattr("qmoe.loading.config.is_compressed_tensors_available", lambda: False)
    model = build(family)
    compressed_tensors_checkpoint(model, tmp_path, weights)
    expected = logits(qmoe.patch(model, weights))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(quantized_modules(loaded)) == 2
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert names(tmp_path / "again") == names(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape and after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_left_in_16_bit_stay_so(family, tmp_path) -> None:
    """One layer quantized, one not, in one compressed-tensors checkpoint; there and back."""
    model = build(family)
    compressed_tensors_checkpoint(model, tmp_path, "int8", skip_layer=0, scale_dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    (name,) = quantized_modules(loaded)
    assert "layers.1." in name
    first, _ = (m for n, m in model.named_modules() if n.endswith(".experts"))
    kept = loaded.get_submodule(name.replace("layers.1.", "layers.0."))
    assert torch.equal(kept.gate_up_proj, first.gate_up_proj)
    assert loaded.get_submodule(name).gate_up_proj_scale.dtype == torch.float32
    expected = logits(loaded)
    loaded.save_pretrained(tmp_path / "again")
    if family == "qwen3_moe" or Version(transformers.__version__) >= Version("5.21"):
        # Older ones write the kept layer of a renamed family under its names in memory.
        assert names(tmp_path / "again") == names(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)


def test_a_partly_converted_qmoe_checkpoint(tmp_path) -> None:
    model = build("qwen3_moe")
    expected = build("qwen3_moe")
    config = qmoe.QmoeConfig("int8", modules_to_not_convert=["model.layers.0.mlp.experts"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert list(quantized_modules(loaded)) == ["model.layers.1.mlp.experts"]
    loaded.save_pretrained(tmp_path / "partly")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "partly")
    assert list(quantized_modules(again)) == ["model.layers.1.mlp.experts"]
    assert torch.equal(
        again.model.layers[0].mlp.experts.down_proj, expected.model.layers[0].mlp.experts.down_proj
    )
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("form", ["qmoe", "compressed-tensors"])
@pytest.mark.parametrize("where", ["auto", "cpu", "disk"])
def test_device_maps(form, where, tmp_path) -> None:
    model = build("qwen3_moe")
    if form == "qmoe":
        expected = logits(qmoe.patch(model, "int8"))
        model.save_pretrained(tmp_path)
    else:
        compressed_tensors_checkpoint(model, tmp_path, "int8")
        expected = logits(qmoe.patch(model, "int8"))
    device_map: str | dict[str, str] = where
    if where == "disk":
        device_map = {"": "cpu", "model.layers.1": "disk"}
        device_map = {name: "cpu" for name, _ in model.named_children() if name != "model"}
        device_map |= {f"model.{name}": "cpu" for name, _ in model.model.named_children()}
        device_map.pop("model.layers")
        device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    if where == "disk":
        assert loaded.model.layers[1].mlp.experts.down_proj_q.is_meta
    tolerance = dict(rtol=0, atol=0) if where != "auto" else dict(rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(loaded).cpu(), expected, **tolerance)
    if where == "disk":
        with pytest.raises(ValueError, match="offloaded"):
            qmoe.unpatch(loaded)


def test_a_missing_tensor_is_an_error_and_not_random_numbers(tmp_path) -> None:
    qmoe.patch(build("qwen3_moe")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj_scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_expert_is_an_error(tmp_path) -> None:
    compressed_tensors_checkpoint(build("qwen3_moe"), tmp_path, "int8")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj.* 15 .* 16"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_dense_compressed_tensors_need_the_package(tmp_path, monkeypatch) -> None:
    model = build("qwen3_moe")
    compressed_tensors_checkpoint(model, tmp_path, "int8")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name], scale = quantize(tensors[name], "int8")
    tensors[f"{name}_scale"] = scale[:, None]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"].remove(name.removesuffix(".weight"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with monkeypatch.context() as without:
        without.setattr("qmoe.loading.config.is_compressed_tensors_available", lambda: False)
        with pytest.raises(ImportError, match=r"q_proj.*pip install compressed-tensors"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    pytest.importorskip("compressed_tensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(quantized_modules(loaded)) == 2
    with torch.no_grad():
        projection = model.model.layers[0].self_attn.q_proj
        projection.weight.copy_(tensors[name] * scale[:, None])
    torch.testing.assert_close(
        logits(loaded), logits(qmoe.patch(model, "int8")), rtol=1e-2, atol=1e-2
    )


def test_without_qmoe_a_qmoe_checkpoint_does_not_load_as_garbage(tmp_path) -> None:
    """Another loader must not mistake 8-bit integers for weights: it finds no name it knows."""
    model = qmoe.patch(build("qwen3_moe"))
    model.save_pretrained(tmp_path)
    weights = set(build("qwen3_moe").state_dict())
    assert not {name for name in names(tmp_path) & weights if "experts" in name}


def test_importing_qmoe_is_what_registers_it(tmp_path) -> None:
    qmoe.patch(build("qwen3_moe")).save_pretrained(tmp_path)
    code = (
        "import qmoe, sys, torch; from transformers import AutoModelForCausalLM as A;"
        "m = A.from_pretrained(sys.argv[1]); print(type(m.model.layers[0].mlp.experts).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == QuantizedExperts.__name__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weights="int4"), "int4.*int8.*fp8"),
        (dict(activations="fp4"), "activations 'fp4'.*'auto', 'bf16', 'int8' and 'fp8'"),
        (dict(format_version=7), "version 7.*version 1"),
        (dict(bits=8), "unknown option 'bits'"),
    ],
)
def test_a_wrong_configuration_says_what_works(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        qmoe.QmoeConfig(**options)
