"""Train a small Qwen3-MoE language model on the Python standard library's own sources.

The result is a real, if tiny, checkpoint: a router that has learned, a tokenizer of its own, and a
measured perplexity on held-out text. It needs no network: every Python carries its standard
library. A few minutes on one GPU train it well; on a CPU the script runs too, for `--steps` few.

    python3 examples/train_tiny_moe.py --out examples/tiny-moe

The folder holds eight files: config.json, generation_config.json, model.safetensors (bf16, one
tensor per expert and projection, as on the Hub), tokenizer.json, tokenizer_config.json, README.md
(the model card), metrics.json and heldout.txt (the text that the perplexity was measured on).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

MAX_BYTES = 8_000_000
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"

# Tests, tables that encode data rather than show Python, and lib2to3, which repeats other modules.
EXCLUDED_NAMES = {
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "entities.py",
    "msilib",
    "lib2to3",
}
# Shares of the files, chosen by a hash of each file's path.
HELDOUT_SHARE = 0.06
VALIDATION_SHARE = 0.03
HELDOUT_MAX_BYTES = 256_000
HELDOUT_MAX_BYTES_PER_FILE = 32_000

SAMPLE_PROMPTS = [
    "class Counter(dict):\n",
    "def read_file(path, encoding=None):\n",
    "import os\nimport sys\n",
]


class UsageError(ValueError):
    """Something that the caller can put right; `main` prints it in one line."""


# ---------------------------------------------------------------------------------------- sources


@dataclass
class Split:
    """Source files of one part of the data, and their text joined by the end-of-text token."""

    texts: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.texts)

    @property
    def joined(self) -> str:
        return "".join(text + END_OF_TEXT for text in self.texts)

    def describe(self) -> dict[str, int]:
        return {"files": len(self.texts), "bytes": self.num_bytes}


def find_sources(root: Path) -> list[Path]:
    """Return the standard library's Python files under `root`, in the order of their paths."""
    return sorted(
        (
            path
            for path in root.rglob("*.py")
            # Everything else that lies there (site-packages, build settings) is not the library.
            if path.relative_to(root).parts[0].removesuffix(".py") in sys.stdlib_module_names
            and not EXCLUDED_NAMES.intersection(path.relative_to(root).parts)
        ),
        key=lambda path: path.relative_to(root).as_posix(),
    )


def split_sources(root: Path) -> dict[str, Split]:
    """Read the sources under `root` and split them into train, validation and heldout.

    A file's part depends on nothing but its path relative to `root`, so that a file is in the same
    part whichever Python trains.

    Raises:
        UsageError: `root` has no sources, or too few for each part to have some.
    """
    parts = {"train": Split(), "validation": Split(), "heldout": Split()}
    for path in find_sources(root):
        relative = path.relative_to(root).as_posix()
        try:
            text = path.read_text(encoding="utf-8")  # also turns \r\n into \n
        except UnicodeDecodeError:
            continue
        if not text.strip() or END_OF_TEXT in text:
            continue
        digest = hashlib.sha256(relative.encode()).digest()
        position = int.from_bytes(digest[:4], "big") / 2**32
        if position < HELDOUT_SHARE:
            part = "heldout"
        elif position < HELDOUT_SHARE + VALIDATION_SHARE:
            part = "validation"
        else:
            part = "train"
        parts[part].texts.append(text)
        parts[part].paths.append(relative)
    for name, part in parts.items():
        if not part.texts:
            raise UsageError(
                f"no Python sources for the {name} part under {root}: this Python seems to be "
                "installed without its standard library's .py files; name a folder that has them "
                "with --sources"
            )
    return parts


def heldout_excerpt(heldout: Split) -> Split:
    """Return the fixed text for perplexity: the head of each held-out file, up to a total size."""
    excerpt = Split()
    for path, text in zip(heldout.paths, heldout.texts, strict=True):
        # Cut at a line, so that no token is cut.
        head = text.encode()[:HELDOUT_MAX_BYTES_PER_FILE].decode(errors="ignore")
        if len(head) < len(text):
            head = head[: head.rfind("\n") + 1]
        if excerpt.num_bytes + len(head.encode()) <= HELDOUT_MAX_BYTES:
            excerpt.texts.append(head)
            excerpt.paths.append(path)
    return excerpt


# -------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text encodes, and decodes to exactly itself."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, split: Split) -> Tensor:
    """Return the token ids of a split's files, each closed by the end-of-text token: (n,) int64."""
    encodings = tokenizer.backend_tokenizer.encode_batch(split.texts, add_special_tokens=False)
    ids: list[int] = []
    for encoding in encodings:
        ids += [*encoding.ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


# ------------------------------------------------------------------------------------------ model


def dense_experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run every expert on every token, and weigh those that were not routed to with zero.

    The same function as the sparse forward, and its gradient. At this size two large matrix
    products beat gathering: fixed shapes, no host sync, and autocast sees plain linear layers.

    Args:
        module: The experts: `gate_up_proj` (num_experts, 2 * intermediate_size, hidden_size) and
            `down_proj` (num_experts, hidden_size, intermediate_size).
        hidden_states: (num_tokens, hidden_size).
        top_k_index: (num_tokens, top_k) int64.
        top_k_weights: (num_tokens, top_k).

    Returns:
        (num_tokens, hidden_size), of the dtype of `hidden_states`.
    """
    num_experts, hidden_size, intermediate_size = module.down_proj.shape
    num_tokens = hidden_states.shape[0]
    weights = torch.zeros(
        num_tokens, num_experts, dtype=top_k_weights.dtype, device=top_k_weights.device
    ).scatter(1, top_k_index, top_k_weights)
    gate_up = F.linear(hidden_states, module.gate_up_proj.flatten(0, 1))
    gate, up = gate_up.view(num_tokens, num_experts, -1).chunk(2, dim=-1)
    activated = module.act_fn(gate) * up * weights.unsqueeze(-1)
    # Summing over experts and their intermediate channels at once is one matrix product.
    down_proj = module.down_proj.transpose(0, 1).reshape(hidden_size, -1)
    output = F.linear(activated.view(num_tokens, num_experts * intermediate_size), down_proj)
    return output.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts_forward)


def build_model(args: argparse.Namespace, eos_token_id: int, pad_token_id: int) -> PreTrainedModel:
    """Build the untrained model in fp32, on the CPU.

    Raises:
        UsageError: the checkpoint would be larger than 8 MB in bf16.
    """
    config = Qwen3MoeConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_kv_heads,
        head_dim=args.head_dim,
        # Used by dense layers alone, of which there are none.
        intermediate_size=args.num_experts * args.intermediate_size,
        moe_intermediate_size=args.intermediate_size,
        num_experts=args.num_experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        tie_word_embeddings=True,
        max_position_embeddings=args.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        router_aux_loss_coef=args.balance_loss,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    # Attention dropout stays zero: what regularizes here is no part of the saved model.
    config._experts_implementation = "dense"
    model = Qwen3MoeForCausalLM(config)
    num_tensors = args.num_layers * (3 * args.num_experts + 9) + 2
    num_bytes = (
        2 * model.num_parameters() + 200 * num_tensors
    )  # safetensors' header: names, offsets
    if num_bytes > MAX_BYTES:
        raise UsageError(
            f"{model.num_parameters():,} parameters are about {num_bytes / 1e6:.2f} MB in bf16, "
            f"over the {MAX_BYTES / 1e6:.0f} MB that this model may take: use a smaller "
            "--hidden-size, --intermediate-size, --num-layers or --vocab-size"
        )
    return model


def add_dropout(model: PreTrainedModel, rate: float) -> list[Any]:
    """Drop out embeddings and what each block adds to the residual stream; return the hooks."""

    def drop(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return F.dropout(output, rate, module.training)

    modules = [model.model.embed_tokens]
    for layer in model.model.layers:
        modules += [layer.self_attn.o_proj, layer.mlp]
    return [module.register_forward_hook(drop) for module in modules]


# --------------------------------------------------------------------------------------- training


def windows_of(ids: Tensor, context: int) -> Tensor:
    """Cut (n,) ids into consecutive windows without overlap: (n // context, context)."""
    num_windows = len(ids) // context
    return ids[: num_windows * context].view(num_windows, context)


def batches(ids: Tensor, context: int, batch_size: int, generator: torch.Generator) -> Iterator:
    """Yield (batch_size, context) ids without end: each epoch cuts the text at another offset."""
    while True:
        offset = int(torch.randint(context, (1,), generator=generator))
        windows = windows_of(ids[offset:], context)
        order = torch.randperm(len(windows), generator=generator).to(ids.device)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield windows[order[start : start + batch_size]]


def next_token_loss(logits: Tensor, ids: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of each window's tokens but the first, given those before it."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction=reduction
    )


def routing_losses(router_logits: tuple[Tensor, ...], top_k: int) -> tuple[Tensor, Tensor]:
    """Return the load-balancing loss and the z-loss, each averaged over the layers.

    The first is num_experts * sum_e(f_e * p_e), where f_e is the share of routed slots that expert
    e got and p_e its mean probability (Switch Transformer, equation 4): 1 when both are uniform.
    The second is the mean squared logsumexp of the logits (ST-MoE, equation 5).
    """
    balance, z = [], []
    for logits in router_logits:
        num_experts = logits.shape[-1]
        logits = logits.float().view(-1, num_experts)
        probabilities = logits.softmax(-1)
        chosen = probabilities.topk(top_k, dim=-1).indices
        share = F.one_hot(chosen, num_experts).float().mean((0, 1))
        balance.append(num_experts * (share * probabilities.mean(0)).sum())
        z.append(logits.logsumexp(-1).square().mean())
    return torch.stack(balance).mean(), torch.stack(z).mean()


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def mean_loss(model: PreTrainedModel, windows: Tensor, batch_size: int = 16) -> float:
    """Return the mean next-token loss in nats over (num_windows, context) ids."""
    model.eval()
    total = 0.0
    for batch in windows.split(batch_size):
        logits = model(input_ids=batch, use_cache=False).logits
        total += next_token_loss(logits, batch, "sum").item()
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def train(
    model: PreTrainedModel,
    train_ids: Tensor,
    validation_windows: Tensor,
    args: argparse.Namespace,
    deadline: float,
) -> dict[str, Any]:
    """Train in place and leave `model` with the weights that validated best.

    fp32 weights, bf16 autocast on the GPU, AdamW, linear warm-up, cosine decay to zero at the last
    step or at `deadline` (of `time.monotonic()`), whichever comes first.

    Returns:
        What was done: steps, tokens, seconds, the best validation loss, and the curve.
    """
    device = train_ids.device
    tokens_per_step = args.batch_size * args.context
    steps = args.steps or math.ceil(args.epochs * len(train_ids) / tokens_per_step)
    warmup = max(1, min(args.warmup, steps // 10))
    if len(windows_of(train_ids, args.context)) <= args.batch_size:
        raise UsageError(
            f"{len(train_ids):,} training tokens do not fill a batch of {args.batch_size} windows "
            f"of {args.context}: use a smaller --batch-size or --context"
        )

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
        fused=device.type == "cuda",
    )
    data = batches(
        train_ids, args.context, args.batch_size, torch.Generator().manual_seed(args.seed)
    )
    hooks = add_dropout(model, args.dropout)

    start = last_line = time.monotonic()
    last_step, step, progress, next_evaluation = 0, 0, 0.0, 1 / args.evaluations
    best_loss, best_state, best_step = math.inf, None, 0
    loss = balance = torch.tensor(math.nan)
    curve: list[dict[str, float]] = []
    while True:
        finished = progress >= 1.0
        if finished or progress >= next_evaluation:
            with autocast(device):
                validation_loss = mean_loss(model, validation_windows)
            if not math.isfinite(validation_loss):
                raise UsageError(
                    f"training diverged at step {step}: validation loss {validation_loss}; use a "
                    "smaller --learning-rate"
                )
            curve.append(
                {
                    "step": step,
                    "tokens": step * tokens_per_step,
                    "seconds": round(time.monotonic() - start, 1),
                    "train_loss": round(loss.item(), 4),
                    "validation_loss": round(validation_loss, 4),
                    "balance_loss": round(balance.item(), 4),
                }
            )
            print(f"  validation  step {step}  loss {validation_loss:.4f}", flush=True)
            if validation_loss < best_loss:
                best_loss, best_step = validation_loss, step
                best_state = {name: t.clone() for name, t in model.state_dict().items()}
            next_evaluation = progress + 1 / args.evaluations
        if finished:
            break

        model.train()
        rate = args.learning_rate * min(
            (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(data)
        with autocast(device):
            output = model.model(input_ids=batch, use_cache=False, output_router_logits=True)
            logits = model.lm_head(output.last_hidden_state)
        loss = next_token_loss(logits, batch)
        balance, z = routing_losses(output.router_logits, args.top_k)
        (loss + args.balance_loss * balance + args.z_loss * z).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        now = time.monotonic()
        progress = max(
            step / steps, (now - start) / (deadline - start) if deadline > start else 1.0
        )
        if now - last_line >= args.log_seconds:
            current = loss.item()  # waits for the GPU, so the rate below is the true one
            now = time.monotonic()
            speed = (step - last_step) * tokens_per_step / (now - last_line)
            left = (now - start) * (1 - progress) / progress
            print(
                f"step {step}/{steps}  epoch {step * tokens_per_step / len(train_ids):.1f}  "
                f"loss {current:.3f}  balance {balance.item():.3f}  lr {rate:.1e}  "
                f"{speed / 1e3:,.0f}k tokens/s  {max(left, 0):.0f} s left",
                flush=True,
            )
            last_line, last_step = now, step

    for hook in hooks:
        hook.remove()
    model.load_state_dict(best_state)
    model.eval()
    return {
        "steps": step,
        "planned_steps": steps,
        "tokens": step * tokens_per_step,
        "epochs": round(step * tokens_per_step / len(train_ids), 2),
        "seconds": round(time.monotonic() - start, 1),
        "best_step": best_step,
        "best_validation_loss": round(best_loss, 4),
        "best_validation_perplexity": round(math.exp(best_loss), 4),
        "curve": curve,
    }


# ------------------------------------------------------------------------------------- evaluation


def measure_perplexity(
    folder: Path, tokenizer: PreTrainedTokenizerFast, text: str, context: int, device: torch.device
) -> dict[str, Any]:
    """Measure the saved checkpoint's perplexity on `text`, with 16-bit and with fp32 arithmetic.

    The text is tokenized whole and cut into consecutive windows of `context` tokens without
    overlap; a last window that is not full is dropped. Each window is read on its own, and each of
    its tokens but the first is predicted. Perplexity is exp of the mean loss over those.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = windows_of(ids, context).to(device)
    if not len(windows):
        raise UsageError(
            f"the held-out text has {len(ids)} tokens, fewer than one window of {context}"
        )
    result: dict[str, Any] = {
        "file": "heldout.txt",
        "bytes": len(text.encode()),
        "tokens": len(ids),
        "windows": len(windows),
        "window_tokens": context,
        "predicted_tokens": len(windows) * (context - 1),
        "windowing": "consecutive, no overlap, last partial window dropped, first token not scored",
    }
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, experts_implementation="eager"
        ).to(device)
        loss = mean_loss(model, windows)
        result[f"perplexity_{name}"] = round(math.exp(loss), 4)
    # Of the float32 run, which is last; per byte, since that compares across tokenizers.
    result["bits_per_byte"] = round(loss / math.log(2) * len(ids) / len(text.encode()), 4)
    return result


@torch.no_grad()
def measure_routing(model: PreTrainedModel, windows: Tensor) -> list[dict[str, Any]]:
    """Describe what each layer's router does on (num_windows, context) ids.

    For each layer:
        usage: each expert's share of the routed slots; they sum to 1.
        usage_entropy: its entropy over log(num_experts): 1 when all are used alike.
        token_entropy: mean entropy of the router's probabilities, over log(num_experts).
        top1_weight: mean weight of the first expert among the chosen.
        reuse: share of a token's experts that the token before it was routed to as well.
        reuse_by_chance: the same if tokens were independent and the usage as it is.
    """
    top_k, num_experts = model.config.num_experts_per_tok, model.config.num_experts
    model.eval()
    per_layer: list[list[Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]
    for batch in windows.split(16):
        output = model.model(input_ids=batch, use_cache=False, output_router_logits=True)
        for layer, logits in enumerate(output.router_logits):
            per_layer[layer].append(logits.float().view(*batch.shape, num_experts))
    result = []
    for layer, logits_list in enumerate(per_layer):
        probabilities = torch.cat(logits_list).softmax(-1)  # (num_windows, context, num_experts)
        weights, chosen = probabilities.topk(top_k, dim=-1)
        usage = chosen.flatten().bincount(minlength=num_experts).double()
        usage /= usage.sum()
        reuse = (chosen[:, 1:, :, None] == chosen[:, :-1, None, :]).any(-1).double().mean()
        result.append(
            {
                "layer": layer,
                "usage": [round(share, 4) for share in usage.tolist()],
                "usage_entropy": round(
                    torch.special.entr(usage).sum().item() / math.log(num_experts), 4
                ),
                "token_entropy": round(
                    torch.special.entr(probabilities).sum(-1).mean().item() / math.log(num_experts),
                    4,
                ),
                "top1_weight": round((weights[..., 0] / weights.sum(-1)).mean().item(), 4),
                "reuse": round(reuse.item(), 4),
                "reuse_by_chance": round(top_k * usage.square().sum().item(), 4),
            }
        )
    return result


def write_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int
) -> list[dict[str, str]]:
    """Continue each prompt by 128 tokens, sampled at temperature 0.7 from the top 0.95."""
    samples = []
    for prompt in SAMPLE_PROMPTS:
        torch.manual_seed(seed)
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        output = model.generate(
            **inputs, max_new_tokens=128, do_sample=True, temperature=0.7, top_p=0.95, top_k=0
        )
        text = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        samples.append({"prompt": prompt, "continuation": text})
    return samples


# ------------------------------------------------------------------------------------- model card


def model_card(metrics: dict[str, Any]) -> str:
    """Return README.md: what the model is, how it was trained, and what was measured."""
    model, data = metrics["model"], metrics["data"]
    training, heldout = metrics["training"], metrics["heldout"]
    settings, environment = metrics["settings"], metrics["environment"]
    routing = "\n".join(
        f"| {layer['layer']} | {min(layer['usage']):.1%} to {max(layer['usage']):.1%} "
        f"| {layer['usage_entropy']:.3f} | {layer['token_entropy']:.3f} "
        f"| {layer['reuse']:.1%} | {layer['reuse_by_chance']:.1%} |"
        for layer in metrics["routing"]
    )
    samples = "\n".join(
        f"```python\n{sample['prompt']}{sample['continuation'].rstrip()}\n```\n"
        for sample in metrics["samples"]
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [moe, qwen3_moe, code]
---

# tiny-moe

A Mixture-of-Experts language model of {model["parameters"] / 1e6:.2f} million parameters
({model["active_parameters"] / 1e6:.2f} million active per token) that writes something like Python.
It exists to show and test quantized inference on a real checkpoint: its router has learned, which
random weights' has not. It is far too small to be of use as a programmer.

| | |
| --- | --- |
| architecture | Qwen3-MoE: {settings["num_layers"]} layers of {settings["hidden_size"]} channels, \
{settings["num_experts"]} experts of {settings["intermediate_size"]}, top-{settings["top_k"]} |
| attention | {settings["num_heads"]} heads of {settings["head_dim"]}, \
{settings["num_kv_heads"]} for keys and values; {settings["context"]} tokens of context |
| tokenizer | byte-level BPE, {settings["vocab_size"]} tokens, trained on the same sources, \
{data["bytes_per_token"]:.2f} bytes per token |
| size | {model["bytes"] / 1e6:.2f} MB in bf16, \
of which {model["expert_bytes"] / 1e6:.2f} MB experts |
| **perplexity on `heldout.txt`** | **{heldout["perplexity_bfloat16"]:.3f}** in bf16, \
{heldout["perplexity_float32"]:.3f} with the same weights computed in fp32 |
| bits per byte | {heldout["bits_per_byte"]:.3f} (fp32) |

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("examples/tiny-moe")
model = AutoModelForCausalLM.from_pretrained("examples/tiny-moe", dtype="auto")
inputs = tokenizer("def read_file(path):\\n", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.7, top_p=0.95)
print(tokenizer.decode(output[0]))
```

## Training

`examples/train_tiny_moe.py` trained it on the standard library of Python
{environment["python"]}: {data["train"]["files"]} files, {data["train"]["bytes"] / 1e6:.2f} MB,
{data["train_tokens"] / 1e6:.2f} million tokens. Left out: tests, data tables (`encodings`,
`pydoc_data`, `html.entities`) and `lib2to3`. {data["validation"]["files"]} files served to choose
the best step, and {data["heldout"]["files"]} files were held out altogether; a hash of its path
decides where a file belongs.

{training["steps"]} steps of {settings["batch_size"]} windows of {settings["context"]} tokens
({training["tokens"] / 1e6:.0f} million tokens, {training["epochs"]:.0f} epochs) with AdamW:
learning rate {settings["learning_rate"]}, weight decay {settings["weight_decay"]}, dropout
{settings["dropout"]}, load-balancing loss weighted {settings["balance_loss"]}, seed
{settings["seed"]}; {training["seconds"]:.0f} seconds on {environment["device"]} (torch
{environment["torch"]}, transformers {environment["transformers"]}). The weights are those of step
{training["best_step"]}, where the validation perplexity was lowest:
{training["best_validation_perplexity"]:.3f}.

`metrics.json` has every setting, the training curve, and all that is shown here.

## How the perplexity was measured

On `heldout.txt`, tokenized whole and cut into {heldout["windows"]} consecutive windows of
{heldout["window_tokens"]} tokens without overlap (a last partial window is dropped). Each window is
read on its own, and every token of it but the first is predicted: {heldout["predicted_tokens"]}
predictions. Perplexity is exp of their mean cross-entropy. The checkpoint was loaded from disk.

## What the router learned

On `heldout.txt`, for each layer: the least and most used expert's share of the routed slots; the
entropy of the usage and the mean entropy of a token's routing probabilities, both as a fraction of
log({settings["num_experts"]}); and how many of a token's experts the token before it used too,
beside what chance would give.

| layer | usage | usage entropy | token entropy | reuse | by chance |
| --- | --- | --- | --- | --- | --- |
{routing}

## Samples

Temperature 0.7, top-p 0.95, the first seed tried:

{samples}
## Licences

The weights and the tokenizer: Apache-2.0, as this repository. `heldout.txt` consists of excerpts
from the standard library of Python {environment["python"]}, under the
[PSF License Version 2](../LICENSE-PSF.txt) (some files carry notices of their own), joined by
`{END_OF_TEXT}` and unchanged otherwise:
{", ".join(f"`{path}`" for path in data["heldout_paths"])}.

{sys.copyright.splitlines()[0]} All Rights Reserved.
"""


# ------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--sources",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="the standard library's folder",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)

    schedule = parser.add_argument_group("schedule")
    schedule.add_argument("--epochs", type=float, default=45.0, help="passes over the text")
    schedule.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    schedule.add_argument(
        "--minutes", type=float, default=6.0, help="end the schedule by then in any case"
    )
    schedule.add_argument("--batch-size", type=int, default=32, help="windows per step")
    schedule.add_argument("--learning-rate", type=float, default=2e-3)
    schedule.add_argument("--warmup", type=int, default=200, help="steps")
    schedule.add_argument("--weight-decay", type=float, default=0.1)
    schedule.add_argument("--dropout", type=float, default=0.25)
    schedule.add_argument("--balance-loss", type=float, default=0.01, help="its weight")
    schedule.add_argument("--z-loss", type=float, default=1e-3, help="its weight")
    schedule.add_argument("--evaluations", type=int, default=25, help="on the validation files")
    schedule.add_argument("--log-seconds", type=float, default=10.0)

    shape = parser.add_argument_group("shape")
    shape.add_argument("--vocab-size", type=int, default=2048)
    shape.add_argument("--hidden-size", type=int, default=192)
    shape.add_argument("--num-layers", type=int, default=6)
    shape.add_argument("--num-heads", type=int, default=4)
    shape.add_argument("--num-kv-heads", type=int, default=2)
    shape.add_argument("--head-dim", type=int, default=48)
    shape.add_argument("--num-experts", type=int, default=16)
    shape.add_argument("--top-k", type=int, default=2)
    shape.add_argument("--intermediate-size", type=int, default=48, help="of one expert")
    shape.add_argument("--context", type=int, default=1024, help="tokens")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, save, measure what was saved; return the metrics. The folder is complete or absent."""
    start = time.monotonic()
    deadline = start + 60 * args.minutes
    if args.out.exists():
        raise UsageError(f"{args.out} exists: remove it, or name another folder with --out")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no GPU: use --device cpu with few --steps")
    torch.manual_seed(args.seed)

    splits = split_sources(args.sources)
    for name, split in splits.items():
        print(f"{name}: {len(split.texts)} files, {split.num_bytes:,} bytes", flush=True)
    tokenizer = train_tokenizer(splits["train"].texts, args.vocab_size, args.context)
    if len(tokenizer) != args.vocab_size:
        raise UsageError(
            f"the sources give a vocabulary of {len(tokenizer)}, not {args.vocab_size}: use "
            f"--vocab-size {len(tokenizer)} or less, and at least 258"
        )
    model = build_model(args, tokenizer.eos_token_id, tokenizer.pad_token_id).to(device)
    train_ids = encode(tokenizer, splits["train"]).to(device)
    validation_ids = encode(tokenizer, splits["validation"])
    validation_windows = windows_of(validation_ids, args.context)
    if not len(validation_windows):
        raise UsageError(f"the validation files do not fill one window of {args.context} tokens")
    bytes_per_token = splits["train"].num_bytes / len(train_ids)
    expert_parameters = sum(
        p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name
    )
    idle_parameters = expert_parameters * (1 - args.top_k / args.num_experts)
    print(
        f"{len(train_ids):,} training tokens, {bytes_per_token:.2f} bytes per token; "
        f"{model.num_parameters():,} parameters, {expert_parameters:,} of them experts; "
        f"{time.monotonic() - start:.0f} s so far",
        flush=True,
    )

    training = train(model, train_ids, validation_windows.to(device), args, deadline)
    training["best_validation_bits_per_byte"] = round(
        training["best_validation_loss"]
        / math.log(2)
        * len(validation_ids)
        / splits["validation"].num_bytes,
        4,
    )

    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    excerpt = heldout_excerpt(splits["heldout"])
    text = excerpt.joined
    (partial / "heldout.txt").write_text(text, encoding="utf-8", newline="\n")
    model_bytes = (partial / "model.safetensors").stat().st_size
    if model_bytes > MAX_BYTES:
        raise UsageError(
            f"{partial}/model.safetensors has {model_bytes:,} bytes, over {MAX_BYTES:,}"
        )

    # From here on, what was saved: the model and tokenizer that somebody else will load.
    tokenizer = AutoTokenizer.from_pretrained(partial)
    heldout = measure_perplexity(partial, tokenizer, text, args.context, device)
    model = AutoModelForCausalLM.from_pretrained(
        partial, dtype=torch.float32, experts_implementation="eager"
    ).to(device)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = windows_of(ids, args.context).to(device)
    is_cuda = device.type == "cuda"
    metrics = {
        "model": {
            "parameters": model.num_parameters(),
            "active_parameters": round(model.num_parameters() - idle_parameters),
            "bytes": model_bytes,
            "expert_bytes": 2 * expert_parameters,
        },
        "heldout": heldout,
        "routing": measure_routing(model, windows),
        "data": {
            **{name: split.describe() for name, split in splits.items()},
            "train_tokens": len(train_ids),
            "bytes_per_token": round(bytes_per_token, 4),
            "heldout_paths": excerpt.paths,
        },
        "settings": {
            name: value for name, value in vars(args).items() if name not in ("out", "sources")
        },
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "device": torch.cuda.get_device_name(device) if is_cuda else "CPU",
        },
        "samples": write_samples(model, tokenizer, args.seed),
        "training": training,
        "total_seconds": round(time.monotonic() - start, 1),
    }
    (partial / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(model_card(metrics), encoding="utf-8")
    partial.rename(args.out)
    return metrics


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        metrics = run(args)
    except UsageError as error:
        sys.exit(f"train_tiny_moe.py: {error}")
    for sample in metrics["samples"]:
        print(f"----\n{sample['prompt']}{sample['continuation']}")
    print("----")
    for layer in metrics["routing"]:
        print(
            f"layer {layer['layer']}: usage {min(layer['usage']):.3f} to "
            f"{max(layer['usage']):.3f}, token entropy {layer['token_entropy']:.3f}, "
            f"reuse {layer['reuse']:.3f} (by chance {layer['reuse_by_chance']:.3f})"
        )
    heldout, training = metrics["heldout"], metrics["training"]
    print(
        f"{args.out}: {metrics['model']['bytes']:,} bytes, held-out perplexity "
        f"{heldout['perplexity_bfloat16']} (bf16) {heldout['perplexity_float32']} (fp32), "
        f"{heldout['bits_per_byte']} bits per byte; validation perplexity "
        f"{training['best_validation_perplexity']}, "
        f"{training['best_validation_bits_per_byte']} bits per byte at step "
        f"{training['best_step']} of {training['steps']} "
        f"({training['epochs']} epochs); {metrics['total_seconds']} s in all"
    )


if __name__ == "__main__":
    main()
