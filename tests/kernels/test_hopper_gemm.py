"""The kernels for Hopper: interpreted in part, layouts on paper, compiled, and on a GPU."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch
from compiling import SHARED_MEMORY, run_compiler
from random_layer import DEVICE, Layer, assert_close, random_layer, relative_error

from qmoe_kernels import Activation, ExpertRouting, widening
from qmoe_kernels import hopper_gemm as hopper
from qmoe_kernels.experts import Projection
from qmoe_kernels.heuristic import hopper_tiles
from qmoe_kernels.layer import fused_moe_triton
from qmoe_kernels.quantization import STORAGE_DTYPE, QuantizedRows, quantize
from qmoe_kernels.rows import launch_quantize_rows

needs_gluon = pytest.mark.skipif(hopper.gluon is None, reason="Triton has no Gluon")
ON_HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] == 9


def reordered(x: torch.Tensor, block_k: int) -> torch.Tensor:
    """Order K as the module's docstring says; K a multiple of ``block_k``."""
    x = x.unflatten(1, (-1, 4, block_k // 16, 2, 2))
    return x.permute(0, 1, 3, 4, 2, 5).flatten(1)


def tokens_and_routing(in_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, ExpertRouting]:
    x = torch.randn(7, in_features, device=DEVICE).to(dtype)
    # Experts 4 and 5 are another rank's: their pairs come last.
    topk_ids = torch.rand(7, 6, device=DEVICE).topk(2).indices
    return x, ExpertRouting.from_topk_ids(topk_ids, 4, block_m=16)


@pytest.mark.parametrize("in_features", [16, 64, 176, 4096])
@pytest.mark.parametrize("permute", [False, True])
def test_sort_rows(in_features: int, permute: bool) -> None:
    x, routing = tokens_and_routing(in_features, torch.float16)
    out = hopper.launch_sort_rows(x, routing.positions, 2, permute=permute)
    expected = x[routing.sorted_token_ids]
    if permute:
        expected = torch.nn.functional.pad(expected, (0, -in_features % hopper.BLOCK_K_16))
        expected = reordered(expected, hopper.BLOCK_K_16)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("in_features", [16, 176, 4096])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantize_sorted_rows(in_features: int, dtype: torch.dtype) -> None:
    x, routing = tokens_and_routing(in_features, torch.float16)
    x[3] = 0.0
    x[5, 3] = float("nan")
    out, scale = launch_quantize_rows(
        x, dtype, places=routing.positions, dependent=True, early=True
    )
    expected, expected_scale = launch_quantize_rows(x, dtype, dependent=False)
    tokens = routing.sorted_token_ids
    assert torch.equal(scale.isnan(), tokens == 5)
    finite = tokens != 5
    assert torch.equal(scale[finite], expected_scale[tokens][finite])
    rows, expected = out.view(torch.uint8), expected.view(torch.uint8)[tokens]
    assert torch.equal(rows[finite], expected[finite])


@pytest.mark.parametrize("in_features", [16, 176, 4096])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_sort_rows_that_are_quantized(in_features: int, dtype: torch.dtype) -> None:
    x, routing = tokens_and_routing(in_features, torch.float16)
    q, scale = launch_quantize_rows(x, dtype, dependent=False)
    out, out_scale = hopper.launch_sort_quantized_rows(
        QuantizedRows(q, scale, x.dtype), routing.positions, 2
    )
    tokens = routing.sorted_token_ids
    assert out.dtype == dtype
    assert torch.equal(out.view(torch.uint8), q.view(torch.uint8)[tokens])
    assert torch.equal(out_scale, scale[tokens])


@needs_gluon
def test_operands_meet_where_weights_lie() -> None:
    """A thread's bytes of weights are wgmma's first operand, for K in `reordered`'s order."""
    block_k = hopper.BLOCK_K_16
    # Where K went: column c of rows lies at position[c].
    position = torch.empty(block_k, dtype=torch.int64)
    position[reordered(torch.arange(block_k)[None], block_k)[0]] = torch.arange(block_k)
    bases = hopper._register_bases.fn(block_k)
    held = {}
    for lane in range(32):
        for register in range(1 << len(bases)):
            column = lane % 4 * (block_k // 4)
            row = lane // 4
            for bit, (row_step, column_step) in enumerate(bases):
                row += row_step * (register >> bit & 1)
                column += column_step * (register >> bit & 1)
            held.setdefault(lane, set()).add((row, int(position[column])))
    # PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16", matrix A, of each 16 columns.
    for lane in range(32):
        fragments = {
            (lane // 4 + 8 * i, 16 * step + 8 * h + lane % 4 * 2 + e)
            for step in range(block_k // 16)
            for i in range(2)
            for h in range(2)
            for e in range(2)
        }
        assert held[lane] == fragments


def test_words_part_into_first_and_second_bytes() -> None:
    """Bytes b0, b1 are an even word, b2, b3 the next: first ones become neighbours, and second."""
    for name in ("INT8", "E4M3"):
        for to in ("BF16", "FP16"):
            asm = getattr(widening, f"_{name}_WORDS_TO_{to}").value
            taken = []
            for selector in re.findall(r"prmt\.b32 .*0x([0-9A-F]{4});", asm):
                taken.append([int(digit) for digit in reversed(selector) if int(digit) < 4])
            assert taken == [[0, 2], [1, 3]], (name, to)


@needs_gluon
def test_words_of_weights_are_an_operand_of_transposed_products() -> None:
    """Words lie in registers as the first operand does, whose rows i and i + 8 they hold."""
    held: dict[int, set[tuple[int, int]]] = {}
    for lane in range(32):
        for register in range(16):
            sums = sum(step * (lane >> bit & 1) for bit, step in enumerate((2, 4)))
            word = sum(step * (lane >> 2 + bit & 1) for bit, step in enumerate((1, 2, 4)))
            sums += sum(step * (register >> bit & 1) for bit, step in enumerate((1, 8, 16, 32)))
            for byte in range(2):  # of channel 2 * word + byte, which is row word + 8 * byte
                held.setdefault(lane, set()).add((word + 8 * byte, sums))
    for lane in range(32):
        fragments = {
            (lane // 4 + 8 * i, 16 * step + 8 * h + lane % 4 * 2 + e)
            for step in range(4)
            for i in range(2)
            for h in range(2)
            for e in range(2)
        }
        assert held[lane] == fragments


# ---- compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import json, re
import torch
from compiling import compiling_for, spilled_bytes
from qmoe_kernels import Activation, ExpertRouting
from qmoe_kernels import hopper_gemm as hopper
from qmoe_kernels.experts import Projection
from qmoe_kernels.heuristic import hopper_tiles

DTYPES = {
    "int8": torch.int8, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16
}
routing = ExpertRouting(torch.zeros(512, dtype=torch.int32), torch.zeros(9, dtype=torch.int32), 2)
table = torch.zeros(20, 4, dtype=torch.int32)
limited = Activation(alpha=1.702, up_shift=1.0, limit=7.0)
with compiling_for(90) as compiled:
    for rows, weights, gated, block_m, tail_m, num_stages in [
        ("bf16", "int8", True, 128, 64, 4), ("bf16", "int8", False, 256, 128, 4),
        ("bf16", "fp8", True, 256, 64, 4), ("fp16", "fp8", False, 64, 16, 20),
        ("fp16", "int8", True, 64, 0, 3), ("bf16", "int8", True, 16, 8, 6),
        ("bf16", "fp8", False, 128, 16, 4), ("int8", "int8", True, 128, 64, 3),
        ("int8", "int8", False, 256, 16, 4), ("int8", "int8", True, 32, 8, 4),
        ("fp8", "fp8", True, 128, 16, 3), ("fp8", "fp8", False, 256, 128, 4),
        ("fp8", "fp8", True, 64, 8, 4), ("bf16", "bf16", True, 128, 16, 3),
        ("bf16", "bf16", False, 256, 64, 3), ("fp16", "fp16", True, 32, 8, 6),
        ("bf16", "int8", None, 128, 16, 4), ("bf16", "int8", None, 256, 64, 4),
        ("bf16", "fp8", None, 128, 64, 4), ("fp16", "int8", None, 64, 16, 6),
        ("fp16", "fp8", None, 32, 16, 6), ("bf16", "bf16", None, 128, 64, 3),
        ("bf16", "bf16", None, 256, 64, 4),
    ]:
        transposed = gated is None
        quantized, widen = not rows.endswith("16"), rows.endswith("16") > weights.endswith("16")
        dtype = DTYPES[rows]
        out_dtype = torch.float16 if rows == "fp16" else torch.bfloat16
        features = 512
        hopper.launch_hopper_gemm(
            torch.zeros(512, 1024, dtype=dtype),
            Projection(
                torch.zeros(8, 1024, features, dtype=DTYPES[weights]) if transposed else
                torch.zeros(8, features * 2 if gated else features, 1024, dtype=DTYPES[weights]),
                None if weights == rows and not quantized
                else torch.zeros(8, features * 2 if gated else features),
                torch.zeros(8, features * 2 if gated else features, dtype=torch.bfloat16),
            ),
            routing, table, torch.zeros(512, features, dtype=out_dtype),
            hopper_tiles(block_m, dtype, num_stages, tail_m).gate_up, out_features=features,
            x_scale=torch.zeros(512) if quantized else None, activation=limited if gated else None,
            scatter=not gated, permute=widen and bool(gated), transposed=transposed,
            expert_scale=torch.zeros(8) if transposed and widen else None,
        )
        kernel = compiled[-1]
        ptx = kernel.asm["ptx"]
        print(json.dumps({
            "case": f"{rows} {weights} gated={gated} {block_m} {tail_m}",
            "widen": widen, "transposed": transposed,
            "matrix_loads": len(re.findall(r"ldmatrix\\S+x4\\.trans", ptx)),
            "heights": len(hopper.tile_heights(block_m, tail_m)),
            "shared": kernel.metadata.shared,
            "spilled": spilled_bytes(kernel.asm["cubin"]),
            "products": len(set(re.findall(r"wgmma.mma_async\\S+", ptx))),
            "byte_loads": len(re.findall(r"ld\\.shared\\.[bsu]8", ptx)),
            "wide_loads": len(re.findall(r"ld\\.shared\\.v4\\.b32", ptx)),
        }))
"""


@pytest.mark.slow
@needs_gluon
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_compiles() -> None:
    kernels = run_compiler(COMPILE)
    assert len(kernels) == 23
    for kernel in kernels:
        # A height is a kind of product, but for two of 128 rows instead of one of 256.
        assert kernel["products"] >= min(kernel["heights"], 4), f"no tensor cores: {kernel}"
        assert kernel["shared"] <= SHARED_MEMORY[90] * 1024, kernel
        assert kernel["spilled"] <= 32, kernel
        if kernel["transposed"]:
            assert kernel["spilled"] == 0, kernel
            # Two for a step's weights, in each of three places.
            assert not kernel["widen"] or kernel["matrix_loads"] >= 6, kernel
        elif kernel["widen"]:
            # Weights come sixteen bytes at a time: two loads in each of three places.
            assert kernel["wide_loads"] >= 6 and not kernel["byte_loads"], kernel


# ---- on a GPU ----------------------------------------------------------------------------------


def run(
    layer: Layer,
    activations: str | None = None,
    block_m: int = 128,
    tail_m: int = 64,
    num_stages: int = 4,
) -> torch.Tensor:
    layer = layer.to("cuda")
    storage = None if activations is None else STORAGE_DTYPE[activations]
    assert hopper.hopper_supports(
        layer.hidden_states, layer.experts(), layer.topk_ids, activations=storage
    )
    tiles = hopper_tiles(block_m, storage or layer.hidden_states.dtype, num_stages, tail_m)
    return layer.triton(activations=activations, tiles=tiles)


def moe(**sizes: object) -> Layer:
    defaults = {
        "num_tokens": 300,
        "hidden_size": 256,
        "intermediate_size": 192,
        "dtype": torch.bfloat16,
    }
    return random_layer(**(defaults | sizes))


@pytest.mark.gpu
@needs_gluon
@pytest.mark.skipif(not ON_HOPPER, reason="needs compute capability 9")
class TestOnHopper:
    @pytest.mark.parametrize(
        ("block_m", "tail_m", "num_stages"),
        [(8, 0, 6), (16, 0, 6), (32, 16, 4), (64, 0, 3), (64, 8, 5), (128, 64, 3), (128, 0, 4),
         (128, 16, 4), (256, 128, 4), (256, 16, 3)],
    )  # fmt: skip
    @pytest.mark.parametrize(
        ("weights", "quantized"),
        [("int8", False), ("fp8", False), ("int8", True), ("fp8", True), (None, False)],
    )
    def test_formats(
        self, weights: str | None, quantized: bool, block_m: int, tail_m: int, num_stages: int
    ) -> None:
        layer = moe(weights=weights, bias=True)
        # An expert for every height, and one for more than one tile of all of them.
        ids = torch.repeat_interleave(torch.arange(6), torch.tensor([5, 12, 25, 50, 100, 408]))
        layer.topk_ids = ids[torch.randperm(600)].view(300, 2)
        out = run(layer, weights if quantized else None, block_m, tail_m, num_stages)
        expected = layer.reference(activations=weights if quantized else None)
        # A sum that ends a little off may be rounded to the next 8-bit number.
        assert relative_error(out, expected) < (0.03 if quantized else 0.015)

    @pytest.mark.parametrize(
        "case",
        [
            {"num_tokens": 1},
            {"num_experts": 40, "top_k": 8},
            {"num_tokens": 1000, "num_experts": 2, "top_k": 1},
            {"hidden_size": 16, "intermediate_size": 16},
            {"hidden_size": 720, "intermediate_size": 176},  # no multiple of any block
            {"hidden_size": 64, "intermediate_size": 128},  # one step, two steps
            {"hidden_size": 80, "intermediate_size": 400},  # two steps and seven
            {"dtype": torch.float16},
            {"activation": Activation("relu2", gated=False), "bias": True},
        ],
        ids=str,
    )
    @pytest.mark.parametrize(
        ("weights", "activations"), [("int8", None), ("int8", "int8"), (None, None)]
    )
    def test_sizes(
        self, case: dict[str, object], weights: str | None, activations: str | None
    ) -> None:
        layer = moe(weights=weights, **case)
        error = relative_error(run(layer, activations), layer.reference(activations=activations))
        assert error < (0.015 if activations is None else 0.03)

    @pytest.mark.parametrize("weights", ["int8", "fp8"])
    def test_rows_quantized_before_give_the_same_bits(self, weights: str) -> None:
        layer = moe(weights=weights, bias=True).to("cuda")
        layer.topk_ids[0] = torch.tensor([-1, 6])
        expected = run(layer, weights)
        storage = STORAGE_DTYPE[weights]
        q, scale = launch_quantize_rows(layer.hidden_states, storage, dependent=False)
        rows = QuantizedRows(q, scale, layer.hidden_states.dtype)
        tiles = hopper_tiles(128, storage, 4, 64)
        routed = layer.topk_ids, layer.topk_weights
        actual = fused_moe_triton(rows, layer.experts(), *routed, activations=storage, tiles=tiles)
        assert torch.equal(actual, expected)

    def test_skipped_ids_and_unreduced_rows(self) -> None:
        layer = moe(bias=True)
        layer.topk_ids[0] = torch.tensor([-1, 6])
        layer.topk_ids[3, 0] = 6
        assert_close(run(layer), layer.reference())
        unreduced = replace(layer, topk_weights=None)
        assert_close(run(unreduced), unreduced.reference())

    def test_absent_experts_are_nan(self) -> None:
        layer = moe()
        layer.expert_to_slot = torch.arange(6, dtype=torch.int32)
        layer.expert_to_slot[4] = -1
        out = run(layer).cpu()
        uses_it = (layer.topk_ids == 4).any(1)
        assert out[uses_it].isnan().all()
        assert_close(out[~uses_it], layer.reference()[~uses_it])

    @pytest.mark.parametrize("activations", [None, "int8"])
    def test_small_tensors_may_have_strides(self, activations: str | None) -> None:
        layer = moe(bias=True).to("cuda")
        slots = torch.tensor([3, 0, 5, 1, 4, 2], device="cuda")
        place = slots.argsort()
        layer.gate_up_proj, layer.down_proj = layer.gate_up_proj[place], layer.down_proj[place]
        layer.expert_to_slot = slots.int()
        expected = run(layer, activations)
        for name in (
            "expert_to_slot",
            "gate_up_proj_scale",
            "gate_up_proj_bias",
            "down_proj_scale",
            "down_proj_bias",
            "topk_ids",
            "topk_weights",
            "hidden_states",
        ):
            tensor = getattr(layer, name)
            apart = torch.stack((tensor, torch.full_like(tensor, 5)), -1)[..., 0]
            assert torch.equal(run(replace(layer, **{name: apart}), activations), expected), name

    def test_skipped_ids_count_for_nothing(self) -> None:
        layer = moe(bias=True)
        layer.topk_ids[0, 0], layer.topk_ids[1, 1] = -1, layer.num_experts
        expected = run(layer)
        layer.topk_weights[0, 0], layer.topk_weights[1, 1] = torch.nan, torch.inf
        assert torch.equal(run(layer), expected)
        layer.topk_ids.fill_(-1)
        for _ in range(20):  # programs only wait
            assert run(layer).eq(0).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("weights", ["int8", "fp8", None])
    @pytest.mark.parametrize("sizes", [(192, 256), (64, 128), (16, 16), (400, 720), (1000, 80)])
    def test_transposed(
        self, sizes: tuple[int, int], weights: str | None, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        scale = None
        wide = torch.randn(3, *sizes, device="cuda", dtype=torch.float32)
        weight, full = wide.to(dtype), wide.to(dtype).double()
        if weights is not None:
            weight, _ = quantize(wide, weights)
            scale = torch.rand(3, device="cuda") + 0.1
            full = weight.double() * scale.double()[:, None, None]
        ids = torch.repeat_interleave(torch.arange(-1, 3), torch.tensor([7, 3, 130, 40]))
        ids = ids[torch.randperm(180)].view(180, 1).to("cuda")
        x = torch.randn(180, sizes[0], device="cuda", dtype=dtype)
        for block_m, tail_m, num_stages in ((128, 16, 4), (64, 0, 6), (256, 64, 3), (16, 8, 4)):
            routing = ExpertRouting.from_topk_ids(ids, 3, block_m=block_m)
            pairs = routing.sorted_pair_ids.long()
            for scatter in (False, True):
                out = hopper.launch_hopper_gemm(
                    x[pairs],
                    Projection(weight),
                    routing,
                    routing.tiles,
                    x.new_full((180, sizes[1]), torch.nan),
                    hopper_tiles(block_m, dtype, num_stages, tail_m).gate_up,
                    out_features=sizes[1],
                    scatter=scatter,
                    transposed=True,
                    expert_scale=scale,
                )
                if not scatter:
                    out = torch.empty_like(out).index_copy_(0, pairs, out)
                routed = ids[:, 0] >= 0
                expected = torch.einsum("po,poi->pi", x.double(), full[ids[:, 0].clamp(0)])
                assert relative_error(out[routed], expected[routed]) < 5e-3
