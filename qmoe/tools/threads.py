"""How many of torch's threads a command uses on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Bytes below which one thread is faster than two: they wait for each other more than they compute,
# twenty times as long where another process takes one of the cores.
SMALL_MODEL = 100_000_000


@contextmanager
def threads_for(model_bytes: int) -> Iterator[None]:
    """Run the block on one thread if the model is small; OMP_NUM_THREADS of the user goes before.

    torch's number of threads belongs to the whole process: this is for commands.
    """
    before = torch.get_num_threads()
    if model_bytes < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
