"""The tables that are printed, from what was written down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.kernels.layers import MODES
from benchmarks.kernels.shapes import TOKENS
from benchmarks.kernels.targets import (
    HELD_OUT_TARGETS,
    PEER_MICROSECONDS,
    best_peer,
    held_out_ratios,
)

LEGEND = (
    "microseconds, % of the floor (the larger of memory's and arithmetic's), + target reached, "
    "- missed;\nfloor: active experts at 8 bits; best here: of whole layers in this run; known: "
    "of the table that targets come from"
)


TIMED = ("latency.", "held_out.")


def tables(sections: dict[str, Any]) -> Iterator[str]:
    """Yield lines: latencies shape by shape, then what else there is."""
    timed = {n: s for n, s in sections.items() if n.startswith(TIMED) and s.get("cells")}
    if timed:
        yield LEGEND
    for section in timed.values():
        yield from latency_table(section)
    for section in sections.values():
        for cell in section.get("skewed", []):
            yield (
                f"skewed: {cell['shape']:8} {cell['tokens']:5} {cell['mode']:10} "
                f"{cell['skewed_us']:9.1f} {cell['uniform_us']:9.1f} us, ratio {cell['ratio']:.3f}"
            )
    for section in sections.values():
        for cell in section.get("sums", []):
            levels = (
                f"{n} levels {cell[f'levels_{n}_us']:.1f} us, error {cell[f'levels_{n}_error']:.5f}"
                for n in (1, 2)
            )
            yield f"sums: {cell['shape']:8} {cell['tokens']:5} {'; '.join(levels)}"
    for cell in sections.get("errors", {}).get("errors", []):
        yield (
            f"error: {cell['shape']:8} {cell['tokens']:5} {cell['mode']:10} {cell['error']:.5f}, "
            f"the format's {cell['format_error']:.5f}, ratio {cell['ratio']:.3f}"
        )
    held_out = [s for name, s in timed.items() if name.startswith("held_out.")]
    if held_out:
        yield from ratio_table(held_out)


def latency_table(section: dict[str, Any]) -> Iterator[str]:
    """Yield one shape's table: a row for each number of tokens, a column for each mode."""
    shape = section["cells"][0]["shape"]
    cells = {(c["tokens"], c["mode"]): c for c in section["cells"]}
    modes = [m for m in MODES if any(mode == m for _, mode in cells)]
    yield ""
    yield f"{shape:8} active   floor |" + "|".join(f"{m:^17}" for m in modes) + "| best here, known"
    for tokens in sorted({t for t, _ in cells}):
        row = [cells.get((tokens, mode)) for mode in modes]
        first = next(c for c in row if c is not None)
        floor = min(c["floor_us"] for c in row if c is not None)
        line = f"{tokens:8} {first['active']:6.1f} {floor:7.1f} |"
        line += "|".join(_entry(cell) for cell in row)
        yield line + "| " + _peers(section, shape, tokens)
    for cell in section["cells"]:
        if "failed" in cell:
            yield f"FAILED {shape} {cell['tokens']} {cell['mode']}: {cell['failed']}"


def ratio_table(sections: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield a row for each number of tokens of each shape that the rule was not fitted on."""
    yield ""
    yield f"{'held out':15} |" + "|".join(f"{what:^24}" for what in HELD_OUT_TARGETS)
    for row in (row for section in sections for row in held_out_ratios(section)):
        entries = (_ratio(row.get(what), target) for what, target in HELD_OUT_TARGETS.items())
        yield f"{row['shape']:10}{row['tokens']:5} |" + "|".join(entries)


def _entry(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return " " * 17
    if "us" not in cell:
        return f"{'FAILED':^17}"
    mark = " "
    if cell["target_us"] is not None:
        mark = "+" if cell["us"] <= cell["target_us"] else "-"
    return f"{cell['us']:9.1f} {100 * cell['share_of_floor']:3.0f}% {mark} "


def _ratio(ratio: float | None, target: float) -> str:
    if ratio is None:
        return " " * 24
    mark = "+" if ratio <= target else f"- of {target}"
    return f"{ratio:10.3f} {mark:13}"


def _peers(section: dict[str, Any], shape: str, tokens: int) -> str:
    here = [
        (p["us"], p["peer"])
        for p in section.get("peers", [])
        if p["tokens"] == tokens and "us" in p and p["whole_layer"]
    ]
    text = "{1} {0:.1f}".format(*min(here)) if here else ""
    if tokens in TOKENS and shape in PEER_MICROSECONDS:
        text += ", {} {:.1f}".format(*best_peer(shape, tokens))
    return text
