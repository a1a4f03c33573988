"""What a model with 8-bit experts refuses: moves, states and adapters that would leave it wrong."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qmoe.experts.guard import guard_of
from qmoe.experts.quantized import quantized_modules
from qmoe.loading.side_by_side import lay_side_by_side


def protect(model: nn.Module) -> None:
    """Let ``model`` refuse what would leave its experts wrong. Done again, it changes nothing."""
    model.__dict__["_apply"] = GuardedApply(model)
    if _check_state not in map(_function, model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(_check_state)
    if _check_adapters not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_check_adapters)


def _refuse_saving_around(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.config, "quantization_config", None) is None:
            for name, experts in quantized_modules(self).items():
                if experts.change is not None:
                    experts.change.check_finished()
                raise ValueError(
                    f"{type(self).__name__} cannot be saved: {name} is in 8 bit, and its "
                    "configuration does not say so, since only a part of the model was patched; "
                    "call qmoe.unpatch on that part and qmoe.patch on this model"
                )
        elif GuardedApply is type(vars(self).get("_apply")) and not quantized_modules(self):
            raise ValueError(
                f"{type(self).__name__} cannot be saved: its configuration says that its experts "
                "are in 8 bit, and qmoe.unpatch has been called on a part of it, or on a model "
                "that shares it; call qmoe.patch on this model"
            )
        return save(self, *args, **kwargs)

    return save_pretrained


# A model does not know what it is a part of, so that the whole has to ask: it would write a
# checkpoint of which nobody can tell that it is quantized, and whose experts load as random ones.
PreTrainedModel.save_pretrained = _refuse_saving_around(PreTrainedModel.save_pretrained)


def unprotect(model: nn.Module) -> None:
    """Undo :func:`protect`."""
    model.__dict__.pop("_apply", None)
    for hooks in (model._load_state_dict_pre_hooks, model._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if _function(hook) in (_check_state, _check_adapters):
                del hooks[key]


def _function(hook: Any) -> Any:
    return getattr(hook, "hook", hook)  # torch wraps those that get the module


class GuardedApply:
    """Stands in a model's attributes in front of its class's ``_apply``.

    ``.to()``, ``.half()``, ``.cuda()`` and the like go through that. The reference to the model is
    weak, so that deleting the model frees its memory at once. A copy of the model, by
    ``copy.deepcopy`` or through a file, gets one of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Apply ``fn`` to every tensor of the model, or refuse before the first.

        Raises:
            RuntimeError: the model is generating text.
            ValueError: its experts are paged on another device.
        """
        model = self.model()
        assert model is not None, "called by a method of the model"
        with guard_of(model).changing(f"{type(model).__name__}.to()"):
            for experts in quantized_modules(model).values():
                experts.check_move(fn)
            type(model)._apply(model, fn, recurse)
            lay_side_by_side(model)
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardedApply:
        model = self.model()
        return GuardedApply(memo.get(id(model), model))

    def __reduce__(self) -> tuple[type[GuardedApply], tuple[nn.Module | None]]:
        return GuardedApply, (self.model(),)


def _check_state(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str, *_: Any
) -> None:
    """Refuse a state that is not this model's, before anything of it is copied."""
    with guard_of(model).changing("load_state_dict"):
        for name, experts in quantized_modules(model).items():
            experts.check_state(state_dict, f"{prefix}{name}.")
        guard_of(model).begin_loading()


def _check_adapters(model: nn.Module, *_: Any) -> None:
    """Refuse adapters (PEFT) of experts that PEFT found no weight for, and only warned of.

    What it did find is handled by `qmoe.experts.adapters`.
    """
    for adapter, config in getattr(model, "peft_config", {}).items():
        targets = getattr(config, "target_parameters", None) or ()
        for name, experts in quantized_modules(model).items() if targets else ():
            adapted = _adapted_parameters(model, name)
            own = name.replace(".base_layer", "")
            for source in (s for sources in experts.layout.sources.values() for s in sources):
                targeted = any(f".{own}.{source}".endswith(f".{target}") for target in targets)
                if targeted and source not in adapted:
                    raise ValueError(
                        f"the adapter {adapter!r} adapts {own}.{source}, which is in 8 bit and "
                        "takes no adapter; adapt other modules, or call qmoe.unpatch(model) before "
                        "adding it"
                    )


def _adapted_parameters(model: nn.Module, name: str) -> set[str]:
    """Names of the parameters that wrappers around a module adapt."""
    found = set()
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
        found.add(getattr(model.get_submodule(name), "parameter_name", ""))
    return found
