"""Windows of tokens: what routers learn from, and what is held out to measure them on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HELD_OUT_SHARE = 0.1
# More are held out of a long text, but not measured on: so many tell two states apart.
MOST_MEASURED = 64


@dataclass(frozen=True)
class Windows:
    """A text, or several, in windows that do not overlap; a rest that fills none is left out.

    Attributes:
        learn: (windows, window) int64: what routers learn from.
        held_out: (windows, window) int64: what they are measured on, of the last tenth of each
            file. Nothing of that tenth is in ``learn``.
    """

    learn: Tensor
    held_out: Tensor


def read_texts(files: Sequence[Path]) -> list[str]:
    """The text of each file.

    Raises:
        ValueError: a file that is not there or cannot be read, or is no UTF-8.
    """
    texts = []
    for file in files:
        try:
            texts.append(file.read_bytes().decode("utf-8"))
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file}: is no text in UTF-8 (byte {error.start} is none of it); convert it first"
            ) from None
    return texts


def sha256_of_texts(texts: Sequence[str]) -> str:
    """Tells texts from others, for a run that is resumed."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def encode(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, without special ones."""
    # verbose=False: it may be longer than the model's context, since it is cut later.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def cut(files: Sequence[Path], tokens: Sequence[list[int]], window: int) -> Windows:
    """Cut each file's tokens into windows, and hold the last tenth of each file out.

    Raises:
        ValueError: a file too short for a window to learn from and one that is held out.
    """
    learn, held_out = [], []
    for file, ids in zip(files, tokens, strict=True):
        count = len(ids) // window
        if count < 2:
            raise ValueError(
                f"{file}: {len(ids)} tokens; at least {2 * window} are needed, a window of "
                f"{window} to learn from and one to hold out. Give more text or a smaller --window"
            )
        windows = torch.tensor(ids[: count * window]).view(count, window)
        held = max(1, int(count * HELD_OUT_SHARE))
        learn.append(windows[:-held])
        held_out.append(windows[-held:])
    measured = torch.cat(held_out)
    if len(measured) > MOST_MEASURED:
        measured = measured[torch.linspace(0, len(measured) - 1, MOST_MEASURED).long()]
    return Windows(torch.cat(learn), measured)


def schedule(num_windows: int, steps: int, batch: int, seed: int) -> Tensor:
    """Which windows each step learns from: (steps, batch) int64.

    Each window comes once before any comes again. Equal arguments give equal orders.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps * batch // num_windows)
    order = torch.cat([torch.randperm(num_windows, generator=generator) for _ in range(rounds)])
    return order[: steps * batch].view(steps, batch)
