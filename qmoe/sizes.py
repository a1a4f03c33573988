"""How sizes in bytes are written, for people and by people.

Decimal units are printed, as disks, links and the Hub count; binary ones are read too.
"""

from __future__ import annotations

import math
import re

_UNITS = {"": 1, "b": 1}
_UNITS |= {p + b: 1000**power for power, p in enumerate("kmgt", 1) for b in ("b", "")}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}


def format_size(num_bytes: float) -> str:
    """``1234567`` as ``1.24 MB``: three digits, rounded up.

    `parse_size` reads it back, and what it reads is never less: a budget or a disk of the size that
    a message asks for is large enough.
    """
    value = math.ceil(num_bytes)
    step = 10 ** max(0, len(str(value)) - 3)  # of the third digit
    value = -(-value // step) * step
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 * _UNITS[unit.lower()]:
            break
    digits = f"{value / _UNITS[unit.lower()]:.2f}".rstrip("0").rstrip(".")
    return f"{digits} {unit}"


def parse_size(size: str | float) -> int:
    """Bytes of ``"5GB"``, ``"500 MB"``, ``"2GiB"`` or a whole number; ``"5G"`` is ``"5GB"``.

    Raises:
        ValueError: anything else, or less than one byte.
    """
    match = re.fullmatch(r"(\d+|\d*\.\d+|\d+\.) ?([a-z]*)", str(size).strip().lower())
    if match is not None and match[2] in _UNITS and not isinstance(size, (bool, float)):
        number, unit = match[1], match[2]
        # Whole numbers stay exact where a float would not be; a fraction of a byte is no size.
        if number.isdecimal():
            num_bytes = int(number) * _UNITS[unit]
        else:
            num_bytes = int(round(float(number) * _UNITS[unit], 3)) if unit else 0
        if num_bytes >= 1:
            return num_bytes
    raise ValueError(f"{size!r} is not a size; write one like 5GB, 500MB or 2GiB")
