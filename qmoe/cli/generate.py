"""``qmoe generate``: text on stdout as it comes, statistics on stderr."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qmoe.checkpoints.hub import check_place
from qmoe.cli.output import Debug, Json, grouped, print_json, quiet, readable_size
from qmoe.cli.ranks import rank_0_speaks, rank_of_torchrun
from qmoe.cli.status_line import CacheStatus
from qmoe.exits import INTERRUPTED, interruptible
from qmoe.paging.options import PagingOptions
from qmoe.sizes import format_size

if TYPE_CHECKING:
    from qmoe.generation import GenerationResult, GenerationStatistics
    from qmoe.traces.record import Recording


@dataclass(frozen=True)
class Prompting:
    """What is continued, and how far."""

    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue; repeat it for a batch. Without it, stdin is read."),
    ] = None
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")
    ] = False
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many for each prompt.")] = (
        128
    )

    def prompts(self) -> list[str]:
        """The prompts, or what stdin says."""
        return self.prompt or [_read_stdin()]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    do_sample: Annotated[
        bool | None,
        typer.Option(help="Sample; implied by the four options below.", show_default="the model's"),
    ] = None
    temperature: Annotated[float | None, typer.Option(min=0)] = None
    top_k: Annotated[int | None, typer.Option(min=0)] = None
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None
    min_p: Annotated[float | None, typer.Option(min=0, max=1)] = None
    repetition_penalty: Annotated[float | None, typer.Option(min=0)] = None
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Beam search; the text comes at the end.")
    ] = None
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**64 - 1, help="Makes sampling repeatable.")
    ] = None

    def options(self) -> dict[str, Any]:
        """As :func:`qmoe.generate` takes them."""
        options = {name: value for name, value in asdict(self).items() if value is not None}
        if options.get("temperature") == 0:
            del options["temperature"]
            return {**options, "do_sample": False}
        if options.keys() & {"temperature", "top_k", "top_p", "min_p"}:
            options.setdefault("do_sample", True)
        return options


def _known_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise typer.BadParameter(f"{device!r}: auto, cpu, cuda and cuda:1 work")
    return device


def _readable_budget(budget: str | None) -> str | None:
    """A budget that can be read; whether it can work, only the model knows."""
    if budget is not None:
        from qmoe.paging.budget import check_budget

        try:
            check_budget(budget)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return budget


@dataclass(frozen=True)
class Loading:
    """How the model is loaded."""

    device: Annotated[
        str, typer.Option(callback=_known_device, help="auto, cpu, cuda, cuda:1 ...")
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Of what is not quantized; auto: as it is stored."),
    ] = "auto"
    weights: Annotated[
        Literal["int8", "fp8"] | None,
        typer.Option(help="Quantize the experts of a 16-bit model while loading."),
    ] = None


@dataclass(frozen=True)
class Paging:
    """What the model may take of the device."""

    hbm_budget: Annotated[
        str | None,
        typer.Option(
            callback=_readable_budget,
            help="Page experts within so much GPU memory: 16GiB, 50%, auto.",
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens per text that the budget holds.", show_default="8192"),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Texts at a time that it holds.", show_default="the prompts"),
    ] = None

    misses: Annotated[
        Literal["link", "host", "auto"] | None,
        typer.Option(
            help="Who serves experts that are not there: a copy, the processor, or both as "
            "measured. All but link depend, within rounding, on what was there.",
            show_default="link",
        ),
    ] = None

    host_memory: Annotated[
        str | None,
        typer.Option(
            callback=readable_size,
            help="Host memory for paged experts: 16GiB. Others are read from the files as needed.",
            show_default="all are in host memory",
        ),
    ] = None

    def options(self, num_texts: int) -> PagingOptions | None:
        """As the runtime takes them; None where nothing is paged."""
        if self.hbm_budget is not None:
            size, misses = self.batch_size or num_texts, self.misses or "link"
            return PagingOptions(self.hbm_budget, self.context, size, misses, self.host_memory)
        if (self.context, self.batch_size, self.misses, self.host_memory) != (None,) * 4:
            raise typer.BadParameter(
                "--context, --batch-size, --misses and --host-memory need --hbm-budget"
            )
        return None


@dataclass(frozen=True)
class Watching:
    """What is shown and written beside the text."""

    stats: Annotated[
        bool, typer.Option("--stats", help="Show the expert cache at work, on stderr.")
    ] = False
    record_routing: Annotated[
        Path | None,
        typer.Option(
            help="Write which experts every token went to, for qmoe cache-report.", metavar="FILE"
        ),
    ] = None


@grouped
def generate(
    path: Annotated[str, typer.Argument(help="A model's folder or Hub id.", metavar="PATH")],
    prompting: Prompting,
    sampling: Sampling,
    loading: Loading,
    paging: Paging,
    watching: Watching,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Continue prompts: text on stdout, statistics on stderr.

    Under torchrun the experts are spread over its processes, and the first of them speaks.
    """
    rank = rank_of_torchrun()
    with rank_0_speaks(rank, debug):
        _continue(path, prompting, sampling, loading, paging, watching, json_output, rank)


def _continue(
    path: str,
    prompting: Prompting,
    sampling: Sampling,
    loading: Loading,
    paging: Paging,
    watching: Watching,
    json_output: bool,
    rank: int | None,
) -> None:
    check_place(path)
    if rank is not None and not prompting.prompt:
        raise typer.BadParameter("under torchrun give --prompt TEXT: stdin is not every rank's")
    if watching.record_routing is not None:
        _check_writable(watching.record_routing)
    prompts = prompting.prompts()
    paged = paging.options(len(prompts) * (sampling.num_beams or 1))

    # Takes seconds, in which Ctrl-C has nothing to undo.
    import qmoe
    from qmoe.generation import load_tokenizer
    from qmoe.tools.threads import threads_for

    quiet()
    beams = (sampling.num_beams or 1) > 1
    record = watching.record_routing  # on every rank, so that all run the same steps
    with ExitStack() as stack:
        stack.enter_context(interruptible())
        tokenizer = load_tokenizer(path)  # before minutes go into loading
        model = qmoe.load(
            path,
            **asdict(loading),
            **({} if paged is None else asdict(paged)),
            expert_parallel=rank is not None,
        )
        if model.device.type == "cpu" and rank is None:  # ranks share the cores
            stack.enter_context(threads_for(model.get_memory_footprint()))
        writer = None if json_output or beams else _Writer(len(prompts))
        status = CacheStatus(model) if watching.stats else None
        options = {
            "max_new_tokens": prompting.max_new_tokens,
            "chat": prompting.chat,
            "stream": None if beams else _stream(writer, status),
            **sampling.options(),
        }
        result, recording, interrupted = _generate(
            model, tokenizer, prompts, options, status, record is not None
        )
        if json_output:
            document = {"model": path, "prompts": prompts, **asdict(result)}
            if status is not None:
                document["cache"] = status.document()
            print_json({**document, "interrupted": interrupted != 0})
        else:
            (writer or _Writer(len(prompts))).finish(result)
            print(_statistics_line(result.statistics), file=sys.stderr)
            if status is not None:
                print(status.line(), file=sys.stderr)
        if recording is not None and record is not None and not rank:
            name = Path(path).resolve().name if os.path.isdir(path) else path
            _save_trace(recording, record, name, len(prompts), interrupted != 0)
    if interrupted:
        raise typer.Exit(interrupted)


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    options: dict[str, Any],
    status: CacheStatus | None,
    record: bool,
) -> tuple[GenerationResult, Recording | None, int]:
    """The result, the routing if it is recorded, and the exit code of what interrupted it, or 0."""
    import qmoe
    from qmoe.generation import OverBudget

    recording = None
    try:
        with ExitStack() as stack:
            if status is not None:
                stack.enter_context(closing(status))
            if record:
                recording = stack.enter_context(qmoe.record_routing(model))
            result = qmoe.generate(model, tokenizer, prompts, **options)
    except OverBudget as error:
        raise ValueError(error.on_command_line) from None
    except qmoe.GenerationInterrupted as interruption:
        cause = interruption.__context__
        return interruption.result, recording, getattr(cause, "exit_code", INTERRUPTED)
    return result, recording, 0


def _stream(
    writer: _Writer | None, status: CacheStatus | None
) -> Callable[[int, str], None] | None:
    if writer is None and status is None:
        return None

    def stream(index: int, piece: str) -> None:
        if writer is not None:
            writer(index, piece)
        if status is not None:
            status.update()

    return stream


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


def _statistics_line(statistics: GenerationStatistics) -> str:
    s = statistics
    decode = s.decode_tokens_per_second
    peak = s.peak_memory_bytes
    parts = [
        f"prompt {s.prompt_tokens} tokens, {s.prompt_tokens_per_second:.1f}/s",
        f"new {s.new_tokens} tokens" + (f", {decode:.1f}/s" if decode else ""),
        f"experts {format_size(s.expert_bytes)}",
        f"peak {format_size(peak)} {s.peak_memory_kind}" if peak is not None else "peak unknown",
    ]
    return " | ".join(parts)
