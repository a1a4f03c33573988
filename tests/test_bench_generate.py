"""Generation's benchmark runs in its tiny configuration; nothing here looks at times."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.generate import __main__ as benchmark
from benchmarks.generate import breakdown, sections
from benchmarks.generate.bench import CALLS, SHORT, TINY_SIZES, Benchmark, Timing, generate
from benchmarks.generate.breakdown import KINDS, Kernel
from benchmarks.generate.targets import targets
from benchmarks.model import TINY
from benchmarks.record import Results
from qmoe.decoding.pieces import PIECES

torch.set_num_threads(1)
CPU = torch.device("cpu")


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    failed = benchmark.main(["--tiny", f"--out={out}", "--commit=test", *arguments])
    return failed, json.loads(out.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("bench") / "generate.json"
    failed, data = run(out)
    assert failed == 0
    return out, data


@pytest.fixture
def bench(tmp_path: Path) -> Benchmark:
    results = Results("generate", tmp_path / "generate.json", {}, targets)
    results.begin("test")
    return Benchmark(TINY, TINY_SIZES, CPU, results)


# ---- sections ----------------------------------------------------------------------------------


def test_every_section_runs(results: tuple[Path, dict[str, Any]]) -> None:
    found = results[1]["sections"]
    assert list(found) == [n for n in benchmark.SECTIONS if n not in benchmark.ON_REQUEST]
    for section in found.values():
        assert "error" not in section and "incomplete" not in section
        assert section["commit"] == "test" and section["machine"]["torch"]
        assert section["command"].startswith("python -m benchmarks.generate --tiny")
    cells = found["decode"]["cells"]
    assert {(c["batch"], c["prompt"], c["sampled"]) for c in cells} == {
        (1, 8, False), (2, 8, False), (1, 8, True), (2, 8, True), (1, 16, False),
    }  # fmt: skip
    assert [c["what"] for c in found["startup"]["cells"]] == [
        *["first call", "call that captures", "call after that"] * 2,
        "call that captures again",
    ]
    assert [c["prompt"] for c in found["prefill"]["cells"]] == [16, 32]
    assert all(c["same_token"] for c in found["prefill"]["cells"])
    assert found["host"]["cells"][0]["steps"] == TINY_SIZES.host
    assert [c["added"] for c in found["steps"]["cells"]] == ["none", *PIECES] * 2
    theirs = found["transformers"]
    assert len({(c["path"], c["batch"]) for c in theirs["cells"]}) == 4
    assert len(theirs["prefill"]) == len(found["transformers_int8"]["cells"]) == 2


def test_tokens_are_those_of_transformers(results: tuple[Path, dict[str, Any]]) -> None:
    checks = results[1]["sections"]["decode"]["checks"]
    assert [c["batch"] for c in checks] == [1, 2]
    for check in checks:
        assert check["share_equal"] >= 0.75 and check["most_behind"] < 0.1


def test_a_breakdown_is_the_whole_step(results: tuple[Path, dict[str, Any]]) -> None:
    for cell in results[1]["sections"]["breakdown"]["cells"]:
        kinds = cell["kinds_ms"]
        assert list(kinds) == list(KINDS)
        assert sum(kinds.values()) == pytest.approx(cell["ms"], abs=1e-3)
        assert cell["kernels"] > 100 and cell["profiled_busy_ms"] > 0
        assert len(cell["largest"]) == breakdown.NUM_LARGEST


def test_kinds_of_a_step_that_ran(bench: Benchmark) -> None:
    run = bench.ours(1, 8)
    steps = breakdown.split(breakdown.profile(lambda: run(3), CPU))
    assert len(steps) == 2  # the prompt's token is the first
    kinds = breakdown.kinds_of([kernel.name for kernel in steps[-1]])
    assert kinds.count("experts") == 2 and kinds.count("head") == 1
    assert kinds.count("linear layers") == 2 * 2  # query, key and value are one product
    assert {"routing", "sampling"} <= set(kinds)


def test_static_cache_on_request(tmp_path: Path) -> None:
    failed, data = run(tmp_path / "generate.json", "--only=transformers_static")
    (cell,) = data["sections"]["transformers_static"]["cells"]
    assert failed == 0 and cell["first_call_s"] > 0 and cell["steps"] == TINY_SIZES.new


def test_pictures_are_drawn_from_the_file(results: tuple[Path, dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    out = results[0]
    assert benchmark.main(["--draw", f"--out={out}"]) == 0
    names = {picture.name for picture in out.parent.glob("*.png")}
    assert names == {"generate_decode.png", "generate_breakdown.png"}


def test_a_section_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setitem(benchmark.SECTIONS, "startup", broken)
    failed, data = run(tmp_path / "generate.json", "--only=startup,prefill")
    assert failed == 1
    assert data["sections"]["startup"]["error"] == "RuntimeError: no such luck"
    assert len(data["sections"]["prefill"]["cells"]) == 2
    assert "no such luck" in capsys.readouterr().err


def test_when_time_is_up_what_was_measured_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "generate.json"
    run(out, "--only=prefill")
    _, data = run(out, "--only=decode,host", "--seconds=0")
    assert data["sections"]["decode"]["incomplete"] and "host" not in data["sections"]
    assert len(data["sections"]["decode"]["checks"]) == 1
    assert len(data["sections"]["prefill"]["cells"]) == 2  # of the run before


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--tiny"], "another --out"),
        (["--tiny", f"--out={tmp_path / 'x.json'}", "--only=host,nothing"], "no section nothing"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(arguments)
        assert said in capsys.readouterr().err


def test_compilers_find_nothing_and_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with benchmark.empty_compiler_caches():
        assert not Path(os.environ["TRITON_CACHE_DIR"]).exists()
        assert "TORCHINDUCTOR_CACHE_DIR" in os.environ
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


# ---- what is measured --------------------------------------------------------------------------


def test_a_step_is_a_long_call_less_a_short_one(
    bench: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm: list[int] = []
    monkeypatch.setattr(bench, "seconds", lambda _, num_new: 0.5 + 0.25 * num_new)
    timing = bench.time_steps(warm.append, 16)
    assert warm == [SHORT + 16, *[SHORT] * CALLS]
    assert timing == Timing(16, [0.25], 5.5)
    cell = timing.cell(8, 128)
    assert cell["tokens_per_s"] == 32.0 and cell["ms"] == [250.0]
    bench.time_steps(warm.append, 16, warm=True)
    assert len(warm) == 1 + CALLS
    assert bench.affordable_steps(warm.append) == 2  # 0.25 s each, of 0.01
    monkeypatch.setattr(bench, "seconds", lambda _, num_new: 1e-9 * num_new)
    assert bench.affordable_steps(warm.append) == TINY_SIZES.new


def test_a_call_that_stops_early_is_no_measurement() -> None:
    class Model:
        def generate(self, input_ids: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
            return torch.cat((input_ids, input_ids[:, :1].expand(-1, max_new_tokens - 1)), 1)

    with pytest.raises(ValueError, match="5 tokens were asked for"):
        generate(Model(), torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3), 5)


def test_a_loop_that_is_not_ours_is_no_measurement(bench: Benchmark) -> None:
    run = bench.ours(1, 8, use_cache=False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="use_cache=False"):
            run(2)


def test_tokens_that_differ_are_found(bench: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        return model._sample(input_ids, **kwargs)

    def wrong(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        tokens = theirs(model, input_ids, **kwargs)
        tokens[-1, TINY_SIZES.prompt + 2] = (tokens[-1, TINY_SIZES.prompt + 2] + 1) % 64
        return tokens

    monkeypatch.setattr(sections, "decode", theirs)
    right = sections.compare(bench, 2)
    assert right == {
        "batch": 2, "tokens": 4, "equal": True, "first_difference": None, "share_equal": 1.0,
        "most_behind": 0.0,
    }  # fmt: skip
    monkeypatch.setattr(sections, "decode", wrong)
    found = sections.compare(bench, 2)
    assert not found["equal"] and found["first_difference"] == 2
    assert 0 < found["share_equal"] < 1 and found["most_behind"] > 0.1


def test_which_targets_were_met() -> None:
    decode = {"prompt": 128, "sampled": False}
    found = targets(
        {
            "decode": {
                "cells": [
                    decode | {"batch": 1, "tokens_per_s": 301.0},
                    decode | {"batch": 64, "tokens_per_s": 5999.0},
                    decode | {"batch": 8, "tokens_per_s": 1.0, "sampled": True},
                    decode | {"batch": 8, "tokens_per_s": 1.0, "prompt": 1024},
                ]
            },
            "prefill": {"cells": [{"prompt": 2048, "tokens_per_s": 5e4}]},
            "startup": {
                "cells": [
                    {"batch": 1, "what": "first call", "seconds": 9.0},
                    {"batch": 1, "what": "call that captures", "seconds": 1.5},
                    {"batch": 1, "what": "call after that", "seconds": 0.1},
                ]
            },
            "host": {"cells": [{"cores": 0.21}]},
        }
    )
    assert {t["what"]: (t["measured"], t["met"]) for t in found} == {
        "decode, batch 1: tokens/s": (301.0, True),
        "decode, batch 64: tokens/s": (5999.0, False),
        "prefill, 2048 tokens: tokens/s": (5e4, True),
        "start-up, batch 1, first call included: s": (9.0, True),
        "start-up, batch 1, call that captures included: s": (10.5, False),
        "host while decoding: cores": (0.21, False),
    }


# ---- kinds of kernels --------------------------------------------------------------------------


def a_step(layers: int = 2) -> Iterator[tuple[str, str]]:
    """Names of a decode step's kernels on a GPU, and their kinds."""
    nvjet = "nvjet_tst_64x8_64x16_4x1_v_bz_splitK_TNT"
    add = "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<float>>"
    yield "void at::native::(anonymous namespace)::indexSelectSmallIndex<c10::BFloat16>", "other"
    for _ in range(layers):
        yield "rms_norm_kernel", "norms"
        yield nvjet, "linear layers"
        yield "void cublasLt::splitKreduce_kernel<32, 16, int>", "linear layers"
        yield "rotate_kernel", "attention"
        yield "store_kv_kernel", "attention"
        yield "decode_attention_kernel", "attention"
        yield "void gemv2T_kernel_val<int, int, __nv_bfloat16>", "linear layers"
        yield add, "other"
        yield "rms_norm_kernel", "norms"
        yield nvjet, "routing"
        yield "select_experts_kernel", "routing"
        yield "routing_kernel", "routing"
        yield "gemv_kernel", "experts"
        yield "weighted_sum_kernel", "experts"
        yield add, "other"
    yield "rms_norm_kernel", "norms"
    yield nvjet, "head"
    yield "void cublasLt::splitKreduce_kernel<32, 16, int>", "head"
    yield "void at::native::unrolled_elementwise_kernel<at::native::direct_copy>", "sampling"
    yield "void at::native::reduce_kernel<512, 1, at::native::ArgMaxOps<float>>", "sampling"
    yield "Memcpy DtoH (Device -> Pinned)", "sampling"


def test_kinds_of_a_steps_kernels() -> None:
    pytest.importorskip("triton")
    names, kinds = zip(*a_step(), strict=True)
    assert breakdown.kinds_of(names) == list(kinds)


def test_every_kernel_of_ours_has_a_kind() -> None:
    pytest.importorskip("triton")
    own = breakdown.own_kernels()
    for name, kind in (
        ("grouped_gemm_kernel", "experts"),
        ("hopper_gemm_kernel", "experts"),
        ("quantize_rows_kernel", "experts"),
        ("sort_rows_kernel", "routing"),
        ("sort_pairs_kernel", "routing"),
        ("combine_splits_kernel", "attention"),
        ("linear_fma_kernel", "product"),  # until its place says which
    ):
        assert own[name] == kind, name
    assert set(own.values()) <= {*KINDS, "product"}


def test_kinds_where_transformers_routes_and_attends() -> None:
    names = (
        "ampere_bf16_s16816gemm_bf16",
        "void pytorch_flash::flash_fwd_splitkv_kernel<cutlass::bfloat16_t>",
        "nvjet_o",
        "nvjet_router",
        "void (anonymous namespace)::softmax_warp_forward<float>",
        "void at::native::sbtopk::gatherTopK<float>",
        "nvjet_head",
        "void (anonymous namespace)::softmax_warp_forward<float>",
    )
    assert breakdown.kinds_of(names) == [
        "linear layers", "attention", "linear layers", "routing", "other", "routing", "head",
        "sampling",
    ]  # fmt: skip


def test_kernels_that_overlap_count_once() -> None:
    kernels = [Kernel("a", 0, 10), Kernel("b", 8, 14), Kernel("c", 9, 12), Kernel("d", 20, 21)]
    assert breakdown.busy(kernels) == [10, 4, 0, 1]


def test_gaps_are_what_no_kernel_takes() -> None:
    kernels = [Kernel(name, 10.0 * i, 10.0 * i + 8) for i, (name, _) in enumerate(a_step())]
    ms = 8e-3 * len(kernels) + 0.5
    found = breakdown.breakdown(kernels, ms)
    assert found["gaps"] == pytest.approx(0.5, abs=1e-3)
    assert sum(found.values()) == pytest.approx(ms, abs=1e-3)
    shorter = breakdown.breakdown(kernels, ms / 4)  # the profiler slows kernels down
    assert shorter["gaps"] == pytest.approx(0, abs=1e-3)
    assert sum(shorter.values()) == pytest.approx(ms / 4, abs=1e-3)
    assert shorter["head"] / shorter["norms"] == pytest.approx(found["head"] / found["norms"], 0.02)


def test_steps_end_where_tokens_go_to_the_host() -> None:
    names = [name for _ in range(3) for name, _ in a_step(1)]
    steps = breakdown.split([Kernel(name, i, i + 1) for i, name in enumerate([*names, "later"])])
    assert [[k.name for k in step] for step in steps] == [[n for n, _ in a_step(1)]] * 2
    with pytest.raises(ValueError, match="none ends a step"):
        breakdown.split([Kernel("a", 0, 1)])


def test_largest_kernels_first() -> None:
    kernels = [Kernel(name, 10.0 * i, 10.0 * i + 1) for i, (name, _) in enumerate(a_step())]
    first, *_, last = breakdown.largest(kernels)
    assert first["launches"] == 5 and first["kind"] == "norms" and first["us"] == 5.0
    assert last["launches"] == 1
