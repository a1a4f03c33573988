"""What was to be reached, and what was."""

from __future__ import annotations

from typing import Any

DECODE = {1: 300.0, 8: 1500.0, 64: 6000.0}  # tokens/s by batch, prompts of PROMPT tokens
PROMPT = 128
PREFILL = {2048: 50_000.0, 8192: 60_000.0}  # tokens/s by tokens of the prompt
STARTUP_SECONDS = 10.0
HOST_CORES = 0.2


def targets(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached, and what was, as far as it has been measured."""
    found: list[dict[str, Any]] = []

    def add(what: str, target: float, measured: float, at_most: bool = False) -> None:
        met = measured <= target if at_most else measured >= target
        found.append({"what": what, "target": target, "measured": measured, "met": met})

    def cells(section: str) -> list[dict[str, Any]]:
        return sections.get(section, {}).get("cells", [])

    for cell in cells("decode"):
        if cell["batch"] in DECODE and cell["prompt"] == PROMPT and not cell["sampled"]:
            what = f"decode, batch {cell['batch']}: tokens/s"
            add(what, DECODE[cell["batch"]], cell["tokens_per_s"])
    for cell in cells("prefill"):
        if cell["prompt"] in PREFILL:
            what = f"prefill, {cell['prompt']} tokens: tokens/s"
            add(what, PREFILL[cell["prompt"]], cell["tokens_per_s"])
    started: dict[int, float] = {}  # seconds by batch, until a captured step has run
    for cell in cells("startup"):
        if cell["what"] in ("first call", "call that captures"):
            batch = cell["batch"]
            started[batch] = round(started.get(batch, 0.0) + cell["seconds"], 3)
            what = f"start-up, batch {batch}, {cell['what']} included: s"
            add(what, STARTUP_SECONDS, started[batch], at_most=True)
    for cell in cells("host"):
        add("host while decoding: cores", HOST_CORES, cell["cores"], at_most=True)
    return found
