"""Rotary embedding: bit for bit that of transformers, in torch and in the kernel."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from compiling import ARCHITECTURES, SHARED_MEMORY, run_compiler
from graphs import capture, no_synchronization
from random_layer import DEVICE, TRITON_DTYPES

from qmoe_kernels import rope
from qmoe_kernels.rope import launch_rotate, rotate

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """A function of transformers, and how `rotate` is asked for the same."""

    model: str
    function: str = "apply_rotary_pos_emb"
    heads: tuple[int, int, int] = (4, 2, 32)  # num_heads, num_kv_heads, head_dim
    angles: int = 32  # that cos has
    interleaved: bool = False
    half_angles: bool = False

    def __str__(self) -> str:
        return f"{self.model}-{self.function}-{self.angles}"

    def transformers(self) -> Callable[..., Pair]:
        module = importlib.import_module(f"transformers.models.{self.model}.modeling_{self.model}")
        return getattr(module, self.function)

    def torch(self, *tensors: torch.Tensor) -> Pair:
        tensors = tuple(t.cpu() for t in tensors)
        out = rotate(*tensors, interleaved=self.interleaved, half_angles=self.half_angles)
        return out[0].to(DEVICE), out[1].to(DEVICE)

    def kernel(self, *tensors: torch.Tensor) -> Pair:
        return launch_rotate(*tensors, self.interleaved, self.half_angles)


FAMILIES = [
    Family("qwen3_moe", heads=(8, 2, 64), angles=64),
    Family("mixtral", heads=(3, 3, 80), angles=80),
    Family("olmoe"),
    Family("granitemoe", heads=(3, 1, 6), angles=6),
    Family("deepseek_v3", heads=(5, 1, 64), angles=64),
    Family("deepseek_v3", "apply_rotary_pos_emb_interleave", (5, 1, 64), 64, interleaved=True),
    Family("deepseek_v3", "apply_rotary_pos_emb_interleave", (2, 3, 12), 12, interleaved=True),
    Family("glm4_moe", heads=(6, 2, 64), angles=32),
    Family("glm4_moe", heads=(3, 2, 24), angles=10),
    Family("qwen3_next", heads=(3, 2, 256), angles=64),
    Family("gpt_oss", heads=(8, 2, 64), angles=32, half_angles=True),
    Family("gpt_oss", heads=(3, 5, 20), angles=10, half_angles=True),
]
LARGE = [
    Family("qwen3_moe", heads=(32, 4, 128), angles=128),
    Family("mixtral", heads=(48, 8, 128), angles=128),
    Family("deepseek_v3", "apply_rotary_pos_emb_interleave", (128, 1, 64), 64, interleaved=True),
    Family("glm4_moe", heads=(96, 8, 128), angles=64),
    Family("qwen3_next", heads=(16, 2, 256), angles=64),
    Family("gpt_oss", heads=(64, 8, 64), angles=32, half_angles=True),
]
QWEN3 = FAMILIES[0]


def random_tensors(
    family: Family,
    num_rows: int,
    num_tokens: int,
    dtype: torch.dtype,
    angles_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """query, key, cos and sin as a model has them: transposed parts of one product.

    cos and sin are no angle's, nor are their halves equal: which value goes where is seen.
    """
    torch.manual_seed(num_tokens)
    num_heads, num_kv_heads, head_dim = family.heads
    product = torch.randn(num_rows, num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    query, key, _ = product.to(DEVICE).split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    angles = torch.randn(2, num_rows, num_tokens, family.angles).to(angles_dtype or dtype)
    return query.transpose(1, 2), key.transpose(1, 2), *angles.to(DEVICE).unbind(0)


def assert_equal(actual: Pair, expected: Pair) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs)
        assert ours.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_in_torch_it_is_that_of_transformers(family: Family, dtype: torch.dtype) -> None:
    tensors = tuple(t.cpu() for t in random_tensors(family, 2, 5, dtype))
    actual = rotate(*tensors, interleaved=family.interleaved, half_angles=family.half_angles)
    assert_equal(actual, family.transformers()(*tensors))


@pytest.mark.parametrize("num_rows, num_tokens", [(1, 1), (2, 3)])
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_kernel(family: Family, dtype: torch.dtype, num_rows: int, num_tokens: int) -> None:
    tensors = random_tensors(family, num_rows, num_tokens, dtype)
    assert_equal(family.kernel(*tensors), family.transformers()(*tensors))


@pytest.mark.parametrize("family", [QWEN3, FAMILIES[5], FAMILIES[8]], ids=str)
def test_kernel_for_many_tokens(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, "FEW_TOKENS", 5)
    tensors = random_tensors(family, 2, 3, TRITON_DTYPES[-1])
    assert_equal(family.kernel(*tensors), family.transformers()(*tensors))


@pytest.mark.parametrize("way", ["torch", "kernel"])
@pytest.mark.parametrize(
    "dtype, angles_dtype", [(torch.float16, torch.float32), (torch.float32, torch.float16)]
)
@pytest.mark.parametrize("family", [QWEN3, FAMILIES[5], FAMILIES[8], FAMILIES[11]], ids=str)
def test_angles_of_another_dtype(
    family: Family, dtype: torch.dtype, angles_dtype: torch.dtype, way: str
) -> None:
    tensors = random_tensors(family, 2, 3, dtype, angles_dtype)
    expected = family.transformers()(*tensors)
    assert expected[0].dtype == torch.float32
    assert_equal(getattr(family, way)(*tensors), expected)


@pytest.mark.parametrize("way", ["torch", "kernel"])
def test_strides(way: str) -> None:
    family = Family("olmoe")
    run, theirs = getattr(family, way), family.transformers()
    query, key, cos, sin = random_tensors(family, 2, 4, TRITON_DTYPES[-1])
    for tensors in (
        (query.contiguous(), key.contiguous(), cos, sin),
        (query, key, cos[1:], sin[1:]),  # one row of angles for all
        (query, key, cos[:1].expand(2, -1, -1), sin[:1].expand(2, -1, -1)),
        (query, key, cos, sin[:1].expand_as(sin)),
        (query, key, cos.transpose(1, 2).contiguous().transpose(1, 2), sin),
        tuple(t[..., ::2, :] for t in (query, key, cos, sin)),
        (query, key[:, :1].expand(-1, 3, -1, -1), cos, sin),
        (query[:, 1:2], key, cos, sin),
        (query[..., 1:25], key[..., 1:25], cos[..., 1:25], sin[..., 1:25]),
    ):
        assert_equal(run(*tensors), theirs(*tensors))


@pytest.mark.parametrize("way", ["torch", "kernel"])
def test_no_tokens_and_numbers_that_are_not_finite(way: str) -> None:
    query, key, cos, sin = random_tensors(QWEN3, 2, 3, TRITON_DTYPES[-1])
    run = getattr(QWEN3, way)
    none = run(*(t[..., :0, :] for t in (query, key, cos, sin)))
    assert none[0].shape == (2, 8, 0, 64) and none[1].shape == (2, 2, 0, 64)
    query, key = query.clone(), key.clone()
    query[0, 1, 2, 3], key[1, 1, 1, 50] = torch.nan, torch.inf
    actual = run(query, key, cos, sin)
    expected = QWEN3.transformers()(query, key, cos, sin)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert (~ours.isfinite()).sum() == 2  # of a pair


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    far = 2**31 + 64
    dtype = TRITON_DTYPES[-1]
    if DEVICE.type == "cuda":
        memory = torch.zeros(far + 64, dtype=dtype, device=DEVICE)
    else:  # a file with a hole
        memory = torch.from_file(str(tmp_path / "x"), shared=True, size=far + 64, dtype=dtype)
    for num_rows, num_heads, num_tokens in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        family = Family("olmoe", heads=(num_heads, num_heads, 32))
        query, _, cos, sin = random_tensors(family, num_rows, num_tokens, dtype)
        expected = family.kernel(query, query, cos, sin)
        spread = memory.as_strided(query.shape, (far, far, far, 1))
        spread.copy_(query)
        assert_equal(family.kernel(spread, spread, cos, sin), expected)
    family = Family("olmoe", heads=(1, 1, 32))
    query, key, cos, sin = random_tensors(family, 1, 2, dtype)
    spread = memory.as_strided(cos.shape, (far, far, 1))
    spread.copy_(cos)
    expected = family.kernel(query, key, cos, cos)
    assert_equal(family.kernel(query, key, spread, spread), expected)


def test_arguments_that_do_not_fit() -> None:
    q, k, c = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 3, 8), torch.zeros(2, 3, 8)
    for tensors, options, message in [
        ((q[0], k, c, c), {}, "query has 3 dimensions and key has 4"),
        ((q, k[..., :4], c, c), {}, r"key has shape \(2, 2, 3, 4\) and query"),
        ((q, k[:1], c, c), {}, "only the number of heads may differ"),
        ((q, k, c[:, :2], c), {}, r"expected \(2 or 1, 3, rotary_dim\)"),
        ((q, k, c[0], c), {}, "cos has shape"),
        ((q, k, c, c[..., :4]), {}, "sin is torch.float32 of shape"),
        ((q, k, c, c.half()), {}, "sin is torch.float16"),
        ((q, k, c, c), {"half_angles": True}, "rotary_dim=16 for head_dim=8"),
        ((q, k, c[..., :5], c[..., :5]), {}, "rotary_dim=5"),
        ((q, k.half(), c, c), {}, "key torch.float16"),
        ((q.int(), k.int(), c, c), {}, "query is torch.int32"),
        ((q, k.to("meta"), c, c), {}, "key on meta"),
        ((q.mT.contiguous().mT, k, c, c), {}, "strides 3 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            rotate(*tensors, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows, num_tokens", [(1, 1), (64, 1), (1, 2049), (3, 700)])
@pytest.mark.parametrize("family", LARGE, ids=str)
def test_on_the_device(family: Family, num_rows: int, num_tokens: int) -> None:
    tensors = random_tensors(family, num_rows, num_tokens, torch.bfloat16)
    options = {"interleaved": family.interleaved, "half_angles": family.half_angles}
    assert_equal(rotate(*tensors, **options), family.transformers()(*tensors))


@pytest.mark.gpu
def test_results_beyond_32_bits() -> None:
    family = Family("olmoe", heads=(64, 1, 1024), angles=1024)
    num_tokens = 2**31 // (64 * 1024) + 3
    key, cos = (torch.randn(1, num_tokens, 1024, device="cuda").bfloat16() for _ in "kc")
    query = key[:, None].expand(1, 64, num_tokens, 1024)
    query_out, key_out = rotate(query, key[:, None], cos, cos)
    expected = family.transformers()(key[:, None], key[:, None], cos, cos)[1]
    assert torch.equal(key_out, expected)
    for head in (0, 63):
        assert torch.equal(query_out[:, head], expected[:, 0])


@pytest.mark.gpu
def test_a_cuda_graph_and_no_synchronization() -> None:
    tensors = random_tensors(QWEN3, 7, 1, torch.bfloat16)

    def chain() -> Pair:
        query, key = tensors[:2]
        for _ in range(20):  # each starts while the one before it ends
            query, key = rotate(query, key, *tensors[2:])
        return query, key

    chain()
    with no_synchronization():
        chain()
    graph, out = capture(chain)
    for _ in range(3):
        for t in tensors:
            t.uniform_(-0.7, 0.7)
        graph.replay()
        expected = tensors[:2]
        for _ in range(20):
            expected = QWEN3.transformers()(*expected, *tensors[2:])
        assert_equal(out, expected)


# ---- compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import json, re
import torch
from compiling import compiling_for, spilled_bytes
from qmoe_kernels.launching import has_dependent_launch
from qmoe_kernels.rope import launch_rotate

for capability in ARCHITECTURES:
    has_dependent_launch.cache_clear()
    with compiling_for(capability) as compiled:
        for num_tokens, heads, angles, dtype, interleaved, half_angles in [
            (1, (32, 4, 128), 128, torch.float32, False, False),
            (300, (96, 8, 128), 64, torch.bfloat16, False, False),
            (300, (128, 1, 64), 64, torch.float16, True, False),
        ]:
            query, key = (torch.zeros(1, num_tokens, n, heads[2], dtype=dtype) for n in heads[:2])
            cos = torch.zeros(1, num_tokens, angles, dtype=dtype)
            launch_rotate(query.transpose(1, 2), key.transpose(1, 2), cos, cos, interleaved,
                          half_angles)
    for kernel in compiled:
        ptx = kernel.asm["ptx"]
        print(json.dumps({
            "capability": capability,
            "shared": kernel.metadata.shared,
            "spilled": spilled_bytes(kernel.asm["cubin"]),
            "wide": "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx,
            "waits": "griddepcontrol.wait" in ptx,
            # Those of bf16 are how sm_80 writes its products and sums.
            "fused": len(re.findall(r"fma\\.rn\\.f", ptx)),
            "accesses": re.findall(r"(ld|st)\\.global", ptx),
        }))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_compiles_for_every_architecture() -> None:
    kernels = run_compiler(f"ARCHITECTURES = {ARCHITECTURES}\n{COMPILE}")
    assert len(kernels) == 3 * len(ARCHITECTURES)
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[kernel["capability"]] * 1024, kernel
        assert kernel["spilled"] == 0 and kernel["wide"], kernel
        assert kernel["waits"] == (kernel["capability"] >= 90), kernel
        assert kernel["fused"] == 0, f"products that are not rounded: {kernel}"
        assert kernel["accesses"] == sorted(kernel["accesses"]), f"a load after a store: {kernel}"
