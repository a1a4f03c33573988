"""RMSNorm: torch's way is transformers', the kernel is within roundings of it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import ARCHITECTURES, SHARED_MEMORY, run_compiler
from graphs import capture, no_synchronization
from random_layer import DEVICE, TRITON_DTYPES

from qmoe_kernels import norm
from qmoe_kernels.norm import MAX_SIZE, launch_rms_norm, rms_norm

ROUNDED_ONCE = {"weight_offset": 0.0, "round_before_weight": False}
OFFSET = {"weight_offset": 1.0, "round_before_weight": False}
ROUNDED_TWICE = {"weight_offset": 0.0, "round_before_weight": True}
FAMILIES = {
    "mixtral.MixtralRMSNorm": ROUNDED_TWICE,
    "qwen3_moe.Qwen3MoeRMSNorm": ROUNDED_TWICE,
    "olmoe.OlmoeRMSNorm": ROUNDED_TWICE,
    "deepseek_v3.DeepseekV3RMSNorm": ROUNDED_TWICE,
    "glm4_moe.Glm4MoeRMSNorm": ROUNDED_TWICE,
    "granitemoe.GraniteMoeRMSNorm": ROUNDED_TWICE,
    "gpt_oss.GptOssRMSNorm": ROUNDED_ONCE,
    "qwen3_next.Qwen3NextRMSNorm": OFFSET,
}
EPSILON = 1e-5


def transformers_norm(family: str, weight: torch.Tensor) -> torch.nn.Module:
    model, name = family.split(".")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    built = getattr(module, name)(weight.numel(), eps=EPSILON)
    built.weight = torch.nn.Parameter(weight, requires_grad=False)
    return built


def random_rows(
    shape: tuple[int, ...], dtype: torch.dtype, family: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different sizes and a weight, drawn on the CPU."""
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[-2]).unsqueeze(-1)
    weight = 0.3 * torch.randn(shape[-1]) + (FAMILIES.get(family) is not OFFSET)
    return x.to(dtype).to(DEVICE), weight.to(dtype).to(DEVICE)


def norm_by_kernel(
    x: torch.Tensor, weight: torch.Tensor, options: dict[str, Any] = ROUNDED_TWICE
) -> torch.Tensor:
    return launch_rms_norm(x, weight, EPSILON, **options)


def norm_by_torch(
    x: torch.Tensor, weight: torch.Tensor, options: dict[str, Any] = ROUNDED_TWICE
) -> torch.Tensor:
    return rms_norm(x.cpu(), weight.cpu(), EPSILON, **options).to(x.device)


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many numbers of their dtype two tensors are apart."""
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.isfinite().all() and b.isfinite().all()
    integer = torch.int32 if a.element_size() == 4 else torch.int16
    largest = torch.iinfo(integer).max
    a, b = (t.contiguous().view(integer).long() for t in (a, b))
    a, b = (torch.where(t < 0, -(t & largest), t) for t in (a, b))
    return (a - b).abs()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, options: dict[str, Any]) -> None:
    """Compare results of sums in another order: few numbers differ, by one rounding or two."""
    apart = distance(actual, expected)
    if actual.dtype == torch.float32:
        assert apart.max() <= 16
    else:
        # One number before the weight can be two numbers after it.
        assert apart.max() <= (2 if options["round_before_weight"] else 1)
        assert (apart > 0).float().mean() <= 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_torch_it_is_that_of_transformers(family: str, dtype: torch.dtype) -> None:
    x, weight = (t.cpu() for t in random_rows((3, 5, 80), dtype, family))
    expected = transformers_norm(family, weight)(x)
    actual = rms_norm(x, weight, EPSILON, **FAMILIES[family])
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(3, 2880), (2, 9, 128), (5, 80), (1, 7)])
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernel(family: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = random_rows(shape, dtype, family)
    expected = transformers_norm(family, weight)(x)
    assert_close(norm_by_kernel(x, weight, FAMILIES[family]), expected, FAMILIES[family])


@pytest.mark.parametrize("size", [1, 16, 64, 256, 500, 513, 1024, 4096, MAX_SIZE])
def test_sizes(size: int) -> None:
    x, weight = random_rows((3, size), TRITON_DTYPES[-1])
    assert_close(norm_by_kernel(x, weight), norm_by_torch(x, weight), ROUNDED_TWICE)


def test_a_row_has_the_same_bits_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "MANY_ROWS", 70)
    for size in (48, 128, 512):
        x, weight = random_rows((71, size), TRITON_DTYPES[-1])
        among_many = norm_by_kernel(x, weight)
        assert_close(among_many, norm_by_torch(x, weight), ROUNDED_TWICE)
        assert torch.equal(norm_by_kernel(x[:5], weight), among_many[:5])
        assert torch.equal(norm_by_kernel(x[-1:], weight), among_many[-1:])


@pytest.mark.parametrize("normalize", [norm_by_torch, norm_by_kernel])
def test_strides(normalize) -> None:
    x, weight = random_rows((3, 4, 10 * 16), TRITON_DTYPES[-1])
    heads = x.unflatten(-1, (10, 16))
    for view in (
        x[..., :96].view(3, 4, 6, 16),  # of a product with more outputs
        x[..., 96:].view(3, 4, 4, 16),
        x[:, :, 1:17],
        x[:, 2:, :16],
        x[::2, ::3, :16],
        x[:, :, 3:8],
        heads.transpose(1, 2),
        heads[:, ::2, ::3],  # three strides
        heads[0, 0, 0],  # one row
        heads[:1, :1, 3:4],
        heads.transpose(2, 3)[..., :7],  # columns apart
        x[:1, :1, :5].expand(2, 3, 5),
    ):
        w = weight[: view.shape[-1]]
        out = normalize(view, w)
        assert out.is_contiguous() and out.shape == view.shape
        expected = normalize(view.contiguous(), w)
        assert distance(out, expected).max() <= 2
        assert not torch.equal(out.flatten()[0], out.flatten()[1])


@pytest.mark.parametrize("normalize", [norm_by_torch, norm_by_kernel])
def test_a_wider_weight_widens(normalize) -> None:
    x, weight = random_rows((4, 64), torch.float16)
    expected = transformers_norm("mixtral.MixtralRMSNorm", weight.float())(x)
    assert expected.dtype == torch.float32
    rounded = (x, weight.float(), ROUNDED_TWICE)
    torch.testing.assert_close(normalize(*rounded), expected, rtol=2**-10, atol=0)
    for options in (ROUNDED_ONCE, OFFSET):
        assert normalize(x, weight.float(), options).dtype == torch.float16


@pytest.mark.parametrize("normalize", [norm_by_torch, norm_by_kernel])
def test_no_rows_and_rows_that_are_not_finite(normalize) -> None:
    x, weight = random_rows((4, 64), TRITON_DTYPES[-1])
    assert normalize(x[:0], weight).shape == (0, 64)
    expected = normalize(x, weight)
    x[0], x[1, 3], x[2, 5] = 0.0, torch.nan, torch.inf
    out = normalize(x, weight)
    assert not out[0].any()
    assert out[1].isnan().all() and out[2, 5].isnan()
    assert torch.equal(out[3], expected[3])


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    far = 2**31 + 64
    dtype = TRITON_DTYPES[-1]
    if DEVICE.type == "cuda":
        memory = torch.zeros(far + 64, dtype=dtype, device=DEVICE)
    else:  # a file with a hole
        memory = torch.from_file(str(tmp_path / "x"), shared=True, size=far + 64, dtype=dtype)
    x, weight = random_rows((2, 64), dtype)
    rows = memory.as_strided((2, 64), (far, 1))
    rows.copy_(x)
    assert torch.equal(norm_by_kernel(rows, weight), norm_by_kernel(x, weight))
    rows, x = (t.view(2, 4, 16) for t in (rows, x))
    assert torch.equal(norm_by_kernel(rows, weight[:16]), norm_by_kernel(x, weight[:16]))


def test_arguments_that_do_not_fit() -> None:
    x, weight = torch.zeros(3, 8), torch.ones(8)
    for arguments, options, message in [
        ((x, weight[:1], EPSILON), {}, r"weight of shape \(1,\) for hidden_states of shape"),
        ((x[0, 0], weight, EPSILON), {}, "expected one weight for each column"),
        ((x.int(), weight, EPSILON), {}, "hidden_states are torch.int32"),
        ((x, weight.to("meta"), EPSILON), {}, "weight is on meta, not on cpu"),
        ((x, weight, EPSILON), {"weight_offset": 1.0}, "needs round_before_weight=False"),
    ]:
        with pytest.raises(ValueError, match=message):
            rms_norm(*arguments, **options)
    long = torch.zeros(1, MAX_SIZE + 1, device=DEVICE)
    with pytest.raises(ValueError, match=f"up to {MAX_SIZE} work"):
        norm_by_kernel(long, long[0])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 2048), (64, 2880), (8192, 2048), (64, 32, 128), (4096, 80)])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_the_device(family: str, shape: tuple[int, ...]) -> None:
    x, weight = random_rows(shape, torch.bfloat16, family)
    expected = transformers_norm(family, weight)(x)
    actual = rms_norm(x, weight, EPSILON, **FAMILIES[family])
    assert_close(actual, expected, FAMILIES[family])
    assert torch.equal(actual, rms_norm(x, weight, EPSILON, **FAMILIES[family]))
    some = rms_norm(x[-1:], weight, EPSILON, **FAMILIES[family])
    assert torch.equal(some, actual[-1:])


@pytest.mark.gpu
def test_results_beyond_32_bits() -> None:
    size = 4096
    x = torch.ones(2**31 // size + 3, size, dtype=torch.bfloat16, device="cuda")
    weight = torch.arange(size, device="cuda").to(x)
    x[-1] = weight
    out = rms_norm(x, weight, EPSILON)
    assert torch.equal(out[-1:], rms_norm(x[-1:], weight, EPSILON))
    assert torch.equal(out[:1], rms_norm(x[:1], weight, EPSILON))


@pytest.mark.gpu
def test_a_chain_in_a_cuda_graph_without_synchronization() -> None:
    x, weight = random_rows((7, 2048), torch.bfloat16)

    def chain() -> torch.Tensor:
        y = x
        for _ in range(20):  # each starts while the one before it ends
            y = rms_norm(y, weight, EPSILON)
            y = rms_norm(y.view(7, 16, 128), weight[:128], EPSILON).view(7, 2048)
        return y

    chain()
    with no_synchronization():
        chain()
    graph, y = capture(chain)
    for _ in range(3):
        x.normal_()
        graph.replay()
        expected = x
        for _ in range(20):
            for shape, w in (((7, 2048), weight), ((7, 16, 128), weight[:128])):
                expected = rms_norm(expected.view(shape), w, EPSILON)
                torch.cuda.synchronize()
        assert torch.equal(y, expected.view(7, 2048))


# ---- compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import json
import torch
from compiling import compiling_for, spilled_bytes
from qmoe_kernels.launching import has_dependent_launch
from qmoe_kernels.norm import launch_rms_norm

for capability in ARCHITECTURES:
    has_dependent_launch.cache_clear()
    with compiling_for(capability) as compiled:
        for shape, dtype, offset, twice in [
            ((32, 128), torch.bfloat16, 0.0, True),
            ((8192, 128), torch.float16, 1.0, False),
            ((2, 8192), torch.float32, 0.0, False),
        ]:
            x = torch.zeros(shape, dtype=dtype)
            launch_rms_norm(x, x[0], 1e-5, offset, twice)
    for kernel in compiled:
        ptx = kernel.asm["ptx"]
        print(json.dumps({
            "capability": capability,
            "shared": kernel.metadata.shared,
            "spilled": spilled_bytes(kernel.asm["cubin"]),
            "wide": "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx,
            "waits": "griddepcontrol.wait" in ptx,
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
