"""Linear layers of few rows, against sums in fp64."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from compiling import ARCHITECTURES, SHARED_MEMORY, run_compiler
from graphs import capture, no_synchronization
from random_layer import DEVICE, TRITON_DTYPES
from torch.fx.experimental.proxy_tensor import make_fx

from qmoe_kernels import cpu
from qmoe_kernels import linear as linear_module
from qmoe_kernels.linear import LinearTile, choose_tile, launch_linear, linear, linear_pays

NUM_ROWS = [1, 2, 3, 5, 8, 16, 33, 64]
HALF = TRITON_DTYPES[-1]  # of 16 bits


def random_product(
    num_rows: int, out_features: int, in_features: int, dtype: torch.dtype, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows, weight and bias; the bias is as large as the sums."""
    torch.manual_seed(0)
    x = torch.randn(num_rows, in_features, device=DEVICE)
    weight = torch.randn(out_features, in_features, device=DEVICE) * in_features**-0.5
    b = torch.randn(out_features, device=DEVICE).to(dtype) if bias else None
    return x.to(dtype), weight.to(dtype), b


def assert_exact(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """Compare with the exact result: sums in fp32, then one rounding to the dtype."""
    assert out.dtype == x.dtype and out.is_contiguous()
    x, weight = x.double(), weight.double()
    exact, size = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert out.shape == exact.shape
    error = (out.double() - exact).abs()
    bound = torch.finfo(out.dtype).eps / 2 * exact.abs() + 32 * 2.0**-24 * size
    if out.dtype == torch.float16:
        bound += 2.0**-25  # half of a subnormal's last bit
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_rows(dtype: torch.dtype, num_rows: int, bias: bool) -> None:
    x, weight, b = random_product(num_rows, 9, 704, dtype, bias)
    assert_exact(launch_linear(x, weight, b), x, weight, b)


@pytest.mark.parametrize("num_rows", [1, 16])
@pytest.mark.parametrize("out_features, in_features", [(1, 1), (7, 5), (33, 64), (4, 2880)])
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_sizes(dtype: torch.dtype, out_features: int, in_features: int, num_rows: int) -> None:
    x, weight, b = random_product(num_rows, out_features, in_features, dtype, True)
    assert_exact(launch_linear(x, weight, b), x, weight, b)


@pytest.mark.parametrize(
    "tile",
    [
        LinearTile(False, 1, 1, 1024, 1),  # all columns at once
        LinearTile(False, 2, 4, 256, 4),  # a loop
        LinearTile(False, 8, 2, 64, 2, num_stages=1),
        LinearTile(False, 4, 8, 256, 8, prefetch=False),
        LinearTile(True, 8, 16, 16, 4),
        LinearTile(True, 8, 32, 128, 8),  # all columns at once
        LinearTile(True, 16, 16, 64, 2, num_stages=2),
        LinearTile(True, 64, 32, 32, 8, prefetch=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("in_features", [1024, 601])
def test_tiles(in_features: int, tile: LinearTile) -> None:
    num_rows = 3 if tile.block_m == 1 else 11
    x, weight, b = random_product(num_rows, 5 if tile.block_n == 1 else 35, in_features, HALF, True)
    assert_exact(launch_linear(x, weight, b, tile=tile), x, weight, b)


@pytest.mark.parametrize("num_rows", [1, 9])
def test_a_bias_is_added_before_the_rounding(num_rows: int) -> None:
    x, weight, _ = random_product(num_rows, 8, 64, HALF)
    b = -(x[0].double() @ weight.double().T).to(HALF)
    assert_exact(launch_linear(x, weight, b), x, weight, b)
    # What is left is what a rounding before the bias would have lost.
    assert launch_linear(x, weight, b)[0].count_nonzero() > 4


@pytest.mark.parametrize("num_rows", [2, 12])
def test_parts_of_larger_tensors(num_rows: int) -> None:
    x, weight, b = random_product(num_rows, 24, 96, HALF, True)
    for x_part, weight_part in (
        (x, weight[8:20]),  # some of a merged matrix
        (x[:, :72], weight[5:11, 24:]),
        (x[:, 8:80], weight[20:, :72]),
        (x[:, 1:4], weight[1:4, 3:6]),
        (x.T.contiguous().T, weight[:3]),  # columns that lie apart
        (x[:1].expand(3, 96), weight[:3]),
    ):
        bias = None if b is None else b[: len(weight_part)]
        out = launch_linear(x_part, weight_part, bias)
        assert_exact(out, x_part, weight_part, bias)
    out = launch_linear(x.view(num_rows, 1, 96)[..., :64], weight[:, :64], b)
    assert out.shape == (num_rows, 1, 24)
    assert_exact(out[:, 0], x[:, :64], weight[:, :64], b)
    assert torch.equal(launch_linear(x[0], weight, b), launch_linear(x[:1], weight, b)[0])
    assert launch_linear(x[:0], weight, b).shape == (0, 24)


@pytest.mark.parametrize("num_rows", [2, 5, 17])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_rows_depend_on_themselves_alone(dtype: torch.dtype, num_rows: int) -> None:
    x, weight, _ = random_product(num_rows, 6, 300, dtype)
    expected = launch_linear(x, weight, None)
    assert torch.equal(launch_linear(x, weight, None), expected)
    others = x.clone()
    others[:-1] *= 3.0
    others[0, 7] = torch.nan
    out = launch_linear(others, weight, None)
    assert torch.equal(out[-1], expected[-1])
    assert out[0].isnan().all() and not out[1:].isnan().any()


def test_equal_rows_have_equal_results() -> None:
    for num_rows in (4, 20):
        x, weight, _ = random_product(num_rows, 6, 300, HALF)
        out = launch_linear(x[:1].expand_as(x), weight, None)
        assert torch.equal(out, out[:1].expand_as(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_the_cpu_it_is_torch(dtype: torch.dtype) -> None:
    x, weight, b = (t.cpu() for t in random_product(6, 20, 30, dtype, True) if t is not None)
    for rows in (x, x[0], x.view(2, 3, 30), x[:0]):
        assert torch.equal(linear(rows, weight, b), F.linear(rows, weight, b))
    with pytest.raises(RuntimeError):
        linear(x, weight[:, 1:], b)
    with pytest.raises(RuntimeError):
        linear(x, weight.double())


def test_tiles_fit_any_shape() -> None:
    for num_rows in range(1, 65):
        for out_features in (1, 127, 128, 2048, 151936):
            for in_features in (1, 100, 2880, 16384):
                for itemsize in (2, 4):
                    sizes = (num_rows, out_features, in_features, itemsize)
                    tile = choose_tile(*sizes, 99 << 10)
                    assert tile.dot is False or itemsize == 2
                    weights = tile.block_n * tile.block_k * itemsize
                    assert weights <= max(32 << 10, tile.block_k * itemsize), tile
                    registers = tile.block_m * tile.block_n * tile.block_k / tile.num_warps / 32
                    assert tile.dot or registers <= 256, tile


def test_pays_up_to_some_rows() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for out_features, most in ((4096, 2), (2048, 16), (128, 64)):
            weight = torch.empty(out_features, 2048, dtype=dtype, device="meta")
            bound = most if dtype == torch.bfloat16 else 8
            pays = [linear_pays(num_rows, weight) for num_rows in (1, bound, bound + 1, 1000)]
            assert pays == [True, True, False, False]


# ---- on a CPU ----------------------------------------------------------------------------------


@pytest.fixture
def natively(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's loops, also where torch is quicker; they fail where torch multiplies."""
    if cpu.native.address_of("linear") is None:
        pytest.skip("no native loops on this machine")
    monkeypatch.setattr(cpu, "LINEAR_SIZE", 1)
    monkeypatch.setattr(F, "linear", None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("out_features, in_features", [(1, 1), (7, 5), (301, 72), (64, 2880)])
@torch.no_grad()
def test_native_products(
    out_features: int, in_features: int, num_rows: int, bias: bool, natively: None
) -> None:
    x, weight, b = (
        None if t is None else t.cpu()
        for t in random_product(num_rows, out_features, in_features, torch.bfloat16, bias)
    )
    assert x is not None and weight is not None
    out = linear(x, weight, b)
    assert_exact(out, x, weight, b)
    for row in range(num_rows):  # whatever the other rows are, and however they lie
        alone = linear(x[row], weight, b)
        assert alone.shape == (out_features,) and torch.equal(alone, out[row])
    wider = torch.randn(num_rows, 1, in_features + 3).bfloat16()
    wider[:, 0, :in_features] = x
    assert torch.equal(linear(wider[:, :, :in_features], weight, b)[:, 0], out)
    rows = torch.full((out_features, in_features + 5), float("nan"), dtype=torch.bfloat16)
    rows[:, :in_features] = weight
    assert torch.equal(linear(x, rows[:, :in_features], b), out)


@torch.no_grad()
def test_native_products_of_what_is_no_number(natively: None) -> None:
    x, weight = torch.ones(2, 40).bfloat16(), torch.ones(6, 40).bfloat16()
    x[1, 39], weight[2, 3], weight[4, 5] = float("inf"), float("nan"), float("-inf")
    expected = (x.double() @ weight.double().T).bfloat16()
    torch.testing.assert_close(linear(x, weight), expected, rtol=0, atol=0, equal_nan=True)


def test_gradients_and_many_rows_are_torch_s() -> None:
    weight = torch.randn(512, 512).bfloat16().requires_grad_()
    linear(torch.ones(1, 512, dtype=torch.bfloat16), weight).sum().backward()
    assert weight.grad is not None and bool((weight.grad == 1).all())
    with torch.no_grad():
        x = torch.randn(cpu.LINEAR_ROWS + 1, 512).bfloat16()
        assert torch.equal(linear(x, weight), F.linear(x, weight))


@torch.no_grad()
def test_what_traces_or_transforms_sees_torch_s_product() -> None:
    """Who looks on sees no product that was made by addresses."""
    weight = torch.randn(512, 512).bfloat16()
    x, other = torch.randn(2, 3, 512).bfloat16()
    expected = F.linear(other, weight)

    def product(x: torch.Tensor) -> torch.Tensor:
        return linear(x, weight)

    assert torch.equal(make_fx(product)(x)(other), expected)
    assert torch.equal(torch.jit.trace(product, (x,))(other), expected)
    assert torch.equal(torch.func.functionalize(product)(other), expected)
    torch.testing.assert_close(torch.func.vmap(product)(other), expected)
    assert torch.equal(torch.compile(product, backend="eager", fullgraph=True)(other), expected)
    _, tangent = torch.func.jvp(product, (x,), (other,))
    torch.testing.assert_close(tangent, expected)
    with torch.autocast("cpu", torch.float16):
        assert linear(x, weight).dtype == F.linear(x, weight).dtype == torch.float16
    for odd in (torch._neg_view(weight), weight[:1].expand(512, 512)):
        torch.testing.assert_close(linear(x, odd), F.linear(x, odd), rtol=2**-6, atol=0.5)


# ---- on a GPU ----------------------------------------------------------------------------------

SHAPES = [(4096, 2048), (2048, 4096), (128, 2048), (5120, 2048), (2880, 2880), (2048, 704)]


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("out_features, in_features", SHAPES)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_shapes_of_models(
    dtype: torch.dtype, out_features: int, in_features: int, num_rows: int
) -> None:
    x, weight, b = random_product(num_rows, out_features, in_features, dtype, True)
    for bias in (None, b):
        out = launch_linear(x, weight, bias)
        assert_exact(out, x, weight, bias)
        assert torch.equal(out, launch_linear(x, weight, bias))
        assert_exact(linear(x, weight, bias), x, weight, bias) if dtype != torch.float32 else None


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8])
def test_a_large_head(num_rows: int) -> None:
    x, weight, _ = random_product(num_rows, 151936, 2048, torch.bfloat16)
    assert_exact(launch_linear(x, weight, None), x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 8, 16])
def test_a_chain_in_a_cuda_graph_without_synchronization(num_rows: int) -> None:
    x, up, b = random_product(num_rows, 4096, 2048, torch.bfloat16, True)
    down = random_product(1, 2048, 4096, torch.bfloat16)[1]
    assert b is not None

    def steps(y: torch.Tensor):  # each starts while the one before it ends
        for _ in range(10):
            yield (y := launch_linear(y, up, b))
            yield (y := launch_linear(y, down, None))

    def chain() -> torch.Tensor:
        *_, last = steps(x)
        return last

    chain()
    with no_synchronization():
        chain()
    graph, y = capture(chain)
    for _ in range(3):
        x.normal_()
        graph.replay()
        expected = x
        for step in steps(x):
            torch.cuda.synchronize()
            expected = step
        assert torch.equal(y, expected)


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [48, 64, 99, 163, 227])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_in_shared_memory(itemsize: int, limit: int) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    for num_rows in (1, 2, 4, 8, 16, 64):
        for out_features in (8, 512, 2048, 32768):
            weight = torch.empty(out_features, 1, dtype=dtype, device="meta")
            if not linear_pays(num_rows, weight):
                continue
            for in_features in (64, 2880, 8192, 8200, 12288, 16384):
                tile = choose_tile(num_rows, out_features, in_features, itemsize, limit << 10)
                assert tile is not None
                stage = tile.block_k * (tile.block_m + tile.block_n) * itemsize
                stage *= tile.num_warps if tile.dot else 1
                assert stage * (tile.num_stages - 1) <= limit << 10, tile


def test_torch_multiplies_where_no_tile_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "shared_memory", lambda device: 16 << 10)
    x, weight, b = random_product(16, 64, 2048, HALF, True)
    assert choose_tile(16, 64, 2048, 2, 16 << 10) is None
    assert torch.equal(launch_linear(x, weight, b), F.linear(x, weight, b))


# ---- compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import json
import torch
from compiling import compiling_for, spilled_bytes
from qmoe_kernels import linear
from qmoe_kernels.launching import has_dependent_launch

for capability in ARCHITECTURES:
    has_dependent_launch.cache_clear()
    linear.shared_memory = lambda device: SHARED_MEMORY[capability] << 10
    for num_rows, out_features, in_features, dtype in [
        (1, 4096, 2048, torch.bfloat16),
        (8, 128, 2048, torch.float16),
        (1, 1024, 8192, torch.float32),
        (8, 2048, 4096, torch.bfloat16),
        (64, 2880, 2880, torch.float16),
    ]:
        x = torch.zeros(num_rows, in_features, dtype=dtype)
        weight = torch.zeros(out_features, in_features, dtype=dtype)
        with compiling_for(capability) as compiled:
            linear.launch_linear(x, weight, weight[:, 0])
        ptx = compiled[0].asm["ptx"]
        print(json.dumps({
            "capability": capability,
            "dot": "mma.sync" in ptx,
            "tensor_cores": num_rows >= 8 and out_features > 128,
            "shared": compiled[0].metadata.shared,
            "spilled": spilled_bytes(compiled[0].asm["cubin"]),
            "wide": "ld.global.v4.b32" in ptx or "cp.async.cg.shared.global" in ptx,
            "waits": "griddepcontrol.wait" in ptx,
            # Of many outputs tensor cores' weights were slower when they were asked for twice.
            "prefetches": num_rows == 1 or out_features == 128,
            # Weights are on their way before the wait.
            "early": any(
                0 <= ptx.find(asked) < ptx.find("griddepcontrol.wait")
                for asked in ("ld.global.v4.b32", "prefetch.global.L2")
            ),
        }))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_compiles_for_every_architecture() -> None:
    setup = f"ARCHITECTURES = {ARCHITECTURES}\nSHARED_MEMORY = {SHARED_MEMORY}\n"
    kernels = run_compiler(setup + COMPILE)
    assert len(kernels) == 5 * len(ARCHITECTURES)
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[kernel["capability"]] * 1024, kernel
        assert kernel["spilled"] <= 16 and kernel["wide"], kernel  # a number or two, for sm_80
        assert kernel["dot"] == kernel["tensor_cores"], kernel
        assert kernel["waits"] == (kernel["capability"] >= 90), kernel
        assert kernel["early"] == (kernel["waits"] and kernel["prefetches"]), kernel


COMPILE_WIDE = """
import json
import torch
from compiling import compiling_for
from qmoe_kernels import linear
from qmoe_kernels.launching import has_dependent_launch

for capability in (86, 89):
    has_dependent_launch.cache_clear()
    linear.shared_memory = lambda device: SHARED_MEMORY[capability] << 10
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for num_rows, out_features in ((8, 512), (2, 4096), (16, 2048)):
            for in_features in (8192, 8200, 16384):
                weight = torch.zeros(out_features, in_features, dtype=dtype)
                if not linear.linear_pays(num_rows, weight.to("meta")):
                    continue
                x = torch.zeros(num_rows, in_features, dtype=dtype)
                with compiling_for(capability) as compiled:
                    linear.launch_linear(x, weight, None)
                print(json.dumps({
                    "case": f"{capability} {dtype} {num_rows} {out_features} {in_features}",
                    "shared": compiled[0].metadata.shared,
                }))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_many_columns_fit_on_consumer_gpus() -> None:
    kernels = run_compiler(f"SHARED_MEMORY = {SHARED_MEMORY}\n" + COMPILE_WIDE)
    assert len(kernels) == 2 * (6 + 9 + 9)
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[86] * 1024, kernel
