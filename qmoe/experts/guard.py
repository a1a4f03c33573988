"""Who uses a model and who changes it: one `Guard` for each model.

Steps of a generation are queued under the guard's lock, and so is everything that changes the
model. What may not happen in the middle of a text is refused; what may (`qmoe.resize`) happens
between two steps, and the generation sees by `Guard.version` that it did.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

_NAME = "_qmoe_guard"


class Releasable(Protocol):
    """What is kept for a model and can be made again."""

    def release(self) -> None:
        """Let go of everything that is not in use."""


class Guard:
    """The lock of one model, and what qmoe keeps for it.

    Attributes:
        lock: held while a step is queued and while the model is changed; a thread may hold it
            several times.
        version: how often the model was changed.
        kept: what decoding keeps for later calls; None until there is something.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.version = 0
        self.kept: Releasable | None = None
        # Weak: a call that an interrupt cut off before its end must not block the model for ever.
        self._calls: weakref.WeakSet[_Call] = weakref.WeakSet()

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Mark a generation that is under way; begins when nobody changes the model."""
        call = _Call()
        try:
            with self.lock:
                self._calls.add(call)
            yield
        finally:
            self._calls.discard(call)

    @contextmanager
    def changing(self, what: str, *, live: bool = False) -> Iterator[None]:
        """Change the model; nothing of it runs meanwhile, and nothing kept survives it.

        Args:
            what: the change, for the message: ``"qmoe.patch"``.
            live: it may happen between two steps of a generation.

        Raises:
            RuntimeError: a generation is under way, and the change is not ``live``.
        """
        with self.lock:
            if self._calls and not live:
                raise RuntimeError(
                    f"{what}: the model is generating text; call it again when that has ended"
                )
            self.release()
            self.version += 1
            yield

    def release(self) -> None:
        """Let go of what is kept and not in use."""
        with self.lock:
            if self.kept is not None:
                self.kept.release()

    # A copy of a model has tensors of its own, and so a guard.
    def __deepcopy__(self, memo: Any) -> Guard:
        return Guard()

    def __reduce__(self) -> tuple[type[Guard], tuple[()]]:
        return Guard, ()


class _Call:
    """A generation that is under way."""


def is_guard(name: str) -> bool:
    """Whether a module keeps its guard as the attribute ``name``."""
    return name == _NAME


def guard_of(model: nn.Module) -> Guard:
    """The guard of a model; a wrapper around a model (PEFT) shares that of the model inside."""
    for module in model.modules():
        guard: Guard | None = vars(module).get(_NAME)
        if guard is not None:
            return guard
    # In one operation: two threads that come here first get the same one.
    own: Guard = vars(model).setdefault(_NAME, Guard())
    return own
