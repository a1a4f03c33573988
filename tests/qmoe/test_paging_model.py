"""Budgets, resizing and statistics of whole models, on the CPU's simulated pool."""

from __future__ import annotations

import copy
import gc
import os
import random
import re
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from types import MethodType

import pytest
import torch
from torch.utils import _python_dispatch as dispatch
from torch.utils._python_dispatch import TorchDispatchMode
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
from qmoe.experts import quantized
from qmoe.experts.guard import guard_of
from qmoe.experts.quantized import QuantizedExperts
from qmoe.paging import expert_cache, host_store
from qmoe.paging import model as paging_model
from qmoe.paging.footprint import _LiveBytes, measure
from qmoe.paging.model import budget_for, resize, stats
from qmoe.paging.options import PagingOptions

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


def smallest(model, device: str = "cpu", **sizes) -> int:
    with pytest.raises(ValueError, match="smallest that works") as caught:
        budget_for(model, layer_pages(model), PagingOptions(1, **sizes), device)
    return int(re.search(r"\((\d+) bytes\)", str(caught.value))[1])


def measure_once(model, monkeypatch, *sizes) -> None:
    """From now on, `resize` to one of these sizes takes the budget that it is found to be now."""
    found = {size: resize(model, hbm_budget=size, context=64) for size in sizes}
    monkeypatch.setattr(
        paging_model, "budget_for", lambda model, layers, options, device: found[options.hbm_budget]
    )


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
        model.train()
        calls = []
        for module in model.modules():
            module.register_forward_hook(lambda *_: calls.append("hook"))
            module.register_forward_pre_hook(lambda *_: calls.append("hook"))
        attention = model.model.layers[0].self_attn
        attention.forward = MethodType(counts_itself, attention)  # sets itself, as some models do
        before = {name: vars(module).copy() for name, module in model.named_modules()}
        random = torch.get_rng_state()
        measure(model, layer_pages(model))
        assert not calls and torch.equal(torch.get_rng_state(), random)
        assert {name: vars(module) for name, module in model.named_modules()} == before

    @pytest.mark.parametrize("mode", [torch.inference_mode, partial(torch.autocast, "cpu")])
    def test_is_the_same_in_every_mode(self, mode):
        model = build("qwen3_moe")
        expected = measure(model, layer_pages(model))
        with mode():
            assert measure(model, layer_pages(model)) == expected

    def test_an_error_on_the_way_changes_nothing(self):
        model = build("qwen3_moe")
        attention = model.model.layers[1].self_attn
        expected = model(tokens(20)).logits
        attention.forward = MethodType(fails, attention)
        with pytest.raises(ZeroDivisionError):
            measure(model, layer_pages(model))
        del attention.forward
        assert torch.equal(model(tokens(20)).logits, expected)

    def test_keeps_no_weight(self):
        model = build("qwen3_moe")
        weight = weakref.ref(model.lm_head.weight)
        gc.collect()
        gc.disable()
        try:
            measure(model, layer_pages(model))
            del model
            assert weight() is None
        finally:
            gc.enable()

    def test_others_may_run_the_model_meanwhile(self):
        model = build("qwen3_moe")
        expected = [model(tokens(n)).logits for n in (1, 9, 20)]
        expected_footprint = measure(model, layer_pages(model))
        results, footprints = [], []

        def run():
            with torch.no_grad():
                for _ in range(4):
                    results.append([model(tokens(n)).logits for n in (1, 9, 20)])

        def look():
            footprints.extend(measure(model, layer_pages(model)) for _ in range(6))

        in_threads(run, look, run)
        assert len(results) == 8 and len(footprints) == 6
        assert all(map(expected_footprint.__eq__, footprints))
        assert all(torch.equal(a, b) for r in results for a, b in zip(r, expected, strict=True))

    def test_refuses_what_is_offloaded(self):
        model = build("qwen3_moe")
        model.lm_head.to("meta")
        with pytest.raises(ValueError, match=r"is on cpu, meta.*one device"):
            measure(model, layer_pages(model))


class TestBudget:
    def test_context_is_the_models(self):
        model = build("qwen3_moe")
        model.config.max_position_embeddings = 100
        pages = layer_pages(model)
        assert budget_for(model, pages, PagingOptions("1GiB"), "cpu").context == 100
        options = PagingOptions("1GiB", batch_size=3)
        assert budget_for(model, pages, options, "cpu").batch_size == 3
        with pytest.raises(ValueError, match="context=101: Qwen3MoeForCausalLM takes 100 tokens"):
            budget_for(model, pages, PagingOptions("1GiB", context=101), "cpu")
        model.config.max_position_embeddings = 1 << 20
        assert budget_for(model, pages, PagingOptions("1GiB"), "cpu").context == 8192

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
            budget_for(model, layer_pages(model), PagingOptions("900TiB"), "cpu")
        with pytest.raises(ValueError, match="hbm_budget='lots'"):
            budget_for(model, layer_pages(model), PagingOptions("lots"), "cpu")


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

    @pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
    @pytest.mark.parametrize(
        ("start", "target"), [(0, "1GiB"), (0, 4), (4, 0), ("1GiB", 0)], ids=str
    )
    def test_out_of_memory_anywhere(self, start, target, lasting, monkeypatch):
        """At the n-th tensor, for every n: the same bits or one refusal, and it can still be done.

        ``start`` and ``target`` are experts above the smallest budget, or a budget.
        """
        model = build("qwen3_moe")
        least = smallest(model, context=64)
        start, target = (n if isinstance(n, str) else least + n * PAGE for n in (start, target))
        expected = model(tokens(20)).logits
        resize(model, hbm_budget=start, context=64)
        before = state_of(model)
        with pytest.raises(torch.OutOfMemoryError), OutOfMemory(50, lasting):  # while measuring
            resize(model, hbm_budget=target)
        assert state_of(model) == before and torch.equal(model(tokens(20)).logits, expected)
        measure_once(model, monkeypatch, target, start)
        number, refused = 0, 0
        while True:
            model(tokens(20))
            try:
                with OutOfMemory(number, lasting):
                    resize(model, hbm_budget=target)
            except torch.OutOfMemoryError:
                number += 1
            else:
                break
            try:
                assert torch.equal(model(tokens(20)).logits, expected), number
            except RuntimeError as error:
                assert "call qmoe.resize" in str(error)
                refused += 1
            resize(model, hbm_budget=target)
            assert torch.equal(model(tokens(20)).logits, expected), number
            resize(model, hbm_budget=start)
        assert number > 12
        assert refused < number / 2 and (lasting or not refused)

    @pytest.mark.parametrize(("start", "target"), [(0, "1GiB"), (0, 4), ("1GiB", 0)], ids=str)
    def test_an_interrupt_anywhere(self, start, target, monkeypatch):
        """Before every line that changes something: the same bits, and it can still be done."""
        model = build("qwen3_moe")
        least = smallest(model, context=64)
        start, target = (n if isinstance(n, str) else least + n * PAGE for n in (start, target))
        expected = model(tokens(20)).logits
        files = {paging_model.__file__, expert_cache.__file__, quantized.__file__}
        measure_once(model, monkeypatch, start, target)
        resize(model, hbm_budget=start)
        lines = run_lines(lambda: resize(model, hbm_budget=target), files)
        # Each line where it is first run, and where it is last: loops over pages are long.
        first = {line: number for number, line in reversed([*enumerate(lines, 1)])}
        last = {line: number for number, line in enumerate(lines, 1)}
        for number in sorted({*first.values(), *last.values()}):
            resize(model, hbm_budget=start)
            with pytest.raises(KeyboardInterrupt):
                run_lines(lambda: resize(model, hbm_budget=target), files, number)
            assert torch.equal(model(tokens(20)).logits, expected), lines[number - 1]
            resize(model, hbm_budget=target)
            assert torch.equal(model(tokens(20)).logits, expected), lines[number - 1]

    def test_an_interrupt_leaves_none_of_our_modes(self):
        """Before every line of torch's own that puts a mode on its stack or takes it off."""
        model = build("qwen3_moe")
        files = {dispatch.__file__}
        flags = {name: vars(dispatch)[name] for name in vars(dispatch) if name[:7] == "_is_in_"}
        lines = run_lines(lambda: smallest(model), files)
        assert len(lines) > 10
        for number in range(1, len(lines) + 1):
            with pytest.raises(KeyboardInterrupt):
                run_lines(lambda: smallest(model), files, number)
            assert not dispatch._get_current_dispatch_mode_stack(), lines[number - 1]
            assert {name: vars(dispatch)[name] for name in flags} == flags, lines[number - 1]

    def test_interrupts_leave_no_lock_held(self):
        """Ctrl-C at random moments; then other threads do the same."""
        model = build("qwen3_moe")
        least = smallest(model, context=64)
        assert not resize(model, hbm_budget=least, context=64).all_resident
        expected = model(tokens(20)).logits
        draw = random.Random(0)

        def interrupt(*_):
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            for _ in range(60):
                with suppress(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 0.05))
                    try:
                        model(tokens(20))
                        resize(model, hbm_budget=draw.choice([least, least + 4 * PAGE, "1GiB"]))
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.signal(signal.SIGALRM, before)
        logits = []
        in_threads(
            lambda: logits.append(model(tokens(20)).logits), lambda: resize(model, hbm_budget=least)
        )
        assert torch.equal(logits[0], expected)
        assert torch.equal(model(tokens(20)).logits, expected)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_child_process_is_not_locked_out(self):
        """Forked while a thread is in the middle of a layer, which the child never finishes."""
        model = build("qwen3_moe")
        resize(model, hbm_budget=smallest(model, context=64), context=64)
        with torch.no_grad():
            expected = model(tokens(20)).logits
        (cache, layer), *_ = (
            experts.paged for experts in quantized.quantized_modules(model).values()
        )
        inside, done = threading.Event(), threading.Event()

        def compute(*_):
            inside.set()
            done.wait()
            return torch.zeros(1)

        ids, weights = torch.tensor([[0, 1]]), torch.ones(1, 2)
        thread = threading.Thread(target=cache.run, args=(layer, ids, weights, compute))
        thread.start()
        inside.wait()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a child has none of torch's threads, and torch waits for them
        child = os.fork()
        if child == 0:
            with torch.no_grad():
                os._exit(7 if torch.equal(model(tokens(20)).logits, expected) else 1)
        for _ in range(200):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            time.sleep(0.1)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        torch.set_num_threads(threads)
        done.set()
        thread.join()
        assert pid and os.waitstatus_to_exitcode(status) == 7

    def test_while_others_run_the_model(self):
        """Every transition, while two threads generate and one runs plain forwards."""
        model = build("qwen3_moe")
        least = smallest(model, context=64, batch_size=2)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        ids = [tokens(5), tokens(24, 2), tokens(1)]

        def everything():
            with torch.no_grad():
                texts = [
                    model.generate(x, attention_mask=torch.ones_like(x), **options) for x in ids
                ]
                return [*texts, *(model(x).logits for x in ids)]

        expected, results, done = everything(), [], threading.Event()

        def run():
            while not done.is_set():
                results.append(everything())

        def change():
            for size in (least, least + 4 * PAGE, "1GiB", least, "1GiB", least, least) * 2:
                resize(model, hbm_budget=size, context=64, batch_size=2)
            done.set()

        in_threads(run, run, change, end=done.set)
        assert len(results) > 1
        assert all(torch.equal(a, b) for r in results for a, b in zip(r, expected, strict=True))

    def test_waits_for_what_is_queued_under_the_models_lock(self):
        model = build("qwen3_moe")
        guard, version = guard_of(model), guard_of(model).version
        order = []
        thread = threading.Thread(
            target=lambda: (resize(model, hbm_budget="1GiB", context=64), order.append("resized"))
        )
        with guard.lock:
            thread.start()
            thread.join(0.3)
            order.append("step")
        thread.join()
        assert order == ["step", "resized"] and guard.version > version

    def test_under_inference_mode_and_outside(self):
        model = build("qwen3_moe")
        expected = model(tokens(20)).logits
        with torch.inference_mode():
            resize(model, hbm_budget=smallest(model, context=64), context=64)
            assert torch.equal(model(tokens(20)).logits, expected)
        assert torch.equal(model(tokens(20)).logits, expected)
        with torch.inference_mode():
            resize(model, hbm_budget="1GiB")
        assert not any(parameter.is_inference() for parameter in model.parameters())

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


class OutOfMemory(TorchDispatchMode):
    """The device has no memory for the n-th tensor that this thread makes, or none from it on."""

    def __init__(self, number: int, lasting: bool = False) -> None:
        super().__init__()
        self.left, self.lasting = number, lasting

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # What is returned without being an argument, or a view of one.
        self.left -= all(value.alias_info is None for value in func._schema.returns)
        if self.left == -1 or (self.lasting and self.left < 0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return func(*args, **(kwargs or {}))


def run_lines(action, files, interrupt=-1):
    """The lines of some files that ``action`` runs; Ctrl-C before the so-manieth of them."""
    lines = []

    def trace(frame, event, _):
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) == interrupt:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(previous)
    return lines


def in_threads(*functions, end=lambda: None):
    """Run functions at once; the first error of one of them."""
    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(function) for function in functions]
        try:
            for future in as_completed(futures, timeout=300):
                future.result()
        finally:
            end()


def counts_itself(self, *args, **kwargs):
    self.calls = getattr(self, "calls", 0) + 1
    return type(self).forward(self, *args, **kwargs)


def fails(self, *args, **kwargs):
    self.calls = 1 / 0


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
        options = PagingOptions(1, context, batch_size)
        budget_for(model, layer_pages(model), options, "cuda")
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
