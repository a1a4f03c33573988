"""Compile kernels for architectures that are not there."""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = [80, 86, 89, 90, 100, 120]
# KiB that one program may have: "Shared Memory" in the CUDA programming guide, by capability.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


# Importing torch and Triton takes longer than most compilations: one process does it, and forks.
COMPILER = """
import os, sys
import torch, triton
import compiling, random_layer, qmoe_kernels.hopper_gemm, qmoe_kernels.layer

getattr(triton.runtime.cache, "triton_key", int)()  # hashes all of Triton, once for each process
for line in sys.stdin:
    code, out, err = eval(line)
    if not (child := os.fork()):
        os.dup2(os.open(out, os.O_WRONLY), 1)
        os.dup2(os.open(err, os.O_WRONLY), 2)
        exec(code, {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def compiler() -> subprocess.Popen[str]:
    """A process that sees no GPU and no interpreter, which here may have taken the kernels' place.

    It ends with this one, when there is nothing left to read.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folders = [str(Path(__file__).parents[2] / "kernels"), str(Path(__file__).parent)]
    environment["PYTHONPATH"] = os.pathsep.join([*folders, environment.get("PYTHONPATH", "")])
    environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILER],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(process.communicate)
    return process


def run_compiler(code: str) -> list[dict[str, Any]]:
    """Run Python code that compiles kernels; what it prints, one JSON object per line.

    In a process of its own, so that it may change what it likes.
    """
    process = compiler()
    assert process.stdin is not None and process.stdout is not None
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        try:
            process.stdin.write(repr((code, out.name, err.name)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BaseException:  # a timeout: the next call must not read this one's answer
            process.kill()
            compiler.cache_clear()
            raise
        assert answer == "0\n", err.read()
        return [json.loads(line) for line in out]


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Any]]:
    """Make launches compile for an architecture and launch nothing; yields what they compiled.

    For `run_compiler`: nothing is put back where it was.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        """As much of a GPU's driver as a compiler asks for."""

        def get_current_device(self) -> int:
            return capability  # kernels are kept by device

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    compiled: list[Any] = []
    run = triton.JITFunction.run

    def compile_only(kernel: Any, *args: Any, **options: Any) -> None:
        compiled.append(run(kernel, *args, **{**options, "warmup": True}))

    triton.runtime.driver.set_active(Driver())
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    triton.JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        triton.JITFunction.run = run


def spilled_bytes(cubin: bytes) -> int:
    """Bytes of local memory that each thread has, which is where registers that lack go."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,), (local,) = (re.findall(rf"{word}:(\d+)", usage) for word in ("STACK", "LOCAL"))
    return int(stack) + int(local)
