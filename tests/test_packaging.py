"""The folder ``kernels/`` must never be taken for the PyPI package of that name."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Leaves the interpreter as it would be if the package had never been installed: only what stands in
# the working directory answers to the name.
WITHOUT_KERNELS = """
import importlib.machinery, importlib.metadata, sys

class OnlyHere:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "kernels":
            return importlib.machinery.PathFinder.find_spec(name, ["."])
        return None

sys.meta_path.insert(0, OnlyHere)
version = importlib.metadata.version

def without(name):
    if name == "kernels":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = without
"""

BUILD = """
import os, sys
sys.path.insert(0, os.getcwd())
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
config = Qwen3MoeConfig(
    vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16,
)
import torch
assert Qwen3MoeForCausalLM(config)(torch.arange(4)[None]).logits.isfinite().all()
import importlib.util
print("installed package:", importlib.util.find_spec("kernels").origin is not None)
"""


@pytest.mark.parametrize("installed", [True, False], ids=["with kernels", "without kernels"])
def test_transformers_builds_a_model_from_the_repository_root(installed) -> None:
    if installed and importlib.util.find_spec("kernels.layer") is None:
        pytest.skip("the PyPI package kernels is not installed here")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ("" if installed else WITHOUT_KERNELS) + BUILD],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"installed package: {installed}"


@pytest.mark.parametrize("folder", ["kernels", "convert"])
def test_the_folder_is_no_package(folder) -> None:
    """An ``__init__.py`` would make it importable, and transformers probes for ``kernels``."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize(
    "module",
    [
        "qmoe.generation",
        "qmoe.loading.load",
        "qmoe.paging.model",
        "qmoe.progress",
        "qmoe.loading.patch",
        "qmoe.loading.config",
    ],
)
def test_examples_in_docstrings_run(module, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    results = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0 and results.failed == 0
