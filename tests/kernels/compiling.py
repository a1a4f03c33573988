"""Compile kernels for architectures that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ARCHITECTURES = [80, 86, 89, 90, 100, 120]
# KiB that one program may have: "Shared Memory" in the CUDA programming guide, by capability.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def run_compiler(code: str) -> list[dict[str, Any]]:
    """Run Python code that compiles kernels; what it prints, one JSON object per line.

    In a process of its own: here the interpreter may have taken the kernels' place.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folder = Path(__file__).parents[2] / "kernels"
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
