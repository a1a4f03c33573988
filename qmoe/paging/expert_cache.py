"""The expert cache of one model: slots on the device, and what brings pages into them.

A layer runs in one of three ways, chosen from the number of its tokens alone:

admitted   `qmoe_kernels.paging` gives every routed expert a slot and copies what is absent, in one
           launch. All of it happens on the device: a CUDA graph can hold it.
in waves   the same for a range of experts at a time, where there may be more of them than slots.
streamed   when nearly every expert is routed to (a long prompt), the copy engine brings what is
           absent, group after group, into two staging buffers while the other one is computed
           with. The slots are read, and left as they are.

All three give the same bits as weights that are resident: a product does not depend on where its
weights lie, and a row comes from one wave or group alone, the others add zeros to it.

A cache whose misses are shared (`share_misses`) leaves some of an admitted layer's missed experts
to the host. Then results depend, within rounding, on what was resident.

Where host memory holds a part of the pages only (`FrameStore`), an admitted layer begins with
reading what neither a slot nor a frame has; what is streamed is read past the frames.

On the CPU the same code runs on slots in host memory, and streams and events mean nothing.
"""

from __future__ import annotations

import os
import threading
import traceback
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qmoe.checkpoints.files import CheckpointError
from qmoe.paging.frame_store import FrameStore
from qmoe.paging.host_experts import HostExperts
from qmoe.paging.host_reads import HostReads
from qmoe.paging.host_store import HostStore
from qmoe.paging.stats import CacheStats, LayerStats
from qmoe.sizes import format_size
from qmoe_kernels import weighted_sum
from qmoe_kernels.mailbox import SERVED, WAITED_NS
from qmoe_kernels.paging import HITS, MISSES, CopyList, Residency, Transfer, admit, gather

# compute(gate_up, down, expert_to_slot, topk_ids, topk_weights): one layer's experts, see
# `qmoe_kernels.fused_moe`; without weights it returns (num_tokens, top_k, hidden_size).
Compute = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]

# From so many routed pairs per expert on, a layer is streamed: 98 % of the experts are routed to
# when routing is uniform, and what the slots hold would be washed out.
STREAMED_PAIRS_PER_EXPERT = 4
# From so many tokens on, computing with the experts that are there takes longer than queueing a
# layer in two parts does.
OVERLAPPED_TOKENS = 16


@dataclass(frozen=True)
class _Staged:
    """A group of experts on its way into a staging buffer."""

    layer: int
    group: int
    buffer: int
    ready: Any  # event


@dataclass(frozen=True)
class _Pool:
    """Slots, which pages are in them, and two staging buffers that no admission knows of.

    Attributes:
        residency: the slots' tables.
        num_staging: pages of each staging buffer.
        memory: (num_slots + 2 * num_staging, slot_bytes) uint8.
        weights: of each layer, as views of ``memory``.
        expert_to_slot: of each layer, (num_experts,) int32: views of the tables.
        free: of each staging buffer, the event after which it may be overwritten.
    """

    residency: Residency
    num_staging: int
    memory: Tensor
    weights: list[tuple[Tensor, Tensor]]
    expert_to_slot: list[Tensor]
    free: tuple[Any, Any]

    @property
    def num_slots(self) -> int:
        return len(self.residency.slot_to_page)


class ExpertCache:
    """Slots for the pages of one model, shared by all of its layers.

    Safe to use from several threads: a layer's admission, copies and kernels are queued as one
    under `lock`, and streams wait for each other. A CUDA graph that was captured with the cache is
    replayed after `take_turn`, and is void after `resize`.

    Attributes:
        host: where every page is, or which files have those that host memory has no room for.
        device: where the slots are.
        num_pages: of the model.
        failures: how often a page could not be read, or the host left its share out. What was
            queued before one of them and not given out yet is not valid.
        lock: held by whoever queues work that uses the slots, and while they change.
        overlap: whether a layer computes with the experts that it has while the others fly; None:
            from `OVERLAPPED_TOKENS` tokens on.
    """

    def __init__(
        self,
        host: HostStore | FrameStore,
        device: torch.device | str,
        *,
        num_slots: int,
        num_staging: int,
        overlap: bool | None = None,
    ) -> None:
        """Take the device memory for the slots; nothing is resident yet.

        Args:
            num_slots: pages that fit.
            num_staging: pages of each of the two staging buffers; 0: long prompts go in waves.

        Raises:
            ValueError: no slot at all.
            torch.OutOfMemoryError: the device has less memory than that.
        """
        self.host = host
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.overlap = overlap
        self.slot_bytes = max(layer.page_stride for layer in host.layers)
        # An RLock in C: an interrupt comes before or after it is taken or given back, never between
        # that and the `with` block, as it may where a context manager is written in Python.
        self.lock = threading.RLock()
        self._runtime: Any = torch.cuda if self.device.type == "cuda" else torch.cpu
        num_layers = len(host.layers)
        self.num_pages = sum(layer.num_experts for layer in host.layers)
        self._reads: HostReads | None = None
        if isinstance(host, FrameStore):
            self._reads = HostReads(host, self.device)
            self._addresses = self._reads.frames.addresses
        else:
            self._addresses = host.addresses.to(self.device)
        most = max(layer.num_experts for layer in host.layers)
        self._copies = CopyList.empty(most, self.device)
        self._counters = torch.zeros(num_layers, 2, dtype=torch.int64, device=self.device)
        self._streamed_bytes = [0] * num_layers
        self._last_stream: Any = None
        # Not finished: a page that the tables call resident may never have been copied.
        self._interrupted = False
        self._copy_stream = self._new_stream()
        self._stats_stream = self._new_stream()
        self._closed = False
        self.failures = 0
        # The group that is copied ahead, and the pages that were absent when its pass began. Void
        # as soon as anything else uses the slots.
        self._staged: _Staged | None = None
        self._absent: list[bool] = []
        # What computes some of the misses, and what others before it have done (see `_served`): one
        # value, since counters are read without the lock.
        self._share_state: tuple[HostExperts | None, list[list[int]]] = (
            None,
            [[0, 0] for _ in range(num_layers)],
        )
        self._pool: _Pool | None = None
        self.resize(num_slots, num_staging)
        _caches.add(self)

    def __reduce__(self) -> Any:
        # What copy.deepcopy and pickle ask for; they would stumble over a lock.
        raise TypeError("a paged model cannot be copied or pickled; load it again")

    # ---- memory --------------------------------------------------------------------------------

    @property
    def num_slots(self) -> int:
        """Pages that fit; 0 if a failed `resize` left no memory."""
        return 0 if self._pool is None else self._pool.num_slots

    @property
    def num_staging(self) -> int:
        """Pages of each staging buffer."""
        return 0 if self._pool is None else self._pool.num_staging

    @property
    def num_bytes(self) -> int:
        """Device memory of slots and staging buffers."""
        return 0 if self._pool is None else self._pool.memory.nbytes

    @torch.no_grad()
    def resize(self, num_slots: int, num_staging: int) -> None:
        """Change the number of slots; the pages with the largest claims stay resident.

        Old slots are given back before new ones are taken, so that the memory in use never passes
        the larger of the two; pages come back from the host.

        Args:
            num_slots, num_staging: see :class:`ExpertCache`.

        Raises:
            ValueError: no slot at all; nothing has changed.
            torch.OutOfMemoryError: the device has less memory than that. The cache is as before, or
                has fewer slots where those do not fit any more either; the message says how many.
                Without any it refuses to run until a later `resize` finds memory.
        """
        with self.lock, self._on_device():
            self._refuse_if_closed()
            self._synchronize()
            self._last_stream, self._staged = self._current_stream(), None
            if self._interrupted:
                self._forget()
            old = None if self._pool is None else self._pool.residency
            old_staging = self.num_staging
            residency = self._tables(num_slots, old)
            try:
                self._take(residency, num_staging)
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # they hold what was taken in vain
                self._take_back(old, old_staging)
                if not isinstance(error, torch.OutOfMemoryError):
                    raise
                nbytes = (num_slots + 2 * num_staging) * self.slot_bytes
                raise torch.OutOfMemoryError(
                    f"{self.device} has no {format_size(nbytes)} for {num_slots} slots and 2 x "
                    f"{num_staging} pages to stream; the expert cache has {self.num_slots} slots "
                    "now, free some memory and call qmoe.resize"
                ) from None

    def _tables(self, num_slots: int, old: Residency | None) -> Residency:
        """Tables of so many slots, the first of which hold the pages with the largest claims.

        What is known of pages, and the clock, are the tensors of the old tables and go on; the mean
        of misses is one of so many slots, and begins anew.
        """
        num_layers = len(self._counters)
        tables = Residency.empty(self.num_pages, num_slots, num_layers, self.device)
        tables = replace(tables, counters=self._counters)
        if old is None:
            return tables
        # In the order in which they would be evicted: of one claim, the lower slot first.
        pages = old.slot_to_page[old.slot_to_page >= 0].long()
        pages = pages[old.claims[pages].argsort(stable=True)][-num_slots:]
        slots = torch.arange(len(pages), dtype=torch.int32, device=self.device)
        tables.slot_to_page[: len(pages)] = pages.int()
        tables.last_used[: len(pages)] = old.last_used[old.page_to_slot[pages].long()]
        tables.slot_claims[: len(pages)] = old.claims[pages]
        tables.page_to_slot[pages] = slots
        return replace(
            tables,
            claims=old.claims,
            clock=old.clock,
            last_admitted=old.last_admitted,
        )

    def _take(self, residency: Residency, num_staging: int) -> None:
        """Give the memory back, take that for other slots, and bring the pages that they hold."""
        self._pool = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        pool = self._new_pool(residency, num_staging)
        self._interrupted = True
        self._pool = pool
        for slot, page in enumerate(residency.slot_to_page.tolist()):
            if page >= 0:
                layer, expert = self._layer_of(page)
                for source in self.host.pieces(layer, expert, expert + 1):
                    pool.memory[slot, : source.shape[1]].copy_(source[0], non_blocking=True)
        self._interrupted = False

    def _new_pool(self, residency: Residency, num_staging: int) -> _Pool:
        layers = self.host.layers
        num_slots = len(residency.slot_to_page) + 2 * num_staging
        memory = torch.empty(num_slots, self.slot_bytes, dtype=torch.uint8, device=self.device)
        return _Pool(
            residency=residency,
            num_staging=num_staging,
            memory=memory,
            weights=[layer.views(memory) for layer in layers],
            expert_to_slot=[
                residency.page_to_slot[first : first + layer.num_experts]
                for layer, first in zip(layers, self.host.first_page, strict=True)
            ],
            free=(self._runtime.Event(), self._runtime.Event()),
        )

    def _take_back(self, old: Residency | None, num_staging: int) -> None:
        """Take the slots that there were; where they do not fit any more, half as many, empty."""
        num_slots = 0 if old is None else len(old.slot_to_page)
        while old is not None and num_slots:
            with suppress(torch.OutOfMemoryError):
                self._take(_first_slots(old, num_slots), num_staging)
                return
            num_slots, num_staging = num_slots // 2, 0

    def _layer_of(self, page: int) -> tuple[int, int]:
        layer = bisect_right(self.host.first_page, page) - 1
        return layer, page - self.host.first_page[layer]

    def forget(self) -> None:
        """Empty every slot, once the device has ended what it does."""
        with self.lock, self._on_device():
            self._synchronize()
            self._forget()

    def share_misses(self, sharing: HostExperts | None) -> None:
        """Let the host compute some of the misses from now on, which the cache then owns."""
        with self.lock, self._on_device():
            self._refuse_if_closed()
            before = self.sharing
            if before is sharing:
                return
            self._synchronize()
            self._share_state = sharing, self._served()
            if before is not None:
                before.stop()

    @property
    def sharing(self) -> HostExperts | None:
        """What computes some of the misses; None: all come over the link."""
        return self._share_state[0]

    def _forget(self) -> None:
        """Empty every slot: what a step that was cut off left there is not known."""
        self._staged = None
        if self.sharing is not None:
            self.sharing.drain()
        if self._reads is not None:
            with self._counting_failures():
                self._reads.forget()
        if self._pool is not None:
            self._pool.residency.clear()
        self._interrupted = False

    def close(self) -> None:
        """Give device and host memory back. The cache cannot be used again."""
        with self.lock:
            self._closed = True
            self._synchronize()
            if self.sharing is not None:
                self.sharing.stop()
            if self._reads is not None:
                self._reads.stop()
            self._pool = self._staged = None
            self._share_state = None, self._served()
            self.host.close()

    # ---- a layer -------------------------------------------------------------------------------

    @torch.compiler.disable
    def run(
        self,
        layer: int,
        topk_ids: Tensor,  # (num_tokens, top_k)
        topk_weights: Tensor | None,  # (num_tokens, top_k)
        compute: Compute,
        hidden_states: Tensor | None = None,  # (num_tokens, hidden_size)
    ) -> Tensor:
        """Run one layer's experts; they are in slots while ``compute`` is called.

        Args:
            layer: its index in the host store.
            topk_ids, topk_weights: go to ``compute``, perhaps in parts.
            hidden_states: the rows, for the host where misses are shared; without them they are
                not.

        Returns:
            what ``compute`` returns for all of ``topk_ids``.

        Raises:
            ValueError: after `close`.
            CheckpointError: a page could not be read.
            RuntimeError: a `resize` that failed left no slots, or the host did not compute its
                share.
        """
        with self.lock, self._on_device():
            pool = self._follow()
            num_pairs, num_experts = topk_ids.numel(), self.host.layers[layer].num_experts
            many = num_pairs >= STREAMED_PAIRS_PER_EXPERT * num_experts
            if pool.num_staging and many and not self._capturing():
                return self._run_streamed(pool, layer, topk_ids, topk_weights, compute)
            self._staged = None
            if min(num_pairs, num_experts) > self._most_at_once(pool):
                return self._run_in_waves(pool, layer, topk_ids, topk_weights, compute)
            self._read(pool, layer, topk_ids)
            if hidden_states is None or not self._shares(hidden_states, topk_ids, topk_weights):
                return self._run_admitted(pool, layer, topk_ids, topk_weights, compute)
            return self._run_shared(pool, layer, hidden_states, topk_ids, topk_weights, compute)

    def _shares(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor | None) -> bool:
        """Whether the host may compute some of this call; no gradient comes back from there."""
        records = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (hidden_states, topk_weights)
        )
        return self.sharing is not None and not records and self.sharing.takes(*topk_ids.shape)

    def _run_shared(
        self,
        pool: _Pool,
        layer: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor | None,
        compute: Compute,
    ) -> Tensor:
        """The host computes some of the experts that are absent, the link brings the others."""
        sharing = self.sharing
        assert sharing is not None
        if not self._capturing():
            sharing.begin([layer])
        there = self._there_before(pool, layer, topk_ids)
        self._interrupted = True
        tables = pool.residency, self._copies
        transfer = self._transfer(pool, layer) if there is None else None
        link_ids = sharing.admit(*tables, layer, hidden_states, topk_ids, transfer)
        if there is None:
            if transfer is None:
                self._gather(pool, layer)
            rows = compute(*pool.weights[layer], pool.expert_to_slot[layer], link_ids, None)
        else:
            rows = self._hits_first(pool, layer, link_ids, None, compute, there)
        self._interrupted = True
        output = sharing.collect(layer, rows, topk_ids, link_ids, topk_weights)
        self._interrupted = False
        return output

    def _run_admitted(
        self,
        pool: _Pool,
        layer: int,
        topk_ids: Tensor,
        topk_weights: Tensor | None,
        compute: Compute,
    ) -> Tensor:
        """With all experts that are routed to in slots."""
        there = self._there_before(pool, layer, topk_ids)
        self._interrupted = True
        if there is not None:
            self._admit(pool, layer, topk_ids)
            return self._hits_first(pool, layer, topk_ids, topk_weights, compute, there)
        self._fetch(pool, layer, topk_ids)
        self._interrupted = False
        slots = pool.expert_to_slot[layer]
        return compute(*pool.weights[layer], slots, topk_ids, topk_weights)

    def _there_before(self, pool: _Pool, layer: int, topk_ids: Tensor) -> Tensor | None:
        """(num_experts + 1,) bool: what is there before an admission; None: nobody asks."""
        overlap = self.overlap
        if overlap is None:
            overlap = topk_ids.shape[0] >= OVERLAPPED_TOKENS
        if not overlap:
            return None
        slots = pool.expert_to_slot[layer]
        return torch.cat((slots >= 0, slots.new_zeros(1, dtype=torch.bool)))

    def _hits_first(
        self,
        pool: _Pool,
        layer: int,
        topk_ids: Tensor,
        topk_weights: Tensor | None,
        compute: Compute,
        there: Tensor,
    ) -> Tensor:
        """Compute what was there before an admission while the others are copied.

        Args:
            there: from `_there_before`.
        """
        weights, slots = pool.weights[layer], pool.expert_to_slot[layer]
        num_experts = slots.shape[0]
        admitted = self._event()
        with self._runtime.stream(self._copy_stream):
            admitted.wait(self._copy_stream)
            self._gather(pool, layer)
            gathered = self._event()
        in_range = (topk_ids >= 0) & (topk_ids < num_experts)
        hit = there[torch.where(in_range, topk_ids, num_experts)]
        rows = compute(*weights, slots, topk_ids.masked_fill(~hit, num_experts), None)
        gathered.wait(self._current_stream())
        self._interrupted = False
        rows = rows + compute(*weights, slots, topk_ids.masked_fill(hit, num_experts), None)
        return rows if topk_weights is None else weighted_sum(rows, topk_weights)

    def _run_in_waves(
        self,
        pool: _Pool,
        layer: int,
        topk_ids: Tensor,
        topk_weights: Tensor | None,
        compute: Compute,
    ) -> Tensor:
        """As many experts at a time as there are slots."""
        rows: Tensor | None = None
        for experts in _ranges(self.host.layers[layer].num_experts, self._most_at_once(pool)):
            self._read(pool, layer, topk_ids, experts)
            self._interrupted = True
            self._fetch(pool, layer, topk_ids, experts=experts)
            self._interrupted = False
            ids = self._only(topk_ids, layer, experts)
            wave = compute(*pool.weights[layer], pool.expert_to_slot[layer], ids, None)
            rows = wave if rows is None else rows + wave
        assert rows is not None
        return rows if topk_weights is None else weighted_sum(rows, topk_weights)

    def _run_streamed(
        self,
        pool: _Pool,
        layer: int,
        topk_ids: Tensor,
        topk_weights: Tensor | None,
        compute: Compute,
    ) -> Tensor:
        """Group after group through the staging buffers; the next group is on its way meanwhile."""
        groups = self._groups(pool, layer)
        rows: Tensor | None = None
        for group, experts in enumerate(groups):
            staged, self._staged = self._staged, None
            if staged is None or (staged.layer, staged.group) != (layer, group):
                # What is resident does not change while layers are streamed, so that one look at
                # the tables serves a whole pass through the model.
                self._absent = (pool.residency.page_to_slot < 0).tolist()
                staged = self._stage(pool, layer, group, 0)
            following = self._following(pool, layer, group)
            if following is not None:
                self._staged = self._stage(pool, *following, 1 - staged.buffer)
            slots = self._slots_while_staged(pool, staged, experts[0])
            staged.ready.wait(self._current_stream())
            if len(groups) == 1:
                output = compute(*pool.weights[layer], slots, topk_ids, topk_weights)
            else:
                ids = self._only(topk_ids, layer, experts)
                output = compute(*pool.weights[layer], slots, ids, None)
            pool.free[staged.buffer].record(self._current_stream())
            rows = output if rows is None else rows + output
        assert rows is not None
        if topk_weights is None or len(groups) == 1:
            return rows
        return weighted_sum(rows, topk_weights)

    def _slots_while_staged(self, pool: _Pool, staged: _Staged, first: int) -> Tensor:
        """(num_experts,) int32: an expert's slot, or its place in the staging buffer.

        Args:
            first: the first expert of the group that is staged; the others' places mean nothing.
        """
        resident = pool.expert_to_slot[staged.layer]
        places = torch.arange(-first, len(resident) - first, dtype=torch.int32, device=self.device)
        places += pool.num_slots + staged.buffer * pool.num_staging
        return torch.where(resident >= 0, resident, places)

    def _groups(self, pool: _Pool, layer: int) -> list[tuple[int, int]]:
        return _ranges(self.host.layers[layer].num_experts, pool.num_staging)

    def _following(self, pool: _Pool, layer: int, group: int) -> tuple[int, int] | None:
        if group + 1 < len(self._groups(pool, layer)):
            return layer, group + 1
        return (layer + 1, 0) if layer + 1 < len(self.host.layers) else None

    def _stage(self, pool: _Pool, layer: int, group: int, buffer: int) -> _Staged:
        """Queue the copies of a group's absent pages into a staging buffer."""
        low, high = self._groups(pool, layer)[group]
        first_slot = pool.num_slots + buffer * pool.num_staging
        first_page = self.host.first_page[layer]
        ready = self._runtime.Event()
        with self._runtime.stream(self._copy_stream):
            pool.free[buffer].wait(self._copy_stream)
            for start, end in _stretches(self._absent[first_page + low : first_page + high]):
                slot = first_slot + start
                for source in self.host.pieces(layer, low + start, low + end):
                    target = pool.memory[slot : slot + len(source)]
                    if source.shape == target.shape:  # one copy
                        target.copy_(source, non_blocking=True)
                    else:
                        for one, other in zip(source, target, strict=True):
                            other[: one.shape[0]].copy_(one, non_blocking=True)
                    slot += len(source)
                    self._streamed_bytes[layer] += source.nbytes
            ready.record(self._copy_stream)
        return _Staged(layer, group, buffer, ready)

    def _only(self, topk_ids: Tensor, layer: int, experts: tuple[int, int]) -> Tensor:
        """The same ids with those outside a range made ones that are skipped."""
        low, high = experts
        outside = (topk_ids < low) | (topk_ids >= high)
        return topk_ids.masked_fill(outside, self.host.layers[layer].num_experts)

    # ---- steps of a layer ----------------------------------------------------------------------

    def _most_at_once(self, pool: _Pool) -> int:
        """Experts that one admission can bring."""
        return min(pool.num_slots, self._reads.num_frames) if self._reads else pool.num_slots

    def _read(
        self, pool: _Pool, layer: int, topk_ids: Tensor, experts: tuple[int, int] | None = None
    ) -> None:
        """Bring what is in no slot into host memory, where that does not hold all pages."""
        if self._reads is not None:
            self._interrupted = True
            with self._counting_failures():
                self._reads.read(layer, topk_ids, pool.residency.page_to_slot, experts)
            self._interrupted = False

    def _fetch(self, pool: _Pool, layer: int, topk_ids: Tensor, **options: Any) -> None:
        """Admit, and copy what is absent: on a GPU all of it is one launch."""
        transfer = self._transfer(pool, layer)
        if transfer is not None:
            self._admit(pool, layer, topk_ids, transfer=transfer, **options)
            return
        self._admit(pool, layer, topk_ids, **options)
        self._gather(pool, layer)

    def _transfer(self, pool: _Pool, layer: int) -> Transfer | None:
        """What a kernel copies a layer's pages by; None: there are no kernels."""
        if self.device.type != "cuda":
            return None
        return Transfer(self._addresses, pool.memory, self.host.layers[layer].page_stride)

    def _admit(self, pool: _Pool, layer: int, topk_ids: Tensor, **options: Any) -> None:
        first_page = self.host.first_page[layer]
        num_experts = self.host.layers[layer].num_experts
        tables = pool.residency, self._copies
        admit(topk_ids, layer, first_page, num_experts, *tables, **options)

    def _gather(self, pool: _Pool, layer: int) -> None:
        transfer = self._transfer(pool, layer)
        if transfer is not None:
            gather(transfer, self._copies)
            return
        page_bytes = self.host.layers[layer].page_stride
        for page, slot in self._copies.listed():
            if isinstance(self.host, HostStore):
                source = self.host.pages(layer)[page - self.host.first_page[layer]]
            else:
                assert self._reads is not None
                source = self._reads.page(page)
            pool.memory[slot, :page_bytes] = source[:page_bytes]

    # ---- threads and streams -------------------------------------------------------------------

    def take_turn(self) -> None:
        """Order what the current stream gets next behind everything that used the cache before.

        For work that uses the slots without `run`: the replay of a captured graph. Nothing of it
        may be queued before, and all of it while `lock` is held::

            with cache.lock:
                cache.take_turn()
                graph.replay()

        Raises:
            ValueError: after `close`.
            RuntimeError: a `resize` that failed left no slots.
        """
        with self.lock, self._on_device():
            self._follow()
            if not self._capturing():
                with self._counting_failures():
                    if self.sharing is not None:
                        self.sharing.begin()
                    if self._reads is not None:
                        self._unless_failed(self._reads.begin)
            self._staged = None  # other pages may be resident afterwards

    def check_answers(self) -> None:
        """Raise if the host did not compute its share of what the device has done, or read it.

        For results that were waited for and are about to be given out.

        Raises:
            RuntimeError: it did not compute its share.
            CheckpointError: a page could not be read.
        """
        with self.lock, self._on_device(), self._counting_failures():
            if self.sharing is not None:
                self.sharing.check()
            if self._reads is not None:
                self._unless_failed(self._reads.check)

    def _unless_failed(self, look: Callable[[], None]) -> None:
        """Look whether reading has failed; if so, the slots hold anything."""
        before, self._interrupted = self._interrupted, True
        look()
        self._interrupted = before

    @contextmanager
    def _counting_failures(self) -> Iterator[None]:
        try:
            yield
        except (CheckpointError, RuntimeError):
            self.failures += 1
            raise

    def stop_workers(self) -> None:
        """End the threads on the host, if there are some; the next step starts others."""
        with self.lock, self._on_device():
            if self.sharing is not None or self._reads is not None:
                self._synchronize()
            if self.sharing is not None:
                self.sharing.stop()
            if self._reads is not None:
                self._reads.stop()

    def _follow(self) -> _Pool:
        """Let the current stream wait for the last one that used the slots."""
        self._refuse_if_closed()
        if self._pool is None:
            raise RuntimeError(
                f"the expert cache found no memory on {self.device} when it was last resized; free "
                "some and call qmoe.resize"
            )
        if self._capturing():
            if self._interrupted:
                raise ValueError("the last step was cut off; run the model once before a capture")
            return self._pool
        stream = self._current_stream()
        if self._last_stream is not None and self._last_stream != stream:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream
        if self._interrupted:
            self._synchronize()
            self._forget()
        return self._pool

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ValueError("this expert cache is closed; load the model again")

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and bool(torch.cuda.is_current_stream_capturing())

    def _on_device(self) -> Any:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _current_stream(self) -> Any:
        return self._runtime.current_stream(self.device)

    def _new_stream(self) -> Any:
        if self.device.type == "cuda":
            return torch.cuda.Stream(self.device)
        return torch.cpu.Stream()

    def _event(self) -> Any:
        """An event that is recorded on the current stream."""
        event = self._runtime.Event()
        event.record(self._current_stream())
        return event

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # ---- statistics ----------------------------------------------------------------------------

    def read_counters(self) -> CacheStats:
        """Read the counters as they are now; what is being computed is not waited for."""
        with self._runtime.stream(self._stats_stream):
            counters = self._counters.tolist()
            shared = self._served()
            reads = self._reads.read_counters() if self._reads else [[0, 0]] * len(counters)
        return CacheStats(
            layers=tuple(
                LayerStats(
                    hits=row[HITS],
                    misses=row[MISSES],
                    streamed_bytes=streamed,
                    host_misses=host[SERVED],
                    waited_ns=host[WAITED_NS],
                    disk_misses=read[0],
                    disk_bytes=read[0] * pages.page_bytes + (streamed if self._reads else 0),
                    disk_waited_ns=read[1],
                )
                for row, host, streamed, read, pages in zip(
                    counters, shared, self._streamed_bytes, reads, self.host.layers, strict=True
                )
            ),
            page_bytes=tuple(layer.page_bytes for layer in self.host.layers),
            num_slots=self.num_slots,
            num_pages=self.num_pages,
        )

    def _served(self) -> list[list[int]]:
        """Of each layer, the columns of `mailbox.Posts`' counters since the cache was made."""
        sharing, before = self._share_state
        if sharing is None:
            return before
        now = sharing.read_counters()
        return [
            [a + b for a, b in zip(*rows, strict=True)] for rows in zip(before, now, strict=True)
        ]


def _first_slots(residency: Residency, num_slots: int) -> Residency:
    """The same tables; of fewer slots, in the same memory and empty."""
    if num_slots < len(residency.slot_to_page):
        by_slot = ("slot_to_page", "last_used", "slot_claims")
        parts = {name: getattr(residency, name)[:num_slots] for name in by_slot}
        residency = replace(residency, **parts)
        residency.clear()
    return residency


def _ranges(num_experts: int, size: int) -> list[tuple[int, int]]:
    """[0, num_experts) in ranges of at most ``size``."""
    return [(low, min(low + size, num_experts)) for low in range(0, num_experts, size)]


def _stretches(wanted: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """The ranges in which every item of ``wanted`` is true."""
    start: int | None = None
    for i, item in enumerate((*wanted, False)):
        if item and start is None:
            start = i
        elif not item and start is not None:
            yield start, i
            start = None


# All there are: see `_renew`.
_caches: weakref.WeakSet[ExpertCache] = weakref.WeakSet()


def _renew() -> None:
    """In a child process: a thread that used a cache is not there, and did not finish."""
    for cache in list(_caches):
        if cache.lock.acquire(blocking=False):
            cache.lock.release()
        else:
            cache.lock = threading.RLock()
            cache._interrupted = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
