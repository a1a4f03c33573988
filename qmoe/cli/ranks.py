"""Commands that torchrun started several times: rank 0 speaks, the others are silent."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer

# Seconds that rank 0 has to say what went wrong. torchrun ends all ranks as soon as one has ended:
# a silent one must not be the first.
_PATIENCE = 5.0


def rank_of_torchrun() -> int | None:
    """This process's rank among several; None for a command that was started once."""
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return rank if size > 1 else None


@contextmanager
def rank_0_speaks(rank: int | None, debug: bool) -> Iterator[None]:
    """Let no rank but 0 print anything, to the end of the process.

    What goes wrong on another rank is said by rank 0; by that rank itself where rank 0 is gone, or
    goes on.

    Args:
        rank: as :func:`rank_of_torchrun`.
        debug: every rank shows its failure.
    """
    if not rank:
        yield
        return
    streams = sys.stdout, sys.stderr
    silence = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # open as long as the process
    sys.stdout = silence
    if not debug:
        sys.stderr = silence
    try:
        yield
    except typer.Exit:  # no failure, or one that all ranks know of
        raise
    except Exception as error:
        if 0 not in getattr(error, "ranks", ()):
            time.sleep(_PATIENCE)  # torchrun ends this process meanwhile if rank 0 has ended
        sys.stdout, sys.stderr = streams
        raise
