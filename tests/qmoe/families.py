"""One small model, or two, of each architecture that qmoe.decode is made for: random, patched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import qmoe
from qmoe.loading.side_by_side import lay_side_by_side

VOCABULARY = 264  # conftest's tokenizer of bytes fits
WINDOW = 8
EXPERTS = 32  # of Qwen3-MoE, enough to be paged
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=4096,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
GATED = dict(moe_intermediate_size=32)
DEEPSEEK = (
    SIZES
    | GATED
    | dict(
        num_key_value_heads=4,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=12,
    )
)
GLM = SIZES | GATED | dict(n_routed_experts=8, first_k_dense_replace=1, head_dim=16)


@dataclass(frozen=True)
class Family:
    """An architecture with some options.

    Attributes:
        build: the model, small, with the weights that its class draws.
        found: how many pieces of each kind are found in it; kinds that are not named: none.
    """

    build: Callable[[], PreTrainedModel]
    found: dict[str, int]


FAMILIES = {
    "qwen3_moe": Family(
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SIZES, **GATED, num_experts=EXPERTS, head_dim=16, norm_topk_prob=True)
        ),
        dict(norms=2 * 4 + 1, rotary=2, router=2, qkv=6),
    ),
    "mixtral": Family(
        lambda: MixtralForCausalLM(
            MixtralConfig(**SIZES, num_local_experts=4, sliding_window=WINDOW)
        ),
        dict(norms=2 * 2 + 1, rotary=2, router=2, qkv=6),
    ),
    "olmoe": Family(
        lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=8)),
        dict(norms=2 * 4 + 1, rotary=2, router=2, qkv=6),
    ),
    "olmoe clipped": Family(
        lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=8, clip_qkv=1.0)),
        dict(norms=2 * 4 + 1, rotary=2, router=2, qkv=6),
    ),
    "deepseek_v3": Family(
        lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK, q_lora_rank=24)),
        dict(norms=2 * 4 + 1, rotary=2, router=1),
    ),
    "deepseek_v3 in halves": Family(
        lambda: DeepseekV3ForCausalLM(
            DeepseekV3Config(**DEEPSEEK, q_lora_rank=None, rope_interleave=False)
        ),
        dict(norms=2 * 3 + 1, rotary=2, router=1),
    ),
    "gpt_oss": Family(
        lambda: GptOssForCausalLM(
            GptOssConfig(**SIZES, num_local_experts=4, head_dim=16, sliding_window=WINDOW)
        ),
        dict(norms=2 * 2 + 1, rotary=2, router=2, qkv=6),
    ),
    "glm4_moe": Family(
        lambda: Glm4MoeForCausalLM(Glm4MoeConfig(**GLM)),
        dict(norms=2 * 2 + 1, rotary=2, router=1, qkv=6),
    ),
    "glm4_moe with norms": Family(
        lambda: Glm4MoeForCausalLM(Glm4MoeConfig(**GLM, use_qk_norm=True, attention_bias=True)),
        dict(norms=2 * 4 + 1, rotary=2, router=1, qkv=6),
    ),
    "qwen3_next": Family(
        lambda: Qwen3NextForCausalLM(
            Qwen3NextConfig(
                **SIZES | {"num_hidden_layers": 3},
                **GATED,
                num_experts=8,
                head_dim=16,
                shared_expert_intermediate_size=32,
                linear_key_head_dim=16,
                linear_value_head_dim=16,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                layer_types=["linear_attention", "full_attention", "linear_attention"],
            )
        ),
        # The norms of linear attention have a gate.
        dict(norms=3 * 2 + 2 + 1, rotary=1, router=3, qkv=3),
    ),
    "granitemoe": Family(
        lambda: GraniteMoeForCausalLM(
            GraniteMoeConfig(
                **SIZES,
                num_local_experts=4,
                embedding_multiplier=3.0,
                logits_scaling=0.5,
                residual_multiplier=0.7,
                attention_multiplier=0.3,
            )
        ),
        dict(norms=2 * 2 + 1, rotary=2, router=2, qkv=6),
    ),
}


@torch.no_grad()
def build(
    family: str, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A model of the family whose every weight matters to its output, INT8 by `qmoe.patch`."""
    torch.manual_seed(seed)
    model = FAMILIES[family].build().eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "inv_freq" in name:
            continue
        if "sinks" in name:
            tensor.normal_()
        elif "bias" in name:
            tensor.normal_(std=0.3)
        elif tensor.ndim > 1:
            # Far from zero, so that greedy choices are no near ties.
            tensor.normal_(std=0.3)
        else:  # norms, and what decays in linear attention
            tensor.add_(torch.randn_like(tensor), alpha=0.2)
    model.generation_config = GenerationConfig(pad_token_id=0)
    # Rows are never quantized: how many of them there are must not matter.
    return qmoe.patch(model.to(device, dtype), activations="bf16")


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy to change, with weights laid side by side as a patched model has them."""
    twin = copy.deepcopy(model)
    lay_side_by_side(twin)
    return twin


def prompts(*lengths: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids (rows, longest) and their mask, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), longest), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : longest - length] = 0
    return ids * mask, mask
