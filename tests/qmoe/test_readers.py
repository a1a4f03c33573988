"""What qmoe says of the programs that read its checkpoints is what they do.

`make docs` lets transformers alone read every class; here it reads those whose names differ from
the checkpoint's, one with a layer in 16 bit, and two that it refuses.
"""

from __future__ import annotations

from pathlib import Path

import alone
import pytest
import torch
import whole_models
from test_every_model import IS_OURS, READ_ALONE

from qmoe.checkpoints.readers import REFUSED_BY_TRANSFORMERS, readers_of

CASES = (
    ("Qwen3MoeForCausalLM", "int8", {"ignore": [r"layers\.1\."]}),
    ("NemotronHForCausalLM", "int8", {}),
    ("NemotronHForCausalLM", "fp8", {}),
    ("LongcatFlashForCausalLM", "int8", {}),
    ("GptOssForCausalLM", "int8", {}),  # in the format qmoe
)


def test_transformers_alone_reads_or_refuses(tmp_path: Path) -> None:
    classes = {whole.name: whole for whole in whole_models.generating_classes()}
    folders = {}
    for name, weights, options in CASES:
        folder = tmp_path / f"{name}-{weights}"
        folders[folder] = name
        model = whole_models.convert_and_load(classes[name], folder, weights, **options)
        if folders[folder].startswith("Nemotron"):
            model.save_pretrained(folder / "again")
            torch.save(alone.logits(model), folder / "again" / alone.EXPECTED)
            folders[folder / "again"] = name
    found = alone.readings(folders)
    refused = {name for folder, name in folders.items() if found[folder] == "refuses"}
    read = {name for folder, name in folders.items() if found[folder] == "reads"}
    assert refused == {"LongcatFlashForCausalLM", "GptOssForCausalLM"} and not refused & read, found
    assert refused | read == set(folders.values()), found


@pytest.mark.skipif(not IS_OURS, reason="docs/models.md was generated with another transformers")
def test_the_sentence_says_what_was_found_of_every_class() -> None:
    assert set(READ_ALONE.values()) == {"reads", "refuses", "-"}
    refused = {name for name, found in READ_ALONE.items() if found == "refuses"}
    assert refused == set(REFUSED_BY_TRANSFORMERS)


@pytest.mark.parametrize(
    ("form", "architecture", "said"),
    [
        ("qmoe", "GptOssForCausalLM", "nothing else"),
        ("compressed-tensors", "Qwen3MoeForCausalLM", "vLLM 0.26; transformers alone"),
        ("compressed-tensors", "MixtralForCausalLM", "vLLM where it has MixtralForCausalLM"),
        ("compressed-tensors", "LongcatFlashForCausalLM", "transformers 5.23 refuses it"),
    ],
)
def test_the_sentence(form: str, architecture: str, said: str) -> None:
    sentence = readers_of(form, architecture)
    assert "after `import qmoe`" in sentence and said in sentence
