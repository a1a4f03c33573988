"""Host memory for a part of a model's pages; the others stay in files until they are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from qmoe.checkpoints.files import CheckpointError, FileVersion
from qmoe.experts.pages import LayerPages
from qmoe.paging.host_store import HostStore, PageRead
from qmoe.sizes import format_size
from qmoe_kernels.cpu.readers import FileState, PageTable, unavailable

# Pages of each of the two landing buffers, where the bound leaves room for so many.
MOST_LANDING = 32
# They take at most so much of the bound, in parts of it.
LANDING_SHARE = 8


class FrameStore:
    """Frames of host memory, in which pages come and go, and where each page lies in files.

    A frame is a page's place in host memory, as a slot is on the device; `HostReads` decides what
    is in them. What is copied past the slots (long prompts, another number of slots, a model that
    becomes resident) does not go through frames, but through two landing buffers beside them.

    Attributes:
        layers, first_page: as of a :class:`HostStore`.
        num_bytes: host memory taken, which is at most the bound.
        frames: (num_frames, frame_bytes) uint8.
        table: where pages lie.
    """

    def __init__(
        self,
        layers: Sequence[LayerPages],
        reads: Sequence[PageRead],
        bound: int,
        least: int,
        *,
        pin: bool,
        progress: bool = False,
    ) -> None:
        """Take the memory; no page is read.

        Args:
            layers: in the order in which the model runs them.
            reads: the pieces of all pages.
            bound: bytes of host memory.
            least: pages that one layer needs at a time.
            pin: see :class:`HostStore`.
            progress: draw a progress bar of that if stderr is a terminal.

        Raises:
            ValueError: the bound is too small, with the smallest that works; this machine cannot
                read pages while it decodes; or see :class:`HostStore`.
        """
        self.layers = tuple(layers)
        frame_bytes = max(layer.page_stride for layer in layers)
        if (reason := unavailable()) is not None:
            raise ValueError(f"host_memory cannot bound the experts' pages: {reason}")
        places = bound // frame_bytes
        num_landing = max(1, min(MOST_LANDING, places // (2 * LANDING_SHARE)))
        num_frames = places - 2 * num_landing
        if num_frames < least:
            smallest = (least + 2) * frame_bytes
            raise ValueError(
                f"host_memory={bound} is too small; the smallest that works is {smallest} bytes "
                f"({format_size(smallest)}): {least} experts that one layer needs at a time and 2 "
                "for those that are copied past them"
            )
        first_page = accumulate((layer.num_experts for layer in layers), initial=0)
        *self.first_page, self.num_pages = first_page
        self._num_landing = num_landing
        self._reads: list[list[PageRead]] = [[] for _ in range(self.num_pages)]
        for read in reads:
            self._reads[self.first_page[read.layer] + read.expert].append(read)
        self._versions = {read.file: read.version or FileVersion.of(read.file) for read in reads}
        self.table = _table(self._reads, self._versions)
        places_like = LayerPages("frames", places, torch.uint8, (1, frame_bytes), (0, 0))
        self._memory = HostStore([places_like], pin=pin, progress=progress)
        self.num_bytes = self._memory.num_bytes
        self.frames = self._memory.pages(0)[:num_frames]
        self._half = 0
        self._copied: list[Any] = [None, None]  # of each landing buffer, the event of its copies

    def pieces(self, layer: int, start: int, end: int) -> Iterator[torch.Tensor]:
        """Read the pages of experts ``start`` to ``end``, some at a time: (n, page_stride) uint8.

        Copies of a piece are queued on the current stream before the next one is asked for; its
        memory is overwritten once they have ended.

        Raises:
            CheckpointError: see :meth:`HostStore.fill`.
        """
        memory, frames = self._memory.pages(0), len(self.frames)
        for low in range(start, end, self._num_landing):
            high = min(low + self._num_landing, end)
            half, self._half = self._half, 1 - self._half
            place = frames + half * self._num_landing
            if self._copied[half] is not None:
                self._copied[half].synchronize()
            self._memory.fill(list(self._landing(layer, low, high, place)), few=True)
            try:
                yield memory[place : place + high - low, : self.layers[layer].page_stride]
            finally:
                if torch.cuda.is_initialized():
                    self._copied[half] = torch.cuda.Event(blocking=True)
                    self._copied[half].record()

    def _landing(self, layer: int, low: int, high: int, place: int) -> Iterator[PageRead]:
        for expert in range(low, high):
            for read in self._reads[self.first_page[layer] + expert]:
                yield replace(read, layer=0, expert=place + expert - low)

    def weights(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up and down of one layer, (num_experts, rows, columns) each: read anew.

        Beside the bound, the pages of this layer are in memory for as long as they are used.

        Raises:
            CheckpointError: see :meth:`HostStore.fill`.
        """
        geometry = self.layers[layer]
        memory = torch.empty(geometry.num_experts, geometry.page_stride, dtype=torch.uint8)
        done = 0
        for piece in self.pieces(layer, 0, geometry.num_experts):
            memory[done : done + len(piece)] = piece
            done += len(piece)
        return geometry.views(memory)

    def check_files(self) -> None:
        """Refuse files that are not what they were when the model was loaded.

        Raises:
            CheckpointError: one is another by now, or is gone.
        """
        for file, version in self._versions.items():
            try:
                version.check(file)
            except (CheckpointError, OSError):
                raise CheckpointError(
                    f"{file}: is not there any more as it was when the model was loaded; put it "
                    "back, or load the model again"
                ) from None

    def close(self) -> None:
        """Unpin and free the memory. Nobody reads into frames any more."""
        self._memory.close()


def _table(reads: Sequence[Sequence[PageRead]], versions: Mapping[Path, FileVersion]) -> PageTable:
    """Where pages lie, for the threads that read them."""
    numbers = {file: number for number, file in enumerate(versions)}
    files = [FileState(file, v.size, v.modified) for file, v in versions.items()]
    pages = [
        [(numbers[read.file], read.file_offset, read.offset, read.nbytes) for read in page]
        for page in reads
    ]
    return PageTable.of(pages, files)
