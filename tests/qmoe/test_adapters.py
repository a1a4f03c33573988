"""PEFT's LoRA on experts in 8 bit, beside the same on the 16-bit weights that these stand for.

PEFT is as it comes: `target_parameters` names the weights of the model's own experts.
"""

from __future__ import annotations

import copy
import functools
import io
import sys
from typing import Any

import families
import pytest
import torch
import zoo
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4ForCausalLM
from zoo import TOKENS, ExpertsClass, experts_classes, logits

import qmoe
import qmoe_kernels.low_rank
from qmoe.decoding.decoder import decoder_of
from qmoe.decoding.pieces import find_pieces
from qmoe.experts.quantized import QuantizedExperts, quantized_modules

peft = pytest.importorskip("peft")

CLASSES = experts_classes()
CLOSE = dict(rtol=1e-4, atol=1e-5)
LORA: dict[str, Any] = dict(r=4, lora_alpha=12, init_lora_weights=False, task_type="CAUSAL_LM")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def build(family: str) -> PreTrainedModel:
    if family != "llama4":
        return zoo.build(family)
    torch.manual_seed(0)
    model = Llama4ForCausalLM(
        Llama4TextConfig(
            **zoo.SIZES | {"num_experts_per_tok": 1}, intermediate_size_mlp=32, num_local_experts=4
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.2)
    return model.eval()


@functools.cache
def _quantized(family: str, weights: str) -> PreTrainedModel:
    return qmoe.patch(build(family), weights)


def quantized(family: str, weights: str = "int8", device: str = "cpu") -> PreTrainedModel:
    return copy.deepcopy(_quantized(family, weights)).to(device)


def dequantized(family: str, weights: str = "int8", device: str = "cpu") -> PreTrainedModel:
    """The model's own, with weights that those of `quantized` stand for."""
    return qmoe.unpatch(quantized(family, weights, device))


def targets(model: nn.Module) -> list[str]:
    """The weights of all experts, by the last parts of their names."""
    name, experts = list(quantized_modules(model).items())[-1]
    block = ".".join(name.split(".")[-2:])
    return [f"{block}.{projection}" for projection in experts.adaptable]


def config(family: str, **options: Any) -> Any:
    names = targets(_quantized(family, "int8"))
    own = dict(target_modules=["q_proj", "v_proj"], target_parameters=names)
    return peft.LoraConfig(**LORA | own | options)


def adapt(model: PreTrainedModel, config: Any, *names: str) -> Any:
    """Put adapters with random values onto ``model``, the same each time."""
    torch.manual_seed(1)
    first, *others = names or ("default",)
    adapted = peft.get_peft_model(model, config, adapter_name=first)
    for name in others:
        adapted.add_adapter(name, config)
    return adapted.eval()


def pair(family: str, weights: str = "int8", *names: str, **options: Any) -> tuple[Any, Any]:
    """The same adapters on experts in 8 bit, and on the weights that they stand for."""
    own = config(family, **options)
    return (
        adapt(quantized(family, weights), own, *names),
        adapt(dequantized(family, weights), own, *names),
    )


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ids = TOKENS.to(model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["products", "layer"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Product by product as on a CPU, or by a GPU's operators, in the interpreter."""
    if request.param == "layer":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("kernels are not interpreted where there is a GPU")
        for module in (qmoe.experts.quantized, qmoe_kernels.low_rank):
            monkeypatch.setattr(module, "adapted_moe_supports", lambda *_: True)
    return request.param


class Block(nn.Module):
    """What PEFT needs around an experts module."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


@pytest.mark.parametrize("experts_class", CLASSES, ids=str)
def test_every_experts_class(experts_class: ExpertsClass, by: str) -> None:
    """As PEFT's own on the class itself, for every layout, gate, bias and sentinel."""
    ours = QuantizedExperts.quantized_from(experts_class.build(), "int8")
    layout = ours.layout
    own = copy.deepcopy(ours).restore(torch.float32)
    names = [f"experts.{name}" for name in ours.adaptable]
    options = peft.LoraConfig(
        r=3,
        target_modules=[],
        target_parameters=names,
        **{"lora_alpha": 9, "init_lora_weights": False},
    )
    blocks = [Block(ours), Block(own)]
    if layout.flat:
        options.target_parameters = ["mlp.w1", "mlp.w2"]
        with pytest.raises(ValueError, match="no `target_parameters` found"):
            peft.inject_adapter_in_model(options, blocks[0])
        return
    for block in blocks:
        torch.manual_seed(1)
        peft.inject_adapter_in_model(options, block)
    hidden, topk_ids, topk_weights = zoo.routing(17, zoo.NUM_EXPERTS + layout.num_identity_experts)
    gradient = torch.randn(hidden.shape)
    seen = []
    for block in blocks:
        x = hidden.clone().requires_grad_()
        if not layout.dense:
            output = block.experts(x, topk_ids, topk_weights).view(hidden.shape)
        elif block is blocks[0]:  # see `WeightedInputMoe`
            rows = (x[:, None] * topk_weights[..., None]).flatten(0, 1)
            ones = torch.ones_like(topk_weights).view(-1, 1)
            output = block.experts(rows, topk_ids.view(-1, 1), ones)
            output = output.unflatten(0, (-1, zoo.TOP_K)).sum(1)
        else:
            scores = torch.zeros(len(x), zoo.NUM_EXPERTS).scatter(1, topk_ids, topk_weights)
            rows = x.repeat(zoo.NUM_EXPERTS, 1) * scores.T.reshape(-1, 1)
            output = block.experts(rows).unflatten(0, (zoo.NUM_EXPERTS, -1)).sum(0)
        output.backward(gradient)
        learned = {n: p.grad for n, p in block.named_parameters() if "lora_" in n}
        assert len(learned) == 2 * len(names)
        seen.append([output.detach(), x.grad, *(learned[n] for n in sorted(learned))])
    for actual, expected in zip(*seen, strict=True):
        scale = expected.abs().max()
        assert scale > 0
        torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=2e-5)


FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "llama4"]


class TestWholeModels:
    @pytest.mark.parametrize("weights", ["int8", "fp8"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_outputs_and_gradients(self, family: str, weights: str) -> None:
        ours, theirs = pair(family, weights)
        with ours.disable_adapter():
            assert torch.equal(logits(ours), logits(quantized(family, weights)))
        without = logits(ours.base_model.model.eval())
        torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
        with ours.disable_adapter():
            assert not torch.allclose(logits(ours), without, rtol=0.1, atol=0.1)
        actual, expected = gradients(ours), gradients(theirs)
        assert actual.keys() == expected.keys()
        assert all("lora_" in name for name in actual)
        assert sum(".experts." in name for name in actual) >= 4
        for name, gradient in actual.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_files_are_interchangeable(self, family: str, tmp_path) -> None:
        ours, theirs = pair(family)
        for i, (adapted, others) in enumerate([(ours, dequantized), (theirs, quantized)]):
            adapted.save_pretrained(tmp_path / str(i))
            for options in ({}, {"low_cpu_mem_usage": True}):
                again = peft.PeftModel.from_pretrained(
                    others(family), tmp_path / str(i), **options
                ).eval()
                torch.testing.assert_close(logits(again), logits(adapted), **CLOSE)
        saved = [peft.load_peft_weights(tmp_path / str(i), device="cpu") for i in range(2)]
        assert saved[0].keys() == saved[1].keys()
        assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
    @pytest.mark.parametrize("device", DEVICES)
    def test_devices_and_dtypes(self, device: str, family: str, dtype: torch.dtype) -> None:
        """PEFT keeps its factors in fp32; products are in the dtype of rows."""
        own = config(family)
        ours = adapt(quantized(family, device=device).to(dtype), own)
        theirs = adapt(dequantized(family, device=device).to(dtype), own)
        for name, parameter in ours.named_parameters():
            assert "lora_" not in name or parameter.dtype == torch.float32
        # Rows of a trainable model are never quantized.
        actual, expected = (model.train()(TOKENS.to(device)).logits for model in (ours, theirs))
        # Of fp32, a GPU's matrix products may keep ten bits.
        bound = 2e-3 if dtype == torch.float32 else 0.02
        assert (actual - expected).float().norm() < bound * expected.float().norm()
        learned, expected = gradients(ours), gradients(theirs)
        assert learned.keys() == expected.keys()
        for name, gradient in learned.items():
            assert gradient.dtype == torch.float32
            assert (gradient - expected[name]).norm() < 3 * bound * expected[name].norm(), name

    @pytest.mark.parametrize("autocast", [True, False])
    def test_dtype_of_adapters_is_the_models(self, autocast: bool) -> None:
        model = quantized("gpt_oss").to(torch.float16)
        own = config("gpt_oss", target_modules=[])
        adapted = peft.get_peft_model(model, own, autocast_adapter_dtype=autocast)
        found = {p.dtype for n, p in adapted.named_parameters() if "lora_" in n}
        assert found == {torch.float32 if autocast else torch.float16}
        assert logits(adapted).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_under_autocast(self, dtype: torch.dtype) -> None:
        """A model in fp32, whose rows come in 16 bit from the layers before."""
        ours, theirs = pair("qwen3_moe")
        with torch.autocast("cpu", dtype):
            actual, expected = (logits(model).float() for model in (ours, theirs))
            learned = gradients(ours)
        assert (actual - expected).norm() < 0.02 * expected.norm()
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in learned.values())

    def test_under_autocast_to_the_other_16_bits(self) -> None:
        """Factors of gpt-oss are sorted into gate and up, in a dtype that is not autocast's."""
        ours, theirs = pair("gpt_oss")
        for model in (ours, theirs):
            model.to(torch.bfloat16)
        with torch.autocast("cpu", torch.float16):
            actual, expected = (logits(model).float() for model in (ours, theirs))
        assert (actual - expected).norm() < 0.03 * expected.norm()

    def test_compiled(self, by: str) -> None:
        ours, _ = pair("gpt_oss")
        expected, gradient = logits(ours), gradients(ours)
        compiled = torch.compile(ours, backend="aot_eager")
        torch.testing.assert_close(logits(compiled), expected, **CLOSE)
        ours.zero_grad()
        compiled(input_ids=TOKENS, labels=TOKENS).loss.backward()
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, gradient[name], **CLOSE)

    def test_one_projection_alone(self, by: str) -> None:
        for projection in ("gate_up_proj", "down_proj"):
            ours, theirs = pair(
                "gpt_oss", target_modules=[], target_parameters=[f"mlp.experts.{projection}"]
            )
            torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)

    def test_ranks_scales_and_alphas_of_their_own(self, by: str) -> None:
        patterns = dict(
            rank_pattern={"mlp.experts.gate_up_proj": 2},
            alpha_pattern={"mlp.experts.down_proj": 3},
            use_rslora=True,
        )
        ours, theirs = pair("gpt_oss", **patterns)
        ranks = {m.r["default"] for m in ours.modules() if hasattr(m, "parameter_name")}
        assert ranks == {2, 4}
        torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
        for model in (ours, theirs):
            for module in model.modules():
                if hasattr(module, "set_scale"):
                    module.set_scale("default", 0.25)
        torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)

    @pytest.mark.parametrize(
        ("names", "count"),
        # By the latter it means routers too.
        [(["q_proj", "gate_proj", "up_proj", "down_proj"], 4), ("all-linear", 6)],
    )
    def test_names_of_an_older_transformers(self, names: Any, count: int) -> None:
        """PEFT itself takes them for the experts' weights."""
        with pytest.warns(RuntimeWarning):  # of patterns that name parameters
            ours, theirs = pair("qwen3_moe", target_modules=names, target_parameters=None)
        assert sum(hasattr(m, "parameter_name") for m in ours.modules()) == count
        torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)


class TestSeveral:
    def test_switching_adding_and_deleting(self, by: str) -> None:
        models = pair("gpt_oss", "int8", "one", "two")
        for model in models:
            model.set_adapter("one")
        first = self._same(models)
        for model in models:
            model.set_adapter("two")
        assert not torch.allclose(first, self._same(models), rtol=0.1, atol=0.1)
        for model in models:
            model.base_model.set_adapter(["one", "two"])
        self._same(models)
        actual, expected = map(gradients, models)
        assert sum(".two." in name and ".experts." in name for name in actual) >= 4
        for name, gradient in actual.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
        for model in models:
            model.delete_adapter("two")
            model.set_adapter("one")
        torch.testing.assert_close(self._same(models), first, **CLOSE)

    @staticmethod
    def _same(models: tuple[Any, Any]) -> torch.Tensor:
        ours, theirs = map(logits, models)
        torch.testing.assert_close(ours, theirs, **CLOSE)
        return ours

    def test_unloading_leaves_the_model_as_it_was(self) -> None:
        model = quantized("gpt_oss")
        before, state = logits(model), model.state_dict()
        adapted = adapt(model, config("gpt_oss"))
        assert not torch.allclose(logits(adapted), before, rtol=0.1, atol=0.1)
        plain = adapted.unload()
        assert torch.equal(logits(plain), before)
        assert plain.state_dict().keys() == state.keys()
        assert type(plain.model.layers[0].mlp.experts) is QuantizedExperts
        again = adapt(plain, config("gpt_oss"))
        assert torch.equal(logits(again.unload()), before)

    def test_transformers_own_calls(self, tmp_path) -> None:
        ours, theirs = pair("gpt_oss")
        ours.save_pretrained(tmp_path)
        model = quantized("gpt_oss")
        without = logits(model)
        model.load_adapter(str(tmp_path))
        torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)
        model.disable_adapters()
        assert torch.equal(logits(model), without)
        model.enable_adapters()
        torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)
        model.save_pretrained(tmp_path / "again")  # transformers saves the adapter alone
        again = peft.PeftModel.from_pretrained(dequantized("gpt_oss"), tmp_path / "again").eval()
        torch.testing.assert_close(logits(again), logits(model), **CLOSE)

        added = quantized("gpt_oss")
        torch.manual_seed(1)
        added.add_adapter(config("gpt_oss"))
        torch.testing.assert_close(logits(added.eval()), logits(theirs), **CLOSE)

    def test_copies(self) -> None:
        ours, _ = pair("gpt_oss")
        expected = logits(ours)
        assert torch.equal(logits(copy.deepcopy(ours)), expected)
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(logits(loaded), expected)
        with pytest.raises(ValueError, match=r"qmoe\.merge.*unmerge_adapter\(\) takes out"):
            loaded.merge_adapter()


class TestThatNobodyElseSeesIt:
    """The weights that PEFT is shown are not there for anybody else."""

    def test_parameters(self) -> None:
        experts = quantized("gpt_oss").model.layers[0].mlp.experts
        names = {name for name, _ in experts.named_parameters(recurse=False)}
        assert names == {name for name, _ in experts.named_parameters()} == {*experts._parameters}
        assert len(list(experts.parameters(recurse=False))) == len(names)
        assert not any(name.endswith("_proj") for name in experts.state_dict())
        assert experts.gate_up_proj.isnan().all()  # whoever computes with it sees it at once
        assert experts.gate_up_proj.shape == (4, 64, 64)
        assert experts.gate_up_proj.untyped_storage().nbytes() == 4
        assert not hasattr(experts, "up_proj") and not hasattr(experts, "w1")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtype_follows_the_model(self, dtype: torch.dtype) -> None:
        model = quantized("qwen3_moe")
        experts = model.model.layers[0].mlp.experts
        assert experts.down_proj.dtype == torch.float32
        model.to(dtype)
        assert experts.down_proj.dtype == dtype

    def test_accelerate_moves_it(self) -> None:
        """Its hooks set each of a module's own parameters by name."""
        from accelerate import dispatch_model

        model = quantized("qwen3_moe")
        before = logits(model)
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
        adapted = adapt(model, config("qwen3_moe"))
        assert not torch.equal(logits(adapted), before)
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize("device", DEVICES)
class TestGeneration:
    """qmoe's loop beside transformers' own, on the 16-bit weights that PEFT itself adapts."""

    @staticmethod
    def models(family: str, device: str, *names: str, more: tuple[str, ...] = ()) -> Any:
        ours = families.build(family, device)
        theirs = qmoe.unpatch(copy.deepcopy(ours))
        own = peft.LoraConfig(
            **LORA, target_modules=["o_proj"], target_parameters=[*targets(ours), *more]
        )
        return adapt(families.copy_of(ours), own, *names), adapt(theirs, own, *names)

    @staticmethod
    def check(ours: Any, theirs: Any, *lengths: int) -> list[list[int]]:
        ids, mask = families.prompts(*lengths or (11, 4))
        options = dict(attention_mask=mask.to(ours.device), max_new_tokens=10, do_sample=False)
        ids = ids.to(ours.device)
        expected = theirs.generate(ids, **options).tolist()
        assert ours.generate(ids, custom_generate=qmoe.decode, **options).tolist() == expected
        step = decoder_of(ours.base_model.model).idle[-1]._step
        assert step.trouble is None
        assert (step._graph is not None) == (ours.device.type == "cuda")
        return expected

    @pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
    def test_tokens(self, family: str, device: str) -> None:
        ours, theirs = self.models(family, device)
        text = self.check(ours, theirs)
        with ours.disable_adapter(), theirs.disable_adapter():
            assert self.check(ours, theirs) != text
        assert self.check(ours, theirs) == text
        base = ours.base_model.model
        plain = families.build(family, device)
        assert len(find_pieces(base, ["router"]).forwards) == len(
            find_pieces(plain, ["router"]).forwards
        )

    def test_what_changes_between_calls(self, device: str) -> None:
        """Adapters, their weights and their scales, after a step was kept."""
        ours, theirs = self.models("gpt_oss", device, "one", "two")
        texts = []
        for name in ("one", "two", "one"):
            for model in (ours, theirs):
                model.set_adapter(name)
            texts.append(self.check(ours, theirs))
        assert texts[0] == texts[2] != texts[1]
        for model in (ours, theirs):
            model.base_model.set_adapter(["one", "two"])
        assert self.check(ours, theirs) not in texts
        before = self.check(ours, theirs)
        for model in (ours, theirs):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "experts" in name and "lora_B" in name:
                        parameter.mul_(-1)
        changed = self.check(ours, theirs)
        assert changed != before
        for model in (ours, theirs):
            model.base_model.set_adapter("one")
            for module in model.modules():
                if hasattr(module, "parameter_name"):
                    module.scale_layer(0.0)
        assert self.check(ours, theirs) not in (*texts, changed)

    def test_routers_too(self, device: str) -> None:
        """Whose adapters are PEFT's own."""
        with_router = self.models("qwen3_moe", device, more=("mlp.gate.weight",))
        assert self.check(*with_router) != self.check(*self.models("qwen3_moe", device))

    def test_after_training(self, device: str) -> None:
        """An optimizer's steps between two calls."""
        models = self.models("qwen3_moe", device)
        before = self.check(*models)
        for model in models:
            ids = TOKENS.to(model.device)
            learning = [p for n, p in model.named_parameters() if "lora_" in n]
            for parameter in learning:
                parameter.requires_grad_()
            optimizer = torch.optim.SGD(learning, lr=1.0)
            for _ in range(3):
                optimizer.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
            model.zero_grad()
        assert self.check(*models) != before


class TestTraining:
    @pytest.mark.parametrize("reentrant", [None, False, True])
    def test_learns_as_on_16_bit_weights(self, reentrant: bool | None, by: str, tmp_path) -> None:
        """The Trainer's own loop, from the same start, with and without checkpointed layers."""
        found = []
        for model in pair("gpt_oss"):
            model.train()
            model.enable_input_require_grads()
            arguments = TrainingArguments(
                tmp_path,
                max_steps=4 if by == "products" else 2,  # the interpreter is slow
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                gradient_checkpointing=reentrant is not None,
                gradient_checkpointing_kwargs={"use_reentrant": bool(reentrant)},
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                use_cpu=True,
            )
            rows = [{"input_ids": row, "labels": row} for row in TOKENS.tolist()]
            trainer = Trainer(model, arguments, train_dataset=rows)
            trainer.train()
            found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        ours, theirs = found
        assert ours[-1] < ours[0] - 0.02 * len(ours)
        assert ours == pytest.approx(theirs, rel=1e-3)

    def test_nothing_is_kept_for_factors_that_do_not_learn(self, by: str) -> None:
        ours, _ = pair("qwen3_moe")
        for name, parameter in ours.named_parameters():
            parameter.requires_grad_(".self_attn." in name and "lora_" in name)
        actual = gradients(ours)
        assert actual and all(".self_attn." in name for name in actual)


class TestRefusals:
    def test_merging(self) -> None:
        for safe in (False, True):
            ours, theirs = pair("gpt_oss")
            with pytest.raises(ValueError, match=r"takes no adapter in.*qmoe\.merge"):
                ours.merge_and_unload(safe_merge=safe)
            torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
            ours, theirs = pair("gpt_oss")
            with pytest.raises(ValueError, match=r"takes no adapter in.*qmoe\.merge"):
                ours.merge_adapter(safe_merge=safe)
            torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)

    def test_what_a_refused_merging_leaves(self) -> None:
        """unmerge_adapter() undoes merge_adapter(); what merge_and_unload() took off is gone."""
        before = logits(_quantized("gpt_oss", "int8"))
        ours, _ = pair("gpt_oss")
        with pytest.raises(ValueError, match=r"qmoe\.merge.*unmerge_adapter\(\) takes out"):
            ours.merge_adapter()
        ours.unmerge_adapter()
        torch.testing.assert_close(logits(ours.unload()), before, **CLOSE)
        ours, _ = pair("gpt_oss")
        with pytest.raises(ValueError, match=r"qmoe\.merge.*load this model again") as caught:
            ours.merge_and_unload()
        assert "unmerge_adapter" not in str(caught.value)

    def test_merging_what_experts_have_no_part_of(self) -> None:
        """An adapter of attention alone, beside one of experts that stays as it is."""
        models = [
            adapt(model, config("gpt_oss", target_modules=[]), "experts")
            for model in (quantized("gpt_oss"), dequantized("gpt_oss"))
        ]
        for model in models:
            torch.manual_seed(2)
            model.add_adapter("attention", peft.LoraConfig(**LORA, target_modules=["q_proj"]))
            model.base_model.set_adapter(["experts", "attention"])
            model.eval()
        ours = models[0]
        expected = logits(ours)
        for model in models:
            model.merge_adapter(["attention"])
            assert {m.merged for m in model.modules() if hasattr(m, "parameter_name")} == {False}
        torch.testing.assert_close(logits(ours), expected, **CLOSE)
        with pytest.raises(ValueError, match="takes no adapter in"):
            ours.merge_adapter(["experts"])
        with pytest.raises(ValueError, match="takes no adapter in"):
            ours.merge_adapter()
        plain, other = (model.merge_and_unload(adapter_names=["attention"]) for model in models)
        torch.testing.assert_close(logits(plain), logits(other), **CLOSE)

    @pytest.mark.parametrize("name", ["gate_up_proj_bias", "down_proj_scale", "down_proj_q"])
    def test_other_parameters(self, name: str) -> None:
        own = config("gpt_oss", target_parameters=[f"mlp.experts.{name}"])
        with pytest.raises(ValueError, match=f"{name}.*gate_up_proj and down_proj can be adapted"):
            adapt(quantized("gpt_oss"), own)

    def test_unpatching_and_patching(self) -> None:
        ours, theirs = pair("gpt_oss")
        with pytest.raises(ValueError, match=r"mlp\.experts has an adapter.*unload"):
            qmoe.unpatch(ours.base_model.model)
        assert logits(ours).isfinite().all()
        with pytest.raises(ValueError, match=r"mlp\.experts has an adapter.*merge"):
            qmoe.patch(theirs.base_model.model)

    def test_experts_of_several_ranks(self) -> None:
        from qmoe.experts.adapters import ParamWrapper

        experts = next(iter(quantized_modules(quantized("gpt_oss")).values()))
        experts.share = object()
        with pytest.raises(ValueError, match=r"spread over ranks.*without expert_parallel"):
            ParamWrapper.check(experts, "down_proj")

    def test_another_peft(self, monkeypatch) -> None:
        from peft.tuners.lora.layer import ParamWrapper

        monkeypatch.delattr(ParamWrapper, "get_delta_factors")
        with pytest.raises(ValueError, match=r"another way; install 0\.21\.2"):
            adapt(quantized("gpt_oss"), config("gpt_oss"))

    def test_adapters_of_each_row(self) -> None:
        ours, _ = pair("gpt_oss", "int8", "one", "two")
        with pytest.raises(ValueError, match="mixed adapter batches"):
            ours(TOKENS, adapter_names=["one", "two"])

    def test_weights_that_peft_did_not_find(self) -> None:
        """As with another release of it, which looks for them elsewhere."""
        model = quantized("gpt_oss")
        experts = model.model.layers[0].mlp.experts
        model.peft_config = {"default": config("gpt_oss")}
        for use in (lambda: logits(model),):
            with pytest.raises(ValueError, match=r"adapts model\.layers\.0\.mlp\.experts.*unpatch"):
                use()
        assert isinstance(experts, QuantizedExperts)


class TestPaged:
    @staticmethod
    def paged(**options: Any) -> PreTrainedModel:
        model = zoo.build("qwen3_moe", 64)
        return qmoe.patch(model, hbm_budget=1_100_000, device="cpu", context=32, **options)

    @pytest.mark.parametrize("misses", ["link", "host"])
    def test_outputs(self, misses: str, by: str) -> None:
        """The host, which knows no adapters, leaves all misses to the link."""
        if misses == "host" and not sys.platform.startswith("linux"):
            pytest.skip("shared memory between processor and device needs Linux")
        model = self.paged(misses=misses)
        assert next(iter(quantized_modules(model).values())).paged is not None
        own = qmoe.unpatch(qmoe.patch(zoo.build("qwen3_moe", 64)))
        ours, theirs = (adapt(m, config("qwen3_moe")) for m in (model, own))
        torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
        for tokens in (TOKENS[:1, :1], TOKENS[:1, :2]):
            with torch.no_grad():
                torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, **CLOSE)
        assert qmoe.stats(model).misses > 0 == qmoe.stats(model).host_misses
        qmoe.resize(model, hbm_budget=1_800_000)
        torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)

    def test_training_says_what_to_do(self, by: str) -> None:
        ours = adapt(self.paged(), config("qwen3_moe"))
        with pytest.raises(RuntimeError, match=r"paged experts have no gradient.*hbm_budget"):
            gradients(ours)
