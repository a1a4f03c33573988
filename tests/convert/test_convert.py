from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import qmoe_convert.output as output_module
import qmoe_convert.workers as workers_module
import qmoe_convert.write as write_module
from qmoe.checkpoints.files import open_checkpoint, read_header
from qmoe.checkpoints.schema import MANIFEST_NAME, Manifest
from qmoe.experts.layout import find_experts
from qmoe_convert import ConversionError
from qmoe_convert.convert import convert
from qmoe_convert.shards import ShardWriter, sha256_of
from qmoe_convert.small_files import DOWNLOADED
from qmoe_convert.workers import in_order
from qmoe_convert.write import with_quantization_config
from qmoe_kernels.quantization import LARGEST, SAMPLED_ROWS, STORAGE_DTYPE, quantize

from .conftest import FAMILIES, PER_EXPERT, build, contents, fp8_blocks, load, rewrite

Source = Callable[..., Path]
Run = Callable[..., Any]
ROOT = Path(__file__).parents[2]


def quantize_plainly(weight: torch.Tensor, weights: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The format's definition, without blocks, threads or our own quantization."""
    scale = weight.float().abs().amax(-1) / LARGEST[weights]
    scaled = weight.float() / scale.unsqueeze(-1)
    scaled = scaled.round() if weights == "int8" else scaled
    return scaled.to(STORAGE_DTYPE[weights]), scale


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, shape and bits."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


class TestValues:
    @pytest.mark.parametrize("weights", ["int8", "fp8"])
    @pytest.mark.parametrize("family", PER_EXPERT)
    def test_compressed_tensors(self, family: str, weights: str, source: Source, run: Run) -> None:
        folder = source(family)
        report, out = run(folder, weights=weights)
        assert report.format == "compressed-tensors"
        before, after = load(folder), load(out)
        num_quantized = 0
        for name, tensor in before.items():
            if f"{name}_scale" in after:
                q, scale = quantize_plainly(tensor, weights)
                assert equal(after.pop(name), q)
                assert equal(after.pop(f"{name}_scale"), scale.unsqueeze(-1))
                num_quantized += 1
            elif name in after:
                assert equal(after.pop(name), tensor)
            else:  # LongCat's rows for experts that return their input
                assert family == "longcat_flash" and ".experts." in name
        assert not after
        layouts = find_experts(build(family)).values()
        assert num_quantized == sum((2 + layout.gated) * layout.num_experts for layout in layouts)

    @pytest.mark.parametrize("weights", ["int8", "fp8"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_qmoe(self, family: str, weights: str, source: Source, run: Run) -> None:
        folder = source(family)
        report, out = run(folder, weights=weights, format="qmoe")
        assert report.format == "qmoe"
        before, after = load(folder), load(out)
        model = build(family)
        for module, layout in find_experts(model).items():
            for name in layout.sources:
                parameters = [
                    model.get_submodule(module).get_parameter(p).detach()
                    for p in layout.sources[name]
                ]
                canonical = layout.canonical(name, parameters)
                if name in layout.biases:
                    assert equal(after.pop(f"{module}.{name}"), canonical)
                    before.pop(f"{module}.{name}")
                    continue
                q, scale = quantize_plainly(canonical, weights)
                assert equal(after.pop(f"{module}.{name}_q"), q)
                assert equal(after.pop(f"{module}.{name}_scale"), scale)
        assert after  # everything else is as it was
        for name, tensor in after.items():
            assert equal(tensor, before[name])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_other_source_dtypes(self, dtype: torch.dtype, source: Source, run: Run) -> None:
        folder = source(dtype=dtype)
        _, out = run(folder)
        name = "model.layers.1.mlp.experts.2.down_proj.weight"
        q, _ = quantize_plainly(load(folder)[name], "int8")
        after = load(out)
        assert equal(after[name], q) and after["lm_head.weight"].dtype == dtype

    def test_a_zero_row(self, source: Source, run: Run) -> None:
        folder = source()
        tensors = load(folder)
        name = "model.layers.0.mlp.experts.0.up_proj.weight"
        tensors[name][3] = 0
        rewrite(folder, tensors)
        report, out = run(folder)
        after = load(out)
        assert after[name][3].eq(0).all() and after[f"{name}_scale"][3] > 0
        assert report.verified


class TestLayout:
    def test_an_experts_weights_are_one_contiguous_read(self, qwen3_folder: Path, run: Run) -> None:
        _, out = run(qwen3_folder, max_shard_size="60kB")
        tensors = open_checkpoint(out)
        for layer in range(2):
            for expert in range(4):
                at = f"model.layers.{layer}.mlp.experts.{expert}"
                gate, up, down = (tensors[f"{at}.{p}_proj.weight"] for p in ("gate", "up", "down"))
                assert gate.file == up.file == down.file
                assert up.offset == gate.offset + gate.nbytes
                assert down.offset == up.offset + up.nbytes
                assert tensors[f"{at}.down_proj.weight_scale"].file == gate.file

    @pytest.mark.parametrize("max_shard_size", ["20kB", "50kB", "5GB"])
    def test_shards_and_index(self, max_shard_size: str, source: Source, run: Run) -> None:
        report, out = run(source(), max_shard_size=max_shard_size)
        files = sorted(out.glob("*.safetensors"))
        assert [f.name for f in files] == list(report.shards)
        assert [f.stat().st_size for f in files] == list(report.shards.values())
        tensors = {n: t for f in files for n, t in read_header(f).items()}
        total = sum(tensor.nbytes for tensor in tensors.values())
        if max_shard_size == "5GB":
            assert [f.name for f in files] == ["model.safetensors"]
            assert not (out / "model.safetensors.index.json").exists()
        else:
            count = len(files)
            assert files[0].name == f"model-00001-of-{count:05}.safetensors" and count > 2
            index = json.loads((out / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == total
            assert index["weight_map"] == {n: t.file.name for n, t in tensors.items()}

    def test_odd_sizes_stay_aligned(self, source: Source, run: Run) -> None:
        """Expert weights of odd bytes come before fp32 scales; every reader wants those aligned."""
        folder = source(hidden_size=63, moe_intermediate_size=13, num_experts=3)
        _, out = run(folder)
        for tensor in open_checkpoint(out).values():
            assert tensor.offset % tensor.torch_dtype.itemsize == 0
        assert load(out)

    def test_small_files(self, source: Source, run: Run) -> None:
        folder = source()
        kept = {
            "tokenizer.json": b"{}",
            "tokenizer_config.json": b"not what it says",
            "processor_config.json": b'{"auto_map": {"AutoProcessor": "owner/name--code.Class"}}',
            "chat_template.jinja": b"{{ x }}",
            "vocab.txt": b"a",
            "vocab.bpe": b"a b",
            "tokenizer.model": b"\x00\x01",
            "tokenizer.model.v3": b"\x00\x02",
            "additional_chat_templates/tool.jinja": b"{{ y }}",
            "docs.md": b"# use",
            **dict.fromkeys(
                ("LICENSE", "license.md", "License.rst", "LICENCE-2.0", "NOTICE", "Copying"),
                b"free",
            ),
        }
        dropped = [
            "evil.py",
            "license.py",
            "training_args.bin",
            "state.pt",
            ".gitattributes",
            "x.pkl",
            "old.index.json",
            "adapter_config.json",
            "model_card.md",
        ]
        for name, data in kept.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        for name in dropped:
            (folder / name).write_bytes(b"x")
        report, out = run(folder)
        after = contents(out)
        for name, data in kept.items():
            assert after[name] == data
        assert after["generation_config.json"] == (folder / "generation_config.json").read_bytes()
        assert not set(dropped) & set(after)
        ours = {"config.json", "model.safetensors", "generation_config.json", MANIFEST_NAME}
        assert set(after) == {*kept, *ours, "README.md"}
        assert [w for w in report.warnings if "adapter_config.json" in w] == report.warnings
        assert not any(fnmatch(name, pattern) for name in dropped[:1] for pattern in DOWNLOADED)
        assert all(any(fnmatch(name, p) for p in DOWNLOADED) for name in kept)

    def test_links(self, source: Source, run: Run, tmp_path: Path) -> None:
        """What lies elsewhere is not ours to publish; a Hub cache keeps its files elsewhere."""
        folder, elsewhere = source(), tmp_path / "elsewhere"
        blobs = tmp_path / "models--owner--name" / "blobs"
        for made in (elsewhere, blobs):
            made.mkdir(parents=True)
            (made / "a").write_text("secret")
        (folder / "notes.txt").symlink_to(Path("..") / "elsewhere" / "a")
        (folder / "additional_chat_templates").symlink_to(elsewhere, target_is_directory=True)
        (elsewhere / "x.jinja").write_text("secret")
        (folder / "same.txt").symlink_to("generation_config.json")
        (folder / "vocab.txt").symlink_to(blobs / "a")
        (folder / "gone.txt").symlink_to("nowhere")
        os.mkfifo(folder / "pipe.txt")
        weights = folder / "model.safetensors"
        weights.rename(elsewhere / "disk.safetensors")
        weights.symlink_to(elsewhere / "disk.safetensors")
        report, out = run(folder)
        after = contents(out)
        assert after["vocab.txt"] == b"secret" and "same.txt" in after
        assert not {"notes.txt", "additional_chat_templates/x.jinja"} & set(after)
        outside = [w for w in report.warnings if "outside of the checkpoint" in w]
        assert len(outside) == 2 and any("notes.txt" in w for w in outside)

    def test_code_that_does_not_go_along(self, source: Source, run: Run) -> None:
        folder = source()
        rewrite(folder, load(folder), auto_map={"AutoConfig": "configuration_x.X"})
        tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "a": 1}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        report, out = run(folder)
        assert "auto_map" not in json.loads((out / "config.json").read_text())
        assert json.loads((out / "tokenizer_config.json").read_text()) == {"a": 1}
        assert [w.split()[0] for w in report.warnings] == ["config.json", "tokenizer_config.json"]

    @pytest.mark.parametrize("on_hub", [True, False])
    def test_the_card_is_ours(self, on_hub: bool, source: Source, run: Run) -> None:
        folder = source()
        metadata = {"license": "mit", "language": ["en"], "tags": ["theirs"], "model-index": 1}
        (folder / "README.md").write_text(f"---\n{json.dumps(metadata)}\n---\n# Theirs")
        if on_hub:
            snapshots = folder.parent / "models--owner--some-name" / "snapshots"
            snapshots.mkdir(parents=True)
            folder = folder.rename(snapshots / "abc")
        report, out = run(folder, ignore="layers.0")
        card = ModelCard.load(out / "README.md")
        found = card.data.to_dict()
        assert (found["license"], found["language"]) == ("mit", ["en"])
        assert "theirs" not in found["tags"] and "int8" in found["tags"]
        assert found.get("base_model") == ("owner/some-name" if on_hub else None)
        assert found.get("base_model_relation") == ("quantized" if on_hub else None)
        assert "Theirs" not in card.text and str(folder.parent) not in card.text
        assert f"{report.worst_error[1]:.3%}" in card.text and "model.layers.0" in card.text
        assert report.readers in card.text

    @pytest.mark.parametrize("card", [b"---\nlicense: [1\n---\n", b"\xff", b"---\n- 1\n---", b""])
    def test_a_card_that_cannot_be_read(self, card: bytes, source: Source, run: Run) -> None:
        folder = source()
        (folder / "README.md").write_bytes(card)
        _, out = run(folder)
        assert "license" not in ModelCard.load(out / "README.md").data.to_dict()

    def test_manifest(self, qwen3_folder: Path, run: Run) -> None:
        report, out = run(qwen3_folder, weights="fp8", max_shard_size="60kB")
        manifest = Manifest.read(out)
        assert (manifest.weights, manifest.format) == ("fp8", "compressed-tensors")
        assert manifest.source == "source"  # a name, not a path of this machine
        for name, shard in manifest.shards.items():
            assert shard.sha256 == sha256_of(out / name)
            assert shard.bytes == (out / name).stat().st_size
        assert manifest.errors == report.errors
        assert set(manifest.errors) == {f"model.layers.{i}.mlp.experts" for i in range(2)}


class TestConfig:
    def test_the_source_stays_verbatim(self) -> None:
        text = '{\n  "b": 1e-06,\n\t"a": [1,2],\n  "big": 10000000000000000000000.0\n}\n'
        result = with_quantization_config(text, {"quant_method": "qmoe"})
        assert result.startswith(text.rstrip()[:-1].rstrip() + ",\n")
        assert json.loads(result) == {
            **json.loads(text),
            "quantization_config": {"quant_method": "qmoe"},
        }

    def test_an_older_one_is_replaced_in_place(self) -> None:
        text = '{"a": 1, "quantization_config": {"quant_method": "fp8"}, "z": 2}'
        nested = f'{{"text_config": {text}}}'
        result = json.loads(with_quantization_config(nested, {"quant_method": "qmoe"}))
        assert result == {
            "text_config": {"a": 1, "z": 2},
            "quantization_config": {"quant_method": "qmoe"},
        }
        result = json.loads(with_quantization_config(text, {"quant_method": "qmoe"}))
        assert list(result) == ["a", "quantization_config", "z"]
        assert result["quantization_config"] == {"quant_method": "qmoe"}

    def test_every_linear_left_in_16_bit_is_named(self, source: Source, run: Run) -> None:
        _, out = run(source(), ignore=[r"layers\.0\."])
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "compressed-tensors"
        after = load(out)
        expected = {
            name.removesuffix(".weight")
            for name, tensor in after.items()
            if tensor.ndim == 2 and name.endswith(".weight") and tensor.dtype == torch.bfloat16
        }
        assert set(config["ignore"]) == expected - {"model.embed_tokens"}
        assert "model.layers.0.mlp.experts.0.up_proj" in config["ignore"]
        assert "model.layers.1.mlp.gate" in config["ignore"]

    def test_modules_that_stay(self, source: Source, run: Run) -> None:
        report, out = run(source("gpt_oss"), ignore=[r"layers\.1\."])
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert config["modules_to_not_convert"] == ["model.layers.1.mlp.experts"]
        assert report.skipped_modules == ["model.layers.1.mlp.experts"]
        assert "model.layers.1.mlp.experts.gate_up_proj" in load(out)


class TestReport:
    def test_numbers(self, source: Source, run: Run) -> None:
        folder = source()
        report, out = run(folder)
        before, after = load(folder), load(out)
        assert report.source_bytes == sum(t.nbytes for t in before.values())
        assert report.output_bytes == sum(f.stat().st_size for f in out.glob("*.safetensors"))
        scales = [t for n, t in after.items() if n.endswith("_scale")]
        quantized = [t for t in after.values() if t.dtype == torch.int8]
        num_weights = sum(t.numel() for t in quantized)
        assert report.bits_per_weight == 8 * (1 + sum(t.nbytes for t in scales) / num_weights)
        at = "model.layers.1.mlp.experts"
        error = norm = 0.0
        for expert in range(4):
            name = f"{at}.{expert}.down_proj.weight"
            dequantized = after[name].double() * after[f"{name}_scale"].double()
            rows = slice(None, None, SAMPLED_ROWS)
            error += float((dequantized - before[name].double())[rows].square().sum())
            norm += float(before[name].double()[rows].square().sum())
        assert report.errors[at]["down_proj"] == pytest.approx((error / norm) ** 0.5, rel=1e-4)
        values = sorted(e for errors in report.errors.values() for e in errors.values())
        assert report.worst_error[1] == values[-1]
        assert report.median_error == pytest.approx((values[1] + values[2]) / 2)
        assert json.loads(json.dumps(report.to_dict()))["worst_error"]["error"] == values[-1]

    def test_dry_run_reads_headers_only(
        self, source: Source, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = source(max_shard_size="100kB")
        # Nothing but the headers is there to be read.
        for file in folder.glob("*.safetensors"):
            size, header = file.stat().st_size, file.read_bytes()
            length = 8 + int.from_bytes(header[:8], "little")
            file.write_bytes(header[:length])
            os.truncate(file, size)
        report, out = run(folder, dry_run=True, max_shard_size="60kB")
        assert not out.exists() and not out.with_name("out.partial").exists()
        assert report.errors == {} and report.peak_memory_bytes > 0
        monkeypatch.setattr(write_module, "quantize_with_squares", None)
        assert sum(report.shards.values()) == report.output_bytes

    def test_the_plan_is_what_is_written(self, qwen3_folder: Path, run: Run) -> None:
        planned, _ = run(qwen3_folder, dry_run=True, max_shard_size="60kB")
        done, _ = run(qwen3_folder, max_shard_size="60kB")
        assert planned.shards == done.shards

    def test_progress(self, qwen3_folder: Path, run: Run) -> None:
        calls: list[tuple[str, int, int]] = []
        run(qwen3_folder, progress=lambda *call: calls.append(call))
        for stage in ("convert", "verify"):
            done = [d for s, d, _ in calls if s == stage]
            assert done == sorted(done)
            assert (stage, done[-1], done[-1]) in calls


class TestQuantizedInputs:
    """The source's dequantized values, quantized again; its dense layers come back to 16 bit."""

    def check(self, folder: Path, dense: dict[str, torch.Tensor], run: Run) -> None:
        report, out = run(folder)
        assert report.format == "compressed-tensors"
        assert any("quantizing twice" in warning for warning in report.warnings)
        after = load(out)
        assert report.num_dequantized == sum("proj" in n and "experts" not in n for n in dense)
        for name, tensor in dense.items():
            if ".experts." in name:
                q, scale = quantize(tensor, "int8")
                assert equal(after.pop(name), q)
                assert equal(after.pop(f"{name}_scale"), scale.unsqueeze(-1))
            else:
                assert equal(after.pop(name), tensor)
        assert not after
        # Layers that --ignore keeps come back to 16 bit too.
        report, out = run(folder, name="partly", ignore=[r"layers\.0\."], format="qmoe")
        after = load(out)
        for name, tensor in dense.items():
            if "layers.0." in name:
                assert equal(after[name], tensor)

    @pytest.mark.parametrize(
        "sizes",
        [{}, {"moe_intermediate_size": 24}, {"moe_intermediate_size": 40, "head_dim": 12}],
        ids=["whole", "two cut to 24 rows", "cut in attention too"],
    )
    def test_fp8_blocks(self, sizes: dict[str, int], source: Source, run: Run) -> None:
        """Of blocks that a weight ends in the middle of, transformers makes smaller, equal ones."""
        folder, block = source(**sizes), 16
        stored, dense = {}, {}
        for name, tensor in load(folder).items():
            stored[name] = dense[name] = tensor
            if "proj" in name:
                stored[name], scale = fp8_blocks(tensor, block)
                stored[f"{name}_scale_inv"] = scale
                wide = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
                wide = wide[: len(tensor), : tensor.shape[1]]
                dense[name] = (stored[name].float() * wide).bfloat16()
        quantization = {"quant_method": "fp8", "activation_scheme": "dynamic"}
        rewrite(folder, stored, quantization_config=quantization | {"weight_block_size": [16, 16]})
        self.check(folder, dense, run)

    @pytest.mark.parametrize("dense_kind", ["fp8", "int8", "int4"])
    @pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
    def test_compressed_tensors(self, kind: str, dense_kind: str, source: Source, run: Run) -> None:
        """Experts of one kind, and of the same or another kind the layers beside them."""
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig

        formats = {"fp8": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized"}

        def group(kind: str, target: str) -> dict[str, Any]:
            weights = {"symmetric": True, "dynamic": False, "num_bits": 4 if kind == "int4" else 8}
            weights["type"] = "float" if kind == "fp8" else "int"
            weights |= (
                {"strategy": "group", "group_size": 16}
                if kind == "int4"
                else {"strategy": "channel"}
            )
            return {"targets": [target], "weights": weights, "format": formats[kind]}

        groups = {"group_0": group(kind, "Linear")}
        if kind != dense_kind:
            groups = {
                "group_0": group(kind, r"re:.*experts.*"),
                "group_1": group(dense_kind, r"re:.*self_attn.*"),
            }
        quantization = {
            "quant_method": "compressed-tensors",
            "format": formats[kind] if kind == dense_kind else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ["lm_head"],
        }
        schemes = QuantizationConfig.model_validate(quantization).config_groups
        folder = source()
        stored, dense = {}, {}
        for name, tensor in load(folder).items():
            if "proj" not in name:
                stored[name] = dense[name] = tensor
                continue
            of_experts = ".experts." in name
            own = kind if of_experts else dense_kind
            if own == "int4":
                scheme = schemes["group_0" if of_experts or kind == dense_kind else "group_1"]
                compressor = BaseCompressor.get_value_from_registry(formats[own])
                groups_of_16 = tensor.float().reshape(tensor.shape[0], -1, 16)
                scale = (groups_of_16.abs().amax(-1) / 7).bfloat16()
                state = compressor.compress({"weight": tensor, "weight_scale": scale}, scheme)
                dense[name] = compressor.decompress(state, scheme)["weight"].bfloat16()
            else:
                q, scale = quantize(tensor, own)
                state = {"weight": q, "weight_scale": scale.unsqueeze(-1)}
                dense[name] = (q.float() * scale.unsqueeze(-1)).bfloat16()
            for leaf, value in state.items():
                stored[name.removesuffix("weight") + leaf] = value.contiguous()
        rewrite(folder, stored, quantization_config=quantization)
        self.check(folder, dense, run)

    @pytest.mark.parametrize("kind", ["int8", "fp8"])
    def test_a_layer_in_16_bit(self, kind: str, source: Source, run: Run) -> None:
        """And static scales of activations, which are of no use in OUT."""
        pytest.importorskip("compressed_tensors")
        folder = source()
        stored, dense = {}, {}
        for name, tensor in load(folder).items():
            stored[name] = dense[name] = tensor
            if ".0.mlp.experts." in name:
                q, scale = quantize(tensor, kind)
                stored[name], stored[f"{name}_scale"] = q, scale.unsqueeze(-1)
                stored[name.replace("weight", "input_scale")] = torch.ones(1)
                dense[name] = (q.float() * scale.unsqueeze(-1)).bfloat16()
        type = {"int8": "int", "fp8": "float"}[kind]
        weights = {"num_bits": 8, "type": type, "symmetric": True, "strategy": "channel"}
        group = {"targets": ["Linear"], "weights": weights, "format": f"{type}-quantized"}
        quantization = {
            "quant_method": "compressed-tensors",
            "format": f"{type}-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*layers.1.*", "re:.*self_attn.*"],
        }
        rewrite(folder, stored, quantization_config=quantization)
        report, out = run(folder)
        assert any("input_scale and 11 more left out" in warning for warning in report.warnings)
        after = load(out)
        for name, tensor in dense.items():
            if ".experts." in name:
                q, scale = quantize(tensor, "int8")
                assert equal(after.pop(name), q)
                assert equal(after.pop(f"{name}_scale"), scale.unsqueeze(-1))
            else:
                assert equal(after.pop(name), tensor)
        assert not after
        config = json.loads((out / "config.json").read_text())
        assert config["quantization_config"]["format"] == "int-quantized"

    def test_scales_of_no_values(self, source: Source, tmp_path: Path) -> None:
        folder = source()
        stored = load(folder)
        for name in list(stored):
            if "_proj" in name:
                q, scale = quantize(stored[name], "fp8")
                stored[name], stored[f"{name}_scale"] = q, scale.unsqueeze(-1)[:0]
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
        group = {"targets": ["Linear"], "weights": weights}
        quantization = {"quant_method": "compressed-tensors", "format": "float-quantized",
                        "config_groups": {"group_0": group}}  # fmt: skip
        rewrite(folder, stored, quantization_config=quantization)
        with pytest.raises(ConversionError, match=r"proj\.weight") as error:
            convert(folder, tmp_path / "out")
        assert "\n" not in str(error.value)
        assert not list(tmp_path.glob("out*"))

    def test_mxfp4(self, source: Source, run: Run) -> None:
        from transformers import AutoModelForCausalLM, Mxfp4Config

        folder = source("gpt_oss", intermediate_size=64)
        generator = torch.Generator().manual_seed(0)
        stored = {}
        for name, tensor in load(folder).items():
            stored[name] = tensor
            if name.endswith(("gate_up_proj", "down_proj")):
                del stored[name]
                experts, columns, rows = tensor.shape
                size = (experts, rows, columns // 32)
                stored[f"{name}_blocks"] = torch.randint(
                    256, (*size, 16), dtype=torch.uint8, generator=generator
                )
                stored[f"{name}_scales"] = torch.randint(
                    118, 126, size, dtype=torch.uint8, generator=generator
                )
        rewrite(folder, stored, quantization_config={"quant_method": "mxfp4"})
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
        )
        report, out = run(folder, ignore=[r"layers\.0\."])
        assert any("mxfp4" in warning for warning in report.warnings)
        after = load(out)
        layouts = find_experts(model)
        kept, quantized = (model.get_submodule(name) for name in layouts)
        at = "model.layers.0.mlp.experts"
        assert equal(after[f"{at}.gate_up_proj"], kept.gate_up_proj.detach())
        assert equal(after[f"{at}.down_proj_bias"], kept.down_proj_bias.detach())
        layout = layouts["model.layers.1.mlp.experts"]
        for name in layout.projections:
            canonical = layout.canonical(name, [quantized.get_parameter(name).detach()])
            q, scale = quantize(canonical, "int8")
            assert equal(after[f"model.layers.1.mlp.experts.{name}_q"], q)
            assert equal(after[f"model.layers.1.mlp.experts.{name}_scale"], scale)


class TestRefused:
    def test_a_name_that_the_experts_scales_need(self, source: Source, tmp_path: Path) -> None:
        """A header held the name once, and the file both tensors: nobody could read it."""
        folder = source()
        name = "model.layers.0.mlp.experts.1.up_proj.weight_scale"
        rewrite(folder, {**load(folder), name: torch.ones(32, 1)})
        self.expect(
            folder, tmp_path / "out", f"{re.escape(name)}: .* need for another", verify=False
        )

    def expect(self, folder: Path, out: Path, message: str, **options: Any) -> None:
        with pytest.raises(ConversionError, match=message) as error:
            convert(folder, out, **options)
        assert "\n" not in str(error.value)
        assert not out.exists()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
    def test_nan_and_infinity(
        self, bad: float, family: str, source: Source, tmp_path: Path
    ) -> None:
        folder = source(family)
        tensors = load(folder)
        if family == "qwen3_moe":
            tensors["model.layers.1.mlp.experts.2.up_proj.weight"][5, 7] = bad
            where = r"model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight, expert 2, row 5"
        else:  # interleaved: column 10 is row 5 of the gate
            tensors["model.layers.1.mlp.experts.gate_up_proj"][2, 7, 10] = bad
            where = r"model\.layers\.1\.mlp\.experts\.gate_up_proj, expert 2, row 5"
        rewrite(folder, tensors)
        kind = "NaN" if bad != bad else "infinity"
        self.expect(folder, tmp_path / "out", f"{kind} in {where}")
        assert not (tmp_path / "out.partial").exists()

    def test_compressed_tensors_for_fused_experts(self, source: Source, tmp_path: Path) -> None:
        folder = source("granitemoe")
        message = "compressed-tensors cannot hold it; use --format qmoe"
        self.expect(folder, tmp_path / "out", message, format="compressed-tensors")

    def test_ignoring_everything(self, source: Source, tmp_path: Path) -> None:
        self.expect(source(), tmp_path / "out", "leaves nothing to quantize", ignore=["experts"])
        for ignore in (["layer.0"], [r"layers\.0\.", "lm_head"]):
            message = f"'{ignore[-1]}' finds no experts module; they are named like model.layers.0"
            self.expect(source(), tmp_path / "out", message, ignore=ignore)

    def test_ignoring_half_of_what_is_stored_together(self, source: Source, tmp_path: Path) -> None:
        folder = source("ernie4_5_vl_moe")
        self.expect(folder, tmp_path / "out", "ignore both or neither", ignore=["text_moe"])

    def test_integer_experts_without_a_quantization_config(
        self, source: Source, tmp_path: Path
    ) -> None:
        folder = source()
        tensors = load(folder)
        for name in tensors:
            if ".experts." in name:
                tensors[name] = tensors[name].mul(100).to(torch.int8)
        rewrite(folder, tensors)
        self.expect(folder, tmp_path / "out", r"is I8; weights must be BF16, F16 or F32")

    def test_no_such_model(self, tmp_path: Path, source: Source) -> None:
        out = tmp_path / "out"
        self.expect(tmp_path / "nowhere", out, "no such folder")
        self.expect(source() / "config.json", out, "a file; give the folder")
        with pytest.raises(ConversionError, match="no such folder"):
            convert("just-a-name", out)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weights": "int4"}, "weights='int4'; int8, fp8 work"),
            ({"format": "gguf"}, "auto, compressed-tensors, qmoe work"),
            ({"device": "tpu"}, "auto, cpu, cuda work"),
            ({"workers": 0}, "at least 1 is needed"),
            ({"ignore": ["("]}, "is not a regular expression"),
            ({"max_shard_size": "huge"}, "is not a size"),
            ({"push_to_hub": "a/b/c"}, "no name of a repository"),
        ],
    )
    def test_options(
        self, qwen3_folder: Path, tmp_path: Path, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            convert(qwen3_folder, tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())


class TestFailures:
    """The disk, permissions, signals: OUT stays absent, and what can be gone on with is kept."""

    def test_disk_full_beforehand(
        self, qwen3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = type("usage", (), {"free": 1000})()
        monkeypatch.setattr(output_module.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ConversionError, match=r"out: .* are needed, 1 kB are free"):
            convert(qwen3_folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("inodes", "message"), [(9, "the disk is full"), (0, "no inodes left")]
    )
    def test_disk_full_on_the_way(
        self,
        qwen3_folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        inodes: int,
        message: str,
    ) -> None:
        out = tmp_path / "out"
        undisturbed = tmp_path / "undisturbed"
        convert(qwen3_folder, undisturbed, max_shard_size="60kB")
        write = ShardWriter.write

        def fail(self: ShardWriter, data: Any) -> None:
            if "model-00002" in self.file.name:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(self, data)

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "write", fail)
            status = SimpleNamespace(
                f_files=99, f_favail=inodes, f_bavail=99, f_frsize=1 << 40, f_blocks=99, f_bfree=99
            )
            patch.setattr("qmoe_convert.os.statvfs", lambda path: status)
            with pytest.raises(ConversionError, match=rf"model-00002.*{message}.*--resume"):
                convert(qwen3_folder, out, max_shard_size="60kB")
        assert not out.exists()
        convert(qwen3_folder, out, max_shard_size="60kB", resume=True)
        assert contents(out) == contents(undisturbed)

    def test_no_permission(
        self, qwen3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
            if path.name == "out.partial":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(ConversionError, match=r"out\.partial: no permission"):
            convert(qwen3_folder, tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_no_folder_to_write_to(self, qwen3_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match="no such folder; create it first"):
            convert(qwen3_folder, tmp_path / "a" / "out")


class TestResume:
    def test_after_a_kill_the_result_is_the_same_to_the_byte(
        self, qwen3_folder: Path, tmp_path: Path
    ) -> None:
        """SIGKILL in the middle of a shard; the shards before it are not written again."""
        undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
        convert(qwen3_folder, undisturbed, max_shard_size="30kB")
        script = f"""
            import os, signal
            from pathlib import Path
            from qmoe_convert.convert import convert

            def kill(stage, done, total):
                if len(list(Path({str(out)!r} + ".partial/new").glob("*.safetensors"))) == 4:
                    os.kill(os.getpid(), signal.SIGKILL)

            convert({str(qwen3_folder)!r}, {str(out)!r}, max_shard_size="30kB", progress=kill)
        """
        paths = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "convert"))
        killed = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL
        assert not out.exists()
        new = tmp_path / "out.partial" / "new"
        whole = {p.name: p.stat().st_ino for p in new.glob("*.safetensors")}
        assert len(whole) == 4 and list(new.glob("*.safetensors.partial"))

        with pytest.raises(FileExistsError, match=r"out\.partial is left.*--resume.*--overwrite"):
            convert(qwen3_folder, out, max_shard_size="30kB")
        convert(qwen3_folder, out, max_shard_size="30kB", resume=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "undisturbed"]
        assert contents(out) == contents(undisturbed)
        journaled = [n for n, inode in whole.items() if (out / n).stat().st_ino == inode]
        assert len(journaled) >= 3  # the fourth may have been killed before its entry

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weights": "fp8"}, "begun with --weights int8, and this is --weights fp8; repeat"),
            ({"format": "qmoe"}, "--format compressed-tensors, and this is --format qmoe"),
            ({"max_shard_size": "40kB"}, "size 30000, .* 40000; .*30000 to keep what is finished"),
            ({"ignore": "layers.0"}, "--ignore nothing, and this is --ignore 'layers.0'"),
            ({}, "another source, or from one that has changed"),
        ],
    )
    def test_another_source_or_other_options(
        self, source: Source, tmp_path: Path, options: dict[str, Any], message: str
    ) -> None:
        folder, out = source(), tmp_path / "out"

        def interrupt(stage: str, done: int, total: int) -> None:
            if done > total / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(folder, out, max_shard_size="30kB", progress=interrupt)
        if not options:
            os.utime(next(folder.glob("*.safetensors")), ns=(0, 0))
        options = {"max_shard_size": "30kB"} | options
        with pytest.raises(ConversionError, match=message):
            convert(folder, out, resume=True, **options)
        assert len(list((tmp_path / "out.partial" / "new").glob("*.safetensors"))) >= 2
        convert(folder, out, overwrite=True, **options)

    def test_a_shard_that_shrank_is_written_again(self, source: Source, tmp_path: Path) -> None:
        folder, out = source(), tmp_path / "out"

        def interrupt(stage: str, done: int, total: int) -> None:
            if done > total / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(folder, out, max_shard_size="30kB", progress=interrupt)
        first = min((tmp_path / "out.partial" / "new").glob("*.safetensors"))
        first.write_bytes(first.read_bytes()[:100])
        assert convert(folder, out, max_shard_size="30kB", resume=True).verified

    def test_nothing_to_resume_is_a_fresh_run(self, qwen3_folder: Path, tmp_path: Path) -> None:
        assert convert(qwen3_folder, tmp_path / "out", resume=True).verified


class TestWorkers:
    @pytest.mark.parametrize("workers", [1, 2, 7])
    def test_their_number_changes_no_byte(self, qwen3_folder: Path, run: Run, workers: int) -> None:
        run(qwen3_folder, name="reference", max_shard_size="60kB")
        _, out = run(qwen3_folder, workers=workers, max_shard_size="60kB")
        assert contents(out) == contents(out.with_name("reference"))

    def test_pieces_in_flight_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(workers_module, "IN_FLIGHT_BYTES", 100)
        lock, held, peak = threading.Lock(), 0, 0

        class Item:
            def __init__(self, index: int, cost: int) -> None:
                self.index, self.cost = index, cost

        def work(item: Item) -> Item:
            nonlocal held, peak
            with lock:
                held += item.cost
                peak = max(peak, held)
            return item

        items = [Item(i, cost) for i, cost in enumerate([10, 90, 20, 250, 5, 5, 60, 60, 1] * 5)]
        order = []
        for item in in_order(work, items, 3):
            order.append(item.index)
            with lock:
                held -= item.cost
        assert order == list(range(len(items)))
        # What was just yielded is still held, and one item may exceed the bound by itself.
        assert peak <= 250 + 100

    def test_buffers_are_used_again(
        self, qwen3_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pools = []

        class Counted(write_module.BufferPool):
            def __init__(self) -> None:
                super().__init__()
                pools.append(self)

        monkeypatch.setattr(write_module, "BufferPool", Counted)
        monkeypatch.setattr(workers_module, "IN_FLIGHT_BYTES", 1)
        run(qwen3_folder)
        (pool,) = pools
        # An expert is 6 kB in 8 bit; everything that was written is 150 kB.
        assert 6_000 < pool.nbytes < 40_000

    def test_an_error_stops_the_others(self) -> None:
        class Item:
            cost = 1

        def work(item: Item) -> None:
            raise ValueError("bad piece")

        results = in_order(work, [Item() for _ in range(50)], 2)
        with pytest.raises(ValueError, match="bad piece"):
            next(results)
        assert not [t for t in threading.enumerate() if t.name.startswith("qmoe-convert")]

    def test_of_two_that_overlap_the_last_restores_settings(
        self, qwen3_folder: Path, tmp_path: Path
    ) -> None:
        """The first to start is the first to end; what the second found was set by the first."""
        entered, first_done = threading.Event(), threading.Event()
        found: list[int] = []
        verbosity = transformers.logging.get_verbosity()

        def run_second() -> None:
            def wait(*call: Any) -> None:
                entered.set()
                assert first_done.wait(60)

            convert(qwen3_folder, tmp_path / "second", progress=wait)

        second = threading.Thread(target=run_second)

        def start_second(*call: Any) -> None:
            if not entered.is_set():
                second.start()
                assert entered.wait(60)

        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            convert(qwen3_folder, tmp_path / "first", progress=start_second)
            assert torch.get_num_threads() == 3
            first_done.set()
            second.join()
            # A new thread has what the process is set to.
            new = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            new.start()
            new.join()
        finally:
            torch.set_num_threads(before)
        assert found == [3]
        assert transformers.logging.get_verbosity() == verbosity
        assert contents(tmp_path / "first") == contents(tmp_path / "second")

    def test_several_at_once(self, qwen3_folder: Path, tmp_path: Path) -> None:
        """Building a model sets torch's default dtype, which is the process's."""
        convert(qwen3_folder, tmp_path / "alone")
        expected = contents(tmp_path / "alone")
        same: list[bool] = []

        def run_some(name: str) -> None:
            for i in range(3):
                out = tmp_path / f"{name}{i}"
                convert(qwen3_folder, out)
                same.append(contents(out) == expected)

        threads = [threading.Thread(target=run_some, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert same == [True] * 9
        assert torch.get_default_dtype() == torch.float32

    def test_the_default_dtype_changes_no_byte(self, qwen3_folder: Path, run: Run) -> None:
        """Another thread may be loading a model, under the dtype of that model."""
        _, expected = run(qwen3_folder, name="expected")
        torch.set_default_dtype(torch.bfloat16)
        try:
            # Workers are new threads, so that no scratch of theirs is left from before.
            report, out = run(qwen3_folder)
        finally:
            torch.set_default_dtype(torch.float32)
        assert report.verified and contents(out) == contents(expected)

    @pytest.mark.parametrize("stage", ["convert", "verify"])
    def test_an_interrupt_leaves_no_worker_behind(
        self, qwen3_folder: Path, tmp_path: Path, stage: str
    ) -> None:
        def interrupt(at: str, done: int, total: int) -> None:
            if at == stage:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            try:
                convert(qwen3_folder, tmp_path / "out", workers=2, progress=interrupt)
            except KeyboardInterrupt:
                # While the traceback still holds every frame.
                assert not [t for t in threading.enumerate() if t.name.startswith("qmoe-convert")]
                raise
        assert convert(qwen3_folder, tmp_path / "out", resume=True).verified

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
    @pytest.mark.parametrize("weights", ["int8", "fp8"])
    def test_a_gpu_writes_the_same_bytes(self, qwen3_folder: Path, run: Run, weights: str) -> None:
        _, cpu = run(qwen3_folder, name="cpu", weights=weights, device="cpu")
        _, gpu = run(qwen3_folder, name="gpu", weights=weights, device="cuda")
        assert contents(cpu) == contents(gpu)


def test_a_single_huge_tensor_may_exceed_the_shard_size(source: Source, run: Run) -> None:
    report, _ = run(source("granitemoe"), max_shard_size="1kB")
    assert max(report.shards.values()) > 1000 and len(report.shards) > 5


def test_a_checkpoint_of_one_expert(source: Source, run: Run) -> None:
    report, _ = run(source(num_experts=1, num_experts_per_tok=1))
    assert report.format == "compressed-tensors" and report.verified


def test_extra_unused_file_is_not_a_shard(source: Source, run: Run) -> None:
    folder = source()
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")
    _, out = run(folder)
    assert not (out / "consolidated.safetensors").exists()
