"""replay(): how often a cache of a given capacity and policy would have hit on a routing trace.

A step is one token in one layer, as in decode of one sequence. All layers share one pool of slots,
which is empty at the start. A step's experts are served together: none of them is evicted by it,
and an expert that it names twice is one page. With ``lru`` this is what `qmoe_kernels.paging.admit`
does, to the slot: where every slot was used since its layer's last step, the most recently used
goes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qmoe.traces.trace import RoutingTrace

Policy = Literal["lru", "lfu", "belady"]
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
    trace: RoutingTrace, capacity: int, policy: Policy = "lru", *, warmup: int = 0
) -> Replay:
    """Run a trace through a cache.

    Args:
        trace: what was asked for.
        capacity: slots, at least trace.top_k.
        policy: which page goes when one has to: ``"lru"``, the least recently used, as
            `qmoe_kernels.paging` has it; ``"lfu"``, the one used least often since the start of the
            trace, whether it was in a slot or not; ``"belady"``, the one whose next use is farthest
            away, which no policy can beat (L. A. Belady, "A study of replacement algorithms for a
            virtual-storage computer", 1966).
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
        keep = _keep(pages, lengths, policy).tolist()
        for capacity in capacities:
            cycle = trace.num_layers if policy == "lru" else None
            steps = torch.tensor(_misses(pages.tolist(), keep, lengths.tolist(), capacity, cycle))
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


def _misses(
    pages: list[int],
    keep: list[int],
    lengths: list[int],
    capacity: int,
    cycle: int | None,
) -> list[int]:
    """Misses of each step in a pool of ``capacity`` slots.

    Slots wait in a heap for their eviction, as ``keep * capacity + slot``. A slot that is used
    again gets another entry; its earlier ones are out of date and skipped when they come up.

    Args:
        cycle: ``keep`` counts steps, and of slots that were all used in the last so many steps the
            most recently used goes: a second heap has them by ``-keep``. None: never.
    """
    page_to_slot: dict[int, int] = {}
    slot_to_page = [-1] * capacity
    empty = min(keep, default=0) - 1  # these go before all others
    claims: list[int | None] = [empty] * capacity  # of each slot; None while in use
    oldest = [empty * capacity + slot for slot in range(capacity)]
    newest: list[int] = []

    def first(heap: list[int], sign: int) -> int:
        """The slot whose entry comes first; it stays there."""
        while claims[heap[0] % capacity] != sign * (heap[0] // capacity):
            heapq.heappop(heap)
        return heap[0] % capacity

    misses = []
    start = 0
    for now, length in enumerate(lengths):
        step = pages[start : start + length]
        slots = [page_to_slot.get(page, -1) for page in step]
        misses.append(slots.count(-1))
        for slot in slots:
            if slot >= 0:
                claims[slot] = None
        for index, page in enumerate(step):
            if slots[index] < 0:
                slot = first(oldest, 1)
                claim = claims[slot]
                assert claim is not None
                if cycle is not None and claim > max(now - cycle, empty):
                    slot = first(newest, -1)
                slots[index] = slot
                page_to_slot.pop(slot_to_page[slot], None)
                slot_to_page[slot], page_to_slot[page] = page, slot
                claims[slot] = None
        for slot, claim in zip(slots, keep[start : start + length], strict=True):
            claims[slot] = claim
            heapq.heappush(oldest, claim * capacity + slot)
            if cycle is not None:
                heapq.heappush(newest, -claim * capacity + slot)
        start += length
    return misses
