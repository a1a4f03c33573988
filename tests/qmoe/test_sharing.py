"""Models whose misses the host computes a share of: tokens, threads, failures, what is kept."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import logging
import os
import sys
import threading
import time
import weakref
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_paging_model import MODELS, build, smallest

import qmoe
from qmoe.decoding.graph import capture
from qmoe.experts.quantized import quantized_modules
from qmoe.paging import sharing
from qmoe.paging.model import resize
from qmoe.paging.sharing import share_table
from qmoe_kernels.cpu import native, workers
from qmoe_kernels.mailbox import SERVED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers need Linux")

CONTEXT = 64
# Seconds of one and two misses, by how many of them the host takes.
AS_QUICK = {(m, h): float(m) for m in (1, 2) for h in range(m + 1)}
QUICKER = {(m, h): m - 0.5 * h for m in (1, 2) for h in range(m + 1)}
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch) -> None:
    """Tables of these tests are nobody else's; the machine code is everybody's."""
    folder = tmp_path / "tables"
    monkeypatch.setattr(sharing, "_file", lambda key: folder / f"{key['top_k']}.json")
    sharing._warn_once.cache_clear()
    gc.collect()  # other tests' models, and their threads


def paged(family: str = "qwen3_moe", misses: str | None = "host", **sizes):
    """A model with the smallest budget, and the resident one."""
    resident = build(family)
    model = copy.deepcopy(resident)
    sizes = {"context": CONTEXT, **sizes}
    budget = smallest(copy.deepcopy(resident), **sizes)
    resize(model, hbm_budget=budget, misses=misses, **sizes)
    return model, resident


def decode(model, steps: int = 12) -> torch.Tensor:
    """Logits of a prompt and of the tokens after it, which do not depend on the model."""
    tokens = torch.arange(10, 10 + steps)
    with torch.no_grad():
        out = model(IDS, use_cache=True)
        logits, cache = [out.logits[:, -1]], out.past_key_values
        for token in tokens:
            out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            logits.append(out.logits[:, -1])
    return torch.cat(logits)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("qmoe-host-")]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "qwen3_next"])
def test_logits_are_the_resident_models_within_rounding(family) -> None:
    model, resident = paged(family)
    expected = decode(resident)
    for _ in range(2):
        found = decode(model)
        assert (found - expected).norm() < 1e-4 * expected.norm()
    stats = qmoe.stats(model)
    assert 0 < stats.host_misses < stats.misses, "both served some"
    assert all(layer.host_misses <= layer.misses for layer in stats.layers)
    assert stats.waited_seconds > 0


def test_link_and_host_at_once() -> None:
    """Of several misses each serves some; what the host computes is not copied."""
    model, resident = paged()
    cache = model.qmoe_paging.cache
    resize(model, hbm_budget=model.qmoe_paging.budget.total + 8 * 6144)
    share = cache.sharing.posts.share
    share.copy_((torch.arange(share.shape[1]) + 1) // 2)
    share[:, 1] = 0  # one miss is the link's
    expected = decode(resident)
    for _ in range(2):
        assert (decode(model) - expected).norm() < 1e-4 * expected.norm()
    stats = qmoe.stats(model)
    assert 0 < stats.host_misses < stats.misses
    assert stats.bytes == 6144 * (stats.misses - stats.host_misses)


def test_link_is_the_default_and_exact() -> None:
    model, resident = paged(misses=None)
    assert torch.equal(decode(model), decode(resident))
    stats = qmoe.stats(model)
    assert (stats.host_misses, stats.waited_seconds) == (0, 0) and not threads()


def test_generates_and_serves_several_rows() -> None:
    model, resident = paged(batch_size=3)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [1, 2, 3, 4]])
    mask = torch.ones_like(ids)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), resident.generate(ids, **options))
    assert qmoe.stats(model).host_misses > 0


def test_the_same_state_gives_the_same_bits() -> None:
    model, _ = paged()
    cache = model.qmoe_paging.cache
    found = []
    for _ in range(2):
        cache.forget()
        found.append(decode(model))
    assert torch.equal(*found)


def test_threads_end_with_release_deletion_and_another_way() -> None:
    model, _ = paged()
    decode(model)
    assert threads()
    qmoe.release(model)
    assert not threads()
    decode(model)
    assert threads(), "the next call starts others"
    budget, counted = model.qmoe_paging.budget.total, qmoe.stats(model)
    assert counted.host_misses
    resize(model, hbm_budget=budget, misses="link")
    assert not threads() and model.qmoe_paging.cache.sharing is None
    assert qmoe.stats(model).layers == counted.layers, "what the host did before still counts"
    resize(model, hbm_budget=budget, misses="host")
    decode(model)
    assert qmoe.stats(model).host_misses > counted.host_misses
    resize(model, hbm_budget="1GiB")
    assert model.qmoe_paging.budget.all_resident and not threads()
    resize(model, hbm_budget=budget)
    assert model.qmoe_paging.misses == "host", "as it was asked for"
    decode(model)
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None and not threads()


def test_the_host_goes_on_after_a_resize() -> None:
    model, _ = paged()
    decode(model, 40)
    budget = model.qmoe_paging.budget.total
    for pages in (2, 0):
        before = qmoe.stats(model).host_misses
        resize(model, hbm_budget=budget + pages * 6144)
        decode(model)
        assert qmoe.stats(model).host_misses > before


def test_gradients_of_routers_alone_are_not_lost_either() -> None:
    model, _ = paged()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("mlp.gate.weight"))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="paged experts have no gradient"):
        model(IDS[:, :1]).logits.sum().backward()


def test_gradients_are_not_lost_without_a_word() -> None:
    model, _ = paged()
    with torch.enable_grad():
        loss = model(IDS[:, :1]).logits.sum()
    assert qmoe.stats(model).host_misses == 0
    with pytest.raises(Exception, match=r"autograd|backward|grad"):
        loss.backward()


def test_scales_that_change_reach_the_host() -> None:
    model, resident = paged()
    decode(model)
    for either in (model, resident):
        for experts in quantized_modules(either).values():
            experts.down_proj_scale.mul_(1.5)
    expected = decode(resident)
    assert (decode(model) - expected).norm() < 1e-4 * expected.norm()


def test_biases_that_a_cast_rounds_reach_the_host() -> None:
    """torch casts through ``.data``, and the memory may be the old one again."""
    model, resident = paged("gpt_oss")
    decode(model)
    for either in (model, resident):
        either.to(torch.bfloat16).to(torch.float32)
    expected = decode(resident)
    assert (decode(model) - expected).norm() < 1e-4 * expected.norm()


def test_a_worker_that_hangs_is_an_error_and_then_the_link(monkeypatch) -> None:
    model, resident = paged()
    decode(model)
    cache = model.qmoe_paging.cache
    shared = cache.sharing
    shared._seconds = 0.05
    # As if the leader had seen nothing: posts go to another word.
    store = workers.store_word
    monkeypatch.setattr(
        workers,
        "store_word",
        lambda w, word, value: word == workers.POSTED or store(w, word, value),
    )
    with pytest.raises(RuntimeError, match=r"within 0.05 s.*misses='link'"):
        decode(model)
    monkeypatch.undo()
    assert not threads() and not shared.working
    assert torch.equal(decode(model), decode(resident)), "all over the link"


def test_ctrl_c_in_the_middle_of_an_exchange(monkeypatch) -> None:
    model, resident = paged()
    expected = decode(resident)
    decode(model)
    wait = workers.wait_for_answer
    calls = 0

    def interrupt(*args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return wait(*args)

    monkeypatch.setattr(workers, "wait_for_answer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode(model)
    assert (decode(model) - expected).norm() < 1e-4 * expected.norm()


def test_ctrl_c_when_the_last_thread_has_started_leaves_one_team(monkeypatch) -> None:
    """Two teams at one mailbox would answer each other's posts."""
    model, resident = paged()
    start = workers.Team.start

    def cut_off(team) -> None:
        start(team)
        raise KeyboardInterrupt

    model.qmoe_paging.cache.stop_workers()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr(workers.Team, "start", cut_off)
        decode(model)
    expected = decode(resident)
    assert (decode(model) - expected).norm() < 1e-4 * expected.norm()
    assert len([name for name in threads() if name.endswith("lead")]) == 1
    assert caught.traceback, "it holds what was cut off"


def test_two_threads_and_two_models() -> None:
    models = [paged()[0] for _ in range(2)]
    expected = decode(build("qwen3_moe"))
    wrong = []

    def use(model) -> None:
        for _ in range(3):
            off = (decode(model) - expected).norm() / expected.norm()
            if not off < 1e-4:
                wrong.append(off)

    users = [threading.Thread(target=use, args=(model,)) for model in models * 2]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert not wrong


def test_a_forked_child_has_workers_of_its_own() -> None:
    model, resident = paged()
    expected = decode(resident)
    decode(model)
    if not (child := os.fork()):
        off = (decode(model) - expected).norm() / expected.norm()
        os._exit(0 if off < 1e-4 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (decode(model) - expected).norm() < 1e-4 * expected.norm()


# ---- on a GPU ----------------------------------------------------------------------------------


def paged_on_gpu(misses: str, seconds: float | None = None):
    """As `paged`; greedy tokens of both models are those of steps that qmoe captures."""
    resident = build("qwen3_moe").to("cuda")
    model = copy.deepcopy(resident)
    budget = smallest(model, "cuda", context=CONTEXT)
    resize(model, hbm_budget=budget, context=CONTEXT, misses=misses)
    if seconds is not None:
        model.qmoe_paging.cache.sharing._seconds = seconds
    return model, resident


def tokens_of(model) -> torch.Tensor:
    options = {"max_new_tokens": 24, "do_sample": False, "custom_generate": qmoe.decode}
    return model.generate(IDS.to("cuda"), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("misses", ["link", "host", "auto"])
def test_captured_steps_give_the_resident_models_tokens(misses) -> None:
    model, resident = paged_on_gpu(misses)
    expected = tokens_of(resident)
    for _ in range(3):
        assert torch.equal(tokens_of(model), expected)
    host_misses = qmoe.stats(model).host_misses
    assert misses == "auto" or (host_misses > 0) == (misses == "host")


@pytest.mark.gpu
@pytest.mark.parametrize("twice", [False, True])
def test_slots_hold_their_pages_after_replays(twice) -> None:
    """Captured layers, one of them twice; what is in each slot afterwards."""
    model, resident = paged_on_gpu("host")
    cache, config = model.qmoe_paging.cache, model.config
    layers = [*quantized_modules(model).values()]
    same = [*quantized_modules(resident).values()]
    order = [*range(len(layers)), *([0] if twice else [])]
    generator = torch.Generator("cuda").manual_seed(0)
    size = (1, config.hidden_size)
    x = torch.randn(size, device="cuda", generator=generator).to(model.dtype)
    weights = torch.full((1, config.num_experts_per_tok), 0.5, device="cuda")
    ids = torch.zeros(1, config.num_experts_per_tok, dtype=torch.int64, device="cuda")

    def step() -> list[torch.Tensor]:
        return [layers[i]._fused_moe(x, ids, weights) for i in order]

    with torch.no_grad():
        step()
        outputs: list[torch.Tensor] = []
        graph = capture(lambda: outputs.extend(step()), torch.device("cuda"))
        for _ in range(20):
            experts = torch.randperm(config.num_experts, device="cuda", generator=generator)
            ids.copy_(experts[None, : ids.shape[1]])
            for _ in range(2):
                with cache.lock:
                    cache.take_turn()
                    graph.replay()
                torch.cuda.synchronize()
                cache.check_answers()
                for i, output in zip(order, outputs, strict=True):
                    expected = same[i]._fused_moe(x, ids, weights)
                    off = (output - expected).float().norm() / expected.float().norm()
                    assert off < 0.02
                for slot, page in enumerate(cache._pool.residency.slot_to_page.tolist()):
                    if page >= 0:
                        layer, expert = cache._layer_of(page)
                        source = cache.host.pages(layer)[expert]
                        assert torch.equal(cache._pool.memory[slot, : len(source)].cpu(), source)
    assert qmoe.stats(model).host_misses > 0


@pytest.mark.gpu
def test_calibration_does_not_wake_torchs_threads() -> None:
    """They would spin on the cores of the workers that are timed; from 3000 slots on they did."""
    pages = SimpleNamespace(
        layers=48 * [SimpleNamespace(num_experts=128)], first_page=tuple(range(0, 6144, 128))
    )
    cache = SimpleNamespace(host=pages, num_slots=4096, num_pages=6144, device=torch.device("cuda"))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = others_ns()
        torch.arange(9000)[torch.arange(8000)]
        time.sleep(0.1)
        assert others_ns() - before > 10_000, "this is how they are woken"
        sharing._case(cache, 5, 1, 8, 1, 0)
        before = others_ns()
        for turn in range(8):
            sharing._case(cache, 5, 1, 8, 1, turn)
        time.sleep(0.1)
        assert others_ns() - before < 1_000_000
    finally:
        torch.set_num_threads(num_threads)


def others_ns() -> int:
    """Processor time of threads that torch started."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


@pytest.mark.gpu
def test_a_captured_step_without_workers_ends_and_goes_on_with_the_link() -> None:
    model, resident = paged_on_gpu("host", seconds=0.3)
    expected = tokens_of(resident)
    assert torch.equal(tokens_of(model), expected)
    shared = model.qmoe_paging.cache.sharing
    # The threads end and nobody starts others: as if they hung.
    workers.store_word(shared._mailbox.words, workers.STOP, 1)
    shared._start = lambda: None
    # If it is seen before a token was given out, transformers' loop begins anew, over the link.
    with contextlib.suppress(RuntimeError):
        assert torch.equal(tokens_of(model), expected)
    assert not shared.working
    assert torch.equal(tokens_of(model), expected)


# ---- what is refused ---------------------------------------------------------------------------


def test_refusals() -> None:
    with pytest.raises(ValueError, match="misses='disk'; use one of 'link', 'host', 'auto'"):
        qmoe.PagingOptions("1GiB", misses="disk")
    with pytest.raises(ValueError, match="misses='host' has no effect without hbm_budget"):
        qmoe.load("examples/tiny-moe", weights="int8", misses="host")
    with pytest.raises(ValueError, match="misses='host' goes with activations='auto' or 'bf16'"):
        qmoe.load("examples/tiny-moe", weights="int8", hbm_budget="1GiB", misses="host",
                  activations="int8")  # fmt: skip


def test_a_gate_of_its_own_is_refused_or_left_to_the_link(monkeypatch, caplog) -> None:
    resident = build("qwen3_moe")
    for experts in quantized_modules(resident).values():
        experts.activation = None
    budget = smallest(copy.deepcopy(resident), context=CONTEXT)
    model = copy.deepcopy(resident)
    with pytest.raises(ValueError, match=r"misses='host': .*gate.*misses='link' works"):
        resize(model, hbm_budget=budget, context=CONTEXT, misses="host")
    assert torch.equal(decode(model), decode(resident)), "as it was"
    with caplog.at_level(logging.WARNING):
        resize(model, hbm_budget=budget, context=CONTEXT, misses="auto")
    assert "leaves all misses to the link" in caplog.text
    assert torch.equal(decode(model), decode(resident))


def test_without_native_loops(monkeypatch, caplog) -> None:
    monkeypatch.setitem(native._loaded, "workers", None)
    resident = build("qwen3_moe")
    budget = smallest(copy.deepcopy(resident), context=CONTEXT)
    with pytest.raises(ValueError, match="misses='host': it needs the native loops"):
        resize(resident, hbm_budget=budget, context=CONTEXT, misses="host")


# ---- how many ----------------------------------------------------------------------------------


def test_share_table_takes_the_quickest_and_no_small_gain() -> None:
    times = {
        (1, 0): 100, (1, 1): 98,  # no gain worth the price
        (2, 0): 200, (2, 1): 120, (2, 2): 150,
        (4, 0): 400, (4, 1): 300, (4, 2): 210, (4, 3): 210, (4, 4): 300,
    }  # fmt: skip
    # Of what is as quick the most; of 3 and of 5 to 8 as of 4.
    assert share_table(times, 8) == [0, 0, 1, 2, 3, 4, 4, 5, 6]
    assert share_table({}, 3) == [0, 0, 0, 0]
    assert share_table({(1, 0): 100, (1, 1): 99.5, (2, 0): 200, (2, 1): 99.5, (2, 2): 100}, 2) == [
        *(0, 0, 2)
    ]


def test_auto_measures_once_and_keeps_it(monkeypatch) -> None:
    measured = []

    def measure(*args):
        measured.append(args)
        return [QUICKER, QUICKER]

    monkeypatch.setattr(sharing, "_measure", measure)
    for _ in range(2):
        model, resident = paged(misses="auto")
        share = model.qmoe_paging.cache.sharing.posts.share.tolist()
        assert share == 2 * [list(range(len(share[0])))]
    assert len(measured) == 1
    expected = decode(resident)
    assert (decode(model) - expected).norm() < 1e-4 * expected.norm()
    assert qmoe.stats(model).host_misses > 0


@pytest.mark.parametrize(
    "content",
    ["", "{}", '{"key": 1, "share": [[0], [0]]}', '{"key": 1, "share": [0]}', "[1, 2]", "foreign"],
)
def test_a_broken_or_foreign_table_is_not_used(content, monkeypatch, caplog) -> None:
    monkeypatch.setattr(sharing, "_measure", lambda *args: [QUICKER, QUICKER])
    model, _ = paged(misses="auto")
    file = sharing._file({"top_k": model.config.num_experts_per_tok})
    if content == "foreign":
        content = json.loads(file.read_text())
        content["key"]["gpu"] = "another"
        content["share"] = [[0] * len(table) for table in content["share"]]
        content = json.dumps(content)
    file.write_text(content)
    with caplog.at_level(logging.WARNING):
        model, _ = paged(misses="auto")
    assert "is not used, and measured anew" in caplog.text
    assert model.qmoe_paging.cache.sharing.posts.share.any()


def test_nothing_is_kept_of_a_host_that_was_given_up(monkeypatch) -> None:
    monkeypatch.setattr(sharing, "_measure", lambda *args: [QUICKER, QUICKER])
    model, resident = paged(misses="auto")
    file = sharing._file({"top_k": model.config.num_experts_per_tok})
    file.unlink()
    shared = model.qmoe_paging.cache.sharing
    shared._give_up()
    monkeypatch.setattr(sharing, "_measure", lambda *args: [AS_QUICK, AS_QUICK])  # all by the link
    resize(model, hbm_budget=model.qmoe_paging.budget.total)
    assert not file.exists() and not shared.working
    assert torch.equal(decode(model), decode(resident))


def test_no_gain_is_the_link_and_said_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(sharing, "_measure", lambda *args: [AS_QUICK, AS_QUICK])
    with caplog.at_level(logging.WARNING):
        model, resident = paged(misses="auto")
    assert caplog.text.count("would make no step quicker") == 1
    assert model.qmoe_paging.cache.sharing is None and not threads()
    assert torch.equal(decode(model), decode(resident))
    with caplog.at_level(logging.WARNING):
        resize(model, hbm_budget=model.qmoe_paging.budget.total)
    assert caplog.text.count("would make no step quicker") == 1


def test_no_gain_for_single_tokens_is_said_too(monkeypatch, caplog) -> None:
    monkeypatch.setattr(sharing, "_measure", lambda *args: [AS_QUICK, QUICKER])
    with caplog.at_level(logging.WARNING):
        model, _ = paged(misses="auto")
    assert "misses of single tokens to the link" in caplog.text
    assert model.qmoe_paging.cache.sharing.kinds == (False, True)


def test_what_cannot_be_measured_is_the_links(monkeypatch, caplog) -> None:
    def fail(*args):
        raise torch.OutOfMemoryError("no memory for a graph")

    monkeypatch.setattr(sharing, "_measure", fail)
    with caplog.at_level(logging.WARNING):
        model, resident = paged(misses="auto")
    assert "all misses to the link: no memory for a graph" in caplog.text
    assert torch.equal(decode(model), decode(resident)) and not threads()


def test_calibration_runs_on_the_models_own_layers() -> None:
    model, resident = paged(misses="host")
    # Several tokens are routed to all of a layer's experts.
    resize(model, hbm_budget=model.qmoe_paging.budget.total + 16 * 6144)
    cache, modules = model.qmoe_paging.cache, quantized_modules(model)
    before = qmoe.stats(model)
    top_k = model.config.num_experts_per_tok
    times = sharing._measure(cache, list(modules.values()), top_k, model.dtype)
    one, several = times
    assert set(one) == {(m, h) for m in range(1, top_k + 1) for h in range(m + 1)}
    assert several and all(h <= m <= model.config.num_experts for m, h in several)
    assert all((m, 0) in several and (m, m) in several for m, _ in several)
    assert all(seconds > 0 for seconds in (*one.values(), *several.values()))
    assert qmoe.stats(model) == before, "it is not counted"
    expected = decode(resident)
    assert (decode(model) - expected).norm() < 1e-4 * expected.norm()


def test_the_host_takes_what_calibration_says_it_times(monkeypatch) -> None:
    model, _ = paged(misses="host")
    # Several tokens are routed to all of a layer's experts.
    resize(model, hbm_budget=model.qmoe_paging.budget.total + 16 * 6144)
    cache, modules = model.qmoe_paging.cache, [*quantized_modules(model).values()]
    posts, time_case, seen = cache.sharing.posts, sharing._Calls.time, []
    missed_of: dict[tuple[int, int], list[set[int]]] = {}

    def count(calls, case, *, shared: bool) -> float:
        before = posts.counters[:, SERVED].clone()
        seconds = time_case(calls, case, shared=shared)
        taken = (posts.counters[:, SERVED] - before)[: len(calls._modules)]
        seen.append((int(posts.share[0, 0]), set(taken.tolist())))
        missed = {e for e in case.ids[0].unique().tolist() if case.tables.page_to_slot[e] < 0}
        missed_of.setdefault((case.ids.shape[1], len(missed)), []).append(missed)
        return seconds

    monkeypatch.setattr(sharing._Calls, "time", count)
    sharing._measure(cache, modules, model.config.num_experts_per_tok, model.dtype)
    assert {host for host, _ in seen} >= {0, 1, 2}
    assert all(taken == {host} for host, taken in seen)
    # One after the other, so that none of them lies in the processor's caches.
    everything = set(range(model.config.num_experts))
    assert all(a != b for a, b in pairwise(missed_of[1, 1]))
    assert set.union(*missed_of[1, 1]) == everything
    several = [found for (tokens, _), found in missed_of.items() if tokens > 1]
    assert len(several) > 1
    for found in several:
        assert len(found[0]) < len(everything) and all(a != b for a, b in pairwise(found))


def test_every_family_is_known_here() -> None:
    assert {"qwen3_moe", "gpt_oss", "mixtral", "qwen3_next"} <= set(MODELS)
