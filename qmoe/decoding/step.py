"""One decode step of a whole model, and the reading of prompts before it.

The step reads a token of each row and leaves the logits of the next. Everything in it has a fixed
place, and what changes from step to step (columns, positions, tokens) is a value on the device, so
that one CUDA graph serves all steps.

A short prompt has the same trouble as a step: launches take longer than kernels. It is rounded up
to one of a few lengths, each of which gets a graph too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qmoe.checkpoints.inspection import find_top_k
from qmoe.decoding.graph import Graphed, GraphPool
from qmoe.decoding.kv_cache import DecodeCache
from qmoe.decoding.pieces import (
    SUBSTITUTIONS,
    Substitutions,
    UnknownAttention,
    has_attention_interface,
)
from qmoe.experts.quantized import quantized_modules
from qmoe_kernels.fused_moe import ARITHMETIC_BOUND_ROWS

_OWN_MASKS = ("eager", "sdpa")  # implementations that a mask over a static cache is enough for
# Of more tokens than these kernels take longer than launches.
_MAX_GRAPHED_TOKENS = 4096
_SHORTEST_PROMPT = 32
_KEPT_PROMPTS = 16  # lengths that have a graph at a time; those read longest ago go first


class DecodeStep:
    """A model's decode step for a number of rows and of columns.

    Attributes:
        cache: what the model remembers.
        input_ids: (rows, 1) int64, the tokens that the next step reads.
        position_ids: (rows, 1) int64, their positions.
        logits: (rows, vocab_size) in the model's dtype, of the last step or prompt.
        rounds_prompts: whether prompts are rounded up to lengths that have a graph.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        length: int,
        substitutions: Iterable[str] = SUBSTITUTIONS,
    ) -> None:
        """Allocate little; the cache grows with the first prompt.

        Args:
            model: a causal language model of transformers, on one device.
            rows: texts at a time.
            length: tokens of each at most, prompt and padding included.
            substitutions: see `qmoe.decoding.pieces`.

        Raises:
            ValueError: the model cannot be run like this; the message says why.
        """
        config = model.config.get_text_config()
        own = config._attn_implementation
        if not has_attention_interface(model) and own not in _OWN_MASKS:
            raise ValueError(f"its attention is {own!r}, which takes no static cache")
        self.model, self.device = model, model.device
        self.substitutions = Substitutions(model, substitutions)
        self.cache = DecodeCache(model.config, rows, length, self.device)
        self.rows, self.length = rows, length
        self.input_ids = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        self.position_ids = torch.zeros_like(self.input_ids)
        self.logits: Tensor = torch.empty(0)
        # For a model that makes its masks itself; new columns are never masked.
        self._attention_mask = torch.ones(rows, length, dtype=torch.int64, device=self.device)
        self._takes_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._paging = getattr(model, "qmoe_paging", None)
        self._pool = GraphPool(self.device)
        self._step = Graphed(self.run, self.device, self._pool)
        # A budget has no room for the memory that graphs of prompts keep; states that are not
        # columns would take in what a prompt is rounded up with.
        self.rounds_prompts = (
            self.device.type == "cuda"
            and self._takes_last
            and self._paging is None
            and self.cache.has_columns_only
        )
        self._bound = _arithmetic_bound(model)
        self._prompts: dict[int, _Prompt] = {}

    @property
    def trouble(self) -> str | None:
        """Why the step has no graph, once it was tried; None otherwise."""
        return self._step.trouble

    # ---- prompts -------------------------------------------------------------------------------

    @torch.no_grad()
    def read(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, chunk: int | None
    ) -> None:
        """Read prompts, and forget what was before; `logits` are those of their last tokens.

        Args:
            input_ids, attention_mask, position_ids: (rows, columns) int64, padded on the left.
            chunk: columns at a time; None for all at once.
        """
        cache, columns = self.cache, input_ids.shape[1]
        cache.begin(attention_mask)
        self._attention_mask.fill_(1)
        self._attention_mask[:, :columns] = attention_mask
        rounded = self._round_up(columns)
        if rounded is not None and columns <= (chunk or columns) and bool(attention_mask.all()):
            prompt = self._prompts.pop(rounded, None) or _Prompt(self, rounded)
            self._prompts[rounded] = prompt
            if len(self._prompts) > _KEPT_PROMPTS:
                del self._prompts[next(iter(self._prompts))]
            prompt.read(input_ids)
        else:
            self._read(input_ids, attention_mask, position_ids, chunk or columns)
        cache.begin_decoding(columns)
        self.position_ids.copy_(position_ids[:, -1:] + 1)

    def _read(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, chunk: int
    ) -> None:
        cache = self.cache
        with self.substitutions.active(cache):
            for ids, positions in zip(
                input_ids.split(chunk, 1), position_ids.split(chunk, 1), strict=True
            ):
                output = self.model(
                    input_ids=ids,
                    attention_mask=attention_mask[:, : cache.filled + ids.shape[1]],
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    return_dict=True,
                    **({"logits_to_keep": 1} if self._takes_last else {}),
                )
                cache.extend(ids.shape[1])
        self._keep(output.logits)

    def _round_up(self, columns: int) -> int | None:
        """The length that prompts of so many columns are read with; None for their own.

        It depends on the length alone, so that a prompt is always computed in the same way.
        """
        if not self.rounds_prompts:
            return None
        rounded = _SHORTEST_PROMPT
        if columns > rounded:
            quarter = max(1, (1 << (columns - 1).bit_length() - 1) // 4)
            rounded = -(-columns // quarter) * quarter
        if self.rows * rounded > _MAX_GRAPHED_TOKENS or rounded > self.length:
            return None
        # Rows that are quantized because there are more of them would not be the same rows.
        bound = self._bound
        if bound is None or (self.rows * columns < bound) != (self.rows * rounded < bound):
            return None
        return rounded

    # ---- steps ---------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self) -> None:
        """One step, kernel by kernel."""
        try:
            self._run()
        except UnknownAttention:
            # What the layers before have stored is stored again.
            self.substitutions.attention = False
            self._run()

    def _run(self) -> None:
        with self.substitutions.active(self.cache):
            output = self.model(
                input_ids=self.input_ids,
                attention_mask=None if self.substitutions.attention else self._attention_mask,
                position_ids=self.position_ids,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
            )
        self._keep(output.logits)
        self.cache.advance()
        self.position_ids.add_(1)

    def advance(self) -> None:
        """One step, by its graph as soon as there is one; see `Graphed`."""
        if (paging := getattr(self.model, "qmoe_paging", None)) is not self._paging:
            self._paging = paging  # another budget, since the last step
            self.release()
        self._step()

    def capture(self) -> None:
        """Capture the step; see `Graphed.capture`."""
        self._step.capture()

    def replay(self) -> None:
        """One step, by its graph; see `Graphed.replay`."""
        self._step.replay()

    def release(self) -> None:
        """Drop all graphs and their memory; others are captured when they are due."""
        self._prompts.clear()
        self._pool = GraphPool(self.device)
        self._step = Graphed(self.run, self.device, self._pool)

    def _keep(self, logits: Tensor) -> None:
        logits = logits[:, -1]
        if self.logits.shape != logits.shape:
            self.logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        self.logits.copy_(logits)


class _Prompt:
    """Prompts without padding, rounded up to one length on the right.

    The columns beyond the prompt are hidden from what comes before them, and written again by what
    comes after.
    """

    def __init__(self, step: DecodeStep, columns: int) -> None:
        self.step, device = step, step.device
        self.input_ids = torch.zeros(step.rows, columns, dtype=torch.int64, device=device)
        self.position_ids = torch.arange(columns, device=device).expand(step.rows, -1)
        self.last = torch.zeros(1, dtype=torch.int64, device=device)
        self.run = Graphed(self._run, device, step._pool)

    def read(self, input_ids: Tensor) -> None:
        columns, length = input_ids.shape[1], self.input_ids.shape[1]
        # The prompt again: tokens that are routed like it, not all to the same experts.
        repeats = -(-length // columns)
        self.input_ids.copy_(input_ids.repeat(1, repeats)[:, :length])
        self.last.fill_(columns - 1)
        self.run()

    def _run(self) -> None:
        step = self.step
        with step.substitutions.active(step.cache):
            output = step.model(
                input_ids=self.input_ids,
                position_ids=self.position_ids,
                past_key_values=step.cache,
                use_cache=True,
                return_dict=True,
                logits_to_keep=self.last,
            )
        step._keep(output.logits)


def _arithmetic_bound(model: Any) -> float | None:
    """Tokens from which on experts quantize their rows; None where that is not known."""
    experts = [m for m in quantized_modules(model).values() if m.activations == "auto"]
    if not experts:
        return float("inf")
    top_k = find_top_k(model.config.get_text_config().to_dict())
    counts = {m.num_experts for m in experts}
    if top_k is None or len(counts) != 1:
        return None
    return ARITHMETIC_BOUND_ROWS * counts.pop() / top_k
