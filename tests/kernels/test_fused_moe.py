"""The public operators: plain torch on a CPU, Triton on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from random_layer import Layer, assert_close, random_layer

import qmoe_kernels
from qmoe_kernels import Activation, fused_moe, grouped_linear, weighted_sum
from qmoe_kernels.reference import grouped_linear_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WEIGHTS = ["int8", "fp8", None]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


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
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights_dtype", DTYPES)
def test_routing_dtypes(ids_dtype: torch.dtype, weights_dtype: torch.dtype, device: str) -> None:
    layer = random_layer().to(device)
    layer.topk_ids = layer.topk_ids.to(ids_dtype)
    layer.topk_weights = layer.topk_weights.to(weights_dtype)
    assert_close(layer.fused_moe(), layer.reference())


@pytest.mark.parametrize("device", DEVICES)
def test_slots(device: str) -> None:
    layer = random_layer(bias=True).to(device)
    slots = torch.randperm(6, dtype=torch.int32).to(device)
    moved = replace(layer, expert_to_slot=slots)
    order = slots.argsort()
    moved.gate_up_proj, moved.down_proj = layer.gate_up_proj[order], layer.down_proj[order]
    assert torch.equal(moved.fused_moe(), layer.fused_moe())
    assert_close(moved.fused_moe(), moved.reference())


def test_cpu_touches_routed_experts_only() -> None:
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
    small.expert_to_slot[routed[0]] = -1
    with pytest.raises(ValueError, match=f"expert {routed[0]} is routed to but has no slot"):
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
    out = layer.fused_moe()
    assert all(torch.equal(layer.fused_moe(), out) for _ in range(3))


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
    activation = ("silu", True, 1.0, 0.0, None, False, None, None, "auto")
    for topk_weights in (layer.topk_weights, None):
        torch.library.opcheck(
            torch.ops.qmoe.fused_moe.default,
            (layer.hidden_states, *up, *down, layer.topk_ids, topk_weights, None, *activation),
        )
    torch.library.opcheck(
        torch.ops.qmoe.grouped_linear.default,
        (layer.hidden_states, *up, layer.topk_ids, None, "auto"),
    )
    torch.library.opcheck(
        torch.ops.qmoe.weighted_sum.default,
        (layer.hidden_states.unsqueeze(1).expand(-1, 2, -1).contiguous(), layer.topk_weights),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", [Activation(limit=7.0), swiglu], ids=["known", "callable"])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_compiles_into_one_graph(weights: str, activation: Activation, device: str) -> None:
    torch.compiler.reset()
    layer = random_layer(weights=weights, activation=activation).to(device)

    def forward(hidden_states: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        arguments = layer.arguments() | {"hidden_states": hidden_states, "topk_ids": topk_ids}
        return fused_moe(**arguments) * 2

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for num_tokens in (7, 5):
        x, ids = layer.hidden_states[:num_tokens], layer.topk_ids[:num_tokens]
        layer.topk_weights = layer.topk_weights[:num_tokens]
        torch.testing.assert_close(compiled(x, ids), forward(x, ids))


@pytest.mark.gpu
@pytest.mark.parametrize("topk_weights", [True, False])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_cuda_graph_and_no_synchronization(weights: str, topk_weights: bool) -> None:
    draws = [random_layer(dtype=torch.bfloat16, weights=weights, seed=s) for s in range(3)]
    layer = draws[0].to("cuda")
    if not topk_weights:
        layer.topk_weights = None
    layer.fused_moe()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.fused_moe()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.fused_moe()
    for draw in draws:
        layer.hidden_states.copy_(draw.hidden_states)
        layer.topk_ids.copy_(draw.topk_ids)
        graph.replay()
        assert torch.equal(captured, layer.fused_moe())
        assert_close(captured, layer.reference())


@pytest.mark.gpu
def test_any_number_of_tokens() -> None:
    """Meet every tile of `choose_tile`."""
    layer = random_layer(
        num_tokens=2048, num_experts=4, hidden_size=128, intermediate_size=96, dtype=torch.bfloat16
    ).to("cuda")
    expected = layer.reference()
    for num_tokens in (1, 3, 9, 33, 65, 130, 257, 1024, 2048):
        part = replace(
            layer,
            hidden_states=layer.hidden_states[:num_tokens],
            topk_ids=layer.topk_ids[:num_tokens],
            topk_weights=layer.topk_weights[:num_tokens],
        )
        assert_close(part.fused_moe(), expected[:num_tokens])


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


def test_activations_that_do_not_work() -> None:
    layer = random_layer()
    assert "unknown activations 'fp4'" in refused(layer, activations="fp4")
    assert "activations='fp8' with int8 weights" in refused(layer, activations="fp8")


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
