"""Who uses a model and who changes it, through every door to the model."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
import threading
import time
import weakref
from typing import Any

import families
import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import qmoe
from qmoe.experts.guard import Guard, guard_of


@pytest.fixture
def model() -> Any:
    return families.build("qwen3_moe")


class Calling(BaseStreamer):
    def __init__(self, function: Any) -> None:
        self.function = function

    def put(self, value: torch.Tensor) -> None:
        self.function()

    def end(self) -> None:
        pass


def decode(model: Any, function: Any = lambda: None) -> list[list[int]]:
    ids, mask = families.prompts(9, 5)
    streamer = Calling(function)
    options: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)

    def loop(*args: Any, **kwargs: Any) -> Any:
        return qmoe.decode(*args, **kwargs | dict(streamer=streamer))

    return model.generate(ids, custom_generate=loop, **options).tolist()


class Wrapper(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = model


@pytest.mark.parametrize("first", ["wrapper", "model", "inner"])
def test_one_model_has_one_guard(model, first):
    vars(model).pop("_qmoe_guard", None)
    vars(model.model).pop("_qmoe_guard", None)
    doors = {"wrapper": Wrapper(model), "model": model, "inner": model.model}
    guard = guard_of(doors[first])
    assert all(guard_of(door) is guard for door in doors.values())


def test_threads_that_come_first_together():
    plain = families.FAMILIES["qwen3_moe"].build()
    barrier, found = threading.Barrier(8), []

    def ask() -> None:
        barrier.wait()
        found.append(guard_of(plain))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1


@pytest.mark.parametrize(
    "change", [lambda m: qmoe.unpatch(m), lambda m: qmoe.unpatch(m.model), lambda m: m.to("cpu")]
)
def test_changes_are_refused_while_text_is_generated(model, change):
    expected, refused = decode(model), []

    def call() -> None:
        with pytest.raises(RuntimeError, match="is generating text"):
            change(model)
        refused.append(True)

    assert decode(model, call) == expected
    assert len(refused) == 6
    qmoe.unpatch(model)


def test_no_generation_begins_while_a_state_is_loaded(model):
    """It waits, and has the tokens of the new state; also after a load that failed."""
    ids, mask = families.prompts(9, 5)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for name in state:
        if name.endswith("proj.weight"):
            state[name] *= -1
    began = threading.Event()

    def slow(*_: Any) -> None:
        began.set()
        time.sleep(0.5)

    handle = model.model.layers[1].register_load_state_dict_pre_hook(slow)
    thread = threading.Thread(target=model.load_state_dict, args=(state,))
    thread.start()
    began.wait()
    found = decode(model)
    thread.join()
    handle.remove()
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)
    assert found == model.generate(ids, attention_mask=mask, **options).tolist()

    def fail(*_: Any) -> None:
        raise OSError("gone")

    handle = model.model.layers[1].register_load_state_dict_pre_hook(fail)
    with pytest.raises(OSError, match="gone"):
        model.load_state_dict(state)
    handle.remove()
    assert decode(model) == found


def test_what_inference_mode_leaves_is_no_poison(model):
    with torch.inference_mode():
        qmoe.unpatch(model)
        qmoe.patch(model)
    assert not any(tensor.is_inference() for tensor in model.parameters())
    model(families.prompts(5)[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_process_is_not_locked_out(model):
    guard = guard_of(model)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with guard.generating(), guard.lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        with guard.changing("a change"):  # hangs, or is refused, where the lock was copied
            os._exit(7)
    for _ in range(100):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
    done.set()
    thread.join()
    assert pid and os.waitstatus_to_exitcode(status) == 7


def test_copies_have_a_guard_of_their_own(model):
    guard = guard_of(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert guard_of(twin) is guard_of(twin.model) is not guard
    assert guard_of(model.model) is guard


def test_a_guard_goes_with_its_model():
    model = families.build("qwen3_moe")
    decode(model)
    guard: Any = weakref.ref(guard_of(model))
    gc.collect()
    gc.disable()
    try:
        del model
        assert guard() is None
    finally:
        gc.enable()


def test_a_call_that_was_cut_off_blocks_nothing():
    guard = Guard()
    call = guard.generating()
    call.__enter__()
    with pytest.raises(RuntimeError, match="is generating text"), guard.changing("a change"):
        pass
    del call
    sys.exc_info()
    with guard.changing("a change"):
        assert guard.version == 1
