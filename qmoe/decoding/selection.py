"""The next token of each row: logits processors, then argmax or a draw, on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import (
    EpsilonLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from qmoe.decoding.graph import Graphed, GraphPool

if TYPE_CHECKING:
    from qmoe.decoding.step import DecodeStep

# Processors that compute on scores alone, the same operations in every step. EtaLogitsWarper and
# SuppressTokensLogitsProcessor ask the device something.
CAPTURED_PROCESSORS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
)

Key = tuple[object, ...]


class Selection:
    """Chooses tokens after a step, by a CUDA graph where the processors allow it.

    Tokens go to the step, for its next run, and in turns to two places in host memory.

    Attributes:
        made: choices since `begin`.
        is_foreign: whether a processor may look at anything, other texts too.
    """

    def __init__(
        self, step: DecodeStep, rows: int, processors: LogitsProcessorList, do_sample: bool
    ) -> None:
        """Allocate; nothing is chosen yet.

        Args:
            step: gives logits, and takes tokens; it may have more rows.
            rows: texts.
            do_sample: draw by the probabilities, from ``step.generator``; else take the largest.
        """
        # Not the step, which keeps this.
        self.rows, self.ids, self.column = rows, step.ids[:rows], step.cache.columns.column
        self.next_ids, self.generator = step.input_ids, step.generator
        self.processors, self.do_sample = processors, do_sample
        self.columns = self.made = 0
        self._states: list[Tensor] = []  # of the generator, after the last two choices
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=step.device)
        cuda = step.device.type == "cuda"
        self.on_host = [torch.empty(rows, 1, dtype=torch.int64, pin_memory=cuda) for _ in range(2)]
        # A blocked host sleeps instead of asking again and again.
        self.events = [torch.cuda.Event(blocking=True) for _ in range(2 if cuda else 0)]
        self._graphed: Graphed | None = None
        self.is_foreign = key_of(rows, processors, do_sample) is None
        if cuda and not self.is_foreign:
            self.forget_graph(step.pool)

    def begin(self, input_ids: Tensor) -> None:
        """Texts of ``input_ids`` (rows, columns) int64 go on."""
        self.columns, self.made = input_ids.shape[1], 0
        # Beyond what is there stands a row's first token, which it has anyhow: a penalty for what
        # a row contains does not see the difference.
        self.ids.copy_(input_ids[:, :1].expand_as(self.ids))
        self.ids[:, : self.columns] = input_ids
        self.tokens.copy_(input_ids[:, -1:])
        if self._graphed is not None:
            self._graphed.try_again()

    def make(self, logits: Tensor) -> None:
        """Choose the next new token of each row, after a step; returns before it is done.

        Args:
            logits: (rows of the step, vocab_size), in the same place each time.
        """
        if self._graphed is not None:
            self._graphed(lambda: self._choose(self.ids, logits))
        else:
            self._choose(self.ids[:, : self.columns + self.made], logits)
        self.on_host[self.made % 2].copy_(self.tokens, non_blocking=True)
        if self.events:
            self.events[self.made % 2].record()
        if self.do_sample:
            self._states = [*self._states[-1:], self.generator.get_state()]
        self.made += 1

    def wait(self, index: int) -> Tensor:
        """The tokens (rows,) of choice ``index``, on the host."""
        if self.events:
            self.events[index % 2].synchronize()
        return self.on_host[index % 2][:, 0].clone()

    def replace(self, index: int, tokens: Tensor) -> None:
        """Let texts have ``tokens`` (rows,), on the host, in the place of choice ``index``."""
        self.ids[:, self.columns + index] = tokens.to(self.ids.device)

    def forget_after(self, index: int) -> None:
        """Let the generator go on after choice ``index``, one of the last two."""
        if self.do_sample:
            self.generator.set_state(self._states[index - self.made])

    def forget_graph(self, pool: GraphPool) -> None:
        """Drop the graph; another is captured when it is due, with memory of ``pool``."""
        self._graphed = Graphed(pool, generator=self.generator if self.do_sample else None)

    def _choose(self, ids: Tensor, logits: Tensor) -> None:
        rows = self.rows
        # As transformers does it, in fp32.
        scores = self.processors(ids, logits[:rows].to(torch.float32, copy=True))
        if self.do_sample:
            probabilities = scores.softmax(-1)
            tokens = torch.multinomial(probabilities, num_samples=1, generator=self.generator)
        else:
            tokens = scores.argmax(-1, keepdim=True)
        self.tokens.copy_(tokens)
        self.next_ids[:rows].copy_(tokens)
        if len(self.next_ids) > rows:
            self.next_ids[rows:].copy_(tokens[:1].expand(len(self.next_ids) - rows, 1))
        self.ids.index_copy_(1, self.column, tokens)


def key_of(rows: int, processors: LogitsProcessorList, do_sample: bool) -> Key | None:
    """What a selection's graph rests on; None where there can be no graph."""
    parts: list[object] = [rows, do_sample]
    for processor in processors:
        numbers = tuple(sorted(vars(processor).items()))
        plain = all(isinstance(v, bool | int | float | str | None) for _, v in numbers)
        if not plain or not _can_be_captured(processor):
            return None
        parts.append((type(processor), numbers))
    return tuple(parts)


def _can_be_captured(processor: Callable[..., Any]) -> bool:
    if type(processor) is RepetitionPenaltyLogitsProcessor:
        return not getattr(processor, "prompt_ignore_length", None)
    return type(processor) in CAPTURED_PROCESSORS
