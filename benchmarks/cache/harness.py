"""The model, store and cache that sections share."""

from __future__ import annotations

import gc
from functools import cached_property
from typing import Any

import torch

from benchmarks.cache.model import (
    Decoder,
    Replay,
    Residents,
    fill_host_store,
    measure_link,
    replay_routing,
    sweep,
)
from benchmarks.cache.traces import fitted_trace
from benchmarks.model import Shape, build_model, synchronize
from benchmarks.record import Results
from qmoe.paging.expert_cache import ExpertCache
from qmoe.paging.host_store import HostStore
from qmoe.paging.stats import CacheStats
from qmoe.traces.trace import RoutingTrace


class Benchmark:
    """One model, one host store and one cache, made when a section first asks for them."""

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        results: Results,
        options: Any,
        traces: dict[str, RoutingTrace],
    ) -> None:
        self.shape, self.device, self.results = shape, device, results
        self.num_tokens, self.num_warmup = options.tokens, options.warmup
        self.context, self.prompt = options.context, options.prompt
        # By name; each starts with a sweep over all experts, then warm-up, then what is timed.
        self.traces = {name: sweep(trace) for name, trace in traces.items()}
        self.misses: list[str] = options.misses.split(",")
        self.batches = [int(batch) for batch in options.batch.split(",")]

    @property
    def first_trace(self) -> RoutingTrace:
        """For what needs only one."""
        return next(iter(self.traces.values()))

    def texts(self, num_texts: int) -> list[RoutingTrace]:
        """Traces of so many texts: one of one model, cut, or the user's, begun elsewhere each."""
        num_tokens = self.num_warmup + self.num_tokens
        if "fitted" in self.traces:
            whole = fitted_trace(self.shape, num_texts * num_tokens).topk_ids
        else:
            ids = self.first_trace.topk_ids[-num_tokens:]
            step = max(1, num_tokens // num_texts)
            whole = torch.cat([ids.roll(-i * step, 0) for i in range(num_texts)])
        like = self.first_trace
        return [
            RoutingTrace(part, like.num_experts, like.page_bytes)
            for part in whole.split(num_tokens)
        ]

    @property
    def first(self) -> int:
        """Tokens of a trace before those that are timed."""
        return self.first_trace.num_tokens - self.num_tokens

    @cached_property
    def model(self) -> Any:
        """Its routers replay; experts have no weights until `residents` or `cache` give them."""
        model = build_model(self.shape, self.device)
        replay_routing(model, self.replay)
        self.results.log("model built")
        return model

    @cached_property
    def store(self) -> HostStore:
        store, self.store_facts = fill_host_store(self.model, self.device)
        self.results.log(f"host store filled: {self.store_facts}")
        return store

    @cached_property
    def replay(self) -> Replay:
        return Replay(self.shape, self.first_trace.num_tokens, self.device)

    @cached_property
    def residents(self) -> Residents:
        residents = Residents(self.model, self.store, self.device)
        synchronize(self.device)
        self.results.log("experts on the device")
        return residents

    @cached_property
    def cache(self) -> ExpertCache:
        top_k = self.shape.num_experts_per_tok
        return ExpertCache(
            self.store,
            self.device,
            num_slots=self.num_slots(0.5),
            num_staging=top_k,
        )

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.model, self.replay, self.context, self.first_trace.num_tokens)

    @cached_property
    def link(self) -> dict[str, float]:
        """GB/s, see `measure_link`."""
        return {k: round(v, 2) for k, v in measure_link(self.store, self.device).items()}

    def num_slots(self, capacity: float) -> int:
        """Slots for a share of all pages."""
        return int(capacity * self.shape.num_pages)

    def counters(self) -> CacheStats:
        """What the cache counted until now; waits for the device."""
        synchronize(self.device)
        return self.cache.read_counters()

    def close(self) -> None:
        """Give back what the model, the store and the cache hold."""
        made = self.__dict__
        if "decoder" in made:
            self.decoder.release()
        if "cache" in made:
            self.cache.close()
        store = made.get("store")
        for name in ("decoder", "cache", "residents", "replay", "model", "store"):
            made.pop(name, None)
        if store is not None:
            store.close()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
