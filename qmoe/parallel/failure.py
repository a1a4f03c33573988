"""How ranks learn that one of them has ended: notes in a store, and a thread that looks at them.

gloo ends an exchange as soon as a process at its other end is gone, NCCL waits. What neither tells
is which rank it was and why. So a rank that fails leaves a note in the store that torch.distributed
started with, and the others look there. A rank that was killed leaves none, and its *pulse*, which
a thread of each rank counts up, stops.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# Between two looks at the store, in seconds.
_PAUSE = 0.5
# So long others may take to say that they have failed, before they count as gone.
_GRACE = 3.0


class RankFailed(RuntimeError):
    """Another rank failed or is gone; the message names it.

    Attributes:
        ranks: those that did; empty where nobody knows.
    """

    def __init__(self, what: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(what)
        self.ranks = ranks


class Notes:
    """What the ranks of a group leave for each other in its store.

    Every method returns soon: whoever waits does so by asking again.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size

    def fail(self, reason: str) -> None:
        """Leave word that this rank has failed by itself."""
        with suppress(Exception):  # the store may be gone with the rank that kept it
            self.store.set(f"failed/{self.rank}", reason)

    def hear(self) -> None:
        """Leave word that this rank ends because another did."""
        with suppress(Exception):
            self.store.set(f"heard/{self.rank}", "")

    def pulse(self, count: int) -> None:
        """Leave a sign of life."""
        self.store.set(f"pulse/{self.rank}", str(count))

    def pulses(self) -> dict[int, str]:
        """The last sign of life of each other rank that has left one."""
        return self._read("pulse")

    def failures(self) -> dict[int, str]:
        """Why other ranks have failed by themselves."""
        return self._read("failed")

    def _read(self, kind: str) -> dict[int, str]:
        others = (rank for rank in range(self.size) if rank != self.rank)
        return {
            rank: self.store.get(f"{kind}/{rank}").decode()
            for rank in others
            if self.store.check([f"{kind}/{rank}"])
        }

    def who_is_missing(self, waited: float) -> RankFailed:
        """Of the ranks that were to meet, those that have left no sign of life.

        Args:
            waited: seconds, for the message.
        """
        missing: tuple[int, ...] = ()
        with suppress(Exception):  # the store's keeper is gone
            here = self.pulses()
            missing = tuple(r for r in range(self.size) if r not in (*here, self.rank))
        who = f"rank {', '.join(map(str, missing))}" if missing else "another rank"
        return RankFailed(
            f"{who} did not begin to load within {waited:.0f} s; every rank must make the same "
            "calls in the same order",
            missing,
        )

    def who_failed(self) -> RankFailed:
        """Find out which rank it was, in at most a few seconds."""
        end = time.monotonic() + _GRACE
        silent: tuple[int, ...] = ()
        try:
            while True:
                for rank, reason in self.failures().items():
                    return RankFailed(f"rank {rank} failed: {reason}", (rank,))
                heard = self._read("heard")
                silent = tuple(r for r in range(self.size) if r not in (*heard, self.rank))
                if time.monotonic() > end:
                    break
                time.sleep(0.05)
        except Exception:  # whatever a store says whose keeper is gone
            return RankFailed("the process that keeps the ranks' store is gone", ())
        if not silent:
            return RankFailed("the exchange between the ranks failed, and none of them says why")
        named = ", ".join(map(str, silent))
        return RankFailed(
            f"rank {named} does not answer any more: it was killed, has crashed or is stuck", silent
        )


class Watch:
    """A thread that counts up this rank's pulse and looks at the others'.

    Needed where an exchange does not end by itself when another rank has: on GPUs. There a kernel
    may wait for a rank that is gone, and nothing in the process can end that; then the process
    ends, and says why.
    """

    def __init__(
        self,
        notes: Notes,
        patience: float,
        interrupt: Callable[[], None],
        give_up: Callable[[RankFailed], None] | None = None,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            notes: of the group.
            patience: seconds without a pulse after which a rank counts as gone.
            interrupt: ends the exchange that is under way; called once, from the thread.
            give_up: called where that did not help; by default it ends the process.
        """
        self.notes, self.patience, self.interrupt = notes, patience, interrupt
        self.give_up = give_up or _end_process
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qmoe-ranks", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no further; returns when the thread has ended."""
        self._stopped.set()
        if self._thread.ident is not None:  # an interrupt may come before the start
            self._thread.join()

    def _run(self) -> None:
        others = (rank for rank in range(self.notes.size) if rank != self.notes.rank)
        count, seen = 0, {rank: ("", time.monotonic()) for rank in others}
        while not self._stopped.wait(_PAUSE):
            count, now = count + 1, time.monotonic()
            try:
                self.notes.pulse(count)
                for rank, pulse in self.notes.pulses().items():
                    if seen[rank][0] != pulse:
                        seen[rank] = pulse, now
                trouble = bool(self.notes.failures())
            except Exception:  # the store's keeper is gone
                trouble = True
            if trouble or any(now - since > self.patience for _, since in seen.values()):
                self.interrupt()
                if not self._stopped.wait(2 * _GRACE):
                    self.give_up(self.notes.who_failed())
                return


def _end_process(failed: RankFailed) -> None:
    print(
        f"qmoe: {failed}; the GPU still waits for it, this rank ends", file=sys.stderr, flush=True
    )
    os._exit(1)
