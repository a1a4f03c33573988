"""Layer by layer to 8 bit and back, with at most one layer's weights in memory twice.

A change that is cut off (Ctrl-C, out of memory) leaves a model that says so: nothing of it runs or
is saved until the same change has been called again, which goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from qmoe.experts.guard import guard_of
from qmoe.experts.layout import ExpertsLayout, describe, find_experts
from qmoe.experts.quantized import (
    Change,
    QuantizedExperts,
    check_replaceable,
    install,
    quantized_modules,
)
from qmoe.loading.config import give_own_config
from qmoe.loading.conversions import quantized_conversions, restored_conversions
from qmoe.loading.protection import unprotect
from qmoe_kernels.quantization import WeightFormat


def layers_to_quantize(model: nn.Module, weights: WeightFormat) -> dict[str, ExpertsLayout]:
    """All experts modules of ``model``, also those that a cut-off change has quantized already.

    Raises:
        ValueError: all are quantized, the model has no experts that qmoe supports, or the change
            was begun with another format.
        RuntimeError: restoring the experts was cut off.
    """
    modules = quantized_modules(model)
    change = cut_off_change(model)
    if modules and all(experts.change is not change for experts in modules.values()):
        raise ValueError(
            f"{type(model).__name__} is patched already; call qmoe.unpatch(model) first"
        )
    if change.what != _QUANTIZE:
        change.check_finished()
    for name, experts in modules.items():
        if experts.weights != weights:
            raise ValueError(
                f"qmoe.patch was cut off, and {name} is {experts.weights} already; go on with "
                f"weights={experts.weights!r}, or load the model again"
            )
    done = {name: experts.layout for name, experts in modules.items()}
    rest = _described(model) if done else find_experts(model)
    return {
        name: {**done, **rest}[name] for name, _ in model.named_modules() if name in done | rest
    }


def quantize_layers(
    model: PreTrainedModel,
    layouts: Mapping[str, ExpertsLayout],
    weights: WeightFormat,
    activations: str,
    change: Change,
) -> None:
    """Quantize the experts of ``layouts`` in place, or go on with it.

    Args:
        model: in 16 bit, or where ``change`` was cut off.
        layouts: its experts modules.
        weights: see :func:`qmoe.patch`.
        activations: see :func:`qmoe.patch`.
        change: finished by the caller, when the rest of the model is ready too.

    Raises:
        ValueError: experts that cannot be replaced, are offloaded, or hold NaN or infinity. Nothing
            is changed.
    """
    done = quantized_modules(model)
    rest = {name: layout for name, layout in layouts.items() if name not in done}
    for name, layout in rest.items():
        check_replaceable(model, name, layout)
        _check_values(model, name, layout)
    for experts in done.values():
        experts.activations = activations
        experts.empty_source()  # it may have been cut off before that
    for name in rest:
        experts = QuantizedExperts.quantized_from(
            model.get_submodule(name), weights, activations, name=name
        )
        experts.change = change
        install(model, name, experts)
    kept = _described(model).keys()
    model._weight_conversions = quantized_conversions(model, layouts, kept)


def restore_layers(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Put a model's own experts modules back, or go on with it; see :func:`qmoe.unpatch`."""
    with guard_of(model).changing("qmoe.unpatch"):
        modules = quantized_modules(model)
        quantizer = vars(model).get("hf_quantizer")
        cut_off = getattr(quantizer, "change", None)
        fresh = cut_off is None or cut_off.finished
        if not modules and fresh:
            raise ValueError(f"{type(model).__name__} is not patched; there is nothing to restore")
        for name, experts in modules.items():
            _check_restorable(name, experts)
        kept = _described(model)
        layouts = {name: experts.layout for name, experts in modules.items()} | kept
        caches = {experts.paged[0] for experts in modules.values() if experts.paged is not None}
        change = Change(_RESTORE)
        if quantizer is not None:
            quantizer.change = change
        for experts in modules.values():
            experts.change = change
        try:
            while modules:
                name = next(iter(modules))
                own = modules.pop(name).restore(dtype or model.dtype)
                if not modules:
                    _forget_quantization(model, layouts)
                install(model, name, own)
        except BaseException:
            if fresh and quantized_modules(model).keys() == layouts.keys() - kept.keys():
                change.finished = hasattr(model.config, "quantization_config")  # as before
            raise
        unprotect(model)
        for cache in caches:
            cache.close()
        for attribute in ("quantization_method", "hf_quantizer"):  # while it is there, call again
            vars(model).pop(attribute, None)
    return model


def cut_off_change(model: nn.Module) -> Change:
    """The change of the layers to 8 bit that was cut off, or a new one."""
    changes = (experts.change for experts in quantized_modules(model).values())
    return next((c for c in changes if c is not None and not c.finished), Change(_QUANTIZE))


_QUANTIZE, _RESTORE = "qmoe.patch", "qmoe.unpatch"


def _described(model: nn.Module) -> dict[str, ExpertsLayout]:
    """The experts modules that are in 16 bit."""
    layouts = ((name, describe(module)) for name, module in model.named_modules())
    return {name: layout for name, layout in layouts if layout is not None}


def _check_restorable(name: str, experts: QuantizedExperts) -> None:
    if name.endswith(".base_layer"):
        raise ValueError(
            f"{name.replace('.base_layer', '')} has an adapter on its experts; take it off first "
            "(model.unload() of PEFT), and put it on again afterwards"
        )
    if experts.share is not None:
        raise ValueError(
            f"{name}: this rank holds only its own experts; load the model without expert_parallel "
            "to restore all of them"
        )
    if experts.change is not None and experts.change.what != _RESTORE:
        experts.change.check_finished()
    if any(parameter.is_meta for parameter in experts.parameters()):
        raise ValueError(
            f"{name} is offloaded; load the model without offloading to restore its experts"
        )
    experts.quantized_weights()  # raises where they were lost


def _check_values(model: nn.Module, name: str, layout: ExpertsLayout) -> None:
    module = model.get_submodule(name)
    for source in (s for p in layout.projections for s in layout.sources[p]):
        weight = module.get_parameter(source)
        if weight.is_meta:
            raise ValueError(
                f"{name}.{source} is offloaded; load the model without offloading, "
                "or convert the checkpoint with convert-checkpoint"
            )
        by_expert = weight.detach()
        if layout.flat:
            by_expert = by_expert.unflatten(0, (layout.num_experts, -1))
        for expert, values in enumerate(by_expert[: layout.num_experts]):
            # Both carry NaN and infinity along; a mask would be the size of the weight.
            if not torch.stack((values.amax(), values.amin())).isfinite().all():
                raise ValueError(
                    f"{name}.{source}[{expert}] holds NaN or infinity; it cannot be quantized"
                )


def _forget_quantization(model: PreTrainedModel, layouts: Mapping[str, ExpertsLayout]) -> None:
    """Let transformers take the model for one in 16 bit."""
    give_own_config(model)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        vars(config).pop("quantization_config", None)
    vars(model).pop("qmoe_paging", None)
    model.is_quantized = False
    model._weight_conversions = restored_conversions(model, layouts)
