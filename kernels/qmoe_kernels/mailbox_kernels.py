"""The kernels of `mailbox`: what a GPU does for misses that the host computes.

Each waits for the one before it. Memory that both sides see is written before a number that is
released to the whole system, and read after one that was acquired.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qmoe_kernels.cpu import DTYPES, workers
from qmoe_kernels.launching import COMPILED
from qmoe_kernels.mailbox import RANK_BITS, SERVED, WAITED_NS, Mailbox, Posts
from qmoe_kernels.paging import Residency
from qmoe_kernels.signals import store_released, wait_until

# Kernels see only globals of this type; words are counted in int64.
_POSTED = tl.constexpr(workers.POSTED * workers.WORD_STRIDE)
_ANSWERED = tl.constexpr(workers.ANSWERED * workers.WORD_STRIDE)
_HEADER = tl.constexpr(workers.HEADER * workers.WORD_STRIDE)
_FAILED = tl.constexpr(workers.FAILED * workers.WORD_STRIDE)
_SERVED, _WAITED_NS = tl.constexpr(SERVED), tl.constexpr(WAITED_NS)
_RANK_BITS, _LAST_RANK = tl.constexpr(RANK_BITS), tl.constexpr((1 << RANK_BITS) - 1)
_NEVER = tl.constexpr(0x7FFFFFFFFFFFFFFF)
_PAUSE_NS = tl.constexpr(200)  # between two looks over the link

_NOT_SPECIALIZED: Any = [
    "num_tokens",
    "top_k",
    "layer",
    "first_page",
    "num_experts",
    "num_slots",
]


def launch_divert(
    hidden_states: Tensor,
    topk_ids: Tensor,
    layer: int,
    first_page: int,
    num_experts: int,
    residency: Residency,
    posts: Posts,
    mailbox: Mailbox,
) -> Tensor:
    """Run `divert_kernel`; arguments as in `divert`."""
    num_tokens, top_k = topk_ids.shape
    hidden_states, topk_ids = hidden_states.contiguous(), topk_ids.contiguous()
    link_ids = torch.empty_like(topk_ids)
    num_slots = residency.slot_to_page.shape[0]
    hidden_size = hidden_states.shape[1]
    divert_kernel[(1,)](
        hidden_states,
        topk_ids,
        link_ids,
        residency.page_to_slot,
        residency.last_used,
        residency.clock,
        posts.share,
        posts.last_asked,
        posts.number,
        posts.pending,
        posts.failed,
        posts.counters,
        mailbox.words,
        mailbox.ids,
        mailbox.rows,
        num_tokens,
        top_k,
        layer,
        first_page,
        num_experts,
        num_slots,
        hidden_size,
        mailbox.rows.shape[1],
        DTYPE=DTYPES.index(hidden_states.dtype),
        IDS_BLOCK=16,
        EXPERTS_BLOCK=triton.next_power_of_2(num_experts),
        SLOTS_BLOCK=min(triton.next_power_of_2(num_slots), 1024),
        ROW_BLOCK=min(triton.next_power_of_2(hidden_size), 2048),
        ON_GPU=COMPILED,
        num_warps=4,
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
    """Run `wait_kernel` and `combine_kernel`; arguments as in `combine`."""
    num_tokens, top_k, hidden_size = rows.shape
    rows, topk_ids, link_ids = rows.contiguous(), topk_ids.contiguous(), link_ids.contiguous()
    # One thread looks at the word: many would take the link from the pages.
    wait_kernel[(1,)](
        posts.number,
        posts.pending,
        posts.failed,
        posts.counters,
        mailbox.words,
        layer,
        int(seconds * 1e9),
        ON_GPU=COMPILED,
        num_warps=1,
    )
    summed = topk_weights is not None
    if topk_weights is not None:
        topk_weights = topk_weights.contiguous()
    out = rows.new_empty(num_tokens, hidden_size) if summed else torch.empty_like(rows)
    block = min(triton.next_power_of_2(hidden_size), 512)
    combine_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        rows,
        mailbox.answers,
        topk_ids,
        link_ids,
        topk_weights,
        out,
        posts.pending,
        posts.failed,
        num_experts,
        hidden_size,
        TOP_K=top_k,
        BLOCK=block,
        num_warps=4,
    )
    return out


# One compilation serves every layer and every number of tokens.
@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def divert_kernel(
    hidden_states_ptr,  # (num_tokens, hidden_size)
    topk_ids_ptr,  # (num_tokens, top_k)
    link_ids_ptr,  # (num_tokens, top_k)
    page_to_slot_ptr,  # Residency's tensors
    last_used_ptr,
    clock_ptr,
    share_ptr,  # Posts' tensors
    last_asked_ptr,
    number_ptr,
    pending_ptr,
    failed_ptr,
    counters_ptr,
    words_ptr,  # Mailbox's tensors
    host_ids_ptr,
    host_rows_ptr,
    num_tokens,
    top_k,
    layer,
    first_page,
    num_experts,
    num_slots,
    hidden_size,
    row_stride,  # of host_rows
    DTYPE: tl.constexpr,  # its place in `cpu.DTYPES`
    IDS_BLOCK: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,  # power of two, at least num_experts
    SLOTS_BLOCK: tl.constexpr,  # power of two
    ROW_BLOCK: tl.constexpr,  # power of two
    ON_GPU: tl.constexpr,
):
    """Grid: (1,). Slots are only searched when something is missing."""
    NONE: tl.constexpr = _LAST_RANK

    clock, number = tl.load(clock_ptr), tl.load(number_ptr)
    experts = tl.arange(0, EXPERTS_BLOCK)
    in_range = experts < num_experts
    slots = tl.load(page_to_slot_ptr + first_page + experts, mask=in_range, other=-1)
    asked = tl.load(last_asked_ptr + first_page + experts, mask=in_range, other=0)
    served_ptr = counters_ptr + 2 * layer + _SERVED
    served = tl.load(served_ptr)

    # The rank at which each expert is first named, as in `paging.admit_kernel`.
    rank = tl.full((EXPERTS_BLOCK,), NONE, dtype=tl.int32)
    num_ids = num_tokens * top_k
    for start in range(0, num_ids, IDS_BLOCK):
        index = start + tl.arange(0, IDS_BLOCK)
        ids = tl.load(topk_ids_ptr + index, mask=index < num_ids, other=-1)
        ranks = (index % top_k) * num_tokens + index // top_k
        named = ids[:, None] == experts[None, :]
        rank = tl.minimum(rank, tl.min(tl.where(named, ranks[:, None], NONE), axis=0))
    wanted = in_range & (rank < NONE)
    missing = wanted & (slots < 0)
    num_missing = tl.sum(missing.to(tl.int32), 0)
    share = tl.load(share_ptr + num_missing)
    share = tl.where(tl.load(failed_ptr) != 0, 0, share)

    taken = tl.zeros((EXPERTS_BLOCK,), dtype=tl.int32)
    num_taken = num_missing * 0
    if share > 0:
        coldest = tl.full((SLOTS_BLOCK,), _NEVER, dtype=tl.int64)
        for start in range(0, num_slots, SLOTS_BLOCK):
            slot = start + tl.arange(0, SLOTS_BLOCK)
            used = tl.load(last_used_ptr + slot, mask=slot < num_slots, other=_NEVER)
            coldest = tl.minimum(coldest, used)
        cold = missing & (asked < tl.min(coldest, 0))
        # The last ranks first; so many ones less a rank are these bits, turned over.
        key = (asked << _RANK_BITS) | (rank.to(tl.int64) ^ _LAST_RANK)
        key = tl.where(cold, key, _NEVER)
        num_taken = tl.minimum(share, tl.sum(cold.to(tl.int32), 0))
        for _ in range(num_taken):
            chosen = key == tl.min(key, 0)  # one rank, one expert
            taken = tl.where(chosen, 1, taken)
            key = tl.where(chosen, _NEVER, key)
    tl.debug_barrier()  # what was read above is written below
    tl.store(last_asked_ptr + first_page + experts, asked * 0 + clock + 1, mask=wanted)
    tl.store(pending_ptr, num_taken)
    for start in range(0, num_ids, IDS_BLOCK):
        index = start + tl.arange(0, IDS_BLOCK)
        ids = tl.load(topk_ids_ptr + index, mask=index < num_ids, other=-1)
        named = ids[:, None] == experts[None, :]
        on_host = tl.sum(tl.where(named, taken[None, :], 0), 1) > 0
        link = tl.where(on_host, num_experts, ids)
        tl.store(link_ids_ptr + index, link, mask=index < num_ids)
        if num_taken > 0:
            host = tl.where(on_host, ids, -1).to(tl.int64)
            tl.store(host_ids_ptr + index, host, mask=index < num_ids)
    if num_taken > 0:
        for token in range(num_tokens):
            for start in range(0, hidden_size, ROW_BLOCK):
                column = start + tl.arange(0, ROW_BLOCK)
                inside = column < hidden_size
                x = tl.load(hidden_states_ptr + token * hidden_size + column, mask=inside)
                tl.store(host_rows_ptr + token * row_stride + column, x.to(tl.float32), inside)
        header = words_ptr + _HEADER
        tl.store(header + 0, layer)
        tl.store(header + 1, num_tokens)
        tl.store(header + 2, top_k)
        tl.store(header + 3, DTYPE)
        tl.store(served_ptr, served + num_taken)
        tl.store(number_ptr, number + 1)
        store_released(words_ptr + _POSTED, number + 1, ON_GPU)


@triton.jit(do_not_specialize=["layer", "nanoseconds"])
def wait_kernel(
    number_ptr,  # Posts' tensors
    pending_ptr,
    failed_ptr,
    counters_ptr,
    words_ptr,
    layer,
    nanoseconds,
    ON_GPU: tl.constexpr,
):
    """Grid: (1,)."""
    number, failed = tl.load(number_ptr), tl.load(failed_ptr)
    waited_ptr = counters_ptr + 2 * layer + _WAITED_NS
    before = tl.load(waited_ptr)
    if (tl.load(pending_ptr) > 0) & (failed == 0):
        limit = number * 0 + nanoseconds
        waited = wait_until(words_ptr + _ANSWERED, number, limit, _PAUSE_NS, ON_GPU)
        tl.debug_barrier()
        tl.store(waited_ptr, before + tl.where(waited < 0, limit, waited))
        if waited < 0:
            tl.store(failed_ptr, 1)
            store_released(words_ptr + _FAILED, number * 0 + 1, ON_GPU)


@triton.jit(do_not_specialize=["num_experts"])
def combine_kernel(
    rows_ptr,  # (num_tokens, TOP_K, hidden_size)
    answers_ptr,  # (num_tokens * TOP_K, hidden_size) fp32, in the host's memory
    topk_ids_ptr,  # (num_tokens, TOP_K)
    link_ids_ptr,  # (num_tokens, TOP_K)
    topk_weights_ptr,  # (num_tokens, TOP_K), or None: rows are not summed
    out_ptr,  # (num_tokens, hidden_size), or as rows
    pending_ptr,
    failed_ptr,
    num_experts,
    hidden_size,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (num_tokens, cdiv(hidden_size, BLOCK)). Sums as `rows.weighted_sum_kernel` does."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden_size
    pending = tl.load(pending_ptr) > 0
    valid = tl.load(failed_ptr) == 0
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
