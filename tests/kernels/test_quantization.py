from __future__ import annotations

import math
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qmoe_kernels import cpu, quantization
from qmoe_kernels.quantization import (
    LARGEST,
    SMALLEST_SCALE,
    STORAGE_DTYPE,
    dequantize,
    quantize,
    quantize_rows,
    quantize_with_squares,
    relative_error,
    widen,
)

FORMATS = ["int8", "fp8"]
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def quantize_naive(weight: torch.Tensor, weights: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula of the module's docstring, as plainly as torch says it."""
    x = weight.float()
    scale = (x.abs().amax(-1) / LARGEST[weights]).clamp(min=SMALLEST_SCALE)
    x = x / scale.unsqueeze(-1)
    if weights == "int8":
        x = x.round().clamp(-127, 127)
    return x.to(STORAGE_DTYPE[weights]), scale


def bits(q: torch.Tensor) -> torch.Tensor:
    return q.view(torch.int8)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 24), (5, 7, 33), (2, 3, 4, 5), (300, 1000)])
def test_follows_the_formula(weights: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.rand(*shape[:-1], 1)).to(dtype)
    q, scale = quantize(weight, weights)
    expected_q, expected_scale = quantize_naive(weight, weights)
    assert q.dtype == STORAGE_DTYPE[weights] and scale.dtype == torch.float32
    assert torch.equal(bits(q), bits(expected_q))
    assert torch.equal(scale, expected_scale)


def test_int8_rounds_half_to_even() -> None:
    q, scale = quantize(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]]), "int8")
    assert scale.item() == 1.0
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -126]]


def test_fp8_keeps_subnormals() -> None:
    values = [448.0, 2.0**-9, 3 * 2.0**-9, 2.0**-10, -(2.0**-9)]  # 2**-10 is a tie to zero
    q, scale = quantize(torch.tensor([values]), "fp8")
    assert scale.item() == 1.0
    assert q.float().tolist() == [[448.0, 2.0**-9, 3 * 2.0**-9, 0.0, -(2.0**-9)]]


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-30, 1e30, 3.4e38])
def test_any_magnitude_stays_in_range(weights: str, magnitude: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 50).clamp(-1, 1) * magnitude
    q, scale = quantize(weight, weights)
    assert torch.equal(bits(q), bits(quantize_naive(weight, weights)[0]))
    assert scale.min() >= SMALLEST_SCALE
    assert q.float().abs().max() <= LARGEST[weights]
    assert dequantize(q, scale, torch.float64).isfinite().all()


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_channel(weights: str, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 16).to(dtype)
    weight[2] = 0
    q, scale = quantize(weight, weights)
    assert scale[2] > 0
    assert dequantize(q, scale)[2].eq(0).all()


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_named(weights: str, dtype: torch.dtype, bad: float) -> None:
    weight = torch.randn(3, 5, 8).to(dtype)
    weight[2, 4, 7] = bad
    with pytest.raises(ValueError, match=r"layers\.0\.down_proj.*expert 2, row 4"):
        quantize(weight, weights, name="layers.0.down_proj")
    with pytest.raises(ValueError, match=r"^weight: NaN or infinity in row 4"):
        quantize(weight[2], weights)


def test_what_cannot_be_quantized() -> None:
    with pytest.raises(ValueError, match="unknown weight format 'int4'"):
        quantize(torch.randn(2, 2), "int4")
    with pytest.raises(ValueError, match=r"q: cannot quantize torch\.int8"):
        quantize(torch.zeros(2, 2, dtype=torch.int8), "int8", name="q")
    with pytest.raises(ValueError, match="cannot quantize"):
        quantize(torch.randn(2), "int8")


@pytest.mark.parametrize("weights", FORMATS)
def test_neither_blocks_nor_strides_change_a_bit(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 37, 100).bfloat16()
    q, scale = quantize(weight, weights)
    strided = torch.empty_strided(weight.shape, (3700, 1, 37), dtype=weight.dtype).copy_(weight)
    for block_size in (1, 150, 999, 1 << 20):
        monkeypatch.setitem(quantization.BLOCK_SIZE, "cpu", block_size)
        for same in (weight, strided, weight.float()):
            q2, scale2 = quantize(same, weights)
            assert torch.equal(bits(q2), bits(q)) and torch.equal(scale2, scale)
            assert q2.is_contiguous()
        assert torch.equal(dequantize(q, scale), q.float() * scale.unsqueeze(-1))


@pytest.mark.parametrize("weights", FORMATS)
def test_threads_do_not_disturb_each_other(weights: str) -> None:
    experts = torch.randn(8, 96, 128).bfloat16()
    results: list[tuple[torch.Tensor, torch.Tensor]] = [None] * 8  # type: ignore[list-item]

    def work(expert: int) -> None:
        results[expert] = quantize(experts[expert], weights)

    threads = [threading.Thread(target=work, args=(e,)) for e in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    q, scale = quantize(experts, weights)
    assert torch.equal(bits(torch.stack([r[0] for r in results])), bits(q))
    assert torch.equal(torch.stack([r[1] for r in results]), scale)


# Uniform steps of absmax / 127 on a normal row of 1000 (absmax about 3.2 sigma), and e4m3fn's
# 3-bit mantissa: 2**-4 / sqrt(3) at worst in a binade, 0.026 on average.
EXPECTED_ERROR = {"int8": 0.0075, "fp8": 0.026}


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_error(weights: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 200, 1000).to(dtype) * 0.02
    q, scale = quantize(weight, weights)
    exact = dequantize(q, scale, torch.float64) - weight.double()
    exact_error = float(exact.norm() / weight.double().norm())
    assert exact_error == pytest.approx(EXPECTED_ERROR[weights], rel=0.05)
    assert relative_error(q, scale, weight) == pytest.approx(exact_error, rel=1e-9)
    q2, scale2, error, norm = quantize_with_squares(weight, weights)
    assert torch.equal(bits(q), bits(q2)) and torch.equal(scale, scale2)
    rows = slice(None, None, quantization.SAMPLED_ROWS)
    sampled, sampled_weight = exact.flatten(0, 1)[rows], weight.double().flatten(0, 1)[rows]
    assert error == pytest.approx(float(sampled.square().sum()), rel=2e-4)
    assert norm == pytest.approx(float(sampled_weight.square().sum()), rel=2e-4)
    assert math.sqrt(error / norm) == pytest.approx(exact_error, rel=0.05)


def test_error_of_zeros_is_zero() -> None:
    zeros = torch.zeros(4, 8)
    assert quantize_with_squares(zeros, "int8")[2:] == (0.0, 0.0)
    assert relative_error(*quantize(zeros, "int8"), zeros) == 0.0


@pytest.mark.parametrize("dtype", FLOATS)
def test_widening_is_exact_for_every_fp8_value(dtype: torch.dtype) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(torch.float8_e4m3fn)
    values = torch.tensor([float(c) for c in codes.to(torch.float64)], dtype=dtype)
    numbers = values.isfinite()  # 0x7f and 0xff are NaN
    assert numbers.sum() == 254
    wide = widen(codes, out=torch.empty(256, dtype=dtype))
    assert torch.equal(wide[numbers], values[numbers])


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 33), (0, 8), (3, 0)])
def test_rows_are_quantized_as_weights_are(
    shape: tuple[int, ...], dtype: torch.dtype, to: str
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.rand(*shape[:-1], 1)).to(dtype)
    if x.numel():
        x[1] = 0
    q, scale = quantize_rows(x, to)
    expected_q, expected_scale = quantize(x, to)
    assert torch.equal(bits(q), bits(expected_q)) and torch.equal(scale, expected_scale)
    assert q.dtype == STORAGE_DTYPE[to] and scale.shape == shape[:-1]


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_shows(bad: float, to: str) -> None:
    x = torch.randn(3, 8)
    x[1, 5] = bad
    q, scale = quantize_rows(x, to)
    assert scale.isfinite().tolist() == [True, False, True]
    rows = dequantize(q, scale)
    assert not rows[1].isfinite().any() and rows[0].isfinite().all() and rows[2].isfinite().all()


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_rounds_once(weights: str, dtype: torch.dtype) -> None:
    q, scale = quantize(torch.randn(2, 5, 64), weights)
    wide = torch.promote_types(dtype, torch.float32)
    expected = (q.to(wide) * scale.unsqueeze(-1)).to(dtype)
    assert torch.equal(dequantize(q, scale, dtype), expected)


def test_what_cannot_be_dequantized() -> None:
    q, scale = quantize(torch.randn(4, 8), "int8")
    with pytest.raises(ValueError, match=r"cannot dequantize torch\.int16"):
        dequantize(q.to(torch.int16), scale)
    with pytest.raises(ValueError, match=r"expected \(4,\)"):
        dequantize(q, scale.unsqueeze(-1))


def test_fake_weights_are_not_read() -> None:
    with FakeTensorMode():
        weight = torch.randn(4, 64)
        q, scale = quantize_rows(weight, "int8")
        quantize_rows(weight.double(), "int8")
    assert isinstance(q, FakeTensor) and isinstance(scale, FakeTensor)
    assert not cpu.narrows(weight)
    assert quantize_rows(torch.ones(1, 64).double(), "int8")[0].eq(127).all()


@pytest.mark.parametrize("weights", FORMATS)
def test_negative_bit(weights: str) -> None:
    weight = torch.randn(33, 64, dtype=torch.complex64).conj().imag  # nothing is copied
    rows = weight.as_strided((33, 64), (64, 1))
    assert rows.is_neg() and rows.stride(1) == 1
    for negated in (rows, weight):
        expected = quantize_with_squares(negated.resolve_neg().contiguous(), weights)
        actual = quantize_with_squares(negated, weights)
        assert torch.equal(bits(actual[0]), bits(expected[0]))
        assert torch.equal(actual[1], expected[1])
        assert actual[2:] == pytest.approx(expected[2:], rel=1e-5)


@pytest.mark.parametrize("weights", FORMATS)
def test_nothing_to_quantize(weights: str) -> None:
    q, scale = quantize(torch.empty(0, 4, 8), weights)
    assert q.shape == (0, 4, 8) and scale.shape == (0, 4)
    assert dequantize(q, scale).shape == (0, 4, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gpu_and_cpu_give_the_same_bits(weights: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(4, 300, 700) * torch.rand(4, 300, 1)).to(dtype)
    q, scale = quantize(weight, weights)
    q_gpu, scale_gpu = quantize(weight.cuda(), weights)
    assert torch.equal(bits(q_gpu).cpu(), bits(q))
    assert torch.equal(scale_gpu.cpu(), scale)
    assert torch.equal(dequantize(q_gpu, scale_gpu).cpu(), dequantize(q, scale))
