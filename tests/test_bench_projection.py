"""The projection of paging on another machine: its costs, and the decisions that it counts."""

import json
from pathlib import Path

import pytest

from benchmarks.projection import (
    COPY,
    EXCHANGE,
    LAUNCHES,
    Machine,
    main,
    misses_of,
    share_of,
    wait_of,
)
from qmoe.traces.replay import replay
from qmoe.traces.trace import synthetic_trace

MACHINE = Machine("round numbers", link=25.0, memory=100.0)
PAGE = 1_000_000  # 40 us over the link; 13.3 us on the host beside it, 10 alone


def test_the_later_one_of_link_and_host_is_waited_for() -> None:
    def wait(misses: int, on_host: int) -> float:
        return wait_of(misses, on_host, PAGE, MACHINE) - LAUNCHES

    assert wait(0, 0) == 0
    assert wait(2, 0) == pytest.approx(80 + COPY)
    assert wait(1, 1) == pytest.approx(10 + EXCHANGE)
    assert wait(3, 2) == pytest.approx(40 + COPY)  # the host needs no longer than the link
    # In 40 us the host reads 3 pages beside the link, and 3 more by itself in 30.
    assert wait(7, 6) == pytest.approx(40 + 30 + EXCHANGE)


def test_the_host_takes_what_makes_the_wait_shortest() -> None:
    shares = [share_of(n, PAGE, MACHINE) for n in range(9)]
    assert shares[:2] == [0, 1]
    assert all(
        wait_of(n, share, PAGE, MACHINE) <= wait_of(n, other, PAGE, MACHINE)
        for n, share in enumerate(shares)
        for other in range(n + 1)
    )
    slow = Machine("slow memory", link=25.0, memory=25.1)
    assert share_of(1, 100_000, slow) == 0


def test_misses_are_those_of_a_cache() -> None:
    trace = synthetic_trace(24, 3, 16, 2, page_bytes=PAGE)
    by_link = misses_of(trace, 20, [0] * 3, first=8)
    assert len(by_link) == 16 * 3
    assert sum(m for m, _ in by_link) == sum(replay(trace, 20, warmup=8).misses)
    shared = misses_of(trace, 20, [0, 1, 2], first=8)
    assert 0 < sum(h for _, h in shared) <= sum(m for m, _ in shared)


def test_it_runs(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["--tiny", "--out", str(out)]) == 0
    section = json.loads(out.read_text())["sections"]["projection"]
    assert len(section["cells"]) == 2 * 3 * 2 * 2
    assert not any("measured_ms" in cell for cell in section["cells"])
