"""PEFT's adapters of experts' weights, on experts in 8 bit.

PEFT wraps a module in a `ParamWrapper` for each of its parameters that is adapted, and lets the
module compute with a weight to which the adapter's product has been added: a tensor of the size of
all experts. Experts in 8 bit have no such weight. Those wrappers become the class here as soon as
they are put around 8-bit experts: the same modules with the same parameters, which hand their
factors on instead.

This file needs PEFT, and is imported only when one of its wrappers is met.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import torch
from peft.tuners.lora import layer

from qmoe.experts.low_rank import LowRank
from qmoe.experts.quantized import QuantizedExperts


# PEFT asks for the name of the class, too.
class ParamWrapper(layer.ParamWrapper):
    """PEFT's wrapper of one parameter, around experts in 8 bit."""

    @staticmethod
    def check(experts: QuantizedExperts, parameter_name: str) -> None:
        """Raise ValueError if adapters of this parameter cannot run."""
        if not hasattr(layer.ParamWrapper, "get_delta_factors"):
            raise ValueError(
                f"PEFT {peft.__version__} keeps adapters of experts in another way; install 0.21.2 "
                "or newer"
            )
        if experts.share is not None:
            raise ValueError(
                f"an adapter on {parameter_name}: experts that are spread over ranks take none; "
                "load the model without expert_parallel"
            )
        if parameter_name not in experts.adaptable:
            raise ValueError(
                f"an adapter on {parameter_name}: of experts in 8 bit, "
                f"{' and '.join(experts.adaptable) or 'no parameters of these'} can be adapted"
            )

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Call what is inside with the factors of the active adapters, if it is in 8 bit."""
        experts = self.get_base_layer()
        if not isinstance(experts, QuantizedExperts):
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        if not self.disable_adapters:
            own = tuple(self._low_ranks(experts))
            kwargs["adapters"] = (*kwargs.get("adapters", ()), *own)
        return self.base_layer(x, *args, **kwargs)

    def _low_ranks(self, experts: QuantizedExperts) -> Iterator[LowRank]:
        """What the active adapters add to this parameter."""
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            first = a.view(self.num_experts, -1, a.shape[1])  # (experts, rank, in)
            last = b.view(len(b), -1, self.num_experts).permute(2, 0, 1)  # (experts, out, rank)
            if not self._did_swap_in_out_features:  # PEFT's "in" is the first dimension here
                first, last = last.transpose(1, 2), first.transpose(1, 2)
            out_factor, in_factor = experts.layout.canonical_factors(
                self.parameter_name, last, first
            )
            yield LowRank(self.parameter_name, in_factor, out_factor, self.scaling[adapter])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse, where the experts are in 8 bit and one of these adapters is theirs.

        Raises:
            ValueError: they are.
        """
        self._refuse_merging(
            adapter_names,
            "unmerge_adapter() takes out what PEFT has merged before it met the experts",
        )
        super().merge(safe_merge, adapter_names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> torch.nn.Module:
        """Refuse as `merge` does; adapters of modules before this one are off by then.

        Raises:
            ValueError: as `merge`.
        """
        inside: Any = self if merge else None
        while isinstance(inside, ParamWrapper):
            inside._refuse_merging(
                adapter_names,
                "load this model again before you use it: PEFT has merged adapters of the modules "
                "before and taken them off, and the adapter would be saved without these",
            )
            inside = inside.base_layer
        return super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)

    def _refuse_merging(self, adapter_names: list[str] | None, remedy: str) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        own = any(name in self.lora_A for name in names)
        if own and isinstance(self.get_base_layer(), QuantizedExperts):
            raise ValueError(
                f"{self.parameter_name} is in 8 bit and takes no adapter in; call "
                f"qmoe.merge(checkpoint, adapter, output) with a saved adapter, which writes a "
                f"merged checkpoint; {remedy}"
            )
