"""Pages that are in no host memory: a post to the threads that read them, and the wait for it.

Where host memory does not hold all pages of a model, it has *frames*, as the device has slots: the
device chooses which pages are in them, by the same admission. Before a layer is admitted to slots,
`read_pages` looks at its routed experts that are in no slot; those that are in no frame either get
one, are written down in a mailbox of pinned memory, and a number is posted. Threads
(`qmoe_kernels.cpu.readers`) see the number, read the pages from their files into the frames, and
write the number back, for which the device waits. From then on the pages have addresses, like all
others: `paging.gather` knows of nothing. All of it is one launch without a word from the host's
program, so that a CUDA graph can hold it; where nothing is to be read it neither posts nor waits.

A frame is overwritten only after everything that was queued before on the device's stream has
ended: the post itself is queued there. Copies from frames on other streams are to be waited for
before, as `ExpertCache` does.

On the CPU the same functions are plain Python over the same tensors, and the threads are real.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe_kernels.cpu import workers
from qmoe_kernels.paging import CopyList, Residency, _admit_cpu

# Pages that take longer do not come: the disk hangs, or a reader is gone.
READ_SECONDS = 30.0


@dataclass(frozen=True)
class ReadBox:
    """Memory that the device and the reading threads share; pinned if the device is a GPU.

    Attributes:
        words: (NUM_WORDS, WORD_STRIDE) int64, see `workers`; the header is how many pages.
        status: (1,) int64, 0, or why a page could not be read: see `readers`.
        pages, frames: (capacity,) int64: what is to be read, and where it goes.
    """

    words: Tensor
    status: Tensor
    pages: Tensor
    frames: Tensor

    @classmethod
    def empty(cls, capacity: int, device: torch.device) -> ReadBox:
        """A mailbox for as many pages as a layer has experts, in which nothing was posted yet."""
        pin = device.type == "cuda"

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, pin_memory=pin)

        words = zeros(workers.NUM_WORDS, workers.WORD_STRIDE)
        return cls(words, zeros(1), zeros(capacity), zeros(capacity))


@dataclass(frozen=True)
class Frames:
    """Which page is in which frame, and what the device knows of the mailbox; all on one device.

    Attributes:
        residency: of frames as of slots. Its counters are distinct experts per admission that were
            in no slot, but in a frame (`HITS`), and in neither (`MISSES`): what was read.
        reads: pages and frames of the last post.
        addresses: (num_pages,) int64, where each page that is in a frame is in host memory.
        base: address of the first frame.
        frame_bytes: from one frame to the next.
        number: (1,) int64, of the last post.
        failed: (1,) int32, 1 once a page did not come. Nothing is posted then, and frames hold
            anything.
        waited_ns: (num_layers,) int64, how long the device waited.
    """

    residency: Residency
    reads: CopyList
    addresses: Tensor
    base: int
    frame_bytes: int
    number: Tensor
    failed: Tensor
    waited_ns: Tensor

    @classmethod
    def empty(
        cls,
        num_pages: int,
        num_layers: int,
        capacity: int,
        memory: Tensor,  # (num_frames, frame_bytes) uint8
        device: torch.device,
    ) -> Frames:
        """Nothing read yet."""
        return cls(
            residency=Residency.empty(num_pages, len(memory), num_layers, device),
            reads=CopyList.empty(capacity, device),
            # Of frames that hold no such page: after a failure pages are copied all the same.
            addresses=torch.full((num_pages,), memory.data_ptr(), device=device),
            base=memory.data_ptr(),
            frame_bytes=memory.stride(0),
            number=torch.zeros(1, dtype=torch.int64, device=device),
            failed=torch.zeros(1, dtype=torch.int32, device=device),
            waited_ns=torch.zeros(num_layers, dtype=torch.int64, device=device),
        )


def read_pages(
    topk_ids: Tensor,  # (num_tokens, top_k) int32 | int64
    layer: int,
    first_page: int,
    num_experts: int,
    page_to_slot: Tensor,  # (num_pages,) int32
    frames: Frames,
    box: ReadBox,
    *,
    experts: tuple[int, int] | None = None,
    seconds: float = READ_SECONDS,
) -> None:
    """Read what a layer's routed experts need and neither a slot nor a frame has.

    If a page cannot be read, or does not come within ``seconds``, `Frames.failed` is set, and what
    is computed from then on may be given to nobody: see `has_failed`.

    Args:
        topk_ids: as in `paging.admit`; no more distinct ones than there are frames.
        layer: row of the counters.
        first_page: page of the layer's expert 0.
        num_experts: of this layer.
        page_to_slot: of the slots, as the last admission left it.
        frames, box: changed in place.
        experts: only ids in [low, high) are looked at; all where it is None.
        seconds: how long the pages may take.
    """
    low, high = experts or (0, num_experts)
    arguments = (topk_ids, layer, first_page, num_experts, low, high, page_to_slot, frames, box)
    if topk_ids.device.type == "cpu":
        _read_pages_cpu(*arguments, seconds)
    else:
        from qmoe_kernels.reading_kernels import launch_read_pages  # here: a CPU needs no Triton

        launch_read_pages(*arguments, seconds)


def has_failed(box: ReadBox) -> bool:
    """Whether a page did not come; does not wait for the device."""
    failed = workers.load_word(box.words, workers.FAILED) != 0
    return failed or workers.load_word(box.status.view(1, 1), 0) != 0


# ---- CPU ---------------------------------------------------------------------------------------


def _read_pages_cpu(
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
    where = (layer, first_page, num_experts, low, high)
    _admit_cpu(topk_ids, *where, frames.residency, frames.reads, page_to_slot)
    count = int(frames.reads.count)
    if not count:
        return
    pages, targets = frames.reads.pages[:count].long(), frames.reads.slots[:count].long()
    frames.addresses[pages] = frames.base + targets * frames.frame_bytes
    if int(frames.failed):
        return
    box.pages[:count], box.frames[:count] = pages, targets
    box.words[workers.HEADER, 0] = count
    # The number first: cut off here, a post that nobody saw is one too many, not one twice.
    frames.number.add_(1)
    began = time.perf_counter_ns()
    workers.store_word(box.words, workers.POSTED, int(frames.number))
    answered = workers.wait_for_answer(box.words, int(frames.number), seconds)
    frames.waited_ns[layer] += time.perf_counter_ns() - began
    if not answered:
        workers.store_word(box.words, workers.FAILED, 1)
    if has_failed(box):
        frames.failed.fill_(1)
