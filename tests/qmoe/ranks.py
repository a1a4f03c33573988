"""Runs a function in several processes, as torchrun would start them: ranks of gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Literal


@dataclass(frozen=True)
class Failure:
    """How a rank failed: the error's class and text, and seconds from the start until then."""

    kind: str
    text: str
    seconds: float


def run(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60,
    start: Literal["fork", "spawn"] = "fork",
) -> list[Any]:
    """Call ``function(rank, *args)`` in ``size`` processes.

    Forked, since a new process takes seconds to import what this one has; on GPUs spawned, since
    one that has used CUDA cannot fork any more.

    Returns:
        what each returned, a `Failure` where it raised, None where it was killed.
    """
    context = multiprocessing.get_context(start)
    port = _free_port()
    pipes = [context.Pipe() for _ in range(size)]
    processes = [
        context.Process(target=_child, args=(rank, size, port, pipe[1], function, args))
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    results: list[Any] = []
    try:
        for process, (mine, its) in zip(processes, pipes, strict=True):
            its.close()
            # A killed one's pipe stays open: its siblings have it too.
            if not wait([mine, process.sentinel], max(0.0, end - time.monotonic())):
                raise TimeoutError(f"{process.name} gave no answer in {timeout} s")
            results.append(_received(mine))
    finally:
        for process, (mine, _) in zip(processes, pipes, strict=True):
            with suppress(OSError):
                mine.send("go")
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    return results


def _child(
    rank: int, size: int, port: int, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    started = time.monotonic()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        result = function(rank, *args)
    except BaseException as error:
        if os.environ.get("QMOE_SHOW_RANKS"):
            traceback.print_exc()
        result = Failure(type(error).__name__, str(error), time.monotonic() - started)
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send(result)
    pipe.recv()  # until all are done: rank 0 keeps the store
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _received(pipe: Any) -> Any:
    """What a rank sent; None where it was killed, whether or not that has closed its pipe."""
    with suppress(EOFError):
        return pipe.recv() if pipe.poll() else None
