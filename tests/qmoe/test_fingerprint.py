"""Whatever a captured step rests on is noticed when it changes, and nothing else."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import qmoe
from qmoe.decoding.decoder import decoder_of
from qmoe.decoding.fingerprint import Fingerprint
from qmoe.decoding.pieces import find_pieces


@pytest.fixture(scope="module")
def qwen3() -> PreTrainedModel:
    return families.build("qwen3_moe")


@pytest.fixture
def own(qwen3: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(qwen3)


def layer(model: Any) -> Any:
    return model.model.layers[1]


def set_(owner: Callable[[Any], Any], name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(owner(model), name, value)


def replace_data(model: Any) -> None:
    weight = layer(model).mlp.gate.weight
    weight.data = weight.data.clone()


def swap_class(model: Any) -> None:
    norm = model.model.norm
    norm.__class__ = type("Other", (type(norm),), {})


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda m: layer(m).register_forward_hook(lambda *a: None),
    "a hook before": lambda m: layer(m).mlp.register_forward_pre_hook(lambda *a: None),
    "top_k of a router": set_(lambda m: layer(m).mlp.gate, "top_k", 1),
    "training mode": lambda m: layer(m).train(),
    "a value of the configuration": set_(lambda m: m.config, "rms_norm_eps", 0.5),
    "a value in the configuration": lambda m: m.config.rope_parameters.update(rope_theta=5.0),
    "the attention implementation": lambda m: m.set_attn_implementation("eager"),
    "a parameter": set_(lambda m: m.model.norm, "weight", nn.Parameter(torch.ones(64))),
    "where a parameter is": replace_data,
    "a buffer": lambda m: m.model.rotary_emb.register_buffer("inv_freq", torch.ones(8)),
    "a module": lambda m: m.set_submodule("lm_head", nn.Linear(64, 264)),
    "a module more": lambda m: layer(m).add_module("more", nn.Linear(2, 2)),
    "a module less": lambda m: delattr(layer(m).self_attn, "q_norm"),
    "a class": swap_class,
    "a forward": set_(layer, "forward", lambda *a, **k: None),
    "activations": set_(lambda m: layer(m).mlp.experts, "activations", "auto"),
    "a budget": lambda m: qmoe.resize(m, hbm_budget="4GiB", context=32),
    "an attribute more": set_(layer, "more", 1.0),
    "an attribute in a list": lambda m: layer(m).self_attn.many.append(2),
    "precision of products": lambda m: torch.set_float32_matmul_precision("high"),
    "unpatched": qmoe.unpatch,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed(own, name):
    layer(own).self_attn.many = [1]
    precision = torch.get_float32_matmul_precision()
    fingerprint = Fingerprint(own)
    assert fingerprint.matches(own)
    try:
        CHANGES[name](own)
        assert not fingerprint.matches(own)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_functions_of_classes_and_modules(own, monkeypatch):
    """As kernels of other libraries put themselves there."""
    module = sys.modules[type(own).__module__]
    fingerprint = Fingerprint(own)
    fingerprint.watch(find_pieces(own).rests_on)
    assert fingerprint.matches(own)
    with monkeypatch.context() as patched:
        patched.setattr(module, "apply_rotary_pos_emb", lambda *a, **k: None)
        assert not fingerprint.matches(own)
    assert fingerprint.matches(own)
    monkeypatch.setattr(type(own.model.norm), "forward", lambda self, x: x)
    assert not fingerprint.matches(own)


def test_global_hooks(own):
    fingerprint = Fingerprint(own)
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        assert not fingerprint.matches(own)
        assert Fingerprint(own).uncapturable == "hooks of all modules"
    finally:
        handle.remove()
    assert fingerprint.matches(own)


def test_what_stays_the_same(own):
    """Values that are equal, other numbers in the same tensors, runs of the model."""
    fingerprint = Fingerprint(own)
    own.config.rms_norm_eps = float(str(own.config.rms_norm_eps))
    layer(own).mlp.gate.top_k = int("2")
    layer(own).self_attn.scaling = float(str(layer(own).self_attn.scaling))
    assert fingerprint.matches(own)
    with torch.no_grad():
        own.model.norm.weight.mul_(2)
    ids, mask = families.prompts(5, 3)
    own.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    own.generate(ids, attention_mask=mask, max_new_tokens=3, num_beams=2)
    own(ids)
    own.generate(ids, attention_mask=mask, max_new_tokens=3, custom_generate=qmoe.decode)
    assert fingerprint.matches(own)


def test_hooks_of_transformers_that_do_nothing(own):
    """They stay once somebody has asked for hidden states; a step may be captured all the same."""
    own(families.prompts(5)[0], output_hidden_states=True)
    assert any(module._forward_hooks for module in own.modules())
    assert Fingerprint(own).uncapturable is None


def test_what_may_do_anything_is_not_captured(own):
    assert Fingerprint(own).uncapturable is None
    handle = layer(own).register_forward_hook(lambda *a: None)
    assert "a hook on Qwen3MoeDecoderLayer" in str(Fingerprint(own).uncapturable)
    handle.remove()
    assert Fingerprint(own).uncapturable is None
    inner = layer(own).mlp.forward
    layer(own).mlp.forward = lambda x: inner(x)
    assert "in place of Qwen3MoeSparseMoeBlock.forward" in str(Fingerprint(own).uncapturable)


def test_an_undecodable_model_is_searched_once(own, monkeypatch):
    """What was found out about it is kept like a step, and forgotten like one."""
    from qmoe.decoding import decoder

    looked: list[Any] = []

    def refuse(model: Any, fingerprint: Any) -> Any:
        looked.append(model)
        raise KeyError("no such layer")

    monkeypatch.setattr(decoder, "Shadows", refuse)
    ids, mask = families.prompts(5)
    options = dict(attention_mask=mask, max_new_tokens=3, do_sample=False)
    expected = own.generate(ids, **options).tolist()
    with pytest.warns(
        UserWarning, match=r"transformers' own loop: KeyError: 'no such layer'"
    ) as caught:
        for _ in range(3):
            assert own.generate(ids, custom_generate=qmoe.decode, **options).tolist() == expected
    assert len(looked) == 1 and len(caught) == 1
    monkeypatch.undo()
    layer(own).mlp.gate.top_k = 1
    own.generate(ids, custom_generate=qmoe.decode, **options)
    assert decoder_of(own).known.obstacle is None and decoder_of(own).idle


@pytest.mark.slow
def test_takes_two_milliseconds_at_most():
    """For a model of 48 layers; the processor's own time, as others may use it too."""
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=48,
        num_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = qmoe.patch(Qwen3MoeForCausalLM(config).eval())
    fingerprint = Fingerprint(model)

    def seconds() -> float:
        started = time.thread_time()
        assert fingerprint.matches(model)
        return time.thread_time() - started

    # The quickest of some seconds: on a busy machine others take the processor's caches meanwhile.
    quickest, started = seconds(), time.monotonic()
    while quickest >= 2e-3 and time.monotonic() - started < 10:
        quickest = min(quickest, seconds())
    assert quickest < 2e-3
