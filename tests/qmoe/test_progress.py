"""Progress bars: on terminals only, from many threads, and gone when they end."""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from qmoe.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_as_stderr(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)  # in the test: pytest sets it before each phase
    return terminal


def left_on(terminal: Terminal) -> list[str]:
    """The lines that a terminal shows in the end, by the escape sequences that rich uses."""
    lines, row = [""], 0
    text = terminal.getvalue()
    while text:
        if text.startswith("\x1b["):
            end = next(i for i, c in enumerate(text[2:], 2) if c.isalpha())
            code, text = text[2 : end + 1], text[end + 1 :]
            if code == "2K":
                lines[row] = ""
            elif code.endswith("A"):
                row -= int(code[:-1])
        elif text[0] == "\n":
            row, text = row + 1, text[1:]
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] += text[0].strip("\r")
            text = text[1:]
    return [line for line in lines if line.strip()]


def test_nothing_where_there_is_no_terminal(capfd):
    with progress("Loading", 2) as bars:
        bars.advance()
        bars.update("other", 1, 2)
        bars.print("a line", sys.stdout)
    assert capfd.readouterr() == ("a line\n", "")


def test_nothing_where_none_is_wanted(monkeypatch):
    terminal = terminal_as_stderr(monkeypatch)
    with progress("Loading", 2, show=False) as bars:
        bars.advance()
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("stderr", [None, io.StringIO()])
def test_without_a_stderr(monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress("Loading", 2) as bars:
        bars.advance()


@pytest.mark.parametrize(
    ("unit", "shown"), [("bytes", ["3.0/4.0 GB", "Reading"]), ("items", ["3000000000/4000000000"])]
)
def test_what_is_drawn(monkeypatch, unit, shown):
    terminal = terminal_as_stderr(monkeypatch)
    with progress("Reading", 4 * 10**9, unit=unit) as bars:
        bars.advance(10**9)
        bars.update("Reading", 3 * 10**9, 4 * 10**9)
    assert all(text in terminal.getvalue() for text in shown)
    assert left_on(terminal) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_when_interrupted(monkeypatch, error):
    terminal = terminal_as_stderr(monkeypatch)
    before = sys.stdout, sys.stderr
    with pytest.raises(error), progress("Loading", 2) as bars:
        bars.advance()
        bars.print("[a line]", terminal)
        raise error
    assert left_on(terminal) == ["[a line]"]
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")
    assert (sys.stdout, sys.stderr) == before


def test_many_threads(monkeypatch):
    terminal_as_stderr(monkeypatch)

    def work(count: int) -> None:
        for _ in range(count):
            bars.advance(2)

    with ThreadPoolExecutor(8) as pool, progress("Loading", 1600) as bars:
        list(pool.map(work, [100] * 8))
        assert bars._display is not None
        assert [task.completed for task in bars._display.tasks] == [1600]


def test_two_at_once(monkeypatch):
    terminal_as_stderr(monkeypatch)
    with progress("outer", 2) as outer, progress("inner", 2) as inner:
        inner.advance()
        outer.advance()
