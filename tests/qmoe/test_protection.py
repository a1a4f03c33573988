"""What a model with 8-bit experts refuses, and what of a model patching leaves alone."""

from __future__ import annotations

import copy
import gc
import io
import json
import threading
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeForCausalLM
from zoo import TOKENS, build, logits

import qmoe
from qmoe.experts.guard import guard_of
from qmoe.experts.quantized import quantized_modules

BUDGET = 1_150_000  # in bytes: pages a Qwen3-MoE of 12 experts


def paged() -> PreTrainedModel:
    model = qmoe.patch(build("qwen3_moe", 12), hbm_budget=BUDGET, device="cpu", context=64)
    assert model.qmoe_paging.cache is not None
    return model


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(
        torch.equal(after[n].contiguous().view(torch.uint8), t.contiguous().view(torch.uint8))
        for n, t in before.items()
    )


class TestLoadStateDict:
    @pytest.mark.parametrize("whole", [True, False], ids=["model", "sub-module"])
    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize(
        ("state", "target", "message"),
        [
            ("fp8", "int8", r"down_proj_q|gate_up_proj_q.*float8.*these experts are int8"),
            ("int8", "fp8", "int8.*these experts are fp8"),
            ("int8", "paged", "paged; load it into a model without hbm_budget"),
            ("16 bit", "int8", r"experts\.gate_up_proj is .*these experts are int8"),
            ("other sizes", "int8", r"shape \[8, 64, 64\].*it must have the shape"),
        ],
    )
    def test_another_form_is_refused_before_anything_is_copied(
        self, state, target, message, whole, strict
    ) -> None:
        num_experts = 12 if state != "other sizes" else 8
        torch.manual_seed(1)
        source = build("qwen3_moe", num_experts)
        with torch.no_grad():
            source.model.embed_tokens.weight.add_(1)
        if state != "16 bit":
            qmoe.patch(source, "fp8" if state == "fp8" else "int8")
        model = paged() if target == "paged" else qmoe.patch(build("qwen3_moe", 12), target)
        before = snapshot(model)
        if whole:
            with pytest.raises(ValueError, match=message):
                model.load_state_dict(source.state_dict(), strict=strict)
        else:
            theirs = source.model.layers[1].mlp.experts.state_dict()
            with pytest.raises(ValueError, match=r"these experts are|it must have"):
                model.model.layers[1].mlp.experts.load_state_dict(theirs, strict=strict)
        assert same_bits(model, before)

    def test_a_wrapper_around_the_model_refuses_too(self) -> None:
        model = qmoe.patch(build("qwen3_moe"))
        state = nn.ModuleDict({"inner": qmoe.patch(build("qwen3_moe"), "fp8")}).state_dict()
        with pytest.raises(ValueError, match="these experts are int8"):
            nn.ModuleDict({"inner": model}).load_state_dict(state)

    @pytest.mark.parametrize("assign", [True, False])
    def test_the_same_form_is_loaded(self, assign) -> None:
        other = build("qwen3_moe")
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        qmoe.patch(other)
        model = qmoe.patch(build("qwen3_moe"))
        assert not torch.equal(logits(model), logits(other))
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        assert torch.equal(logits(model), logits(other))
        rest = {k: v for k, v in build("qwen3_moe").state_dict().items() if "experts" not in k}
        model.load_state_dict(rest, strict=False)  # what is no expert's is none of this module's
        paged().load_state_dict(
            {k: v for k, v in build("qwen3_moe", 12).state_dict().items() if "experts" not in k},
            strict=False,
        )

    def test_not_while_text_is_generated(self) -> None:
        model = qmoe.patch(build("qwen3_moe"))
        before, state = snapshot(model), copy.deepcopy(model.state_dict())
        for tensor in state.values():
            tensor.zero_()
        with (
            guard_of(model).generating(),
            pytest.raises(RuntimeError, match="load_state_dict: the model is generating"),
        ):
            model.load_state_dict(state)
        assert same_bits(model, before)


class TestMove:
    def test_a_paged_model_stays_on_its_device(self) -> None:
        model = paged()
        before = {name: p.data_ptr() for name, p in model.named_parameters()}
        for move in (lambda: model.to("meta"), lambda: model.model.layers[0].mlp.to("meta")):
            with pytest.raises(ValueError, match=r"paged on cpu.*cannot move to meta"):
                move()
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
        expected = logits(model)
        assert torch.equal(logits(model.to("cpu")), expected)
        assert model.to(torch.float64).lm_head.weight.dtype == torch.float64

    @pytest.mark.parametrize("make", [paged, lambda: qmoe.patch(build("qwen3_moe"))])
    def test_not_while_text_is_generated(self, make) -> None:
        model = make()
        wrapper = nn.ModuleDict({"inner": model})
        with guard_of(model).generating():
            for change in (
                lambda: model.to(torch.float64),
                model.double,
                lambda: wrapper.to(torch.float64),
                lambda: qmoe.unpatch(model),
                model.dequantize,
            ):
                with pytest.raises(RuntimeError, match="the model is generating text"):
                    change()
        assert {p.dtype for p in model.parameters()} <= {torch.float32, torch.int8}
        plain = build("qwen3_moe")
        with (
            guard_of(plain).generating(),
            pytest.raises(RuntimeError, match=r"qmoe\.patch: the model is generating"),
        ):
            qmoe.patch(plain)

    def test_waits_for_a_step_of_another_thread(self) -> None:
        model = qmoe.patch(build("qwen3_moe"))
        moved = threading.Event()

        def move() -> None:
            model.to(torch.bfloat16)
            moved.set()

        with guard_of(model).lock:
            thread = threading.Thread(target=move)
            thread.start()
            assert not moved.wait(0.2) and model.dtype == torch.float32
        thread.join(10)
        assert moved.is_set() and model.dtype == torch.bfloat16

    def test_the_model_is_freed_without_the_garbage_collector(self) -> None:
        model = qmoe.patch(build("qwen3_moe"))
        logits(model.to(torch.bfloat16))
        gc.collect()
        gc.disable()
        try:
            gone = weakref.ref(model.model.layers[0].mlp.experts)
            del model
            assert gone() is None
        finally:
            gc.enable()

    def test_a_chain_of_calls_on_a_new_model(self) -> None:
        assert qmoe.patch(build("qwen3_moe")).to(torch.bfloat16).eval().dtype == torch.bfloat16


@pytest.mark.parametrize("copied_by", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_a_copy_is_as_the_model_and_its_own(family, copied_by) -> None:
    from test_interrupted_patching import tiny

    model = qmoe.patch(tiny(family))
    if copied_by == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(other), logits(model))
    other.to(torch.bfloat16)
    assert other.dtype == torch.bfloat16 and model.dtype == torch.float32
    with guard_of(model).generating():
        other.to(torch.float32)
    with pytest.raises(ValueError, match="these experts are int8"):
        other.load_state_dict(qmoe.patch(tiny(family), "fp8").state_dict())
    qmoe.unpatch(other)
    assert not quantized_modules(other) and len(quantized_modules(model)) == 2
    assert type(other.model.layers[0]) is type(model.model.layers[0])
    assert "_apply" not in vars(other) and not other._forward_pre_hooks
    assert not other._load_state_dict_pre_hooks


class TestConfig:
    def test_the_callers_object_is_never_written_to(self, tmp_path) -> None:
        config = build("qwen3_moe").config
        before = json.dumps(config.to_dict(), default=str)
        one, other = Qwen3MoeForCausalLM(config).eval(), Qwen3MoeForCausalLM(config).eval()
        qmoe.patch(one)
        assert json.dumps(config.to_dict(), default=str) == before
        assert one.config is not config and other.config is config
        configs = {id(m.config) for m in one.modules() if hasattr(m, "config")}
        assert configs == {id(one.config)}
        other.save_pretrained(tmp_path / "other")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
        assert torch.equal(logits(again), logits(other))
        qmoe.patch(other)
        expected = logits(other)
        qmoe.unpatch(one)
        other.save_pretrained(tmp_path / "patched")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
        assert quantized_modules(again) and torch.equal(logits(again), expected)
        assert not hasattr(config, "quantization_config")

    def test_all_parts_of_a_composite_model_get_the_new_one(self) -> None:
        from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

        text = dict(build("qwen3_moe").config.to_dict())
        text.pop("model_type")
        vision = dict(
            depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64
        )
        config = Qwen3VLMoeConfig(text_config=text, vision_config=vision)
        model = qmoe.patch(Qwen3VLMoeForConditionalGeneration(config))
        assert model.config is not config
        text = {id(m.config) for m in model.model.language_model.modules() if hasattr(m, "config")}
        assert text == {id(model.config.text_config)} and id(config.text_config) not in text
        model.set_attn_implementation("eager")
        assert config.text_config._attn_implementation != "eager"
        assert model.model.language_model.layers[0].self_attn.config._attn_implementation == "eager"

    @pytest.mark.parametrize("form", ["qmoe", "compressed-tensors", "no package"])
    def test_loads_with_the_config_of_a_patched_model(self, form, tmp_path, monkeypatch) -> None:
        from test_quantizer import compressed_tensors_checkpoint

        if form == "no package":
            target = "qmoe.loading.config.is_compressed_tensors_available"
            monkeypatch.setattr(target, lambda: False)
        if form == "qmoe":
            qmoe.patch(build("qwen3_moe")).save_pretrained(tmp_path)
        else:
            compressed_tensors_checkpoint(build("qwen3_moe"), tmp_path, "int8")
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        before = model.config.to_dict()
        again = AutoModelForCausalLM.from_pretrained(tmp_path, config=model.config)
        assert torch.equal(logits(again), logits(model)) and model.config.to_dict() == before
        paging = qmoe.PagingOptions("4GiB", 64)
        if form == "qmoe":
            asked = qmoe.QmoeConfig(paging=paging)
            with pytest.warns(UserWarning, match="loading attributes"):
                AutoModelForCausalLM.from_pretrained(
                    tmp_path, config=model.config, quantization_config=asked, device_map="cpu"
                )
            assert model.config.quantization_config.paging is None and asked.paging is paging


class TestWhatStandsOnExperts:
    def test_training_mode_and_hooks_of_all_kinds_are_taken_over_and_given_back(self) -> None:
        model = build("qwen3_moe")
        experts = model.model.layers[1].mlp.experts
        calls: list[str] = []
        handles = [
            experts.register_forward_pre_hook(lambda m, args: calls.append("pre")),
            experts.register_forward_pre_hook(
                lambda m, args, kwargs: calls.append("pre kwargs"), with_kwargs=True
            ),
            experts.register_forward_hook(lambda m, args, out: calls.append("post")),
            experts.register_forward_hook(
                lambda m, args, kwargs, out: calls.append("post kwargs"),
                with_kwargs=True,
                always_call=True,
            ),
            experts.register_state_dict_post_hook(
                lambda m, state, prefix, meta: calls.append("state")
            ),
        ]
        expected = ["pre", "pre kwargs", "post", "post kwargs"]
        qmoe.patch(model)
        assert not any(m.training for m in model.modules())
        logits(model)
        assert calls == expected
        calls.clear()
        model.state_dict()
        assert calls == ["state"]
        calls.clear()
        handles.pop(0).remove()
        model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda *_: calls.append("new"))
        logits(model)
        assert calls == ["pre kwargs", "new", "post", "post kwargs"]
        calls.clear()
        qmoe.unpatch(model.train())
        assert model.model.layers[1].mlp.experts is experts and experts.training
        logits(model)
        assert calls == ["pre kwargs", "new", "post", "post kwargs"]
        for handle in handles:
            handle.remove()
        assert not experts._forward_hooks and len(experts._forward_pre_hooks) == 1

    def test_what_cannot_be_taken_over_is_refused_before_anything_changes(self) -> None:
        from test_interrupted_patching import tiny

        def own_forward(module: nn.Module) -> None:
            module.forward = lambda *args: args[0]

        def hook(module: nn.Module) -> None:
            module.register_forward_hook(lambda *args: None)

        for family, path, change, message in (
            ("qwen3_moe", "model.layers.1.mlp.experts", own_forward, "forward method of its own"),
            ("llama4", "model.layers.1.feed_forward", own_forward, "forward method of its own"),
            ("llama4", "model.layers.1.feed_forward.experts", hook, "has forward hooks"),
        ):
            model = tiny(family)
            change(model.get_submodule(path))
            with pytest.raises(ValueError, match=message):
                qmoe.patch(model)
            assert not quantized_modules(model) and "hf_quantizer" not in vars(model)


LORA = dict(r=2, task_type="CAUSAL_LM", lora_dropout=0.0)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class TestAdapters:
    def test_on_experts_before_patching(self) -> None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(**LORA, target_modules=[], target_parameters=EXPERTS)
        model = build("qwen3_moe")
        adapted = peft.get_peft_model(model, config)
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts has an adapter.*merge"):
            qmoe.patch(model)
        merged = adapted.merge_and_unload()
        qmoe.patch(merged)  # tests/qmoe/test_adapters.py puts them on afterwards
        assert logits(merged).isfinite().all()

    def test_on_attention_before_and_after_patching(self, tmp_path) -> None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(**LORA, target_modules=["q_proj", "k_proj"])

        def adapt(model: PreTrainedModel) -> nn.Module:
            adapted = peft.get_peft_model(model, config).eval()
            torch.manual_seed(0)
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if "lora_" in name:
                        parameter.copy_(torch.randn(parameter.shape))
            return adapted

        before = adapt(build("qwen3_moe"))
        qmoe.patch(before.base_model.model)
        after = adapt(qmoe.patch(build("qwen3_moe")))
        with torch.no_grad():
            assert torch.equal(before(TOKENS).logits, after(TOKENS).logits)
            after.save_pretrained(tmp_path)
            again = peft.PeftModel.from_pretrained(qmoe.patch(build("qwen3_moe")), tmp_path)
            assert torch.equal(again(TOKENS).logits, after(TOKENS).logits)
        qmoe.unpatch(after.base_model.model)
        merged = after.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(logits(loaded), logits(merged))
