"""Rotary embeddings of queries and keys: ten launches, here one, with the same bits.

Attention looks the function up among its module's globals. The shadow's attention gets the same
code with globals of its own, in which that name is another function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.decoding.pieces.probe import close, draw, runs_as_its_class, try_out
from qmoe.decoding.shadow import Forward
from qmoe_kernels.rope import rotate

_NAMES = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")

Rotation = Callable[..., tuple[Tensor, Tensor]]


def find_rotary(model: Any) -> tuple[dict[nn.Module, Forward], list[tuple[Any, str]]]:
    """The attention modules of ``model`` that rotate, and what computes the same.

    Returns:
        also the globals that their code looks up, by module of Python and name.
    """
    embeddings = [m for name, m in model.named_modules() if name.endswith("rotary_emb")]
    if not embeddings:
        return {}, []
    tables = _Tables(model, embeddings[0])
    rebound: dict[Any, FunctionType | None] = {}
    forwards: dict[nn.Module, Forward] = {}
    for module in model.modules():
        kind: Any = type(module)
        if not kind.__name__.endswith("Attention") or not runs_as_its_class(module):
            continue
        if kind not in rebound:
            rebound[kind] = _rebound(kind.forward, tables)
        if (forward := rebound[kind]) is not None:
            forwards[module] = forward
    looked_up = {
        (kind.forward.__globals__["__name__"], name)
        for kind, forward in rebound.items()
        if forward is not None
        for name in kind.forward.__code__.co_names
        if name in kind.forward.__globals__
    }
    return forwards, [(sys.modules[module], name) for module, name in sorted(looked_up)]


def _rebound(forward: Any, tables: _Tables) -> FunctionType | None:
    """The same code with rotations of ours; None if it has none that are known."""
    if type(forward) is not FunctionType or hasattr(forward, "__wrapped__"):
        return None
    own_globals = forward.__globals__
    ours = {
        name: rotation
        for name in _NAMES
        if name in forward.__code__.co_names
        and (rotation := tables.rotation(own_globals.get(name), name)) is not None
    }
    if not ours:
        return None
    rebound = FunctionType(
        forward.__code__,
        {**own_globals, **ours},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    rebound.__kwdefaults__ = forward.__kwdefaults__
    return rebound


class _Tables:
    """Cosines and sines of a few positions, and what rotations make of them."""

    def __init__(self, model: Any, embedding: nn.Module) -> None:
        config = model.config.get_text_config()
        self.dtype = model.dtype
        self.cos_sin: tuple[Tensor, Tensor] | None = None
        self.sizes: set[int] = set()
        positions = torch.tensor([[1, 5, 70], [0, 2, 3]], device=model.device)
        # Of the hidden states only dtype and device count here. Tables by kind of layer, or of
        # several axes, are not known.
        with suppress(TypeError, ValueError, AttributeError):
            hidden_states = draw(2, 3, 8, dtype=model.dtype).to(model.device)
            cos, sin = (
                table.cpu() for table in try_out(embedding).forward(hidden_states, positions)
            )
            width = cos.shape[-1]
            self.cos_sin = cos, sin
            self.sizes = {width, 2 * width, getattr(config, "head_dim", None) or width}
        self._known: dict[Any, Rotation | None] = {}

    def rotation(self, original: Rotation | None, name: str) -> Rotation | None:
        """What computes the same as the model's function; None if nothing does."""
        if original is None or self.cos_sin is None:
            return None
        if original not in self._known:
            forms = [
                partial(rotate, interleaved=name.endswith("interleave"), half_angles=half_angles)
                for half_angles in (False, True)
            ]
            form = next((form for form in forms if self._alike(original, form)), None)
            self._known[original] = None if form is None else _with_way_back(original, form)
        return self._known[original]

    def _alike(self, original: Rotation, form: Rotation) -> bool:
        assert self.cos_sin is not None
        known = False
        for size in sorted(self.sizes):
            q = draw(2, 3, 4, size, dtype=self.dtype).transpose(1, 2)
            k = draw(2, 3, 2, size, dtype=self.dtype).transpose(1, 2)
            try:
                expected, found = original(q, k, *self.cos_sin), form(q, k, *self.cos_sin)
            except (RuntimeError, ValueError):  # not a size that the model has
                continue
            if not all(map(close, found, expected)):
                return False
            known = True
        return known


def _with_way_back(original: Rotation, form: Rotation) -> Rotation:
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:  # else another axis to broadcast over
            with suppress(ValueError):  # sizes that no head of the probe had
                return form(q, k, cos, sin)
        return original(q, k, cos, sin, *args, **kwargs)

    return rotary
