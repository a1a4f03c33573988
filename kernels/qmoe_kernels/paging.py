"""Admission and gather: what brings routed experts from host memory into slots on the device.

A model's experts are numbered as *pages*; the device holds some of them in *slots*. Before a layer
runs, `admit` looks its routed experts up, chooses slots for those that are absent, and writes down
what must be copied. The same launch copies it, if it is given a `Transfer`; if not, `gather` does,
later or on another stream. All of it runs on the device without a word from the host, so that a
CUDA graph can hold it: the GPU reads pinned host memory itself.

In the launch that does both, the first thread block admits and publishes the list; the others wait
for it, and copy. Where nothing is absent all that they hear is that they may end.

A clock ticks once per admission. The slot whose page has the smallest claim (see `claims`) goes
first, of those that nobody used since this layer was admitted last. All others are wanted again
before they would grow that old: layers run in a cycle, and the least recently used slot would be
the very next one. Where there are only such, the most recently used goes first, whose turn comes
last. So a model whose layers want more in a cycle than there are slots still hits what fits. Empty
slots go before all others, and of two that are alike the lower one. A slot that the present
admission uses is never taken.

On the CPU the same functions are plain Python over the same tensors: a simulation of the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmoe_kernels.claims import (
    DIVISOR_BITS,
    FIRST_RATE,
    RATE_BITS,
    RATE_SHIFT,
    horizon_of,
    max_horizon,
    next_rate,
    renewed,
)

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
# Of blocks that are launched with the one that admits: all of its warps come to every barrier.
COPYING_WARPS = 8

# Slots are numbered in the low bits of an eviction key, times of the clock lie above them.
SLOT_BITS = 20
# What is published is how many pages are to be copied, in the low bits, and a number above them.
COUNT_BITS = 20
# So many eviction keys are held in registers at a time: with more, they would spill.
SLOTS_BLOCK = 2048


@dataclass(frozen=True)
class Residency:
    """Which page is in which slot, and which ones have earned to stay; all on one device.

    Attributes:
        page_to_slot: (num_pages,) int32, -1 where the page is absent.
        slot_to_page: (num_slots,) int32, -1 where the slot is empty.
        last_used: (num_slots,) int64, the clock at the slot's last use, 0 where it is empty.
        claims: (num_pages,) int64, of pages in slots and of all others, see `claims`; 0: never
            routed to.
        slot_claims: (num_slots,) int64, of the pages in slots once more, 0 where they are empty. A
            search for a slot reads them side by side; one that gathered them by page took 2.7 us
            longer on an H200.
        miss_rate: (1,) int64, misses per tick of the clock, see `claims`.
        clock: (1,) int64.
        last_admitted: (num_layers,) int64, the clock at the layer's last admission, 0: never.
        counters: (num_layers, 2) int64: distinct experts per admission that were there (`HITS`) and
            were not (`MISSES`).
    """

    page_to_slot: Tensor
    slot_to_page: Tensor
    last_used: Tensor
    claims: Tensor
    slot_claims: Tensor
    miss_rate: Tensor
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
            claims=torch.zeros(num_pages, dtype=torch.int64, device=device),
            slot_claims=torch.zeros(num_slots, dtype=torch.int64, device=device),
            miss_rate=torch.full((1,), FIRST_RATE, dtype=torch.int64, device=device),
            clock=torch.zeros(1, dtype=torch.int64, device=device),
            last_admitted=torch.zeros(num_layers, dtype=torch.int64, device=device),
            counters=torch.zeros(num_layers, 2, dtype=torch.int64, device=device),
        )

    def clear(self) -> None:
        """Empty every slot, in place: all but the counters is as in `empty`."""
        self.page_to_slot.fill_(-1)
        self.slot_to_page.fill_(-1)
        self.last_used.zero_()
        self.claims.zero_()
        self.slot_claims.zero_()
        self.miss_rate.fill_(FIRST_RATE)
        self.clock.zero_()
        self.last_admitted.zero_()


@dataclass(frozen=True)
class CopyList:
    """What is to be copied: the first ``count`` pairs of page and slot.

    One launch at a time uses it, or waits would not end.

    Attributes:
        pages, slots: (capacity,) int32.
        count: (1,) int32.
        signal: (1 + `GATHER_PROGRAMS`,) int64, of launches that admit and copy: the word that was
            published last, and what each thread block that copies has seen of it. No two words in
            a row are equal, so that a block waits for one that it has not seen.
    """

    pages: Tensor
    slots: Tensor
    count: Tensor
    signal: Tensor

    @classmethod
    def empty(cls, capacity: int, device: torch.device | str) -> CopyList:
        """A list for as many pages as a layer has experts."""
        pages, slots = torch.zeros(2, capacity, dtype=torch.int32, device=device).unbind()
        count = torch.zeros(1, dtype=torch.int32, device=device)
        signal = torch.zeros(1 + GATHER_PROGRAMS, dtype=torch.int64, device=device)
        return cls(pages, slots, count, signal)

    def listed(self) -> list[tuple[int, int]]:
        """The pairs that are copied; waits for the device."""
        count = int(self.count)
        return list(zip(self.pages[:count].tolist(), self.slots[:count].tolist(), strict=True))


@dataclass(frozen=True)
class Transfer:
    """Where a layer's pages are copied from and to.

    Attributes:
        addresses: (num_pages,) int64, where each page is in pinned host memory; multiples of 128.
        memory: (num_slots, slot_bytes) uint8, the slots, on the device of ``addresses``.
        page_bytes: bytes to copy of each page, a multiple of 128.
    """

    addresses: Tensor
    memory: Tensor
    page_bytes: int


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
    transfer: Transfer | None = None,
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
        transfer: copy what is listed, in the same launch; for tensors on a GPU.
    """
    low, high = experts or (0, num_experts)
    arguments = (topk_ids, layer, first_page, num_experts, low, high, residency, copies, elsewhere)
    if topk_ids.device.type == "cpu":
        assert transfer is None  # nothing reads addresses there
        _admit_cpu(*arguments)
    else:
        launch_admit(*arguments, transfer)


def gather(transfer: Transfer, copies: CopyList, *, num_programs: int | None = None) -> None:
    """Copy the pages of ``copies`` from host memory into their slots, on the device.

    Args:
        copies: from `admit`.
        num_programs: thread blocks that copy, `GATHER_PROGRAMS` by default; the fewer, the more of
            the device is left to others.
    """
    gather_kernel[(num_programs or GATHER_PROGRAMS,)](
        transfer.addresses,
        transfer.memory,
        copies.pages,
        copies.slots,
        copies.count,
        *_words(transfer),
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
    """The first half of an admission on a CPU: tick, count, and renew what is routed to.

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
    missing = [e for e in wanted if slots[e] < 0]
    r.counters[layer, HITS] += len(wanted) - len(missing)
    r.counters[layer, MISSES] += len(missing)
    miss_rate = int(r.miss_rate)
    horizon = horizon_of(miss_rate, len(r.slot_to_page), len(r.last_admitted))
    r.miss_rate.fill_(next_rate(miss_rate, len(missing)))
    for expert, slot in slots.items():
        page = first_page + expert
        r.claims[page] = renewed(int(r.claims[page]), now, horizon)
        if slot >= 0:
            r.last_used[slot], r.slot_claims[slot] = now, r.claims[page]
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
        r.last_used[slot], r.slot_claims[slot] = now, r.claims[page]
        copies.pages[i], copies.slots[i] = page, slot
    copies.count.fill_(len(pairs))


def turns(residency: Residency, last: int) -> dict[int, int]:
    """When each slot that may be taken goes: the smaller the earlier.

    Args:
        last: the clock at the layer's admission before this one.
    """
    r, now = residency, int(residency.clock)
    after_claims = 2 * now + max_horizon(len(r.last_admitted))
    turn = torch.where(r.last_used > last, after_claims - r.last_used, r.slot_claims).tolist()
    return {slot: turn[slot] for slot in (r.last_used < now).nonzero().flatten().tolist()}


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
    transfer: Transfer | None = None,
) -> None:
    """Run `admit_kernel`; arguments as in `admit`."""
    num_tokens, top_k = topk_ids.shape
    num_slots = residency.slot_to_page.shape[0]
    grid, copying, blocks = launch_copying(num_experts, num_slots, copies, transfer)
    admit_kernel[grid](
        topk_ids.contiguous(),
        residency.page_to_slot,
        residency.slot_to_page,
        residency.last_used,
        residency.claims,
        residency.slot_claims,
        residency.miss_rate,
        residency.clock,
        residency.last_admitted,
        residency.counters,
        copies.pages,
        copies.slots,
        copies.count,
        elsewhere,
        *copying,
        num_tokens,
        top_k,
        layer,
        first_page,
        num_experts,
        low,
        high,
        num_slots,
        max_horizon(len(residency.last_admitted)),
        COPY_BLOCK=GATHER_BLOCK,
        ON_GPU=COMPILED,
        PDL=has_dependent_launch(topk_ids.device),
        **blocks,
        **launch_options(True, topk_ids.device),
    )


def admission_blocks(num_experts: int, num_slots: int) -> dict[str, int]:
    """The sizes that a kernel which admits is compiled for."""
    block = min(triton.next_power_of_2(num_slots), SLOTS_BLOCK)
    return {
        "IDS_BLOCK": 8,  # as many as a token has, mostly; the others are read after them
        "EXPERTS_BLOCK": triton.next_power_of_2(num_experts),
        "SLOTS_BLOCK": block,
        "NUM_BLOCKS": triton.next_power_of_2(triton.cdiv(num_slots, block)),
        "num_warps": 4 if block <= 1024 else 8,
    }


def launch_copying(
    num_experts: int, num_slots: int, copies: CopyList, transfer: Transfer | None
) -> tuple[tuple[int], tuple[Any, ...], dict[str, int]]:
    """What a kernel is launched with that admits, and copies if there is a ``transfer``.

    Returns:
        its grid, its arguments from ``signal_ptr`` to ``slot_words``, and its sizes.
    """
    blocks = admission_blocks(num_experts, num_slots)
    if transfer is None:
        return (1,), (None, None, None, 0, 0), blocks
    given = (copies.signal, transfer.addresses, transfer.memory, *_words(transfer))
    return (len(copies.signal),), given, blocks | {"num_warps": COPYING_WARPS}


def _words(transfer: Transfer) -> tuple[int, int]:
    """Of 8 bytes: of a page, and from one slot to the next."""
    return transfer.page_bytes // 8, transfer.memory.stride(0) // 8


if triton is not None:
    from qmoe_kernels.launching import COMPILED, has_dependent_launch, launch_options
    from qmoe_kernels.signals import publish, wait_for_word

    # Kernels see only globals of this type.
    _HITS, _MISSES = tl.constexpr(HITS), tl.constexpr(MISSES)
    _RATE_BITS, _RATE_SHIFT = tl.constexpr(RATE_BITS), tl.constexpr(RATE_SHIFT)
    _DIVISOR_BITS = tl.constexpr(DIVISOR_BITS)
    _SLOT_BITS, _SLOT_MASK = tl.constexpr(SLOT_BITS), tl.constexpr((1 << SLOT_BITS) - 1)
    _COUNT_BITS, _COUNT_MASK = tl.constexpr(COUNT_BITS), tl.constexpr((1 << COUNT_BITS) - 1)
    _NEVER = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # the key of a slot that may not be evicted
    _UNNAMED = tl.constexpr(0x7FFFFFFF)  # the rank of an expert that nobody is routed to

    _NOT_SPECIALIZED: Any = [
        "page_words",
        "slot_words",
        "num_tokens",
        "top_k",
        "layer",
        "first_page",
        "num_experts",
        "low",
        "high",
        "num_slots",
        "max_horizon",
    ]

    # One compilation serves every layer and every number of tokens.
    @triton.jit(do_not_specialize=_NOT_SPECIALIZED)
    def admit_kernel(
        topk_ids_ptr,  # (num_tokens, top_k)
        page_to_slot_ptr,  # Residency's tensors
        slot_to_page_ptr,
        last_used_ptr,
        claims_ptr,
        slot_claims_ptr,
        miss_rate_ptr,
        clock_ptr,
        last_admitted_ptr,
        counters_ptr,
        copy_pages_ptr,  # CopyList's tensors
        copy_slots_ptr,
        copy_count_ptr,
        elsewhere_ptr,  # (num_pages,), or None
        signal_ptr,  # CopyList's; this and Transfer's are None if nothing is copied
        addresses_ptr,
        memory_ptr,
        page_words,  # of 8 bytes
        slot_words,
        num_tokens,
        top_k,
        layer,
        first_page,
        num_experts,
        low,
        high,
        num_slots,
        max_horizon,  # `claims.max_horizon`
        COPY_BLOCK: tl.constexpr,  # words of 8 bytes
        ON_GPU: tl.constexpr,
        PDL: tl.constexpr,
        IDS_BLOCK: tl.constexpr,
        EXPERTS_BLOCK: tl.constexpr,  # power of two, at least num_experts
        SLOTS_BLOCK: tl.constexpr,  # power of two
        NUM_BLOCKS: tl.constexpr,  # power of two; so many blocks hold num_slots
    ):
        """Grid: (1,); to copy as well, as many as CopyList's signal has words."""
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        if tl.program_id(0) == 0:
            admit_experts(
                topk_ids_ptr,
                page_to_slot_ptr,
                slot_to_page_ptr,
                last_used_ptr,
                claims_ptr,
                slot_claims_ptr,
                miss_rate_ptr,
                clock_ptr,
                last_admitted_ptr,
                counters_ptr,
                copy_pages_ptr,
                copy_slots_ptr,
                copy_count_ptr,
                elsewhere_ptr,
                signal_ptr,
                num_tokens,
                top_k,
                layer,
                first_page,
                num_experts,
                low,
                high,
                num_slots,
                max_horizon,
                ON_GPU,
                IDS_BLOCK,
                EXPERTS_BLOCK,
                SLOTS_BLOCK,
                NUM_BLOCKS,
            )
        elif signal_ptr is not None:
            copy_published(
                signal_ptr,
                addresses_ptr,
                memory_ptr,
                copy_pages_ptr,
                copy_slots_ptr,
                page_words,
                slot_words,
                COPY_BLOCK,
                ON_GPU,
            )

    @triton.jit
    def admit_experts(
        topk_ids_ptr,  # as in `admit_kernel`
        page_to_slot_ptr,
        slot_to_page_ptr,
        last_used_ptr,
        claims_ptr,
        slot_claims_ptr,
        miss_rate_ptr,
        clock_ptr,
        last_admitted_ptr,
        counters_ptr,
        copy_pages_ptr,
        copy_slots_ptr,
        copy_count_ptr,
        elsewhere_ptr,
        signal_ptr,
        num_tokens,
        top_k,
        layer,
        first_page,
        num_experts,
        low,
        high,
        num_slots,
        max_horizon,
        ON_GPU: tl.constexpr,
        IDS_BLOCK: tl.constexpr,
        EXPERTS_BLOCK: tl.constexpr,
        SLOTS_BLOCK: tl.constexpr,
        NUM_BLOCKS: tl.constexpr,
    ):
        """What one program does. Slots are only searched when something is missing.

        All warps hold what is smaller than the program, and one of them writes it. So whatever is
        read and then overwritten has a barrier between the two: a warp that is late would read what
        another one has written already. `mailbox_kernels.admit_and_post_kernel` is of the same
        parts, with a post between them.

        What does not depend on each other is read at the top, so that all of it is waited for once.
        """
        experts = tl.arange(0, EXPERTS_BLOCK)
        in_layer = experts < num_experts
        pages = first_page + experts
        slots = tl.load(page_to_slot_ptr + pages, mask=in_layer, other=-1)
        claims = tl.load(claims_ptr + pages, mask=in_layer, other=0)
        miss_rate = tl.load(miss_rate_ptr)
        if elsewhere_ptr is not None:
            places = tl.load(elsewhere_ptr + pages, mask=in_layer, other=0)
            in_layer &= places < 0
        clock, last = tl.load(clock_ptr), tl.load(last_admitted_ptr + layer)
        hits_ptr = counters_ptr + 2 * layer + _HITS
        misses_ptr = counters_ptr + 2 * layer + _MISSES
        hits, misses = tl.load(hits_ptr), tl.load(misses_ptr)
        word = clock
        if signal_ptr is not None:
            # Volatile: the compiler would read it later, and wait for it alone.
            word = tl.load(signal_ptr, volatile=True)
        rank = first_ranks(topk_ids_ptr, experts, num_tokens, top_k, IDS_BLOCK)
        in_range = in_layer & (experts >= low) & (experts < high)
        wanted = in_range & (rank < _UNNAMED)
        hit = wanted & (slots >= 0)
        missing = wanted & (slots < 0)
        num_hits, num_missing = count_both(hit, missing)
        now = clock + 1

        tl.debug_barrier()  # what is written below has been read by all
        if num_missing == 0:
            publish_count(signal_ptr, word, 0, False, ON_GPU)
        tl.store(clock_ptr, now)
        tl.store(last_admitted_ptr + layer, now, mask=high >= num_experts)
        tl.store(hits_ptr, hits + num_hits)
        tl.store(misses_ptr, misses + num_missing)
        renew_pages(
            wanted,
            pages,
            slots,
            claims,
            miss_rate,
            num_missing,
            last_used_ptr,
            claims_ptr,
            slot_claims_ptr,
            miss_rate_ptr,
            now,
            num_slots,
            max_horizon,
        )

        num_copies = num_missing * 0
        if num_missing > 0:
            tl.debug_barrier()  # the stamps of hits must be seen below
            keys = coldest_slots(
                last_used_ptr,
                slot_claims_ptr,
                num_slots,
                now,
                last,
                max_horizon,
                SLOTS_BLOCK,
            )
            num_copies = tl.minimum(num_missing, num_slots - num_hits)  # hits keep theirs
            fill_slots(
                keys,
                tl.where(missing, rank, _UNNAMED),
                num_copies,
                pages,
                word,
                page_to_slot_ptr,
                slot_to_page_ptr,
                last_used_ptr,
                claims_ptr,
                slot_claims_ptr,
                copy_pages_ptr,
                copy_slots_ptr,
                signal_ptr,
                num_slots,
                now,
                last,
                max_horizon,
                ON_GPU,
                SLOTS_BLOCK,
                NUM_BLOCKS,
            )
        tl.store(copy_count_ptr, num_copies)

    @triton.jit
    def first_ranks(topk_ids_ptr, experts, num_tokens, top_k, IDS_BLOCK: tl.constexpr):
        """The rank at which each expert is first named; _UNNAMED if it is not.

        Every thread reads every id: warps need not tell each other what they found. The first ids
        come before the loop, so that they are read together with what the caller reads.
        """
        unnamed = tl.zeros_like(experts) + _UNNAMED
        token, choice = num_tokens * 0, num_tokens * 0
        rank, token, choice = _ranks_of_some(
            unnamed, 0, token, choice, topk_ids_ptr, experts, num_tokens, top_k, IDS_BLOCK
        )
        for start in range(IDS_BLOCK, num_tokens * top_k, IDS_BLOCK):
            rank, token, choice = _ranks_of_some(
                rank, start, token, choice, topk_ids_ptr, experts, num_tokens, top_k, IDS_BLOCK
            )
        return rank

    @triton.jit
    def _ranks_of_some(
        rank,  # of the ids before
        start,  # the first of these ids
        token,  # whose it is
        choice,  # and which of the token's
        topk_ids_ptr,
        experts,
        num_tokens,
        top_k,
        IDS_BLOCK: tl.constexpr,
    ):
        for i in tl.static_range(IDS_BLOCK):
            inside = start + i < num_tokens * top_k
            expert = tl.load(topk_ids_ptr + start + i, mask=inside, other=-1)
            named = tl.where(experts == expert, choice * num_tokens + token, _UNNAMED)
            rank = tl.minimum(rank, named)
            last = choice == top_k - 1
            token += last.to(tl.int32)
            choice = tl.where(last, 0, choice + 1)
        return rank, token, choice

    @triton.jit
    def count_both(these, others):
        """How many are true, of two vectors at once; of fewer than 2**15 numbers."""
        both = tl.sum(these.to(tl.int32) + (others.to(tl.int32) << 16), 0)
        return both & 0xFFFF, both >> 16

    @triton.jit
    def renew_pages(
        wanted,  # by expert: those that are routed to
        pages,
        slots,  # -1: in none
        claims,  # before this use
        miss_rate,  # before this admission
        num_missing,
        last_used_ptr,
        claims_ptr,
        slot_claims_ptr,
        miss_rate_ptr,
        now,
        num_slots,
        max_horizon,
    ):
        """Write the claims of what is routed to, stamp it where it is in a slot; the horizon."""
        divisor = (miss_rate >> (_RATE_BITS - _DIVISOR_BITS)).to(tl.int32)
        turnovers = (2 * num_slots << _DIVISOR_BITS) // tl.maximum(divisor, 1)
        horizon = tl.minimum(turnovers, max_horizon)
        claims = tl.maximum((claims + (now + horizon)) >> 1, now)
        tl.store(claims_ptr + pages, claims, mask=wanted)
        hit = wanted & (slots >= 0)
        tl.store(slot_claims_ptr + slots, claims, mask=hit)
        tl.store(last_used_ptr + slots, tl.zeros_like(claims) + now, mask=hit)
        more = (num_missing.to(tl.int64) << _RATE_BITS) - miss_rate
        tl.store(miss_rate_ptr, miss_rate + (more >> _RATE_SHIFT))
        return horizon

    @triton.jit
    def coldest_slots(
        last_used_ptr,
        slot_claims_ptr,
        num_slots,
        now,
        last,
        max_horizon,
        SLOTS_BLOCK: tl.constexpr,
    ):
        """Keys of slots by lane.

        Slots that are SLOTS_BLOCK apart share a lane. A lane holds the key of its slot that is
        evicted next; once that is taken, its other slots are looked at again.
        """
        lanes = tl.arange(0, SLOTS_BLOCK)
        keys = tl.full((SLOTS_BLOCK,), _NEVER, dtype=tl.int64)
        for start in range(0, num_slots, SLOTS_BLOCK):
            more = _eviction_keys(
                last_used_ptr,
                slot_claims_ptr,
                start + lanes,
                num_slots,
                now,
                last,
                max_horizon,
            )
            keys = tl.minimum(keys, more)
        return keys

    @triton.jit
    def fill_slots(
        keys,  # from `coldest_slots`
        order,  # of experts: those with the smallest numbers, all different, get slots
        num_copies,  # how many
        pages,  # of the same experts
        word,  # that was published last
        page_to_slot_ptr,
        slot_to_page_ptr,
        last_used_ptr,
        claims_ptr,
        slot_claims_ptr,
        copy_pages_ptr,
        copy_slots_ptr,
        signal_ptr,
        num_slots,
        now,
        last,  # the clock at the layer's admission before this one
        max_horizon,
        ON_GPU: tl.constexpr,
        SLOTS_BLOCK: tl.constexpr,
        NUM_BLOCKS: tl.constexpr,
    ):
        """Write and publish the copy list, then change the tables: slots hold these pages."""
        victims = tl.zeros_like(order) - 1
        places = tl.zeros_like(order)  # in the list
        for i in range(num_copies):
            oldest = tl.min(keys, 0)
            chosen = order == tl.min(order, 0)  # one number, one expert
            victim = (oldest & _SLOT_MASK).to(tl.int32)
            victims = tl.where(chosen, victim, victims)
            places = tl.where(chosen, i, places)
            order = tl.where(chosen, _UNNAMED, order)
            following = oldest * 0 + _NEVER
            if NUM_BLOCKS > 1:
                lane = victim % SLOTS_BLOCK + tl.arange(0, NUM_BLOCKS) * SLOTS_BLOCK
                # Nobody asks what follows the last one: then nothing is read, nor waited for.
                end = tl.where(i + 1 < num_copies, num_slots, 0)
                others = _eviction_keys(
                    last_used_ptr,
                    slot_claims_ptr,
                    lane,
                    end,
                    now,
                    last,
                    max_horizon,
                )
                following = tl.min(tl.where(others > oldest, others, _NEVER), 0)
            keys = tl.where(keys == oldest, following, keys)
        tl.store(copy_pages_ptr + places, pages, mask=victims >= 0)
        tl.store(copy_slots_ptr + places, victims, mask=victims >= 0)
        publish_count(signal_ptr, word, num_copies, True, ON_GPU)
        taken = victims >= 0
        evicted = tl.load(slot_to_page_ptr + victims, mask=taken, other=-1)
        # Renewed before, and read again: kept meanwhile, they would not fit into registers.
        claims = tl.load(claims_ptr + pages, mask=taken, other=0)
        tl.debug_barrier()  # what is overwritten has been read
        tl.store(page_to_slot_ptr + evicted, tl.zeros_like(evicted) - 1, mask=evicted >= 0)
        tl.store(page_to_slot_ptr + pages, victims, mask=taken)
        tl.store(slot_to_page_ptr + victims, pages, mask=taken)
        tl.store(slot_claims_ptr + victims, claims, mask=taken)
        tl.store(last_used_ptr + victims, tl.zeros_like(claims) + now, mask=taken)

    @triton.jit
    def _eviction_keys(
        last_used_ptr,
        slot_claims_ptr,
        slots,
        num_slots,
        now,
        last,
        max_horizon,  # no claim is farther than that from now
    ):
        """Smaller for what is evicted earlier; _NEVER where a slot is in use or not there."""
        last_used = tl.load(last_used_ptr + slots, mask=slots < num_slots, other=_NEVER)
        claims = tl.load(slot_claims_ptr + slots, mask=slots < num_slots, other=0)
        turn = tl.where(last_used > last, 2 * now + max_horizon - last_used, claims)
        return tl.where(last_used < now, (turn << _SLOT_BITS) | slots, _NEVER)

    @triton.jit
    def publish_count(signal_ptr, word, count, LISTED: tl.constexpr, ON_GPU: tl.constexpr):
        """Tell those that copy, if there are any, how many pages there are.

        Args:
            word: that was published last. The next one has another number.
            LISTED: the list was written; else there is nothing to copy.
        """
        if signal_ptr is not None:
            following = (((word >> _COUNT_BITS) + 1) << _COUNT_BITS) | count
            publish(signal_ptr, following, LISTED, ON_GPU)

    @triton.jit
    def copy_published(
        signal_ptr,
        addresses_ptr,
        memory_ptr,
        copy_pages_ptr,
        copy_slots_ptr,
        page_words,
        slot_words,
        BLOCK: tl.constexpr,
        ON_GPU: tl.constexpr,
    ):
        """What every program but the first one does: wait for the list, and copy its share.

        The wait always ends. The first program waits for no other one and is the first to be
        started. Were it not, the few that wait would leave it room all the same; and what starts
        early behind this launch does so when all of its programs run.
        """
        seen_ptr = signal_ptr + tl.program_id(0)
        word = wait_for_word(signal_ptr, tl.load(seen_ptr), ON_GPU)
        tl.debug_barrier()  # what was seen before has been read by all
        tl.store(seen_ptr, word)
        copy_pages(
            addresses_ptr,
            memory_ptr,
            copy_pages_ptr,
            copy_slots_ptr,
            (word & _COUNT_MASK).to(tl.int32),
            tl.program_id(0) - 1,
            tl.num_programs(0) - 1,
            page_words,
            slot_words,
            BLOCK,
        )

    @triton.jit(do_not_specialize=["page_words", "slot_words"])
    def gather_kernel(
        addresses_ptr,  # Transfer's tensors
        memory_ptr,
        copy_pages_ptr,  # CopyList's tensors
        copy_slots_ptr,
        copy_count_ptr,
        page_words,  # of 8 bytes
        slot_words,
        BLOCK: tl.constexpr,  # words of 8 bytes
    ):
        """Grid: any number of programs."""
        copy_pages(
            addresses_ptr,
            memory_ptr,
            copy_pages_ptr,
            copy_slots_ptr,
            tl.load(copy_count_ptr),
            tl.program_id(0),
            tl.num_programs(0),
            page_words,
            slot_words,
            BLOCK,
        )

    @triton.jit
    def copy_pages(
        addresses_ptr,  # as in `gather_kernel`
        memory_ptr,
        copy_pages_ptr,
        copy_slots_ptr,
        num_copies,
        program,  # of those that copy
        num_programs,
        page_words,
        slot_words,
        BLOCK: tl.constexpr,
    ):
        """Copy a program's share of the listed pages, whose blocks are dealt out in turn."""
        blocks_per_page = tl.cdiv(page_words, BLOCK)
        memory = memory_ptr.to(tl.pointer_type(tl.int64))
        for block in range(program, num_copies * blocks_per_page, num_programs):
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
