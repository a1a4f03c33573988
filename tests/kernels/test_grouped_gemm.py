"""The Triton kernels: interpreted without a GPU, and compiled for every architecture anyway."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from compiling import ARCHITECTURES, SHARED_MEMORY, run_compiler
from random_layer import DEVICE, TRITON_DTYPES, assert_close, random_layer

from qmoe_kernels import Activation, ExpertRouting, weighted_sum
from qmoe_kernels.grouped_gemm import (
    grouped_linear_triton,
    launch_grouped_gemm,
    launch_weighted_sum,
)
from qmoe_kernels.heuristic import heuristic_tile
from qmoe_kernels.reference import grouped_linear_reference
from qmoe_kernels.tiles import TileConfig

WEIGHTS = ["int8", "fp8", None]


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("bias", [False, True])
def test_formats(weights: str | None, dtype: torch.dtype, bias: bool) -> None:
    layer = random_layer(weights=weights, dtype=dtype, bias=bias)
    out = layer.triton()
    assert out.dtype == dtype
    assert_close(out, layer.reference())


@pytest.mark.parametrize(
    "case",
    [
        {"num_tokens": 1, "num_experts": 1, "top_k": 1},
        {"num_tokens": 0},
        {"num_tokens": 1, "num_experts": 512, "top_k": 10, "hidden_size": 16},
        {"num_tokens": 13, "num_experts": 5, "top_k": 5},  # every expert for every token
        {"num_tokens": 37, "num_experts": 2, "top_k": 1, "hidden_size": 8},  # several tiles each
        {"hidden_size": 1, "intermediate_size": 1},
        {"hidden_size": 24, "intermediate_size": 56},  # no multiple of any block
        {"hidden_size": 176, "intermediate_size": 29},  # K spans blocks and ends within one
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_sizes(case: dict[str, int], weights: str) -> None:
    layer = random_layer(weights=weights, dtype=torch.float16, **case)
    assert_close(layer.triton(), layer.reference())


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 17, 700])
@pytest.mark.parametrize("hidden_size, intermediate_size", [(2880, 704), (2688, 1856)])
def test_sizes_of_models(num_tokens: int, hidden_size: int, intermediate_size: int) -> None:
    layer = random_layer(
        num_tokens=num_tokens,
        num_experts=16,
        top_k=4,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        dtype=torch.bfloat16,
    )
    # The reference loops over tokens: check a few.
    some = torch.arange(0, num_tokens, max(1, num_tokens // 5))
    few = replace(
        layer,
        hidden_states=layer.hidden_states[some],
        topk_ids=layer.topk_ids[some],
        topk_weights=layer.topk_weights[some],
    )
    assert_close(layer.triton()[some.to(DEVICE)], few.reference())


@pytest.mark.parametrize(
    "activation",
    [
        Activation("relu2", gated=False),
        Activation("gelu_tanh"),
        Activation(alpha=1.702, up_shift=1.0, limit=0.5),
        Activation(gate_softcap=1.0, up_softcap=0.5),
    ],
    ids=repr,
)
def test_activations(activation: Activation) -> None:
    layer = random_layer(activation=activation, bias=True)
    assert_close(layer.triton(), layer.reference())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("block_m, block_n, block_k", [(16, 64, 128), (32, 32, 32), (64, 128, 64)])
def test_tiles(weights: str | None, block_m: int, block_n: int, block_k: int) -> None:
    if DEVICE.type == "cuda" and (block_m, block_n) == (64, 128):
        pytest.skip("fp32 products of this tile exceed the registers")
    layer = random_layer(num_tokens=70, num_experts=3, weights=weights).to(DEVICE)
    projection = (layer.gate_up_proj, layer.gate_up_proj_scale)
    out = launch_grouped_gemm(
        layer.hidden_states,
        *projection,
        None,
        layer.topk_ids,
        3,
        ExpertRouting.from_topk_ids(layer.topk_ids, 3),
        None,
        torch.full((140, layer.gate_up_proj.shape[1]), torch.nan, device=DEVICE),
        pairs_per_row=2,
        scatter=True,
        tile=TileConfig(block_m, block_n, block_k, num_warps=4, num_stages=2),
    )
    expected = grouped_linear_reference(layer.hidden_states, *projection, layer.topk_ids)
    assert_close(out.view(expected.shape), expected)


def test_tiles_fit_any_routing() -> None:
    """The grid is sized without looking at the routing: the worst ones must fit in it."""
    tile = TileConfig(16, 32, 32, num_warps=4, num_stages=2)
    for counts in ([1, 1, 1, 45], [17, 17, 17, 1], [0, 0, 0, 52], [33, 1, 17, 1], [16, 16, 16, 4]):
        ids = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))[:, None].to(DEVICE)
        x = torch.randn(len(ids), 8, device=DEVICE)
        weight = torch.randn(4, 5, 8, device=DEVICE)
        out = launch_grouped_gemm(
            x,
            weight,
            None,
            None,
            ids,
            4,
            ExpertRouting.from_topk_ids(ids, 4),
            None,
            torch.full((len(ids), 5), torch.nan, device=DEVICE),
            pairs_per_row=1,
            scatter=True,
            tile=tile,
        )
        assert_close(out[:, None], grouped_linear_reference(x, weight, None, ids))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("per_pair", [False, True])
def test_grouped_linear(weights: str | None, per_pair: bool) -> None:
    layer = random_layer(weights=weights, bias=True).to(DEVICE)
    num_tokens, top_k = layer.topk_ids.shape
    layer.topk_ids[0, 1] = -1
    x = layer.hidden_states
    if per_pair:
        x = torch.randn(num_tokens, top_k, x.shape[-1], device=DEVICE)
    weight, scale, bias = layer.gate_up_proj, layer.gate_up_proj_scale, layer.gate_up_proj_bias
    out = grouped_linear_triton(x, weight, scale, bias, layer.topk_ids, None, layer.num_experts)
    expected = grouped_linear_reference(x, weight, scale, layer.topk_ids, bias=bias)
    assert expected[0, 1].eq(0).all()
    assert_close(out, expected)


def test_weighted_sum() -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 3, 1300, device=DEVICE)
    weights = torch.randn(5, 3, device=DEVICE)
    expected = (rows.double() * weights.double().unsqueeze(-1)).sum(1)
    assert_close(launch_weighted_sum(rows, weights), expected)
    assert_close(weighted_sum(rows.cpu(), weights.cpu()), expected)
    # Rows of skipped ids are not read, whatever stands in them.
    ids = torch.tensor([[0, 1, 2]] * 4 + [[0, 9, -1]], device=DEVICE)
    rows[4, 1:] = torch.nan
    expected[4] = rows[4, 0].double() * weights[4, 0].double()
    assert_close(launch_weighted_sum(rows, weights, ids, num_experts=3), expected)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_skipped_ids_and_unreduced_rows(weights: str) -> None:
    layer = random_layer(weights=weights, bias=True)
    layer.topk_ids[0] = torch.tensor([-1, 6])  # a token without any expert
    layer.topk_ids[3, 0] = 6
    assert_close(layer.triton(), layer.reference())
    unreduced = replace(layer, topk_weights=None)
    rows = unreduced.triton()
    assert_close(rows, unreduced.reference())
    assert rows[0].eq(0).all() and rows[3, 0].eq(0).all()
    summed = launch_weighted_sum(rows, layer.topk_weights.to(DEVICE))
    assert torch.equal(summed, layer.triton())


def test_slots_are_where_weights_are() -> None:
    layer = random_layer(bias=True)
    slots = torch.tensor([4, 0, 7, 2, 5, 1], dtype=torch.int32)
    gate_up_proj = torch.full((8, *layer.gate_up_proj.shape[1:]), 127, dtype=torch.int8)
    down_proj = torch.full((8, *layer.down_proj.shape[1:]), 127, dtype=torch.int8)
    gate_up_proj[slots] = layer.gate_up_proj
    down_proj[slots] = layer.down_proj
    moved = replace(layer, gate_up_proj=gate_up_proj, down_proj=down_proj, expert_to_slot=slots)
    assert torch.equal(moved.triton(), layer.triton())
    # An expert that is not there gives NaN, not another expert's output.
    moved.expert_to_slot[layer.topk_ids[2, 0]] = -1
    uses_it = (layer.topk_ids == layer.topk_ids[2, 0]).any(1).to(DEVICE)
    out = moved.triton()
    assert out[uses_it].isnan().all()
    assert torch.equal(out[~uses_it], layer.triton()[~uses_it])


def test_weights_of_a_page() -> None:
    """An expert's two weights lie in one piece: only the strides of slots change."""
    layer = random_layer()
    shapes = layer.gate_up_proj.shape[1:], layer.down_proj.shape[1:]
    sizes = [s.numel() for s in shapes]
    pages = torch.zeros(6, sum(sizes) + 5, dtype=torch.int8, device=DEVICE)
    gate_up_proj = pages[:, : sizes[0]].unflatten(1, shapes[0])
    down_proj = pages[:, sizes[0] : sum(sizes)].unflatten(1, shapes[1])
    gate_up_proj.copy_(layer.gate_up_proj)
    down_proj.copy_(layer.down_proj)
    paged = replace(layer, gate_up_proj=gate_up_proj, down_proj=down_proj)
    assert torch.equal(paged.triton(), layer.triton())


def test_same_bits_every_time_and_in_any_batch() -> None:
    layer = random_layer(num_tokens=9, dtype=torch.float16)
    out = layer.triton()
    assert torch.equal(out, layer.triton())
    for few in (slice(0, 1), slice(3, 8)):
        part = replace(
            layer,
            hidden_states=layer.hidden_states[few],
            topk_ids=layer.topk_ids[few],
            topk_weights=layer.topk_weights[few],
        )
        # The tile is the same below 16 rows per expert, and a row never meets another.
        assert torch.equal(part.triton(), out[few])


# ---- compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import json, re
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qmoe_kernels.grouped_gemm import grouped_gemm_kernel
from qmoe_kernels.heuristic import heuristic_tile

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
pointers = dict.fromkeys(
    ["ids_ptr", "expert_offsets_ptr", "expert_to_slot_ptr"], "*i32"
)
activation = dict(NAME="silu", ALPHA=1.702, UP_SHIFT=1.0, LIMIT=7.0, LIMIT_AFTER=False,
                  GATE_SOFTCAP=None, UP_SOFTCAP=None)
for capability in ARCHITECTURES:
    for dtype, weights, gated, rows in [
        (torch.bfloat16, "int8", True, 1), (torch.bfloat16, "fp8", False, 200),
        (torch.float16, "fp8", True, 40),
    ]:
        tile = heuristic_tile(rows, torch.int8, dtype, gated=gated)
        constants = dict(
            activation, x_scale_ptr=None, SORTED=True, GATHER=gated, SCATTER=not gated,
            FP8=weights == "fp8", GATED=gated, BLOCK_IDS=128, BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, TAIL_M=tile.tail_m, GROUP_M=8,
            EVEN_K=False, ASM=True, PDL=False,
        )
        if not gated:
            constants["NAME"] = None
        types = dict(
            pointers, x_ptr="*" + NAMES[dtype], out_ptr="*" + NAMES[dtype],
            weight_ptr="*i8", scale_ptr="*fp32", bias_ptr="*" + NAMES[dtype],
        )
        names = grouped_gemm_kernel.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        aligned = [i for i, n in enumerate(names) if n.endswith("_ptr") or "stride" in n]
        source = ASTSource(
            grouped_gemm_kernel, signature,
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned if names[i] not in constants},
        )
        kernel = triton.compile(
            source, target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        )
        tensor_cores = r"(wgmma|tcgen05)\\.mma|mma\\.sync"
        print(json.dumps({
            "capability": capability,
            "case": f"{NAMES[dtype]} {weights} gated={gated} rows={rows}",
            "shared": kernel.metadata.shared,
            "products": sorted({m[0] for m in re.finditer(tensor_cores, kernel.asm["ptx"])}),
            "local_memory": len(re.findall(r"(ld|st)\\.local", kernel.asm["ptx"])),
        }))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_compiles_for_every_architecture() -> None:
    kernels = run_compiler(f"ARCHITECTURES = {ARCHITECTURES}\n{COMPILE}")
    assert len(kernels) == 3 * len(ARCHITECTURES)
    for kernel in kernels:
        assert kernel["products"], f"no tensor cores: {kernel}"
        assert kernel["shared"] <= SHARED_MEMORY[kernel["capability"]] * 1024, kernel
        assert kernel["local_memory"] == 0, kernel
        if kernel["capability"] == 90:
            assert "wgmma.mma" in kernel["products"], kernel


@pytest.mark.parametrize("weights", [torch.int8, torch.bfloat16])
def test_tile_grows_with_rows(weights: torch.dtype) -> None:
    blocks = [
        heuristic_tile(tokens * 8 / 128, weights, torch.bfloat16, gated=True).block_m
        for tokens in (0, 1, 64, 512, 1024, 4096)
    ]
    assert blocks == sorted(blocks) and blocks[0] == 16 and blocks[-1] == 128
