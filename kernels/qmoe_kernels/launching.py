"""What the launchers of kernels have in common."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def prefetch(ptr, offsets, length, LINES: tl.constexpr):
    """Bring LINES cache lines from each ``ptr + offsets`` on to L2, up to ``length`` elements."""
    LINE: tl.constexpr = 128 * 8 // ptr.dtype.element_ty.primitive_bitwidth
    lines = tl.minimum(tl.arange(0, LINES) * LINE, length - 1)
    ptrs = (ptr + offsets[:, None] + lines[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def narrow(ids):
    """Ids as int32; one that int32 does not hold stays outside of all experts."""
    if ids.dtype == tl.int64:
        ids = tl.minimum(tl.maximum(ids, -1), 0x7FFFFFFF)
    return ids.to(tl.int32)


# Inline assembly and programmatic launches are for devices, not for the interpreter.
COMPILED = isinstance(prefetch, triton.JITFunction)


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Return whether a kernel may start while the one before it ends."""
    return COMPILED and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(dependent: bool, device: torch.device) -> dict[str, bool]:
    """Return what lets a kernel start while the one before it ends, where it is to and can."""
    return {"launch_pdl": True} if dependent and has_dependent_launch(device) else {}


def weight_bits(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return weights as kernels take them: FP8 that is to be widened as int8."""
    return weight.view(torch.int8) if is_widened_fp8(weight, x) else weight


def is_widened_fp8(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Return whether FP8 weights meet rows of another dtype."""
    return weight.dtype == torch.float8_e4m3fn and x.dtype != weight.dtype
