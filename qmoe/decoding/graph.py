"""Functions that become CUDA graphs once they have run a few times."""

from __future__ import annotations

import os
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from qmoe.checkpoints.files import first_line

# Runs before the capture: the first compiles kernels, the last is watched for what a graph cannot
# do.
WARM_UP = 2
# Captures that may fail before a function goes on without: memory may be short for a while, and
# another thread that synchronizes the device breaks a capture.
_ATTEMPTS = 3
# How PyTorch's debug mode begins what it says of each wait.
_WAITED = "called a synchronizing"

_locks: dict[torch.device, threading.RLock] = defaultdict(threading.RLock)


def device_lock(device: torch.device) -> threading.RLock:
    """Held while a graph is captured or replayed: captures stand alone on a device."""
    return _locks[device]


if hasattr(os, "register_at_fork"):  # a thread that held one is not in the child
    os.register_at_fork(after_in_child=_locks.clear)


class GraphPool:
    """Memory that graphs share which never run at the same time.

    Attributes:
        num_bytes: by how much torch's reserved memory has grown with captures.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_bytes = 0
        self._handle: tuple[int, int] | None = None
        self._keeper: torch.cuda.CUDAGraph | None = None

    @property
    def handle(self) -> tuple[int, int]:
        """What PyTorch calls it; made when it is first asked for."""
        if self._handle is None:
            handle = torch.cuda.graph_pool_handle()
            anything = torch.zeros(1, device=self.device)
            # PyTorch forgets a pool with the last graph in it: this one stays.
            self._keeper = capture(anything.zero_, self.device, handle)
            self._handle = handle
        return self._handle

    def capture(
        self, function: Callable[[], None], generator: torch.Generator | None
    ) -> torch.cuda.CUDAGraph:
        """A graph of ``function`` with memory of this pool; see `capture`."""
        handle = self.handle
        before = torch.cuda.memory_reserved(self.device)
        graph = capture(function, self.device, handle, generator)
        self.num_bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        return graph


class Graphed:
    """Runs a function without arguments that does the same in the same places each time.

    On a GPU it runs by itself at first, and by a CUDA graph from then on; on a CPU by itself. The
    function is given each time: whoever owns a graph is then not held by it.

    Attributes:
        trouble: why there is no graph, once it was tried; None otherwise.
    """

    def __init__(
        self,
        pool: GraphPool,
        *,
        uncapturable: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Nothing is run yet.

        Args:
            pool: where the graph's memory comes from.
            uncapturable: why there must be no graph; None where there may be one.
            generator: that the function draws from.
        """
        self.pool, self.generator = pool, generator
        self.trouble = uncapturable if pool.device.type == "cuda" else None
        self._uncapturable = uncapturable
        self._runs = self._failures = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[[], None]) -> None:
        """Run the function, or its graph.

        Args:
            function: what it leaves is in tensors that it was given, none that it makes.
        """
        if self.pool.device.type != "cuda" or self._uncapturable is not None:
            function()
            return
        with device_lock(self.pool.device):
            if self._graph is None and self._runs == WARM_UP and self.trouble is None:
                self._try_capture(function)
            if self._graph is not None:
                self._graph.replay()
            elif self._runs == WARM_UP - 1:
                self.trouble = self._uncapturable = _watch(function)
                self._runs += 1
            else:
                function()
                self._runs += self._runs < WARM_UP

    def try_again(self) -> None:
        """Forget a capture that failed, unless it keeps failing."""
        if self._uncapturable is None and self._failures < _ATTEMPTS:
            self.trouble = None

    def capture(self, function: Callable[[], None]) -> None:
        """Capture a function without running it; its kernels must have been compiled.

        Raises:
            RuntimeError: it does what a graph cannot; nothing has changed.
        """
        with device_lock(self.pool.device):
            self._graph = self.pool.capture(function, self.generator)

    def replay(self) -> None:
        """Run the graph.

        Raises:
            ValueError: there is none.
        """
        if self._graph is None:
            raise ValueError("there is no graph; call capture() first")
        with device_lock(self.pool.device):
            self._graph.replay()

    def _try_capture(self, function: Callable[[], None]) -> None:
        try:
            self.capture(function)
        except Exception as error:  # whatever a model's forward may do, and too little memory
            self._failures += 1
            self.trouble = reason_of(error)


def reason_of(error: Exception) -> str:
    """What an error says, in one line; of which kind it is, where it says no sentence."""
    line, kind = first_line(error), type(error).__name__
    return (
        line if isinstance(error, ValueError | RuntimeError) or line == kind else f"{kind}: {line}"
    )


def capture(
    function: Callable[[], object],
    device: torch.device,
    pool: tuple[int, int] | None = None,
    generator: torch.Generator | None = None,
) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``function``, which is not run; its kernels must have been compiled.

    Args:
        generator: that ``function`` draws from, if that is not the device's default.
    """
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        # cuBLAS has a workspace for each stream, which torch keeps for ever. What a graph uses is
        # to be the graph's own, made during the capture and let go of at its end: then nobody else
        # frees it or writes to it, and it goes with the graph.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.stream(stream):
            try:
                # torch.cuda.graph would collect garbage first, which takes longer than the
                # capture; and another thread may go on using the device.
                graph.capture_begin(pool, capture_error_mode="thread_local")
                function()
                graph.capture_end()
            except BaseException:
                _give_up(graph, device, pool, generator)
                raise
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        # torch writes generators' offsets on this stream when a capture begins, and again where
        # the graph is replayed: not in the other order.
        torch.cuda.current_stream().wait_stream(stream)
    return graph


def _give_up(
    graph: torch.cuda.CUDAGraph,
    device: torch.device,
    pool: tuple[int, int] | None,
    generator: torch.Generator | None,
) -> None:
    """End a capture that failed, as far as torch does not do so itself."""
    with suppress(RuntimeError):  # what is captured is not valid any more
        graph.capture_end()
    index = torch.cuda.current_device() if device.index is None else device.index
    if pool is not None:
        # Else the allocator would go on as if there were a capture, and free nothing for streams.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(index, pool)
    # An end that fails leaves generators in the capture.
    for used in (torch.cuda.default_generators[index], generator):
        if used is not None:
            used.graphsafe_set_state(used.clone_state())


def _watch(function: Callable[[], None]) -> str | None:
    """Run a function; what in it makes the host wait for the device, which a graph cannot do."""
    this_thread, waits = threading.get_ident(), list[str]()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show = warnings.showwarning

        def note(
            message: Any,
            category: Any,
            filename: str,
            lineno: int,
            file: Any = None,
            line: Any = None,
        ) -> None:
            if _WAITED not in str(message):
                show(message, category, filename, lineno, file, line)
            elif threading.get_ident() == this_thread:  # others may wait
                waits.append(f"{filename.rpartition('/')[2]}:{lineno} waits for the device")

        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return waits[0] if waits else None
