"""vLLM's engine on Qwen3-30B-A3B's shape with dummy weights: a process of its own, run by `peers`.

``python -m benchmarks.generate.vllm_engine '{"weights": "int8", ...}'`` prints one JSON object. It
imports nothing of qmoe, since what vLLM needs may be other versions of the same packages.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# vLLM multiplies 8-bit experts by 8-bit rows; attention, router and head stay in bf16, as ours do.
LEFT_IN_BF16 = ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.gate$"]


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Load the engine, then time decoding and prompts.

    Args:
        request: ``config`` of the model; ``quantization``, a compressed-tensors config or None;
            ``batches``, ``prompt`` and ``new`` tokens of decoding; ``prefills``; ``repeats``.

    Returns:
        ``version``, ``start_s``, and lists ``cells`` and ``prefill`` as the benchmark has them.
    """
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        config = dict(request["config"])
        if request["quantization"] is not None:
            config["quantization_config"] = request["quantization"] | {"ignore": LEFT_IN_BF16}
        Path(folder, "config.json").write_text(json.dumps(config))
        started = time.perf_counter()
        engine = vllm.LLM(
            folder,
            dtype="bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=2 * max(request["prefills"]),
            max_num_seqs=max(request["batches"]),
            max_num_batched_tokens=max(request["prefills"]),
            gpu_memory_utilization=0.85,
            enable_prefix_caching=False,
            # Its own attention kernels in Triton: they come without compiled libraries.
            attention_config={"backend": "TRITON_ATTN"},
        )
        start = time.perf_counter() - started

    def seconds(batch: int, length: int, num_new: int) -> float:
        vocabulary = range(1000, config["vocab_size"] - 1000)
        prompts = [{"prompt_token_ids": random.choices(vocabulary, k=length)} for _ in range(batch)]
        options = vllm.SamplingParams(
            temperature=0, max_tokens=num_new, ignore_eos=True, detokenize=False
        )
        begun = time.perf_counter()
        engine.generate(prompts, options, use_tqdm=False)
        return time.perf_counter() - begun

    prompt, new, repeats = request["prompt"], request["new"], request["repeats"]
    cells = []
    for batch in request["batches"]:
        seconds(batch, prompt, 8)
        # As ours: a long call less one that reads the prompt and decodes no further.
        less = statistics.median(seconds(batch, prompt, 2) for _ in range(repeats))
        steps = [(seconds(batch, prompt, 2 + new) - less) / new for _ in range(repeats)]
        rate = batch / statistics.median(steps)
        ms = [round(1e3 * s, 4) for s in steps]
        cells.append({"batch": batch, "prompt": prompt, "ms": ms, "tokens_per_s": round(rate, 2)})
    prefill = []
    for length in request["prefills"]:
        seconds(1, length, 1)
        times = [seconds(1, length, 1) for _ in range(repeats)]
        rate = length / statistics.median(times)
        ms = [round(1e3 * s, 2) for s in times]
        prefill.append({"prompt": length, "ms": ms, "tokens_per_s": round(rate, 1)})
    return {
        "version": vllm.__version__,
        "start_s": round(start, 1),
        "cells": cells,
        "prefill": prefill,
    }


if __name__ == "__main__":
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    print(json.dumps(main(json.loads(sys.argv[1]))))
