"""drifting_trace(): routing whose favourite experts change along the text, as a real model's do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qmoe.traces.trace import RoutingTrace, check_sizes


@dataclass(frozen=True)
class Drift:
    """How unequal the experts of a layer are, in the long run and at the moment.

    Attributes:
        skew: over a long text, weights fall from the most popular expert to the least by e ** skew.
        spread: how far the moment's weights are apart: the mean of what is taken off an expert's
            logarithmic weight.
        period: tokens, in the mean, until what is taken off an expert is drawn anew.

    Raises:
        ValueError: a negative skew or spread, a period below 1 token, or no number.
    """

    skew: float
    spread: float
    period: float

    def __post_init__(self) -> None:
        # Comparisons of this form are false for NaN too.
        if not (0 <= self.skew < math.inf and 0 <= self.spread < math.inf and self.period >= 1):
            raise ValueError(
                f"skew={self.skew}, spread={self.spread}, period={self.period}: "
                "skew and spread are at least 0 and finite, and a period is at least 1 token"
            )


def drifting_trace(
    num_tokens: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    drift: Drift,
    *,
    page_bytes: int = 0,
    seed: int = 0,
) -> RoutingTrace:
    """Draw a trace in which a layer has favourites, and each stays one for some time.

    The logarithm of an expert's weight is ``-skew * rank / num_experts - spread * e``: its rank in
    the layer stays for the whole trace, and e is a number with an exponential distribution of mean
    1 that is drawn anew with probability ``1 / period`` at each token. A token's experts are drawn
    one after the other in proportion to these weights, without putting any back: they are the
    largest of the logarithmic weights plus Gumbel noise (P. Efraimidis and P. Spirakis, "Weighted
    random sampling with a reservoir", 2006).

    So all tokens of a trace are alike: no favourite is older at its end than at its beginning.

    Args:
        num_tokens: tokens.
        num_layers: layers; nothing that is drawn for one has to do with another.
        num_experts: experts per layer.
        top_k: experts per token and layer.
        drift: how unequal they are, and for how long.
        page_bytes: of every layer.
        seed: the same seed gives the same trace; a shorter trace is the beginning of a longer one.

    Raises:
        ValueError: sizes that cannot be.
    """
    check_sizes(num_tokens, num_layers, num_experts, top_k)
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(num_layers, num_experts, dtype=torch.float64, generator=generator)

    def exponential() -> torch.Tensor:
        return -torch.log1p(-uniform())

    lasting = -drift.skew * uniform().argsort(1) / num_experts  # (num_layers, num_experts)
    momentary = -drift.spread * exponential()
    topk_ids = torch.empty(num_tokens, num_layers, top_k, dtype=torch.int16)
    for token in range(num_tokens):
        changes = uniform() < 1 / drift.period
        momentary = torch.where(changes, -drift.spread * exponential(), momentary)
        gumbel = -exponential().log()
        topk_ids[token] = (lasting + momentary + gumbel).topk(top_k).indices

    return RoutingTrace(
        topk_ids,
        num_experts,
        (page_bytes,) * num_layers,
        {
            "source": f"drifting: skew={drift.skew:g} spread={drift.spread:g} "
            f"period={drift.period:g} seed={seed}"
        },
    )
