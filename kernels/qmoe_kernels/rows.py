"""What happens to rows around the products: quantizing them, and adding them up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qmoe_kernels.launching import has_dependent_launch, launch_options
from qmoe_kernels.quantization import FORMAT_OF, LARGEST, SMALLEST_SCALE

_ADDED = 2048  # numbers of one program


@triton.jit
def add_rows_kernel(
    rows_ptr,  # (NUM_ROWS, length)
    out_ptr,  # (length,)
    length,
    NUM_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (cdiv(length, BLOCK),)."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < length
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in tl.static_range(NUM_ROWS):
        acc += tl.load(rows_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rows_ptr += length
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


# Not specialized: it must not compile anything.
@triton.jit(do_not_specialize=["num_experts"])
def weighted_sum_kernel(
    rows_ptr,  # (num_tokens, TOP_K, hidden_size)
    topk_weights_ptr,  # (num_tokens, TOP_K), or None: all are one
    topk_ids_ptr,  # (num_tokens, TOP_K), or None: every row counts
    out_ptr,  # (num_tokens, hidden_size)
    num_experts,
    hidden_size,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (num_tokens, cdiv(hidden_size, BLOCK)). Rows of skipped ids are never read."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < hidden_size
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        mask_row = mask
        weight = 1.0
        if topk_weights_ptr is not None:
            weight = tl.load(topk_weights_ptr + pair).to(tl.float32)
        if topk_ids_ptr is not None:
            expert = tl.load(topk_ids_ptr + pair)
            routed = (expert >= 0) & (expert < num_experts)
            mask_row = mask & routed
            weight = tl.where(routed, weight, 0.0)  # it may be NaN
        row = tl.load(rows_ptr + pair * hidden_size + offsets, mask=mask_row, other=0.0)
        acc = tl.fma(row.to(tl.float32), tl.zeros_like(acc) + weight, acc)
    tl.store(out_ptr + token * hidden_size + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def quantize_rows_kernel(
    x_ptr,  # (num_rows, K)
    places_ptr,  # (num_rows, COPIES) int32: where in out each row goes; or None: where it is in x
    out_ptr,  # (num_rows * COPIES, K) int8 | e4m3fn
    scale_ptr,  # (num_rows * COPIES,) fp32
    num_rows,
    K,
    LARGEST_VALUE: tl.constexpr,  # 127 or 448
    SMALLEST: tl.constexpr,  # a scale is not below
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,  # per program
    BLOCK: tl.constexpr,  # power of two
    LONG: tl.constexpr,  # rows are longer than BLOCK, and read twice
    EARLY: tl.constexpr,  # the kernel before this one did not write x
    PDL: tl.constexpr,
):
    """Grid: (cdiv(num_rows, ROWS),)."""
    if PDL and not EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    columns = tl.arange(0, BLOCK)
    x_ptrs = x_ptr + rows[:, None] * K + columns[None, :]
    mask = exists[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(x), 1)
    not_finite = tl.sum(x * 0.0, 1)
    if LONG:
        for k in range(BLOCK, K, BLOCK):
            mask_k = exists[:, None] & (columns < K - k)[None, :]
            other = tl.load(x_ptrs + k, mask=mask_k, other=0.0).to(tl.float32)
            absmax = tl.maximum(absmax, tl.max(tl.abs(other), 1))
            not_finite += tl.sum(other * 0.0, 1)
    # A maximum passes over NaN, a sum does not.
    scale = tl.maximum(absmax / LARGEST_VALUE, SMALLEST) + not_finite
    # Times the inverse: where that rounds another way than a division, it is by one unit of a
    # number half-way between two.
    inverse = (1.0 / scale)[:, None]
    x = round_to(x * inverse, out_ptr.dtype.element_ty, LARGEST_VALUE)
    if PDL and EARLY:
        # What is written now may have been that kernel's memory.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for copy in tl.static_range(COPIES):
        places = rows
        if places_ptr is not None:
            places = tl.load(places_ptr + rows * COPIES + copy, mask=exists, other=0)
        out_ptrs = out_ptr + places.to(tl.int64)[:, None] * K + columns[None, :]
        tl.store(scale_ptr + places, scale, mask=exists)
        tl.store(out_ptrs, x, mask=mask)
        if LONG:
            for k in range(BLOCK, K, BLOCK):
                mask_k = exists[:, None] & (columns < K - k)[None, :]
                other = tl.load(x_ptrs + k, mask=mask_k, other=0.0).to(tl.float32)
                other = round_to(other * inverse, out_ptr.dtype.element_ty, LARGEST_VALUE)
                tl.store(out_ptrs + k, other, mask=mask_k)


@triton.jit
def round_to(x, dtype: tl.constexpr, LARGEST_VALUE: tl.constexpr):
    x = tl.minimum(tl.maximum(x, -LARGEST_VALUE), LARGEST_VALUE)
    if dtype == tl.int8:
        # The sum is past 2**23, where fp32 has no fraction: rounded, half to even.
        x = (x + 12582912.0) - 12582912.0
    return x.to(dtype)


def launch_quantize_rows(
    x: torch.Tensor,  # (num_rows, K)
    dtype: torch.dtype,
    *,
    places: torch.Tensor | None = None,  # (num_rows * copies,) int32
    dependent: bool,
    early: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x``, which is contiguous, to int8 or e4m3fn.

    Args:
        places: where row ``i // copies`` of ``x`` goes, for each ``i``; None: where it is.
        dependent: start while the kernel before this one ends.
        early: that kernel does not write ``x``, which is read without waiting.

    Returns:
        (num_rows * copies, K) and its scales, (num_rows * copies,) fp32.
    """
    num_rows, in_features = x.shape
    num_out = num_rows if places is None else places.shape[0]
    out = x.new_empty(num_out, in_features, dtype=dtype)
    scale = x.new_empty(num_out, dtype=torch.float32)
    if out.numel():
        block = min(16384, max(16, triton.next_power_of_2(in_features)))
        rows = max(1, (4096 if places is None else 2048) // block)
        quantize_rows_kernel[(triton.cdiv(num_rows, rows),)](
            x,
            places,
            out,
            scale,
            num_rows,
            in_features,
            LARGEST_VALUE=LARGEST[FORMAT_OF[dtype]],
            SMALLEST=SMALLEST_SCALE,
            COPIES=num_out // num_rows,
            ROWS=rows,
            BLOCK=block,
            LONG=in_features > block,
            EARLY=early,
            PDL=has_dependent_launch(x.device),
            num_warps=max(4, block // 1024),
            **launch_options(dependent, x.device),
        )
    return out, scale


def launch_add_rows(rows: torch.Tensor) -> torch.Tensor:
    """Add up ``rows``, (num_rows, ...) and contiguous, in fp32, first to last, and round once.

    Returns:
        (...) in the dtype of ``rows``.
    """
    out = rows.new_empty(rows.shape[1:])
    if num := out.numel():
        grid = (triton.cdiv(num, _ADDED),)
        add_rows_kernel[grid](rows, out, num, NUM_ROWS=len(rows), BLOCK=_ADDED)
    return out


def launch_weighted_sum(
    rows: torch.Tensor,  # (num_tokens, top_k, hidden_size)
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor | None = None,
    num_experts: int = 0,
    *,
    dependent: bool = False,
) -> torch.Tensor:
    """Sum rows by their weights, in fp32 and in order; with ``topk_ids``, those of experts only.

    Without ``topk_weights`` each counts once.
    """
    num_tokens, top_k, hidden_size = rows.shape
    out = rows.new_empty(num_tokens, hidden_size)
    if out.numel():
        block = min(1024, triton.next_power_of_2(hidden_size))
        weighted_sum_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
            rows.contiguous(),
            None if topk_weights is None else topk_weights.contiguous(),
            None if topk_ids is None else topk_ids.contiguous(),
            out,
            num_experts,
            hidden_size,
            TOP_K=top_k,
            BLOCK=block,
            PDL=has_dependent_launch(rows.device),
            **launch_options(dependent, rows.device),
        )
    return out
