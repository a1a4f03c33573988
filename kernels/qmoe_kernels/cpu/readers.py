"""Threads without Python that read pages from files into frames, whenever a mailbox asks.

`read_loops` says how they read, `worker_loops` how they agree. `qmoe_kernels.reading` posts to
them, from the host or from a GPU.
"""

from __future__ import annotations

import os
import sys
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qmoe_kernels.cpu import native, workers

# So many reads at a time keep an NVMe drive busy, or copy from the system's cache of files as
# quickly as memory does.
MOST_THREADS = 16
# A part of a page, so that few pages are enough for all threads.
PART_BYTES = 1 << 20
# Who assists waits for a bell that is always rung.
ASSISTANTS_SPIN_NS, ASSISTANTS_POLL_NS = 50_000, 900_000_000

# What a status says; see `read_loops`, whose numbers these are. Smaller ones are the system's.
ENDED, CHANGED, CANCELLED = 4001, 4002, 4003
FILE_BIT = 12


@dataclass(frozen=True)
class FileState:
    """A file, and what it was when its header was read: bytes, and nanoseconds of its last change.

    What has another size or time is not read.
    """

    path: Path
    size: int
    modified: int


@dataclass(frozen=True)
class PageTable:
    """Where each page lies in files.

    Attributes:
        first: (num_pages + 1,) int64: a page's parts are rows first[page] to first[page + 1].
        parts: (num_parts, 4) int64: file, offset in it, offset in the page, bytes.
        files: of the model, in the order of their numbers.
    """

    first: Tensor
    parts: Tensor
    files: tuple[FileState, ...]

    @classmethod
    def of(
        cls, pages: Sequence[Sequence[tuple[int, int, int, int]]], files: Sequence[FileState]
    ) -> PageTable:
        """Make it from rows as in ``parts``, of any size, page by page."""
        counts, rows = [0], []
        for pieces in pages:
            for file, file_offset, offset, nbytes in pieces:
                for start in range(0, nbytes, PART_BYTES):
                    size = min(PART_BYTES, nbytes - start)
                    rows.append((file, file_offset + start, offset + start, size))
            counts.append(len(rows))
        return cls(torch.tensor(counts), torch.tensor(rows).view(-1, 4), tuple(files))


def unavailable() -> str | None:
    """Why this machine cannot read pages while it decodes; None if it can."""
    if not sys.platform.startswith("linux"):
        return f"it needs Linux, and this is {sys.platform}"
    if native.address_of("read") is None or native.address_of("lead") is None:
        return "it needs the native loops, which are missing here (is numba installed?)"
    return None


class Readers(workers.Team):
    """The threads that read, and the files that they have open for as long as they run."""

    def __init__(
        self,
        table: PageTable,
        frames: Tensor,  # (num_frames, frame_bytes) uint8
        words: Tensor,  # (workers.NUM_WORDS, workers.WORD_STRIDE) int64, zeros
        status: Tensor,  # (1,) int64, 0
        pages: Tensor,  # (capacity,) int64
        targets: Tensor,  # (capacity,) int64
        num_threads: int | None = None,
    ) -> None:
        """Open the files and make the threads.

        Args:
            table: where pages are.
            frames: where they go.
            words, status, pages, targets: the mailbox's memory: which pages, and to which frames.
            num_threads: how many; None: four for each processor, at most `MOST_THREADS`.

        Raises:
            OSError: a file cannot be opened; its name is in the error.
        """
        if num_threads is None:
            num_threads = min(MOST_THREADS, 4 * (os.cpu_count() or 4))
        self._status = status
        files = _Open(table.files)
        claimed = torch.zeros(1, dtype=torch.int64)
        most = int(table.first.diff().max())
        arguments = [claimed, status, None, pages, targets, table.first, table.parts, most]
        arguments += [files.rows, frames, frames.stride(0)]
        job = array("q", [a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments])
        super().__init__(
            words,
            [native.address_of("read") or 0, job.buffer_info()[0], 0, 0, len(pages)],
            num_threads,
            (table, frames, status, pages, targets, files, claimed, job),
            spin_ns=(workers.SPIN_NS, ASSISTANTS_SPIN_NS),
            poll_ns=(workers.POLL_NS, ASSISTANTS_POLL_NS),
            name="qmoe-reader",
        )

    def close(self) -> bool:
        """End the threads, which leave what they have not begun, and close the files."""
        self.told.append(True)  # an interrupt leaves none that are cancelled, and still asked
        self.cancel()
        return super().close()

    def cancel(self) -> None:
        """Have the threads leave what they have not begun."""
        if workers.load_word(self._status.view(1, 1), 0) == 0:
            workers.store_word(self._status.view(1, 1), 0, CANCELLED)


class _Open:
    """Open files, closed when nobody uses this any more.

    Attributes:
        rows: (num_files, 4) int64: descriptor, size, seconds and nanoseconds of the last change.
    """

    def __init__(self, files: Sequence[FileState]) -> None:
        descriptors: list[int] = []
        weakref.finalize(self, _close, descriptors)
        for file in files:
            descriptors.append(os.open(file.path, os.O_RDONLY | os.O_CLOEXEC))
        rows = [
            (descriptor, file.size, *divmod(file.modified, 1_000_000_000))
            for descriptor, file in zip(descriptors, files, strict=True)
        ]
        self.rows = torch.tensor(rows).view(-1, 4)


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
