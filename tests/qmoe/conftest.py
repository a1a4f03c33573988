"""A tiny random Qwen3-MoE with a tokenizer of single bytes, in memory and as a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

# For models this small a second thread costs more than it brings, and far more on a busy machine.
torch.set_num_threads(1)

END_OF_TEXT = "<|endoftext|>"
TINY = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1 << 20,
    # Far from zero, so that greedy choices are no near ties that padding could flip.
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that most characters beyond ASCII are several tokens; no pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([END_OF_TEXT, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model() -> Qwen3MoeForCausalLM:
    """Session-wide: a test that changes it takes a copy."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY, eos_token_id=0)).eval()


@pytest.fixture(scope="session")
def checkpoint(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The same in bf16 on disk, in the Hub's per-expert layout, with held-out text."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    halved = Qwen3MoeForCausalLM(model.config).to(torch.bfloat16)
    halved.load_state_dict(model.state_dict())
    halved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "heldout.txt").write_text("Held out: naïve café, 東京. " * 100, encoding="utf-8")
    return folder
