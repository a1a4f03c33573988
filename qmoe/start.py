"""The first lines of both commands.

What is guarded here are imports, so it imports as little as Python lets it.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys

TYPE_CHECKING = False  # typing takes as long as all the rest
if TYPE_CHECKING:
    from typing import Any, NoReturn


# What ends a command, and the word for it. Windows has no terminal that hangs up.
SIGNALS = {
    getattr(signal, name): word
    for name, word in (("SIGINT", "interrupted"), ("SIGTERM", "terminated"), ("SIGHUP", "hung up"))
    if hasattr(signal, name)
}


def start(program: str, module: str) -> NoReturn:
    """Be the process of a command: import ``module``, run its ``main()``, and exit.

    Ctrl-C ends the process at once, for while modules are imported and options are read there is
    nothing to undo; so do SIGTERM and SIGHUP. Work that has to be undone runs inside
    :func:`qmoe.exits.interruptible`.
    """

    # Of ranks that torchrun has started, the first speaks: it ends the others when one has ended.
    speaks = os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"

    def leave(number: int, frame: Any) -> None:
        word, code = SIGNALS[signal.Signals(number)], 128 + number
        try:
            # Not print: the signal may strike in the middle of one.
            if speaks and "--json" in sys.argv:
                os.write(1, f'{{"error": "{word}", "exit_code": {code}}}\n'.encode())
            if speaks:
                os.write(2, f"{program}: {word}\n".encode())
        finally:  # a terminal that hung up takes no more
            os._exit(code)

    # In the background of a script Ctrl-C is ignored, under nohup SIGHUP.
    ours = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in ours:
        signal.signal(number, leave)
        # The first to be registered runs last: Python would hand Ctrl-C back to the system.
        atexit.register(signal.signal, number, signal.SIG_IGN)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # What the terminal cannot show must not end the command.
        getattr(sys, name).reconfigure(errors="replace")
    from importlib import import_module

    code = import_module(module).main()
    # All has been said; Ctrl-C only ends the farewell of threads and libraries.
    for number in ours:
        signal.signal(number, lambda *signal_and_frame: os._exit(code))
    sys.exit(code)
