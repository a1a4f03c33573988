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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import (
    GenerationConfig,
    GenerationMode,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from qmoe.decoding.decoder import decoder_of
from qmoe.decoding.draws import drawing
from qmoe.decoding.fingerprint import Fingerprint
from qmoe.decoding.graph import reason_of
from qmoe.decoding.selection import Selection, key_of
from qmoe.decoding.shadow import Undecodable
from qmoe.decoding.step import DecodeStep, ExpertsStep
from qmoe.experts.guard import guard_of
from qmoe.experts.quantized import group_of
from qmoe.parallel.failure import RankFailed
from qmoe.parallel.group import KnownToAll
from qmoe.parallel.texts import OwnTexts

_KNOWN_ARGUMENTS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
}


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> Any:
    """Decode greedily or by sampling, for ``model.generate(..., custom_generate=qmoe.decode)``.

    The decode step of the whole model is captured as a CUDA graph, once for a number of texts and
    a length, and kept for later calls (`qmoe.release` lets go of it); on a CPU the same step runs
    kernel by kernel. A model or an option that it cannot serve is left to transformers' own loop,
    and a warning says why.

    Several threads may decode with one model, and a streamer may call ``generate`` again: each call
    has a step of its own.

    Args:
        input_ids: (rows, columns) int64 prompts, padded on the left; the rest is what transformers
            hands to its decoding loops.
        generator: what tokens are drawn from, on the model's device; by default torch's own
            generator of that device, as transformers does it. Calls at the same time that share the
            default one draw from different random numbers.

    Returns:
        (rows, columns + new tokens) int64, ``input_ids`` included.

    Raises:
        ValueError: the options ask for another decoding strategy, beams for instance.
        RuntimeError: this thread is in the middle of loading a state dict into the model.
        RankFailed: another rank failed or is gone.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"custom_generate=qmoe.decode is greedy or samples, and the options ask for {mode}; "
            "leave custom_generate out for that"
        )
    group = group_of(model)
    if group is not None and not group.in_call:
        raise ValueError(
            "custom_generate=qmoe.decode: the experts are spread over ranks, which have to agree "
            "on every token; call qmoe.generate on each of them"
        )
    call = _Call(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        streamer,
        generator,
    )
    with guard_of(model).generating():
        try:
            with _own_modes():
                call.check(model_kwargs, synced_gpus)
                return call.run()
        except Undecodable as error:
            # Not the error itself, which holds on to the step and its memory.
            reason, tried = str(error), error.__cause__ is not None
        if group is not None and group.own_texts is not None:
            group.own_texts.agree_on_steps(None)
        if tried and group is not None:
            # Other ranks may be further on: to begin again would add up what is not one layer's.
            raise RuntimeError(f"{type(model).__name__} cannot be decoded on this rank: {reason}")
        if not tried:
            _notice(model, f"decodes by transformers' own loop: {reason}")
        sequences = type(model)._sample(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
        if tried:
            # transformers can do what qmoe could not: it was not the input's fault.
            decoder_of(model).refuse(reason)
            _notice(model, f"decodes by transformers' own loop: {reason}")
        return sequences


_NOTICED: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def _notice(model: Any, what: str) -> None:
    """Warn, once for a model and a reason."""
    seen = _NOTICED.setdefault(model, set())
    if what not in seen:
        seen.add(what)
        warnings.warn(f"{type(model).__name__} {what}", stacklevel=3)


@dataclass
class _Call:
    """One call of `decode`."""

    model: Any
    input_ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: BaseStreamer | None
    generator: torch.Generator | None

    def check(self, model_kwargs: dict[str, Any], synced_gpus: bool) -> None:
        """Take what transformers hands over.

        Raises:
            Undecodable: these options are not for qmoe's loop.
        """
        obstacle = _obstacle(
            self.model, self.input_ids.device, self.config, model_kwargs, synced_gpus
        )
        if obstacle is not None:
            raise Undecodable(obstacle)
        shape = self.input_ids.shape
        if self.criteria.max_length <= shape[1]:
            raise Undecodable("a MaxLengthCriteria was given that its prompt fulfils")
        mask, positions = (model_kwargs.get(name) for name in ("attention_mask", "position_ids"))
        for name, given in (("attention_mask", mask), ("position_ids", positions)):
            if given is not None and given.shape != shape:
                raise Undecodable(f"{name} of shape {tuple(given.shape)} were given")
        self.mask = torch.ones_like(self.input_ids) if mask is None else mask.long()
        natural = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.positions = natural if positions is None else positions
        looks = torch.stack(
            (
                # zeros, then ones: a row may not have a hole, nor end with padding
                (self.mask.diff(dim=-1) >= 0).all() & (self.mask[:, -1] == 1).all(),
                ((self.mask == 0) | (self.mask == 1)).all(),
                self.mask.bool().all(),
                ((self.positions == natural) | (self.mask == 0)).all(),
            )
        ).tolist()
        if not (looks[0] and looks[1]):
            raise Undecodable("its attention_mask is more than padding on the left")
        self.plain = looks[2] and looks[3]

    def run(self) -> Tensor:
        """Generate; see `decode`.

        Raises:
            Undecodable: the model is not for qmoe's loop; no token was given out.
        """
        decoder = decoder_of(self.model)
        step = decoder.take(self.model, len(self.input_ids), self.criteria.max_length)
        whole = False
        try:
            self._agree(step)
            with drawing(step, self.generator):
                sequences = self._generate(step)
            if step.trouble not in (None, Fingerprint.RECORDING):
                _notice(self.model, f"decodes without a CUDA graph: {step.trouble}")
            whole = True
            return sequences
        finally:
            try:
                if step.device.type == "cuda":
                    # Nothing of it is in flight: any stream may use it, or free it.
                    torch.cuda.current_stream(step.device).synchronize()
            finally:
                decoder.give_back(step, keep=whole)

    def _agree(self, step: DecodeStep) -> None:
        """Refuse to run where ranks would run steps of other shapes, or another number of them.

        Raises:
            Undecodable: texts are each rank's own, and one of them decodes by transformers' loop.
            RankFailed: the ranks differ.
        """
        group = group_of(self.model)
        if group is None:
            return
        if group.own_texts is not None:
            do_sample = bool(self.config.do_sample)
            # Ranks queue steps ahead of what is chosen, which these would wait for.
            waits = key_of(len(self.input_ids), self.processors, do_sample) is None
            can = step.shadows.uncapturable is None and not waits
            round_rows = group.own_texts.agree_on_steps(step.rows if can else None)
            if round_rows is None:
                raise Undecodable("hooks or logits processors of a rank, which may do anything")
            step.serve(round_rows)
            return
        step.serve(None)
        chunk = self.config.prefill_chunk_size
        columns = step.columns_of(self.input_ids.shape[1], chunk, plain=self.plain)
        mine = [step.rows, columns, step.shadows.uncapturable is None]
        for rank, other in enumerate(group.exchange("qmoe.decode", step=mine)):
            if other["step"] != mine:
                raise RankFailed(
                    f"rank {rank} decodes in other steps than rank {group.rank}; register the same "
                    "hooks on every rank, and call qmoe.release on all or none",
                    (rank,),
                )

    def _advance(self, step: DecodeStep) -> None:
        step.advance()
        if (rounds := self._rounds()) is not None:
            rounds.steps += 1

    def _rounds(self) -> OwnTexts | None:
        group = group_of(self.model)
        return None if group is None else group.own_texts

    def _generate(self, step: DecodeStep) -> Tensor:
        max_new_tokens = self.criteria.max_length - self.input_ids.shape[1]
        do_sample = bool(self.config.do_sample)
        selection = step.selection(len(self.input_ids), self.processors, do_sample)
        # The caller's code is to see no text beyond its end, which the host decides.
        calls_back = any(map(_calls_back, self.processors))
        self._begin(step, selection, max_new_tokens, choose=not calls_back)
        texts = _Texts(self.input_ids, self.criteria, self.config, self.streamer)
        # Whoever listens to a step by hooks is to hear no more steps than there are.
        heard = step.shadows.uncapturable is not None
        # What looks at all texts is to see padding where one has ended, which the host decides.
        watched = selection.is_foreign and texts.pad is not None and len(self.input_ids) > 1
        ahead = 0 if heard or watched or calls_back else 1
        group, rounds = group_of(self.model), self._rounds()
        for index in range(max_new_tokens):
            if index > 0 and selection.made <= index + ahead < max_new_tokens:
                with step.alone():
                    if index > 1 or not calls_back:  # else `_begin` has done it
                        self._advance(step)
                    selection.make(step.logits)
            tokens = selection.wait(index)
            step.check()
            if group is not None:
                group.check_open()
            if texts.extend(tokens):
                selection.forget_after(index)
                break
            if rounds is not None:
                rounds.goes_on(True)
            if watched:
                selection.replace(index, texts.ids[:, texts.columns - 1])
        if self.streamer is not None:
            self.streamer.end()
        return texts.ids[:, : texts.columns].to(self.input_ids.device)

    def _begin(
        self, step: DecodeStep, selection: Selection, max_new_tokens: int, *, choose: bool
    ) -> None:
        """Read the prompts, choose a token and run a step; no token is given out yet.

        Args:
            choose: the token after that step, too.
        """

        def begin() -> None:
            selection.begin(self.input_ids)
            with _undecodable(step):
                step.read(*prompts, plain=self.plain)
            if (rounds := self._rounds()) is not None:
                ExpertsStep(self.model, rounds).read()
            selection.make(step.logits)
            if max_new_tokens > 1:
                with _undecodable(step):
                    self._advance(step)
                if choose:
                    selection.make(step.logits)

        # Rows beyond the real ones repeat the first text; their output is thrown away.
        row_of = torch.arange(step.rows, device=self.input_ids.device)
        row_of[len(self.input_ids) :] = 0
        texts = (self.input_ids, self.mask, self.positions)
        prompts = (*(tensor[row_of] for tensor in texts), self.config.prefill_chunk_size)
        draws = step.generator.get_state()
        try:
            begin()
            return
        except torch.OutOfMemoryError:
            if group_of(self.model) is not None:
                raise  # the other ranks would not begin again
        # not inside, where the error still holds what there was
        decoder_of(self.model).make_room()
        step.forget_graphs()
        step.generator.set_state(draws)
        begin()


@contextmanager
def _undecodable(step: DecodeStep) -> Iterator[None]:
    """Let transformers' loop try what fails in the model's own code, but not in hooks on it."""
    try:
        yield
    except (torch.OutOfMemoryError, Undecodable, RankFailed, KnownToAll):
        raise
    except Exception as error:  # whatever the model does with a cache of this kind
        if step.shadows.uncapturable is not None:
            raise
        raise Undecodable(reason_of(error)) from error


@contextmanager
def _own_modes() -> Iterator[None]:
    """Tensors that a later call may write to, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _obstacle(
    model: Any,
    device: torch.device,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    synced_gpus: bool,
) -> str | None:
    """Why a call with these options is not for qmoe's loop; None if it is."""
    # Of this call: adapters of prompts (PEFT) put theirs on the model while they generate.
    prepare = model.prepare_inputs_for_generation
    if getattr(prepare, "__func__", None) is not GenerationMixin.prepare_inputs_for_generation:
        return f"{type(model).__name__} prepares its inputs in a way of its own"
    update = model._update_model_kwargs_for_generation
    if getattr(update, "__func__", None) is not GenerationMixin._update_model_kwargs_for_generation:
        return f"{type(model).__name__} updates its inputs in a way of its own"
    if synced_gpus:
        return "it is spread over processes"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
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
    given = {k for k, v in model_kwargs.items() if v is not None and not _is_empty(v)}
    if meant := given - _KNOWN_ARGUMENTS:
        return f"{', '.join(sorted(meant))} were given"
    return None


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict | list | tuple) and not value


def _calls_back(processor: Any) -> bool:
    """Whether a logits processor runs the caller's code (a grammar, say)."""
    theirs = type(processor).__module__.startswith("transformers.")
    return not theirs or isinstance(processor, PrefixConstrainedLogitsProcessor)


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
