from __future__ import annotations

import pytest
import torch

from qmoe_kernels import ExpertRouting

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
