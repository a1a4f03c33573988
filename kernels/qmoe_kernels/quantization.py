"""Symmetric quantization per output channel: INT8 and FP8 (e4m3fn).

Each output row ``w`` of a weight is stored as ``q`` and one fp32 ``scale`` with ``w ~ q * scale``:

- INT8: ``scale = absmax(w) / 127``, ``q = round_half_to_even(w / scale)`` in [-127, 127].
- FP8:  ``scale = absmax(w) / 448``, ``q = e4m3fn(w / scale)``; 448 is e4m3fn's largest finite
  value.

A scale is at least the smallest normal fp32. A row of zeros therefore divides by something and
gives zeros back, and no scale is subnormal: ``absmax / scale`` exceeds 127 (448) by rounding
alone, which ``round`` takes back, so nothing needs clamping.

Rows go through in blocks that stay in the processor's cache. A row never depends on its neighbours,
and every step is exact or correctly rounded by IEEE 754: block size, threads and device change no
bit.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Literal, cast

import torch

from qmoe_kernels import cpu
from qmoe_kernels.tensors import is_watched

WeightFormat = Literal["int8", "fp8"]

STORAGE_DTYPE: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FORMAT_OF = {dtype: cast(WeightFormat, name) for name, dtype in STORAGE_DTYPE.items()}
LARGEST: dict[str, float] = {"int8": 127.0, "fp8": 448.0}

SMALLEST_SCALE = torch.finfo(torch.float32).tiny

# Elements per block. On a CPU a block and its scratch (7 bytes an element) fit in 2 MiB of L2.
BLOCK_SIZE = {"cpu": 1 << 18, "cuda": 1 << 26}
# Of these rows one is looked at where an error is estimated on the way.
SAMPLED_ROWS = 16

_of_thread = threading.local()


@dataclass(frozen=True)
class QuantizedRows:
    """Rows of activations in 8 bits, as products of 8-bit rows take them.

    Attributes:
        q: (num_rows, in_features) int8 or float8_e4m3fn, contiguous.
        scale: (num_rows,) fp32, contiguous.
        dtype: what the rows were before, and what a layer makes of them: bf16, fp16 or fp32.
    """

    q: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """(num_rows, in_features)."""
        return self.q.shape

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.q.device


def quantize(
    weight: torch.Tensor, weights: WeightFormat, *, name: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight, or a stack of experts' weights, per output channel.

    Args:
        weight: (..., out_features, in_features), any floating-point dtype and strides.
        weights: ``"int8"`` or ``"fp8"``.
        name: what errors call the tensor.

    Returns:
        ``q``, (..., out_features, in_features) int8 or float8_e4m3fn, contiguous, and ``scale``,
        (..., out_features) fp32.

    Raises:
        ValueError: an unknown format, a weight that is not floating point or has fewer than two
            dimensions, or a NaN or an infinity in it.
    """
    return _quantize(weight, weights, name)


def quantize_with_squares(
    weight: torch.Tensor,
    weights: WeightFormat,
    *,
    name: str | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Do what `quantize` does and return ``(q, scale, error, norm)``.

    ``error`` is ``|q * scale - weight|**2`` and ``norm`` is ``|weight|**2``, both over every
    `SAMPLED_ROWS`-th row: a weight that comes in pieces has its relative error from their sums,
    and every piece is in it at little cost. ``out`` is where ``q`` goes, if given.
    """
    squares: list[float] = []
    q, scale = _quantize(weight, weights, name, out, squares)
    if not weight.numel():
        return q, scale, 0.0, 0.0
    if squares:
        return q, scale, squares[0], squares[1]
    rows = slice(None, None, SAMPLED_ROWS)
    matrix = (-1, weight.shape[-1])
    sampled = weight.detach().reshape(matrix)[rows]
    unit = scale.view(-1, 1)[rows]
    exact, off = _scratch(2, *sampled.shape, device=weight.device)
    # In units of the row's scale: squares neither overflow nor vanish.
    norm = torch.linalg.vector_norm(exact.copy_(sampled).div_(unit), dim=-1, keepdim=True)
    widen(q.view(matrix)[rows], out=off).sub_(exact)
    error = torch.linalg.vector_norm(off, dim=-1, keepdim=True)
    squares = [float((values.double() * unit).square().sum()) for values in (error, norm)]
    return q, scale, squares[0], squares[1]


def quantize_rows(x: torch.Tensor, to: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of activations by its own largest magnitude, as `quantize` does weights.

    Unlike weights, activations may hold a NaN or an infinity: such a row's scale is not finite
    either, and what it is multiplied with shows it.

    Args:
        x: (..., in_features), any floating-point dtype.
        to: ``"int8"`` or ``"fp8"``.

    Returns:
        ``q``, (..., in_features) int8 or float8_e4m3fn, and ``scale``, (...) fp32.
    """
    q = torch.empty(x.shape, dtype=STORAGE_DTYPE[to], device=x.device)
    scale = x.new_full(x.shape[:-1], SMALLEST_SCALE, dtype=torch.float32)
    if x.numel():
        matrix = x.detach().reshape(-1, x.shape[-1])
        _quantize_rows(matrix, q.view(matrix.shape), scale.view(-1), LARGEST[to])
    return q, scale


def dequantize(
    q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return ``q * scale``, multiplied in fp32 and rounded once to ``dtype``.

    Args:
        q: (..., out_features, in_features) int8 or float8_e4m3fn.
        scale: (..., out_features) fp32.
        dtype: of the result; float64 multiplies in float64.

    Raises:
        ValueError: ``q`` has another dtype or ``scale`` another shape.
    """
    if q.dtype not in STORAGE_DTYPE.values():
        raise ValueError(f"cannot dequantize {q.dtype}; int8 and float8_e4m3fn work")
    if scale.shape != q.shape[:-1]:
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} does not fit q of shape {tuple(q.shape)}; "
            f"expected {tuple(q.shape[:-1])}"
        )
    result = torch.empty(q.shape, dtype=dtype, device=q.device)
    if not q.numel():
        return result
    q_rows, scale_rows = q.reshape(-1, q.shape[-1]), scale.reshape(-1, 1)
    result_rows = result.view(q_rows.shape)
    num_rows = max(1, BLOCK_SIZE[_kind(q)] // q.shape[-1])
    wide_dtype = torch.promote_types(dtype, torch.float32)
    scratch = torch.empty_like(q_rows[:num_rows], dtype=wide_dtype)
    for start in range(0, q_rows.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        wide = widen(q_rows[rows], out=scratch[: q_rows.shape[0] - start])
        result_rows[rows] = wide.mul_(scale_rows[rows])
    return result


def relative_error(q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> float:
    """Return ``|q * scale - weight| / |weight|`` (Frobenius), computed in fp64; 0 for zeros.

    Args:
        q: (..., out_features, in_features) int8 or float8_e4m3fn.
        scale: (..., out_features) fp32.
        weight: (..., out_features, in_features), what was quantized.
    """
    error = norm = 0.0
    in_features = weight.shape[-1]
    rows_per_block = max(1, BLOCK_SIZE[_kind(weight)] // max(1, in_features))
    for q2, scale2, weight2 in zip(
        q.reshape(-1, *q.shape[-2:]),
        scale.reshape(-1, scale.shape[-1]),
        weight.reshape(-1, *weight.shape[-2:]),
        strict=True,
    ):
        for start in range(0, weight2.shape[0], rows_per_block):
            rows = slice(start, start + rows_per_block)
            exact = weight2[rows].double()
            difference = dequantize(q2[rows], scale2[rows], torch.float64).sub_(exact)
            error += float(difference.square_().sum())
            norm += float(exact.square().sum())
    return math.sqrt(error / norm) if norm else 0.0


def widen(q: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Copy int8 or float8_e4m3fn values into ``out``, a tensor of a wider float dtype; exact.

    torch converts float8 on a CPU one value at a time. An e4m3fn number ``seeeemmm`` whose bits
    are put into a half as ``s0eeeemmm0000000`` is that number times 2**-8, subnormals included,
    because the exponents' biases are 7 and 15: integer passes in cache, ten times as fast. Two
    codes are NaN instead; no weight that was quantized here holds them.
    """
    if q.dtype != torch.float8_e4m3fn or q.device.type != "cpu":
        return out.copy_(q)
    num_rows = max(1, BLOCK_SIZE["cpu"] // max(1, math.prod(q.shape[1:])))
    bits = torch.empty_like(q[:num_rows], dtype=torch.int16)
    # From half to bf16, too, torch goes one value at a time: by way of fp32.
    wide = None if out.itemsize > 2 else torch.empty_like(q[:num_rows], dtype=torch.float32)
    for block, out_block in zip(
        q.view(torch.int8).split(num_rows), out.split(num_rows), strict=True
    ):
        # Sign extension puts copies of the sign into bits 15 and 14; the mask clears bit 14.
        half = bits[: len(block)].copy_(block).mul_(1 << 7).bitwise_and_(~0x4000)
        to = out_block if wide is None else wide[: len(block)]
        to.copy_(half.view(torch.float16)).mul_(256.0)
        is_nan = block.bitwise_and(0x7F) == 0x7F
        if is_nan.any():
            to.masked_fill_(is_nan, torch.nan)
        if wide is not None:
            out_block.copy_(to)
    return out


def _kind(tensor: torch.Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else "cuda"


def _quantize(
    weight: torch.Tensor,
    weights: WeightFormat,
    name: str | None,
    out: torch.Tensor | None = None,
    squares: list[float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `quantize` does; extend ``squares`` by error and norm where that costs nothing."""
    if weights not in STORAGE_DTYPE:
        raise ValueError(f"unknown weight format {weights!r}; 'int8' and 'fp8' work")
    what = name or "weight"
    if not weight.is_floating_point() or weight.ndim < 2:
        raise ValueError(
            f"{what}: cannot quantize {weight.dtype} of shape {tuple(weight.shape)}; "
            "expected a float tensor (..., out_features, in_features)"
        )
    weight = weight.detach()
    q = out
    if q is None:
        q = torch.empty(weight.shape, dtype=STORAGE_DTYPE[weights], device=weight.device)
    scale = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    if not weight.numel():
        return q, scale.fill_(SMALLEST_SCALE)

    # Experts that are slices of something larger are matrices of their own; else all rows are one.
    matrices = [weight.view(-1, weight.shape[-1])] if weight.is_contiguous() else [weight]
    while matrices[0].ndim > 2:
        matrices = [matrix for stack in matrices for matrix in stack]
    for matrix, q_rows, scale_rows in zip(
        matrices,
        q.view(len(matrices), -1, q.shape[-1]),
        scale.view(len(matrices), -1),
        strict=True,
    ):
        if squares is None or len(matrices) > 1 or not cpu.narrows(matrix):
            _quantize_rows(matrix, q_rows, scale_rows, LARGEST[weights])
        else:
            squares += cpu.quantize_rows(matrix, q_rows, scale_rows, SAMPLED_ROWS)
    if not scale.isfinite().all():
        *expert, row = (~scale.isfinite()).nonzero()[0].tolist()
        where = f"expert {', '.join(map(str, expert))}, " if expert else ""
        raise ValueError(f"{what}: NaN or infinity in {where}row {row}; fix the checkpoint")
    return q, scale


def _quantize_rows(
    weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, largest: float
) -> None:
    """Fill ``q`` (rows, columns) and ``scale`` (rows,) from ``weight`` (rows, columns).

    By native loops; in torch on a GPU and where there are none. Python takes as long over a call of
    torch as the processor over 32 KiB of cache, and calls of several threads take turns: hence few
    calls, on blocks as large as the cache allows.
    """
    weight = weight.resolve_neg()  # the imaginary part of a conjugate is negated when read
    if cpu.narrows(weight):
        cpu.quantize_rows(weight, q, scale)
        return
    step = max(1, BLOCK_SIZE[_kind(weight)] // max(1, weight.shape[1]))
    (scratch,) = _scratch(1, min(step, len(weight)), weight.shape[1], device=weight.device)
    # A tensor, since CUDA multiplies by the rounded inverse of a number instead of dividing by it.
    largest_ = torch.tensor(largest, dtype=torch.float32, device=weight.device)
    for block, q_block, scale_block in zip(
        weight.split(step), q.split(step), scale.split(step), strict=True
    ):
        rounded = scratch[: len(block)]
        absmax = _absmax(block, rounded)
        torch.div(absmax, largest_, out=scale_block).clamp_(min=SMALLEST_SCALE)
        rounded.copy_(block).div_(scale_block[:, None])
        q_block.copy_(rounded.round_() if q.dtype == torch.int8 else rounded)


def _scratch(*shape: int, device: torch.device) -> torch.Tensor:
    """Room for fp32; on a CPU the thread's own, kept: fresh memory costs as much as quantizing."""
    if device.type != "cpu" or is_watched():  # what is kept must not be a fake tensor
        return torch.empty(shape, dtype=torch.float32, device=device)
    size = math.prod(shape)
    kept: torch.Tensor | None = getattr(_of_thread, "scratch", None)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):  # in which later calls could not write
            kept = _of_thread.scratch = torch.empty(size, dtype=torch.float32, device=device)
    return kept[:size].view(shape)


def _absmax(block: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row, fp32; NaN or infinity if the row holds one."""
    if block.dtype not in (torch.bfloat16, torch.float16):
        return torch.amax(scratch.copy_(block).abs_(), -1)
    # Without its sign a float's bits order as integers do, infinity and NaN last.
    bits = scratch.view(-1).view(torch.int16)[: block.numel()].view(block.shape)
    torch.bitwise_and(block.view(torch.int16), 0x7FFF, out=bits)
    return torch.amax(bits, -1).view(block.dtype).float()
