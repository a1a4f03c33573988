"""Tiny random checkpoints in the Hub's layouts, written by transformers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qmoe_convert.convert import convert
from qmoe_convert.report import Report

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = MLA | {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}

# family -> (config class, its options); each stores its experts in another way
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", SIZES | EXPERTS),
    "mixtral": ("MixtralConfig", SIZES | LOCAL),
    "deepseek_v3": ("DeepseekV3Config", SIZES | DEEPSEEK | {"num_key_value_heads": 4}),
    "nemotron_h": (
        "NemotronHConfig",
        SIZES
        | {
            "layers_block_type": ["moe", "attention"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        SIZES | LOCAL | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "granitemoe": ("GraniteMoeConfig", SIZES | LOCAL),
    "dbrx": (
        "DbrxConfig",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "vocab_size": 64,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {
                "ffn_hidden_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "hidden_size": 64,
            },
        },
    ),
    "llama4_text": (
        "Llama4TextConfig",
        SIZES
        | LOCAL
        | {"intermediate_size_mlp": 48, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
    ),
    "longcat_flash": (
        "LongcatFlashConfig",
        SIZES
        | MLA
        | {
            "num_layers": 1,
            "num_hidden_layers": 2,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
    ),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeConfig",
        {
            "text_config": SIZES
            | {
                "moe_intermediate_size": [32, 16],
                "moe_num_experts": 4,
                "moe_k": 2,
                "mlp_layer_types": ["dense", "sparse"],
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [3, 3, 2],
                },
            },
            "vision_config": {
                "hidden_size": 64,
                "depth": 1,
                "num_heads": 4,
                "intermediate_size": 64,
            },
        },
    ),
}
# Those that compressed-tensors can hold.
PER_EXPERT = ("qwen3_moe", "mixtral", "deepseek_v3", "nemotron_h", "longcat_flash")


def build(family: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """A tiny model with random weights."""
    name, defaults = FAMILIES[family]
    config = getattr(transformers, name)(**{**defaults, **options})
    torch.manual_seed(0)
    auto = next(
        a
        for a in (AutoModelForCausalLM, AutoModelForImageTextToText)
        if type(config) in a._model_mapping
    )
    model = auto.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    return model


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's shards."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, as bytes."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    """Replace a checkpoint's tensors by others in one file, and add to its config."""
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}, indent=2))


def fp8_blocks(tensor: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in FP8 and the scales of its square blocks; the last may be cut, as DeepSeek's."""
    shape = [-(-size // block) * block for size in tensor.shape]
    padded = torch.zeros(shape)
    padded[: len(tensor), : tensor.shape[1]] = tensor
    tiles = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scale = tiles.abs().amax((1, 3), keepdim=True) / 448
    q = (tiles / scale).to(torch.float8_e4m3fn).reshape(shape)
    return q[: len(tensor), : tensor.shape[1]].contiguous(), scale[:, 0, :, 0].contiguous()


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    """Write a family's checkpoint below ``tmp_path`` and return its folder."""

    def make(
        family: str = "qwen3_moe",
        max_shard_size: str = "5GB",
        dtype: torch.dtype = torch.bfloat16,
        **options: Any,
    ) -> Path:
        folder = tmp_path / "source"
        model = build(family, dtype, **options)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded Qwen3-MoE checkpoint that no test changes."""
    folder = tmp_path_factory.mktemp("qwen3") / "source"
    build("qwen3_moe").save_pretrained(folder, max_shard_size="50kB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Report, Path]]:
    """Convert into a folder below ``tmp_path``; returns the report and the folder."""

    def convert_to(folder: Path, name: str = "out", **options: Any) -> tuple[Report, Path]:
        return convert(folder, tmp_path / name, **options), tmp_path / name

    return convert_to
