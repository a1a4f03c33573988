"""What ranks agree on while they generate together: the call, each token, and when to stop.

All ranks compute the same, so there is little to decide. What may differ from rank to rank is what
comes from outside, an interrupt or a caller's function, and it must end a text on all of them at
the same token: the layers of the next one would wait for a rank that does not come.
"""

from __future__ import annotations

import json
import signal
import threading
import time
import zlib
from collections.abc import Callable, Sized
from types import FrameType
from typing import Any, TypeAlias

import torch
from transformers import GenerationConfig, StoppingCriteria

from qmoe.checkpoints.inspection import find_top_k
from qmoe.decoding.fingerprint import Fingerprint
from qmoe.decoding.step import ExpertsStep
from qmoe.loading.spread import sizes_of_shared
from qmoe.parallel.failure import RankFailed
from qmoe.parallel.group import RankGroup
from qmoe.parallel.texts import OwnTexts
from qmoe.start import SIGNALS
from qmoe.text import Text

# The configuration of a call and the tokens of its prompts.
Prepared: TypeAlias = "tuple[GenerationConfig, list[list[int]]]"
# A launcher may hand on a Ctrl-C that the terminal has sent already. In seconds.
_SAME_STRIKE = 1.0


class Strikes:
    """Keeps Ctrl-C and the like until the ranks have agreed to stop.

    A second one, a while after the first, is not kept: whoever waits in vain gets away.
    """

    def __init__(self) -> None:
        self.struck: tuple[int, float] | None = None  # signal, time
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def __enter__(self) -> Strikes:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if callable(before):
                    self._before[number] = before
                    signal.signal(number, self._keep)
        return self

    def _keep(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.struck is None:
            self.struck = number, now
        elif now - self.struck[1] > _SAME_STRIKE:
            self._before[number](number, frame)

    def __exit__(self, kind: Any, *exception: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if kind is None and self.struck is not None:
            number, _ = self.struck
            self._before[number](number, None)


class Agreement(StoppingCriteria):
    """Asked after every token of every text, on every rank: whether the ranks go on.

    Attributes:
        interrupted: the rank that was interrupted, once all know of it.
    """

    def __init__(self, group: RankGroup, strikes: Strikes) -> None:
        self.group, self.strikes = group, strikes
        self.until: StoppingCriteria | None = None
        self.texts: list[Text] = []
        self.interrupted: int | None = None
        self.step = 0

    def watch(self, texts: list[Text], until: StoppingCriteria | None) -> None:
        """Take what this rank has: its texts, and who else ends them.

        Args:
            texts: end here where another rank ends them.
            until: asked on this rank alone; what it ends, ends everywhere.
        """
        self.texts, self.until = texts, until

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.step += 1
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.until is not None:
            done |= self.until(input_ids, scores).to(done.device)
        heard = self.group.exchange(
            f"token {self.step} of qmoe.generate",
            tokens=_sum_of(input_ids[:, -1].tolist()),
            done=done.nonzero()[:, 0].tolist(),
            interrupted=self.strikes.struck is not None,
        )
        for rank, other in enumerate(heard):
            if other["tokens"] != heard[0]["tokens"]:
                raise RankFailed(
                    f"rank {rank} chose another token than rank 0, so the ranks do not compute the "
                    "same; start all of them with the same versions on the same kind of device",
                    (rank,),
                )
            for index in other["done"]:
                done[index] = True
                if not self.texts[index].done:
                    self.texts[index].end_at(self.step)
            if other["interrupted"] and self.interrupted is None:
                self.interrupted = rank
                done[:] = True
        return done

    def check_interrupted(self) -> None:
        """Raise KeyboardInterrupt if another rank was interrupted."""
        if self.interrupted is not None:
            raise KeyboardInterrupt(f"rank {self.interrupted} was interrupted")


def agree(
    model: Any,
    group: RankGroup,
    prepare: Callable[[], Prepared],
    seed: int | None,
) -> tuple[GenerationConfig, list[list[int]], int | None]:
    """What this rank's call is, and its seed; every rank's is the same.

    Args:
        model: of the ranks.
        group: the ranks, in a call together.
        prepare: looks at what the caller gave.
        seed: None: where tokens are drawn, they are from a seed that rank 0 draws.

    Raises:
        what ``prepare`` raises; on the other ranks a RankFailed that names this one.
        RankFailed: another rank generates something else, or with another model.
    """
    try:
        config, token_ids = prepare()
    except Exception as error:
        _agree_on_call(model, group, error, None, [], seed)
        raise  # never: it was raised there
    return config, token_ids, _agree_on_call(model, group, None, config, token_ids, seed)


def _agree_on_call(
    model: Any,
    group: RankGroup,
    error: Exception | None,
    config: GenerationConfig | None,
    token_ids: list[list[int]],
    seed: int | None,
) -> int | None:
    """Find out whether all ranks generate the same; they read prompts in equal chunks then.

    Args:
        error: why this rank cannot; what follows is not looked at then.
        config: of the call; gets the smallest chunk of all ranks.
        token_ids: the prompts.
        seed: None: where tokens are drawn, they are from a seed that rank 0 draws.

    Returns:
        the seed.

    Raises:
        error, where it was given; on the other ranks a RankFailed that names this one.
        RankFailed: another rank generates something else, or with another model.
    """
    drawn = None
    if error is None:
        assert config is not None
        chunk, config.prefill_chunk_size = config.prefill_chunk_size, None
        if seed is None and config.do_sample:
            drawn = int(torch.randint(2**63 - 1, ()))
        call = _sum_of([config.to_json_string(use_diff=False), token_ids, seed])
    else:
        chunk = call = None
    said = {"call": call, "chunk": chunk, "seed": drawn, "sizes": sizes_of_shared(model)}
    heard = group.agree("qmoe.generate", error, **said)
    _check_same_model(heard)
    for rank, other in enumerate(heard):
        if other["call"] != call:
            raise RankFailed(
                f"rank {rank} generates from other prompts or options than rank {group.rank}; give "
                "all ranks the same",
                (rank,),
            )
    assert config is not None
    chunks = [other["chunk"] for other in heard if other["chunk"] is not None]
    config.prefill_chunk_size = min(chunks, default=None)
    return heard[0]["seed"] if seed is None else seed


def _check_same_model(heard: list[dict[str, Any]]) -> None:
    """Refuse a model that was changed on some ranks since all have loaded the same."""
    for rank, other in enumerate(heard):
        if other["sizes"] != heard[0]["sizes"]:
            raise RankFailed(
                f"the ranks' models differ beside their experts: rank 0 has "
                f"{_in_words(heard[0]['sizes'])}, rank {rank} has {_in_words(other['sizes'])}; "
                "cast it or add adapters on every rank",
                (rank,),
            )


def _in_words(sizes: dict[str, int]) -> str:
    return " and ".join(f"{size} numbers of {dtype}" for dtype, size in sizes.items())


def begin_own_texts(
    model: Any,
    group: RankGroup,
    strikes: Strikes,
    prompts: Any,
    prepare: Callable[[], Prepared],
) -> tuple[Any, list[list[int]]]:
    """What this rank generates, nothing where it has no prompts; from here on there are rounds."""
    error: Exception | None = None
    config: Any = None
    token_ids: list[list[int]] = []
    top_k = None
    try:
        if isinstance(prompts, str) or not isinstance(prompts, Sized) or len(prompts):
            config, token_ids = prepare()
        top_k = find_top_k(model.config.get_text_config().to_dict())
        if top_k is None:
            raise ValueError(
                f"own_texts=True: {type(model).__name__} does not say how many experts a token "
                "has; give all ranks the same prompts"
            )
    except Exception as unusable:
        error = unusable
    heard = group.agree("qmoe.generate with texts of its own", error, sizes=sizes_of_shared(model))
    _check_same_model(heard)
    assert top_k is not None
    group.own_texts = OwnTexts(group, top_k, lambda: strikes.struck is not None)
    return config, token_ids


def take_part(model: Any, group: RankGroup) -> None:
    """Run this rank's experts for the others, until all texts have ended."""
    rounds: OwnTexts = group.own_texts
    # Where this rank had texts, it was agreed on with them.
    listens = Fingerprint(model).uncapturable is not None
    rows = rounds.agree_on_steps(None if listens else 0)
    step = ExpertsStep(model, rounds)
    if not rows:
        step.take_part()
        return
    if not rounds.in_steps:
        step.read()
    try:
        while True:
            while rounds.lacks_step:
                step.advance()
            if not rounds.goes_on(False):
                return
    finally:
        if step.device.type == "cuda":  # its graph is in flight
            torch.cuda.current_stream(step.device).synchronize()


def _sum_of(values: Any) -> int:
    return zlib.crc32(json.dumps(values).encode())
