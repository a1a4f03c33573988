"""Who serves a model's misses: what the host computes with, and how many it takes.

How many of so many misses the host takes is measured on the model's own layers on this machine, as
they run in a step: captured on a GPU. It is kept in the user's cache, by what it depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe.checkpoints.schema import BIAS_SUFFIX, SCALE_SUFFIX
from qmoe.experts.quantized import QuantizedExperts
from qmoe.paging.expert_cache import STREAMED_PAIRS_PER_EXPERT, ExpertCache
from qmoe.paging.frame_store import FrameStore
from qmoe.paging.host_experts import HostExperts
from qmoe_kernels.cpu import native
from qmoe_kernels.experts import Experts, Projection
from qmoe_kernels.mailbox import MAX_PAIRS
from qmoe_kernels.paging import Residency

logger = logging.getLogger(__name__)

# Less than that much quicker is no gain: results that depend on what was resident are its price.
GAIN = 0.97
# What is quicker by less than that is as quick. Then the host takes more, and evicts less.
_TIE = 1.01
# Of the layers, as many are timed at once: what one leaves to the next counts too.
_LAYERS = 5
# Tokens of the two kinds of calls that are timed, and how often. With several tokens an expert has
# several rows, which cost the link nothing and the host much. Many are measured, so that the host
# is never given too much.
_TOKENS, _REPEATS = (1, 32), (9, 3)
_VERSION = 5
_NO_GAIN = "on this machine the host's share would make no step quicker"


def sharing_of(
    cache: ExpertCache, modules: Mapping[str, QuantizedExperts], misses: str
) -> HostExperts | None:
    """What computes missed experts on the host; None if nothing does.

    With ``"auto"``, experts that the host cannot compute are the link's, which a warning says.

    Args:
        cache: of the modules' pages.
        modules: in the cache's order.
        misses: see :class:`qmoe.PagingOptions`.

    Raises:
        ValueError: with ``"host"``, the host cannot compute these experts; says why.
    """
    if misses == "link":
        return None
    try:
        if isinstance(cache.host, FrameStore):
            raise ValueError("host_memory leaves experts in files, where no processor reaches them")
        for name, experts in modules.items():
            if experts.activation is None:
                raise ValueError(
                    f"{name} has a gate between its products that only its own code knows"
                )
        return _host_experts(cache, list(modules.values()))
    except ValueError as error:
        if misses == "auto":
            _warn_once(str(error))
            return None
        raise ValueError(f"misses='host': {error}; misses='link' works") from None


def _host_experts(cache: ExpertCache, modules: Sequence[QuantizedExperts]) -> HostExperts:
    # Weak: a cache that kept its model's modules alive would keep the model.
    ends = (SCALE_SUFFIX, BIAS_SUFFIX)
    references = [weakref.ref(experts) for experts in modules]

    def module(layer: int) -> QuantizedExperts:
        experts = references[layer]()
        assert experts is not None  # whoever runs it has the model
        return experts

    def experts_of(layer: int) -> Experts:
        experts = module(layer)
        assert experts.activation is not None
        up, down = (
            Projection(weight, *(_on_host(experts, name + end) for end in ends))
            for name, weight in zip(
                experts.layout.projections, cache.host.weights(layer), strict=True
            )
        )
        return Experts(up, down, experts.activation)

    watched = [
        [(m._parameters, p + end) for p in m.layout.projections for end in ends] for m in modules
    ]
    return HostExperts(experts_of, watched, cache.host.first_page, cache.device)


def _on_host(experts: QuantizedExperts, name: str) -> Tensor | None:
    parameter = experts._parameters.get(name)
    return None if parameter is None else parameter.detach().to("cpu", copy=True).contiguous()


def calibrate(
    cache: ExpertCache,
    modules: Mapping[str, QuantizedExperts],
    misses: str,
    *,
    top_k: int,
    dtype: torch.dtype,
) -> None:
    """Say how many misses the host takes.

    With ``"auto"`` this takes a second or two on a GPU, once for a kind of model and machine, and
    empties the slots. If the host is of no use, it is not used, which a line says.

    Args:
        cache: shares its misses, see `sharing_of`; nothing happens if it does not, or if the host
            was given up: then nothing of what it can do is seen.
        modules: which are paged in the cache, in its order.
        misses: see :class:`qmoe.PagingOptions`.
        top_k: experts of a token.
        dtype: of hidden states.
    """
    sharing = cache.sharing
    if sharing is None or not sharing.working:
        return
    share = sharing.posts.share
    num_experts = share.shape[1] - 1
    if misses == "host":
        share.copy_(torch.arange(num_experts + 1))
        sharing.kinds = (True, True)
        return
    key = _key(cache, top_k)
    tables = _read(key, num_experts)
    if tables is None:
        try:
            times = _measure(cache, list(modules.values()), top_k, dtype)
        except RuntimeError as error:  # too little memory, or the host does not answer
            _warn_once(str(error))
            cache.share_misses(None)
            return
        tables = [share_table(found, num_experts) for found in times]
        # Else too few experts are absent, or too few slots there: other budgets may say more.
        if (top_k, 0) in times[0] and times[1]:
            _write(key, tables)
    one, several = (any(table) for table in tables)
    if not one:
        _warn_once(_NO_GAIN, "misses of single tokens" if several else "all misses")
    if one or several:
        share.copy_(torch.tensor(tables))
        sharing.kinds = (one, several)
    else:
        cache.share_misses(None)


@lru_cache
def _warn_once(reason: str, what: str = "all misses") -> None:
    logger.warning("misses='auto' leaves %s to the link: %s", what, reason)


def share_table(times: Mapping[tuple[int, int], float], num_experts: int) -> list[int]:
    """How many of 0, 1, 2 ... ``num_experts`` misses the host takes.

    Args:
        times: (misses, of them by the host) -> seconds; for each number of misses, 0 by the host is
            among them. Where a number was not measured, the share is in proportion to that of the
            next larger one, or of the largest.
    """
    best = {0: 0}
    for misses in sorted({misses for misses, _ in times}):
        by_share = {host: seconds for (m, host), seconds in times.items() if m == misses}
        quickest = min(by_share.values())
        as_quick = [host for host, seconds in by_share.items() if seconds <= _TIE * quickest]
        best[misses] = max(as_quick) if quickest <= GAIN * by_share[0] else 0
    table = []
    for misses in range(num_experts + 1):
        measured = next((m for m in best if m >= misses), max(best))
        table.append(round(misses * best[measured] / measured) if measured else 0)
    return table


# ---- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """Calls of some layers, each of which misses as many experts.

    Attributes:
        ids: (layers, num_tokens, top_k) int64.
        tables: of the cache, to begin with: all that is routed to is there, but for some experts of
            each layer. No slot is empty: these are all cold, so that the host takes as many as are
            to be timed.
    """

    ids: Tensor
    tables: Residency


def _sizes(cache: ExpertCache, num_routed: int) -> tuple[int, int]:
    """How many layers can be timed, and how many experts each can miss; 0, 0: none."""
    absent = cache.num_pages - cache.num_slots
    layers = min(_LAYERS, len(cache.host.layers), cache.num_slots // num_routed, absent)
    return (layers, min(num_routed, absent // layers)) if layers > 0 else (0, 0)


def _case(
    cache: ExpertCache, layers: int, num_tokens: int, top_k: int, misses: int, turn: int
) -> _Case:
    """The ``turn``-th case: all experts are missed in turn.

    In a text, an expert that is missed was not asked for lately, and the processor reads it from
    memory. If the same few were timed again and again, they would lie in the processor's caches.
    Hits change with them: where a call is routed to all experts, there are no others to miss.

    All of it is made on the cache's device. On a CPU torch spreads what indexes 3000 elements or
    more over its threads, and they then spin for milliseconds on the cores that workers need.
    """
    host, num_slots, num_pages, device = cache.host, cache.num_slots, cache.num_pages, cache.device
    num_experts = min(layer.num_experts for layer in host.layers)
    num_routed = min(num_tokens * top_k, num_experts)
    places = torch.arange(num_tokens * top_k, device=device) % num_routed
    # The first ones are missed.
    routed = (turn * misses + torch.arange(num_routed, device=device)) % num_experts
    ids = routed[places].view(num_tokens, top_k)
    first = torch.tensor(host.first_page[:layers], device=device)[:, None]
    others = torch.ones(num_pages, dtype=torch.bool, device=device)
    others[(first + routed).flatten()] = False
    there = (first + routed[misses:]).flatten()
    # What is routed to has the largest claims: nothing of it is evicted.
    pages = torch.cat([others.nonzero().flatten()[: num_slots - len(there)], there])
    slots = torch.arange(num_slots, dtype=torch.int32, device=device)
    tables = Residency.empty(num_pages, num_slots, 1, device)
    tables.slot_to_page[:] = pages
    tables.page_to_slot[pages] = slots
    tables.last_used[:] = tables.slot_claims[:] = slots + 1
    tables.claims[pages] = tables.slot_claims
    tables.clock.fill_(num_slots)
    tables.last_admitted.fill_(num_slots)
    return _Case(ids.expand(layers, -1, -1), tables)


def _measure(
    cache: ExpertCache, modules: Sequence[QuantizedExperts], top_k: int, dtype: torch.dtype
) -> list[dict[tuple[int, int], float]]:
    """Seconds of some layers' step by misses, and by how many of them the host computes.

    Of calls of one token, and of several; nothing where no such call can miss anything.
    """
    sharing, pool = cache.sharing, cache._pool
    if sharing is None or pool is None:
        return [{}, {}]
    posts, num_experts = sharing.posts, min(layer.num_experts for layer in cache.host.layers)
    counters = (cache._counters, posts.counters)
    saved, kinds = posts.share.clone(), sharing.kinds
    counted = [tensor.clone() for tensor in counters]
    found: list[dict[tuple[int, int], float]] = []
    try:
        for tokens, repeats in zip(_TOKENS, _REPEATS, strict=True):
            times: dict[tuple[int, int], float] = {}
            found.append(times)
            # Calls of more pairs are streamed, or find no room in the mailbox.
            most_pairs = min(STREAMED_PAIRS_PER_EXPERT * num_experts - 1, MAX_PAIRS)
            num_tokens = max(1, min(tokens, most_pairs // top_k))
            layers, most = _sizes(cache, min(num_tokens * top_k, num_experts))
            if not most:
                continue
            calls = _Calls(cache, modules[:layers], num_tokens, top_k, dtype)
            one, turn = tokens == 1, count()
            for misses in range(1, most + 1) if one else sorted({-(-most // 4), most}):
                cases = partial(_case, cache, layers, num_tokens, top_k, misses)
                quarters = {misses * i // 4 for i in range(5)}
                for host in range(misses + 1) if one else sorted(quarters):
                    posts.share.fill_(host)
                    # Without a share calls go as they do where nothing is shared.
                    sharing.kinds = (host > 0, host > 0)
                    times[misses, host] = statistics.median(
                        calls.time(cases(next(turn)), shared=host > 0) for _ in range(repeats)
                    )
    finally:
        posts.share.copy_(saved)
        sharing.kinds = kinds
        for tensor, before in zip(counters, counted, strict=True):
            tensor.copy_(before)
        cache.forget()
    return found


class _Calls:
    """Some layers' calls in a row, captured on a GPU."""

    def __init__(
        self,
        cache: ExpertCache,
        modules: Sequence[QuantizedExperts],
        num_tokens: int,
        top_k: int,
        dtype: torch.dtype,
    ) -> None:
        device = cache.device
        # Of its own: nobody's random numbers change because a model was loaded.
        generator = torch.Generator(device).manual_seed(0)
        size = (num_tokens, modules[0].layout.hidden_size)
        self._cache, self._modules = cache, modules
        self._x = torch.randn(size, device=device, generator=generator).to(dtype)
        self._weights = torch.full((num_tokens, top_k), 1 / top_k, device=device)
        self._ids = torch.zeros(len(modules), num_tokens, top_k, dtype=torch.int64, device=device)
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    def time(self, case: _Case, *, shared: bool) -> float:
        """Seconds that the calls of a case take, which are shared or not."""
        self._begin(case)
        if self._cache.device.type != "cuda":
            began = time.perf_counter()
            self._run()
            return time.perf_counter() - began
        if shared not in self._graphs:
            self._run()  # compiles
            torch.cuda.synchronize(self._cache.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
            self._graphs[shared] = graph
            self._begin(case)
        return self._replay(self._graphs[shared])

    def _run(self) -> None:
        for layer, module in enumerate(self._modules):
            module._fused_moe(self._x, self._ids[layer], self._weights)

    def _begin(self, case: _Case) -> None:
        """Slots and claims as the case has them; what was there before is never read."""
        pool = self._cache._pool
        assert pool is not None
        self._ids.copy_(case.ids)
        for field in fields(Residency):
            if field.name != "counters":
                getattr(pool.residency, field.name).copy_(getattr(case.tables, field.name))

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with self._cache.lock:
            self._cache.take_turn()
            begin.record()
            graph.replay()
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


# ---- what is kept ------------------------------------------------------------------------------


def _key(cache: ExpertCache, top_k: int) -> dict[str, Any]:
    """What a table depends on."""
    layer, device = cache.host.layers[0], cache.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "version": _VERSION,
        "num_experts": layer.num_experts,
        "top_k": top_k,
        "gate_up": list(layer.gate_up),
        "down": list(layer.down),
        "dtype": str(layer.dtype),
        "gpu": gpu,
        "host": list(native.this_machine()[:3]),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _file(key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return native.cache_folder() / f"host-share-{digest}.json"


def _read(key: dict[str, Any], num_experts: int) -> list[list[int]] | None:
    """The tables that `_write` kept; None, with a line, if they are not there or another's."""
    file = _file(key)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        tables = content["share"]
        sizes = [len(table) for table in tables]
        right = content["key"] == key and sizes == len(_TOKENS) * [num_experts + 1]
        if right and all(
            type(n) is int and 0 <= n <= i for table in tables for i, n in enumerate(table)
        ):
            return [list(table) for table in tables]
        raise ValueError("is of something else")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: is not used, and measured anew (%s)", file, error)
        return None


def _write(key: dict[str, Any], tables: list[list[int]]) -> None:
    """Keep tables; where that is not possible, each process measures."""
    with suppress(OSError):
        content = json.dumps({"key": key, "share": tables}, indent=1)
        native.write_whole(_file(key), content.encode())
