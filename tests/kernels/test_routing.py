"""Sorting pairs by expert: torch's way by its definition, the kernel against torch's way."""

from __future__ import annotations

import sys

import pytest
import torch
from compiling import ARCHITECTURES, run_compiler
from random_layer import DEVICE

from qmoe_kernels import ExpertRouting
from qmoe_kernels.routing import LARGE_BLOCK, MAX_PAIRS, SMALL_BLOCK, launch_routing

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


def test_one_expert_takes_all() -> None:
    routing = ExpertRouting.from_topk_ids(torch.full((9, 1), 3), 5)
    assert routing.expert_offsets.tolist() == [0, 0, 0, 0, 9, 9]
    assert routing.sorted_pair_ids.tolist() == list(range(9))


def test_nothing_is_routed() -> None:
    routing = ExpertRouting.from_topk_ids(torch.full((4, 2), 5), 5)
    assert routing.expert_offsets.tolist() == [0] * 6


# ---- the kernel --------------------------------------------------------------------------------


def random_ids(num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype) -> torch.Tensor:
    """About a tenth of the ids belong to no expert, below and above."""
    torch.manual_seed(0)
    spread = max(1, num_experts // 20)
    return torch.randint(-spread, num_experts + spread, (num_tokens, top_k), dtype=dtype)


def assert_like_torch(topk_ids: torch.Tensor, num_experts: int) -> None:
    """``topk_ids`` are on the CPU, where `ExpertRouting.from_topk_ids` is torch's sort."""
    expected = ExpertRouting.from_topk_ids(topk_ids, num_experts)
    routing = launch_routing(topk_ids.to(DEVICE), num_experts)
    assert routing.top_k == expected.top_k
    for name in ("sorted_pair_ids", "expert_offsets"):
        ours, theirs = getattr(routing, name).cpu(), getattr(expected, name)
        assert ours.dtype == theirs.dtype == torch.int32
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [
        (1, 1, 1),
        (0, 8, 2),  # no tokens: offsets are written all the same
        (1, 128, 8),
        (5, 7, 3),
        (SMALL_BLOCK // 2, 4, 2),  # a full block
        (SMALL_BLOCK // 2 + 1, 3, 2),  # the larger block
        (LARGE_BLOCK // 2 + 3, 6, 5),  # several blocks, the last one not full
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kernel(num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
    assert_like_torch(random_ids(num_tokens, num_experts, top_k, dtype), num_experts)


def test_kernel_with_512_experts() -> None:
    assert_like_torch(random_ids(9, 512, 10, torch.int64), 512)


def test_kernel_with_as_many_pairs_as_it_takes() -> None:
    ids = random_ids(MAX_PAIRS // 8, 2, 8, torch.int32)
    assert ids.numel() == MAX_PAIRS
    assert_like_torch(ids, 2)


@pytest.mark.parametrize("num_experts", [4, 5])  # the skipped ids' program has an expert, or none
@pytest.mark.parametrize("expert", [-1, 0, 3, 4, 5])
@pytest.mark.parametrize("num_tokens", [9, LARGE_BLOCK + 5])
def test_kernel_with_all_pairs_on_one_id(num_experts: int, expert: int, num_tokens: int) -> None:
    assert_like_torch(torch.full((num_tokens, 1), expert), num_experts)


def test_kernel_reads_any_strides_and_alignment() -> None:
    ids = random_ids(40, 6, 4, torch.int64)
    for view in (ids.t().contiguous().t(), ids[:, 1:3], ids[1:], ids[::2], ids[:1].expand(7, 4)):
        assert_like_torch(view, 6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_experts", [8, 128, 129, 512])
def test_many_pairs(num_experts: int, dtype: torch.dtype) -> None:
    for num_tokens, top_k in ((1, 10), (700, 10), (4096, 8), (8192, 10), (MAX_PAIRS // 10, 10)):
        ids = random_ids(num_tokens, num_experts, top_k, dtype)
        assert_like_torch(ids, num_experts)
        again = [launch_routing(ids.cuda(), num_experts) for _ in range(2)]
        assert torch.equal(again[0].sorted_pair_ids, again[1].sorted_pair_ids)
    beyond = random_ids(MAX_PAIRS // 10 + 1, num_experts, 10, dtype)
    assert beyond.numel() > MAX_PAIRS
    routing = ExpertRouting.from_topk_ids(beyond.cuda(), num_experts)
    expected = ExpertRouting.from_topk_ids(beyond, num_experts)
    assert torch.equal(routing.sorted_pair_ids.cpu(), expected.sorted_pair_ids)
    assert torch.equal(routing.expert_offsets.cpu(), expected.expert_offsets)


@pytest.mark.gpu
def test_one_launch_and_no_compilation_for_another_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qmoe_kernels.routing import routing_kernel

    # Poison is a launch too.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    for num_tokens in (1, 4096):  # both blocks
        launch_routing(random_ids(num_tokens, 128, 8, torch.int64).cuda(), 128)
    cache = routing_kernel.device_caches[torch.cuda.current_device()][0]
    num_compiled = len(cache)
    for num_tokens in (2, 16, 37, 3000, 8192):
        ids = random_ids(num_tokens, 128, 8, torch.int64).cuda()
        launch_routing(ids, 128)
        launch_routing(ids[1:], 130)
    assert len(cache) == num_compiled
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ExpertRouting.from_topk_ids(ids, 128)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert [e.name for e in kernels] == ["routing_kernel"]


@pytest.mark.gpu
def test_cuda_graph_and_no_synchronization() -> None:
    torch.manual_seed(0)
    draws = [torch.randint(-1, 65, (33, 6)) for _ in range(3)]
    ids = draws[0].cuda()
    ExpertRouting.from_topk_ids(ids, 64)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ExpertRouting.from_topk_ids(ids, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ExpertRouting.from_topk_ids(ids, 64)
    for draw in draws:
        ids.copy_(draw)
        graph.replay()
        expected = ExpertRouting.from_topk_ids(draw, 64)
        assert torch.equal(captured.sorted_pair_ids.cpu(), expected.sorted_pair_ids)
        assert torch.equal(captured.expert_offsets.cpu(), expected.expert_offsets)


# ---- compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qmoe_kernels import routing

names = routing.routing_kernel.arg_names
for capability in ARCHITECTURES:
    for block, warps, ids in ((routing.SMALL_BLOCK, routing.SMALL_WARPS, "*i64"),
                              (routing.LARGE_BLOCK, routing.LARGE_WARPS, "*i64"),
                              (routing.LARGE_BLOCK, routing.LARGE_WARPS, "*i32")):
        constants = dict(BLOCK=block, PDL=capability >= 90)
        types = dict(topk_ids_ptr=ids, **dict.fromkeys(constants, "constexpr"))
        source = ASTSource(
            routing.routing_kernel,
            {n: types.get(n, "*i32" if n.endswith("_ptr") else "i32") for n in names},
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]]
                   for n in ("sorted_pair_ids_ptr", "expert_offsets_ptr")},
        )
        kernel = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
        )
        ptx = kernel.asm["ptx"]
        print(json.dumps({
            "capability": capability,
            "shared": kernel.metadata.shared,
            "local_memory": len(re.findall(r"(ld|st)\\.local", ptx)),
            "loads": len(re.findall(r"ld\\.global", ptx)),
            "launches_dependents": "griddepcontrol.launch_dependents" in ptx,
            "loads_per_thread": block // (32 * warps),
        }))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_compiles_for_every_architecture() -> None:
    kernels = run_compiler(f"ARCHITECTURES = {ARCHITECTURES}\n{COMPILE}")
    assert len(kernels) == 3 * len(ARCHITECTURES)
    for kernel in kernels:
        assert kernel["local_memory"] == 0, kernel
        assert kernel["loads"] == kernel["loads_per_thread"], kernel  # every id is read once
        # No layout is changed through shared memory, which would take tens of KiB.
        assert kernel["shared"] <= 1024, kernel
        assert kernel["launches_dependents"] == (kernel["capability"] >= 90), kernel
