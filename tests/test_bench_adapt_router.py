"""The benchmark of adapted routers runs in its tiny configuration; its rounding is what it says."""

from __future__ import annotations

import json

import torch

from benchmarks import adapt_router


def test_tiny(tmp_path) -> None:
    out = tmp_path / "adapt_router.json"
    arguments = ["--tiny", "--only=3bit,int8", f"--out={out}", "--commit=test"]
    assert adapt_router.main(arguments) == 0
    document = json.loads(out.read_text())
    sections = document["sections"]
    lost = {n: section["before"] / section["teacher"] - 1 for n, section in sections.items()}
    assert lost["3bit"] > 0.01 > abs(lost["int8"])
    assert [target["target"] for target in document["targets"]] == [0.5, 1.0]


def test_rounding() -> None:
    values = torch.arange(-127, 128).to(torch.int8)
    for bits in (3, 4):
        rounded = adapt_router.round_to_bits(values, bits)
        assert len(rounded.unique()) == 2**bits - 1 and rounded.max() == 127
        assert (rounded.int() - values.int()).abs().max() <= 127 / (2**bits - 2) + 1
    torch.manual_seed(0)
    weights = torch.randn(4, 64)
    rounded = adapt_router.round_to_mxfp4(weights)
    for block, original in zip(rounded.view(-1, 32), weights.view(-1, 32), strict=True):
        scale = 2.0 ** (original.abs().max().log2().floor() - 2)
        assert set((block / scale).abs().tolist()) <= set(adapt_router.MAGNITUDES.tolist())
    assert (rounded - weights).norm() < 0.2 * weights.norm()
    assert torch.equal(adapt_router.round_to_mxfp4(rounded), rounded)
