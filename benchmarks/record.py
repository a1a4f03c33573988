"""What benchmarks write down: results as they come, and where and of which commit they are."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.convert import commit, machine

Targets = Callable[[dict[str, Any]], list[dict[str, Any]]]


class OutOfTime(Exception):
    """The benchmark's time is up; what was measured is kept."""


class Results:
    """What was measured so far, on the disk after every cell."""

    def __init__(
        self,
        name: str,
        path: Path,
        common: dict[str, Any],
        targets: Targets,
        deadline: float = math.inf,
    ) -> None:
        self.path, self.common, self.targets, self.deadline = path, common, targets, deadline
        self.started = time.monotonic()
        self.data: dict[str, Any] = {"benchmark": name, "sections": {}}
        if path.exists():
            self.data = json.loads(path.read_text())
        self.section: dict[str, Any] = {}

    def begin(self, name: str) -> None:
        """Start a section afresh."""
        self.section = {**self.common}
        self.data["sections"][name] = self.section
        self.log(f"== {name}")

    def add(self, key: str, cell: dict[str, Any]) -> None:
        """Append a cell to a list of the present section.

        Raises:
            OutOfTime: that was the last one.
        """
        self.section.setdefault(key, []).append(cell)
        self.save()
        self.log(f"{key}: " + ", ".join(f"{k}={v}" for k, v in cell.items()))
        if time.monotonic() - self.started > self.deadline:
            raise OutOfTime

    def set(self, **values: Any) -> None:
        """Set values of the present section."""
        self.section |= values
        self.save()
        self.log(", ".join(f"{k}={v}" for k, v in values.items()))

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.data["targets"] = self.targets(self.data["sections"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=2) + "\n")
        partial.replace(self.path)

    def log(self, line: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{time.monotonic() - self.started:6.1f}] {line}", flush=True)


def run_sections(results: Results, sections: dict[str, Callable[[], None]]) -> int:
    """Run sections in turn until time is up, and say which targets were met.

    Returns:
        how many failed; the others still tell something.
    """
    failed = 0
    for name, run in sections.items():
        results.begin(name)
        started = time.monotonic()
        try:
            run()
        except OutOfTime:
            results.set(incomplete=f"stopped after {results.deadline:.0f} s")
            break
        except Exception as error:
            traceback.print_exc()
            results.set(error=f"{type(error).__name__}: {error}")
            failed += 1
        finally:
            results.set(seconds=round(time.monotonic() - started, 1))
    for target in results.data["targets"]:
        word = "met   " if target["met"] else "missed"
        print(f"{word} {target['what']}: {target['measured']} (target {target['target']})")
    return failed


def facts(name: str, arguments: Sequence[str], given_commit: str | None) -> dict[str, Any]:
    """Command, commit, date and machine: sections may be measured at different times."""
    described = {
        "commit": given_commit or "",
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join([f"python -m benchmarks.{name}", *arguments]),
    }
    if not given_commit:
        with suppress(OSError):  # no git
            described["commit"] = commit()
    for package in ("triton", "vllm", "torchao", "kt-kernel"):
        with suppress(PackageNotFoundError):
            described["machine"][package] = version(package)
    described["machine"]["cuda"] = torch.version.cuda
    return described
