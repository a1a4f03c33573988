"""Attention of one token over a cache: torch's way and the kernels against softmax in fp64."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import pytest
import torch
from compiling import ARCHITECTURES, SHARED_MEMORY, run_compiler
from graphs import capture, no_synchronization
from random_layer import DEVICE, TRITON_DTYPES
from torch import Tensor

from qmoe_kernels import attention
from qmoe_kernels.attention import (
    AttentionTile,
    choose_tile,
    decode_attention,
    launch_decode_attention,
    launch_store_kv,
    store_kv,
)


@dataclass(frozen=True)
class Case:
    """One call: row i attends to ``start[i] <= c < end[i]``, one end for all rows if it is one."""

    start: tuple[int, ...] = (5, 40)
    end: tuple[int, ...] = (100,)
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    value_dim: int = 32
    max_length: int = 128
    sliding_window: int | None = None
    sinks: bool = False
    softcap: float | None = None

    def visible(self) -> Tensor:
        """(num_rows, max_length): which columns a row attends to."""
        columns = range(self.max_length)
        ends = self.end * (len(self.start) if len(self.end) == 1 else 1)
        window = self.sliding_window or self.max_length
        spans = [
            (max(s, min(e, self.max_length) - window), e)
            for s, e in zip(self.start, ends, strict=True)
        ]
        return torch.tensor([[s <= c < e for c in columns] for s, e in spans])

    def arguments(self, dtype: torch.dtype, seed: int = 0) -> dict[str, object]:
        """Random arguments of `decode_attention`, NaN in each column that is not visible."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        num_rows, cache = len(self.start), (self.max_length, self.num_kv_heads)
        # In larger storage, as a product of queries, keys and values leaves them.
        query = random(num_rows, self.num_heads + 2, self.head_dim)[:, 1:-1]
        keys = random(num_rows, *cache, self.head_dim)
        values = random(num_rows, *cache, self.value_dim)
        hidden = ~self.visible()[..., None, None]
        sinks = 2.0 * random(self.num_heads)
        return {
            "query": query.to(DEVICE),
            "keys": keys.masked_fill(hidden, torch.nan).to(DEVICE),
            "values": values.masked_fill(hidden, torch.nan).to(DEVICE),
            "start": torch.tensor(self.start, dtype=torch.int32, device=DEVICE),
            "end": torch.tensor(self.end, dtype=torch.int32, device=DEVICE),
            "scale": self.head_dim**-0.5,
            "sliding_window": self.sliding_window,
            "sinks": sinks.to(DEVICE) if self.sinks else None,
            "softcap": self.softcap,
        }

    def check(self, out: Tensor, arguments: dict[str, object], *, rounds: bool = True) -> None:
        """Compare with fp64, one row and head at a time.

        Where ``u`` is half the dtype's distance between 1 and the next number, a probability and
        an output that are rounded differ by no more than ``u`` of themselves; logits differ by
        the errors of a sum of head_dim fp32 products, probabilities by twice as much.
        """
        query, keys, values = (arguments[n].cpu() for n in ("query", "keys", "values"))
        assert out.is_contiguous() and out.dtype == query.dtype
        assert out.shape == (*query.shape[:2], self.value_dim)
        half_steps = torch.finfo(out.dtype).eps / 2 * (2 if rounds else 1)
        group = self.num_heads // self.num_kv_heads
        for i, visible in enumerate(self.visible()):
            for h in range(self.num_heads):
                if not visible.any():
                    assert (out[i, h] == 0).all()
                    continue
                q = query[i, h].double() * arguments["scale"]
                k, v = (t[i, visible, h // group].double() for t in (keys, values))
                logits = k @ q
                if self.softcap is not None:
                    logits = self.softcap * torch.tanh(logits / self.softcap)
                if self.sinks:
                    sink = arguments["sinks"].cpu()[h].double()
                    logits = torch.cat([logits, sink[None]])
                p = logits.softmax(0)[: len(v)]
                wrong = 2**-24 * (self.head_dim + 8) * float((k.abs() @ q.abs()).max())
                if self.softcap is not None:  # tanh by exponentials: as much of the cap
                    wrong += 2**-22 * self.softcap
                wrong = half_steps + 2 * wrong + 2**-20
                error = (out[i, h].cpu().double() - p @ v).abs()
                assert (error <= wrong * (p @ v.abs()) + 1e-30).all(), (i, h, error.max())


def on_cpu(arguments: dict[str, object]) -> dict[str, object]:
    return {n: v.cpu() if isinstance(v, Tensor) else v for n, v in arguments.items()}


CASES = {
    "one_column": Case(start=(0,), end=(1,)),
    "blocks": Case(start=(0, 16), end=(64, 48)),
    "all": Case(start=(0, 1), end=(128,)),
    "past_the_end": Case(start=(0, -3), end=(200, 128)),
    "an_end_per_row": Case(start=(0, 5, 40), end=(101, 6, 128)),
    "empty": Case(start=(0, 7, 30), end=(0, 7, 20)),
    "empty_with_sinks": Case(start=(0, 7), end=(90, 7), sinks=True),
    "group_of_1": Case(num_heads=2, num_kv_heads=2),
    "group_of_3": Case(num_heads=3, num_kv_heads=1, end=(77,)),
    "group_of_8": Case(num_heads=16, num_kv_heads=2, start=(3,)),
    "group_of_20": Case(num_heads=20, num_kv_heads=1, start=(0, 70), max_length=100),
    "head_dim_64": Case(head_dim=64, value_dim=64, start=(2,)),
    "head_dim_80": Case(head_dim=80, value_dim=80, start=(2,), end=(93,)),
    "head_dim_128": Case(head_dim=128, value_dim=128, start=(0,), num_heads=2, num_kv_heads=1),
    "mla": Case(head_dim=192, value_dim=128, start=(9,), num_heads=2),
    "odd_dims": Case(head_dim=13, value_dim=7),
    "window": Case(start=(0, 5, 40), sliding_window=16, end=(100, 9, 45)),
    "window_of_1": Case(sliding_window=1),
    "wide_window": Case(sliding_window=1000, end=(128,)),
    "sinks": Case(sinks=True, num_heads=8),
    "softcap": Case(softcap=2.0),
    "everything": Case(
        start=(0, 60, 9),
        end=(128, 61, 101),
        num_heads=6,
        head_dim=48,
        value_dim=40,
        sliding_window=70,
        sinks=True,
        softcap=5.0,
    ),
}
TILES = {
    "one_split": AttentionTile(1, 32, num_stages=2),
    "two_splits": AttentionTile(2, 16),
    "five_splits": AttentionTile(5, 64),  # no power of two; more than some rows have columns for
}
# The interpreter takes a while: there each case has two of its six.
KERNEL_CASES = [
    pytest.param(case, tile, dtype, id=f"{name}-{tile_name}-{dtype}")
    for i, (name, case) in enumerate(CASES.items())
    for j, (tile_name, tile) in enumerate(TILES.items())
    for k, dtype in enumerate(TRITON_DTYPES)
    if DEVICE.type == "cuda" or (i + j + k) % 3 == 0
]


@pytest.mark.parametrize("dtype", attention.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference(case: Case, dtype: torch.dtype) -> None:
    arguments = on_cpu(case.arguments(dtype))
    case.check(decode_attention(**arguments), arguments, rounds=False)


@pytest.mark.parametrize("case, tile, dtype", KERNEL_CASES)
def test_kernels(case: Case, tile: AttentionTile, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    out = launch_decode_attention(**arguments, tile=tile)
    case.check(out, arguments)
    if DEVICE.type == "cuda":
        assert torch.equal(out, launch_decode_attention(**arguments, tile=tile))


@pytest.mark.parametrize("case", [CASES["mla"], CASES["sinks"], Case(max_length=300, end=(290,))])
def test_the_chosen_tile(case: Case) -> None:
    arguments = case.arguments(torch.float32)
    case.check(launch_decode_attention(**arguments), arguments)
    case.check(decode_attention(**arguments), arguments)


def test_strided_caches_and_wide_ends() -> None:
    """Layers of one tensor, keys beside values; int64 ends."""
    case = Case()
    arguments = case.arguments(torch.float32)
    expected = launch_decode_attention(**arguments)
    storage = torch.full((5, 2, 128, 2, 2, 40), torch.nan, device=DEVICE)
    keys, values = storage[2, :, :, :, 0, 4:36], storage[2, :, :, :, 1, 4:36]
    keys.copy_(arguments["keys"])
    values.copy_(arguments["values"])
    arguments |= {"keys": keys, "values": values, "end": arguments["end"].long()}
    assert torch.equal(launch_decode_attention(**arguments), expected)
    arguments["end"] = arguments["end"].expand(2)
    assert torch.equal(launch_decode_attention(**arguments), expected)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_rows_do_not_see_each_other(tile: AttentionTile) -> None:
    """Another content and other lengths of the other rows change no bit."""
    case = replace(CASES["sinks"], num_kv_heads=1, start=(0, 5, 40), end=(100, 100, 100))
    arguments = case.arguments(torch.float32)
    expected = launch_decode_attention(**arguments, tile=tile)
    others = replace(case, start=(50, 5, 99), end=(51, 100, 99)).arguments(torch.float32, seed=1)
    for name in ("query", "keys", "values"):
        others[name][1] = arguments[name][1]
    others["sinks"] = arguments["sinks"]
    out = launch_decode_attention(**others, tile=tile)
    assert torch.equal(out[1], expected[1])
    assert not torch.equal(out[0], expected[0])


def test_no_rows() -> None:
    arguments = Case().arguments(torch.float32)
    for name in ("query", "keys", "values", "start"):
        arguments[name] = arguments[name][:0]
    for attend in (decode_attention, launch_decode_attention):
        assert attend(**arguments).shape == (0, 4, 32)


def test_tiles_follow_shapes() -> None:
    qwen3 = (2048, 512, 132)  # columns, bytes of a key and a value, multiprocessors
    splits = [choose_tile(num_rows * 4, *qwen3).num_splits for num_rows in (1, 8, 16, 64, 1000)]
    assert splits == [16, 4, 2, 1, 1]
    assert choose_tile(8, 128, 256, 132).num_splits == 1  # gpt-oss's window
    for column_bytes in (32, 64, 256, 512, 768, 1024, 2048, 4096):
        tile = choose_tile(4, 2048, column_bytes, 132)
        assert tile.num_stages >= 2 and tile.block_n in (16, 32, 64)
        assert (tile.num_stages - 1) * tile.block_n * column_bytes <= 64 << 10


# ---- storing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [store_kv, launch_store_kv])
@pytest.mark.parametrize("new_tokens", [1, 3])
@pytest.mark.parametrize("column", [0, 4, 8, 9, 12, -1])
def test_store(store, column: int, new_tokens: int) -> None:
    num_rows, heads, head_dim, value_dim, length = 2, 3, 6, 10, 9
    # As one product of queries, keys and values leaves them.
    new = torch.randn(num_rows, new_tokens, 70, device=DEVICE)
    key = new[..., 5 : 5 + 18].unflatten(-1, (heads, head_dim)).transpose(1, 2)
    value = new[..., 30 : 30 + 30].unflatten(-1, (heads, value_dim)).transpose(1, 2)
    storage = torch.randn(num_rows + 1, length + 2, heads, 32, device=DEVICE)
    expected = storage.clone()
    keys, values = (t[:num_rows, 1:-1] for t in (storage[..., 1:7], storage[..., 12:22]))
    for t in range(new_tokens):
        if 0 <= column + t < length:
            expected[:num_rows, 1 + column + t, :, 1:7] = key[:, :, t]
            expected[:num_rows, 1 + column + t, :, 12:22] = value[:, :, t]
    store(key, value, keys, values, torch.tensor([column], device=DEVICE))
    assert torch.equal(storage, expected)


@pytest.mark.parametrize("store", [store_kv, launch_store_kv])
def test_store_many_heads_in_another_dtype(store) -> None:
    key, value = torch.randn(2, 2, 130, 2, 96, device=DEVICE)
    keys, values = torch.zeros(2, 2, 5, 130, 96, device=DEVICE, dtype=torch.float16)
    column = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    store(key, value, keys, values, column)
    for new, cache in ((key, keys), (value, values)):
        assert torch.equal(cache[:, 2:4], new.transpose(1, 2).half())
        assert not cache[:, :2].any() and not cache[:, 4:].any()


# ---- what does not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": torch.zeros(3, 4)}, "expected .num_rows, num_heads, head_dim."),
        ({"query": torch.zeros(2, 5, 32)}, "does not fit keys"),
        ({"values": torch.zeros(2, 127, 2, 32)}, "does not fit keys"),
        ({"values": torch.zeros(2, 128, 2, 32).half()}, "values torch.float16; one of"),
        ({"query": torch.zeros(2, 32, 4).mT}, "query has strides"),
        ({"start": torch.zeros(2)}, "start is torch.float32"),
        ({"start": torch.zeros(1).int()}, "expected int32 or int64 of shape .2,."),
        ({"end": torch.zeros(3).int()}, "end is torch.int32 of shape .3,."),
        ({"sinks": torch.zeros(3)}, "expected floats .4,."),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"keys": torch.zeros(2, 128, 2, 32, device="meta")}, "have to be on"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, object], message: str) -> None:
    arguments = on_cpu(Case().arguments(torch.float32))
    with pytest.raises(ValueError, match=message):
        decode_attention(**(arguments | change))


def test_tokens_that_do_not_fit() -> None:
    new, cache, column = torch.zeros(2, 3, 1, 8), torch.zeros(2, 9, 3, 8), torch.zeros(1).int()
    for arguments, message in [
        ((new[:1], new, cache, cache, column), "key .1, 3, 1, 8. does not fit a cache"),
        ((new, new[:, :2], cache, cache, column), "value .* does not fit a cache"),
        ((new, new, cache, cache[:, :5], column), "only the last dimensions may differ"),
        ((new, new, cache, cache, column.float()), "column is torch.float32"),
        ((new, new, cache, cache, column[0]), "expected int32 or int64 of shape .1,."),
        ((new, new, cache, torch.zeros(2, 9, 8, 3).mT, column), "values has strides"),
    ]:
        with pytest.raises(ValueError, match=message):
            store_kv(*arguments)


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_as_large_as_models(num_rows: int, dtype: torch.dtype) -> None:
    ends = tuple(1 + 2047 * i // max(1, num_rows - 1) for i in range(num_rows))
    case = Case(
        start=tuple(end // 9 for end in ends),
        end=ends if num_rows > 1 else (1025,),
        num_heads=16,
        num_kv_heads=2,
        head_dim=128,
        value_dim=128,
        max_length=2048,
    )
    arguments = case.arguments(dtype)
    case.check(decode_attention(**arguments), arguments)


@pytest.mark.gpu
def test_past_two_to_the_31() -> None:
    """The last row's keys lie behind more than 2**31 elements."""
    shape = (5, 4096, 8, 16384)
    storage = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    keys, values = storage[..., -128:], storage[..., :64]
    keys.normal_()
    values.normal_()
    query = torch.randn(5, 8, 128, device="cuda", dtype=torch.bfloat16)
    start = torch.full((5,), 4000, dtype=torch.int32, device="cuda")
    end = torch.full((1,), 4096, dtype=torch.int32, device="cuda")
    key = torch.randn(5, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    store_kv(key, key[..., :64], keys, values, end - 1)
    assert torch.equal(keys[:, -1], key[:, :, 0])
    out = decode_attention(query, keys, values, start, end, scale=0.1)
    compact = (query, keys[:, 4000:], values[:, 4000:], start - 4000, end - 4000)
    expected = decode_attention(*(t.cpu() for t in compact), scale=0.1)
    torch.testing.assert_close(out.cpu(), expected, rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 160])
def test_cuda_graph_and_no_synchronization(num_rows: int, early: bool) -> None:
    """One graph writes a token, reads the cache and goes on to the next column."""
    length, heads, dim = 300, 2, 64
    keys, values = torch.full((2, num_rows, length, heads, dim), torch.nan, device="cuda").half()
    new = torch.randn(2, num_rows, heads, 1, dim, device="cuda").half()
    query = torch.randn(num_rows, 8, dim, device="cuda").half()
    start = torch.arange(num_rows, device="cuda", dtype=torch.int32) % 3
    column = torch.zeros(1, dtype=torch.int64, device="cuda")
    end = column + 1
    outs = []

    def step() -> None:
        for _ in range(2):  # as layers do, on the same cache
            store_kv(*new, keys, values, column)
            outs.append(decode_attention(query, keys, values, start, end, scale=0.1, early=early))
        column.add_(1)
        end.add_(1)

    step()
    with no_synchronization():
        step()
    column.zero_()
    end.fill_(1)
    outs.clear()
    graph, _ = capture(step)
    for i in range(length + 2):
        new.normal_()
        query.normal_()
        graph.replay()
        if i < length:
            assert torch.equal(keys[:, i], new[0, :, :, 0])
            assert torch.equal(values[:, i], new[1, :, :, 0])
        if i % 37 == 0 or i >= length - 1:
            assert torch.equal(outs[0], outs[1])
            now = (query, keys, values, start, torch.full_like(end, i + 1))
            expected = decode_attention(*(t.cpu() for t in now), scale=0.1)
            torch.testing.assert_close(outs[0].cpu(), expected, rtol=2e-3, atol=2e-3)


# ---- compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import json
import torch
from compiling import compiling_for, spilled_bytes
from qmoe_kernels.attention import has_dependent_launch, launch_decode_attention, launch_store_kv

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
for capability in ARCHITECTURES:
    has_dependent_launch.cache_clear()
    with compiling_for(capability) as compiled:
        for dtype, num_heads, kv_heads, head_dim, value_dim, options in [
            (bf16, 32, 4, 128, 128, dict(early=True)),
            (fp16, 64, 2, 192, 128, dict(
                sinks=torch.zeros(64), sliding_window=128, softcap=30.0, early=True)),
            (fp32, 8, 8, 32, 32, dict(sliding_window=128)),
        ]:
            keys, values = (
                torch.zeros(1, 2048, kv_heads, dim, dtype=dtype) for dim in (head_dim, value_dim)
            )
            column = torch.zeros(1, dtype=torch.int32)
            first = len(compiled)
            launch_decode_attention(
                torch.zeros(1, num_heads, head_dim, dtype=dtype), keys, values, column, column,
                1.0, **options,
            )
            if dtype == bf16:
                new = torch.zeros(1, kv_heads, 1, head_dim, dtype=dtype)
                launch_store_kv(new, new, keys, values, column)
            for kernel in compiled[first:]:
                print(json.dumps({
                    "capability": capability,
                    "dtype": str(dtype),
                    "name": kernel.metadata.name,
                    "shared": kernel.metadata.shared,
                    "spilled": spilled_bytes(kernel.asm["cubin"]),
                    "products": "mma" in kernel.asm["ptx"],
                    "wide_copies": "cp.async.cg.shared.global" in kernel.asm["ptx"],
                    "waits": "griddepcontrol.wait" in kernel.asm["ptx"],
                }))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_compiles_for_every_architecture() -> None:
    kernels = run_compiler(f"ARCHITECTURES = {ARCHITECTURES}\n{COMPILE}")
    assert len(kernels) == 5 * len(ARCHITECTURES)
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[kernel["capability"]] * 1024, kernel
        assert kernel["spilled"] == 0, kernel
        assert kernel["waits"] == (kernel["capability"] >= 90), kernel
        if kernel["name"] == "decode_attention_kernel":
            assert kernel["wide_copies"], f"not pipelined: {kernel}"
            assert kernel["products"] or kernel["dtype"] == "torch.float32", kernel
