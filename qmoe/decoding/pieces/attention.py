"""Attention of one new token over the columns that a cache has filled, without a mask."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from qmoe.decoding.kv_cache import Columns
from qmoe_kernels.attention import decode_attention

# The name of qmoe's attention among transformers' implementations.
IMPLEMENTATION = "qmoe"
# Of the step that runs; transformers hands attention no more than keys and values.
running_columns: ContextVar[Columns] = ContextVar("running_columns")


class UnknownAttention(NotImplementedError):
    """A model's attention is more than qmoe's computes."""


def has_attention_interface(model: Any) -> bool:
    """Return whether the model's attention can be any function of transformers' interface."""
    config = model.config.get_text_config()
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        # Chunks are known to masks only.
        and getattr(config, "attention_chunk_size", None) is None
    )


def _attention(
    module: nn.Module,
    query: Tensor,  # (rows, num_heads, 1, head_dim)
    key: Tensor,  # (rows, num_kv_heads, length, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One new token's attention over the columns that the running step has filled."""
    # Switches and sizes are for masks and outputs; a tensor or a factor would change the result.
    others = {k: v for k, v in others.items() if k not in ("position_ids", "dropout")}
    meant = [k for k, v in others.items() if isinstance(v, Tensor | float)]
    if meant or attention_mask is not None:
        raise UnknownAttention(
            f"{type(module).__name__} calls attention with {', '.join(meant) or 'a mask'}"
        )
    columns = running_columns.get()
    layer = getattr(module, "layer_idx", None)
    window = None if layer is None else columns.windows[layer]
    if window != (None if sliding_window is None else min(sliding_window, columns.length)):
        raise UnknownAttention(
            f"{type(module).__name__} calls attention with a window of {sliding_window}, and its "
            f"mask has one of {window}"
        )
    output = decode_attention(
        query[:, :, 0],
        key.transpose(1, 2),
        value.transpose(1, 2),
        columns.start,
        columns.end,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        sinks=s_aux,
        softcap=softcap,
        early=True,  # start and end are written between steps only
    )
    return output[:, None], None  # (rows, 1, num_heads, value_dim)


# transformers makes no masks for an implementation that has no function for them.
AttentionInterface.register(IMPLEMENTATION, _attention)
