"""Threads without Python that multiply with experts where they lie, whenever a mailbox asks.

`worker_loops` says what they do, and how they agree; here they are compiled, given memory, started
and ended. `qmoe_kernels.mailbox` posts to them, from the host or from a GPU.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from qmoe_kernels import cpu
from qmoe_kernels.cpu import native
from qmoe_kernels.experts import Experts

logger = logging.getLogger(__name__)

# A mailbox's words: see `worker_loops`, whose names these are. Each has a line of its own.
WORD_STRIDE = 16  # int64
POSTED, ANSWERED, STOP, TEAM, BELL, SLEEPERS, HEADER, FAILED = range(8)
NUM_WORDS = 8

# Steps follow one another within milliseconds; who decodes finds the workers awake.
SPIN_NS = 3_000_000
# A GPU cannot ring: so long an answer may come late where nobody rang before it posted.
POLL_NS = 1_000_000
# Weights that a worker claims at a time. A job is one expert or two, and some workers come to it
# late: those that were in time take more parts. Smaller ones cost more in claims than they save.
ITEM_BYTES = 1 << 15
# No part of a job takes so long. Threads that have not ended by then are left alone.
JOIN_SECONDS = 5.0

# What threads that did not end may still write to. Nothing takes it back.
_abandoned: list[Any] = []


def unavailable(experts: Sequence[Experts]) -> str | None:
    """Why workers cannot compute these layers on this machine; None if they can."""
    if not sys.platform.startswith("linux"):
        return f"it needs Linux, and this is {sys.platform}"
    for layer in experts:
        for projection in (layer.gate_up, layer.down):
            weight = projection.weight
            if weight.dtype not in (torch.int8, torch.float8_e4m3fn) or projection.scale is None:
                return f"it needs INT8 or FP8 experts, and these are {weight.dtype}"
    sizes = {layer.hidden_size for layer in experts}
    if len(sizes) > 1:
        return f"it needs layers of one hidden size, and these have {sorted(sizes)}"
    if native.address_of("layer") is None or native.address_of("lead") is None:
        return "it needs the native loops, which are missing here (is numba installed?)"
    return None


class Team:
    """Threads that serve one mailbox until `close`, the end of the process, or nobody's use of it.

    A forked child has none of its parent's threads: there `alive` is False, and others are to be
    made, with a mailbox of their own.

    Attributes:
        told: not empty once the threads are to end.
    """

    def __init__(
        self,
        words: Tensor,  # (NUM_WORDS, WORD_STRIDE) int64, zeros
        job: Sequence[int],
        num_threads: int,
        kept: Any,
        *,
        spin_ns: tuple[int, int],
        poll_ns: tuple[int, int],
        name: str,
    ) -> None:
        """Make the threads; `start` starts them, once somebody holds the team.

        Args:
            words: of the mailbox.
            job: the arguments of `worker_loops.lead` between the words and the two times.
            num_threads: how many, one of which leads.
            kept: what they may write to; it outlives them.
            spin_ns: so long the leader, and the others, look for work before they sleep, in
                nanoseconds.
            poll_ns: so long they sleep at most, less than a second.
            name: of the threads, with their part behind it.
        """
        self._pid = os.getpid()
        self._words = words
        given = [
            array("q", [words.data_ptr(), *job, *times])
            for times in zip(spin_ns, poll_ns, strict=True)
        ]
        parts = [("lead", given[0]), *[("assist", given[1])] * (num_threads - 1)]
        memory = (words, given, kept)
        self.told: list[bool] = []
        # Daemons: their end is the finalizer's business, before which Python must not wait.
        self._threads = [
            threading.Thread(
                target=_serve,
                args=(_native(part), arguments.buffer_info()[0], self.told, memory),
                name=f"{name}-{part}",
                daemon=True,
            )
            for part, arguments in parts
        ]
        self._finalizer = weakref.finalize(
            self, _end, self._threads, words, self._pid, self.told, memory
        )

    def start(self) -> None:
        """Start the threads. An interrupt may leave some, which whoever holds the team closes.

        (Two teams at one mailbox would answer each other's posts.)
        """
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.close()
            raise

    @property
    def num_threads(self) -> int:
        return len(self._threads)

    @property
    def alive(self) -> bool:
        """Whether all threads are running, in this process, and nobody told them to end."""
        if self.told or os.getpid() != self._pid:
            return False
        return all(thread.is_alive() for thread in self._threads)

    def ring(self) -> None:
        """Wake who sleeps, because a post is about to come."""
        _call("ring_bell", self._words.data_ptr())

    def close(self) -> bool:
        """End the threads. Where an interrupt cuts it off, it can be called again.

        Returns:
            whether they have ended; if not, the mailbox's memory is theirs for good.
        """
        if (found := self._finalizer.peek()) is None:
            return True
        _, end, arguments, _ = found
        ended: bool = end(*arguments)
        self._finalizer.detach()
        return ended


class Workers(Team):
    """The threads that compute experts."""

    def __init__(
        self,
        experts: Sequence[Experts],
        words: Tensor,  # (NUM_WORDS, WORD_STRIDE) int64, zeros
        ids: Tensor,  # (max_pairs,) int64
        rows: Tensor,  # (max_tokens, padded hidden_size) fp32, zeros
        answers: Tensor,  # (max_pairs, hidden_size) fp32
        num_threads: int | None = None,
        *,
        spin_ns: int = SPIN_NS,
        poll_ns: int = POLL_NS,
    ) -> None:
        """Make the threads.

        Args:
            experts: of each layer, all on the CPU, without slots.
            words, ids, rows, answers: the mailbox's memory.
            num_threads: how many; None: one fewer than torch takes, and at least one.
            spin_ns: so long a worker looks for work before it sleeps, in nanoseconds.
            poll_ns: so long it sleeps at most, less than a second.

        Raises:
            ValueError: they cannot compute these layers here; the message says why.
        """
        if (reason := unavailable(experts)) is not None:
            raise ValueError(f"the host cannot compute experts: {reason}")
        if num_threads is None:
            num_threads = max(1, torch.get_num_threads() - 1)
        memory = _Job(experts, ids, rows, answers)
        super().__init__(
            words,
            [
                native.address_of("layer") or 0,
                memory.address,
                memory.products.buffer_info()[0],
                len(experts),
                len(ids),
            ],
            num_threads,
            (ids, rows, answers, memory),
            spin_ns=(spin_ns, spin_ns),
            poll_ns=(poll_ns, poll_ns),
            name="qmoe-host",
        )


def store_word(words: Tensor, word: int, value: int) -> None:
    """Put a value into a word of a mailbox, after all that was written before."""
    _call("store_word", words[word].data_ptr(), value)


def load_word(words: Tensor, word: int) -> int:
    """Read a word of a mailbox, before all that is read afterwards."""
    return _call("load_word", words[word].data_ptr(), 0)[1]


def wait_for_answer(words: Tensor, number: int, seconds: float) -> bool:
    """Wait until a post has been answered; False if it was not within so many seconds.

    Ctrl-C ends it.
    """
    end = time.monotonic() + seconds
    while load_word(words, ANSWERED) < number:
        if time.monotonic() > end:
            return False
        time.sleep(20e-6)  # which lets other threads of Python run
    return True


class _Job:
    """The arguments of one call of the loop `layer`, and the memory that it works in.

    Attributes:
        address: of the arguments.
        products: the arguments of both products and the number of experts, by layer and dtype.
    """

    def __init__(
        self, experts: Sequence[Experts], ids: Tensor, rows: Tensor, answers: Tensor
    ) -> None:
        pairs, lanes = len(ids), cpu.LANES
        most = max(layer.num_experts for layer in experts)
        sizes = [most, pairs, pairs, pairs, most + 1, most, most, most]
        tables = [torch.zeros(size, dtype=torch.int64) for size in sizes]
        _, of_pairs, tokens, order, offsets, numbers, slots, _ = (t.data_ptr() for t in tables)
        up_sums = torch.empty(pairs, max(layer.gate_up.weight.shape[1] for layer in experts))
        down_sums = torch.empty(pairs, experts[0].hidden_size)
        hidden: dict[int, Tensor] = {}  # zeros behind the columns, which differ
        self.kept: list[Any] = [experts, tables, up_sums, down_sums, hidden]
        products = []
        for layer in experts:
            columns = layer.down.weight.shape[2]
            width = -(-columns // lanes) * lanes
            middle_rows = hidden.setdefault(columns, torch.zeros(pairs, width))
            source = (rows.data_ptr(), 4 * rows.shape[1], tokens)
            middle = (middle_rows.data_ptr(), 4 * width, order)
            target = (answers.data_ptr(), 4 * answers.shape[1], of_pairs)
            routed = (offsets, numbers, slots)
            for rounded in range(len(cpu.DTYPES)):
                first = cpu._product(
                    layer.gate_up, layer.activation, source, None, routed, middle, rounded,
                    up_sums.data_ptr(), self.kept, ITEM_BYTES,
                )  # fmt: skip
                second = cpu._product(
                    layer.down, None, middle, None, routed, target, rounded,
                    down_sums.data_ptr(), self.kept, ITEM_BYTES,
                )  # fmt: skip
                products += [first, second, layer.num_experts]
        self.products = array("q", products)
        # As `native.run` lays them out; what is zero here is filled in for each post.
        before = [0, 0, ids.data_ptr(), 0, 0, 0, 0, 0, *(t.data_ptr() for t in tables), 0, 0, 0, 0]
        self._arguments = array("q", [*before, *[0] * native.COUNTERS])
        self.address = self._arguments.buffer_info()[0]
        counters = self.address + 8 * len(before)
        self._arguments[0], self._arguments[1] = counters, counters + 8


def _serve(loop: Callable[[int], None], arguments: int, told: list[bool], memory: Any) -> None:
    """What a thread does, unless it was told to end before it began; it keeps its memory."""
    if not told:
        loop(arguments)


def _end(
    threads: list[threading.Thread], words: Tensor, pid: int, told: list[bool], kept: Any
) -> bool:
    """Tell threads to stop and wait for them; what they may write to outlives them."""
    if os.getpid() != pid:
        return True  # a forked child: there are no threads
    told.append(True)
    if all(thread.ident is None for thread in threads):
        return True  # the words may be those of others, who run
    store_word(words, STOP, 1)
    _call("ring_bell", words.data_ptr())
    end = time.monotonic() + JOIN_SECONDS
    for thread in threads:
        # Not begun, where an interrupt came while it was started: then it looks at `told` first.
        with suppress(RuntimeError):
            thread.join(max(0.0, end - time.monotonic()))
    if not any(thread.is_alive() for thread in threads):
        return True
    _abandoned.append(kept)
    logger.warning("a thread of the host's did not end; its memory is not freed")
    return False


def _call(name: str, *arguments: int) -> array[int]:
    given = array("q", arguments)
    _native(name)(given.buffer_info()[0])
    return given


def _native(name: str) -> Callable[[int], None]:
    function = native.address_of(name)
    assert function is not None
    return native.callable_at(function)
