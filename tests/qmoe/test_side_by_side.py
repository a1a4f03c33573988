"""Attention's weights side by side: nothing about a model changes but where they lie."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from accelerate.utils.other import clean_state_dict_for_safetensors
from safetensors.torch import load_file, save_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeForCausalLM
from zoo import build, logits

import qmoe
from qmoe.loading.side_by_side import lay_side_by_side

# Without biases, and with; a budget in bytes that pages the experts of each.
FAMILIES = {"qwen3_moe": 1_150_000, "gpt_oss": 5_940_000}


def lie_side_by_side(model: nn.Module) -> bool:
    """Whether q, k and v of every layer are rows of one tensor, one behind the other."""
    for layer in model.model.layers:
        linears = [getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
        for parameters in ([m.weight for m in linears], [m.bias for m in linears]):
            if parameters[0] is None:
                continue
            offset = 0
            for parameter in parameters:
                if (
                    parameter.untyped_storage().data_ptr()
                    != parameters[0].untyped_storage().data_ptr()
                    or parameter.storage_offset() != offset
                    or not parameter.is_contiguous()
                ):
                    return False
                offset += parameter.numel()
            if parameters[0].untyped_storage().nbytes() != offset * parameters[0].itemsize:
                return False
    return True


def num_bytes(model: nn.Module) -> int:
    """Bytes of all storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_model_is_changed_anyway(family, tmp_path) -> None:
    model = build(family, 12)
    expected = logits(qmoe.unpatch(qmoe.patch(copy.deepcopy(model))))
    assert not lie_side_by_side(model)
    qmoe.patch(model)
    assert lie_side_by_side(model)
    assert num_bytes(model) == sum(p.nbytes for p in model.parameters())
    assert lie_side_by_side(model.to(torch.bfloat16)) and lie_side_by_side(model.to(torch.float32))
    model = qmoe.patch(build(family, 12))
    model.save_pretrained(tmp_path)
    assert lie_side_by_side(AutoModelForCausalLM.from_pretrained(tmp_path))
    paged = qmoe.load(tmp_path, device="cpu", hbm_budget=FAMILIES[family], context=64)
    assert paged.qmoe_paging.cache is not None and lie_side_by_side(paged)
    torch.testing.assert_close(logits(qmoe.unpatch(model)), expected, rtol=1e-4, atol=1e-4)


def files_of(model: PreTrainedModel, folder) -> dict[str, int]:
    """Sizes of what every way of writing the model writes."""
    folder.mkdir()
    model.save_pretrained(folder / "pretrained")
    torch.save(model.state_dict(), folder / "state")
    torch.save(model, folder / "whole")
    save_model(model, folder / "safetensors")
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_whole_and_no_larger(family, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as without:
        without.setattr("qmoe.loading.patch.lay_side_by_side", lambda model: None)
        apart = qmoe.patch(build(family))
        assert not lie_side_by_side(apart)
        before = files_of(apart, tmp_path / "apart")
    model = qmoe.patch(build(family))
    after = files_of(model, tmp_path / "together")
    assert after.keys() == before.keys()
    assert all(after[name] <= before[name] + 100 for name in before), (before, after)
    expected = {name: tensor.clone() for name, tensor in apart.state_dict().items()}
    loaded = type(model).from_pretrained(tmp_path / "together" / "pretrained")
    whole = torch.load(tmp_path / "together" / "whole", weights_only=False)
    for tensors in (
        torch.load(tmp_path / "together" / "state"),
        load_file(tmp_path / "together" / "safetensors"),
        clean_state_dict_for_safetensors(model.state_dict()),
        loaded.state_dict(),
        whole.state_dict(),
        copy.deepcopy(model).state_dict(),
    ):
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            ours = tensor.contiguous().view(torch.uint8)
            assert torch.equal(ours, expected[name].view(torch.uint8)), name
    assert torch.equal(logits(whole), logits(model)) and whole.to(torch.float32) is whole
    assert num_bytes(copy.deepcopy(model)) == num_bytes(model)


def test_weights_that_others_hold_stay_where_they_are() -> None:
    def check(change) -> None:
        model = build("qwen3_moe").to(torch.float32)
        attention = model.model.layers[0].self_attn
        change(model, attention)
        pointers = [p.data_ptr() for p in attention.parameters()]
        lay_side_by_side(model)
        assert [p.data_ptr() for p in attention.parameters()] == pointers
        assert model.model.layers[1].self_attn.q_proj.weight.untyped_storage().nbytes() > (
            model.model.layers[1].self_attn.q_proj.weight.nbytes
        ), "the other layer is laid"

    def tie(model: nn.Module, attention: nn.Module) -> None:
        model.other = nn.Linear(64, 64, bias=False)
        model.other.weight = attention.q_proj.weight

    def view(model: nn.Module, attention: nn.Module) -> None:
        attention.k_proj.weight.data = torch.zeros(33, 64)[1:]

    def inference(model: nn.Module, attention: nn.Module) -> None:
        with torch.inference_mode():
            attention.v_proj.weight = nn.Parameter(torch.zeros(32, 64), requires_grad=False)

    def dtype(model: nn.Module, attention: nn.Module) -> None:
        attention.v_proj.to(torch.float64)

    def bias(model: nn.Module, attention: nn.Module) -> None:
        attention.v_proj.bias = nn.Parameter(torch.zeros(32))

    def meta(model: nn.Module, attention: nn.Module) -> None:
        attention.v_proj.to("meta")

    def hooked(model: nn.Module, attention: nn.Module) -> None:
        from accelerate.hooks import ModelHook, add_hook_to_module

        add_hook_to_module(attention.v_proj, ModelHook())

    def subclass(model: nn.Module, attention: nn.Module) -> None:
        class Linear(nn.Linear):
            pass

        attention.v_proj.__class__ = Linear

    for change in (tie, view, inference, dtype, bias, meta, hooked, subclass):
        check(change)


def test_short_memory_leaves_them_apart(monkeypatch) -> None:
    model = build("qwen3_moe")
    expected = logits(model)

    def cat(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "cat", cat)
        lay_side_by_side(model)
    assert not lie_side_by_side(model) and torch.equal(logits(model), expected)


def test_training_goes_on() -> None:
    model: Qwen3MoeForCausalLM = build("qwen3_moe")
    apart = copy.deepcopy(model)
    lay_side_by_side(model)
    assert lie_side_by_side(model)
    for each in (model, apart):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        ids = torch.arange(12).view(2, 6)
        each(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    assert lie_side_by_side(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() < 1.1 * num_bytes(model) + 20_000
