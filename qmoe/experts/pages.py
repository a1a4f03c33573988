"""What one layer's pages look like: one expert's 8-bit weights, gate_up then down, contiguous."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Pages start at multiples of this, so that every load of a page is a full 128-byte line.
PAGE_ALIGNMENT = 128


@dataclass(frozen=True)
class LayerPages:
    """The pages of one layer: one per expert, all of the same size.

    Scales and biases are no part of a page: they are small and stay on the device.

    Attributes:
        name: the experts module's name in its model, for messages.
        num_experts: pages of this layer.
        dtype: of the weights, int8 or float8_e4m3fn: one byte each.
        gate_up: (rows, columns) of an expert's first projection.
        down: (rows, columns) of its second one.
    """

    name: str
    num_experts: int
    dtype: torch.dtype
    gate_up: tuple[int, int]
    down: tuple[int, int]

    @property
    def down_offset(self) -> int:
        """Bytes from a page's start to its down projection."""
        return math.prod(self.gate_up)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return math.prod(self.gate_up) + math.prod(self.down)

    @property
    def page_stride(self) -> int:
        """Bytes from one page to the next: page_bytes rounded up to `PAGE_ALIGNMENT`."""
        return -(-self.page_bytes // PAGE_ALIGNMENT) * PAGE_ALIGNMENT

    def views(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights that lie in ``memory``, without a copy.

        Args:
            memory: (num_pages, stride) uint8, its rows contiguous and at least page_bytes long.

        Returns:
            gate_up (num_pages, rows, columns) and down (num_pages, rows, columns) in ``dtype``;
            rows of one page are contiguous.
        """
        gate_up = memory[:, : self.down_offset].view(self.dtype)
        down = memory[:, self.down_offset : self.page_bytes].view(self.dtype)
        return gate_up.unflatten(1, self.gate_up), down.unflatten(1, self.down)
