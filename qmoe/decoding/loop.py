"""A decoding loop for transformers' ``generate`` that replays a captured step.

    model.generate(input_ids, attention_mask=mask, custom_generate=qmoe.decode, ...)

transformers prepares everything as ever: the configuration, logits processors, stopping criteria.
This loop takes the place of its own for greedy decoding and for sampling, and returns the same
tokens. The device is always one token ahead of the host: while the host looks at a token (is it the
end of a text? is there somebody to stream it to?), the next is being computed.

transformers hands a streamer to no loop but its own, and the streamer no more than the prompt; so
it is named twice: ``generate(..., streamer=s, custom_generate=partial(qmoe.decode, streamer=s))``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation import (
    EpsilonLogitsWarper,
    GenerationConfig,
    GenerationMode,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from qmoe.decoding.graph import STEPS, capture
from qmoe.decoding.step import DecodeStep

# Steps that are kept for a model at a time; the one that was used longest ago goes first.
_KEPT_STEPS = 4
# Columns are rounded up, so that a step serves many lengths.
_SHORTEST = 512

# Processors that compute on scores alone, the same operations in every step. EtaLogitsWarper and
# SuppressTokensLogitsProcessor ask the device something.
_CAPTURED_PROCESSORS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
)
_KNOWN_ARGUMENTS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
}


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Any:
    """Decode greedily or by sampling, for ``model.generate(..., custom_generate=qmoe.decode)``.

    The decode step of the whole model is captured as a CUDA graph, once for a number of texts and
    a length, and kept for later calls; on a CPU the same step runs kernel by kernel. A model or an
    option that it cannot serve is left to transformers' own loop, and a warning says why.

    Args:
        input_ids: (rows, columns) int64 prompts, padded on the left; the rest is what transformers
            hands to its decoding loops.

    Returns:
        (rows, columns + new tokens) int64, ``input_ids`` included.

    Raises:
        ValueError: the options ask for another decoding strategy, beams for instance.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"custom_generate=qmoe.decode is greedy or samples, and the options ask for {mode}; "
            "leave custom_generate out for that"
        )
    tensors = _tensors(model)
    obstacle = _obstacle(model, tensors, generation_config, model_kwargs, synced_gpus)
    step: DecodeStep | None = None
    if obstacle is None:
        try:
            length = stopping_criteria.max_length
            step = _steps_of(model).take(model, tensors, len(input_ids), length)
        except ValueError as error:
            obstacle = str(error)
    if step is None:
        _notice(model, f"decodes by transformers' own loop: {obstacle}")
        loop = type(model)._sample
        return loop(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    return _decode(
        step,
        input_ids,
        model_kwargs,
        logits_processor,
        stopping_criteria,
        generation_config,
        streamer,
    )


# ---- what can be decoded like this -------------------------------------------------------------


def _tensors(model: Any) -> list[Tensor]:
    """Parameters and buffers of all modules, in one pass: a model has thousands of modules."""
    return [
        tensor
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]


def _obstacle(
    model: Any,
    tensors: list[Tensor],
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    synced_gpus: bool,
) -> str | None:
    """Why a model with these options is not for `_decode`; None if it is."""
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if synced_gpus:
        return "it is spread over processes"
    devices = {tensor.device for tensor in tensors if isinstance(tensor, nn.Parameter)}
    if len(devices) != 1 or torch.device("meta") in devices:
        return "it is on several devices or offloaded"
    own = type(model).prepare_inputs_for_generation
    if own is not GenerationMixin.prepare_inputs_for_generation:
        return f"{type(model).__name__} prepares its inputs in a way of its own"
    if config.use_cache is False:
        return "use_cache=False"
    if config.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation={config.cache_implementation!r} was asked for"
    for name in ("return_dict_in_generate", "is_assistant"):
        if getattr(config, name, False):
            return f"{name}=True"
    cache = model_kwargs.get("past_key_values")
    if cache is not None and getattr(cache, "_is_user_defined", False):
        return "past_key_values were given"
    if meant := {k for k, v in model_kwargs.items() if v is not None} - _KNOWN_ARGUMENTS:
        return f"{', '.join(sorted(meant))} were given"
    return None


_NOTICED: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def _notice(model: Any, what: str) -> None:
    """Warn, once for a model and a reason."""
    seen = _NOTICED.setdefault(model, set())
    if what not in seen:
        seen.add(what)
        warnings.warn(f"{type(model).__name__} {what}", stacklevel=3)


# ---- steps, kept -------------------------------------------------------------------------------


@dataclass
class _Steps:
    """The steps of one model, the latest used last, and what the model was when they were made."""

    steps: dict[tuple[int, int], DecodeStep] = field(default_factory=dict)
    state: Any = None

    def take(self, model: Any, tensors: list[Tensor], rows: int, columns: int) -> DecodeStep:
        """A step for so many rows and at least so many columns.

        Args:
            tensors: of the model, see `_tensors`.

        Raises:
            ValueError: the model cannot be run like this.
        """
        if self.state != _state(model, tensors):
            self.steps.clear()
        budget = _budget(model)
        if _bucket(rows) * columns <= budget:
            rows = _bucket(rows)
        found = min(
            (key for key in self.steps if key[0] == rows and key[1] >= columns), default=None
        )
        if found is None:
            length = _length(model, rows, columns)
            for key in list(self.steps):
                held = sum(r * c for r, c in self.steps)
                if len(self.steps) >= _KEPT_STEPS or held + rows * length > budget:
                    del self.steps[key]
            found = rows, length
            self.steps[found] = DecodeStep(model, rows, length)
            self.state = _state(model, _tensors(model))  # products are merged by now
        step = self.steps.pop(found)
        self.steps[found] = step
        return step

    def keep(self, step: DecodeStep) -> None:
        """Drop all steps but this one."""
        self.steps = {key: kept for key, kept in self.steps.items() if kept is step}

    def __deepcopy__(self, memo: Any) -> _Steps:
        return _Steps()  # a copy of a model has tensors of its own

    def __reduce__(self) -> tuple[type[_Steps], tuple[()]]:
        return _Steps, ()


def _steps_of(model: Any) -> _Steps:
    # In the model itself: a table of models beside it would keep them alive, since steps do.
    steps: _Steps = vars(model).setdefault(STEPS, _Steps())
    return steps


def _state(model: Any, tensors: list[Tensor]) -> Any:
    """What a captured graph rests on: where all tensors are, and what the experts are."""
    return (
        [tensor.data_ptr() for tensor in tensors],
        [id(tensor) for tensor in tensors],
        getattr(model, "qmoe_paging", None),
        model.config._attn_implementation,
        model.training,
    )


def _bucket(rows: int) -> int:
    """Rows are rounded up: to 8 each is its own, then in eights, and in steps of 64 from 64 on."""
    return rows if rows <= 8 else -(-rows // 8) * 8 if rows <= 64 else -(-rows // 64) * 64


def _budget(model: Any) -> float:
    """Tokens that caches may hold together."""
    paging = getattr(model, "qmoe_paging", None)
    return float("inf") if paging is None else paging.budget.batch_size * paging.budget.context


def _length(model: Any, rows: int, columns: int) -> int:
    length = _SHORTEST
    while length < columns:
        length *= 2
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    return max(columns, int(min(length, limit, _budget(model) // rows)))


# ---- the loop ----------------------------------------------------------------------------------


def _decode(
    step: DecodeStep,
    input_ids: Tensor,
    model_kwargs: dict[str, Any],
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
) -> Tensor:
    rows, columns = input_ids.shape
    max_new_tokens = criteria.max_length - columns
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    positions = model_kwargs.get("position_ids")
    if positions is None:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
    choice = _Choice(step, input_ids, criteria.max_length, processors, bool(config.do_sample))
    # A bucket's other rows are the first text again.
    row_of = torch.arange(step.rows, device=input_ids.device)
    row_of[rows:] = 0

    def padded(tensor: Tensor) -> Tensor:
        return tensor.expand(rows, -1)[row_of]

    prompts = padded(input_ids), padded(mask), padded(positions), config.prefill_chunk_size
    try:
        step.read(*prompts)
        too_little = False
    except torch.OutOfMemoryError:
        too_little = True
    if too_little:  # not above, where the error still holds what there was
        _steps_of(step.model).keep(step)
        torch.cuda.empty_cache()
        step.read(*prompts)
    texts = _Texts(input_ids, criteria, config, streamer)
    choice.make(0)
    for index in range(max_new_tokens):
        if index + 1 < max_new_tokens:
            step.advance()
            choice.make(index + 1)
        if texts.extend(choice.wait(index)):
            break
    if step.trouble is not None:
        _notice(step.model, f"decodes without a CUDA graph: {step.trouble}")
    if streamer is not None:
        streamer.end()
    return texts.ids[:, : texts.columns].to(input_ids.device)


class _Choice:
    """The next token of each row: logits processors, argmax or a draw, on the device.

    Tokens go to the step, for its next run, and in turns to two places in host memory.
    """

    def __init__(
        self,
        step: DecodeStep,
        input_ids: Tensor,
        max_length: int,
        processors: LogitsProcessorList,
        do_sample: bool,
    ) -> None:
        self.step, self.processors, self.do_sample = step, processors, do_sample
        self.rows, self.columns = input_ids.shape
        # Beyond what is there stands a row's first token, which it has anyhow: a penalty for what
        # a row contains does not see the difference.
        self.ids = input_ids[:, :1].repeat(1, max_length)
        self.ids[:, : self.columns] = input_ids
        self.tokens = input_ids[:, -1:].clone()  # (rows, 1), the last choice
        self.cuda = step.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured = self.cuda and all(map(_can_be_captured, processors))
        self.on_host = [
            torch.empty(self.rows, 1, dtype=torch.int64, pin_memory=self.cuda) for _ in range(2)
        ]
        # A blocked host sleeps instead of asking again and again.
        self.events = [torch.cuda.Event(blocking=True) for _ in range(2 if self.cuda else 0)]

    def make(self, index: int) -> None:
        """Choose new token ``index`` of each row, after a step; returns before it is done."""
        if self.captured and index == 2:  # the first ones have compiled what there is
            self.graph = capture(lambda: self._choose(self.ids), self.step.device)
        if self.graph is not None:
            self.graph.replay()
        else:
            # Where a graph follows, with the operands that it is going to have.
            self._choose(self.ids if self.captured else self.ids[:, : self.columns + index])
        self.on_host[index % 2].copy_(self.tokens, non_blocking=True)
        if self.cuda:
            self.events[index % 2].record()

    def wait(self, index: int) -> Tensor:
        """The tokens (rows,) of choice ``index``, on the host."""
        if self.cuda:
            self.events[index % 2].synchronize()
        return self.on_host[index % 2][:, 0].clone()

    def _choose(self, ids: Tensor) -> None:
        # As transformers does it, in fp32.
        scores = self.processors(ids, self.step.logits[: self.rows].to(torch.float32, copy=True))
        if self.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1)
        else:
            tokens = scores.argmax(-1, keepdim=True)
        self.tokens.copy_(tokens)
        self.step.input_ids[: self.rows].copy_(tokens)
        if self.step.rows > self.rows:
            self.step.input_ids[self.rows :].copy_(tokens[:1].expand(self.step.rows - self.rows, 1))
        self.ids.index_copy_(1, self.step.cache.column, tokens)


def _can_be_captured(processor: Callable[..., Tensor]) -> bool:
    if type(processor) is RepetitionPenaltyLogitsProcessor:
        return not getattr(processor, "prompt_ignore_length", None)
    return type(processor) in _CAPTURED_PROCESSORS


class _Texts:
    """What has been generated, on the host, and which rows go on."""

    def __init__(
        self,
        input_ids: Tensor,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
    ) -> None:
        rows, self.columns = input_ids.shape
        self.ids = torch.zeros(rows, criteria.max_length, dtype=torch.int64)
        self.ids[:, : self.columns] = input_ids.cpu()
        self.criteria, self.streamer = criteria, streamer
        self.unfinished = torch.ones(rows, dtype=torch.bool)
        # As in transformers: a row that has ended goes on with padding where there is an end.
        pad = config._pad_token_tensor
        ends = any(hasattr(c, "eos_token_id") for c in criteria)
        self.pad = int(pad) if ends and pad is not None else None

    def extend(self, tokens: Tensor) -> bool:
        """Add a token (rows,) to each row; whether all rows have ended."""
        if self.pad is not None:
            tokens = tokens.where(self.unfinished, self.pad)
        self.ids[:, self.columns] = tokens
        self.columns += 1
        if self.streamer is not None:
            self.streamer.put(tokens)
        done = self.criteria(self.ids[:, : self.columns], None)
        self.unfinished &= ~done
        return not bool(self.unfinished.any())
