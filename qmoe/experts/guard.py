"""Who uses a model and who changes it: one `Guard` for each model.

Steps of a generation are queued under the guard's lock, and so is everything that changes the
model. What may not happen in the middle of a text is refused; what may (`qmoe.resize`) happens
between two steps, and the generation sees by `Guard.version` that it did.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

_NAME = "_qmoe_guard"
_making = threading.Lock()
_guards: weakref.WeakSet[Guard] = weakref.WeakSet()


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
        self._loading: int | None = None  # the thread that copies a state into the model
        _guards.add(self)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Mark a generation that is under way; begins when nobody changes the model."""
        call = _Call()
        try:
            while True:
                with self.lock:
                    if not self._is_loading():
                        self._calls.add(call)
                        break
                time.sleep(0.01)
            yield
        finally:
            self._calls.discard(call)

    def begin_loading(self) -> None:
        """Let no generation begin until this thread has left ``load_state_dict``."""
        self._loading = threading.get_ident()

    def _is_loading(self) -> bool:
        # Looked up on the thread's stack: torch calls nobody where loading ends by an error.
        frame = sys._current_frames().get(self._loading) if self._loading is not None else None
        while frame is not None and frame.f_code is not nn.Module.load_state_dict.__code__:
            frame = frame.f_back
        if frame is None:
            self._loading = None
        elif self._loading == threading.get_ident():
            raise RuntimeError("the model is loading a state dict; generate when that has ended")
        return frame is not None

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
            # Tensors made here outlive the mode that the caller is in.
            with torch.inference_mode(False), torch.no_grad():
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


def has_guard(attributes: Mapping[str, Any]) -> bool:
    """Whether a guard is among a module's attributes."""
    return _NAME in attributes


def _renew() -> None:
    """In a child process: threads that held locks, or generated, are not there."""
    global _making
    _making = threading.Lock()
    for guard in list(_guards):
        guard.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def is_guard(name: str) -> bool:
    """Whether a module keeps its guard as the attribute ``name``."""
    return name == _NAME


def guard_of(model: nn.Module) -> Guard:
    """The guard of a model; wrappers around it (PEFT) and models inside of it share it."""
    guard = _own_guard(model)
    if guard is not None:
        return guard
    with _making:
        # Models of transformers, of which one may be inside another; wrappers have none of this.
        inside = [m for m in model.modules() if hasattr(type(m), "can_generate")] or [model]
        guard = next(filter(None, map(_own_guard, inside)), None) or Guard()
        vars(inside[0])[_NAME] = guard
        for module in inside[1:]:
            vars(module)[_NAME] = _Link(guard)
    return guard


def _own_guard(module: nn.Module) -> Guard | None:
    found = vars(module).get(_NAME)
    return found.guard() if isinstance(found, _Link) else found


class _Link:
    """Leads a model inside another to the guard of both.

    Weakly: what a guard keeps holds on to modules, and memory is to go with the model.
    """

    def __init__(self, guard: Guard | None) -> None:
        self.guard = (lambda: None) if guard is None else weakref.ref(guard)

    def __deepcopy__(self, memo: Any) -> _Link:
        return _Link(copy.deepcopy(self.guard(), memo))

    def __reduce__(self) -> tuple[type[_Link], tuple[Guard | None]]:
        return _Link, (self.guard(),)
