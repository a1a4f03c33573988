"""One thread that owns the model: requests wait in a queue, and those that can share a batch do.

A *job* is one text to continue. The jobs at the head of the queue that ask for the same sampling
run as one batch; each ends by itself, at its own length, at a stop string, or when nobody wants it
any more. A job with a seed runs alone, so that its text does not depend on who else asks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qmoe.generation import generate
from qmoe.generation_config import as_list

logger = logging.getLogger(__name__)

Reason = Literal["stop", "length"]


class Busy(RuntimeError):
    """There is no room in the queue."""


class Closing(RuntimeError):
    """The server is shutting down."""


@dataclass(frozen=True)
class Finished:
    """The end of a text; ``new_tokens`` counts those that were generated for it."""

    reason: Reason
    new_tokens: int


Event = str | Finished | Exception


@dataclass(eq=False)
class Job:
    """One text to continue.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: to generate at most.
        options: of `qmoe.generate`; jobs with equal ones may share a batch.
        seed: of its draws; it then runs alone.
        stop: strings that end the text, and are not part of it.
        listener: called by the engine's thread with pieces of text, then with one `Finished` or an
            exception.
    """

    prompt: list[int]
    max_tokens: int
    options: dict[str, Any]
    seed: int | None
    stop: tuple[str, ...]
    listener: Callable[[Event], None]
    cancelled: bool = False
    asked: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    reason: Reason | None = None  # why the text ended, once it has
    new_tokens: int = 0
    answered: bool = False  # the listener has heard the last
    _held: str = ""
    _stopped: bool = False  # at a stop string

    def cancel(self) -> None:
        """End it at its next token, or before it begins, if it has not ended: nobody listens."""
        self.cancelled = not self.answered

    def write(self, piece: str) -> None:
        """Pass on text up to a stop string; what may be the beginning of one is held back."""
        if self._stopped:
            return
        text = self._held + piece
        places = [place for s in self.stop if (place := text.find(s)) >= 0]
        self._stopped = bool(places)
        keep = min(places) if places else len(text) - self._may_begin(text)
        self._held = "" if places else text[keep:]
        if keep:
            self.listener(text[:keep])

    def look(self, tokens: Sequence[int], eos: frozenset[int]) -> None:
        """Note whether the text ends with the last of its new tokens."""
        self.new_tokens = len(tokens)
        if self._stopped or tokens[-1] in eos:
            self.reason = "stop"
        elif self.new_tokens >= self.max_tokens:
            self.reason = "length"

    def answer(self, error: Exception) -> None:
        """Tell the listener the end, or else the error; only once."""
        if self.answered:
            return
        self.answered = True
        if self.reason is None:
            self.listener(error)
            return
        if self._held:
            self.listener(self._held)
        # The last token may have been the last allowed one and the end of a stop string.
        reason: Reason = "stop" if self._stopped else self.reason
        self.listener(Finished(reason, self.new_tokens))

    def _may_begin(self, text: str) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-count:]) for s in self.stop):
                return count
        return 0


@dataclass
class Counts:
    """What was done so far; read by `qmoe.serve.metrics`."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    batches: int = 0
    cancelled: int = 0
    decode_tokens_per_second: float = 0.0


class Engine:
    """Owns the model's thread and the queue; :meth:`start` begins, :meth:`close` ends."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, max_queue: int) -> None:
        """Take a model.

        Args:
            model: that `qmoe.load` or transformers loaded.
            tokenizer: its own.
            batch_size: texts at a time, at most; a budget's own limit holds as well.
            max_queue: texts that may wait.
        """
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_queue = batch_size, max_queue
        paging = getattr(model, "qmoe_paging", None)
        self._budget = None if paging is None else paging.budget
        self.counts = Counts()
        self.running: list[Job] = []
        defaults = model.generation_config
        self._eos = frozenset(as_list(defaults.eos_token_id))
        stop = defaults.stop_strings or ()
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if defaults.prompt_lookup_num_tokens:
            self.batch_size = 1  # transformers looks up for one text at a time
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def context(self) -> int | None:
        """Tokens of a text, prompt included, at most."""
        config = self.model.config.get_text_config()
        limits = (
            getattr(config, "max_position_embeddings", None),
            None if self._budget is None else self._budget.batch_size * self._budget.context,
        )
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has an embedding for."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def samples(self) -> bool:
        """Whether the model draws tokens where a request does not say."""
        return bool(self.model.generation_config.do_sample)

    @property
    def alive(self) -> bool:
        """Whether it takes jobs."""
        return self._thread is not None and self._thread.is_alive() and not self._closing

    @property
    def num_waiting(self) -> int:
        """Jobs in the queue."""
        return sum(not job.cancelled for job in [*self._waiting])

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._work, name="qmoe-serve", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End everything that runs and waits at its next token; return at once."""
        with self._changed:
            self._closing = True
            waiting = [*self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for job in waiting:
            job.answer(Closing("the server is shutting down"))

    def close(self, timeout: float = 10.0) -> None:
        """Stop, and wait for the thread to end."""
        self.stop()
        if self._thread is not None:
            self._thread.join(timeout)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for their turn: all of them or none.

        Raises:
            Busy: more would wait than may.
            Closing: the engine does not run: it has been told to stop, or nobody started it.
        """
        with self._changed:
            if not self.alive:
                never = self._thread is None and not self._closing
                raise Closing(
                    "the engine was not started: the application's lifespan did not run"
                    if never
                    else "the server is shutting down"
                )
            self._forget_cancelled()
            if len(self._waiting) + len(jobs) > self.max_queue:
                raise Busy(
                    f"{len(self._waiting)} texts are waiting and {len(jobs)} more were asked for; "
                    f"at most {self.max_queue} may wait, try again later"
                )
            for job in jobs:
                job.stop = (*job.stop, *self._stop)
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            self.running = batch
            try:
                self._run(batch)
            finally:
                self.running = []

    def _forget_cancelled(self) -> None:
        """Let nobody wait behind jobs whose clients have left; the lock is held."""
        for job in [job for job in self._waiting if job.cancelled]:
            self._waiting.remove(job)
            self.counts.cancelled += 1

    def _next_batch(self) -> list[Job] | None:
        """The job that has waited longest and those that can run with it; None at the end."""
        with self._changed:
            while True:
                self._forget_cancelled()
                if self._closing:
                    return None
                if self._waiting:
                    break
                self._changed.wait()
            batch = [self._waiting.popleft()]
            for job in [*self._waiting] if batch[0].seed is None else ():
                if job.options == batch[0].options and self._fit([*batch, job]):
                    batch.append(job)
                    self._waiting.remove(job)
            return batch

    def _fit(self, batch: list[Job]) -> bool:
        """Whether jobs can run as one batch: rows are as long as the longest prompt and text."""
        tokens = max(len(j.prompt) for j in batch) + max(j.max_tokens for j in batch)
        room = self._budget is None or (
            len(batch) * tokens <= self._budget.batch_size * self._budget.context
        )
        fits = self.context is None or tokens <= self.context
        return len(batch) <= self.batch_size and fits and room and batch[-1].seed is None

    def _run(self, batch: list[Job]) -> None:
        def stream(index: int, piece: str) -> None:
            batch[index].write(piece)

        def until(index: int, tokens: Sequence[int]) -> bool:
            job = batch[index]
            self.counts.new_tokens += 1
            job.first_token = job.first_token or time.monotonic()
            for other in batch:
                # The last piece may come a token after this was asked.
                if other.reason is not None and other.new_tokens + 1 < len(tokens):
                    other.answer(closing)
            if job.cancelled or self._closing:
                return True
            job.look(tokens, self._eos)
            return job.reason is not None

        self.counts.batches += 1
        self.counts.prompt_tokens += sum(len(job.prompt) for job in batch)
        closing = Closing("the server is shutting down")
        error: Exception = closing
        try:
            result = generate(
                self.model,
                self.tokenizer,
                [job.prompt for job in batch],
                max_new_tokens=max(job.max_tokens for job in batch),
                seed=batch[0].seed,
                stream=stream,
                until=until,
                # The model's own defaults: jobs know their stop strings, and each is one text.
                stop_strings=[],
                num_return_sequences=1,
                **batch[0].options,
            )
            for job, new_tokens in zip(batch, result.new_tokens, strict=True):
                if job.reason is None and not self._closing:  # the model's max_time
                    job.reason, job.new_tokens = "length", new_tokens
            rate = result.statistics.decode_tokens_per_second
            self.counts.decode_tokens_per_second = rate or 0.0
        except Exception as failure:  # whatever it is, the next batch may be fine
            error = failure
            if not isinstance(failure, ValueError):  # which says what is wrong with the requests
                logger.error("a batch of %d texts failed", len(batch), exc_info=failure)
        self.counts.cancelled += sum(job.cancelled for job in batch)
        for job in batch:
            if not job.cancelled:
                job.answer(error)
