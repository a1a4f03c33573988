from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe.experts.pages import LayerPages
from qmoe.paging.budget import AUTO_FRACTION, Budget, divide_budget, parse_budget
from qmoe.paging.options import PagingOptions
from qmoe.sizes import format_size

GIB = 1 << 30


class TestParse:
    @pytest.mark.parametrize(
        ("written", "expected"),
        [
            (12345, 12345),
            ("12345", 12345),
            ("12345B", 12345),
            ("2GiB", 2 * GIB),
            (" 2 gib ", 2 * GIB),
            ("1.5GiB", 3 * GIB // 2),
            ("2GB", 2 * 10**9),
            (".5kB", 500),
            (0.25, 4 * GIB),
            ("0.25", 4 * GIB),
            ("25%", 4 * GIB),
            (1.0, 16 * GIB),
            ("auto", int(16 * GIB * AUTO_FRACTION)),
        ],
    )
    def test_sizes_fractions_and_auto(self, written, expected):
        assert parse_budget(written, total=16 * GIB, free=16 * GIB) == expected

    def test_auto_takes_what_is_free_and_a_fraction_is_of_the_whole(self):
        assert parse_budget("auto", total=16 * GIB, free=4 * GIB) == int(4 * GIB * AUTO_FRACTION)
        assert parse_budget(0.125, total=16 * GIB, free=4 * GIB) == 2 * GIB

    @pytest.mark.parametrize(
        "written",
        [
            *("", "much", "16 bananas", "-1GiB", "1.5", "150%", "0%"),
            *(-1, 0, 0.0, 1.5, float("nan"), float("inf"), True, None),
        ],
    )
    def test_what_is_no_size_is_named(self, written):
        with pytest.raises(ValueError, match=re.escape(f"hbm_budget={written!r}; write a size")):
            parse_budget(written, total=16 * GIB, free=16 * GIB)

    def test_more_than_is_free(self):
        with pytest.raises(ValueError, match=f"hbm_budget='5GiB' is {5 * GIB} bytes.*17.2 GB only"):
            parse_budget("5GiB", total=16 * GIB, free=4 * GIB)


@given(st.integers(1, 1 << 50))
def test_a_printed_size_is_enough(num_bytes):
    printed = parse_budget(format_size(num_bytes), total=1 << 60, free=1 << 60)
    assert num_bytes <= printed <= max(num_bytes + 1, num_bytes * 1.011)


def layer(num_experts: int, size: int) -> LayerPages:
    return LayerPages("layer", num_experts, torch.int8, (2 * size, size), (size, size))


SIZES = dict(resident=10_000, kv_cache=3_000, context=500, batch_size=1)


def workspace(chunk: int) -> int:
    return 1000 + 10 * chunk


def smallest_and_everything(layers, top_k, **sizes) -> tuple[int, int]:
    with pytest.raises(ValueError) as caught:
        divide_budget(layers, top_k, total=1, workspace=workspace, **sizes)
    smallest = int(re.search(r"\((\d+) bytes\)", str(caught.value))[1])
    pages = sum(p.num_experts * p.page_bytes for p in layers)
    chunk = min(64, sizes["context"])
    return smallest, pages + sizes["resident"] + sizes["kv_cache"] + workspace(chunk)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_budget_from_the_smallest_on_is_kept(data):
    layers, top_k = [], []
    for _ in range(data.draw(st.integers(1, 5))):
        num_experts = data.draw(st.integers(1, 40))
        layers.append(layer(num_experts, data.draw(st.integers(1, 12)) * 8))
        top_k.append(data.draw(st.integers(0, num_experts)))
    sizes = SIZES | dict(
        context=data.draw(st.integers(1, 20_000)), batch_size=data.draw(st.integers(1, 9))
    )
    smallest, everything = smallest_and_everything(layers, top_k, **sizes)
    total = data.draw(st.integers(smallest, everything + 200_000))
    budget = divide_budget(layers, top_k, total=total, workspace=workspace, **sizes)

    pages = sum(p.num_experts * p.page_bytes for p in layers)
    spent = budget.resident + budget.kv_cache + budget.workspace + budget.staging + budget.slots
    assert spent <= total
    assert budget.workspace == workspace(budget.chunk)
    assert 1 <= budget.chunk <= min(8192, sizes["context"])
    assert budget.chunk == sizes["context"] or budget.chunk.bit_count() == 1
    assert budget.all_resident == (total >= everything)
    if budget.all_resident:
        assert (budget.num_slots, budget.num_staging) == (0, 0)
        assert budget.resident == sizes["resident"] + pages
        return
    slot = max(p.page_stride for p in layers)
    batch = sizes["batch_size"]
    cycle = sum(min(k * batch, p.num_experts) for k, p in zip(top_k, layers, strict=True))
    assert budget.num_slots >= cycle
    assert budget.slots == budget.num_slots * slot
    assert budget.staging == 2 * budget.num_staging * slot
    assert 1 <= budget.num_staging <= max(p.num_experts for p in layers)
    # What is left over is no whole slot, unless there are no more pages to hold.
    assert total - spent < slot or budget.num_slots == sum(p.num_experts for p in layers)


def test_one_byte_less_than_the_smallest_is_refused():
    layers = [layer(8, 64)] * 3
    smallest, everything = smallest_and_everything(layers, [2] * 3, **SIZES)
    # 13 kB that stay, 1640 bytes of workspace at 64 tokens, 3 * 2 pages and two buffers of 2
    assert smallest == 13_000 + 1640 + (6 + 4) * 3 * 64 * 64 < everything
    divide_budget(layers, [2] * 3, total=smallest, workspace=workspace, **SIZES)
    with pytest.raises(ValueError, match="the 6 experts of one token's cycle and 2 x 2"):
        divide_budget(layers, [2] * 3, total=smallest - 1, workspace=workspace, **SIZES)


def test_where_everything_is_less_than_a_cycle_it_is_the_smallest():
    layers = [layer(4, 64)]
    smallest, everything = smallest_and_everything(layers, [3], **SIZES)
    assert smallest == everything
    assert divide_budget(layers, [3], total=smallest, workspace=workspace, **SIZES).all_resident
    with pytest.raises(ValueError, match="all 4 experts"):
        divide_budget(layers, [3], total=smallest - 1, workspace=workspace, **SIZES)


def test_the_largest_batch_needs_no_more_than_every_expert():
    layers = [layer(8, 64)] * 40
    one = smallest_and_everything(layers, [2] * 40, **SIZES)[0]
    two = smallest_and_everything(layers, [2] * 40, **SIZES | {"batch_size": 2})[0]
    assert two - one == 40 * 2 * 3 * 64 * 64


def budget_of(total: int, context: int = 100_000) -> Budget:
    layers = [layer(128, 64)] * 10
    return divide_budget(
        layers, [8] * 10, total=total, workspace=workspace, **SIZES | {"context": context}
    )


def test_larger_budgets_buy_larger_chunks_and_buffers():
    everything = 13_000 + workspace(64) + 1280 * 3 * 64 * 64
    budgets = [budget_of(int(everything * part)) for part in (0.1, 0.2, 0.4, 0.99)]
    chunks, staging, slots = zip(
        *((b.chunk, b.num_staging, b.num_slots) for b in budgets), strict=True
    )
    assert sorted(chunks) == list(chunks) and chunks[0] < 8192 and chunks[-1] == 8192
    assert sorted(staging) == list(staging) and staging[0] < 16 and 60 < staging[-1] <= 128
    assert sorted(slots) == list(slots) and slots[-1] > 0.7 * 1280


@pytest.mark.parametrize(("name", "value"), [("context", 0), ("batch_size", -1), ("context", "8k")])
def test_no_context_and_no_batch(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        PagingOptions("1GiB", **{name: value})
