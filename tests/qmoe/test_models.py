"""Every experts class of the installed transformers, quantized, against its own eager forward."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from torch import nn
from transformers import PreTrainedModel

import qmoe
from qmoe.experts.gate import identify_activation
from qmoe.experts.layout import describe, find_experts
from qmoe.experts.quantized import QuantizedExperts, install, quantized_modules

CLASSES = zoo.experts_classes()


@pytest.fixture(params=CLASSES, ids=str, scope="module")
def experts_class(request: pytest.FixtureRequest) -> zoo.ExpertsClass:
    return request.param


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def test_the_discovery_finds_what_transformers_has() -> None:
    """The counts read off the sources; a new release changes them and must be looked at."""
    version = ".".join(transformers.__version__.split(".")[:2])
    decorated = sum(c.decorated for c in CLASSES)
    assert {"5.17": 55, "5.23": 65}.get(version, decorated) == decorated
    assert {c.model for c in CLASSES if not c.decorated} == set(zoo.UNDECORATED)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_output_equals_eager_on_the_dequantized_weights(experts_class, weights) -> None:
    actual, expected, quantized = zoo.outputs(experts_class, weights, device())
    assert quantized.activation is not None, "its gate should be one of the fused ones"
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert expected.norm() > 1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_documented_classes_are_those_that_there_are() -> None:
    document = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," not in document:
        pytest.skip("docs/models.md was generated with another transformers")
    for experts_class in CLASSES:
        assert f"| {experts_class.model} | {experts_class.name} |" in document, "run `make docs`"


def test_restoring_undoes_the_canonical_form(experts_class) -> None:
    experts = experts_class.build()
    layout = describe(experts)
    for projection, names in layout.sources.items():
        tensors = [experts.get_parameter(name).detach() for name in names]
        canonical = layout.canonical(projection, tensors)
        assert canonical.shape == layout.shape(projection) and canonical.is_contiguous()
        for tensor, restored in zip(tensors, layout.restore(projection, canonical), strict=True):
            used = restored.shape[0] if not layout.num_identity_experts else layout.num_experts
            assert torch.equal(restored[:used], tensor[:used]) and restored.shape == tensor.shape


def test_the_sentinel_of_expert_parallelism_is_skipped(experts_class) -> None:
    experts = experts_class.build().to(device())
    layout = describe(experts)
    if layout.dense or layout.num_identity_experts:
        pytest.skip("ids past the experts mean something else here")
    quantized = QuantizedExperts.quantized_from(experts, "int8")
    hidden, topk_ids, topk_weights = (t.to(device()) for t in zoo.routing(17, zoo.NUM_EXPERTS))
    topk_ids[::3, 1] = layout.num_experts
    topk_ids[5] = layout.num_experts
    absent = topk_ids == layout.num_experts
    actual = quantized(hidden, topk_ids, topk_weights)
    expected = quantized(
        hidden, topk_ids.masked_fill(absent, 0), topk_weights.masked_fill(absent, 0)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not actual[5].any() and actual[4].any()


def test_identity_experts_return_their_input() -> None:
    (experts_class,) = (c for c in CLASSES if c.model == "longcat_flash")
    quantized = QuantizedExperts.quantized_from(experts_class.build(), "int8")
    hidden, topk_ids, topk_weights = zoo.routing(5, zoo.NUM_EXPERTS)
    topk_ids[:] = zoo.NUM_EXPERTS + 1
    expected = hidden * topk_weights.sum(-1, keepdim=True)
    torch.testing.assert_close(quantized(hidden, topk_ids, topk_weights), expected)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_llama4_block(weights, top_k) -> None:
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = Llama4TextConfig(
        hidden_size=zoo.HIDDEN,
        intermediate_size=zoo.INTERMEDIATE,
        intermediate_size_mlp=zoo.INTERMEDIATE,
        num_local_experts=zoo.NUM_EXPERTS,
        num_experts_per_tok=top_k,
    )
    torch.manual_seed(0)
    model = nn.ModuleDict({"moe": Llama4TextMoe(config).eval()}).to(device())
    block = model["moe"]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=zoo.HIDDEN**-0.5)
    (name,) = find_experts(model)
    quantized = QuantizedExperts.quantized_from(block.experts, weights)
    restored = copy.deepcopy(quantized).restore(torch.float32)
    hidden = torch.randn(2, 9, zoo.HIDDEN, device=device())
    install(model, name, restored)
    expected, expected_logits = model["moe"](hidden)
    assert model["moe"] is block
    install(model, name, quantized)
    names = [name for name, _ in block.named_children()]
    assert [name for name, _ in model["moe"].named_children()] == names
    actual, logits = model["moe"](hidden)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, expected_logits)
    install(model, name, restored)
    assert model["moe"] is block and block.experts is restored


@pytest.mark.parametrize("model", sorted(zoo.REFUSED))
def test_experts_that_qmoe_does_not_support_are_refused_by_name(model) -> None:
    name = zoo.REFUSED[model]
    stand_in = type(name, (nn.Module,), {})()
    assert hasattr(zoo.ExpertsClass(model, name, False).module, name), "transformers renamed it"
    with pytest.raises(ValueError, match=model):
        find_experts(nn.ModuleDict({"experts": stand_in}))


TEXT = zoo.SIZES | dict(moe_intermediate_size=32, max_position_embeddings=64)


def qwen3_omni_thinker() -> PreTrainedModel:
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configuration
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64)
    audio = dict(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32)
    config = configuration.Qwen3OmniMoeThinkerConfig(
        text_config=TEXT | dict(num_experts=4, rope_parameters=rope),
        vision_config=vision | dict(deepstack_visual_indexes=[]),
        audio_config=audio | dict(num_mel_bins=16, output_dim=64, downsample_hidden_size=16),
    )
    return modeling.Qwen3OmniMoeThinkerForConditionalGeneration(config)


def inkling() -> PreTrainedModel:
    if not hasattr(transformers, "InklingForCausalLM"):
        pytest.skip("this transformers has no Inkling")
    attention = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = transformers.InklingTextConfig(
        **TEXT,
        **{f"swa_{name}": value for name, value in attention.items()},
        d_rel=4,
        rel_extent=16,
        sliding_window_size=8,
        n_routed_experts=4,
        mlp_layer_types=["sparse", "sparse"],
        local_layer_ids=[0],
    )
    return transformers.InklingForCausalLM(config)


@pytest.mark.parametrize("make", [qwen3_omni_thinker, inkling])
def test_a_whole_model_is_patched_saved_and_loaded(make, tmp_path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "16 bit")
    qmoe.patch(model)
    assert len(quantized_modules(model)) == 2
    expected = zoo.logits(model)
    model.save_pretrained(tmp_path / "patched")
    loaded = type(model).from_pretrained(tmp_path / "patched")
    assert torch.equal(zoo.logits(loaded), expected)
    on_load = type(model).from_pretrained(
        tmp_path / "16 bit", quantization_config=qmoe.QmoeConfig()
    )
    assert torch.equal(zoo.logits(on_load), expected)
    on_load.save_pretrained(tmp_path / "again")
    loaded = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(zoo.logits(loaded), expected)
    torch.testing.assert_close(zoo.logits(qmoe.unpatch(loaded)), expected, rtol=1e-4, atol=1e-4)


def test_tied_experts_are_refused_before_anything_changes(tmp_path) -> None:
    if not hasattr(transformers, "DiffusionGemmaForBlockDiffusion"):
        pytest.skip("this transformers has no DiffusionGemma")
    config = transformers.DiffusionGemmaConfig(
        text_config=TEXT | dict(num_experts=4, top_k_experts=2), canvas_length=8
    )
    if config.vision_config is None and transformers.__version__.startswith("5.17"):
        pytest.skip("this transformers builds no DiffusionGemma without a vision tower")
    model = transformers.DiffusionGemmaForBlockDiffusion(config)
    refusal = r"DiffusionGemmaForBlockDiffusion ties its experts .*does not support"
    with pytest.raises(ValueError, match=refusal):
        qmoe.patch(model)
    assert not quantized_modules(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=refusal):
        type(model).from_pretrained(tmp_path, quantization_config=qmoe.QmoeConfig())
    shared = zoo.build("qwen3_moe")
    shared.model.layers[1].mlp.experts = shared.model.layers[0].mlp.experts
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM ties its experts"):
        qmoe.patch(shared)


@pytest.mark.parametrize("model", ["deepseek_v4", "gpt_oss", "step3p7"])
@pytest.mark.parametrize("limit", [7.0, 30.0, 100.0])
@torch.no_grad()
def test_a_gate_s_limit_is_kept_wherever_it_is(model, limit) -> None:
    """What is tried reaches beyond it, else it looks as if there were none."""
    experts = next(c for c in CLASSES if c.model == model).build()
    experts.limit = limit
    quantized = QuantizedExperts.quantized_from(experts, "int8", "bf16")
    hidden, topk_ids, topk_weights = zoo.routing(9, zoo.NUM_EXPERTS)
    hidden *= 20 * limit
    actual = quantized(hidden, topk_ids, topk_weights)
    expected = copy.deepcopy(quantized).restore(torch.float32)(hidden, topk_ids, topk_weights)
    assert (actual - expected).norm() < 1e-4 * expected.norm()
    assert quantized.activation is not None and quantized.activation.limit == limit


def test_an_unknown_gate_is_called_between_the_products() -> None:
    """A class whose gate qmoe has never seen still computes what its author wrote."""
    (mixtral,) = (c for c in CLASSES if c.model == "mixtral")
    experts = mixtral.build()

    class Odd(type(experts)):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return torch.sin(gate) * up

    experts.__class__ = Odd
    assert identify_activation(experts, describe(experts)) is None
    quantized = QuantizedExperts.quantized_from(experts, "int8")
    hidden, topk_ids, topk_weights = zoo.routing(9, zoo.NUM_EXPERTS)
    actual = quantized(hidden, topk_ids, topk_weights)
    gate_up = quantized.gate_up_proj_q * quantized.gate_up_proj_scale[..., None]
    down = quantized.down_proj_q * quantized.down_proj_scale[..., None]
    expected = torch.zeros_like(hidden)
    for token in range(9):
        for k in range(zoo.TOP_K):
            expert = topk_ids[token, k]
            rows = experts_gate = gate_up[expert] @ hidden[token]
            gate, up = experts_gate.chunk(2)
            rows = down[expert] @ (torch.sin(gate) * up)
            expected[token] += topk_weights[token, k] * rows
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
