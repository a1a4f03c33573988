"""A line of statistics that stays at the bottom of a terminal while text scrolls above it."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING, TextIO

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
        self.live = self.stream.isatty()
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


def cache_line(stats: CacheStats) -> str:
    """A cache's counters in one line."""
    rate = "-" if stats.hit_rate is None else f"{stats.hit_rate:.1%}"
    return " | ".join(
        (
            f"{stats.num_slots} of {stats.num_pages} experts in slots",
            f"hit rate {rate}",
            f"misses {stats.misses}",
            f"copied {stats.bytes / 1e9:.2f} GB",
        )
    )
