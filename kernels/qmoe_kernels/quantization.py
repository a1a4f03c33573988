"""Symmetric quantization per output channel: INT8 and FP8 (e4m3fn).

Each output row ``w`` of a weight is stored as ``q`` and one fp32 ``scale`` with ``w ~ q * scale``:

- INT8: ``scale = absmax(w) / 127``, ``q = round_half_to_even(w / scale)`` in [-127, 127].
- FP8:  ``scale = absmax(w) / 448``, ``q = e4m3fn(w / scale)``; 448 is e4m3fn's largest finite value.

A row of zeros gets the smallest normal fp32 as its scale, so that dequantizing never divides or
multiplies by zero and gives zeros back.
"""

from __future__ import annotations

from typing import Literal

import torch

WeightFormat = Literal["int8", "fp8"]

STORAGE_DTYPE: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST: dict[str, float] = {"int8": 127.0, "fp8": 448.0}
