"""generate(): text from one or many prompts, streamed, with what it cost.

It goes through transformers' own ``model.generate``, so every decoding strategy works as it does
there; on a GPU greedy decoding and sampling take the loop of `qmoe.decoding.loop`. What is added:
batches that need no pad token and change nothing in the tokenizer, options that are never dropped
silently, pieces of text as they come, and statistics.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    EncoderNoRepeatNGramLogitsProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.utils import logging as transformers_logging

from qmoe.agreement import Agreement, Strikes, agree, begin_own_texts, take_part
from qmoe.checkpoints.files import check_folder, first_line
from qmoe.decoding.loop import decode
from qmoe.experts.guard import guard_of
from qmoe.experts.layout import describe
from qmoe.experts.quantized import QuantizedExperts, group_of
from qmoe.generation_config import BEAMS, ONE_BY_ONE, as_list, configuration
from qmoe.paging.model import check_answers
from qmoe.seeds import Draws, check_seed, refuse_dropout
from qmoe.stopping import Clock, Until
from qmoe.text import Streamer, Text
from qmoe.thread_state import thread_state


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
            summed over GPUs; torch has one such counter for the process, and each call sets it
            back, so calls at the same time share it. ``"process resident"``: the most RAM the
            process ever held, loading included.
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
    prompts: str | Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 128,
    stream: Callable[[int, str], None] | None = None,
    until: Callable[[int, Sequence[int]], bool] | None = None,
    chat: bool = False,
    seed: int | None = None,
    own_texts: bool = False,
    **options: Any,
) -> GenerationResult:
    """Continue one or many prompts.

    Works on any causal language model of transformers, patched or not, and leaves the model, the
    tokenizer and torch's random state (where ``seed`` is given) as they were. It may be called from
    several threads at a time, and from ``stream``.

    Args:
        model: a transformers model with ``generate``.
        tokenizer: its tokenizer; needs neither a pad token nor a padding side.
        prompts: one or many; many run as one batch, padded on the left. Each is a text, or the list
            of its tokens.
        max_new_tokens: at most so many tokens for each prompt.
        stream: called as ``stream(index, piece)`` while text comes; ``index`` counts ``texts``.
            Pieces never split a character, and joined they are the text. Not with beams.
        until: called as ``until(index, tokens)`` after each new token of a text, with all new ones
            of that text; it ends there if this returns True. Not with beams.
        chat: wrap each prompt as a user's message in the tokenizer's chat template.
        seed: seeds sampling; the same seed gives the same text on the same device, whatever else
            draws meanwhile.
        own_texts: where the experts are spread over ranks: each rank has prompts of its own, or
            none, and gets their texts; its attention is for these alone.
        options: named as in transformers' ``GenerationConfig``: ``do_sample``, ``temperature``,
            ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``, ``num_beams``, ``stop_strings``
            ... What is not given comes from ``model.generation_config``, but for ``max_length``
            and what asks for other outputs than texts.

    A model whose experts are spread over ranks (see :func:`qmoe.load`) generates on all of them:
    each makes the same call and gets the same texts. ``stream`` and ``until`` may be given on some
    ranks only; where one rank is interrupted or its ``until`` ends a text, all stop at that token.

    A model with a budget (see :func:`qmoe.load`) takes long prompts in chunks of a size that the
    budget has room for.

    Raises:
        ValueError: no prompts, an empty one, one that does not fit into the model's context, or
            all of them not into its budget, together with ``max_new_tokens``; another model's
            tokenizer, or a chat template that fails; an unknown option, a value that it cannot
            have, one that would have no effect, or one that qmoe cannot serve; a seed that is no
            64-bit number, or one for a model whose dropout is on.
        GenerationInterrupted: Ctrl-C; carries the result so far.
        RankFailed: the experts are spread over ranks, and another failed, is gone, or generates
            something else.

    Example:
        >>> import qmoe
        >>> from transformers import AutoTokenizer
        >>> model = qmoe.load("examples/tiny-moe", weights="int8")
        >>> tokenizer = AutoTokenizer.from_pretrained("examples/tiny-moe")
        >>> result = qmoe.generate(model, tokenizer, "def main():", max_new_tokens=8)
        >>> len(result.texts), result.new_tokens[0] <= 8
        (1, True)
    """
    group = group_of(model)
    listener = "stream" if stream is not None else "until" if until is not None else None
    prepare = partial(
        _prepare, model, tokenizer, prompts, max_new_tokens, chat, options, listener, seed
    )
    if own_texts and group is None:
        raise ValueError("own_texts=True: this model's experts are not spread over ranks; drop it")
    restore = thread_state()
    call = agreement = None
    try:
        with ExitStack() as stack:
            if group is None:
                config, token_ids = prepare()
            else:
                strikes = stack.enter_context(Strikes())
                stack.enter_context(group.together("qmoe.generate"))
                if own_texts:
                    config, token_ids = begin_own_texts(model, group, strikes, prompts, prepare)
                else:
                    config, token_ids, seed = agree(model, group, prepare, seed)
                    agreement = Agreement(group, strikes)
            stack.enter_context(guard_of(model).generating())
            draws = None if seed is None else Draws(seed)
            if token_ids:
                call = _Call(model, tokenizer, token_ids, config, stream, until, draws, agreement)
                call.run()
            if own_texts and group is not None:
                take_part(model, group)
        if agreement is not None:
            agreement.check_interrupted()
        if call is None:
            return _no_texts(model)
        call.finish()
        return call.result()
    except KeyboardInterrupt:
        if call is None and not own_texts:
            raise
        if call is not None:
            call.cut()
        result = _no_texts(model) if call is None else call.result()
        raise GenerationInterrupted(result) from None
    finally:
        restore()


def _prepare(
    model: Any,
    tokenizer: Any,
    prompts: str | Sequence[str | Sequence[int]],
    max_new_tokens: int,
    chat: bool,
    options: dict[str, Any],
    listener: str | None,
    seed: int | None,
) -> tuple[GenerationConfig, list[list[int]]]:
    """The configuration of a call and the tokens of its prompts.

    Args:
        listener: the option that names who is called for each token, if somebody is.

    Raises:
        ValueError: see :func:`generate`.
    """
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts is {prompts!r}; give a text, or a list of texts")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    config = configuration(model, tokenizer, max_new_tokens, options)
    token_ids = _tokenize(tokenizer, prompts, chat)
    _check_vocabulary(model, token_ids)
    _check_context(model, token_ids, max_new_tokens)
    _keep_to_budget(model, config, token_ids, max_new_tokens)
    mode = config.get_generation_mode()
    if listener is not None and mode in BEAMS:
        raise ValueError(
            f"{listener} with num_beams={config.num_beams}: beams are chosen at the end; drop one "
            "of the two"
        )
    if mode not in ONE_BY_ONE and group_of(model) is not None:
        raise ValueError(
            f"the options ask for {mode.value}, and experts that are spread over ranks decode "
            "greedily or by sampling; drop num_beams and the like, or load without expert_parallel"
        )
    if seed is not None:
        check_seed(seed)
        refuse_dropout(model, seed)
    config.max_length = max(map(len, token_ids)) + max_new_tokens
    return config, token_ids


def _no_texts(model: Any) -> GenerationResult:
    nothing = GenerationStatistics(
        0, 0, 0.0, 0.0, 0.0, None, None, "process resident", expert_bytes(model)
    )
    return GenerationResult([], [], [], nothing)


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


class OverBudget(ValueError):
    """Texts that a model's budget has no room for.

    Attributes:
        on_command_line: the message for people who gave the budget there.
    """

    def __init__(self, what: str, remedy: str, remedy_on_command_line: str) -> None:
        super().__init__(f"{what}; {remedy}")
        self.on_command_line = f"{what}; {remedy_on_command_line}"


def load_tokenizer(path_or_repo: str) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: it has none, or one that cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_repo)
    except Exception as error:  # each tokenizer class fails in its own way
        if Path(path_or_repo).is_dir():
            check_folder(Path(path_or_repo))  # no model: that comes before its tokenizer
        raise ValueError(f"{path_or_repo}: no usable tokenizer ({first_line(error)})") from error
    # Where there are no files, transformers makes up one that knows special tokens alone.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"{path_or_repo}: no tokenizer here; put tokenizer.json and tokenizer_config.json of "
            "the model that it was made from beside config.json"
        )
    return tokenizer


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


class _Call:
    """One call of generate(): its texts, its clock, and what runs them."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        token_ids: list[list[int]],
        config: GenerationConfig,
        stream: Callable[[int, str], None] | None,
        until: Callable[[int, Sequence[int]], bool] | None,
        draws: Draws | None,
        agreement: Agreement | None = None,
    ) -> None:
        self.model, self.token_ids, self.config, self.draws = model, token_ids, config, draws
        self.group = group_of(model)
        self.devices = sorted(
            {p.device.index for p in model.parameters() if p.device.type == "cuda"}
        )
        given = config.stop_strings or []
        stop_strings = [given] if isinstance(given, str) else list(given)
        # Here, since transformers hands no tokenizer to a loop that is not its own.
        config.stop_strings = None
        self.texts = [
            Text(
                tokenizer,
                as_list(config.eos_token_id),
                stop_strings,
                None if stream is None else partial(self._emit, stream, index),
            )
            for index in range(len(token_ids) * (config.num_return_sequences or 1))
        ]
        self.clock = Clock(self.devices)
        self.criteria = StoppingCriteriaList([self.clock])
        if stop_strings:
            self.criteria.append(StopStringCriteria(tokenizer, stop_strings))
        own = None if until is None else Until(self.texts, until, self._paused)
        if agreement is not None:
            agreement.watch(self.texts, own)
            self.criteria.append(agreement)
        elif own is not None:
            self.criteria.append(own)

    def _emit(self, stream: Callable[[int, str], None], index: int, piece: str) -> None:
        with self._paused():
            stream(index, piece)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """What the caller draws meanwhile, in a generation of its own, is no draw of ours."""
        with (
            nullcontext() if self.draws is None else self.draws.paused(),
            nullcontext() if self.group is None else self.group.outside(),
        ):
            yield

    def run(self) -> None:
        """Generate; the texts have their tokens then, those before an interrupt too."""
        mode = self.config.get_generation_mode()
        streamer = None if mode in BEAMS else Streamer(self.texts)
        input_ids, attention_mask = _pad_left(self.token_ids)  # (prompts, longest)
        # Offloaded weights are on the meta device; accelerate moves the input where it is wanted.
        device = self.model.device
        device = torch.device("cpu") if device.type == "meta" else device
        # On a CPU a launch costs nothing, and transformers' own loop is as good; of texts of each
        # rank's own it knows nothing.
        ours = mode in ONE_BY_ONE and (device.type == "cuda" or self._has_own_texts())
        generator = None if self.draws is None else self.draws.generator(device)
        # transformers hands its streamer to no loop but its own.
        loop = partial(decode, streamer=streamer, generator=generator)
        processors = _without_padding(self.config, self.token_ids)
        for index in self.devices:
            torch.cuda.reset_peak_memory_stats(index)
        self.clock.start()
        with nullcontext() if self.draws is None else self.draws:
            sequences = self.model.generate(
                input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=self.config,
                logits_processor=processors,
                stopping_criteria=self.criteria,
                streamer=streamer,
                custom_generate=loop if ours else None,
            )
        check_answers(self.model)
        self.clock.stop()
        if streamer is None:
            rows = sequences[:, input_ids.shape[1] :].tolist()
            for text, row in zip(self.texts, rows, strict=True):
                text.extend(row)

    def _has_own_texts(self) -> bool:
        """Whether the other ranks have other texts."""
        return self.group is not None and self.group.own_texts is not None

    def finish(self) -> None:
        """Give out what the texts hold back."""
        for text in self.texts:
            text.finish()

    def cut(self) -> None:
        """End everything where an interrupt found it."""
        self.clock.stop()
        for text in self.texts:
            text.cut()

    def result(self) -> GenerationResult:
        """Texts and statistics; after :meth:`finish` or :meth:`cut`."""
        prompt_tokens = [len(ids) for ids in self.token_ids]
        new_tokens = [len(text.tokens) for text in self.texts]
        after_first = sum(max(n - 1, 0) for n in new_tokens)
        prefill, decoding = self.clock.seconds()
        statistics = GenerationStatistics(
            prompt_tokens=sum(prompt_tokens),
            new_tokens=sum(new_tokens),
            prefill_seconds=prefill,
            decode_seconds=decoding,
            prompt_tokens_per_second=sum(prompt_tokens) / prefill if prefill else 0.0,
            decode_tokens_per_second=after_first / decoding if after_first and decoding else None,
            peak_memory_bytes=(
                sum(map(torch.cuda.max_memory_allocated, self.devices))
                if self.devices
                else peak_resident_bytes()
            ),
            peak_memory_kind="cuda allocated" if self.devices else "process resident",
            expert_bytes=expert_bytes(self.model),
        )
        texts = [text.text for text in self.texts]
        return GenerationResult(texts, prompt_tokens, new_tokens, statistics)


def _tokenize(
    tokenizer: Any, prompts: Sequence[str | Sequence[int]], chat: bool
) -> list[list[int]]:
    if not prompts:
        raise ValueError("prompts is empty; give at least one prompt")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}: the tokenizer "
            "has no chat template; this is probably a base model, prompt it without chat"
        )
    token_ids = []
    for index, prompt in enumerate(prompts):
        are_tokens = isinstance(prompt, (list, tuple)) and all(type(i) is int for i in prompt)
        if not isinstance(prompt, str) and not are_tokens:
            raise ValueError(
                f"prompt {index} is a {type(prompt).__name__}; prompts are strings, or lists of "
                "their tokens"
            )
        if not prompt:
            raise ValueError(f"prompt {index} is empty; give it some text")
        if are_tokens and chat:
            raise ValueError(f"prompt {index}: chat needs text, and these are tokens")
        if not isinstance(prompt, str):
            token_ids.append(list(prompt))
            continue
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            # A byte that is no UTF-8 becomes such a one on the command line.
            raise ValueError(f"prompt {index} ({prompt!r}) is no text in UTF-8")
        if chat:
            prompt = _in_template(tokenizer, prompt)
        # A chat template writes the special tokens itself.
        ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
        if not ids:
            raise ValueError(f"prompt {index} ({prompt!r}) has no tokens; give it some text")
        token_ids.append(list(ids))
    return token_ids


def _in_template(tokenizer: Any, prompt: str) -> str:
    message = {"role": "user", "content": prompt}
    try:
        return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the checkpoint's
        raise ValueError(
            f"{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}: the chat "
            f"template failed ({first_line(error)}); write the prompt out, without chat"
        ) from error


def _check_vocabulary(model: Any, token_ids: list[list[int]]) -> None:
    """Refuse tokens that the model has no embedding for: on a GPU they end the whole process."""
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    for index, ids in enumerate(token_ids):
        if size is not None and not 0 <= min(ids) <= max(ids) < size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(
                f"prompt {index} has the token {wrong}, and the model has {size} tokens; this "
                "is the tokenizer of another model"
            )


def _keep_to_budget(
    model: Any, config: GenerationConfig, token_ids: list[list[int]], max_new_tokens: int
) -> None:
    """Refuse what a model's budget has no room for; have long prompts taken in chunks."""
    if getattr(model, "qmoe_paging", None) is None:
        return
    budget = model.qmoe_paging.budget
    rows = len(token_ids) * max(config.num_beams or 1, config.num_return_sequences or 1)
    longest = max(map(len, token_ids))
    tokens = longest + max_new_tokens
    if rows * tokens > budget.batch_size * budget.context:
        raise OverBudget(
            f"{rows} texts of {longest} + {max_new_tokens} tokens do not fit into the "
            f"budget, which has room for {budget.batch_size} of {budget.context}",
            f"make room with qmoe.resize(model, hbm_budget=..., context={tokens}, "
            f"batch_size={rows})",
            f"give --context {tokens} --batch-size {rows}, and --hbm-budget as much as they take",
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


def _without_padding(config: GenerationConfig, token_ids: list[list[int]]) -> LogitsProcessorList:
    """Take out of ``config`` what would find repetitions in padding; what does it for each row."""
    processors = LogitsProcessorList()
    if len({len(ids) for ids in token_ids}) == 1:
        return processors
    if config.no_repeat_ngram_size:
        own = NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size)
        processors.append(_Unpadded(token_ids, [own] * len(token_ids)))
        config.no_repeat_ngram_size = None
    if size := config.encoder_no_repeat_ngram_size:
        prompts = [torch.tensor([ids]) for ids in token_ids]
        owns = [EncoderNoRepeatNGramLogitsProcessor(size, prompt) for prompt in prompts]
        processors.append(_Unpadded(token_ids, owns))
        config.encoder_no_repeat_ngram_size = None
    return processors


class _Unpadded(LogitsProcessor):
    """A processor for each prompt, which sees its texts without the padding on the left."""

    def __init__(self, token_ids: list[list[int]], processors: list[LogitsProcessor]) -> None:
        longest = max(map(len, token_ids))
        self.paddings = [longest - len(ids) for ids in token_ids]
        self.processors = processors

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        texts = len(input_ids) // len(self.processors)  # of each prompt, one after another
        scores = scores.clone()
        for row, (ids, own) in enumerate(zip(input_ids, scores, strict=True)):
            padding, process = self.paddings[row // texts], self.processors[row // texts]
            own.copy_(process(ids[None, padding:], own[None])[0])
        return scores


def _pad_left(token_ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (prompts, longest prompt) int64.

    Padding is masked, but some penalties look at all that stands in a row. So a row is padded with
    its own first token: what it contains stays the same, and nothing leaves the vocabulary.
    """
    longest = max(map(len, token_ids))
    input_ids = torch.tensor([[ids[0]] * (longest - len(ids)) + ids for ids in token_ids])
    attention_mask = torch.tensor(
        [[0] * (longest - len(ids)) + [1] * len(ids) for ids in token_ids]
    )
    return input_ids, attention_mask
