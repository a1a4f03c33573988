"""Progress bars on stderr, drawn by rich; nothing is written where they cannot be."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def redraws(stream: TextIO | None) -> bool:
    """Whether ``stream`` is a terminal on which a line can be drawn anew."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") not in ("dumb", "")


class Bars:
    """What :func:`progress` gives out; any thread may call it."""

    def __init__(self, display: Progress | None) -> None:
        self._display = display
        self._tasks: dict[str, TaskID] = {}  # by title
        self._lock = threading.Lock()

    def update(self, title: str, done: float, total: float) -> None:
        """Set the bar of this title, which is added if there is none, to ``done`` of ``total``."""
        if self._display is not None:
            with self._lock:
                if title not in self._tasks:
                    self._tasks[title] = self._display.add_task(title, total=total)
                self._display.update(self._tasks[title], completed=done)

    def advance(self, amount: float = 1) -> None:
        """Move the bar that was added last on."""
        if self._display is not None:
            with self._lock:
                self._display.advance(next(reversed(self._tasks.values())), amount)

    def print(self, line: str, file: TextIO) -> None:
        """Print a line to ``file``; above the bars, if both are on a terminal."""
        if self._display is not None and file.isatty():
            self._display.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=file, flush=True)


@contextmanager
def progress(
    title: str | None = None,
    total: float = 0,
    *,
    unit: Literal["bytes", "items"] = "items",
    show: bool = True,
) -> Iterator[Bars]:
    """Draw progress bars while the block runs; when it ends, however it ends, they are gone.

    Args:
        title: of a bar that is there from the start; None: :meth:`Bars.update` adds them.
        total: what that bar counts to, in ``unit``.
        unit: what is counted; bytes are shown as sizes, with their rate.
        show: False: never draw.

    Example:
        >>> with progress("Loading experts", 2) as bars:
        ...     for layer in range(2):
        ...         bars.advance()
    """
    if not show or not redraws(sys.stderr):
        yield Bars(None)
        return
    display = _display(unit)
    bars = Bars(display)
    if title is not None:
        bars.update(title, 0, total)
    try:
        display.start()
        yield bars
    finally:
        try:
            display.stop()
        finally:  # of an interrupt in the middle of starting or stopping
            display.console.show_cursor(True)


def _display(unit: Literal["bytes", "items"]) -> Progress:
    from rich import progress as columns
    from rich.console import Console

    counted = (
        [columns.DownloadColumn(), columns.TransferSpeedColumn()]
        if unit == "bytes"
        else [columns.MofNCompleteColumn()]
    )
    return columns.Progress(
        columns.TextColumn("{task.description}"),
        columns.BarColumn(bar_width=None),
        *counted,
        columns.TimeRemainingColumn(),
        # Its own console, so that bars of several threads do not exclude each other.
        console=Console(stderr=True),
        transient=True,
        # They would replace sys.stdout and sys.stderr, and threads put them back in any order.
        redirect_stdout=False,
        redirect_stderr=False,
    )
