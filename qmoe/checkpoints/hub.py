"""Where a checkpoint is said to be. Imports nothing, so that a mistyped path is told at once."""

from __future__ import annotations

import re
from pathlib import Path


def is_hub_id(text: str) -> bool:
    """Whether ``text`` reads like a repository on the Hub: ``owner/name``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def check_place(path: str | Path) -> None:
    """Refuse what is neither a folder nor could be a repository on the Hub.

    Raises:
        FileNotFoundError: there is nothing there.
        NotADirectoryError: a file is there.
    """
    if Path(path).is_dir():
        return
    if Path(path).exists():
        raise NotADirectoryError(f"{path}: is a file; give the folder that holds config.json")
    if not is_hub_id(str(path)):
        raise FileNotFoundError(f"{path}: no such folder, and no Hub id of the form owner/name")
