"""How a budget of device memory is spent: what stays, KV cache, workspace, staging, slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmoe.sizes import format_size, parse_size

if TYPE_CHECKING:
    from qmoe.experts.pages import LayerPages

# "auto" leaves this much of what is free to what torch's allocator does not count: kernels' code,
# libraries' handles, gaps between blocks.
AUTO_FRACTION = 0.95
# Of what is left above the smallest budget, so much goes to a larger prefill chunk, and as much to
# larger staging buffers; slots get the rest.
SHARE = 8
SMALLEST_CHUNK, LARGEST_CHUNK = 64, 8192


@dataclass(frozen=True)
class Budget:
    """A budget and how it is spent; all sizes in bytes.

    Attributes:
        total: the budget.
        context: tokens per sequence that it is made for, new ones included.
        batch_size: sequences at a time.
        resident: weights that stay: everything but pages, and in a model that fits, pages too.
        kv_cache: keys, values and states of ``batch_size`` sequences of ``context`` tokens.
        workspace: an upper bound of what one step allocates, of a chunk or of one token each.
        staging: both staging buffers.
        slots: the pool.
        num_slots: pages in the pool; 0 if all are resident.
        num_staging: pages in one staging buffer; 0 if all are resident.
        chunk: tokens of each sequence in one step of prefill.
        all_resident: whether every expert stays on the device, and nothing is paged.
    """

    total: int
    context: int
    batch_size: int
    resident: int
    kv_cache: int
    workspace: int
    staging: int
    slots: int
    num_slots: int
    num_staging: int
    chunk: int
    all_resident: bool


def parse_budget(hbm_budget: str | int | float, total: int, free: int) -> int:
    """Turn what a user writes into bytes.

    Args:
        hbm_budget: bytes; ``"16GiB"``, ``"16GB"``; a fraction of the device's memory (0.5,
            ``"0.5"``, ``"50%"``); or ``"auto"``, what is free less a reserve.
        total: bytes of the device.
        free: bytes of it that this model may take, those that it holds already included.

    Raises:
        ValueError: no size, or one beyond what is free.
    """
    budget = _parse(hbm_budget, total, free)
    if budget > free:
        raise ValueError(
            f"hbm_budget={hbm_budget!r} is {budget} bytes, and of the device's "
            f"{format_size(total)} only {free} bytes are free for this model; 'auto' takes those"
        )
    return budget


def check_budget(hbm_budget: str | int | float) -> None:
    """Raise ValueError if a budget is written in a way that nobody reads."""
    _parse(hbm_budget, 1, 1)


def _parse(hbm_budget: str | int | float, total: int, free: int) -> int:
    text = str(hbm_budget).strip()
    if text.lower() == "auto":
        return int(free * AUTO_FRACTION)
    with suppress(ValueError):
        return parse_size(hbm_budget)
    with suppress(ValueError):
        fraction = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if 0 < fraction <= 1 and not isinstance(hbm_budget, bool):
            return int(total * fraction)
    raise ValueError(
        f"hbm_budget={hbm_budget!r}; write a size ('16GiB', '16GB', or bytes as a whole number), "
        "a fraction of the device's memory (0.5 or '50%'), or 'auto'"
    )


def divide_budget(
    layers: Sequence[LayerPages],
    top_k: Sequence[int],
    *,
    total: int,
    resident: int,
    kv_cache: int,
    workspace: Callable[[int], int],
    context: int,
    batch_size: int,
) -> Budget:
    """Divide a budget.

    The smallest one that works holds the weights that stay, the KV cache, the workspace of the
    smallest chunk, two staging buffers of top_k pages and one token's cycle: what one step of every
    layer is routed to. Below that, each page would be evicted before it is wanted again.

    Args:
        layers: the geometry of every layer's pages.
        top_k: pages that one token is routed to, by layer.
        total: the budget in bytes.
        resident: bytes of weights that stay, scales and biases of experts included.
        kv_cache: bytes for ``batch_size`` sequences of ``context`` tokens.
        workspace: chunk -> bytes of a step of so many tokens per sequence; grows with it.
        context: tokens per sequence.
        batch_size: sequences.

    Raises:
        ValueError: the budget is too small; says what the smallest is and what it consists of.
    """
    slot = max(layer.page_stride for layer in layers)
    num_pages = sum(layer.num_experts for layer in layers)
    experts = sum(layer.num_experts * layer.page_bytes for layer in layers)
    cycle = sum(min(k * batch_size, p.num_experts) for k, p in zip(top_k, layers, strict=True))
    num_staging = max(1, *(min(k, p.num_experts) for k, p in zip(top_k, layers, strict=True)))
    chunks = _chunks(context)
    least = resident + kv_cache + workspace(chunks[0])
    paged = (cycle + 2 * num_staging) * slot
    all_resident = total >= least + experts
    num_slots = 0
    if all_resident:
        resident += experts
        num_staging = 0
        chunk = _largest(chunks, workspace, total - resident - kv_cache)
    elif total < least + paged:
        raise ValueError(
            f"an HBM budget of {total} bytes is too small; the smallest that works is "
            + _smallest(
                {
                    "weights that stay": resident,
                    f"KV cache (context={context}, batch_size={batch_size})": kv_cache,
                    "workspace": workspace(chunks[0]),
                    f"the {cycle} experts of one token's cycle and 2 x {num_staging} to stream"
                    if paged < experts
                    else f"all {num_pages} experts": min(paged, experts),
                }
            )
        )
    else:
        share = (total - least - paged) // SHARE
        chunk = _largest(chunks, workspace, workspace(chunks[0]) + share)
        most = max(layer.num_experts for layer in layers)
        num_staging = min(most, num_staging + share // (2 * slot))
        left = total - resident - kv_cache - workspace(chunk) - 2 * num_staging * slot
        num_slots = min(num_pages, left // slot)
    return Budget(
        total=total,
        context=context,
        batch_size=batch_size,
        resident=resident,
        kv_cache=kv_cache,
        workspace=workspace(chunk),
        staging=2 * num_staging * slot,
        slots=num_slots * slot,
        num_slots=num_slots,
        num_staging=num_staging,
        chunk=chunk,
        all_resident=all_resident,
    )


def _smallest(parts: dict[str, int]) -> str:
    """The sum of a budget's parts, and what each of them is for; the last one are experts."""
    total = sum(parts.values())
    *spent, experts = (f"{format_size(nbytes)} of {what}" for what, nbytes in parts.items())
    listed = ", ".join([*spent, experts.replace(" of ", " for ", 1)])
    return f"{format_size(total)} ({total} bytes): {listed}"


def _chunks(context: int) -> list[int]:
    """Sizes that a prefill chunk can have: powers of two, and a short context as a whole."""
    largest = min(LARGEST_CHUNK, context)
    powers = (1 << exponent for exponent in range(SMALLEST_CHUNK.bit_length() - 1, 14))
    return [*(power for power in powers if power < largest), largest]


def _largest(chunks: list[int], workspace: Callable[[int], int], limit: int) -> int:
    return max((c for c in chunks if workspace(c) <= limit), default=chunks[0])
