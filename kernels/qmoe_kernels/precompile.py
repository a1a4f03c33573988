"""Compile layers' kernels in other processes, which fill Triton's cache on disk.

A process with a kernel that a search wants to time then finds it there. Nothing is launched: the
GPU is free for timing meanwhile. ``python -m qmoe_kernels.precompile`` is such a process; it reads
a line of JSON for each layer and answers with one: null, or what went wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import asdict
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch

from qmoe_kernels.activations import Activation
from qmoe_kernels.experts import Experts, Projection
from qmoe_kernels.quantization import STORAGE_DTYPE
from qmoe_kernels.tile_search import Cell
from qmoe_kernels.tile_tables import LayerKind, sizes_from_dict, tiles_from_dict
from qmoe_kernels.tiles import LayerShape, LayerTiles


def activation_of(shape: LayerShape) -> Activation:
    """The nonlinearity that layers are tuned with; which one makes no difference in time."""
    return Activation(gated=shape.gated)


def rows_dtype(activations: str) -> torch.dtype | None:
    """What `fused_moe_triton` quantizes rows to: None for 16-bit activations."""
    return STORAGE_DTYPE.get(activations)


class Precompiler:
    """Processes that compile; leave the ``with`` block to end them.

    Args:
        num_workers: how many processes.
        device: whose kernels they compile.
    """

    def __init__(self, num_workers: int, device: str = "cuda") -> None:
        self.device = device
        self._pool = ThreadPoolExecutor(num_workers)
        self._own = threading.local()
        self._lock = threading.Lock()
        self._workers: list[subprocess.Popen[str]] = []
        self._closed = False

    def __enter__(self) -> Precompiler:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.communicate()

    def submit(self, cell: Cell, layers: Sequence[LayerTiles]) -> dict[LayerTiles, Future[Any]]:
        """Begin to compile one cell's layers."""
        return {tiles: self._pool.submit(self._compile, cell, tiles) for tiles in layers}

    def _compile(self, cell: Cell, tiles: LayerTiles) -> str | None:
        job = {"num_tokens": cell.num_tokens, "tiles": asdict(tiles), "device": self.device}
        worker = getattr(self._own, "worker", None)
        if worker is None or worker.poll() is not None:
            worker = self._own.worker = self._start()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            print(json.dumps({**job, **asdict(cell.kind)}), file=worker.stdin, flush=True)
            answer = worker.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(1)  # for its own exit code
            worker.kill()
            code = worker.wait()
            self._own.log.seek(0)
            last = (self._own.log.read().strip() or "no message").splitlines()[-1]
            return f"the compiling process ended with code {code}: {last}"
        return json.loads(answer)

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(
            [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        # Compilers say much about what they cannot compile.
        self._own.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        with self._lock:
            if self._closed:
                raise RuntimeError("closed")
            worker = subprocess.Popen(
                [sys.executable, "-m", "qmoe_kernels.precompile"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._own.log,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                # Ctrl-C is for the process that tunes, which ends this one.
                start_new_session=True,
            )
            self._workers.append(worker)
        return worker


def failures(compiling: dict[LayerTiles, Future[Any]], seconds: float) -> dict[LayerTiles, str]:
    """Wait so long at most; what could not be compiled, and why."""
    wait_for(compiling.values(), seconds)
    found = {}
    for tiles, future in compiling.items():
        error = future.result() if future.done() else f"not compiled within {seconds:.0f} s"
        if error is not None:
            found[tiles] = error
    return found


def compile_layer(cell: Cell, tiles: LayerTiles, device: str) -> None:
    """Go through a layer's launches with its real sizes, compiling every kernel.

    Weights share one expert's memory: a kernel depends on strides only by what divides them.
    """
    import triton

    from qmoe_kernels.layer import fused_moe_triton

    shape = cell.kind.shape
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    dtype = STORAGE_DTYPE.get(cell.kind.weights, torch.bfloat16)

    def projection(rows: int, columns: int) -> Projection:
        weight = torch.empty(1, rows, columns, dtype=dtype, device=device)
        scale = torch.empty(shape.num_experts, rows, device=device) if dtype.itemsize == 1 else None
        return Projection(weight.expand(shape.num_experts, rows, columns), scale)

    experts = Experts(
        projection(intermediate * (2 if shape.gated else 1), hidden),
        projection(hidden, intermediate),
        activation_of(shape),
    )

    launch = triton.JITFunction.run
    triton.JITFunction.run = partialmethod(_compile_only, launch)
    try:
        fused_moe_triton(
            torch.empty(cell.num_tokens, hidden, dtype=torch.bfloat16, device=device),
            experts,
            torch.zeros(cell.num_tokens, shape.top_k, dtype=torch.int64, device=device),
            torch.empty(cell.num_tokens, shape.top_k, device=device),
            activations=rows_dtype(cell.kind.activations),
            tiles=tiles,
        )
    finally:
        triton.JITFunction.run = launch


def _compile_only(function: Any, launch: Any, *args: Any, **options: Any) -> Any:
    return launch(function, *args, **{**options, "warmup": True})


def main() -> None:
    """Answer lines on stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no answer
    for line in sys.stdin:
        job = json.loads(line)
        shape = sizes_from_dict(LayerShape, job["shape"])
        cell = Cell(LayerKind(shape, job["weights"], job["activations"]), job["num_tokens"])
        error = None
        try:
            compile_layer(cell, tiles_from_dict(job["tiles"]), job["device"])
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        print(json.dumps(error), file=answers, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
