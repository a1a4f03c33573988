"""Record the routing of the shipped model on its held-out text.

    python benchmarks/record_routing.py

writes benchmarks/data/tiny_moe_routing.safetensors: the INT8 model reads the text as in decode,
window by window, every token after those before it in its window.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import qmoe
from qmoe.generation import load_tokenizer
from qmoe.traces.trace import RoutingTrace

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-moe"
TRACE = ROOT / "benchmarks" / "data" / "tiny_moe_routing.safetensors"


@torch.no_grad()
def record(folder: Path, *, num_windows: int = 2, window: int = 1024) -> RoutingTrace:
    """The routing of the first ``num_windows * window`` tokens of a model's ``heldout.txt``."""
    model = qmoe.load(folder, device="cpu", weights="int8")
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(str(folder))(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(ids[: num_windows * window]).view(num_windows, window)
    with qmoe.record_routing(model) as recording:
        for tokens in windows:
            model(input_ids=tokens[None], use_cache=False, logits_to_keep=1)
    source = f"{folder.name}/heldout.txt: {num_windows} windows of {window} tokens, experts in INT8"
    return recording.trace({"source": source})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TRACE)
    out = parser.parse_args().out
    trace = record(MODEL)
    out.parent.mkdir(parents=True, exist_ok=True)
    trace.save(out)
    print(f"{out}: {trace.num_tokens} tokens, {trace.num_layers} layers, top {trace.top_k}")
    print("reuse", " ".join(f"{share:.1%}" for share in trace.reuse().tolist()))
