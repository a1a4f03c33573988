"""The expert cache of one model: slots on the device, and what brings pages into them.

A layer runs in one of three ways, chosen from the number of its tokens alone:

admitted   `qmoe_kernels.paging` gives every routed expert a slot and copies what is absent. All of
           it happens on the device: a CUDA graph can hold it.
in waves   the same for a range of experts at a time, where there may be more of them than slots.
streamed   when nearly every expert is routed to (a long prompt), the copy engine brings what is
           absent, group after group, into two staging buffers while the other one is computed
           with. The slots are read, and left as they are.

All three give the same bits as weights that are resident: a product does not depend on where its
weights lie, and a row comes from one wave or group alone, the others add zeros to it.

On the CPU the same code runs on slots in host memory, and streams and events mean nothing.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmoe.paging.host_store import HostStore
from qmoe.paging.stats import CacheStats, LayerStats
from qmoe_kernels import weighted_sum
from qmoe_kernels.paging import (
    HITS,
    MISSES,
    PREFETCH_USED,
    PREFETCHED,
    CopyList,
    Residency,
    admit,
    gather,
)

# compute(gate_up, down, expert_to_slot, topk_ids, topk_weights): one layer's experts, see
# `qmoe_kernels.fused_moe`; without weights it returns (num_tokens, top_k, hidden_size).
Compute = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
# (num_tokens, hidden_size) -> (num_tokens, k): experts of the next layer, most likely first.
Predictor = Callable[[Tensor], Tensor]

# From so many routed pairs per expert on, a layer is streamed: 98 % of the experts are routed to
# when routing is uniform, and a least recently used cache would be washed out.
STREAMED_PAIRS_PER_EXPERT = 4
# More tokens than this keep the link busy by themselves.
PREFETCHED_TOKENS = 8
# What a layer may copy ahead: about what the link carries while a layer computes. More costs
# little, as most of it is needed; docs/expert-cache.md has the figures.
PREFETCHED_BYTES = 15 << 20
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


class ExpertCache:
    """Slots for the pages of one model, shared by all of its layers.

    Safe to use from several threads: a layer's admission, copies and kernels are queued as one, and
    streams wait for each other. A CUDA graph that was captured with the cache must be replayed
    by one thread at a time, on one stream with everything else that uses the model, and is void
    after `resize`.

    Attributes:
        host: where every page is.
        device: where the slots are.
        num_slots: pages that fit.
        num_staging: pages of each of the two staging buffers; 0: long prompts go in waves.
        prefetch: whether pages are copied ahead of their layer.
        overlap: whether a layer computes with the experts that it has while the others fly; None:
            from `OVERLAPPED_TOKENS` tokens on.
    """

    def __init__(
        self,
        host: HostStore,
        device: torch.device | str,
        *,
        num_slots: int,
        num_staging: int,
        prefetch: bool = False,
        overlap: bool | None = None,
        predictors: Sequence[Predictor | None] | None = None,
    ) -> None:
        """Take the device memory for the slots; nothing is resident yet.

        Args:
            predictors: for each layer, what proposes experts of the next one from the hidden
                states that go into this one's experts; None: nothing is proposed.

        Raises:
            ValueError: no slot at all.
            torch.OutOfMemoryError: the device has less memory than that.
        """
        self.host = host
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.prefetch = prefetch
        self.overlap = overlap
        num_layers = len(host.layers)
        self._predictors = list(predictors or [None] * num_layers)
        self._runtime: Any = torch.cuda if self.device.type == "cuda" else torch.cpu
        self._addresses = host.addresses.to(self.device)
        self._num_pages = host.addresses.shape[0]
        self.slot_bytes = max(layer.page_stride for layer in host.layers)
        most = max(layer.num_experts for layer in host.layers)
        self._copies = CopyList.empty(most, self.device)
        self._prefetch_copies = CopyList.empty(most, self.device)
        self._streamed_bytes = [0] * num_layers

        self._lock = threading.RLock()
        self._last_stream: Any = None
        # Not finished: a page that the tables call resident may never have been copied.
        self._interrupted = False
        self._prefetch_stream = self._new_stream()
        self._copy_stream = self._new_stream()
        self._stats_stream = self._new_stream()
        # The event after which prefetched pages are there, what must live until then, and whether
        # both belong to a graph that is being captured.
        self._prefetching: tuple[Any, Tensor, bool] | None = None
        self._closed = False
        self._staged: _Staged | None = None
        self._absent: list[bool] = []
        self._allocate(num_slots, num_staging)

    def __reduce__(self) -> Any:
        # What copy.deepcopy and pickle ask for; they would stumble over a lock.
        raise TypeError("a paged model cannot be copied or pickled; load it again")

    # ---- memory --------------------------------------------------------------------------------

    def _allocate(self, num_slots: int, num_staging: int) -> None:
        layers = self.host.layers
        self._residency = Residency.empty(self._num_pages, num_slots, len(layers), self.device)
        self.num_slots, self.num_staging = num_slots, num_staging
        # Staging buffers are slots that no admission knows of.
        self.memory = torch.empty(
            num_slots + 2 * num_staging, self.slot_bytes, dtype=torch.uint8, device=self.device
        )
        self._weights = [layer.views(self.memory) for layer in layers]
        self._expert_to_slot = [
            self._residency.page_to_slot[first : first + layer.num_experts]
            for layer, first in zip(layers, self.host.first_page, strict=True)
        ]
        self._free = [self._runtime.Event(), self._runtime.Event()]
        self._staged = None

    def resize(self, num_slots: int, num_staging: int) -> None:
        """Change the number of slots; the most recently used pages stay resident.

        Old slots are given back before new ones are taken, so that the memory in use never passes
        the larger of the two; pages come back from the host.

        Raises:
            ValueError: no slot at all.
            torch.OutOfMemoryError: the device has less memory than that.
            In both cases the slots are as many as before, and empty.
        """
        with self._exclusive():
            self._synchronize()
            old, before = self._residency, (self.num_slots, self.num_staging)
            # In the order in which they would be evicted: of one stamp, the lower slot first.
            recent = old.last_used.argsort(stable=True)[-num_slots:]
            recent = recent[old.slot_to_page[recent] >= 0]
            try:
                del self.memory, self._weights
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                self._allocate(num_slots, num_staging)
            except BaseException:
                self._allocate(*before)
                raise
            finally:
                self._residency.counters.copy_(old.counters)
                self._residency.credit.copy_(old.credit)
            self._interrupted = True
            self._load(old.slot_to_page[recent].tolist())
            self._residency.prefetched[: len(recent)] = old.prefetched[recent]
            self._interrupted = False

    def _load(self, pages: Sequence[int]) -> None:
        """Bring pages into the empty slots 0, 1, 2 ..., the last one being the most recent."""
        num = len(pages)
        for slot, page in enumerate(pages):
            layer, expert = self._layer_of(page)
            source = self.host.pages(layer)[expert]
            self.memory[slot, : source.shape[0]].copy_(source, non_blocking=True)
        r = self._residency
        slots = torch.arange(num, dtype=torch.int32, device=self.device)
        ids = torch.tensor(pages, dtype=torch.int32, device=self.device)
        r.slot_to_page[:num] = ids
        r.page_to_slot[ids.long()] = slots
        r.last_used[:num] = slots.long() + 1
        r.clock.fill_(num)

    def _layer_of(self, page: int) -> tuple[int, int]:
        layer = bisect_right(self.host.first_page, page) - 1
        return layer, page - self.host.first_page[layer]

    def _forget(self) -> None:
        """Empty every slot."""
        r = self._residency
        r.page_to_slot.fill_(-1)
        r.slot_to_page.fill_(-1)
        r.last_used.zero_()
        r.prefetched.zero_()

    def close(self) -> None:
        """Give device and host memory back. The cache cannot be used again."""
        with self._lock:
            if self._closed:
                return
            self._synchronize()
            self._closed = True
            self._prefetching = self._staged = None
            del self.memory, self._weights, self._expert_to_slot, self._residency
            self.host.close()

    # ---- a layer -------------------------------------------------------------------------------

    @torch.compiler.disable
    def run(
        self,
        layer: int,
        hidden_states: Tensor,  # (num_tokens, hidden_size)
        topk_ids: Tensor,  # (num_tokens, top_k)
        topk_weights: Tensor | None,  # (num_tokens, top_k)
        compute: Compute,
    ) -> Tensor:
        """Run one layer's experts; they are in slots while ``compute`` is called.

        Args:
            layer: its index in the host store.
            hidden_states: what the next layer's experts are guessed from.
            topk_ids, topk_weights: go to ``compute``, perhaps in parts.

        Returns:
            what ``compute`` returns for all of ``topk_ids``.
        """
        with self._exclusive() as capturing:
            self._join_prefetch()
            num_pairs, num_experts = topk_ids.numel(), self.host.layers[layer].num_experts
            if (
                self.num_staging
                and not capturing
                and num_pairs >= STREAMED_PAIRS_PER_EXPERT * num_experts
            ):
                return self._run_streamed(layer, topk_ids, topk_weights, compute)
            self._staged = None  # chosen by what was resident then
            if min(num_pairs, num_experts) > self.num_slots:
                return self._run_in_waves(layer, topk_ids, topk_weights, compute)
            self._interrupted = True
            overlap = self.overlap
            if overlap is None:
                overlap = topk_ids.shape[0] >= OVERLAPPED_TOKENS
            if overlap:
                return self._run_overlapped(layer, hidden_states, topk_ids, topk_weights, compute)
            self._admit(self._copies, layer, topk_ids)
            admitted = self._event()
            self._gather(self._copies, layer)
            self._start_prefetch(layer, hidden_states, admitted, self._event())
            self._interrupted = False
            return compute(
                *self._weights[layer], self._expert_to_slot[layer], topk_ids, topk_weights
            )

    def _run_overlapped(
        self,
        layer: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor | None,
        compute: Compute,
    ) -> Tensor:
        """Experts that are there first, while the others are copied on another stream."""
        slots = self._expert_to_slot[layer]
        num_experts = slots.shape[0]
        was_there = torch.cat((slots >= 0, slots.new_zeros(1, dtype=torch.bool)))
        self._admit(self._copies, layer, topk_ids)
        admitted = self._event()
        with self._runtime.stream(self._copy_stream):
            admitted.wait(self._copy_stream)
            self._gather(self._copies, layer)
            gathered = self._event()
        self._start_prefetch(layer, hidden_states, admitted, gathered)
        in_range = (topk_ids >= 0) & (topk_ids < num_experts)
        hit = was_there[torch.where(in_range, topk_ids, num_experts)]
        weights = self._weights[layer]
        rows = compute(*weights, slots, topk_ids.masked_fill(~hit, num_experts), None)
        gathered.wait(self._current_stream())
        self._interrupted = False
        rows = rows + compute(*weights, slots, topk_ids.masked_fill(hit, num_experts), None)
        return rows if topk_weights is None else weighted_sum(rows, topk_weights)

    def _run_in_waves(
        self, layer: int, topk_ids: Tensor, topk_weights: Tensor | None, compute: Compute
    ) -> Tensor:
        """As many experts at a time as there are slots."""
        rows: Tensor | None = None
        for experts in _ranges(self.host.layers[layer].num_experts, self.num_slots):
            self._interrupted = True
            self._admit(self._copies, layer, topk_ids, experts=experts)
            self._gather(self._copies, layer)
            self._interrupted = False
            ids = self._only(topk_ids, layer, experts)
            wave = compute(*self._weights[layer], self._expert_to_slot[layer], ids, None)
            rows = wave if rows is None else rows + wave
        assert rows is not None
        return rows if topk_weights is None else weighted_sum(rows, topk_weights)

    def _run_streamed(
        self, layer: int, topk_ids: Tensor, topk_weights: Tensor | None, compute: Compute
    ) -> Tensor:
        """Group after group through the staging buffers; the next group is on its way meanwhile."""
        resident = self._expert_to_slot[layer]
        groups = self._groups(layer)
        rows: Tensor | None = None
        for group, experts in enumerate(groups):
            staged, self._staged = self._staged, None
            if staged is None or (staged.layer, staged.group) != (layer, group):
                # What is resident does not change while layers are streamed, so that one look at
                # the tables serves a whole pass through the model.
                self._absent = (self._residency.page_to_slot < 0).tolist()
                staged = self._stage(layer, group, 0)
            following = self._following(layer, group)
            if following is not None:
                self._staged = self._stage(*following, 1 - staged.buffer)
            low = experts[0]
            # Staging slots of the group's experts, for those that have no slot of their own.
            slots = torch.arange(-low, len(resident) - low, dtype=torch.int32, device=self.device)
            slots += self.num_slots + staged.buffer * self.num_staging
            slots = torch.where(resident >= 0, resident, slots)
            staged.ready.wait(self._current_stream())
            weights = self._weights[layer]
            if len(groups) == 1:
                output = compute(*weights, slots, topk_ids, topk_weights)
            else:
                output = compute(*weights, slots, self._only(topk_ids, layer, experts), None)
            self._free[staged.buffer].record(self._current_stream())
            rows = output if rows is None else rows + output
        assert rows is not None
        return (
            rows if topk_weights is None or len(groups) == 1 else weighted_sum(rows, topk_weights)
        )

    def _groups(self, layer: int) -> list[tuple[int, int]]:
        return _ranges(self.host.layers[layer].num_experts, self.num_staging)

    def _following(self, layer: int, group: int) -> tuple[int, int] | None:
        if group + 1 < len(self._groups(layer)):
            return layer, group + 1
        return (layer + 1, 0) if layer + 1 < len(self.host.layers) else None

    def _stage(self, layer: int, group: int, buffer: int) -> _Staged:
        """Queue the copies of a group's absent pages into a staging buffer."""
        low, high = self._groups(layer)[group]
        first_slot = self.num_slots + buffer * self.num_staging
        pages = self.host.pages(layer)
        first_page = self.host.first_page[layer]
        ready = self._runtime.Event()
        with self._runtime.stream(self._copy_stream):
            self._free[buffer].wait(self._copy_stream)
            for start, end in _runs(self._absent[first_page + low : first_page + high]):
                source = pages[low + start : low + end]
                target = self.memory[first_slot + start : first_slot + end]
                if source.shape == target.shape:  # one piece
                    target.copy_(source, non_blocking=True)
                else:
                    for one, other in zip(source, target, strict=True):
                        other[: one.shape[0]].copy_(one, non_blocking=True)
                self._streamed_bytes[layer] += source.nbytes
            ready.record(self._copy_stream)
        return _Staged(layer, group, buffer, ready)

    def _only(self, topk_ids: Tensor, layer: int, experts: tuple[int, int]) -> Tensor:
        """The same ids with those outside a range made ones that are skipped."""
        low, high = experts
        outside = (topk_ids < low) | (topk_ids >= high)
        return topk_ids.masked_fill(outside, self.host.layers[layer].num_experts)

    # ---- steps of a layer ----------------------------------------------------------------------

    def _admit(self, copies: CopyList, layer: int, topk_ids: Tensor, **options: Any) -> None:
        first_page = self.host.first_page[layer]
        num_experts = self.host.layers[layer].num_experts
        admit(topk_ids, layer, first_page, num_experts, self._residency, copies, **options)

    def _gather(self, copies: CopyList, layer: int) -> None:
        page_bytes = self.host.layers[layer].page_stride
        if self.device.type == "cuda":
            gather(self._addresses, self.memory, copies, page_bytes)
            return
        pages, first_page = self.host.pages(layer), self.host.first_page[layer]
        for i in range(int(copies.count)):
            page, slot = int(copies.pages[i]), int(copies.slots[i])
            self.memory[slot, :page_bytes] = pages[page - first_page]

    def _start_prefetch(
        self, layer: int, hidden_states: Tensor, admitted: Any, gathered: Any
    ) -> None:
        """Copy what the next layer will probably need, behind what this one needs."""
        predict = self._predictors[layer] if self.prefetch else None
        if predict is None or hidden_states.shape[0] > PREFETCHED_TOKENS:
            return
        limit = PREFETCHED_BYTES // self.host.layers[layer + 1].page_bytes
        if not limit:
            return
        stream = self._prefetch_stream
        with self._runtime.stream(stream):
            admitted.wait(stream)
            ids = predict(hidden_states)
            self._admit(self._prefetch_copies, layer + 1, ids, prefetch=limit)
            gathered.wait(stream)
            self._gather(self._prefetch_copies, layer + 1)
            self._prefetching = (self._event(), hidden_states, self._capturing())

    def _join_prefetch(self) -> None:
        if self._prefetching is not None:
            prefetched, _, captured = self._prefetching
            # What was queued before a capture began has been waited for; what was captured in a
            # graph that was given up never runs.
            if captured == self._capturing():
                prefetched.wait(self._current_stream())
            self._prefetching = None

    # ---- threads and streams -------------------------------------------------------------------

    @contextmanager
    def _exclusive(self) -> Iterator[bool]:
        """Queue behind what other threads queued; yields whether a CUDA graph is being captured."""
        with self._lock, self._on_device():
            if self._closed:
                raise ValueError("this expert cache is closed; load the model again")
            capturing = self._capturing()
            stream = self._current_stream()
            if not capturing:
                if self._last_stream is not None and self._last_stream != stream:
                    stream.wait_stream(self._last_stream)
                self._last_stream = stream
            if self._interrupted and capturing:
                raise ValueError("the last step was cut off; run the model once before a capture")
            if self._interrupted:
                self._synchronize()
                self._forget()
                self._interrupted = False
            yield capturing

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
        r = self._residency
        with self._runtime.stream(self._stats_stream):
            counters = r.counters.tolist()
            waiting = r.slot_to_page[r.prefetched.bool()].tolist()
        unused = [0] * len(counters)
        for page in waiting:
            if page >= 0:
                unused[self._layer_of(page)[0]] += 1
        return CacheStats(
            layers=tuple(
                LayerStats(
                    hits=row[HITS],
                    misses=row[MISSES],
                    prefetched=row[PREFETCHED],
                    prefetch_used=row[PREFETCH_USED],
                    # The tables may be a step ahead of the counters.
                    prefetch_wasted=max(0, row[PREFETCHED] - row[PREFETCH_USED] - unused[layer]),
                    streamed_bytes=self._streamed_bytes[layer],
                )
                for layer, row in enumerate(counters)
            ),
            page_bytes=tuple(layer.page_bytes for layer in self.host.layers),
            num_slots=self.num_slots,
            num_pages=self._num_pages,
        )


def _ranges(num_experts: int, size: int) -> list[tuple[int, int]]:
    """[0, num_experts) in ranges of at most ``size``."""
    return [(low, min(low + size, num_experts)) for low in range(0, num_experts, size)]


def _runs(wanted: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """The ranges in which every item of ``wanted`` is true."""
    start: int | None = None
    for i, item in enumerate((*wanted, False)):
        if item and start is None:
            start = i
        elif not item and start is not None:
            yield start, i
            start = None
