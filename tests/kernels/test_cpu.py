"""The native loops of a processor, against the reference in fp64 and against themselves."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from signal import SIGINT

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layer import Layer, assert_close, random_layer

from qmoe_kernels import Activation, cpu, fused_moe, grouped_linear, weighted_sum
from qmoe_kernels.cpu import native

pytestmark = pytest.mark.skipif(
    native.address_of("layer") is None, reason="no native loops on this machine"
)

ACTIVATIONS = [
    Activation(),
    Activation("gelu"),
    Activation("gelu_tanh", limit=0.3),
    Activation("relu", gated=False),
    Activation("relu2"),
    Activation(alpha=1.702, up_shift=1.0, limit=0.5),
    Activation(limit=0.4, limit_after=True),
    Activation(gate_softcap=0.7, up_softcap=0.5),
]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    num_tokens=st.integers(0, 50),
    num_experts=st.integers(1, 9),
    hidden_size=st.integers(1, 150),
    intermediate_size=st.integers(1, 90),
    weights=st.sampled_from(["int8", "fp8"]),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    skewed=st.booleans(),
)
def test_any_shape(
    seed: int, num_tokens: int, num_experts: int, activation: Activation, skewed: bool, **case: int
) -> None:
    layer = random_layer(
        seed=seed,
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=min(3, num_experts),
        activation=activation,
        **case,  # type: ignore[arg-type]
    )
    ids = torch.randint(-1, num_experts + 1, layer.topk_ids.shape)  # both ends are skipped
    layer.topk_ids = torch.full_like(ids, num_experts - 1) if skewed else ids
    slots = torch.randperm(num_experts + 2)[:num_experts].to(torch.int32)
    gate_up, down = (
        w.new_zeros(num_experts + 2, *w.shape[1:])
        .view(torch.int8)
        .index_copy(0, slots.long(), w.view(torch.int8))
        .view(w.dtype)
        for w in (layer.gate_up_proj, layer.down_proj)
    )
    layer = replace(layer, gate_up_proj=gate_up, down_proj=down, expert_to_slot=slots)
    assert_close(layer.fused_moe(), layer.reference())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_every_gate(activation: Activation) -> None:
    layer = random_layer(activation=activation, bias=True, num_tokens=30)
    assert_close(layer.fused_moe(), layer.reference())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gates_at_infinity_are_torch_s(sign: float) -> None:
    from qmoe_kernels.activations import apply

    one = torch.ones(1, 2, 1, dtype=torch.int8)
    for activation in ACTIVATIONS:
        for x in (90.0, 1e30, float("inf"), float("nan")):
            expected = apply(activation, torch.full((1, 2 if activation.gated else 1), sign * x))
            actual = fused_moe(
                torch.full((1, 1), sign * x),
                one if activation.gated else one[:, :1],
                torch.ones(1, 2 if activation.gated else 1),
                one[:, :1],
                torch.ones(1, 1),
                torch.zeros(1, 1, dtype=torch.int64),
                torch.ones(1, 1),
                activation=activation,
            )
            torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 40])
def test_the_256_codes_of_fp8(rows: int, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    ids = torch.zeros(rows, 1, dtype=torch.int64)
    expected = codes.float().expand(rows, 1, 256).to(dtype)
    for columns in (1, 64, 80):  # alone, and among zeros in any lane of a line
        for place in {0, columns // 3, columns - 1}:
            weight = torch.zeros(1, 256, columns, dtype=torch.float8_e4m3fn)
            weight[0, :, place] = codes
            x = torch.ones(rows, columns, dtype=dtype)
            out = grouped_linear(x, weight, torch.ones(1, 256), ids)
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    # Within a row, too, at any place of it.
    for columns in (16, 64, 100):
        weight = torch.zeros(1, columns, columns, dtype=torch.int8)
        weight[0].fill_diagonal_(0x7F)
        out = grouped_linear(
            torch.ones(rows, columns, dtype=dtype),
            weight.view(torch.float8_e4m3fn),
            torch.ones(1, columns),
            ids,
        )
        assert out.isnan().all()


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_subnormal_sums_are_kept(weights: str) -> None:
    layer = random_layer(weights=weights)
    layer.hidden_states *= 1e-37
    out = grouped_linear(
        layer.hidden_states, layer.gate_up_proj, layer.gate_up_proj_scale, layer.topk_ids
    )
    assert out.abs().max() > 0 and out.abs().max() < 1e-35


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_same_bits(weights: str, dtype: torch.dtype, two_threads: None) -> None:
    """Whatever the threads are, and the other tokens."""
    layer = random_layer(
        weights=weights, dtype=dtype, num_tokens=21, hidden_size=300, intermediate_size=180
    )
    out = layer.fused_moe()
    assert torch.equal(out, layer.fused_moe())
    torch.set_num_threads(1)
    assert torch.equal(out, layer.fused_moe())
    for token in (0, 7, 20):
        alone = layer.tokens(slice(token, token + 1)).fused_moe()
        assert torch.equal(out[token : token + 1], alone)
    rows = replace(layer, topk_weights=None).fused_moe()
    assert torch.equal(weighted_sum(rows, layer.topk_weights), out)


@pytest.mark.parametrize("num_tokens", [1, 5, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_uninitialized_is_read(num_tokens: int, dtype: torch.dtype) -> None:
    layer = random_layer(num_tokens=num_tokens, hidden_size=41, intermediate_size=23, dtype=dtype)
    layer.topk_ids[0, 0] = -1
    expected = layer.reference()
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        assert torch.empty(1).isnan()
        assert_close(layer.fused_moe(), expected)
        unreduced = replace(layer, topk_weights=None)
        assert_close(unreduced.fused_moe(), unreduced.reference())
    finally:
        torch.use_deterministic_algorithms(False)


def test_strides_and_default_settings() -> None:
    layer = random_layer(num_tokens=3, hidden_size=50, intermediate_size=30, bias=True)
    expected = layer.reference()
    room = torch.zeros(6, 48 + 12, 64, dtype=torch.int8)
    padded = room[:, :60, :50]
    padded.copy_(layer.gate_up_proj)
    out = replace(layer, gate_up_proj=padded)
    torch.set_default_dtype(torch.float64)
    try:
        assert_close(out.fused_moe(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_python_threads_at_once(two_threads: None) -> None:
    layers = [random_layer(seed=i, hidden_size=256, intermediate_size=128) for i in range(4)]
    expected = [layer.fused_moe() for layer in layers]
    wrong: list[int] = []

    def work(i: int) -> None:
        torch.set_num_threads(2)
        for _ in range(20):
            if not torch.equal(layers[i].fused_moe(), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def in_child(is_right: Callable[[], bool]) -> int | None:
    """The exit status of a forked child, 0 where ``is_right``; None: it hung."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if is_right() else 2
        finally:
            os._exit(code)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def cpu_product(layer: Layer) -> torch.Tensor:
    x = layer.hidden_states
    return grouped_linear(x, layer.gate_up_proj, layer.gate_up_proj_scale, layer.topk_ids)


@pytest.mark.skipif(os.name != "posix", reason="no signal from a thread")
def test_ctrl_c_comes_when_a_call_ends() -> None:
    layer = random_layer(num_tokens=1, num_experts=2, hidden_size=4096, intermediate_size=4096)
    layer.topk_ids = torch.zeros(32, 1, dtype=torch.int64)  # of one expert, done by the loops
    layer.topk_weights = torch.ones(32, 1)
    layer.hidden_states = layer.hidden_states.expand(32, -1).contiguous()
    expected = layer.fused_moe()
    begin = time.perf_counter()
    layer.fused_moe()
    press = threading.Timer((time.perf_counter() - begin) / 2, os.kill, (os.getpid(), SIGINT))
    with pytest.raises(KeyboardInterrupt):
        press.start()
        while True:  # the signal is for the first call, on a busy machine for a later one
            layer.fused_moe()
    assert torch.equal(layer.fused_moe(), expected)


@pytest.mark.skipif(os.name != "posix", reason="no signal from a thread")
def test_ctrl_c_waits_for_threads_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without OpenMP: what the threads write to is freed once the interrupt is raised."""
    monkeypatch.setattr(native, "_openmp", lambda: None)
    ended = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def loop(_: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(1.0)
            ended.append(True)

    address = ctypes.cast(loop, ctypes.c_void_p).value
    assert address is not None and native.address_of("spread")  # compiled before
    press = threading.Timer(0.3, os.kill, (os.getpid(), SIGINT))
    with pytest.raises(KeyboardInterrupt):
        press.start()
        native._run(address, 0, 3)
    assert ended == [True, True]


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_same_bits_without_openmp(
    weights: str, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = random_layer(weights=weights, num_tokens=9, hidden_size=256, intermediate_size=128)
    expected = layer.fused_moe()
    monkeypatch.setattr(native, "_openmp", lambda: None)
    assert torch.equal(layer.fused_moe(), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_after_a_fork(two_threads: None) -> None:
    layer = random_layer(hidden_size=256, intermediate_size=128)
    expected = cpu_product(layer)  # on two threads, which a child does not have
    assert in_child(lambda: torch.equal(cpu_product(layer), expected)) == 0
    assert torch.equal(cpu_product(layer), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_torch_s_own_operators_after_a_fork(two_threads: None) -> None:
    """Rows that are cast in parallel, and an expert with as many as torch's product takes."""
    many_rows = replace(
        random_layer(num_tokens=90, num_experts=2, hidden_size=1024, intermediate_size=128),
        topk_ids=torch.zeros(90, 1, dtype=torch.int64),
        topk_weights=torch.ones(90, 1),
    )
    wide = random_layer(num_tokens=16, hidden_size=4096, dtype=torch.bfloat16)
    for layer in (many_rows, wide):
        expected = layer.fused_moe()
        assert in_child(lambda: torch.equal(layer.fused_moe(), expected)) == 0  # noqa: B023
        assert torch.equal(layer.fused_moe(), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_after_a_fork_with_an_openmp_that_keeps_its_threads(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = random_layer(hidden_size=256, intermediate_size=128)
    expected = cpu_product(layer)
    monkeypatch.setattr(native, "_end_team", lambda: False)
    assert in_child(lambda: torch.equal(cpu_product(layer), expected)) == 0


def test_without_native_loops_torch_does_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(group: str) -> dict[str, int]:
        raise RuntimeError("numba is not installed")

    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "_load", missing)
    with caplog.at_level(logging.WARNING):
        for bias in (False, True):
            layer = random_layer(num_tokens=20, bias=bias)
            layer.topk_ids[0] = torch.tensor([-1, 6])
            assert_close(layer.fused_moe(), layer.reference())
    assert [r.getMessage() for r in caplog.records if r.name == native.__name__] == [
        "experts run on the CPU by torch alone, some ten times slower: the native loops are "
        "missing (RuntimeError: numba is not installed)"
    ]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="another processor")
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_a_processor_without_avx512_has_the_same_bits(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = random_layer(
        weights=weights, num_tokens=9, num_experts=2, hidden_size=200, intermediate_size=70
    )
    expected = layer.fused_moe()
    with another_processor(monkeypatch, "haswell", "+avx2,+fma,+f16c", wide=False, pairs=False):
        assert torch.equal(layer.fused_moe(), expected)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("hidden_size", [64, 200, 37])
def test_pairs_of_bf16_are_sums_of_fp32(
    num_tokens: int, hidden_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 weights with bf16 rows, as the processor multiplies pairs and as one without does."""
    if not native.this_machine().pairs:
        pytest.skip("the processor has no products of pairs")
    layer = random_layer(
        weights="fp8",
        dtype=torch.bfloat16,
        num_tokens=num_tokens,
        num_experts=2,
        hidden_size=hidden_size,
        intermediate_size=70,
    )
    args = layer.hidden_states, layer.gate_up_proj, layer.gate_up_proj_scale, layer.topk_ids
    actual = grouped_linear(*args)
    machine = native.this_machine()
    with another_processor(monkeypatch, machine.cpu, machine.features, wide=True, pairs=False):
        expected = grouped_linear(*args)
    # Sums in another order: a step of bf16 where they lie between two, and that rarely.
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-5)
    assert (actual != expected).float().mean() < 0.05


@contextmanager
def another_processor(
    monkeypatch: pytest.MonkeyPatch, cpu_name: str, features: str, *, wide: bool, pairs: bool
) -> Iterator[None]:
    """Run what another processor runs, one that has less."""
    other = native.Machine(native.this_machine().triple, cpu_name, features, wide, pairs)
    cpu._dots.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(native, "this_machine", lambda: other)
        patched.setattr(native, "_loaded", {})
        patched.setattr(native, "cache_folder", lambda: native.Path("/dev/null"))
        yield
    cpu._dots.cache_clear()


def test_machine_code_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = native.cache_folder() / "x.o"
    assert native._read(file) is None
    native._write(file, b"code")
    assert native._read(file) == b"code"
    file.write_bytes(file.read_bytes()[:-1])
    assert native._read(file) is None  # not whole
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # no folder: nothing is kept, nothing raised
    native._write(native.cache_folder() / "x.o", b"code")


def test_a_user_without_a_home_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> native.Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", home)
    monkeypatch.setattr(native, "_loaded", {})
    assert native.address_of("spread") is not None
    file = native.cache_folder() / "x.o"
    native._write(file, b"code")
    assert native._read(file) is None
