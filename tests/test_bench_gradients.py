"""The benchmark of gradients runs in its tiny configuration; nothing here looks at times."""

from __future__ import annotations

import json

from benchmarks import gradients


def test_tiny(tmp_path) -> None:
    out = tmp_path / "gradients.json"
    assert gradients.main(["--tiny", f"--out={out}", "--commit=test"]) == 0
    cells = json.loads(out.read_text())["sections"]["layer"]["cells"]
    assert [cell["what"] for cell in cells] == ["qmoe int8", "grouped_mm bf16"]
    assert all(cell["forward_ms"] > 0 and cell["distance"] < 0.02 for cell in cells)
