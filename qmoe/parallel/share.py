"""Which experts of a layer are a rank's own, and what a layer does with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qmoe.parallel.group import RankGroup
from qmoe.parallel.texts import RowFormat, Rows

# A layer's own experts: rows, ids of own experts, weights -> rows.
OwnExperts = Callable[[Rows, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Share:
    """The experts of one layer that one rank holds: one range of ids.

    Attributes:
        group: the ranks that hold the layer's experts between them.
        num_experts: of the layer, on all ranks.
        first: id of the first expert of this rank.
        count: how many it holds.
    """

    group: RankGroup
    num_experts: int
    first: int
    count: int

    def own_ids(self, topk_ids: Tensor) -> Tensor:
        """Number this rank's experts from 0; other ids leave [0, count), so that kernels skip them.

        Args:
            topk_ids: (num_tokens, top_k) int, of the layer.
        """
        return topk_ids - self.first if self.first else topk_ids

    def run(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        experts: OwnExperts,
        row_format: RowFormat,
    ) -> Tensor:
        """The layer's output, from what each rank's own experts make.

        Args:
            hidden_states: (num_tokens, hidden_size), the same on every rank, or each rank's own
                in a call of that kind.
            topk_ids, topk_weights: (num_tokens, top_k), of the layer; likewise.
            experts: this rank's.
            row_format: what they take rows in.

        Returns:
            (num_tokens, hidden_size), as ``hidden_states``.
        """

        def own_experts(rows: Rows, ids: Tensor, weights: Tensor) -> Tensor:
            return experts(rows, self.own_ids(ids), weights)

        if self.group.own_texts is not None:
            output: Tensor = self.group.own_texts.run(
                hidden_states, topk_ids, topk_weights, own_experts, row_format
            )
            return output
        self.group.check_rows(hidden_states)
        return self.group.sum(own_experts(hidden_states, topk_ids, topk_weights))


def share_of(group: RankGroup, num_experts: int, name: str) -> Share:
    """This rank's share: ranges as equal as they can be, those of the first ranks one longer.

    Args:
        num_experts: of the layer.
        name: the layer's experts module, for the message.

    Raises:
        ValueError: there are fewer experts than ranks.

    Example:
        >>> from qmoe.parallel.share import ranges
        >>> ranges(8, 3)
        [(0, 3), (3, 3), (6, 2)]
    """
    if num_experts < group.size:
        raise ValueError(
            f"{name} has {num_experts} experts for {group.size} ranks; start at most {num_experts}"
        )
    first, count = ranges(num_experts, group.size)[group.rank]
    return Share(group, num_experts, first, count)


def ranges(num_experts: int, size: int) -> list[tuple[int, int]]:
    """(first, count) of each of ``size`` ranks."""
    least, longer = divmod(num_experts, size)
    counts = [least + (rank < longer) for rank in range(size)]
    return [(sum(counts[:rank]), count) for rank, count in enumerate(counts)]
