"""The kernels of `mailbox`: what a GPU does for misses that the host computes.

Memory that both sides see is written before a number that is released to the whole system, and read
after one that was acquired.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qmoe_kernels.claims import max_horizon
from qmoe_kernels.cpu import DTYPES, workers
from qmoe_kernels.launching import COMPILED, has_dependent_launch, launch_options
from qmoe_kernels.mailbox import RANK_BITS, SERVED, WAITED_NS, Mailbox, Posts
from qmoe_kernels.paging import (
    GATHER_BLOCK,
    HITS,
    MISSES,
    SLOT_BITS,
    CopyList,
    Residency,
    Transfer,
    coldest_slots,
    copy_published,
    count_both,
    fill_slots,
    first_ranks,
    launch_copying,
    publish_count,
    renew_pages,
)
from qmoe_kernels.signals import store_released, wait_until

# A program of `combine_kernel` that waits looks at the host's memory so often, times the number of
# programs: all of them together do not take the link from the pages.
LOOK_NS = 50

# Kernels see only globals of this type; words are counted in int64.
_POSTED = tl.constexpr(workers.POSTED * workers.WORD_STRIDE)
_ANSWERED = tl.constexpr(workers.ANSWERED * workers.WORD_STRIDE)
_HEADER = tl.constexpr(workers.HEADER * workers.WORD_STRIDE)
_FAILED = tl.constexpr(workers.FAILED * workers.WORD_STRIDE)
_SERVED, _WAITED_NS = tl.constexpr(SERVED), tl.constexpr(WAITED_NS)
_HITS, _MISSES, _SLOT_BITS = tl.constexpr(HITS), tl.constexpr(MISSES), tl.constexpr(SLOT_BITS)
_RANK_BITS, _LAST_RANK = tl.constexpr(RANK_BITS), tl.constexpr((1 << RANK_BITS) - 1)
_NEVER, _UNNAMED = tl.constexpr(0x7FFFFFFFFFFFFFFF), tl.constexpr(0x7FFFFFFF)
_LOOK_NS = tl.constexpr(LOOK_NS)

_NOT_SPECIALIZED: Any = [
    "page_words",
    "slot_words",
    "num_tokens",
    "top_k",
    "layer",
    "first_page",
    "num_experts",
    "num_slots",
    "max_horizon",
    "share_start",
]


def launch_admit_and_post(
    hidden_states: Tensor,
    topk_ids: Tensor,
    layer: int,
    first_page: int,
    num_experts: int,
    residency: Residency,
    copies: CopyList,
    posts: Posts,
    mailbox: Mailbox,
    transfer: Transfer | None = None,
) -> Tensor:
    """Run `admit_and_post_kernel`; arguments as in `admit_and_post`."""
    num_tokens, top_k = topk_ids.shape
    hidden_states, topk_ids = hidden_states.contiguous(), topk_ids.contiguous()
    link_ids = torch.empty_like(topk_ids)
    num_slots = residency.slot_to_page.shape[0]
    hidden_size = hidden_states.shape[1]
    grid, copying, blocks = launch_copying(num_experts, num_slots, copies, transfer)
    admit_and_post_kernel[grid](
        hidden_states,
        topk_ids,
        link_ids,
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
        posts.share,
        posts.number,
        posts.pending,
        posts.failed,
        posts.counters,
        mailbox.words,
        mailbox.ids,
        mailbox.rows,
        *copying,
        num_tokens,
        top_k,
        layer,
        first_page,
        num_experts,
        num_slots,
        max_horizon(len(residency.last_admitted)),
        posts.share.stride(0) if num_tokens > 1 else 0,
        hidden_size,
        mailbox.rows.shape[1],
        DTYPE=DTYPES.index(hidden_states.dtype),
        ROW_BLOCK=min(triton.next_power_of_2(hidden_size), 2048),
        COPY_BLOCK=GATHER_BLOCK,
        ON_GPU=COMPILED,
        PDL=has_dependent_launch(topk_ids.device),
        **blocks,
        **launch_options(True, topk_ids.device),
    )
    return link_ids


def launch_combine(
    rows: Tensor,
    topk_ids: Tensor,
    link_ids: Tensor,
    topk_weights: Tensor | None,
    layer: int,
    num_experts: int,
    posts: Posts,
    mailbox: Mailbox,
    seconds: float,
) -> Tensor:
    """Run `combine_kernel`; arguments as in `combine`."""
    num_tokens, top_k, hidden_size = rows.shape
    rows, topk_ids, link_ids = rows.contiguous(), topk_ids.contiguous(), link_ids.contiguous()
    summed = topk_weights is not None
    if topk_weights is not None:
        topk_weights = topk_weights.contiguous()
    out = rows.new_empty(num_tokens, hidden_size) if summed else torch.empty_like(rows)
    block = min(triton.next_power_of_2(hidden_size), 256)
    combine_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        rows,
        mailbox.answers,
        topk_ids,
        link_ids,
        topk_weights,
        out,
        posts.number,
        posts.pending,
        posts.failed,
        posts.counters,
        mailbox.words,
        layer,
        num_experts,
        hidden_size,
        int(seconds * 1e9),
        TOP_K=top_k,
        BLOCK=block,
        ON_GPU=COMPILED,
        PDL=has_dependent_launch(rows.device),
        # Each thread that waits looks by itself: one warp's threads all look at once.
        num_warps=1,
        # The kernels before it are the products'.
        **launch_options(True, rows.device),
    )
    return out


# One compilation serves every layer and every number of tokens.
@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def admit_and_post_kernel(
    hidden_states_ptr,  # (num_tokens, hidden_size)
    topk_ids_ptr,  # (num_tokens, top_k)
    link_ids_ptr,  # (num_tokens, top_k)
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
    share_ptr,  # Posts' tensors
    number_ptr,
    pending_ptr,
    failed_ptr,
    host_counters_ptr,
    words_ptr,  # Mailbox's tensors
    host_ids_ptr,
    host_rows_ptr,
    signal_ptr,  # these five are as in `paging.admit_kernel`
    addresses_ptr,
    memory_ptr,
    page_words,
    slot_words,
    num_tokens,
    top_k,
    layer,
    first_page,
    num_experts,
    num_slots,
    max_horizon,
    share_start,  # of the table in share
    hidden_size,
    row_stride,  # of host_rows
    DTYPE: tl.constexpr,  # its place in `cpu.DTYPES`
    ROW_BLOCK: tl.constexpr,  # power of two
    COPY_BLOCK: tl.constexpr,
    ON_GPU: tl.constexpr,
    PDL: tl.constexpr,
    IDS_BLOCK: tl.constexpr,  # as in `paging.admit_kernel`
    EXPERTS_BLOCK: tl.constexpr,
    SLOTS_BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """Grid: as of `paging.admit_kernel`, whose admission this is; the host begins in its middle."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if tl.program_id(0) == 0:
        _admit_and_post(
            hidden_states_ptr,
            topk_ids_ptr,
            link_ids_ptr,
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
            share_ptr,
            number_ptr,
            pending_ptr,
            failed_ptr,
            host_counters_ptr,
            words_ptr,
            host_ids_ptr,
            host_rows_ptr,
            signal_ptr,
            num_tokens,
            top_k,
            layer,
            first_page,
            num_experts,
            num_slots,
            max_horizon,
            share_start,
            hidden_size,
            row_stride,
            DTYPE,
            ROW_BLOCK,
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
def _admit_and_post(
    hidden_states_ptr,  # as in `admit_and_post_kernel`
    topk_ids_ptr,
    link_ids_ptr,
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
    share_ptr,
    number_ptr,
    pending_ptr,
    failed_ptr,
    host_counters_ptr,
    words_ptr,
    host_ids_ptr,
    host_rows_ptr,
    signal_ptr,
    num_tokens,
    top_k,
    layer,
    first_page,
    num_experts,
    num_slots,
    max_horizon,
    share_start,
    hidden_size,
    row_stride,
    DTYPE: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ON_GPU: tl.constexpr,
    IDS_BLOCK: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    SLOTS_BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """What one program does; see `paging.admit_experts`."""
    experts = tl.arange(0, EXPERTS_BLOCK)
    in_range = experts < num_experts
    pages = first_page + experts
    slots = tl.load(page_to_slot_ptr + pages, mask=in_range, other=-1)
    claims = tl.load(claims_ptr + pages, mask=in_range, other=0)
    miss_rate = tl.load(miss_rate_ptr)
    clock = tl.load(clock_ptr)
    hits_ptr = counters_ptr + 2 * layer + _HITS
    misses_ptr = counters_ptr + 2 * layer + _MISSES
    served_ptr = host_counters_ptr + 2 * layer + _SERVED
    hits, misses = tl.load(hits_ptr), tl.load(misses_ptr)
    word = clock
    if signal_ptr is not None:
        word = tl.load(signal_ptr, volatile=True)
    rank = first_ranks(topk_ids_ptr, experts, num_tokens, top_k, IDS_BLOCK)
    wanted = in_range & (rank < _UNNAMED)
    hit = wanted & (slots >= 0)
    missing = wanted & (slots < 0)
    num_hits, num_missing = count_both(hit, missing)
    now = clock + 1

    tl.debug_barrier()  # what is written below has been read by all
    if num_missing == 0:
        publish_count(signal_ptr, word, 0, False, ON_GPU)
    tl.store(clock_ptr, now)
    tl.store(hits_ptr, hits + num_hits)
    tl.store(misses_ptr, misses + num_missing)
    horizon = renew_pages(
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

    num_ids = num_tokens * top_k
    MANY_IDS: tl.constexpr = 2 * IDS_BLOCK  # by all threads together
    num_taken = num_missing * 0
    num_copies = num_missing * 0
    if num_missing == 0:
        for start in range(0, num_ids, MANY_IDS):
            index = start + tl.arange(0, MANY_IDS)
            ids = tl.load(topk_ids_ptr + index, mask=index < num_ids, other=-1)
            tl.store(link_ids_ptr + index, ids, mask=index < num_ids)
    else:
        last = tl.load(last_admitted_ptr + layer)
        share = tl.load(share_ptr + share_start + num_missing)
        share = tl.where(tl.load(failed_ptr) != 0, 0, share)
        tl.debug_barrier()  # the stamps of hits must be seen below; `last` has been read by all
        keys = coldest_slots(
            last_used_ptr,
            slot_claims_ptr,
            num_slots,
            now,
            last,
            max_horizon,
            SLOTS_BLOCK,
        )
        order = tl.where(missing, rank, _UNNAMED)  # of those that get a slot
        coldest = tl.min(keys, 0) >> _SLOT_BITS
        cold = missing & (claims < coldest + tl.where(coldest > 0, horizon // 2, 0))
        num_taken = tl.minimum(share, tl.sum(cold.to(tl.int32), 0))
        num_copies = tl.minimum(num_missing - num_taken, num_slots - num_hits)  # hits keep theirs
        # The last ranks first; so many ones less a rank are these bits, turned over.
        key = (claims << _RANK_BITS) | (rank.to(tl.int64) ^ _LAST_RANK)
        key = tl.where(cold, key, _NEVER)
        for _ in range(num_taken):
            chosen = key == tl.min(key, 0)  # one rank, one expert
            order = tl.where(chosen, _UNNAMED, order)
            key = tl.where(chosen, _NEVER, key)
        taken = (missing & (order == _UNNAMED)).to(tl.int32)
        for start in range(0, num_ids, MANY_IDS):
            index = start + tl.arange(0, MANY_IDS)
            ids = tl.load(topk_ids_ptr + index, mask=index < num_ids, other=-1)
            named = ids[:, None] == experts[None, :]
            on_host = tl.sum(tl.where(named, taken[None, :], 0), 1) > 0
            tl.store(link_ids_ptr + index, tl.where(on_host, num_experts, ids), index < num_ids)
            if num_taken > 0:
                host = tl.where(on_host, ids, -1).to(tl.int64)
                tl.store(host_ids_ptr + index, host, mask=index < num_ids)
        if num_taken > 0:
            for token in range(num_tokens):
                for start in range(0, hidden_size, ROW_BLOCK):
                    column = start + tl.arange(0, ROW_BLOCK)
                    inside = column < hidden_size
                    x = tl.load(hidden_states_ptr + token * hidden_size + column, mask=inside)
                    at = token * row_stride + column
                    tl.store(host_rows_ptr + at, x.to(tl.float32), mask=inside)
            number, served = tl.load(number_ptr), tl.load(served_ptr)
            tl.debug_barrier()  # they have been read by all
            header = words_ptr + _HEADER
            tl.store(header + 0, layer)
            tl.store(header + 1, num_tokens)
            tl.store(header + 2, top_k)
            tl.store(header + 3, DTYPE)
            tl.store(served_ptr, served + num_taken)
            tl.store(number_ptr, number + 1)
            store_released(words_ptr + _POSTED, number + 1, ON_GPU)
        fill_slots(
            keys,
            order,
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
    tl.store(last_admitted_ptr + layer, now)
    tl.store(copy_count_ptr, num_copies)
    tl.store(pending_ptr, num_taken)


@triton.jit(do_not_specialize=["layer", "num_experts", "nanoseconds"])
def combine_kernel(
    rows_ptr,  # (num_tokens, TOP_K, hidden_size)
    answers_ptr,  # (num_tokens * TOP_K, hidden_size) fp32, in the host's memory
    topk_ids_ptr,  # (num_tokens, TOP_K)
    link_ids_ptr,  # (num_tokens, TOP_K)
    topk_weights_ptr,  # (num_tokens, TOP_K), or None: rows are not summed
    out_ptr,  # (num_tokens, hidden_size), or as rows
    number_ptr,  # Posts' tensors
    pending_ptr,
    failed_ptr,
    counters_ptr,
    words_ptr,
    layer,
    num_experts,
    hidden_size,
    nanoseconds,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    ON_GPU: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (num_tokens, cdiv(hidden_size, BLOCK)). Sums as `rows.weighted_sum_kernel` does.

    Every program waits for itself; the first one writes down how long. Where one gives up, others
    may still have seen the answer: what all of them have written is thrown away.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden_size
    pending = tl.load(pending_ptr) > 0
    valid = tl.load(failed_ptr) == 0
    if pending & valid:
        number = tl.load(number_ptr)
        limit = number * 0 + nanoseconds
        pause = tl.minimum(tl.num_programs(0) * tl.num_programs(1) * _LOOK_NS, 20000)
        waited = wait_until(words_ptr + _ANSWERED, number, limit, pause, ON_GPU)
        valid = waited >= 0
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            waited_ptr = counters_ptr + 2 * layer + _WAITED_NS
            tl.store(waited_ptr, tl.load(waited_ptr) + tl.where(valid, waited, limit))
        if waited < 0:
            tl.store(failed_ptr, 1)
            store_released(words_ptr + _FAILED, number * 0 + 1, ON_GPU)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        expert, link = tl.load(topk_ids_ptr + pair), tl.load(link_ids_ptr + pair)
        routed = (expert >= 0) & (expert < num_experts)
        on_host = valid & pending & (expert != link)
        at = pair * hidden_size + column
        row = tl.load(rows_ptr + at, mask=inside & valid & routed & (expert == link), other=0.0)
        # Volatile: these lines were in nobody's cache when they were written.
        answer = tl.load(answers_ptr + at, mask=inside & on_host, other=0.0, volatile=True)
        row = tl.where(on_host, answer, row.to(tl.float32))
        if topk_weights_ptr is None:
            tl.store(out_ptr + at, row.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            weight = tl.load(topk_weights_ptr + pair).to(tl.float32)
            weight = tl.where(routed, weight, 0.0)  # it may be NaN
            acc = tl.fma(row, tl.zeros_like(acc) + weight, acc)
    if topk_weights_ptr is not None:
        at = token * hidden_size + column
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
