"""Small files that belong to a checkpoint; weights, code and whatever could run code do not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from qmoe.checkpoints import schema
from qmoe.checkpoints.files import CheckpointError, read_json

COPIED_SUFFIXES = (
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".md",
    ".tiktoken",
    ".vocab",
    ".merges",
    ".bpe",
    ".spm",
)
# Mistral's tokenizer.model.v3 and its like, and licences under all spellings.
_COPIED = re.compile(
    r"[\w-]+\.model\.v\d\w*"
    r"|(?!.*\.(py\w?|so|sh|exe|bin|pkl|pt\w?|zip)$)"
    r"(un)?(licen[cs]e|notice|copying|copyright|use_policy).*",
    re.IGNORECASE,
)
# What says something else about OUT than is true: the card of the source, an adapter that is not
# applied, and what is written anew.
_LEFT_OUT = re.compile(
    r"\..*|(readme|model_?card)[\w-]*(\.\w+)?|adapter_config\.json|.*\.index\.json|config\.json",
    re.IGNORECASE,
)


def _any_case(name: str) -> str:
    """The pattern that matches ``name`` in capitals or not, of those that the Hub understands."""
    return "".join(f"[{c.upper()}{c.lower()}]" if c.isalpha() else c for c in name)


# What is fetched of a checkpoint on the Hub.
DOWNLOADED = (
    *("*.safetensors", "*.json", *(f"*{suffix}" for suffix in COPIED_SUFFIXES), "*.model.v[0-9]*"),
    *(f"{_any_case(n)}*" for n in ("license", "licence", "notice", "copying", "use_policy")),
)


def small_files(folder: Path) -> list[Path]:
    """The files of the checkpoint in ``folder`` that go along, see `copy_small_file`."""
    return [file for file in _candidates(folder) if _is_inside(file, folder)]


def _candidates(folder: Path) -> list[Path]:
    found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")]
    return sorted(
        file
        for file in found
        if file.is_file()
        and (file.suffix in COPIED_SUFFIXES or _COPIED.fullmatch(file.name))
        and not _LEFT_OUT.fullmatch(file.name)
        and file.name != schema.MANIFEST_NAME
    )


def _is_inside(file: Path, folder: Path) -> bool:
    """Whether a file lies in ``folder`` and not only a link to it.

    Links to the blobs of a Hub cache are how the cache keeps a snapshot.
    """
    target = file.resolve()
    in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return in_cache or target.is_relative_to(folder.resolve())


def copy_small_file(file: Path, target: Path) -> None:
    """Copy a file as it is, but for an ``auto_map`` that names code beside it."""
    shutil.copyfile(file, target)
    if _code(target):
        config = read_json(target)
        del config["auto_map"]
        target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def names_code(config: dict[str, Any]) -> str | None:
    """The class that a config's ``auto_map`` wants from a file beside it; no file of code is taken.

    ``owner/name--module.Class`` says where the code is, and needs no file here.
    """
    auto_map = config.get("auto_map")
    values = list(auto_map.values()) if isinstance(auto_map, dict) else []
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return next((v for v in flat if isinstance(v, str) and "--" not in v), None)


def _code(file: Path) -> str | None:
    if not file.name.endswith("config.json"):
        return None
    try:
        return names_code(read_json(file))
    except CheckpointError:  # not what it is called; it goes along as it is
        return None


def warnings_about(folder: Path) -> list[str]:
    """What the user should know about small files of ``folder`` that do not go along."""
    warnings = [
        f"{file.relative_to(folder)} is a link to {file.resolve().name} outside of the checkpoint: "
        "left out; copy the file there if it belongs to it"
        for file in _candidates(folder)
        if not _is_inside(file, folder)
    ]
    for file in [folder / "config.json", *small_files(folder)]:
        if name := _code(file):
            warnings.append(
                f"{file.name} wants the code {name!r:.80}, which does not go along: its auto_map "
                "is left out; where transformers has no class of its own, load that part from the "
                "source"
            )
    if (folder / "adapter_config.json").exists():
        warnings.append(
            "adapter_config.json: there is an adapter beside the weights; it is left out and not "
            "applied, merge it first if it belongs to the model"
        )
    return warnings
