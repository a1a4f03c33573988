"""Native loops for the processor: products of few rows with 8-bit experts, and quantization.

`native` compiles what `loops` and `dots` say and runs it; this module calls it with tensors. Only
`qmoe_kernels.fused_moe` and `qmoe_kernels.quantization` enter, and do without where `available`
says no. Nothing here imports numba before a loop is needed that the user's cache does not have.
"""

from __future__ import annotations

from array import array
from functools import lru_cache

import torch
from torch import Tensor

from qmoe_kernels.activations import Activation
from qmoe_kernels.cpu import native
from qmoe_kernels.experts import Projection

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # loops know a dtype by its place
NAMES = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

LANES = 16  # of a vector; fp32 rows are as long as a multiple of it
ROWS_AT_ONCE = 4  # of weights, that the processor reads side by side
# Weights that a thread claims at a time: a hundredth of a millisecond.
ITEM_BYTES = 1 << 17
# Up to so many rows of one expert the loops are quicker than torch's matrix product.
FEW_ROWS = 32
# Values of a sum over experts that are worth a thread.
SUM_SIZE = 1 << 17


def available(*weights: Tensor) -> bool:
    """Whether the loops multiply with these weights on this machine; the first no warns why."""
    if any(w.dtype not in (torch.int8, torch.float8_e4m3fn) for w in weights):
        return False
    return native.address_of("product") is not None


@lru_cache
def multiplies_bf16() -> bool:
    """Whether the processor's products of bf16 are quicker than those of fp32."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class Routing:
    """Pairs by expert: first the experts with few rows, for `product`, then the others.

    Attributes:
        num_few, num_routed: experts of the former kind, and of both.
        num_pairs: of the former kind's.
    """

    def __init__(self, topk_ids: Tensor, num_experts: int, expert_to_slot: Tensor | None) -> None:
        ids = topk_ids.contiguous()
        slots = None if expert_to_slot is None else expert_to_slot.contiguous()
        pairs, most = ids.numel(), min(ids.numel(), num_experts)
        sizes = [3, num_experts, pairs, pairs, pairs, most + 1, most, most]
        self._tables = array("q", bytes(8 * sum(sizes)))
        self._begins = [sum(sizes[:i]) for i in range(len(sizes))]
        base = self._tables.buffer_info()[0]
        addresses = [base + 8 * begin for begin in self._begins]
        self.pairs, self.tokens, self.order, self.offsets, self.experts, self.slots = addresses[2:]
        native.run(
            "group",
            [
                ids.data_ptr(),
                ids.itemsize,
                pairs,
                ids.shape[1],
                num_experts,
                _address(slots),
                FEW_ROWS,
                *addresses,
            ],
            items=1,
        )
        self.num_few, self.num_routed, missing = self._tables[:3]
        if missing >= 0:
            raise ValueError(
                f"expert {missing} is routed to but has no slot "
                f"(expert_to_slot is {int(expert_to_slot[missing])})"  # type: ignore[index]
            )
        self.num_pairs = self._tables[self._begins[5] + self.num_few]

    def many(self) -> list[tuple[int, int, list[int]]]:
        """(expert, slot, its pairs) of each expert with many rows."""
        _, _, pairs, _, _, offsets, experts, slots = self._begins
        table = self._tables
        return [
            (
                table[experts + i],
                table[slots + i],
                table[pairs + table[offsets + i] : pairs + table[offsets + i + 1]].tolist(),
            )
            for i in range(self.num_few, self.num_routed)
        ]


def padded(rows: Tensor) -> Tensor:
    """Rows, (num_rows, columns) of any dtype, in fp32, with zeros up to a multiple of 16."""
    if rows.shape[1] % LANES == 0:
        return rows.to(torch.float32).contiguous()
    out = room(rows, rows.shape[0], rows.shape[1])
    out[:, : rows.shape[1]] = rows
    return out


def room(like: Tensor, num_rows: int, columns: int) -> Tensor:
    """Room for `padded` rows."""
    out = like.new_empty(num_rows, -(-columns // LANES) * LANES, dtype=torch.float32)
    if out.shape[1] != columns:
        out[:, columns:] = 0
    return out


def product(
    rows: Tensor,  # (num_rows, in_features up to a multiple of 16) fp32, `padded`
    row_scales: Tensor | None,  # (num_rows,) fp32
    sources: int,  # the address of a table of `routing`: of each pair, which of `rows`
    routing: Routing,
    projection: Projection,
    out: Tensor,  # (num_out, at least out_features or intermediate_size) fp32
    targets: int,  # of each pair, which row of `out`
    activation: Activation | None = None,
    round_to: torch.dtype = torch.float32,
) -> None:
    """Fill ``out`` with ``activation(projection(rows))`` of the experts with few rows.

    Sums are fp32 and the same whatever the threads and the other pairs are; results are rounded to
    the numbers of ``round_to``.
    """
    weight, scale, bias = projection.weight, projection.scale, projection.bias
    assert scale is not None
    parts = 2 if activation is not None and activation.gated else 1
    channels, columns = weight.shape[1] // parts, weight.shape[2]
    if not routing.num_few or not channels:
        return
    scale = scale.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype in DTYPES else bias.float()).contiguous()
    sums = rows.new_empty(routing.num_pairs, weight.shape[1])
    size = max(1, ITEM_BYTES // (max(1, columns) * parts * ROWS_AT_ONCE)) * ROWS_AT_ONCE
    blocks = -(-channels // size)
    items = routing.num_few * blocks
    flags, numbers = (0, 0) if activation is None else _gate(activation)[:2]
    native.run(
        "product",
        [
            items,
            blocks,
            size,
            channels,
            parts,
            weight.data_ptr(),
            weight.stride(0),
            weight.stride(1),
            columns,
            rows.data_ptr(),
            4 * rows.shape[1],
            sources,
            routing.offsets,
            routing.experts,
            routing.slots,
            scale.data_ptr(),
            _address(bias),
            0 if bias is None else DTYPES.index(bias.dtype),
            _address(row_scales),
            out.data_ptr(),
            4 * out.shape[1],
            targets,
            DTYPES.index(round_to),
            sums.data_ptr(),
            flags,
            numbers,
            _dots(weight.dtype == torch.float8_e4m3fn)[0],
        ],
        items,
    )


def weighted_sum(
    rows: Tensor,  # (num_tokens, top_k, columns) bf16 | fp16 | fp32
    topk_weights: Tensor,  # (num_tokens, top_k) float
    topk_ids: Tensor | None = None,  # (num_tokens, top_k) int32 | int64
    num_experts: int = 0,
) -> Tensor:
    """Sum the rows of each token by its weights, in fp32, first expert to last.

    Rows of ids outside [0, num_experts) do not count, if there are ids.

    Returns:
        (num_tokens, columns) fp32.
    """
    num_tokens, top_k, columns = rows.shape
    out = rows.new_empty(num_tokens, columns, dtype=torch.float32)
    weights = topk_weights.to(torch.float32).contiguous()
    rows = rows.contiguous()
    ids = None if topk_ids is None else topk_ids.contiguous()
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
            _address(ids),
            8 if ids is None else ids.itemsize,
            num_experts,
        ],
        min(num_tokens, 1 + rows.numel() // SUM_SIZE),
    )
    return out


def widen(q: Tensor, *, out: Tensor) -> Tensor:
    """Copy a weight, (rows, columns) int8 or e4m3fn, columns contiguous, to bf16; exact."""
    fp8 = q.dtype == torch.float8_e4m3fn
    arguments = [*q.shape, int(fp8), q.data_ptr(), q.stride(0), out.data_ptr()]
    native.run("widen", arguments, q.shape[0])
    return out


def narrows(weight: Tensor) -> bool:
    """Whether `quantize_rows` and `wrong_rows` take rows of this dtype and these strides."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in DTYPES
        and (weight.stride(-1) == 1 or weight.shape[-1] == 1)
        and native.address_of("quantize") is not None
    )


def quantize_rows(
    weight: Tensor,  # (rows, columns) bf16 | fp16 | fp32, columns contiguous
    q: Tensor,  # (rows, columns) int8 | e4m3fn, contiguous
    scale: Tensor,  # (rows,) fp32, contiguous
    sampled_rows: int = 0,
) -> list[float]:
    """Fill ``q`` and ``scale`` as `quantization` says, in one pass over memory.

    Rows with a NaN or an infinity get such a scale, and nothing in ``q``.

    Returns:
        ``|q * scale - weight|**2`` and ``|weight|**2`` over every ``sampled_rows``-th row, if not
        0; the same for any number of threads.
    """
    rows, columns = weight.shape
    threads = max(1, min(torch.get_num_threads(), rows))
    scratch = scale.new_empty(threads, columns)
    squares = None
    if sampled_rows:
        squares = scale.new_zeros(-(-rows // sampled_rows), 2, dtype=torch.float64)
    arguments = _rows_and_codes(weight, q, scale, scratch)
    native.run("quantize", [*arguments, _address(squares), sampled_rows], threads, threads)
    if squares is None:
        return []
    unit = scale[::sampled_rows, None].double()
    return [float(total) for total in (squares * unit.square()).sum(0)]


def wrong_rows(
    source: Tensor,  # (rows, columns) bf16 | fp16 | fp32, columns contiguous
    q: Tensor,  # (rows, columns) int8 | e4m3fn, contiguous
    scale: Tensor,  # (rows,) fp32, contiguous
    relative: float,
    absolute: float,
) -> Tensor:
    """Which rows hold a number further from ``source`` than rounding, as bool (rows,).

    Rounding is off by ``relative`` of the number and by ``absolute``, in units of the scale.
    """
    rows, columns = source.shape
    threads = max(1, min(torch.get_num_threads(), rows))
    scratch = scale.new_empty(threads, columns)
    limits = scale.new_tensor([relative, absolute])
    wrong = torch.empty_like(scale, dtype=torch.bool)
    arguments = _rows_and_codes(source, q, scale, scratch)
    native.run("compare", [*arguments, limits.data_ptr(), wrong.data_ptr()], threads, threads)
    return wrong


def _rows_and_codes(rows: Tensor, q: Tensor, scale: Tensor, scratch: Tensor) -> list[int]:
    return [
        *rows.shape,
        DTYPES.index(rows.dtype),
        int(q.dtype == torch.float8_e4m3fn),
        rows.data_ptr(),
        rows.stride(0) * rows.itemsize,
        q.data_ptr(),
        scale.data_ptr(),
        scratch.data_ptr(),
    ]


@lru_cache
def _dots(fp8: bool) -> tuple[int, array[int]]:
    """The address of the table of dot products that `loops.multiply` takes, and the table."""
    single, *blocks = (b for b in native.DOTS_BY_WIDTH[native.is_wide()] if b[0] == fp8)
    table = [native.address_of(native.dots_name(*single)) or 0]
    for block in blocks:
        table += [native.address_of(native.dots_name(*block)) or 0, block[1]]
    kept = array("q", table)
    return kept.buffer_info()[0], kept


@lru_cache
def _gate(a: Activation) -> tuple[int, int, array[int], array[float]]:
    """The addresses of the flags and numbers that `loops.gated` takes, and these."""
    limited = 0 if a.limit is None else 2 if a.limit_after else 1
    caps = (a.gate_softcap, a.up_softcap)
    flags = array("q", [NAMES.index(a.name), a.gated, limited, *(c is not None for c in caps)])
    numbers = array("f", [a.alpha, a.up_shift, a.limit or 0.0, *(c or 1.0 for c in caps)])
    return flags.buffer_info()[0], numbers.buffer_info()[0], flags, numbers


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
