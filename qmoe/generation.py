"""generate(): text from one or many prompts, streamed, with what it cost.

It goes through transformers' own ``model.generate``, so every decoding strategy works as it does
there; on a GPU greedy decoding and sampling take the loop of `qmoe.decoding.loop`. What is added:
batches that need no pad token and change nothing in the tokenizer, options that are never dropped
silently, pieces of text as they come, and statistics.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from qmoe.decoding.loop import decode
from qmoe.experts.layout import describe
from qmoe.experts.quantized import QuantizedExperts

# Options of transformers that would have no effect: they need another option to be on.
_SAMPLING_ONLY = frozenset(
    {
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "top_h",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
    }
)
_BEAM_ONLY = frozenset({"early_stopping", "length_penalty"})
# Fields of GenerationConfig that are no choice of a caller who wants texts.
_NOT_AN_OPTION = frozenset(
    {
        "max_length",  # counts the prompt too; max_new_tokens says what is meant
        "return_dict_in_generate",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "is_assistant",
        "decoder_start_token_id",
        "continuous_batching_config",
        "transformers_version",
    }
)

# What a byte-level tokenizer decodes to while the bytes of a character are incomplete.
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class GenerationStatistics:
    """What one call of :func:`generate` cost.

    Attributes:
        prompt_tokens: tokens of all prompts, without padding.
        new_tokens: tokens generated for all texts, end-of-text tokens included.
        prefill_seconds: from the start until the first new token is there.
        decode_seconds: from then to the end.
        prompt_tokens_per_second: prompt_tokens / prefill_seconds.
        decode_tokens_per_second: new tokens after each text's first, / decode_seconds; None where
            no text has more than one token.
        peak_memory_bytes: see ``peak_memory_kind``; None where the system does not tell.
        peak_memory_kind: ``"cuda allocated"``: the most that torch had allocated during the call,
            summed over GPUs. ``"process resident"``: the most RAM the process ever held, loading
            included.
        expert_bytes: bytes of all expert weights and scales that the model holds.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens_per_second: float
    decode_tokens_per_second: float | None
    peak_memory_bytes: int | None
    peak_memory_kind: Literal["cuda allocated", "process resident"]
    expert_bytes: int


@dataclass(frozen=True)
class GenerationResult:
    """Texts in the order of their prompts, and what they cost.

    Attributes:
        texts: the new text of each prompt, without the prompt and without special tokens. With
            ``num_return_sequences=n``, the n texts of a prompt follow one another.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens generated for each text, the end-of-text token included.
        statistics: time and memory.
    """

    texts: list[str]
    prompt_tokens: list[int]
    new_tokens: list[int]
    statistics: GenerationStatistics


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during :func:`generate`; ``result`` holds what there was by then."""

    def __init__(self, result: GenerationResult) -> None:
        super().__init__("generation was interrupted")
        self.result = result


def generate(
    model: Any,
    tokenizer: Any,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    stream: Callable[[int, str], None] | None = None,
    chat: bool = False,
    seed: int | None = None,
    **options: Any,
) -> GenerationResult:
    """Continue one or many prompts.

    Works on any causal language model of transformers, patched or not, and leaves the model, the
    tokenizer and torch's random state (where ``seed`` is given) as they were.

    Args:
        model: a transformers model with ``generate``.
        tokenizer: its tokenizer; needs neither a pad token nor a padding side.
        prompts: one or many; many run as one batch, padded on the left.
        max_new_tokens: at most so many tokens for each prompt.
        stream: called as ``stream(index, piece)`` while text comes; ``index`` counts ``texts``.
            Pieces never split a character, and joined they are the text. Not with beams.
        chat: wrap each prompt as a user's message in the tokenizer's chat template.
        seed: seeds sampling; the same seed gives the same text on the same device.
        options: named as in transformers' ``GenerationConfig``: ``do_sample``, ``temperature``,
            ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``, ``num_beams``, ``stop_strings``
            ... What is not given comes from ``model.generation_config``.

    A model with a budget (see :func:`qmoe.load`) takes long prompts in chunks of a size that the
    budget has room for.

    Raises:
        ValueError: no prompts, an empty one, one that does not fit into the model's context, or
            all of them not into its budget, together with ``max_new_tokens``; an unknown option, or
            one that would have no effect.
        GenerationInterrupted: Ctrl-C; carries the result so far.

    Example:
        >>> import qmoe
        >>> from transformers import AutoTokenizer
        >>> model = qmoe.load("examples/tiny-moe", weights="int8")
        >>> tokenizer = AutoTokenizer.from_pretrained("examples/tiny-moe")
        >>> result = qmoe.generate(model, tokenizer, "def main():", max_new_tokens=8)
        >>> len(result.texts), result.new_tokens[0] <= 8
        (1, True)
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    config = _generation_config(model, tokenizer, max_new_tokens, options)
    token_ids = _tokenize(tokenizer, prompts, chat)
    _check_context(model, token_ids, max_new_tokens)
    _keep_to_budget(model, config, token_ids)
    num_beams = config.num_beams or 1
    if stream is not None and num_beams > 1:
        raise ValueError(
            f"stream with num_beams={num_beams}: beams are chosen at the end; drop one of the two"
        )

    stop_strings = (
        [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings or []
    )
    config.stop_strings = None
    texts = [
        _Text(
            tokenizer,
            set(_as_list(config.eos_token_id)),
            stop_strings,
            None if stream is None else _bind(stream, index),
        )
        for index in range(len(prompts) * (config.num_return_sequences or 1))
    ]
    input_ids, attention_mask = _pad_left(token_ids, config.pad_token_id)  # (prompts, longest)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    # Offloaded weights are on the meta device; accelerate then moves the input where it is wanted.
    device = model.device if model.device.type != "meta" else torch.device("cpu")
    clock = _Clock(devices)
    criteria = StoppingCriteriaList([clock])
    if stop_strings:
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    streamer = _Streamer(texts) if num_beams == 1 else None
    # On a CPU a launch costs nothing, and transformers' own loop is as good.
    ours = device.type == "cuda" and config.get_generation_mode() in (
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
    )

    def result() -> GenerationResult:
        return _result(model, [len(ids) for ids in token_ids], texts, clock, devices)

    try:
        with torch.random.fork_rng(devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            sequences = model.generate(
                input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=config,
                stopping_criteria=criteria,
                streamer=streamer,
                # transformers hands its streamer to no loop but its own.
                custom_generate=partial(decode, streamer=streamer) if ours else None,
            )
        clock.stop()
        if num_beams > 1:
            for text, row in zip(texts, sequences[:, input_ids.shape[1] :].tolist(), strict=True):
                text.extend(row)
        for text in texts:
            text.finish()
    except KeyboardInterrupt:
        clock.stop()
        for text in texts:
            text.finish()
        raise GenerationInterrupted(result()) from None
    return result()


def expert_bytes(model: nn.Module) -> int:
    """Bytes of all expert weights and scales of a model, in whatever form it holds them."""
    total = 0
    for module in model.modules():
        if isinstance(module, QuantizedExperts):
            total += module.num_bytes
        elif (layout := describe(module)) is not None:
            names = (name for p in layout.projections for name in layout.sources[p])
            total += sum(module.get_parameter(name).nbytes for name in names)
    return total


def load_tokenizer(path_or_repo: str) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: it has none, or one that cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(path_or_repo)
    except Exception as error:  # each tokenizer class fails in its own way
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{path_or_repo}: no usable tokenizer ({reason})") from error


def hide_progress_bars() -> None:
    """Load without transformers' progress bars."""
    transformers_logging.disable_progress_bar()


def peak_resident_bytes() -> int | None:
    """The most RAM this process ever held, in bytes; None where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Clock(StoppingCriteria):
    """Notes when the first new tokens are there. Every decoding strategy asks whether to stop."""

    def __init__(self, devices: list[int]) -> None:
        self.devices = devices
        self.started = time.perf_counter()
        self.prefilled: float | None = None
        self.stopped: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.prefilled is None:
            # Tokens on the host are there; tokens on a device may only be going to be.
            self.prefilled = time.perf_counter() if input_ids.device.type == "cpu" else self._now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def stop(self) -> None:
        self.stopped = self._now()

    def _now(self) -> float:
        for device in self.devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()


class _Streamer(BaseStreamer):
    """Deals transformers' new tokens to the texts they belong to."""

    def __init__(self, texts: list[_Text]) -> None:
        self.texts = texts
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:  # the first call brings the prompts
            self.prompt_seen = True
            return
        # (texts,), or (1, n) from strategies that accept several tokens in a step
        for text, tokens in zip(
            self.texts, value.reshape(len(self.texts), -1).tolist(), strict=True
        ):
            text.extend(tokens)

    def end(self) -> None:
        """Nothing is held here."""


class _Text:
    """The new tokens of one text, and the text as far as it is certain.

    A token is decoded together with the few before it, since what it decodes to can depend on them
    (a leading space, a character of several tokens); what those decode to alone is then taken off.
    """

    def __init__(
        self,
        tokenizer: Any,
        eos: set[int],
        stop_strings: list[str],
        emit: Callable[[str], None] | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.eos = eos
        self.stop_strings = stop_strings
        self.emit = emit
        self.tokens: list[int] = []
        self.text = ""
        self.done = False
        self._context = 0  # tokens[_context:_certain] are the few before
        self._certain = 0  # text holds what tokens[:_certain] decode to
        self._piece_length = 0  # of the last piece

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens up to the end of this text; what follows is padding of the batch."""
        for token in tokens:
            if self.done:
                return
            self.tokens.append(token)
            self.done = token in self.eos
            if self.emit is not None or self.stop_strings:
                self._advance()
                # A stop string ends in the last piece, so the whole text need not be searched.
                self.done |= any(
                    s in self.text[-(len(s) + self._piece_length) :] for s in self.stop_strings
                )

    def finish(self) -> None:
        """Give out what was held back: an incomplete character at the very end."""
        self.done = True
        if self.emit is None and not self.stop_strings:
            self.text = self._decode(self.tokens)
        else:
            self._advance(last=True)

    def _advance(self, last: bool = False) -> None:
        known = self._decode(self.tokens[self._context : self._certain])
        decoded = self._decode(self.tokens[self._context :])
        if len(decoded) <= len(known) or (decoded.endswith(_REPLACEMENT) and not last):
            return
        piece = decoded[len(known) :]
        self._piece_length = len(piece)
        self.text += piece
        self._context, self._certain = self._certain, len(self.tokens)
        if self.emit is not None:
            self.emit(piece)

    def _decode(self, tokens: list[int]) -> str:
        # Tidying spaces would change text that has been given out already.
        return self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _bind(stream: Callable[[int, str], None], index: int) -> Callable[[str], None]:
    return lambda piece: stream(index, piece)


def _as_list(value: int | Sequence[int] | torch.Tensor | None) -> list[int]:
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return [value] if isinstance(value, int) else list(value)


def _generation_config(
    model: Any, tokenizer: Any, max_new_tokens: int, options: dict[str, Any]
) -> GenerationConfig:
    """The model's own generation config with the caller's options; the model keeps its own."""
    if not getattr(model, "generation_config", None):
        raise ValueError(
            f"{type(model).__name__} cannot generate text: it has no generation_config"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; generate() takes decoders")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r}: must be a whole number, at least 1")
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - _NOT_AN_OPTION
    for name in options:
        if name not in known:
            raise ValueError(
                f"{name}: no option of generate(); options are named as in transformers' "
                "GenerationConfig (do_sample, temperature, top_k, top_p, num_beams ...)"
            )
    options = {name: value for name, value in options.items() if value is not None}
    config = copy.deepcopy(model.generation_config)
    config.update(**options, max_new_tokens=max_new_tokens)
    if not config.do_sample:
        _refuse_without_effect(options, _SAMPLING_ONLY, "do_sample=True")
    if (config.num_beams or 1) == 1:
        _refuse_without_effect(options, _BEAM_ONLY, "num_beams > 1")
    config.max_length = None  # a model's own default; max_new_tokens decides
    if config.pad_token_id is None:
        candidates = [*_as_list(tokenizer.pad_token_id), *_as_list(config.eos_token_id), 0]
        config.pad_token_id = candidates[0]  # masked wherever it stands
    return config


def _refuse_without_effect(options: dict[str, Any], names: frozenset[str], needs: str) -> None:
    for name in sorted(names & options.keys()):
        raise ValueError(f"{name}={options[name]!r} has no effect without {needs}")


def _tokenize(tokenizer: Any, prompts: list[str], chat: bool) -> list[list[int]]:
    if not prompts:
        raise ValueError("prompts is empty; give at least one prompt")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}: the tokenizer "
            "has no chat template; this is probably a base model, prompt it without chat"
        )
    token_ids = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {index} is a {type(prompt).__name__}; prompts are strings")
        if not prompt:
            raise ValueError(f"prompt {index} is empty; give it some text")
        if chat:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        # A chat template writes the special tokens itself.
        ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
        if not ids:
            raise ValueError(f"prompt {index} ({prompt!r}) has no tokens; give it some text")
        token_ids.append(list(ids))
    return token_ids


def _keep_to_budget(model: Any, config: GenerationConfig, token_ids: list[list[int]]) -> None:
    """Refuse what a model's budget has no room for; have long prompts taken in chunks."""
    if getattr(model, "qmoe_paging", None) is None:
        return
    budget = model.qmoe_paging.budget
    rows = len(token_ids) * max(config.num_beams or 1, config.num_return_sequences or 1)
    longest = max(map(len, token_ids))
    tokens = longest + config.max_new_tokens
    if rows * tokens > budget.batch_size * budget.context:
        raise ValueError(
            f"{rows} texts of {longest} + {config.max_new_tokens} tokens do not fit into the "
            f"budget, which has room for {budget.batch_size} of {budget.context}; make room with "
            f"qmoe.resize(model, hbm_budget=..., context={tokens}, batch_size={rows})"
        )
    # At least two: some models take a chunk of a single token for one that they generated.
    chunk = max(2, budget.chunk * budget.batch_size // rows)
    if (config.prefill_chunk_size or 0) > chunk:
        raise ValueError(
            f"prefill_chunk_size={config.prefill_chunk_size}: the budget has room for {chunk}"
        )
    if longest > chunk and config.prefill_chunk_size is None and config.use_cache is not False:
        config.prefill_chunk_size = chunk


def _check_context(model: Any, token_ids: list[list[int]], max_new_tokens: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return
    for index, ids in enumerate(token_ids):
        if len(ids) >= context:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens, the model's context {context}; shorten it"
            )
        if len(ids) + max_new_tokens > context:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens, the model's context {context}: "
                f"max_new_tokens={max_new_tokens} does not fit, {context - len(ids)} would"
            )


def _pad_left(token_ids: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (prompts, longest prompt) int64."""
    longest = max(map(len, token_ids))
    input_ids = torch.full((len(token_ids), longest), pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(token_ids):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, longest - len(ids) :] = 1
    return input_ids, attention_mask


def _result(
    model: Any,
    prompt_tokens: list[int],
    texts: list[_Text],
    clock: _Clock,
    devices: list[int],
) -> GenerationResult:
    assert clock.stopped is not None
    prefilled = clock.stopped if clock.prefilled is None else clock.prefilled
    prefill, decode = prefilled - clock.started, clock.stopped - prefilled
    new_tokens = [len(text.tokens) for text in texts]
    after_first = sum(max(n - 1, 0) for n in new_tokens)
    statistics = GenerationStatistics(
        prompt_tokens=sum(prompt_tokens),
        new_tokens=sum(new_tokens),
        prefill_seconds=prefill,
        decode_seconds=decode,
        prompt_tokens_per_second=sum(prompt_tokens) / prefill,
        decode_tokens_per_second=after_first / decode if after_first else None,
        peak_memory_bytes=(
            sum(map(torch.cuda.max_memory_allocated, devices)) if devices else peak_resident_bytes()
        ),
        peak_memory_kind="cuda allocated" if devices else "process resident",
        expert_bytes=expert_bytes(model),
    )
    return GenerationResult([text.text for text in texts], prompt_tokens, new_tokens, statistics)
