"""Every page of a model in host memory, pinned so that the GPU can read it, filled from files."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch

from qmoe.checkpoints.files import CheckpointError, FileVersion
from qmoe.experts.pages import LayerPages
from qmoe.progress import progress as progress_bar
from qmoe.sizes import format_size

T = TypeVar("T")

# The RAM that may be taken, in GiB, where the system's own figure is wrong: a virtual machine that
# is given its memory as it asks for it shows little of it as available.
AVAILABLE_VARIABLE = "QMOE_HOST_MEMORY_GIB"

# Enough to keep an NVMe drive busy, or to copy from the page cache at the speed of memory.
_NUM_THREADS = min(16, 2 * (os.cpu_count() or 4))
# A thread opens a file for so many bytes of reads that lie one behind the other.
_BATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class PageRead:
    """One contiguous piece of a page, and where a file holds it. Offsets and sizes in bytes.

    Attributes:
        layer: index into the store's layers.
        expert: whose page.
        offset: of the piece within the page.
        file: a safetensors shard.
        file_offset: of the piece, from the start of the file.
        nbytes: of the piece.
        version: that the file had when its header was read; None: whatever is there now.
    """

    layer: int
    expert: int
    offset: int
    file: Path
    file_offset: int
    nbytes: int
    version: FileVersion | None = None


class HostStore:
    """All pages of a model, one anonymous mapping per layer, in page order.

    Pages are read-only once they are filled: evicting one from a slot only forgets it.

    Attributes:
        layers: the geometry of each layer's pages.
        num_bytes: host memory taken.
        first_page: page id of a layer's expert 0; that of (layer, expert) is
            ``first_page[layer] + expert``.
        addresses: (num_pages,) int64 on the CPU; where each page starts, for the GPU as well as for
            the CPU if the store is pinned.
    """

    def __init__(self, layers: Sequence[LayerPages], *, pin: bool, progress: bool = False) -> None:
        """Take the memory for the pages of ``layers``; what they hold is undefined.

        Args:
            layers: in the order in which the model runs them.
            pin: register the memory with the current CUDA device, for every device to read.
            progress: draw a progress bar of that if stderr is a terminal.

        Raises:
            ValueError: more memory than the machine has available (then nothing was allocated), or
                more than CUDA can pin (then all is released).
        """
        self.layers = tuple(layers)
        sizes = [layer.num_experts * layer.page_stride for layer in self.layers]
        self.num_bytes = sum(sizes)
        available = available_bytes()
        if available is not None and self.num_bytes > available:
            raise ValueError(
                f"the experts' pages take {format_size(self.num_bytes)} of host memory, "
                f"{format_size(available)} are available; free some, or set {AVAILABLE_VARIABLE} "
                "if the machine has more than it shows"
            )
        *first_page, self._num_pages = accumulate((x.num_experts for x in self.layers), initial=0)
        self.first_page = tuple(first_page)
        self._maps: list[mmap.mmap] = []
        self._pinned: list[int] = []
        # Holds the mappings: they must outlive their registration.
        finalizer = weakref.finalize(self, _release, self._maps, self._pinned)
        finalizer.atexit = False  # the system takes everything back faster than we could
        try:
            for nbytes in sizes:
                self._maps.append(_allocate(nbytes))
            pages = [self.pages(layer) for layer in range(len(self.layers))]
            if pin:
                _pin([layer.view(-1) for layer in pages], self._pinned, progress)
            self.addresses = torch.cat(
                [layer.data_ptr() + torch.arange(len(layer)) * layer.stride(0) for layer in pages]
            )
        except BaseException:
            self.close()
            raise

    def pages(self, layer: int) -> torch.Tensor:
        """(num_experts, page_stride) uint8: the memory of one layer's pages.

        Raises:
            ValueError: the store is closed.
        """
        if not self._maps:
            raise ValueError("this host store is closed; its pages are gone")
        geometry = self.layers[layer]
        memory = torch.frombuffer(self._maps[layer], dtype=torch.uint8)
        memory = memory[: geometry.num_experts * geometry.page_stride]
        return memory.view(geometry.num_experts, geometry.page_stride)

    def pieces(self, layer: int, start: int, end: int) -> Iterator[torch.Tensor]:
        """One piece, the pages of experts ``start`` to ``end``: (n, page_stride) uint8."""
        yield self.pages(layer)[start:end]

    def weights(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up and down of one layer, (num_experts, rows, columns) each: views of its pages."""
        return self.layers[layer].views(self.pages(layer))

    def fill(self, reads: Sequence[PageRead], *, progress: bool = False, few: bool = False) -> None:
        """Read pieces of files straight into pages, with several threads.

        Args:
            reads: in any order.
            progress: draw a progress bar if stderr is a terminal.
            few: they are, so that each thread is to take its part of them.

        Raises:
            CheckpointError: a file is gone, was replaced, ends too early or cannot be read; the
                pages are then undefined.
        """
        num_bytes = sum(read.nbytes for read in reads)
        most = num_bytes // _NUM_THREADS if few else _BATCH_BYTES
        _in_threads(self._read, _batches(reads, most), "Loading experts", num_bytes, progress)

    def _read(self, batch: Sequence[PageRead]) -> int:
        file, version = batch[0].file, batch[0].version
        try:
            with file.open("rb", buffering=0) as stream:
                if version is not None:
                    version.check(file, stream.fileno())
                for read in batch:
                    stream.seek(read.file_offset)
                    target = self._target(read)
                    while target:
                        count = stream.readinto(target)
                        if not count:
                            raise CheckpointError(
                                f"{file}: ends at byte {stream.tell()}, in the middle of an "
                                "expert; it was truncated while it was read, download it again"
                            )
                        target = target[count:]
        except FileNotFoundError:
            raise CheckpointError(
                f"{file}: vanished while it was read; download it again"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
        return sum(read.nbytes for read in batch)

    def _target(self, read: PageRead) -> memoryview:
        layer = self.layers[read.layer]
        assert 0 <= read.expert < layer.num_experts
        assert 0 <= read.offset <= read.offset + read.nbytes <= layer.page_bytes
        start = read.expert * layer.page_stride + read.offset
        return memoryview(self._maps[read.layer])[start : start + read.nbytes]

    def empty(self, layer: int) -> None:
        """Give the memory of a layer that is not pinned back; its pages are undefined then."""
        if not self._pinned and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[layer].madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unpin and free the pages; what :meth:`pages` gave out stays readable until dropped."""
        _release(self._maps, self._pinned)


def available_bytes() -> int | None:
    """Host memory that can still be taken: by the system's figures and the control groups' limits.

    The environment variable ``QMOE_HOST_MEMORY_GIB`` overrides them.

    Returns:
        None where the system does not tell.

    Raises:
        ValueError: the variable is no number.
    """
    override = os.environ.get(AVAILABLE_VARIABLE)
    if override:
        try:
            return int(float(override) * (1 << 30))
        except (ValueError, OverflowError):
            raise ValueError(f"{AVAILABLE_VARIABLE}={override!r}: not a number of GiB") from None
    bounds = list(_available_in_control_groups())
    with suppress(OSError, KeyError):
        bounds.append(_numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024)
    return max(0, min(bounds)) if bounds else None


def _available_in_control_groups() -> Iterator[int]:
    with suppress(OSError, IndexError):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        (path,) = [line[3:] for line in lines if line.startswith("0::")] or [""]
        root = Path("/sys/fs/cgroup")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            with suppress(OSError, ValueError, KeyError):  # no limit reads "max"
                limit = int((folder / "memory.max").read_text(encoding="utf-8"))
                used = int((folder / "memory.current").read_text(encoding="utf-8"))
                cached = _numbers(folder / "memory.stat")
                yield limit - used + cached["inactive_file"] + cached["active_file"]


def _numbers(file: Path) -> dict[str, int]:
    """``name number ...`` lines, as the kernel writes them."""
    rows = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _allocate(nbytes: int) -> mmap.mmap:
    flags = {}
    if hasattr(mmap, "MAP_PRIVATE"):  # shared mappings, the default, get no huge pages
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    try:
        memory = mmap.mmap(-1, max(nbytes, 1), **flags)
    except OSError as error:
        raise ValueError(
            f"the system refuses {format_size(nbytes)} of host memory ({error.strerror})"
        ) from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # fewer pages to fault in and to pin, where the system has them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _pin(layers: Sequence[torch.Tensor], pinned: list[int], progress: bool) -> None:
    """Register flat memory with CUDA; the addresses go to ``pinned`` one by one."""
    device = torch.cuda.current_device()
    num_bytes = sum(memory.nbytes for memory in layers)

    def pin(memory: torch.Tensor) -> int:
        # Faulted in here, by many threads, rather than by CUDA under its lock; in parts for which
        # torch starts no threads of its own.
        for part in memory.split(_BATCH_BYTES):
            part[:: mmap.PAGESIZE] = 0
        error = _register(memory.data_ptr(), memory.nbytes, device)
        if error:
            raise ValueError(
                f"CUDA cannot pin {format_size(num_bytes)} of host memory for the experts' pages: "
                f"{error} after {len(pinned)} of {len(layers)} layers; free some, or use a machine "
                "or container that allows more"
            )
        pinned.append(memory.data_ptr())
        return int(memory.nbytes)

    _in_threads(pin, layers, "Pinning host memory", num_bytes, progress)


def _in_threads(
    function: Callable[[T], int], items: Iterable[T], title: str, num_bytes: int, progress: bool
) -> None:
    """Call a function that returns how many bytes it has dealt with; the first error ends it."""
    pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="qmoe-host-store")
    with progress_bar(title, num_bytes, unit="bytes", show=progress) as bar:
        try:
            for done in as_completed([pool.submit(function, item) for item in items]):
                bar.advance(done.result())
        finally:
            # After an error or Ctrl-C too: when this returns, nobody writes into pages any more.
            pool.shutdown(cancel_futures=True)


def _register(address: int, nbytes: int, device: int) -> str | None:
    """Pin memory that lies at ``address``; CUDA's words if that fails.

    torch's own ``pin_memory`` would copy, and round the size up to a power of two.
    """
    portable_and_mapped = 1 | 2
    with torch.cuda.device(device):
        cudart = torch.cuda.cudart()
        code = cudart.cudaHostRegister(address, nbytes, portable_and_mapped)
        if int(code) == 0:
            return None
        # CUDA keeps the error for whoever asks next: that must not be some innocent kernel.
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        return str(cudart.cudaGetErrorString(code))


def _release(maps: list[mmap.mmap], pinned: list[int]) -> None:
    if pinned:
        torch.cuda.synchronize()  # a copy in flight still reads
    while pinned:  # one by one: an interrupt leaves the others for another call
        torch.cuda.cudart().cudaHostUnregister(pinned[-1])
        pinned.pop()
    maps.clear()


def _batches(reads: Sequence[PageRead], most: int) -> Iterator[list[PageRead]]:
    """Group reads that follow one another in a file, for one thread each, from so many bytes on."""
    batch: list[PageRead] = []
    nbytes = 0
    for read in sorted(reads, key=lambda read: (str(read.file), read.file_offset)):
        if batch and (read.file != batch[0].file or nbytes >= most):
            yield batch
            batch, nbytes = [], 0
        batch.append(read)
        nbytes += read.nbytes
    if batch:
        yield batch
