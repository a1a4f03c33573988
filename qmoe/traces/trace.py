"""Routing traces: which experts each token was routed to, recorded or drawn at random."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

NONE = -1  # in place of an expert's id: fewer than top_k experts, or one without a page
FORMAT = "qmoe-routing-trace"


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The experts of every token in every layer, in the order in which tokens came.

    Attributes:
        topk_ids: (num_tokens, num_layers, top_k) int16, the router's order: largest weight first;
            `NONE` where there is no expert.
        num_experts: of one layer; where layers differ, the largest.
        page_bytes: bytes of one expert's page, for each layer.
        metadata: anything else, for the reader of the file.

    Raises:
        ValueError: shapes that do not match, or ids outside of ``range(-1, num_experts)``.
    """

    topk_ids: torch.Tensor
    num_experts: int
    page_bytes: tuple[int, ...]
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.topk_ids.dim() != 3 or not self.topk_ids.numel():
            raise ValueError(
                f"topk_ids has shape {tuple(self.topk_ids.shape)}; a trace takes "
                "(num_tokens, num_layers, top_k), none of them 0"
            )
        if len(self.page_bytes) != self.num_layers or min(self.page_bytes) < 0:
            raise ValueError(
                f"page_bytes={self.page_bytes}: one size for each of {self.num_layers} layers"
            )
        if self.topk_ids.dtype != torch.int16:
            raise ValueError(f"topk_ids is {self.topk_ids.dtype}; expected torch.int16")
        smallest, largest = (int(bound) for bound in self.topk_ids.aminmax())
        if smallest < NONE or largest >= self.num_experts:
            raise ValueError(
                f"topk_ids holds ids from {smallest} to {largest}; "
                f"{self.num_experts} experts have {NONE} to {self.num_experts - 1}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens in the trace."""
        return int(self.topk_ids.shape[0])

    @property
    def num_layers(self) -> int:
        """Layers that have experts."""
        return int(self.topk_ids.shape[1])

    @property
    def top_k(self) -> int:
        """Experts of one token in one layer, at most."""
        return int(self.topk_ids.shape[2])

    @property
    def num_pages(self) -> int:
        """Pages of all layers: what a cache that holds everything holds."""
        return self.num_layers * self.num_experts

    def popularity(self) -> torch.Tensor:
        """How often each expert was routed to, (num_layers, num_experts) int64."""
        ids = self.topk_ids.long()
        one_past = torch.where(ids < 0, self.num_experts, ids).transpose(0, 1).flatten(1)
        counts = torch.zeros(self.num_layers, self.num_experts + 1, dtype=torch.int64)
        counts.scatter_add_(1, one_past, torch.ones_like(one_past))
        return counts[:, :-1]

    def reuse(self) -> torch.Tensor:
        """Share of a token's experts that the token before it used too, (num_layers,) fp64."""
        ids, before = self.topk_ids[1:], self.topk_ids[:-1]
        real = ids >= 0
        found = (ids[..., :, None] == before[..., None, :]).any(-1) & real
        return found.sum((0, 2)).double() / real.sum((0, 2)).clamp(min=1)

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file."""
        save_file(
            {"topk_ids": self.topk_ids.contiguous()},
            path,
            metadata={
                **self.metadata,
                "format": FORMAT,
                "num_experts": str(self.num_experts),
                "page_bytes": json.dumps(self.page_bytes),
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read what :meth:`save` wrote; what else stands in the file is left there.

        Older files also hold ``predicted_ids``, of a prefetcher that is gone.

        Raises:
            ValueError: no such file, or no routing trace.
        """
        if not Path(path).is_file():
            raise ValueError(
                f"{path}: no such file; record one with qmoe generate --record-routing"
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                if metadata.pop("format", None) != FORMAT:
                    raise ValueError("no routing trace, though a .safetensors file")
                topk_ids = file.get_tensor("topk_ids")
            return cls(
                topk_ids=topk_ids,
                num_experts=int(metadata.pop("num_experts")),
                page_bytes=tuple(map(int, json.loads(metadata.pop("page_bytes")))),
                metadata=metadata,
            )
        except (
            SafetensorError,
            ValueError,
            TypeError,
            KeyError,
            OverflowError,
            RecursionError,
        ) as error:
            raise ValueError(f"{path}: no usable routing trace ({error!s:.200})") from error


def check_sizes(num_tokens: int, num_layers: int, num_experts: int, top_k: int) -> None:
    """Refuse sizes of a trace that nothing can be drawn for.

    Raises:
        ValueError: it names them.
    """
    if min(num_tokens, num_layers) < 1 or not 1 <= top_k <= num_experts < 1 << 15:
        raise ValueError(
            f"num_tokens={num_tokens}, num_layers={num_layers}, num_experts={num_experts}, "
            f"top_k={top_k}: at least 1, and top_k at most num_experts"
        )


def synthetic_trace(
    num_tokens: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    *,
    zipf: float = 0.65,
    reuse: float = 0.40,
    page_bytes: int = 0,
    seed: int = 0,
) -> RoutingTrace:
    """Draw a trace with a given popularity of experts and a given reuse between tokens.

    Each expert of a token stays for the next one with probability ``reuse``; the others are drawn
    from the experts that the token did not use. If an expert is to have a share pi of the tokens,
    newly drawn ones must make up (1 - reuse) pi of them, and only a share 1 - pi can draw it: it is
    drawn with probability q = (1 - reuse) pi / (1 - pi). The largest of logit(q) + logistic noise
    are a sample of fixed size with these probabilities (Pareto sampling; B. Rosén, "On sampling
    with probability proportional to size", 1997), to within a per cent or so. No share can be above
    1 / (2 - reuse): an expert asked to be more popular comes out at that.

    Args:
        num_tokens: tokens.
        num_layers: layers; their experts' ranks are independent permutations.
        num_experts: experts per layer.
        top_k: experts per token and layer.
        zipf: the r-th most popular expert's share is proportional to r ** -zipf.
        reuse: share of a token's experts that the token before it used too, in the same layer.
        page_bytes: of every layer.
        seed: the same seed gives the same trace.

    Raises:
        ValueError: sizes or shares that cannot be.
    """
    check_sizes(num_tokens, num_layers, num_experts, top_k)
    if not 0 <= reuse <= 1:
        raise ValueError(f"reuse={reuse}: must be from 0 to 1")
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    weights = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -zipf
    share = (top_k * weights / weights.sum()).clamp(max=0.999)  # no expert twice for a token
    ranks = uniform(num_layers, num_experts).argsort(1)
    first = share.logit()[ranks]  # (num_layers, num_experts)
    later = ((1 - reuse) * share / (1 - share)).clamp(max=0.999).logit()[ranks]

    kept = torch.tensor(torch.inf, dtype=torch.float64)
    topk_ids = torch.empty(num_tokens, num_layers, top_k, dtype=torch.int64)
    for token in range(num_tokens):
        score = (later if token else first) + uniform(num_layers, num_experts).logit()
        if token:
            stays = uniform(num_layers, top_k) < reuse
            score.scatter_(1, topk_ids[token - 1], torch.where(stays, kept, -kept))
        topk_ids[token] = score.topk(top_k).indices

    return RoutingTrace(
        topk_ids.to(torch.int16),
        num_experts,
        (page_bytes,) * num_layers,
        {"source": f"synthetic: zipf={zipf} reuse={reuse} seed={seed}"},
    )


def tile_trace(
    trace: RoutingTrace,
    num_layers: int,
    num_experts: int,
    top_k: int,
    *,
    num_tokens: int | None = None,
    page_bytes: int = 0,
) -> RoutingTrace:
    """Lay copies of a small model's trace side by side until they have a larger model's shape.

    A layer's experts are ``num_experts / trace.num_experts`` groups, each with the popularity that
    the small model's experts have. Of every token, each group gets the first ``top_k / groups``
    choices of the small model's router, read at another place of the text: the trace is a ring, and
    the copies' starting points are spread evenly over it. The first layer is a copy of the trace's
    first; the layers after it go through the trace's other layers in turn. So a group's popularity
    and its reuse between tokens are the recorded ones, of the router's first choices.

    Args:
        trace: the small one.
        num_layers: of the result; at least 1.
        num_experts: of the result; a multiple of trace.num_experts.
        top_k: of the result; a multiple of the number of groups, at most trace.top_k for each.
        num_tokens: of the result; None or at most trace.num_tokens.
        page_bytes: of every layer.

    Raises:
        ValueError: a shape that cannot be laid out so.
    """
    num_tokens = trace.num_tokens if num_tokens is None else num_tokens
    groups, rest = divmod(num_experts, trace.num_experts)
    each = top_k // groups if groups else 0
    if rest or each * groups != top_k or not 1 <= each <= trace.top_k:
        raise ValueError(
            f"num_experts={num_experts}, top_k={top_k}: not made of whole copies of "
            f"{trace.num_experts} experts with 1 to {trace.top_k} of them per token"
        )
    if not 1 <= num_tokens <= trace.num_tokens or num_layers < 1:
        raise ValueError(
            f"num_tokens={num_tokens}, num_layers={num_layers}: at least 1, "
            f"and no more tokens than the trace's {trace.num_tokens}"
        )
    layer = torch.arange(num_layers)
    others = max(trace.num_layers - 1, 1)
    source = torch.where(layer > 0, 1 + (layer - 1) % others, 0) % trace.num_layers
    round_ = (layer - 1).clamp(min=0) // others
    copy = round_[:, None] * groups + torch.arange(groups)  # (num_layers, groups)
    start = copy * trace.num_tokens // (int(round_.max()) + 1) // groups
    token = (torch.arange(num_tokens)[:, None, None] + start) % trace.num_tokens

    tiled = trace.topk_ids[token, source[:, None], :each].long()
    offset = (torch.arange(groups) * trace.num_experts)[:, None]
    tiled = torch.where(tiled < 0, NONE, tiled + offset)  # (num_tokens, num_layers, groups, each)
    return RoutingTrace(
        tiled.flatten(2).to(torch.int16),
        num_experts,
        (page_bytes,) * num_layers,
        {**trace.metadata, "tiled_from": "x".join(map(str, trace.topk_ids.shape))},
    )
