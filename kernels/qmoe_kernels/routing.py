"""Which expert works on which tokens: (token, expert) pairs sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExpertRouting:
    """The pairs of ``topk_ids`` grouped by expert.

    Pair ``p`` is token ``p // top_k`` at its ``p % top_k``-th expert. With two experts, top_k = 2
    and ``topk_ids = [[1, 0], [1, 2], [0, 1]]`` (2 is not one of the experts: that pair is
    skipped)::

        sorted_pair_ids  = [1, 4, 0, 2, 5, 3]  # expert 0: 1, 4; expert 1: 0, 2, 5; skipped: 3
        sorted_token_ids = [0, 2, 0, 1, 2, 1]
        expert_offsets   = [0, 2, 5]

    Pairs of one expert keep their order, so the result depends on nothing but ``topk_ids``.

    Attributes:
        sorted_pair_ids: (num_tokens * top_k,) int32.
        expert_offsets: (num_experts + 1,) int32, exclusive, with a leading 0.
        top_k: experts per token.
    """

    sorted_pair_ids: torch.Tensor
    expert_offsets: torch.Tensor
    top_k: int

    @property
    def sorted_token_ids(self) -> torch.Tensor:
        """(num_tokens * top_k,) int32: the token of each sorted pair."""
        return self.sorted_pair_ids // self.top_k

    @classmethod
    def from_topk_ids(cls, topk_ids: torch.Tensor, num_experts: int) -> ExpertRouting:
        """Sort the pairs of ``topk_ids`` by expert.

        On a GPU this is a handful of launches without a synchronization, and no shape depends on a
        device value: a CUDA graph can hold it.

        Args:
            topk_ids: (num_tokens, top_k) int32 or int64. Ids outside [0, num_experts) are skipped;
                expert parallelism marks experts of other ranks so.
            num_experts: of this layer.
        """
        ids = topk_ids.flatten().to(torch.int32)
        ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
        sorted_ids, order = torch.sort(ids, stable=True)
        experts = torch.arange(num_experts + 1, dtype=torch.int32, device=ids.device)
        offsets = torch.searchsorted(sorted_ids, experts, out_int32=True)
        return cls(order.to(torch.int32), offsets, topk_ids.shape[1])
