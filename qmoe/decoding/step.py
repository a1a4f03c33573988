"""One decode step of a whole model, and the reading of prompts before it.

The step reads a token of each row and leaves the logits of the next. Everything in it has a fixed
place, and what changes from step to step (columns, positions, tokens) is a value on the device, so
that one CUDA graph serves all steps.

A short prompt has the same trouble as a step: launches take longer than kernels. It is rounded up
to one of a few lengths, each of which gets a graph too.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList

from qmoe.checkpoints.inspection import find_top_k
from qmoe.decoding.fingerprint import Fingerprint
from qmoe.decoding.graph import Graphed, GraphPool
from qmoe.decoding.kv_cache import DecodeCache
from qmoe.decoding.pieces import PIECES, find_pieces
from qmoe.decoding.pieces.attention import (
    IMPLEMENTATION,
    UnknownAttention,
    has_attention_interface,
    running_columns,
)
from qmoe.decoding.selection import Key, Selection, key_of
from qmoe.decoding.shadow import Shadow, Undecodable
from qmoe.experts.guard import Guard, guard_of
from qmoe.experts.quantized import QuantizedExperts, quantized_modules
from qmoe.paging.expert_cache import ExpertCache
from qmoe.parallel.texts import OwnTexts
from qmoe_kernels.fused_moe import EIGHT_BIT_ROWS

_OWN_MASKS = ("eager", "sdpa")  # implementations that a mask over a static cache is enough for
# With more tokens the kernels themselves take longer than their launches, so that a graph no
# longer helps.
_MAX_GRAPHED_TOKENS = 4096
_SHORTEST_PROMPT = 32
_KEPT_PROMPTS = 16  # lengths that have a graph at a time; those read longest ago go first
_KEPT_SELECTIONS = 4  # by rows and processors, likewise


class Shadows:
    """What runs in place of a model, as long as the model is what it was.

    Attributes:
        uncapturable: why there must be no graph of the model; None where there may be one.
        prompts: the shadow that reads prompts, with the model's own attention.
        steps: the shadow for decode steps, with qmoe's attention; None where the model's attention
            cannot be replaced. Then ``prompts`` decodes too, with masks.
        config, device: the model's.
        takes_last: whether it can be told to compute the logits of some tokens only.
        eight_bit_tokens: tokens from which on experts quantize their rows; None where that is not
            known.
        has_budget: whether memory is counted.
    """

    def __init__(
        self, model: Any, fingerprint: Fingerprint, pieces: Iterable[str] = PIECES
    ) -> None:
        """Look for pieces in ``model`` and make its shadows; the model is only read.

        Args:
            fingerprint: of the model; what the pieces rest on is added to it.
            pieces: of `qmoe.decoding.pieces.PIECES`, those that are wanted.

        Raises:
            Undecodable: the model cannot be run like this; the message says why.
        """
        own = model.config.get_text_config()._attn_implementation
        self._masks_are_enough = own in _OWN_MASKS
        if not has_attention_interface(model) and not self._masks_are_enough:
            raise Undecodable(f"its attention is {own!r}, which takes no static cache")
        found = find_pieces(model, pieces)
        fingerprint.watch(found.rests_on)
        self.uncapturable = fingerprint.uncapturable
        self.prompts = Shadow(model, found.forwards)
        self.steps: Shadow | None = None
        if found.attention:
            self.steps = Shadow(model, found.forwards, IMPLEMENTATION)
        self.config, self.device = self.prompts.root.config, model.device
        self.takes_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.eight_bit_tokens = _eight_bit_tokens(model)
        self.has_budget = getattr(model, "qmoe_paging", None) is not None
        self.experts = list(quantized_modules(model).values())

    def drop_attention(self, reason: UnknownAttention) -> None:
        """Decode with masks from now on: the model's attention is more than qmoe's.

        Raises:
            Undecodable: its own takes no masks over a static cache.
        """
        if not self._masks_are_enough:
            raise Undecodable(str(reason)) from reason
        self.steps = None


class Step:
    """Runs a model's experts in the same way each time, so that a graph can hold it."""

    def __init__(self, guard: Guard, experts: list[QuantizedExperts]) -> None:
        """Run nothing yet.

        Args:
            guard: of the model.
            experts: of the model.
        """
        self._guard = weakref.ref(guard)  # which keeps steps
        self._version = guard.version
        self._experts = experts
        for group in {e.share.group for e in experts if e.share is not None}:
            group.steps.add(self)
        self._failures = 0  # of the expert cache, when the prompts were read

    def forget_graphs(self) -> None:
        """Drop all graphs and their memory; others are captured when they are due."""
        raise NotImplementedError

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody changes the model meanwhile, and graphs are of the model as it is."""
        guard = self._guard()
        assert guard is not None  # whoever runs a step has its model
        with guard.lock:
            if guard.version != self._version:  # another budget, since the last step
                self._version = guard.version
                self.forget_graphs()
            cache = self._expert_cache()
            if cache is None:
                yield
                return
            with cache.lock:
                cache.take_turn()
                yield

    def _expert_cache(self) -> ExpertCache | None:
        paged = next((e.paged for e in self._experts if e.paged is not None), None)
        return None if paged is None else paged[0]

    def begin(self) -> None:
        """Failures of others that were before do not count."""
        cache = self._expert_cache()
        self._failures = 0 if cache is None else cache.failures

    def check(self) -> None:
        """Raise if steps that have ended are not valid: the host left its share out, or a disk.

        For tokens that were waited for and are about to be given out.

        Raises:
            RuntimeError, CheckpointError: see `ExpertCache.check_answers`; or another call was told
                since this one has read its prompts, and steps that were queued meanwhile are not
                valid either.
        """
        if (cache := self._expert_cache()) is not None:
            cache.check_answers()
            if cache.failures != self._failures:
                raise RuntimeError(
                    "experts could not be read or computed while this text was made, as another "
                    "call was told, and what was computed meanwhile is not valid; call again"
                )


class ExpertsStep(Step):
    """A step of a rank that has no texts, or none any more: its experts, for the others' rows."""

    def __init__(self, model: Any, rounds: OwnTexts) -> None:
        """Run nothing yet.

        Args:
            model: its experts are spread over ranks.
            rounds: of the call that is under way.
        """
        layers = list(quantized_modules(model).values())
        super().__init__(guard_of(model), layers)
        self.rounds, self.device = rounds, layers[0].down_proj_scale.device
        self._like = torch.empty(
            0, layers[0].layout.hidden_size, dtype=model.dtype, device=self.device
        )
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Drop the graph and its memory; another is captured when it is due."""
        self._graphed = Graphed(GraphPool(self.device))

    @torch.no_grad()
    def read(self) -> None:
        """Take part until all ranks have read their prompts; from here on there are steps."""
        self.begin()
        self.rounds.begin_steps(self._experts, self._like)

    @torch.no_grad()
    def take_part(self) -> None:
        """Take part in open rounds until no rank has texts any more."""
        self.rounds.take_part(self._experts, self._like)

    def advance(self) -> None:
        """One step, by its graph as soon as there is one; see `Graphed`."""
        with self.alone():
            self._graphed(self._run)
        self.rounds.steps += 1

    @torch.no_grad()
    def _run(self) -> None:
        self.rounds.run_experts(self._experts, self._like)


class DecodeStep(Step):
    """A model's decode step for a number of rows and of columns; it serves one call at a time.

    Attributes:
        cache: what the model remembers.
        input_ids: (rows, 1) int64, the tokens that the next step reads.
        position_ids: (rows, 1) int64, their positions.
        logits: (rows, vocab_size) in the model's dtype, of the last step or prompt.
        ids: (rows, length) int64, texts so far, for processors that look at them.
        generator: that tokens are drawn from.
        rounds_prompts: whether prompts are rounded up to lengths that have a graph.
    """

    def __init__(self, shadows: Shadows, guard: Guard, rows: int, length: int) -> None:
        """Allocate little; the cache grows with the first prompt.

        Args:
            shadows: of the model.
            guard: of the model.
            rows: texts at a time.
            length: tokens of each at most, prompt and padding included.

        Raises:
            ValueError: the model keeps something that no cache here is for.
        """
        super().__init__(guard, shadows.experts)
        self.shadows, self.device = shadows, shadows.device
        self.cache = DecodeCache(shadows.config, rows, length, self.device)
        self.rows, self.length = rows, length
        self.input_ids = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        self.position_ids = torch.zeros_like(self.input_ids)
        self.logits: Tensor = torch.empty(0)
        self.ids = torch.zeros(rows, length, dtype=torch.int64, device=self.device)
        self.generator = torch.Generator(self.device)
        # For a model that makes its masks itself; new columns are never masked.
        self._attention_mask = torch.ones(rows, length, dtype=torch.int64, device=self.device)
        # A budget has no room for the memory that graphs of prompts keep; states that are not
        # columns would take in what a prompt is rounded up with.
        self.rounds_prompts = (
            self.device.type == "cuda"
            and shadows.takes_last
            and not shadows.has_budget
            and shadows.uncapturable is None  # who listens hears the prompt and nothing else
            and self.cache.has_columns_only
        )
        self._round_rows: int | None = None
        self._selections: dict[Key, Selection] = {}
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Drop all graphs and their memory; others are captured when they are due."""
        self.pool = GraphPool(self.device)
        self._prompts: dict[int, _Prompt] = {}
        self._step = Graphed(self.pool, uncapturable=self.shadows.uncapturable)
        for selection in self._selections.values():
            selection.forget_graph(self.pool)

    def serve(self, round_rows: int | None) -> None:
        """Drop graphs that are not of what experts are going to exchange.

        Args:
            round_rows: of the rank that has most, where each rank has texts of its own; None where
                all have the same.
        """
        if round_rows != self._round_rows:
            self._round_rows = round_rows
            self.forget_graphs()

    @property
    def trouble(self) -> str | None:
        """Why the step has no graph, once it was tried; None otherwise."""
        return self._step.trouble

    @property
    def num_bytes(self) -> int:
        """Bytes that the step keeps on the device."""
        return self.cache.num_bytes + self.pool.num_bytes + self.logits.nbytes + self.ids.nbytes

    # ---- prompts -------------------------------------------------------------------------------

    @torch.no_grad()
    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        chunk: int | None,
        *,
        plain: bool = False,
    ) -> None:
        """Read prompts, and forget what was before; `logits` are those of their last tokens.

        Args:
            input_ids, attention_mask, position_ids: (rows, columns) int64, padded on the left.
            chunk: columns at a time; None for all at once.
            plain: there is no padding, and positions count from 0.
        """
        cache, columns = self.cache, input_ids.shape[1]
        self.begin()
        self._step.try_again()
        cache.begin(attention_mask)
        self._attention_mask.fill_(1)
        self._attention_mask[:, :columns] = attention_mask
        rounded = self.columns_of(columns, chunk, plain=plain)
        if rounded is None:
            self._read(input_ids, attention_mask, position_ids, chunk or columns)
        else:
            with self.alone():
                prompt = self._prompts.pop(rounded, None) or _Prompt(self, rounded)
                self._prompts[rounded] = prompt
                if len(self._prompts) > _KEPT_PROMPTS:
                    del self._prompts[next(iter(self._prompts))]
                prompt.read(self, input_ids)
        cache.columns.begin_decoding(columns)
        self.position_ids.copy_(position_ids[:, -1:] + 1)

    def _read(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, chunk: int
    ) -> None:
        cache = self.cache
        for ids, positions in zip(
            input_ids.split(chunk, 1), position_ids.split(chunk, 1), strict=True
        ):
            with self.alone():
                output = self.shadows.prompts(
                    input_ids=ids,
                    attention_mask=attention_mask[:, : cache.columns.filled + ids.shape[1]],
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    return_dict=True,
                    **({"logits_to_keep": 1} if self.shadows.takes_last else {}),
                )
            cache.columns.extend(ids.shape[1])
        self._keep(output.logits)

    def columns_of(self, columns: int, chunk: int | None, *, plain: bool) -> int | None:
        """The columns that `read` rounds a prompt up to; None where it is read as it is."""
        return self._round_up(columns) if plain and columns <= (chunk or columns) else None

    def _round_up(self, columns: int) -> int | None:
        """The length that prompts of so many columns are read with; None for their own.

        It depends on the length alone, so that a prompt is always computed in the same way.
        """
        # Of texts of its own other ranks know no rounded length.
        if not self.rounds_prompts or self._round_rows is not None:
            return None
        rounded = _SHORTEST_PROMPT
        if columns > rounded:
            quarter = max(1, (1 << (columns - 1).bit_length() - 1) // 4)
            rounded = -(-columns // quarter) * quarter
        if self.rows * rounded > _MAX_GRAPHED_TOKENS or rounded > self.length:
            return None
        # Rows that are quantized because there are more of them would not be the same rows.
        bound = self.shadows.eight_bit_tokens
        if bound is None or (self.rows * columns < bound) != (self.rows * rounded < bound):
            return None
        return rounded

    # ---- steps ---------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self) -> None:
        """One step, kernel by kernel."""
        try:
            self._run()
        except UnknownAttention as reason:
            # What the layers before have stored is stored again.
            self.shadows.drop_attention(reason)
            self._run()

    def _run(self) -> None:
        shadows = self.shadows
        running = running_columns.set(self.cache.columns)
        try:
            output = (shadows.steps or shadows.prompts)(
                input_ids=self.input_ids,
                attention_mask=self._attention_mask if shadows.steps is None else None,
                position_ids=self.position_ids,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
            )
        finally:
            running_columns.reset(running)
        self._keep(output.logits)
        self.cache.columns.advance()
        self.position_ids.add_(1)

    def advance(self) -> None:
        """One step, by its graph as soon as there is one; see `Graphed`."""
        with self.alone():
            self._step(self.run)

    def capture(self) -> None:
        """Capture the step; see `Graphed.capture`."""
        with self.alone():
            self._step.capture(self.run)

    def replay(self) -> None:
        """One step, by its graph; see `Graphed.replay`."""
        with self.alone():
            self._step.replay()

    def selection(self, rows: int, processors: LogitsProcessorList, do_sample: bool) -> Selection:
        """What chooses tokens after this step; kept where its graph can be used again."""
        key = key_of(rows, processors, do_sample)
        if key is None:
            return Selection(self, rows, processors, do_sample)
        selection = self._selections.pop(key, None) or Selection(self, rows, processors, do_sample)
        self._selections[key] = selection
        if len(self._selections) > _KEPT_SELECTIONS:
            del self._selections[next(iter(self._selections))]
        return selection

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
        device = step.device
        self.input_ids = torch.zeros(step.rows, columns, dtype=torch.int64, device=device)
        self.position_ids = torch.arange(columns, device=device).expand(step.rows, -1)
        self.last = torch.zeros(1, dtype=torch.int64, device=device)
        self.graphed = Graphed(step.pool, uncapturable=step.shadows.uncapturable)

    def read(self, step: DecodeStep, input_ids: Tensor) -> None:
        columns, length = input_ids.shape[1], self.input_ids.shape[1]
        # The prompt again: tokens that are routed like it, not all to the same experts.
        repeats = -(-length // columns)
        self.input_ids.copy_(input_ids.repeat(1, repeats)[:, :length])
        self.last.fill_(columns - 1)
        self.graphed.try_again()
        self.graphed(lambda: self._run(step))

    def _run(self, step: DecodeStep) -> None:
        output = step.shadows.prompts(
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            past_key_values=step.cache,
            use_cache=True,
            return_dict=True,
            logits_to_keep=self.last,
        )
        step._keep(output.logits)


def step_of(model: Any, rows: int, length: int, pieces: Iterable[str] = PIECES) -> DecodeStep:
    """A step of ``model`` that nobody else uses; see `Shadows` and `DecodeStep`."""
    return DecodeStep(Shadows(model, Fingerprint(model), pieces), guard_of(model), rows, length)


def _eight_bit_tokens(model: Any) -> float | None:
    experts = [m for m in quantized_modules(model).values() if m.activations == "auto"]
    if not experts:
        return float("inf")
    top_k = find_top_k(model.config.get_text_config().to_dict())
    counts = {m.num_experts for m in experts}
    if top_k is None or len(counts) != 1:
        return None
    return EIGHT_BIT_ROWS * counts.pop() / top_k
