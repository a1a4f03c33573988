"""Adding up few rows over symmetric memory: each GPU reads the others' in one kernel.

NCCL is quicker from some size on, and works where this does not: over several hosts, without peer
access. So it is tried out when a group is made, against NCCL, and all ranks use it or none does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Bytes of fp32 rows up to which it is quicker than NCCL between two H200s.
MOST_BYTES = 1 << 20


class OneShot:
    """Sums of up to `MOST_BYTES` over the ranks of a registered process group."""

    def __init__(self, processes: Any, device: torch.device) -> None:
        """Take memory that the other ranks can read; every rank calls this.

        Raises:
            Exception: whatever torch says where there is no such memory.
        """
        import torch.distributed._symmetric_memory as symmetric

        self.name: str = processes.group_name
        self.buffer: Tensor = symmetric.empty(MOST_BYTES // 4, dtype=torch.float32, device=device)
        symmetric.rendezvous(self.buffer, self.name)

    def takes(self, output: Tensor) -> bool:
        """Whether ``output`` is small enough, and of a size that the kernel reads whole."""
        return output.numel() * 4 <= MOST_BYTES and output.numel() % 4 == 0

    def sum(self, output: Tensor) -> Tensor:
        """The sum of all ranks' outputs, in fp32; the ranks add up in one order.

        Args:
            output: any shape, float; `takes` it.
        """
        place = self.buffer[: output.numel()]
        place.copy_(output.reshape(-1))
        total = torch.ops.symm_mem.one_shot_all_reduce(place, "sum", self.name)
        return total.view(output.shape)
