"""RMSNorm: rows divided by their root mean square, times a weight.

    y   = x * rsqrt(mean(x ** 2) + epsilon)           in fp32
    out = round(weight * round(y))                    round_before_weight
    out = round((weight_offset + weight) * y)         otherwise

``round`` goes to the dtype of ``x``. In transformers 5.17 and 5.23:

- rounded before the weight: MixtralRMSNorm, Qwen3MoeRMSNorm, OlmoeRMSNorm, DeepseekV3RMSNorm,
  Glm4MoeRMSNorm, GraniteMoeRMSNorm
- rounded once: GptOssRMSNorm; Qwen3NextRMSNorm with an offset of 1

Sums are fp32 on both sides, but in another order than torch's: now and then ``y`` is the next one
of the dtype's numbers, which the weight can make two numbers of the result.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from qmoe_kernels.tensors import is_plain

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU needs no Triton
    triton = None

MAX_SIZE = 16384  # of a row, which one program has in its registers


def rms_norm(
    hidden_states: Tensor,  # (..., size) bf16 | fp16 | fp32
    weight: Tensor,  # (size,) float
    epsilon: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = True,
) -> Tensor:
    """Normalize rows; the module's docstring has the formula, and which model has which.

    One launch on a GPU. A row's bits depend on that row alone, not on how many others there are.
    Heads of a projection's output, ``x.view(..., num_heads, head_dim)``, are read where they lie,
    also where the projection has more outputs than these; layouts with more strides are copied.
    There is no gradient.

    Returns:
        Contiguous, of the shape and dtype of ``hidden_states``; a wider weight that comes after
        the rounding makes the result as wide.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, rows beyond `MAX_SIZE` on a GPU, or
            an offset for a weight that comes after the rounding.
    """
    if not hidden_states.ndim or weight.shape != hidden_states.shape[-1:]:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} for hidden_states of shape "
            f"{tuple(hidden_states.shape)}; expected one weight for each column"
        )
    if not (hidden_states.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"hidden_states are {hidden_states.dtype} and weight is {weight.dtype}; floats work"
        )
    if weight.device != hidden_states.device:
        raise ValueError(f"weight is on {weight.device}, not on {hidden_states.device}")
    if round_before_weight and weight_offset:
        raise ValueError(f"weight_offset={weight_offset} needs round_before_weight=False")
    plain = is_plain(hidden_states, weight)
    if triton is None or not (plain and hidden_states.is_cuda):
        return _rms_norm(hidden_states, weight, epsilon, weight_offset, round_before_weight)
    with torch.cuda.device_of(hidden_states):
        return launch_rms_norm(hidden_states, weight, epsilon, weight_offset, round_before_weight)


def _rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, weight_offset: float, round_before_weight: bool
) -> Tensor:
    """`rms_norm` in torch."""
    y = F.rms_norm(x.float(), x.shape[-1:], eps=epsilon)
    if round_before_weight:
        out = weight * y.to(x.dtype)
    else:
        out = ((weight_offset + weight.float()) * y).to(x.dtype)
    return out.contiguous()


def launch_rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, weight_offset: float, round_before_weight: bool
) -> Tensor:
    """Run `rms_norm_kernel`; arguments and result as those of `rms_norm`."""
    size = x.shape[-1]
    if size > MAX_SIZE:
        raise ValueError(f"rows of {size} numbers; up to {MAX_SIZE} work")
    dtype = x.dtype
    if round_before_weight and weight.dtype != dtype:
        dtype = torch.promote_types(dtype, weight.dtype)
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    strides = _row_strides(x)
    if strides is None:
        x = x.contiguous()
        strides = _evenly(size)
    num_rows = out.numel() // size
    rows, block, num_warps = _tile(size, num_rows >= MANY_ROWS)
    rms_norm_kernel[(-(-num_rows // rows),)](
        x,
        weight.contiguous(),
        out,
        num_rows,
        *strides,
        float(epsilon),
        SIZE=size,
        WEIGHT_OFFSET=float(weight_offset),
        ROUND_BEFORE_WEIGHT=round_before_weight,
        ROWS=rows,
        BLOCK=block,
        PDL=has_dependent_launch(x.device),
        num_warps=num_warps,
        enable_fp_fusion=False,  # torch's mean is rounded before epsilon is added
        **launch_options(True, x.device),
    )
    return out


def _row_strides(x: Tensor) -> tuple[int, int, int] | None:
    """Return ``(inner, outer_stride, inner_stride)``, in elements, or None for another layout.

    Row r begins at ``r // inner * outer_stride + r % inner * inner_stride``: heads in tokens.
    """
    if x.is_contiguous():
        return _evenly(x.shape[-1])
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    levels: list[tuple[int, int]] = []  # (length, stride) of what counts rows, the fastest first
    for length, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * length, levels[-1][1])
        elif length > 1:
            levels.append((length, stride))
    if len(levels) > 2:
        return None
    if len(levels) == 2:
        return levels[0][0], levels[1][1], levels[0][1]
    return _evenly(levels[0][1] if levels else 0)


def _evenly(stride: int) -> tuple[int, int, int]:
    """Return strides of rows at one distance, with no 1 and no 0 in them.

    Of each of these Triton would compile a kernel of its own, beside that for two distances.
    """
    return 16, 16 * stride, stride


# From so many short rows on, programs have as many as fill four warps. Below, one warp each: with
# few rows, more programs end earlier.
MANY_ROWS = 8192


@functools.cache
def _tile(size: int, many: bool) -> tuple[int, int, int]:
    """Return rows per program, the power of two they are padded to, and warps.

    A row is spread over the same threads whether there are many rows or few, so that its sum has
    one order.
    """
    block = triton.next_power_of_2(size)
    if block > 512:
        return 1, block, block // 512
    return (4096 // block, block, 4) if many else (max(1, 256 // block), block, 1)


if triton is not None:
    from qmoe_kernels.launching import has_dependent_launch, launch_options

    @triton.jit(do_not_specialize=["num_rows", "epsilon"])
    def rms_norm_kernel(
        x_ptr,  # (num_rows, SIZE), strides below
        weight_ptr,  # (SIZE,)
        out_ptr,  # (num_rows, SIZE)
        num_rows,
        inner,  # row r begins at r // inner * outer_stride + r % inner * inner_stride
        outer_stride,
        inner_stride,
        epsilon,
        SIZE: tl.constexpr,
        WEIGHT_OFFSET: tl.constexpr,
        ROUND_BEFORE_WEIGHT: tl.constexpr,
        ROWS: tl.constexpr,  # per program
        BLOCK: tl.constexpr,  # power of two, at least SIZE
        PDL: tl.constexpr,
    ):
        """Grid: (cdiv(num_rows, ROWS),)."""
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        columns = tl.arange(0, BLOCK)[None, :]
        mask = (rows < num_rows) & (columns < SIZE)
        begins = (rows // inner).to(tl.int64) * outer_stride
        begins += (rows % inner).to(tl.int64) * inner_stride
        x = tl.load(x_ptr + begins + columns, mask=mask, other=0.0).to(tl.float32)
        # Each row its own, so that the weight comes in the layout of x.
        weight = tl.load(weight_ptr + columns + 0 * rows, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x * x, 1)[:, None] * (1.0 / SIZE)
        y = x * tl.rsqrt(mean + epsilon)
        if ROUND_BEFORE_WEIGHT:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        elif WEIGHT_OFFSET != 0.0:
            weight += WEIGHT_OFFSET
        y = (weight * y).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows.to(tl.int64) * SIZE + columns, y, mask=mask)
