"""The reads of one cache whose host memory is bounded: frames, threads, and what may go wrong.

`qmoe_kernels.reading` is the protocol on the device, `qmoe_kernels.cpu.readers` the threads. Here
is who owns both: the cache, for as long as it is open.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from qmoe.checkpoints.files import CheckpointError
from qmoe.paging.frame_store import FrameStore
from qmoe_kernels.cpu import readers, workers
from qmoe_kernels.reading import READ_SECONDS, Frames, ReadBox, has_failed, read_pages


class HostReads:
    """What brings pages from files into frames, for one expert cache.

    Used under the cache's lock. Files are opened and threads started with the first call, again in
    a forked child, and again after an error; `stop` ends them.

    Attributes:
        frames: the device's tables.
        num_frames: pages that host memory holds.
    """

    def __init__(
        self, store: FrameStore, device: torch.device, *, seconds: float = READ_SECONDS
    ) -> None:
        """Take the mailbox's memory; nothing is read yet.

        Args:
            store: host memory and files.
            device: of the cache.
            seconds: how long the pages of one layer may take.
        """
        self._store, self._device, self._seconds = store, device, seconds
        most = max(layer.num_experts for layer in store.layers)
        sizes = (store.num_pages, len(store.layers), most)
        self.frames = Frames.empty(*sizes, store.frames, device)
        self.num_frames = len(store.frames)
        self._box = ReadBox.empty(most, device)
        self._readers: readers.Readers | None = None
        self._pid = os.getpid()
        self._told = False  # somebody was told of a failure that has not ended
        self._lost = False  # a thread that did not end may write into frames at any time

    def begin(self) -> None:
        """Before something is posted: files are open, threads are awake, and nothing has failed.

        Raises:
            CheckpointError: see `check`; or a file is gone, or another one.
        """
        self.check()
        if self._readers is None or not self._readers.alive:
            self._start()
        assert self._readers is not None
        self._readers.ring()

    def _start(self) -> None:
        """Open the files and start threads, on a mailbox in which nothing is under way."""
        self.stop()
        if self._lost:
            raise CheckpointError(
                "a read of this model's files has not ended, and its memory cannot be used again; "
                "load the model again"
            )
        self._pid, box, store = os.getpid(), self._box, self._store
        store.check_files()
        posted = workers.load_word(box.words, workers.POSTED)
        for word in (workers.STOP, workers.TEAM, workers.SLEEPERS):
            workers.store_word(box.words, word, 0)
        workers.store_word(box.words, workers.ANSWERED, posted)
        box.status.zero_()
        try:
            self._readers = readers.Readers(
                store.table, store.frames, box.words, box.status, box.pages, box.frames
            )
        except OSError as error:
            raise CheckpointError(
                f"{error.filename}: cannot be read ({error.strerror}); experts that are not in "
                "host memory come from there"
            ) from None
        self._readers.start()

    def read(
        self,
        layer: int,
        topk_ids: Tensor,
        page_to_slot: Tensor,
        experts: tuple[int, int] | None = None,
    ) -> None:
        """Bring what a layer needs into frames; see `qmoe_kernels.reading.read_pages`.

        Outside of a capture it waits for the device: what follows is not computed with what is not
        valid. Who replays a graph calls `check` before results are given out.

        Raises:
            CheckpointError: see `check`.
        """
        capturing = topk_ids.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing:
            self.begin()
        geometry, first = self._store.layers[layer], self._store.first_page[layer]
        where = (layer, first, geometry.num_experts, page_to_slot)
        read_pages(topk_ids, *where, self.frames, self._box, experts=experts, seconds=self._seconds)
        if capturing:
            return
        if topk_ids.is_cuda:
            done = torch.cuda.Event(blocking=True)
            done.record()
            done.synchronize()
        self.check()

    def page(self, page: int) -> Tensor:
        """(frame_bytes,) uint8: the frame of a page that is in one, on the CPU."""
        return self._store.frames[int(self.frames.residency.page_to_slot[page])]

    def check(self) -> None:
        """Raise if a page could not be read. Does not wait for the device.

        Raises:
            CheckpointError: it could not; what was computed since is not valid, and neither is what
                slots hold. Later calls read again.
        """
        if self._readers is not None and self._readers.told:
            self.stop()  # an interrupt cut that off
        if self._readers is None and int(self._box.status) == readers.CANCELLED:
            self._box.status.zero_()  # they were told to end, and nobody wants what is left
        if not has_failed(self._box):
            return
        error, told = self._error(), self._told
        self._told = not self._recover()
        if self._told or not told:
            raise CheckpointError(error)

    def _error(self) -> str:
        box, files = self._box, self._store.table.files
        number, code = divmod(int(box.status), 1 << readers.FILE_BIT)
        if code in (0, readers.CANCELLED):  # nobody said why, but the pages did not come
            count = int(box.words[workers.HEADER, 0])
            names = sorted({str(f) for p in box.pages[:count].tolist() for f in self._files_of(p)})
            return (
                f"{', '.join(names)}: did not give its experts within {self._seconds:g} s; the "
                "next call reads again"
            )
        file = files[number].path
        if code == readers.ENDED:
            return f"{file}: ends in the middle of an expert; it was truncated, put it back"
        if code == readers.CHANGED:
            return f"{file}: changed since the model was loaded; put it back or load it again"
        return f"{file}: cannot be read ({os.strerror(code)}); the next call reads again"

    def _files_of(self, page: int) -> list[object]:
        table = self._store.table
        rows = table.parts[int(table.first[page]) : int(table.first[page + 1]), 0]
        return [table.files[file].path for file in rows.tolist()]

    def _recover(self) -> bool:
        """Make the mailbox and the frames as new, unless a thread is still reading into them."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._readers is not None:
            self._readers.cancel()
            if not self._ended(workers.JOIN_SECONDS):
                return False  # it has failed until then, for the device too
            self.stop()
        self.frames.residency.clear()
        workers.store_word(self._box.words, workers.FAILED, 0)
        self._box.status.zero_()
        self.frames.failed.zero_()
        return True

    def _ended(self, seconds: float) -> bool:
        """Whether nothing is under way, or no more so after a while."""
        if self._readers is None or not self._readers.alive:
            return True
        posted = workers.load_word(self._box.words, workers.POSTED)
        return workers.wait_for_answer(self._box.words, posted, seconds)

    def forget(self) -> None:
        """Empty the frames, after a step that was cut off.

        Raises:
            CheckpointError: what was posted does not come.
        """
        if self._pid == os.getpid() and not self._ended(self._seconds):
            workers.store_word(self._box.words, workers.FAILED, 1)
        self.check()
        self.frames.residency.clear()

    def stop(self) -> None:
        """End the threads and close the files; the next call opens them again."""
        if self._readers is None:
            return
        ended = self._readers.close()  # cut off here, they are told again the next time
        self._readers = None
        if not ended:
            self._lost = True

    def read_counters(self) -> list[list[int]]:
        """Of each layer, pages that were read, and nanoseconds waited for them."""
        counts = self.frames.residency.counters[:, 1].tolist()
        waited = self.frames.waited_ns.tolist()
        return [list(pair) for pair in zip(counts, waited, strict=True)]
