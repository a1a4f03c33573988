"""Spread a model's experts over several GPUs, or over processes of a CPU, and stream text.

convert-checkpoint examples/tiny-moe -o OUT
torchrun --nproc-per-node 2 examples/expert_parallel.py OUT
"""

import os
import sys

from transformers import AutoTokenizer

import qmoe

path = sys.argv[1]
model = qmoe.load(path, expert_parallel=True)
tokenizer = AutoTokenizer.from_pretrained(path)
rank = int(os.environ["RANK"])

# The same call on every rank: all get the same text, and rank 0 shows it.
show = (lambda index, piece: print(piece, end="", flush=True)) if rank == 0 else None
qmoe.generate(model, tokenizer, "def read_lines(path):\n", max_new_tokens=64, stream=show)

# Texts of its own on every rank: attention runs for these alone. The first rank has none left.
mine = [f"def function_{rank}(x):\n"] if rank > 0 else []
result = qmoe.generate(model, tokenizer, mine, max_new_tokens=32, own_texts=True)
for text in result.texts:
    print(f"\nrank {rank}: {text!r}", flush=True)
