"""How the commands begin and end: exit codes, failures in one line, Ctrl-C, a reader that leaves.

Both commands use it; :mod:`qmoe.start` comes first. Neither imports much: whoever mistypes an
option should not wait.

| code | meaning |
|---|---|
| 0 | done |
| 1 | something unforeseen; ``--debug`` shows where |
| 2 | wrong usage |
| 3 | input that cannot be used |
| 4 | what ``convert-checkpoint`` wrote is not what it should be |
| 129 | hung up (SIGHUP: the terminal was closed) |
| 130 | interrupted (Ctrl-C) |
| 141 | the reader of stdout left, as ``head`` does; this is no failure |
| 143 | terminated (SIGTERM) |
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from qmoe.start import SIGNALS

FAILED, USAGE, UNUSABLE, UNVERIFIED = 1, 2, 3, 4
INTERRUPTED, READER_LEFT = 130, 141


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP."""

    def __init__(self, note: str, number: int) -> None:
        super().__init__(note)
        self.number = number
        self.exit_code = 128 + number


def run(
    app: Any,
    program: str,
    arguments: Sequence[str] | None = None,
    codes: Mapping[type[Exception], int] | None = None,
) -> int:
    """Run a typer application; a failure is one line on stderr, with ``--json`` an object too.

    Args:
        app: the application.
        program: its name, as failures begin with.
        arguments: None: those of the process.
        codes: exit codes of exceptions that have no ``exit_code`` of their own; the first that fits
            is taken, :data:`FAILED` where none does.

    Returns:
        the exit code.
    """
    import typer

    arguments = sys.argv[1:] if arguments is None else arguments
    code = 0
    try:
        try:
            # Not app(): it would print an empty line for Ctrl-C and exit 1 for a reader that left.
            command = typer.main.get_command(app)
            with command.make_context(program, list(arguments)) as context:
                command.invoke(context)
        except typer.Exit as end:
            code = end.exit_code
        sys.stdout.flush()
        return code
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return READER_LEFT
        if "--debug" in arguments:
            import traceback

            traceback.print_exception(error)
        message, code = _explain(error, program, codes or {ValueError: UNUSABLE, OSError: UNUSABLE})
        with suppress(OSError):  # nobody listens, or a full disk
            if "--json" in arguments:
                print(_json(message, code), flush=True)
            print(f"{program}: {message}", file=sys.stderr)
        return code


@contextmanager
def interruptible(note: str = "") -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP unwind the block, so that files are closed and workers stop.

    Args:
        note: what the last line says after "interrupted", "terminated" or "hung up".
    """

    def unwind(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt(note) if number == signal.SIGINT else Terminated(note, number)

    def again(unraisable: Any) -> None:
        """Python drops what is raised inside a ``__del__`` or a callback; Ctrl-C comes again."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            number = getattr(unraisable.exc_value, "number", signal.SIGINT)
            threading.Timer(0.05, os.kill, [os.getpid(), number]).start()
        else:
            hook(unraisable)

    hook, sys.unraisablehook = sys.unraisablehook, again
    before = {number: _handle(number, unwind) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            _handle(number, handler)
        sys.unraisablehook = hook


def _handle(number: signal.Signals, handler: Any) -> Any:
    """Set a handler and return the one before.

    Not in threads, which cannot, nor where the signal is ignored or is not Python's.
    """
    before = signal.getsignal(number)
    ours = before not in (signal.SIG_IGN, None)
    if ours and threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)
    return before


def _explain(
    error: BaseException, program: str, codes: Mapping[type[Exception], int]
) -> tuple[str, int]:
    """A failure in one line, and its exit code."""
    text = printable(str(error))
    if isinstance(error, KeyboardInterrupt):
        what = SIGNALS[getattr(error, "number", signal.SIGINT)]
        return f"{what}; {text}" if text else what, getattr(error, "exit_code", INTERRUPTED)
    if hasattr(error, "format_message"):  # what typer finds wrong with the usage
        context = getattr(error, "ctx", None)
        where = program if context is None else context.command_path
        return f"{printable(error.format_message())} (see {where} --help)", USAGE
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), FAILED)
    code = getattr(error, "exit_code", code)
    if isinstance(error, OSError) and error.strerror:  # without [Errno 28]
        text = ": ".join(printable(str(part)) for part in (error.filename, error.strerror) if part)
    if code == FAILED:
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    return text or type(error).__name__, code


def printable(text: str) -> str:
    """``text`` in one line, without what would move a terminal's cursor or change its colors."""
    line = " ".join(text.split())
    return "".join(character if character.isprintable() else "?" for character in line)


def _json(message: str, code: int) -> str:
    return json.dumps({"error": message, "exit_code": code}, indent=2)


def _reader_left() -> bool:
    """Whether nobody reads stdout or stderr any more; then nothing is written there either."""
    if not hasattr(select, "poll"):  # Windows
        return True
    left = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # no file behind it
            poll = select.poll()
            poll.register(stream.fileno(), 0)  # asks for nothing but errors
            if poll.poll(0):
                left = True
                # Python would write what is buffered at exit, and complain.
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return left
