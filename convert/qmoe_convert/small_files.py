"""Small files that belong to a checkpoint; weights, code and whatever could run code do not."""

from __future__ import annotations

from pathlib import Path

from qmoe.checkpoints import schema

COPIED_SUFFIXES = (
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".md",
    ".tiktoken",
    ".vocab",
    ".merges",
    ".spm",
)
COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY", "COPYING")

# What is fetched of a checkpoint on the Hub.
DOWNLOADED = ("*.safetensors", "*.json", *(f"*{s}" for s in COPIED_SUFFIXES), *COPIED_NAMES)


def small_files(folder: Path) -> list[Path]:
    """The files of the checkpoint in ``folder`` that go along as they are."""
    found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")]
    return sorted(
        file
        for file in found
        if file.is_file()
        and (file.suffix in COPIED_SUFFIXES or file.name.startswith(COPIED_NAMES))
        and not file.name.endswith(".index.json")
        and not file.name.startswith(".")
        and file.name not in ("config.json", schema.MANIFEST_NAME)
    )
