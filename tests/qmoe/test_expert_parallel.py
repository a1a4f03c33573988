"""Experts spread over ranks: processes with gloo on the CPU, compared with one process."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import pytest
import ranks
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import qmoe
from qmoe.experts.quantized import QuantizedExperts, quantized_modules
from qmoe.loading import shares
from qmoe.paging.host_store import HostStore
from qmoe.parallel.share import ranges
from qmoe_convert.convert import convert

# Stored expert by expert, and fused with biases; with dense layers; with shared experts. The number
# of experts is 32, 4, 4, 8 and 8: three ranks divide none of them.
NAMES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"]
TOKENS = torch.arange(1, 19).view(2, 9)
PROMPTS = ["def close(self):", "import os"]
LENGTH = 12


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A converted checkpoint of each family, in fp32, INT8."""
    folder = tmp_path_factory.mktemp("spread")
    found = {}
    for name in NAMES:
        model = qmoe.unpatch(families.build(name))
        model.save_pretrained(folder / name / "source")
        convert(folder / name / "source", folder / name / "int8", weights="int8")
        found[name] = folder / name / "int8"
    return found


def load(path: Path, **options: Any) -> Any:
    return qmoe.load(path, device="cpu", **options)


def spread(path: Path, **options: Any) -> Any:
    return load(path, expert_parallel=True, **options)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


def generate(model: Any, tokenizer: Any, **options: Any) -> list[list[int]]:
    """Tokens of a text, as the texts are of a tokenizer of bytes."""
    tokens: dict[int, list[int]] = {}

    def note(index: int, so_far: Any) -> bool:
        tokens[index] = list(so_far)
        return False

    options = {"max_new_tokens": LENGTH, "until": note, **options}
    result = qmoe.generate(model, tokenizer, options.pop("prompts", PROMPTS), **options)
    return [tokens[i] for i in sorted(tokens)] if options["until"] is note else result.new_tokens


def outputs(path: Path, tokenizer: Any, **options: Any) -> tuple[Any, ...]:
    model = load(path, **options)
    held = [experts.layout.num_experts for experts in quantized_modules(model).values()]
    return (
        held,
        logits(model),
        generate(model, tokenizer),
        generate(model, tokenizer, do_sample=True, temperature=1.5, seed=3),
    )


def outputs_of_all(rank: int, paths: dict[str, Path], tokenizer: Any) -> dict[str, Any]:
    return {name: outputs(path, tokenizer, expert_parallel=True) for name, path in paths.items()}


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, Path], tokenizer: Any) -> dict[str, Any]:
    """What one process computes with all experts."""
    return {name: outputs(path, tokenizer) for name, path in checkpoints.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_whole_models_compute_what_one_process_does(size, checkpoints, tokenizer, alone) -> None:
    results = ranks.run(size, outputs_of_all, checkpoints, tokenizer)
    for name, (whole, expected, greedy, sampled) in alone.items():
        for rank, result in enumerate(results):
            held, actual, its_greedy, its_sampled = result[name]
            assert held == [ranges(n, size)[rank][1] for n in whole], name
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            assert (its_greedy, its_sampled) == (greedy, sampled), name
            assert torch.equal(actual, results[0][name][1]), "the ranks differ in bits"
