"""The models, prompts and calls that sections share, and how decoding is timed."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.model import Shape, build_model, synchronize
from benchmarks.record import Results
from qmoe.decoding.loop import decode

OURS = "qmoe"
FALLBACK = r"\w+ decodes (by|without)"  # how `qmoe.decode` warns
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.95}


@dataclass(frozen=True)
class Sizes:
    """How many tokens and rows.

    Attributes:
        prompt: tokens of each row where nothing else is said.
        new: decode steps that are timed.
        batches: rows.
        contexts: longer prompts, decoded at all but the largest batch.
        prefills: tokens of the prompts whose prefill is timed.
        host: tokens over which the host's time is taken.
        check: tokens compared with transformers'.
        theirs: seconds that one cell of transformers' decoding may take.
        repeats: of what is timed.
        replays: of a step by itself.
        profiled: steps that are looked at kernel by kernel.
    """

    prompt: int = 128
    new: int = 128
    batches: tuple[int, ...] = (1, 8, 64)
    contexts: tuple[int, ...] = (1024, 4096)
    prefills: tuple[int, ...] = (2048, 8192)
    host: int = 512
    check: int = 32
    theirs: float = 1.0
    repeats: int = 2
    replays: int = 20
    profiled: int = 8


TINY_SIZES = Sizes(8, 4, (1, 2), (16,), (16, 32), 8, 4, 0.01, repeats=1, replays=2, profiled=2)

SHORT = 4  # new tokens of a call by qmoe's loop in which all that it captures of steps is captured
CALLS = 3  # with prompts of one length, until the reading of these is captured

Run = Callable[[int], object]  # generates so many new tokens


@dataclass(frozen=True)
class Timing:
    """Of decode steps.

    Attributes:
        steps: that were timed at a time.
        seconds: of one of them, by repetition.
        call: seconds of the whole call, prompt and all.
    """

    steps: int
    seconds: list[float]
    call: float

    @property
    def step(self) -> float:
        """Seconds of one step, the median."""
        return statistics.median(self.seconds)

    def cell(self, batch: int, prompt: int) -> dict[str, Any]:
        """What results say about it."""
        return {
            "batch": batch,
            "prompt": prompt,
            "steps": self.steps,
            "ms": [round(1e3 * s, 4) for s in self.seconds],
            "tokens_per_s": round(batch / self.step, 2),
            "call_s": round(self.call, 4),
        }


class Benchmark:
    """Two models of one shape, made when a section first asks for them."""

    def __init__(self, shape: Shape, sizes: Sizes, device: torch.device, results: Results) -> None:
        self.shape, self.sizes, self.device, self.results = shape, sizes, device, results
        self.fallback: str | None = None

    @cached_property
    def int8(self) -> Any:
        """The model with INT8 experts, all of them resident."""
        return self._build("int8")

    @cached_property
    def bf16(self) -> Any:
        """The model as transformers has it."""
        return self._build("bf16")

    def _build(self, experts: Any) -> Any:
        started = time.perf_counter()
        model = build_model(self.shape, self.device, experts)
        synchronize(self.device)
        self.results.log(f"{experts} model built in {time.perf_counter() - started:.1f} s")
        return model

    def prompts(self, batch: int, length: int) -> Tensor:
        """(batch, length) int64, random."""
        generator = torch.Generator(self.device).manual_seed(batch * length)
        size = (batch, length)
        return torch.randint(self.shape.vocab_size, size, device=self.device, generator=generator)

    def run(self, model: Any, batch: int, length: int, **options: Any) -> Run:
        """What generates from prompts of ``length`` tokens.

        Args:
            options: of ``model.generate``; greedy without any.
        """
        input_ids = self.prompts(batch, length)
        mask = torch.ones_like(input_ids)
        return lambda num_new: generate(model, input_ids, mask, num_new, **options)

    def ours(self, batch: int, length: int, **options: Any) -> Run:
        """The same, by qmoe's own decoding loop, which must not leave it to transformers'.

        Running it raises a RuntimeError if it does, or captures nothing on a GPU.
        """
        loop = self.run(self.int8, batch, length, custom_generate=decode, **options)

        def run(num_new: int) -> object:
            if self.fallback is None:  # it warns once only
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", message=FALLBACK)
                    try:
                        return loop(num_new)
                    except UserWarning as warning:
                        self.fallback = str(warning)
            raise RuntimeError(self.fallback)

        return run

    def seconds(self, run: Run, num_new: int) -> float:
        """How long a call takes, until the device has finished."""
        synchronize(self.device)
        started = time.perf_counter()
        run(num_new)
        synchronize(self.device)
        return time.perf_counter() - started

    def time_steps(
        self, run: Run, steps: int, *, short: int = SHORT, repeats: int = 0, warm: bool = False
    ) -> Timing:
        """Time decode steps: a long call less a short one, which reads the same prompt.

        Args:
            steps: by which the calls differ.
            short: tokens of the short one. Its own steps capture, and are not timed.
            repeats: of both; by default as the sizes say.
            warm: calls like these have run before.
        """
        repeats = repeats or self.sizes.repeats
        for num_new in () if warm else (short + steps, *[short] * CALLS):
            run(num_new)
        less = statistics.median(self.seconds(run, short) for _ in range(repeats))
        calls = [self.seconds(run, short + steps) for _ in range(repeats)]
        # On a busy machine a short call may take longer than a long one.
        each = [max(call - less, 1e-6) / steps for call in calls]
        return Timing(steps, each, statistics.median(calls))

    def affordable_steps(self, run: Run) -> int:
        """Steps that fit into the time of a cell: some ways to decode take a second for each."""
        run(3)
        step = (self.seconds(run, 3) - self.seconds(run, 1)) / 2
        return max(2, min(self.sizes.new, int(self.sizes.theirs / max(step, 1e-6))))


def generate(model: Any, input_ids: Tensor, mask: Tensor, num_new: int, **options: Any) -> Tensor:
    """``model.generate`` of exactly ``num_new`` tokens, whatever they are; greedy if not told.

    Returns:
        (rows, num_new) the new tokens.

    Raises:
        ValueError: there came more or fewer.
    """
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    sequences = model.generate(input_ids, attention_mask=mask, max_new_tokens=num_new, **options)
    new = sequences[:, input_ids.shape[1] :]
    if new.shape != (len(input_ids), num_new):
        raise ValueError(f"{num_new} tokens were asked for, {tuple(new.shape)} came")
    return new
