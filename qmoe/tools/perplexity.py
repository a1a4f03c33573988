"""perplexity(): how well a model predicts a text, to compare a quantized one with its original."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    window: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 8,
) -> float:
    """Perplexity of a causal language model on ``text``.

    The text is tokenized once, without special tokens, and cut into windows that do not overlap;
    each token but the first of its window is predicted from those before it in the window: exp(mean
    of -log p), in fp32. A last window that is not full counts too. Windows make the figure higher
    than a sliding context would, for every model alike: compare only figures of the same window.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        text: what to predict.
        window: tokens per window, at most the model's context.
        max_tokens: use only the first so many tokens.
        batch_size: windows per forward pass.

    Raises:
        ValueError: fewer than two tokens, or a window below 2 or beyond the model's context.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window < 2 or (context is not None and window > context):
        raise ValueError(f"window={window}: must be from 2 to the model's context, {context}")
    # verbose=False: the text may be longer than the model's context, it is cut below.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; perplexity needs at least 2")
    tokens = torch.tensor(ids, device=model.device)
    whole = len(ids) // window * window
    batches = list(tokens[:whole].view(-1, window).split(batch_size)) if whole else []
    if len(ids) - whole >= 2:
        batches.append(tokens[whole:][None])
    loss, count = 0.0, 0
    for batch in batches:  # (windows, window)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        targets = batch[:, 1:]
        loss += functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten().to(logits.device), reduction="sum"
        ).item()
        count += targets.numel()
    return math.exp(loss / count)
