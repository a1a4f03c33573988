"""The kernels for Hopper: interpreted in part, layouts on paper, compiled, and on a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from compiling import SHARED_MEMORY, run_compiler
from random_layer import DEVICE, Layer, assert_close, random_layer

from qmoe_kernels import Activation, ExpertRouting
from qmoe_kernels import hopper_gemm as hopper
from qmoe_kernels.quantization import STORAGE_DTYPE

needs_gluon = pytest.mark.skipif(hopper.gluon is None, reason="Triton has no Gluon")
ON_HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.parametrize("counts", [[1, 1, 1, 45], [17, 0, 16, 1], [0, 0, 0, 52], [0, 0, 0, 0]])
@pytest.mark.parametrize("skipped", [0, 3])
def test_tile_table(counts: list[int], skipped: int) -> None:
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor([*counts, skipped]))
    num_pairs = len(ids) or 1
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32).to(DEVICE)
    table = hopper.launch_tile_table(offsets, num_pairs, 4, block_m=16).tolist()
    rows = [(e, p) for e, first, n in table if e >= 0 for p in range(first, first + min(n, 16))]
    expected = [(int(e), p) for p, e in enumerate(ids) if e < 4]
    assert rows == expected


def reordered(x: torch.Tensor, block_k: int) -> torch.Tensor:
    """Order K as the module's docstring says; K a multiple of ``block_k``."""
    x = x.unflatten(1, (-1, 4, block_k // 16, 2, 2))
    return x.permute(0, 1, 3, 4, 2, 5).flatten(1)


@pytest.mark.parametrize("in_features", [16, 64, 176, 4096])
@pytest.mark.parametrize("block_k", [0, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_gather_rows(in_features: int, block_k: int, dtype: torch.dtype) -> None:
    if block_k and dtype == torch.int8:
        pytest.skip("8-bit rows keep their order")
    x = torch.randint(-128, 128, (7, in_features), device=DEVICE).to(dtype)
    routing = ExpertRouting.from_topk_ids(torch.rand(7, 6, device=DEVICE).topk(2).indices, 6)
    scale = torch.rand(7, device=DEVICE)
    out, out_scale = hopper.launch_gather_rows(x, routing, block_k, scale=scale)
    assert torch.equal(out_scale, scale[routing.sorted_token_ids])
    expected = x[routing.sorted_token_ids]
    if block_k:
        padding = -in_features % block_k
        expected = reordered(torch.nn.functional.pad(expected, (0, padding)), block_k)
    assert torch.equal(out, expected)


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


# ---- compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import json, re, subprocess
import triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from qmoe_kernels import hopper_gemm as hopper

kernel = hopper.hopper_gemm_kernel
names = kernel.arg_names
for x, weights, gated, block_m, num_stages in [
    ("bf16", "int8", True, 128, 4), ("bf16", "int8", False, 256, 4), ("bf16", "fp8", True, 256, 4),
    ("fp16", "fp8", False, 64, 4), ("fp16", "int8", True, 64, 3), ("i8", "int8", True, 256, 4),
    ("i8", "int8", False, 128, 4), ("fp8e4nv", "fp8", True, 128, 4),
    ("fp8e4nv", "fp8", False, 256, 4),
]:
    wide = x.endswith("16")
    block_k = hopper.BLOCK_K_16 if wide else hopper.BLOCK_K_8
    weight_layout = gl.NVMMASharedLayout(block_k, 8, rank=5 if gated else 3)
    x_layout = gl.NVMMASharedLayout(128, 16 if wide else 8, rank=2)
    box = f"1,8,2,8,{block_k}" if gated else f"1,128,{block_k}"
    constants = dict(
        SCATTER=not gated, FP8=wide and weights == "fp8", NAME="silu" if gated else None,
        GATED=gated, ALPHA=1.702, UP_SHIFT=1.0, LIMIT=7.0, LIMIT_AFTER=False, GATE_SOFTCAP=None,
        UP_SOFTCAP=None, PERMUTE=block_k if wide and gated else 0, BLOCK_M=block_m,
        BLOCK_N=hopper.BLOCK_N, BLOCK_K=block_k, NUM_STAGES=num_stages, GROUP_M=8,
        TAIL_M=block_m // 2 if block_m > 64 else 0,
    )
    if wide:
        constants["x_scale_ptr"] = None
    types = dict(
        weight_desc=f"tensordesc<{'i8' if wide else x}[{box}],{weight_layout!r}>",
        x_desc=f"tensordesc<{x}[{block_m},{block_k}],{x_layout!r}>",
        scale_ptr="*fp32", x_scale_ptr="*fp32", bias_ptr="*bf16", out_ptr="*bf16",
        table_ptr="*i32", sorted_pair_ids_ptr="*i32", expert_to_slot_ptr="*i32",
    )
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    even = [n for n in names if n.endswith("_ptr") or n in ("N", "K", "stride_out")]
    source = GluonASTSource(
        kernel, signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in even if n not in constants},
    )
    options = {"num_warps": 8, "maxnreg": 128 if block_m <= 128 else None}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    loop = compiled.asm["ptx"]
    print(json.dumps({
        "case": f"{x} {weights} gated={gated} block_m={block_m}",
        "shared": compiled.metadata.shared,
        "products": sorted({m[0] for m in re.finditer(r"wgmma.mma_async\\S+", loop)}),
        "byte_loads": len(re.findall(r"ld\\.shared\\.[bsu]8", loop)),
        "wide_loads": len(re.findall(r"ld\\.shared\\.v4\\.b32", loop)),
    }))
"""


@pytest.mark.slow
@needs_gluon
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_compiles() -> None:
    kernels = run_compiler(COMPILE)
    assert len(kernels) == 9
    for kernel in kernels:
        assert kernel["products"], f"no tensor cores: {kernel}"
        assert kernel["shared"] <= SHARED_MEMORY[90] * 1024, kernel
        if "16" in kernel["case"].split()[0]:
            # Weights come sixteen bytes at a time: two loads in each of three places.
            assert kernel["wide_loads"] >= 6 and not kernel["byte_loads"], kernel


# ---- on a GPU ----------------------------------------------------------------------------------


def run(layer: Layer, activations: str | None = None, block_m: int = 128) -> torch.Tensor:
    layer = layer.to("cuda")
    storage = None if activations is None else STORAGE_DTYPE[activations]
    assert hopper.hopper_supports(
        layer.hidden_states,
        layer.gate_up_proj,
        layer.gate_up_proj_scale,
        layer.down_proj,
        layer.down_proj_scale,
        layer.topk_ids,
        layer.activation,
        layer.num_experts,
        activations=storage,
    )
    return hopper.hopper_fused_moe(
        **layer.arguments(),
        num_experts=layer.num_experts,
        activations=storage,
        block_m=block_m,
        num_stages=4,
    )


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
    @pytest.mark.parametrize("block_m", [64, 128, 256])
    @pytest.mark.parametrize("weights", ["int8", "fp8"])
    @pytest.mark.parametrize("quantized", [False, True])
    def test_formats(self, weights: str, quantized: bool, block_m: int) -> None:
        activations = weights if quantized else None
        layer = moe(weights=weights, bias=True)
        out = run(layer, activations, block_m)
        assert_close(out, layer.reference(activations=activations))

    @pytest.mark.parametrize(
        "case",
        [
            {"num_tokens": 1},
            {"num_experts": 40, "top_k": 8},
            {"num_tokens": 1000, "num_experts": 2, "top_k": 1},
            {"hidden_size": 16, "intermediate_size": 16},
            {"hidden_size": 720, "intermediate_size": 176},  # no multiple of any block
            {"hidden_size": 64, "intermediate_size": 128},  # one step, two steps
            {"dtype": torch.float16},
            {"activation": Activation("relu2", gated=False), "bias": True},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("activations", [None, "int8"])
    def test_sizes(self, case: dict[str, object], activations: str | None) -> None:
        layer = moe(**case)
        assert_close(run(layer, activations), layer.reference(activations=activations))

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
