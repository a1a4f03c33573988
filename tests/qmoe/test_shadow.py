"""A shadow computes what the model computes, and the model never changes."""

from __future__ import annotations

import functools
import gc
import sys
import threading
import weakref
from typing import Any

import families
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from qmoe.decoding.pieces import find_pieces
from qmoe.decoding.shadow import Shadow, Undecodable
from qmoe.experts.quantized import QuantizedExperts


@pytest.fixture(scope="module")
def qwen3() -> PreTrainedModel:
    return families.build("qwen3_moe")


@pytest.fixture
def own(qwen3: PreTrainedModel) -> PreTrainedModel:
    return families.copy_of(qwen3)


def shadow_of(model: Any, attention: str | None = None) -> Shadow:
    return Shadow(model, find_pieces(model).forwards, attention)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(families.prompts(9)[0], use_cache=False).logits


def state(model: Any) -> list[Any]:
    """All attributes of modules, configuration and transformers' module, by identity."""
    owners = [*model.modules(), model.config, sys.modules[type(model).__module__]]
    return [{name: id(value) for name, value in vars(owner).items()} for owner in owners]


def test_the_model_stays_what_it_was(own):
    before = state(own)
    shadow = shadow_of(own, "eager")
    logits(shadow)
    assert state(own) == before
    del shadow
    assert state(own) == before


def test_what_is_shared_and_what_is_not(own):
    root = shadow_of(own, "eager").root
    assert root is not own
    assert root.config._attn_implementation == "eager" != own.config._attn_implementation
    theirs = dict(own.named_modules())
    for name, module in root.named_modules():
        assert module._parameters is theirs[name]._parameters
        assert module._forward_hooks is theirs[name]._forward_hooks
        if isinstance(module, QuantizedExperts):
            assert module is theirs[name]
        if (config := getattr(module, "config", None)) is not None:
            assert config is root.config


def test_hooks_that_are_added_later_are_seen(own):
    shadow = shadow_of(own)
    layer = own.model.layers[1]
    layer.register_forward_hook(lambda module, args, output: output * 0.5)
    torch.testing.assert_close(logits(shadow), logits(own), rtol=1e-4, atol=1e-4)


def test_two_threads_and_the_model_itself(own):
    expected, shadow = logits(own), shadow_of(own)
    failures: list[Any] = []

    def run(what: Any) -> None:
        for _ in range(10):
            found = logits(what)
            if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
                failures.append(what)

    threads = [threading.Thread(target=run, args=(what,)) for what in (shadow, shadow, own)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_what_a_forward_stores_is_the_shadow_s(own):
    """As rotary embeddings of a dynamic kind do."""
    embedding = type(own.model.rotary_emb)
    before = own.model.rotary_emb.inv_freq

    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        self.register_buffer("inv_freq", self.inv_freq * 2, persistent=False)
        self.seen = 1
        return embedding.forward(self, x, position_ids)

    shadow = Shadow(own, {own.model.rotary_emb: forward})
    logits(shadow)
    assert own.model.rotary_emb.inv_freq is before
    assert not hasattr(own.model.rotary_emb, "seen")


def test_attributes_that_lead_to_modules_lead_to_their_copies(own):
    attention = own.model.layers[0].self_attn
    attention.__dict__["above"] = own.model
    attention.all_layers = tuple(own.model.layers)
    attention.bound = own.model.forward
    attention.partial = functools.partial(print, own.model)
    root = shadow_of(own).root
    copied = root.model.layers[0].self_attn
    assert copied.above is root.model and copied.all_layers == tuple(root.model.layers)
    assert copied.bound.__self__ is root.model and copied.partial.args == (root.model,)


def test_a_forward_that_leads_back_into_the_model(own):
    """Above attention it would run the model's own, without a mask; elsewhere it is harmless."""
    mlp, layer = own.model.layers[0].mlp, own.model.layers[1]
    mlp.forward = functools.partial(type(mlp).forward, mlp)
    layer.forward = type(layer).forward.__get__(layer)
    torch.testing.assert_close(logits(shadow_of(own)), logits(own), rtol=1e-4, atol=1e-4)
    inner = mlp.forward
    mlp.forward = lambda hidden_states: inner(hidden_states)
    torch.testing.assert_close(logits(shadow_of(own)), logits(own), rtol=1e-4, atol=1e-4)
    whole = layer.forward
    layer.forward = lambda *args, **kwargs: whole(*args, **kwargs)
    with pytest.raises(Undecodable, match=r"DecoderLayer.forward was replaced by .*lambda"):
        shadow_of(own)


def test_a_compiled_model_is_not_called(own):
    own._compiled_call_impl = lambda *args, **kwargs: pytest.fail("the original ran")
    logits(shadow_of(own))


def test_memory_goes_with_the_shadow(own):
    shadow = shadow_of(own)
    assert any("forward" in vars(module) for module in shadow.root.modules())
    modules = [weakref.ref(m) for m in shadow.root.modules() if not isinstance(m, QuantizedExperts)]
    shared = {id(module) for module in own.modules()}
    modules = [m for m in modules if id(m()) not in shared]
    gc.collect()
    gc.disable()
    try:
        del shadow
        assert not [m() for m in modules if m() is not None]
    finally:
        gc.enable()


def test_a_module_that_is_used_twice(own):
    own.model.again = nn.ModuleList([own.model.layers[0]])
    root = shadow_of(own).root
    assert root.model.again[0] is root.model.layers[0] is not own.model.layers[0]
