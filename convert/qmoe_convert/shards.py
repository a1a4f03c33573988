"""safetensors on disk: positioned reads, and shards written front to back.

Files are read with ``pread`` rather than mapped: mapped pages count towards resident memory, and
this package promises a bound on it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmoe.checkpoints.files import TORCH_DTYPES, CheckpointError, FileVersion, StoredTensor

PARTIAL_SUFFIX = ".partial"

# One read or write call: small enough to stay in the cache until it is hashed.
CHUNK = 1 << 22
# What is written before the disk is told to take it.
WRITEBACK_BYTES = 64 << 20
# What may be written and not hashed yet.
UNHASHED_BYTES = 32 << 20
# Reads and writes past the system's cache begin and end at multiples of it, in memory too.
DIRECT_BYTES = 4096
# torch aligns its own allocations so.
ALIGNMENT = 64


class Reader:
    """Reads tensors into memory that each thread uses again and again.

    What `read` returns is valid until the same thread calls `reserve`.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = tensors
        self._local = threading.local()

    def reserve(self, nbytes: int, memory: torch.Tensor | None = None) -> None:
        """Forget this thread's tensors and make room for ``nbytes`` bytes of new ones.

        They go to ``memory``, uint8, if given: whoever gave it keeps what is read.
        """
        if memory is None:
            memory = getattr(self._local, "own", None)
            if memory is None or memory.numel() < nbytes:
                memory = self._local.own = _memory(nbytes)
        self._local.memory, self._local.used = memory, 0

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Read a tensor, or a run of rows along its first dimension."""
        tensor = self.tensors[name]
        shape, start, stop = tensor.shape, 0, tensor.nbytes
        if rows is not None:
            row_bytes = tensor.nbytes // shape[0]
            shape = (rows.stop - rows.start, *shape[1:])
            start, stop = rows.start * row_bytes, rows.stop * row_bytes
        return self.read_bytes(name, start, stop).view(tensor.torch_dtype).view(shape)

    def read_bytes(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read bytes ``start`` to ``stop`` (excluded) of a tensor, as uint8."""
        memory: torch.Tensor | None = getattr(self._local, "memory", None)
        first: int = getattr(self._local, "used", 0)
        if memory is None or first + stop - start > memory.numel():
            buffer = torch.empty(stop - start, dtype=torch.uint8)
        else:
            buffer = memory[first : first + stop - start]
            self._local.used = first + -(-(stop - start) // ALIGNMENT) * ALIGNMENT
        tensor = self.tensors[name]
        read_into(tensor.file, tensor.offset + start, buffer, tensor.version)
        return buffer


class BufferPool:
    """Byte buffers that are used again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[torch.Tensor] = []
        self.nbytes = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """A buffer of at least ``nbytes`` bytes, uint8."""
        with self._lock:
            for i, buffer in enumerate(self._free):
                if buffer.numel() >= nbytes:
                    return self._free.pop(i)
            self.nbytes += nbytes
            # One that is too small makes room for the new one.
            if self._free:
                self.nbytes -= self._free.pop().numel()
        return _memory(nbytes)

    def give(self, buffer: torch.Tensor) -> None:
        """Return a buffer whose contents are no longer needed."""
        with self._lock:
            self._free.append(buffer)


def _memory(nbytes: int) -> torch.Tensor:
    """Fresh memory, uint8, that goes back to the system with its last use.

    Not the heap's: pieces of other sizes, freed out of order by other threads, leave holes in it.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, max(1, nbytes), flags), dtype=torch.uint8)


def read_into(
    file: Path, offset: int, buffer: torch.Tensor, version: FileVersion | None = None
) -> None:
    """Fill ``buffer``, uint8, with the bytes of ``file`` from ``offset``.

    Raises:
        CheckpointError: the file ends early, or is not of that ``version``.
    """
    view = memoryview(buffer.numpy())
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if version is not None:
            version.check(file, descriptor)
        _fill(view, file, descriptor, offset, len(view))
    finally:
        os.close(descriptor)


def read_past_cache(file: Path, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
    """Bytes ``start`` to ``stop`` of ``file``, in ``buffer``: from the disk, where there is a way.

    What the system has in its cache need not be what the disk has.

    Args:
        buffer: uint8, of `_memory`, longer by two of `DIRECT_BYTES`.

    Raises:
        CheckpointError: the file ends early.
    """
    first = start // DIRECT_BYTES * DIRECT_BYTES
    whole = memoryview(buffer.numpy())[: -(-(stop - first) // DIRECT_BYTES) * DIRECT_BYTES]
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        try:
            _fill(whole, file, descriptor, first, stop - first)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        read_into(file, start, buffer[: stop - start])  # the file system knows no such reads
        return buffer[: stop - start]
    return buffer[start - first : stop - first]


def _fill(view: memoryview, file: Path, descriptor: int, offset: int, least: int) -> None:
    """Read from ``offset`` on until ``view`` holds at least so many bytes."""
    done = 0
    while done < least:
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:  # which does not name the file by itself
            raise OSError(error.errno, error.strerror, str(file)) from None
        if count == 0:
            raise CheckpointError(f"{file}: ends early; it changed while it was read")
        done += count


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor that a shard will hold; ``dtype`` is safetensors' name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def itemsize(self) -> int:
        """Bytes of an element; 0 for dtypes that torch does not know, which need no alignment."""
        return TORCH_DTYPES[self.dtype].itemsize if self.dtype in TORCH_DTYPES else 0


def header_bytes(tensors: Iterable[PlannedTensor]) -> bytes:
    """The header of a shard whose data are ``tensors``, one after the other.

    Readers map the file and view its bytes, which needs each tensor aligned to its item size. Data
    may start with one-byte items, then come wider ones, the widest first: spaces at the header's
    end bring the first of those to a multiple of 8 in the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, narrow_bytes = 0, None
    for tensor in tensors:
        if narrow_bytes is None and tensor.itemsize > 1:
            narrow_bytes = offset
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text) + (narrow_bytes or 0)) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Writes one file front to back, while a thread of its own hashes what is written.

    It is called ``<name>.partial`` until `finish`, so a name without the suffix is a whole file.
    What is written must not change until it is hashed too: see `after`.
    """

    def __init__(self, file: Path, size: int) -> None:
        self.file = file
        self.partial = file.with_name(file.name + PARTIAL_SUFFIX)
        self.sha256 = hashlib.sha256()
        self.written = 0
        self.size = size
        self._advised = 0
        # The disk takes bytes in fits and starts, the processor does not: one is ahead of the other
        # now and then.
        self._hasher = ThreadPoolExecutor(1, "qmoe-convert-sha256")
        self._unhashed: deque[tuple[int, Future[None]]] = deque()
        self._unhashed_bytes = 0
        # Past the system's cache, where there is a way: to fill that takes the processor longer
        # than quantizing, and drops the source from it, which is still to be read.
        self._staging = memoryview(_memory(CHUNK).numpy())
        self._staged = 0
        self._descriptor, self._direct = _open_direct(self.partial)

    def write(self, data: torch.Tensor | bytes) -> None:
        """Append a contiguous tensor's bytes."""
        if isinstance(data, torch.Tensor):
            flat = data.contiguous().view(-1)
            view = memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
        else:
            view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            self._hash(view[start : start + CHUNK])
        self.written += len(view)
        while view:
            count = min(len(view), CHUNK - self._staged)
            self._staging[self._staged : self._staged + count] = view[:count]
            self._staged += count
            view = view[count:]
            if self._staged == CHUNK:
                self._write_staged()

    def _write_staged(self) -> None:
        chunk = self._staging[: self._staged]
        while chunk:
            try:
                chunk = chunk[os.write(self._descriptor, chunk) :]
            except OSError as error:
                # A file system that knows no such writes, or a rest that is no whole block.
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._use_cache()
        self._staged = 0
        if not self._direct:
            self._start_writeback()

    def _use_cache(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = False

    def after(self, function: Callable[[], None]) -> None:
        """Call ``function``, in another thread, once all that was written is hashed too."""
        self._hasher.submit(function)

    def _hash(self, chunk: memoryview) -> None:
        self._unhashed.append((len(chunk), self._hasher.submit(self.sha256.update, chunk)))
        self._unhashed_bytes += len(chunk)
        while self._unhashed_bytes > UNHASHED_BYTES:
            nbytes, future = self._unhashed.popleft()
            future.result()
            self._unhashed_bytes -= nbytes

    def _start_writeback(self) -> None:
        # So that the disk works meanwhile and not when `finish` asks for everything at once. On
        # Linux this advice starts writing and waits for nothing.
        count = self.written - self._advised
        if hasattr(os, "posix_fadvise") and count >= WRITEBACK_BYTES:
            os.posix_fadvise(self._descriptor, self._advised, count, os.POSIX_FADV_DONTNEED)
            self._advised = self.written

    def finish(self) -> str:
        """Make the file durable, give it its name, and return its SHA-256."""
        assert self.written == self.size, f"{self.file}: {self.written} of {self.size} bytes"
        if self._direct:
            self._use_cache()  # for the end of a file, which is no whole block
        self._write_staged()
        os.fsync(self._descriptor)
        self._close()
        self._hasher.shutdown()
        os.rename(self.partial, self.file)
        return self.sha256.hexdigest()

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close the file; one that is not whole keeps its partial name."""
        self._close()
        self._hasher.shutdown(cancel_futures=True)
        if isinstance(error, OSError) and error.filename is None:  # a failed write names none
            error.filename = str(self.partial)


def _open_direct(file: Path) -> tuple[int, bool]:
    """A descriptor to write a new file to, and whether it goes past the system's cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    if hasattr(os, "O_DIRECT"):
        with suppress(OSError):  # what else is wrong shows below
            return os.open(file, flags | os.O_DIRECT, 0o666), True
    return os.open(file, flags, 0o666), False


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
