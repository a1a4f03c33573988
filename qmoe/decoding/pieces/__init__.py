"""The small pieces of a model that have one kernel each.

transformers writes a norm as eight launches and a router as five. In a decode step, where each
works on a few thousand numbers, launches are most of the time. A piece is found in a model by what
it is, and checked by a probe: one that does not give what the model's own gives stays as it is.
What is found goes into a shadow of the model (`qmoe.decoding.shadow`), never into the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qmoe.decoding.pieces.attention import has_attention_interface
from qmoe.decoding.pieces.linear import find_linears, find_merged_products, product_of
from qmoe.decoding.pieces.norms import find_norms
from qmoe.decoding.pieces.rotary import find_rotary
from qmoe.decoding.pieces.router import find_routers
from qmoe.decoding.shadow import Forward

# In the order in which docs/generate.md adds one to the other.
PIECES = ("attention", "norms", "rotary", "router", "qkv", "linears")


@dataclass
class Pieces:
    """What was found in a model.

    Attributes:
        attention: whether decode steps can use qmoe's attention, and need no mask.
        forwards: the model's modules and what computes the same.
        rests_on: attributes outside of the model that this rests on, by owner and name.
    """

    attention: bool
    forwards: dict[nn.Module, Forward] = field(default_factory=dict)
    rests_on: list[tuple[Any, str]] = field(default_factory=list)


@torch.no_grad()
def find_pieces(model: Any, names: Iterable[str] = PIECES) -> Pieces:
    """Find the pieces of ``model`` that have a kernel; the model is only read.

    Args:
        model: a causal language model of transformers, on one device.
        names: of `PIECES`, those that are wanted.

    Raises:
        ValueError: a name that is none of them.
    """
    names = set(names)
    if unknown := names - set(PIECES):
        raise ValueError(f"no piece {', '.join(sorted(unknown))}; there are {', '.join(PIECES)}")
    found = Pieces("attention" in names and has_attention_interface(model))
    product = product_of("linears" in names)
    if "norms" in names:
        found.forwards |= find_norms(model)
    if "rotary" in names:
        forwards, found.rests_on = find_rotary(model)
        found.forwards |= forwards
    if "router" in names:
        found.forwards |= find_routers(model, product)
    if "linears" in names:
        found.forwards |= find_linears(model)
    if "qkv" in names:  # these are linears too: the later of two counts
        found.forwards |= find_merged_products(model, product)
    return found
