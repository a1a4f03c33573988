"""Convert Mixture-of-Experts checkpoints to 8-bit experts: map, plan, write, verify."""

from __future__ import annotations

from qmoe.exits import printable


class ConversionError(ValueError):
    """A conversion that cannot be done or went wrong.

    The message is one line that names the file or tensor and says what to do.
    """


class SourceError(ConversionError):
    """A checkpoint that has to change before it can be converted."""


def one_line(error: BaseException) -> str:
    """What an error of somebody else says, in one line that is not too long."""
    return printable(str(error))[:200] or type(error).__name__
