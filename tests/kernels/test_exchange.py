"""Exchanges between ranks: processes that share memory, which on a GPU would be its peers'."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiling import run_compiler

from qmoe_kernels import exchange
from qmoe_kernels.exchange import NUMBER, PeerMemory, gathered_bytes, launch_gather, launch_sum
from qmoe_kernels.launching import COMPILED

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="ranks fork"),
    pytest.mark.skipif(COMPILED, reason="with GPUs: tests of qmoe, which has their memory"),
]

SLOT_BYTES = 4096
DTYPES = [torch.float32, torch.float16]


def run(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(peers, *args)`` returns in each of ``size`` processes that share memory."""
    context = multiprocessing.get_context("fork")
    num_bytes = PeerMemory.num_bytes(size, SLOT_BYTES)
    memory = torch.zeros(size, num_bytes, dtype=torch.uint8).share_memory_()
    pipes = [context.Pipe(duplex=False) for _ in range(size)]

    def work(rank: int) -> None:
        peers = PeerMemory(
            rank,
            size,
            torch.tensor([of_rank.data_ptr() for of_rank in memory]),
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            SLOT_BYTES,
            10**11,
        )
        pipes[rank][1].send(function(peers, *args))

    processes = [context.Process(target=work, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        for mine, _ in pipes:
            assert mine.poll(60), "a rank gave no answer"
        return [mine.recv() for mine, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def rows_of(rank: int, step: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def sums(peers: PeerMemory, shapes: list[Any], dtype: torch.dtype) -> list[Any]:
    found = []
    for step, shape in enumerate(shapes):
        rows = rows_of(peers.rank, step, shape, dtype)
        scatter = shape[0] % peers.size == 0 and step % 2 == 1
        found.append((scatter, launch_sum(rows, peers, scatter=scatter).numpy()))
    assert int(peers.state[NUMBER]) == len(shapes) and not peers.failed
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_of_all_ranks_in_their_order(size, dtype, monkeypatch) -> None:
    """Many of them, of sizes that take another number of programs each time."""
    monkeypatch.setattr(exchange, "_BLOCK", 64)
    shapes = [(1, 7), (6, 100), (5, 3), (12, 16), (1, 640), (6, 33), (2, 64), (6, 1)] * 2
    results = run(size, sums, shapes, dtype)
    for step, shape in enumerate(shapes):
        parts = [rows_of(rank, step, shape, dtype) for rank in range(size)]
        total = torch.zeros(shape)
        for part in parts:
            total += part.float()
        for rank, result in enumerate(results):
            scatter, actual = result[step]
            expected = total.to(dtype)
            if scatter:
                expected = expected.chunk(size)[rank]
            assert torch.equal(torch.from_numpy(actual), expected), (step, rank)


def gathers(peers: PeerMemory, cases: list[Any], dtype: torch.dtype) -> list[Any]:
    found = []
    for step, (counts, hidden_size, top_k) in enumerate(cases):
        num_rows = counts[peers.rank]
        rows = rows_of(peers.rank, step, (num_rows, hidden_size), dtype)
        ids = torch.arange(num_rows * top_k).view(num_rows, top_k) + 100 * peers.rank
        assert gathered_bytes(max(counts), hidden_size, top_k, dtype) <= SLOT_BYTES
        out = launch_gather(rows, ids, ids.to(dtype), max(counts), peers)
        found.append([tensor.numpy() for tensor in out])
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathers_fill_up_what_a_rank_lacks(dtype, monkeypatch) -> None:
    monkeypatch.setattr(exchange, "_BLOCK", 64)
    cases = [([3, 1, 0], 40, 2), ([0, 0, 1], 5, 3), ([2, 2, 2], 64, 1), ([7, 0, 9], 33, 4)] * 2
    results = run(3, gathers, cases, dtype)
    for step, (counts, hidden_size, top_k) in enumerate(cases):
        most = max(counts)
        rows = torch.zeros(3, most, hidden_size, dtype=dtype)
        ids = torch.full((3, most, top_k), -1, dtype=torch.int32)
        for rank, count in enumerate(counts):
            rows[rank, :count] = rows_of(rank, step, (count, hidden_size), dtype)
            ids[rank, :count] = torch.arange(count * top_k).view(count, top_k) + 100 * rank
        for result in results:
            actual = [torch.from_numpy(array) for array in result[step]]
            assert torch.equal(actual[0], rows.flatten(0, 1)), step
            assert torch.equal(actual[1], ids.flatten(0, 1)), step
            assert torch.equal(actual[2], ids.flatten(0, 1).clamp(min=0).to(torch.float32)), step


def left_alone(peers: PeerMemory) -> Any:
    """The last rank makes one exchange, the others three."""
    rows = torch.ones(2, 8)
    first = launch_sum(rows, peers)
    if peers.rank == peers.size - 1:
        return None
    hasty = replace(peers, limit_ns=10**7)
    others = [launch_sum(rows, hasty) for _ in range(2)]
    return first.tolist(), [out.isnan().all().item() for out in others], peers.failed.item()


def test_a_rank_that_does_not_come_is_given_up() -> None:
    *left, gone = run(3, left_alone)
    assert gone is None
    for first, are_nan, failed in left:
        assert first == [[3.0] * 8] * 2
        assert are_nan == [True, True] and failed == 1


COMPILE = """
import json
import torch
from compiling import compiling_for
from qmoe_kernels.exchange import PeerMemory, launch_gather, launch_sum
from qmoe_kernels.rows import launch_add_rows

with compiling_for(CAPABILITY) as compiled:
    words = torch.zeros(3, dtype=torch.int64)
    peers = PeerMemory(0, 2, words[:2], words, words[:1], 1 << 20, 10**9)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = torch.zeros(4, 2048, dtype=dtype)
        launch_sum(rows, peers)
        launch_sum(rows, peers, scatter=True)
        ids = torch.zeros(4, 8, dtype=torch.int64)
        launch_gather(rows, ids, torch.zeros(4, 8, dtype=dtype), 5, peers)
        launch_add_rows(rows)
for kernel in compiled:
    print(json.dumps({"name": kernel.metadata.name, "ptx": kernel.asm["ptx"]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile(capability) -> None:
    kernels = run_compiler(COMPILE.replace("CAPABILITY", str(capability)))
    assert len(kernels) == 12
    for kernel in kernels:
        assert "st.global.v4" in kernel["ptx"], json.dumps(kernel["name"])
        if kernel["name"] == "add_rows_kernel":  # of NCCL's
            assert "ld.global.v4" in kernel["ptx"]
            continue
        assert "st.release.sys" in kernel["ptx"] and "ld.acquire.sys" in kernel["ptx"]
