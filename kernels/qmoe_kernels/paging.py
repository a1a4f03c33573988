"""Admission and gather: what brings routed experts from host memory into slots on the device.

A model's experts are numbered as *pages*; the device holds some of them in *slots*. Before a layer
runs, `admit` looks its routed experts up, chooses the least recently used slots for those that are
absent, and writes down what must be copied; `gather` copies it. Both run on the device without a
word from the host, so that a CUDA graph can hold them: the GPU reads pinned host memory itself.

Recency is a clock that ticks once per admission. Of two slots with the same stamp, the lower one
is older. A slot that the present admission uses is never taken.

On the CPU the same functions are plain Python over the same tensors: a simulation of the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU needs no Triton
    triton = None

# Columns of Residency.counters; a row is 64 bytes.
HITS, MISSES, PREFETCHED, PREFETCH_USED = range(4)
NUM_COUNTERS = 8

# A layer's prefetching lives on credit. A prefetched page costs some, one that is then routed to
# earns twice as much, and every step brings a little: below one page used in two, a layer copies no
# more than one page in sixteen steps, just enough to notice that its proposals have become better.
CREDIT_PER_STEP, PAGE_COST, PAGE_REWARD, CREDIT_LIMIT = 1, 16, 32, 1024

# Measured on an H200, see docs/expert-cache.md: 256 KiB in flight keep its link busy; blocks that
# take few registers and no shared memory leave their multiprocessors to others as well.
GATHER_PROGRAMS = 4
GATHER_BLOCK = 8192  # words of 8 bytes
GATHER_WARPS = 16

# Slots are numbered in the low bits of an eviction key, clock stamps lie above them.
SLOT_BITS = 20


@dataclass(frozen=True)
class Residency:
    """Which page is in which slot, and since when nobody asked for it; all on one device.

    Attributes:
        page_to_slot: (num_pages,) int32, -1 where the page is absent.
        slot_to_page: (num_slots,) int32, -1 where the slot is empty.
        last_used: (num_slots,) int64, the clock at the slot's last use, 0 where it is empty.
        prefetched: (num_slots,) int8, 1 where a prefetched page has not been routed to yet.
        clock: (1,) int64.
        counters: (num_layers, NUM_COUNTERS) int64: distinct experts per admission that were there
            (`HITS`) and were not (`MISSES`), pages copied ahead (`PREFETCHED`) and how many of
            these were then routed to (`PREFETCH_USED`).
        credit: (num_layers,) int32, see `CREDIT_LIMIT`.
    """

    page_to_slot: Tensor
    slot_to_page: Tensor
    last_used: Tensor
    prefetched: Tensor
    clock: Tensor
    counters: Tensor
    credit: Tensor

    @classmethod
    def empty(
        cls, num_pages: int, num_slots: int, num_layers: int, device: torch.device | str
    ) -> Residency:
        """Nothing resident.

        Raises:
            ValueError: more slots than an eviction key can tell apart.
        """
        if not 0 < num_slots < 1 << SLOT_BITS:
            raise ValueError(f"num_slots={num_slots}; 1 to {(1 << SLOT_BITS) - 1} slots work")
        return cls(
            page_to_slot=torch.full((num_pages,), -1, dtype=torch.int32, device=device),
            slot_to_page=torch.full((num_slots,), -1, dtype=torch.int32, device=device),
            last_used=torch.zeros(num_slots, dtype=torch.int64, device=device),
            prefetched=torch.zeros(num_slots, dtype=torch.int8, device=device),
            clock=torch.zeros(1, dtype=torch.int64, device=device),
            counters=torch.zeros(num_layers, NUM_COUNTERS, dtype=torch.int64, device=device),
            credit=torch.full((num_layers,), CREDIT_LIMIT // 2, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class CopyList:
    """What `gather` is to copy: the first ``count`` pairs of page and slot.

    Attributes:
        pages, slots: (capacity,) int32.
        count: (1,) int32.
    """

    pages: Tensor
    slots: Tensor
    count: Tensor

    @classmethod
    def empty(cls, capacity: int, device: torch.device | str) -> CopyList:
        """A list for as many pages as a layer has experts."""
        pages, slots = torch.zeros(2, capacity, dtype=torch.int32, device=device).unbind()
        return cls(pages, slots, torch.zeros(1, dtype=torch.int32, device=device))


def admit(
    topk_ids: Tensor,  # (num_tokens, top_k) int32 | int64
    layer: int,
    first_page: int,
    num_experts: int,
    residency: Residency,
    copies: CopyList,
    *,
    experts: tuple[int, int] | None = None,
    prefetch: int | None = None,
) -> None:
    """Give every routed expert of a layer a slot, and write what must be copied into ``copies``.

    Copies are in the order in which experts are first named, all tokens' first choices before
    their second ones. An expert that finds no slot, because every one is in use by this very
    admission, stays absent.

    Args:
        topk_ids: ids outside [0, num_experts) are skipped; repeated ones count once.
        layer: row of the counters.
        first_page: page of the layer's expert 0.
        num_experts: of this layer.
        residency, copies: changed in place.
        experts: only ids in [low, high) are looked at; all where it is None.
        prefetch: None admits what is needed now. A number admits what may be needed soon: at most
            so many pages are copied, fewer where the layer's credit is short, the clock stands
            still, and slots used at the present clock are left alone.
    """
    low, high = experts or (0, num_experts)
    arguments = (topk_ids, layer, first_page, num_experts, low, high, residency, copies, prefetch)
    if topk_ids.device.type == "cpu":
        _admit_cpu(*arguments)
    else:
        launch_admit(*arguments)


def gather(
    addresses: Tensor,  # (num_pages,) int64, on the device of memory
    memory: Tensor,  # (num_slots, slot_bytes) uint8
    copies: CopyList,
    page_bytes: int,
    *,
    num_programs: int | None = None,
) -> None:
    """Copy the pages of ``copies`` from host memory into their slots, on the device.

    Args:
        addresses: where each page is in pinned host memory; multiples of 128.
        memory: the slots.
        copies: from `admit`.
        page_bytes: bytes to copy of each page, a multiple of 128.
        num_programs: thread blocks that copy, `GATHER_PROGRAMS` by default; the fewer, the more of
            the device is left to others.
    """
    gather_kernel[(num_programs or GATHER_PROGRAMS,)](
        addresses,
        memory,
        copies.pages,
        copies.slots,
        copies.count,
        page_bytes // 8,
        memory.stride(0) // 8,
        BLOCK=GATHER_BLOCK,
        num_warps=GATHER_WARPS,
    )


# ---- CPU ---------------------------------------------------------------------------------------


def _admit_cpu(
    topk_ids: Tensor,
    layer: int,
    first_page: int,
    num_experts: int,
    low: int,
    high: int,
    residency: Residency,
    copies: CopyList,
    prefetch: int | None,
) -> None:
    r = residency
    now = int(r.clock) + (prefetch is None)
    r.clock.fill_(now)
    by_rank = topk_ids.t().flatten().tolist()
    wanted = list(dict.fromkeys(e for e in by_rank if low <= e < high and 0 <= e < num_experts))
    slots = {e: int(r.page_to_slot[first_page + e]) for e in wanted}
    hits = [slot for slot in slots.values() if slot >= 0]
    missing = [e for e in wanted if slots[e] < 0]
    credit = int(r.credit[layer])
    limit = len(missing)
    if prefetch is None:
        used = int(r.prefetched[hits].sum())
        r.prefetched[hits] = 0
        r.counters[layer, HITS] += len(hits)
        r.counters[layer, MISSES] += len(missing)
        r.counters[layer, PREFETCH_USED] += used
        credit = min(credit + CREDIT_PER_STEP + PAGE_REWARD * used, CREDIT_LIMIT)
    else:
        limit = min(limit, prefetch, credit // PAGE_COST)
    r.last_used[hits] = now
    last_used = r.last_used.tolist()
    victims = sorted(
        (s for s, used in enumerate(last_used) if used < now), key=last_used.__getitem__
    )
    pairs = list(zip(missing[:limit], victims, strict=False))
    for i, (expert, slot) in enumerate(pairs):
        page, evicted = first_page + expert, int(r.slot_to_page[slot])
        if evicted >= 0:
            r.page_to_slot[evicted] = -1
        r.page_to_slot[page] = slot
        r.slot_to_page[slot] = page
        r.last_used[slot] = now
        r.prefetched[slot] = prefetch is not None
        copies.pages[i], copies.slots[i] = page, slot
    copies.count.fill_(len(pairs))
    if prefetch is not None:
        r.counters[layer, PREFETCHED] += len(pairs)
        credit -= PAGE_COST * len(pairs)
    r.credit[layer] = credit


# ---- GPU ---------------------------------------------------------------------------------------


def launch_admit(
    topk_ids: Tensor,
    layer: int,
    first_page: int,
    num_experts: int,
    low: int,
    high: int,
    residency: Residency,
    copies: CopyList,
    prefetch: int | None,
) -> None:
    """Run `admit_kernel`; arguments as in `admit`."""
    num_tokens, top_k = topk_ids.shape
    num_slots = residency.slot_to_page.shape[0]
    slots_block = triton.next_power_of_2(num_slots)
    admit_kernel[(1,)](
        topk_ids.contiguous(),
        residency.page_to_slot,
        residency.slot_to_page,
        residency.last_used,
        residency.prefetched,
        residency.clock,
        residency.counters,
        residency.credit,
        copies.pages,
        copies.slots,
        copies.count,
        num_tokens,
        top_k,
        layer,
        first_page,
        num_experts,
        low,
        high,
        num_slots,
        copies.pages.shape[0] if prefetch is None else prefetch,
        PREFETCH=prefetch is not None,
        IDS_BLOCK=16,
        EXPERTS_BLOCK=triton.next_power_of_2(num_experts),
        SLOTS_BLOCK=slots_block,
        num_warps=4 if slots_block <= 1024 else 8 if slots_block <= 8192 else 16,
    )


if triton is not None:
    # Kernels see only globals of this type.
    _HITS, _MISSES = tl.constexpr(HITS), tl.constexpr(MISSES)
    _PREFETCHED, _PREFETCH_USED = tl.constexpr(PREFETCHED), tl.constexpr(PREFETCH_USED)
    _NUM_COUNTERS = tl.constexpr(NUM_COUNTERS)
    _SLOT_BITS, _SLOT_MASK = tl.constexpr(SLOT_BITS), tl.constexpr((1 << SLOT_BITS) - 1)
    _PER_STEP, _LIMIT = tl.constexpr(CREDIT_PER_STEP), tl.constexpr(CREDIT_LIMIT)
    _COST, _REWARD = tl.constexpr(PAGE_COST), tl.constexpr(PAGE_REWARD)

    _NOT_SPECIALIZED: Any = [
        "num_tokens",
        "top_k",
        "layer",
        "first_page",
        "num_experts",
        "low",
        "high",
        "num_slots",
        "max_copies",
    ]

    # One compilation serves every layer and every number of tokens.
    @triton.jit(do_not_specialize=_NOT_SPECIALIZED)
    def admit_kernel(
        topk_ids_ptr,  # (num_tokens, top_k)
        page_to_slot_ptr,  # Residency's tensors
        slot_to_page_ptr,
        last_used_ptr,
        prefetched_ptr,
        clock_ptr,
        counters_ptr,
        credit_ptr,
        copy_pages_ptr,  # CopyList's tensors
        copy_slots_ptr,
        copy_count_ptr,
        num_tokens,
        top_k,
        layer,
        first_page,
        num_experts,
        low,
        high,
        num_slots,
        max_copies,
        PREFETCH: tl.constexpr,
        IDS_BLOCK: tl.constexpr,
        EXPERTS_BLOCK: tl.constexpr,  # power of two, at least num_experts
        SLOTS_BLOCK: tl.constexpr,  # power of two, at least num_slots
    ):
        """Grid: (1,). Slots are only searched when something is missing."""
        NONE: tl.constexpr = 0x7FFFFFFF
        NEVER: tl.constexpr = 0x7FFFFFFFFFFFFFFF

        clock = tl.load(clock_ptr)
        credit = tl.load(credit_ptr + layer)
        experts = tl.arange(0, EXPERTS_BLOCK)
        in_range = (experts < num_experts) & (experts >= low) & (experts < high)
        slots = tl.load(page_to_slot_ptr + first_page + experts, mask=in_range, other=-1)

        # The rank at which each expert is first named; NONE if it is not.
        rank = tl.full((EXPERTS_BLOCK,), NONE, dtype=tl.int32)
        num_ids = num_tokens * top_k
        for start in range(0, num_ids, IDS_BLOCK):
            index = start + tl.arange(0, IDS_BLOCK)
            ids = tl.load(topk_ids_ptr + index, mask=index < num_ids, other=-1)
            ranks = (index % top_k) * num_tokens + index // top_k
            named = ids[:, None] == experts[None, :]
            rank = tl.minimum(rank, tl.min(tl.where(named, ranks[:, None], NONE), axis=0))
        wanted = in_range & (rank < NONE)
        hit = wanted & (slots >= 0)
        missing = wanted & (slots < 0)
        num_missing = tl.sum(missing.to(tl.int32), 0)
        limit = tl.minimum(num_missing, max_copies)

        now = clock
        counters_row = counters_ptr + layer * _NUM_COUNTERS
        if PREFETCH:
            limit = tl.minimum(limit, credit // _COST)
        else:
            now = clock + 1
            tl.store(clock_ptr, now)
            used = tl.load(prefetched_ptr + slots, mask=hit, other=0).to(tl.int32)
            tl.store(prefetched_ptr + slots, tl.zeros_like(used).to(tl.int8), mask=hit)
            num_used = tl.sum(used, 0)
            num_hits = tl.sum(hit.to(tl.int32), 0)
            _add(counters_row + _HITS, num_hits)
            _add(counters_row + _MISSES, num_missing)
            _add(counters_row + _PREFETCH_USED, num_used)
            credit = tl.minimum(credit + _PER_STEP + _REWARD * num_used, _LIMIT)
        tl.store(last_used_ptr + slots, tl.zeros_like(slots).to(tl.int64) + now, mask=hit)

        num_copies = limit * 0
        if limit > 0:
            tl.debug_barrier()  # the stamps of hits must be seen below
            every_slot = tl.arange(0, SLOTS_BLOCK)
            last_used = tl.load(
                last_used_ptr + every_slot, mask=every_slot < num_slots, other=NEVER
            )
            key = tl.where(last_used < now, (last_used << _SLOT_BITS) | every_slot, NEVER)
            num_copies = tl.minimum(limit, tl.sum((key < NEVER).to(tl.int32), 0))
            order = tl.where(missing, rank, NONE)
            for i in range(num_copies):
                oldest = tl.min(key, 0)
                first = tl.min(order, 0)
                # One rank, one id, one expert.
                expert = tl.sum(tl.where(order == first, experts, 0), 0)
                tl.store(copy_slots_ptr + i, (oldest & _SLOT_MASK).to(tl.int32))
                tl.store(copy_pages_ptr + i, first_page + expert)
                key = tl.where(key == oldest, NEVER, key)
                order = tl.where(order == first, NONE, order)
            tl.debug_barrier()
            copied = experts < num_copies
            pages = tl.load(copy_pages_ptr + experts, mask=copied, other=0)
            victims = tl.load(copy_slots_ptr + experts, mask=copied, other=0)
            evicted = tl.load(slot_to_page_ptr + victims, mask=copied, other=-1)
            tl.store(page_to_slot_ptr + evicted, tl.zeros_like(evicted) - 1, mask=evicted >= 0)
            tl.store(page_to_slot_ptr + pages, victims, mask=copied)
            tl.store(slot_to_page_ptr + victims, pages, mask=copied)
            tl.store(
                last_used_ptr + victims, tl.zeros_like(victims).to(tl.int64) + now, mask=copied
            )
            flag = tl.zeros_like(victims)
            if PREFETCH:
                flag += 1
            tl.store(prefetched_ptr + victims, flag.to(tl.int8), mask=copied)
        tl.store(copy_count_ptr, num_copies)
        if PREFETCH:
            _add(counters_row + _PREFETCHED, num_copies)
            credit -= _COST * num_copies
        tl.store(credit_ptr + layer, credit)

    @triton.jit
    def _add(counter_ptr, count):
        tl.store(counter_ptr, tl.load(counter_ptr) + count)

    @triton.jit(do_not_specialize=["page_words", "slot_words"])
    def gather_kernel(
        addresses_ptr,  # (num_pages,) int64
        memory_ptr,  # (num_slots, slot_bytes) uint8
        copy_pages_ptr,
        copy_slots_ptr,
        copy_count_ptr,
        page_words,  # of 8 bytes
        slot_words,
        BLOCK: tl.constexpr,  # words of 8 bytes
    ):
        """Grid: any number of programs; blocks of all pages are dealt out in turn."""
        count = tl.load(copy_count_ptr)
        blocks_per_page = tl.cdiv(page_words, BLOCK)
        memory = memory_ptr.to(tl.pointer_type(tl.int64))
        num_blocks = count * blocks_per_page
        for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
            i = block // blocks_per_page
            offsets = (block % blocks_per_page) * BLOCK + tl.arange(0, BLOCK)
            # What do_not_specialize hides from the compiler: pages are whole lines, so that a
            # thread's two words are inside together or outside together.
            mask = tl.max_constancy(offsets < page_words, 16)
            address = tl.load(addresses_ptr + tl.load(copy_pages_ptr + i))
            source = tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 128)
            slot = tl.load(copy_slots_ptr + i).to(tl.int64)
            target = tl.multiple_of(memory + slot * slot_words, 128)
            words = tl.load(source + offsets, mask=mask, eviction_policy="evict_first")
            tl.store(target + offsets, words, mask=mask)
