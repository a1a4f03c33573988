"""Each way in which transformers itself generates, on a patched model and on converted files.

What is expected comes from elsewhere: from weights quantized and dequantized inside an unpatched
model, and, for greedy tokens, from whole forward passes without a cache. All in fp32, where the two
differ by rounding alone.
"""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

import qmoe
from qmoe.experts.quantized import quantized_modules
from qmoe_convert.convert import convert
from qmoe_kernels.quantization import dequantize, quantize

PROMPTS = ["Hello", "a much longer prompt, naïve café", "x"]
NEW_TOKENS = 16
GREEDY: dict[str, Any] = dict(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
CLOSE = dict(rtol=1e-3, atol=1e-3)
GPU = pytest.mark.gpu
MESSAGES = [{"role": "user", "content": "def close(self):"}]
CHAT_PROMPT = "<|im_start|>user\ndef close(self):<|im_end|>\n<|im_start|>assistant\n"
TINY_MOE = Path(__file__).resolve().parents[2] / "examples" / "tiny-moe"


@torch.no_grad()
def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, unpatched, on the weights that its INT8 experts stand for."""
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parameter.copy_(dequantize(*quantize(parameter, "int8"), parameter.dtype))
    return model


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int], num_tokens: int = NEW_TOKENS) -> list[int]:
    """New tokens by whole forward passes."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        logits = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
        tokens.append(int(logits.logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def logits(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    """(num_tokens, vocab_size)"""
    return model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def reference(model, device) -> PreTrainedModel:
    return dequantized(copy.deepcopy(model)).to(device)


@pytest.fixture(scope="module")
def expected(reference, prompts) -> list[list[int]]:
    tokens = [greedy(reference, prompt) for prompt in prompts]
    assert all(0 not in new for new in tokens)  # the end of text, where generate() would stop
    return tokens


@pytest.fixture(scope="module")
def resident(model, device) -> PreTrainedModel:
    return qmoe.patch(copy.deepcopy(model)).to(device)


@pytest.fixture(scope="module", params=["resident", "paged"])
def patched(request, model, device) -> PreTrainedModel:
    if request.param == "resident":
        return request.getfixturevalue("resident")
    options = dict(device=device, context=200, batch_size=2)
    with pytest.raises(ValueError, match="smallest that works") as refusal:
        qmoe.patch(copy.deepcopy(model), hbm_budget=1, **options)
    smallest = int(re.search(r"\((\d+) bytes\)", str(refusal.value))[1])
    paged = qmoe.patch(copy.deepcopy(model), hbm_budget=smallest, **options)
    assert all(experts.paged for experts in quantized_modules(paged).values())
    return paged


@pytest.fixture(scope="module")
def batch(prompts, device) -> dict[str, torch.Tensor]:
    """All prompts, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    lengths = torch.tensor([[len(p)] for p in prompts], device=device)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(longest, device=device) >= longest - lengths).long(),
    }


def single(prompt: list[int], device: str | torch.device) -> dict[str, torch.Tensor]:
    ids = torch.tensor([prompt], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def new_tokens(sequences: torch.Tensor) -> list[list[int]]:
    return sequences[:, -NEW_TOKENS:].tolist()


class TestGenerate:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_cache": False},
            {"cache_implementation": "static", "disable_compile": True},
        ],
        ids=["dynamic", "no cache", "static"],
    )
    def test_greedy_in_each_cache(self, patched, reference, prompts, batch, expected, options):
        for prompt, tokens in zip(prompts, expected, strict=True):
            inputs = single(prompt, patched.device)
            assert new_tokens(patched.generate(**inputs, **GREEDY, **options)) == [tokens]
        output = patched.generate(
            **batch, **GREEDY, **options, output_logits=True, return_dict_in_generate=True
        )
        assert new_tokens(output.sequences) == expected
        for row, (prompt, tokens) in enumerate(zip(prompts, expected, strict=True)):
            whole = logits(reference, [*prompt, *tokens])[len(prompt) - 1 : -1]
            torch.testing.assert_close(torch.stack(output.logits)[:, row], whole, **CLOSE)

    def test_compiled(self, resident, prompts, expected):
        """As transformers does by itself with a static cache on a GPU, CUDA graphs included."""
        compiled = copy.deepcopy(resident)
        config = CompileConfig(fullgraph=True)
        if resident.device.type == "cpu":
            config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
            config._compile_all_devices = True
        inputs = single(prompts[0], resident.device)
        options = dict(GREEDY, cache_implementation="static", compile_config=config)
        assert new_tokens(compiled.generate(**inputs, **options)) == [expected[0]]
        assert hasattr(compiled, "_compiled_call")

    def test_beam_search(self, patched, reference, batch):
        options = dict(
            GREEDY,
            num_beams=3,
            num_return_sequences=2,
            length_penalty=0.5,
            output_scores=True,
            return_dict_in_generate=True,
        )
        actual = patched.generate(**batch, **options)
        beams = reference.generate(**batch, **options)
        assert torch.equal(actual.sequences, beams.sequences)
        # Sums of many logarithms: on a GPU with products in another order than the CPU's.
        close = CLOSE if patched.device.type == "cpu" else {"rtol": 5e-3, "atol": 1e-2}
        torch.testing.assert_close(actual.sequences_scores, beams.sequences_scores, **close)
        # It did look further than greedy decoding.
        assert not torch.equal(actual.sequences[::2], reference.generate(**batch, **GREEDY))

    def test_sampling_with_a_seed(self, patched, reference, batch):
        options = dict(
            GREEDY, do_sample=True, temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.2
        )
        texts = []
        for generator, seed in ((reference, 1), (patched, 1), (patched, 2)):
            torch.manual_seed(seed)
            texts.append(new_tokens(generator.generate(**batch, **options)))
        assert texts[0] == texts[1] != texts[2]

    @pytest.mark.parametrize("role", ["target", "assistant"])
    def test_assisted_decoding(self, patched, reference, model, prompts, expected, role):
        draft = copy.deepcopy(model).to(patched.device)  # the 16-bit original
        target, assistant = (patched, draft) if role == "target" else (reference, patched)
        calls = []
        hook = target.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
        try:
            for prompt, tokens in zip(prompts, expected, strict=True):
                inputs = single(prompt, patched.device)
                output = target.generate(**inputs, **GREEDY, assistant_model=assistant)
                assert new_tokens(output) == [tokens]
        finally:
            hook.remove()
        assert len(calls) < len(prompts) * NEW_TOKENS / 2  # most of the draft is accepted


@pytest.mark.parametrize("use_cuda_graph", [False, pytest.param(True, marks=GPU)])
def test_continuous_batching(patched, prompts, expected, use_cuda_graph):
    if use_cuda_graph and patched.device.type == "cpu":
        pytest.skip("a CPU has no graphs")
    if use_cuda_graph and any(experts.paged for experts in quantized_modules(patched).values()):
        pytest.skip("paging copies on streams that transformers' capture does not know")
    config = ContinuousBatchingConfig(
        num_blocks=16,
        max_batch_tokens=16,  # the longest prompt takes several steps
        max_requests_per_batch=2,
        use_cuda_graph=use_cuda_graph,
    )
    attention = patched.config._attn_implementation
    # Of all others transformers makes flash attention where there is a GPU, which knows no fp32.
    patched.set_attn_implementation("paged|eager")
    try:
        outputs = patched.generate_batch(
            prompts * 2,
            generation_config=GenerationConfig(**GREEDY, eos_token_id=0),
            continuous_batching_config=config,
        )
    finally:
        patched.set_attn_implementation(attention)
    assert [output.error for output in outputs.values()] == [None] * len(prompts) * 2
    assert [output.generated_tokens for output in outputs.values()] == expected * 2


def test_pipeline(patched, tokenizer, device, expected):
    generate = pipeline("text-generation", model=patched, tokenizer=tokenizer, device=device)
    outputs = generate(PROMPTS, **GREEDY, return_full_text=False)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]
    assert [output["generated_text"] for (output,) in outputs] == texts


class TestDeviceMap:
    @pytest.mark.parametrize("weights", ["int8", "fp8"])
    @pytest.mark.parametrize("where", ["cpu", "disk"])
    def test_a_patched_model_offloaded_afterwards(
        self, model, device, batch, weights, where, tmp_path
    ):
        import accelerate

        release = tuple(map(int, accelerate.__version__.split(".")[:2]))
        if (weights, where) == ("fp8", "disk") and release < (1, 15):
            pytest.skip("accelerate writes no FP8 to disk before 1.15")
        patched = qmoe.patch(copy.deepcopy(model).to(device), weights)
        resident = patched.generate(**batch, **GREEDY)
        if where == "cpu":
            accelerate.cpu_offload(patched, execution_device=device)
        else:
            accelerate.disk_offload(patched, tmp_path, execution_device=device)
        experts = quantized_modules(patched).values()
        assert all(module.down_proj_q.is_meta for module in experts)
        assert torch.equal(patched.generate(**batch, **GREEDY), resident)
        assert all(module.down_proj_q.is_meta for module in experts)

    @pytest.mark.parametrize(
        ("first", "last"),
        [
            ("cpu", "disk"),
            pytest.param("cuda:0", "cpu", marks=GPU),
            pytest.param("cuda:0", "disk", marks=GPU),
            pytest.param(
                "cuda:0",
                "cuda:1",
                marks=[
                    pytest.mark.multi_gpu,
                    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
                ],
            ),
        ],
    )
    def test_a_checkpoint_on_two_devices(self, model, prompts, first, last, tmp_path):
        patched = qmoe.patch(copy.deepcopy(model))
        patched.save_pretrained(tmp_path)
        names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
        device_map = dict.fromkeys([*names, "model.layers.0"], first) | {"model.layers.1": last}
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        weight = loaded.model.layers[1].mlp.experts.down_proj_q
        assert str(weight.device) == ("meta" if last in ("cpu", "disk") else last)
        inputs = single(prompts[1], first)
        output = loaded.generate(**inputs, **GREEDY)
        assert new_tokens(output) == [greedy(dequantized(copy.deepcopy(model)), prompts[1])]


class TestAdapters:
    """LoRA on the attention; the experts stay what they are."""

    @pytest.fixture
    def adapt(self):
        """Give a copy of a model an adapter, the same each time, that changes its output."""
        peft = pytest.importorskip("peft")

        def adapt(model: PreTrainedModel, scale: float = 0.2) -> Any:
            config = peft.LoraConfig(
                r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
            )
            adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if "lora_" in name:
                        spread = scale if "lora_B" in name else 1.0
                        values = torch.randn(parameter.shape, generator=generator) * spread
                        parameter.copy_(values)
            return adapted

        return adapt

    def test_generates_as_on_dequantized_weights(
        self, adapt, resident, reference, prompts, batch, expected
    ):
        adapted, other = adapt(resident), adapt(reference)
        for prompt in prompts:
            torch.testing.assert_close(logits(adapted, prompt), logits(other, prompt), **CLOSE)
        tokens = [greedy(other, prompt) for prompt in prompts]
        assert new_tokens(adapted.generate(**batch, **GREEDY, eos_token_id=-1)) == tokens
        assert tokens != expected

    def test_without_effect_or_disabled_every_bit_is_the_base_models(
        self, adapt, resident, prompts
    ):
        base = logits(resident, prompts[1])
        assert torch.equal(logits(adapt(resident, scale=0.0), prompts[1]), base)
        adapted = adapt(resident)
        assert not torch.allclose(logits(adapted, prompts[1]), base, rtol=0.1, atol=0.1)
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted, prompts[1]), base)

    def test_merges_and_leaves_quantized_experts(self, adapt, resident, prompts):
        adapted = adapt(resident)
        before = logits(adapted, prompts[1])
        merged = adapted.merge_and_unload()
        assert len(quantized_modules(merged)) == 2
        torch.testing.assert_close(logits(merged, prompts[1]), before, **CLOSE)

    def test_is_saved_alone_and_loaded_by_peft_and_by_transformers(
        self, adapt, resident, prompts, tmp_path
    ):
        import peft

        adapted = adapt(resident)
        after = logits(adapted, prompts[1])
        adapted.save_pretrained(tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 20_000
        again = peft.PeftModel.from_pretrained(copy.deepcopy(resident), tmp_path / "adapter")
        assert torch.equal(logits(again.eval(), prompts[1]), after)

        resident.save_pretrained(tmp_path / "model")
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=resident.device
        )
        loaded.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(logits(loaded, prompts[1]), after)
        loaded.disable_adapters()
        assert torch.equal(logits(loaded, prompts[1]), logits(resident, prompts[1]))

    def test_adapters_learn_as_beside_dequantized_weights(
        self, adapt, resident, reference, prompts
    ):
        adapted, other = adapt(resident), adapt(reference)
        trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in name for name in trained)
        for model in (adapted, other):
            ids = torch.tensor([prompts[1]], device=model.device)
            model(input_ids=ids, labels=ids).loss.backward()
        theirs = dict(other.named_parameters())
        for name in trained:
            ours = adapted.get_parameter(name).grad
            assert ours.abs().sum() > 0
            torch.testing.assert_close(ours.cpu(), theirs[name].grad.cpu(), rtol=2e-3, atol=2e-4)

    def test_routers_learn_as_beside_dequantized_weights(self, resident, reference, prompts):
        name = "model.layers.0.mlp.gate.weight"
        gradients = []
        for model in (resident, reference):
            model = copy.deepcopy(model).requires_grad_(False)
            router = model.get_parameter(name).requires_grad_()
            ids = torch.tensor([prompts[1]], device=model.device)
            model(input_ids=ids, labels=ids).loss.backward()
            gradients.append(router.grad.cpu())
        assert gradients[0].abs().sum() > 0
        torch.testing.assert_close(*gradients, rtol=2e-3, atol=2e-5)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointed_layers_compute_one_function(self, resident, prompts, reentrant):
        """Rows are quantized neither in the pass without gradients nor when it is repeated."""
        seen = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function is torch.ops.qmoe.fused_moe.default:
                    seen.append(args[18])
                return function(*args, **kwargs or {})

        model = copy.deepcopy(resident).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        ids = torch.tensor([prompts[1]], device=model.device)
        with Watch():
            model(input_ids=ids, labels=ids).loss.backward()
        assert set(seen) == {"bf16"} and len(seen) >= 2 * len(quantized_modules(model))

    def test_trains_with_transformers_trainer(self, adapt, resident, prompts, tmp_path):
        adapted = adapt(resident).train()
        adapted.enable_input_require_grads()
        rows = [{"input_ids": prompts[1], "labels": prompts[1]} for _ in range(4)]
        arguments = TrainingArguments(
            tmp_path,
            report_to="none",
            use_cpu=resident.device.type == "cpu",
            num_train_epochs=3,
            per_device_train_batch_size=1,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=True,
        )
        before = {n: p.clone() for n, p in adapted.named_parameters()}
        trainer = Trainer(adapted, arguments, train_dataset=rows)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert losses[-1] < 0.8 * losses[0]
        for name, parameter in adapted.named_parameters():
            assert torch.equal(parameter, before[name]) != ("lora_" in name), name


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """The shipped model with a chat template, its experts converted to INT8."""
    folder = tmp_path_factory.mktemp("converted")
    source = shutil.copytree(TINY_MOE, folder / "source")
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (source / "chat_template.jinja").write_text(template)
    convert(source, folder / "int8", weights="int8")
    return folder / "int8"


@pytest.fixture(scope="module")
def continuation(device):
    """What the shipped model on dequantized weights says after a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32)
    model = dequantized(model).to(device)

    def continuation(prompt: str, num_tokens: int) -> str:
        tokens = greedy(model, tokenizer(prompt)["input_ids"], num_tokens)
        return tokenizer.decode(tokens)

    return continuation


def test_pipeline_of_a_converted_checkpoint(converted, continuation, device):
    generate = pipeline(
        "text-generation", model=str(converted), dtype=torch.float32, device_map=device
    )
    assert len(quantized_modules(generate.model)) == 6
    options = dict(max_new_tokens=24, do_sample=False, return_full_text=False)
    ((completion,), (chat,)) = (
        generate("def close(self):", **options),
        generate(MESSAGES, **options),
    )
    assert completion["generated_text"] == continuation("def close(self):", 24)
    assert chat["generated_text"] == continuation(CHAT_PROMPT, 24)
