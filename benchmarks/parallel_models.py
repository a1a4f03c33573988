"""Whole models on several GPUs: what one rank measures of them, for `benchmarks.parallel`.

Texts are the same on every rank (*same*), or each rank has its part of them (*own*); *one* is one
rank alone.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.cache.model import Replay, ReplayedRouter, sweep
from benchmarks.cache.traces import fitted_trace
from benchmarks.model import (
    QWEN3_30B_A3B,
    QWEN3_235B_A22B,
    TINY,
    TINY_DEEPSEEK,
    DeepseekShape,
    Shape,
    build_model,
    experts_of,
    synchronize,
    time_each,
)
from qmoe.decoding.step import DecodeStep, step_of
from qmoe.paging.expert_cache import ExpertCache
from qmoe.paging.host_store import HostStore
from qmoe.parallel.texts import OwnTexts
from qmoe.traces.trace import RoutingTrace

if TYPE_CHECKING:
    from benchmarks.parallel import Worker

PROMPT = 8  # tokens of each text that are read before it is decoded
MANY_TEXTS = 64  # from so many on each rank has its own part
# Experts of 8 layers of DeepSeek-V3 take 90 GB in 8 bits, and one GPU holds them.
DEEPSEEK_LAYERS = 8
# For transformers in 16 bits; experts of a layer take 1.2 GB.
TRANSFORMERS_LAYERS = 8
# Relative Frobenius distance of logits in bf16: wrong weights give 1 and more, a near tie of
# routers that is decided otherwise some hundredths.
MOST_DIFFERENT = 0.2
# Of the paged model: layers that have memory of their own on the host, and what slots leave free on
# the GPU for keys, values and a step.
HOST_LAYERS = 4
RESERVE = 8 << 30


@dataclass(frozen=True)
class Texts:
    """Texts that are decoded at a time, by every rank or between all of them.

    Attributes:
        texts: of all ranks together.
        length: columns of the cache.
        warm: steps before those that are timed.
        steps: that are timed.
    """

    texts: int
    length: int = 512
    warm: int = 4
    steps: int = 100


def run_model(worker: Worker) -> None:
    """Qwen3-30B-A3B's shape: captured decode steps, and the reading of prompts."""
    model = build_model(_shape(worker, QWEN3_30B_A3B), worker.device, "int8", worker.group)
    for texts in (1, 2) if worker.tiny else (1, 8, 64, 256, 1024):
        worker.add(what="decode", **decode(worker, model, _few(worker, Texts(texts))))
    for texts, columns in ((8, 16),) if worker.tiny else ((8, 2048), (32, 2048)):
        worker.add(what="prefill", **prefill(worker, model, texts, columns))


def run_deepseek(worker: Worker) -> None:
    """DeepSeek-V3's shape, as many layers on any number of ranks as one GPU holds."""
    shape = TINY_DEEPSEEK if worker.tiny else DeepseekShape(DEEPSEEK_LAYERS)
    model = build_model(shape, worker.device, "int8", worker.group)
    about = {"layers": shape.num_hidden_layers}
    for texts in (1, 2) if worker.tiny else (1, 64, 256):
        # Its attention expands all columns of the cache in each step: no more than are needed.
        asked = _few(worker, Texts(texts, length=64, steps=40))
        worker.add(what="decode", **about, **decode(worker, model, asked))
    columns = 16 if worker.tiny else 2048
    worker.add(what="prefill", **about, **prefill(worker, model, 8, columns))


def run_large(worker: Worker) -> None:
    """Qwen3-235B-A22B's shape: resident on several ranks, paged on one; its routing is a trace.

    The trace is the same however many ranks there are. Host memory has pages for a few layers only,
    which all layers share: what is copied has as many bytes as with pages of each layer's own, and
    repeats itself.
    """
    shape = _shape(worker, QWEN3_235B_A22B)
    device, group = worker.device, worker.group
    one = group.size == 1
    model = build_model(shape, device, "paged" if one else "int8", None if one else group)
    replay = Replay(shape, 1, device)
    for layer, block in enumerate(model.model.layers):
        block.mlp.gate = TracedRouter(block.mlp.gate, replay, layer, shape.num_hidden_layers)
    synchronize(device)
    worker.say(f"built, {_gib(device)}")
    store = cache = None
    if one:
        store, cache = _page(worker, model)
        worker.say(f"paged, {cache.num_slots} of {cache.num_pages} experts on the device")
    counts = (
        (Texts(1, 128, 12, 4), Texts(2, 128))
        if worker.tiny
        else (
            Texts(1, 256, 80, 64),  # the first steps fill the slots
            Texts(8, 128, 16, 16),
            Texts(64, 128, 4, 4),
        )
    )
    for asked in counts:
        asked = replace(asked, steps=4) if worker.tiny else asked
        traces = _traces(shape, asked)
        cell = decode(worker, model, _few(worker, asked), replay, traces, cache)
        held = "paged" if one else "resident"
        rate = round(1e3 * asked.texts / cell["mean_ms"], 1)  # some steps copy more than others
        worker.add(what="decode", held=held, **cell, tokens_per_s=rate)
    if cache is not None and store is not None:
        synchronize(device)
        cache.close()
        store.close()


def run_transformers(worker: Worker) -> None:
    """transformers' own expert parallelism in 16 bits beside qmoe's in INT8, a few layers.

    Both models run in the same loop, transformers' modules kernel by kernel with SDPA, the same
    texts on all ranks (its own way knows no other); and qmoe's by its captured step.
    """
    shape = _shape(worker, replace(QWEN3_30B_A3B, num_hidden_layers=TRANSFORMERS_LAYERS))
    counts = (1, 2) if worker.tiny else (1, 8, 64, 256)
    prompts = (8, 16) if worker.tiny else (8, 2048)
    about = {"layers": shape.num_hidden_layers}
    theirs = load_by_transformers(shape, worker)
    about["experts"] = theirs.config._experts_implementation
    about["attention"] = theirs.config._attn_implementation
    _in_a_loop(worker, theirs, counts, prompts, by="transformers", **about)
    del theirs
    gc.collect()
    model = build_model(shape, worker.device, "int8", worker.group)
    about["experts"] = "qmoe, INT8"
    about["attention"] = model.config._attn_implementation
    _in_a_loop(worker, model, counts, prompts, by="qmoe in the same loop", **about)
    for texts in counts:
        cell = decode(worker, model, _few(worker, Texts(texts)))
        worker.add(what="decode", by="qmoe", **(about | {"attention": "qmoe"}), **cell)
    worker.add(what="prefill", by="qmoe", **about, **prefill(worker, model, *prompts))


# ---- decode steps and prompts ------------------------------------------------------------------


def decode(
    worker: Worker,
    model: Any,
    asked: Texts,
    replay: Replay | None = None,
    traces: Sequence[RoutingTrace] = (),
    cache: ExpertCache | None = None,
) -> dict[str, Any]:
    """Milliseconds of a decode step, captured where that is possible, on the slowest rank.

    Args:
        replay, traces: of a model whose routing is replayed; a trace for each text of all ranks.
        cache: of a paged model; what it did in the timed steps is told too.
    """
    group, device = worker.group, worker.device
    own = _own(worker, asked.texts)
    rows = asked.texts // group.size if own else asked.texts
    step = step_of(model, rows, asked.length)
    step.rounds_prompts = step.rounds_prompts and replay is None
    if replay is not None:
        first = group.rank * rows if own else 0
        replay.num_tokens = traces[0].num_tokens
        replay.load(*traces[first : first + rows])
        replay.token.zero_()
    ids = torch.arange(rows * PROMPT, device=device).view(rows, PROMPT) % model.config.vocab_size
    positions = torch.arange(PROMPT, device=device).expand(rows, -1)
    rounds = OwnTexts(group, model.config.num_experts_per_tok, lambda: False)
    if own:
        group.own_texts = rounds
        rounds.rows = ids.numel()
    step.read(ids, torch.ones_like(ids), positions, None)
    rounds.rows = rows
    step.serve(rows if own else None)

    def advance(step: DecodeStep = step) -> None:
        step.advance()
        if group.own_texts is not None:
            rounds.goes_on(True)  # what hosts say beside each step

    for _ in range(asked.warm):
        advance()
    synchronize(device)
    before = None if cache is None else cache.read_counters()
    steps = 3 if worker.tiny else asked.steps
    each, _ = time_each(advance, steps, device)
    group.own_texts = None
    how = "own" if own else "one" if group.size == 1 else "same"
    cell = {
        "texts": asked.texts,
        "how": how,
        "ms": _slowest(worker, each),
        "mean_ms": _slowest(worker, [fmean(each)]),
        "trouble": step.trouble,
    }
    if cache is not None and before is not None:
        after = cache.read_counters()
        hits, misses = after.hits - before.hits, after.misses - before.misses
        cell |= {
            "slots": cache.num_slots,
            "pages": cache.num_pages,
            "host_layers": HOST_LAYERS,
            "hit_rate": round(hits / max(1, hits + misses), 4),  # of what was not streamed
            "copied_gb": round((after.bytes - before.bytes) / 1e9 / steps, 3),
        }
    return cell


def prefill(worker: Worker, model: Any, texts: int, columns: int) -> dict[str, Any]:
    """Milliseconds that the reading of prompts takes on the slowest rank, each rank its part.

    ``host_ms`` until the host has queued it all: where that is as long, the host is what it takes.
    """
    group, device = worker.group, worker.device
    own = group.size > 1 and texts % group.size == 0
    rows = texts // group.size if own else texts
    step = step_of(model, rows, columns + 8)
    ids = torch.arange(rows * columns, device=device).view(rows, columns) % model.config.vocab_size
    positions = torch.arange(columns, device=device).expand(rows, -1)
    read = partial(step.read, ids, torch.ones_like(ids), positions, None)
    if own:
        group.own_texts = OwnTexts(group, model.config.num_experts_per_tok, lambda: False)
        group.own_texts.rows = ids.numel()
    read()
    each, _ = time_each(read, 3, device)
    synchronize(device)
    began = time.perf_counter()
    read()
    queued = 1e3 * (time.perf_counter() - began)
    synchronize(device)
    group.own_texts = None
    how = "own" if own else "one" if group.size == 1 else "same"
    ms, host_ms = _slowest(worker, each), _slowest(worker, [queued])
    return {"texts": texts, "columns": columns, "how": how, "ms": ms, "host_ms": host_ms}


def _own(worker: Worker, texts: int) -> bool:
    """Whether each rank has its own part of so many texts."""
    size, many = worker.group.size, 2 if worker.tiny else MANY_TEXTS
    return size > 1 and texts >= many and texts % size == 0


def _few(worker: Worker, asked: Texts) -> Texts:
    return replace(asked, length=64) if worker.tiny else asked


def _shape(worker: Worker, shape: Shape) -> Shape:
    return TINY if worker.tiny else shape


def _slowest(worker: Worker, each: Sequence[float]) -> float:
    """The median of times, of the rank on which it is longest; 0.001 ms exactly."""
    heard = worker.group.exchange("a time", ms=median(each))
    return round(max(other["ms"] for other in heard), 3)


def _gib(device: torch.device) -> str:
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return f"{held / (1 << 30):.1f} GiB on the device"


# ---- a large model -----------------------------------------------------------------------------


class TracedRouter(ReplayedRouter):
    """Runs a router and then says what the trace says, which goes on by itself."""

    def __init__(self, router: nn.Module, replay: Replay, layer: int, num_layers: int) -> None:
        super().__init__(router, replay, layer)
        self.is_last = layer == num_layers - 1

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        replay = self.replay
        num_texts = replay.topk_ids.shape[1] // replay.num_tokens
        num_tokens = len(hidden_states) // num_texts
        if self.layer == 0:
            replay.begin(num_tokens)
        output = super().forward(hidden_states)
        if self.is_last:
            replay.end(num_tokens)
        return output


def _traces(shape: Shape, asked: Texts) -> list[RoutingTrace]:
    """One for each text: parts of one that hits as often as Qwen3-30B-A3B's routing.

    That of a text alone begins with every expert once, so that slots are full from there on.
    """
    num_tokens = PROMPT + asked.warm + asked.steps
    whole = fitted_trace(shape, asked.texts * num_tokens)
    if asked.texts == 1:
        swept = sweep(whole)
        return [RoutingTrace(swept.topk_ids[:num_tokens], whole.num_experts, whole.page_bytes)]
    parts = whole.topk_ids.split(num_tokens)
    return [RoutingTrace(part, whole.num_experts, whole.page_bytes) for part in parts]


def _page(worker: Worker, model: Any) -> tuple[HostStore, ExpertCache]:
    """Page a model that has no weights yet, with as many slots as fit on the device."""
    device, modules = worker.device, experts_of(model)
    layers = [experts.layer_pages(name) for name, experts in modules.items()]
    store = repeating_store(layers, HOST_LAYERS, device)
    pages = sum(layer.num_experts for layer in layers)
    num_slots, num_staging = pages // 2, model.config.num_experts_per_tok
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        num_slots = (free - RESERVE) // layers[0].page_stride - 2 * num_staging
    cache = ExpertCache(store, device, num_slots=min(num_slots, pages), num_staging=num_staging)
    for layer, experts in enumerate(modules.values()):
        experts.page(cache, layer)
    return store, cache


def repeating_store(layers: Sequence[Any], distinct: int, device: torch.device) -> HostStore:
    """A store of random pages for all ``layers``, with memory for the first few of them only.

    Layer i has the pages of layer ``i % distinct``. Nobody else knows: pages have numbers of their
    own, and slots hold each by itself. So a machine whose memory is too small for all pages, or
    takes minutes to fill it, copies what it would copy.

    Args:
        layers: what the pages look like; of one size.
        distinct: layers that have pages of their own.
    """
    distinct = min(distinct, len(layers))
    store = HostStore(layers[:distinct], pin=device.type == "cuda")
    generator = torch.Generator(device).manual_seed(1)
    for layer in range(distinct):
        pages = store.pages(layer)
        noise = torch.empty(pages.shape, dtype=torch.uint8, device=device)
        pages.copy_(noise.random_(0, 256, generator=generator))
    repeated = [layer % distinct for layer in range(len(layers))]
    per_layer = store.addresses.split([layer.num_experts for layer in store.layers])
    store.addresses = torch.cat([per_layer[layer] for layer in repeated])
    *first_page, store._num_pages = accumulate((x.num_experts for x in layers), initial=0)
    store.first_page, store.layers = tuple(first_page), tuple(layers)
    # In place: what frees them holds this list.
    store._maps[:] = [store._maps[layer] for layer in repeated]
    return store


# ---- transformers' own expert parallelism ------------------------------------------------------


def load_by_transformers(shape: Shape, worker: Worker) -> Any:
    """A model of random weights in 16 bits that transformers spreads over the ranks.

    It is loaded from memory, as from a checkpoint. On one rank it is a model as any.

    Raises:
        ValueError: the experts are whole on each rank all the same.
    """
    from transformers import Qwen3MoeForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    group = worker.group
    whole = build_model(shape, worker.device, "bf16")
    if group.size == 1:
        return whole
    config = shape.config()
    spread: dict[str, Any] = {"tp_size": group.size, "enable_expert_parallel": True}
    if "ep_size" in {field.name for field in fields(DistributedConfig)}:  # from 5.21 on
        spread = {"tp_size": group.size, "ep_size": group.size}
        config.base_model_tp_plan = {}  # the attention stays whole, as before
    model = Qwen3MoeForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=whole.state_dict(),
        dtype=torch.bfloat16,
        distributed_config=DistributedConfig(**spread),
    )
    held = _local(model.model.layers[0].mlp.experts.down_proj).shape[0]
    if held * group.size != shape.num_experts:
        raise ValueError(f"transformers holds {held} of {shape.num_experts} experts on a rank")
    ids = torch.arange(16, device=worker.device)[None] % shape.vocab_size
    expected, actual = (m(ids).logits.float() for m in (whole, model))
    distance = float((actual - expected).norm() / expected.norm())
    if not distance < MOST_DIFFERENT:
        raise ValueError(f"logits of transformers' spread model are {distance:.3f} off")
    worker.say(f"logits of transformers' spread model are {distance:.4f} off those of the whole")
    return model


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _in_a_loop(
    worker: Worker, model: Any, counts: Sequence[int], prompts: tuple[int, int], **about: Any
) -> None:
    """Decode so many texts each, and read prompts: kernel by kernel, whosever experts they are."""
    for texts in counts:
        ms = _loop(worker, model, texts)
        worker.add(what="decode", **about, texts=texts, ms=ms)
    ms = _loop_prefill(worker, model, *prompts)
    worker.add(what="prefill", **about, texts=prompts[0], ms=ms)


def _loop(worker: Worker, model: Any, texts: int) -> float:
    """Milliseconds of a decode step as transformers' generate makes it, the same on all ranks."""
    ids = torch.arange(texts * PROMPT, device=worker.device).view(texts, PROMPT)
    ids %= model.config.vocab_size
    output = model(ids, use_cache=True, logits_to_keep=1)
    past, token = output.past_key_values, output.logits.argmax(-1)

    def advance() -> None:
        nonlocal token
        token = model(token, past_key_values=past, use_cache=True).logits.argmax(-1)

    for _ in range(3):
        advance()
    each, _ = time_each(advance, 3 if worker.tiny else 30, worker.device)
    return _slowest(worker, each)


def _loop_prefill(worker: Worker, model: Any, texts: int, columns: int) -> float:
    ids = torch.arange(texts * columns, device=worker.device).view(texts, columns)
    ids %= model.config.vocab_size
    read: Callable[[], object] = partial(model, ids, use_cache=True, logits_to_keep=1)
    read()
    each, _ = time_each(read, 3, worker.device)
    return _slowest(worker, each)


# By section.
MODELS: dict[str, Callable[[Worker], None]] = {
    "model": run_model,
    "deepseek": run_deepseek,
    "large": run_large,
    "transformers": run_transformers,
}
