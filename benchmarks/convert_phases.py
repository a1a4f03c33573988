"""Where ``convert-checkpoint`` spends its time: seconds by phase, in Qwen3-30B-A3B's shape.

``python benchmarks/convert_phases.py`` converts a generated checkpoint once for each number of
workers, without verifying, and adds up how long imports, planning, reading, quantizing, hashing and
writing took. Workers run beside the main thread: their seconds overlap with its own and, with two
workers, with each other's. Results go to ``benchmarks/results/convert_phases.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "convert_phases.json"


def measure(source: Path, target: Path, workers: int) -> dict[str, Any]:
    """Convert in this process and return seconds by phase."""
    seconds: defaultdict[str, float] = defaultdict(float)
    start = time.perf_counter()

    def timed(owner: Any, name: str, phase: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[phase] += time.perf_counter() - begin

        setattr(owner, name, wrapper)

    gc.disable()  # as the command does
    from qmoe_convert import convert, shards, write

    gc.freeze()
    gc.enable()
    seconds["main: imports"] = time.perf_counter() - start
    timed(convert, "map_checkpoint", "main: map names")
    timed(convert, "make_plan", "main: plan")
    timed(convert, "write_shards", "main: shards, all of it")
    timed(shards.ShardWriter, "write", "main: write")
    timed(shards.ShardWriter, "finish", "main: fsync")
    timed(shards.ShardWriter, "_hash", "main: of writing, wait for hashing")
    timed(write, "quantize_with_squares", "workers: quantize")
    timed(shards, "read_into", "workers: read")
    convert.convert(source, target, workers=workers, verify=False, device="cpu")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "workers": workers,
        "total_s": round(time.perf_counter() - start, 2),
        "user_cpu_s": round(usage.ru_utime, 2),
        "system_cpu_s": round(usage.ru_stime, 2),
        "seconds": {phase: round(value, 2) for phase, value in sorted(seconds.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to work; 20 GB")
    parser.add_argument("--layers", type=int, default=7, help="1.2 GB each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        source, target, workers = arguments.measure
        print(json.dumps(measure(Path(source), Path(target), int(workers))))
        return

    sys.path.insert(0, str(Path(__file__).parent))
    from convert import commit, generate, machine

    work = Path(tempfile.mkdtemp(prefix="qmoe-benchmark-", dir=arguments.folder))
    try:
        source, target = work / "source", work / "target"
        source_bytes = generate(source, arguments.layers)
        runs = []
        for workers in (1, 2):
            command = [sys.executable, __file__, "--measure", str(source), str(target)]
            done = subprocess.run(
                [*command, str(workers)], stdout=subprocess.PIPE, text=True, check=True
            )
            runs.append(json.loads(done.stdout))
            print(runs[-1], flush=True)
            shutil.rmtree(target)
    finally:
        shutil.rmtree(work)
    results = {
        "benchmark": "convert_phases",
        "commit": commit(),
        "machine": machine(),
        "source_bytes": source_bytes,
        "weights": "int8",
        "runs": runs,
    }
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
