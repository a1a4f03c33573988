"""The kernel of `reading`: what a GPU does for pages that are read from files."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qmoe_kernels.claims import max_horizon
from qmoe_kernels.cpu import workers
from qmoe_kernels.launching import COMPILED
from qmoe_kernels.paging import admission_blocks, admit_experts
from qmoe_kernels.reading import Frames, ReadBox
from qmoe_kernels.signals import store_released, wait_until

# A waiting thread looks at the host's memory so often, in nanoseconds.
LOOK_NS = 200
_LOOK_NS = tl.constexpr(LOOK_NS)

# Kernels see only globals of this type; words are counted in int64.
_POSTED = tl.constexpr(workers.POSTED * workers.WORD_STRIDE)
_ANSWERED = tl.constexpr(workers.ANSWERED * workers.WORD_STRIDE)
_HEADER = tl.constexpr(workers.HEADER * workers.WORD_STRIDE)
_FAILED = tl.constexpr(workers.FAILED * workers.WORD_STRIDE)

_NOT_SPECIALIZED: Any = [
    "num_tokens",
    "top_k",
    "layer",
    "first_page",
    "num_experts",
    "low",
    "high",
    "num_frames",
    "max_horizon",
    "nanoseconds",
]


def launch_read_pages(
    topk_ids: Tensor,
    layer: int,
    first_page: int,
    num_experts: int,
    low: int,
    high: int,
    page_to_slot: Tensor,
    frames: Frames,
    box: ReadBox,
    seconds: float,
) -> None:
    """Run `read_kernel`; arguments as in `read_pages`."""
    num_tokens, top_k = topk_ids.shape
    held = frames.residency
    num_frames = held.slot_to_page.shape[0]
    blocks = admission_blocks(num_experts, num_frames)
    read_kernel[(1,)](
        topk_ids.contiguous(),
        page_to_slot,
        held.page_to_slot,
        held.slot_to_page,
        held.last_used,
        held.claims,
        held.slot_claims,
        held.miss_rate,
        held.clock,
        held.last_admitted,
        held.counters,
        frames.reads.pages,
        frames.reads.slots,
        frames.reads.count,
        frames.addresses,
        frames.number,
        frames.failed,
        frames.waited_ns,
        box.words,
        box.status,
        box.pages,
        box.frames,
        frames.base,
        frames.frame_bytes,
        num_tokens,
        top_k,
        layer,
        first_page,
        num_experts,
        low,
        high,
        num_frames,
        max_horizon(len(held.last_admitted)),
        int(seconds * 1e9),
        **blocks,
        NUM_THREADS=32 * blocks["num_warps"],
        ON_GPU=COMPILED,
    )


# One compilation serves every layer and every number of tokens.
@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def read_kernel(
    topk_ids_ptr,  # (num_tokens, top_k)
    page_to_slot_ptr,  # (num_pages,)
    page_to_frame_ptr,  # Residency's tensors, of frames
    frame_to_page_ptr,
    last_used_ptr,
    claims_ptr,
    slot_claims_ptr,
    miss_rate_ptr,
    clock_ptr,
    last_admitted_ptr,
    counters_ptr,
    read_pages_ptr,  # CopyList's tensors
    read_frames_ptr,
    read_count_ptr,
    addresses_ptr,  # (num_pages,)
    number_ptr,
    failed_ptr,
    waited_ns_ptr,  # (num_layers,)
    words_ptr,  # ReadBox's tensors
    status_ptr,
    box_pages_ptr,
    box_frames_ptr,
    base,  # address of the first frame
    frame_bytes,
    num_tokens,
    top_k,
    layer,
    first_page,
    num_experts,
    low,
    high,
    num_frames,
    max_horizon,
    nanoseconds,
    IDS_BLOCK: tl.constexpr,  # see `paging.admit_kernel`
    EXPERTS_BLOCK: tl.constexpr,
    SLOTS_BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    NUM_THREADS: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """Grid: (1,). Frames are given out as slots are, to pages that are in no slot."""
    admit_experts(
        topk_ids_ptr,
        page_to_frame_ptr,
        frame_to_page_ptr,
        last_used_ptr,
        claims_ptr,
        slot_claims_ptr,
        miss_rate_ptr,
        clock_ptr,
        last_admitted_ptr,
        counters_ptr,
        read_pages_ptr,
        read_frames_ptr,
        read_count_ptr,
        page_to_slot_ptr,
        None,
        num_tokens,
        top_k,
        layer,
        first_page,
        num_experts,
        low,
        high,
        num_frames,
        max_horizon,
        ON_GPU,
        IDS_BLOCK,
        EXPERTS_BLOCK,
        SLOTS_BLOCK,
        NUM_BLOCKS,
    )
    tl.debug_barrier()  # the list must be seen
    count = tl.load(read_count_ptr)
    if count > 0:
        i = tl.arange(0, EXPERTS_BLOCK)
        pages = tl.load(read_pages_ptr + i, mask=i < count, other=0).to(tl.int64)
        frames = tl.load(read_frames_ptr + i, mask=i < count, other=0).to(tl.int64)
        tl.store(addresses_ptr + pages, base + frames * frame_bytes, mask=i < count)
        number, failed = tl.load(number_ptr) + 1, tl.load(failed_ptr)
        waited = tl.load(waited_ns_ptr + layer)
        tl.debug_barrier()  # what was read above is written below
        if failed == 0:
            tl.store(box_pages_ptr + i, pages, mask=i < count)
            tl.store(box_frames_ptr + i, frames, mask=i < count)
            tl.store(words_ptr + _HEADER, count.to(tl.int64))
            tl.store(number_ptr, number)
            store_released(words_ptr + _POSTED, number, ON_GPU)
            limit = number * 0 + nanoseconds
            answered_ptr = words_ptr + _ANSWERED
            if ON_GPU:
                # Every thread looks for itself, and one that is late makes all of them late: they
                # must agree on what comes next.
                none = tl.zeros((NUM_THREADS,), dtype=tl.int64)
                times = wait_until(
                    answered_ptr + none,
                    none + number,
                    none + limit,
                    none.to(tl.int32) + _LOOK_NS,
                    ON_GPU,
                )
                late = tl.min(times, 0) < 0
                longest = tl.max(times, 0)
            else:
                longest = wait_until(answered_ptr, number, limit, _LOOK_NS, ON_GPU)
                late = longest < 0
            tl.store(waited_ns_ptr + layer, waited + tl.where(late, limit, longest))
            if late:
                store_released(words_ptr + _FAILED, number * 0 + 1, ON_GPU)
            # Volatile: nobody has it in a cache.
            if late | (tl.load(status_ptr, volatile=True) != 0):
                tl.store(failed_ptr, 1)
