"""Decode with a part of the experts in host memory, beside all of them: tokens per second.

``python -m benchmarks.host_memory`` (``make bench-host-memory``) saves a few layers of
Qwen3-30B-A3B's shape with random weights, which route at random: a hard case. Each bound generates
the same text, which must be that of the model with all pages in host memory. Once the system's
cache of files is emptied before. Results go to ``benchmarks/results/host_memory.json``.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import qmoe
from benchmarks.options import check, parser_of
from benchmarks.record import Results, facts, run_sections
from qmoe.experts.quantized import quantized_modules

RESULTS = Path(__file__).parent / "results" / "host_memory.json"
CONTEXT = 1024


def save_model(folder: Path, device: str, num_layers: int, num_experts: int, hidden: int) -> None:
    """An INT8 checkpoint of random experts."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=hidden, num_experts=num_experts,
        num_hidden_layers=num_layers, moe_intermediate_size=3 * hidden // 8, head_dim=64,
        num_experts_per_tok=8, num_attention_heads=hidden // 64, num_key_value_heads=4,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    qmoe.patch(model)
    model.save_pretrained(folder)


def forget_files(folder: Path) -> None:
    """Ask the system to drop what its cache has of the checkpoint."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure(
    folder: Path, device: str, budget: int, bound: int | None, num_tokens: int, cold: bool
) -> tuple[dict[str, Any], torch.Tensor]:
    """Tokens per second of a text, once another one has been generated, and the text."""
    model = qmoe.load(folder, device=device, hbm_budget=budget, context=CONTEXT, host_memory=bound)
    ids = torch.arange(1, 17, device=device)[None]
    options = {
        "attention_mask": torch.ones_like(ids), "do_sample": False, "min_new_tokens": num_tokens,
        "max_new_tokens": num_tokens, "custom_generate": qmoe.decode,
    }  # fmt: skip
    model.generate(ids, **options)
    if cold:
        forget_files(folder)
    before, began = qmoe.stats(model), time.perf_counter()
    text = model.generate(ids, **options).cpu()
    seconds = time.perf_counter() - began
    after = qmoe.stats(model)
    found = {
        "host_memory": bound,
        "cold": cold,
        "tokens_per_second": num_tokens / seconds,
        "misses": after.misses - before.misses,
        "disk_misses": after.disk_misses - before.disk_misses,
        "disk_bytes": after.disk_bytes - before.disk_bytes,
        "disk_waited_seconds": after.disk_waited_seconds - before.disk_waited_seconds,
    }
    qmoe.release(model)
    return found, text


def run(results: Results, sizes: tuple[int, int, int, int], device: str) -> None:
    """Tokens per second by bound of host memory.

    Args:
        sizes: layers, experts of each, hidden size and tokens of the text.
    """
    *shape, num_tokens = sizes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, device, *shape)
        model = qmoe.load(folder, device=device)
        pages = sum(
            p.num_experts * p.page_stride
            for p in (e.layer_pages(n) for n, e in quantized_modules(model).items())
        )
        try:
            qmoe.resize(model, hbm_budget=1, context=CONTEXT)
        except ValueError as error:  # which names the smallest that works
            smallest = int(str(error).split(" bytes)")[0].rpartition("(")[2])
        del model
        budget = smallest + pages // 4
        results.set(layers=shape[0], experts=shape[1], hidden=shape[2], page_bytes_in_all=pages)
        _, expected = measure(folder, device, budget, None, num_tokens, False)
        for bound, cold in ((None, False), (pages // 2, False), (pages // 4, False),
                            (pages // 4, True)):  # fmt: skip
            found, text = measure(folder, device, budget, bound, num_tokens, cold)
            if not torch.equal(text, expected):
                raise AssertionError(f"host_memory={bound}: another text")
            results.add("cells", found)


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 if it failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = parser_of(__doc__, ("decode",), RESULTS)
    options = parser.parse_args(arguments)
    if options.draw:
        parser.error("there is no picture of these")
    check(parser, options, ("decode",))
    sizes = (2, 64, 256, 8) if options.tiny else (4, 128, 2048, 64)
    results = Results(
        "host_memory", options.out, facts("host_memory", arguments, options.commit), lambda _: []
    )
    device = "cpu" if options.tiny else "cuda"
    return run_sections(results, {"decode": lambda: run(results, sizes, device)})


if __name__ == "__main__":
    sys.exit(main())
