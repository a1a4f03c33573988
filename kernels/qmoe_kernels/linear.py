"""Linear layers of few rows, bound by how fast weights come from memory:

    out = round(x @ weight^T + bias)

Sums are fp32 and rounded once, after the bias. So does `torch.nn.functional.linear` where it is
one product with a bias (rows that lie in one piece, on a GPU by cuBLAS), but in another order.

Each program has few outputs and all of their weights, so that all programs together have the whole
matrix on its way at once. No kernel in a model writes weights: programs ask for them while the
kernel before this one still ends. Then they wait for it, and read rows.

- `linear_fma_kernel`, one row or few: weights go to registers, without tensor cores.
- `linear_dot_kernel`, more rows: weights are the left operand, whose side is the longer one of
  a tensor core's product. Warps share the columns of a program, not its outputs, which are few.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qmoe_kernels import cpu
from qmoe_kernels.tensors import is_plain, is_watched

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU needs no Triton
    triton = None


def linear(
    x: Tensor,  # (..., in_features) bf16 | fp16 | fp32
    weight: Tensor,  # (out_features, in_features), same dtype
    bias: Tensor | None = None,  # (out_features,), same dtype
) -> Tensor:
    """Do what `torch.nn.functional.linear` does, faster for few rows.

    One launch on a GPU; on a CPU of bf16 alone, where gradients are off. The same input gives the
    same bits, and a row's bits do not depend on what is in other rows, though on how many there
    are. There is no gradient.

    The kernel before this one on the device must not have written ``weight``.

    Args:
        x: rows at any stride.
        weight: rows at any stride, as those of a larger matrix.

    Returns:
        (..., out_features), of the dtype of ``x``.

    Raises:
        RuntimeError: what torch raises where shapes, dtypes or devices do not fit.
    """
    if not (_is_known(x, weight, bias) and linear_pays(x.numel() // x.shape[-1], weight)):
        return F.linear(x, weight, bias)
    if not x.is_cuda:
        rows = cpu.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return rows.view(*x.shape[:-1], len(weight))
    with torch.cuda.device_of(x):
        return launch_linear(x, weight, bias)


def _is_known(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the kernels can do it: of anything else torch knows, or what is wrong."""
    return (
        is_plain(x, weight, bias)
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x.dtype == weight.dtype
        and x.device == weight.device
        and x.ndim > 0
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1] > 0
        and weight.stride(1) == 1
        and (
            bias is None
            or (bias.shape, bias.dtype, bias.device) == (weight.shape[:1], x.dtype, x.device)
        )
        and (triton is not None if x.is_cuda else _runs_natively(x, weight, bias))
    )


def _runs_natively(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the processor's loops, which take addresses, do what torch would."""
    return (
        x.is_cpu
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_watched())
        and not any(t is not None and t.is_neg() for t in (x, weight, bias))
        and weight.stride(0) >= weight.shape[1]
    )


# Measured on an H200 with cold weights, after a norm (docs/generate.md); cuBLAS leads elsewhere.
FMA_ROWS = 2  # up to so many, tensor cores gain nothing
FEW_OUTPUTS, MAX_ROWS = 2048, 16  # where cuBLAS splits the columns, and needs a second launch
SMALL_OUTPUTS, SMALL_MAX_ROWS = 1024, 64  # a router's: far fewer than fill the GPU
SMALL_FMA_ROWS = 8


def linear_pays(num_rows: int, weight: Tensor) -> bool:
    """Return whether a kernel here is to be preferred to torch's, as far as shapes tell."""
    if weight.is_cpu:
        return cpu.linear_pays(num_rows, weight)
    if weight.dtype == torch.float32:
        # Tensor cores would keep ten bits of a number, and without them many rows take long.
        return num_rows <= SMALL_FMA_ROWS
    out_features = len(weight)
    return (
        num_rows <= FMA_ROWS
        or (num_rows <= MAX_ROWS and out_features <= FEW_OUTPUTS)
        or (num_rows <= SMALL_MAX_ROWS and out_features <= SMALL_OUTPUTS)
    )


@dataclass(frozen=True)
class LinearTile:
    """How a product is cut into programs.

    Attributes:
        dot: `linear_dot_kernel`, else `linear_fma_kernel`.
        block_m: rows of a program, a power of two as all blocks are, at least 8 with ``dot``.
        block_n: outputs of a program for each row, at least 16 with ``dot``.
        block_k: columns at once; with ``dot`` those of one warp, at least 16.
        num_warps: of a program.
        num_stages: of the loop over columns; 1 keeps nothing in shared memory.
        prefetch: ask for all of a program's weights before waiting.
    """

    dot: bool
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 3
    prefetch: bool = True


@functools.cache
def choose_tile(
    num_rows: int, out_features: int, in_features: int, itemsize: int, shared_memory: int
) -> LinearTile | None:
    """Choose by shapes alone; None where nothing fits.

    A loop over columns keeps all of its stages but one in shared memory, a block of weights and a
    block of rows each.

    Args:
        num_rows: may be rounded up to a power of two.
        itemsize: of weights, in bytes.
        shared_memory: that one program can have, in bytes.
    """
    block_m = triton.next_power_of_2(num_rows)
    block_k = triton.next_power_of_2(in_features)
    small = out_features <= SMALL_OUTPUTS
    if itemsize == 4 or num_rows <= (SMALL_FMA_ROWS if small else FMA_ROWS):
        block_k = min(block_k, 4096)
        if small:
            block_m, block_n = max(1, min(4, block_m // 2)), min(2, block_m)
        else:
            # 32 KiB of weights per program, but a program for each of some 128 processors.
            block_n = min((32 << 10) // (block_k * itemsize), out_features // 128)
            block_m, block_n = min(4, block_m), 1 << max(1, block_n).bit_length() - 1
        num_warps = max(4, min(8, block_n * block_k // 4096))
        stage_bytes = block_k * (block_n + block_m) * itemsize
        num_stages = min(3, 1 + shared_memory // stage_bytes)
        return LinearTile(False, block_m, block_n, block_k, num_warps, num_stages)
    block_m, block_n = max(8, min(16, block_m)), 16
    num_warps, block_k = (4, min(128, block_k // 4)) if small else (8, min(64, block_k // 8))
    block_k = max(16, block_k)
    stage_bytes = num_warps * block_k * (block_n + block_m) * itemsize
    if stage_bytes > shared_memory:  # which a product takes without a loop, too
        return None
    num_stages = 1 + triton.cdiv(in_features, num_warps * block_k)
    num_stages = min(5 if small else 6, num_stages, 1 + shared_memory // stage_bytes)
    return LinearTile(True, block_m, block_n, block_k, num_warps, num_stages, prefetch=small)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have."""
    if device.type != "cuda":  # interpreted
        return 99 << 10
    driver = triton.runtime.driver.active
    return driver.utils.get_device_properties(device.index)["max_shared_mem"]


def launch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, tile: LinearTile | None = None
) -> Tensor:
    """Run a kernel, or torch where no tile fits; arguments and result as those of `linear`.

    ``tile``: instead of `choose_tile`'s.
    """
    out_features, in_features = weight.shape
    out = x.new_empty(*x.shape[:-1], out_features)
    if not out.numel():
        return out
    if tile is None:
        rows = triton.next_power_of_2(x.numel() // in_features)
        limit = shared_memory(x.device)
        tile = choose_tile(rows, out_features, in_features, x.element_size(), limit)
    if tile is None:
        return F.linear(x, weight, bias)
    if x.stride(-1) != 1:
        x = x.contiguous()
    x = x.reshape(-1, in_features)
    num_rows = x.shape[0]
    pdl = has_dependent_launch(x.device)
    kernel = linear_dot_kernel if tile.dot else linear_fma_kernel
    kernel[(triton.cdiv(out_features, tile.block_n), triton.cdiv(num_rows, tile.block_m))](
        x,
        weight,
        None if bias is None else bias.contiguous(),
        out,
        num_rows,
        out_features,
        x.stride(0),
        weight.stride(0),
        K=in_features,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        NUM_WARPS=tile.num_warps,
        NUM_STAGES=tile.num_stages,
        PREFETCH=pdl and tile.prefetch,
        PDL=pdl,
        num_warps=tile.num_warps,
        **launch_options(True, x.device),
    )
    return out


if triton is not None:
    from qmoe_kernels.launching import has_dependent_launch, launch_options, prefetch

    @triton.jit(do_not_specialize=["num_rows"])
    def linear_fma_kernel(
        x_ptr,  # (num_rows, K)
        weight_ptr,  # (N, K)
        bias_ptr,  # (N,), or None
        out_ptr,  # (num_rows, N)
        num_rows,
        N,
        stride_x,
        stride_weight,
        K: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,  # the first so many columns are read before rows are known
        NUM_WARPS: tl.constexpr,
        NUM_STAGES: tl.constexpr,
        PREFETCH: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """Grid: (cdiv(N, BLOCK_N), cdiv(num_rows, BLOCK_M))."""
        rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]
        columns = tl.arange(0, BLOCK_K)[None, None, :]
        # What lies beyond the outputs reads the last one again, and is not stored.
        weight_rows = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
        weight_rows = weight_rows.to(tl.int64) * stride_weight
        weight_ptrs = weight_ptr + weight_rows[None, :, None] + columns
        x_ptrs = x_ptr + rows.to(tl.int64) * stride_x + columns
        mask = rows < num_rows
        weight = tl.load(weight_ptrs, mask=columns < K, other=0.0)
        if PREFETCH and BLOCK_K < K:
            _prefetch_rows(weight_ptr + BLOCK_K, weight_rows, K - BLOCK_K)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        x = tl.load(x_ptrs, mask=mask & (columns < K), other=0.0)
        acc = weight.to(tl.float32) * x.to(tl.float32)
        for k in tl.range(BLOCK_K, K, BLOCK_K, num_stages=NUM_STAGES):
            weight = tl.load(weight_ptrs + k, mask=columns < K - k, other=0.0)
            x = tl.load(x_ptrs + k, mask=mask & (columns < K - k), other=0.0)
            acc += weight.to(tl.float32) * x.to(tl.float32)
        _store(
            tl.sum(acc, 2),
            bias_ptr,
            out_ptr,
            tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None],
            tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :],
            num_rows,
            N,
        )

    @triton.jit(do_not_specialize=["num_rows"])
    def linear_dot_kernel(
        x_ptr,  # (num_rows, K)
        weight_ptr,  # (N, K)
        bias_ptr,  # (N,), or None
        out_ptr,  # (num_rows, N)
        num_rows,
        N,
        stride_x,
        stride_weight,
        K: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,  # of one warp
        NUM_WARPS: tl.constexpr,
        NUM_STAGES: tl.constexpr,
        PREFETCH: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """Grid: (cdiv(N, BLOCK_N), cdiv(num_rows, BLOCK_M)).

        A batch of products, one for each warp, each of other columns; their sum is the result.
        """
        first_output = tl.program_id(0) * BLOCK_N
        warps = tl.arange(0, NUM_WARPS)[:, None, None] * BLOCK_K
        columns = warps + tl.arange(0, BLOCK_K)[None, None, :]
        weight_rows = tl.minimum(first_output + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        weight_rows *= stride_weight
        weight_ptrs = weight_ptr + weight_rows[None, :, None] + columns
        rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[None, None, :]
        x_columns = warps + tl.arange(0, BLOCK_K)[None, :, None]
        x_ptrs = x_ptr + rows.to(tl.int64) * stride_x + x_columns
        mask = rows < num_rows
        acc = tl.zeros((NUM_WARPS, BLOCK_N, BLOCK_M), dtype=tl.float32)
        if PREFETCH:
            _prefetch_rows(weight_ptr, weight_rows, K)
        if NUM_WARPS * BLOCK_K >= K:
            weight = tl.load(weight_ptrs, mask=columns < K, other=0.0)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        if NUM_WARPS * BLOCK_K >= K:
            x = tl.load(x_ptrs, mask=mask & (x_columns < K), other=0.0)
            acc = tl.dot(weight, x, acc)
        else:
            for k in tl.range(0, K, NUM_WARPS * BLOCK_K, num_stages=NUM_STAGES):
                weight = tl.load(weight_ptrs + k, mask=columns < K - k, other=0.0)
                x = tl.load(x_ptrs + k, mask=mask & (x_columns < K - k), other=0.0)
                acc = tl.dot(weight, x, acc)
        _store(
            tl.sum(acc, 0),
            bias_ptr,
            out_ptr,
            tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :],
            first_output + tl.arange(0, BLOCK_N)[:, None],
            num_rows,
            N,
        )

    @triton.jit
    def _prefetch_rows(ptr, rows, LENGTH: tl.constexpr):
        """Bring LENGTH elements from each ``ptr + rows`` on to L2."""
        LINE: tl.constexpr = 128 * 8 // ptr.dtype.element_ty.primitive_bitwidth
        prefetch(ptr, rows, LENGTH, triton.next_power_of_2(triton.cdiv(LENGTH, LINE)))

    @triton.jit
    def _store(y, bias_ptr, out_ptr, rows, outputs, num_rows, N):
        if bias_ptr is not None:
            y += tl.load(bias_ptr + tl.minimum(outputs, N - 1)).to(tl.float32)
        mask = (rows < num_rows) & (outputs < N)
        out_ptrs = out_ptr + rows.to(tl.int64) * N + outputs
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
