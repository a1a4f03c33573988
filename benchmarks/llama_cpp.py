"""llama.cpp beside qmoe on a CPU: the same shape in a GGUF file of random weights.

It comes as a prebuilt library in npm's ``node-llama-cpp``, with code for each kind of processor,
and the file is written by the package ``gguf``: ``npm install --ignore-scripts node-llama-cpp``
and ``pip install gguf``.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.model import Shape

SCRIPT = Path(__file__).with_suffix(".mjs")
BLOCK = 32  # numbers of Q8_0 that share a scale of fp16


def write_gguf(file: Path, shape: Shape, dense: str) -> None:
    """Write a Qwen3-MoE with random weights, experts in Q8_0.

    Args:
        dense: what the other matrices are in, ``"Q8_0"`` or ``"BF16"``.
    """
    import gguf

    writer = gguf.GGUFWriter(str(file), "qwen3moe")
    _describe(writer, shape)
    rng = np.random.default_rng(0)

    def add(name: str, *sizes: int, kind: str) -> None:
        if kind == "Q8_0":
            blocks = np.empty((int(np.prod(sizes)) // BLOCK, 2 + BLOCK), np.uint8)
            blocks[:, :2] = np.frombuffer(np.float16(2.5e-4).tobytes(), np.uint8)
            blocks[:, 2:] = rng.integers(0, 256, (len(blocks), BLOCK), dtype=np.uint8)
            rows: Any = blocks.reshape(*sizes[:-1], -1)
        else:
            rows = rng.standard_normal(sizes, dtype=np.float32) * 0.02
            if kind == "BF16":
                rows = (rows.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kind])

    hidden, inner, experts = shape.hidden_size, shape.moe_intermediate_size, shape.num_experts
    queries, keys = (
        n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads)
    )
    add("token_embd.weight", shape.vocab_size, hidden, kind=dense)
    add("output.weight", shape.vocab_size, hidden, kind=dense)
    add("output_norm.weight", hidden, kind="F32")
    for layer in range(shape.num_hidden_layers):
        prefix = f"blk.{layer}."
        for name, size in (("attn_norm", hidden), ("ffn_norm", hidden)):
            add(f"{prefix}{name}.weight", size, kind="F32")
        for name in ("attn_q_norm", "attn_k_norm"):
            add(f"{prefix}{name}.weight", shape.head_dim, kind="F32")
        for name, size in (("attn_q", queries), ("attn_k", keys), ("attn_v", keys)):
            add(f"{prefix}{name}.weight", size, hidden, kind=dense)
        add(f"{prefix}attn_output.weight", hidden, queries, kind=dense)
        add(f"{prefix}ffn_gate_inp.weight", experts, hidden, kind="F32")
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            add(f"{prefix}{name}.weight", experts, inner, hidden, kind="Q8_0")
        add(f"{prefix}ffn_down_exps.weight", experts, hidden, inner, kind="Q8_0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, shape: Shape) -> None:
    """The shape, and a vocabulary that no text is made of: tokens are given by number."""
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(40960)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(3 * shape.hidden_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(shape.num_experts)
    writer.add_expert_used_count(shape.num_experts_per_tok)
    writer.add_expert_feed_forward_length(shape.moe_intermediate_size)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(shape.vocab_size)])
    writer.add_token_types([1] * shape.vocab_size)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(shape.vocab_size - 2)
    writer.add_eos_token_id(shape.vocab_size - 1)


def tokens_per_second(modules: Path, file: Path, threads: int, tokens: int) -> tuple[str, float]:
    """llama.cpp's release, and its best rate of decoding one text.

    Args:
        modules: the folder ``node_modules`` that has node-llama-cpp.
    """
    command = ["node", SCRIPT, modules, file, str(threads), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["release"], max(found["rates"])
