"""Attention of one new token per row over a static cache of keys and values.

Of a row's query ``q`` (head_dim,) and the columns ``c`` that it attends to, in fp32:

    logit_c = scale * q·k_c          or  softcap * tanh(scale * q·k_c / softcap)
    out     = sum_c exp(logit_c) v_c / (sum_c exp(logit_c) + exp(sink))

A sink is a logit per head that has no value. Consecutive query heads share one of the keys and
values (grouped-query attention). Columns that a row does not attend to may hold anything, NaN too.

Which columns a row attends to is read on the device, so that one CUDA graph serves all lengths.
Its columns are cut into equal splits, as many as the shapes allow, to keep the whole GPU reading
(flash-decoding): `decode_attention_kernel` leaves for each split the sums above, relative to its
largest logit, and `combine_splits_kernel` adds these up in order. The second launch costs little
where it starts before the first one ends; a counter by which the last split finds out that it is
the last would cost as many trips to L2, and one program would read what here many do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qmoe_kernels.tensors import is_plain, is_watched

try:
    import triton
    import triton.language as tl

    from qmoe_kernels.launching import has_dependent_launch, launch_options, prefetch
except ImportError:  # a CPU needs no Triton
    triton = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def decode_attention(
    query: Tensor,  # (num_rows, num_heads, head_dim) bf16 | fp16 | fp32
    keys: Tensor,  # (num_rows, max_length, num_kv_heads, head_dim), same dtype
    values: Tensor,  # (num_rows, max_length, num_kv_heads, value_dim), same dtype
    start: Tensor,  # (num_rows,) int32 | int64
    end: Tensor,  # (num_rows,) or (1,) int32 | int64
    *,
    scale: float,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,  # (num_heads,) float
    softcap: float | None = None,
    early: bool = False,
) -> Tensor:
    """Attend from row i's query to its columns ``start[i] <= c < end[i]``.

    Without a synchronization; two launches, or one where rows are many or columns few. A row's
    result depends on shapes and on its own content only, and is the same to the bit every time.
    The kernels round probabilities to the values' dtype, relative to the largest so far. A row
    without columns gets zeros. There is no gradient.

    Args:
        query: any strides but for the last dimension, as ``keys`` and ``values``.
        start: columns before it do not exist for the row; negative is as 0.
        end: more than max_length is as max_length; one element counts for all rows.
        scale: of the products, usually ``head_dim ** -0.5``.
        sliding_window: attend to no more than so many columns, the last ones before ``end``.
        sinks: a logit per head, neither scaled nor capped.
        softcap: bound of the logits' absolute values.
        early: the operation just before this one on the device wrote neither ``start`` nor
            ``end``, which are read, and keys and values prefetched, while it ends.

    Returns:
        (num_rows, num_heads, value_dim), contiguous, of the query's dtype.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit.
    """
    _check(query, keys, values, start, end, sinks)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window={sliding_window}; 1 and more work, or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}; a positive number works, or None")
    arguments = (query, keys, values, start, end, scale, sliding_window, sinks, softcap)
    dims = (query.shape[-1], values.shape[-1])
    plain = is_plain(query, keys, values, start, end, sinks)
    alone = query.is_cpu and len(query) == 1 and sinks is None and softcap is None
    if alone and not is_watched():
        return _attend_alone(query, keys, values, start, end, scale, sliding_window)
    if triton is None or not (plain and query.is_cuda) or max(dims) > MAX_DIM:
        return decode_attention_reference(*arguments)
    with torch.cuda.device(query.device):
        return launch_decode_attention(*arguments, early=early)


def store_kv(
    key: Tensor,  # (num_rows, num_kv_heads, new_tokens, head_dim)
    value: Tensor,  # (num_rows, num_kv_heads, new_tokens, value_dim)
    keys: Tensor,  # (num_rows, max_length, num_kv_heads, head_dim)
    values: Tensor,  # (num_rows, max_length, num_kv_heads, value_dim)
    column: Tensor,  # (1,) int32 | int64
) -> None:
    """Write new tokens' keys and values to columns ``column, column + 1, ...`` of the cache.

    One launch, without a synchronization. Tokens that the cache has no column for are dropped.

    Args:
        key: any strides but for the last dimension, as all of them.
        column: where the first new token goes, on the device.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
    """
    for name, new, cache in (("key", key, keys), ("value", value, values)):
        if (
            new.ndim != 4
            or cache.ndim != 4
            or (new.shape[0], *new.shape[1::2]) != (cache.shape[0], *cache.shape[2:])
        ):
            raise ValueError(
                f"{name} {tuple(new.shape)} does not fit a cache {tuple(cache.shape)}; expected "
                "(num_rows, num_kv_heads, new_tokens, dim) and "
                "(num_rows, max_length, num_kv_heads, dim)"
            )
        _check_last_stride(name, new)
        _check_last_stride(name + "s", cache)
    if keys.shape[:3] != values.shape[:3] or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)}, key {tuple(key.shape)} "
            f"and value {tuple(value.shape)}: only the last dimensions may differ"
        )
    _check_integers("column", column, (1,))
    if any(t.device != keys.device for t in (key, value, values, column)):
        raise ValueError(f"all tensors have to be on {keys.device}, as keys are")
    if triton is None or not (keys.is_cuda and is_plain(key, value, keys, values, column)):
        if keys.is_cpu and not is_watched():  # where a column's number costs no synchronization
            first = int(column)
            drop, end = max(0, -first), max(0, min(first + key.shape[2], keys.shape[1]))
            for new, cache in ((key, keys), (value, values)):
                to = cache[:, first + drop : end]
                to.copy_(new.transpose(1, 2)[:, drop : drop + to.shape[1]])
            return
        columns = column.long() + torch.arange(key.shape[2], device=keys.device)
        exists = (columns >= 0) & (columns < keys.shape[1])
        for new, cache in ((key, keys), (value, values)):
            tokens = new.transpose(1, 2)[:, exists].to(cache.dtype)
            cache.index_copy_(1, columns[exists], tokens)
        return
    with torch.cuda.device(keys.device):
        launch_store_kv(key, value, keys, values, column)


def _attend_alone(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    end: Tensor,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """`decode_attention` of one row on a CPU, by torch's fused attention over its columns."""
    last = min(int(end), keys.shape[1])
    first = max(0, int(start), 0 if sliding_window is None else last - sliding_window)
    if first >= last:
        return query.new_zeros(1, query.shape[1], values.shape[3])
    grouped = query.unflatten(1, (keys.shape[2], -1))  # heads as tokens of their keys' head
    k, v = (cache[:, first:last].transpose(1, 2) for cache in (keys, values))
    return F.scaled_dot_product_attention(grouped, k, v, scale=scale).flatten(1, 2)


def decode_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    end: Tensor,
    scale: float,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Do what `decode_attention` does with torch's operations, in fp32."""
    last = end.clamp(max=keys.shape[1])
    first = start.clamp(min=0)
    if sliding_window is not None:
        first = torch.maximum(first, last - sliding_window)
    if query.device.type == "cpu" and last.numel():  # where its value costs no synchronization
        length = max(0, int(last.max()))
        keys, values = keys[:, :length], values[:, :length]
    columns = torch.arange(keys.shape[1], device=keys.device)
    visible = (columns >= first[:, None]) & (columns < last[:, None])
    # Zeros, since products with NaN are NaN even where the other factor is zero.
    hidden = ~visible[:, :, None, None]
    k, v = keys.float().masked_fill(hidden, 0.0), values.float().masked_fill(hidden, 0.0)
    visible = visible[:, None, None]
    q = query.float().unflatten(1, (keys.shape[2], -1))
    logits = torch.einsum("rhgd,rchd->rhgc", q, k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(1, *q.shape[1:3], 1).expand(*q.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    # Of a row without columns and sinks the softmax is NaN.
    probabilities = logits.softmax(-1)[..., : len(columns)].where(visible, 0.0)
    out = torch.einsum("rhgc,rchd->rhgd", probabilities, v)
    return out.flatten(1, 2).to(query.dtype)


def _check(
    query: Tensor, keys: Tensor, values: Tensor, start: Tensor, end: Tensor, sinks: Tensor | None
) -> None:
    if query.ndim != 3 or keys.ndim != 4 or values.ndim != 4:
        raise ValueError(
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}; "
            "expected (num_rows, num_heads, head_dim) and twice "
            "(num_rows, max_length, num_kv_heads, dim)"
        )
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[2]
    if (
        keys.shape[:3] != values.shape[:3]
        or (keys.shape[0], keys.shape[3]) != (num_rows, head_dim)
        or num_heads % max(1, num_kv_heads)
    ):
        raise ValueError(
            f"query {tuple(query.shape)} does not fit keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)}: rows, columns and head_dim have to be equal, heads a multiple"
        )
    if query.dtype not in DTYPES or {keys.dtype, values.dtype} != {query.dtype}:
        raise ValueError(
            f"query is {query.dtype}, keys {keys.dtype}, values {values.dtype}; one of "
            "bfloat16, float16 and float32 for all works"
        )
    for name, tensor in (("query", query), ("keys", keys), ("values", values)):
        _check_last_stride(name, tensor)
    _check_integers("start", start, (num_rows,))
    _check_integers("end", end, (1,) if end.numel() == 1 else (num_rows,))
    if sinks is not None and (sinks.shape != (num_heads,) or not sinks.is_floating_point()):
        raise ValueError(
            f"sinks are {sinks.dtype} of shape {tuple(sinks.shape)}; expected floats ({num_heads},)"
        )
    if any(t is not None and t.device != query.device for t in (keys, values, start, end, sinks)):
        raise ValueError(f"all tensors have to be on {query.device}, as query is")


def _check_last_stride(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; the last one has to be 1")


def _check_integers(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected int32 or int64 "
            f"of shape {shape}"
        )


# ---- launches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionTile:
    """How `decode_attention_kernel` cuts its work.

    Attributes:
        num_splits: programs that share the columns of a row and a key head.
        block_n: columns that a program multiplies at once, 16 or a larger power of two.
        num_warps: of a program.
        num_stages: one more than blocks of columns that are in flight.
    """

    num_splits: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 3


MAX_DIM = 512  # of heads; a block of 16 wider columns takes more memory than some GPUs have
BLOCK_G = 16  # query heads per program: the rows of a tensor core's product
# A program's blocks of keys and values in shared memory: what GPUs with little of it allow.
BLOCK_BYTES, BUFFER_BYTES = 32 << 10, 64 << 10
# Fewer columns per split than this, of a full cache, are not worth combining; in all, of a split.
MIN_SPLIT_COLUMNS, MAX_SINGLE_COLUMNS = 128, 128
MAX_SPLITS = 64
COMBINED_ELEMENTS = 1024  # of splits' sums, per program: two loads of a thread


def choose_tile(
    num_programs: int, num_columns: int, column_bytes: int, num_processors: int
) -> AttentionTile:
    """Choose by shapes alone, which do not change while a captured graph is replayed.

    Args:
        num_programs: for all columns of all rows.
        num_columns: that a row may attend to at most.
        column_bytes: of one head's key and value, as powers of two.
        num_processors: the device's multiprocessors.
    """
    block_n = max(16, min(64, 1 << (BLOCK_BYTES // column_bytes).bit_length() - 1))
    num_splits = 1
    if num_columns > MAX_SINGLE_COLUMNS:
        fill = num_processors // num_programs
        num_splits = max(1, min(fill, -(-num_columns // MIN_SPLIT_COLUMNS), MAX_SPLITS))
    num_stages = min(3, 1 + BUFFER_BYTES // (block_n * column_bytes))
    return AttentionTile(num_splits, block_n, num_stages=num_stages)


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted, or compiled only
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    end: Tensor,
    scale: float,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    *,
    early: bool = False,
    tile: AttentionTile | None = None,
) -> Tensor:
    """Run the kernels; arguments and result as those of `decode_attention`.

    ``tile``: instead of `choose_tile`'s.
    """
    num_rows, num_heads, head_dim = query.shape
    max_length, num_kv_heads, value_dim = values.shape[1:]
    out = query.new_empty(num_rows, num_heads, value_dim)
    if out.numel() == 0:
        return out
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_v = max(16, triton.next_power_of_2(value_dim))
    num_programs = num_rows * num_kv_heads * triton.cdiv(num_heads // num_kv_heads, BLOCK_G)
    if tile is None:
        tile = choose_tile(
            num_programs,
            min(max_length, sliding_window or max_length),
            (block_d + block_v) * query.element_size(),
            _num_processors(query.device),
        )
    num_splits = tile.num_splits
    sums, maxima, totals = out, None, None
    if num_splits > 1:
        sums = out.new_empty(num_rows, num_heads, num_splits, value_dim, dtype=torch.float32)
        maxima, totals = sums.new_empty(2, num_rows, num_heads, num_splits)
    if sinks is not None:
        sinks = sinks.contiguous()
    # A copy is made by the operation just before this one: it has to be waited for.
    early = early and start.is_contiguous() and end.is_contiguous()
    start, end = start.contiguous(), end.contiguous()
    columns = (start, end, max_length, sliding_window)
    decode_attention_kernel[(num_programs, num_splits)](
        query,
        keys,
        values,
        sinks,
        sums,
        maxima,
        totals,
        *columns,
        scale,
        softcap,
        *query.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        num_splits,
        SHARED_END=end.numel() == 1,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_G=BLOCK_G,
        BLOCK_N=tile.block_n,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        NUM_STAGES=tile.num_stages,
        EARLY=early,
        PDL=has_dependent_launch(query.device),
        num_warps=tile.num_warps,
        **launch_options(True, query.device),
    )
    if num_splits > 1:
        _launch_combine_splits(sums, maxima, totals, out, columns)
    return out


def _launch_combine_splits(
    sums: Tensor,
    maxima: Tensor | None,
    totals: Tensor | None,
    out: Tensor,
    columns: tuple[Any, ...],
) -> None:
    """Run `combine_splits_kernel`, whose arguments these are."""
    num_rows, num_heads, num_splits, value_dim = sums.shape
    splits_block = triton.next_power_of_2(num_splits)
    block_v = max(16, triton.next_power_of_2(value_dim))
    block_v = min(block_v, max(16, COMBINED_ELEMENTS // splits_block))
    combine_splits_kernel[(num_rows * num_heads, triton.cdiv(value_dim, block_v))](
        sums,
        maxima,
        totals,
        out,
        *columns,
        num_splits,
        SHARED_END=columns[1].numel() == 1,
        NUM_HEADS=num_heads,
        VALUE_DIM=value_dim,
        SPLITS_BLOCK=splits_block,
        BLOCK_V=block_v,
        PDL=has_dependent_launch(out.device),
        num_warps=4,
        **launch_options(True, out.device),
    )


def launch_store_kv(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, column: Tensor
) -> None:
    """Run `store_kv_kernel`; arguments as those of `store_kv`."""
    num_rows, num_kv_heads, new_tokens, head_dim = key.shape
    value_dim = value.shape[3]
    if num_rows * num_kv_heads * new_tokens == 0:
        return
    block_d = triton.next_power_of_2(head_dim)
    block_v = triton.next_power_of_2(value_dim)
    block_h = min(triton.next_power_of_2(num_kv_heads), max(1, 2048 // max(block_d, block_v)))
    store_kv_kernel[(num_rows * new_tokens, triton.cdiv(num_kv_heads, block_h))](
        key,
        value,
        keys,
        values,
        column,
        new_tokens,
        num_kv_heads,
        keys.shape[1],
        *key.stride()[:3],
        *value.stride()[:3],
        *keys.stride()[:3],
        *values.stride()[:3],
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        PDL=has_dependent_launch(keys.device),
        num_warps=4,
        **launch_options(True, keys.device),
    )


# ---- kernels -----------------------------------------------------------------------------------


if triton is not None:

    @triton.jit(
        do_not_specialize=["max_length", "sliding_window", "num_splits"],
        do_not_specialize_on_alignment=["start_ptr", "end_ptr"],
    )
    def decode_attention_kernel(
        query_ptr,  # (num_rows, NUM_KV_HEADS * GROUP, HEAD_DIM)
        keys_ptr,  # (num_rows, max_length, NUM_KV_HEADS, HEAD_DIM)
        values_ptr,  # (num_rows, max_length, NUM_KV_HEADS, VALUE_DIM)
        sinks_ptr,  # (num_heads,), or None
        sums_ptr,  # (num_rows, num_heads, num_splits, VALUE_DIM) fp32, or of one split: the result
        maxima_ptr,  # (num_rows, num_heads, num_splits) fp32, or None: one split
        totals_ptr,  # (num_rows, num_heads, num_splits) fp32, or None: one split
        start_ptr,  # (num_rows,)
        end_ptr,  # (num_rows,), or (1,) if SHARED_END
        max_length,
        sliding_window,  # or None
        scale,
        softcap,  # or None
        stride_query_row,
        stride_query_head,
        stride_keys_row,
        stride_keys_column,
        stride_keys_head,
        stride_values_row,
        stride_values_column,
        stride_values_head,
        num_splits,
        SHARED_END: tl.constexpr,
        NUM_KV_HEADS: tl.constexpr,
        GROUP: tl.constexpr,  # query heads that share a key head
        HEAD_DIM: tl.constexpr,
        VALUE_DIM: tl.constexpr,
        BLOCK_G: tl.constexpr,  # of them, a program has so many
        BLOCK_N: tl.constexpr,  # columns at once
        BLOCK_D: tl.constexpr,  # powers of two from 16 on, at least as large
        BLOCK_V: tl.constexpr,
        NUM_STAGES: tl.constexpr,
        EARLY: tl.constexpr,  # the kernel before this one did not write start and end
        PDL: tl.constexpr,
    ):
        """Grid: (num_rows * NUM_KV_HEADS * cdiv(GROUP, BLOCK_G), num_splits).

        A program has the query heads of one key head, so that keys and values are read once. One
        whose split has no columns leaves at once. Logits are in powers of two, which exp2 takes.
        """
        HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
        LOG2_E: tl.constexpr = 1.4426950408889634
        if PDL and not EARLY:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        row = (tl.program_id(0) // (NUM_KV_HEADS * HEAD_BLOCKS)).to(tl.int64)
        kv_head = tl.program_id(0) // HEAD_BLOCKS % NUM_KV_HEADS
        split = tl.program_id(1)
        first, last, split_length = _columns(
            start_ptr, end_ptr, row, max_length, sliding_window, num_splits, SHARED_END
        )
        first += split * split_length
        last = tl.minimum(last, first + split_length)

        # int64: rows times columns pass 2**31.
        columns = tl.arange(0, BLOCK_N)
        wide_columns = columns.to(tl.int64)
        wide_head = kv_head.to(tl.int64)
        keys_ptr += row * stride_keys_row + wide_head * stride_keys_head
        keys_ptr += first.to(tl.int64) * stride_keys_column
        values_ptr += row * stride_values_row + wide_head * stride_values_head
        values_ptr += first.to(tl.int64) * stride_values_column
        if PDL and EARLY:
            if first < last:
                # What the loop's first loads ask for. The new token's key may not be there yet:
                # only L2 has seen what was.
                LINE: tl.constexpr = 1024 // keys_ptr.dtype.element_ty.primitive_bitwidth
                for i in tl.static_range(max(1, NUM_STAGES - 1)):
                    some = tl.minimum(i * BLOCK_N + columns, last - first - 1).to(tl.int64)
                    prefetch(keys_ptr, some * stride_keys_column, HEAD_DIM, max(1, BLOCK_D // LINE))
                    prefetch(
                        values_ptr, some * stride_values_column, VALUE_DIM, max(1, BLOCK_V // LINE)
                    )
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        if maxima_ptr is not None:  # noqa: SIM102 (one is known when compiling)
            if first >= last:
                return

        heads = tl.program_id(0) % HEAD_BLOCKS * BLOCK_G + tl.arange(0, BLOCK_G)
        exists = heads < GROUP
        heads = kv_head * GROUP + tl.minimum(heads, GROUP - 1)
        dims = tl.arange(0, BLOCK_D)
        value_dims = tl.arange(0, BLOCK_V)
        query_ptrs = query_ptr + row * stride_query_row
        query_ptrs += (heads.to(tl.int64) * stride_query_head)[:, None] + dims[None, :]
        q = tl.load(query_ptrs, mask=exists[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        key_offsets = (wide_columns * stride_keys_column)[:, None] + dims[None, :]
        value_offsets = (wide_columns * stride_values_column)[:, None] + value_dims[None, :]

        maximum = tl.full((BLOCK_G,), -float("inf"), tl.float32)
        totals = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)  # to be summed up once, after the loop
        acc = tl.zeros((BLOCK_G, BLOCK_V), tl.float32)
        if sinks_ptr is not None:
            # As a column of the first split.
            sinks = tl.load(sinks_ptr + heads).to(tl.float32) * LOG2_E
            maximum = tl.where(split == 0, sinks, maximum)
            totals += tl.where((columns == 0) & (split == 0), 1.0, 0.0)[None, :]
        block = tl.full((), BLOCK_N, tl.int64)
        for column in tl.range(first, last, BLOCK_N, num_stages=NUM_STAGES):
            # Masked columns are zeros, not what memory holds there: a product with NaN is NaN.
            inside = columns < last - column
            k = tl.load(
                keys_ptr + key_offsets, mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0
            )
            v = tl.load(
                values_ptr + value_offsets,
                mask=inside[:, None] & (value_dims < VALUE_DIM)[None, :],
                other=0.0,
            )
            keys_ptr += block * stride_keys_column
            values_ptr += block * stride_values_column
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
            if softcap is None:
                logits *= scale * LOG2_E
            else:  # The interpreter has no tanh.
                tanh = 2.0 * tl.sigmoid(logits * (2.0 * scale / softcap)) - 1.0
                logits = tanh * (softcap * LOG2_E)
            logits = tl.where(inside[None, :], logits, -float("inf"))
            largest = tl.maximum(maximum, tl.max(logits, 1))
            p = tl.exp2(logits - largest[:, None])
            rescale = tl.exp2(maximum - largest)
            maximum = largest
            totals = totals * rescale[:, None] + p
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")

        total = tl.sum(totals, 1)
        out = row * (NUM_KV_HEADS * GROUP) + heads
        stored = exists[:, None] & (value_dims < VALUE_DIM)[None, :]
        if maxima_ptr is None:
            acc /= tl.where(total == 0.0, 1.0, total)[:, None]
        else:
            out = out * num_splits + split
            tl.store(maxima_ptr + out, maximum, mask=exists)
            tl.store(totals_ptr + out, total, mask=exists)
        out = out[:, None] * VALUE_DIM + value_dims[None, :]
        tl.store(sums_ptr + out, acc.to(sums_ptr.dtype.element_ty), mask=stored)

    @triton.jit(
        do_not_specialize=["max_length", "sliding_window", "num_splits"],
        do_not_specialize_on_alignment=["start_ptr", "end_ptr", "totals_ptr"],
    )
    def combine_splits_kernel(
        sums_ptr,  # (num_rows, NUM_HEADS, num_splits, VALUE_DIM) fp32
        maxima_ptr,  # (num_rows, NUM_HEADS, num_splits) fp32
        totals_ptr,  # (num_rows, NUM_HEADS, num_splits) fp32
        out_ptr,  # (num_rows, NUM_HEADS, VALUE_DIM)
        start_ptr,  # as in decode_attention_kernel
        end_ptr,
        max_length,
        sliding_window,
        num_splits,
        SHARED_END: tl.constexpr,
        NUM_HEADS: tl.constexpr,
        VALUE_DIM: tl.constexpr,
        SPLITS_BLOCK: tl.constexpr,  # power of two, at least num_splits
        BLOCK_V: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """Grid: (num_rows * NUM_HEADS, cdiv(VALUE_DIM, BLOCK_V))."""
        head = tl.program_id(0).to(tl.int64)
        # The kernel before this one writes neither start nor end.
        first, last, split_length = _columns(
            start_ptr,
            end_ptr,
            head // NUM_HEADS,
            max_length,
            sliding_window,
            num_splits,
            SHARED_END,
        )
        splits = tl.arange(0, SPLITS_BLOCK)
        written = (splits < num_splits) & (splits * split_length < last - first)
        dims = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        splits = head * num_splits + splits
        maxima = tl.load(maxima_ptr + splits, mask=written, other=-float("inf"))
        totals = tl.load(totals_ptr + splits, mask=written, other=0.0)
        sums_ptrs = sums_ptr + splits[:, None] * VALUE_DIM + dims[None, :]
        sums = tl.load(sums_ptrs, mask=written[:, None] & (dims < VALUE_DIM)[None, :], other=0.0)
        largest = tl.where(last > first, tl.max(maxima, 0), 0.0)
        rescale = tl.exp2(maxima - largest)
        total = tl.sum(totals * rescale, 0)
        out = tl.sum(sums * rescale[:, None], 0) / tl.where(total == 0.0, 1.0, total)
        out_ptrs = out_ptr + head * VALUE_DIM + dims
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=dims < VALUE_DIM)

    @triton.jit
    def _columns(
        start_ptr, end_ptr, row, max_length, sliding_window, num_splits, SHARED_END: tl.constexpr
    ):
        """A row's columns, from the first up to before the last, and how many each split has."""
        if not SHARED_END:
            end_ptr += row
        last = tl.minimum(tl.load(end_ptr), max_length).to(tl.int32)
        first = tl.maximum(tl.load(start_ptr + row), 0).to(tl.int32)
        if sliding_window is not None:
            first = tl.maximum(first, last - sliding_window)
        # Even whatever the length, but no splits of a few columns.
        split_length = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), num_splits), 16) * 16
        return first, last, split_length

    @triton.jit(
        do_not_specialize=["new_tokens", "num_kv_heads", "max_length"],
        do_not_specialize_on_alignment=["column_ptr"],
    )
    def store_kv_kernel(
        key_ptr,  # (num_rows, num_kv_heads, new_tokens, HEAD_DIM)
        value_ptr,  # (num_rows, num_kv_heads, new_tokens, VALUE_DIM)
        keys_ptr,  # (num_rows, max_length, num_kv_heads, HEAD_DIM)
        values_ptr,  # (num_rows, max_length, num_kv_heads, VALUE_DIM)
        column_ptr,  # (1,)
        new_tokens,
        num_kv_heads,
        max_length,
        stride_key_row,
        stride_key_head,
        stride_key_token,
        stride_value_row,
        stride_value_head,
        stride_value_token,
        stride_keys_row,
        stride_keys_column,
        stride_keys_head,
        stride_values_row,
        stride_values_column,
        stride_values_head,
        HEAD_DIM: tl.constexpr,
        VALUE_DIM: tl.constexpr,
        BLOCK_H: tl.constexpr,  # heads per program
        BLOCK_D: tl.constexpr,  # powers of two, at least as large
        BLOCK_V: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """Grid: (num_rows * new_tokens, cdiv(num_kv_heads, BLOCK_H))."""
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        row = tl.program_id(0).to(tl.int64) // new_tokens
        token = tl.program_id(0).to(tl.int64) % new_tokens
        heads = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
        dims = tl.arange(0, BLOCK_D)[None, :]
        value_dims = tl.arange(0, BLOCK_V)[None, :]
        column = tl.load(column_ptr).to(tl.int64) + token
        key_ptrs = key_ptr + row * stride_key_row + heads * stride_key_head
        key_ptrs += token * stride_key_token + dims
        value_ptrs = value_ptr + row * stride_value_row + heads * stride_value_head
        value_ptrs += token * stride_value_token + value_dims
        is_key = (heads < num_kv_heads) & (dims < HEAD_DIM)
        is_value = (heads < num_kv_heads) & (value_dims < VALUE_DIM)
        key = tl.load(key_ptrs, mask=is_key)
        value = tl.load(value_ptrs, mask=is_value)
        exists = (column >= 0) & (column < max_length)
        keys_ptrs = keys_ptr + row * stride_keys_row + heads * stride_keys_head
        keys_ptrs += column * stride_keys_column + dims
        values_ptrs = values_ptr + row * stride_values_row + heads * stride_values_head
        values_ptrs += column * stride_values_column + value_dims
        tl.store(keys_ptrs, key.to(keys_ptr.dtype.element_ty), mask=is_key & exists)
        tl.store(values_ptrs, value.to(values_ptr.dtype.element_ty), mask=is_value & exists)
