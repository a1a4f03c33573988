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


def start(program: str, module: str) -> NoReturn:
    """Be the process of a command: import ``module``, run its ``main()``, and exit.

    Ctrl-C ends the process at once, for while modules are imported and options are read there is
    nothing to undo. Work that has to be undone runs inside :func:`qmoe.exits.interruptible`.
    """
    interrupted = 128 + signal.SIGINT

    def leave(*signal_and_frame: Any) -> None:
        # Not print: the signal may strike in the middle of one.
        if "--json" in sys.argv:
            os.write(1, b'{"error": "interrupted", "exit_code": %d}\n' % interrupted)
        os.write(2, f"{program}: interrupted\n".encode())
        os._exit(interrupted)

    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # in the background of a script
    if not ignored:
        signal.signal(signal.SIGINT, leave)
        # The first to be registered runs last: Python would hand Ctrl-C back to the system.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # What the terminal cannot show must not end the command.
        getattr(sys, name).reconfigure(errors="replace")
    from importlib import import_module

    code = import_module(module).main()
    # All has been said; Ctrl-C only ends the farewell of threads and libraries.
    if not ignored:
        signal.signal(signal.SIGINT, lambda *signal_and_frame: os._exit(code))
    sys.exit(code)
