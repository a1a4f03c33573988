"""patch and unpatch that are cut off, at every allocation and at every line of qmoe's."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Llama4ForCausalLM, Llama4TextConfig, PreTrainedModel
from zoo import SIZES, build, logits

import qmoe
from qmoe.experts.quantized import QuantizedExperts, quantized_modules

FAMILIES = ["qwen3_moe", "llama4"]


def tiny(family: str) -> PreTrainedModel:
    if family != "llama4":
        return build(family, 4)
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **SIZES | {"num_experts_per_tok": 1}, intermediate_size_mlp=32, num_local_experts=4
    )
    model = Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.2)
    return model


class OutOfMemoryAt(TorchDispatchMode):
    """The allocation of this number fails; counts them."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        known = {
            t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            if tensor.untyped_storage()._cdata not in known:
                self.count += 1
                if self.count == self.number:
                    raise torch.OutOfMemoryError("CUDA out of memory")
        return result


Line = tuple[str, int]


def lines_of(call: Callable[[], object]) -> dict[Line, int]:
    """How often each line of the rooms that patch is run."""
    counts: dict[Line, int] = {}

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if "/qmoe/loading/" not in (file := frame.f_code.co_filename) and (
            not file.endswith("/experts/quantized.py") and not file.endswith("/experts/llama4.py")
        ):
            return None
        if event == "line":
            counts[file, frame.f_lineno] = counts.get((file, frame.f_lineno), 0) + 1
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return counts


@contextmanager
def interrupt_at(line: Line, occurrence: int) -> Iterator[None]:
    """Raise KeyboardInterrupt where Python comes to a line for the so-manieth time."""
    seen = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != line[0]:
            return None
        if event == "line" and frame.f_lineno == line[1]:
            seen += 1
            if seen == occurrence:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def check_refuses(model: PreTrainedModel, what: str, tmp_path) -> None:
    """A model that is cut off neither runs nor is saved, and says what to do."""
    for use in (
        lambda: logits(model),
        model.state_dict,
        lambda: model.save_pretrained(tmp_path / "cut off"),
        lambda: qmoe.unpatch(model) if what == "qmoe.patch" else qmoe.patch(model),
    ):
        with pytest.raises(RuntimeError, match=rf"{what} was cut off.*call {what} again"):
            use()
    assert not (tmp_path / "cut off").exists()


def check_goes_on(
    model: PreTrainedModel,
    original: torch.Tensor,
    patched: torch.Tensor,
    tmp_path,
) -> str:
    """Either as before, or refuses until patching has gone on to the end, or patched."""
    modules = quantized_modules(model).values()
    if not modules:
        assert vars(model).get("hf_quantizer") is None
        assert torch.equal(logits(model), original)
        state = "as before"
    elif all(experts.change.finished for experts in modules):
        assert torch.equal(logits(model), patched)
        assert model.config.quantization_config.to_dict()["format"] == "qmoe"
        return "patched"
    else:
        check_refuses(model, "qmoe.patch", tmp_path)
        with pytest.raises(ValueError, match="go on with weights='int8'"):
            qmoe.patch(model, "fp8")
        state = "cut off"
    qmoe.patch(model)
    assert torch.equal(logits(model), patched)
    assert "quantization_config" in model.config.to_dict()
    return state


@pytest.mark.parametrize("family", FAMILIES)
def test_out_of_memory_at_every_allocation_of_patch(family, tmp_path) -> None:
    base = tiny(family)
    original, patched = logits(base), logits(qmoe.patch(tiny(family)))
    states: list[str] = []
    model = copy.deepcopy(base)
    with OutOfMemoryAt(-1) as counted:
        qmoe.patch(model)
    for number in range(1, counted.count + 1):
        model = copy.deepcopy(base)
        try:
            with OutOfMemoryAt(number):
                qmoe.patch(model)
        except torch.OutOfMemoryError:
            states.append(check_goes_on(model, original, patched, tmp_path))
        else:  # laying weights side by side is only for speed
            assert torch.equal(logits(model), patched)
            states.append("patched")
    assert {"as before", "cut off"} <= set(states)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupt_at_every_line_of_patch(family, tmp_path) -> None:
    base = tiny(family)
    original, patched = logits(base), logits(qmoe.patch(tiny(family)))
    chosen, states, model = random.Random(0), set(), copy.deepcopy(base)
    for line, count in lines_of(partial(qmoe.patch, model)).items():
        model = copy.deepcopy(base)
        with pytest.raises(KeyboardInterrupt), interrupt_at(line, chosen.randint(1, count)):
            qmoe.patch(model)
        states.add(check_goes_on(model, original, patched, tmp_path))
    assert states == {"as before", "cut off", "patched"}


def check_restored(
    model: PreTrainedModel, before: torch.Tensor, restored: PreTrainedModel, tmp_path
) -> str:
    after = logits(restored)
    modules = quantized_modules(model).values()
    if modules and all(m.change.finished for m in modules):
        assert torch.equal(logits(model), before)
        state = "patched"
    elif modules:
        check_refuses(model, "qmoe.unpatch", tmp_path)
        state = "cut off"
    else:
        assert torch.equal(logits(model), after)
        state = "restored"
    if "hf_quantizer" in vars(model):
        qmoe.unpatch(model)
    assert torch.equal(logits(model), after)
    assert "quantization_config" not in model.config.to_dict()
    assert vars(model).keys() == vars(restored).keys()
    found, wanted = model.state_dict(), restored.state_dict()
    assert list(found) == list(wanted) and all(torch.equal(found[k], wanted[k]) for k in wanted)
    if not (folder := tmp_path / f"saved, {state}").exists():
        model.save_pretrained(folder)
        assert torch.equal(logits(type(model).from_pretrained(folder)), after)
    return state


@pytest.mark.parametrize("family", FAMILIES)
def test_out_of_memory_at_every_allocation_of_unpatch(family, tmp_path) -> None:
    base = qmoe.patch(tiny(family))
    before, restored = logits(base), qmoe.unpatch(copy.deepcopy(base))
    states, number = set(), 0
    while "done" not in states:
        model = copy.deepcopy(base)
        number += 1
        try:
            with OutOfMemoryAt(number):
                qmoe.unpatch(model)
        except torch.OutOfMemoryError:
            states.add(check_restored(model, before, restored, tmp_path))
        else:
            states.add("done")
    assert number > 5 and "cut off" in states


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupt_at_every_line_of_unpatch(family, tmp_path) -> None:
    base = qmoe.patch(tiny(family))
    before, restored = logits(base), qmoe.unpatch(copy.deepcopy(base))
    chosen, states, model = random.Random(0), set(), copy.deepcopy(base)
    for line, count in lines_of(partial(qmoe.unpatch, model)).items():
        model = copy.deepcopy(base)
        with pytest.raises(KeyboardInterrupt), interrupt_at(line, chosen.randint(1, count)):
            qmoe.unpatch(model)
        states.add(check_restored(model, before, restored, tmp_path))
    assert states == {"patched", "cut off", "restored"}


def test_copies_of_what_was_cut_off_refuse_too(tmp_path, monkeypatch) -> None:
    model = build("qwen3_moe", 4)
    quantized_from, calls = QuantizedExperts.quantized_from, []

    def fail_at_the_second(*args: Any, **options: Any) -> QuantizedExperts:
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return quantized_from(*args, **options)

    monkeypatch.setattr(QuantizedExperts, "quantized_from", fail_at_the_second)
    with pytest.raises(torch.OutOfMemoryError):
        qmoe.patch(model)
    torch.save(model, tmp_path / "whole")
    for cut_off in (copy.deepcopy(model), torch.load(tmp_path / "whole", weights_only=False)):
        check_refuses(cut_off, "qmoe.patch", tmp_path)
        with pytest.raises(RuntimeError, match=r"qmoe\.patch was cut off"):
            cut_off.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=1)
        qmoe.patch(cut_off)
        assert torch.equal(logits(cut_off), logits(qmoe.patch(build("qwen3_moe", 4))))


def test_a_failed_return_to_the_cpu_leaves_modules_that_say_so(monkeypatch) -> None:
    """Out of memory while paging, and again while its weights are brought back."""
    model = build("qwen3_moe", 12)

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("qmoe.loading.pages.page_experts", fail)
        patched.setattr(QuantizedExperts, "unpage", fail)
        with pytest.raises(torch.OutOfMemoryError):
            qmoe.patch(model, hbm_budget=1_150_000, device="cpu", context=64)
    for use in (lambda: logits(model), model.state_dict, lambda: qmoe.unpatch(model)):
        with pytest.raises(ValueError, match=r"no weights.*load the model again"):
            use()
