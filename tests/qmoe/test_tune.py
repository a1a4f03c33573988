"""``qmoe tune`` with times that a formula makes up."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from qmoe.cli.main import main
from qmoe.tools import tune as tools
from qmoe_kernels import tuning
from qmoe_kernels.tile_search import Cell, candidates
from qmoe_kernels.tile_tables import LayerKind, TileTable, table_path
from qmoe_kernels.tiles import LayerShape, LayerTiles

SHAPE = LayerShape(16, 4, 512, 256)
SIZES = ["--experts=16", "--top-k=4", "--hidden-size=512", "--intermediate-size=256"]
GPU = "Some GPU"


def best_tiles(cell: Cell) -> LayerTiles:
    kernel = candidates(cell)[-1]
    return LayerTiles(kernel.gate_up[-1], kernel.down[-1], kernel.start.sort)


class FakeGpu:
    """Opens cells; what they measure grows with the distance from `best_tiles`."""

    def __init__(self) -> None:
        self.opened: list[Cell] = []
        self.fail_at: dict[int, BaseException] = {}

    def __call__(self, cell: Cell) -> tuple[Any, list[str]]:
        self.opened.append(cell)
        best = best_tiles(cell)

        def measure(tiles: LayerTiles, seconds: float, bound: float | None) -> float:
            if error := self.fail_at.get(cell.num_tokens):
                raise error
            time = 100.0 + (tiles.sort != best.sort)
            for name in ("gate_up", "down"):
                mine, other = asdict(getattr(tiles, name)), asdict(getattr(best, name))
                time += sum(abs(math.log2((v + 1) / (other[k] + 1))) for k, v in mine.items())
            return time

        return measure, []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(tools, "_gpu", lambda: (torch.device("cuda", 0), GPU))
    monkeypatch.setattr(tuning, "gpu_name", lambda device: GPU)
    monkeypatch.setattr(tools, "_timing", lambda device: fake)
    monkeypatch.setattr(tools, "_precompiler", lambda workers: None)
    return fake


def tune(folder: Path, *arguments: str) -> int:
    return main(["tune", *SIZES, f"--output={folder}", *arguments])


class TestTune:
    def test_writes_a_row_for_each_pair_of_operands(self, gpu, tmp_path, capsys) -> None:
        folder = tmp_path / "made" / "here"
        assert tune(folder, "--weights=int8,bf16", "--tokens=64,1", "--commit=abc") == 0
        table = TileTable.read(table_path(folder, GPU))
        assert table.gpu == GPU
        pairs = [("int8", "bf16"), ("int8", "int8"), ("bf16", "bf16")]
        assert list(table.rows) == [LayerKind(SHAPE, *pair) for pair in pairs]
        for kind, row in table.rows.items():
            assert list(row) == [1, 64]
            for num_tokens, found in row.items():
                assert found.tiles == best_tiles(Cell(kind, num_tokens))
                assert found.microseconds == 100 < found.baseline_microseconds
                assert found.measured_with["commit"] == "abc"
                assert found.measured_with["torch"] == torch.__version__
        out, _ = capsys.readouterr()
        assert "int8 weights, bf16 activations, 64 tokens: 100.0 µs, before 1" in out
        assert "6 cells in" in out

    def test_writes_down_the_commit(self, gpu, tmp_path) -> None:
        repository = Path(__file__).parents[2]
        assert tune(tmp_path, "--weights=int8", "--activations=int8", "--tokens=4") == 0
        (row,) = TileTable.read(table_path(tmp_path, GPU)).rows.values()
        known = row[4].measured_with["commit"] != "unknown"
        assert known == (repository / ".git").exists()

    def test_the_old_spelling(self, gpu, tmp_path) -> None:
        arguments = ["--weights=int8", "--activations=int8", "--tokens=4"]
        assert main(["bench", "tune", *SIZES, f"--output={tmp_path}", *arguments]) == 0

    def test_adds_to_a_table(self, gpu, tmp_path) -> None:
        assert tune(tmp_path, "--weights=int8", "--activations=bf16", "--tokens=4") == 0
        assert tune(tmp_path, "--weights=int8", "--activations=bf16", "--tokens=16") == 0
        assert tune(tmp_path, "--no-gate", "--weights=fp8", "--activations=fp8", "--tokens=1") == 0
        rows = TileTable.read(table_path(tmp_path, GPU)).rows
        assert {(k.weights, k.shape.gated): list(row) for k, row in rows.items()} == {
            ("int8", True): [4, 16],
            ("fp8", False): [1],
        }

    def test_an_interrupt_keeps_what_is_finished(self, gpu, tmp_path, capsys) -> None:
        gpu.fail_at[16] = KeyboardInterrupt()
        arguments = ["--weights=int8", "--activations=bf16", "--tokens=1,4,16,64"]
        assert tune(tmp_path, *arguments) == 130
        (row,) = TileTable.read(table_path(tmp_path, GPU)).rows.values()
        assert list(row) == [1, 4]
        assert "interrupted; 2 of 4 cells are in" in capsys.readouterr().err

    def test_a_cell_that_fails_is_told_and_the_others_go_on(self, gpu, tmp_path, capsys) -> None:
        gpu.fail_at[16] = ValueError("no room\nfor it")
        arguments = ["--weights=int8", "--activations=bf16", "--tokens=4,16,64"]
        assert tune(tmp_path, *arguments) == 1
        (row,) = TileTable.read(table_path(tmp_path, GPU)).rows.values()
        assert list(row) == [4, 64]
        out, err = capsys.readouterr()
        assert "16 tokens: failed" in out and "2 cells in" in out
        assert "no room for it" in err

    def test_json(self, gpu, tmp_path, capsys) -> None:
        assert tune(tmp_path, "--weights=fp8", "--activations=fp8", "--tokens=4", "--json") == 0
        document = json.loads(capsys.readouterr().out)
        assert document["table"] == str(table_path(tmp_path, GPU))
        (cell,) = document["cells"]
        assert cell["cell"]["num_tokens"] == 4
        assert cell["found"]["microseconds"] == 100

    def test_the_folder_of_the_environment(self, gpu, tmp_path, monkeypatch) -> None:
        monkeypatch.setenv("QMOE_CONFIGS", str(tmp_path))
        assert main(["bench", "tune", *SIZES, "--weights=int8", "--tokens=4"]) == 0
        assert table_path(tmp_path, GPU).exists()

    def test_candidates_that_do_not_compile_are_left_out(self) -> None:
        gpu, cell = FakeGpu(), Cell(LayerKind(SHAPE, "int8", "bf16"), 64)

        class Compiler:
            def __init__(self, every: bool) -> None:
                self.every = every

            def submit(self, cell: Cell, layers: list[LayerTiles]) -> dict[LayerTiles, Any]:
                futures: dict[LayerTiles, Any] = {}
                for tiles in layers:
                    futures[tiles] = future = Future()
                    bad = self.every or tiles.gate_up == best_tiles(cell).gate_up
                    future.set_result("no ptxas" if bad else None)
                return futures

        device = torch.device("cpu")
        compiler = Compiler(every=False)
        (some,) = tools.tune_cells([cell], gpu, precompiler=compiler, device=device)
        assert some.found is not None
        assert some.found.tiles.gate_up != best_tiles(cell).gate_up
        assert any("no ptxas" in error for error in some.errors)
        # Where nothing compiles, the processes are at fault and the candidates are tried here.
        compiler = Compiler(every=True)
        (every,) = tools.tune_cells([cell], gpu, precompiler=compiler, device=device)
        assert every.found is not None and every.found.tiles == best_tiles(cell)


@pytest.mark.gpu
def test_tunes_on_a_gpu(tmp_path, capsys) -> None:
    arguments = ["--weights=int8", "--tokens=1,4", "--seconds-per-cell=2", "--workers=4", "--json"]
    assert tune(tmp_path, *arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["cells"]) == 4
    for cell in document["cells"]:
        assert cell["found"]["num_tried"] > 1
        assert cell["found"]["microseconds"] <= cell["found"]["baseline_microseconds"]
        assert not [error for error in cell["errors"] if "OutOf" not in error]
    table = TileTable.read(Path(document["table"]))
    assert [list(row) for row in table.rows.values()] == [[1, 4], [1, 4]]


class TestModel:
    def test_the_shape_of_a_checkpoint(self, gpu, checkpoint, tmp_path) -> None:
        arguments = ["--model", str(checkpoint), f"--output={tmp_path}", "--tokens=4"]
        assert main(["tune", *arguments, "--weights=int8", "--activations=int8"]) == 0
        (kind,) = TileTable.read(table_path(tmp_path, GPU)).rows
        assert kind.shape == LayerShape(8, 2, 64, 32)

    def test_a_model_without_experts(self, tmp_path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
        with pytest.raises(ValueError, match="holds no experts"):
            tools.model_shapes(str(tmp_path))


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            ([], 2, "give --model, or --experts"),
            (SIZES[:3], 2, "give --model, or --experts"),
            ([*SIZES, "--model=x/y"], 2, "give --model, or --experts"),
            ([*SIZES, "--top-k=17"], 2, "--top-k is at most --experts"),
            ([*SIZES, "--hidden-size=0"], 2, "x>=1"),
            ([*SIZES, "--weights=int3"], 2, "--weights int3: int8, fp8 and bf16 work"),
            ([*SIZES, "--activations=fp16"], 2, "--activations fp16: int8, fp8 and bf16"),
            ([*SIZES, "--weights=fp8", "--activations=int8"], 2, "no kernel for --weights 'fp8'"),
            ([*SIZES, "--tokens=1,some"], 2, "--tokens some: positive numbers work"),
            ([*SIZES, "--tokens=0"], 2, "--tokens 0"),
            ([*SIZES, "--tokens=,"], 2, "--tokens: give at least one"),
            ([*SIZES, "--effort=none"], 2, "none"),
            (["--model=no-such-folder"], 3, "no-such-folder: no such folder"),
        ],
    )
    def test_one_line(self, gpu, tmp_path, capsys, arguments, code, message) -> None:
        assert main(["tune", f"--output={tmp_path}", *arguments]) == code
        out, err = capsys.readouterr()
        assert out == "" and message in err
        assert err.startswith("qmoe: ") and len(err.splitlines()) == 1
        assert not list(tmp_path.iterdir())
        assert not gpu.opened

    def test_no_folder(self, gpu, capsys, monkeypatch) -> None:
        monkeypatch.delenv("QMOE_CONFIGS", raising=False)
        assert main(["bench", "tune", *SIZES]) == 2
        assert "give --output FOLDER, or set QMOE_CONFIGS" in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self, tmp_path, capsys) -> None:
        assert tune(tmp_path) == 3
        assert "a CUDA GPU, and torch finds none" in capsys.readouterr().err

    def test_a_malformed_table_is_told_before_anything_is_measured(
        self, gpu, tmp_path, capsys
    ) -> None:
        path = table_path(tmp_path, GPU)
        path.write_text("{}")
        assert tune(tmp_path) == 3
        assert f"{path}: the top: gpu, rows missing" in capsys.readouterr().err
        assert not gpu.opened
