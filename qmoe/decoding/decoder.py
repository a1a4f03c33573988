"""What decoding keeps for one model: its shadows, and steps for later calls.

A step belongs to one call, from taking it to giving it back. Steps that nobody uses are kept under
one bound in bytes, as long as the model is what it was.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qmoe.decoding.fingerprint import Fingerprint
from qmoe.decoding.graph import reason_of
from qmoe.decoding.shadow import Undecodable
from qmoe.decoding.step import DecodeStep, Shadows
from qmoe.experts.guard import Guard, guard_of

# Of a device's memory, what steps that nobody uses may keep.
KEPT_SHARE = 1 / 8
_KEPT_ON_CPU = 1 << 30
# Columns are rounded up, so that a step serves many lengths.
SHORTEST = 512
_SHORTEST_WITHIN = 32  # where a budget has little room


class Decoder:
    """The owner of one model's shadows and steps; everything here happens under its guard's lock.

    Attributes:
        known: what is known of the model; None before the first call and after a release.
        idle: steps that nobody uses, the latest used last.
    """

    def __init__(self, guard: Guard) -> None:
        self.known: Known | None = None
        self.idle: list[DecodeStep] = []
        self._given_back = threading.Condition(guard.lock)
        # Weak: a step whose call was cut off before its end is in use no more.
        self._in_use: weakref.WeakKeyDictionary[DecodeStep, int] = weakref.WeakKeyDictionary()

    def take(self, model: Any, rows: int, columns: int) -> DecodeStep:
        """A step for so many rows and at least so many columns; nobody else gets it meanwhile.

        With a budget, a call waits until others have given back what there is no room for beside
        them.

        Raises:
            Undecodable: the model cannot be run like this.
            ValueError: there is no room in the budget beside steps that this thread uses itself.
        """
        with self._given_back:
            shadows = self._shadows(model)
            while (room := self._room(model)) < rows * columns and self._in_use:
                self._wait(rows, columns, room)
                shadows = self._shadows(model)  # others had the lock meanwhile
            # Rows that are not the call's would be heard by whoever listens.
            if shadows.uncapturable is None and _bucket(rows) * columns <= room:
                rows = _bucket(rows)
            step = self._idle_step(rows, columns) or self._new_step(
                model, shadows, rows, columns, room
            )
            self._in_use[step] = threading.get_ident()
            return step

    def give_back(self, step: DecodeStep, *, keep: bool = True) -> None:
        """Return a step; nothing of it may be running on the device.

        Args:
            keep: it is whole, and can serve another call.
        """
        with self._given_back:
            self._in_use.pop(step, None)
            if keep and self.known is not None and step.shadows is self.known.shadows:
                self.idle.append(step)
                self._keep_to(_bound(step.device))
            self._given_back.notify_all()

    def refuse(self, reason: str) -> None:
        """Remember that the model, as it is, cannot be run like this."""
        with self._given_back:
            if self.known is not None:
                self.known = Known(self.known.fingerprint, None, reason)
            self.idle.clear()

    def make_room(self) -> None:
        """Give the memory of steps that nobody uses back to the device."""
        with self._given_back:
            self.idle.clear()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def release(self) -> None:
        """Let go of everything that is not in use; steps that are, go when they are given back."""
        with self._given_back:
            self.known = None
            self.idle.clear()

    # ---- steps ---------------------------------------------------------------------------------

    def _shadows(self, model: Any) -> Shadows:
        """Shadows of the model as it is, made anew where it is not what it was."""
        if self.known is None or not self.known.fingerprint.matches(model):
            self.release()
            self.known = _look_at(model)
        if self.known.shadows is None:
            raise Undecodable(self.known.obstacle)
        return self.known.shadows

    def _idle_step(self, rows: int, columns: int) -> DecodeStep | None:
        fitting = [s for s in self.idle if s.rows == rows and s.length >= columns]
        if not fitting:
            return None
        step = min(fitting, key=lambda step: step.length)
        self.idle.remove(step)
        return step

    def _new_step(
        self, model: Any, shadows: Shadows, rows: int, columns: int, room: float
    ) -> DecodeStep:
        length = _length(model, rows, columns, room)
        while self.idle and rows * length + _tokens(self.idle) > room:
            del self.idle[0]
        try:
            return DecodeStep(shadows, guard_of(model), rows, length)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # too long for the machine: of this call, not of the model
            raise Undecodable(reason_of(error)) from None
        except Exception as error:  # a configuration that no cache is known for
            self.refuse(reason_of(error))
            raise Undecodable(reason_of(error)) from None

    def _room(self, model: Any) -> float:
        """Tokens that caches may hold beside those of steps in use."""
        paging = getattr(model, "qmoe_paging", None)
        if paging is None:
            return float("inf")
        room: int = paging.budget.batch_size * paging.budget.context
        return room - _tokens(self._in_use)

    def _wait(self, rows: int, columns: int, room: float) -> None:
        self._drop_lost()
        if threading.get_ident() in self._in_use.values():
            raise ValueError(
                f"{rows} texts of {columns} tokens inside another generation: the budget has room "
                f"for {int(room)} tokens beside it; make room with qmoe.resize"
            )
        self._given_back.wait(timeout=1.0)

    def _drop_lost(self) -> None:
        """Forget steps whose call was cut off before it could give them back.

        An exception that somebody keeps holds the call's frames, and these the step; but a call
        that has ended is on no thread's stack.
        """
        running = {id(local) for frame in _frames() for local in frame.f_locals.values()}
        for step in [step for step in self._in_use if id(step) not in running]:
            del self._in_use[step]

    def _keep_to(self, bound: int) -> None:
        while self.idle and sum(step.num_bytes for step in self.idle) > bound:
            del self.idle[0]


@dataclass(frozen=True)
class Known:
    """What is known of a model as it was at one time.

    Attributes:
        fingerprint: by which it is seen whether it still is.
        shadows: None where it cannot be run like this.
        obstacle: why it cannot.
    """

    fingerprint: Fingerprint
    shadows: Shadows | None
    obstacle: str | None


def _look_at(model: Any) -> Known:
    # First: what changes from now on is noticed when fingerprints are compared.
    fingerprint = Fingerprint(model)
    obstacle = _obstacle(model, fingerprint)
    if obstacle is not None:
        return Known(fingerprint, None, obstacle)
    try:
        return Known(fingerprint, Shadows(model, fingerprint), None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's modules may be
        return Known(fingerprint, None, reason_of(error))


def decoder_of(model: Any) -> Decoder:
    """The decoder of a model; it lives in the model's guard."""
    guard = guard_of(model)
    with guard.lock:
        if guard.kept is None:
            guard.kept = Decoder(guard)
        assert isinstance(guard.kept, Decoder)
        return guard.kept


def release(model: Any) -> None:
    """Let go of all that is kept for a model's next call: steps, their caches, graphs, threads.

    What a call under way uses goes when that ends. The next call makes everything anew, which
    takes some tenths of a second on a GPU.

    Args:
        model: any model of transformers, or a wrapper around one (PEFT).

    Example:
        >>> import qmoe
        >>> model = qmoe.load("examples/tiny-moe", weights="int8")
        >>> qmoe.release(model)
    """
    guard_of(model).release()
    paging = getattr(model, "qmoe_paging", None)
    if paging is not None and paging.cache is not None:
        paging.cache.stop_workers()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _obstacle(model: Any, fingerprint: Fingerprint) -> str | None:
    """Why a model is not for qmoe's loop; None if it is."""
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if model.training:
        return "it is in training mode; call model.eval()"
    if len(fingerprint.devices) != 1 or torch.device("meta") in fingerprint.devices:
        return "it is on several devices or offloaded"
    return None


def _frames() -> Iterator[Any]:
    for frame in sys._current_frames().values():
        above: Any = frame
        while above is not None:
            yield above
            above = above.f_back


def _tokens(steps: Any) -> int:
    return sum(step.rows * step.length for step in steps)


def _bound(device: torch.device) -> int:
    if device.type != "cuda":
        return _KEPT_ON_CPU
    return int(KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory)


def _bucket(rows: int) -> int:
    """Rows are rounded up: to 8 each is its own, then in eights, and in steps of 64 from 64 on."""
    return rows if rows <= 8 else -(-rows // 8) * 8 if rows <= 64 else -(-rows // 64) * 64


def _length(model: Any, rows: int, columns: int, room: float) -> int:
    length = SHORTEST
    if rows * length > room / 2:
        length = _SHORTEST_WITHIN  # a call inside this one, or beside it, wants room too
    while length < columns:
        length *= 2
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    return max(columns, int(min(length, limit, room // rows)))
