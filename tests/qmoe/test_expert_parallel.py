"""Experts spread over ranks: processes with gloo on the CPU, compared with one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import families
import pytest
import ranks
import torch
import torch.distributed as dist
import zoo
from safetensors import safe_open
from transformers import AutoModelForCausalLM, StoppingCriteriaList
from transformers.distributed import DistributedConfig

import qmoe
from qmoe.agreement import Agreement, Strikes
from qmoe.cli.main import main
from qmoe.decoding.step import step_of
from qmoe.experts.quantized import QuantizedExperts, group_of, quantized_modules
from qmoe.loading import shares
from qmoe.paging.host_store import HostStore
from qmoe.parallel import failure
from qmoe.parallel.group import _closer, _end_closing, rank_group
from qmoe.parallel.share import ranges, share_of
from qmoe.parallel.texts import OwnTexts
from qmoe.text import Text
from qmoe_convert.convert import convert
from qmoe_kernels.fused_moe import EIGHT_BIT_ROWS

# Stored expert by expert, and fused with biases; with dense layers; with shared experts. The number
# of experts is 32, 4, 4, 8 and 8: three ranks divide none of them.
NAMES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"]
TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
ON_CPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a distributed_config takes the GPUs, and more than one"
)
TOKENS = torch.arange(1, 19).view(2, 9)
BEFORE_EP_SIZE = not hasattr(DistributedConfig, "ep_size")  # before transformers 5.19
PROMPTS = ["def close(self):", "import os"]
LENGTH = 12


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A converted checkpoint of each family, in fp32, INT8."""
    folder = tmp_path_factory.mktemp("spread")
    found = {}
    for name in NAMES:
        model = qmoe.unpatch(families.build(name))
        model.save_pretrained(folder / name / "source")
        convert(folder / name / "source", folder / name / "int8", weights="int8")
        found[name] = folder / name / "int8"
    return found


def load(path: Path, **options: Any) -> Any:
    return qmoe.load(path, device="cpu", **options)


def spread(path: Path, **options: Any) -> Any:
    return load(path, expert_parallel=True, **options)


def spread_by_transformers(path: Path, **options: Any) -> Any:
    """As `spread`, the way that the installed transformers spells it."""
    size = int(os.environ["WORLD_SIZE"])
    config = DistributedConfig(**{**spelling(size), **options.pop("asked", {})})
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=config, **options)


def spelling(size: int) -> dict[str, Any]:
    if BEFORE_EP_SIZE:
        return {"tp_size": size, "enable_expert_parallel": True}
    return {"tp_size": size, "ep_size": size, "tp_plan": {}}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


def generate(model: Any, tokenizer: Any, **options: Any) -> list[list[int]]:
    """Tokens of a text, as the texts are of a tokenizer of bytes."""
    tokens: dict[int, list[int]] = {}

    def note(index: int, so_far: Any) -> bool:
        tokens[index] = list(so_far)
        return False

    options = {"max_new_tokens": LENGTH, "until": note, **options}
    result = qmoe.generate(model, tokenizer, options.pop("prompts", PROMPTS), **options)
    return [tokens[i] for i in sorted(tokens)] if options["until"] is note else result.new_tokens


def outputs(path: Path, tokenizer: Any, **options: Any) -> tuple[Any, ...]:
    model = load(path, **options)
    held = [experts.layout.num_experts for experts in quantized_modules(model).values()]
    return (
        held,
        logits(model),
        generate(model, tokenizer),
        generate(model, tokenizer, do_sample=True, temperature=1.5, seed=3),
    )


def outputs_of_all(rank: int, paths: dict[str, Path], tokenizer: Any) -> dict[str, Any]:
    return {name: outputs(path, tokenizer, expert_parallel=True) for name, path in paths.items()}


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, Path], tokenizer: Any) -> dict[str, Any]:
    """What one process computes with all experts."""
    return {name: outputs(path, tokenizer) for name, path in checkpoints.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_whole_models_compute_what_one_process_does(size, checkpoints, tokenizer, alone) -> None:
    results = ranks.run(size, outputs_of_all, checkpoints, tokenizer)
    for name, (whole, expected, greedy, sampled) in alone.items():
        for rank, result in enumerate(results):
            held, actual, its_greedy, its_sampled = result[name]
            assert held == [ranges(n, size)[rank][1] for n in whole], name
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            assert (its_greedy, its_sampled) == (greedy, sampled), name
            assert torch.equal(actual, results[0][name][1]), "the ranks differ in bits"


# ---- what is read ------------------------------------------------------------------------------


@contextmanager
def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Bytes that are read: by transformers of which tensors, and by us."""
    read: Counter[str] = Counter()

    class Slice:
        def __init__(self, name: str, inner: Any) -> None:
            self.name, self.inner = name, inner

        def __getitem__(self, index: Any) -> torch.Tensor:
            tensor = self.inner[index]
            read[self.name] += tensor.nbytes
            return tensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = safe_open(*args, **kwargs)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.inner.get_slice(name))

        def get_tensor(self, name: str) -> torch.Tensor:
            return self.get_slice(name)[...]

        def __enter__(self) -> File:
            return self

        def __exit__(self, *exception: Any) -> None:
            self.inner.__exit__(*exception)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    fill, part = HostStore.fill, shares._read

    def counted_fill(self: HostStore, reads: Any, **options: Any) -> None:
        read["pages"] += sum(one.nbytes for one in reads)
        fill(self, reads, **options)

    def counted_part(tensor: Any, start: int, stop: int) -> torch.Tensor:
        read["shares"] += (stop - start) * tensor.torch_dtype.itemsize
        return part(tensor, start, stop)

    with monkeypatch.context() as patched:
        patched.setattr("transformers.modeling_utils.safe_open", File)
        patched.setattr(HostStore, "fill", counted_fill)
        patched.setattr(shares, "_read", counted_part)
        yield read


def bytes_read(rank: int, how: Any, paths: dict[str, Path], monkeypatch: Any) -> dict[str, Any]:
    found = {}
    for name, path in paths.items():
        with counted_reads(monkeypatch) as read:
            model = how(path)
        own = sum(e.num_bytes for e in quantized_modules(model).values())
        biases = sum(
            getattr(e, bias).nbytes
            for e in quantized_modules(model).values()
            for bias in e.layout.biases
        )
        held = {id(p) for e in quantized_modules(model).values() for p in e.parameters()}
        rest = sum(p.nbytes for p in model.parameters() if id(p) not in held)
        found[name] = dict(read), own + biases, rest
    return found


@pytest.mark.parametrize("how", [spread, pytest.param(spread_by_transformers, marks=ON_CPU)])
def test_a_rank_reads_its_own_experts_and_no_others(how, checkpoints, monkeypatch) -> None:
    both = {name: checkpoints[name] for name in ("qwen3_moe", "gpt_oss")}
    results = ranks.run(3, bytes_read, how, both, monkeypatch)
    for name, path in both.items():
        sizes = {}
        for file in path.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                sizes |= {key: tensors.get_tensor(key).nbytes for key in tensors.keys()}  # noqa: SIM118
        of_experts = sum(size for key, size in sizes.items() if "experts" in key)
        assert sum(result[name][1] for result in results) == of_experts, "all of them are somewhere"
        for result in results:
            read, own, rest = result[name]
            assert read.pop("pages") + read.pop("shares") == own
            assert not [key for key in read if "experts" in key]
            assert sum(read.values()) == rest == sum(sizes.values()) - of_experts


def test_ranges_cover_all_experts_evenly() -> None:
    for num_experts in range(1, 20):
        for size in range(1, num_experts + 1):
            found = ranges(num_experts, size)
            ids = [first + i for first, count in found for i in range(count)]
            assert ids == list(range(num_experts))
            assert {count for _, count in found} <= {num_experts // size, -(-num_experts // size)}


# ---- layers ------------------------------------------------------------------------------------


def routed_layers(rank: int, path: Path, cases: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A layer's output for ids of several kinds; with one rank, all experts are in one place."""
    model = spread(path) if rank >= 0 else load(path)
    layer = next(iter(quantized_modules(model).values()))
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, ids in cases.items():
        hidden = torch.randn(len(ids), layer.layout.hidden_size, generator=generator)
        weights = torch.rand(ids.shape, generator=generator)
        found[name] = layer(hidden, ids, weights)
    return found


def test_layers_with_ids_of_every_kind(checkpoints) -> None:
    generator = torch.Generator().manual_seed(1)
    cases = {
        "any": torch.rand(17, 32, generator=generator).topk(2).indices,
        "all to the last rank": torch.full((5, 2), 31),
        "one token": torch.tensor([[0, 31]]),
        "no token": torch.empty(0, 2, dtype=torch.int64),
        "sentinels": torch.tensor([[32, 3], [-1, 40], [32, 32]]),
        "int32": torch.tensor([[7, 21]], dtype=torch.int32),
    }
    expected = routed_layers(-1, checkpoints["qwen3_moe"], cases)
    for result in ranks.run(3, routed_layers, checkpoints["qwen3_moe"], cases):
        for name, actual in result.items():
            torch.testing.assert_close(actual, expected[name], rtol=1e-5, atol=1e-5, msg=name)


class Alone:
    """Stands in for the ranks of a group, whose parts are known: no process is started."""

    def __init__(self, rank: int, total: torch.Tensor | None = None) -> None:
        self.rank, self.size, self.own_texts, self.total = rank, 3, None, total

    def check_rows(self, rows: torch.Tensor) -> None:
        pass

    def sum(self, output: torch.Tensor) -> torch.Tensor:
        return output if self.total is None else self.total


@pytest.mark.parametrize("experts_class", zoo.experts_classes(), ids=str)
def test_every_experts_class_is_the_sum_of_its_shares(experts_class) -> None:
    source = experts_class.build()
    whole = QuantizedExperts.quantized_from(source, "int8")
    layout = whole.layout
    num_ids = layout.num_experts + layout.num_identity_experts
    hidden, ids, weights = zoo.routing(17, num_ids)
    parts = []
    for rank in (0, 1, 2, 0):
        group = Alone(rank, sum(parts) if len(parts) == 3 else None)
        share = share_of(group, layout.num_experts, "experts")
        experts = QuantizedExperts(source, "int8", share=share)
        held = slice(share.first, share.first + share.count)
        tensors = {name: parameter.data[held] for name, parameter in whole.named_parameters()}
        kept = {name for name in tensors if "." in name}  # a norm's
        pages = [tensors.pop(f"{projection}_q") for projection in layout.projections]
        experts.take_share({name: t for name, t in tensors.items() if name not in kept})
        experts.unpage(*pages)
        with torch.no_grad():
            if len(parts) == 3:  # what is not of experts comes once, on every rank
                expected = whole(hidden, ids, weights)
                torch.testing.assert_close(experts(hidden, ids, weights), expected)
            else:
                parts.append(experts._own_experts(hidden, share.own_ids(ids), weights))


def rounded_once(total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp64 to 16 bits by whole numbers: torch's own way goes over fp32, and rounds twice."""
    kept = {torch.bfloat16: 7, torch.float16: 10}[dtype]
    bits = total.view(torch.int64)
    half = 1 << (51 - kept)
    bits = bits + (half - 1) + ((bits >> (52 - kept)) & 1)
    return (bits & -(half << 1)).view(torch.float64)


class Counted:
    """A rank's connection, and the bytes that it gives to each kind of exchange."""

    def __init__(self, layers: Any) -> None:
        self.layers, self.given = layers, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.layers, name)
        if name not in ("allreduce", "_allgather_base", "_reduce_scatter_base", "alltoall_base"):
            return found

        def exchange(*args: Any) -> Any:
            given = args[0][0] if name == "allreduce" else args[1]
            self.given[name.strip("_")] += given.nbytes
            return found(*args)

        return exchange


def exchanged(rank: int, dtype: torch.dtype) -> Any:
    """What layers exchange, of numbers whose exponents differ by all that matters."""
    group = rank_group(True, torch.device("cpu"))
    generator = torch.Generator().manual_seed(rank)
    exponents = torch.randint(-6, 6, (64 * group.size, 256), generator=generator)
    rows = (torch.randn(exponents.shape, generator=generator) * 2.0**exponents).to(dtype)
    ids = torch.arange(2 * rank).view(rank, 2) + 10 * rank
    with group.together("a test"):
        routed = group.gather(rows[:rank, :3], ids, ids.to(dtype), 2)
        group._groups[1] = counted = Counted(group._groups[1])
        scattered = group.sum_and_scatter(rows.clone())
        total = group.sum(rows.clone())
        counts = dict(counted.given)
        few = group.sum(rows[:1].clone())
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("qmoe.parallel.group._ALL_PARTS", 0)
            large = group.sum(rows.clone())
            uneven = group.sum(rows[:5, :7].clone())
            one = group.sum(rows[:1, :1].clone())
        assert torch.equal(large, total)
        assert torch.equal(few, total[:1])
        assert torch.equal(uneven, total[:5, :7]), "numbers that the ranks do not divide"
        assert torch.equal(one, total[:1, :1]), "fewer numbers than ranks"
        return rows, routed, scattered, total, counts


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_rounded_once(dtype, size) -> None:
    """In the order of ranks, and numbers of 16 bits are all that they exchange."""
    results = ranks.run(size, exchanged, dtype)
    assert not [result for result in results if isinstance(result, ranks.Failure)], results
    rows = [result[0] for result in results]
    in_order = torch.zeros_like(rows[0], dtype=torch.float32)
    for part in rows:
        in_order += part.float()
    exact = torch.stack(rows).double().sum(0)
    assert (rows[0] + rows[1] != rows[0]).double().mean() > 0.5, "both matter"
    if size > 2:
        backwards = torch.zeros_like(in_order)
        for part in reversed(rows):
            backwards += part.float()
        assert not torch.equal(backwards, in_order), "the order matters"
    for rank, (_, routed, scattered, total, counts) in enumerate(results):
        assert torch.equal(scattered, total.chunk(size)[rank])
        assert torch.equal(total, in_order.to(dtype))
        given = rows[0].nbytes
        if size == 2:
            assert torch.equal(total.double(), rounded_once(exact, dtype))
            assert counts == {"reduce_scatter_base": given, "allreduce": given}
        else:
            assert counts == {"alltoall_base": given, "allgather_base": given}
        lengths = [min(2, count) for count in range(size)]
        assert (routed[1] >= 0).sum(1).tolist() == [2 * (i < n) for n in lengths for i in (0, 1)]
        assert routed[2].dtype == torch.float32
        for other, count in enumerate(lengths):
            actual = routed[0].view(size, 2, 3)[other, :count]
            assert torch.equal(actual, rows[other][:count, :3])


def flying(rank: int, path: Path, options: dict[str, Any], counts: list[int]) -> Any:
    """A layer with rows of each rank's own, which fly in 8 bits and then as they are."""
    device = options.get("device", "cpu")
    options = {"activations": options["weights"], **options["load"]}
    model = qmoe.load(path, device=device, expert_parallel=True, **options)
    layer = next(iter(quantized_modules(model).values()))
    group, found = group_of(model), []
    group.peers = None  # over which few rows go, as they are
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(counts[rank], layer.layout.hidden_size, generator=generator)
    hidden = hidden * torch.rand(counts[rank], 1, generator=generator)
    ids = torch.rand(counts[rank], layer.num_experts, generator=generator).topk(2).indices
    ids[:1, 0] = -1
    weights = torch.rand(ids.shape, generator=generator)
    routed = [tensor.to(group.device) for tensor in (hidden, ids, weights)]
    group._groups[1] = counted = Counted(group._groups[1])
    for way in ("8 bits", "as they are"):
        if way != "8 bits":
            layer._flying_format = lambda *_: None
        with group.together("a test"), torch.no_grad():
            group.own_texts = texts = OwnTexts(group, 2, lambda: False)
            texts.rows = max(counts)
            counted.given.clear()
            found.append((layer(*routed).cpu(), counted.given["allgather_base"]))
    return found


@pytest.mark.parametrize("paged", [False, True], ids=["resident", "paged"])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_rows_in_8_bits_give_the_same_bits(name, weights, paged, checkpoints, tmp_path) -> None:
    path = checkpoints[name]
    if weights == "fp8":
        convert(path.parent / "source", tmp_path / "fp8", weights="fp8")
        path = tmp_path / "fp8"
    whole = load(path)
    layer = next(iter(quantized_modules(whole).values()))
    options: dict[str, Any] = {"weights": weights, "load": {}}
    if paged:
        budget = refused(load, path, hbm_budget=1, context=64, batch_size=2)
        budget = int(budget.split(" bytes)")[0].rpartition("(")[2])
        options["load"] = {"hbm_budget": budget, "context": 64, "batch_size": 2}
    # Pairs of eight for each expert, with two for a row, on three ranks.
    enough = -(-EIGHT_BIT_ROWS * layer.num_experts // 6)
    for most, in_8_bits in ((enough, True), (enough - 1, False)):
        results = ranks.run(3, flying, path, options, [most - 2, 0, most])
        for result in results:
            assert not isinstance(result, ranks.Failure), result
            (actual, few_bytes), (expected, many_bytes) = result
            assert torch.equal(actual, expected)
            assert actual.numel() == 0 or actual.abs().max() > 0
            of_ids = 2 * 8
            assert many_bytes == most * (4 * layer.layout.hidden_size + of_ids)
            as_bytes = most * (layer.layout.hidden_size + 4 + of_ids)
            assert few_bytes == (as_bytes if in_8_bits else many_bytes)


# ---- what is refused ---------------------------------------------------------------------------


def refused(function: Any, *args: Any, **options: Any) -> str:
    try:
        function(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def refusals(rank: int, path: Path, folder: Path, tokenizer: Any) -> dict[str, str]:
    model = spread(path)
    ids = torch.tensor([[1, 2, 3]])
    found = {
        "state_dict": refused(model.state_dict),
        "save": refused(model.save_pretrained, folder / "saved"),
        "load_state_dict": refused(model.load_state_dict, {"model.embed_tokens.weight": ids}),
        "unpatch": refused(qmoe.unpatch, model),
        "beams": refused(generate, model, tokenizer, num_beams=2, until=None),
        "decode": refused(model.generate, ids, custom_generate=qmoe.decode, max_new_tokens=2),
        "inside": refused(
            generate,
            model,
            tokenizer,
            stream=lambda *_: generate(model, tokenizer),
        ),
    }
    found["16 bit"] = refused(spread, path.parent / "source")
    found["weights"] = refused(spread, path.parent / "source", weights="int8")
    found["many ranks"] = refused(spread, folder / "two experts")
    return found


def within(rank: int, path: Path) -> Any:
    """A process group of two of three ranks, and a device mesh of all."""
    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (3,), mesh_dim_names=("experts",))
    group = dist.new_group([0, 2])
    found = {"mesh": generate_greedily(spread_over(path, mesh))}
    if rank != 1:
        found["group"] = generate_greedily(spread_over(path, group))
    found["two dimensions"] = refused(
        spread_over, path, dist.device_mesh.init_device_mesh("cpu", (3, 1))
    )
    return found


def spread_over(path: Path, ranks_of_it: Any) -> Any:
    return load(path, expert_parallel=ranks_of_it)


def generate_greedily(model: Any) -> torch.Tensor:
    return model.generate(TOKENS, max_new_tokens=4, do_sample=False)


def test_process_groups_and_device_meshes(checkpoints) -> None:
    expected = generate_greedily(load(checkpoints["qwen3_moe"]))
    for rank, found in enumerate(ranks.run(3, within, checkpoints["qwen3_moe"])):
        assert isinstance(found, dict), found
        assert torch.equal(found["mesh"], expected)
        assert rank == 1 or torch.equal(found["group"], expected)
        assert "device mesh of 2 dimensions" in found["two dimensions"]


def test_what_does_not_combine_is_refused(checkpoints, tokenizer, tmp_path) -> None:
    torch.manual_seed(0)
    two = qmoe.patch(families.FAMILIES["mixtral"].build())
    assert isinstance(next(iter(quantized_modules(two).values())), QuantizedExperts)
    config = two.config
    config.num_local_experts = 2
    small = qmoe.patch(type(two)(config))
    small.save_pretrained(tmp_path / "two experts")
    for found in ranks.run(3, refusals, checkpoints["qwen3_moe"], tmp_path, tokenizer):
        assert isinstance(found, dict), found
        for what, words in {
            "state_dict": "holds only its own experts",
            "save": "each rank holds only its own experts",
            "load_state_dict": "holds only its own experts",
            "unpatch": "without expert_parallel",
            "beams": "beam_search, and experts that are spread over ranks",
            "decode": "call qmoe.generate on each of them",
            "inside": "make one call after the other",
            "16 bit": "not in 8 bit; convert it with convert-checkpoint",
            "weights": "quantizes while it loads; convert it",
            "many ranks": "has 2 experts for 3 ranks; start at most 2",
        }.items():
            assert words in found[what], (what, found[what])
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_without_torchrun(checkpoints, monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        spread(checkpoints["qwen3_moe"])
    with pytest.raises(ValueError, match="expert_parallel=2; give True, a process group"):
        load(checkpoints["qwen3_moe"], expert_parallel=2)


# ---- transformers' own spelling ----------------------------------------------------------------


def loaded_both_ways(rank: int, paths: dict[str, Path], tokenizer: Any) -> dict[str, Any]:
    found = {}
    for name, path in paths.items():
        ours, theirs = spread(path), spread_by_transformers(path)
        whole = logits(theirs)
        found[name] = (
            differences(ours, theirs),
            torch.equal(logits(ours), whole),
            whole,
            generate(theirs, tokenizer),
            generate(theirs, tokenizer, do_sample=True, temperature=1.5, seed=3),
            theirs.generate(TOKENS, max_new_tokens=4, do_sample=False),
        )
    return found


def differences(ours: Any, theirs: Any) -> list[str]:
    """What transformers has left in a model, its modules or its configuration."""
    found = [f"config.{n}" for n in vars(theirs.config).keys() ^ vars(ours.config).keys()]
    for (name, a), (_, b) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        found += [f"{name}.{n}" for n in vars(a).keys() ^ vars(b).keys()]
        found += [f"{name}: {type(b)}" for _ in [0] if type(a) is not type(b)]
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            found += [f"{name}.{kind}" for _ in [0] if len(vars(a)[kind]) != len(vars(b)[kind])]
        for leaf, tensor in (*b._parameters.items(), *b._buffers.items()):
            mine = getattr(a, leaf)
            same = type(tensor) is type(mine) and (tensor is None or torch.equal(tensor, mine))
            found += [f"{name}.{leaf}" for _ in [0] if not same]
    plans = ("_tp_plan", "_ep_plan", "_tp_size", "_device_mesh")
    return found + [n for n in plans if getattr(ours, n) != getattr(theirs, n)]


@ON_CPU
@pytest.mark.parametrize("size", [2, 3])
def test_transformers_own_spelling(size, checkpoints, tokenizer, alone) -> None:
    results = ranks.run(size, loaded_both_ways, checkpoints, tokenizer)
    for name, (_, expected, greedy, sampled) in alone.items():
        tokens = generate_greedily(load(checkpoints[name]))
        for result in results:
            assert isinstance(result, dict), result
            left, same_bits, actual, its_greedy, its_sampled, its_tokens = result[name]
            assert (left, same_bits) == ([], True), name
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            assert (its_greedy, its_sampled) == (greedy, sampled), name
            assert torch.equal(its_tokens, tokens), name


def asked_otherwise(rank: int, path: Path) -> dict[str, str]:
    def ask(**asked: Any) -> str:
        return refused(spread_by_transformers, path, asked=asked)

    found = {}
    if BEFORE_EP_SIZE:
        found["no experts"] = ask(enable_expert_parallel=False)
        found["a plan"] = ask(tp_plan={"model.embed_tokens": "colwise"})
    else:
        found["attention"] = ask(tp_plan=None)
        found["no experts"] = ask(ep_size=1)
        found["a plan"] = ask(ep_plan={"model.layers.*.mlp.experts": "ep_dispatch_experts"})
        found["fsdp"] = ask(tp_size=1, ep_size=1, fsdp_size=2)
        found["erased"] = refused(spread_by_transformers, path, asked={"tp_size": 1, "ep_size": 1})
    if "ep_implementation" in vars(DistributedConfig()):
        found["another way"] = ask(ep_implementation="all_to_all")
    found["16 bit"] = refused(
        spread_by_transformers,
        path.parent / "source",
        quantization_config=qmoe.QmoeConfig("int8"),
    )
    found["after that"] = refused(spread_by_transformers, path)
    old = {"enable_expert_parallel": True} | ({} if BEFORE_EP_SIZE else {"ep_size": None})
    found["the old spelling"] = ask(**old, tp_plan=None)
    return found


@ON_CPU
def test_what_transformers_may_ask_otherwise(checkpoints) -> None:
    for found in ranks.run(2, asked_otherwise, checkpoints["qwen3_moe"]):
        assert isinstance(found, dict), found
        asks = ", ".join(f"{name}={value!r}" for name, value in spelling(2).items())
        for what, words in {
            "attention": "distributed_config with tp_plan=None: ",
            "no experts": "=False: " if BEFORE_EP_SIZE else "distributed_config with ep_size=1: ",
            "a plan": "tp_plan={" if BEFORE_EP_SIZE else "distributed_config with ep_plan={",
            "fsdp": "distributed_config with tp_size=1, fsdp_size=2, ep_size=1: ",
            "erased": "distributed_config with tp_size=1, ep_size=1: ",
            "another way": "distributed_config with ep_implementation='all_to_all': ",
        }.items():
            if what in found:
                assert words in found[what], (what, found[what])
                assert f"DistributedConfig({asks}), or call qmoe.load" in found[what]
        assert "this quantizes while it loads; convert it" in found["16 bit"]
        assert found["after that"] == found["the old spelling"] == "nothing was refused"


def paged_by_transformers(rank: int, path: Path, tokenizer: Any) -> Any:
    """The configuration as a dictionary, and with each rank's own budget."""
    found = refused(spread, path, hbm_budget=1, context=64, batch_size=2)
    smallest = int(found.split(" bytes)")[0].rpartition("(")[2])
    paging = qmoe.PagingOptions(hbm_budget=smallest, context=64, batch_size=2)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        distributed_config=spelling(2),
        quantization_config=qmoe.QmoeConfig(paging=paging),
    )
    dist.destroy_process_group()  # that transformers has started; the model has its own
    return model.qmoe_paging.budget.num_slots, generate(model, tokenizer), logits(model)


@ON_CPU
def test_transformers_own_spelling_with_paging(checkpoints, tokenizer, alone) -> None:
    whole, expected, greedy, _ = alone["gpt_oss"]  # whose format is ours: only that takes a budget
    for found in ranks.run(2, paged_by_transformers, checkpoints["gpt_oss"], tokenizer):
        assert isinstance(found, tuple), found
        num_slots, tokens, actual = found
        assert num_slots < sum(whole) and tokens == greedy
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def fails_while_loading(rank: int, path: Path, where: str, monkeypatch: Any) -> Any:
    """One rank fails, in transformers or in what we do; it goes on to live."""
    if rank == 1:
        if where == "transformers":
            target = "transformers.PreTrainedModel._load_pretrained_model"
        else:
            target = "qmoe.loading.quantizer.load_shares"
        monkeypatch.setattr(target, fail)
    return refused(spread_by_transformers, path)


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError("no such disk")


@ON_CPU
@pytest.mark.parametrize("where", ["transformers", "qmoe"])
def test_a_rank_that_cannot_load_ends_all(where, checkpoints, monkeypatch) -> None:
    path = checkpoints["qwen3_moe"]
    first, second = ranks.run(2, fails_while_loading, path, where, monkeypatch)
    assert second == "OSError: no such disk"
    reason = "RuntimeError: loading ended early" if where == "transformers" else second
    assert f"rank 1 failed: {reason}" in first


def loads_once_more(rank: int, path: Path) -> Any:
    """The last rank refuses its own arguments, before it meets the others."""
    spread(path)
    return refused(spread, path, activations="int9" if rank == 2 else "auto")


def test_a_rank_that_does_not_come_is_named(checkpoints, monkeypatch) -> None:
    monkeypatch.setenv("QMOE_RANK_TIMEOUT", "2")
    *others, last = ranks.run(3, loads_once_more, checkpoints["qwen3_moe"])
    assert last.startswith("ValueError: unknown activations 'int9'")
    for found in others:
        assert found.startswith("RankFailed: rank 2 did not begin to load within 2 s; every rank")


# ---- one end for all ---------------------------------------------------------------------------


def ends(rank: int, path: Path, tokenizer: Any) -> dict[str, Any]:
    model = spread(path)
    found: dict[str, Any] = {}

    def until(index: int, tokens: Any) -> bool:
        return index == 0 and len(tokens) == 4

    found["until"] = generate(model, tokenizer, until=until if rank == 1 else None)
    plain = qmoe.generate(model, tokenizer, PROMPTS, max_new_tokens=LENGTH)
    stop = plain.texts[0][3:6]
    found["stop"] = qmoe.generate(
        model, tokenizer, PROMPTS[:1], max_new_tokens=LENGTH, stop_strings=[stop]
    ).new_tokens
    torch.manual_seed(rank)
    found["drawn"] = generate(model, tokenizer, do_sample=True)
    pieces: list[str] = []
    options = {"stream": lambda index, piece: pieces.append(piece)} if rank == 0 else {}
    found["stream"] = generate(model, tokenizer, **options)
    # One rank's prompts are too many; then none begins, and the next call works.
    many = ["x"] if rank == 1 else PROMPTS
    found["other prompts"] = refused(generate, model, tokenizer, prompts=many)
    return found


def test_ends_and_draws_are_the_same(checkpoints, tokenizer) -> None:
    results = ranks.run(2, ends, checkpoints["qwen3_moe"], tokenizer)
    for found in results:
        assert isinstance(found, dict), found
        assert found["until"] == [4, LENGTH]
        assert found["stop"][0] < LENGTH
        assert found["drawn"] == results[0]["drawn"]
        assert found["stream"] == results[0]["stream"]
        assert "from other prompts or options" in found["other prompts"]


def decoded(rank: int, path: Path, listener: int | None = None) -> Any:
    """qmoe's own loop, which is for GPUs but runs anywhere: a token ahead of what is agreed on."""
    model = spread(path)
    if rank == listener:
        model.register_forward_hook(lambda *_: None)
    group = group_of(model)
    with group.together("a test"):
        agreement = Agreement(group, Strikes())
        agreement.watch([Text(None, [], [], None) for _ in TOKENS], None)
        return model.generate(
            TOKENS,
            attention_mask=torch.ones_like(TOKENS),
            custom_generate=qmoe.decode,
            stopping_criteria=StoppingCriteriaList([agreement]),
            max_new_tokens=LENGTH,
            do_sample=False,
        )


def test_our_own_loop_gives_the_same_tokens(checkpoints) -> None:
    for name in ("qwen3_moe", "gpt_oss"):
        model = load(checkpoints[name])
        expected = model.generate(
            TOKENS,
            attention_mask=torch.ones_like(TOKENS),
            custom_generate=qmoe.decode,
            max_new_tokens=LENGTH,
            do_sample=False,
        )
        for actual in ranks.run(2, decoded, checkpoints[name]):
            assert torch.equal(actual, expected), actual
    for found in ranks.run(2, decoded, checkpoints["qwen3_moe"], 1):
        assert "register the same hooks on every rank" in found.text


def interrupted(rank: int, path: Path, tokenizer: Any) -> Any:
    """A rank is interrupted at its third token, once; all give out the same, and can go on."""
    model = spread(path)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def strike(index: int, tokens: Any) -> bool:
        if rank == 1 and len(tokens) == 3 and index == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    try:
        generate(model, tokenizer, until=strike)
    except qmoe.GenerationInterrupted as error:
        result = error.result.new_tokens, error.result.texts, str(error.__context__)
    # A prompt that only one rank cannot take: nobody begins, and the ranks stay a group.
    prompts = [[10**6]] if rank == 0 else PROMPTS
    not_begun = refused(generate, model, tokenizer, prompts=prompts)
    return result, not_begun, generate(model, tokenizer)


def test_an_interrupt_of_one_rank_stops_all_at_one_token(checkpoints, tokenizer, alone) -> None:
    first, second = ranks.run(2, interrupted, checkpoints["qwen3_moe"], tokenizer)
    assert first[0][:2] == second[0][:2]
    assert first[0][0] == [3, 3]
    assert "rank 1 was interrupted" in first[0][2]
    assert "tokenizer of another model" in first[1]
    assert first[1].startswith("ValueError: prompt 0") and "rank 0 failed" in second[1]
    assert first[2] == second[2] == alone["qwen3_moe"][2]


def fails(rank: int, path: Path, tokenizer: Any, how: str, who: int = 1) -> Any:
    """A rank fails in the middle of a text; what the others say, and how long it took them."""
    model = spread(path)
    layer = list(quantized_modules(model).values())[1]
    seen = []

    def fail(*_: Any) -> None:
        seen.append(0)
        if rank == who and len(seen) == 3:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the disk is gone")

    layer.register_forward_pre_hook(fail)
    started = time.monotonic()
    first = refused(generate, model, tokenizer)
    return first, time.monotonic() - started, refused(generate, model, tokenizer)


def test_an_error_of_one_rank_ends_all(checkpoints, tokenizer) -> None:
    zero, one, two = ranks.run(3, fails, checkpoints["qwen3_moe"], tokenizer, "raises")
    assert one[0] == "OSError: the disk is gone"
    for found in (zero, two):
        assert found[0] == "RankFailed: rank 1 failed: OSError: the disk is gone"
        assert found[1] < 10
    for found in (zero, one, two):
        assert "the ranks have ended (qmoe.generate: " in found[2]


def test_a_killed_rank_ends_the_others(checkpoints, tokenizer) -> None:
    zero, one, two = ranks.run(3, fails, checkpoints["qwen3_moe"], tokenizer, "killed")
    assert one is None
    for found in (zero, two):
        assert "RankFailed: rank 1 does not answer any more" in found[0]
        assert found[1] < 10
    # Rank 0 keeps what the others would look up.
    zero, one = ranks.run(2, fails, checkpoints["qwen3_moe"], tokenizer, "killed", 0)
    assert zero is None
    assert "RankFailed: rank 0 does not answer" in one[0] or "store is gone" in one[0]
    assert one[1] < 10


def differ(rank: int, path: Path, other: Path) -> Any:
    return refused(spread, path if rank else other)


def test_ranks_that_load_different_models_say_so(checkpoints, tmp_path) -> None:
    paths = checkpoints["qwen3_moe"], checkpoints["deepseek_v3"]
    for found in ranks.run(2, differ, *paths):
        assert "RankFailed: the ranks differ in model" in found
    broken = tmp_path / "broken"
    shutil.copytree(paths[0], broken)
    next(broken.glob("*.safetensors")).unlink()
    whole, failed = ranks.run(2, differ, broken, paths[0])
    assert "RankFailed: rank 1 failed" in whole
    assert failed.startswith(("ValueError", "CheckpointError"))


def changed(rank: int, path: Path, tokenizer: Any, how: str, own: bool) -> Any:
    """One rank's model is cast, or gets an adapter, after all have loaded the same."""
    model = spread(path)
    if how == "to":
        model.to(torch.bfloat16 if rank else torch.float16)  # as many bytes
    elif rank:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    return refused(generate, model, tokenizer, own_texts=own)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("how", ["to", "adapter"])
def test_a_model_that_one_rank_has_changed_is_refused(how, own, checkpoints, tokenizer) -> None:
    if how == "adapter":
        pytest.importorskip("peft")
    for found in ranks.run(2, changed, checkpoints["qwen3_moe"], tokenizer, how, own):
        assert "RankFailed: the ranks' models differ beside their experts: rank 0 has" in found


class Store(dict):
    """What `Notes` needs of a store of torch.distributed."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def get(self, key: str) -> bytes:
        return self[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


@pytest.mark.parametrize("how", ["no pulse", "a note"])
def test_a_watch_ends_what_waits_for_a_rank_that_is_gone(how, monkeypatch) -> None:
    monkeypatch.setattr(failure, "_PAUSE", 0.01)
    monkeypatch.setattr(failure, "_GRACE", 0.05)
    store, called = Store(), list[Any]()
    mine, other = (failure.Notes(store, rank, 2) for rank in (0, 1))
    watch = failure.Watch(mine, 0.2, lambda: called.append("interrupt"), called.append)
    other.pulse(1)
    watch.start()
    for count in range(2, 12):  # half a second, longer than a watch waits for a pulse
        time.sleep(0.05)
        other.pulse(count)
    assert not called
    if how == "a note":
        other.fail("out of memory")
    end = time.monotonic() + 10
    while len(called) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    watch.stop()
    assert called[0] == "interrupt"
    said = "rank 1 failed: out of memory" if how == "a note" else "rank 1 does not answer any more"
    assert said in str(called[1])


# ---- texts of a rank's own ---------------------------------------------------------------------

OWN = [["def close(self):", "x"], [], ["import os and so on, a longer prompt"]]
LENGTHS = [LENGTH, LENGTH, 4]


def own_texts(rank: int, paths: dict[str, Path], tokenizer: Any) -> dict[str, Any]:
    found = {}
    for name, path in paths.items():
        model = spread(path)
        options = {"prompts": OWN[rank], "max_new_tokens": LENGTHS[rank], "own_texts": True}
        first = generate(model, tokenizer, **options)
        sampled = generate(model, tokenizer, do_sample=True, seed=rank, **options)
        found[name] = first, sampled, generate(model, tokenizer)
    return found


def test_each_rank_has_texts_of_its_own(checkpoints, tokenizer, alone) -> None:
    some = {name: checkpoints[name] for name in ("qwen3_moe", "gpt_oss", "qwen3_next")}
    results = ranks.run(3, own_texts, some, tokenizer)
    for name, path in some.items():
        model = load(path)
        for rank, result in enumerate(results):
            assert not isinstance(result, ranks.Failure), result
            options = {"prompts": OWN[rank], "max_new_tokens": LENGTHS[rank]}
            expected = [], []
            if OWN[rank]:
                expected = (
                    generate(model, tokenizer, **options),
                    generate(model, tokenizer, do_sample=True, seed=rank, **options),
                )
            assert result[name] == (*expected, alone[name][2]), (name, rank)


def heard_texts(rank: int, path: Path, tokenizer: Any) -> Any:
    """One rank listens, which only transformers' loop lets it do: all decode in open rounds."""
    model = spread(path)
    calls = []
    if rank == 2:
        layer = next(iter(quantized_modules(model).values()))
        layer.register_forward_hook(lambda *_: calls.append(0))
    options = {"prompts": OWN[rank], "max_new_tokens": LENGTHS[rank], "own_texts": True}
    return generate(model, tokenizer, **options), len(calls)


@pytest.mark.filterwarnings("ignore:.*decodes by transformers' own loop")
def test_who_listens_hears_every_round(checkpoints, tokenizer) -> None:
    results = ranks.run(3, heard_texts, checkpoints["qwen3_moe"], tokenizer)
    model = load(checkpoints["qwen3_moe"])
    for rank, result in enumerate(results):
        assert not isinstance(result, ranks.Failure), result
        options = {"prompts": OWN[rank], "max_new_tokens": LENGTHS[rank]}
        assert result[0] == (generate(model, tokenizer, **options) if OWN[rank] else [])
    assert results[2][1] == LENGTH, "a pass for each token of the longest text"


def said(rank: int, path: Path, tokenizer: Any) -> Any:
    """What hosts say while ranks decode in steps, and what the others queue for it."""
    model = spread(path)
    group = group_of(model)
    heard, exchange = [], type(group).exchange

    def note(self: Any, what: str, **words: Any) -> Any:
        heard.append(what.partition(" of ")[0])
        return exchange(self, what, **words)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(group), "exchange", note)
        options = {"prompts": OWN[rank], "max_new_tokens": LENGTHS[rank], "own_texts": True}
        generate(model, tokenizer, **options)
    return heard[1:]


def test_steps_are_agreed_on_once(checkpoints, tokenizer) -> None:
    reading = ["how texts are decoded", "a forward pass", "a forward pass"]
    steps = [f"step {i}" for i in range(1, LENGTH + 1)]
    for heard in ranks.run(3, said, checkpoints["qwen3_moe"], tokenizer):
        assert heard == [*reading, *steps]


def test_graphs_are_of_one_exchange(checkpoints) -> None:
    """A kept step is captured again where ranks exchange other rows than in its graph."""
    step = step_of(load(checkpoints["qwen3_moe"]), 2, 32)
    pools = []
    for round_rows in (None, 8, 8, 16, None):
        step.serve(round_rows)
        pools.append(step.pool)
    assert [a is b for a, b in pairwise(pools)] == [False, True, False, False]
    assert step.pool is not pools[0]


def own_ends(rank: int, path: Path, tokenizer: Any) -> Any:
    model = spread(path)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def strike(index: int, tokens: Any) -> bool:
        if len(tokens) == 3 and index == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    options = {"prompts": OWN[rank], "own_texts": True}
    struck = {"until": strike} if rank == 2 else {}
    interrupted = refused_interrupt(generate, model, tokenizer, **options, **struck)
    unusable = {"prompts": [[10**6]], "own_texts": True} if rank == 0 else options
    not_begun = refused(generate, model, tokenizer, **unusable)
    no_texts = []
    for prompts in ("", None):
        unusable = {"prompts": prompts, "own_texts": True} if rank == 0 else options
        no_texts.append(refused(generate, model, tokenizer, **unusable))
    if rank == 0:
        options["prompts"] = iter(OWN[rank])
    return interrupted, not_begun, no_texts, generate(model, tokenizer, **options)


def refused_interrupt(function: Any, *args: Any, **options: Any) -> list[int]:
    try:
        function(*args, **options)
    except qmoe.GenerationInterrupted as error:
        return error.result.new_tokens
    return [-1]


def test_texts_of_its_own_end_together(checkpoints, tokenizer) -> None:
    results = ranks.run(3, own_ends, checkpoints["qwen3_moe"], tokenizer)
    model = load(checkpoints["qwen3_moe"])
    for rank, result in enumerate(results):
        assert not isinstance(result, ranks.Failure), result
        interrupted, not_begun, (empty, none), after = result
        assert interrupted == [3] * len(OWN[rank])
        assert "tokenizer of another model" in not_begun
        assert "prompt 0 is empty" in empty
        assert "prompts is None" in none
        assert after == (generate(model, tokenizer, prompts=OWN[rank]) if OWN[rank] else [])
    with pytest.raises(ValueError, match="not spread over ranks"):
        generate(model, tokenizer, own_texts=True)


# ---- paging ------------------------------------------------------------------------------------


def paged(rank: int, path: Path, tokenizer: Any) -> Any:
    """Each rank pages with a budget of its own, rank 0 as little as works; it changes it later."""
    refusal = refused(load, path, hbm_budget=1, context=64, batch_size=2)
    whole = int(refusal.split(" bytes)")[0].rpartition("(")[2])
    found = refused(spread, path, hbm_budget=1, context=64, batch_size=2)
    smallest = int(found.split(" bytes)")[0].rpartition("(")[2]) if rank == 0 else whole
    model = spread(path, hbm_budget=smallest, context=64, batch_size=2)
    before = generate(model, tokenizer), model.qmoe_paging.budget.num_slots
    if rank == 1:
        qmoe.resize(model, hbm_budget=whole + 20_000)
    return whole, smallest, before, generate(model, tokenizer), logits(model)


def test_each_rank_pages_with_its_own_budget(checkpoints, tokenizer, alone) -> None:
    zero, one = ranks.run(2, paged, checkpoints["qwen3_moe"], tokenizer)
    _, expected, greedy, _ = alone["qwen3_moe"]
    for found in (zero, one):
        assert not isinstance(found, ranks.Failure), found
        before, after, actual = found[2:]
        assert before[0] == after == greedy
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert zero[1] <= one[1] and zero[2][1] < 2 * 16


def closes(rank: int) -> list[str]:
    order: list[str] = []

    class Captured:
        def forget_graphs(self) -> None:
            order.append("graphs")
            raise RuntimeError("the device is gone")

    _closer(lambda: order.append("connections"), [Captured(), Captured()])()
    _end_closing()
    return order


def test_graphs_go_before_connections_close() -> None:
    """NCCL waits for graphs that hold its connections; a thread, which a fork must not meet."""
    assert ranks.run(1, closes) == [["graphs", "graphs", "connections"]]


# A shutdown that waits for a graph, as NCCL's does. GONE says when the graph goes: never, or with
# the group that it is in a cycle with, after the group's end was told.
CLOSING = """
import gc, sys, threading, time, weakref
from qmoe.parallel import group
group._CLOSING = 1.0
gone = threading.Event()
class Graph:
    def __del__(self): gone.set()
class Group: pass
it = Group()
it.itself, it.graph = it, Graph()
weakref.finalize(it, group._closer(lambda: gone.wait(10), []))
if GONE:
    del it
    started = time.monotonic()
    gc.collect()
    assert gone.is_set() and time.monotonic() - started < 0.5
print("a text")
sys.exit(0)
"""


@pytest.mark.parametrize("gone", [True, False])
def test_whatever_keeps_connections_open_python_ends_with_a_sentence(gone) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLOSING.replace("GONE", str(gone))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0 if gone else 1, "a text\n"), done.stderr
    sentence = "qmoe: NCCL's connections did not close within 1 s; this rank ends\n"
    assert done.stderr == ("" if gone else sentence)


# ---- forward passes ----------------------------------------------------------------------------

DIFFERENT = {
    "input_ids": TOKENS[:1].flip(1),  # the same numbers
    "attention_mask": (torch.arange(9) > 1).long()[None],
    "position_ids": torch.arange(9)[None] + 5,
}


@torch.no_grad()
def passes(rank: int, path: Path, which: str | None) -> Any:
    """A forward pass, another one on rank 1 unless ``which`` is None."""
    model = spread(path)
    given = {
        "attention_mask": torch.ones(1, 9, dtype=torch.int64),
        "position_ids": torch.arange(9)[None],
    }
    if which is None:
        embeds = model.get_input_embeddings()(TOKENS[:1])
        embeds[0, -1] = float("nan")
        return model(inputs_embeds=embeds, **given).logits
    given = {"input_ids": TOKENS[:1], **given}
    if rank:
        given[which] = DIFFERENT[which]
    return model(given.pop("input_ids"), **given).logits


@torch.no_grad()
def trunk_alone(rank: int, path: Path, differ: bool) -> Any:
    """Layers that run without ``model(...)``."""
    model = spread(path)
    model(TOKENS)  # what was compared before says nothing of what comes
    return model.model(TOKENS[:1].flip(1) if differ and rank else TOKENS[:1])[0]


def test_what_goes_past_the_model_is_compared_too(checkpoints) -> None:
    path = checkpoints["qwen3_moe"]
    with torch.no_grad():
        expected = load(path).model(TOKENS[:1])[0]
    for found in ranks.run(2, trunk_alone, path, False):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for failed in ranks.run(2, trunk_alone, path, True):
        assert "runs the model on other inputs" in failed.text
        assert "(hidden_states)" in failed.text


@pytest.mark.parametrize("which", DIFFERENT)
def test_passes_that_differ_are_refused(which, checkpoints) -> None:
    for rank, found in enumerate(ranks.run(2, passes, checkpoints["qwen3_moe"], which)):
        assert isinstance(found, ranks.Failure), "sums of different passes"
        assert found.kind == "RankFailed"
        other = f"rank {1 - rank} runs the model on other inputs than rank {rank} ({which})"
        assert found.text.startswith(other)


@torch.no_grad()
def two_threads(rank: int, path: Path) -> Any:
    """Two threads begin a pass each, one after the other, the same way on every rank."""
    model = spread(path)
    inside, found = threading.Event(), {}
    layer = next(iter(quantized_modules(model).values()))

    def wait(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and not inside.is_set():
            inside.set()
            found.setdefault("begun", threading.Event()).wait(5)

    def first() -> None:
        with torch.no_grad():
            found["first"] = refused(model, TOKENS[:1])

    layer.register_forward_pre_hook(wait)
    found["begun"] = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(5)
    handle = layer.register_forward_pre_hook(lambda *_: found["begun"].set())
    second = refused(model, TOKENS[1:])
    handle.remove()
    thread.join()
    return found["first"], second


def test_passes_of_two_threads_are_refused(checkpoints, monkeypatch) -> None:
    monkeypatch.setenv("QMOE_RANK_TIMEOUT", "5")
    for both in ranks.run(2, two_threads, checkpoints["qwen3_moe"]):
        assert not isinstance(both, ranks.Failure), both
        assert "two threads run this model at a time" in both[0] + both[1]
        assert "nothing was refused" not in both


def nested(rank: int, path: Path, tokenizer: Any, own: bool) -> Any:
    model = spread(path)

    def listen(*_: Any) -> None:
        model(TOKENS)

    options = {"stream": listen} if rank == 1 else {}
    return refused(qmoe.generate, model, tokenizer, PROMPTS, own_texts=own, **options)


@pytest.mark.parametrize("own", [False, True])
def test_a_pass_from_stream_is_refused(own, checkpoints, tokenizer) -> None:
    for found in ranks.run(2, nested, checkpoints["qwen3_moe"], tokenizer, own):
        assert "ValueError: model(...) inside another call of this model" in found


def test_passes_with_nan_are_the_same(checkpoints) -> None:
    first, second = ranks.run(2, passes, checkpoints["qwen3_moe"], None)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


# ---- gradients ---------------------------------------------------------------------------------


def gradient(rank: int, path: Path) -> Any:
    model = spread(path)
    with pytest.raises(RuntimeError) as caught:
        model(TOKENS).logits.sum().backward()
    return str(caught.value)


def test_gradients_are_refused(checkpoints) -> None:
    for found in ranks.run(2, gradient, checkpoints["qwen3_moe"]):
        assert "experts on several ranks have no gradient" in found


# ---- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_torchrun_generates_and_rank_0_speaks(device, checkpoints, tokenizer, tmp_path) -> None:
    path = tmp_path / "model"
    shutil.copytree(checkpoints["qwen3_moe"], path)
    tokenizer.save_pretrained(path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--prompt", PROMPTS[0], "--device", device, "--max-new-tokens", "8", "--json"]
    done = subprocess.run(
        [*command, "-m", "qmoe", "generate", str(path), *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (text,) = json.loads(done.stdout)["texts"]
    one = qmoe.load(path, device=device)
    assert text == qmoe.generate(one, tokenizer, PROMPTS[0], max_new_tokens=8).texts[0]
    assert done.stderr.count("qmoe: 2 ranks hold 16, 16 of 32 experts in each of 2 layers") == 1


def test_torchrun_says_once_why_it_fails(tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["generate", str(tmp_path / "nothing"), "--prompt", "x", "--json"]
    done = subprocess.run(
        [*command, "-m", "qmoe", *options], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "no such folder" in json.loads(done.stdout)["error"]
    lines = [line for line in done.stderr.splitlines() if line.startswith("qmoe:")]
    assert len(lines) == 1 and "no such folder" in lines[0]


def test_what_the_commands_refuse_under_torchrun(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command, words in (
        (["serve", str(tmp_path)], "runs in one process; start it without torchrun"),
        (["generate", str(tmp_path)], "under torchrun give --prompt TEXT"),
    ):
        (tmp_path / "config.json").write_text("{}")
        assert main(command) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    stderr, waited = sys.stderr, []

    def wait(seconds: float) -> None:
        assert sys.stderr is not stderr, "rank 0 says it first"
        waited.append(seconds)

    monkeypatch.setattr("qmoe.cli.ranks.time.sleep", wait)
    assert main(["generate", str(tmp_path / "nothing"), "--prompt", "x"]) == 3
    assert waited, "torchrun would end rank 0 before it has said anything"
    assert "no such folder" in capsys.readouterr().err, "rank 0 did not, or has been killed"


# ---- two GPUs ----------------------------------------------------------------------------------


def on_two_gpus(test: Any) -> Any:
    for mark in TWO_GPUS:
        test = mark(test)
    return test


def on_two(function: Any, *args: Any) -> list[Any]:
    results = ranks.run(2, function, *args, start="spawn", timeout=240)
    assert not [result for result in results if isinstance(result, ranks.Failure)], results
    return results


def on_gpus(rank: int, paths: list[Path], tokenizer: Any, device: str) -> Any:
    """Texts of both kinds on all GPUs and on one, each kind twice: by a step that was kept."""
    found = []
    warnings.filterwarnings("error", message=".*without a CUDA graph|.*own loop")
    for path in paths:
        model = qmoe.load(path, device=device, expert_parallel=True)
        alone = qmoe.load(path, device=f"{device}:{rank}" if device == "cuda" else device)
        same = {"max_new_tokens": 2 * LENGTH}
        own = {"prompts": OWN[-rank], "max_new_tokens": (3 + rank) * LENGTH}
        sampled = {"do_sample": True, "temperature": 1.5, "seed": 3}
        for options in (same, own, same | sampled, own | sampled, own, same):
            spread_over_all = {"own_texts": True} if "prompts" in options else {}
            found.append(
                (
                    generate(model, tokenizer, **options, **spread_over_all),
                    generate(alone, tokenizer, **options),
                )
            )
        nobody = {"prompts": own["prompts"] if rank else [], "own_texts": True}
        expected = generate(alone, tokenizer, prompts=own["prompts"]) if rank else []
        found.append((generate(model, tokenizer, **nobody), expected))
    return found


@on_two_gpus
@pytest.mark.parametrize("peers", ["0", "1"])
def test_two_gpus_give_the_tokens_of_one(checkpoints, tokenizer, monkeypatch, peers) -> None:
    monkeypatch.setenv("QMOE_PEERS", peers)
    paths = [checkpoints[name] for name in ("qwen3_moe", "gpt_oss")]
    for result in on_two(on_gpus, paths, tokenizer, "cuda"):
        for actual, expected in result:
            assert actual == expected


def on_gpus_by_transformers(rank: int, path: Path, tokenizer: Any) -> Any:
    """As transformers spells it, with NCCL that it has started; on one GPU for comparison."""
    warnings.filterwarnings("error", message=".*without a CUDA graph|.*own loop")
    model = spread_by_transformers(path)
    assert model.device == torch.device("cuda", rank)
    alone = qmoe.load(path, device=f"cuda:{rank}")
    left = differences(qmoe.load(path, expert_parallel=True), model)
    found = [generate(model, tokenizer) for _ in range(2)]
    dist.destroy_process_group()
    return left, [*found, generate(model, tokenizer)], generate(alone, tokenizer)


@on_two_gpus
def test_two_gpus_as_transformers_spells_it(checkpoints, tokenizer) -> None:
    for left, found, expected in on_two(on_gpus_by_transformers, checkpoints["gpt_oss"], tokenizer):
        assert left == []
        assert found == [expected] * 3


def all_ways(rank: int) -> Any:
    """Exchanges over peers' memory, by NCCL and of parts, of many sizes, also by a graph."""
    os.environ["QMOE_PEERS"] = "1"
    group = rank_group(True, torch.device("cuda", rank))
    torch.cuda.set_device(rank)
    assert group.peers is not None
    generator = torch.Generator("cuda").manual_seed(rank)
    found = []
    with group.together("a test"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for num_rows, width in [(1, 2048), (3, 7), (64, 2048), (128, 2880), (2, 64)] * 3:
                rows = torch.randn(2 * num_rows, width, device="cuda", generator=generator)
                rows = rows.to(dtype)
                ids = torch.randint(0, 9, (num_rows, 4), device="cuda", generator=generator)
                routed = rows[: num_rows - rank], ids[rank:], ids[rank:].to(dtype), num_rows

                def exchange(rows: Any = rows, routed: Any = routed) -> Any:
                    total = group.sum(rows.clone())
                    return total, group.sum_and_scatter(rows.clone()), *group.gather(*routed)

                peers, group.peers = group.peers, None
                expected = exchange()
                for group.peers, group.adds_parts in ((peers, False), (None, True)):
                    actual = exchange()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        replayed = exchange()
                    for _ in range(5):
                        graph.replay()
                    for way in (actual, replayed):
                        found.append(all(map(torch.equal, way, expected)))
                group.peers, group.adds_parts = peers, False
        group.check_open()
    return found


@on_two_gpus
def test_every_way_exchanges_the_same() -> None:
    for found in on_two(all_ways):
        assert found == [True] * len(found)


@on_two_gpus
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_rows_in_8_bits_between_gpus(weights, checkpoints, tmp_path) -> None:
    path = checkpoints["qwen3_moe"]
    if weights == "fp8":
        convert(path.parent / "source", tmp_path / "fp8", weights="fp8")
        path = tmp_path / "fp8"
    options = {"weights": weights, "load": {}, "device": "cuda"}
    for eight, plain in on_two(flying, path, options, [300, 298]):
        assert torch.equal(eight[0], plain[0]) and eight[0].abs().max() > 0
        assert eight[1] < plain[1] / 2, "bytes of fp32"


def dies(rank: int, path: Path, tokenizer: Any, own: bool) -> Any:
    """Rank 1 is killed in the middle of a text; steps are captured by then."""
    model = qmoe.load(path, device="cuda", expert_parallel=True)

    def until(index: int, tokens: Any) -> bool:
        if rank == 1 and len(tokens) == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    started = time.monotonic()
    options = {"until": until, "own_texts": own, "max_new_tokens": 4 * LENGTH}
    return refused(generate, model, tokenizer, **options), time.monotonic() - started


@on_two_gpus
@pytest.mark.parametrize("own", [False, True], ids=["same", "own"])
def test_a_killed_rank_ends_the_other_gpu(own, checkpoints, tokenizer) -> None:
    zero, one = on_two(dies, checkpoints["qwen3_moe"], tokenizer, own)
    assert one is None
    assert "RankFailed: rank 1 does not answer any more" in zero[0]
    assert zero[1] < 60  # kernels are compiled in it
