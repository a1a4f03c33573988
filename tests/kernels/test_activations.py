from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from random_layer import DEVICE

from qmoe_kernels import Activation
from qmoe_kernels.activations import apply, apply_triton

ACTIVATIONS = [
    Activation(),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("relu"),
    Activation("relu2"),
    Activation("silu", gated=False),
    Activation("gelu", gated=False),
    Activation("gelu_tanh", gated=False),
    Activation("relu", gated=False),
    Activation("relu2", gated=False),  # Nemotron-H
    Activation(limit=2.0),  # GLM 5, DeepSeek V4
    Activation(alpha=1.702, up_shift=1.0, limit=2.0),  # gpt-oss
    Activation(limit=1.0, limit_after=True),  # Step 3.7
    Activation(gate_softcap=3.0, up_softcap=2.0),  # Inkling 2
    Activation("gelu", limit=1.5, up_softcap=2.0),
]


def one_by_one(a: Activation, gate: float, up: float) -> float:
    """The formula of the module's docstring on two numbers."""
    if not a.gated:
        up, gate = 1.0, up
    if a.limit is not None:
        up = max(-a.limit, min(up, a.limit))
        gate = gate if a.limit_after else min(gate, a.limit)
    linear = gate if a.gate_softcap is None else a.gate_softcap * math.tanh(gate / a.gate_softcap)
    out = {
        "silu": lambda: linear / (1 + math.exp(-a.alpha * gate)),
        "gelu": lambda: gate * (1 + math.erf(gate / math.sqrt(2))) / 2,
        "gelu_tanh": lambda: (
            gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2
        ),
        "relu": lambda: max(gate, 0.0),
        "relu2": lambda: max(gate, 0.0) ** 2,
    }[a.name]()
    if a.limit_after:
        out = min(out, a.limit)
    if a.up_softcap is not None:
        up = a.up_softcap * math.tanh(up / a.up_softcap)
    return out * (up + a.up_shift)


def grid(a: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, 2 or 1) inputs across the interesting range, and what should come out."""
    gate, up = torch.meshgrid(torch.linspace(-9, 9, 25), torch.linspace(-5, 5, 11), indexing="ij")
    gate, up = gate.flatten(), up.flatten()
    expected = torch.tensor(
        [one_by_one(a, g, u) for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
    )
    return (torch.stack([gate, up], 1) if a.gated else up[:, None]), expected[:, None]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_torch_follows_the_formula(activation: Activation) -> None:
    gate_up, expected = grid(activation)
    torch.testing.assert_close(apply(activation, gate_up), expected, rtol=1e-5, atol=1e-5)


@triton.jit
def apply_kernel(
    gate_up_ptr,  # (num_rows, 2 or 1)
    out_ptr,  # (num_rows,)
    num_rows,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.arange(0, BLOCK)
    columns: tl.constexpr = 2 if ACTIVATION.gated else 1
    gate = tl.load(gate_up_ptr + rows * columns, mask=rows < num_rows, other=0.0)
    up = tl.load(gate_up_ptr + rows * columns + columns - 1, mask=rows < num_rows, other=0.0)
    tl.store(out_ptr + rows, apply_triton(gate, up, ACTIVATION), mask=rows < num_rows)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_triton_follows_the_formula(activation: Activation) -> None:
    gate_up, expected = grid(activation)
    gate_up = torch.cat([gate_up, torch.full_like(gate_up[:1], math.nan)]).to(DEVICE)
    out = torch.empty(len(gate_up), device=DEVICE)
    apply_kernel[(1,)](
        gate_up,
        out,
        len(gate_up),
        ACTIVATION=activation,
        BLOCK=triton.next_power_of_2(len(gate_up)),
    )
    torch.testing.assert_close(out[:-1].cpu(), expected[:, 0], rtol=1e-5, atol=1e-5)
    assert out[-1].isnan(), "a NaN must not be clamped away"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keeps_shape_and_dtype(dtype: torch.dtype) -> None:
    assert apply(Activation(), torch.randn(2, 3, 8).to(dtype)).dtype == dtype
    assert apply(Activation(), torch.randn(2, 3, 8)).shape == (2, 3, 4)
    assert apply(Activation("relu2", gated=False), torch.randn(2, 3, 8)).shape == (2, 3, 8)


def test_computes_in_fp32() -> None:
    gate_up = torch.randn(100, 8).bfloat16()
    expected = apply(Activation(), gate_up.float()).bfloat16()
    assert torch.equal(apply(Activation(), gate_up), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "swish"}, "unknown activation 'swish'"),
        ({"name": "gelu", "alpha": 1.7}, "belong to silu"),
        ({"gated": False, "limit": 7.0}, "need a gate"),
        ({"gated": False, "up_shift": 1.0}, "need a gate"),
        ({"limit": -1.0}, "a limit is at least 0"),
        ({"limit": math.nan}, "a limit is at least 0"),
        ({"gate_softcap": 0.0}, "a softcap positive and finite"),
        ({"gate_softcap": math.nan}, "a softcap positive and finite"),
        ({"up_softcap": 0.0}, "a softcap positive and finite"),
        ({"up_softcap": math.nan}, "a softcap positive and finite"),
        ({"up_softcap": math.inf}, "a softcap positive and finite"),
    ],
)
def test_meaningless_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Activation(**fields)


def test_equal_and_hashable() -> None:
    assert Activation(limit=7.0) == Activation(limit=7.0) != Activation()
    assert len({Activation(), Activation(), Activation("relu")}) == 2
