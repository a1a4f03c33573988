"""Measure which tiles a layer runs fastest with, and write them to a table."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from qmoe_kernels.precompile import Precompiler
    from qmoe_kernels.tile_search import Cell, Effort, Found, Measure
    from qmoe_kernels.tiles import LayerShape

    # What times a cell's candidates, and a list that gets the reasons of those that don't work.
    OpenCell = Callable[[Cell], tuple[Measure, list[str]]]

SECONDS_PER_CELL = {"quick": 10.0, "full": 120.0}
# Cores that compiling leaves to others.
FREE_CORES = 2
# The slowest of a cell's candidates is not waited for longer.
COMPILING_SECONDS = 60.0


@dataclass(frozen=True)
class Tuned:
    """One cell's outcome: ``found``, or None and why in ``errors``, which has skipped tiles too."""

    cell: Cell
    found: Found | None
    errors: list[str]

    def line(self) -> str:
        """Say it in one line."""
        if self.found is None:
            return f"{self.cell}: failed"
        f = self.found
        line = f"{self.cell}: {f.microseconds:.1f} µs, before {f.baseline_microseconds:.1f}"
        line += f"; {f.num_tried} tried, {f.num_skipped} of them skipped"
        return line + (", out of time" if f.out_of_time else "")


def tune_cells(
    cells: Sequence[Cell],
    open_cell: OpenCell,
    *,
    precompiler: Precompiler | None = None,
    effort: Effort = "quick",
    seconds: float = SECONDS_PER_CELL["quick"],
    device: torch.device,
) -> Iterator[Tuned]:
    """Compile every cell's candidates, then search for its tiles, one cell after another.

    Args:
        cells: what to tune.
        open_cell: gives what times a cell.
        precompiler: compiles candidates ahead; without it, the first measurement does.
        effort: how many candidates.
        seconds: of timing, for each cell.
        device: what `open_cell` times on.
    """
    import torch

    from qmoe_kernels.precompile import failures
    from qmoe_kernels.tile_search import candidates, search
    from qmoe_kernels.tuning import is_hopper

    baselines = [cell.baseline(device) for cell in cells]
    options = [candidates(cell, effort, hopper=is_hopper(device)) for cell in cells]
    compiling = [
        {}
        if precompiler is None
        else precompiler.submit(
            cell, [baseline, *(tiles for kernel in kernels for tiles in kernel.pairs())]
        )
        for cell, kernels, baseline in zip(cells, options, baselines, strict=True)
    ]
    # All of them first: a host that compiles launches late, and good tiles would look slow.
    compiled = [failures(layers, COMPILING_SECONDS) for layers in compiling]
    for cell, baseline, kernels, layers, broken in zip(
        cells, baselines, options, compiling, compiled, strict=True
    ):
        errors: list[str] = []
        found = None
        try:
            measure, errors = open_cell(cell)
            errors += [f"{tiles}: {error}" for tiles, error in broken.items()]
            if len(broken) < len(layers):  # else it is hardly the candidates' fault
                kernels = [kernel.without(broken) for kernel in kernels]
            found = search(cell, kernels, measure, baseline=baseline, seconds=seconds)
        except (ValueError, torch.OutOfMemoryError) as error:
            errors.insert(0, str(error))
        yield Tuned(cell, found, errors)


@dataclass(frozen=True)
class Tuning:
    """What to tune on this machine's GPU, and how long to try.

    Attributes:
        folder: of the tables, made if missing.
        cells: what to tune; each becomes a cell of the GPU's table.
        effort: how many candidates.
        seconds: of timing, for each cell; None: as the effort has it.
        workers: processes that compile; None: all cores but two; 0: none.
        commit: to write down; None: what git says.
    """

    folder: Path
    cells: Sequence[Cell]
    effort: Effort = "quick"
    seconds: float | None = None
    workers: int | None = None
    commit: str | None = None

    def table(self) -> tuple[str, Path]:
        """This machine's GPU, and where its table is.

        Raises:
            ValueError: there is no GPU.
        """
        from qmoe_kernels.tile_tables import table_path

        _, gpu = _gpu()
        return gpu, table_path(self.folder, gpu)

    def run(self) -> Generator[Tuned]:
        """Tune one cell after another; each is in the table when it is given out."""
        from qmoe_kernels.tile_tables import Measurement, TileTable

        device, _ = _gpu()
        gpu, path = self.table()
        self.folder.mkdir(parents=True, exist_ok=True)
        table = TileTable.read(path) if path.exists() else TileTable(gpu, {})
        versions = _versions(self.commit)
        with ExitStack() as stack:
            precompiler = _precompiler(self.workers)
            if precompiler is not None:
                stack.enter_context(precompiler)
            for tuned in tune_cells(
                self.cells,
                _timing(device),
                precompiler=precompiler,
                effort=self.effort,
                seconds=self.seconds or SECONDS_PER_CELL[self.effort],
                device=device,
            ):
                if tuned.found is not None:
                    measured = Measurement(
                        tuned.found.tiles,
                        round(tuned.found.microseconds, 2),
                        round(tuned.found.baseline_microseconds, 2),
                        versions,
                    )
                    table.add(tuned.cell.kind, tuned.cell.num_tokens, measured)
                    table.write(path)
                yield tuned


def model_shapes(path: str) -> list[LayerShape]:
    """Read the shapes of a model's layers from its config; each that occurs, once.

    Args:
        path: a folder or a Hub id, of which only the config is fetched.

    Raises:
        ValueError: no such model, one without experts, or one that does not tell its top_k.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from qmoe.checkpoints.files import first_line
    from qmoe.checkpoints.hub import why_no_place
    from qmoe.checkpoints.inspection import find_top_k
    from qmoe.experts.layout import find_experts
    from qmoe_kernels.tiles import LayerShape

    if why := why_no_place(path):
        raise ValueError(why)
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"{path}: no model here ({first_line(error)})") from None
    auto = AutoModelForCausalLM
    if type(config) not in AutoModelForCausalLM._model_mapping:
        auto = AutoModelForImageTextToText
    with torch.device("meta"):
        layouts = find_experts(auto.from_config(config)).values()
    top_k = find_top_k(config.to_dict())
    if top_k is None:
        raise ValueError(f"{path}: its config does not tell how many experts a token goes to")
    shapes = [
        LayerShape(
            layout.num_experts, top_k, layout.hidden_size, layout.intermediate_size, layout.gated
        )
        for layout in layouts
    ]
    return list(dict.fromkeys(shapes))


def _gpu() -> tuple[torch.device, str]:
    import torch

    from qmoe_kernels.tuning import gpu_name

    if not torch.cuda.is_available():
        raise ValueError("tuning measures on a CUDA GPU, and torch finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    name = gpu_name(device)
    assert name is not None
    return device, name


def _timing(device: torch.device) -> OpenCell:
    """What opens cells on a GPU, keeping the weights while they stay the same."""
    from qmoe_kernels.tile_timing import LayerTimer

    timer: dict[tuple[LayerShape, str], LayerTimer] = {}

    def open_cell(cell: Cell) -> tuple[Measure, list[str]]:
        key = (cell.kind.shape, cell.kind.weights)
        if key not in timer:
            timer.clear()  # first, for there may be no room for both
            timer[key] = LayerTimer(*key, device)
        return timer[key].cell(cell)

    return open_cell


def _precompiler(workers: int | None) -> Precompiler | None:
    from qmoe_kernels.precompile import Precompiler

    if workers is None:
        workers = max(1, (os.cpu_count() or 1) - FREE_CORES)
    return Precompiler(workers) if workers > 0 else None


def _versions(commit: str | None) -> dict[str, str]:
    import torch

    import qmoe

    root = Path(__file__).parents[2]
    if commit is None and (root / ".git").exists():
        git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        told = subprocess.run(git, capture_output=True, text=True, check=False)
        commit = told.stdout.strip()
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = ""
    return {
        "qmoe": qmoe.__version__,
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "triton": triton_version,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
