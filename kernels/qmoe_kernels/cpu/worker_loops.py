"""The workers of a mailbox, in numba's Python; `workers` compiles this and starts the threads.

They compute experts, or read pages from files (`read_loops`): the protocol is the same.

A post has a number, one more than the one before. Whoever posts writes rows, experts and the
header, then the number (`POSTED`); the *leader* sees it, opens a job that *helpers* may join, and
works on it; so does who joined. Once no work is left to claim the leader closes the job, waits for
those who joined to leave, and writes the number back (`ANSWERED`). Then nobody touches the job, the
rows or the answers until the next number. `TEAM` holds all of a job's state in one word, which is
only ever added to: a helper joins by adding itself and learns from what was there whether it may;
if not, it was late and takes itself away again. (With compare-and-swap many helpers that come at
once make one another try again.)

Who finds nothing to do spins a bounded time, then sleeps on `BELL`: until somebody rings, or for
`POLL_NS`, because a GPU cannot ring.
"""

from __future__ import annotations

from typing import Any

from numba import njit, types

from qmoe_kernels.cpu.atomics import add, load, now, pause, run, sleep_on, swap, wake
from qmoe_kernels.cpu.intrinsics import pointer_to, yield_processor
from qmoe_kernels.cpu.loops import OPTIONS, loop
from qmoe_kernels.cpu.read_loops import prepare_reads

longs_at = pointer_to(types.int64)

# Words, in bytes from the mailbox's begin: each has its own line of the cache.
POSTED, ANSWERED, STOP, TEAM, BELL, SLEEPERS, HEADER, FAILED = range(0, 8 * 128, 128)
# The header: what is posted. A layer's number, tokens, experts of each, the place of a dtype in
# `cpu.DTYPES`.
LAYER, NUM_TOKENS, TOP_K, DTYPE = range(4)
# TEAM: how many joined, whether more may, and the post's number.
MEMBERS, OPEN, NUMBER_BIT = (1 << 16) - 1, 1 << 16, 17
# Arguments of a worker. PRODUCTS is 0 where the job is to read files: see `read_loops`.
WORDS, LOOP, JOB, PRODUCTS, NUM_LAYERS, MAX_PAIRS, SPIN_NS, POLL_NS = range(8)
NUM_DTYPES = 3
# Places in the arguments of `loops.layer`, see `cpu.layer`.
PAIRS, TOP, EXPERTS, FEW, UP, DOWN, COUNTERS = 3, 4, 5, 7, 16, 17, 19

CHECKS = 64  # of a word, before the clock is read


@njit(**OPTIONS)
def prepare(a):
    """Fill in the job's arguments; whether what is posted can be one."""
    header, job = longs_at(a[WORDS] + HEADER), longs_at(a[JOB])
    if a[PRODUCTS] == 0:
        return prepare_reads(header[0], a[MAX_PAIRS], a[JOB])
    pairs = header[NUM_TOKENS] * header[TOP_K]
    if not 0 <= header[LAYER] < a[NUM_LAYERS] or not 0 <= header[DTYPE] < NUM_DTYPES:
        return False
    if not 0 < pairs <= a[MAX_PAIRS] or not 0 < header[TOP_K] <= pairs:
        return False
    products = longs_at(a[PRODUCTS] + 24 * (header[LAYER] * NUM_DTYPES + header[DTYPE]))
    job[PAIRS], job[TOP], job[FEW], job[EXPERTS] = pairs, header[TOP_K], pairs, products[2]
    job[UP], job[DOWN] = products[0], products[1]
    for i in range(7):
        job[COUNTERS + i] = 0
    return True


@njit(**OPTIONS)
def work(a):
    """Claim and do parts of the job until none is left."""
    run(a[LOOP], a[JOB])


@njit(**OPTIONS)
def rest(a, since, watched, value):
    """Wait a little while a word has a value.

    ``since`` is when the waiting began, 0 where it is about to; returned for the next turn.
    """
    words = a[WORDS]
    if since == 0:
        since = now()
    for _ in range(CHECKS):
        if load(watched) != value:
            return since
        pause()
    if now() - since < a[SPIN_NS]:
        yield_processor()
        return since
    # Whoever changes the word rings afterwards: the bell is looked at first, then the word.
    bell = load(words + BELL)
    add(words + SLEEPERS, 1)
    if load(watched) == value and load(words + STOP) == 0:
        sleep_on(words + BELL, bell, a[POLL_NS])
    add(words + SLEEPERS, -1)
    return since if load(words + BELL) == bell else 0


@njit(**OPTIONS)
def ring(words):
    """Wake all who sleep."""
    add(words + BELL, 1)
    wake(words + BELL)


@njit(**OPTIONS)
def serve(a, number):
    """Have one post computed; whether it is answered."""
    words = a[WORDS]
    if not prepare(a):
        return False
    # Only who leads changes these bits; below them somebody who was late may be counted.
    before = load(words + TEAM) & ~MEMBERS
    add(words + TEAM, ((number << NUMBER_BIT) | OPEN) - before)
    if load(words + SLEEPERS) > 0:
        ring(words)
    work(a)
    add(words + TEAM, -OPEN)
    while load(words + TEAM) & MEMBERS:
        if load(words + STOP):
            return False
        pause()
    swap(words + ANSWERED, number)
    return True


def lead(a):
    """The thread that answers posts."""
    words, since = a[WORDS], 0
    seen = load(words + ANSWERED)
    while load(words + STOP) == 0:
        number = load(words + POSTED)
        if number == seen:
            since = rest(a, since, words + POSTED, number)
        else:
            serve(a, number)
            seen, since = number, 0


def assist(a):
    """A thread that joins jobs."""
    words, since, seen = a[WORDS], 0, 0
    while load(words + STOP) == 0:
        team = load(words + TEAM)
        number = team >> NUMBER_BIT
        if team & OPEN and number != seen:
            team = add(words + TEAM, 1)
            if team & OPEN:
                work(a)
                seen, since = team >> NUMBER_BIT, 0
            add(words + TEAM, -1)
        else:
            since = rest(a, since, words + TEAM, team)


def make_lead() -> Any:
    return loop(lead)


def make_assist() -> Any:
    return loop(assist)


def make_store_word() -> Any:
    """Put ``a[1]`` at the address ``a[0]``, after all that was written before."""

    def store_word(a):
        swap(a[0], a[1])

    return loop(store_word)


def make_load_word() -> Any:
    """Read the word at the address ``a[0]`` into ``a[1]``, before all that is read afterwards."""

    def load_word(a):
        a[1] = load(a[0])

    return loop(load_word)


def make_ring_bell() -> Any:
    """Wake all who sleep in the mailbox at ``a[0]``."""

    def ring_bell(a):
        ring(a[0])

    return loop(ring_bell)
