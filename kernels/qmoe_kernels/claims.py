"""Claims: how long a page has earned to stay in a slot.

A clock ticks once per admission. A page's claim is a time of that clock, and of two pages the one
with the smaller claim goes first. With each use it becomes the middle between what it was and
``now + horizon``, and never less than now. So the first use after a long time earns nothing beyond
now: the page stays as long as the least recently used one would. A second use soon after earns half
a horizon, and no page is ever more than a horizon ahead. Time takes away what uses have earned.

The horizon is twice the turnover, the ticks in which as many pages are missed as there are slots,
and at most `HORIZON_CYCLES` times as many ticks as there are layers: a page whose text is over
stays no longer than that. Misses per tick are a running mean, kept as a fixed-point number.

The rule is of the family LRFU, between recency and frequency of use (D. Lee et al., "LRFU: a
spectrum of policies that subsumes the least recently used and least frequently used policies",
2001), but LRFU sums up uses whose weights shrink exponentially, by a rate that is chosen once,
where this is a bounded time whose bound follows the misses.

The kernels do the same with the same integers; nothing here is ever negative but the difference
that `next_rate` shifts, which rounds down everywhere.
"""

from __future__ import annotations

# Of a rate, misses per tick: so many bits lie behind the point, and the mean is over about
# 2**RATE_SHIFT ticks.
RATE_BITS, RATE_SHIFT = 16, 9
# Of these as many that what is divided has 31 bits: a GPU divides 64 bits by a subroutine.
DIVISOR_BITS = 10
# Where nothing was counted yet. As many misses as that earn pages little while slots fill.
FIRST_RATE = 8 << RATE_BITS
HORIZON_CYCLES = 64  # a cycle: every layer once


def max_horizon(num_layers: int) -> int:
    """What no horizon is longer than, in ticks."""
    return HORIZON_CYCLES * num_layers


def horizon_of(miss_rate: int, num_slots: int, num_layers: int) -> int:
    """Ticks that a claim may be ahead of the clock."""
    turnovers = (2 * num_slots << DIVISOR_BITS) // max(miss_rate >> RATE_BITS - DIVISOR_BITS, 1)
    return min(turnovers, max_horizon(num_layers))


def renewed(claim: int, now: int, horizon: int) -> int:
    """A page's claim after a use."""
    return max(now, (claim + now + horizon) // 2)


def next_rate(miss_rate: int, num_missing: int) -> int:
    """The rate after an admission that missed so many pages."""
    return miss_rate + (((num_missing << RATE_BITS) - miss_rate) >> RATE_SHIFT)
