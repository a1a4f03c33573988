"""Convert Mixture-of-Experts checkpoints to 8-bit experts: map, plan, write, verify."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

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


def why_full(place: Path) -> str:
    """What a disk that takes no more has run out of, at a place that need not be there yet."""
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        status = os.statvfs(place)
    except (AttributeError, OSError):  # Windows
        return "the disk is full; make room"
    # A file system that has no table of inodes says 0 of 0.
    if status.f_files and not status.f_favail and status.f_bavail:
        return "the disk has no inodes left, however many bytes are free; remove files"
    return "the disk is full; make room"


def read_ahead(files: Iterable[Path]) -> None:
    """Ask the disk for the first gigabytes of what will be read."""
    if not hasattr(os, "posix_fadvise"):
        return
    left = 4 << 30
    for file in files:
        size = min(left, file.stat().st_size)
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
        left -= size
        if left <= 0:
            return
