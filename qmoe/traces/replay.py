"""replay(): how often a cache of a given capacity and policy would have hit on a routing trace.

A step is one token in one layer, as in decode of one sequence. All layers share one pool of slots,
which is empty at the start. A step's experts are served together: none of them is evicted by it,
and an expert that it names twice is one page. With ``claims`` this is what
`qmoe_kernels.paging.admit` does, to the slot.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qmoe.traces.trace import RoutingTrace
from qmoe_kernels.claims import FIRST_RATE, horizon_of, next_rate, renewed

Policy = Literal["claims", "lru", "lfu", "belady"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True)
class Replay:
    """What a cache would have done.

    Attributes:
        policy: what was evicted.
        capacity: slots.
        hits: for each layer, experts that were in a slot when a token asked for them.
        misses: for each layer, those that were not: pages to copy.
        missed_bytes: bytes of these pages.
    """

    policy: Policy
    capacity: int
    hits: tuple[int, ...]
    misses: tuple[int, ...]
    missed_bytes: int

    @property
    def hit_rate(self) -> float:
        """Hits over all that was asked for; 0 where nothing was."""
        return sum(self.hits) / max(sum(self.hits) + sum(self.misses), 1)


def replay(
    trace: RoutingTrace, capacity: int, policy: Policy = "claims", *, warmup: int = 0
) -> Replay:
    """Run a trace through a cache.

    Args:
        trace: what was asked for.
        capacity: slots, at least trace.top_k.
        policy: which page goes when one has to: ``"claims"``, the one with the smallest claim, as
            `qmoe_kernels.paging` has it; ``"lru"``, the least recently used; ``"lfu"``, the one
            used least often since the start of the trace, whether it was in a slot or not;
            ``"belady"``, the one whose next use is farthest away, which no policy can beat (L. A.
            Belady, "A study of replacement algorithms for a virtual-storage computer", 1966). With
            the first two, where every slot was used since its layer's last step, the most recently
            used goes.
        warmup: the first so many tokens fill the cache and are not counted.

    Raises:
        ValueError: an unknown policy, slots too few for one step, or no tokens after the warm-up.
    """
    (result,) = replay_curve(trace, [capacity], [policy], warmup=warmup)
    return result


def replay_curve(
    trace: RoutingTrace,
    capacities: Iterable[int],
    policies: Iterable[Policy] = POLICIES,
    *,
    warmup: int = 0,
) -> list[Replay]:
    """As :func:`replay`, for every capacity under every policy, policies outermost."""
    capacities, policies = list(capacities), list(policies)
    for policy in policies:
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r}; use one of {', '.join(map(repr, POLICIES))}")
    if min(capacities, default=trace.top_k) < trace.top_k:
        raise ValueError(
            f"capacity={min(capacities)}: one step needs {trace.top_k} slots at once, top_k"
        )
    if not 0 <= warmup < trace.num_tokens:
        raise ValueError(f"warmup={warmup}: from 0 to fewer than the trace's {trace.num_tokens}")
    pages, lengths = _accesses(trace)
    asked = lengths.view(-1, trace.num_layers)[warmup:].sum(0)
    results = []
    for policy in policies:
        # Claims are earned while the trace is replayed.
        keep = None if policy == "claims" else _keep(pages, lengths, policy).tolist()
        layers_in_turn = trace.num_layers if policy in ("claims", "lru") else None
        for capacity in capacities:
            earned = _Claims(capacity, trace.num_layers) if keep is None else _Given(keep)
            given = (pages.tolist(), lengths.tolist(), capacity)
            steps = torch.tensor(_misses(*given, earned, layers_in_turn))
            misses = steps.view(-1, trace.num_layers)[warmup:].sum(0)
            missed_bytes = sum(map(int.__mul__, misses.tolist(), trace.page_bytes))
            results.append(
                Replay(
                    policy,
                    capacity,
                    tuple((asked - misses).tolist()),
                    tuple(misses.tolist()),
                    missed_bytes,
                )
            )
    return results


def _accesses(trace: RoutingTrace) -> tuple[Tensor, Tensor]:
    """Distinct pages of each step, one step after the other, and how many each step has."""
    ids = trace.topk_ids.long()
    repeated = (ids[..., :, None] == ids[..., None, :]).tril(-1).any(-1)
    wanted = (ids >= 0) & ~repeated
    pages = ids + (torch.arange(trace.num_layers) * trace.num_experts)[:, None]
    return pages[wanted], wanted.sum(-1).flatten()


def _keep(pages: Tensor, lengths: Tensor, policy: Policy) -> Tensor:
    """For each access, its page's claim to stay from then until its next access."""
    num_steps = len(lengths)
    step = torch.arange(num_steps).repeat_interleave(lengths)
    if policy == "lru":
        return step
    # Accesses of one page next to each other, in the order of time.
    order = pages.argsort(stable=True)
    same = pages[order][1:] == pages[order][:-1]
    keep = torch.empty_like(step)
    if policy == "belady":
        following = torch.full_like(step, num_steps)
        following[:-1] = torch.where(same, step[order][1:], num_steps)
        keep[order] = -following
        return keep
    position = torch.arange(len(pages))
    first = torch.cat([position[:1], torch.where(same, 0, position[1:])]).cummax(0).values
    keep[order] = (position - first) * num_steps  # earlier uses
    return keep + step  # of two used equally often, the one used longer ago goes


class _Given:
    """Claims that were known before."""

    def __init__(self, keep: list[int]) -> None:
        self._keep, self._start = keep, 0

    def use(self, pages: list[int], num_missing: int) -> list[int]:
        """Claims of a step's pages from now on."""
        start = self._start
        self._start += len(pages)
        return self._keep[start : self._start]


class _Claims:
    """Those of `qmoe_kernels.claims`."""

    def __init__(self, num_slots: int, num_layers: int) -> None:
        self._num_slots, self._num_layers = num_slots, num_layers
        self._clock, self._rate = 0, FIRST_RATE
        self._of_page: dict[int, int] = {}

    def use(self, pages: list[int], num_missing: int) -> list[int]:
        """Claims of a step's pages from now on."""
        self._clock += 1
        horizon = horizon_of(self._rate, self._num_slots, self._num_layers)
        self._rate = next_rate(self._rate, num_missing)
        for page in pages:
            self._of_page[page] = renewed(self._of_page.get(page, 0), self._clock, horizon)
        return [self._of_page[page] for page in pages]


def _misses(
    pages: list[int],
    lengths: list[int],
    capacity: int,
    earned: _Given | _Claims,
    cycle: int | None,
) -> list[int]:
    """Misses of each step in a pool of ``capacity`` slots.

    Slots wait for their eviction in heaps, where a slot that is used again has other entries; those
    of its earlier uses are out of date and skipped when they come up.

    Args:
        cycle: slots that one of so many steps before has used go after all others, the most
            recently used first. None: they go as all others do.
    """
    page_to_slot: dict[int, int] = {}
    slot_to_page = [-1] * capacity
    last_used = [-1] * capacity  # of each slot; the present step while in use
    # Entries are (what goes first, slot, its last use). Empty slots go before all others.
    old: list[tuple[float, int, int]] = [(-math.inf, slot, -1) for slot in range(capacity)]
    new: list[tuple[float, int, int]] = []
    # Of each of the last steps: what its slots enter `old` with, once they are old.
    recent: deque[list[tuple[float, int, int]]] = deque()

    def first(heap: list[tuple[float, int, int]]) -> int | None:
        """The slot whose entry comes first; it stays there."""
        while heap and last_used[heap[0][1]] != heap[0][2]:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def trim(heap: list[tuple[float, int, int]]) -> None:
        """Drop what is out of date, where that is most of it."""
        if len(heap) > 4 * capacity + 64:
            heap[:] = [entry for entry in heap if last_used[entry[1]] == entry[2]]
            heapq.heapify(heap)

    misses = []
    start = 0
    for now, length in enumerate(lengths):
        if len(recent) == (cycle or 1):
            for entry in recent.popleft():
                if last_used[entry[1]] == entry[2]:
                    heapq.heappush(old, entry)
        step = pages[start : start + length]
        slots = [page_to_slot.get(page, -1) for page in step]
        misses.append(slots.count(-1))
        for slot in slots:
            if slot >= 0:
                last_used[slot] = now
        for index, page in enumerate(step):
            if slots[index] < 0:
                goes = first(old)
                goes = first(new) if goes is None else goes
                assert goes is not None  # there are as many slots as a step has pages
                slots[index] = slot = goes
                page_to_slot.pop(slot_to_page[slot], None)
                slot_to_page[slot], page_to_slot[page] = page, slot
                last_used[slot] = now
        claims = earned.use(step, misses[-1])
        recent.append([(claim, slot, now) for claim, slot in zip(claims, slots, strict=True)])
        if cycle is not None:
            for slot in slots:
                heapq.heappush(new, (-now, slot, now))
        trim(old)
        trim(new)
        start += length
    return misses
