"""The Triton kernels: interpreted without a GPU, and compiled for every architecture anyway."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from compiling import ARCHITECTURES, SHARED_MEMORY, run_compiler
from random_layer import (
    DEVICE,
    TRITON_DTYPES,
    Layer,
    assert_close,
    assert_close_quantized,
    random_layer,
    relative_error,
    skip_without_fp8,
)
from trained_layer import trained_layer

from qmoe_kernels import Activation, ExpertRouting, quantize, weighted_sum
from qmoe_kernels.experts import Projection
from qmoe_kernels.grouped_gemm import launch_grouped_gemm
from qmoe_kernels.heuristic import heuristic_tiles
from qmoe_kernels.launching import COMPILED
from qmoe_kernels.layer import fused_moe_triton, grouped_linear_triton
from qmoe_kernels.quantization import (
    SMALLEST_SCALE,
    STORAGE_DTYPE,
    QuantizedRows,
    dequantize,
    quantize_rows,
)
from qmoe_kernels.reference import grouped_linear_reference
from qmoe_kernels.rows import launch_add_rows, launch_quantize_rows, launch_weighted_sum
from qmoe_kernels.tiles import LayerShape, LayerTiles, TileConfig
from qmoe_kernels.widening import widen_weights

# What numpy says of poisoned rows in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
WEIGHTS = ["int8", "fp8", None]
TILE = TileConfig(16, 64, 64, num_warps=4, num_stages=2)
GEMV = TileConfig(1, 32, 64, num_warps=4, num_stages=2)
PATHS = {
    "gemv": LayerTiles(GEMV, GEMV, sort=False),
    "unsorted": LayerTiles(TILE, TILE, sort=False),
    "sorted": LayerTiles(TILE, TILE, sort=True),
}
ALL_PATHS = pytest.mark.parametrize("tiles", PATHS.values(), ids=PATHS)
GEMM_PATHS = pytest.mark.parametrize(
    "tiles", [PATHS["unsorted"], PATHS["sorted"]], ids=["unsorted", "sorted"]
)


@ALL_PATHS
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_formats(weights: str | None, dtype: torch.dtype, tiles: LayerTiles) -> None:
    layer = random_layer(weights=weights, dtype=dtype, bias=True, num_tokens=5)
    out = layer.triton(tiles=tiles)
    assert out.dtype == dtype
    assert_close(out, layer.reference())


@ALL_PATHS
def test_the_weight_of_a_skipped_id_does_not_count(tiles: LayerTiles) -> None:
    layer = random_layer(num_tokens=3, dtype=torch.float16)
    layer.topk_ids[0, 0], layer.topk_ids[1, 1] = -1, layer.num_experts
    expected = layer.triton(tiles=tiles)
    assert expected.isfinite().all()
    layer.topk_weights[0, 0], layer.topk_weights[1, 1] = torch.nan, torch.inf
    assert torch.equal(layer.triton(tiles=tiles), expected)
    assert_close(expected, layer.reference())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_sorting_changes_no_bit(weights: str | None) -> None:
    layer = random_layer(weights=weights, dtype=torch.float16)
    out = layer.triton(tiles=PATHS["unsorted"])
    assert torch.equal(out, layer.triton(tiles=PATHS["sorted"]))


@pytest.mark.parametrize(
    "case",
    [
        {"num_tokens": 1, "num_experts": 1, "top_k": 1},
        {"num_tokens": 0},
        {"num_tokens": 1, "num_experts": 512, "top_k": 10, "hidden_size": 16},
        {"num_tokens": 6, "num_experts": 5, "top_k": 5},  # every expert for every token
        {"num_tokens": 2, "hidden_size": 1, "intermediate_size": 1},
        {"num_tokens": 2, "hidden_size": 24, "intermediate_size": 52},  # no multiple of any block
        {"num_tokens": 2, "hidden_size": 176, "intermediate_size": 29},  # K ends within a block
    ],
    ids=str,
)
@ALL_PATHS
def test_sizes(case: dict[str, int], tiles: LayerTiles) -> None:
    layer = random_layer(weights="fp8", dtype=torch.float16, **case)
    assert_close(layer.triton(tiles=tiles), layer.reference())


@pytest.mark.parametrize("intermediate_size", [704, 1856, 2880])  # of models
@ALL_PATHS
def test_intermediate_sizes(intermediate_size: int, tiles: LayerTiles) -> None:
    tile = replace(tiles.down, block_n=256, block_k=128)
    layer = random_layer(
        num_tokens=2,
        num_experts=1,
        top_k=1,
        hidden_size=20,
        intermediate_size=intermediate_size,
        dtype=torch.float16,
    )
    out = layer.triton(tiles=replace(tiles, gate_up=tile, down=tile))
    assert_close(out, layer.reference())


@pytest.mark.parametrize("num_tokens", [1, 20, 70])
def test_tiles_by_rule(num_tokens: int) -> None:
    """One path each: these have 2, 40 and 140 pairs."""
    layer = random_layer(num_tokens=num_tokens, dtype=torch.float16)
    assert_close(layer.triton(), layer.reference())


@pytest.mark.gpu
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("num_tokens", [1, 17, 700])
@pytest.mark.parametrize("hidden_size, intermediate_size", [(2880, 704), (2688, 1856)])
def test_sizes_of_models(
    num_tokens: int, hidden_size: int, intermediate_size: int, activations: str | None
) -> None:
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
    few = layer.tokens(some)
    out = layer.triton(activations=activations)[some.to(DEVICE)]
    assert_close(out, few.reference(activations=activations))


@pytest.mark.parametrize(
    "activation",
    [
        Activation("relu2", gated=False),
        Activation("silu", gated=False),
        Activation("gelu"),
        Activation("gelu_tanh"),
        Activation("relu"),
        Activation(alpha=1.702, up_shift=1.0, limit=0.5),
        Activation(limit=0.5, limit_after=True),
        Activation(gate_softcap=1.0, up_softcap=0.5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("path", ["gemv", "sorted"])
def test_activations(activation: Activation, path: str) -> None:
    layer = random_layer(activation=activation, bias=True, num_tokens=3)
    assert_close(layer.triton(tiles=PATHS[path]), layer.reference())


@pytest.mark.parametrize(
    "tile",
    [
        TileConfig(16, 64, 128, num_warps=4, num_stages=2),
        TileConfig(32, 32, 32, num_warps=4, num_stages=2),
        TileConfig(32, 32, 64, num_warps=2, num_stages=3, tail_m=16),
        TileConfig(64, 128, 64, num_warps=4, num_stages=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("sort", [False, True])
def test_tiles(tile: TileConfig, sort: bool) -> None:
    layer = random_layer(
        num_tokens=45,
        num_experts=3,
        top_k=1,
        hidden_size=33,
        intermediate_size=12,
        dtype=torch.float16,
    )
    # One expert has no rows; the last one's second tile, if it has one, is nearly empty.
    layer.topk_ids = torch.tensor([0] * 5 + [2] * 40)[torch.randperm(45)][:, None]
    assert_close(layer.triton(tiles=LayerTiles(tile, tile, sort)), layer.reference())


@pytest.mark.parametrize("sort", [False, True])
def test_tiles_fit_any_routing(sort: bool) -> None:
    """The grid is sized without looking at the routing: the worst ones must fit in it."""
    tile = TileConfig(16, 32, 32, num_warps=4, num_stages=2)
    for counts in ([1, 1, 1, 45], [17, 17, 17, 1], [0, 0, 0, 52], [33, 1, 17, 1], [16, 16, 16, 4]):
        ids = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))[:, None]
        ids = ids[torch.randperm(len(ids))].to(DEVICE)
        x = torch.randn(len(ids), 8, device=DEVICE)
        weight = torch.randn(4, 5, 8, device=DEVICE)
        out = launch_grouped_gemm(
            x,
            Projection(weight),
            ids,
            ExpertRouting.from_topk_ids(ids, 4, block_m=16) if sort else None,
            torch.full((len(ids), 5), torch.nan, device=DEVICE),
            tile,
            pairs_per_row=1,
            scatter=sort,
            dependent=False,
        )
        assert_close(out[:, None], grouped_linear_reference(x, weight, None, ids))


def test_unsorted_products_may_have_tiles_of_their_own() -> None:
    layer = random_layer()
    tiles = LayerTiles(TILE, replace(TILE, block_m=32), sort=False)
    assert_close(layer.triton(tiles=tiles), layer.reference())


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
    for activations in (None, weights) if weights else (None,):
        skip_without_fp8(DEVICE, activations)
        out = grouped_linear_triton(
            x,
            Projection(weight, scale, bias),
            layer.topk_ids,
            activations=None if activations is None else STORAGE_DTYPE[activations],
        )
        expected = grouped_linear_reference(
            x, weight, scale, layer.topk_ids, bias=bias, activations=activations
        )
        assert expected[0, 1].eq(0).all()
        (assert_close if activations is None else assert_close_quantized)(out, expected)


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


@GEMM_PATHS
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_rows_quantized_before_give_the_same_bits(tiles: LayerTiles, weights: str) -> None:
    layer = random_layer(weights=weights, dtype=torch.float16, bias=True, num_tokens=9)
    layer.topk_ids[2] = torch.tensor([-1, 3])
    expected = layer.triton(tiles=tiles, activations=weights)
    layer = layer.to(DEVICE)
    storage = STORAGE_DTYPE[weights]
    q, scale = launch_quantize_rows(layer.hidden_states, storage, dependent=False)
    rows = QuantizedRows(q, scale, torch.float16)
    routed = layer.topk_ids, layer.topk_weights
    actual = fused_moe_triton(rows, layer.experts(), *routed, activations=storage, tiles=tiles)
    assert actual.dtype == torch.float16 and torch.equal(actual, expected)
    up = layer.experts().gate_up
    actual = grouped_linear_triton(rows, up, layer.topk_ids, activations=storage)
    expected = grouped_linear_triton(layer.hidden_states, up, layer.topk_ids, activations=storage)
    assert actual.dtype == torch.float16 and torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (2, 3, 7), (4, 5000), (3, 0, 8)], ids=str)
def test_rows_are_added_in_order(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = (torch.randn(shape) * 2.0 ** torch.randint(-6, 6, shape)).to(dtype)
    expected = torch.zeros(shape[1:])
    for row in rows:
        expected += row.float()
    assert torch.equal(launch_add_rows(rows.to(DEVICE)).cpu(), expected.to(dtype))


@ALL_PATHS
@pytest.mark.parametrize("activations", [None, "int8"])
def test_skipped_ids_and_unreduced_rows(tiles: LayerTiles, activations: str | None) -> None:
    layer = random_layer(bias=True, num_tokens=4)
    layer.topk_ids[0] = torch.tensor([-1, 6])  # a token without any expert
    layer.topk_ids[3, 0] = 6
    if tiles.gate_up.block_m == 1 and activations is not None:
        pytest.skip("rows stay as they are")
    close = assert_close if activations is None else assert_close_quantized
    out = layer.triton(tiles=tiles, activations=activations)
    close(out, layer.reference(activations=activations))
    unreduced = replace(layer, topk_weights=None)
    rows = unreduced.triton(tiles=tiles, activations=activations)
    close(rows, unreduced.reference(activations=activations))
    assert rows[0].eq(0).all() and rows[3, 0].eq(0).all()
    summed = launch_weighted_sum(rows, layer.topk_weights.to(DEVICE))
    if DEVICE.type == "cuda" and tiles.gate_up.block_m == 1:
        # Another kernel, whose threads may share the sum over K in another way.
        assert_close(summed, out)
    else:
        assert torch.equal(summed, out)


@ALL_PATHS
def test_slots_are_where_weights_are(tiles: LayerTiles) -> None:
    layer = random_layer(bias=True, num_tokens=4)
    slots = torch.tensor([4, 0, 7, 2, 5, 1], dtype=torch.int32)
    gate_up_proj = torch.full((8, *layer.gate_up_proj.shape[1:]), 127, dtype=torch.int8)
    down_proj = torch.full((8, *layer.down_proj.shape[1:]), 127, dtype=torch.int8)
    gate_up_proj[slots] = layer.gate_up_proj
    down_proj[slots] = layer.down_proj
    moved = replace(layer, gate_up_proj=gate_up_proj, down_proj=down_proj, expert_to_slot=slots)
    expected = layer.triton(tiles=tiles)
    assert torch.equal(moved.triton(tiles=tiles), expected)
    # An expert that is not there gives NaN, not another expert's output.
    moved.expert_to_slot[layer.topk_ids[2, 0]] = -1
    uses_it = (layer.topk_ids == layer.topk_ids[2, 0]).any(1).to(DEVICE)
    out = moved.triton(tiles=tiles)
    assert out[uses_it].isnan().all()
    assert torch.equal(out[~uses_it], expected[~uses_it])


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_absent_experts_with_quantized_rows(weights: str, sort: bool) -> None:
    layer = random_layer(weights=weights, num_tokens=3)
    slots = torch.arange(6, dtype=torch.int32)
    slots[layer.topk_ids[1, 1]] = -1
    uses_it = (layer.topk_ids == layer.topk_ids[1, 1]).any(1).to(DEVICE)
    tiles = LayerTiles(TILE, TILE, sort)
    out = replace(layer, expert_to_slot=slots).triton(tiles=tiles, activations=weights)
    assert out[uses_it].isnan().all()
    assert torch.equal(out[~uses_it], layer.triton(tiles=tiles, activations=weights)[~uses_it])


@ALL_PATHS
def test_weights_of_a_page(tiles: LayerTiles) -> None:
    """An expert's two weights lie in one piece: only the strides of slots change."""
    layer = random_layer(num_tokens=4)
    shapes = layer.gate_up_proj.shape[1:], layer.down_proj.shape[1:]
    sizes = [s.numel() for s in shapes]
    pages = torch.zeros(6, sum(sizes) + 64, dtype=torch.int8, device=DEVICE)
    gate_up_proj = pages[:, : sizes[0]].unflatten(1, shapes[0])
    down_proj = pages[:, sizes[0] : sum(sizes)].unflatten(1, shapes[1])
    gate_up_proj.copy_(layer.gate_up_proj)
    down_proj.copy_(layer.down_proj)
    paged = replace(layer, gate_up_proj=gate_up_proj, down_proj=down_proj)
    assert torch.equal(paged.triton(tiles=tiles), layer.triton(tiles=tiles))


@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("activations", [None, "int8"])
def test_strided_inputs(num_tokens: int, activations: str | None) -> None:
    layer = random_layer(num_tokens=num_tokens, dtype=torch.float16)
    strided = replace(
        layer,
        hidden_states=layer.hidden_states.repeat_interleave(2, 1)[:, ::2],
        topk_ids=layer.topk_ids.repeat_interleave(2, 1)[:, ::2],
        topk_weights=layer.topk_weights.repeat_interleave(2, 1)[:, ::2],
    )
    assert not strided.topk_ids.is_contiguous()
    expected = layer.triton(activations=activations)
    assert torch.equal(strided.triton(activations=activations), expected)


@ALL_PATHS
@pytest.mark.parametrize("activations", [None, "int8"])
def test_same_bits_every_time_and_in_any_batch(tiles: LayerTiles, activations: str | None) -> None:
    layer = random_layer(num_tokens=6, dtype=torch.float16)
    if tiles.gate_up.block_m == 1 and activations is not None:
        pytest.skip("rows stay as they are")
    out = layer.triton(tiles=tiles, activations=activations)
    assert torch.equal(out, layer.triton(tiles=tiles, activations=activations))
    for few in (slice(0, 1), slice(3, 6)):
        # A row never meets another.
        part = layer.tokens(few).triton(tiles=tiles, activations=activations)
        assert torch.equal(part, out[few])


# ---- rows and weights in 8 bit -----------------------------------------------------------------


@GEMM_PATHS
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_quantized_rows(weights: str, tiles: LayerTiles) -> None:
    # In fp32: no other rounding decides which of two numbers a value between them becomes.
    layer = random_layer(
        num_tokens=5, weights=weights, bias=True, hidden_size=72, intermediate_size=29
    )
    out = layer.triton(tiles=tiles, activations=weights)
    assert_close_quantized(out, layer.reference(activations=weights))


@pytest.mark.parametrize("block_k", [32, 128])
def test_two_level_sums(block_k: int) -> None:
    tile = replace(TILE, block_k=block_k)
    layer = random_layer(num_tokens=3, weights="fp8", hidden_size=72)
    out = layer.triton(
        activations="fp8", two_level_sums=True, tiles=LayerTiles(tile, tile, sort=False)
    )
    assert_close_quantized(out, layer.reference(activations="fp8"))


@pytest.mark.gpu
@pytest.mark.skipif(CAPABILITY[0] != 9, reason="what two levels are for is Hopper's")
def test_two_level_sums_are_closer() -> None:
    torch.manual_seed(0)
    x, weight = torch.rand(32, 8192, device="cuda"), torch.rand(1, 64, 8192, device="cuda")
    x_q, x_scale = launch_quantize_rows(x, torch.float8_e4m3fn, dependent=False)
    weight_q, scale = quantize(weight, "fp8")
    ids = torch.zeros(32, 1, dtype=torch.int64, device="cuda")
    exact = (
        dequantize(x_q, x_scale, torch.float64) @ dequantize(weight_q, scale, torch.float64)[0].T
    )
    errors = [
        relative_error(
            launch_grouped_gemm(
                x_q,
                Projection(weight_q, scale),
                ids,
                None,
                torch.empty(32, 64, device="cuda"),
                TILE,
                x_scale=x_scale,
                pairs_per_row=1,
                two_level_sums=two_level_sums,
                dependent=False,
            ),
            exact,
        )
        for two_level_sums in (False, True)
    ]
    assert errors[1] < errors[0] / 2, errors


def test_rows_of_any_magnitude() -> None:
    """A row's scale is fp32, and its own."""
    torch.manual_seed(0)
    factors = 2.0 ** torch.tensor([-100, -24, 0, 24, 90])
    x = torch.randn(5, 40)
    weight, scale = quantize(torch.randn(2, 24, 40), "int8")
    ids = torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1], [0, 1]])
    outs = [
        grouped_linear_triton(
            rows.to(DEVICE),
            Projection(weight.to(DEVICE), scale.to(DEVICE)),
            ids.to(DEVICE),
            activations=torch.int8,
        ).cpu()
        for rows in (x, x * factors[:, None])
    ]
    torch.testing.assert_close(outs[1], outs[0] * factors[:, None, None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("eight_bit_rows", [False, True])
def test_error_is_that_of_the_format(weights: str, eight_bit_rows: bool, trained: bool) -> None:
    """At most 1.2 times what quantizing costs, whatever the arithmetic."""
    num_tokens = 3 if DEVICE.type == "cpu" else 64
    layer = random_layer(num_tokens=num_tokens, weights=None, hidden_size=64, intermediate_size=48)
    if trained:
        layer = trained_layer(num_tokens)
    activations = weights if eight_bit_rows else None
    dtype = TRITON_DTYPES[-1]
    layer = replace(layer, hidden_states=layer.hidden_states.to(dtype).float())
    exact, quantized = layer.reference(), layer.quantized(weights)
    error = relative_error(quantized.reference(activations=activations), exact)
    assert 1e-3 < error < 0.1
    quantized.hidden_states = layer.hidden_states.to(dtype)
    ours = relative_error(quantized.triton(activations=activations), exact)
    assert ours <= 1.2 * error, f"{ours:.2e}, the format's is {error:.2e}"


@pytest.mark.parametrize("to", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (130, 40), (2, 17000), (0, 8)])
def test_quantize_rows(shape: tuple[int, int], dtype: torch.dtype, to: str) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)
    if len(x):
        x[1] = 0
    q, scale = launch_quantize_rows(x.to(DEVICE), STORAGE_DTYPE[to], dependent=False)
    expected_q, expected_scale = quantize_rows(x, to)
    assert q.dtype == expected_q.dtype and scale.dtype == torch.float32
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=1e-6, atol=0)
    # A number half-way between two may become either.
    ours, theirs = q.cpu().double(), expected_q.double()
    exact = x.double() / expected_scale.double()[:, None]
    half_way = ((ours + theirs) / 2 - exact).abs() <= 1e-5 * exact.abs()
    step = 1.0 if to == "int8" else theirs.abs().clamp(min=2.0**-6) / 8
    assert ((ours == theirs) | (half_way & ((ours - theirs).abs() <= step))).all()
    if len(x):
        assert q[1].float().eq(0).all() and scale[1] == pytest.approx(SMALLEST_SCALE)


@pytest.mark.parametrize("to", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_show(bad: float, to: str) -> None:
    layer = random_layer(weights=to, num_tokens=3)
    layer.hidden_states[1, 17] = bad
    out = layer.triton(activations=to, tiles=PATHS["unsorted"]).cpu()
    assert not out[1].isfinite().any()
    assert out[0].isfinite().all() and out[2].isfinite().all()
    x = torch.ones(2, 17000, device=DEVICE)
    x[0, 16999] = bad  # in the second block
    scale = launch_quantize_rows(x, STORAGE_DTYPE[to], dependent=False)[1]
    assert scale.isfinite().tolist() == [False, True]


@triton.jit
def widen_kernel(codes_ptr, out_ptr, FP8: tl.constexpr, ASM: tl.constexpr):
    """Grid: (1,)."""
    codes = tl.arange(0, 256)
    weight = tl.load(codes_ptr + codes)
    tl.store(out_ptr + codes, widen_weights(weight, out_ptr.dtype.element_ty, FP8, ASM))


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("asm", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_widening_is_exact(weights: str, dtype: torch.dtype, asm: bool) -> None:
    assert COMPILED or not asm
    # Not in order: four neighbours differ in every bit.
    codes = (torch.arange(256) * 37 % 256).to(torch.uint8).view(torch.int8)
    out = torch.full((256,), torch.nan, dtype=dtype, device=DEVICE)
    widen_kernel[(1,)](codes.to(DEVICE), out, FP8=weights == "fp8", ASM=asm, num_warps=1)
    expected = codes.view(STORAGE_DTYPE[weights]).double()
    numbers = expected.isfinite()
    assert numbers.sum() == (254 if weights == "fp8" else 256)
    factor = 256 if weights == "fp8" else 1
    assert torch.equal(out.double().cpu()[numbers] * factor, expected[numbers])


# ---- past 32 bits ------------------------------------------------------------------------------


@pytest.mark.gpu
@ALL_PATHS
@pytest.mark.parametrize(
    "weights, eight_bit_rows", [("int8", False), ("int8", True), ("fp8", True)]
)
def test_weights_beyond_32_bits(weights: str, eight_bit_rows: bool, tiles: LayerTiles) -> None:
    """The last expert starts beyond 2**31 elements; it is the identity, rows are exact in 8 bit."""
    if tiles.gate_up.block_m == 1 and eight_bit_rows:
        pytest.skip("rows stay as they are")
    num_experts, size = 144, 4096
    weight = torch.zeros(num_experts, size, size, dtype=torch.int8, device="cuda")
    weight = weight.view(STORAGE_DTYPE[weights])
    weight[-1] = torch.eye(size, device="cuda").to(weight.dtype)
    scale = torch.ones(num_experts, size, device="cuda")
    x = 2.0 ** torch.randint(0, 6, (3, size))
    x[:, 0] = 127 if weights == "int8" else 448  # the scale is 1
    x[:, 1::2] *= -1
    ids, topk_weights = torch.full((3, 1), num_experts - 1), torch.ones(3, 1)
    layer = Layer(
        x.bfloat16(),
        weight,
        scale,
        weight,
        scale,
        ids,
        topk_weights,
        activation=Activation("relu", gated=False),
    )
    out = layer.triton(tiles=tiles, activations=weights if eight_bit_rows else None)
    assert torch.equal(out.cpu(), layer.hidden_states.relu())


@pytest.mark.gpu
@pytest.mark.parametrize("activations", [None, "int8"])
def test_rows_beyond_32_bits(activations: str | None) -> None:
    """Of x, its quantized copy and the result the last rows start beyond 2**31 elements."""
    layer = random_layer(
        num_tokens=64,
        num_experts=2,
        top_k=1,
        hidden_size=2048,
        intermediate_size=32,
        dtype=torch.bfloat16,
    ).to("cuda")
    tile = TileConfig(128, 128, 64, num_warps=8, num_stages=3)
    tiles = LayerTiles(tile, tile, sort=True)
    expected = layer.triton(tiles=tiles, activations=activations)
    num_tokens = (1 << 20) + 64
    many = replace(
        layer,
        hidden_states=torch.zeros(num_tokens, 2048, dtype=torch.bfloat16, device="cuda"),
        topk_ids=torch.zeros(num_tokens, 1, dtype=torch.int64, device="cuda"),
        topk_weights=torch.ones(num_tokens, 1, device="cuda"),
    )
    many.hidden_states[-64:] = layer.hidden_states
    many.topk_ids[-64:] = layer.topk_ids
    many.topk_weights[-64:] = layer.topk_weights
    out = many.triton(tiles=tiles, activations=activations)
    assert torch.equal(out[-64:], expected)
    assert out[:-64].eq(0).all()


# ---- compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import json, re
import torch
from compiling import compiling_for, spilled_bytes
from random_layer import random_layer

# Eight experts for every token: as many rows for each as there are tokens.
LAYERS = [
    # num_tokens, weights, dtype, activations
    (1, "int8", torch.bfloat16, None),
    (1, "fp8", torch.float16, None),
    (4, "int8", torch.bfloat16, None),
    (32, "fp8", torch.float16, None),
    (64, "int8", torch.float16, None),
    (200, "fp8", torch.bfloat16, None),
    (200, "int8", torch.bfloat16, "int8"),
    (4, "fp8", torch.bfloat16, "fp8"),
]
with compiling_for(CAPABILITY) as compiled:
    for num_tokens, weights, dtype, activations in LAYERS:
        if activations == "fp8" and CAPABILITY < 89:
            continue
        layer = random_layer(num_tokens=num_tokens, num_experts=8, top_k=8, hidden_size=1024,
                             intermediate_size=704, weights=weights, dtype=dtype)
        layer.triton(activations=activations)
        for kernel in compiled:
            ptx = kernel.asm["ptx"]
            print(json.dumps({
                "kernel": kernel.metadata.name,
                "layer": f"{num_tokens} tokens, {weights}, {dtype}, {activations}",
                "num_tokens": num_tokens,
                "activations": activations,
                "shared": kernel.metadata.shared,
                "spilled": spilled_bytes(kernel.asm["cubin"]),
                "products": sorted(set(re.findall(r"(?:wgmma|tcgen05|mma)\\S*\\.[\\w:.]*", ptx))),
                "conversions": sorted(set(re.findall(r"cvt\\.\\S+", ptx))),
                "waits": "griddepcontrol.wait" in ptx,
            }))
        compiled.clear()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_compiles(capability: int) -> None:
    kernels = run_compiler(f"CAPABILITY = {capability}\n{COMPILE}")
    counts = {name: 0 for name in ("gemv", "grouped_gemm", "quantize_rows", "weighted_sum")}
    for kernel in kernels:
        name, eight_bit = kernel["kernel"].removesuffix("_kernel"), kernel["activations"]
        counts[name] += 1
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability] * 1024, kernel
        assert kernel["waits"] == (capability >= 90), kernel
        # Weights are widened without conversion instructions.
        if name == "gemv" or (name == "grouped_gemm" and eight_bit is None):
            slow = [c for c in kernel["conversions"] if ".s8" in c or "e4m3" in c]
            slow += [c for c in kernel["conversions"] if c.startswith("cvt.rn.f32.")]
            assert not slow, kernel
        if name == "grouped_gemm":
            products = " ".join(kernel["products"])
            assert products, f"no tensor cores: {kernel}"
            if capability == 90 and kernel["num_tokens"] >= 64:
                assert "wgmma" in products, kernel
            if eight_bit == "int8":
                assert "s8.s8" in products, kernel
            if eight_bit == "fp8":
                assert "e4m3.e4m3" in products or "kind::f8f6f4" in products, kernel
    fp8 = capability >= 89
    assert counts == {
        "gemv": 4,
        "grouped_gemm": 10 + 2 * fp8,
        "quantize_rows": 2 + 2 * fp8,
        "weighted_sum": 5 + fp8,
    }


COMPILE_SIZES = """
import json
import torch
from compiling import compiling_for, spilled_bytes
from random_layer import random_layer

with compiling_for(90) as compiled:
    for size in (1032, 1028, 1026):
        for num_tokens, weights, activations in (
            (4, "int8", None), (32, "fp8", None), (32, None, None), (16, "int8", "int8"),
        ):
            layer = random_layer(num_tokens=num_tokens, num_experts=8, top_k=8, hidden_size=size,
                                 intermediate_size=size, weights=weights, dtype=torch.bfloat16)
            layer.triton(activations=activations)
            for kernel in compiled:
                print(json.dumps({
                    "kernel": kernel.metadata.name,
                    "layer": f"{size}, {num_tokens} tokens, {weights}, {activations}",
                    "size": size,
                    "asynchronous": "cp.async" in kernel.asm["ptx"],
                    "spilled": spilled_bytes(kernel.asm["cubin"]),
                }))
            compiled.clear()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_sizes_that_16_does_not_divide_spill_nothing() -> None:
    kernels = [k for k in run_compiler(COMPILE_SIZES) if k["kernel"] == "grouped_gemm_kernel"]
    assert len(kernels) == 24
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["asynchronous"] or kernel["size"] % 4, kernel


@pytest.mark.parametrize("weights", [torch.int8, torch.bfloat16])
def test_tile_grows_with_rows(weights: torch.dtype) -> None:
    shape = LayerShape(128, 8, 2048, 768)
    blocks = [
        heuristic_tiles(shape, num_tokens, weights, torch.bfloat16).gate_up.block_m
        for num_tokens in (1, 4, 64, 512, 1024, 4096)
    ]
    assert blocks == sorted(blocks) and blocks[0] == 1 and blocks[-1] == 128
