"""Functions that become CUDA graphs once they have run a few times."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

# Runs before the capture: the first compiles kernels, the last is watched for what a graph cannot
# do.
WARM_UP = 2
# Where a model keeps its captured steps.
STEPS = "_qmoe_steps"
# How PyTorch's debug mode begins what it says of each wait.
_WAITED = "called a synchronizing"


def drop_steps(model: Any) -> None:
    """Let go of a model's captured steps and of their caches; `qmoe.decode` makes new ones."""
    vars(model).pop(STEPS, None)


class GraphPool:
    """Memory that graphs share which never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
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


class Graphed:
    """A function without arguments that does the same in the same places each time.

    On a GPU it runs by itself at first, and by a CUDA graph from then on; on a CPU by itself.

    Attributes:
        trouble: why there is no graph, once it was tried; None otherwise.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, pool: GraphPool) -> None:
        """Nothing is run yet.

        Args:
            function: what it leaves is in tensors that it was given, none that it makes.
            device: where it runs.
            pool: where the graph's memory comes from.
        """
        self.function, self.device, self.pool = function, device, pool
        self.trouble: str | None = None
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Run the function, or its graph."""
        if self._graph is None and self._runs == WARM_UP and self.trouble is None:
            self._try_capture()
        if self._graph is not None:
            self._graph.replay()
        elif self._runs == WARM_UP - 1 and self.device.type == "cuda":
            self.trouble = _watch(self.function)
            self._runs += 1
        else:
            self.function()
            self._runs += self._runs < WARM_UP

    def capture(self) -> None:
        """Capture the function without running it; its kernels must have been compiled.

        Raises:
            RuntimeError: it does what a graph cannot; nothing has changed.
        """
        self._graph = capture(self.function, self.device, self.pool.handle)

    def replay(self) -> None:
        """Run the graph.

        Raises:
            ValueError: there is none.
        """
        if self._graph is None:
            raise ValueError("there is no graph; call capture() first")
        self._graph.replay()

    def _try_capture(self) -> None:
        if self.device.type != "cuda":
            return
        try:
            self.capture()
        except Exception as error:  # whatever a model's forward may do, and too little memory
            self.trouble = next(iter(str(error).strip().splitlines()), type(error).__name__)


def capture(
    function: Callable[[], object], device: torch.device, pool: tuple[int, int] | None = None
) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``function``, which is not run; its kernels must have been compiled."""
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # torch.cuda.graph would collect garbage first, which takes longer than the capture;
            # and another thread may go on using the device.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                function()
            except BaseException:
                with suppress(RuntimeError):  # what is captured is not valid any more
                    graph.capture_end()
                _end_capture_of_generator(device)
                raise
            graph.capture_end()
    return graph


def _end_capture_of_generator(device: torch.device) -> None:
    """Let the device's generator draw numbers again; an end that fails leaves it in the capture."""
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


def _watch(function: Callable[[], None]) -> str | None:
    """Run a function; what in it makes the host wait for the device, which a graph cannot do."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if _WAITED in str(warning.message):
            return f"{warning.filename.rpartition('/')[2]}:{warning.lineno} waits for the device"
    return None
