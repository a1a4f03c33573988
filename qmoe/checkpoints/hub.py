"""Where a checkpoint is said to be. Imports nothing, so that a mistyped path is told at once."""

from __future__ import annotations

import re
from pathlib import Path


def is_hub_id(text: str) -> bool:
    """Whether ``text`` reads like a repository on the Hub: ``owner/name``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def why_no_place(path: str | Path, *, hub: bool = True) -> str | None:
    """Why there is no checkpoint at ``path``; None if there may be one.

    Args:
        path: a folder's, or a repository's on the Hub.
        hub: whether it may be the latter.
    """
    if path == "":  # Path() would make it the current folder
        return "the checkpoint's name is empty; give a folder or a Hub id of the form owner/name"
    if Path(path).is_dir():
        return None
    if Path(path).exists():
        return f"{path}: is a file; give the folder that holds config.json"
    if hub and is_hub_id(str(path)):
        return None
    return f"{path}: no such folder, and no Hub id of the form owner/name"


def check_revision(path: str | Path, revision: str | None) -> None:
    """Refuse a revision of a folder: it would have no effect.

    Raises:
        ValueError: it has one.
    """
    if revision is not None and Path(path).is_dir():
        raise ValueError(
            f"revision={revision!r} has no effect: {path} is a folder, and only a repository on "
            "the Hub has revisions; leave it out"
        )


def check_place(path: str | Path) -> None:
    """Refuse what is neither a folder nor could be a repository on the Hub.

    Raises:
        FileNotFoundError: there is nothing there, or a file.
    """
    if why := why_no_place(path):
        raise FileNotFoundError(why)
