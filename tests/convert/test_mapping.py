from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qmoe
from qmoe.checkpoints.files import CheckpointError, open_checkpoint
from qmoe.checkpoints.inspection import inspect_checkpoint
from qmoe.experts.layout import find_experts
from qmoe_convert.mapping import CheckpointMapping, MappingError, map_checkpoint
from qmoe_convert.shards import Reader

from .conftest import FAMILIES, PER_EXPERT, build, fp8_blocks, load, rewrite


def mapping_of(folder: Path) -> CheckpointMapping:
    return map_checkpoint(folder, open_checkpoint(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_is_read_as_transformers_loads_it(
    family: str, source: Callable[..., Path]
) -> None:
    folder = source(family)
    tensors = open_checkpoint(folder)
    mapping, reader = map_checkpoint(folder, tensors), Reader(tensors)
    model = build(family)
    layouts = find_experts(model)
    assert set(mapping.experts) == set(layouts)
    claimed = set()
    for module, layout in layouts.items():
        experts = mapping.experts[module]
        claimed.update(experts.source_names)
        assert experts.stored_per_expert == (family in PER_EXPERT)
        for name in layout.sources:
            parameters = [
                model.get_submodule(module).get_parameter(p).detach() for p in layout.sources[name]
            ]
            expected = layout.canonical(name, parameters)
            projection = experts.projections[name]
            assert torch.equal(projection.load(reader, 0, layout.num_experts), expected)
            assert torch.equal(projection.load(reader, 1, 3), expected[1:3])
            if family in PER_EXPERT:
                parts = projection.load_parts(reader, 2)
                assert torch.equal(torch.cat(parts), expected[2])
    assert claimed.isdisjoint(mapping.others)


def test_linear_layers_and_routers_by_the_checkpoints_names(source: Callable[..., Path]) -> None:
    names = mapping_of(source("mixtral")).linear_names
    attention = [f"model.layers.0.self_attn.{p}_proj" for p in "koqv"]
    assert names[:2] == ["lm_head", "model.layers.0.block_sparse_moe.gate"]
    assert [n for n in names if "layers.0.self_attn" in n] == attention
    assert not any("norm" in n or "embed" in n or "experts" in n for n in names)


def test_linear_layers_by_transformers_names_as_well(source: Callable[..., Path]) -> None:
    names = mapping_of(source("nemotron_h")).linear_names
    assert {"backbone.layers.1.mixer.q_proj", "model.layers.1.mixer.q_proj"} <= set(names)


def test_a_tied_head_is_a_linear_too(source: Callable[..., Path]) -> None:
    folder = source("qwen3_moe", tie_word_embeddings=True)
    assert "lm_head.weight" not in load(folder)
    assert "lm_head" in mapping_of(folder).linear_names


class TestRefused:
    def expect(self, folder: Path, message: str) -> None:
        with pytest.raises((MappingError, CheckpointError), match=message) as error:
            mapping_of(folder)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("expert", [0, 2, 3])
    def test_a_tensor_missing_for_one_expert(
        self, source: Callable[..., Path], expert: int
    ) -> None:
        folder = source()
        tensors = load(folder)
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        del tensors[name]
        rewrite(folder, tensors)
        self.expect(folder, rf"{name} is missing; 3 of 4 experts have that tensor")

    def test_a_projection_missing_for_all(self, source: Callable[..., Path]) -> None:
        folder = source()
        rewrite(folder, {k: v for k, v in load(folder).items() if ".0.mlp.experts" not in k})
        self.expect(folder, r"no tensor for model\.layers\.0\.mlp\.experts\.")

    def test_gate_without_up(self, source: Callable[..., Path]) -> None:
        folder = source()
        rewrite(folder, {k: v for k, v in load(folder).items() if "up_proj" not in k})
        self.expect(folder, r"no tensor of the checkpoint matches .*up_proj")

    def test_more_experts_than_the_config_says(self, source: Callable[..., Path]) -> None:
        folder = source()
        rewrite(folder, load(folder), num_experts=3, num_local_experts=3)
        self.expect(folder, r"experts\.3\.\w+\.weight: 4 experts in the checkpoint, 3 in config")

    def test_more_experts_per_token_than_experts(self, source: Callable[..., Path]) -> None:
        folder = source("qwen3_moe", num_experts_per_tok=5)
        for read in (mapping_of, inspect_checkpoint, qmoe.load):
            with pytest.raises(CheckpointError, match="a token to 5 experts, and a layer has 4;"):
                read(folder)

    @pytest.mark.parametrize("top_k", [0, -1])
    def test_no_experts_per_token(self, source: Callable[..., Path], top_k: int) -> None:
        folder = source()
        rewrite(folder, load(folder), num_experts_per_tok=top_k)
        for read in (mapping_of, inspect_checkpoint, qmoe.load):
            with pytest.raises(CheckpointError, match=f"a token to {top_k} experts;"):
                read(folder)

    @pytest.mark.parametrize("module", ["self_attn.q_proj", "mlp.gate", "mlp.experts"])
    def test_fp8_without_scales(self, source: Callable[..., Path], module: str) -> None:
        """Their codes would be taken for the weights."""
        folder, tensors = self.in_fp8(source)
        for name in [n for n in tensors if module in n and n.endswith(".weight")]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors.pop(f"{name}_scale_inv", None)
        self.write_fp8(folder, tensors)
        self.expect(folder, "is F8_E4M3, and the checkpoint holds no scale")
        with pytest.raises(ValueError, match="the checkpoint holds no scale"):
            qmoe.load(folder, weights="int8", device="cpu")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda q, scale: (q.bfloat16(), scale), "is BF16, and .*_scale_inv is beside it"),
            (lambda q, scale: (q, scale.flatten()), r"has the shape \[16\], and a weight of"),
        ],
    )
    def test_fp8_with_odd_scales(
        self, source: Callable[..., Path], change: Any, message: str
    ) -> None:
        folder, tensors = self.in_fp8(source)
        name = "model.layers.1.self_attn.q_proj.weight"
        tensors[name], scale = change(tensors[name], tensors[f"{name}_scale_inv"])
        tensors[f"{name}_scale_inv"] = scale
        self.write_fp8(folder, tensors)
        self.expect(folder, message)

    def test_blocks_that_are_cut_are_not_quantized_on_load(
        self, source: Callable[..., Path]
    ) -> None:
        """transformers takes two rows of scales for two blocks of 12 rows, not for 16 and 8."""
        folder, tensors = self.in_fp8(source, moe_intermediate_size=24)
        self.write_fp8(folder, tensors)
        with pytest.raises(ValueError, match=r"is of 24, which is no multiple of its blocks of 16"):
            qmoe.load(folder, weights="int8", device="cpu")

    def test_mxfp4_scales_that_are_no_bytes(self, source: Callable[..., Path]) -> None:
        """Of powers of two that are taken for exponents, weights become zero."""
        folder = source("gpt_oss", intermediate_size=64)
        tensors = load(folder)
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            blocks = torch.zeros(experts, rows, columns // 32, 16, dtype=torch.uint8)
            tensors[f"{name}_blocks"] = blocks
            tensors[f"{name}_scales"] = (blocks[..., 0] + 120).view(torch.float8_e8m0fnu)
        rewrite(folder, tensors, quantization_config={"quant_method": "mxfp4"})
        message = "_scales is F8_E8M0, and transformers reads MXFP4 scales as U8"
        self.expect(folder, message)
        with pytest.raises(CheckpointError, match=message):
            qmoe.load(folder, weights="int8", device="cpu")

    @staticmethod
    def in_fp8(source: Callable[..., Path], **sizes: int) -> tuple[Path, dict[str, torch.Tensor]]:
        folder = source(**sizes)
        tensors = load(folder)
        for name in list(tensors):
            if "proj" in name:
                tensors[name], tensors[f"{name}_scale_inv"] = fp8_blocks(tensors[name], 16)
        return folder, tensors

    @staticmethod
    def write_fp8(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        rewrite(folder, tensors, quantization_config=quantization)

    @pytest.mark.parametrize("name", ["self_attn.v_proj", "input_layernorm", "mlp.gate"])
    def test_a_tensor_missing_elsewhere(self, source: Callable[..., Path], name: str) -> None:
        folder = source()
        tensors = load(folder)
        tensors["model.layers.1.mystery"] = tensors.pop(f"model.layers.1.{name}.weight")
        rewrite(folder, tensors)
        self.expect(folder, rf"no tensor for .*{name}\.weight of .*, but model\.layers\.1\.mystery")

    def test_a_dense_model(self, tmp_path: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, vocab_size=16)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        self.expect(tmp_path, "holds no experts")

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ("", "is not JSON"),
            ("[]", "holds no JSON object"),
            ("\ufeff{}", "begins with a byte order mark"),
            ("version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
            ('{"model_type": "qwen3_moe", "num_hidden_layers": -1}', "num_hidden_layers is -1"),
            ('{"model_type": "x", "quantization_config": []}', r"_config is \[\] and no object"),
            ('{"a": ' * 9999 + "1" + "}" * 9999, "nested too deeply"),
            ('{"model_type": {"a": 1}}', "model_type is no name"),
            ('{"model_type": "qwen3_moe", "num_hidden_layers": 1e12}', "num_hidden_layers stands"),
            ('{"model_type": "x", "text_config": {"num_labels": 99999}}', "num_labels stands"),
            ('{"model_type": "no_such"}', "does not know model type 'no_such'"),
            ('{"model_type": "x", "auto_map": {"AutoConfig": "c.C"}}', "needs remote code"),
            ('{"model_type": "qwen3_moe", "num_attention_heads": "many"}', "transformers cannot"),
            ('{"model_type": "bert"}', "no class of transformers|holds no experts"),
        ],
    )
    def test_configs(self, source: Callable[..., Path], config: str, message: str) -> None:
        folder = source()
        (folder / "config.json").write_text(config, encoding="utf-8")
        self.expect(folder, message)

    def test_no_config(self, source: Callable[..., Path]) -> None:
        folder = source()
        (folder / "config.json").unlink()
        self.expect(folder, r"config\.json: missing")

    @pytest.mark.parametrize(
        ("quantization", "message"),
        [
            ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq'"),
            ({"quant_method": "qmoe", "weights": "int8"}, "was converted already"),
        ],
    )
    def test_quantizations_without_a_way_back(
        self, source: Callable[..., Path], quantization: dict[str, Any], message: str
    ) -> None:
        folder = source()
        rewrite(folder, load(folder), quantization_config=quantization)
        self.expect(folder, message)

    def test_a_quantization_that_the_language_model_alone_has(
        self, source: Callable[..., Path]
    ) -> None:
        folder = source("ernie4_5_vl_moe")
        text = json.loads((folder / "config.json").read_text())["text_config"]
        text["quantization_config"] = {"quant_method": "gptq"}
        rewrite(folder, load(folder), text_config=text)
        self.expect(folder, "is quantized by 'gptq'")

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("mlp.experts.1.down_proj", lambda t: t[:, :8], r"of shape \[64, 8\], other experts"),
            ("mlp.experts.3.up_proj", lambda t: t[:0, 0], r"of shape \[0\], other experts"),
            ("mlp.experts.2.gate_proj", lambda t: t.to(torch.int8), "is I8; weights must be"),
            ("mlp.experts.2.gate_proj", lambda t: t.float(), "is F32, .* are BF16; save all"),
            ("mlp.gate", lambda t: t[:3], r"of shape \[3, 64\]: the model expects \[4, 64\]"),
            ("self_attn.q_norm", lambda t: t[:0], r"of shape \[0\]: the model expects \[16\]"),
            ("self_attn.q_proj", lambda t: t.bool(), "is BOOL; weights must be BF16"),
        ],
    )
    def test_a_tensor_of_another_dtype_or_shape(
        self,
        source: Callable[..., Path],
        name: str,
        change: Callable[[torch.Tensor], torch.Tensor],
        message: str,
    ) -> None:
        folder = source()
        tensors = load(folder)
        name = f"model.layers.1.{name}.weight"
        tensors[name] = change(tensors[name]).contiguous()
        rewrite(folder, tensors)
        self.expect(folder, f"{re.escape(name)}.*{message}")

    @pytest.mark.parametrize("method", ["fp8", "mxfp4", "compressed-tensors"])
    def test_a_quantization_that_no_tensor_shows(
        self, source: Callable[..., Path], method: str
    ) -> None:
        folder = source()
        rewrite(folder, load(folder), quantization_config={"quant_method": method})
        (warning,) = mapping_of(folder).warnings
        assert (
            f"says that the checkpoint is quantized ({method}), and no tensor of it is" in warning
        )

    def test_a_pointer_of_git_lfs(self, source: Callable[..., Path]) -> None:
        folder = source()
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(CheckpointError, match="pointer of git-lfs; run git lfs pull"):
            inspect_checkpoint(folder)

    def test_a_dtype_that_nobody_reads(self, source: Callable[..., Path]) -> None:
        folder = source()
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"B216"', 1))
        with pytest.raises(CheckpointError, match="has dtype B216, which torch cannot read"):
            mapping_of(folder)

    @pytest.mark.parametrize("family", ["granitemoe", "dbrx", "gpt_oss"])
    def test_all_experts_of_another_shape(self, source: Callable[..., Path], family: str) -> None:
        folder = source(family)
        tensors = load(folder)
        name = next(n for n in tensors if "expert" in n or "input_linear" in n)
        tensors[name] = tensors[name][:-2].contiguous()
        rewrite(folder, tensors)
        self.expect(folder, rf"{re.escape(name)}.*the model expects")


@pytest.mark.parametrize("layer", [2, 61])
def test_what_the_model_has_no_place_for_is_kept(source: Callable[..., Path], layer: int) -> None:
    """A layer for multi-token prediction, known to transformers by its number or not."""
    folder = source("deepseek_v3")
    extra = f"model.layers.{layer}.mlp.experts.0.gate_proj.weight"
    rewrite(folder, {**load(folder), extra: torch.ones(4, 4), "mystery": torch.ones(2)})
    mapping = mapping_of(folder)
    assert {extra, "mystery"} <= set(mapping.others)
    assert extra.removesuffix(".weight") in mapping.linear_names
    assert any(extra in warning or "mystery" in warning for warning in mapping.warnings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fp8_is_loaded_in_the_dtype_that_is_asked_for(
    source: Callable[..., Path], dtype: torch.dtype
) -> None:
    """transformers leaves what was not FP8 in bf16; the first forward pass ended in an error."""
    folder, tensors = TestRefused.in_fp8(source)
    TestRefused.write_fp8(folder, tensors)
    model = qmoe.load(folder, weights="int8", device="cpu", dtype=dtype)
    logits = model(torch.arange(8)[None]).logits
    assert logits.dtype == dtype and logits.isfinite().all()


def test_no_remote_code_runs(source: Callable[..., Path]) -> None:
    folder = source()
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text("raise SystemExit('executed')")
    assert mapping_of(folder).model_class == "Qwen3MoeForCausalLM"
