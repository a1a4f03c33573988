"""The benchmark of bounded host memory runs in its tiny configuration."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import host_memory


@pytest.mark.skipif(sys.platform != "linux", reason="readers need Linux")
def test_tiny(tmp_path) -> None:
    out = tmp_path / "host_memory.json"
    assert host_memory.main(["--tiny", f"--out={out}", "--commit=test"]) == 0
    cells = json.loads(out.read_text())["sections"]["decode"]["cells"]
    assert [cell["disk_misses"] > 0 for cell in cells] == [False, True, True, True]
    assert [cell["cold"] for cell in cells] == [False, False, False, True]
