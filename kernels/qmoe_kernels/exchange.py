"""Exchanges between the GPUs of one host: each writes to the others' memory, in one launch.

A rank writes its rows where each other rank reads them, then a number; and goes on when it has the
others' numbers. Program ``i`` of every rank handles the same slices, so that it waits for program
``i`` of the others and for no other.

A slot is written again in the exchange after the next one. By then its reader has begun the next
one, which it does when it has ended this one: so nobody needs to say that a slot was read.

Unlike a layer's kernels these start when all before them has ended, and no earlier: rows may come
from a copy, which a kernel that starts early would not wait for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qmoe_kernels.launching import COMPILED
from qmoe_kernels.signals import store_released, wait_until

# Of one kernel: all of them must run at the same time, on every GPU.
MAX_PROGRAMS = 64
_BLOCK = 2048
_ALIGNED = 16
_PAUSE_NS = tl.constexpr(20)
# Columns of PeerMemory.state.
NUMBER, ENDED, FAILED = range(3)
_NUMBER, _ENDED, _FAILED = tl.constexpr(NUMBER), tl.constexpr(ENDED), tl.constexpr(FAILED)


@dataclass(frozen=True)
class PeerMemory:
    """Memory of every rank that all of them can write to.

    Each rank's begins with zeros: numbers, (`MAX_PROGRAMS`, size) int64, that programs of the
    others have written; then slots, (2, size, ``slot_bytes``), two for each rank that writes.

    Attributes:
        rank, size: of this rank, and of all.
        addresses: (size,) int64 on the device, of each rank's memory, as this rank sees it.
        state: (3,) int64 on the device: exchanges so far, programs of this one that have ended, and
            whether one gave up. From then on nothing waits.
        failed: (1,) int64 that the host can read, 1 once an exchange gave up.
        slot_bytes: what one rank may write to another in one exchange; a multiple of 16.
        limit_ns: nanoseconds after which a rank that does not come is given up.
    """

    rank: int
    size: int
    addresses: Tensor
    state: Tensor
    failed: Tensor
    slot_bytes: int
    limit_ns: int

    @staticmethod
    def num_bytes(size: int, slot_bytes: int) -> int:
        """Bytes of one rank's memory."""
        return MAX_PROGRAMS * size * 8 + 2 * size * slot_bytes


def gathered_bytes(num_rows: int, hidden_size: int, top_k: int, dtype: torch.dtype) -> int:
    """Bytes that a rank writes to another in `launch_gather`."""
    return _sections(num_rows, hidden_size, top_k, dtype)[2]


def _sections(
    num_rows: int, hidden_size: int, top_k: int, dtype: torch.dtype
) -> tuple[int, int, int]:
    """Where ids and weights begin in a slot, and where they end."""
    ids = -(-num_rows * hidden_size * dtype.itemsize // _ALIGNED) * _ALIGNED
    weights = ids + -(-num_rows * top_k * 4 // _ALIGNED) * _ALIGNED
    return ids, weights, weights + num_rows * top_k * 4


def launch_sum(output: Tensor, peers: PeerMemory, *, scatter: bool = False) -> Tensor:
    """Add up the ranks' outputs in fp32, first rank to last, and round once.

    Args:
        output: of this rank; any shape, contiguous, bf16, fp16 or fp32.
        scatter: sum only what is this rank's: the first dimension is split between the ranks.

    Returns:
        as ``output``, or its part; NaN where another rank did not come.
    """
    parts = peers.size if scatter else 1
    out = output.new_empty(len(output) // parts, *output.shape[1:])
    num = out.numel()
    sum_kernel[(min(MAX_PROGRAMS, triton.cdiv(num, _BLOCK)),)](
        output,
        out,
        peers.addresses,
        peers.state,
        peers.failed,
        num,
        peers.limit_ns,
        RANK=peers.rank,
        SIZE=peers.size,
        SCATTER=scatter,
        FIRST_SLOT=MAX_PROGRAMS * peers.size * 8,
        SLOT_BYTES=peers.slot_bytes,
        BLOCK=_BLOCK,
        ON_GPU=COMPILED,
        num_warps=8,
    )
    return out


def launch_gather(
    rows: Tensor,  # (num_rows, hidden_size) bf16 | fp16 | fp32
    topk_ids: Tensor,  # (num_rows, top_k) int32 | int64
    topk_weights: Tensor,  # (num_rows, top_k) float
    most_rows: int,
    peers: PeerMemory,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring together what the ranks give to a layer, one rank's behind the other's.

    Args:
        most_rows: that each rank is to have in the result, at least its ``num_rows``; those that it
            lacks are zeros, and their ids -1.

    Returns:
        rows (size * most_rows, hidden_size), ids int32 and weights fp32 (size * most_rows, top_k).
    """
    (num_rows, hidden_size), top_k = rows.shape, topk_ids.shape[1]
    num_out = peers.size * most_rows
    out = (
        rows.new_empty(num_out, hidden_size),
        topk_ids.new_empty(num_out, top_k, dtype=torch.int32),
        topk_weights.new_empty(num_out, top_k, dtype=torch.float32),
    )
    ids_at, weights_at, _ = _sections(most_rows, hidden_size, top_k, rows.dtype)
    gather_kernel[(min(MAX_PROGRAMS, triton.cdiv(most_rows * hidden_size, _BLOCK)),)](
        rows.contiguous(),
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        *out,
        peers.addresses,
        peers.state,
        peers.failed,
        num_rows,
        most_rows,
        hidden_size,
        top_k,
        ids_at,
        weights_at,
        peers.limit_ns,
        RANK=peers.rank,
        SIZE=peers.size,
        FIRST_SLOT=MAX_PROGRAMS * peers.size * 8,
        SLOT_BYTES=peers.slot_bytes,
        BLOCK=_BLOCK,
        ON_GPU=COMPILED,
        num_warps=8,
    )
    return out


@triton.jit
def _slot(
    addresses_ptr,
    owner,
    writer,
    number,
    offset,
    dtype: tl.constexpr,
    SIZE: tl.constexpr,
    FIRST_SLOT: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
):
    """Where ``writer`` writes in the memory of ``owner`` in an exchange of this number."""
    place = (number % 2) * SIZE + writer
    address = tl.load(addresses_ptr + owner) + FIRST_SLOT + place * SLOT_BYTES + offset
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _copy(x_ptr, to_ptr, num, num_to, FILL: tl.constexpr, BLOCK: tl.constexpr):
    """Copy this program's slices of ``num`` numbers, then FILL up to ``num_to``."""
    for start in range(tl.program_id(0) * BLOCK, num_to, tl.num_programs(0) * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets, mask=offsets < num, other=FILL)
        tl.store(to_ptr + offsets, x.to(to_ptr.dtype.element_ty), mask=offsets < num_to)


@triton.jit
def _meet(
    addresses_ptr,
    state_ptr,
    failed_ptr,
    number,
    limit_ns,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """Tell this program's counterparts that it has written, and wait for them; whether one failed.

    Of a rank that is gone everything after would wait, layer by layer: only the first does.
    """
    counter = (tl.program_id(0) * SIZE).to(tl.int64) * 8
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            address = tl.load(addresses_ptr + peer) + counter + RANK * 8
            store_released(address.to(tl.pointer_type(tl.int64)), number, ON_GPU)
    failed = tl.load(state_ptr + _FAILED) != 0
    limit = tl.where(failed, 0, number * 0 + limit_ns)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            address = tl.load(addresses_ptr + RANK) + counter + peer * 8
            waited = wait_until(
                address.to(tl.pointer_type(tl.int64)), number, limit, _PAUSE_NS, ON_GPU
            )
            failed = failed | (waited < 0)
    tl.debug_barrier()
    if failed:
        tl.store(state_ptr + _FAILED, 1)
        tl.store(failed_ptr, 1)
    return failed


@triton.jit
def _end(state_ptr, number):
    """Count an exchange once all of its programs have begun, and so know its number."""
    tl.debug_barrier()
    ended = tl.atomic_add(state_ptr + _ENDED, 1)
    if ended == tl.num_programs(0) - 1:
        tl.store(state_ptr + _ENDED, 0)
        tl.store(state_ptr + _NUMBER, number)


@triton.jit(do_not_specialize=["limit_ns"])
def sum_kernel(
    x_ptr,  # (num,), or (SIZE, num) to be scattered
    out_ptr,  # (num,)
    addresses_ptr,  # (SIZE,) int64
    state_ptr,  # (3,) int64
    failed_ptr,  # (1,) int64, the host's
    num,
    limit_ns,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    SCATTER: tl.constexpr,
    FIRST_SLOT: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """Grid: (up to MAX_PROGRAMS,)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    number = tl.load(state_ptr + _NUMBER) + 1
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            to_ptr = _slot(
                addresses_ptr, peer, RANK, number, 0, dtype, SIZE, FIRST_SLOT, SLOT_BYTES
            )
            from_ptr = x_ptr
            if SCATTER:
                from_ptr = x_ptr + peer * num
            _copy(from_ptr, to_ptr, num, num, 0, BLOCK)
    failed = _meet(addresses_ptr, state_ptr, failed_ptr, number, limit_ns, RANK, SIZE, ON_GPU)
    for start in range(tl.program_id(0) * BLOCK, num, tl.num_programs(0) * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < num
        acc = tl.zeros((BLOCK,), dtype=tl.float32)
        for source in tl.static_range(SIZE):
            if source == RANK:
                from_ptr = x_ptr
                if SCATTER:
                    from_ptr = x_ptr + RANK * num
                acc += tl.load(from_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            else:
                slot_ptr = _slot(
                    addresses_ptr, RANK, source, number, 0, dtype, SIZE, FIRST_SLOT, SLOT_BYTES
                )
                acc += tl.load(slot_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        acc = tl.where(failed, float("nan"), acc)
        tl.store(out_ptr + offsets, acc.to(dtype), mask=mask)
    _end(state_ptr, number)


@triton.jit(do_not_specialize=["num_rows", "most_rows", "limit_ns"])
def gather_kernel(
    rows_ptr,  # (num_rows, hidden_size)
    ids_ptr,  # (num_rows, top_k)
    weights_ptr,  # (num_rows, top_k)
    out_rows_ptr,  # (SIZE * most_rows, hidden_size)
    out_ids_ptr,  # (SIZE * most_rows, top_k) int32
    out_weights_ptr,  # (SIZE * most_rows, top_k) fp32
    addresses_ptr,  # (SIZE,) int64
    state_ptr,  # (3,) int64
    failed_ptr,  # (1,) int64, the host's
    num_rows,
    most_rows,
    hidden_size,
    top_k,
    ids_at,  # in a slot, in bytes
    weights_at,
    limit_ns,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    FIRST_SLOT: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """Grid: (up to MAX_PROGRAMS,)."""
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    number = tl.load(state_ptr + _NUMBER) + 1
    num, most = num_rows * hidden_size, most_rows * hidden_size
    num_pairs, most_pairs = num_rows * top_k, most_rows * top_k
    for peer in tl.static_range(SIZE):
        if peer == RANK:
            to_rows_ptr = out_rows_ptr + RANK * most
            to_ids_ptr = out_ids_ptr + RANK * most_pairs
            to_weights_ptr = out_weights_ptr + RANK * most_pairs
        else:
            to_rows_ptr = _slot(
                addresses_ptr, peer, RANK, number, 0, dtype, SIZE, FIRST_SLOT, SLOT_BYTES
            )
            to_ids_ptr = _slot(
                addresses_ptr, peer, RANK, number, ids_at, tl.int32, SIZE, FIRST_SLOT, SLOT_BYTES
            )
            to_weights_ptr = _slot(
                addresses_ptr, peer, RANK, number, weights_at, tl.float32, SIZE, FIRST_SLOT,
                SLOT_BYTES,
            )  # fmt: skip
        _copy(rows_ptr, to_rows_ptr, num, most, 0, BLOCK)
        _copy(ids_ptr, to_ids_ptr, num_pairs, most_pairs, -1, BLOCK)
        _copy(weights_ptr, to_weights_ptr, num_pairs, most_pairs, 0, BLOCK)
    _meet(addresses_ptr, state_ptr, failed_ptr, number, limit_ns, RANK, SIZE, ON_GPU)
    for source in tl.static_range(SIZE):
        if source != RANK:
            slot_ptr = _slot(
                addresses_ptr, RANK, source, number, 0, dtype, SIZE, FIRST_SLOT, SLOT_BYTES
            )
            _copy(slot_ptr, out_rows_ptr + source * most, most, most, 0, BLOCK)
            slot_ids_ptr = _slot(
                addresses_ptr, RANK, source, number, ids_at, tl.int32, SIZE, FIRST_SLOT, SLOT_BYTES
            )
            to_ids_ptr = out_ids_ptr + source * most_pairs
            _copy(slot_ids_ptr, to_ids_ptr, most_pairs, most_pairs, 0, BLOCK)
            slot_weights_ptr = _slot(
                addresses_ptr, RANK, source, number, weights_at, tl.float32, SIZE, FIRST_SLOT,
                SLOT_BYTES,
            )  # fmt: skip
            to_weights_ptr = out_weights_ptr + source * most_pairs
            _copy(slot_weights_ptr, to_weights_ptr, most_pairs, most_pairs, 0, BLOCK)
    _end(state_ptr, number)
