"""What transformers makes of checkpoints without qmoe: a program of its own, that never imports it.

``python tests/qmoe/alone.py FOLDER ...`` prints one JSON object, folder -> what became of it:
"reads" if the logits are those in ``FOLDER/expected.pt``, "refuses", or what is wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CompressedTensorsConfig,
    PreTrainedModel,
)

TOKENS = torch.arange(11, 29).view(2, 9)
EXPECTED = "expected.pt"
# Until 5.20, experts are widened to bf16 whatever dtype is asked for.
TOLERANCE = 1e-5 if transformers.__version__ >= "5.21" else 0.05


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """(2, 9, vocab_size): what the model makes of :data:`TOKENS`."""
    return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def readings(folders: Iterable[Path]) -> dict[Path, str]:
    """Load every folder in a process without qmoe; folder -> what became of it, as above."""
    command = [sys.executable, __file__, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {Path(folder): found for folder, found in json.loads(done.stdout).items()}


def _read(folder: Path) -> str:
    """As it is, and asking to dequantize: transformers goes two ways."""
    config = AutoConfig.from_pretrained(folder)
    causal = type(config) in AutoModelForCausalLM._model_mapping
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    expected = torch.load(folder / EXPECTED)
    found = set()
    for options in ({}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}):
        try:
            given = logits(auto.from_pretrained(folder, dtype=torch.float32, **options))
        except (RuntimeError, ValueError):
            found.add("refuses")
            continue
        distance = ((given - expected).norm() / expected.norm()).item()
        found.add("reads" if distance < TOLERANCE else f"WRONG: other logits ({distance:.0e})")
    return " and ".join(sorted(found))


if __name__ == "__main__":
    print(json.dumps({folder: _read(Path(folder)) for folder in sys.argv[1:]}))
    assert "qmoe" not in sys.modules
