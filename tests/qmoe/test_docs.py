"""The Python in README.md and docs/recipes.md runs as it stands, and relative links are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
SNIPPETS = [
    (page.name, code)
    for page in (ROOT / "README.md", ROOT / "docs" / "recipes.md")
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]
torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("page", "code"),
    [(page, code) for page, code in SNIPPETS if "examples/tiny-moe" in code],
    ids=lambda value: value if value.endswith(".md") else "code",
)
def test_python_runs(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "peft" in code:
        pytest.importorskip("peft")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
