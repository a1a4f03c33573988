"""Which tensors kernels are given: with memory of their own, and copied in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from random_layer import DEVICE, Layer, random_layer
from test_grouped_gemm import ALL_PATHS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from qmoe_kernels import attention, rope
from qmoe_kernels.launching import COMPILED
from qmoe_kernels.linear import linear
from qmoe_kernels.norm import rms_norm
from qmoe_kernels.quantization import quantize
from qmoe_kernels.rope import rotate
from qmoe_kernels.router import RouterSpec, select_experts
from qmoe_kernels.tensors import is_plain
from qmoe_kernels.tiles import LayerTiles


class Wrapped(Tensor):
    """Says that it is a tensor and has no memory, as quantized weights do; unwraps for torch."""

    @staticmethod
    def __new__(cls, inner: Tensor, device: str | None = None) -> Wrapped:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=device or DEVICE
        )

    def __init__(self, inner: Tensor, device: str | None = None) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Wrapped, lambda x: x.inner, (args, kwargs or {}))
        return function(*args, **kwargs)


def on_a_gpu(x: Tensor) -> Tensor:
    return Wrapped(x, "cuda")


def same(x: Tensor) -> Tensor:
    return x


def test_plain_tensors() -> None:
    x = torch.zeros(2)
    assert is_plain(x, None, nn.Parameter(x), x[:1])
    assert not is_plain(x, Wrapped(x))


Wrap = Callable[[Tensor], Tensor]


def calls(w: Wrap, a: Wrap) -> dict[str, Callable[[], Tensor]]:
    """A call of each function that reads a model's own tensors: those as ``w``, all else ``a``."""
    x, heads, cache, column = (
        t.to(DEVICE)
        for t in (
            torch.ones(1, 16, dtype=torch.float16),
            torch.ones(1, 2, 1, 16),
            torch.ones(1, 8, 2, 16),
            torch.zeros(1, dtype=torch.int32),
        )
    )
    weight, bias = x.expand(32, 16).contiguous(), x[0, :1].expand(32).contiguous()
    query, angles, sinks = heads[:, :, 0], heads[:, 0], heads[0, :, 0, 0]

    def store() -> Tensor:
        keys = torch.zeros_like(cache)
        attention.store_kv(w(heads), a(heads), a(keys), a(torch.zeros_like(cache)), a(column))
        return keys

    return {
        "linear": lambda: linear(a(x), w(weight), None),
        "bias": lambda: linear(a(x), a(weight), w(bias)),
        "norm": lambda: rms_norm(a(x), w(x[0]), 1e-5),
        "rope": lambda: rotate(a(heads), a(heads), w(angles), a(angles))[0],
        "attention": lambda: attention.decode_attention(
            a(query), a(cache), a(cache), a(column), a(column + 3), scale=1.0, sinks=w(sinks)
        ),
        "store": store,
        "router": lambda: select_experts(a(x.float()), RouterSpec(2), w(x[0].float()))[1],
    }


FUNCTIONS = list(calls(same, same))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wrapped_tensor_counts_as_what_it_stands_for(name: str) -> None:
    expected = calls(same, same)[name]()
    torch.testing.assert_close(calls(Wrapped, same)[name](), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("name", ["linear", "bias", "norm", "rope", "attention"])
def test_what_only_says_that_it_is_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = calls(same, same)[name]()
    # Which would ask for the device.
    monkeypatch.setattr(attention, "decode_attention_reference", lambda *_: expected)
    monkeypatch.setattr(rope, "_rotate", lambda *_: expected)
    assert torch.equal(calls(on_a_gpu, on_a_gpu)[name](), expected)


# ---- strides -----------------------------------------------------------------------------------

SMALL = [
    "expert_to_slot",
    "gate_up_proj_scale",
    "gate_up_proj_bias",
    "down_proj_scale",
    "down_proj_bias",
    "topk_ids",
    "topk_weights",
]


def with_slots(**sizes: Any) -> Layer:
    layer = random_layer(bias=True, dtype=torch.float16, **sizes).to(DEVICE)
    slots = torch.tensor([3, 0, 5, 1, 4, 2])
    place = slots.argsort().to(DEVICE)
    layer.gate_up_proj, layer.down_proj = layer.gate_up_proj[place], layer.down_proj[place]
    layer.expert_to_slot = slots.to(DEVICE, torch.int32)
    return layer


def spread(tensor: Tensor) -> Tensor:
    """Return the same numbers with others in between."""
    apart = torch.stack((tensor, torch.full_like(tensor, 5)), -1)[..., 0]
    assert not apart.is_contiguous() and torch.equal(apart, tensor)
    return apart


@ALL_PATHS
@pytest.mark.parametrize("name", SMALL)
def test_small_tensors_may_have_strides(name: str, tiles: LayerTiles) -> None:
    layer = with_slots(num_tokens=5)
    expected = layer.triton(tiles=tiles)
    setattr(layer, name, spread(getattr(layer, name)))
    assert torch.equal(layer.triton(tiles=tiles), expected)
    assert torch.equal(layer.fused_moe(activations="bf16"), with_slots(num_tokens=5).fused_moe())


class Events(TorchDispatchMode):
    """What was copied and what was launched, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.launching = False
        owner, name = triton.JITFunction, "run"
        if not COMPILED:
            owner, name = triton.runtime.interpreter.GridExecutor, "__call__"
        launch = getattr(owner, name)

        def launched(kernel: Any, *args: Any, **options: Any) -> Any:
            self.seen.append("kernel")
            self.launching = True
            try:
                return launch(kernel, *args, **options)
            finally:
                self.launching = False

        monkeypatch.setattr(owner, name, launched)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if not self.launching and function.overloadpacket._qualified_op_name in (
            "aten::clone",
            "aten::copy_",
            "aten::_to_copy",
        ):
            self.seen.append("copy")
        return function(*args, **(kwargs or {}))


@ALL_PATHS
def test_copies_come_before_kernels(tiles: LayerTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that starts early does not wait for a copy of what it reads then."""
    layer = with_slots(num_tokens=2)
    for name in [*SMALL, "hidden_states"]:
        setattr(layer, name, spread(getattr(layer, name)))
    with Events(monkeypatch) as events:
        layer.triton(tiles=tiles)
    first = events.seen.index("kernel")
    assert events.seen[:first].count("copy") >= len(SMALL) + 1
    assert set(events.seen[first:]) == {"kernel"}


def test_attention_waits_for_copies_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    early: list[bool] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: early.append(options["EARLY"])

    monkeypatch.setattr(attention, "decode_attention_kernel", Kernel())
    query, cache = torch.zeros(2, 2, 16), torch.zeros(2, 8, 2, 16)
    start, end = torch.tensor([0, 1]), torch.tensor([3, 4])
    for columns in ((start, end), (spread(start), end), (start, spread(end))):
        attention.launch_decode_attention(query, cache, cache, *columns, 1.0, early=True)
    assert early == [True, False, False]


def test_inference_mode_leaves_nothing_behind() -> None:
    weight = torch.randn(4, 4096)
    with torch.inference_mode():
        expected = quantize(torch.cat([weight] * 8), "int8")  # the most scratch so far
    found = quantize(torch.cat([weight] * 8), "int8")
    assert all(map(torch.equal, found, expected))
