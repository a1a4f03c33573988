"""The public operators: plain torch on a CPU, Triton on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, no_synchronization
from random_layer import (
    Layer,
    assert_close,
    assert_close_quantized,
    random_layer,
    relative_error,
    skip_without_fp8,
)
from trained_layer import trained_layer

import qmoe_kernels
from qmoe_kernels import (
    Activation,
    QuantizedRows,
    cpu,
    fused_moe,
    grouped_linear,
    quantize_activations,
    weighted_sum,
)
from qmoe_kernels.activations import apply
from qmoe_kernels.fused_moe import EIGHT_BIT_ROWS, check_activations
from qmoe_kernels.reference import grouped_linear_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WEIGHTS = ["int8", "fp8", None]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
MODES = [
    ("int8", "bf16"),
    ("int8", "int8"),
    ("fp8", "bf16"),
    ("fp8", "fp8"),
    (None, "bf16"),
]


def swiglu(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("bias", [False, True])
def test_formats(weights: str | None, dtype: torch.dtype, bias: bool, device: str) -> None:
    layer = random_layer(num_tokens=40, weights=weights, dtype=dtype, bias=bias).to(device)
    out = layer.fused_moe()
    assert out.dtype == dtype and out.device.type == device
    assert_close(out, layer.reference())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case",
    [
        {"num_tokens": 1, "num_experts": 1, "top_k": 1},
        {"num_tokens": 0},
        {"num_tokens": 2, "num_experts": 512, "top_k": 10, "hidden_size": 16},
        {"num_tokens": 50, "num_experts": 5, "top_k": 5},
        {"hidden_size": 2880, "intermediate_size": 24},
        {"hidden_size": 24, "intermediate_size": 704},
        {"hidden_size": 1, "intermediate_size": 1},
    ],
    ids=str,
)
def test_sizes(case: dict[str, int], device: str) -> None:
    layer = random_layer(dtype=torch.bfloat16, **case).to(device)
    assert_close(layer.fused_moe(), layer.reference())


@pytest.mark.parametrize("device", DEVICES)
def test_all_tokens_on_one_expert(device: str) -> None:
    layer = random_layer(num_tokens=50, top_k=1).to(device)
    layer.topk_ids.fill_(4)
    assert_close(layer.fused_moe(), layer.reference())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "activation",
    [Activation("relu2", gated=False), Activation(alpha=1.702, up_shift=1.0, limit=0.5)],
    ids=repr,
)
def test_activation(activation: Activation, device: str) -> None:
    layer = random_layer(activation=activation, bias=True).to(device)
    assert_close(layer.fused_moe(), layer.reference())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_callable_between_the_products(dtype: torch.dtype, device: str) -> None:
    layer = random_layer(activation=swiglu, bias=True, dtype=dtype).to(device)
    layer.topk_ids[0] = 6
    assert_close(layer.fused_moe(), layer.reference())
    assert_close(layer.fused_moe(), replace(layer, activation=Activation()).reference())
    wrong = replace(layer, activation=lambda rows: rows)
    with pytest.raises(ValueError, match="returned rows of 48; down_proj takes 24"):
        wrong.fused_moe()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unreduced_rows(dtype: torch.dtype, device: str) -> None:
    layer = random_layer(dtype=dtype).to(device)
    layer.topk_ids[1] = torch.tensor([-1, 6])
    layer.topk_ids[2, 0] = 1 << 30
    unreduced = replace(layer, topk_weights=None)
    rows = unreduced.fused_moe()
    assert_close(rows, unreduced.reference())
    assert rows[1].eq(0).all() and rows[2, 0].eq(0).all()
    assert torch.equal(weighted_sum(rows, layer.topk_weights), layer.fused_moe())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", [Activation(), swiglu], ids=["known", "callable"])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_quantized_rows(weights: str, activation: Activation, device: str) -> None:
    # In fp32: no other rounding decides which of two numbers a value between them becomes.
    layer = random_layer(weights=weights, activation=activation, bias=True, num_tokens=20)
    layer.topk_ids[3, 1] = -1
    out = layer.to(device).fused_moe(activations=weights)
    assert_close_quantized(out, layer.reference(activations=weights))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_is_that_of_the_format(
    dtype: torch.dtype, weights: str, trained: bool, device: str
) -> None:
    """At most 1.2 times what quantizing costs, whatever the arithmetic."""
    layer = random_layer(num_tokens=64, weights=None, hidden_size=256, intermediate_size=192)
    if trained:
        layer = trained_layer(64)
    layer = replace(layer, hidden_states=layer.hidden_states.to(dtype).float())
    exact, quantized = layer.reference(), layer.quantized(weights)
    for rows in (None, weights):
        error = relative_error(quantized.reference(activations=rows), exact)
        assert 1e-3 < error < 0.1
        ours = replace(quantized, hidden_states=layer.hidden_states.to(dtype)).to(device)
        out = ours.fused_moe(activations=rows or "bf16")
        assert relative_error(out, exact) <= 1.2 * error


def test_auto_leaves_rows_as_they_are_on_a_cpu() -> None:
    layer = random_layer(num_tokens=200, num_experts=2)
    out = layer.fused_moe(activations="auto")
    assert torch.equal(out, layer.fused_moe(activations="bf16"))
    assert not torch.equal(out, layer.fused_moe(activations="int8"))


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_auto_takes_8_bit_rows_where_many_16_bit_ones_come(weights: str) -> None:
    for dtype in DTYPES:
        for num_tokens in (EIGHT_BIT_ROWS, EIGHT_BIT_ROWS - 1):
            layer = random_layer(
                num_tokens=num_tokens, num_experts=2, weights=weights, dtype=dtype
            ).to("cuda")
            quantized = dtype != torch.float32 and num_tokens == EIGHT_BIT_ROWS
            same = layer.fused_moe(activations=weights if quantized else "bf16")
            assert torch.equal(layer.fused_moe(activations="auto"), same)


def test_sums_are_exact_enough_on_a_cpu() -> None:
    layer = random_layer(weights="fp8")
    out = fused_moe(**layer.arguments(), activations="fp8", two_level_sums=True)
    assert torch.equal(out, layer.fused_moe(activations="fp8"))


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
def test_auto_quantizes_rows_where_that_is_quicker(weights: str | None) -> None:
    # Both experts for every token.
    layer = random_layer(
        num_tokens=EIGHT_BIT_ROWS,
        num_experts=2,
        hidden_size=64,
        weights=weights,
        dtype=torch.bfloat16,
    ).to("cuda")
    quantizes = weights is not None and (weights == "int8" or CAPABILITY >= (8, 9))
    many = layer.fused_moe(activations="auto")
    few = layer.tokens(slice(1, None))
    assert torch.equal(few.fused_moe(activations="auto"), few.fused_moe(activations="bf16"))
    assert torch.equal(many, layer.fused_moe(activations="bf16")) != quantizes
    if quantizes:
        assert torch.equal(many, layer.fused_moe(activations=weights))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights_dtype", DTYPES)
def test_routing_dtypes(ids_dtype: torch.dtype, weights_dtype: torch.dtype, device: str) -> None:
    layer = random_layer().to(device)
    layer.topk_ids = layer.topk_ids.to(ids_dtype)
    layer.topk_weights = layer.topk_weights.to(weights_dtype)
    assert_close(layer.fused_moe(), layer.reference())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "callable"])
def test_the_weight_of_a_skipped_id_does_not_count(fused: bool, device: str) -> None:
    layer = random_layer(bias=True).to(device)
    if not fused:
        layer.activation = partial(apply, Activation())
    layer.topk_ids[0, 0], layer.topk_ids[1, 1] = -1, layer.num_experts
    expected = layer.fused_moe()
    assert expected.isfinite().all()
    layer.topk_weights[0, 0], layer.topk_weights[1, 1] = torch.nan, torch.inf
    assert torch.equal(layer.fused_moe(), expected)
    assert_close(expected, layer.reference())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", ["int8", None])
def test_sums_are_not_rounded_before_the_bias(weights: str | None, device: str) -> None:
    layer = random_layer(num_tokens=2, weights=weights, dtype=torch.bfloat16, hidden_size=256)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    product = partial(
        grouped_linear_reference,
        layer.hidden_states,
        layer.gate_up_proj,
        layer.gate_up_proj_scale,
        ids,
    )
    # What is left of the first token's sums is what a rounding before the bias would have lost.
    bias = torch.zeros(layer.gate_up_proj.shape[:2])
    bias[0] = -product()[0, 0].bfloat16().float()
    expected = product(bias=bias)
    out = grouped_linear(
        layer.hidden_states.to(device),
        layer.gate_up_proj.to(device),
        None if layer.gate_up_proj_scale is None else layer.gate_up_proj_scale.to(device),
        ids.to(device),
        bias=bias.to(device),
        activations="bf16",
    )
    assert relative_error(out[0], expected[0]) < 0.01
    assert_close(out, expected.to(out.device))


@pytest.mark.parametrize("device", DEVICES)
def test_slots(device: str) -> None:
    layer = random_layer(bias=True).to(device)
    slots = torch.randperm(6, dtype=torch.int32).to(device)
    moved = replace(layer, expert_to_slot=slots)
    order = slots.argsort()
    moved.gate_up_proj, moved.down_proj = layer.gate_up_proj[order], layer.down_proj[order]
    assert torch.equal(moved.fused_moe(), layer.fused_moe())
    assert_close(moved.fused_moe(), moved.reference())


def test_cpu_touches_routed_experts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    available = cpu.available
    layer = random_layer(num_tokens=1)
    routed = layer.topk_ids[0].tolist()
    expected = layer.fused_moe()
    # The weights of the others are nowhere: two slots hold all there is.
    slots = torch.full((6,), -1, dtype=torch.int32)
    slots[routed] = torch.arange(2, dtype=torch.int32)
    small = replace(
        layer,
        gate_up_proj=layer.gate_up_proj[routed],
        down_proj=layer.down_proj[routed],
        expert_to_slot=slots,
    )
    assert torch.equal(small.fused_moe(), expected)
    for slot in (-1, 2, 1 << 30):
        small.expert_to_slot[routed[0]] = slot
        for native in (True, False):
            monkeypatch.setattr(cpu, "available", available if native else lambda *_: False)
            with pytest.raises(ValueError, match=f"expert {routed[0]} is routed to but has no"):
                small.fused_moe()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("per_pair", [False, True])
def test_grouped_linear(weights: str | None, per_pair: bool, device: str) -> None:
    layer = random_layer(weights=weights, bias=True).to(device)
    layer.topk_ids[0, 1] = -1
    x = layer.hidden_states
    x = torch.randn(7, 2, x.shape[-1], device=device) if per_pair else x
    weight, scale, bias = layer.gate_up_proj, layer.gate_up_proj_scale, layer.gate_up_proj_bias
    out = grouped_linear(x, weight, scale, layer.topk_ids, bias=bias)
    assert_close(out, grouped_linear_reference(x, weight, scale, layer.topk_ids, bias=bias))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype: torch.dtype, device: str) -> None:
    layer = random_layer(num_tokens=300, hidden_size=256, top_k=6, dtype=dtype).to(device)
    for activations in ("bf16", "int8"):
        out = layer.fused_moe(activations=activations)
        assert all(torch.equal(layer.fused_moe(activations=activations), out) for _ in range(3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("native", [True, False])
def test_rows_quantized_before_give_the_same_bits(
    weights: str, dtype: torch.dtype, device: str, native: bool, monkeypatch
) -> None:
    skip_without_fp8(torch.device(device), weights)
    if not native:
        monkeypatch.setattr(cpu, "available", lambda *_: False)
    for num_tokens in (0, 1, 5, 300):
        for activation in (Activation(), swiglu):
            layer = random_layer(
                num_tokens=num_tokens, weights=weights, dtype=dtype, bias=True, hidden_size=80
            ).to(device)
            layer = replace(layer, activation=activation)
            layer.topk_ids[3:4, 0] = -1
            rows = quantize_activations(layer.hidden_states, weights)
            assert rows.q.itemsize == 1 and rows.dtype == dtype
            for unreduced in (False, True):
                if unreduced:
                    layer = replace(layer, topk_weights=None)
                expected = layer.fused_moe(activations=weights)
                before = replace(layer, hidden_states=rows)
                actual = fused_moe(**before.arguments())
                assert actual.dtype == dtype and torch.equal(actual, expected)
                if num_tokens == 300:
                    plain = layer.fused_moe(activations="bf16")
                    assert not torch.equal(actual, plain), "they were in 8 bits"


def test_what_is_no_quantized_row_is_refused() -> None:
    layer = random_layer(num_tokens=3)
    rows = quantize_activations(layer.hidden_states, "int8")

    def run(rows: QuantizedRows, **options: str) -> None:
        fused_moe(**replace(layer, hidden_states=rows).arguments(), **options)

    run(rows)
    for changed, words in (
        ({"q": rows.q.float()}, r"8-bit rows are torch.float32 of shape \(3, 40\); expected int8"),
        (
            {"scale": rows.scale[:2]},
            r"scales of 8-bit rows .* \(2,\) .*expected float32 \(3,\)",
        ),
        ({"scale": rows.scale.double()}, "scales of 8-bit rows are torch.float64"),
        ({"dtype": torch.int8}, "hidden_states are torch.int8"),
        ({"q": rows.q[:2], "scale": rows.scale[:2]}, "expected bf16, fp16 or fp32"),
        ({"q": rows.q.to(torch.float8_e4m3fn)}, "activations='fp8' with int8 weights"),
    ):
        with pytest.raises(ValueError, match=words):
            run(replace(rows, **changed))
    with pytest.raises(ValueError, match="in 8 bits already; 'auto' and 'int8' work"):
        run(rows, activations="bf16")
    with pytest.raises(ValueError, match="cannot be quantized to 'fp4'; 'int8' and 'fp8' work"):
        quantize_activations(layer.hidden_states, "fp4")
    with pytest.raises(ValueError, match=r"rows are torch.float32 of shape \(40,\)"):
        quantize_activations(layer.hidden_states[0], "int8")
    with pytest.raises(ValueError, match="in 8 bits already are for fused_moe; give a tensor"):
        grouped_linear(rows, layer.gate_up_proj, layer.gate_up_proj_scale, layer.topk_ids)
    layer.topk_weights.requires_grad_()
    with pytest.raises(RuntimeError, match="rows that came in 8 bits have no gradient"):
        fused_moe(**replace(layer, hidden_states=rows).arguments()).sum().backward()


def test_fp16_sums_do_not_overflow() -> None:
    # Unscaled, the sum over 1024 products of 448 reaches 458752; fp16 ends at 65504.
    weight, scale = qmoe_kernels.quantize(torch.full((1, 4, 1024), 1e-3), "fp8")
    ids = torch.zeros(3, 1, dtype=torch.int32)
    out = grouped_linear(torch.ones(3, 1024, dtype=torch.float16), weight, scale, ids)
    torch.testing.assert_close(out, torch.full_like(out, 1.024), rtol=1e-3, atol=0)


# ---- as operators of torch ---------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", ["int8", None])
def test_opcheck(weights: str | None, device: str) -> None:
    layer = random_layer(weights=weights, bias=True).to(device)
    up = (layer.gate_up_proj, layer.gate_up_proj_scale, layer.gate_up_proj_bias)
    down = (layer.down_proj, layer.down_proj_scale, layer.down_proj_bias)
    activation = ("silu", True, 1.0, 0.0, None, False, None, None)
    x, ids = layer.hidden_states, layer.topk_ids
    for activations in ("auto", weights) if weights else ("auto",):
        for topk_weights in (layer.topk_weights, None):
            torch.library.opcheck(
                torch.ops.qmoe.fused_moe.default,
                (
                    x,
                    *up,
                    *down,
                    ids,
                    topk_weights,
                    None,
                    *activation,
                    activations,
                    False,
                    None,
                    None,
                ),
            )
        torch.library.opcheck(
            torch.ops.qmoe.grouped_linear.default, (x, *up, ids, None, activations, None, None)
        )
    if weights is not None:
        rows = quantize_activations(x, weights)
        given = rows.scale, rows.dtype
        torch.library.opcheck(
            torch.ops.qmoe.fused_moe.default,
            (rows.q, *up, *down, ids, topk_weights, None, *activation, weights, False, *given),
        )
        torch.library.opcheck(
            torch.ops.qmoe.grouped_linear.default, (rows.q, *up, ids, None, weights, *given)
        )
    torch.library.opcheck(
        torch.ops.qmoe.weighted_sum.default,
        (layer.hidden_states.unsqueeze(1).expand(-1, 2, -1).contiguous(), layer.topk_weights),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", [Activation(limit=7.0), swiglu], ids=["known", "callable"])
@pytest.mark.parametrize("weights, activations", [("int8", "auto"), ("fp8", "fp8")])
def test_compiles_into_one_graph(
    weights: str, activations: str, activation: Activation, device: str
) -> None:
    skip_without_fp8(torch.device(device), activations)
    torch.compiler.reset()
    layer = random_layer(weights=weights, activation=activation).to(device)

    def forward(hidden_states: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        arguments = layer.arguments() | {"hidden_states": hidden_states, "topk_ids": topk_ids}
        return fused_moe(**arguments, activations=activations) * 2

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for num_tokens in (7, 5):
        x, ids = layer.hidden_states[:num_tokens], layer.topk_ids[:num_tokens]
        layer.topk_weights = layer.topk_weights[:num_tokens]
        torch.testing.assert_close(compiled(x, ids), forward(x, ids))


@pytest.mark.gpu
@pytest.mark.parametrize("topk_weights", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 7, 100])
@pytest.mark.parametrize("weights, activations", MODES)
def test_cuda_graph_and_no_synchronization(
    weights: str | None,
    activations: str,
    num_tokens: int,
    topk_weights: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Nothing between the kernels: each may start before the one ahead of it has ended.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    sizes = {"hidden_size": 256, "intermediate_size": 192, "num_tokens": num_tokens}
    draws = [
        random_layer(dtype=torch.bfloat16, weights=weights, seed=seed, **sizes) for seed in range(3)
    ]
    layer = draws[0].to("cuda")
    if not topk_weights:
        layer.topk_weights = None
    layer.fused_moe(activations=activations)
    with no_synchronization():
        layer.fused_moe(activations=activations)
    graph, captured = capture(lambda: layer.fused_moe(activations=activations))
    for draw in draws:
        layer.hidden_states.copy_(draw.hidden_states)
        layer.topk_ids.copy_(draw.topk_ids)
        outs = []
        for _ in range(20):
            graph.replay()
            outs.append(captured.clone())
        expected = layer.fused_moe(activations=activations)
        assert all(torch.equal(out, expected) for out in outs)
        rows = activations if activations in ("int8", "fp8") else None
        # FP8 numbers lie far apart: one that bf16 rounds to the next one costs more.
        error = relative_error(expected, layer.reference(activations=rows))
        assert error < (0.03 if rows == "fp8" else 0.015)


@pytest.mark.gpu
@pytest.mark.parametrize("weights, activations", MODES)
def test_any_number_of_tokens(weights: str | None, activations: str) -> None:
    """Meet every tile of `heuristic_tiles`."""
    layer = random_layer(
        num_tokens=2048,
        num_experts=4,
        hidden_size=128,
        intermediate_size=96,
        weights=weights,
        dtype=torch.bfloat16,
    ).to("cuda")
    rows = activations if activations in ("int8", "fp8") else None
    expected = layer.reference(activations=rows)
    for num_tokens in (1, 3, 9, 33, 65, 130, 257, 1024, 2048):
        part = layer.tokens(slice(0, num_tokens))
        out = part.fused_moe(activations=activations)
        assert relative_error(out, expected[:num_tokens]) < (0.03 if rows == "fp8" else 0.015)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    # 2.25 GiB of weights per projection: the last expert starts beyond 2**31 elements.
    num_experts, size = 144, 4096
    weight = torch.zeros(num_experts, size, size, dtype=torch.int8, device="cuda")
    scale = torch.ones(num_experts, size, device="cuda")
    weight[-1] = torch.eye(size, dtype=torch.int8, device="cuda")
    x = torch.randn(3, size, device="cuda", dtype=torch.bfloat16)
    ids = torch.full((3, 1), num_experts - 1, device="cuda")
    assert torch.equal(grouped_linear(x, weight, scale, ids)[:, 0], x)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_its_tensors_are() -> None:
    layer = random_layer(dtype=torch.bfloat16).to("cuda:1")
    with torch.cuda.device(0):
        out = layer.fused_moe()
    assert out.device == torch.device("cuda:1")
    assert_close(out, layer.reference())


# ---- what is refused ---------------------------------------------------------------------------


def refused(layer: Layer, **changes: object) -> str:
    with pytest.raises(ValueError) as error:
        fused_moe(**layer.arguments() | changes)
    return str(error.value)


def test_arguments_that_do_not_fit() -> None:
    layer = random_layer(bias=True)
    x, up, up_scale = layer.hidden_states, layer.gate_up_proj, layer.gate_up_proj_scale
    ids, slots = layer.topk_ids, torch.arange(6, dtype=torch.int32)
    for changes, message in [
        ({"hidden_states": x.double()}, "hidden_states are torch.float64"),
        ({"hidden_states": x[:3]}, "of shape (3, 40)"),
        ({"hidden_states": x[:, None].expand(-1, 2, -1)}, "of shape (7, 2, 40)"),
        ({"hidden_states": x[:, :8]}, "gate_up_proj has shape (6, 48, 40)"),
        ({"topk_ids": ids.float()}, "topk_ids are torch.float32"),
        ({"topk_ids": ids[0]}, "expected int32 or int64 (num_tokens, top_k)"),
        ({"topk_weights": ids}, "topk_weights are torch.int64"),
        ({"topk_weights": layer.topk_weights[:, :1]}, "expected a float tensor of shape (7, 2)"),
        (
            {
                "gate_up_proj": up[:, :-1],
                "gate_up_proj_scale": up_scale[:, :-1],
                "gate_up_proj_bias": None,
            },
            "47 rows, an odd number",
        ),
        ({"gate_up_proj": up[0]}, "gate_up_proj has shape (48, 40)"),
        ({"gate_up_proj": up.half()}, "gate_up_proj is torch.float16"),
        ({"gate_up_proj": up.mT.contiguous().mT}, "last dimension must be contiguous"),
        ({"gate_up_proj": up[:5]}, "holds 5 experts and gate_up_proj_scale 6"),
        ({"gate_up_proj_scale": None}, "gate_up_proj_scale is missing"),
        ({"gate_up_proj": up.float()}, "gate_up_proj_scale is given"),
        ({"gate_up_proj_scale": up_scale.half()}, "gate_up_proj_scale is torch.float16"),
        ({"gate_up_proj_scale": up_scale[..., None]}, "expected float32 (6, 48)"),
        ({"gate_up_proj_bias": layer.down_proj_bias}, "gate_up_proj_bias is torch.float32"),
        ({"down_proj": layer.down_proj[..., :8]}, "down_proj has shape (6, 40, 8)"),
        ({"expert_to_slot": slots.long()}, "expert_to_slot is torch.int64"),
        ({"expert_to_slot": slots[:5]}, "expected int32 (6,)"),
        ({"topk_weights": layer.topk_weights.to("meta")}, "topk_weights are on meta"),
        ({"topk_ids": ids.to("meta")}, "topk_ids are on meta"),
        ({"down_proj_scale": layer.down_proj_scale.to("meta")}, "down_proj: a tensor on meta"),
    ]:
        assert message in refused(layer, **changes), changes.keys()


@pytest.mark.parametrize("weights, activations", [("int8", "fp8"), ("fp8", "int8")])
def test_rows_of_another_format_than_the_weights(weights: str, activations: str) -> None:
    layer = random_layer(weights=weights)
    expected = f"activations='{activations}' with {weights} weights; 8-bit activations need weights"
    assert expected in refused(layer, activations=activations)
    with pytest.raises(ValueError, match=expected):
        check_activations(activations, weights)


def test_activations_that_do_not_work() -> None:
    layer = random_layer(weights=None)
    assert "activations='int8' with torch.float32 weights" in refused(layer, activations="int8")
    assert "unknown activations 'fp4'; 'auto', 'bf16', 'int8'" in refused(layer, activations="fp4")
    with pytest.raises(ValueError, match="unknown activations 'fp4'"):
        grouped_linear(
            layer.hidden_states, layer.gate_up_proj, None, layer.topk_ids, activations="fp4"
        )
    for weights in (None, "int8", "fp8"):
        check_activations("auto", weights)
        check_activations("bf16", weights)


@pytest.mark.gpu
def test_gpus_without_fp8_refuse_fp8_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    message = refused(random_layer(weights="fp8").to("cuda"), activations="fp8")
    assert f"{torch.cuda.get_device_name()} multiplies no FP8; 'auto' and 'bf16' work" in message


def test_weighted_sum_refuses() -> None:
    with pytest.raises(ValueError, match="expected bf16, fp16 or fp32"):
        weighted_sum(torch.zeros(2, 8), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"expected a float tensor of shape \(2, 3\)"):
        weighted_sum(torch.zeros(2, 3, 8), torch.zeros(2, 1))


# ---- without triton ----------------------------------------------------------------------------

WITHOUT_TRITON = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTriton())
import torch
import qmoe_kernels
from qmoe_kernels.reference import fused_moe_reference

assert not {"numba", "llvmlite"} & sys.modules.keys()  # they take a third of a second
gate_up_proj, gate_up_proj_scale = qmoe_kernels.quantize(torch.randn(4, 16, 8), "fp8")
down_proj, down_proj_scale = qmoe_kernels.quantize(torch.randn(4, 8, 8), "fp8")
ids = torch.tensor([[0, 1], [3, 1]])
arguments = (torch.randn(2, 8), gate_up_proj, gate_up_proj_scale, down_proj, down_proj_scale, ids,
             torch.rand(2, 2))
torch.testing.assert_close(
    qmoe_kernels.fused_moe(*arguments), fused_moe_reference(*arguments).float()
)
assert "triton" not in sys.modules
"""


def test_a_cpu_needs_no_triton() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(qmoe_kernels.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("device", DEVICES)
def test_ids_beyond_32_bits_are_skipped(device: str, weights: str | None) -> None:
    layer = random_layer(weights=weights).to(device)
    layer.topk_ids[:] = 2**32 + 1
    layer.topk_ids[0, 0] = torch.iinfo(torch.int64).min
    for one in (layer, layer.tokens(slice(0, 1))):
        assert not one.fused_moe().any()
        if device == "cpu":
            assert not one.triton().any()  # in the interpreter
        arguments = one.arguments()
        up = grouped_linear(
            one.hidden_states, one.gate_up_proj, one.gate_up_proj_scale, one.topk_ids
        )
        assert not up.any()
        assert not fused_moe(**arguments | {"topk_weights": None}).any()


def test_projections_that_do_not_belong_together_are_refused() -> None:
    layer = random_layer(weights=None)
    arguments = layer.arguments()
    with pytest.raises(ValueError, match="down_proj holds 3 experts and gate_up_proj 6"):
        fused_moe(**arguments | {"down_proj": layer.down_proj[:3]})
    with pytest.raises(ValueError, match="down_proj has 20 rows; hidden_states has rows of 40"):
        fused_moe(**arguments | {"down_proj": layer.down_proj[:, :20]})


def test_projections_of_two_formats() -> None:
    """8-bit rows are of one format; 16-bit ones meet both."""
    int8, fp8 = random_layer(weights="int8"), random_layer(weights="fp8")
    mixed = replace(int8, down_proj=fp8.down_proj, down_proj_scale=fp8.down_proj_scale)
    for activations in ("int8", "fp8"):
        with pytest.raises(ValueError, match="8-bit activations need weights"):
            mixed.fused_moe(activations=activations)
    assert_close(mixed.fused_moe(activations="auto"), mixed.reference())


@pytest.mark.parametrize("activations", ["int8", "fp8"])
def test_no_tokens_with_rows_of_8_bits(activations: str) -> None:
    none = random_layer(weights=activations).tokens(slice(0, 0))
    assert none.fused_moe(activations=activations).shape == (0, 40)
