"""Ranks with texts of their own: attention for a rank's own rows, experts for everybody's.

Each forward pass of any rank is a *round*, which all ranks take part in: those that have nothing to
compute run the layers' experts alone, for the others' rows. In a layer, rows are gathered from all
ranks, each runs its own experts on all of them, and the sums are scattered to where the rows came
from.

How many rows a round has is agreed on in one of two ways. In *open* rounds the hosts say it before
each of them. *Steps* all have the number that was agreed on once, so that a CUDA graph can hold
them: first all prompts are read, in open rounds, then all ranks decode. Every rank queues as many
steps as the others; whether there is another is said while a step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qmoe.parallel.group import KnownToAll, RankGroup
from qmoe_kernels import QuantizedRows
from qmoe_kernels.quantization import WeightFormat

# Rows as experts take them.
Rows: TypeAlias = "Tensor | QuantizedRows"
# What a layer's products take rows in, of so many pairs on all ranks: the same on each of them.
RowFormat = Callable[[int], WeightFormat | None]
# A layer's experts: rows, ids, weights -> rows.
Layer = Callable[[Tensor, Tensor, Tensor], Any]


class OwnTexts:
    """One call in which each rank has texts of its own.

    Attributes:
        rows: rows of the rank that has most of them, in the round that is under way.
        in_steps: whether all rounds from now on are steps.
        steps: how many this rank has queued.
    """

    def __init__(self, group: RankGroup, top_k: int, interrupted: Callable[[], bool]) -> None:
        """Nothing is exchanged yet.

        Args:
            group: the ranks, in a call together.
            top_k: experts of a token, in every layer.
            interrupted: whether this rank was.
        """
        self.group, self.top_k, self.interrupted = group, top_k, interrupted
        self.rows = self.steps = self._said = 0
        self.in_steps = False
        self._step_rows: int | None = None
        self._agreed = False

    # ---- which rounds --------------------------------------------------------------------------

    def agree_on_steps(self, num_rows: int | None) -> int | None:
        """Agree, once in a call, whether ranks decode in steps; all do or none.

        Args:
            num_rows: of this rank's steps; 0 where it has no texts, None where it cannot.

        Returns:
            rows of the rank that has most of them; None where there are open rounds only.
        """
        if not self._agreed:
            heard = self._exchange("how texts are decoded", rows=num_rows)
            counts = [other["rows"] for other in heard]
            self._step_rows = None if None in counts else max(counts)
            self._agreed = True
        return self._step_rows

    def begin(self, num_rows: int) -> bool:
        """Begin an open round; False where no rank has rows any more. In steps: nothing is said.

        Args:
            num_rows: of this rank; 0 where its texts have ended.

        Raises:
            KnownToAll: a rank was interrupted; all raise this in the same round.
            RankFailed: another rank failed or is gone.
        """
        if not self.in_steps:
            heard = self._exchange("a forward pass", rows=num_rows)
            self.rows = max(other["rows"] for other in heard)
        return self.rows > 0

    def begin_steps(self, layers: Sequence[Layer], like: Tensor) -> None:
        """Take part until all ranks have read their prompts; from here on there are steps.

        Args:
            layers, like: as `take_part` has them.
        """
        assert self._step_rows is not None  # agreed on before prompts are read
        self.take_part(layers, like)
        self.rows, self.in_steps = self._step_rows, True

    def goes_on(self, has_texts: bool) -> bool:
        """Whether a rank's texts go on after a step, all ranks having queued one more.

        Raises:
            KnownToAll, RankFailed: as `begin`.
        """
        self._said += 1
        heard = self._exchange(f"step {self._said}", goes_on=has_texts)
        return any(other["goes_on"] for other in heard)

    @property
    def lacks_step(self) -> bool:
        """Whether this rank has yet to queue the step that the next `goes_on` is said beside."""
        return self.steps <= self._said

    def _exchange(self, what: str, **said: Any) -> list[dict[str, Any]]:
        heard = self.group.exchange(
            f"{what} of qmoe.generate with texts of its own",
            **said,
            interrupted=self.interrupted(),
        )
        for rank, other in enumerate(heard):
            if other["interrupted"]:
                raise KnownToAll(KeyboardInterrupt(f"rank {rank} was interrupted"))
        return heard

    # ---- layers --------------------------------------------------------------------------------

    def take_part(self, layers: Sequence[Layer], like: Tensor) -> None:
        """Take part in open rounds without rows, until no rank has any.

        Args:
            layers: the model's experts modules in the order in which it runs them.
            like: (0, hidden_size) in the dtype and on the device of the model's rows.
        """
        while self.begin(0):
            self.run_experts(layers, like)

    def run_experts(self, layers: Sequence[Layer], like: Tensor) -> None:
        """Run the experts of all layers, in a round in which this rank has no rows.

        Args:
            layers, like: as `take_part` has them.
        """
        ids = torch.empty(0, self.top_k, dtype=torch.int64, device=like.device)
        weights = torch.empty(0, self.top_k, device=like.device)
        for layer in layers:
            layer(like, ids, weights)

    def run(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        experts: Callable[[Rows, Tensor, Tensor], Tensor],
        row_format: RowFormat,
    ) -> Tensor:
        """A layer's output for this rank's rows.

        Args:
            hidden_states: (num_tokens, hidden_size), this rank's.
            topk_ids, topk_weights: (num_tokens, top_k), of the layer's experts.
            experts: this rank's, for anybody's rows.
            row_format: of the layer; rows in 8 bits are quantized before they fly.

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
        found = row_format(self.group.size * self.rows * self.top_k)
        gathered = self.group.gather(hidden_states, topk_ids, topk_weights, self.rows, found)
        return self.group.sum_and_scatter(experts(*gathered))[:num_tokens]
