"""What 8-bit rows cost a whole model: the perplexity of the shipped one."""

from __future__ import annotations

from benchmarks.kernels.sections import Bench, Cell
from qmoe_kernels.quantization import FORMAT_OF

TOKENS, CPU_TOKENS = 65536, 64  # of the held-out text; a CPU tests this file


def run_perplexity(bench: Bench) -> None:
    """Of the shipped model in 16 bits, and with rows of its experts' products in 16 and in 8."""
    import torch
    from transformers import AutoModelForCausalLM

    from qmoe.generation import load_tokenizer
    from qmoe.loading.patch import patch
    from qmoe.tools.demo import HELD_OUT, SHIPPED_MODEL, WINDOW
    from qmoe.tools.perplexity import perplexity

    bench.results.begin("perplexity")
    text = (SHIPPED_MODEL / HELD_OUT).read_text()
    tokens = TOKENS if bench.device.type == "cuda" else CPU_TOKENS
    bench.results.set(model=SHIPPED_MODEL.name, tokens=tokens, window=WINDOW)
    tokenizer = load_tokenizer(SHIPPED_MODEL)
    for weights in (None, *FORMAT_OF.values()):
        for activations in ("bf16", weights) if weights else ("bf16",):
            model = AutoModelForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=torch.bfloat16)
            model = model.to(bench.device)
            if weights:
                patch(model, weights, activations=activations)
            found = perplexity(model, tokenizer, text, window=WINDOW, max_tokens=tokens)
            cell: Cell = {"weights": weights or "bf16", "activations": activations}
            bench.results.add("cells", cell | {"perplexity": round(found, 4)})
