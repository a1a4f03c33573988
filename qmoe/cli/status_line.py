"""A line of statistics that stays at the bottom of a terminal while text scrolls above it."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from qmoe.progress import redraws
from qmoe.sizes import format_size

if TYPE_CHECKING:
    from qmoe.paging.stats import CacheStats

_SECONDS_BETWEEN = 0.2

# Escape sequences of ECMA-48 and of the VT100, as every terminal knows them.
_SAVE, _RESTORE = "\x1b7", "\x1b8"
_CLEAR_LINE, _UP = "\x1b[2K", "\x1b[1A"


class StatusLine:
    """Writes to ``stream`` if that is a terminal; only the last line if it is not.

    The terminal's last row is taken out of what scrolls, so that text may go to it meanwhile, on
    this stream or another.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.live = redraws(self.stream)
        self._written_at = 0.0
        self._rows = 0  # of the terminal; 0 before the first line

    def due(self) -> bool:
        """Whether a new line would be shown: a few times a second on a terminal."""
        return self.live and time.monotonic() - self._written_at >= _SECONDS_BETWEEN

    def write(self, line: str) -> None:
        """Show ``line`` in the terminal's last row."""
        columns, rows = shutil.get_terminal_size()
        if rows != self._rows:  # the first line, or another size
            self._write(f"\n{_SAVE}\x1b[1;{rows - 1}r{_RESTORE}{_UP}")
            self._rows = rows
        self._write(f"{_SAVE}\x1b[{rows};1H{_CLEAR_LINE}{line[:columns]}{_RESTORE}")
        self._written_at = time.monotonic()

    def close(self) -> None:
        """Let the whole terminal scroll again."""
        if self._rows:
            self._write(f"{_SAVE}\x1b[r\x1b[{self._rows};1H{_CLEAR_LINE}{_RESTORE}")
            self._rows = 0

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


class CacheStatus:
    """What the expert cache does, as a line that changes while text is generated."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.status_line = StatusLine()

    def update(self) -> None:
        """Draw the line anew if it is time."""
        if self.status_line.due():
            self.status_line.write(self.line())

    def close(self) -> None:
        """Take the line off the terminal."""
        self.status_line.close()

    def line(self) -> str:
        """The counters as they are now."""
        stats = self._read()
        return "all experts are resident" if stats is None else cache_line(stats)

    def document(self) -> dict[str, Any] | None:
        """The same for programs; None where nothing is paged."""
        stats = self._read()
        if stats is None:
            return None
        totals = {
            "hit_rate": stats.hit_rate,
            "bytes": stats.bytes,
            "host_misses": stats.host_misses,
            "waited_seconds": stats.waited_seconds,
            "disk_misses": stats.disk_misses,
            "disk_bytes": stats.disk_bytes,
            "disk_waited_seconds": stats.disk_waited_seconds,
        }
        return {**totals, **dataclasses.asdict(stats)}

    def _read(self) -> CacheStats | None:
        import qmoe

        paging = getattr(self.model, "qmoe_paging", None)
        return None if paging is None or paging.cache is None else qmoe.stats(self.model)


def cache_line(stats: CacheStats) -> str:
    """A cache's counters in one line."""
    rate = "-" if stats.hit_rate is None else f"{stats.hit_rate:.1%}"
    line = (
        f"{stats.num_slots} of {stats.num_pages} experts in slots | hit rate {rate} | "
        f"misses {stats.misses} | copied {format_size(stats.bytes)}"
    )
    if stats.host_misses:
        waited = f"waited {stats.waited_seconds:.1f} s for it"
        line += f" | host computed {stats.host_misses}, {waited}"
    if stats.disk_bytes:
        waited = f"waited {stats.disk_waited_seconds:.1f} s for it"
        line += f" | from disk {stats.disk_misses}, {format_size(stats.disk_bytes)}, {waited}"
    return line
