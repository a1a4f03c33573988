"""Which tiles are looked up, tried, compiled and kept."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from compiling import run_compiler

from qmoe_kernels import precompile, tile_timing, tuning
from qmoe_kernels.heuristic import heuristic_tiles
from qmoe_kernels.precompile import Precompiler, failures
from qmoe_kernels.tile_search import (
    FINAL,
    Cell,
    candidates,
    registers,
    search,
    shared_memory,
)
from qmoe_kernels.tile_tables import (
    OPERANDS,
    LayerKind,
    Measurement,
    TileTable,
    table_path,
    tiles_from_dict,
)
from qmoe_kernels.tiles import LayerShape, LayerTiles, TileConfig
from qmoe_kernels.tuning import choose_tiles

QWEN3 = LayerShape(128, 8, 2048, 768)
MIXTRAL = LayerShape(8, 2, 4096, 14336)
ODD = LayerShape(32, 4, 2880, 704, gated=False)
KIND = LayerKind(QWEN3, "int8", "bf16")
GPU, CUDA = "NVIDIA H200", torch.device("cuda", 0)


def tiles(block_n: int, sort: bool = True) -> LayerTiles:
    tile = TileConfig(16, block_n, 128, 4, 3)
    return LayerTiles(tile, replace(tile, block_k=256, tail_m=8), sort)


def measured(layer: LayerTiles) -> Measurement:
    return Measurement(layer, 10.5, 12.0, {"torch": "2", "commit": "abc"})


def by_rule(cell: Cell) -> LayerTiles:
    """What runs where there is no table and no Hopper."""
    return heuristic_tiles(cell.kind.shape, cell.num_tokens, *cell.dtypes)


def table(**block_n: int) -> TileTable:
    """One row; ``t16=64`` says that 64 channels were best for 16 tokens."""
    row = {int(name[1:]): measured(tiles(n)) for name, n in block_n.items()}
    return TileTable(GPU, {KIND: row})


class TestLookup:
    @pytest.mark.parametrize(
        ("num_tokens", "block_n"),
        [
            (16, 64),
            (31, 64),
            (33, 128),
            (32, 128),  # as far from both: the larger
            (250, 256),
            (8, 64),  # within a factor of 2 of the smallest
            (7, None),
            (1, None),
            (512, 256),
            (513, None),
        ],
    )
    def test_nearest_on_a_log_scale(self, num_tokens: int, block_n: int | None) -> None:
        found = table(t16=64, t64=128, t256=256).find(KIND, num_tokens)
        assert found == (None if block_n is None else tiles(block_n))

    @pytest.mark.parametrize(
        "kind",
        [
            replace(KIND, weights="fp8"),
            replace(KIND, activations="int8"),
            replace(KIND, shape=replace(QWEN3, top_k=4)),
            replace(KIND, shape=replace(QWEN3, gated=False)),
        ],
    )
    def test_another_kind_of_layer_is_not_found(self, kind: LayerKind) -> None:
        assert table(t16=64).find(kind, 16) is None

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A user's folder, empty, on a machine with `GPU`."""
        monkeypatch.setattr(tuning, "_gpu_name", lambda index: GPU)
        monkeypatch.setenv(tuning.CONFIGS_VARIABLE, str(tmp_path))
        for cached in (tuning._choose, tuning._table):
            cached.cache_clear()
        return tmp_path

    def choose(
        self,
        num_tokens: int,
        *,
        activations: torch.dtype = torch.bfloat16,
        device: torch.device = CUDA,
    ) -> LayerTiles:
        return choose_tiles(QWEN3, num_tokens, torch.int8, activations, device)

    def test_the_table_then_the_rule(self, folder: Path) -> None:
        table(t16=64, t256=32).write(table_path(folder, GPU))
        assert (folder / "NVIDIA_H200.json").exists()
        assert self.choose(16) == tiles(64)
        assert self.choose(256) == tiles(32)
        heuristic = heuristic_tiles(QWEN3, 4096, torch.int8, torch.bfloat16)
        assert self.choose(4096) == heuristic
        assert self.choose(16, activations=torch.float16) == tiles(64)
        for other in (
            self.choose(16, activations=torch.int8),
            self.choose(16, activations=torch.float32),
            self.choose(16, device=torch.device("cpu")),
        ):
            assert other != tiles(64)

    def test_a_gpu_without_a_table(self, folder, monkeypatch) -> None:
        table(t16=64).write(table_path(folder, "another"))
        assert self.choose(16) == heuristic_tiles(QWEN3, 16, torch.int8, torch.bfloat16)

    def test_no_tokens(self, folder) -> None:
        table(t1=64).write(table_path(folder, GPU))
        assert self.choose(0) == heuristic_tiles(QWEN3, 0, torch.int8, torch.bfloat16)

    def test_many_pairs_are_sorted_whatever_the_nearest_did(self, folder) -> None:
        row = {n: measured(tiles(64, sort=False)) for n in (16, 4096)}
        TileTable(GPU, {KIND: row}).write(table_path(folder, GPU))
        assert not self.choose(64).sort
        assert self.choose(65).sort

    def test_tables_are_read_once(self, folder) -> None:
        path = table_path(folder, GPU)
        table(t16=64).write(path)
        assert self.choose(16) == tiles(64)
        path.unlink()
        assert self.choose(17) == tiles(64)

    def test_a_folder_that_is_not_there(self, folder, monkeypatch) -> None:
        monkeypatch.setenv(tuning.CONFIGS_VARIABLE, "no/such")
        with pytest.raises(ValueError, match="QMOE_CONFIGS=no/such: no such folder"):
            self.choose(16)


class TestTables:
    def test_round_trip_and_one_line_for_a_tile(self, tmp_path: Path) -> None:
        path = tmp_path / "t.json"
        written = table(t256=32, t16=64)
        other = LayerKind(ODD, "fp8", "fp8")
        written.add(other, 4, measured(tiles(64, sort=False)))
        written.write(path)
        assert TileTable.read(path) == written
        text = path.read_text()
        assert '"gate_up": {"block_m": 16, "block_n": 64, "block_k": 128' in text
        assert text.index('"16"') < text.index('"256"')
        assert [p.name for p in tmp_path.iterdir()] == ["t.json"]

    def test_a_newer_measurement_takes_the_place(self) -> None:
        found = table(t16=64)
        found.add(KIND, 16, measured(tiles(128)))
        assert found.rows == table(t16=128).rows

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('"block_k": 128', '"block_k": 100', "block_k is 100; a power of two works"),
            ('"block_k": 128', '"block_q": 128', "gate_up: block_k missing"),
            ('"num_warps": 4', '"num_warps": true', "num_warps is True"),
            ('"num_stages": 3', '"num_stages": 0', "num_stages is 0; a positive integer works"),
            ('"sort": true', '"sort": 1', "sort is 1; true and false work"),
            ('"microseconds": 10.5', '"microseconds": "fast"', "microseconds is 'fast'"),
            ('"sort": true,', "", "sort missing"),
            ('"top_k": 8', '"top_k": -8', "top_k is -8"),
            ('"int8"', '"int3"', "unknown weights 'int3'"),
            ('"16"', '"many"', "is no number of tokens"),
            ('"rows"', '"row"', "the top: rows missing"),
            ('{"block_m": 16', '[{"block_m": 16', "is not JSON"),
            ('"rows"', '"gpu": ' + "[" * 100_000 + ', "rows"', "is not JSON"),
            ('"block_k": 128', '"block_k": 4096', "block_k is 4096; at most 1024 works"),
            ('"num_warps": 4', '"num_warps": 64', "num_warps is 64; at most 16 works"),
            ('"num_stages": 3', '"num_stages": 1000', "num_stages is 1000; at most 8 works"),
            ('"16"', '"016"', "is no number of tokens"),
            ('"16"', '"1' + "0" * 400 + '"', "is no number of tokens"),
        ],
    )
    def test_malformed(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        path = tmp_path / "t.json"
        table(t16=64).write(path)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError) as caught:
            TileTable.read(path)
        assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
        if "top" not in message and "JSON" not in message:
            assert "row 0" in str(caught.value)

    def test_a_missing_tail_is_none(self, tmp_path: Path) -> None:
        path = tmp_path / "t.json"
        table(t16=64).write(path)
        path.write_text(path.read_text().replace(', "tail_m": 0', ""))
        assert TileTable.read(path) == table(t16=64)

    @pytest.mark.parametrize("content", ["[]", "3", '{"gpu": "x", "rows": [3]}'])
    def test_another_kind_of_json(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "t.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"t\.json: .*is no object with"):
            TileTable.read(path)

    def test_a_row_twice(self, tmp_path: Path) -> None:
        path = tmp_path / "t.json"
        table(t16=64).write(path)
        content = json.loads(path.read_text())
        content["rows"] *= 2
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="row 1: a second row for the same layer"):
            TileTable.read(path)


KINDS = [
    LayerKind(shape, weights, activations)
    for shape in (QWEN3, MIXTRAL, ODD)
    for weights, activations in [
        ("int8", "bf16"),
        ("fp8", "bf16"),
        ("int8", "int8"),
        ("fp8", "fp8"),
        ("bf16", "bf16"),
    ]
]


def test_a_kernel_of_hoppers_is_kept_in_tables() -> None:
    tiles = candidates(Cell(KIND, 4096), hopper=True)[-1].start
    assert tiles.tma and tiles_from_dict(asdict(tiles)) == tiles
    stored = {**asdict(tiles), "tma": 1}
    with pytest.raises(ValueError, match="tma is 1; true and false work"):
        tiles_from_dict(stored)


class TestCandidates:
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    @pytest.mark.parametrize("effort", ["quick", "full"])
    def test_they_fit_and_are_enough(self, kind: LayerKind, effort: str) -> None:
        for num_tokens in (1, 4, 16, 64, 256, 1024, 4096, 32768):
            found = candidates(Cell(kind, num_tokens), effort)
            few = num_tokens <= 4 and num_tokens * kind.shape.top_k < 0.3 * kind.shape.num_experts
            gemv = (num_tokens == 1 or few) and kind.activations == "bf16"
            assert len(found) == 1 + gemv
            for kernel in found:
                for options in (kernel.gate_up, kernel.down):
                    assert len(options) == len(set(options))
                    assert len(options) >= 8
                    if effort == "quick":
                        assert len(options) <= 24
                    for tile in options:
                        assert shared_memory(tile, kind) <= 227 * 1024
                        assert registers(tile, kind) < 200
                        assert tile.tail_m < tile.block_m
                # Both products run on the same kernel.
                one_row = {t.block_m == 1 for t in (*kernel.gate_up, *kernel.down)}
                start = {kernel.start.gate_up.block_m == 1, kernel.start.down.block_m == 1}
                assert one_row == start and len(start) == 1

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_hopper_has_a_kernel_of_its_own(self, kind: LayerKind) -> None:
        for num_tokens in (1, 4, 4096):
            plain = candidates(Cell(kind, num_tokens))
            found = candidates(Cell(kind, num_tokens), hopper=True)
            assert found[: len(plain)] == plain
            more = [tiles for kernel in found[len(plain) :] for tiles in kernel.pairs()]
            assert bool(more) == (num_tokens > 1)
            assert all(tiles.tma and tiles.sort and tiles.gate_up == tiles.down for tiles in more)

    def test_quick_is_part_of_full(self) -> None:
        for kind in KINDS:
            quick, full = (candidates(Cell(kind, 64), e)[0] for e in ("quick", "full"))
            assert list(full.gate_up[: len(quick.gate_up)]) == list(quick.gate_up)
            assert len(full.gate_up) > 100

    @pytest.mark.parametrize(
        ("num_tokens", "sort"),
        [(1, [False]), (16, [False, True]), (32, [False, True]), (33, [True])],
    )
    def test_sorting(self, num_tokens: int, sort: list[bool]) -> None:
        assert candidates(Cell(KIND, num_tokens))[0].sort == sort

    def test_estimates(self) -> None:
        tile = TileConfig(16, 128, 64, num_warps=4, num_stages=3)
        assert shared_memory(tile, KIND) == 3 * (128 * 64 + 16 * 64 * 2)
        assert shared_memory(tile, replace(KIND, weights="bf16")) == 3 * 64 * 2 * (128 + 16)
        assert registers(tile, KIND) == (16 * 128 + 128 * 64 / 2) / 128
        assert registers(tile, replace(KIND, activations="int8")) == 16 * 128 / 128

    def test_pairs_hold_every_tile_and_the_start_both_ways(self) -> None:
        kernel = candidates(Cell(KIND, 16))[0]
        pairs = kernel.pairs()
        assert {p.gate_up for p in pairs} >= set(kernel.gate_up)
        assert {p.down for p in pairs} >= set(kernel.down)
        assert {p.sort for p in pairs if p.gate_up == kernel.start.gate_up} == {False, True}

    def test_without_what_does_not_compile(self) -> None:
        kernel = candidates(Cell(KIND, 64))[0]
        kernel = replace(kernel, down=kernel.down[:3])  # the last one goes with many of the first
        assert kernel.start.gate_up != kernel.gate_up[-1]
        broken = [p for p in kernel.pairs() if p.gate_up == kernel.gate_up[-1]]
        left = kernel.without(broken)
        assert list(left.gate_up) == list(kernel.gate_up[:-1])
        assert list(left.down) == list(kernel.down)


class Landscape:
    """Times of tiles by a formula, as a search sees them."""

    def __init__(self, best: LayerTiles) -> None:
        self.best = best
        self.asked: list[tuple[LayerTiles, float]] = []
        self.broken: set[TileConfig] = set()
        self.now = 0.0

    def __call__(self, layer: LayerTiles, seconds: float, bound: float | None) -> float | None:
        self.asked.append((layer, seconds))
        self.now += 1.0
        if layer.gate_up in self.broken:
            return None
        distance = 100.0 + 10 * (layer.sort != self.best.sort)
        for name in ("gate_up", "down"):
            mine, best = asdict(getattr(layer, name)), asdict(getattr(self.best, name))
            distance += sum(abs(math.log2((v + 1) / (best[k] + 1))) for k, v in mine.items())
        return distance


class TestSearch:
    def test_sorted_pairs_keep_one_block_m(self) -> None:
        cell = Cell(KIND, 64)
        (kernel,) = candidates(cell)
        assert kernel.start.sort
        for step in ("gate_up", "down"):
            assert len({tile.block_m for tile in getattr(kernel, step)}) > 1
        best = LayerTiles(kernel.gate_up[-1], kernel.gate_up[-1], sort=True)
        times = Landscape(best)
        found = search(
            cell, [kernel], times, baseline=by_rule(cell), seconds=1e9, clock=lambda: times.now
        )
        assert found.tiles == best
        with pytest.raises(ValueError, match="block_m is 16 in gate_up and 32 in down"):
            LayerTiles(TileConfig(16, 64, 64, 4, 3), TileConfig(32, 64, 64, 4, 3), sort=True)
        unsorted = LayerTiles(TileConfig(16, 64, 64, 4, 3), TileConfig(32, 64, 64, 4, 3), False)
        assert unsorted.sorted().down == TileConfig(16, 64, 64, 4, 3)

    def test_finds_the_best(self) -> None:
        cell = Cell(KIND, 16)
        (kernel,) = candidates(cell)
        best = LayerTiles(kernel.gate_up[7], kernel.down[3], sort=True)
        times = Landscape(best)
        found = search(
            cell, [kernel], times, baseline=by_rule(cell), seconds=1e9, clock=lambda: times.now
        )
        assert found.tiles == best and found.microseconds == 100
        assert found.baseline_microseconds > 100
        assert not found.out_of_time and found.num_skipped == 0
        assert times.asked[0] == (by_rule(cell), FINAL)
        screened = [layer for layer, seconds in times.asked if seconds < FINAL]
        assert len(screened) == len(set(screened)) == found.num_tried - 1

    def test_both_kernels_for_one_token(self) -> None:
        cell = Cell(KIND, 1)
        options = candidates(cell)
        for kernel in options:
            best = LayerTiles(kernel.gate_up[4], kernel.down[2], kernel.start.sort)
            times = Landscape(best)
            found = search(
                cell,
                options,
                times,
                baseline=by_rule(cell),
                seconds=1e9,
                clock=lambda times=times: times.now,
            )
            assert found.tiles == best
            for layer, _ in times.asked:
                assert (layer.gate_up.block_m == 1) == (layer.down.block_m == 1)

    def test_what_does_not_work_is_skipped_and_counted(self) -> None:
        cell = Cell(KIND, 16)
        (kernel,) = candidates(cell)
        best = LayerTiles(kernel.gate_up[7], kernel.down[3], sort=True)
        times = Landscape(best)
        times.broken = {kernel.gate_up[7], kernel.gate_up[2]}
        found = search(
            cell, [kernel], times, baseline=by_rule(cell), seconds=1e9, clock=lambda: times.now
        )
        assert found.num_skipped == 2
        assert found.tiles.gate_up not in times.broken
        assert found.tiles.down == best.down

    def test_time_runs_out_and_both_products_get_a_share(self) -> None:
        cell = Cell(KIND, 16)
        (kernel,) = candidates(cell)
        times = Landscape(LayerTiles(kernel.gate_up[-1], kernel.down[0], sort=False))
        found = search(
            cell, [kernel], times, baseline=by_rule(cell), seconds=12, clock=lambda: times.now
        )
        assert found.out_of_time
        assert len(times.asked) < 20
        start = by_rule(cell)
        assert any(layer.gate_up != start.gate_up for layer, _ in times.asked)
        assert any(layer.down != start.down for layer, _ in times.asked)

    def test_a_baseline_that_does_not_work(self) -> None:
        cell = Cell(KIND, 16)
        with pytest.raises(ValueError, match=r"16 tokens: what runs now does not work"):
            search(cell, candidates(cell), lambda *_: None, baseline=by_rule(cell), seconds=1.0)

    def test_the_baseline_is_what_runs_now(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tuning, "gpu_name", lambda device: "NVIDIA H100")
        monkeypatch.setattr(tuning, "is_hopper", lambda device: True)
        cell = Cell(LayerKind(MIXTRAL, "int8", "int8"), 1024)  # in no table
        baseline = cell.baseline(CUDA)
        assert baseline.tma and not by_rule(cell).tma
        # It is timed first, and stays where nothing else is faster.
        times = Landscape(baseline)
        found = search(
            cell,
            candidates(cell, hopper=True),
            times,
            baseline=baseline,
            seconds=1e9,
            clock=lambda: times.now,
        )
        assert times.asked[0] == (baseline, FINAL)
        assert found.tiles == baseline and found.baseline_microseconds == found.microseconds


class TestTiming:
    """`LayerTimer` over the real launchers; in the interpreter where there is no GPU."""

    DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # 8-bit rows: the interpreter multiplies bf16 tiles wrongly.
    CELL = Cell(LayerKind(LayerShape(2, 1, 32, 16), "int8", "int8"), 2)

    def test_times_and_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tile_timing, "num_calls", lambda *_: 1)
        timer = tile_timing.LayerTimer(self.CELL.kind.shape, "int8", self.DEVICE)
        measure, errors = timer.cell(self.CELL)
        layer = by_rule(self.CELL)
        first = measure(layer, 0.01, None)
        assert first is not None and first > 0 and errors == []
        small = TileConfig(16, 32, 32, num_warps=4, num_stages=2)
        assert measure(LayerTiles(small, small, sort=True), 0.01, None) is not None
        assert errors == []
        assert measure(LayerTiles(small, small, sort=True), 0.01, -1e9) is None  # too slow
        assert errors == []

        odd = replace(small, block_n=33)
        assert measure(LayerTiles(odd, small, sort=False), 0.01, None) is None
        assert "block_n=33" in errors.pop()

    def test_a_wrong_result_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tile_timing, "num_calls", lambda *_: 1)
        timer = tile_timing.LayerTimer(self.CELL.kind.shape, "int8", self.DEVICE)
        right = tile_timing._call

        def wrong(*arguments: object) -> torch.Tensor:
            out = right(*arguments)
            return out * 1.05 if arguments[-1].sort else out

        monkeypatch.setattr(tile_timing, "_call", wrong)
        measure, errors = timer.cell(self.CELL)
        layer = replace(by_rule(self.CELL), sort=False)
        assert measure(layer, 0.01, None) is not None
        assert measure(replace(layer, sort=True), 0.01, None) is None
        assert "relative error" in errors[0]


class TestPrecompiler:
    LAYER = TileConfig(16, 64, 64, 4, 2)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
    def test_answers_in_order_and_says_what_went_wrong(self) -> None:
        layers = [LayerTiles(self.LAYER, self.LAYER, sort) for sort in (True, False)]
        with Precompiler(1) as precompiler:
            compiling = precompiler.submit(Cell(KIND, 4), layers)
            found = failures(compiling, 120)
            (worker,) = precompiler._workers
        assert list(found) == layers
        assert all("Error" in error and "ended" not in error for error in found.values())
        assert worker.poll() is not None

    def test_a_process_that_dies_is_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(precompile.sys, "executable", "/bin/ls")
        layers = [LayerTiles(self.LAYER, self.LAYER, sort) for sort in (True, False)]
        with Precompiler(1) as precompiler:
            found = failures(precompiler.submit(Cell(KIND, 4), layers), 60)
            assert len(precompiler._workers) == 2
        for error in found.values():  # ls -m qmoe_kernels.precompile
            assert "the compiling process ended with code 2: /bin/ls: " in error
        assert len(found) == 2

    @pytest.mark.gpu
    def test_compiles_on_a_gpu(self) -> None:
        cells = [Cell(LayerKind(QWEN3, *pair), 4) for pair in (("int8", "bf16"), ("fp8", "fp8"))]
        with Precompiler(2) as precompiler:
            for cell in cells:
                compiling = precompiler.submit(cell, [by_rule(cell)])
                assert failures(compiling, 120) == {}

    @pytest.mark.slow
    def test_compiles_and_launches_nothing(self, tmp_path: Path) -> None:
        """With a driver that has an architecture and nothing else."""
        pytest.importorskip("triton")
        (compiled,) = run_compiler(
            f"""
import json, os
os.environ["TRITON_CACHE_DIR"] = {str(tmp_path)!r}
import torch, triton
from triton.backends.compiler import GPUTarget

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
torch.cuda.get_device_capability = lambda device=None: (9, 0)
run = triton.JITFunction.run

from qmoe_kernels.precompile import compile_layer
from qmoe_kernels.tile_search import Cell
from qmoe_kernels.tile_tables import LayerKind
from qmoe_kernels.tiles import LayerShape, LayerTiles, TileConfig

kind = LayerKind(LayerShape(8, 2, 256, 128), "fp8", "fp8")
tile = TileConfig(16, 64, 128, num_warps=4, num_stages=3)
compile_layer(Cell(kind, 4), LayerTiles(tile, tile, sort=False), "cpu")
assert triton.JITFunction.run is run
files = [name for _, _, names in os.walk({str(tmp_path)!r}) for name in names]
print(json.dumps(sorted(name for name in files if name.endswith(".cubin"))))
"""
        )
        assert set(compiled) == {
            "grouped_gemm_kernel.cubin",
            "quantize_rows_kernel.cubin",
            "weighted_sum_kernel.cubin",
        }
        assert compiled.count("grouped_gemm_kernel.cubin") == 2


def test_operands_are_named_after_formats() -> None:
    assert OPERANDS[torch.int8] == "int8" and OPERANDS[torch.float8_e4m3fn] == "fp8"
    for name in ("int8", "fp8", "bf16"):
        dtypes = Cell(replace(KIND, activations=name), 64).dtypes
        assert dtypes == (torch.int8, next(d for d, n in OPERANDS.items() if n == name))
