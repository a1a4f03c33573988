"""Every class of the installed transformers that generates with experts, as a whole tiny model.

Each is converted, loaded resident and paged, and decoded by `qmoe.decode`, token for token beside
transformers' own loop on the same patched model. What decodes each stands in docs/models.md, which
`make docs` writes; a class that is new, or that goes another way than it says, is noticed here.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import whole_models
from whole_models import Failure, WholeModel, sweep

import qmoe

CLASSES = whole_models.generating_classes()
DOCUMENT = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
# Another release of transformers has other classes, and other caches.
IS_OURS = f"transformers {transformers.__version__}," in DOCUMENT
ROW = re.compile(r"^\| (\w+) \| (\w+) \| ([\w-]+) \| (.+) \| (.+) \|$", re.MULTILINE)
ROWS = ROW.findall(DOCUMENT.split("\n## ")[1])
DOCUMENTED = {name: (form, by) for _, name, form, by, _ in ROWS}
READ_ALONE = {name: alone for *_, name, _, _, alone in ROWS}


@pytest.mark.skipif(not IS_OURS, reason="docs/models.md was generated with another transformers")
def test_the_documented_models_are_those_that_there_are() -> None:
    assert sorted(DOCUMENTED) == sorted(map(str, CLASSES)), "run `make docs`"
    assert len(CLASSES) > 70
    assert not [name for name, (_, by) in DOCUMENTED.items() if "FAILS" in by]
    by_qmoe = [name for name, (_, by) in DOCUMENTED.items() if by.startswith("qmoe")]
    assert len(by_qmoe) > len(CLASSES) / 2


@pytest.mark.parametrize("whole", CLASSES, ids=str)
def test_it_decodes_as_documented(whole: WholeModel, tmp_path: Path) -> None:
    if whole.family == "diffusion_gemma" and transformers.__version__.startswith("5.17."):
        pytest.skip("transformers 5.17 builds no DiffusionGemma without a vision tower")
    found = sweep(whole, tmp_path)
    if IS_OURS:
        assert found == DOCUMENTED[whole.name], "look at it, then run `make docs`"


class TestTheSweep:
    """It notices what it is there for."""

    (mixtral,) = (whole for whole in CLASSES if whole.name == "MixtralForCausalLM")

    def test_another_token(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        decode = qmoe.decode

        def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
            tokens = decode(*args, **kwargs)
            tokens[-1, -1] += 1
            return tokens

        monkeypatch.setattr(qmoe, "decode", wrong)
        with pytest.raises(Failure, match="resident, greedy"):
            sweep(self.mixtral, tmp_path)

    def test_transformers_own_loop(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        generate = functools.partial(whole_models._generate, use_cache=False)
        monkeypatch.setattr(whole_models, "_generate", generate)
        form, by = sweep(self.mixtral, tmp_path)
        assert form == "compressed-tensors"
        assert by == "transformers: use_cache=False"

    def test_nothing_is_paged(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        load = qmoe.load

        def resident(*args: Any, hbm_budget: Any = None, **kwargs: Any) -> Any:
            return load(*args, hbm_budget=hbm_budget and "1GiB", **kwargs)

        monkeypatch.setattr(qmoe, "load", resident)
        with pytest.raises((Failure, ValueError), match="nothing"):
            sweep(self.mixtral, tmp_path)
