"""Native loops for the processor: products of few rows with 8-bit experts, and quantization.

`native` compiles what `loops` and `dots` say and runs it; this module calls it with tensors. Only
`qmoe_kernels.fused_moe` and `qmoe_kernels.quantization` enter, and do without where `available`
says no. Nothing here imports numba before a loop is needed that the user's cache does not have.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from qmoe_kernels.activations import Activation
from qmoe_kernels.cpu import native
from qmoe_kernels.experts import Projection

LANES = 16  # of a vector; fp32 rows are as long as a multiple of it
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # a loop has a dtype's place here
NAMES = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
# Weights of an item of work: a hundredth of a millisecond.
ITEM_BYTES = 1 << 17
ROWS_AT_ONCE = 4  # of weights
# Rows of one expert from which on torch's matrix product is quicker than the loops.
FEW_ROWS = 32


@dataclass(frozen=True)
class Routed:
    """One expert that tokens are routed to: its number, its slot, and its pairs."""

    expert: int
    slot: int
    pairs: list[int]


def available(*weights: Tensor) -> bool:
    """Whether the loops multiply with these weights, on this machine; warns once if it cannot."""
    if any(w.dtype not in (torch.int8, torch.float8_e4m3fn) for w in weights):
        return False
    return native.address_of("product") is not None


def padded(rows: Tensor) -> Tensor:
    """Rows, (num_rows, columns) of any dtype, in fp32, with zeros up to a multiple of 16."""
    columns = rows.shape[1]
    if columns % LANES == 0:
        return rows.to(torch.float32).contiguous()
    out = rows.new_zeros(rows.shape[0], -(-columns // LANES) * LANES, dtype=torch.float32)
    out[:, :columns] = rows
    return out


def room(num_rows: int, columns: int) -> Tensor:
    """Room for `padded` rows."""
    size = -(-columns // LANES) * LANES
    out = torch.empty(num_rows, size, dtype=torch.float32, device="cpu")
    out[:, columns:] = 0
    return out


@lru_cache
def multiplies_bf16() -> bool:
    """Whether the processor's products of bf16 are quicker than those of fp32."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def product(
    rows: Tensor,  # (num_rows, in_features up to a multiple of 16) fp32, `padded`
    row_scales: Tensor | None,  # (num_rows,) fp32
    sources: Sequence[int],  # of each pair of `routed`, one expert's after the other: its row
    routed: Sequence[Routed],
    projection: Projection,
    out: Tensor,  # (num_out, at least out_features or intermediate_size) fp32
    targets: Sequence[int],  # of each pair: its row of `out`
    activation: Activation | None = None,
) -> None:
    """Fill ``out`` with ``activation(projection(rows))`` of every routed pair.

    Sums are fp32 and the same whatever the threads and the other pairs are.
    """
    weight = projection.weight
    parts = 2 if activation is not None and activation.gated else 1
    channels = weight.shape[1] // parts
    if not targets or not channels:
        return
    scale = _contiguous(projection.scale)
    bias = projection.bias
    if bias is not None:
        bias = bias[[r.expert for r in routed]].to(torch.float32).contiguous()
    sums = rows.new_empty(len(targets), weight.shape[1])
    if row_scales is not None:
        row_scales = row_scales[list(sources)]
    row_bytes = max(1, weight.stride(1))
    size = max(1, ITEM_BYTES // (max(1, weight.shape[2]) * parts * ROWS_AT_ONCE)) * ROWS_AT_ONCE
    blocks = -(-channels // size)
    fp8, wide = weight.dtype == torch.float8_e4m3fn, native.is_wide()
    tables = [
        array("q", numbers)
        for numbers in (
            _addresses(rows, sources),
            accumulate((len(r.pairs) for r in routed), initial=0),
            (r.expert for r in routed),
            (r.slot for r in routed),
            _addresses(out, targets),
            _dots(fp8, wide),
        )
    ]
    from_rows, offsets, experts, slots, to_rows, dots = (t.buffer_info()[0] for t in tables)
    flags, numbers = (None, None) if activation is None else _gate(activation)
    native.run(
        "product",
        [
            len(routed) * blocks,
            blocks,
            size,
            channels,
            parts,
            weight.data_ptr(),
            weight.stride(0),
            row_bytes,
            weight.shape[2],
            from_rows,
            offsets,
            experts,
            slots,
            scale.data_ptr(),
            _address(bias),
            _address(row_scales),
            to_rows,
            sums.data_ptr(),
            0 if flags is None else flags.buffer_info()[0],
            0 if numbers is None else numbers.buffer_info()[0],
            dots,
        ],
        items=len(routed) * blocks,
    )


def weighted_sum(rows: Tensor, topk_weights: Tensor) -> Tensor:
    """What `fused_moe.weighted_sum` says."""
    num_tokens, top_k, columns = rows.shape
    out = rows.new_empty(num_tokens, columns, dtype=torch.float32)
    weights = topk_weights.to(torch.float32).contiguous()
    rows = rows.contiguous()
    native.run(
        "weighted_sum",
        [
            num_tokens,
            top_k,
            columns,
            DTYPES.index(rows.dtype),
            rows.data_ptr(),
            weights.data_ptr(),
            out.data_ptr(),
        ],
        # One token is done before another thread would have begun.
        items=1 + rows.numel() // (1 << 17),
    )
    return out.to(rows.dtype)


def widen(q: Tensor) -> Tensor:
    """A weight, (rows, columns) int8 or e4m3fn, in bf16; exact."""
    out = torch.empty_like(q, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    native.run(
        "widen",
        [
            q.shape[0],
            q.shape[1],
            int(q.dtype == torch.float8_e4m3fn),
            q.data_ptr(),
            q.stride(0),
            out.data_ptr(),
        ],
        items=q.shape[0],
    )
    return out


@lru_cache
def _dots(fp8: bool, wide: bool) -> list[int]:
    single, *blocks = (b for b in native.DOTS_BY_WIDTH[wide] if b[0] == fp8)
    addresses = [native.address_of(native.dots_name(*single)) or 0]
    for block in blocks:
        addresses += [native.address_of(native.dots_name(*block)) or 0, block[1]]
    return addresses


@lru_cache
def _gate(a: Activation) -> tuple[array[int], array[float]]:
    limited = 0 if a.limit is None else 2 if a.limit_after else 1
    caps = (a.gate_softcap, a.up_softcap)
    flags = [NAMES.index(a.name), a.gated, limited, *(cap is not None for cap in caps)]
    numbers = [a.alpha, a.up_shift, a.limit or 0.0, *(cap or 1.0 for cap in caps)]
    return array("q", flags), array("f", numbers)


def _addresses(rows: Tensor, which: Sequence[int]) -> list[int]:
    first, step = rows.data_ptr(), rows.stride(0) * rows.itemsize
    return [first + step * row for row in which]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.contiguous()
