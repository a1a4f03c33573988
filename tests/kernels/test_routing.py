"""Sorting pairs by expert: torch's way by its definition, the kernel against torch's way."""

from __future__ import annotations

import sys

import pytest
import torch
from compiling import ARCHITECTURES, run_compiler
from graphs import capture, no_synchronization
from random_layer import DEVICE

from qmoe_kernels import ExpertRouting
from qmoe_kernels import routing as routing_module
from qmoe_kernels.routing import (
    BLOCK_PAIRS,
    FEW_PAIRS,
    FEW_WARPS,
    PAIRS_AT_ONCE,
    launch_routing,
)

CASES = [
    # num_tokens, num_experts, top_k
    (1, 1, 1),
    (1, 128, 8),
    (5, 7, 3),  # odd everything
    (64, 512, 10),
    (300, 8, 2),
    (0, 8, 2),  # no tokens
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), CASES)
def test_pairs_are_a_permutation_grouped_by_expert(
    num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    # About a tenth of the ids belong to no expert, below and above.
    spread = max(1, num_experts // 20)
    ids = torch.randint(-spread, num_experts + spread, (num_tokens, top_k), dtype=dtype)
    routing = ExpertRouting.from_topk_ids(ids, num_experts)
    pairs, offsets = routing.sorted_pair_ids, routing.expert_offsets

    assert pairs.dtype == offsets.dtype == torch.int32
    assert offsets.shape == (num_experts + 1,) and offsets[0] == 0
    assert pairs.sort().values.tolist() == list(range(num_tokens * top_k))
    assert routing.sorted_token_ids.tolist() == [p // top_k for p in pairs.tolist()]
    flat = ids.flatten().tolist()
    for expert in range(num_experts):
        mine = pairs[offsets[expert] : offsets[expert + 1]].tolist()
        assert mine == [p for p, e in enumerate(flat) if e == expert]
    assert all(not 0 <= flat[p] < num_experts for p in pairs[offsets[-1] :].tolist())


def test_example_of_the_docstring() -> None:
    routing = ExpertRouting.from_topk_ids(torch.tensor([[1, 0], [1, 2], [0, 1]]), 2)
    assert routing.sorted_pair_ids.tolist() == [1, 4, 0, 2, 5, 3]
    assert routing.sorted_token_ids.tolist() == [0, 2, 0, 1, 2, 1]
    assert routing.expert_offsets.tolist() == [0, 2, 5]


def test_tiles_of_the_docstring() -> None:
    ids = torch.tensor([[1, 0], [1, 2], [0, 1]])
    routing = ExpertRouting.from_topk_ids(ids, 2, block_m=2)
    assert routing.positions.tolist() == [2, 0, 3, 5, 1, 4]
    assert routing.tiles[:3].tolist() == [[0, 0, 0, 2], [1, 1, 2, 3], [1, 1, 4, 1]]
    assert routing.tiles[-1, 0] == 3
    without = ExpertRouting.from_topk_ids(ids, 2)
    assert without.positions is without.tiles is without.block_m is None


@pytest.mark.parametrize("counts", [[1, 1, 1, 45], [17, 0, 16, 1], [0, 0, 0, 52], [0, 0, 0, 0]])
@pytest.mark.parametrize("skipped", [0, 3])
def test_tiles_have_every_row_once(counts: list[int], skipped: int) -> None:
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor([*counts, skipped]))
    ids = ids[torch.randperm(len(ids))]
    slots = torch.tensor([2, -1, 0, 1], dtype=torch.int32)
    routing = ExpertRouting.from_topk_ids(ids[:, None], 4, block_m=16, expert_to_slot=slots)
    num_tiles = int(routing.tiles[-1, 0])
    assert num_tiles == sum(-(-count // 16) for count in counts) <= len(routing.tiles) - 1
    tiles = routing.tiles[:num_tiles].tolist()
    rows = [(e, p) for e, _, first, n in tiles for p in range(first, first + min(n, 16))]
    ordered = ids[routing.sorted_pair_ids].tolist()
    assert rows == [(e, p) for p, e in enumerate(ordered) if e < 4]
    assert [slot for _, slot, _, _ in tiles] == [int(slots[e]) for e, *_ in tiles]
    assert torch.equal(routing.positions[routing.sorted_pair_ids], torch.arange(len(ids)))


def test_one_expert_takes_all() -> None:
    routing = ExpertRouting.from_topk_ids(torch.full((9, 1), 3), 5)
    assert routing.expert_offsets.tolist() == [0, 0, 0, 0, 9, 9]
    assert routing.sorted_pair_ids.tolist() == list(range(9))


def test_nothing_is_routed() -> None:
    routing = ExpertRouting.from_topk_ids(torch.full((4, 2), 5), 5)
    assert routing.expert_offsets.tolist() == [0] * 6


# ---- the kernels -------------------------------------------------------------------------------


def random_ids(num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype) -> torch.Tensor:
    """About a tenth of the ids belong to no expert, below and above."""
    torch.manual_seed(0)
    spread = max(1, num_experts // 20)
    return torch.randint(-spread, num_experts + spread, (num_tokens, top_k), dtype=dtype)


def assert_like_torch(topk_ids: torch.Tensor, num_experts: int) -> None:
    """``topk_ids`` are on the CPU, where `ExpertRouting.from_topk_ids` is torch's sort."""
    slots = torch.randperm(num_experts, dtype=torch.int32) - 1
    expected = ExpertRouting.from_topk_ids(topk_ids, num_experts, block_m=8, expert_to_slot=slots)
    routing = launch_routing(
        topk_ids.to(DEVICE), num_experts, block_m=8, expert_to_slot=slots.to(DEVICE)
    )
    assert_equal(routing, expected)


def assert_equal(routing: ExpertRouting, expected: ExpertRouting) -> None:
    """All that is written is what the other one has."""
    assert (routing.top_k, routing.block_m) == (expected.top_k, expected.block_m)
    names = ["sorted_pair_ids", "expert_offsets"]
    if expected.block_m is not None:
        names += ["positions", "tiles"]
    for name in names:
        ours, theirs = getattr(routing, name).cpu(), getattr(expected, name).cpu()
        assert ours.dtype == theirs.dtype == torch.int32
        assert ours.shape == theirs.shape
        if name == "tiles":
            num_tiles = theirs[-1, 0]
            assert ours[-1, 0] == num_tiles
            assert ours[num_tiles:-1, 3].eq(0).all() and theirs[num_tiles:-1, 3].eq(0).all()
            ours, theirs = ours[:num_tiles], theirs[:num_tiles]
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [
        (1, 1, 1),
        (0, 8, 2),  # no tokens: offsets are written all the same
        (1, 128, 8),
        (5, 7, 3),
        (PAIRS_AT_ONCE // 2, 4, 2),  # all that are read at once
        (PAIRS_AT_ONCE // 2 + 1, 3, 2),  # more
        (FEW_PAIRS // 2, 7, 2),  # one launch
        (FEW_PAIRS + 1, 7, 1),  # two, the last block has one pair
        (FEW_PAIRS + BLOCK_PAIRS, 1, 1),  # full blocks, one expert
        (FEW_PAIRS // 6 + 99, 128, 8),
        (FEW_PAIRS // 10 + 1, 300, 10),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kernels(num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
    assert_like_torch(random_ids(num_tokens, num_experts, top_k, dtype), num_experts)


@pytest.mark.parametrize("num_tokens", [9, FEW_PAIRS + 9])
@pytest.mark.parametrize("block_m", [None, 64])
def test_kernels_without_slots_or_tiles(num_tokens: int, block_m: int | None) -> None:
    ids = random_ids(num_tokens, 5, 1, torch.int64)
    routing = launch_routing(ids.to(DEVICE), 5, block_m=block_m)
    assert_equal(routing, ExpertRouting.from_topk_ids(ids, 5, block_m=block_m))


def test_kernel_with_512_experts() -> None:
    assert_like_torch(random_ids(9, 512, 10, torch.int64), 512)


@pytest.mark.parametrize("num_experts", [4, 5])  # the skipped ids' program has an expert, or none
@pytest.mark.parametrize("expert", [-1, 0, 3, 4, 5])
@pytest.mark.parametrize("num_tokens", [9, FEW_PAIRS + 5])
def test_kernels_with_all_pairs_on_one_id(num_experts: int, expert: int, num_tokens: int) -> None:
    assert_like_torch(torch.full((num_tokens, 1), expert), num_experts)


@pytest.mark.parametrize("max_chunks", [1, 2, 4, 16])
def test_chunks_of_several_blocks(max_chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_module, "MAX_CHUNKS", max_chunks)
    assert_like_torch(random_ids(FEW_PAIRS + 5 * BLOCK_PAIRS + 7, 9, 1, torch.int64), 9)


def test_more_experts_make_larger_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_module, "MAX_COUNTS", 256)
    assert_like_torch(random_ids(FEW_PAIRS // 8 + 60, 40, 8, torch.int64), 40)
    assert_like_torch(random_ids(FEW_PAIRS // 8 + 60, 512, 8, torch.int64), 512)


def test_counts_beyond_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_module, "MAX_CHUNKS", 1)
    assert_like_torch(torch.full((2**15, 1), 1), 2)


def test_kernels_read_any_strides_and_alignment() -> None:
    ids = random_ids(40, 6, 4, torch.int64)
    for view in (ids.t().contiguous().t(), ids[:, 1:3], ids[1:], ids[::2], ids[:1].expand(7, 4)):
        assert_like_torch(view, 6)
    many = random_ids(FEW_PAIRS + 9, 6, 1, torch.int32)
    for view in (many[1:], many[:1].expand(FEW_PAIRS + 1, 1)):
        assert_like_torch(view, 6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_experts", [8, 128, 129, 512])
def test_many_pairs(num_experts: int, dtype: torch.dtype) -> None:
    for num_tokens, top_k in ((1, 10), (409, 10), (410, 10), (4096, 8), (8192, 10), (16384, 8)):
        ids = random_ids(num_tokens, num_experts, top_k, dtype)
        assert_like_torch(ids, num_experts)
        assert_equal(*(launch_routing(ids.cuda(), num_experts, block_m=16) for _ in range(2)))
    one_expert = torch.full((16384, 8), num_experts // 2, dtype=dtype)
    assert_like_torch(one_expert, num_experts)


@pytest.mark.gpu
def test_millions_of_pairs() -> None:
    ids = torch.full((1 << 19, 10), 2)  # counts beyond 16 bits
    assert_like_torch(ids, 256)
    assert_like_torch(random_ids(1 << 19, 256, 10, torch.int64), 256)


@pytest.mark.gpu
def test_launches_and_no_compilation_for_another_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Poison is a launch too.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    names = ["routing_kernel", "count_pairs_kernel", "sort_pairs_kernel"]
    for num_tokens in (1, 4096):  # one launch, two
        launch_routing(random_ids(num_tokens, 128, 8, torch.int64).cuda(), 128, block_m=16)
    device = torch.cuda.current_device()
    caches = [getattr(routing_module, name).device_caches[device][0] for name in names]
    num_compiled = [len(cache) for cache in caches]
    for num_tokens in (2, 16, 37, 3000, 8192, 16384, 30000):
        ids = random_ids(num_tokens, 128, 8, torch.int64).cuda()
        launch_routing(ids, 128, block_m=16)
        launch_routing(ids[1:], 120, block_m=16)
    assert [len(cache) for cache in caches] == num_compiled
    for num_tokens, launched in ((FEW_PAIRS // 8, names[:1]), (FEW_PAIRS // 8 + 1, names[1:])):
        ids = random_ids(num_tokens, 128, 8, torch.int64).cuda()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            ExpertRouting.from_topk_ids(ids, 128, block_m=16)
            torch.cuda.synchronize()
        kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert sorted(e.name for e in kernels) == sorted(launched)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [33, 4096])  # one launch, two
def test_cuda_graph_and_no_synchronization(num_tokens: int) -> None:
    torch.manual_seed(0)
    draws = [torch.randint(-1, 65, (num_tokens, 6)) for _ in range(5)]
    ids = draws[0].cuda()
    ExpertRouting.from_topk_ids(ids, 64, block_m=8)
    with no_synchronization():
        ExpertRouting.from_topk_ids(ids, 64, block_m=8)
    graph, captured = capture(lambda: ExpertRouting.from_topk_ids(ids, 64, block_m=8))
    for draw in draws:
        ids.copy_(draw)
        graph.replay()
        assert_equal(captured, ExpertRouting.from_topk_ids(draw, 64, block_m=8))


# ---- compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import json, re
import torch
from compiling import compiling_for, spilled_bytes
from qmoe_kernels.routing import FEW_PAIRS, launch_routing

with compiling_for(CAPABILITY) as compiled:
    for num_pairs, num_experts, dtype in (
        (FEW_PAIRS, 128, torch.int64),
        (FEW_PAIRS + 1, 1, torch.int64),
        (FEW_PAIRS + 1, 128, torch.int64),
        (FEW_PAIRS + 1, 256, torch.int32),
        (FEW_PAIRS + 1, 512, torch.int64),
        (1 << 20, 2048, torch.int64),
    ):
        launch_routing(
            torch.zeros(num_pairs, 1, dtype=dtype), num_experts, block_m=16,
            expert_to_slot=torch.zeros(num_experts, dtype=torch.int32),
        )
        for kernel in compiled:
            ptx = kernel.asm["ptx"]
            print(json.dumps({
                "kernel": kernel.metadata.name,
                "num_experts": num_experts,
                "shared": kernel.metadata.shared,
                "spilled": spilled_bytes(kernel.asm["cubin"]),
                "order": re.findall(
                    r"ld\\.global|st\\.global|griddepcontrol\\.\\w+|st\\.local", ptx
                ),
            }))
        compiled.clear()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_compiles_for_every_architecture(capability: int) -> None:
    kernels = run_compiler(f"CAPABILITY = {capability}\n{COMPILE}")
    assert [k["kernel"] for k in kernels] == [
        "routing_kernel",
        *["count_pairs_kernel", "sort_pairs_kernel"] * 5,
    ]
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        # No tile changes its layout through shared memory: only sums and tables of experts do.
        limit = {"routing_kernel": 1, "count_pairs_kernel": 8, "sort_pairs_kernel": 16}
        assert kernel["shared"] <= limit[kernel["kernel"]] << 10, kernel
        order = kernel["order"]
        steps = [step.split(".")[1] for step in order if step.startswith("griddep")]
        if capability < 90:
            assert steps == []
        elif kernel["kernel"] == "sort_pairs_kernel":
            # It lets the next kernel start once it has waited itself; before, it reads ids only.
            assert steps == ["wait", "launch_dependents"]
            assert order[: order.index("griddepcontrol.wait")] == ["ld.global"]
        else:
            assert order[0] == "griddepcontrol.launch_dependents"
            assert steps == ["launch_dependents"]
        if kernel["kernel"] == "routing_kernel":  # every id is read once, and two slots
            assert order.count("ld.global") == PAIRS_AT_ONCE // (32 * FEW_WARPS) + 2
