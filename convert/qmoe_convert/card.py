"""The model card of a converted checkpoint: what was done, from what, and with which errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qmoe.checkpoints.files import open_file
from qmoe.checkpoints.hub import is_hub_id
from qmoe.checkpoints.schema import Manifest, summarize_errors
from qmoe.sizes import format_size
from qmoe_convert.report import Report

CARD_NAME = "README.md"
# Of the source's card; everything else there is about the source.
_TAKEN_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LARGEST_CARD = 1 << 20

_TEXT = """
# {name}, experts in {bits}

The experts of {source} in {bits}, with one scale for each output channel.
{rest} Written by qmoe {version}.

| | source | here |
|---|---|---|
| size | {source_size} | {size} |

{bits_per_weight:.2f} bits per weight of an expert, scales included; the format is `{format}`.

## Errors

Relative error (Frobenius norm) of the experts, over every 16th row:

| projection | median | worst | worst in |
|---|---|---|---|
{errors}

## How to load it

With qmoe:

```python
import qmoe
from transformers import AutoTokenizer

path = "..."  # this folder or repository
model = qmoe.load(path)
tokenizer = AutoTokenizer.from_pretrained(path)
print(qmoe.generate(model, tokenizer, ["Once upon a time"], max_new_tokens=64).texts[0])
```

Read by {readers}.
"""


def model_card(folder: Path, report: Report, manifest: Manifest) -> str:
    """The text of OUT's card.

    Args:
        folder: the source, whose licence is taken over if its card tells it.
        report: what was done.
        manifest: with the errors.
    """
    from huggingface_hub import ModelCardData

    source = _hub_id(folder, manifest.source)
    data = ModelCardData(
        **_metadata(folder / CARD_NAME),
        base_model=source,
        base_model_relation="quantized" if source else None,
        library_name="transformers",
        tags=["moe", "qmoe", manifest.weights, manifest.format],
    )
    name = (source or manifest.source).rpartition("/")[2]
    summary = summarize_errors(manifest.errors)
    text = _TEXT.format(
        name=name,
        bits=manifest.weights.upper(),
        source=f"[{source}](https://huggingface.co/{source})" if source else f"`{name}`",
        version=manifest.qmoe_version,
        rest=_rest(report),
        source_size=format_size(report.source_bytes),
        size=format_size(report.output_bytes),
        bits_per_weight=report.bits_per_weight,
        format=manifest.format,
        readers=report.readers,
        errors="\n".join(
            f"| {projection} | {e['median']:.3%} | {e['worst']:.3%} | `{e['worst_module']}` |"
            for projection, e in summary.items()
        ),
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def _rest(report: Report) -> str:
    """What became of everything that was not quantized."""
    text = "All other tensors are as they were"
    if report.num_dequantized:
        text += f", but {report.num_dequantized} that were quantized and are in 16 bit again"
    if report.skipped_modules:
        text += f"; so are the experts of {', '.join(f'`{m}`' for m in report.skipped_modules)}"
    return text + "."


def _hub_id(folder: Path, source: str) -> str | None:
    """The source's repository on the Hub, where that is known."""
    if is_hub_id(source):
        return source
    # A snapshot in the Hub's cache: models--OWNER--NAME/snapshots/REVISION.
    match = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/\w+$", folder.resolve().as_posix())
    return f"{match[1]}/{match[2]}" if match else None


def _metadata(card: Path) -> dict[str, Any]:
    """What is taken over of the source's card; nothing of one that cannot be read."""
    from huggingface_hub import ModelCard

    try:
        with open_file(card) as stream:
            text = stream.read(_LARGEST_CARD).decode("utf-8")
        data: Any = ModelCard(text, ignore_metadata_errors=True).data
        found = data.to_dict()
    except Exception:  # no file, or whatever a parser of YAML raises
        return {}
    return {name: found[name] for name in _TAKEN_OVER if _is_plain(found.get(name))}


def _is_plain(value: Any) -> bool:
    """Whether metadata are a word, or some."""
    words = value if isinstance(value, list) and value else [value]
    return all(isinstance(word, str) and len(word) < 200 for word in words)
