"""Budgets, resizing and statistics of whole models, on the CPU's simulated pool."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from zoo import SIZES

import qmoe
from qmoe.experts.quantized import QuantizedExperts
from qmoe.paging import expert_cache, host_store
from qmoe.paging.footprint import _LiveBytes, measure
from qmoe.paging.model import plan_budget, predictors, resize, stats

EXPERTS = 16
PAGE = 3 * 64 * 32  # bytes
MODELS = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=EXPERTS)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=EXPERTS, sliding_window=None)
    ),
    "mixtral with a window": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=EXPERTS, sliding_window=32)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, num_local_experts=EXPERTS, sliding_window=16)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES | {"num_hidden_layers": 3, "num_key_value_heads": 4, "head_dim": 8},
            moe_intermediate_size=32,
            n_routed_experts=EXPERTS,
            n_group=1,
            topk_group=1,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            first_k_dense_replace=1,
        )
    ),
    "qwen3_next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SIZES | {"num_hidden_layers": 4},
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            num_experts=EXPERTS,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
        )
    ),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **SIZES,
            num_local_experts=EXPERTS,
            intermediate_size_mlp=32,
            interleave_moe_layer_step=1,
            attention_chunk_size=16,
        )
    ),
    "granitemoehybrid": lambda: GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **{k: v for k, v in SIZES.items() if k != "head_dim"},
            shared_intermediate_size=32,
            num_local_experts=EXPERTS,
            layer_types=["mamba", "attention"],
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_d_state=16,
            mamba_n_groups=1,
        )
    ),
}
families = pytest.mark.parametrize("family", MODELS)


def build(family: str):
    """A patched model whose experts and attention matter to its output."""
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return qmoe.patch(model)


def layer_pages(model):
    return [
        module.layer_pages(name)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedExperts)
    ]


def smallest(model, **sizes) -> int:
    with pytest.raises(ValueError, match="smallest that works") as caught:
        plan_budget(model, layer_pages(model), 1, "cpu", **sizes)
    return int(re.search(r"\((\d+) bytes\)", str(caught.value))[1])


def tokens(num_tokens: int, batch_size: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(1, SIZES["vocab_size"], (batch_size, num_tokens), generator=generator)


def storage_bytes(value, seen) -> int:
    """Bytes that a cache really holds, found by walking everything that hangs on it."""
    if isinstance(value, torch.Tensor):
        new = value.untyped_storage().data_ptr() not in seen
        seen.add(value.untyped_storage().data_ptr())
        return value.untyped_storage().nbytes() if new else 0
    if isinstance(value, dict):
        return sum(storage_bytes(v, seen) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(storage_bytes(v, seen) for v in value)
    return storage_bytes(vars(value), seen) if hasattr(value, "__dict__") else 0


class TestFootprint:
    @families
    @pytest.mark.parametrize("context", [10, 50, 400])
    def test_kv_cache_is_what_a_model_keeps(self, family, context):
        model = build(family)
        with torch.no_grad():
            cache = None
            for chunk in tokens(context, batch_size=2).split([context - 1, 1], dim=1):
                cache = model(chunk, past_key_values=cache, use_cache=True).past_key_values
        actual = storage_bytes(cache, set())
        predicted = measure(model, layer_pages(model)).kv_cache(context, batch_size=2)
        # A window is kept with one token less: the next one takes its place.
        assert actual <= predicted <= actual + 2 * 256 * SIZES["num_hidden_layers"]

    @families
    def test_a_model_stays_within_cache_and_workspace(self, family):
        model = build(family)
        footprint = measure(model, layer_pages(model))
        context, batch_size = 300, 2
        for chunk in (16, 64, 299):
            ids = tokens(context, batch_size)
            with torch.no_grad(), _LiveBytes() as memory:
                cache = None
                for part in [*ids[:, :-1].split(chunk, dim=1), ids[:, -1:]]:
                    cache = model(part, past_key_values=cache, logits_to_keep=1).past_key_values
            bound = footprint.kv_cache(context, batch_size)
            bound += footprint.workspace(chunk, context, batch_size)
            assert memory.peak <= bound
        assert bound < 12 * memory.peak

    @families
    def test_counts_the_experts_of_a_token(self, family):
        model = build(family)
        experts = len(layer_pages(model))
        assert measure(model, layer_pages(model)).top_k == (2,) * experts

    def test_weights_that_stay(self):
        model = build("deepseek_v3")
        everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        pages = 2 * EXPERTS * PAGE
        assert measure(model, layer_pages(model)).resident == everything - pages
        assert resize(model, hbm_budget="1GiB", context=64).resident == everything
        resize(model, hbm_budget=smallest(model, context=64))
        assert sum(t.nbytes for t in (*model.parameters(), *model.buffers())) == everything - pages

    def test_is_the_same_before_quantizing(self):
        patched = build("gpt_oss")
        model = qmoe.unpatch(copy.deepcopy(patched))
        assert measure(model, layer_pages(patched)) == measure(patched, layer_pages(patched))

    def test_leaves_the_model_as_it_was(self):
        model = build("qwen3_moe")
        expected = model(tokens(20)).logits
        measure(model, layer_pages(model))
        assert torch.equal(model(tokens(20)).logits, expected)
        assert not any("forward" in vars(module) for module in model.modules())

    def test_refuses_what_is_offloaded(self):
        model = build("qwen3_moe")
        model.lm_head.to("meta")
        with pytest.raises(ValueError, match=r"is on cpu, meta.*one device"):
            measure(model, layer_pages(model))


class TestPlan:
    def test_context_is_the_models(self):
        model = build("qwen3_moe")
        model.config.max_position_embeddings = 100
        pages = layer_pages(model)
        assert plan_budget(model, pages, "1GiB", "cpu").context == 100
        assert plan_budget(model, pages, "1GiB", "cpu", batch_size=3).batch_size == 3
        with pytest.raises(ValueError, match="context=101: Qwen3MoeForCausalLM takes 100 tokens"):
            plan_budget(model, pages, "1GiB", "cpu", context=101)
        model.config.max_position_embeddings = 1 << 20
        assert plan_budget(model, pages, "1GiB", "cpu").context == 8192

    def test_larger_contexts_and_batches_cost_more(self):
        model = build("qwen3_moe")
        assert (
            smallest(model, context=64)
            < smallest(model, context=128)
            < smallest(model, context=128, batch_size=2)
        )

    def test_the_device_is_not_exceeded(self):
        model = build("qwen3_moe")
        with pytest.raises(ValueError, match="are free for this model"):
            plan_budget(model, layer_pages(model), "900TiB", "cpu")
        with pytest.raises(ValueError, match="hbm_budget='lots'"):
            plan_budget(model, layer_pages(model), "lots", "cpu")


class TestPredictors:
    @families
    def test_are_the_next_router(self, family):
        model = build(family)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:  # zero in a fresh model
                torch.nn.init.normal_(buffer, std=0.3)
        proposed = predictors(model)
        names = [pages.name for pages in layer_pages(model)]
        assert proposed[-1] is None
        if family == "llama4":  # its experts see hidden states that are weighted already
            assert proposed == [None] * len(names)
            return
        hidden_states = torch.randn(1, 5, SIZES["hidden_size"])
        routed = []
        for predict, following in zip(proposed, names[1:], strict=False):
            experts = model.get_submodule(following)
            hook = experts.register_forward_pre_hook(lambda _, args: routed.append(args[1]))
            with torch.no_grad():
                model.get_submodule(following.rpartition(".")[0])(hidden_states)
            hook.remove()
            ids = predict(hidden_states[0])
            assert ids.shape == (5, 2)
            assert torch.equal(ids.sort().values, routed.pop().long().sort().values)

    def test_an_unknown_router_proposes_nothing(self):
        model = build("qwen3_moe")
        gate = model.model.layers[1].mlp.gate
        gate.other = gate._parameters.pop("weight")
        assert predictors(model) == [None, None]


def state_of(model):
    paged = [m.paged for m in model.modules() if isinstance(m, QuantizedExperts)]
    return getattr(model, "qmoe_paging", None), paged, [id(p) for p in model.parameters()]


class TestResize:
    @families
    def test_every_transition_keeps_every_bit(self, family):
        model = build(family)
        ids = tokens(24, batch_size=2)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

        def run():
            with torch.no_grad():
                return model(ids).logits, model.generate(ids, **options)

        expected = run()
        least = smallest(model, context=64, batch_size=2)
        pages = sum(p.num_experts * p.page_bytes for p in layer_pages(model))
        everything = resize(model, hbm_budget="1GiB", context=64, batch_size=2).resident
        sizes = {"least": least, "some": least + pages // 4, "all": "1GiB"}
        kinds = []
        for step in ("least", "some", "least", "all", "all", "some", "all", "least"):
            budget = resize(model, hbm_budget=sizes[step])
            kinds.append(budget.all_resident)
            assert model.hf_quantizer.is_compileable == budget.all_resident
            for logits, new in (run(), run()):  # cold, then warm
                assert torch.equal(logits, expected[0])
                assert torch.equal(new, expected[1])
            held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
            assert held == (everything if budget.all_resident else everything - pages)
            assert (budget.context, budget.batch_size) == (64, 2)
        assert kinds == [False, False, False, True, True, False, True, False]

    def test_in_the_middle_of_a_generation(self):
        model = build("qwen3_moe")
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(tokens(9), **options)
        least = smallest(model, context=64)
        budgets = iter([least, least + 2 * PAGE, "1GiB", least, least + 3 * PAGE, "1GiB"] * 3)

        class Resizer:
            def put(self, value):
                resize(model, hbm_budget=next(budgets), context=64)

            def end(self):
                pass

        assert torch.equal(model.generate(tokens(9), **options, streamer=Resizer()), expected)

    def test_keeps_what_was_used_last(self):
        model = build("qwen3_moe")
        least = smallest(model, context=64)
        resize(model, hbm_budget=least + 8 * PAGE, context=64)
        model.qmoe_paging.cache.prefetch = False
        with torch.no_grad():
            model(tokens(1))
            before = stats(model)
            resize(model, hbm_budget=least)
            model(tokens(1))
        after = stats(model)
        assert after.num_slots < before.num_slots
        assert after.hits == before.hits + 4  # two experts in each of two layers
        assert after.misses == before.misses

    @pytest.mark.parametrize("start", ["resident", "paged"])
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"hbm_budget": 1000}, "an HBM budget of 1000 bytes is too small; the smallest"),
            ({"hbm_budget": "some"}, "hbm_budget='some'"),
            ({"hbm_budget": "1GiB", "context": 1 << 30}, "context=1073741824"),
            ({"hbm_budget": "1MiB", "batch_size": 1 << 20}, "too small"),
        ],
    )
    def test_a_refusal_changes_nothing(self, start, options, message):
        model = build("qwen3_moe")
        if start == "paged":
            resize(model, hbm_budget=smallest(model, context=64), context=64)
        before, expected = state_of(model), model(tokens(20)).logits
        with pytest.raises(ValueError, match=message):
            resize(model, **options)
        assert state_of(model) == before
        assert torch.equal(model(tokens(20)).logits, expected)

    @pytest.mark.parametrize("start", ["resident", "paged"])
    def test_running_out_of_device_memory_changes_nothing(self, start, monkeypatch):
        model = build("qwen3_moe")
        least = smallest(model, context=64)
        if start == "paged":
            resize(model, hbm_budget=least, context=64)
        expected, paged_before = model(tokens(20)).logits, state_of(model)[1]
        with monkeypatch.context() as patched:
            if start == "paged":
                patched.setattr(QuantizedExperts, "unpage", out_of_memory)
                target = "1GiB"
            else:
                allocate = expert_cache.ExpertCache._allocate
                patched.setattr(
                    expert_cache.ExpertCache,
                    "_allocate",
                    lambda self, slots, staging: (
                        allocate(self, slots, staging) if slots == 1 else out_of_memory()
                    ),
                )
                target = least
            with pytest.raises(torch.OutOfMemoryError):
                resize(model, hbm_budget=target, context=64)
        assert state_of(model)[1] == paged_before
        assert torch.equal(model(tokens(20)).logits, expected)
        resize(model, hbm_budget=target, context=64)  # and it can still be done
        assert torch.equal(model(tokens(20)).logits, expected)

    def test_too_little_host_memory_changes_nothing(self, monkeypatch):
        model = build("qwen3_moe")
        before = state_of(model)
        monkeypatch.setenv(host_store.AVAILABLE_VARIABLE, "0.00001")
        with pytest.raises(ValueError, match="of host memory"):
            resize(model, hbm_budget=smallest(model, context=64), context=64)
        assert state_of(model) == before

    def test_a_paged_model_cannot_be_copied(self):
        model = build("qwen3_moe")
        resize(model, hbm_budget=smallest(model))
        with pytest.raises(TypeError, match="cannot be copied or pickled; load it again"):
            copy.deepcopy(model)

    def test_needs_quantized_experts(self):
        with pytest.raises(ValueError, match=r"call qmoe\.patch\(model\) first"):
            resize(MODELS["qwen3_moe"](), hbm_budget="1GiB")


def out_of_memory(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory")


class TestStats:
    def test_count_what_happened(self):
        model = build("qwen3_moe")
        resize(model, hbm_budget=smallest(model, context=64), context=64)
        with torch.no_grad():
            model(tokens(1))
        counted = stats(model)
        assert counted.hits + counted.misses == 4
        assert counted.num_pages == 2 * EXPERTS
        assert counted.bytes % PAGE == 0 < counted.bytes

    def test_of_a_resident_model_are_refused(self):
        model = build("qwen3_moe")
        with pytest.raises(ValueError, match="Qwen3MoeForCausalLM is resident"):
            stats(model)
        resize(model, hbm_budget="1GiB", context=64)
        with pytest.raises(ValueError, match="is resident"):
            stats(model)
        with pytest.raises(ValueError, match="is not quantized by qmoe"):
            stats(MODELS["qwen3_moe"]())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_gpu_never_holds_more_than_the_budget(attention):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 1024, "num_attention_heads": 16, "head_dim": 64}
    config = Qwen3MoeConfig(
        **sizes | {"vocab_size": 32_000, "num_hidden_layers": 6},
        moe_intermediate_size=256,
        num_experts=64,
        max_position_embeddings=1 << 15,
    )
    model = Qwen3MoeForCausalLM(config).to("cuda", torch.bfloat16).eval()
    model.set_attn_implementation(attention)
    qmoe.patch(model)
    context, batch_size = 3000, 2
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 32_000, (batch_size, context - 10), generator=generator).cuda()
    mask = torch.ones_like(ids)
    mask[1, :700] = 0

    def peak() -> int:
        torch.cuda.synchronize()
        nbytes = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        return nbytes

    def generate(chunk: int) -> torch.Tensor:
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
            prefill_chunk_size=chunk,
        )

    pages = sum(p.num_experts * p.page_bytes for p in layer_pages(model))
    with pytest.raises(ValueError, match="smallest that works") as caught:
        plan_budget(model, layer_pages(model), 1, "cuda", context, batch_size)
    least = int(re.search(r"\((\d+) bytes\)", str(caught.value))[1])
    expected = {}
    total = 1 << 40
    peak()
    for size in (least, least + pages // 3, "2GiB", least, "2GiB"):
        budget = resize(model, hbm_budget=size, context=context, batch_size=batch_size)
        assert peak() <= max(total, budget.total)
        total = budget.total
        assert budget.all_resident == (size == "2GiB")
        # Another chunk is another order of sums: like is compared with like.
        for chunk in {budget.chunk, *(chunk for chunk in expected if chunk < budget.chunk)}:
            generated = generate(chunk)
            assert peak() <= total
            assert torch.equal(generated, expected.setdefault(chunk, generated))
        if not budget.all_resident:
            assert stats(model).bytes > 0
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert torch.cuda.memory_allocated() - before < held + (128 << 20)  # libraries keep theirs
