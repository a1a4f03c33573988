"""The command ``qmoe``: bench tune, cache-report, demo, generate, inspect.

Exit codes: 0; 2 usage; 3 input that cannot be used; 130 interrupted. A failure is one line on
stderr that says what to do; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qmoe.tools import tune as bench

if TYPE_CHECKING:
    from rich.table import Table

    from qmoe.checkpoints.inspection import Inspection
    from qmoe.generation import GenerationResult, GenerationStatistics
    from qmoe.paging.stats import CacheStats
    from qmoe.tools.demo import Demo
    from qmoe.traces.record import Recording
    from qmoe.traces.report import CacheReport

USAGE, UNUSABLE, INTERRUPTED = 2, 3, 130

app = typer.Typer(
    name="qmoe",
    help="Quantized Mixture-of-Experts inference for Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench.app, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the process's own arguments where none are given.

    Returns:
        the exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return int(app(arguments, prog_name="qmoe", standalone_mode=False) or 0)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except Exception as error:
        if "--debug" in arguments:
            raise
        if hasattr(error, "format_message"):  # typer's usage errors; empty if help was printed
            message = error.format_message()
            return _fail(f"{message} (see qmoe --help)", USAGE) if message else USAGE
        if isinstance(error, (ValueError, OSError)):
            return _fail(str(error), UNUSABLE)
        return _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)


def _fail(message: str, code: int) -> int:
    print(f"qmoe: {' '.join(message.split())}", file=sys.stderr)
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        from qmoe import __version__

        print(f"qmoe {__version__}")
        raise typer.Exit


@app.callback()
def _qmoe(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version.",
        ),
    ] = False,
) -> None:
    """Quantized Mixture-of-Experts inference for Hugging Face transformers."""


@app.command()
def generate(
    path: Annotated[str, typer.Argument(help="A model's folder or Hub id.", metavar="PATH")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue; repeat it for a batch. Without it, stdin is read."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many for each prompt.")] = 128,
    do_sample: Annotated[
        bool | None,
        typer.Option(help="Sample; implied by the four options below.", show_default="the model's"),
    ] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    num_beams: Annotated[
        int | None, typer.Option(help="Beam search; the text comes at the end.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of what is not quantized: auto, bfloat16 ...")
    ] = "auto",
    weights: Annotated[
        Literal["int8", "fp8"] | None,
        typer.Option(help="Quantize the experts of a 16-bit model while loading."),
    ] = None,
    hbm_budget: Annotated[
        str | None,
        typer.Option(help="Page experts within so much GPU memory: 16GiB, 50%, auto."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens per text that the budget holds.", show_default="8192"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Texts at a time that it holds.", show_default="the prompts"),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show the expert cache at work, on stderr.")
    ] = False,
    record_routing: Annotated[
        Path | None,
        typer.Option(
            help="Write which experts every token went to, for qmoe cache-report.", metavar="FILE"
        ),
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Continue prompts: text on stdout, statistics on stderr."""
    if record_routing is not None:
        _check_writable(record_routing)
    prompts = prompt or [_read_stdin()]
    paging: dict[str, Any] = {}
    if hbm_budget is not None:
        paging = {
            "hbm_budget": hbm_budget,
            "context": context,
            "batch_size": batch_size or len(prompts) * (num_beams or 1),
        }
    elif context is not None or batch_size is not None:
        raise typer.BadParameter("--context and --batch-size need --hbm-budget")
    if do_sample is None and any(v is not None for v in (temperature, top_k, top_p, min_p)):
        do_sample = True
    options = {
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "num_beams": num_beams,
    }

    import qmoe
    from qmoe.generation import GenerationInterrupted, load_tokenizer
    from qmoe.generation import generate as generate_texts

    _quiet()
    model = qmoe.load(path, device=device, dtype=dtype, weights=weights, **paging)
    writer = None if json_output or (num_beams or 1) > 1 else _Writer(len(prompts))
    status = _CacheStatus(model) if stats else None

    def stream(index: int, piece: str) -> None:
        if writer is not None:
            writer(index, piece)
        if status is not None:
            status.update()

    interrupted = False
    recording = None
    try:
        with nullcontext() if record_routing is None else qmoe.record_routing(model) as recording:
            result = generate_texts(
                model,
                load_tokenizer(path),
                prompts,
                max_new_tokens=max_new_tokens,
                stream=None if (num_beams or 1) > 1 or not (writer or status) else stream,
                chat=chat,
                seed=seed,
                **{name: value for name, value in options.items() if value is not None},
            )
    except GenerationInterrupted as interruption:
        result, interrupted = interruption.result, True
    finally:
        if status is not None:
            status.close()
    if json_output:
        document = {"model": path, "prompts": prompts, **dataclasses.asdict(result)}
        if status is not None:
            document["cache"] = status.document()
        _print_json({**document, "interrupted": interrupted})
    else:
        (writer or _Writer(len(prompts))).finish(result)
        print(_statistics_line(result.statistics), file=sys.stderr)
        if status is not None:
            print(status.line(), file=sys.stderr)
    if recording is not None:
        assert record_routing is not None
        name = Path(path).resolve().name if os.path.isdir(path) else path
        _save_trace(recording, record_routing, name, len(prompts), interrupted)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A model's folder or Hub id.", metavar="PATH")],
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Print what a checkpoint holds, from its config and headers; no weight is read."""
    from qmoe.checkpoints.inspection import inspect_checkpoint

    inspection = inspect_checkpoint(path)
    if json_output:
        _print_json(dataclasses.asdict(inspection))
    else:
        _print(_inspection_table(inspection))


@app.command()
def cache_report(
    trace: Annotated[
        Path,
        typer.Argument(help="What qmoe generate --record-routing wrote.", metavar="TRACE"),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Draw hit_rate.png and heat_map.png into this folder.")
    ] = None,
    capacity: Annotated[
        list[str] | None,
        typer.Option(
            help="Of the cache: a share of all experts (12.5%) or a number of them; repeatable.",
            show_default="the eighths",
        ),
    ] = None,
    warmup: Annotated[
        int, typer.Option(help="So many tokens fill the cache before hits are counted.")
    ] = 0,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Replay recorded routing: hit rates of caches that evict by LRU, LFU and Belady's rule."""
    from qmoe.traces.report import cache_report as replay_trace
    from qmoe.traces.report import draw_report, require_matplotlib
    from qmoe.traces.trace import RoutingTrace

    if out is not None:
        require_matplotlib()
    recorded = RoutingTrace.load(trace)
    report = replay_trace(recorded, capacity, warmup=warmup)
    pictures = [] if out is None else list(map(str, draw_report(report, recorded, out)))
    if json_output:
        document = {"trace": str(trace), **dataclasses.asdict(report)}
        document["replays"] = [
            {
                **dataclasses.asdict(replay),
                "hit_rate": replay.hit_rate,
                "missed_bytes_per_token": report.missed_bytes_per_token(replay),
            }
            for replay in report.replays
        ]
        _print_json({**document, "pictures": pictures})
    else:
        _print(_cache_report_table(report))
        print("\n".join([*_routing_lines(report), *pictures]))


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Another 16-bit model's folder.", show_default="examples/tiny-moe"),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many for each prompt.")] = 48,
    out: Annotated[
        Path | None,
        typer.Option(help="Keep the converted models here.", show_default="a temporary folder"),
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Convert the shipped model to INT8 and FP8, and set both beside the original."""
    from qmoe.tools.demo import run_demo

    _quiet()
    result = run_demo(
        model,
        prompts=prompt or None,
        max_new_tokens=max_new_tokens,
        out=out,
        progress=lambda message: print(message, file=sys.stderr, flush=True),
    )
    if json_output:
        _print_json(dataclasses.asdict(result))
    else:
        _print(_demo_table(result))


class _Writer:
    """Writes texts to stdout as they come: the first at once, the others when it is their turn."""

    def __init__(self, num_texts: int) -> None:
        self.num_texts = num_texts
        self.written = 0  # characters of the first text

    def __call__(self, index: int, piece: str) -> None:
        if index == 0:
            if not self.written:
                self._heading(0)
            self.written += len(piece)
            print(piece, end="", flush=True)

    def finish(self, result: GenerationResult) -> None:
        for index, text in enumerate(result.texts):
            if index or not self.written:
                self._heading(index)
            print(text if index else text[self.written :], flush=True)

    def _heading(self, index: int) -> None:
        if self.num_texts > 1:
            print(f"--- prompt {index + 1}")


class _CacheStatus:
    """What the expert cache does, as a line that changes while text is generated."""

    def __init__(self, model: Any) -> None:
        from qmoe.cli.status_line import StatusLine

        self.model = model
        self.status_line = StatusLine()
        self.close = self.status_line.close

    def update(self) -> None:
        if self.status_line.due():
            self.status_line.write(self.line())

    def line(self) -> str:
        from qmoe.cli.status_line import cache_line

        stats = self._read()
        return "all experts are resident" if stats is None else cache_line(stats)

    def document(self) -> dict[str, Any] | None:
        stats = self._read()
        if stats is None:
            return None
        totals = {"hit_rate": stats.hit_rate, "bytes": stats.bytes}
        return {**totals, **dataclasses.asdict(stats)}

    def _read(self) -> CacheStats | None:
        import qmoe

        paging = getattr(self.model, "qmoe_paging", None)
        return None if paging is None or paging.cache is None else qmoe.stats(self.model)


def _read_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter("give --prompt TEXT, or pipe the text in")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin: not UTF-8 text ({error})") from None
    if not text.strip():
        raise ValueError("stdin: empty; pipe the text to continue, or give --prompt TEXT")
    return text.removesuffix("\n")


def _check_writable(path: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent} to write it into")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a file's name")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path}: may not be written")


def _save_trace(
    recording: Recording, path: Path, model: str, num_prompts: int, interrupted: bool
) -> None:
    try:
        trace = recording.trace()
    except ValueError as error:
        if not interrupted:
            raise
        print(f"{path}: not written, {error}", file=sys.stderr)
        return
    prompts = "1 prompt" if num_prompts == 1 else f"{num_prompts} prompts"
    trace.metadata["source"] = f"{model}: {prompts}, {trace.num_tokens} tokens"
    trace.save(path)


def _quiet() -> None:
    """Keep the libraries' remarks off stderr, which is for statistics and failures."""
    from qmoe.generation import hide_progress_bars

    logging.getLogger("transformers").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        hide_progress_bars()


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _print(table: Table) -> None:
    from rich.console import Console

    # Not a terminal: rich would assume 80 columns.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _statistics_line(statistics: GenerationStatistics) -> str:
    s = statistics
    decode = s.decode_tokens_per_second
    peak = s.peak_memory_bytes
    parts = [
        f"prompt {s.prompt_tokens} tokens, {s.prompt_tokens_per_second:.1f}/s",
        f"new {s.new_tokens} tokens" + (f", {decode:.1f}/s" if decode else ""),
        f"experts {format_bytes(s.expert_bytes)}",
        f"peak {format_bytes(peak)} {s.peak_memory_kind}" if peak is not None else "peak unknown",
    ]
    return " | ".join(parts)


def format_bytes(count: int | None) -> str:
    """``1234567`` as ``1.23 MB``: decimal units, three digits."""
    if count is None:
        return "unknown"
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if unit == "B" or value < 100 else f"{value:.0f} {unit}"


def _inspection_table(inspection: Inspection) -> Table:
    from rich.table import Table

    i = inspection
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def row(name: str, value: object) -> None:
        table.add_row(name, str(value))

    row("checkpoint", i.path)
    row("architecture", i.architecture)
    if i.source is not None:
        row("converted from", i.source)
    layers = "unknown" if i.num_layers is None else i.num_layers
    if i.dense:
        row("layers", layers)
        row("experts", "none: a dense model, qmoe has nothing to quantize in it")
    else:
        row("layers", f"{layers}, {i.expert_layers} with experts")
        row("experts per layer", " or ".join(map(str, i.num_experts)))
        row("experts per token", "unknown" if i.top_k is None else i.top_k)
    row("format", i.format)
    row("files", i.shards)
    row("on disk", format_bytes(i.expert_bytes + i.rest_bytes))
    if not i.dense:
        row("  experts", format_bytes(i.expert_bytes))
        row("  rest", format_bytes(i.rest_bytes))
    row("in memory", format_bytes(i.memory_bytes))
    if i.bits_per_expert_weight is not None:
        row("bits per expert weight", f"{i.bits_per_expert_weight:.2f}")
    for projection, error in (i.errors or {}).items():
        row(
            f"error of {projection}",
            f"median {error['median']:.3%}, worst {error['worst']:.3%} in {error['worst_module']}",
        )
    return table


def _cache_report_table(report: CacheReport) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from qmoe.traces.replay import POLICIES
    from qmoe.traces.report import NAMES

    r = report
    table = Table(title=escape(r.metadata.get("source", "")) or None, title_justify="left")
    table.add_column("capacity", justify="right")
    table.add_column("pages", justify="right")
    for column in ("hit rate", "missed/token"):
        for policy in POLICIES:
            table.add_column(f"{NAMES[policy]}\n{column}", justify="right")
    by_capacity: dict[int, list[str]] = {}
    for cell in (
        lambda replay: f"{replay.hit_rate:.1%}",
        lambda replay: format_bytes(round(r.missed_bytes_per_token(replay))),
    ):
        for replay in r.replays:  # policies outermost
            by_capacity.setdefault(replay.capacity, []).append(cell(replay))
    for capacity, cells in by_capacity.items():
        table.add_row(f"{capacity / r.num_pages:.1%}", str(capacity), *cells)
    return table


def _routing_lines(report: CacheReport) -> list[str]:
    def shares(by_layer: list[float]) -> str:
        mean = sum(by_layer) / len(by_layer)
        return f"{mean:.1%} ({min(by_layer):.1%} to {max(by_layer):.1%} by layer)"

    r = report
    lines = [
        f"{r.num_tokens} tokens through {r.num_layers} layers of {r.num_experts} experts, top "
        f"{r.top_k}: one token asks for {r.cycle} pages",
        f"reuse: {shares(r.reuse)} of a token's experts were the token's before it",
    ]
    if r.warmup:
        lines.append(f"warm-up: the first {r.warmup} tokens are not counted in the table")
    return lines


def _demo_table(result: Demo) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{result.model}: 16 bit, INT8, FP8", title_justify="left", show_lines=True)
    table.add_column("", style="bold")
    for variant in result.variants:
        table.add_column(variant.name, ratio=1, overflow="fold")

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    variants = result.variants
    row("on disk", [format_bytes(v.disk_bytes) for v in variants])
    row("experts in memory", [format_bytes(v.expert_bytes) for v in variants])
    row("bits per expert weight", [f"{v.bits_per_expert_weight:.2f}" for v in variants])
    row(
        f"perplexity\n({result.perplexity_tokens} tokens,\nwindows of {result.window})",
        [f"{v.perplexity:.4f} ({v.perplexity_change:+.2%})" for v in variants],
    )
    row("decode tokens/s", [f"{v.decode_tokens_per_second or 0:.0f}" for v in variants])
    for index, prompt in enumerate(result.prompts):
        row(escape(prompt.rstrip()), [escape(v.texts[index]) for v in variants])
    return table


if __name__ == "__main__":
    sys.exit(main())
