"""Loading with a budget: bytes from files to pages, both formats, and what refuses.

Without a GPU the device's memory is simulated; everything but the copy itself is the same.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quantizer import compressed_tensors_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from zoo import build, logits

import qmoe
from qmoe.checkpoints.files import StoredTensor
from qmoe.checkpoints.schema import compressed_tensors_config
from qmoe.experts.pages import LayerPages
from qmoe.experts.quantized import quantized_modules
from qmoe.loading.pages import page_reads
from qmoe.loading.quantizer import ExpertsQuantizer
from qmoe.paging import host_store
from qmoe.paging.host_store import HostStore
from qmoe.paging.model import stats
from qmoe.paging.options import PagingOptions

FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss"]
# Enough that a budget can be too small for all of them and large enough for a token's cycle.
NUM_EXPERTS = 12
CONTEXT = 64


def smallest_budget(path: Path, **options) -> int:
    """What a refusal says is the smallest that works."""
    with pytest.raises(ValueError, match="smallest that works") as refusal:
        load(path, 1, **options)
    return int(str(refusal.value).split(" bytes)")[0].rpartition("(")[2])


def load(path: Path, hbm_budget: str | int, **options) -> PreTrainedModel:
    options = {"device": "cpu", "context": CONTEXT, **options}
    return qmoe.load(path, hbm_budget=hbm_budget, **options)


def saved(family: str, weights: str, form: str, folder: Path) -> torch.Tensor:
    """A checkpoint in one of the two formats, and the logits of the model without paging."""
    model = build(family, NUM_EXPERTS)
    if form == "compressed-tensors":
        compressed_tensors_checkpoint(model, folder, weights)
    else:
        qmoe.patch(model, weights).save_pretrained(folder)
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def is_paged(model: PreTrainedModel) -> bool:
    modules = quantized_modules(model).values()
    paged = {experts.paged is not None for experts in modules}
    assert len(modules) == 2 and len(paged) == 1
    return paged.pop()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("form", ["qmoe", "compressed-tensors"])
def test_a_paged_model_is_the_model(family, weights, form, tmp_path, caplog) -> None:
    if family == "gpt_oss" and form == "compressed-tensors":
        pytest.skip("the Hub stores its experts fused")
    expected = saved(family, weights, form, tmp_path)
    smallest = smallest_budget(tmp_path)
    for budget in (smallest, smallest + 20_000, "90%"):
        caplog.clear()
        model = load(tmp_path, budget)
        assert is_paged(model) == (budget != "90%")
        assert torch.equal(logits(model), expected)
        assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text
        if is_paged(model):
            assert not [name for name, _ in model.named_parameters() if name.endswith("_q")]
            assert stats(model).bytes > 0


@pytest.mark.parametrize("form", ["qmoe", "compressed-tensors", "no package"])
def test_from_pretrained_takes_the_budget_from_the_config(form, tmp_path, monkeypatch) -> None:
    if form == "no package":
        monkeypatch.setattr("qmoe.loading.config.is_compressed_tensors_available", lambda: False)
        form = "compressed-tensors"
    expected = saved("qwen3_moe", "int8", form, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config["paging"] = PagingOptions(smallest_budget(tmp_path), CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, device_map="cpu")
    assert is_paged(model) and torch.equal(logits(model), expected)
    assert "paging" not in json.dumps(model.config.to_dict())
    with pytest.raises(ValueError, match=r"device_map=.*one device"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, config=config, device_map={"model": "cpu", "lm_head": "disk"}
        )


def test_from_pretrained_takes_the_budget_as_an_argument(tmp_path) -> None:
    expected = saved("qwen3_moe", "int8", "qmoe", tmp_path)
    paging = PagingOptions(smallest_budget(tmp_path), CONTEXT)
    asked = qmoe.QmoeConfig(paging=paging, activations="bf16")
    with pytest.warns(UserWarning, match="loading attributes"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=asked, device_map="cpu"
        )
    assert is_paged(model)
    assert {m.activations for m in quantized_modules(model).values()} == {"bf16"}
    assert expected.shape == logits(model).shape


def test_a_16_bit_checkpoint_is_quantized_and_paged(tmp_path) -> None:
    build("qwen3_moe", NUM_EXPERTS).save_pretrained(tmp_path)
    expected = logits(qmoe.patch(build("qwen3_moe", NUM_EXPERTS), "fp8"))
    budget = smallest_budget(tmp_path, weights="fp8")
    for model in (
        load(tmp_path, budget, weights="fp8"),
        AutoModelForCausalLM.from_pretrained(
            tmp_path,
            quantization_config=qmoe.QmoeConfig("fp8", paging=PagingOptions(budget, CONTEXT)),
            device_map="cpu",
        ),
        qmoe.patch(
            build("qwen3_moe", NUM_EXPERTS), "fp8", hbm_budget=budget, device="cpu", context=CONTEXT
        ),
    ):
        assert is_paged(model) and torch.equal(logits(model), expected)
    resident = qmoe.patch(build("qwen3_moe", NUM_EXPERTS), "fp8", hbm_budget="90%", device="cpu")
    assert not is_paged(resident) and torch.equal(logits(resident), expected)
    with pytest.raises(ValueError, match="add weights='int8'"):
        load(tmp_path, budget)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["qmoe", "compressed-tensors"])
def test_a_paged_model_is_saved_as_it_was_loaded(family, form, tmp_path) -> None:
    if family == "gpt_oss" and form == "compressed-tensors":
        pytest.skip("the Hub stores its experts fused")
    saved(family, "int8", form, tmp_path / "first")
    model = load(tmp_path / "first", smallest_budget(tmp_path / "first"))
    assert is_paged(model)
    model.save_pretrained(tmp_path / "again")
    before = load_file(tmp_path / "first" / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "paging" not in config["quantization_config"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_a_paged_model_can_be_unpatched(tmp_path) -> None:
    saved("qwen3_moe", "int8", "qmoe", tmp_path)
    expected = logits(qmoe.unpatch(AutoModelForCausalLM.from_pretrained(tmp_path)))
    model = load(tmp_path, smallest_budget(tmp_path))
    assert is_paged(model)
    qmoe.unpatch(model)
    assert not quantized_modules(model) and not hasattr(model, "qmoe_paging")
    assert torch.equal(logits(model), expected)


def test_a_refused_budget_leaves_the_model_as_it_was() -> None:
    model = build("qwen3_moe", NUM_EXPERTS)
    expected = logits(model)
    with pytest.raises(ValueError, match="smallest that works"):
        qmoe.patch(model, hbm_budget="1KiB", device="cpu", context=CONTEXT)
    assert not quantized_modules(model) and torch.equal(logits(model), expected)


def test_too_little_host_memory_is_said_before_anything_is_read(tmp_path, monkeypatch) -> None:
    expected = saved("qwen3_moe", "int8", "qmoe", tmp_path)
    budget = smallest_budget(tmp_path)
    monkeypatch.setenv(host_store.AVAILABLE_VARIABLE, "0.00001")
    monkeypatch.setattr(HostStore, "fill", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"pages take 148 kB of host memory, 10\.8 kB are avail"):
        load(tmp_path, budget)
    model = build("qwen3_moe", NUM_EXPERTS)
    with pytest.raises(ValueError, match="host memory"):
        qmoe.patch(model, hbm_budget=budget, device="cpu", context=CONTEXT)
    assert not is_paged(model) and torch.equal(logits(model), expected)  # on the CPU, in 8 bit


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("failure", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_failure_midway_leaves_nothing_behind(failure, weights, tmp_path, monkeypatch) -> None:
    """Out of memory or Ctrl-C where the slots are allocated; the next load works."""
    if weights is None:
        expected = saved("qwen3_moe", "int8", "qmoe", tmp_path)
    else:
        build("qwen3_moe", NUM_EXPERTS).save_pretrained(tmp_path)
        expected = logits(qmoe.patch(build("qwen3_moe", NUM_EXPERTS)))
    budget = smallest_budget(tmp_path, weights=weights)
    stores = []

    class Watched(HostStore):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            stores.append(weakref.ref(self))

    def resize(self, num_slots: int, num_staging: int) -> None:
        raise failure("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("qmoe.paging.model.HostStore", Watched)
        patched.setattr("qmoe.paging.expert_cache.ExpertCache.resize", resize)
        with pytest.raises(failure):
            load(tmp_path, budget, weights=weights)
        model = build("qwen3_moe", NUM_EXPERTS)
        with pytest.raises(failure):
            qmoe.patch(model, hbm_budget=budget, device="cpu", context=CONTEXT)
        assert not is_paged(model)
        assert torch.equal(logits(model), logits(qmoe.patch(build("qwen3_moe", NUM_EXPERTS))))
    gc.collect()
    assert len(stores) == 2 and not any(store() for store in stores)
    assert torch.equal(logits(load(tmp_path, budget, weights=weights)), expected)


@pytest.mark.parametrize("what", ["vanishes", "is truncated"])
@pytest.mark.parametrize("budget", ["smallest", "90%"])
def test_a_shard_that_changes_midway(what, budget, tmp_path, monkeypatch) -> None:
    saved("qwen3_moe", "int8", "qmoe", tmp_path)
    file = tmp_path / "model.safetensors"
    if budget == "smallest":
        budget = smallest_budget(tmp_path)
    content = file.read_bytes()
    fill = HostStore.fill

    def change_then_fill(self, reads, **options) -> None:
        if what == "vanishes":
            file.rename(tmp_path / "elsewhere")
        else:
            os.truncate(file, max(read.file_offset for read in reads) + 7)
        fill(self, reads, **options)

    with monkeypatch.context() as patched:
        patched.setattr(HostStore, "fill", change_then_fill)
        with pytest.raises(ValueError, match=r"model\.safetensors: (vanished|changed) while"):
            load(tmp_path, budget)
    file.write_bytes(content)
    load(tmp_path, budget)


@pytest.mark.parametrize("form", ["qmoe", "compressed-tensors"])
@pytest.mark.parametrize("budget", ["smallest", "1GB", None])
def test_a_folder_that_is_replaced_midway(budget, form, tmp_path, monkeypatch) -> None:
    """Another conversion of the same model, with other numbers in other places."""
    folder, other = tmp_path / "model", tmp_path / "other"
    saved("qwen3_moe", "int8", form, folder)
    shutil.copytree(folder, other)
    tensors = {name: t.flip(0) for name, t in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    if budget == "smallest":
        budget = smallest_budget(folder)
    read_headers = ExpertsQuantizer._headers_of

    def read_then_replace(self, files) -> dict[str, StoredTensor]:
        headers = read_headers(self, files)
        folder.rename(tmp_path / "old")
        other.rename(folder)
        return headers

    monkeypatch.setattr(ExpertsQuantizer, "_headers_of", read_then_replace)
    options = {} if budget is None else {"hbm_budget": budget, "context": CONTEXT}
    with pytest.raises(ValueError, match=r"model\.safetensors: changed while it was read"):
        qmoe.load(folder, device="cpu", **options)


@pytest.mark.parametrize("form", ["qmoe", "compressed-tensors"])
@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_weights_of_another_form_are_refused(form, change, tmp_path) -> None:
    saved("qwen3_moe", "int8", form, tmp_path)
    budget = smallest_budget(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_q"
    if form == "compressed-tensors":
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensor = tensors[name]
    tensors[name] = tensor[..., ::2].contiguous() if change == "shape" else tensor.float()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, ImportError), match=r"layers\.1\.mlp\.experts"):
        load(tmp_path, budget)


def test_a_dense_checkpoint_has_nothing_to_page(tmp_path) -> None:
    build("qwen3_moe", NUM_EXPERTS).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = compressed_tensors_config("int8", ["lm_head"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="this checkpoint has none"):
        load(tmp_path, "90%")


def test_tensors_one_behind_the_other_fill_pages(tmp_path) -> None:
    """Pieces need not end where an expert does."""
    pages = LayerPages("layer", 3, torch.int8, (4, 6), (6, 2))
    content = bytes(range(3 * 24 + 3 * 12))
    (tmp_path / "shard").write_bytes(content)

    def stored(start: int, stop: int) -> StoredTensor:
        return StoredTensor("t", tmp_path / "shard", "I8", (stop - start,), start, stop - start)

    store = HostStore([pages], pin=False)
    gate_up = [stored(0, 10), stored(10, 11), stored(11, 72)]
    store.fill(page_reads(0, pages, gate_up, [stored(72, 108)]))
    first, second = store.weights(0)
    expected = torch.tensor(list(content), dtype=torch.uint8).view(torch.int8)
    assert torch.equal(first, expected[:72].view(3, 4, 6))
    assert torch.equal(second, expected[72:].view(3, 6, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["qmoe", "compressed-tensors", "16 bit"])
def test_on_the_gpu(form, tmp_path, monkeypatch) -> None:
    """Pinned pages, the same bits as a resident model's; a failure leaves no memory behind."""
    options = {"device": "cuda", "dtype": "bfloat16"}
    if form == "16 bit":
        build("qwen3_moe", NUM_EXPERTS).save_pretrained(tmp_path)
        options["weights"] = "int8"
    else:
        saved("qwen3_moe", "int8", form, tmp_path)
    expected = logits(qmoe.load(tmp_path, **options))
    budget = smallest_budget(tmp_path, **options)
    model = load(tmp_path, budget, **options)
    host = model.qmoe_paging.cache.host
    assert is_paged(model) and torch.equal(logits(model), expected)
    assert {tensor.device.type for tensor in model.state_dict().values()} >= {"cuda"}
    assert host.pages(0).is_pinned() and host.pages(1).is_pinned()
    del model, host

    def resize(self, num_slots: int, num_staging: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    gc.collect()
    before = torch.cuda.memory_allocated()
    with monkeypatch.context() as patched:
        patched.setattr("qmoe.paging.expert_cache.ExpertCache.resize", resize)
        with pytest.raises(torch.OutOfMemoryError):
            load(tmp_path, budget, **options)
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(logits(load(tmp_path, budget, **options)), expected)


PEAK = """
import os, sys, threading, time, torch
torch.set_num_threads(1)
import transformers
from qmoe import load
from transformers import AutoModelForCausalLM

def anonymous():  # what a process has written to, beside file pages that can be dropped
    with open("/proc/self/statm") as statm:
        resident, shared = map(int, statm.read().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGESIZE")

before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
model = load(sys.argv[1], device="cpu", **eval(sys.argv[2]))
done = True
watcher.join()
if getattr(model, "qmoe_paging", None) is None:
    print(peak - before, 0, sum(p.nbytes for p in model.parameters()))
else:
    print(peak - before, model.qmoe_paging.cache.host.num_bytes, model.qmoe_paging.budget.total)
"""


def memory_of_loading(folder: Path, **options) -> list[int]:
    """What a process grows by at most, its pages, and its (simulated) device; in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), repr(options)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return [int(number) for number in done.stdout.split()]


def save_large(folder: Path, form: str = "16 bit", num_layers: int = 4) -> None:
    """A Qwen3-MoE whose layers' experts take 151 MB each in 16 bit."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(hidden_size=1024, moe_intermediate_size=768, num_experts=32, vocab_size=256)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts_per_tok=2)
    config = Qwen3MoeConfig(**sizes, **heads, num_hidden_layers=num_layers)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    if form == "compressed-tensors":
        compressed_tensors_checkpoint(model, folder, "int8")
    else:
        (model if form == "16 bit" else qmoe.patch(model)).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize("form", ["qmoe", "compressed-tensors"])
def test_no_second_copy_in_memory(form, tmp_path) -> None:
    """The peak of a load is the pages, the simulated device, and little else."""
    save_large(tmp_path, form)
    budget = smallest_budget(tmp_path)
    grown, pages, device = memory_of_loading(tmp_path, hbm_budget=budget, context=64)
    assert pages > 280 << 20
    assert grown < pages + device + (64 << 20)
