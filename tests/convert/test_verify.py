from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import qmoe_convert.convert as convert_module
from qmoe.checkpoints.files import read_header
from qmoe_convert.convert import convert
from qmoe_convert.shards import sha256_of
from qmoe_convert.verify import VerificationError, first_wrong_row, verify_shards
from qmoe_kernels.quantization import quantize

from .conftest import contents

FORMATS = ["int8", "fp8"]
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


class TestBound:
    @settings(max_examples=80, deadline=None)
    @given(
        arrays.arrays("float32", arrays.array_shapes(min_dims=2, max_dims=2), elements=FINITE),
        st.sampled_from(FORMATS),
    )
    def test_rounding_is_never_an_error(self, values: Any, weights: str) -> None:
        weight = torch.from_numpy(values)
        q, scale = quantize(weight, weights)
        assert first_wrong_row(weight, q, scale, weights) is None

    @pytest.mark.parametrize("weights", FORMATS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_neither_for_large_weights(self, weights: str, dtype: torch.dtype) -> None:
        weight = torch.randn(500, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
        q, scale = quantize(weight, weights)
        assert first_wrong_row(weight, q, scale, weights) is None

    @pytest.mark.parametrize("weights", FORMATS)
    def test_one_step_off_is(self, weights: str) -> None:
        weight = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
        q, scale = quantize(weight, weights)
        row, column = 250, int(weight[250].abs().argmin())
        raw = q.view(torch.int8)
        raw[row, column] += 17 if weights == "fp8" else 1
        assert first_wrong_row(weight, q, scale, weights) == row

    @pytest.mark.parametrize("weights", FORMATS)
    @pytest.mark.parametrize("factor", [1.1, -1.0, float("nan"), float("inf"), 0.0])
    def test_a_wrong_scale_is(self, weights: str, factor: float) -> None:
        weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        q, scale = quantize(weight, weights)
        scale[5] *= factor
        assert first_wrong_row(weight, q, scale, weights) == 5


def damage(monkeypatch: pytest.MonkeyPatch, name: str, byte: int = 0, fix: bool = False) -> None:
    """Flip bits of a tensor after it was written, before it is verified.

    ``fix``: put the checksum right, so that only the values can tell.
    """

    def damaged(plan: Any, tensors: Any, output: Any, *options: Any) -> None:
        for file in output.new.glob("*.safetensors"):
            if name in (tensors_of_file := read_header(file)):
                with file.open("r+b") as stream:
                    stream.seek(tensors_of_file[name].offset + byte)
                    value = stream.read(1)[0]
                    stream.seek(tensors_of_file[name].offset + byte)
                    stream.write(bytes([value ^ 0x70]))
                if fix:
                    output.journal.shards[file.name].sha256 = sha256_of(file)
        verify_shards(plan, tensors, output, *options)

    monkeypatch.setattr(convert_module, "verify_shards", damaged)


AT = "model.layers.1.mlp.experts"


class TestDamage:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            (f"{AT}.2.up_proj.weight", {}),
            (f"{AT}.2.down_proj.weight_scale", {}),
            (f"{AT}.gate_up_proj_q", {"format": "qmoe"}),
            (f"{AT}.down_proj_scale", {"format": "qmoe"}),
            ("model.norm.weight", {}),
            ("model.embed_tokens.weight", {"weights": "fp8"}),
        ],
    )
    @pytest.mark.parametrize("fix", [False, True])
    def test_is_found_and_resumed(
        self,
        qwen3_folder: Path,
        tmp_path: Path,
        name: str,
        options: dict[str, str],
        fix: bool,
    ) -> None:
        out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
        options = {**options, "max_shard_size": "60kB"}
        with pytest.MonkeyPatch.context() as patch:
            damage(patch, name, byte=3 if "scale" in name else 1, fix=fix)
            with pytest.raises(VerificationError, match=r"model-.*safetensors: .*") as error:
                convert(qwen3_folder, out, **options)
        text = str(error.value)
        assert "\n" not in text and "--resume" in text
        quantized = name.replace("_scale", "_q" if "qmoe" in str(options) else "")
        assert name in text or quantized in text
        assert not out.exists()
        convert(qwen3_folder, out, **options, resume=True)
        convert(qwen3_folder, undisturbed, **options)
        assert contents(out) == contents(undisturbed)

    def test_less_than_rounding_is_found_by_the_checksum(
        self, qwen3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        damage(monkeypatch, f"{AT}.2.down_proj.weight_scale", byte=0)
        with pytest.raises(VerificationError, match="SHA-256"):
            convert(qwen3_folder, tmp_path / "out")

    def test_without_verify_nothing_is_read_again(
        self, qwen3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(convert_module, "verify_shards", None)
        report = convert(qwen3_folder, tmp_path / "out", verify=False)
        assert not report.verified and report.errors

    @pytest.mark.parametrize("what", ["truncated", "gone", "grown"])
    def test_files(
        self,
        qwen3_folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        what: str,
    ) -> None:
        def damaged(plan: Any, tensors: Any, output: Any, *options: Any) -> None:
            (file,) = output.new.glob("*.safetensors")
            data = file.read_bytes()
            if what == "gone":
                file.unlink()
            else:
                file.write_bytes(data[:-1] if what == "truncated" else data + b"x")
            verify_shards(plan, tensors, output, *options)

        monkeypatch.setattr(convert_module, "verify_shards", damaged)
        with pytest.raises(VerificationError, match=r"model\.safetensors: "):
            convert(qwen3_folder, tmp_path / "out")
