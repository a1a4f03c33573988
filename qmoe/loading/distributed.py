"""Experts spread over ranks by ``from_pretrained(..., distributed_config=...)``.

transformers prepares the ranks, makes the model and lets our quantizer at it. Then it would split
modules and parameters, which knows no 8-bit experts: here it finds nothing to split.
"""

from __future__ import annotations

import os
import weakref
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from qmoe.loading.spread import meet, say_held

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from qmoe.parallel.group import RankGroup

_CALL = "from_pretrained"
# What transformers writes into a model that it distributes, and what tells it how.
_TRACES = (
    "_device_mesh",
    "_ep_plan",
    "_fsdp_size",
    "_is_distributed_loading_by_transformers",
    "_mesh_manager",
    "_resolve_parallel_plans",
    "_tp_plan",
    "_tp_size",
)


def asks_for_ranks(config: PreTrainedConfig) -> bool:
    """Whether a model is to be loaded with its experts spread over all ranks.

    Args:
        config: as ``from_pretrained`` has it once it has read its arguments.

    Raises:
        ValueError: it is to be distributed otherwise, or each of several ranks is to have all.
    """
    asked = getattr(config, "distributed_config", None)
    if not isinstance(asked, DistributedConfig):
        return False
    num_ranks = _num_ranks()
    if hasattr(asked, "ep_size"):  # from transformers 5.19 on
        how = f"tp_size={num_ranks}, ep_size={num_ranks}, tp_plan={{}}"
        works: dict[str, tuple[Any, ...]] = {
            "ep_size": (num_ranks,),
            "tp_plan": ({},),  # else the rest of the model is to be split too
            "enable_expert_parallel": (False, True),  # says again what ep_size says
            "ep_implementation": ("auto", "all_reduce"),
        }
    else:
        how = f"tp_size={num_ranks}, enable_expert_parallel=True"
        works = {"enable_expert_parallel": (True,), "tp_plan": (None, "auto", {})}
    works["tp_size"] = (num_ranks,)
    other = [
        f"{name}={value!r}"
        for name, value in vars(asked).items()
        if (value not in works[name] if name in works else not _is_unset(name, value))
    ]
    if not other:
        return num_ranks > 1
    if num_ranks == 1 and all(_is_unset(name, value) for name, value in vars(asked).items()):
        return False
    raise ValueError(
        f"distributed_config with {', '.join(other)}: of a model with 8-bit experts, these are "
        f"spread over all ranks and the rest is whole on each; ask for that with "
        f"DistributedConfig({how}), or call qmoe.load(path, expert_parallel=True)"
    )


def _num_ranks() -> int:
    """How many processes there are; transformers has not started a group if nothing is to do."""
    if dist.is_initialized():
        return dist.get_world_size()
    with suppress(ValueError):
        return int(os.environ.get("WORLD_SIZE", "1"))
    return 1


def _is_unset(name: str, value: Any) -> bool:
    return not value or value == "auto" or (name.endswith("_size") and value == 1)


class SpreadLoad:
    """A call of ``from_pretrained`` that all ranks make together, as long as our hooks see it.

    It begins before files are looked for, since that may take some ranks much longer than others.
    Where it ends early on one rank, the others are told: at once by our hooks; elsewhere when
    nobody holds the quantizer any more, be it in an exception, or when the process ends.
    """

    def __init__(self, group: RankGroup, quantizer: Any) -> None:
        """Begin.

        Args:
            group: the ranks; new.
            quantizer: lives as long as the call does.
        """
        self.group = group
        self._call = group.together(_CALL)
        self._call.__enter__()
        self._when_left = weakref.finalize(quantizer, _leave, self._call)
        self._before: dict[str, Any] = {}

    def leave_nothing_to_split(self, model: PreTrainedModel) -> None:
        """Give a model on the meta device plans that name none of its modules."""
        own = vars(model)
        self._before = {name: own[name] for name in _TRACES if name in own}
        own["_tp_plan"] = {}
        # Before 5.23 there must be a rule. This one's style is known, but no module is called so.
        own["_ep_plan"] = {"nothing that is in a model": "colwise"}
        own["_resolve_parallel_plans"] = _no_plans  # from 5.23 on

    @contextmanager
    def hook(self) -> Iterator[None]:
        """Run one of our hooks; the other ranks are told of its failure."""
        try:
            yield
        except BaseException as error:
            self._when_left.detach()
            if not self._call.__exit__(type(error), error, error.__traceback__):
                raise

    def finish(self, model: PreTrainedModel) -> None:
        """End: every rank has loaded the same.

        Raises:
            ValueError: transformers has split the model.
            RankFailed: another rank failed or has loaded something else.
        """
        self._forget_traces(model)
        heard = meet(model, self.group, _CALL)
        self._when_left.detach()
        self._call.__exit__(None, None, None)
        say_held(self.group, heard)

    def _forget_traces(self, model: PreTrainedModel) -> None:
        for name in _TRACES:
            vars(model).pop(name, None)
        vars(model).update(self._before)
        vars(model.config).pop("distributed_config", None)
        for module in model.modules():
            vars(module).pop("_is_hooked", None)
        _check_whole(model)


def _leave(call: AbstractContextManager[None]) -> None:
    error = RuntimeError("loading ended early; this rank's own message says why")
    call.__exit__(type(error), error, None)


def _no_plans(config: DistributedConfig) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    return {}, {}, {}


def _check_whole(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"distributed_config: this version of transformers has split {name}; call "
                "qmoe.load(path, expert_parallel=True)"
            )
