"""What paging would cost on a machine that is not here: a projection, beside what was measured.

``python -m benchmarks.projection`` replays the benchmark's traces through the cache as a CPU runs
it, with the decisions that a GPU takes, and gives each layer the time that its misses take:

- the link copies at ``link``; the host multiplies at ``memory``, less what the link reads there
  meanwhile, since both read one memory;
- both work at once, and the layer waits for the later one;
- how many of so many cold misses the host takes is what makes that time the shortest, as the
  table of ``misses="auto"`` has it from measurements;
- ``LAUNCHES`` are added to each layer, ``COPY`` to each in which the link has a part, and
  ``EXCHANGE`` to each in which the host has one.

The rates of the H200's host, its launches and its exchange are measured (`docs/expert-cache.md`).
A line for that machine shows how far the projection is from the measurement. Results go to
``benchmarks/results/projection.json``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.cache.traces import own_traces
from benchmarks.model import QWEN3_30B_A3B, Shape
from benchmarks.options import check_sections, parser_of
from benchmarks.record import Results, facts, run_sections
from qmoe.traces.trace import RoutingTrace
from qmoe_kernels.mailbox import SERVED, Mailbox, Posts, admit_and_post
from qmoe_kernels.paging import CopyList, Residency

RESULTS = Path(__file__).parent / "results" / "projection.json"
MEASURED = Path(__file__).parent / "results" / "cache.json"
SECTIONS = ("projection",)
TRACES = ("fitted", "synthetic")
CAPACITIES = (0.25, 0.375, 0.5)
LAUNCHES, COPY, EXCHANGE = 3.0, 9.0, 9.7  # microseconds


@dataclass(frozen=True)
class Machine:
    """Rates in GB/s: of the link, and of the host's memory."""

    name: str
    link: float
    memory: float


MACHINES = (Machine("H200 host", 55.3, 113.0), Machine("desktop, PCIe 4", 25.0, 80.0))


def wait_of(misses: int, on_host: int, page_bytes: int, machine: Machine) -> float:
    """Microseconds that a layer waits for pages and rows."""
    us_of = page_bytes / 1e3  # at 1 GB/s
    link = (misses - on_host) * us_of / machine.link
    left = on_host * us_of - link * (machine.memory - machine.link)
    host = on_host * us_of / (machine.memory - machine.link)
    if left > 0:  # the link is done first, and leaves all of the memory to the host
        host = link + left / machine.memory
    link_ends = link + COPY if link else 0.0
    return LAUNCHES + max(link_ends, host + EXCHANGE if on_host else 0.0)


def share_of(misses: int, page_bytes: int, machine: Machine) -> int:
    """How many of so many misses the host takes, if all of them are cold."""
    return min(range(misses + 1), key=lambda n: wait_of(misses, n, page_bytes, machine))


def misses_of(
    trace: RoutingTrace, num_slots: int, share: list[int], first: int
) -> list[tuple[int, int]]:
    """(misses, of these the host's) of each layer of each token from ``first`` on."""
    device = torch.device("cpu")
    num_layers, num_experts = trace.num_layers, trace.num_experts
    residency = Residency.empty(trace.num_pages, num_slots, num_layers, device)
    posts = Posts.empty(num_experts, num_layers, device)
    posts.share[0, : len(share)] = torch.tensor(share, dtype=torch.int32)
    mailbox, copies = Mailbox.empty(1, device), CopyList.empty(num_experts, device)
    row = torch.zeros(1, 1)
    found = []
    for token, ids in enumerate(trace.topk_ids):
        before = _counts(residency, posts)
        for layer in range(num_layers):
            where = (layer, layer * num_experts, num_experts)
            admit_and_post(row, ids[layer][None], *where, residency, copies, posts, mailbox)
        if token >= first:
            found += (_counts(residency, posts) - before).tolist()
    return [(misses, served) for misses, served in found]


def _counts(residency: Residency, posts: Posts) -> torch.Tensor:
    return torch.stack([residency.counters[:, 1], posts.counters[:, SERVED]], 1)


def project(results: Results, shape: Shape, first: int, num_tokens: int) -> None:
    """Milliseconds that misses add to a token, by machine, trace and capacity."""
    results.set(
        model=str(shape),
        page_bytes=shape.page_bytes,
        machines=[asdict(machine) for machine in MACHINES],
        launches_us=LAUNCHES,
        copy_us=COPY,
        exchange_us=EXCHANGE,
        tokens=num_tokens,
    )
    top_k, page_bytes = shape.num_experts_per_tok, shape.page_bytes
    traces = own_traces(shape, first + num_tokens)
    for name, trace in [(name, traces[name]) for name in TRACES]:
        for capacity in CAPACITIES:
            slots = int(capacity * shape.num_pages)
            for machine in MACHINES:
                for served_by in ("link", "auto"):
                    share = [0] * (top_k + 1)
                    if served_by == "auto":
                        share = [share_of(n, page_bytes, machine) for n in range(top_k + 1)]
                    found = misses_of(trace, slots, share, first)
                    measured = {}
                    if shape == QWEN3_30B_A3B and machine is MACHINES[0]:
                        measured = _measured(name, capacity, served_by)
                    wait = sum(wait_of(*layer, page_bytes, machine) for layer in found)
                    results.add(
                        "cells",
                        {
                            "machine": machine.name,
                            "trace": name,
                            "capacity": capacity,
                            "served_by": served_by,
                            "misses_per_token": round(sum(m for m, _ in found) / num_tokens, 1),
                            "host_per_token": round(sum(h for _, h in found) / num_tokens, 1),
                            "added_ms": round(wait / 1e3 / num_tokens, 2),
                            **measured,
                        },
                    )


def _measured(trace: str, capacity: float, served_by: str) -> dict[str, float]:
    """What the H200 took above the resident model, where that was measured."""
    cells = json.loads(MEASURED.read_text())["sections"].get("sharing", {}).get("cells", [])
    where = {"trace": trace, "capacity": capacity, "served_by": served_by}
    for cell in cells:
        if where.items() <= cell.items():
            return {"measured_ms": round(cell["ms"] - cell["resident_ms"], 2)}
    return {}


def main(arguments: list[str] | None = None) -> int:
    """Run the projection; 1 if it failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = parser_of(__doc__, SECTIONS, RESULTS)
    options = parser.parse_args(arguments)
    check_sections(parser, options, SECTIONS)
    results = Results(
        "projection", options.out, facts("projection", arguments, options.commit), lambda _: []
    )
    shape = Shape(3, 64, 32, 16, 2, 2, 1, 32, 64) if options.tiny else QWEN3_30B_A3B
    first, num_tokens = (4, 8) if options.tiny else (128, 64)
    run = partial(project, results, shape, first, num_tokens)
    return run_sections(results, {"projection": run})


if __name__ == "__main__":
    sys.exit(main())
