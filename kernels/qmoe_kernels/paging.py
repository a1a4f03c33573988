"""Admission and gather: what brings routed experts from host memory into slots on the device.

A model's experts are numbered as *pages*; the device holds some of them in *slots*. Before a layer
runs, `admit` looks its routed experts up, chooses slots for those that are absent, and writes down
what must be copied; `gather` copies it. Both run on the device without a
word from the host, so that a CUDA graph can hold them: the GPU reads pinned host memory itself.

Recency is a clock that ticks once per admission. The least recently used slot goes first, as long
as there is one that nobody used since this layer was admitted last. All others are wanted again
before they would grow that old: layers run in a cycle, and the least recently used slot would be
the very next one. Of those the most recently used goes first, whose turn comes last. So a model
whose layers want more in a cycle than there are slots still hits what fits. Of two slots with the
same stamp, the lower one goes first. A slot that the present admission uses is never taken.

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

# Columns of Residency.counters.
HITS, MISSES = range(2)

# Measured on an H200, see docs/expert-cache.md: 256 KiB in flight keep its link busy; blocks that
# take few registers and no shared memory leave their multiprocessors to others as well.
GATHER_PROGRAMS = 4
GATHER_BLOCK = 8192  # words of 8 bytes
GATHER_WARPS = 16

# Slots are numbered in the low bits of an eviction key, clock stamps lie above them.
SLOT_BITS = 20
# So many eviction keys are held in registers at a time: with more, they would spill.
SLOTS_BLOCK = 2048


@dataclass(frozen=True)
class Residency:
    """Which page is in which slot, and since when nobody asked for it; all on one device.

    Attributes:
        page_to_slot: (num_pages,) int32, -1 where the page is absent.
        slot_to_page: (num_slots,) int32, -1 where the slot is empty.
        last_used: (num_slots,) int64, the clock at the slot's last use, 0 where it is empty.
        clock: (1,) int64.
        last_admitted: (num_layers,) int64, the clock at the layer's last admission, 0: never.
        counters: (num_layers, 2) int64: distinct experts per admission that were there (`HITS`) and
            were not (`MISSES`).
    """

    page_to_slot: Tensor
    slot_to_page: Tensor
    last_used: Tensor
    clock: Tensor
    last_admitted: Tensor
    counters: Tensor

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
            clock=torch.zeros(1, dtype=torch.int64, device=device),
            last_admitted=torch.zeros(num_layers, dtype=torch.int64, device=device),
            counters=torch.zeros(num_layers, 2, dtype=torch.int64, device=device),
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

    def listed(self) -> list[tuple[int, int]]:
        """The pairs that `gather` copies; waits for the device."""
        count = int(self.count)
        return list(zip(self.pages[:count].tolist(), self.slots[:count].tolist(), strict=True))


def admit(
    topk_ids: Tensor,  # (num_tokens, top_k) int32 | int64
    layer: int,
    first_page: int,
    num_experts: int,
    residency: Residency,
    copies: CopyList,
    *,
    experts: tuple[int, int] | None = None,
    elsewhere: Tensor | None = None,  # (num_pages,) int32
) -> None:
    """Give every routed expert of a layer a slot, and write what must be copied into ``copies``.

    Copies are in the order in which experts are first named, all tokens' first choices before
    their second ones. An expert that finds no slot, because every one is in use by this very
    admission, stays absent.

    Args:
        topk_ids: ids outside [0, num_experts) are skipped; repeated ones count once.
        layer: its number.
        first_page: page of the layer's expert 0.
        num_experts: of this layer.
        residency, copies: changed in place.
        experts: only ids in [low, high) are looked at; all where it is None. A layer's last range
            ends with ``num_experts``.
        elsewhere: places of pages that need none here; -1: it needs one.
    """
    low, high = experts or (0, num_experts)
    arguments = (topk_ids, layer, first_page, num_experts, low, high, residency, copies, elsewhere)
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
    dependent: bool = False,
) -> None:
    """Copy the pages of ``copies`` from host memory into their slots, on the device.

    Args:
        addresses: where each page is in pinned host memory; multiples of 128.
        memory: the slots.
        copies: from `admit`.
        page_bytes: bytes to copy of each page, a multiple of 128.
        num_programs: thread blocks that copy, `GATHER_PROGRAMS` by default; the fewer, the more of
            the device is left to others.
        dependent: start while the kernel before this one ends; it must be a kernel, not a copy.
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
        PDL=has_dependent_launch(memory.device),
        num_warps=GATHER_WARPS,
        **launch_options(dependent, memory.device),
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
    elsewhere: Tensor | None,
) -> None:
    where = (layer, first_page, num_experts, low, high)
    _, missing, last = look_up(topk_ids, *where, residency, elsewhere)
    take_slots_of_coldest(missing, first_page, last, residency, copies)


def look_up(
    topk_ids: Tensor,
    layer: int,
    first_page: int,
    num_experts: int,
    low: int,
    high: int,
    residency: Residency,
    elsewhere: Tensor | None = None,
) -> tuple[list[int], list[int], int]:
    """The first half of an admission on a CPU: tick, count, and refresh what is there.

    Returns:
        the distinct experts that are routed to, as they are first named, those that are absent, and
        the clock at the layer's admission before this one.
    """
    r = residency
    now, last = int(r.clock) + 1, int(r.last_admitted[layer])
    r.clock.fill_(now)
    if high >= num_experts:
        r.last_admitted[layer] = now
    by_rank = topk_ids.t().flatten().tolist()
    wanted = list(dict.fromkeys(e for e in by_rank if low <= e < high and 0 <= e < num_experts))
    if elsewhere is not None:
        wanted = [e for e in wanted if elsewhere[first_page + e] < 0]
    slots = {e: int(r.page_to_slot[first_page + e]) for e in wanted}
    hits = [slot for slot in slots.values() if slot >= 0]
    missing = [e for e in wanted if slots[e] < 0]
    r.counters[layer, HITS] += len(hits)
    r.counters[layer, MISSES] += len(missing)
    r.last_used[hits] = now
    return wanted, missing, last


def take_slots_of_coldest(
    experts: list[int], first_page: int, last: int, residency: Residency, copies: CopyList
) -> None:
    """The second half: give absent experts the slots that go first, as far as there are some.

    Args:
        experts: in the order in which they get slots.
        last: the clock at the layer's admission before this one.
    """
    r, now = residency, int(residency.clock)
    turn_of = turns(residency, last)
    pairs = list(zip(experts, sorted(turn_of, key=turn_of.__getitem__), strict=False))
    for i, (expert, slot) in enumerate(pairs):
        page, evicted = first_page + expert, int(r.slot_to_page[slot])
        if evicted >= 0:
            r.page_to_slot[evicted] = -1
        r.page_to_slot[page] = slot
        r.slot_to_page[slot] = page
        r.last_used[slot] = now
        copies.pages[i], copies.slots[i] = page, slot
    copies.count.fill_(len(pairs))


def turns(residency: Residency, last: int) -> dict[int, int]:
    """When each slot that may be taken goes: the smaller the earlier.

    Args:
        last: the clock at the layer's admission before this one.
    """
    now, stamps = int(residency.clock), enumerate(residency.last_used.tolist())
    return {s: 2 * now - used if used > last else used for s, used in stamps if used < now}


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
    elsewhere: Tensor | None = None,
) -> None:
    """Run `admit_kernel`; arguments as in `admit`."""
    num_tokens, top_k = topk_ids.shape
    num_slots = residency.slot_to_page.shape[0]
    admit_kernel[(1,)](
        topk_ids.contiguous(),
        residency.page_to_slot,
        residency.slot_to_page,
        residency.last_used,
        residency.clock,
        residency.last_admitted,
        residency.counters,
        copies.pages,
        copies.slots,
        copies.count,
        elsewhere,
        num_tokens,
        top_k,
        layer,
        first_page,
        num_experts,
        low,
        high,
        num_slots,
        PDL=has_dependent_launch(topk_ids.device),
        **admission_blocks(num_experts, num_slots),
    )


def admission_blocks(num_experts: int, num_slots: int) -> dict[str, int]:
    """The sizes that a kernel which admits is compiled for."""
    block = min(triton.next_power_of_2(num_slots), SLOTS_BLOCK)
    return {
        "IDS_BLOCK": 16,
        "EXPERTS_BLOCK": triton.next_power_of_2(num_experts),
        "SLOTS_BLOCK": block,
        "NUM_BLOCKS": triton.next_power_of_2(triton.cdiv(num_slots, block)),
        "num_warps": 4 if block <= 1024 else 8,
    }


if triton is not None:
    from qmoe_kernels.launching import has_dependent_launch, launch_options

    # Kernels see only globals of this type.
    _HITS, _MISSES = tl.constexpr(HITS), tl.constexpr(MISSES)
    _SLOT_BITS, _SLOT_MASK = tl.constexpr(SLOT_BITS), tl.constexpr((1 << SLOT_BITS) - 1)
    _NEVER = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # the key of a slot that may not be evicted
    _UNNAMED = tl.constexpr(0x7FFFFFFF)  # the rank of an expert that nobody is routed to

    _NOT_SPECIALIZED: Any = [
        "num_tokens",
        "top_k",
        "layer",
        "first_page",
        "num_experts",
        "low",
        "high",
        "num_slots",
    ]

    # One compilation serves every layer and every number of tokens.
    @triton.jit(do_not_specialize=_NOT_SPECIALIZED)
    def admit_kernel(
        topk_ids_ptr,  # (num_tokens, top_k)
        page_to_slot_ptr,  # Residency's tensors
        slot_to_page_ptr,
        last_used_ptr,
        clock_ptr,
        last_admitted_ptr,
        counters_ptr,
        copy_pages_ptr,  # CopyList's tensors
        copy_slots_ptr,
        copy_count_ptr,
        elsewhere_ptr,  # (num_pages,), or None
        num_tokens,
        top_k,
        layer,
        first_page,
        num_experts,
        low,
        high,
        num_slots,
        IDS_BLOCK: tl.constexpr,
        EXPERTS_BLOCK: tl.constexpr,  # power of two, at least num_experts
        SLOTS_BLOCK: tl.constexpr,  # power of two
        NUM_BLOCKS: tl.constexpr,  # power of two; so many blocks hold num_slots
        PDL: tl.constexpr,
    ):
        """Grid: (1,). Slots are only searched when something is missing.

        All warps hold what is smaller than the program, and one of them writes it. So whatever is
        read and then overwritten has a barrier between the two: a warp that is late would read what
        another one has written already. `mailbox_kernels.admit_and_post_kernel` is of the same
        parts, with a post between them.
        """
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        now = tl.load(clock_ptr) + 1
        last = tl.load(last_admitted_ptr + layer)
        experts = tl.arange(0, EXPERTS_BLOCK)
        in_range = (experts < num_experts) & (experts >= low) & (experts < high)
        if elsewhere_ptr is not None:
            in_range &= tl.load(elsewhere_ptr + first_page + experts, mask=in_range, other=0) < 0
        slots = tl.load(page_to_slot_ptr + first_page + experts, mask=in_range, other=-1)
        hits_ptr = counters_ptr + 2 * layer + _HITS
        misses_ptr = counters_ptr + 2 * layer + _MISSES
        hits, misses = tl.load(hits_ptr), tl.load(misses_ptr)

        rank = first_ranks(topk_ids_ptr, experts, num_tokens, top_k, IDS_BLOCK)
        wanted = in_range & (rank < _UNNAMED)
        hit = wanted & (slots >= 0)
        missing = wanted & (slots < 0)
        num_missing = tl.sum(missing.to(tl.int32), 0)

        tl.debug_barrier()  # clock, counters and page_to_slot have been read by all
        tl.store(clock_ptr, now)
        tl.store(last_admitted_ptr + layer, now, mask=high >= num_experts)
        tl.store(hits_ptr, hits + tl.sum(hit.to(tl.int32), 0))
        tl.store(misses_ptr, misses + num_missing)
        tl.store(last_used_ptr + slots, tl.zeros_like(slots).to(tl.int64) + now, mask=hit)

        num_copies = num_missing * 0
        if num_missing > 0:
            tl.debug_barrier()  # the stamps of hits must be seen below
            keys, num_free = coldest_slots(last_used_ptr, num_slots, now, last, SLOTS_BLOCK)
            num_copies = tl.minimum(num_missing, num_free)
            take_slots(
                keys,
                tl.where(missing, rank, _UNNAMED),
                num_copies,
                experts,
                page_to_slot_ptr,
                slot_to_page_ptr,
                last_used_ptr,
                copy_pages_ptr,
                copy_slots_ptr,
                first_page,
                num_slots,
                now,
                last,
                SLOTS_BLOCK,
                NUM_BLOCKS,
            )
        tl.store(copy_count_ptr, num_copies)

    @triton.jit
    def first_ranks(topk_ids_ptr, experts, num_tokens, top_k, IDS_BLOCK: tl.constexpr):
        """The rank at which each expert is first named; _UNNAMED if it is not."""
        rank = tl.zeros_like(experts) + _UNNAMED
        num_ids = num_tokens * top_k
        for start in range(0, num_ids, IDS_BLOCK):
            index = start + tl.arange(0, IDS_BLOCK)
            ids = tl.load(topk_ids_ptr + index, mask=index < num_ids, other=-1)
            ranks = (index % top_k) * num_tokens + index // top_k
            named = ids[:, None] == experts[None, :]
            rank = tl.minimum(rank, tl.min(tl.where(named, ranks[:, None], _UNNAMED), axis=0))
        return rank

    @triton.jit
    def coldest_slots(last_used_ptr, num_slots, now, last, SLOTS_BLOCK: tl.constexpr):
        """Keys of slots by lane, and how many slots may be evicted.

        Slots that are SLOTS_BLOCK apart share a lane. A lane holds the key of its slot that is
        evicted next; once that is taken, its other slots are looked at again.
        """
        lanes = tl.arange(0, SLOTS_BLOCK)
        keys = tl.full((SLOTS_BLOCK,), _NEVER, dtype=tl.int64)
        free = tl.zeros((SLOTS_BLOCK,), dtype=tl.int32)
        for start in range(0, num_slots, SLOTS_BLOCK):
            more = _eviction_keys(last_used_ptr, start + lanes, num_slots, now, last)
            free += (more < _NEVER).to(tl.int32)
            keys = tl.minimum(keys, more)
        return keys, tl.sum(free, 0)

    @triton.jit
    def take_slots(
        keys,  # from `coldest_slots`
        order,  # of experts: those with the smallest numbers, all different, get slots
        num_copies,  # how many
        experts,
        page_to_slot_ptr,
        slot_to_page_ptr,
        last_used_ptr,
        copy_pages_ptr,
        copy_slots_ptr,
        first_page,
        num_slots,
        now,
        last,  # the clock at the layer's admission before this one
        SLOTS_BLOCK: tl.constexpr,
        NUM_BLOCKS: tl.constexpr,
    ):
        """Evict the coldest slots, write the copy list, and change the tables."""
        for i in range(num_copies):
            oldest = tl.min(keys, 0)
            first = tl.min(order, 0)
            # One number, one expert.
            expert = tl.sum(tl.where(order == first, experts, 0), 0)
            victim = (oldest & _SLOT_MASK).to(tl.int32)
            tl.store(copy_slots_ptr + i, victim)
            tl.store(copy_pages_ptr + i, first_page + expert)
            lane = victim % SLOTS_BLOCK + tl.arange(0, NUM_BLOCKS) * SLOTS_BLOCK
            others = _eviction_keys(last_used_ptr, lane, num_slots, now, last)
            following = tl.min(tl.where(others > oldest, others, _NEVER), 0)
            keys = tl.where(keys == oldest, following, keys)
            order = tl.where(order == first, _UNNAMED, order)
        tl.debug_barrier()  # the copy list must be seen
        copied = experts < num_copies
        pages = tl.load(copy_pages_ptr + experts, mask=copied, other=0)
        victims = tl.load(copy_slots_ptr + experts, mask=copied, other=0)
        evicted = tl.load(slot_to_page_ptr + victims, mask=copied, other=-1)
        tl.debug_barrier()  # slot_to_page and, in the loop above, last_used have been read
        tl.store(page_to_slot_ptr + evicted, tl.zeros_like(evicted) - 1, mask=evicted >= 0)
        tl.store(page_to_slot_ptr + pages, victims, mask=copied)
        tl.store(slot_to_page_ptr + victims, pages, mask=copied)
        tl.store(last_used_ptr + victims, tl.zeros_like(victims).to(tl.int64) + now, mask=copied)

    @triton.jit
    def _eviction_keys(last_used_ptr, slots, num_slots, now, last):
        """Smaller for what is evicted earlier; _NEVER where a slot is in use or not there."""
        last_used = tl.load(last_used_ptr + slots, mask=slots < num_slots, other=_NEVER)
        turn = tl.where(last_used > last, 2 * now - last_used, last_used)
        return tl.where(last_used < now, (turn << _SLOT_BITS) | slots, _NEVER)

    @triton.jit(do_not_specialize=["page_words", "slot_words"])
    def gather_kernel(
        addresses_ptr,  # (num_pages,) int64
        memory_ptr,  # (num_slots, slot_bytes) uint8
        copy_pages_ptr,  # CopyList's tensors
        copy_slots_ptr,
        copy_count_ptr,
        page_words,  # of 8 bytes
        slot_words,
        BLOCK: tl.constexpr,  # words of 8 bytes
        PDL: tl.constexpr,
    ):
        """Grid: any number of programs; blocks of all pages are dealt out in turn."""
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        blocks_per_page = tl.cdiv(page_words, BLOCK)
        memory = memory_ptr.to(tl.pointer_type(tl.int64))
        num_blocks = tl.load(copy_count_ptr) * blocks_per_page
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
