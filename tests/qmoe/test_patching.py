"""patch and unpatch on whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from zoo import SIZES, TOKENS, build, logits

import qmoe
from qmoe.experts.quantized import quantized_modules
from qmoe_kernels.quantization import dequantize

FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_a_patched_model_is_the_model_on_dequantized_weights(family, weights) -> None:
    model = build(family)
    original = logits(model)
    assert qmoe.patch(model, weights) is model
    patched = logits(model)
    assert qmoe.unpatch(model) is model
    assert not quantized_modules(model)
    torch.testing.assert_close(logits(model), patched, rtol=1e-4, atol=1e-4)
    assert not torch.equal(patched, original)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_8_bit_activations_are_near_and_not_the_same(weights) -> None:
    model = build("qwen3_moe")
    expected = logits(qmoe.patch(copy.deepcopy(model), weights, activations="bf16"))
    actual = logits(qmoe.patch(model, weights, activations=weights))
    error = float((actual - expected).norm() / expected.norm())
    assert 0 < error < 0.5  # unrelated logits are 1.4 apart; routing of random models is fickle


def test_patching_is_no_illusion() -> None:
    """Other weights in the 8-bit parameters, another output: nothing 16 bit is left behind."""
    model = qmoe.patch(build("qwen3_moe"))
    before = logits(model)
    for experts in quantized_modules(model).values():
        experts.down_proj_scale.data *= 2
    assert not torch.allclose(logits(model), before, rtol=1e-2)
    parameters = dict(model.named_parameters())
    assert not [n for n in parameters if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype) -> None:
    model = build("qwen3_moe").to(dtype)
    qmoe.patch(model)
    assert logits(model).dtype == dtype and logits(model).isfinite().all()
    qmoe.unpatch(model)
    assert model.model.layers[0].mlp.experts.down_proj.dtype == dtype


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_casting_the_model_leaves_the_8_bit_form_alone(weights) -> None:
    model = qmoe.patch(build("gpt_oss"), weights)
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith(("_q", "_scale"))}
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.dtype == before[name].dtype
            assert torch.equal(parameter.view(torch.uint8), before[name].view(torch.uint8))
        else:
            assert parameter.dtype == torch.bfloat16, name


def test_unpatched_weights_are_the_dequantized_ones_and_can_be_saved(tmp_path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path / "before")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "before")
    qmoe.patch(loaded)
    experts = copy.deepcopy(loaded.model.layers[1].mlp.experts)
    qmoe.unpatch(loaded)
    expected = dequantize(experts.gate_up_proj_q, experts.gate_up_proj_scale, torch.float32)
    assert torch.equal(loaded.model.layers[1].mlp.experts.gate_up_proj, expected)
    loaded.save_pretrained(tmp_path / "after")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert "quantization_config" not in again.config.to_dict()
    assert torch.equal(logits(again), logits(loaded))


def test_transformers_own_features_work_on_a_patched_model() -> None:
    model = qmoe.patch(build("qwen3_moe"))
    greedy = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    # whatever experts implementation is asked for, the quantized module computes
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert torch.equal(model.generate(TOKENS, max_new_tokens=4, do_sample=False), greedy)
    assert model.generate(TOKENS, max_new_tokens=4, num_beams=2).shape == (2, 13)
    static = model.generate(TOKENS, max_new_tokens=4, cache_implementation="static")
    assert torch.equal(static, greedy)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert not any(
        isinstance(m, qmoe.experts.quantized.QuantizedExperts) for m in model.dequantize().modules()
    )


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    model = qmoe.patch(build("qwen3_moe"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = compiled(TOKENS, use_cache=False).logits
    torch.testing.assert_close(actual, logits(model), rtol=1e-4, atol=1e-4)


def test_compiles_where_gradients_are_on() -> None:
    experts = qmoe.patch(build("qwen3_moe", num_layers=1)).model.layers[0].mlp.experts
    x = torch.randn(3, 64, requires_grad=True)
    routing = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    expected = experts(x, *routing)
    output = torch.compile(experts, backend="aot_eager")(x, *routing)
    assert torch.equal(output, expected)
    ours, compiled = (torch.autograd.grad(y.sum(), x)[0] for y in (expected, output))
    assert ours.abs().sum() > 0
    torch.testing.assert_close(ours, compiled)


def test_experts_that_are_not_frozen_say_so() -> None:
    experts = qmoe.patch(build("qwen3_moe", num_layers=1)).model.layers[0].mlp.experts
    experts.down_proj_scale.requires_grad_()
    routing = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    with pytest.raises(RuntimeError, match=r"has no gradient.*qmoe\.unpatch"):
        experts(torch.randn(3, 64), *routing).sum().backward()


def test_patching_twice_is_refused() -> None:
    model = qmoe.patch(build("qwen3_moe"))
    with pytest.raises(ValueError, match=r"patched already.*unpatch"):
        qmoe.patch(model)


def test_a_dense_model_is_refused() -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "num_experts_per_tok"}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    with pytest.raises(ValueError, match="LlamaForCausalLM holds no experts"):
        qmoe.patch(model)
    with pytest.raises(ValueError, match="not patched"):
        qmoe.unpatch(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_nan_is_named_and_nothing_is_changed(value) -> None:
    model = build("qwen3_moe")
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_proj[5, 3, 7] = value
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.experts\.down_proj\[5\].*NaN or infinity"
    ):
        qmoe.patch(model)
    assert not quantized_modules(model) and getattr(model, "hf_quantizer", None) is None
    assert experts.down_proj.shape == (8, 64, 32)


def test_an_unknown_parameter_of_an_experts_module_is_refused() -> None:
    model = build("qwen3_moe")
    model.model.layers[0].mlp.experts.register_parameter("extra", nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"experts\.extra: an unknown parameter"):
        qmoe.patch(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weights="int3"), "int3.*int8"),
        (dict(activations="fp4"), "fp4.*auto"),
        (dict(weights="fp8", activations="int8"), "'int8' with fp8 weights.*'auto'"),
    ],
)
def test_wrong_options_say_what_works(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        qmoe.patch(build("qwen3_moe"), **options)


class TestLoad:
    def test_quantizes_on_load_or_keeps_16_bit(self, tmp_path) -> None:
        build("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path)
        kept = qmoe.load(tmp_path, device="cpu")
        assert not quantized_modules(kept) and kept.dtype == torch.bfloat16
        quantized = qmoe.load(tmp_path, device="cpu", weights="fp8", dtype="float32")
        assert len(quantized_modules(quantized)) == 2 and quantized.dtype == torch.float32
        quantized.save_pretrained(tmp_path / "fp8")
        again = qmoe.load(tmp_path / "fp8", device="cpu")
        assert torch.equal(logits(again), logits(quantized))
        with pytest.raises(ValueError, match=r"quantized already.*leave weights='int8' out"):
            qmoe.load(tmp_path / "fp8", device="cpu", weights="int8")

    def test_chooses_activations(self, tmp_path) -> None:
        build("qwen3_moe").save_pretrained(tmp_path)
        expected = logits(qmoe.load(tmp_path, device="cpu", weights="int8", activations="int8"))
        qmoe.load(tmp_path, device="cpu", weights="int8").save_pretrained(tmp_path / "int8")
        stored = qmoe.load(tmp_path / "int8", device="cpu", activations="int8")
        assert torch.equal(logits(stored), expected)
        assert not torch.equal(logits(qmoe.load(tmp_path / "int8", device="cpu")), expected)
        with pytest.raises(ValueError, match="'fp8' with int8 weights"):
            qmoe.load(tmp_path / "int8", device="cpu", activations="fp8")
        with pytest.raises(ValueError, match=r"needs 8-bit experts.*weights='int8'"):
            qmoe.load(tmp_path, device="cpu", activations="int8")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(device="gpu"), "device='gpu'"),
            (dict(activations="fp4"), "unknown activations 'fp4'"),
            (dict(dtype="bf17"), "dtype='bf17'"),
            (dict(device="cuda"), "no CUDA GPU"),
        ],
    )
    def test_wrong_options_say_what_works(self, options, message, tmp_path) -> None:
        if options.get("device") == "cuda" and torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        with pytest.raises(ValueError, match=message):
            qmoe.load(tmp_path, **options)

    def test_a_folder_that_is_not_there(self, tmp_path) -> None:
        with pytest.raises(ValueError, match="nowhere: no such folder"):
            qmoe.load(tmp_path / "nowhere")


def test_experts_that_were_taken_apart_are_refused() -> None:
    model = build("qwen3_moe")
    torch.nn.utils.weight_norm(model.model.layers[0].mlp.experts, "down_proj")
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj is no parameter"):
        qmoe.patch(model)
    assert not quantized_modules(model)
