"""A layer of examples/tiny-moe with what it is asked for text: trained, not random."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from random_layer import Layer

FOLDER = Path(__file__).parents[2] / "examples" / "tiny-moe"


@functools.cache
def trained_layer(num_tokens: int, index: int = 3) -> Layer:
    """Return the experts' arguments in the middle of the model, weights not quantized, in fp32.

    Args:
        num_tokens: of the held-out text; the last of them are taken.
        index: of the layer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    text = (FOLDER / "heldout.txt").read_text(encoding="utf-8")[: 16 * (num_tokens + 16)]
    ids = AutoTokenizer.from_pretrained(FOLDER)(text, return_tensors="pt").input_ids
    calls: list[tuple[torch.Tensor, ...]] = []
    experts = model.model.layers[index].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        model(ids[:, : num_tokens + 16])
    hidden_states, topk_ids, topk_weights = (t[-num_tokens:].contiguous() for t in calls[0])
    return Layer(
        hidden_states,
        experts.gate_up_proj.detach(),
        None,
        experts.down_proj.detach(),
        None,
        topk_ids,
        topk_weights,
    )
