"""What was to be reached, and what was."""

from __future__ import annotations

from typing import Any

from qmoe_kernels.paging import GATHER_PROGRAMS


def targets(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached, and what was, as far as it has been measured.

    Decode counts as it is by default; cells of other variants show what they bring.
    """
    found: list[dict[str, Any]] = []

    def add(what: str, target: float, measured: float, at_most: bool = True) -> None:
        met = measured <= target if at_most else measured >= target
        found.append({"what": what, "target": target, "measured": measured, "met": met})

    def cells(section: str, key: str = "cells") -> list[dict[str, Any]]:
        return sections.get(section, {}).get(key, [])

    for pages in sorted({cell["pages"] for cell in cells("gather")}):
        if pages in (1, max(cell["pages"] for cell in cells("gather"))):
            for cell in cells("gather"):
                if cell["pages"] == pages and cell["num_programs"] == GATHER_PROGRAMS:
                    for how, key in (("queued", "ratio"), ("alone", "ratio_alone")):
                        what = f"gather of {pages} pages by {GATHER_PROGRAMS} blocks, {how}"
                        add(f"{what}: share of memcpy", 0.95, cell[key], at_most=False)
    for cell in cells("admission"):
        if cell["misses"] == 0:
            add(f"admission, all hit, {cell['num_slots']} slots: us", 5.0, cell["us"]["p50"])
    decode = {(c["trace"], c["capacity"], c["variant"]): c for c in cells("decode")}
    for (trace, capacity, variant), cell in sorted(decode.items()):
        what = f"{trace}, {100 * capacity:g} %, {variant}: "
        if variant == "plain":
            add(what + "time over (resident + missed bytes / rate)", 1.10, cell["ratio"])
            if capacity == 1:
                retention = cell["retention"]
                add(what + "retention of a cache of that size", 0.98, retention, at_most=False)
    for cell in cells("decode", "resident_again"):
        what = f"{cell['trace']}, budget holds everything: retention"
        add(what, 0.98, cell["retention"], at_most=False)
    for cell in cells("prefill"):
        what = f"prefill, chunks of {cell['chunk']}, {cell['num_staging']} pages staged: "
        add(what + "time over max(compute, bytes / rate)", 1.15, cell["ratio"])
    return found
