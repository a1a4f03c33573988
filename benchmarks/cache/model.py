"""What the benchmark runs: the model with its routing replayed.

Weights are random and hidden states therefore say nothing about experts, so the ids that routers
choose are replaced by those of a recorded or synthetic trace, read by a counter on the device. The
model's own routers run all the same: their cost is in every time.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeForCausalLM

from benchmarks.model import Shape, experts_of, time_each
from qmoe.decoding.graph import capture
from qmoe.decoding.step import step_of
from qmoe.paging.expert_cache import ExpertCache
from qmoe.paging.host_store import HostStore, PageRead
from qmoe.traces.trace import RoutingTrace

RANDOM_BYTES = 1 << 28  # of the file that host stores are filled from


def fill_host_store(model: nn.Module, device: torch.device) -> tuple[HostStore, dict[str, float]]:
    """A store of random pages, no two alike, read from a file as a checkpoint would be.

    Returns:
        the store, pinned where ``device`` is a GPU, and how long its making took.
    """
    start = time.perf_counter()
    layers = [experts.layer_pages(name) for name, experts in experts_of(model).items()]
    store = HostStore(layers, pin=device.type == "cuda")
    made = time.perf_counter()
    num_pages = sum(layer.num_experts for layer in layers)
    page_bytes = max(layer.page_bytes for layer in layers)
    size = min(RANDOM_BYTES, 2 * num_pages * page_bytes)
    step = (size - page_bytes) // num_pages
    with tempfile.TemporaryDirectory(prefix="qmoe-benchmark-") as folder:
        file = Path(folder) / "random.bin"
        generator = torch.Generator(device).manual_seed(1)
        noise = torch.randint(
            -127, 128, (size,), dtype=torch.int8, device=device, generator=generator
        )
        noise.cpu().numpy().tofile(file)
        written = time.perf_counter()
        reads = [
            PageRead(
                layer=i,
                expert=expert,
                offset=0,
                file=file,
                file_offset=(store.first_page[i] + expert) * step,
                nbytes=layer.page_bytes,
            )
            for i, layer in enumerate(layers)
            for expert in range(layer.num_experts)
        ]
        store.fill(reads, progress=True)
    return store, {
        "bytes": store.num_bytes,
        "allocate_s": round(made - start, 2),
        "fill_and_pin_s": round(time.perf_counter() - written, 2),
    }


def measure_link(store: HostStore, device: torch.device) -> dict[str, float]:
    """GB/s of copies from the store's pinned memory to the device, by the copy engine.

    Returns:
        ``layer``: one copy for a whole layer's pages. ``page``: one copy for each page.
    """
    layers = [store.pages(i) for i in range(min(4, len(store.layers)))]
    target = torch.empty_like(layers[0], device=device)

    def whole() -> None:
        for layer in layers:
            target.copy_(layer, non_blocking=True)

    def by_page() -> None:
        for layer in layers:
            for i in range(len(layer)):
                target[i].copy_(layer[i], non_blocking=True)

    nbytes = sum(layer.nbytes for layer in layers)
    rates = {}
    for name, function in (("layer", whole), ("page", by_page)):
        function()
        each, _ = time_each(function, 3, device)
        rates[name] = nbytes / 1e6 / min(each)
    return rates


class Replay:
    """Traces of as many texts on the device, and a counter that says which token is next.

    Attributes:
        topk_ids: (num_layers, num_texts * num_tokens, top_k) int64, one text after the other.
        token: (1,) int64, the next token of each; it wraps around.
        rows: rows of the tokens in the present forward pass.
    """

    def __init__(self, shape: Shape, num_tokens: int, device: torch.device) -> None:
        size = (shape.num_hidden_layers, num_tokens, shape.num_experts_per_tok)
        self.num_tokens = num_tokens
        self.topk_ids = torch.zeros(size, dtype=torch.int64, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.rows = self.token

    def load(self, *traces: RoutingTrace) -> None:
        """Take other traces of the same size; with as many as before, a graph goes on with them."""
        ids = torch.cat([trace.topk_ids.transpose(0, 1) for trace in traces], 1)
        if ids.shape == self.topk_ids.shape:
            self.topk_ids.copy_(ids)
        else:
            self.topk_ids = ids.to(self.topk_ids)

    def begin(self, num_tokens: int) -> None:
        """Call before a forward pass over so many tokens of each text."""
        device = self.token.device
        tokens = (self.token + torch.arange(num_tokens, device=device)) % self.num_tokens
        first = torch.arange(0, self.topk_ids.shape[1], self.num_tokens, device=device)
        self.rows = (first[:, None] + tokens).flatten()

    def end(self, num_tokens: int) -> None:
        """Call after it."""
        self.token.add_(num_tokens)


class ReplayedRouter(nn.Module):
    """Runs a router and then says what the trace says."""

    def __init__(self, router: nn.Module, replay: Replay, layer: int) -> None:
        super().__init__()
        self.router, self.replay, self.layer = router, replay, layer

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, _ = self.router(hidden_states)
        ids = self.replay.topk_ids[self.layer].index_select(0, self.replay.rows)
        return logits, weights, ids


def replay_routing(model: Qwen3MoeForCausalLM, replay: Replay) -> None:
    """Replace what the model's routers choose."""
    for layer, block in enumerate(model.model.layers):
        block.mlp.gate = ReplayedRouter(block.mlp.gate, replay, layer)


class Residents:
    """All experts on the device, to put into a model and to take out again without copying."""

    def __init__(self, model: nn.Module, store: HostStore, device: torch.device) -> None:
        self.experts = list(experts_of(model).values())
        self.weights = []
        for i, layer in enumerate(store.layers):
            pages = store.pages(i).to(device, non_blocking=True)
            gate_up, down = layer.views(pages)
            self.weights.append((gate_up.contiguous(), down.contiguous()))

    def enter(self) -> None:
        """Make the model resident."""
        for experts, (gate_up, down) in zip(self.experts, self.weights, strict=True):
            experts.unpage(gate_up, down)

    def leave(self, cache: ExpertCache) -> None:
        """Make the model paged."""
        for layer, experts in enumerate(self.experts):
            experts.page(cache, layer)

    def free(self) -> None:
        """Drop the weights; the model must be paged."""
        self.weights.clear()


class Decoder:
    """Greedy decoding of one text or several by a step of qmoe's, with traces for its routing.

    On a GPU the step can be captured into a CUDA graph; `advance` then replays it.

    Attributes:
        logits: (num_texts, vocab_size), of the last step.
    """

    def __init__(
        self,
        model: Qwen3MoeForCausalLM,
        replay: Replay,
        context: int,
        num_tokens: int,
        num_texts: int = 1,
    ) -> None:
        self.replay, self.context = replay, context
        self.decode = step_of(model, num_texts, context + num_tokens)
        self.decode.rounds_prompts = False  # a trace has as many rows as there are tokens
        self.device = replay.token.device
        self.graph: Any = None
        self.has_read = False

    @property
    def logits(self) -> Tensor:
        return self.decode.logits

    def read(self) -> None:
        """Fill the context, once."""
        vocab_size = self.decode.shadows.config.vocab_size
        ids = torch.arange(self.context, device=self.device) % vocab_size
        ids = ids.expand(self.decode.rows, -1)
        mask = torch.ones_like(ids)
        self.replay.token.zero_()
        self.replay.begin(self.context)
        self.decode.read(ids, mask, mask.cumsum(-1) - 1, None)
        self.has_read = True

    def reset(self, token: int = 0) -> None:
        """Go back to the end of the context, and to a token of the trace."""
        if not self.has_read:
            self.read()
        self.decode.cache.columns.begin_decoding(self.context)
        self.decode.position_ids.fill_(self.context)
        self.decode.input_ids.fill_(1)
        self.replay.token.fill_(token)

    def step(self) -> None:
        """One token, eagerly."""
        self.replay.begin(1)
        self.decode.run()
        self.decode.input_ids.copy_(self.logits.argmax(-1, keepdim=True))
        self.replay.end(1)

    def capture(self) -> None:
        """Capture the step into a graph, after running it twice; on a CPU only that."""
        self.graph = None
        self.reset()
        for _ in range(2):
            self.step()
        if self.device.type == "cuda":
            self.graph = capture(self.step, self.device)

    def release(self) -> None:
        """Drop the graph; steps are eager again."""
        self.graph = None

    def advance(self) -> None:
        """One token, by the graph where there is one."""
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def logits_of(self, num_tokens: int) -> Tensor:
        """(num_tokens, vocab_size): decode from the end of the context, token 0 of the trace."""
        self.reset()
        rows = []
        for _ in range(num_tokens):
            self.advance()
            rows.append(self.logits.clone())
        return torch.cat(rows)

    def time(self, first: int, num_tokens: int) -> tuple[list[float], float]:
        """Milliseconds of each of ``num_tokens`` tokens, and of all of them together.

        The trace's first ``first`` tokens are decoded before, untimed.
        """
        self.reset()
        for _ in range(first):
            self.advance()
        return time_each(self.advance, num_tokens, self.device)


def sweep(trace: RoutingTrace) -> RoutingTrace:
    """A trace with one more part at its beginning: every expert of every layer once, in order.

    However much a cache held before, it then starts from the same state: the last pages of the
    sweep, or all of them.
    """
    num_steps = -(-trace.num_experts // trace.top_k)
    ids = torch.arange(num_steps * trace.top_k).clamp(max=trace.num_experts - 1)
    every = ids.view(num_steps, 1, trace.top_k).expand(-1, trace.num_layers, -1).to(torch.int16)
    return RoutingTrace(
        torch.cat((every, trace.topk_ids)),
        trace.num_experts,
        trace.page_bytes,
        trace.metadata,
    )
