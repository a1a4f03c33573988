"""Random numbers of a call: the same as transformers would draw, and nobody else's."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qmoe.decoding.shadow import Undecodable

_lock = threading.Lock()
# Steps whose calls go on with the numbers of their device's default generator.
_borrowers: weakref.WeakSet[Any] = weakref.WeakSet()


def _renew() -> None:
    """In a child process: threads that held the lock are not there."""
    global _lock
    _lock = threading.Lock()
    _borrowers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextmanager
def drawing(step: Any, given: torch.Generator | None) -> Iterator[None]:
    """Let ``step.generator`` go on where a generator is, and that one where the call has ended.

    Graphs hold on to the step's own generator, so states are handed over rather than generators.
    Of calls at the same time the first gets the default generator's numbers, as transformers draws
    them; each other one gets numbers from a seed that is drawn from it.

    Args:
        given: by whoever called; None for the default one of the step's device.
    """
    own: torch.Generator = step.generator
    if given is not None and given.device.type != step.device.type:
        raise ValueError(
            f"generator is for {given.device}, and the model is on {step.device}; give it one of "
            "its own device"
        )
    source = _default(step.device) if given is None else given
    with _lock:
        others = given is None and any(s.device == step.device for s in _borrowers)
        if others:
            limit = torch.iinfo(torch.int64).max
            seed = torch.randint(limit, (1,), generator=source, device=step.device)
            own.manual_seed(int(seed))
        else:
            own.set_state(source.get_state())
        if given is None:
            _borrowers.add(step)
    goes_on = not others
    try:
        yield
    except Undecodable:
        goes_on = False  # transformers' loop draws them again
        raise
    finally:
        _borrowers.discard(step)
        if goes_on:
            source.set_state(own.get_state())


def _default(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
