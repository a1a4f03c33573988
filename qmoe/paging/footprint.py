"""What a model takes of a device beside its experts' pages, measured on the model itself.

A copy of the model, which shares its tensors, runs a few tokens with the experts left out. The
cache that comes back says what a token costs in each layer, whatever kind of attention that is; the
calls to the experts say how many of them a token is routed to; and what those few tokens allocated
on the way, with what is known of experts and attention, bounds the workspace of longer steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qmoe.checkpoints.schema import BIAS_SUFFIX, QUANTIZED_SUFFIX, SCALE_SUFFIX
from qmoe.experts.gate import identify_activation
from qmoe.experts.layout import describe
from qmoe.experts.pages import LayerPages
from qmoe.experts.quantized import QuantizedExperts
from qmoe.thread_state import thread_state

# Steps of so many tokens are run, and of half as many: enough for caches that keep one entry for a
# group of tokens, and for attention that works on blocks of them.
_MEASURED_TOKENS = 256
# For what operators allocate inside, which differs from device to device.
_MARGIN = 1.25
# Matrix libraries keep a workspace of their own per stream, 32 MiB on an H100 or H200.
_CUDA_LIBRARIES = 128 << 20


@dataclass(frozen=True)
class CacheGrowth:
    """Bytes that one layer's cache takes for a sequence.

    Attributes:
        fixed: whatever the length.
        per_token: for each token, up to ``window`` of them.
        window: tokens that the layer looks back; None where it keeps all.
    """

    fixed: int
    per_token: int
    window: int | None

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes after ``num_tokens`` tokens."""
        kept = num_tokens if self.window is None else min(num_tokens, self.window)
        return self.fixed + self.per_token * kept


@dataclass(frozen=True)
class Footprint:
    """What a model takes of a device beside its experts' pages; sizes in bytes.

    Attributes:
        resident: parameters and buffers, scales and biases of the experts included.
        top_k: experts that a token is routed to, by experts module.
        caches: how each layer's cache grows.
        measured_tokens: of the longest step that was run.
        measured_bytes: what it allocated beside its cache, without experts.
        expert_bytes: bound of what a step allocates for a token on its way through experts.
        score_bytes: the same for each pair of a token and one that it attends to.
        key_bytes: the same for each token that is attended to.
        logits_bytes: the same for each sequence.
        fixed_bytes: the same, whatever the step.
    """

    resident: int
    top_k: tuple[int, ...]
    caches: tuple[CacheGrowth, ...]
    measured_tokens: int
    measured_bytes: int
    expert_bytes: int
    score_bytes: int
    key_bytes: int
    logits_bytes: int
    fixed_bytes: int

    def kv_cache(self, context: int, batch_size: int) -> int:
        """Bytes of the cache for ``batch_size`` sequences of ``context`` tokens."""
        return batch_size * sum(cache.num_bytes(context) for cache in self.caches)

    def workspace(self, chunk: int, context: int, batch_size: int) -> int:
        """Bound of the bytes that a step of ``chunk`` tokens of each sequence allocates."""
        per_sequence = (
            # In whole steps: state-space models work on blocks of tokens, and on whole ones.
            -(-chunk // self.measured_tokens) * self.measured_bytes
            + chunk * (self.expert_bytes + context * self.score_bytes)
            + context * self.key_bytes
            + self.logits_bytes
        )
        return self.fixed_bytes + batch_size * per_sequence


@torch.no_grad()
def measure(
    model: Any, layers: Sequence[LayerPages], device: torch.device | None = None
) -> Footprint:
    """Run a copy of ``model`` on a few tokens, without its experts, and see what it takes.

    The model itself is only read: other threads may run it meanwhile.

    Args:
        model: a causal language model of transformers, on one device; its experts may be quantized
            or not, paged or not yet there.
        layers: pages of its experts modules, named as the modules are.
        device: where it is going to run; by default where it is.

    Raises:
        ValueError: the model is on several devices or offloaded, or keeps no cache.
    """
    on = {tensor.device for tensor in _staying(model, layers)}
    if len(on) != 1 or torch.device("meta") in on:
        raise ValueError(
            f"{type(model).__name__} is on {', '.join(sorted(map(str, on)))}; a budget is for a "
            "model on one device, load it without offloading"
        )
    device = device or next(iter(on))
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or _MEASURED_TOKENS
    num_tokens = max(1, min(_MEASURED_TOKENS, limit) // 2)
    default_top_k = getattr(config, "num_experts_per_tok", 1)
    routed: dict[str, int | None] = {}
    with _without_experts(model, [layer.name for layer in layers], routed) as copy:
        first = _caches(copy, num_tokens)
        restore = thread_state()
        try:
            with _LiveBytes() as memory:
                second = _caches(copy, 2 * num_tokens)
        finally:
            restore()
    if sum(nbytes for nbytes, _ in second) == 0:
        raise ValueError(
            f"{type(model).__name__} keeps no cache of its tokens (use_cache=True); "
            "it cannot be given a budget"
        )
    pairs = (routed.get(layer.name, 0) for layer in layers)
    top_k = tuple(default_top_k if n is None else n // (2 * num_tokens) for n in pairs)
    caches = []
    for (once, window), (twice, _) in zip(first, second, strict=True):
        per_token = -(-(twice - once) // num_tokens)
        caches.append(CacheGrowth(max(0, once - per_token * num_tokens), per_token, window))
    growing = 2 * num_tokens * sum(c.per_token for c in caches if c.window is None)
    return Footprint(
        resident=_resident_bytes(model, layers),
        top_k=top_k,
        caches=tuple(caches),
        measured_tokens=2 * num_tokens,
        measured_bytes=int(_MARGIN * max(0, memory.peak - growing)),
        fixed_bytes=_CUDA_LIBRARIES if device.type == "cuda" else 0,
        **_bounds(model, layers, top_k, max(c.per_token for c in caches)),
    )


def _bounds(
    model: Any, layers: Sequence[LayerPages], top_k: Sequence[int], cache_bytes: int
) -> dict[str, int]:
    """What the short steps do not tell: the fields of `Footprint` that experts and attention need.

    Args:
        cache_bytes: for a token, of the layer whose cache grows fastest.
    """
    config = model.config.get_text_config()
    itemsize = model.dtype.itemsize
    eager = getattr(config, "_attn_implementation", "eager") == "eager"
    return {
        "expert_bytes": max(
            k * _pair_bytes(model.get_submodule(layer.name), layer, itemsize)
            for k, layer in zip(top_k, layers, strict=True)
        ),
        # Masks; eager attention has scores and probabilities of every head.
        "score_bytes": 2 * (itemsize + 2)
        + (getattr(config, "num_attention_heads", 1) * (2 * itemsize + 4) if eager else 0),
        # A layer's keys and values are copied to append to them, and then made as wide as queries.
        "key_bytes": cache_bytes + 4 * itemsize * _widest_matrix(model, layers),
        # in the model's dtype and in fp32, sorted and cumulated for sampling
        "logits_bytes": 32 * model.get_input_embeddings().weight.shape[0],
    }


def _staying(model: nn.Module, layers: Sequence[LayerPages]) -> Iterator[torch.Tensor]:
    """Parameters and buffers that are no pages, each once."""
    pages = set()
    for layer in layers:
        experts = model.get_submodule(layer.name)
        layout = None if isinstance(experts, QuantizedExperts) else describe(experts)
        for name, parameter in experts.named_parameters():
            if layout is None:
                is_page = name.endswith(QUANTIZED_SUFFIX)
            else:
                is_page = any(name in layout.sources[p] for p in layout.projections)
            if is_page:
                pages.add(id(parameter))
    return (t for t in (*model.parameters(), *model.buffers()) if id(t) not in pages)


def _resident_bytes(model: nn.Module, layers: Sequence[LayerPages]) -> int:
    scales = sum(
        4 * layer.num_experts * (layer.gate_up[0] + layer.down[0])
        for layer in layers
        if not isinstance(model.get_submodule(layer.name), QuantizedExperts)
    )
    return scales + sum(tensor.nbytes for tensor in _staying(model, layers))


def _widest_matrix(model: nn.Module, layers: Sequence[LayerPages]) -> int:
    """The most rows that a matrix of a layer has, experts aside."""
    matrices = {id(tensor) for tensor in _staying(model, layers) if tensor.ndim == 2}
    scales = (BIAS_SUFFIX, SCALE_SUFFIX)
    blocks = (block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m)
    parameters = (parameter for block in blocks for parameter in block.named_parameters())
    return max(
        (p.shape[0] for name, p in parameters if id(p) in matrices and not name.endswith(scales)),
        default=0,
    )


def _pair_bytes(experts: nn.Module, layer: LayerPages, itemsize: int) -> int:
    """What a token takes at an expert.

    Ids; its row, gathered; what is between its products, also in 8 bits; rows of two waves.
    """
    hidden_size, intermediate_size = layer.down
    row = 2 * intermediate_size + 3 * hidden_size
    if isinstance(experts, QuantizedExperts):
        activation = experts.activation
    else:
        layout = describe(experts)
        assert layout is not None
        activation = identify_activation(experts, layout)
    if activation is None:  # the model's own gate, in torch
        row += 4 * layer.gate_up[0]
    return itemsize * row + 64


@contextmanager
def _without_experts(
    model: Any, names: Sequence[str], routed: dict[str, int | None]
) -> Iterator[Any]:
    """Yield a copy of the module tree, in evaluation mode, whose experts return their input.

    It shares parameters and buffers with the model, but no hooks, and what its modules set on
    themselves is lost with it.

    Args:
        model: is only read.
        names: of its experts modules.
        routed: gets the pairs of tokens and experts in each module's last call; None where it was
            called without ids.
    """
    copies: dict[nn.Module, nn.Module] = {}
    copy = _copy(model, copies)
    try:
        for name in names:
            vars(copies[model.get_submodule(name)])["forward"] = _stand_in(name, routed)
        yield copy
    finally:
        # At once, not when Python looks for cycles: they hold weights that are to make room.
        for module in copies.values():
            vars(module).clear()


def _copy(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in copies:
        return copies[module]
    copy = copies[module] = object.__new__(type(module))
    own = vars(copy)
    for name, value in vars(module).copy().items():
        if name in ("_parameters", "_buffers"):
            value = dict(value)  # of any kind: what offloads has its own
        elif name == "_modules":
            value = {n: None if m is None else _copy(m, copies) for n, m in value.copy().items()}
        elif name in ("_forward_hooks", "_forward_pre_hooks"):
            value = type(value)()
        elif isinstance(value, MethodType) and value.__self__ is module:
            value = MethodType(value.__func__, copy)
        elif name == "forward":
            continue  # accelerate's, for instance: it would run the model itself
        own[name] = value
    own["training"] = False
    return copy


def _stand_in(name: str, routed: dict[str, int | None]) -> Callable[..., torch.Tensor]:
    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        topk_ids = args[0] if args else kwargs.get("top_k_index")
        routed[name] = None if topk_ids is None else topk_ids.numel()
        return hidden_states

    return forward


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that this thread makes while it is on.

    Unlike the device's own statistics, nobody else's tensors count, and no peak is reset.

    Attributes:
        peak: the most that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        # Looked at here, and by no callbacks: Python drops a Ctrl-C that strikes in one.
        self._made: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in _tensors((*args, *kwargs.values()))}
        output = func(*args, **kwargs)
        self._made = {key: made for key, made in self._made.items() if made[0]() is not None}
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._made:
                self._made[storage._cdata] = weakref.ref(storage), storage.nbytes()
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._made.values()))
        return output


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Those of an operator's arguments or results: tensors, and lists of them."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _caches(model: Any, num_tokens: int) -> list[tuple[int, int | None]]:
    """Bytes and window of each layer's cache after ``num_tokens`` tokens."""
    tokens = torch.zeros(1, num_tokens, dtype=torch.long, device=model.device)
    last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    with torch.autocast(model.device.type, enabled=False):
        output = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=True, **last)
    cache = getattr(output, "past_key_values", None) or getattr(output, "cache_params", None)
    return [
        (_tensor_bytes(layer, set()), getattr(layer, "sliding_window", None))
        for layer in getattr(cache, "layers", None) or [cache]
    ]


def _tensor_bytes(value: Any, seen: set[int]) -> int:
    """Bytes of all tensors that ``value`` holds, by what they are views of."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(value, dict):
        value = value.values()
    elif hasattr(value, "__dict__"):
        value = vars(value).values()
    elif not isinstance(value, (list, tuple)):
        return 0
    return sum(_tensor_bytes(item, seen) for item in value)
