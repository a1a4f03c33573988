"""Draws from a seed that belong to one call: torch's own random state is neither used nor set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qmoe.thread_state import function_modes

# The functions of torch that draw and can be told from what. transformers' loops call multinomial;
# the others are here for models that draw in their forward.
_DRAWING: frozenset[Callable[..., Any]] = frozenset(
    (
        *(torch.multinomial, torch.bernoulli, torch.normal),
        *(torch.rand, torch.randn, torch.randint, torch.randperm),
        *(Tensor.multinomial, Tensor.bernoulli, Tensor.bernoulli_, Tensor.uniform_),
        *(Tensor.normal_, Tensor.exponential_, Tensor.random_, Tensor.geometric_),
        *(Tensor.cauchy_, Tensor.log_normal_),
    )
)


class Draws(TorchFunctionMode):
    """While it is entered, what its thread draws comes from generators of its own.

    They are seeded as ``torch.manual_seed`` seeds torch's, so the numbers are the same.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._paused = False

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of a device."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let somebody else's code draw from torch's own generators."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __exit__(self, *exception: Any) -> None:
        # First: an interrupt in the lines below would leave this on torch's stack.
        self._paused = True
        # An interrupt inside torch's own handling of modes may have taken it off already.
        if function_modes()[-1:] == [self]:
            super().__exit__(*exception)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWING and not self._paused and kwargs.get("generator") is None:
            tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            device = next((tensor.device for tensor in tensors), kwargs.get("device"))
            device = torch.device(device or torch.get_default_device())
            kwargs = {**kwargs, "generator": self.generator(device)}
        return func(*args, **kwargs)


def check_seed(seed: int) -> None:
    """Refuse what torch does not take for a seed.

    Raises:
        ValueError: no whole number, or one of more than 64 bits.
    """
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed!r}: must be a whole number of at most 64 bits, such as 0")


def refuse_dropout(model: nn.Module, seed: int) -> None:
    """Refuse a seed where dropout would draw from torch's own random state.

    Raises:
        ValueError: some of the model is in training mode and drops.
    """
    if any(module.training and _drops(module) for module in model.modules()):
        raise ValueError(
            f"seed={seed}: the model is in training mode and its dropout knows no seed; "
            "call model.eval() first"
        )


def _drops(module: Any) -> bool:
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    rate = module.p if is_dropout else getattr(module, "attention_dropout", None)
    return isinstance(rate, float) and rate > 0
