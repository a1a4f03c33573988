"""Loading on every rank at once: all load the same, and one that cannot ends all."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import transformers
from torch import nn

from qmoe.experts.quantized import group_of, quantized_modules
from qmoe.parallel.failure import RankFailed
from qmoe.parallel.group import RankGroup


def load_spread(group: RankGroup, load: Callable[[], Any]) -> Any:
    """Load a model whose experts are spread over the ranks of ``group``.

    Args:
        group: of the model.
        load: reads what is this rank's.

    Returns:
        the model, once every rank has its own.

    Raises:
        RankFailed: another rank failed, has loaded something else, or computes differently.
    """
    with group.together("qmoe.load"):
        model = load()
        heard = meet(model, group, "qmoe.load")
    say_held(group, heard)
    return model


def meet(model: nn.Module, group: RankGroup, call: str) -> list[dict[str, Any]]:
    """Wait until every rank has loaded, and make the model one of all ranks.

    Args:
        model: whose experts are this rank's.
        group: of the model; in a call together.
        call: that all ranks make.

    Returns:
        what each rank says of itself, for `say_held`.

    Raises:
        RankFailed: another rank failed, has loaded something else, or computes differently.
    """
    held = [e.layout.num_experts for e in quantized_modules(model).values()]
    heard = group.wait(
        call, model=_looks(model, group), place=_place(group), held=held, layers=len(held)
    )
    _check_same(heard)
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_after_forward, always_call=True)
    return heard


def say_held(group: RankGroup, heard: list[dict[str, Any]]) -> None:
    """Let rank 0 say how many experts each rank holds."""
    if group.rank == 0:
        print(f"qmoe: {_held(heard)}", file=sys.stderr, flush=True)


def _held(heard: list[dict[str, Any]]) -> str:
    """What each rank holds, in a line."""
    held, layers = [other["held"] for other in heard], heard[0]["layers"]
    counts = ", ".join(" or ".join(map(str, sorted(set(of_rank)))) for of_rank in held)
    whole = " or ".join(map(str, sorted({sum(layer) for layer in zip(*held, strict=True)})))
    ranks = "1 rank holds" if len(heard) == 1 else f"{len(heard)} ranks hold"
    return f"{ranks} {counts} of {whole} experts in each of {layers} layers"


def _looks(model: Any, group: RankGroup) -> dict[str, str]:
    """What must be the same on every rank, so that equal inputs give equal outputs."""
    experts = list(quantized_modules(model).values())
    paging = getattr(model, "qmoe_paging", None)
    budget = () if paging is None else (paging.budget.context, paging.budget.batch_size)
    device = group.device
    name = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "model": f"{type(model).__name__} of {sum(p.numel() for p in _shared(model))} parameters",
        "experts": str([(e.num_experts, e.weights, e.activations) for e in experts]),
        "dtype": str(model.dtype),
        "context and batch_size": str(budget),
        "device": f"{device.type} ({name})",
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
    }


def sizes_of_shared(model: nn.Module) -> dict[str, int]:
    """How many numbers of each dtype are whole on every rank: the same on all of them."""
    sizes: Counter[str] = Counter()
    for parameter in _shared(model):
        sizes[str(parameter.dtype)] += parameter.numel()
    return dict(sizes)


def _shared(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that are whole on every rank."""
    own = {id(p) for e in quantized_modules(model).values() for p in e.parameters()}
    return [p for p in model.parameters() if id(p) not in own]


def _place(group: RankGroup) -> list[str]:
    return [] if group.device.type == "cpu" else [platform.node(), str(group.device)]


def _check_same(heard: list[dict[str, Any]]) -> None:
    first = heard[0]["model"]
    for rank, other in enumerate(heard):
        for what, value in other["model"].items():
            if value != first[what]:
                raise RankFailed(
                    f"the ranks differ in {what}: rank 0 has {first[what]}, rank {rank} has "
                    f"{value}; load the same on every rank",
                    (rank,),
                )
    places = [tuple(other["place"]) for other in heard if other["place"]]
    for rank, place in enumerate(places):
        if places.index(place) != rank:
            raise RankFailed(
                f"ranks {places.index(place)} and {rank} are both on {place[1]} of {place[0]}; "
                "leave device out, so that each rank gets a GPU of its own",
                (rank,),
            )


def _before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Begin a round, or refuse a pass that is not the same on every rank.

    The sums of different passes would be of nothing. qmoe.generate has compared its own.
    """
    group = group_of(model)
    if group is None:
        return
    group.check_inside("model(...)")
    given = {**dict(zip(signature(model.forward).parameters, args, strict=False)), **kwargs}
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    if group.own_texts is not None:
        rows = tensors["input_ids" if "input_ids" in tensors else "inputs_embeds"]
        group.own_texts.begin(rows.shape[:2].numel())
    if group.in_call:
        return
    group.begin_pass()
    group.compare("a forward pass", tensors)


def _after_forward(model: nn.Module, *_: Any) -> None:
    if (group := group_of(model)) is not None:
        group.end_pass()
