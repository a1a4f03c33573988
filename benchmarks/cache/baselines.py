"""Sections baselines and offload: a host-driven cache, and accelerate's offloading."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeForCausalLM

from benchmarks.cache.decode import time_cell
from benchmarks.cache.harness import Benchmark
from benchmarks.model import Shape, experts_of, synchronize, time_each
from qmoe.experts.quantized import QuantizedExperts
from qmoe.paging.host_store import HostStore
from qmoe.traces.trace import RoutingTrace
from qmoe_kernels import fused_moe


class HostDrivenCache:
    """A cache of the usual kind: the host decides, the copy engine moves, least recently used goes.

    Every layer of every step reads the routed ids on the host, looks them up in an ordered dict,
    enqueues one ``cudaMemcpyAsync`` for each missing page and goes on: nothing but reading the ids
    waits. Memory, pages and kernels are those of qmoe's own cache.
    """

    def __init__(self, store: HostStore, num_slots: int, device: torch.device) -> None:
        self.store, self.device = store, device
        self.pages = [store.pages(layer) for layer in range(len(store.layers))]
        stride = max(pages.shape[1] for pages in self.pages)
        self.memory = torch.empty(num_slots, stride, dtype=torch.uint8, device=device)
        self.weights = [layer.views(self.memory) for layer in store.layers]
        self.slots: OrderedDict[tuple[int, int], int] = OrderedDict()  # oldest first
        self.free = list(range(num_slots))
        tables = [torch.full((len(pages),), -1, dtype=torch.int32) for pages in self.pages]
        pin = device.type == "cuda"
        self.host_tables = [table.pin_memory() if pin else table for table in tables]
        self.tables = [table.to(device) for table in tables]
        self.hits = self.misses = 0

    def fetch(self, layer: int, experts: list[int]) -> None:
        """Make experts of one layer resident, none of them at the cost of another."""
        missing = []
        for expert in dict.fromkeys(experts):
            if (layer, expert) in self.slots:
                self.slots.move_to_end((layer, expert))
                self.hits += 1
            else:
                missing.append(expert)
        if not missing:
            return
        self.misses += len(missing)
        for expert in missing:
            if self.free:
                slot = self.free.pop()
            else:
                (other_layer, evicted), slot = self.slots.popitem(last=False)
                # Tables of other layers follow when these miss something: until then nobody reads
                # the stale entry, since their own look-up is the dict.
                self.host_tables[other_layer][evicted] = -1
            self.slots[layer, expert] = slot
            self.host_tables[layer][expert] = slot
            page = self.pages[layer][expert]
            self.memory[slot, : len(page)].copy_(page, non_blocking=True)
        self.tables[layer].copy_(self.host_tables[layer], non_blocking=True)

    def fetch_trace(self, trace: RoutingTrace) -> None:
        """Bring the cache to where it stands after a trace, without computing anything."""
        for token in trace.topk_ids.tolist():
            for layer, experts in enumerate(token):
                self.fetch(layer, experts)


class HostDrivenExperts:
    """Computes for an experts module from a `HostDrivenCache`."""

    def __init__(self, experts: QuantizedExperts, cache: HostDrivenCache, layer: int) -> None:
        self.experts, self.cache, self.layer = experts, cache, layer

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        self.cache.fetch(self.layer, topk_ids.flatten().tolist())
        gate_up, down = self.cache.weights[self.layer]
        return fused_moe(
            hidden_states,
            gate_up,
            self.experts.gate_up_proj_scale,
            down,
            self.experts.down_proj_scale,
            topk_ids,
            topk_weights,
            activation=self.experts.activation,
            activations=self.experts.activations,
            expert_to_slot=self.cache.tables[self.layer],
        )


class HostDriven:
    """A model computing from a host-driven cache while a ``with`` block lasts.

    By the experts modules' own forwards: a decode step shares these modules with the model.
    """

    def __init__(self, model: nn.Module, cache: HostDrivenCache) -> None:
        self.cache, self.experts = cache, list(experts_of(model).values())

    def __enter__(self) -> HostDrivenCache:
        for layer, experts in enumerate(self.experts):
            vars(experts)["forward"] = HostDrivenExperts(experts, self.cache, layer).forward
        return self.cache

    def __exit__(self, *_: object) -> None:
        for experts in self.experts:
            del vars(experts)["forward"]


def cpu_offload(
    shape: Shape, device: torch.device, num_tokens: int, log: Any
) -> dict[str, float | int | list[float]]:
    """Decode with the whole bf16 model in pageable memory, moved layer by layer by accelerate.

    On a CPU the same runs without accelerate: it has no device to move weights to.

    Returns:
        bytes of the weights, seconds to make them, and of each token: the first reads the prompt,
        of one token too.
    """
    start = time.perf_counter()
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(shape.config()).to(torch.bfloat16).eval()
    model.config._experts_implementation = "grouped_mm" if device.type == "cuda" else "eager"
    noise = (0.02 * torch.randn(1 << 24)).to(torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        value = torch.empty_like(parameter, device="cpu")
        flat = value.view(-1)
        if value.dim() == 1:
            flat.fill_(1.0)
        else:  # a block again and again: drawing 30 billion numbers would take minutes
            for first in range(0, len(flat), len(noise)):
                flat[first : first + len(noise)] = noise[: len(flat) - first]
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    made = time.perf_counter()
    log(f"{nbytes / 1e9:.1f} GB of bf16 weights in {made - start:.1f} s")
    if device.type == "cuda":
        import accelerate

        accelerate.cpu_offload(model, execution_device=device)
    seconds = []
    input_ids = torch.ones(1, 1, dtype=torch.int64, device=device)
    past = None
    with torch.no_grad():
        for _ in range(1 + num_tokens):
            begin = time.perf_counter()
            output = model(input_ids, past_key_values=past, use_cache=True)
            past = output.past_key_values
            input_ids = output.logits[:, -1:].argmax(-1)
            synchronize(device)
            seconds.append(round(time.perf_counter() - begin, 3))
            log(f"token {len(seconds)}: {seconds[-1]} s")
    return {"bytes": nbytes, "make_s": round(made - start, 1), "token_s": seconds}


def run_baselines(bench: Benchmark, num_tokens: int = 16) -> None:
    """Tokens per second of other ways to run the model; eager forward passes all of them."""
    results, decoder, shape = bench.results, bench.decoder, bench.shape
    decoder.release()
    num_tokens = min(num_tokens, bench.num_tokens)
    results.set(tokens=num_tokens, warmup_tokens=bench.first, graph=False)
    bench.residents.enter()
    for name, trace in bench.traces.items():
        bench.replay.load(trace)
        decoder.reset(bench.first)
        decoder.step()
        decoder.reset(bench.first)
        each, total = time_each(decoder.step, num_tokens, bench.device)
        cell = {"name": "resident, eager", "trace": name, "capacity": 1.0}
        results.add("cells", cell | time_cell(each, total))
        decoder.reset(bench.first)
        decoder.step()
        expected = decoder.logits.clone()
        for capacity in (0.25, 0.5):
            host_driven = HostDrivenCache(bench.store, bench.num_slots(capacity), bench.device)
            before = RoutingTrace(
                trace.topk_ids[: bench.first], trace.num_experts, trace.page_bytes
            )
            host_driven.fetch_trace(before)
            with HostDriven(bench.model, host_driven):
                decoder.reset(bench.first)
                host_driven.hits = host_driven.misses = 0
                each, total = time_each(decoder.step, num_tokens, bench.device)
                asked = host_driven.hits + host_driven.misses
                cell = {"name": "host-driven cache", "trace": name, "capacity": capacity}
                cell |= {"hit_rate": round(host_driven.hits / asked, 4)}
                decoder.reset(bench.first)
                decoder.step()
                cell["equal"] = torch.equal(decoder.logits, expected)
                results.add("cells", cell | time_cell(each, total))
                if not cell["equal"]:
                    raise AssertionError("the host-driven cache computes something else")
            del host_driven
    cache = bench.cache
    bench.residents.leave(cache)
    for capacity in (0.25, 0.5):
        cache.resize(bench.num_slots(capacity), shape.num_experts_per_tok)
        cache.overlap = False
        decoder.capture()  # to be warm sooner
        for name, trace in bench.traces.items():
            bench.replay.load(trace)
            decoder.reset()
            for _ in range(bench.first):
                decoder.advance()
            each, total = time_each(decoder.step, num_tokens, bench.device)
            cell = {"name": "qmoe, eager", "trace": name, "capacity": capacity}
            results.add("cells", cell | time_cell(each, total))


def run_offload(bench: Benchmark) -> None:
    """accelerate's ``cpu_offload``: last, since it needs the memory of all the others."""
    bench.close()
    offloaded = cpu_offload(bench.shape, bench.device, 1, bench.results.log)
    bench.results.set(**offloaded, tokens_per_s=round(1 / min(offloaded["token_s"][1:]), 4))
