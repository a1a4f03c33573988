"""`select_experts` against the router modules of transformers."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from qmoe_kernels.router import RouterSpec, select_experts

NUM_EXPERTS, HIDDEN_SIZE = 16, 32


def softmax(config: Any) -> RouterSpec:
    return RouterSpec(config.num_experts_per_tok, normalize=config.norm_topk_prob)


def softmax_normalized(config: Any) -> RouterSpec:
    return RouterSpec(config.num_experts_per_tok)


def softmax_in_groups(config: Any) -> RouterSpec:
    return RouterSpec(
        config.num_experts_per_tok,
        normalize=False,
        scaling_factor=config.routed_scaling_factor,
        num_groups=config.n_group,
        topk_groups=config.topk_group,
        group_score="max",
    )


def sigmoid_in_groups(config: Any) -> RouterSpec:
    return RouterSpec(
        config.num_experts_per_tok,
        "sigmoid",
        normalize=config.norm_topk_prob,
        scaling_factor=config.routed_scaling_factor,
        num_groups=config.n_group,
        topk_groups=config.topk_group,
        group_score="top2",
    )


def sigmoid_normalized(config: Any) -> RouterSpec:
    return RouterSpec(config.num_experts_per_tok, "sigmoid")


GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
ROUTERS = [
    # model, router, config, changes of it, its spec
    ("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", {"norm_topk_prob": True}, softmax),
    ("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", {"norm_topk_prob": False}, softmax),
    ("qwen3_next", "Qwen3NextTopKRouter", "Qwen3NextConfig", {}, softmax),
    ("olmoe", "OlmoeTopKRouter", "OlmoeConfig", {"norm_topk_prob": False}, softmax),
    ("mixtral", "MixtralTopKRouter", "MixtralConfig", {}, softmax_normalized),
    ("gpt_oss", "GptOssTopKRouter", "GptOssConfig", {}, softmax_normalized),
    ("granitemoe", "GraniteMoeTopKRouter", "GraniteMoeConfig", {}, softmax_normalized),
    ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", "Ernie4_5_MoeConfig", {}, softmax_normalized),
    ("minimax_m2", "MiniMaxM2TopKRouter", "MiniMaxM2Config", {}, sigmoid_normalized),
    (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        "DeepseekV2Config",
        {**GROUPS, "topk_method": "group_limited_greedy"},
        softmax_in_groups,
    ),
    ("deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3Config", GROUPS, sigmoid_in_groups),
    (
        "glm4_moe",
        "Glm4MoeTopkRouter",
        "Glm4MoeConfig",
        {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        sigmoid_in_groups,
    ),
]


@pytest.mark.parametrize("model, router, config, changes, spec", ROUTERS)
def test_like_transformers(
    model: str, router: str, config: str, changes: dict[str, Any], spec: Any
) -> None:
    config_class = getattr(importlib.import_module(f"transformers.models.{model}"), config)
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    made = config_class(hidden_size=HIDDEN_SIZE, num_experts_per_tok=4, **changes)
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if hasattr(made, name):
            setattr(made, name, NUM_EXPERTS)
    made.num_experts_per_tok = 4  # some have a name of their own for it
    module: nn.Module = getattr(modeling, router)(made).float()
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.normal_(0, 0.3)
    bias = next((t for n, t in module.state_dict().items() if "correction_bias" in n), None)
    arguments = ()
    if model == "minimax_m2":  # whose block holds the bias
        bias = 0.3 * torch.randn(NUM_EXPERTS)
        arguments = (bias,)
    biased = ("ernie4_5_moe", "minimax_m2", "deepseek_v3", "glm4_moe")
    assert (bias is not None) == (model in biased)

    with torch.no_grad():
        logits, weights, ids = module(torch.randn(50, HIDDEN_SIZE), *arguments)
    if logits.dtype == torch.int64:  # Granite before transformers 5.23 returns ids first
        logits, ids = ids, logits
    ours, our_weights = select_experts(logits, spec(made), None if bias is None else bias.flatten())
    # Some choose without an order.
    order, our_order = ids.argsort(-1), ours.argsort(-1)
    assert torch.equal(ours.gather(1, our_order), ids.gather(1, order))
    torch.testing.assert_close(
        our_weights.gather(1, our_order), weights.gather(1, order), rtol=1e-5, atol=1e-7
    )
