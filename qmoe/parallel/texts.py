"""Ranks with texts of their own: attention for a rank's own rows, experts for everybody's.

Each forward pass of any rank is a *round*, which all ranks take part in: those that have nothing to
compute run the layers' experts alone, for the others' rows. In a layer, rows are gathered from all
ranks, each runs its own experts on all of them, and the sums are scattered to where the rows came
from. A row's sum is added up in fp32, as for one text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qmoe.parallel.group import KnownToAll, RankGroup

_NO_EXPERT = -1


class OwnTexts:
    """One call in which each rank has texts of its own.

    Attributes:
        rows: rows of the rank that has most of them, in the round that is under way.
    """

    def __init__(self, group: RankGroup, top_k: int, interrupted: Callable[[], bool]) -> None:
        """Nothing is exchanged yet.

        Args:
            group: the ranks, in a call together.
            top_k: experts of a token, in every layer.
            interrupted: whether this rank was.
        """
        self.group, self.top_k, self.interrupted = group, top_k, interrupted
        self.rows = 0

    def begin(self, num_rows: int) -> bool:
        """Begin a round; False where no rank has rows any more.

        Args:
            num_rows: of this rank; 0 where its texts have ended.

        Raises:
            KnownToAll: a rank was interrupted; all raise this in the same round.
            RankFailed: another rank failed or is gone.
        """
        heard = self.group.exchange(
            "a step of qmoe.generate with texts of its own",
            rows=num_rows,
            interrupted=self.interrupted(),
        )
        for rank, other in enumerate(heard):
            if other["interrupted"]:
                raise KnownToAll(KeyboardInterrupt(f"rank {rank} was interrupted"))
        self.rows = max(other["rows"] for other in heard)
        return self.rows > 0

    def take_part(
        self, layers: list[Callable[[Tensor, Tensor, Tensor], Any]], like: Tensor
    ) -> None:
        """Take part in rounds without rows, until no rank has any.

        Args:
            layers: the model's experts modules in the order in which it runs them.
            like: (0, hidden_size) in the dtype and on the device of the model's rows.
        """
        ids = torch.empty(0, self.top_k, dtype=torch.int64, device=like.device)
        weights = torch.empty(0, self.top_k, device=like.device)
        while self.begin(0):
            for layer in layers:
                layer(like, ids, weights)

    def run(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """A layer's output for this rank's rows.

        Args:
            hidden_states: (num_tokens, hidden_size), this rank's.
            topk_ids, topk_weights: (num_tokens, top_k), of the layer's experts.
            experts: this rank's, for anybody's rows.

        Returns:
            (num_tokens, hidden_size), as ``hidden_states``.
        """
        num_tokens = len(hidden_states)
        if num_tokens > self.rows or topk_ids.shape[1] != self.top_k:
            raise ValueError(
                f"a layer got {num_tokens} rows with {topk_ids.shape[1]} experts each, and the "
                f"ranks agreed on at most {self.rows} with {self.top_k}; this model cannot run "
                "with texts of each rank's own"
            )
        missing = (0, 0, 0, self.rows - num_tokens)
        pad = torch.nn.functional.pad
        gathered = (
            self.group.gather(pad(hidden_states, missing)),
            self.group.gather(pad(topk_ids.int(), missing, value=_NO_EXPERT)),
            self.group.gather(pad(topk_weights.float(), missing)),
        )
        return self.group.sum_and_scatter(experts(*gathered))[:num_tokens]
