"""What is asked after each token of a generation: the clock, and a caller who ends texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import StoppingCriteria

from qmoe.text import Text


class Clock(StoppingCriteria):
    """Notes when the first new tokens are there. Every decoding strategy asks whether to stop."""

    def __init__(self, devices: list[int]) -> None:
        self.devices = devices
        self.started: float | None = None
        self.prefilled: float | None = None
        self.stopped: float | None = None

    def start(self) -> None:
        """Begin to count."""
        self.started = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.prefilled is None:
            # Tokens on the host are there; tokens on a device may only be going to be.
            self.prefilled = time.perf_counter() if input_ids.device.type == "cpu" else self._now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def stop(self) -> None:
        """Count no further."""
        if self.stopped is None:
            self.stopped = self._now()

    def seconds(self) -> tuple[float, float]:
        """Until the first new token was there, and from then on; 0 for what has not begun."""
        stopped = time.perf_counter() if self.stopped is None else self.stopped
        started = stopped if self.started is None else self.started
        prefilled = stopped if self.prefilled is None else self.prefilled
        return prefilled - started, stopped - prefilled

    def _now(self) -> float:
        for device in self.devices:
            # Not the whole device: another thread may be capturing a graph there.
            torch.cuda.current_stream(device).synchronize()
        return time.perf_counter()


class Until(StoppingCriteria):
    """Ends each text where its caller says so; it is asked before the streamer has the token."""

    def __init__(
        self,
        texts: list[Text],
        until: Callable[[int, Sequence[int]], bool],
        paused: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.texts, self.until, self.paused = texts, until, paused
        self.columns = 0  # of the prompts, and of what was asked about
        self.tokens: list[list[int]] = [[] for _ in texts]
        self.done = [False] * len(texts)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.columns = self.columns or input_ids.shape[1] - 1
        new = input_ids[:, self.columns :].tolist()
        self.columns = input_ids.shape[1]
        with self.paused():
            for index, text in enumerate(self.texts):
                for token in new[index]:
                    if not self.done[index]:
                        tokens = self.tokens[index]
                        tokens.append(token)
                        if self.until(index, tokens):
                            text.end_at(len(tokens))
                        self.done[index] = text.limit is not None or token in text.eos
                if self.done[index] and text.done:
                    text.finish()  # others go on; this one has all of its tokens
        return torch.tensor(self.done, dtype=torch.bool, device=input_ids.device)
