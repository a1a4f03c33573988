from __future__ import annotations

import io
import os
import re
from types import SimpleNamespace

import pytest

from qmoe.cli.status_line import StatusLine, cache_line


class Terminal(io.StringIO):
    """Of a VT100 what a status line needs."""

    def isatty(self) -> bool:
        return True

    def screen(self, columns: int, rows: int) -> list[str]:
        """What is to be seen after all that was written; at first the cursor is at the top."""
        lines, bottom = [""] * rows, rows  # rows 1 to ``bottom`` scroll
        row = column = 0
        saved = (0, 0)
        sequences = re.compile(r"\x1b([78])|\x1b\[([\d;]*)([A-Za-z])|([^\x1b])", re.DOTALL)
        for position, code, final, text in sequences.findall(self.getvalue()):
            numbers = [int(number) for number in code.split(";") if number]
            if position == "7":
                saved = (row, column)
            elif position == "8":
                row, column = saved
            elif final == "r":
                bottom, row, column = (numbers or [1, rows])[1], 0, 0
            elif final == "H":
                row, column = numbers[0] - 1, numbers[1] - 1
            elif final == "K":
                lines[row] = ""
            elif final == "A":
                row -= numbers[0]
            elif text == "\n":
                column = 0
                if row == bottom - 1:
                    lines[:bottom] = [*lines[1:bottom], ""]
                else:
                    row += 1
            else:
                lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + 1 :]
                column += 1
        return lines


@pytest.fixture
def small_terminal(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((20, 5)))


def test_text_scrolls_above_the_line(small_terminal):
    terminal = Terminal()
    line = StatusLine(terminal)
    for number in range(8):
        line.write(f"status {number}, too long for this terminal")
        terminal.write(f"text {number}\n")
    assert terminal.screen(20, 5) == ["text 5", "text 6", "text 7", "", "status 7, too long f"]
    line.close()
    terminal.write("text 8\ntext 9\n")
    assert terminal.screen(20, 5) == ["text 6", "text 7", "text 8", "text 9", ""]


def test_is_written_a_few_times_a_second(small_terminal, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    line = StatusLine(Terminal())
    assert line.due()
    line.write("a")
    assert not line.due()
    now[0] += 0.3
    assert line.due()


def test_nothing_is_drawn_on_what_is_no_terminal():
    stream = io.StringIO()
    line = StatusLine(stream)
    assert not line.due()
    line.close()
    assert stream.getvalue() == ""


def test_counters_in_one_line():
    stats = SimpleNamespace(
        hit_rate=0.75, misses=20, bytes=2_800_000_000, num_slots=7, num_pages=64, host_misses=0,
        disk_misses=0, disk_bytes=0, disk_waited_seconds=0.0,
    )  # fmt: skip
    line = "7 of 64 experts in slots | hit rate 75.0% | misses 20 | copied 2.8 GB"
    assert cache_line(stats) == line
    stats.hit_rate = None
    assert "hit rate - " in cache_line(stats)
    stats.host_misses, stats.waited_seconds = 8, 1.25
    assert cache_line(stats).endswith(" | host computed 8, waited 1.2 s for it")
    stats.disk_misses, stats.disk_bytes, stats.disk_waited_seconds = 5, 3_000_000, 0.5
    assert cache_line(stats).endswith(" | from disk 5, 3 MB, waited 0.5 s for it")
