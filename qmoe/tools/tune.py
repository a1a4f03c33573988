"""``qmoe bench tune``: measure which tiles a layer runs fastest with, and write them to a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

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

app = typer.Typer(no_args_is_help=True)


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


@app.callback()
def _bench() -> None:
    """Measure kernels on this machine's GPU."""


@app.command()
def tune(
    experts: Annotated[int | None, typer.Option(help="Experts of the layer.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts of a token.")] = None,
    hidden_size: Annotated[int | None, typer.Option()] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Of one expert.")] = None,
    gate: Annotated[bool, typer.Option(help="Whether experts have a gate.")] = True,
    model: Annotated[
        str | None,
        typer.Option(help="Instead: take it all from the config of a folder or Hub id."),
    ] = None,
    weights: Annotated[str, typer.Option(help="Some of int8, fp8, bf16.")] = "int8,fp8",
    activations: Annotated[
        str, typer.Option(help="Some of bf16, int8, fp8; 8 bit only with the same weights.")
    ] = "bf16,int8,fp8",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens.")] = "1,4,16,64,256,1024,4096",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the tables, made if missing.", show_default="$QMOE_CONFIGS"),
    ] = None,
    effort: Annotated[
        Literal["quick", "full"], typer.Option(help="Dozens of candidates, or hundreds.")
    ] = "quick",
    seconds_per_cell: Annotated[
        float | None,
        typer.Option(help="To time for, at most.", show_default="10, or 120 for full"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that compile; 0 for none.", show_default="all cores but two"),
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="To write down.", show_default="what git says")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Say why tiles were skipped; show tracebacks.")
    ] = False,
) -> None:
    """Add a kind of layer to this GPU's table of tiles; Ctrl-C leaves what is finished in it."""
    sizes = (experts, top_k, hidden_size, intermediate_size)
    given = [size for size in sizes if size is not None]
    if len(given) != (4 if model is None else 0):
        raise typer.BadParameter(
            "give --model, or --experts, --top-k, --hidden-size and --intermediate-size"
        )
    if given and (min(given) < 1 or given[1] > given[0]):
        raise typer.BadParameter("sizes are at least 1, and --top-k at most --experts")
    folder = output or Path(os.environ.get("QMOE_CONFIGS", ""))
    if folder == Path():
        raise typer.BadParameter("give --output FOLDER, or set QMOE_CONFIGS to one")
    operands = _operands(weights, activations)
    counts = _token_counts(tokens)

    from qmoe_kernels.tile_search import Cell
    from qmoe_kernels.tile_tables import LayerKind, Measurement, TileTable, table_path
    from qmoe_kernels.tiles import LayerShape

    if model is None:
        shapes = [LayerShape(*cast(tuple[int, int, int, int], sizes), gate)]
    else:
        shapes = model_shapes(model)
    device, gpu = _gpu()
    folder.mkdir(parents=True, exist_ok=True)
    path = table_path(folder, gpu)
    table = TileTable.read(path) if path.exists() else TileTable(gpu, {})
    cells = [
        Cell(LayerKind(shape, *pair), num_tokens)
        for shape in shapes
        for pair in operands
        for num_tokens in counts
    ]
    versions = _versions(commit)
    done: list[Tuned] = []
    started = time.monotonic()
    interrupted = False
    with ExitStack() as stack:
        precompiler = _precompiler(workers)
        if precompiler is not None:
            stack.enter_context(precompiler)
        progress = stack.enter_context(_progress(len(cells)))
        tuning = tune_cells(
            cells,
            _timing(device),
            precompiler=precompiler,
            effort=effort,
            seconds=seconds_per_cell or SECONDS_PER_CELL[effort],
            device=device,
        )
        try:
            for tuned in tuning:
                done.append(tuned)
                progress.set_description("timing")
                progress.update()
                if tuned.found is not None:
                    measured = Measurement(
                        tuned.found.tiles,
                        round(tuned.found.microseconds, 2),
                        round(tuned.found.baseline_microseconds, 2),
                        versions,
                    )
                    table.add(tuned.cell.kind, tuned.cell.num_tokens, measured)
                    table.write(path)
                if not json_output:
                    progress.write(tuned.line(), file=sys.stdout)
                    sys.stdout.flush()
                if debug or tuned.found is None:
                    for error in tuned.errors:
                        progress.write(f"  {' '.join(error.split())[:400]}", file=sys.stderr)
        except KeyboardInterrupt:
            interrupted = True
    succeeded = sum(tuned.found is not None for tuned in done)
    if json_output:
        document = {"table": str(path), "gpu": gpu, "cells": [asdict(tuned) for tuned in done]}
        print(json.dumps(document, indent=2))
    else:
        print(f"{path}: {succeeded} cells in {time.monotonic() - started:.0f} s")
    if interrupted:
        print(
            f"qmoe: interrupted; {succeeded} of {len(cells)} cells are in {path}", file=sys.stderr
        )
        raise typer.Exit(130)
    if succeeded < len(done):
        raise typer.Exit(1)


def model_shapes(path: str) -> list[LayerShape]:
    """Read the shapes of a model's layers from its config; each that occurs, once.

    Args:
        path: a folder or a Hub id, of which only the config is fetched.

    Raises:
        ValueError: no such model, one without experts, or one that does not tell its top_k.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from qmoe.checkpoints.files import is_hub_id
    from qmoe.checkpoints.inspection import find_top_k
    from qmoe.experts.layout import find_experts
    from qmoe_kernels.tiles import LayerShape

    if not Path(path).is_dir() and not is_hub_id(path):
        raise ValueError(f"{path}: no such folder, and no Hub id of the form owner/name")
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"{path}: no model here ({str(error).strip().splitlines()[0]})") from None
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


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _operands(weights: str, activations: str) -> list[tuple[str, str]]:
    """Every pair that there are kernels for."""
    for option, text in (("weights", weights), ("activations", activations)):
        for word in _words(text):
            if word not in ("int8", "fp8", "bf16"):
                raise typer.BadParameter(f"--{option} {word}: int8, fp8 and bf16 work")
    pairs = [(w, a) for w in _words(weights) for a in _words(activations) if a in (w, "bf16")]
    if not pairs:
        raise typer.BadParameter(
            f"no kernel for --weights {weights!r} with --activations {activations!r}: bf16 goes "
            "with all weights, int8 and fp8 with the same"
        )
    return pairs


def _token_counts(text: str) -> list[int]:
    counts = []
    for word in _words(text):
        if not word.isdecimal() or not int(word):
            raise typer.BadParameter(f"--tokens {word}: positive numbers work, such as 1,16,256")
        counts.append(int(word))
    if not counts:
        raise typer.BadParameter("--tokens: give at least one number")
    return sorted(counts)


def _gpu() -> tuple[torch.device, str]:
    import torch

    from qmoe_kernels.tuning import gpu_name

    if not torch.cuda.is_available():
        raise ValueError("bench tune measures on a CUDA GPU, and torch finds none")
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


def _progress(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="compiling", unit="cell", file=sys.stderr, disable=None)


def _versions(commit: str | None) -> dict[str, str]:
    import torch

    import qmoe

    root = Path(__file__).parents[1]
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
