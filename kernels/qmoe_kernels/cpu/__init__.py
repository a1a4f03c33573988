"""Native loops for the processor: products of few rows, and quantization.

`native` compiles what `loops` and `dots` say and runs it; this module calls it with tensors. Only
`qmoe_kernels.fused_moe`, `linear` and `quantization` enter, and do without where `available`,
`linear_pays` or `narrows` says no. Nothing here imports numba before a loop is needed that the
user's cache does not have.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qmoe_kernels.activations import Activation
from qmoe_kernels.cpu import native
from qmoe_kernels.experts import Projection
from qmoe_kernels.tensors import is_plain, is_watched

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # loops know a dtype by its place
BF16 = DTYPES.index(torch.bfloat16)
NAMES = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

LANES = 16  # of a vector; fp32 rows are as long as a multiple of it
ROWS_AT_ONCE = 4  # of weights, that the processor reads side by side
# Weights that a thread claims at a time: a hundredth of a millisecond.
ITEM_BYTES = 1 << 17
# Up to so many rows of one expert the loops are quicker than torch's matrix product.
FEW_ROWS = 32
# Up to so many rows, and from so many weights on, they are quicker with bf16 weights, too.
LINEAR_ROWS, LINEAR_SIZE = 8, 1 << 17
LINEAR_ITEM_BYTES = 1 << 19
# Values of a sum over experts that are worth a thread.
SUM_SIZE = 1 << 17


def available(*weights: Tensor) -> bool:
    """Whether the loops multiply with these weights on this machine; the first no warns why."""
    if any(w.dtype not in (torch.int8, torch.float8_e4m3fn) for w in weights):
        return False
    return native.address_of("layer") is not None


@lru_cache
def multiplies_bf16() -> bool:
    """Whether the processor's products of bf16 are quicker than those of fp32."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def padded(rows: Tensor) -> Tensor:
    """Rows, (num_rows, columns) of any dtype, in fp32, with zeros up to a multiple of 16."""
    columns = rows.shape[1]
    if columns % LANES == 0:
        return rows.to(torch.float32).contiguous()
    out = rows.new_zeros(len(rows), -(-columns // LANES) * LANES, dtype=torch.float32)
    out[:, :columns] = rows
    return out


def layer(
    x: Tensor,  # (num_rows, in_features) float, a row for each token or each pair
    row_scales: Tensor | None,  # (num_rows,) fp32
    topk_ids: Tensor,  # (num_tokens, top_k) int32 | int64
    up: Projection,
    activation: Activation | None = None,
    down: Projection | None = None,
    topk_weights: Tensor | None = None,  # (num_tokens, top_k) float; only with ``down``
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, list[tuple[int, int, list[int]]]]:
    """``down(activation(up(x)))``, or what of it is given, of the experts with few rows.

    Sums are fp32 and the same whatever the threads and the other pairs are; what a product ends
    with is rounded to ``dtype``.

    Returns:
        An output, and (expert, slot, its pairs) of the experts with many rows, which are left.
        With weights and nothing left, the output is the sum over each token's experts,
        (num_tokens, features) of ``dtype``. Else it is (num_pairs, features) fp32: without weights
        rows of skipped ids and of experts that are left are zeros, with weights they are anything.

    Raises:
        ValueError: an expert that is routed to has no slot.
    """
    num_tokens, top_k = topk_ids.shape
    num_rows = len(x)
    num_pairs, num_experts = num_tokens * top_k, up.num_experts
    few, most = min(num_pairs, FEW_ROWS * num_experts), min(num_pairs, num_experts)
    rows = padded(x)
    width = rows.shape[1]
    features = (up if down is None else down).weight.shape[1]
    if down is None and activation is not None and activation.gated:
        features //= 2
    inner = 0 if down is None else -(-down.weight.shape[2] // LANES) * LANES

    # All that is written on the way is in one piece of memory: tables of int64, then fp32.
    sizes = [
        *(2 * n for n in (num_experts, num_pairs, num_pairs, num_pairs)),
        *(2 * n for n in (most + 1, most, most, most)),
        few * up.weight.shape[1],
        few * inner,
        0 if down is None else few * features,
        0 if topk_weights is None else num_pairs * features,
    ]
    begins = [0, *accumulate(-(-size // LANES) * LANES for size in sizes)]
    memory = x.new_empty(begins[-1], dtype=torch.float32)
    base = memory.data_ptr()
    places = [base + 4 * begin for begin in begins]
    _, pairs, tokens, order, offsets, experts, slots, _ = places[:8]
    up_sums, hidden, down_sums, outputs, _ = places[8:]
    if topk_weights is None:
        output = x.new_zeros(num_pairs, features, dtype=torch.float32)
        outputs = output.data_ptr()
    else:
        output = memory[begins[11] : begins[11] + sizes[11]].view(num_pairs, features)
    if down is not None and inner != down.weight.shape[2]:
        memory[begins[9] : begins[10]].zero_()

    routed, rounded = (offsets, experts, slots), DTYPES.index(dtype)
    source = (rows.data_ptr(), 4 * width, tokens if num_rows == num_tokens else pairs)
    target = (outputs, 4 * features, pairs)
    middle = target if down is None else (hidden, 4 * inner, order)
    kept: list[Any] = []  # until the loop has ended
    first = _product(up, activation, source, row_scales, routed, middle, rounded, up_sums, kept)
    second = total = 0
    if down is not None:
        second = _product(down, None, middle, None, routed, target, rounded, down_sums, kept)
    ids, slots_of = topk_ids.to(torch.int64).contiguous(), up.expert_to_slot
    if slots_of is not None:
        slots_of = slots_of.contiguous()
    if topk_weights is not None:
        result = x.new_empty(num_tokens, features, dtype=torch.float32)
        total = _sum(outputs, torch.float32, topk_weights, ids, num_experts, result, kept)
    num_slots = min(len(p.weight) for p in (up, down) if p is not None)
    found = native.run(
        "layer",
        [
            ids.data_ptr(),
            num_pairs,
            top_k,
            num_experts,
            _address(slots_of),
            FEW_ROWS,
            *places[:8],
            first,
            second,
            total,
            num_slots,
        ],
        most * kept[0][0],
    )
    num_few, num_routed, missing = found[2:]
    if missing >= 0:
        raise missing_slot(missing, int(slots_of[missing]), num_slots)  # type: ignore[index]
    if num_few == num_routed:
        return output if topk_weights is None else result.to(dtype), []
    tables = memory[: begins[8]].view(torch.int64)
    of, start, expert, slot = (
        tables[begins[i] // 2 : (begins[i] + sizes[i]) // 2].tolist() for i in (1, 4, 5, 6)
    )
    return output, [
        (expert[i], slot[i], of[start[i] : start[i + 1]]) for i in range(num_few, num_routed)
    ]


def missing_slot(expert: int, slot: int, num_slots: int) -> ValueError:
    """What to raise for an expert whose weights are not among those of ``num_slots``."""
    return ValueError(
        f"expert {expert} is routed to but has no slot (expert_to_slot is {slot}, "
        f"of {num_slots} slots)"
    )


def _product(
    projection: Projection,
    activation: Activation | None,
    source: tuple[int, int, int],
    row_scales: Tensor | None,
    routed: tuple[int, int, int],
    target: tuple[int, int, int],
    rounded: int,
    sums: int,
    kept: list[Any],
    item_bytes: int = ITEM_BYTES,
) -> int:
    """The address of the arguments of one product; ``kept`` is what has to stay in memory.

    Args:
        projection, activation, row_scales, kept: what they are called.
        source: the address of rows, `LANES` times something long, the bytes of one, and the table
            of which of them a pair takes.
        routed: the tables of where an expert's pairs begin, of experts and of slots.
        target: where rows go to, as ``source``.
        rounded: what rows are rounded to, of `DTYPES`.
        sums: room for the sums of all pairs.
        item_bytes: of weights that a thread claims at a time.
    """
    weight, scale, bias = projection.weight, projection.scale, projection.bias
    assert scale is not None
    parts = 2 if activation is not None and activation.gated else 1
    channels, columns = weight.shape[1] // parts, weight.shape[2]
    scale = scale.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype in DTYPES else bias.float()).contiguous()
    size = max(1, item_bytes // (max(1, columns) * parts * ROWS_AT_ONCE)) * ROWS_AT_ONCE
    flags, numbers = (0, 0) if activation is None else _gate(activation)[:2]
    arguments = array(
        "q",
        [
            -(-channels // size),
            size,
            channels,
            parts,
            weight.data_ptr(),
            weight.stride(0),
            weight.stride(1),
            columns,
            *source,
            *routed,
            scale.data_ptr(),
            _address(bias),
            0 if bias is None else DTYPES.index(bias.dtype),
            _address(row_scales),
            *target,
            rounded,
            sums,
            flags,
            numbers,
            # 8-bit rows are bf16 numbers, too
            _dots(_kind(projection, row_scales is not None or rounded == BF16))[0],
        ],
    )
    kept += [arguments, scale, bias]
    return arguments.buffer_info()[0]


def weighted_sum(
    rows: Tensor,  # (num_tokens, top_k, columns) bf16 | fp16 | fp32
    topk_weights: Tensor,  # (num_tokens, top_k) float
    topk_ids: Tensor | None = None,  # (num_tokens, top_k) int32 | int64
    num_experts: int = 0,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Sum the rows of each token by its weights, in fp32, first expert to last.

    Rows of ids outside [0, num_experts) do not count, if there are ids.

    Returns:
        (num_tokens, columns) of ``dtype``.
    """
    num_tokens, _, columns = rows.shape
    rows = rows.contiguous()
    out = rows.new_empty(num_tokens, columns, dtype=torch.float32)
    ids = None if topk_ids is None else topk_ids.to(torch.int64).contiguous()
    kept: list[Any] = []
    arguments = _sum(rows.data_ptr(), rows.dtype, topk_weights, ids, num_experts, out, kept)
    native.run("weighted_sum", [arguments], min(num_tokens, 1 + rows.numel() // SUM_SIZE))
    return out.to(dtype)


def _sum(
    rows: int,
    dtype: torch.dtype,
    topk_weights: Tensor,
    ids: Tensor | None,
    num_experts: int,
    out: Tensor,
    kept: list[Any],
) -> int:
    """The address of the arguments of a weighted sum of ``rows``; ``kept`` as in `_product`."""
    weights = topk_weights.to(torch.float32).contiguous()
    arguments = array(
        "q",
        [
            *weights.shape,
            out.shape[1],
            DTYPES.index(dtype),
            rows,
            weights.data_ptr(),
            out.data_ptr(),
            _address(ids),
            num_experts,
        ],
    )
    kept += [arguments, weights]
    return arguments.buffer_info()[0]


def linear_pays(num_rows: int, weight: Tensor) -> bool:
    """Whether `linear` takes this weight, and is quicker with it than torch's matrix product."""
    return (
        weight.dtype == torch.bfloat16
        and 0 < num_rows <= LINEAR_ROWS
        and weight.numel() >= LINEAR_SIZE
        and native.address_of("linear") is not None
    )


def linear(
    x: Tensor,  # (num_rows, in_features) bf16
    weight: Tensor,  # (out_features, in_features) bf16, columns contiguous
    bias: Tensor | None = None,  # (out_features,) bf16
) -> Tensor:
    """``x @ weight^T + bias`` of few rows, in fp32, rounded once to bf16.

    Returns:
        (num_rows, out_features) bf16.
    """
    (count, columns), channels = x.shape, len(weight)
    row_bytes = weight.stride(0) * weight.itemsize
    rows = padded(x)
    sums = x.new_empty(count, channels, dtype=torch.float32)
    out = x.new_empty(count, channels)
    # A piece of a thread's own: what it asks for ahead is what it multiplies next.
    threads = torch.get_num_threads()
    size = min(-(-channels // threads), LINEAR_ITEM_BYTES // row_bytes)
    size = max(1, size // ROWS_AT_ONCE) * ROWS_AT_ONCE
    if bias is not None:
        bias = bias.contiguous()
    native.run(
        "linear",
        [
            channels,
            columns,
            weight.data_ptr(),
            row_bytes,
            size,
            rows.data_ptr(),
            4 * rows.shape[1],
            count,
            _all_rows()[0],
            sums.data_ptr(),
            out.data_ptr(),
            _dots(native.BF16)[0],
            _address(bias),
        ],
        -(-channels // size),
    )
    return out


@lru_cache
def _all_rows() -> tuple[int, array[int]]:
    """The address of a table of rows, all of those that `linear` takes in order, and the table."""
    table = array("q", range(LINEAR_ROWS))
    return table.buffer_info()[0], table


def widen(q: Tensor, *, out: Tensor) -> Tensor:
    """Copy a weight, (rows, columns) int8 or e4m3fn, columns contiguous, to bf16; exact."""
    fp8 = q.dtype == torch.float8_e4m3fn
    arguments = [*q.shape, int(fp8), q.data_ptr(), q.stride(0), out.data_ptr()]
    native.run("widen", arguments, q.shape[0])
    return out


def narrows(weight: Tensor) -> bool:
    """Whether `quantize_rows` and `wrong_rows`, which take addresses, take these rows."""
    return (
        weight.device.type == "cpu"
        and is_plain(weight)
        and not (is_watched() or weight.is_neg())
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
def _dots(kind: str) -> tuple[int, array[int]]:
    """The address of the table of dot products that `loops.multiply` takes, and the table."""
    single, *blocks = (block for block in native.this_machine().dots if block[0] == kind)
    table = [native.address_of(native.dots_name(*single)) or 0]
    for block in blocks:
        table += [native.address_of(native.dots_name(*block)) or 0, block[1]]
    kept = array("q", table)
    return kept.buffer_info()[0], kept


def _kind(projection: Projection, rows_in_bf16: bool) -> str:
    """Of the dot products that a projection needs, if its rows are bf16 numbers or are not."""
    if projection.weight.dtype == torch.int8:
        return native.INT8
    return native.FP8_PAIRS if rows_in_bf16 and native.this_machine().pairs else native.FP8


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
