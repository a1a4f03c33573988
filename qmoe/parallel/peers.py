"""Exchanges over memory that the GPUs of one host share: the quicker way for few rows.

NCCL is quicker from some size on, and works where this does not: over several hosts, without peer
access. So it is tried out when a group is made, against NCCL, and all ranks use it or none does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Bytes that one rank writes to another, up to which this is used.
MOST_BYTES = 2 << 20


class Peers:
    """This rank's side of the memory that a registered process group shares."""

    def __init__(self, processes: Any, device: torch.device, seconds: float) -> None:
        """Take the memory; every rank calls this, and none exchanges before all have.

        Args:
            processes: of torch.distributed.
            seconds: after which a rank that does not come is given up.

        Raises:
            Exception: whatever torch says where there is no such memory.
        """
        import torch.distributed._symmetric_memory as symmetric

        # Here, so that a CPU needs no Triton.
        from qmoe_kernels import exchange

        self._exchange = exchange
        rank, size = processes.rank(), processes.size()
        num_bytes = exchange.PeerMemory.num_bytes(size, MOST_BYTES)
        self._device = device
        # What others write to, and what holds theirs here: both live as long as this does.
        with torch.cuda.device(device):
            self._buffer: Tensor = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
            self._buffer.zero_()
            self._handle: Any = symmetric.rendezvous(self._buffer, processes.group_name)
        addresses = list(self._handle.buffer_ptrs)
        if addresses[rank] != self._buffer.data_ptr():
            raise RuntimeError("shared memory begins elsewhere")
        self._memory = exchange.PeerMemory(
            rank,
            size,
            torch.tensor(addresses, dtype=torch.int64, device=device),
            torch.zeros(3, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, pin_memory=True),
            MOST_BYTES,
            int(seconds * 1e9),
        )
        self._aside = torch.cuda.Stream(device)

    @property
    def failed(self) -> bool:
        """Whether an exchange was given up; what it has left is nothing."""
        return bool(self._memory.failed)

    def stop(self) -> None:
        """Let no exchange wait any more; from any thread, while a kernel waits."""
        self._memory.failed.fill_(1)
        count = self._exchange.MAX_PROGRAMS * self._memory.size
        with torch.cuda.stream(self._aside):
            self._buffer[: 8 * count].view(torch.int64).fill_(torch.iinfo(torch.int64).max)

    def takes_sum(self, output: Tensor, *, scatter: bool = False) -> bool:
        """Whether `sum` is for rows of this size."""
        parts = self._memory.size if scatter else 1
        return 0 < output.nbytes <= parts * MOST_BYTES

    def sum(self, output: Tensor, *, scatter: bool = False) -> Tensor:
        """As `qmoe_kernels.exchange.launch_sum`; `takes_sum` it."""
        with torch.cuda.device(self._device):
            return self._exchange.launch_sum(output.contiguous(), self._memory, scatter=scatter)

    def takes_gather(self, rows: Tensor, topk_ids: Tensor, most_rows: int) -> bool:
        """Whether `gather` is for rows of this size."""
        sizes = most_rows, rows.shape[1], topk_ids.shape[1]
        return 0 < self._exchange.gathered_bytes(*sizes, rows.dtype) <= MOST_BYTES

    def gather(
        self, rows: Tensor, topk_ids: Tensor, topk_weights: Tensor, most_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `qmoe_kernels.exchange.launch_gather`; `takes_gather` it."""
        given = rows, topk_ids, topk_weights
        with torch.cuda.device(self._device):
            return self._exchange.launch_gather(*given, most_rows, self._memory)
