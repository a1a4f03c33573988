"""The training example: a few steps on part of the standard library, then what it saved."""

import importlib.util
import json
import math
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_tiny_moe.py"
STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small only lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_tiny_moe", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by its name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A small standard library: enough packages for each part of the split to have files."""
    root = tmp_path_factory.mktemp("stdlib")
    ignore = shutil.ignore_patterns("__pycache__", "test", "tests")
    for name in ("concurrent", "html", "json"):
        shutil.copytree(STDLIB / name, root / name, ignore=ignore)
    for path in STDLIB.glob("[bc]*.py"):
        shutil.copy(path, root)
    return root


@pytest.fixture(scope="module")
def arguments(sources):
    shape = "--vocab-size 320 --hidden-size 32 --num-layers 2 --num-heads 2 --num-kv-heads 1"
    rest = "--head-dim 16 --intermediate-size 16 --context 64 --batch-size 8 --device cpu"
    return [*shape.split(), *rest.split(), "--sources", str(sources)]


@pytest.fixture(scope="module")
def trained(example, arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "tiny-moe"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "HELDOUT_MAX_BYTES", 12_000)
        example.main([*arguments, "--out", str(out), "--steps", "30", "--evaluations", "2"])
    return out


def test_writes_a_checkpoint_in_the_hubs_layout(trained):
    assert sorted(path.name for path in trained.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "heldout.txt",
        "metrics.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with safe_open(trained / "model.safetensors", "pt") as shard:
        shapes = {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118
        dtypes = {shard.get_slice(name).get_dtype() for name in shapes}
    assert dtypes == {"BF16"}
    for layer in range(2):
        for expert in range(16):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            assert shapes[f"{prefix}.gate_proj.weight"] == [16, 32]
            assert shapes[f"{prefix}.up_proj.weight"] == [16, 32]
            assert shapes[f"{prefix}.down_proj.weight"] == [32, 16]


def test_learns_and_reports_what_it_measured(trained, example):
    metrics = json.loads((trained / "metrics.json").read_text())
    curve = metrics["training"]["curve"]
    assert curve[0]["validation_loss"] < math.log(320)
    assert metrics["training"]["best_validation_loss"] < curve[0]["validation_loss"]
    heldout = metrics["heldout"]
    assert 1 < heldout["perplexity_float32"] < 320
    # The tokens counted here come from the saved files, as a test elsewhere would read them.
    text = (trained / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    again = example.measure_perplexity(trained, tokenizer, text, 64, torch.device("cpu"))
    assert again == heldout
    assert f"{heldout['perplexity_bfloat16']:.3f}" in (trained / "README.md").read_text()
    for layer in metrics["routing"]:
        assert sum(layer["usage"]) == pytest.approx(1, abs=1e-3)
        assert layer["reuse_by_chance"] >= 2 / 16 - 1e-3  # the least there can be


def test_loads_and_generates(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    text = "def f(x):\n\treturn {'é': x}  # ∑ don't .\n"
    ids = tokenizer(text).input_ids
    assert ids == Tokenizer.from_file(str(trained / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode(ids) == text
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.dtype == torch.bfloat16
    inputs = tokenizer("def ", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert output.shape[1] == inputs.input_ids.shape[1] + 4


def test_heldout_text_is_not_trained_on(example, sources):
    splits = example.split_sources(sources)
    paths = [set(split.paths) for split in splits.values()]
    assert all(paths)
    assert not (paths[0] & paths[1] or paths[0] & paths[2] or paths[1] & paths[2])
    assert set(example.heldout_excerpt(splits["heldout"]).paths) <= paths[2]


def test_dense_experts_equal_the_sparse_ones(example):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=24, moe_intermediate_size=16, num_experts=5)
    config._experts_implementation = "eager"
    experts = Qwen3MoeExperts(config).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    hidden_states = torch.randn(7, 24, dtype=torch.double, requires_grad=True)
    top_k_weights, top_k_index = torch.rand(7, 5, dtype=torch.double).topk(2)
    top_k_weights.requires_grad_()
    inputs = [hidden_states, top_k_weights, *experts.parameters()]
    expected = experts(hidden_states, top_k_index, top_k_weights)
    actual = example.dense_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--sources", "/nonexistent"], "no Python sources"),
        (["--out", "."], "exists: remove it"),
        (["--hidden-size", "4096"], "over the 8 MB"),
        (["--vocab-size", "100"], "vocabulary"),
        (["--batch-size", "100000"], "do not fill a batch"),
    ],
)
def test_refuses_in_one_line(example, arguments, tmp_path, extra, message):
    with pytest.raises(SystemExit, match=message) as error:
        example.main([*arguments, "--out", str(tmp_path / "out"), "--steps", "1", *extra])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
