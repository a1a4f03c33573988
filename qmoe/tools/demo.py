"""run_demo(): one model in 16 bit, INT8 and FP8, side by side.

Everything is measured here and now: the model is converted with the same code as
``convert-checkpoint``, verified, loaded from disk, and asked the same things.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from qmoe.checkpoints.inspection import inspect_checkpoint
from qmoe.generation import expert_bytes, generate, load_tokenizer
from qmoe.loading.load import load
from qmoe.tools.perplexity import perplexity
from qmoe.tools.threads import threads_for

SHIPPED_MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-moe"
HELD_OUT = "heldout.txt"
PROMPTS = (
    'def close(self):\n        """',
    "try:\n    import ",
)
WINDOW = 512  # tokens
MAX_TOKENS = 16384  # of the held-out text: enough for differences of 0.1 %, seconds on two cores


@dataclass(frozen=True)
class Variant:
    """One form of the model, and what was measured of it.

    Attributes:
        name: ``16 bit``, ``INT8`` or ``FP8``.
        path: the checkpoint's folder; None where it was a temporary one.
        disk_bytes: its tensors on disk.
        expert_bytes: expert weights and scales in memory.
        bits_per_expert_weight: on disk, scales included.
        perplexity: on the held-out text.
        perplexity_change: relative to 16 bit, as a fraction.
        decode_tokens_per_second: all prompts in one batch.
        texts: greedy continuations of the prompts.
    """

    name: str
    path: str | None
    disk_bytes: int
    expert_bytes: int
    bits_per_expert_weight: float
    perplexity: float
    perplexity_change: float
    decode_tokens_per_second: float | None
    texts: list[str]


@dataclass(frozen=True)
class Demo:
    """What :func:`run_demo` found.

    Attributes:
        model: the 16-bit original's folder.
        prompts: what every variant continued.
        window: tokens per window of the perplexity; windows do not overlap.
        perplexity_tokens: how many tokens of the held-out text were used.
        variants: 16 bit, INT8, FP8.
    """

    model: str
    prompts: list[str]
    window: int
    perplexity_tokens: int
    variants: list[Variant]


def run_demo(
    model: str | Path | None = None,
    *,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 48,
    out: str | Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Demo:
    """Convert a 16-bit model to INT8 and FP8, verify, and compare the three.

    Args:
        model: a local folder with ``heldout.txt`` beside the model; None: the shipped model.
        prompts: what to continue, greedily.
        max_new_tokens: for each prompt.
        out: keep the converted models in this folder, as ``int8`` and ``fp8``; None: nowhere.
        progress: told what is being done, one line at a time.

    Raises:
        ValueError: no such model, no held-out text, a model without experts, or an ``out`` that
            holds ``int8`` or ``fp8`` already.
    """
    from qmoe_convert.convert import convert

    folder = SHIPPED_MODEL if model is None else Path(model)
    if model is None and not folder.is_dir():
        raise ValueError(
            f"{folder}: the shipped model is not here; run from a clone of the repository, "
            "or name another with --model"
        )
    original = inspect_checkpoint(folder)
    if original.dense:
        raise ValueError(f"{folder}: {original.architecture} is a dense model; it has no experts")
    held_out = folder / HELD_OUT
    if not held_out.is_file():
        raise ValueError(f"{held_out}: not found; put some text there to measure perplexity on")
    text = held_out.read_text(encoding="utf-8")
    prompts = list(prompts or PROMPTS)

    variants: list[Variant] = []
    with ExitStack() as stack:
        stack.enter_context(threads_for(original.expert_bytes + original.rest_bytes))
        target = Path(out or stack.enter_context(tempfile.TemporaryDirectory(prefix="qmoe-demo-")))
        target.mkdir(parents=True, exist_ok=True)
        paths = {"16 bit": folder}
        for weights in ("int8", "fp8"):
            progress(f"converting {folder.name} to {weights.upper()} and verifying it")
            convert(folder, target / weights, weights=weights, verify=True)
            paths[weights.upper()] = target / weights
        for name, path in paths.items():
            progress(f"{name}: loading, measuring perplexity, generating")
            variant = _measure(name, path, prompts, text, max_new_tokens, variants[:1])
            kept = out is not None or path == folder
            variants.append(replace(variant, path=_shown(path) if kept else None))
    num_tokens = len(load_tokenizer(str(folder)).encode(text, add_special_tokens=False))
    return Demo(_shown(folder), prompts, WINDOW, min(num_tokens, MAX_TOKENS), variants)


def _shown(path: Path) -> str:
    """As a reader in the working directory would call it."""
    absolute = path.resolve()
    here = Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else path)


def _measure(
    name: str,
    path: Path,
    prompts: list[str],
    text: str,
    max_new_tokens: int,
    reference: list[Variant],
) -> Variant:
    checkpoint = inspect_checkpoint(path)
    model, tokenizer = load(path), load_tokenizer(str(path))
    ppl = perplexity(model, tokenizer, text, window=WINDOW, max_tokens=MAX_TOKENS)
    result = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, do_sample=False)
    assert checkpoint.bits_per_expert_weight is not None
    return Variant(
        name=name,
        path=str(path),
        disk_bytes=checkpoint.expert_bytes + checkpoint.rest_bytes,
        expert_bytes=expert_bytes(model),
        bits_per_expert_weight=checkpoint.bits_per_expert_weight,
        perplexity=ppl,
        perplexity_change=ppl / reference[0].perplexity - 1 if reference else 0.0,
        decode_tokens_per_second=result.statistics.decode_tokens_per_second,
        texts=result.texts,
    )
