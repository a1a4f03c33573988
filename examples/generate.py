"""Quantize a model's experts while loading, and stream text from it.

python examples/generate.py [FOLDER_OR_HUB_ID]
"""

import sys

from transformers import AutoTokenizer

import qmoe
from qmoe.sizes import format_size

path = sys.argv[1] if len(sys.argv) > 1 else "examples/tiny-moe"
model = qmoe.load(path, weights="int8")
tokenizer = AutoTokenizer.from_pretrained(path)

result = qmoe.generate(
    model,
    tokenizer,
    "def read_lines(path):\n",
    max_new_tokens=64,
    do_sample=False,
    stream=lambda index, piece: print(piece, end="", flush=True),
)
print(f"\n{result.statistics.decode_tokens_per_second:.1f} tokens/s")
print(f"{format_size(result.statistics.expert_bytes)} of experts")
