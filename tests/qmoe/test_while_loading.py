"""A 16-bit checkpoint is quantized while it is read: the same bits, without the memory."""

from __future__ import annotations

import gc
import os
from functools import partial

import pytest
import test_paged_loading as paged_loading
import torch
import zoo
from families import FAMILIES
from test_load import change
from test_paged_loading import memory_of_loading, save_large, smallest_budget
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import MergeModulelist
from whole_models import generating_classes
from zoo import logits

import qmoe
from qmoe.experts.quantized import quantized_modules

# Stored in other ways than those of families.py: two matrices of all experts, rows of gate and up
# in turn, without a gate, with identity experts, text and image experts in one list.
STORED_OTHERWISE = ["Dbrx", "Llama4ForCausalLM", "NemotronH", "Longcat", "Ernie4_5_VLMoe"]
WHOLE = {
    str(whole): whole
    for whole in generating_classes()
    if any(name in str(whole) for name in STORED_OTHERWISE)
}


def assert_same_bits(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    tensors, others = dict(model.named_parameters()), dict(expected.named_parameters())
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        other = others[name]
        assert (tensor.dtype, tensor.device) == (other.dtype, other.device), name
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name


@pytest.mark.parametrize("family", [*FAMILIES, *WHOLE])
def test_the_bits_are_those_of_patch(family, tmp_path) -> None:
    model = FAMILIES[family].build() if family in FAMILIES else WHOLE[family].build()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "16 bit")
    expected = qmoe.patch(qmoe.load(tmp_path / "16 bit", device="cpu"), "int8")
    loaded = qmoe.load(tmp_path / "16 bit", device="cpu", weights="int8")
    assert quantized_modules(loaded)
    assert_same_bits(loaded, expected)
    loaded.save_pretrained(tmp_path / "8 bit")
    assert_same_bits(qmoe.load(tmp_path / "8 bit", device="cpu"), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_in_the_dtype_that_is_asked_for(dtype, checkpoint) -> None:
    expected = qmoe.patch(qmoe.load(checkpoint, device="cpu", dtype=dtype), "fp8")
    assert_same_bits(qmoe.load(checkpoint, device="cpu", dtype=dtype, weights="fp8"), expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("budget", ["paged", "resident"])
def test_with_a_budget(family, budget, tmp_path) -> None:
    zoo.build(family, 12).save_pretrained(tmp_path)
    expected = logits(qmoe.load(tmp_path, device="cpu", weights="int8"))
    hbm_budget = smallest_budget(tmp_path, weights="int8") if budget == "paged" else "1GB"
    model = paged_loading.load(tmp_path, hbm_budget, weights="int8")
    assert (model.qmoe_paging.cache is not None) == (budget == "paged")
    assert torch.equal(logits(model), expected)


def test_experts_that_stay_in_16_bit(checkpoint, tmp_path) -> None:
    """One converter serves both layers; the one that stays is merged by its own operations."""
    kept = "model.layers.0.mlp.experts"
    config = qmoe.QmoeConfig("int8", modules_to_not_convert=[kept])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    assert list(quantized_modules(model)) == ["model.layers.1.mlp.experts"]
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(
        model.get_parameter(f"{kept}.down_proj"), plain.get_parameter(f"{kept}.down_proj")
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(qmoe.load(tmp_path, device="cpu")), logits(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_offloaded(family, tmp_path) -> None:
    """What transformers offloads is what was quantized, or refused."""
    zoo.build(family).save_pretrained(tmp_path / "16 bit")
    on_cpu = dict.fromkeys(("embed_tokens", "layers.0", "norm", "rotary_emb"), "cpu")
    places = {f"model.{name}": place for name, place in {**on_cpu, "layers.1": "disk"}.items()}
    load = partial(
        AutoModelForCausalLM.from_pretrained,
        tmp_path / "16 bit",
        quantization_config=qmoe.QmoeConfig("int8"),
        device_map={**places, "lm_head": "cpu"},
        offload_folder=tmp_path / "offloaded",
    )
    if family == "gpt_oss":
        with pytest.raises(
            ValueError, match=r"layers\.1\.mlp\.experts has biases and is offloaded"
        ):
            load()
        return
    model = load()
    assert model.model.layers[1].mlp.experts.down_proj_q.is_meta
    expected = qmoe.load(tmp_path / "16 bit", device="cpu", weights="int8")
    assert torch.equal(logits(model), logits(expected))


def test_experts_are_not_merged_in_16_bit(checkpoint, monkeypatch) -> None:
    def convert(*args: object, **kwargs: object) -> None:
        raise AssertionError("16-bit experts in memory twice")

    monkeypatch.setattr(MergeModulelist, "convert", convert)
    qmoe.load(checkpoint, device="cpu", weights="int8")


@pytest.mark.parametrize("options", [{}, {"hbm_budget": "1GB"}], ids=["resident", "budget"])
@pytest.mark.parametrize("failure", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_failure_midway(failure, options, checkpoint, monkeypatch) -> None:
    """It is what is raised, not transformers' summary of it; and the next load works."""
    quantize = qmoe.loading.while_loading.quantize
    calls = []

    def fail(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 5:
            raise failure("midway")
        return quantize(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("qmoe.loading.while_loading.quantize", fail)
        with pytest.raises(failure, match="midway"):
            qmoe.load(checkpoint, device="cpu", weights="int8", **options)
    assert len(calls) == 5  # nothing is done in vain
    qmoe.load(checkpoint, device="cpu", weights="int8", **options)


def test_a_nan_is_named(checkpoint, tmp_path) -> None:
    qmoe.load(checkpoint, device="cpu").save_pretrained(tmp_path)
    broken = "model.layers.1.mlp.experts.3.down_proj.weight"
    change(tmp_path, lambda tensors: {**tensors, broken: tensors[broken] * float("nan")})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj\[3\]: NaN"):
        qmoe.load(tmp_path, device="cpu", weights="int8")


# ---- memory ----------------------------------------------------------------------------------

LAYER = 32 * 3 * 1024 * 768 * 2  # bytes of one layer's experts in 16 bit, as save_large has them


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_the_16_bit_model_is_never_in_memory(tmp_path) -> None:
    save_large(tmp_path)
    grown, _, held = memory_of_loading(tmp_path, weights="int8")
    assert grown < held + LAYER + (64 << 20) < 4 * LAYER + (64 << 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("paged", [False, True], ids=["resident", "paged"])
def test_nor_in_that_of_the_gpu(paged, tmp_path) -> None:
    save_large(tmp_path, num_layers=10)
    options = {"device": "cuda", "weights": "int8"}
    if paged:
        budget = smallest_budget(tmp_path, **options)
        options |= {"hbm_budget": budget, "context": paged_loading.CONTEXT}
    torch.zeros(1, device="cuda")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = qmoe.load(tmp_path, **options)
    peak = torch.cuda.max_memory_allocated() - before
    if paged:
        assert model.qmoe_paging.cache is not None and peak < budget + LAYER
    else:
        held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        assert peak < held + LAYER + (64 << 20) < 10 * LAYER  # those of all experts in 16 bit
    on_cpu = qmoe.load(tmp_path, device="cpu", weights="int8")
    for name, experts in quantized_modules(model).items():
        pairs = zip(
            experts.quantized_weights(),
            on_cpu.get_submodule(name).quantized_weights(),
            strict=True,
        )
        assert all(torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
