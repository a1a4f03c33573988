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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe.checkpoints.schema import BIAS_SUFFIX, SCALE_SUFFIX
from qmoe.experts.quantized import QuantizedExperts
from qmoe.paging.expert_cache import ExpertCache
from qmoe.paging.frame_store import FrameStore
from qmoe.paging.host_experts import HostExperts
from qmoe_kernels.cpu import native
from qmoe_kernels.experts import Experts, Projection
from qmoe_kernels.paging import Residency

logger = logging.getLogger(__name__)

# Less than that much quicker is no gain: results that depend on what was resident are its price.
GAIN = 0.97
# Until the tests of a GPU have passed on one, nobody's text rests on it.
TRIED_ON_A_GPU = False
# Of the layers, as many are timed at once: what one leaves to the next counts too.
_LAYERS = 4
_REPEATS = 5
_VERSION = 1


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
        if cache.device.type == "cuda" and not TRIED_ON_A_GPU:
            raise ValueError("the host's share has not been tried on a GPU yet")
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
    first_page, num_pages = cache.host.first_page, cache.num_pages
    return HostExperts(experts_of, watched, first_page, num_pages, cache.device)


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

    With ``"auto"`` this takes about a second on a GPU, once for a kind of model and machine, and
    empties the slots. If the host is of no use, it is not used, which a line says.

    Args:
        cache: shares its misses, see `sharing_of`; nothing happens if it does not.
        modules: which are paged in the cache, in its order.
        misses: see :class:`qmoe.PagingOptions`.
        top_k: experts of a token.
        dtype: of hidden states.
    """
    sharing = cache.sharing
    if sharing is None:
        return
    share = sharing.posts.share
    if misses == "host":
        share.copy_(torch.arange(len(share)))
        return
    key = _key(cache, top_k)
    table = _read(key, len(share))
    if table is None:
        try:
            times = _measure(cache, list(modules.values()), top_k, dtype)
        except RuntimeError as error:  # too little memory, or the host does not answer
            _warn_once(str(error))
            cache.share_misses(None)
            return
        table = share_table(times, len(share) - 1)
        if (top_k, 0) in times:  # else too few experts are absent: other budgets may say more
            _write(key, table)
    if any(table):
        share.copy_(torch.tensor(table))
    else:
        _warn_once("on this machine the host's share would make no step quicker")
        cache.share_misses(None)


@lru_cache
def _warn_once(reason: str) -> None:
    logger.warning("misses='auto' leaves all misses to the link: %s", reason)


def share_table(times: Mapping[tuple[int, int], float], num_experts: int) -> list[int]:
    """How many of 0, 1, 2 ... ``num_experts`` misses the host takes.

    Args:
        times: (misses, of them by the host) -> seconds; for each number of misses, 0 by the host is
            among them. Beyond the largest number measured the share stays in proportion.
    """
    most = max((misses for misses, _ in times), default=0)
    table = [0] * (num_experts + 1)
    for misses in range(1, most + 1):
        by_share = {host: seconds for (m, host), seconds in times.items() if m == misses}
        best = min(by_share, key=lambda host: (by_share[host], host), default=0)
        if best and by_share[best] <= GAIN * by_share[0]:
            table[misses] = best
    for misses in range(most + 1, num_experts + 1):
        table[misses] = round(misses * table[most] / most) if most else 0
    return table


# ---- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """Layers whose last experts are absent while their first ones are in slots.

    Attributes:
        layers: how many.
        most: absent experts of each.
        tables: of the cache, to begin each run with.
    """

    layers: int
    most: int
    tables: Residency


def _case(cache: ExpertCache, top_k: int) -> _Case | None:
    """None where no expert can be absent, or no slot be left for those that are there."""
    host, num_slots = cache.host, cache.num_slots
    absent = cache.num_pages - num_slots
    layers = min(_LAYERS, len(host.layers), absent)
    if layers < 1:
        return None
    num_experts = min(layer.num_experts for layer in host.layers)
    most = min(top_k, num_experts - top_k, absent // layers)
    if most < 1 or num_slots < layers * top_k:
        return None
    away = {
        host.first_page[layer] + host.layers[layer].num_experts - 1 - i
        for layer in range(layers)
        for i in range(most)
    }
    pages = [page for page in range(cache.num_pages) if page not in away][:num_slots]
    tables = Residency.empty(cache.num_pages, num_slots, 1, "cpu")
    slots = torch.arange(len(pages), dtype=torch.int32)
    tables.slot_to_page[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
    tables.page_to_slot[pages] = slots
    tables.last_used[: len(pages)] = torch.arange(1, len(pages) + 1)
    tables.clock.fill_(len(pages))
    return _Case(layers, most, tables)


def _measure(
    cache: ExpertCache, modules: Sequence[QuantizedExperts], top_k: int, dtype: torch.dtype
) -> dict[tuple[int, int], float]:
    """Seconds of some layers' step by misses, and by how many of them the host computes."""
    case, sharing, pool = _case(cache, top_k), cache.sharing, cache._pool
    if case is None or sharing is None or pool is None:
        return {}
    device = cache.device
    # Of its own: nobody's random numbers change because a model was loaded.
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, modules[0].layout.hidden_size, device=device, generator=generator).to(dtype)
    weights = torch.full((1, top_k), 1 / top_k, device=device)
    ids = [torch.zeros(1, top_k, dtype=torch.int64, device=device) for _ in range(case.layers)]
    live = replace(pool.residency, counters=case.tables.counters)
    saved, counters = sharing.posts.share.clone(), (cache._counters, sharing.posts.counters)
    counted = [tensor.clone() for tensor in counters]

    def reset() -> None:
        for name in ("page_to_slot", "slot_to_page", "last_used", "clock"):
            getattr(live, name).copy_(getattr(case.tables, name))
        sharing.posts.last_asked.zero_()

    def step() -> None:
        for layer in range(case.layers):
            modules[layer]._fused_moe(x, ids[layer], weights)

    times = {}
    try:
        timed = _timer(step, reset, cache)
        for misses in range(1, case.most + 1):
            for layer, routed in enumerate(ids):
                last = cache.host.layers[layer].num_experts - 1
                gone = [last - i for i in range(misses)]
                routed.copy_(torch.tensor([[*range(top_k - misses), *gone]]))
            for host in range(misses + 1):
                sharing.posts.share.fill_(host)
                times[misses, host] = timed()
    finally:
        sharing.posts.share.copy_(saved)
        for tensor, before in zip(counters, counted, strict=True):
            tensor.copy_(before)
        cache.forget()
    return times


def _timer(
    step: Callable[[], None], reset: Callable[[], None], cache: ExpertCache
) -> Callable[[], float]:
    """A function that returns the median seconds of a step, which begins with ``reset``."""
    reset()
    step()  # compiles
    if cache.device.type != "cuda":

        def once() -> float:
            reset()
            began = time.perf_counter()
            step()
            return time.perf_counter() - began

        return lambda: statistics.median(once() for _ in range(_REPEATS))
    torch.cuda.synchronize(cache.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        reset()
        with cache.lock:
            cache.take_turn()
            begin.record()
            graph.replay()
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    return lambda: statistics.median(replay() for _ in range(_REPEATS))


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


def _read(key: dict[str, Any], length: int) -> list[int] | None:
    """The table that `_write` kept; None, with a line, if it is not there or is another's."""
    file = _file(key)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        table = content["share"]
        right = content["key"] == key and len(table) == length
        if right and all(type(n) is int and 0 <= n <= i for i, n in enumerate(table)):
            return list(table)
        raise ValueError("is of something else")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: is not used, and measured anew (%s)", file, error)
        return None


def _write(key: dict[str, Any], table: list[int]) -> None:
    """Keep a table; where that is not possible, each process measures."""
    with suppress(OSError):
        content = json.dumps({"key": key, "share": table}, indent=1)
        native.write_whole(_file(key), content.encode())
