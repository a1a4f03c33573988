"""Sections of qmoe's own decoding: startup, decode, prefill, host and steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.generate.bench import CALLS, OURS, SAMPLING, SHORT, Benchmark, generate
from benchmarks.model import time_each
from qmoe.decoding.decoder import release
from qmoe.decoding.loop import decode
from qmoe.decoding.pieces import PIECES
from qmoe.decoding.step import DecodeStep, step_of

NUM_COLUMNS = 512  # of the step, as for generating with short prompts


def run_startup(bench: Benchmark) -> None:
    """Seconds until a loaded model decodes, and until it does so by a captured step.

    Nothing of qmoe has run in this process before. The two smaller batches in turn; then the
    smallest once more with everything compiled, as a model that has changed needs it.
    """
    _ = bench.int8
    bench.results.set(
        includes="Triton's compilation with an empty cache, reading the prompt, decoding; not "
        "importing or loading the model"
    )

    def add(what: str, batch: int, num_new: int) -> None:
        seconds = bench.seconds(bench.ours(batch, bench.sizes.prompt), num_new)
        cell = {"what": what, "batch": batch, "new": num_new, "seconds": round(seconds, 3)}
        bench.results.add("cells", cell)

    smallest, larger = bench.sizes.batches[:2]
    for batch in (smallest, larger):
        add("first call", batch, 2)  # reads the prompt and decodes one token
        add("call that captures", batch, SHORT)
        add("call after that", batch, SHORT)
    release(bench.int8)
    add("call that captures again", smallest, SHORT)


def run_decode(bench: Benchmark) -> None:
    """Tokens per second by batch, greedy and sampled, and by length of the prompt.

    What comes is compared with transformers' own loop on the same model first.
    """
    sizes = bench.sizes
    for batch in sizes.batches[:2]:
        bench.results.add("checks", compare(bench, batch))
    cells = [(batch, sizes.prompt, False) for batch in sizes.batches]
    cells += [(batch, sizes.prompt, True) for batch in sizes.batches]
    cells += [(batch, length, False) for length in sizes.contexts for batch in sizes.batches[:-1]]
    for batch, length, sample in cells:
        run = bench.ours(batch, length, **(SAMPLING if sample else {}))
        timing = bench.time_steps(run, sizes.new)
        cell = {"path": OURS, "sampled": sample, **timing.cell(batch, length)}
        bench.results.add("cells", cell)


def compare(bench: Benchmark, batch: int) -> dict[str, object]:
    """Say how far greedy tokens are those of transformers' loop, rows padded differently.

    transformers' loop is led along our tokens and asked at each of them what it would have chosen:
    until the first difference that is what it generates by itself, and later tokens tell
    something too.
    """
    sizes = bench.sizes
    input_ids, mask = bench.prompts(batch, sizes.prompt), torch.ones(batch, sizes.prompt)
    mask = mask.to(input_ids)
    for row in range(batch):
        mask[row, : row * sizes.prompt // (2 * batch)] = 0
    arguments = (bench.int8, input_ids, mask, sizes.check)
    ours = generate(*arguments, custom_generate=decode)
    led = Led(ours)
    generate(*arguments, logits_processor=LogitsProcessorList([led]))
    equal = torch.stack(led.equal, dim=1)  # (batch, tokens)
    behind = torch.stack(led.behind, dim=1)
    first = (~equal.all(0)).nonzero()
    return {
        "batch": batch,
        "tokens": sizes.check,
        "equal": bool(equal.all()),
        "first_difference": int(first[0]) if len(first) else None,
        "share_equal": round(float(equal.float().mean()), 4),
        "most_behind": round(float(behind.max()), 4),
    }


class Led(LogitsProcessor):
    """Leads a generation along given tokens and notes what it would have chosen.

    Attributes:
        equal: of each step (rows,) whether it would have chosen the same token.
        behind: of each step (rows,) by how many standard deviations of the row's logits the
            largest one is above the given token's.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens  # (rows, num_new)
        self.equal: list[Tensor] = []
        self.behind: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        given = self.tokens[:, len(self.equal), None]
        best = scores.max(-1, keepdim=True)
        self.equal.append((best.indices == given)[:, 0])
        behind = best.values - scores.gather(1, given)
        self.behind.append(behind[:, 0] / scores.std(-1))
        return torch.full_like(scores, -torch.inf).scatter(1, given, 0.0)


def run_prefill(bench: Benchmark) -> None:
    """Tokens per second of a prompt, until its first new token is there."""
    for length in bench.sizes.prefills:
        run = bench.ours(1, length)
        first = bench.seconds(run, 1)
        for _ in range(CALLS):
            run(1)
        later = [bench.seconds(run, 1) for _ in range(bench.sizes.repeats)]
        same = torch.equal(run(1), bench.run(bench.int8, 1, length)(1))
        bench.results.add(
            "cells",
            {
                "path": OURS,
                "prompt": length,
                "same_token": same,
                "first_ms": round(1e3 * first, 2),
                "ms": [round(1e3 * s, 2) for s in later],
                "tokens_per_s": round(length / statistics.median(later), 1),
            },
        )


def run_host(bench: Benchmark) -> None:
    """CPU time of all of the process's threads while one text is decoded, over wall time."""
    run = bench.ours(1, bench.sizes.prompt)
    steps = bench.sizes.host
    for num_new in (SHORT + steps, SHORT):
        run(num_new)

    def measure(num_new: int) -> tuple[float, float]:
        cpu = time.process_time()
        wall = bench.seconds(run, num_new)
        return time.process_time() - cpu, wall

    (cpu, wall), (less_cpu, less_wall) = measure(SHORT + steps), measure(SHORT)
    bench.results.add(
        "cells",
        {
            "batch": 1,
            "steps": steps,
            "cpu_s": round(cpu - less_cpu, 4),
            "wall_s": round(wall - less_wall, 4),
            "cores": round((cpu - less_cpu) / (wall - less_wall), 4),
        },
    )


def run_steps(bench: Benchmark) -> None:
    """Milliseconds of a captured step as kernels take the place of the model's pieces in turn."""
    replays = bench.sizes.replays
    for batch in bench.sizes.batches:
        for count in range(len(PIECES) + 1):
            step = prepared_step(bench, batch, PIECES[:count])
            _, total = time_each(step.advance, replays, bench.device)
            cell = {
                "batch": batch,
                "added": PIECES[count - 1] if count else "none",
                "ms": round(total / replays, 4),
            }
            if step.trouble is not None:  # then it ran without a graph
                cell["trouble"] = step.trouble
            bench.results.add("cells", cell)


def prepared_step(bench: Benchmark, batch: int, pieces: Iterable[str]) -> DecodeStep:
    """A step that has read prompts and, on a GPU, been captured."""
    step = step_of(bench.int8, batch, NUM_COLUMNS, pieces)
    input_ids = bench.prompts(batch, bench.sizes.prompt)
    positions = torch.arange(bench.sizes.prompt, device=bench.device).expand(batch, -1)
    step.read(input_ids, torch.ones_like(input_ids), positions, None)
    for _ in range(SHORT):
        step.advance()
    return step
