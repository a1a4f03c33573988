"""Misses that the host computes: a post to its workers, and the sum that waits for their answer.

A layer whose experts are partly absent goes

    admit_and_post  choose the missed experts that the host takes, post their rows to the mailbox,
                    write ids in which these experts are skipped, give slots to those that stay,
                    and copy these
    ...             products with those ids, while the host computes
    combine         wait for the answer and sum up, first expert to last, whoever computed it

all of it on the device, without a word from its own program on the host, so that a CUDA graph can
hold it. The mailbox is pinned memory that `qmoe_kernels.cpu.workers` looks at. One serves all
layers of a model, because a layer's sum is queued before the next layer's post.

Which experts: a missed expert is *cold* unless its claim before this use is at least half a horizon
above that of the slot that would go first; slots that this call uses do not count. (A copy takes
longer than the processor does, so that it is made for who is likely to come back; see
docs/expert-cache.md.) The host takes cold ones only, the smallest claim first, and at most as many
as a table says for the number of misses. They get no slot: an expert that is wanted once evicts
nobody. All other misses get a slot and are copied at once, and so is what finds an empty one.

On the CPU the same functions are plain Python over the same tensors, and the workers are real.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe_kernels.claims import horizon_of
from qmoe_kernels.cpu import DTYPES, LANES, workers
from qmoe_kernels.paging import (
    CopyList,
    Residency,
    Transfer,
    look_up,
    take_slots_of_coldest,
    turns,
)

# What a mailbox has room for; larger calls are the link's alone.
MAX_TOKENS, MAX_PAIRS = 64, 512
# An answer that takes longer does not come: a worker hangs, or is gone.
ANSWER_SECONDS = 5.0

# Columns of Posts.counters.
SERVED, WAITED_NS = range(2)

RANK_BITS = 20  # of a key; claims lie above


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
        share: (2, num_experts + 1) int32, how many of so many misses the host takes at most: of
            calls of one token, and of several.
        number: (1,) int64, of the last post.
        pending: (1,) int32, experts of the present layer that were posted.
        failed: (1,) int32, 1 once an answer did not come. Nothing is posted then, and sums are 0.
        counters: (num_layers, 2) int64: experts that the host computed (`SERVED`), and how long the
            device waited for it, in nanoseconds (`WAITED_NS`).
    """

    share: Tensor
    number: Tensor
    pending: Tensor
    failed: Tensor
    counters: Tensor

    @classmethod
    def empty(cls, num_experts: int, num_layers: int, device: torch.device) -> Posts:
        """Nothing posted, and everything left to the link."""

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            share=zeros(2, num_experts + 1, dtype=torch.int32),
            number=zeros(1, dtype=torch.int64),
            pending=zeros(1, dtype=torch.int32),
            failed=zeros(1, dtype=torch.int32),
            counters=zeros(num_layers, 2, dtype=torch.int64),
        )


def has_room(num_tokens: int, top_k: int) -> bool:
    """Whether a call of this size can be posted."""
    return 0 < num_tokens <= MAX_TOKENS and 0 < num_tokens * top_k <= MAX_PAIRS


def admit_and_post(
    hidden_states: Tensor,  # (num_tokens, hidden_size) bf16 | fp16 | fp32
    topk_ids: Tensor,  # (num_tokens, top_k) int32 | int64
    layer: int,
    first_page: int,
    num_experts: int,
    residency: Residency,
    copies: CopyList,
    posts: Posts,
    mailbox: Mailbox,
    *,
    transfer: Transfer | None = None,
) -> Tensor:
    """Admit a layer's experts as `paging.admit` does, but for those that the host computes.

    Args:
        hidden_states: at most `MAX_TOKENS` rows.
        topk_ids: at most `MAX_PAIRS`; ids outside [0, num_experts) are skipped.
        layer: its number.
        first_page: page of the layer's expert 0.
        num_experts: of this layer.
        residency, copies, posts, mailbox: changed in place.
        transfer: as in `paging.admit`.

    Returns:
        ``topk_ids`` with ``num_experts``, which is skipped, where the host computes.
    """
    assert has_room(*topk_ids.shape)
    where = (layer, first_page, num_experts)
    arguments = (hidden_states, topk_ids, *where, residency, copies, posts, mailbox)
    if topk_ids.device.type == "cpu":
        assert transfer is None  # nothing reads addresses there
        return _admit_and_post_cpu(*arguments)
    from qmoe_kernels.mailbox_kernels import launch_admit_and_post  # a CPU needs no Triton

    return launch_admit_and_post(*arguments, transfer)


def combine(
    rows: Tensor,  # (num_tokens, top_k, hidden_size) float: zeros where link_ids skip
    topk_ids: Tensor,  # (num_tokens, top_k)
    link_ids: Tensor,  # (num_tokens, top_k), from `admit_and_post`
    topk_weights: Tensor | None,  # (num_tokens, top_k) float
    layer: int,
    num_experts: int,
    posts: Posts,
    mailbox: Mailbox,
    *,
    seconds: float = ANSWER_SECONDS,
) -> Tensor:
    """Wait for the answer to `admit_and_post`, and sum the rows of each token by its weights.

    Sums are fp32, in the order of ``topk_ids``, whoever computed a row. If no answer comes within
    ``seconds``, `Posts.failed` and the word `FAILED` are set and the result is zeros that nobody
    may be given: see `has_failed`. (NaN would end a GPU's context where tokens are drawn.)

    Returns:
        (num_tokens, hidden_size) in the dtype of ``rows``; without weights the rows, all of them.
    """
    arguments = (rows, topk_ids, link_ids, topk_weights, layer, num_experts, posts, mailbox)
    if rows.device.type == "cpu":
        return _combine_cpu(*arguments, seconds)
    from qmoe_kernels.mailbox_kernels import launch_combine

    return launch_combine(*arguments, seconds)


def has_failed(mailbox: Mailbox) -> bool:
    """Whether an answer did not come; does not wait for the device."""
    return workers.load_word(mailbox.words, workers.FAILED) != 0


# ---- CPU ---------------------------------------------------------------------------------------


def _admit_and_post_cpu(
    hidden_states: Tensor,
    topk_ids: Tensor,
    layer: int,
    first_page: int,
    num_experts: int,
    residency: Residency,
    copies: CopyList,
    posts: Posts,
    mailbox: Mailbox,
) -> Tensor:
    num_tokens, top_k = topk_ids.shape
    claims = residency.claims[first_page : first_page + num_experts].tolist()  # before this use
    where = (layer, first_page, num_experts, 0, num_experts)
    sizes = len(residency.slot_to_page), len(residency.last_admitted)
    ahead = horizon_of(int(residency.miss_rate), *sizes) // 2
    wanted, missing, last = look_up(topk_ids, *where, residency)
    coldest = min(turns(residency, last).values(), default=math.inf)
    cold = [e for e in missing if claims[e] < coldest + (ahead if coldest else 0)]
    # The smallest claim first; of those that were never asked for, the last choices.
    allowed = 0 if int(posts.failed) else int(posts.share[int(num_tokens > 1), len(missing)])
    taken = sorted(cold, key=lambda e: (claims[e], -wanted.index(e)))[:allowed]
    on_host = torch.isin(topk_ids, torch.tensor(taken, dtype=topk_ids.dtype))
    posts.pending.fill_(len(taken))
    posts.counters[layer, SERVED] += len(taken)
    if taken:
        mailbox.rows[:num_tokens, : hidden_states.shape[1]] = hidden_states
        mailbox.ids[: topk_ids.numel()] = torch.where(on_host, topk_ids, -1).flatten()
        header = [layer, num_tokens, top_k, DTYPES.index(hidden_states.dtype)]
        mailbox.words[workers.HEADER, :4] = torch.tensor(header)
        # The number first: cut off here, a post that nobody saw is one too many, not one twice.
        posts.number.add_(1)
        workers.store_word(mailbox.words, workers.POSTED, int(posts.number))
    of_link = [e for e in missing if e not in taken]
    take_slots_of_coldest(of_link, first_page, last, residency, copies)
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
        all_rows = torch.zeros_like(all_rows)
    if topk_weights is None:
        return all_rows.to(rows.dtype)
    return _weighted_sum_cpu(all_rows, topk_weights, topk_ids, num_experts, dtype=rows.dtype)
