"""Models that benchmarks run: real models' shapes, random weights; and how they are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DeepseekV3Config, Qwen3MoeConfig

from qmoe.experts.layout import find_experts
from qmoe.experts.quantized import QuantizedExperts, install
from qmoe.loading.side_by_side import lay_side_by_side
from qmoe.parallel.group import RankGroup
from qmoe.parallel.share import share_of


@dataclass(frozen=True)
class Shape:
    """A model of Qwen3-MoE's architecture."""

    num_hidden_layers: int
    hidden_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @property
    def page_bytes(self) -> int:
        """Bytes of one expert at 8 bits."""
        return 3 * self.moe_intermediate_size * self.hidden_size

    @property
    def num_pages(self) -> int:
        """Experts of all layers."""
        return self.num_hidden_layers * self.num_experts

    @property
    def routing(self) -> tuple[int, int, int]:
        """Layers, experts of a layer, experts of a token."""
        return self.num_hidden_layers, self.num_experts, self.num_experts_per_tok

    @property
    def cycle(self) -> int:
        """Pages that one token needs."""
        return self.num_hidden_layers * self.num_experts_per_tok

    def __str__(self) -> str:
        if self == QWEN3_30B_A3B:
            return "Qwen3-30B-A3B's shape"
        layers, experts, top_k = self.routing
        return f"{layers} layers of {experts} experts, top-{top_k}"

    def config(self) -> Qwen3MoeConfig:
        """The model's config; 8192 tokens and more fit its context."""
        return Qwen3MoeConfig(
            **asdict(self),
            intermediate_size=3 * self.hidden_size,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
        )


@dataclass(frozen=True)
class DeepseekShape:
    """A model of DeepSeek-V3's architecture, all of its layers with experts; the rest as there."""

    num_hidden_layers: int
    hidden_size: int = 7168
    moe_intermediate_size: int = 2048
    num_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    num_attention_heads: int = 128
    vocab_size: int = 129280

    def config(self) -> DeepseekV3Config:
        """The model's config."""
        sizes = asdict(self)
        return DeepseekV3Config(
            n_routed_experts=sizes.pop("num_experts"),
            num_key_value_heads=self.num_attention_heads,
            first_k_dense_replace=0,
            tie_word_embeddings=False,
            **sizes,
        )


QWEN3_30B_A3B = Shape(48, 2048, 768, 128, 8, 32, 4, 128, 151936)
QWEN3_235B_A22B = Shape(94, 4096, 1536, 128, 8, 64, 4, 128, 151936)
TINY = Shape(2, 64, 32, 16, 2, 2, 1, 32, 64)
TINY_DEEPSEEK = DeepseekShape(2, 64, 32, 16, 2, 4, 2, 2, 64)


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_each(
    function: Callable[[], object], repeats: int, device: torch.device, *, wait: bool = True
) -> tuple[list[float], float]:
    """Run ``function`` back to back; milliseconds of each run, and of all of them together.

    With ``wait=False`` what the device is doing goes on, and launches queue up behind it.
    """
    if device.type == "cpu":
        clock = [time.perf_counter()]
        for _ in range(repeats):
            function()
            clock.append(time.perf_counter())
        each = [1e3 * (b - a) for a, b in pairwise(clock)]
        return each, sum(each)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    if wait:
        torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize(device)
    each = [a.elapsed_time(b) for a, b in pairwise(events)]
    return each, events[0].elapsed_time(events[-1])


def as_graph(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """What runs ``function`` again: a CUDA graph of it; on a CPU the function itself.

    Kernels must have been compiled.
    """
    if device.type == "cpu":
        return function
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def build_model(
    shape: Shape | DeepseekShape,
    device: torch.device,
    experts: Literal["bf16", "int8", "paged"] = "paged",
    group: RankGroup | None = None,
) -> Any:
    """The model with random weights on ``device``.

    Args:
        experts: ``"bf16"``: transformers' own. ``"int8"``: quantized ones. ``"paged"``: quantized
            ones that have no weights yet.
        group: ranks that hold the experts between them; each draws its own.
    """
    config = shape.config()
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(torch.bfloat16).eval()
    for name in find_experts(model) if experts != "bf16" else ():
        paged = experts == "paged"
        share = None if group is None else share_of(group, shape.num_experts, name)
        ours = QuantizedExperts(model.get_submodule(name), "int8", paged=paged, share=share)
        install(model, name, ours)
        if share is not None:
            _make_meta(ours)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        value = torch.empty_like(parameter, device=device)
        if value.dtype == torch.int8:
            value.random_(-127, 128, generator=generator)
        elif name.endswith("_scale"):  # times random bytes, whose deviation is 74: like the others
            value.uniform_(2e-4, 3e-4, generator=generator)
        elif value.dim() == 1:
            value.fill_(1.0)
        else:
            value.normal_(std=0.02, generator=generator)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    # Buffers were computed on the meta device, that is, not at all. Those that a checkpoint has are
    # corrections of routers, in fp32.
    for module in model.modules():
        for name in module._buffers.keys() - module._non_persistent_buffers_set:
            zeros = torch.zeros_like(module._buffers[name], dtype=torch.float32, device=device)
            module._buffers[name] = zeros
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    if experts != "bf16":
        lay_side_by_side(model)  # as a model that was loaded
    return model


def _make_meta(experts: QuantizedExperts) -> None:
    """Give experts with a share the parameters that reading a checkpoint would give them."""
    with torch.device("meta"):
        up, down = (experts.layout.shape(p) for p in experts.layout.projections)
        scales = (torch.empty(shape[:2], dtype=torch.float32) for shape in (up, down))
        names = (f"{projection}_scale" for projection in experts.layout.projections)
        experts.take_share(dict(zip(names, scales, strict=True)))
        experts.unpage(torch.empty(up, dtype=torch.int8), torch.empty(down, dtype=torch.int8))


def experts_of(model: nn.Module) -> dict[str, QuantizedExperts]:
    """Experts modules by name, first layer to last."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedExperts)}


def percentiles(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """p20, p50 and p80."""
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor((0.2, 0.5, 0.8), dtype=torch.float64)
    )
    names = ("p20", "p50", "p80")
    return {n: round(v, digits) for n, v in zip(names, quantiles.tolist(), strict=True)}
