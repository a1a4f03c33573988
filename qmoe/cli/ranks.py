"""Commands that torchrun started several times: rank 0 speaks, the others are silent."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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

    What goes wrong on another rank is said by rank 0, unless that is what is gone.

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
    except Exception as error:
        if 0 in getattr(error, "ranks", ()):
            sys.stdout, sys.stderr = streams
        raise
