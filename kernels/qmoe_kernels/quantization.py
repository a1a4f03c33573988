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
from typing import Literal

import torch

WeightFormat = Literal["int8", "fp8"]

STORAGE_DTYPE: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST: dict[str, float] = {"int8": 127.0, "fp8": 448.0}

SMALLEST_SCALE = torch.finfo(torch.float32).tiny

# Elements per block. On a CPU the scratch of one block (10 bytes an element) fits in 2 MiB of L2.
BLOCK_SIZE = {"cpu": 1 << 17, "cuda": 1 << 26}


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
    q, scale, *_ = _quantize(weight, weights, name, with_error=False)
    return q, scale


def quantize_with_error(
    weight: torch.Tensor, weights: WeightFormat, *, name: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Do what `quantize` does and return ``(q, scale, error)``.

    ``error`` is ``|q * scale - weight| / |weight|`` (Frobenius), accumulated in fp32 per row and
    fp64 across rows while the rows are in cache; 0 for a weight of zeros.
    """
    q, scale, error, norm = _quantize(weight, weights, name, with_error=True)
    return q, scale, math.sqrt(error / norm) if norm else 0.0


def quantize_with_squares(
    weight: torch.Tensor, weights: WeightFormat, *, name: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Do what `quantize` does and return ``(q, scale, error, norm)``.

    ``error`` is ``|q * scale - weight|**2`` and ``norm`` is ``|weight|**2``, so that a weight
    which comes in pieces has its relative error from their sums.
    """
    return _quantize(weight, weights, name, with_error=True)


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
        wide = decode(q_rows[rows], out=scratch[: q_rows.shape[0] - start])
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


def decode(q: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Copy int8 or float8_e4m3fn values into ``out``, a tensor of a wider float dtype; exact.

    torch converts float8 on a CPU one value at a time. An e4m3fn number ``seeeemmm`` whose bits
    are put into a half as ``s0eeeemmm0000000`` is that number times 2**-8, subnormals included,
    because the exponents' biases are 7 and 15: three integer passes, ten times as fast. (NaN,
    which no quantized weight holds, comes out as 480.)
    """
    if q.dtype != torch.float8_e4m3fn or q.device.type != "cpu":
        return out.copy_(q)
    # Sign extension puts copies of the sign into bits 15 and 14; the mask clears bit 14.
    half = q.view(torch.int8).to(torch.int16)
    half = half.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    return out.copy_(half).mul_(256.0)


def _kind(tensor: torch.Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else "cuda"


def _quantize(
    weight: torch.Tensor, weights: WeightFormat, name: str | None, *, with_error: bool
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    if weights not in STORAGE_DTYPE:
        raise ValueError(f"unknown weight format {weights!r}; 'int8' and 'fp8' work")
    what = name or "weight"
    if not weight.is_floating_point() or weight.ndim < 2:
        raise ValueError(
            f"{what}: cannot quantize {weight.dtype} of shape {tuple(weight.shape)}; "
            "expected a float tensor (..., out_features, in_features)"
        )
    weight = weight.detach()
    q = torch.empty(weight.shape, dtype=STORAGE_DTYPE[weights], device=weight.device)
    scale = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    if not weight.numel():
        return q, scale.fill_(SMALLEST_SCALE), 0.0, 0.0

    matrices = [(weight, q, scale)]
    while matrices[0][0].ndim > 2:
        matrices = [triple for many in matrices for triple in zip(*many, strict=True)]
    rows_per_block = max(1, BLOCK_SIZE[_kind(weight)] // weight.shape[-1])
    quantize_rows = _RowQuantizer(min(rows_per_block, weight.shape[-2]), weight, weights)
    sums = [
        quantize_rows(w[start:][:rows_per_block], q2[start:], scale2[start:], with_error)
        for w, q2, scale2 in matrices
        for start in range(0, weight.shape[-2], rows_per_block)
    ]
    if not scale.isfinite().all():
        *expert, row = (~scale.isfinite()).nonzero()[0].tolist()
        where = f"expert {', '.join(map(str, expert))}, " if expert else ""
        raise ValueError(f"{what}: NaN or infinity in {where}row {row}; fix the checkpoint")
    if not with_error:
        return q, scale, 0.0, 0.0
    error, norm = (math.fsum(map(float, column)) for column in zip(*sums, strict=True))
    return q, scale, error, norm


class _RowQuantizer:
    """Quantizes blocks of rows in one scratch, so that no block allocates."""

    def __init__(self, rows: int, like: torch.Tensor, weights: str) -> None:
        shape = (rows, like.shape[-1])
        self.largest = LARGEST[weights]
        self.scratch = like.new_empty(shape, dtype=torch.float32)
        # Holds the bits of a 16-bit weight, then the rounded values.
        self.scratch2 = like.new_empty(shape, dtype=torch.float32)

    def __call__(
        self, weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, with_error: bool
    ) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Fill the first rows of ``q`` and ``scale``.

        Returns the sums of squares of the error and of the weight.
        """
        num_rows = weight.shape[0]
        q, scale = q[:num_rows], scale[:num_rows]
        x = self.scratch[:num_rows].copy_(weight)
        norm = torch.dot(x.view(-1), x.view(-1)) if with_error else 0.0
        scale.copy_(self._absmax(weight, x)).div_(self.largest).clamp_(min=SMALLEST_SCALE)
        x.div_(scale.unsqueeze(-1))
        if not with_error:
            q.copy_(x.round_() if q.dtype == torch.int8 else x)
            return 0.0, 0.0
        rounded = self.scratch2[:num_rows]
        if q.dtype == torch.int8:
            q.copy_(torch.round(x, out=rounded))
        else:
            decode(q.copy_(x), out=rounded)
        error = torch.linalg.vector_norm(x.sub_(rounded), dim=-1).mul_(scale)
        return torch.dot(error, error), norm

    def _absmax(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Largest magnitude of each row; NaN or infinity if the row holds one."""
        if weight.dtype not in (torch.bfloat16, torch.float16):
            return torch.abs(x, out=self.scratch2[: x.shape[0]]).amax(-1)
        # Without its sign a float's bits order as integers do, infinity and NaN last.
        bits = self.scratch2.view(-1).view(torch.int16)[: x.numel()].view(x.shape)
        torch.bitwise_and(weight.view(torch.int16), 0x7FFF, out=bits)
        return bits.amax(-1).view(weight.dtype)
