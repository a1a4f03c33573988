"""Poisoned memory and the device that Triton kernels run on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

try:
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:  # a CPU needs no Triton
    interpreter = None

if interpreter is not None and hasattr(interpreter, "_patch_lang_tensor"):
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        """Let the interpreter of Triton 3.6 loop to a bound that is loaded, with numpy 2.4."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index

if interpreter is not None:
    convert_float = interpreter._convert_float

    def convert_float_by_torch(data: Any, dtype: Any, to: Any, rounding: Any) -> Any:
        """Round to FP8 as GPUs do: the interpreter loses what a mantissa carries over."""
        if dtype == tl.float32 and to == tl.float8e4nv:
            return torch.from_numpy(data).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert_float(data, dtype, to, rounding)

    interpreter._convert_float = convert_float_by_torch


if interpreter is not None and hasattr(interpreter, "_patch_attr"):

    @cache
    def names_of_builtins(lang: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(lang) if tl.core.is_builtin(member)]

    def patch_builtins(lang: Any, builder: Any, scope: Any) -> None:
        """Look at these names alone: at every call of a function, half of the time went there."""
        for name in names_of_builtins(lang):
            if tl.core.is_builtin(member := getattr(lang, name)):
                interpreter._patch_attr(lang, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtins


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN: an output that nobody wrote is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
