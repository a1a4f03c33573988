"""LoRA on attention and experts: 8-bit experts beside PEFT's own on 16-bit ones.

``python -m benchmarks.lora`` (``make bench-lora``) has two sections:

- ``shipped``, on a CPU: the same LoRA on the model that ships, in 16 bit (computed in fp32), INT8
  and FP8, from the same start on the same text, this repository's documentation. The last tenth of
  it is never learned; its loss is what is compared.
- ``qwen3``, on a GPU: steps of AdamW on Qwen3-30B-A3B's shape with random weights, one text of 2048
  tokens, layers checkpointed: tokens per second, and the most memory that a step takes. With
  ``--loss pieces`` both take the loss a few tokens at a time, as docs/training.md shows it:
  transformers' own has all logits in fp32 three times over.

PEFT keeps factors in fp32 if nothing else is said; ``factors`` says what they were. Results go to
``benchmarks/results/lora.json``.
"""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer

import qmoe
from benchmarks.model import QWEN3_30B_A3B, TINY, Shape, build_model, synchronize
from benchmarks.options import check_sections, parser_of
from benchmarks.record import Results, facts, run_sections
from qmoe.experts.quantized import quantized_modules

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "lora.json"
SHIPPED = ROOT / "examples" / "tiny-moe"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MOST_DIFFERENT = 0.01  # of losses, relative
MOST_BYTES = 40e9  # of a step on Qwen3-30B-A3B's shape
WINDOW = 256  # tokens of a text of the shipped model
TOKENS = 2048  # of the large one's
RANK = 16


def adapt(model: Any, rank: int, **options: Any) -> Any:
    """Put a LoRA onto attention and experts, the same each time."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=ATTENTION,
        target_parameters=EXPERTS,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config, **options)


def optimizer_of(model: Any, rate: float) -> torch.optim.Optimizer:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(learning, lr=rate, fused=learning[0].is_cuda)


# ---- the model that ships ----------------------------------------------------------------------


def run_shipped(results: Results, tiny: bool) -> None:
    """Losses by format; 16 bit first, which the others are compared with."""
    steps, batch = (6, 2) if tiny else (200, 8)
    learned, kept = _windows()
    if tiny:
        kept = kept[:4]
    results.set(steps=steps, batch=batch, window=WINDOW, rank=8, held_out_windows=len(kept))
    expected: float | None = None
    for weights in (None, "int8", "fp8"):
        model = adapt(qmoe.load(SHIPPED, device="cpu", dtype="float32", weights=weights), 8)
        before = _loss(model.eval(), kept)
        optimizer = optimizer_of(model.train(), 3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        order = torch.Generator().manual_seed(0)
        losses, started = [], time.perf_counter()
        for _ in range(steps):
            ids = learned[torch.randint(len(learned), (batch,), generator=order)]
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        seconds = time.perf_counter() - started
        after = _loss(model.eval(), kept)
        expected = after if expected is None else expected
        last = losses[-max(1, steps // 10) :]
        cell = {
            "weights": weights or "16 bit",
            "loss_before": round(before, 4),
            "loss": round(after, 4),
            "training_loss": round(sum(last) / len(last), 4),
            "difference": round(after / expected - 1, 5),
            "seconds_per_step": round(seconds / steps, 3),
        }
        results.add("cells", cell)


def _windows() -> tuple[Tensor, Tensor]:
    """Token ids (windows, WINDOW) to learn, and those that are kept for measuring."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    text = "\n".join(f.read_text(encoding="utf-8") for f in sorted(ROOT.glob("docs/*.md")))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    split = len(windows) * 9 // 10
    return windows[:split], windows[split:]


@torch.no_grad()
def _loss(model: Any, windows: Tensor) -> float:
    losses = [model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in windows.split(8)]
    return sum(losses) / len(windows)


# ---- the shape of a large one ------------------------------------------------------------------


def loss_in_pieces(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """A model's ``loss_function`` that has few tokens' logits in fp32 at a time."""
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].flatten()  # each predicts the next
    pieces = zip(logits.view(-1, vocab_size).split(256), labels.split(256), strict=True)
    losses = [checkpoint(_sum_of_losses, *piece, use_reentrant=False) for piece in pieces]
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return torch.stack(losses).sum() / count


def _sum_of_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def run_qwen3(results: Results, tiny: bool, layers: int | None, loss: str) -> None:
    """Tokens per second and bytes by who computes and the dtype of factors."""
    device = torch.device("cpu" if tiny else "cuda")
    shape = TINY if tiny else QWEN3_30B_A3B
    shape = replace(shape, num_hidden_layers=layers or shape.num_hidden_layers)
    tokens = 32 if tiny else TOKENS
    results.set(layers=shape.num_hidden_layers, tokens=tokens, rank=RANK, loss=loss)
    for experts in ("int8", "bf16"):
        for factors in ("bf16", "fp32"):
            # One after the other: the last model's memory is free by then.
            results.add("cells", _step_cell(shape, device, experts, factors, loss))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _step_cell(
    shape: Shape, device: torch.device, experts: Any, factors: str, loss: str
) -> dict[str, Any]:
    cuda = device.type == "cuda"
    cell: dict[str, Any] = {
        "what": "qmoe int8" if experts == "int8" else "PEFT bf16",
        "factors": factors,
    }
    model = build_model(shape, device, experts)
    assert bool(quantized_modules(model)) == (experts == "int8")
    if loss == "pieces":
        model.loss_function = loss_in_pieces
    model = adapt(model, RANK, autocast_adapter_dtype=factors == "fp32").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    optimizer = optimizer_of(model, 1e-4)
    cell["learning"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    generator = torch.Generator(device).manual_seed(0)
    size = (1, TOKENS if cuda else 32)
    ids = torch.randint(shape.vocab_size, size, device=device, generator=generator)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [step() for _ in range(2)]  # kernels are compiled, AdamW has its state
    if cuda:
        cell["bytes_before"] = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(6 if cuda else 2):
        synchronize(device)
        started = time.perf_counter()
        losses.append(step())
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    if not losses[-1] < losses[0]:
        raise AssertionError(f"{cell}: nothing was learned, losses {losses[0]} to {losses[-1]}")
    if cuda:
        cell["bytes"] = torch.cuda.max_memory_allocated()
    cell["loss_first"], cell["loss_last"] = round(losses[0], 3), round(losses[-1], 3)
    cell["ms"] = round(1e3 * median(seconds), 1)
    return cell | {"tokens_per_second": round(ids.numel() / median(seconds), 1)}


def targets(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """What had to be reached, and was."""
    found = []
    for cell in sections.get("shipped", {}).get("cells", []):
        if cell["weights"] != "16 bit":
            off = abs(cell["difference"])
            row = {"what": f"{cell['weights']}: loss beside 16 bit", "target": MOST_DIFFERENT}
            found.append(row | {"measured": off, "met": off <= MOST_DIFFERENT})
    large = sections.get("qwen3", {})
    whole = large.get("layers") == QWEN3_30B_A3B.num_hidden_layers
    for cell in large.get("cells", []) if whole else []:
        if cell["what"] == "qmoe int8" and "bytes" in cell:
            row = {"what": f"qwen3, {cell['factors']} factors: bytes", "target": MOST_BYTES}
            found.append(row | {"measured": cell["bytes"], "met": cell["bytes"] < MOST_BYTES})
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 if it failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    names = ("shipped", "qwen3")
    parser = parser_of(__doc__, names, RESULTS)
    parser.add_argument("--layers", type=int, help="of the large model, instead of all 48")
    parser.add_argument(
        "--loss",
        choices=["whole", "pieces"],
        default="whole",
        help="of the large model's logits: %(default)s",
    )
    options = parser.parse_args(arguments)
    if options.draw:
        parser.error("there is no picture of these")
    only = check_sections(parser, options, names)
    if "qwen3" in only and not options.tiny and not torch.cuda.is_available():
        parser.error("qwen3 needs a GPU; --only shipped and --tiny run on the CPU")
    warnings.filterwarnings("ignore", category=FutureWarning)
    results = Results("lora", options.out, facts("lora", arguments, options.commit), targets)
    sections: dict[str, Callable[[], None]] = {
        "shipped": lambda: run_shipped(results, options.tiny),
        "qwen3": lambda: run_qwen3(results, options.tiny, options.layers, options.loss),
    }
    return run_sections(results, {name: sections[name] for name in only})


if __name__ == "__main__":
    sys.exit(main())
