"""Paged experts against resident ones, bit for bit, with everything that could go stale poisoned.

`PoisonedCache` is the cache with garbage in every slot that no table names and in every slot that
is about to be copied to: whoever computes with a page that is not there, or not there yet, gets
something else (FP8: NaN). On a GPU copies are slow besides, so that a missing wait is seen; on the
CPU, where streams mean nothing, `Race` follows what the streams would have to wait for.
"""

from __future__ import annotations

import functools
import gc
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

import qmoe
from qmoe.experts.pages import LayerPages
from qmoe.experts.quantized import QuantizedExperts
from qmoe.loading.quantizer import quantized_modules
from qmoe.paging import expert_cache
from qmoe.paging.expert_cache import ExpertCache
from qmoe.paging.host_store import HostStore
from qmoe.paging.stats import LayerStats
from qmoe_kernels.paging import CopyList, admit

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
POISON = 0x7F  # 127 as int8, NaN as float8_e4m3fn
NUM_LAYERS = 3


@pytest.fixture(autouse=True)
def only_with_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


class PoisonedCache(ExpertCache):
    """Garbage wherever no valid page is; on a GPU, copies that are late."""

    late = 200_000  # GPU cycles, about 0.1 ms: longer than a kernel of these models

    def __init__(self, *args: Any, **options: Any) -> None:
        self.ways: set[str] = set()
        super().__init__(*args, **options)

    def _new_pool(self, *args: Any) -> Any:
        pool = super()._new_pool(*args)
        pool.memory.fill_(POISON)
        return pool

    def _fetch(self, pool: Any, layer: int, topk_ids: Tensor, **options: Any) -> None:
        if self.device.type == "cuda":  # one launch, which an admission beside it foretells
            copies, r = CopyList.empty(len(self._copies.slots), self.device), pool.residency
            names = [field.name for field in fields(r)]
            beside = replace(r, **{name: getattr(r, name).clone() for name in names})
            first_page, num_experts = self.host.first_page[layer], len(pool.expert_to_slot[layer])
            admit(topk_ids, layer, first_page, num_experts, beside, copies, **options)
            self._poison(pool, copies)
            self._delay()
        super()._fetch(pool, layer, topk_ids, **options)

    def _gather(self, pool: Any, layer: int) -> None:
        self._poison(pool, self._copies)
        self._delay()
        super()._gather(pool, layer)

    def _poison(self, pool: Any, copies: CopyList) -> None:
        slots = torch.arange(len(copies.slots), device=self.device)
        targets = torch.where(slots < copies.count, copies.slots, self.num_slots)
        stale = torch.zeros(self.num_slots + 1, dtype=torch.bool, device=self.device)
        stale.index_fill_(0, targets.long(), True)
        stale = stale[: self.num_slots] | (pool.residency.slot_to_page < 0)
        pool.memory[: self.num_slots].masked_fill_(stale[:, None], POISON)

    def _admit(self, pool: Any, layer: int, topk_ids: Tensor, **options: Any) -> None:
        self.ways.add("waves" if "experts" in options else "admitted")
        super()._admit(pool, layer, topk_ids, **options)

    def _stage(self, pool: Any, layer: int, group: int, buffer: int) -> Any:
        self.ways.add("streamed")
        first = self.num_slots + buffer * self.num_staging
        with self._runtime.stream(self._copy_stream):
            pool.free[buffer].wait(self._copy_stream)
            pool.memory[first : first + self.num_staging] = POISON
            self._delay()
        return super()._stage(pool, layer, group, buffer)

    def _delay(self) -> None:
        if self.device.type == "cuda":
            torch.cuda._sleep(self.late)


@dataclass
class Paged:
    """A model whose experts are in host memory, and what it computed while they were not."""

    model: PreTrainedModel
    experts: list[QuantizedExperts]
    host: HostStore
    prompts: list[Tensor]
    logits: list[Tensor]
    generated: list[Tensor]

    def cache(self, num_slots: int, num_staging: int = 0, **options: Any) -> PoisonedCache:
        """Page the model's experts with a new cache."""
        sizes = {"num_slots": num_slots, "num_staging": num_staging}
        cache = PoisonedCache(self.host, self.model.device, **sizes, **options)
        for layer, experts in enumerate(self.experts):
            experts.page(cache, layer)
        return cache

    def check(self) -> None:
        """Logits and greedy generation, prompt after prompt."""
        for prompt, logits in zip(self.prompts, self.logits, strict=True):
            assert torch.equal(forward(self.model, prompt), logits), prompt.shape
        for prompt, generated in zip(self.prompts, self.generated, strict=False):
            assert torch.equal(generate(self.model, prompt), generated), prompt.shape
        # A long one again: other pages are resident now.
        assert torch.equal(forward(self.model, self.prompts[4]), self.logits[4])


@torch.no_grad()
def forward(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    return model(prompt.to(model.device)).logits.cpu()


def generate(model: PreTrainedModel, prompt: Tensor, num_tokens: int = 4) -> Tensor:
    prompt = prompt.to(model.device)
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    ).cpu()


@functools.cache
def paged(family: str, weights: str, device: str) -> Paged:
    """Built once for all tests of the family."""
    model = zoo.build(family, num_layers=NUM_LAYERS)
    if device == "cuda":
        model = model.to(torch.bfloat16)
    model = qmoe.patch(model, weights=weights).to(device)
    generator = torch.Generator().manual_seed(0)
    # One token; several; with (2, 20) and (1, 40) there are four pairs per expert and more.
    sizes = [(2, 5), (1, 1), (1, 13), (4, 1), (2, 20), (1, 40)]
    prompts = [torch.randint(1, 96, size, generator=generator) for size in sizes]
    logits = [forward(model, prompt) for prompt in prompts]
    assert all(x.isfinite().all() for x in logits)
    generated = [generate(model, prompt) for prompt in prompts[:1]]
    modules = quantized_modules(model)
    host = HostStore([e.layer_pages(n) for n, e in modules.items()], pin=device == "cuda")
    for layer, experts in enumerate(modules.values()):
        for page, weight in zip(host.weights(layer), experts.quantized_weights(), strict=True):
            page.copy_(weight)
    return Paged(model, list(modules.values()), host, prompts, logits, generated)


# ---- the same bits -----------------------------------------------------------------------------

MODELS = [
    ("qwen3_moe", "int8"),
    ("qwen3_moe", "fp8"),
    ("mixtral", "fp8"),
    ("gpt_oss", "int8"),  # biases
    ("gpt_oss", "fp8"),
]
# num_slots, num_staging: one slot, waves of several, a token's cycle, most, everything and more.
POOLS = [(1, 0), (2, 1), (3, 8), (6, 3), (11, 2), (30, 8)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_paged_equals_resident(model, device) -> None:
    example = paged(*model, device)
    cases = list(itertools.product(POOLS, (False, True)))
    ways = set()
    # The CPU takes every third one, each model others; together they are all there.
    for (num_slots, num_staging), overlap in (
        cases if device == "cuda" else cases[MODELS.index(model) % 3 :: 3]
    ):
        cache = example.cache(num_slots, num_staging, overlap=overlap)
        example.check()
        ways |= cache.ways
    assert ways == {"admitted", "waves", "streamed"}


CLASSES = zoo.experts_classes()


# Flat, biases, identity experts, a norm behind, no gate.
FORMS = ["dbrx", "gpt_oss", "longcat_flash", "muse_spark", "nemotron_h", "openai_privacy_filter"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "experts_class", [c for c in CLASSES if c.model in FORMS], ids=lambda c: c.model
)
def test_forms_of_experts(experts_class, device) -> None:
    check_layer(QuantizedExperts.quantized_from(experts_class.build().to(device), "fp8"), device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_gate_of_its_own(device) -> None:
    (mixtral,) = (c for c in CLASSES if c.model == "mixtral")
    source = mixtral.build().to(device)

    class Odd(type(source)):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return torch.sin(gate) * up

    source.__class__ = Odd
    experts = QuantizedExperts.quantized_from(source, "fp8")
    assert experts.activation is None
    check_layer(experts, device)


@torch.no_grad()
def check_layer(experts: QuantizedExperts, device: str) -> None:
    num_experts = experts.num_experts + experts.layout.num_identity_experts
    calls = []
    for num_tokens in (17, 1, 2):
        hidden, ids, weights = zoo.routing(num_tokens, num_experts, seed=num_tokens)
        ids[-1, 0] = num_experts if not experts.layout.num_identity_experts else num_experts - 1
        calls.append([t.to(device) for t in (hidden, ids, weights)])
    expected = [experts(*call) for call in calls]
    host = HostStore([experts.layer_pages("experts")], pin=device == "cuda")
    for page, weight in zip(host.weights(0), experts.quantized_weights(), strict=True):
        page.copy_(weight)
    for num_slots, num_staging in ((1, 0), (4, 0), (2, 2)):
        experts.page(PoisonedCache(host, device, num_slots=num_slots, num_staging=num_staging), 0)
        for call, output in zip(calls, expected, strict=True):
            assert torch.equal(experts(*call), output)


@pytest.mark.parametrize("device", DEVICES)
def test_llama4_block(device) -> None:
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    from qmoe.experts.quantized import install

    config = Llama4TextConfig(
        hidden_size=zoo.HIDDEN,
        intermediate_size=zoo.INTERMEDIATE,
        intermediate_size_mlp=zoo.INTERMEDIATE,
        num_local_experts=zoo.NUM_EXPERTS,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = nn.ModuleDict({"moe": Llama4TextMoe(config).eval()}).to(device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=zoo.HIDDEN**-0.5)
    experts = QuantizedExperts.quantized_from(model["moe"].experts, "int8")
    install(model, "moe.experts", experts)
    hidden = [torch.randn(2, n, zoo.HIDDEN, device=device) for n in (1, 9)]
    with torch.no_grad():
        expected = [model["moe"](h)[0] for h in hidden]
        host = HostStore([experts.layer_pages("moe.experts")], pin=device == "cuda")
        for page, weight in zip(host.weights(0), experts.quantized_weights(), strict=True):
            page.copy_(weight)
        for num_slots, num_staging in ((1, 0), (3, 2), (6, 6)):
            cache = PoisonedCache(host, device, num_slots=num_slots, num_staging=num_staging)
            experts.page(cache, 0)
            for h, output in zip(hidden, expected, strict=True):
                assert torch.equal(model["moe"](h)[0], output)


@pytest.mark.parametrize("device", DEVICES)
def test_two_models_in_one_process(device) -> None:
    one, other = paged("qwen3_moe", "int8", device), paged("gpt_oss", "fp8", device)
    one.cache(5, 2)
    other.cache(4, 1, overlap=True)
    for i in range(len(one.prompts)):
        assert torch.equal(forward(one.model, one.prompts[i]), one.logits[i])
        assert torch.equal(forward(other.model, other.prompts[-i]), other.logits[-i])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "num_slots, num_staging, overlap", [(6, 0, True), (9, 3, False), (9, 3, True)]
)
def test_several_threads(device, num_slots, num_staging, overlap) -> None:
    """Generations at once on one model, on a GPU each on a stream of its own."""
    example = paged("qwen3_moe", "fp8", device)
    example.cache(num_slots, num_staging, overlap=overlap)
    prompts = [p for p in example.prompts if p.shape[0] < 4]
    results: dict[int, list[Tensor]] = {}
    errors: list[BaseException] = []
    start = threading.Barrier(len(prompts))

    def work(index: int) -> None:
        try:
            stream = torch.cuda.Stream() if device == "cuda" else None
            start.wait()
            with torch.cuda.stream(stream):
                logits = forward(example.model, prompts[index])
                results[index] = [logits, generate(example.model, prompts[index])]
        except BaseException as error:
            errors.append(error)

    for _ in range(2):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        for index, prompt in enumerate(prompts):
            logits, generated = results[index]
            assert torch.equal(logits, forward(example.model, prompt))
            assert torch.equal(generated, generate(example.model, prompt))


# ---- interrupted -------------------------------------------------------------------------------


def interrupt_at(line: int, action: Callable[[], object]) -> bool:
    """Raise KeyboardInterrupt before the so-manieth line that runs in expert_cache.py."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != expert_cache.__file__:
            return None
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
    return False


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "prompt, num_slots, num_staging, overlap, stride",
    [(1, 11, 0, False, 2), (1, 11, 0, True, 3), (3, 3, 0, False, 7), (5, 4, 3, False, 11)],
    ids=["admitted", "overlapped", "waves", "streamed"],
)
def test_an_interrupt_leaves_no_wrong_weights(
    device, prompt, num_slots, num_staging, overlap, stride
) -> None:
    """Ctrl-C anywhere; what comes next is as if nothing had happened."""
    example = paged("qwen3_moe", "fp8", device)
    example.cache(num_slots, num_staging, overlap=overlap)
    prompt, expected = example.prompts[prompt], example.logits[prompt]
    line = 1
    while interrupt_at(line, lambda: forward(example.model, prompt)):
        assert torch.equal(forward(example.model, prompt), expected), line
        forward(example.model, example.prompts[0])  # brings other pages
        line += stride
    assert line > 40


def test_an_error_while_computing_leaves_the_pages_where_they_are() -> None:
    example = paged("qwen3_moe", "fp8", "cpu")
    cache = example.cache(8)
    prompt = example.prompts[1]
    forward(example.model, prompt)
    handle = example.experts[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(example.model, prompt)
    handle.remove()
    before = cache.read_counters()
    assert torch.equal(forward(example.model, prompt), example.logits[1])
    assert cache.read_counters().misses == before.misses


# ---- other sizes -------------------------------------------------------------------------------


def pages_by_claim(cache: ExpertCache) -> list[int]:
    """What is resident, from the page with the smallest claim to the one with the largest."""
    r = cache._pool.residency
    pages = [page for page in r.slot_to_page.tolist() if page >= 0]
    return sorted(pages, key=r.claims.tolist().__getitem__)


def known_of_pages(cache: ExpertCache) -> list[list[int]]:
    r = cache._pool.residency
    return [t.tolist() for t in (r.claims, r.clock, r.last_admitted)]


def counts(cache: ExpertCache) -> tuple[int, int, int]:
    stats = cache.read_counters()
    return stats.hits, stats.misses, stats.bytes


def check_contents(cache: ExpertCache) -> None:
    """Every slot holds the page that the tables say, and has that page's claim."""
    pool = cache._pool
    claims, claims_of_slots = pool.residency.claims, pool.residency.slot_claims.tolist()
    for slot, page in enumerate(pool.residency.slot_to_page.tolist()):
        assert claims_of_slots[slot] == (claims[page] if page >= 0 else 0)
        if page >= 0:
            layer, expert = cache._layer_of(page)
            assert pool.residency.page_to_slot[page] == slot
            expected = cache.host.pages(layer)[expert]
            assert torch.equal(pool.memory[slot, : len(expected)].cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_resize_keeps_the_pages_with_the_largest_claims(device) -> None:
    example = paged("qwen3_moe", "fp8", device)
    cache = example.cache(12, 2)
    prompts = [example.prompts[i] for i in (0, 2, 4)]
    for num_slots, num_staging in ((7, 2), (7, 0), (1, 1), (24, 8), (11, 3), (30, 0)):
        for prompt in prompts:
            forward(example.model, prompt)
        before, counted, known = pages_by_claim(cache), counts(cache), known_of_pages(cache)
        cache.resize(num_slots, num_staging)
        assert known_of_pages(cache) == known
        assert (cache.num_slots, cache.num_staging) == (num_slots, num_staging)
        assert pages_by_claim(cache) == before[-num_slots:] and before
        check_contents(cache)
        assert counts(cache) == counted
        example.check()


@pytest.mark.parametrize("device", DEVICES)
def test_memory_that_is_not_there_leaves_the_old_size(device, monkeypatch) -> None:
    example = paged("qwen3_moe", "fp8", device)
    cache = example.cache(9, 2)
    example.check()
    before, pages = counts(cache), pages_by_claim(cache)
    empty = torch.empty

    def too_little(*shape: int, **options: Any) -> Tensor:
        if shape[0] > 15:
            raise torch.OutOfMemoryError("out of memory")
        return empty(*shape, **options)

    if device == "cpu":
        monkeypatch.setattr(torch, "empty", too_little)
    with pytest.raises(torch.OutOfMemoryError, match=r"for 12 slots.* has 9 slots now"):
        cache.resize(12, 4 if device == "cpu" else 1 << 24)
    monkeypatch.undo()
    assert (cache.num_slots, cache.num_staging) == (9, 2)
    assert pages_by_claim(cache) == pages
    check_contents(cache)
    assert counts(cache) == before
    example.check()
    cache.resize(11, 3)
    example.check()


@pytest.mark.parametrize(("most", "left"), [(7, 4), (1, 1), (0, 0)])
def test_where_the_old_size_is_gone_too_what_fits_is_left(monkeypatch, most, left) -> None:
    """Something else takes the memory between giving it back and taking it again."""
    example = paged("qwen3_moe", "fp8", "cpu")
    cache = example.cache(9, 2)
    example.check()
    new_pool = PoisonedCache._new_pool

    def little(self: Any, residency: Any, num_staging: int) -> Any:
        if len(residency.slot_to_page) + 2 * num_staging > most:
            raise torch.OutOfMemoryError("out of memory")
        return new_pool(self, residency, num_staging)

    with monkeypatch.context() as patch:
        patch.setattr(PoisonedCache, "_new_pool", little)
        with pytest.raises(torch.OutOfMemoryError, match=f"has {left} slots now"):
            cache.resize(12, 4)
    assert cache.num_slots == left
    if left:
        check_contents(cache)
        example.check()
    else:
        with pytest.raises(RuntimeError, match=r"no memory on cpu.*call qmoe\.resize"):
            forward(example.model, example.prompts[0])
        with pytest.raises(RuntimeError, match=r"call qmoe\.resize"):
            cache.take_turn()
        assert cache.num_bytes == 0 and cache.read_counters().misses
    cache.resize(7, 2)
    example.check()


def test_a_size_that_does_not_work_leaves_the_old_one() -> None:
    example = paged("qwen3_moe", "fp8", "cpu")
    cache = example.cache(9, 2)
    with pytest.raises(ValueError, match="num_slots=0"):
        cache.resize(0, 2)
    assert (cache.num_slots, cache.num_staging) == (9, 2)
    example.check()


# ---- counters ----------------------------------------------------------------------------------

LAYERS = [LayerPages(f"layers.{i}", 4, torch.int8, (4, 32), (32, 4)) for i in range(2)]
PAGE_BYTES = 256


def direct_cache(**options: Any) -> ExpertCache:
    """Two layers of four experts without a model around them."""
    host = HostStore(LAYERS, pin=False)
    for layer in range(2):
        host.pages(layer).copy_(torch.randint(0, 256, (4, PAGE_BYTES)))
    options.setdefault("num_staging", 0)
    return ExpertCache(host, "cpu", **options)


def use(cache: ExpertCache, layer: int, ids: list[list[int]]) -> None:
    """Run a layer; what it computes is that its experts are there."""
    host_gate_up, host_down = cache.host.weights(layer)

    def compute(gate_up, down, expert_to_slot, topk_ids, topk_weights) -> Tensor:
        for expert in topk_ids[(topk_ids >= 0) & (topk_ids < 4)].tolist():
            slot = expert_to_slot[expert]
            assert slot >= 0 and torch.equal(gate_up[slot], host_gate_up[expert])
            assert torch.equal(down[slot], host_down[expert])
        return torch.zeros(*topk_ids.shape, 8)

    cache.run(layer, torch.tensor(ids), None, compute)


def test_counters_against_a_count_by_hand() -> None:
    cache = direct_cache(num_slots=4, num_staging=4)
    assert cache.read_counters().hit_rate is None
    use(cache, 0, [[0, 1]])  # slots: 00 01
    use(cache, 1, [[0, 2]])  # 10 12 behind them
    use(cache, 0, [[1, -1], [3, 4]])  # 01 is there, 03 takes the slot of 00
    use(cache, 1, [[0, 1]])  # 10 is there, 11 takes the slot of 12
    stats = cache.read_counters()
    assert (stats.num_slots, stats.num_pages, stats.page_bytes) == (4, 8, (256, 256))
    assert stats.layers == (
        LayerStats(hits=1, misses=3, streamed_bytes=0),
        LayerStats(hits=1, misses=3, streamed_bytes=0),
    )
    assert (stats.hits, stats.misses, stats.hit_rate) == (2, 6, 2 / 8)
    assert stats.bytes == 6 * PAGE_BYTES
    # Sixteen pairs for four experts: streamed. What is in slots stays there.
    slots = cache._pool.residency.slot_to_page.tolist()
    assert slots == [3, 1, 4, 5]
    for layer in range(2):
        use(cache, layer, [[0, 1, 2, 3]] * 4)
    streamed = cache.read_counters()
    assert [layer.streamed_bytes for layer in streamed.layers] == [2 * PAGE_BYTES] * 2
    assert streamed.bytes == stats.bytes + 4 * PAGE_BYTES
    assert (streamed.hits, streamed.misses) == (stats.hits, stats.misses)
    assert cache._pool.residency.slot_to_page.tolist() == slots


def test_counters_can_be_read_while_the_model_runs() -> None:
    example = paged("qwen3_moe", "fp8", "cpu")
    cache = example.cache(6, 2)
    seen, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(cache.read_counters())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for prompt, logits in zip(example.prompts, example.logits, strict=True):
        assert torch.equal(forward(example.model, prompt), logits)
    done.set()
    watcher.join()
    assert seen and all(a.hits <= b.hits for a, b in itertools.pairwise(seen))
    assert cache.read_counters().hits >= seen[-1].hits


# ---- decoding without the host -----------------------------------------------------------------


class Decoder:
    """Greedy decoding on a static KV cache, the same kernels every step; a CUDA graph on a GPU."""

    def __init__(self, model: PreTrainedModel, length: int = 32) -> None:
        config, device = model.config, model.device
        self.model = model
        self.past = StaticCache(config=config, max_cache_len=length)
        heads, width = config.num_key_value_heads, config.head_dim
        self.past.early_initialization(1, heads, width, model.dtype, device)
        self.columns = torch.arange(length, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.input_ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(1, config.vocab_size, dtype=model.dtype, device=device)

    def reset(self) -> None:
        self.past.reset()
        self.position.zero_()
        self.input_ids.fill_(7)

    @torch.no_grad()
    def step(self) -> None:
        output = self.model(
            self.input_ids,
            attention_mask=(self.columns <= self.position)[None, None],
            position_ids=self.position,
            past_key_values=self.past,
            use_cache=True,
        )
        self.logits.copy_(output.logits[:, -1])
        self.input_ids.copy_(self.logits.argmax(-1, keepdim=True))
        self.position.add_(1)

    def capture(self) -> Callable[[], None]:
        if self.model.device.type == "cpu":
            return self.step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.reset()
            self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def run(self, step: Callable[[], None], num_tokens: int = 16) -> Tensor:
        """(num_tokens, vocab_size); whatever makes the host wait for the GPU is an error."""
        self.reset()
        rows = []
        for _ in range(num_tokens):
            with no_synchronization(self.model.device):
                step()
            rows.append(self.logits.clone())
        return torch.cat(rows).cpu()


@contextmanager
def no_synchronization(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_decoding_eagerly_and_by_graph(weights, device) -> None:
    example = paged("qwen3_moe", weights, device)
    decoder = Decoder(example.model)
    for experts, layer in zip(example.experts, range(NUM_LAYERS), strict=True):
        experts.unpage(*(w.clone().to(device) for w in example.host.weights(layer)))
    decoder.reset()
    decoder.step()  # compiles kernels
    expected = decoder.run(decoder.step)
    assert torch.equal(decoder.run(decoder.capture()), expected)
    assert len(expected.argmax(-1).unique()) > 4
    cases = list(itertools.product((1, 2, 6, 11, 24), (False, True)))
    for num_slots, overlap in cases if device == "cuda" else [(6, True)]:
        cache = example.cache(num_slots, overlap=overlap)
        decoder.reset()
        decoder.step()  # compiles kernels
        assert torch.equal(decoder.run(decoder.step), expected)
        replay = decoder.capture()
        assert torch.equal(decoder.run(replay), expected)
        # Eager between replays, on the same stream.
        assert torch.equal(forward(example.model, example.prompts[4]), example.logits[4])
        assert torch.equal(decoder.run(replay), expected)
        check_contents(cache)


@pytest.mark.parametrize("device", DEVICES)
def test_one_thread_replays_while_another_runs_layers(device) -> None:
    """On a GPU each on a stream of its own; the graph takes its turn between two layers."""
    example = paged("qwen3_moe", "fp8", device)
    cache = example.cache(6, 2)
    decoder = Decoder(example.model)
    decoder.reset()
    decoder.step()  # compiles kernels
    replay = decoder.capture()

    def decode() -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream() if device == "cuda" else None):
            decoder.reset()
            rows = []
            for _ in range(16):
                with cache.lock:
                    cache.take_turn()
                    replay()
                rows.append(decoder.logits.clone())
            return torch.cat(rows).cpu()

    expected, done, wrong = decode(), threading.Event(), []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream() if device == "cuda" else None):
            while not done.is_set():
                for prompt, logits in zip(example.prompts, example.logits, strict=True):
                    if not torch.equal(forward(example.model, prompt), logits):
                        wrong.append(prompt.shape)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert all(torch.equal(decode(), expected) for _ in range(4))
    finally:
        done.set()
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_counters_are_read_while_the_gpu_computes() -> None:
    """Reading does not wait for what is queued on the model's stream."""
    example = paged("qwen3_moe", "int8", "cuda")
    cache = example.cache(6, 2)
    forward(example.model, example.prompts[1])
    before = cache.read_counters()
    queued = torch.cuda.Event()
    torch.cuda._sleep(1 << 30)  # half a second
    queued.record()
    assert cache.read_counters() == before
    assert not queued.query(), "it waited"
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_closing_gives_the_memory_back() -> None:
    model = qmoe.patch(zoo.build("qwen3_moe").to(torch.bfloat16)).to("cuda")
    modules = quantized_modules(model)
    prompt = torch.ones(1, 30, dtype=torch.int64)
    forward(model, prompt)
    expected = forward(model, zoo.TOKENS)

    def memory() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    host = HostStore([e.layer_pages(n) for n, e in modules.items()], pin=True)
    weights = []
    for layer, experts in enumerate(modules.values()):
        weights.append([w.cpu() for w in experts.quantized_weights()])
        for page, weight in zip(host.weights(layer), weights[-1], strict=True):
            page.copy_(weight)
        experts.page(None, layer)  # without parameters, and not paged yet
    experts = None
    before = memory()
    cache = ExpertCache(host, "cuda", num_slots=1000, num_staging=100)
    for layer, module in enumerate(modules.values()):
        module.page(cache, layer)
    assert torch.equal(forward(model, zoo.TOKENS), expected)
    forward(model, prompt)
    cache.resize(500, 3)
    forward(model, prompt)
    assert memory() - before > 500 * cache.slot_bytes
    view = host.pages(0)
    assert view.is_pinned()
    cache.close()
    assert memory() - before < 64 << 10 and not view.is_pinned()
    for module, parameters in zip(modules.values(), weights, strict=True):
        module.unpage(*(w.clone() for w in parameters))
    del cache, module
    assert memory() == before
    for module, parameters in zip(modules.values(), weights, strict=True):
        module.unpage(*(w.cuda() for w in parameters))
    assert torch.equal(forward(model, zoo.TOKENS), expected)
