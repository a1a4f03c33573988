"""A trial, not to be kept: Hopper's products with a producer warp beside those without, on one GPU.

    python -m benchmarks.warp_trial [--seconds 85] [--shapes qwen3,mixtral,dsv3] [--tokens 256,1024]

Each kind of kernel and of numbers is a process of its own, which compiles while others measure,
and ends itself if a kernel hangs. One measures at a time. The table comes last.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from qmoe_kernels import Activation, ExpertRouting
from qmoe_kernels import hopper_gemm as hopper
from qmoe_kernels import hopper_specialized as specialized
from qmoe_kernels.experts import Projection
from qmoe_kernels.heuristic import hopper_tiles
from qmoe_kernels.hopper_specialized import Schedule
from qmoe_kernels.tiles import LayerShape
from qmoe_kernels.timing import random_routing, replay_microseconds

SHAPES = {
    "qwen3": LayerShape(128, 8, 2048, 768),
    "mixtral": LayerShape(8, 2, 4096, 14336),
    "dsv3": LayerShape(256, 8, 7168, 2048),
}
SILU = Activation("silu")
DTYPES = ("int8", "fp8", "bf16")  # of rows; bf16 with int8 weights
# What a process measures: name, block_m, schedule (None: today's kernel).
GROUPS: dict[str, list[tuple[str, int, Schedule | None]]] = {
    "now": [(f"now{m}", m, None) for m in (64, 128, 256)],
    "256": [("tile256", 256, Schedule(persistent=False)), ("pers256", 256, Schedule())],
    "turn128": [("turn128", 128, Schedule(in_turn=True))],
    "128": [("tile128", 128, Schedule(persistent=False)), ("pers128", 128, Schedule())],
    "64": [("two64", 64, Schedule(programs=2, producer_registers=32))],
}
MAX_HELD = 15.0  # seconds for which one process may keep the others from measuring


class Case:
    """The inputs of both products, drawn."""

    def __init__(self, shape: LayerShape, num_tokens: int, rows: str, weights: list[torch.Tensor]):
        device = weights[0].device
        generator = torch.Generator(device).manual_seed(num_tokens)
        ids, _ = random_routing(shape, num_tokens, device=device, generator=generator)
        self.shape = shape
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        self.counts = torch.bincount(flat, minlength=shape.num_experts).cpu()
        offsets = torch.nn.functional.pad(self.counts.cumsum(0), (1, 0)).int()
        self.routing = ExpertRouting(order.int(), offsets.to(device), shape.top_k)
        pairs = num_tokens * shape.top_k
        features = (shape.hidden_size, shape.intermediate_size)
        self.rows = [numbers((pairs, k), rows, generator) for k in features]
        self.row_scales = [
            torch.rand(pairs, device=device, generator=generator) + 0.5 if rows != "bf16" else None
            for _ in features
        ]
        self.projections = []
        for weight, x in zip(weights, self.rows, strict=True):
            size = x.shape[1] ** 0.5 * deviation(weight) * deviation(x)
            scale = torch.rand(weight.shape[:2], device=device, generator=generator)
            self.projections.append(Projection(weight, (scale + 0.5) / size))
        self.wide = rows == "bf16"
        self.out = [x.new_empty(pairs, k, dtype=torch.bfloat16)
                    for x, k in zip(self.rows, reversed(features), strict=True)]  # fmt: skip
        self.tables: dict[int, torch.Tensor] = {}

    def table(self, block_m: int) -> torch.Tensor:
        """As `hopper_gemm.launch_tile_table`'s, of as many rows."""
        if block_m not in self.tables:
            pairs, experts = int(self.counts.sum()), self.shape.num_experts
            max_tiles = min(pairs, experts + max(0, pairs - experts) // block_m)
            tiles, start = [], 0
            for expert, count in enumerate(self.counts.tolist()):
                for first in range(0, count, block_m):
                    tiles.append([expert, expert, start + first, count - first])
                start += count
            found = torch.zeros(max_tiles + 1, 4, dtype=torch.int32)
            found[: len(tiles)] = torch.tensor(tiles, dtype=torch.int32)
            found[max_tiles, 0] = len(tiles)
            self.tables[block_m] = found.to(self.rows[0].device)
        return self.tables[block_m]

    def products(self, block_m: int, schedule: Schedule | None, num_sms: int) -> None:
        """Launch both."""
        dtype = self.rows[0].dtype
        narrow = 3 if block_m < 256 and not self.wide else 4
        for i in range(2):
            options: dict[str, Any] = {
                "out_features": self.out[i].shape[1],
                "x_scale": self.row_scales[i],
                "activation": None if i else SILU,
                "scatter": bool(i),
                "permute": self.wide and not i,
            }
            arguments = (self.rows[i], self.projections[i], self.routing, self.table(block_m),
                         self.out[i])  # fmt: skip
            if schedule is None:
                tile = hopper_tiles(block_m, dtype, narrow).gate_up
                hopper.launch_hopper_gemm(*arguments, tile, **options)
            else:
                tile = hopper_tiles(block_m, dtype, 9).gate_up
                specialized.launch_hopper_specialized(
                    *arguments, tile, schedule, num_sms=num_sms, **options
                )

    def outputs(self, block_m: int, schedule: Schedule | None, num_sms: int) -> list[torch.Tensor]:
        for out in self.out:
            out.fill_(torch.nan)
        self.products(block_m, schedule, num_sms)
        torch.cuda.synchronize()
        return [out.clone() for out in self.out]


def numbers(size: tuple[int, ...], dtype: str, generator: torch.Generator) -> torch.Tensor:
    if dtype == "bf16":
        return torch.randn(size, device=generator.device, generator=generator).bfloat16()
    found = torch.empty(size, dtype=torch.int8, device=generator.device)
    flat = found.view(-1)
    for part in flat.split(1 << 30):
        part.random_(-127, 128, generator=generator)
    if dtype == "int8":
        return found
    return found.bitwise_and_(-65).view(torch.float8_e4m3fn)  # finite, below 2


def deviation(values: torch.Tensor) -> float:
    return float(values.reshape(-1)[: 1 << 20].float().std())


def draw_weights(shape: LayerShape, rows: str, device: str) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts
    kind = "fp8" if rows == "fp8" else "int8"
    return [numbers(size, kind, generator) for size in ((e, 2 * i, h), (e, h, i))]


def differences(found: list[torch.Tensor], expected: list[torch.Tensor]) -> tuple[float, bool]:
    """The larger relative error, and whether all bits are equal."""
    error = max(
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(found, expected, strict=True)
    )
    return error, all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Turn:
    """One process at a time; one that takes too long (a kernel that hangs) ends."""

    def __init__(self, path: str):
        self.file = open(path, "w")  # noqa: SIM115
        self.since: float | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(0.2)
            since = self.since
            if since is not None and time.monotonic() - since > MAX_HELD:
                say(failed=f"more than {MAX_HELD} s: a kernel hangs?")
                os._exit(3)

    def __enter__(self) -> None:
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self.since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.since = None
        fcntl.flock(self.file, fcntl.LOCK_UN)


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def compile_only(function: Callable[[], None]) -> None:
    """Call what launches kernels, and only compile them."""
    run = triton.JITFunction.run

    def instead(kernel: Any, *args: Any, **options: Any) -> Any:
        return run(kernel, *args, **{**options, "warmup": True})

    triton.JITFunction.run = instead
    try:
        function()
    finally:
        triton.JITFunction.run = run


def measure(group: str, rows: str, shapes: list[str], tokens: list[int], lock: str) -> None:
    """A process's work: lines of JSON."""
    torch.cuda.init()
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    turn = Turn(lock)
    small = LayerShape(8, 2, 768, 1024)  # programs that stay have several tiles each
    with turn:
        small_case = Case(small, 2000, rows, draw_weights(small, rows, "cuda"))
    reference = (128, None)
    variants = []
    for name, block_m, schedule in GROUPS[group]:
        try:
            compile_only(partial(small_case.products, block_m, schedule, num_sms))
            variants.append((name, block_m, schedule))
        except Exception as wrong:
            say(group=group, rows=rows, variant=name, failed=f"compiling: {str(wrong)[-300:]}")
    compile_only(partial(small_case.products, *reference, num_sms))
    with turn:
        expected = small_case.outputs(*reference, num_sms)
        for name, block_m, schedule in list(variants):
            say(group=group, rows=rows, variant=name, running=True)
            error, _ = differences(small_case.outputs(block_m, schedule, num_sms), expected)
            if not error < 1e-2:
                say(group=group, rows=rows, variant=name, failed=f"error {error} of a small layer")
                variants.remove((name, block_m, schedule))
    del small_case
    for shape in shapes:
        with turn:
            weights = draw_weights(SHAPES[shape], rows, "cuda")
            for num_tokens in tokens:
                case = Case(SHAPES[shape], num_tokens, rows, weights)
                expected = case.outputs(*reference, num_sms)
                for name, block_m, schedule in [("check128", *reference), *variants]:
                    if name == "check128" and group == "now":
                        continue
                    say(group=group, rows=rows, variant=name, running=f"{shape} {num_tokens}")
                    error = again = 0.0
                    same = True
                    if name != "check128":
                        found = case.outputs(block_m, schedule, num_sms)
                        error, same = differences(found, expected)
                        again, repeats = differences(
                            case.outputs(block_m, schedule, num_sms), found
                        )
                        again = 0.0 if repeats else max(again, 1e-9)
                    if not (error < 1e-2 and again == 0.0):
                        say(
                            group=group,
                            rows=rows,
                            variant=name,
                            shape=shape,
                            tokens=num_tokens,
                            failed=f"error {error:.2g}, other bits in a second run: {again:.2g}",
                        )
                        continue
                    call = partial(case.products, block_m, schedule, num_sms)
                    calls = 3 if num_tokens * SHAPES[shape].intermediate_size > 4 << 20 else 6
                    us = replay_microseconds([call] * calls, seconds=0.05)
                    say(group=group, rows=rows, variant=name, shape=shape, tokens=num_tokens,
                        us=us, error=error, same=same)  # fmt: skip
            del weights, case, expected
            torch.cuda.empty_cache()
    say(group=group, rows=rows, done=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=85.0)
    parser.add_argument("--shapes", default="qwen3,mixtral,dsv3")
    parser.add_argument("--tokens", default="256,1024,4096")
    parser.add_argument("--rows", default=",".join(DTYPES))
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--measure", help="a process's own part: group,rows,lock")
    args = parser.parse_args()
    shapes, tokens = args.shapes.split(","), [int(t) for t in args.tokens.split(",")]
    if args.measure:
        group, rows, lock = args.measure.split(",")
        measure(group, rows, shapes, tokens, lock)
        return
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp())
    running = {}
    for rows in args.rows.split(","):
        for group in args.groups.split(","):
            command = [
                sys.executable, "-m", "benchmarks.warp_trial", "--shapes", args.shapes,
                "--tokens", args.tokens, "--measure", f"{group},{rows},{folder / 'lock'}",
            ]  # fmt: skip
            with (
                (folder / f"{group}-{rows}.out").open("w") as out,
                (folder / f"{group}-{rows}.err").open("w") as err,
            ):
                running[group, rows] = subprocess.Popen(command, stdout=out, stderr=err)
    while time.monotonic() - started < args.seconds:
        if all(process.poll() is not None for process in running.values()):
            break
        time.sleep(0.2)
    for process in running.values():
        process.kill()
        process.wait()
    lines = []
    for (group, rows), process in running.items():
        text = (folder / f"{group}-{rows}.out").read_text().splitlines()
        own = [json.loads(line) for line in text if line.endswith("}")]
        lines += own
        if not (own and own[-1].get("done")):
            last = own[-1] if own else None
            error = (folder / f"{group}-{rows}.err").read_text().strip()[-400:]
            print(
                f"!! {group} {rows} did not end (code {process.returncode}); last: {last}\n{error}"
            )
    for line in lines:
        if "failed" in line:
            print("!!", line)
    if results := os.environ.get("OUT"):
        (Path(results) / "warp_trial.json").write_text(json.dumps(lines, indent=1))
    table(lines, shapes, tokens)
    print(f"{time.monotonic() - started:.0f} s, Triton {triton.__version__}")


def table(lines: list[dict[str, Any]], shapes: list[str], tokens: list[int]) -> None:
    """us now (the best tile of today's kernel), us of each variant, ratio; = for equal bits."""
    times = {
        (line["rows"], line["shape"], line["tokens"], line["variant"]): line
        for line in lines
        if "us" in line and line["variant"] != "check128"
    }
    now = {
        key[:3]: min(
            (v["us"], k[3]) for k, v in times.items() if k[:3] == key[:3] and k[3][:3] == "now"
        )
        for key in times
        if key[3][:3] == "now"
    }
    names = [name for group in GROUPS.values() for name, *_ in group if name[:3] != "now"]
    drift = [
        line["us"] / times[key]["us"]
        for line in lines
        if line.get("variant") == "check128" and "us" in line
        if (key := (line["rows"], line["shape"], line["tokens"], "now128")) in times
    ]
    if drift:
        print(f"today's kernel in other processes: {min(drift):.3f} to {max(drift):.3f} of now128")
    head = [f"{name:>14}" for name in names]
    print(f"{'rows':5}{'shape':8}{'tokens':>6} {'us now':>8} {'tile':7}" + "".join(head))
    for rows in DTYPES:
        for shape in shapes:
            for num_tokens in tokens:
                key = (rows, shape, num_tokens)
                if key not in now:
                    continue
                best, tile = now[key]
                cells = []
                for name in names:
                    line = times.get((*key, name))
                    text = "-"
                    if line:
                        equal = "=" if line["same"] else " "
                        text = f"{line['us']:.0f} {line['us'] / best:.3f}{equal}"
                    cells.append(f"{text:>14}")
                print(f"{rows:5}{shape:8}{num_tokens:6} {best:8.0f} {tile:7}" + "".join(cells))


if __name__ == "__main__":
    main()
