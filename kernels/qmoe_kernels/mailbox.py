"""Misses that the host computes: a post to its workers, and the sum that waits for their answer.

A layer whose experts are partly absent goes

    divert    choose the missed experts that the host takes, post their rows to the mailbox, and
              write ids in which these experts are skipped
    ...       admission, gather and products with those ids, while the host computes
    combine   wait for the answer and sum up, first expert to last, whoever computed it

all of it on the device, without a word from its own program on the host, so that a CUDA graph can
hold it. The mailbox is pinned memory that `qmoe_kernels.cpu.workers` looks at. One serves all
layers of a model, because a layer's sum is queued before the next layer's post.

Which experts: those of the missed ones that nobody asked for since the coldest slot was used, the
longest ago first, and at most so many as a table says for the number of misses. They get no slot,
so that an expert that is wanted once evicts nobody. One that comes back earlier than that, or finds
an empty slot, is brought over the link, and stays.

On the CPU the same functions are plain Python over the same tensors, and the workers are real.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmoe_kernels.cpu import DTYPES, LANES, workers
from qmoe_kernels.paging import Residency

try:
    import triton
    import triton.language as tl

    from qmoe_kernels.launching import COMPILED
except ImportError:  # a CPU needs no Triton
    triton = None

# What a mailbox has room for; larger calls are the link's alone.
MAX_TOKENS, MAX_PAIRS = 64, 512
# An answer that takes longer does not come: a worker hangs, or is gone.
ANSWER_SECONDS = 5.0

# Columns of Posts.counters.
SERVED, WAITED_NS = range(2)

RANK_BITS = 20  # of a key; clock stamps lie above


@dataclass(frozen=True)
class Mailbox:
    """Memory that device and workers share; pinned if the device is a GPU.

    Attributes:
        words: (NUM_WORDS, WORD_STRIDE) int64, see `workers`.
        ids: (MAX_PAIRS,) int64, the experts that the host takes, -1 for other pairs.
        rows: (MAX_TOKENS, hidden_size up to a multiple of 16) fp32.
        answers: (MAX_PAIRS, hidden_size) fp32, a row for each pair.
    """

    words: Tensor
    ids: Tensor
    rows: Tensor
    answers: Tensor

    @classmethod
    def empty(cls, hidden_size: int, device: torch.device) -> Mailbox:
        """A mailbox in which nothing was posted yet."""
        pin = device.type == "cuda"
        width = -(-hidden_size // LANES) * LANES
        return cls(
            torch.zeros(workers.NUM_WORDS, workers.WORD_STRIDE, dtype=torch.int64, pin_memory=pin),
            torch.full((MAX_PAIRS,), -1, dtype=torch.int64, pin_memory=pin),
            torch.zeros(MAX_TOKENS, width, pin_memory=pin),
            torch.zeros(MAX_PAIRS, hidden_size, pin_memory=pin),
        )


@dataclass(frozen=True)
class Posts:
    """What the device knows of a mailbox; all on one device.

    Attributes:
        share: (num_experts + 1,) int32, how many of so many misses the host may take.
        last_asked: (num_pages,) int64, the clock when a page was last routed to, 0: never.
        number: (1,) int64, of the last post.
        pending: (1,) int32, experts of the present layer that were posted.
        failed: (1,) int32, 1 once an answer did not come. Nothing is posted then, and sums are NaN.
        counters: (num_layers, 2) int64: experts that the host computed (`SERVED`), and how long the
            device waited for it, in nanoseconds (`WAITED_NS`).
    """

    share: Tensor
    last_asked: Tensor
    number: Tensor
    pending: Tensor
    failed: Tensor
    counters: Tensor

    @classmethod
    def empty(
        cls, num_pages: int, num_experts: int, num_layers: int, device: torch.device
    ) -> Posts:
        """Nothing posted, and everything left to the link."""

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            share=zeros(num_experts + 1, dtype=torch.int32),
            last_asked=zeros(num_pages, dtype=torch.int64),
            number=zeros(1, dtype=torch.int64),
            pending=zeros(1, dtype=torch.int32),
            failed=zeros(1, dtype=torch.int32),
            counters=zeros(num_layers, 2, dtype=torch.int64),
        )


def has_room(num_tokens: int, top_k: int) -> bool:
    """Whether a call of this size can be posted."""
    return 0 < num_tokens <= MAX_TOKENS and 0 < num_tokens * top_k <= MAX_PAIRS


def divert(
    hidden_states: Tensor,  # (num_tokens, hidden_size) bf16 | fp16 | fp32
    topk_ids: Tensor,  # (num_tokens, top_k) int32 | int64
    layer: int,
    first_page: int,
    num_experts: int,
    residency: Residency,
    posts: Posts,
    mailbox: Mailbox,
) -> Tensor:
    """Choose what the host computes of a layer and post it; before the layer's `admit`.

    Args:
        hidden_states: at most `MAX_TOKENS` rows.
        topk_ids: at most `MAX_PAIRS`; ids outside [0, num_experts) are skipped.
        layer: its number.
        first_page: page of the layer's expert 0.
        num_experts: of this layer.
        residency: as the last admission left it; not changed.
        posts, mailbox: changed in place.

    Returns:
        ``topk_ids`` with ``num_experts``, which is skipped, where the host computes.
    """
    assert has_room(*topk_ids.shape)
    arguments = (hidden_states, topk_ids, layer, first_page, num_experts, residency, posts, mailbox)
    if topk_ids.device.type == "cpu":
        return _divert_cpu(*arguments)
    return launch_divert(*arguments)


def combine(
    rows: Tensor,  # (num_tokens, top_k, hidden_size) float: zeros where link_ids skip
    topk_ids: Tensor,  # (num_tokens, top_k)
    link_ids: Tensor,  # (num_tokens, top_k), from `divert`
    topk_weights: Tensor | None,  # (num_tokens, top_k) float
    layer: int,
    num_experts: int,
    posts: Posts,
    mailbox: Mailbox,
    *,
    seconds: float = ANSWER_SECONDS,
) -> Tensor:
    """Wait for the answer to `divert`'s post, and sum the rows of each token by its weights.

    Sums are fp32, in the order of ``topk_ids``, whoever computed a row. If no answer comes within
    ``seconds``, `Posts.failed` and the mailbox's word `FAILED` are set and the result is NaN: see
    `check`.

    Returns:
        (num_tokens, hidden_size) in the dtype of ``rows``; without weights the rows, all of them.
    """
    arguments = (rows, topk_ids, link_ids, topk_weights, layer, num_experts, posts, mailbox)
    if rows.device.type == "cpu":
        return _combine_cpu(*arguments, seconds)
    return launch_combine(*arguments, seconds)


def has_failed(mailbox: Mailbox) -> bool:
    """Whether an answer did not come; does not wait for the device."""
    return workers.load_word(mailbox.words, workers.FAILED) != 0


# ---- CPU ---------------------------------------------------------------------------------------


def _divert_cpu(
    hidden_states: Tensor,
    topk_ids: Tensor,
    layer: int,
    first_page: int,
    num_experts: int,
    residency: Residency,
    posts: Posts,
    mailbox: Mailbox,
) -> Tensor:
    num_tokens, top_k = topk_ids.shape
    by_rank = topk_ids.t().flatten().tolist()
    wanted = list(dict.fromkeys(e for e in by_rank if 0 <= e < num_experts))
    slots = residency.page_to_slot[first_page : first_page + num_experts].tolist()
    asked = posts.last_asked[first_page : first_page + num_experts].tolist()
    coldest = int(residency.last_used.min())
    missing = [e for e in wanted if slots[e] < 0]
    cold = [e for e in missing if asked[e] < coldest]
    # The longest ago first; of those that were never asked for, the last choices.
    cold.sort(key=lambda e: (asked[e], -by_rank.index(e)))
    allowed = 0 if int(posts.failed) else int(posts.share[len(missing)])
    taken = torch.tensor(cold[:allowed], dtype=topk_ids.dtype)
    posts.last_asked[[first_page + e for e in wanted]] = residency.clock + 1
    posts.pending.fill_(len(taken))
    if not len(taken):
        return topk_ids.clone()
    posts.counters[layer, SERVED] += len(taken)
    on_host = torch.isin(topk_ids, taken)
    mailbox.rows[:num_tokens, : hidden_states.shape[1]] = hidden_states
    mailbox.ids[: topk_ids.numel()] = torch.where(on_host, topk_ids, -1).flatten()
    header = [layer, num_tokens, top_k, DTYPES.index(hidden_states.dtype)]
    mailbox.words[workers.HEADER, :4] = torch.tensor(header)
    # The number first: cut off here, a post that nobody saw is one too many, not one twice.
    posts.number.add_(1)
    workers.store_word(mailbox.words, workers.POSTED, int(posts.number))
    return topk_ids.masked_fill(on_host, num_experts)


def _combine_cpu(
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
    from qmoe_kernels.fused_moe import _weighted_sum_cpu

    if int(posts.pending):
        began = time.perf_counter_ns()
        if not workers.wait_for_answer(mailbox.words, int(posts.number), seconds):
            posts.failed.fill_(1)
            workers.store_word(mailbox.words, workers.FAILED, 1)
        posts.counters[layer, WAITED_NS] += time.perf_counter_ns() - began
    all_rows = rows.float()
    if int(posts.pending):
        answers = mailbox.answers[: topk_ids.numel()].view(*topk_ids.shape, -1)
        all_rows = torch.where((topk_ids != link_ids)[..., None], answers, all_rows)
    if int(posts.failed):
        all_rows = torch.full_like(all_rows, torch.nan)
    if topk_weights is None:
        return all_rows.to(rows.dtype)
    return _weighted_sum_cpu(all_rows, topk_weights, topk_ids, num_experts, dtype=rows.dtype)


# ---- GPU ---------------------------------------------------------------------------------------


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


if triton is not None:
    # Kernels see only globals of this type; words are counted in int64.
    _POSTED = tl.constexpr(workers.POSTED * workers.WORD_STRIDE)
    _ANSWERED = tl.constexpr(workers.ANSWERED * workers.WORD_STRIDE)
    _HEADER = tl.constexpr(workers.HEADER * workers.WORD_STRIDE)
    _FAILED = tl.constexpr(workers.FAILED * workers.WORD_STRIDE)
    _SERVED, _WAITED_NS = tl.constexpr(SERVED), tl.constexpr(WAITED_NS)
    _RANK_BITS, _LAST_RANK = tl.constexpr(RANK_BITS), tl.constexpr((1 << RANK_BITS) - 1)
    _NEVER = tl.constexpr(0x7FFFFFFFFFFFFFFF)

    _NOT_SPECIALIZED: Any = [
        "num_tokens",
        "top_k",
        "layer",
        "first_page",
        "num_experts",
        "num_slots",
    ]

    @triton.jit
    def _store_released(ptr, value, ON_GPU: tl.constexpr):
        """Store an int64 that the host sees, after all that this program has written before."""
        tl.debug_barrier()
        if ON_GPU:
            tl.inline_asm_elementwise(
                "fence.acq_rel.sys; st.release.sys.global.u64 [$1], $2; mov.u32 $0, 0;",
                "=r,l,l",
                [ptr.to(tl.int64), value],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            tl.store(ptr, value)

    @triton.jit
    def _wait_until(ptr, value, nanoseconds, ON_GPU: tl.constexpr):
        """Wait until the int64 there is at least ``value``; how long it took, -1: too long."""
        if ON_GPU:
            waited = tl.inline_asm_elementwise(
                """{
                .reg .pred there, late;
                .reg .u64 begin, time, now;
                mov.u64 begin, %globaltimer;
                again:
                ld.acquire.sys.global.u64 now, [$1];
                mov.u64 time, %globaltimer;
                sub.u64 time, time, begin;
                setp.ge.s64 there, now, $2;
                @there bra done;
                setp.gt.u64 late, time, $3;
                @late bra give_up;
                nanosleep.u32 200;
                bra again;
                give_up:
                mov.u64 time, -1;
                done:
                mov.u64 $0, time;
                }""",
                "=l,l,l,l",
                [ptr.to(tl.int64), value, nanoseconds],
                dtype=tl.int64,
                is_pure=False,
                pack=1,
            )
        else:
            # The interpreter has no clock: so many looks take longer there.
            looks = nanoseconds // 10000
            while (tl.load(ptr, volatile=True) < value) & (looks > 0):
                looks -= 1
            waited = tl.where(tl.load(ptr, volatile=True) < value, -1, 0).to(tl.int64)
        return waited

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
            _store_released(words_ptr + _POSTED, number + 1, ON_GPU)

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
            waited = _wait_until(words_ptr + _ANSWERED, number, limit, ON_GPU)
            tl.debug_barrier()
            tl.store(waited_ptr, before + tl.where(waited < 0, limit, waited))
            if waited < 0:
                tl.store(failed_ptr, 1)
                _store_released(words_ptr + _FAILED, number * 0 + 1, ON_GPU)

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
        broken = tl.where(tl.load(failed_ptr) != 0, float("nan"), 0.0)
        acc = tl.zeros((BLOCK,), dtype=tl.float32) + broken
        for k in tl.static_range(TOP_K):
            pair = token * TOP_K + k
            expert, link = tl.load(topk_ids_ptr + pair), tl.load(link_ids_ptr + pair)
            routed = (expert >= 0) & (expert < num_experts)
            on_host = pending & (expert != link)
            at = pair * hidden_size + column
            row = tl.load(rows_ptr + at, mask=inside & routed & (expert == link), other=0.0)
            # Volatile: these lines were in nobody's cache when they were written.
            answer = tl.load(answers_ptr + at, mask=inside & on_host, other=0.0, volatile=True)
            row = tl.where(on_host, answer, row.to(tl.float32))
            if topk_weights_ptr is None:
                out = (row + broken).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + at, out, mask=inside)
            else:
                weight = tl.load(topk_weights_ptr + pair).to(tl.float32)
                weight = tl.where(routed, weight, 0.0)  # it may be NaN
                acc = tl.fma(row, tl.zeros_like(acc) + weight, acc)
        if topk_weights_ptr is not None:
            at = token * hidden_size + column
            tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
