"""adapt_router(): let the routers of a quantized model learn from the model that it was made of.

Rounding moves what experts return, and with it what the best choice among them is. Everything but
the routers stays as it is to the bit. Gradients go through the very 8-bit experts that will run.

The teacher reads all windows first and what it says goes to disk; then it is dropped and the model
is loaded, so that the two are never in memory together. Where the teacher does not fit into memory
by itself, its layers are read from disk as it runs.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe.checkpoints.files import FileVersion, StoredTensor, open_checkpoint
from qmoe.checkpoints.hub import why_no_place
from qmoe.experts.quantized import quantized_modules
from qmoe.generation import load_tokenizer
from qmoe.loading.devices import choose_device
from qmoe.loading.load import load, load_partly, skeleton
from qmoe.paging.host_store import available_bytes
from qmoe.seeds import check_seed
from qmoe.sizes import format_size, parse_size
from qmoe.tools.routers.find import expert_blocks, find_routers, stored_routers
from qmoe.tools.routers.output import AdaptedOutput, find_source
from qmoe.tools.routers.targets import TOP_K, Targets, TargetShape
from qmoe.tools.routers.train import Course, Measured, Training, check_dtype, perplexity_of
from qmoe.tools.routers.windows import (
    Windows,
    cut,
    encode,
    read_texts,
    schedule,
    sha256_of_texts,
)
from qmoe.tools.threads import threads_for

# Of free memory; the rest is for what a forward pass takes.
TEACHER_SHARE = 0.8
SECONDS_BETWEEN_FLUSHES = 30.0

_NO_EXPERTS = "its experts are not in 8 bit; convert it with convert-checkpoint first"


@dataclass(frozen=True)
class Adapted:
    """What :func:`adapt_router` did.

    Attributes:
        out: the folder that was written.
        teacher: its Hub id, or its folder's name.
        weights: how many numbers the routers have.
        windows: different ones that were learned from, of ``window`` tokens each.
        held_out_windows: that states were measured on.
        window, steps, batch, lr, layers, seed: as they were given.
        teacher_perplexity: on the held-out windows.
        before: the model as it was.
        after: the model as it was written. Where no state was better than the start, it is that.
        measured: all that was measured, from the start on.
        seconds: of this run, what an interrupted one did not counted.
    """

    out: str
    teacher: str
    weights: int
    windows: int
    held_out_windows: int
    window: int
    steps: int
    batch: int
    lr: float
    layers: float
    seed: int
    teacher_perplexity: float
    before: Measured
    after: Measured
    measured: list[Measured]
    seconds: float

    @property
    def won_back(self) -> float | None:
        """The share of the perplexity that the teacher is ahead by which was won back."""
        lost = self.before.perplexity - self.teacher_perplexity
        return (self.before.perplexity - self.after.perplexity) / lost if lost > 0 else None


def adapt_router(
    converted: str | Path,
    out: str | Path,
    *,
    teacher: str | Path,
    data: str | Path | Sequence[str | Path],
    window: int = 512,
    steps: int = 200,
    batch: int = 8,
    lr: float = 5e-4,
    layers: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    teacher_memory: str | int | None = None,
    resume: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Adapted:
    """Train the routers of a converted model to say what its 16-bit original says.

    The loss is the divergence of the next-token distributions, KL(teacher || model), and AdamW
    changes an fp32 copy of the routers. The last tenth of each file is held out; the state that
    is closest to the teacher there is written, if its perplexity is not higher than the start's.

    Args:
        converted: a converted checkpoint; a local folder or a repository on the Hub.
        out: the folder to write, a checkpoint like ``converted``. It must not exist. What lies
            beside it meanwhile is for ``resume``.
        teacher: the checkpoint that ``converted`` was made of.
        data: text files in UTF-8.
        window: tokens that are read in one piece.
        steps: of the optimizer.
        batch: windows of a step.
        lr: the highest learning rate; it rises to it and falls to zero.
        layers: weight of the squared distance of each layer's output, relative to the output's
            own power; 0: logits alone. What the teacher's layers return takes disk.
        seed: of the order of windows.
        device: ``"auto"`` or any torch device.
        dtype: of what is not quantized, ``"auto"`` is as it is stored; of the teacher too.
        teacher_memory: what the teacher's weights may take of the device, as ``"16GiB"`` or bytes;
            the others are read from disk as it runs. None: what is free.
        resume: go on with a run that was interrupted, with the same arguments.
        progress: called with (stage, done, total), stages being "teacher", "learn", "measure".
        say: told of sizes before the run starts, and of each measurement; one line at a time.

    Returns:
        What was measured on the held-out windows, before and after.

    Raises:
        FileExistsError: ``out`` is there, or what an interrupted run left and ``resume`` is not
            set.
        ValueError: a checkpoint that cannot be read or has no 8-bit experts, a teacher of other
            shapes or with another tokenizer, a text that is too short or no UTF-8, another run's
            state, an argument that has no such value, too little disk.

    Example::

        adapted = adapt_router("qwen3-int8", "qwen3-adapted", teacher="Qwen/Qwen3-30B-A3B",
                               data="text.txt")
        print(adapted.before.perplexity, adapted.after.perplexity)
    """
    started = time.monotonic()
    device = choose_device(device)
    _check_numbers(window, steps, batch, lr, layers, seed)
    memory = None if teacher_memory is None else parse_size(teacher_memory)
    output = AdaptedOutput(Path(out))
    files = [Path(f) for f in ([data] if isinstance(data, (str, Path)) else data)]
    texts = read_texts(files)
    if why := why_no_place(str(teacher)):
        raise ValueError(why)
    folder, _ = find_source(converted, None)
    tensors = open_checkpoint(folder)
    if not any(tensor.dtype in ("I8", "F8_E4M3") for tensor in tensors.values()):
        raise ValueError(f"{folder}: {_NO_EXPERTS}")
    shape = _compare(folder, str(teacher))
    _check_window(window, shape)
    windows = cut(files, _tokens(folder, str(teacher), texts), window)
    order = schedule(len(windows.learn), steps, batch, seed)
    windows, order = _only_used(windows, order)
    course = Course(order, windows.learn, windows.held_out, lr, layers)
    options = {
        "CONVERTED": _identity(folder, tensors),
        "--teacher": _place(str(teacher)),
        "--data": sha256_of_texts(texts),
        "--window": str(window),
        "--steps": str(steps),
        "--batch": str(batch),
        "--lr": str(lr),
        "--layers": str(layers),
        "--seed": str(seed),
        "--dtype": str(dtype),
    }
    run = _Run(str(teacher), folder, tensors, course, device, dtype, memory, progress, say)
    check_dtype(run.dtype_of(shape))
    with ExitStack() as stack:
        stack.enter_context(output.held())
        output.open(options, resume=resume)
        if output.result is not None:  # published, and interrupted only after that
            output.clean()
            return _adapted(output.result)
        if device.type == "cpu":
            stack.enter_context(threads_for(run.bytes_of(shape)))
        targets = run.targets(shape, output)
        training = run.train(targets, output)
        routers = training.routers_to_store()
        result = Adapted(
            out=str(output.out),
            teacher=Path(teacher).resolve().name if Path(teacher).is_dir() else str(teacher),
            weights=sum(tensor.numel() for tensor in routers.values()),
            windows=len(windows.learn),
            held_out_windows=len(windows.held_out),
            window=window,
            steps=steps,
            batch=batch,
            lr=lr,
            layers=layers,
            seed=seed,
            teacher_perplexity=perplexity_of(
                targets.losses[len(windows.learn) :].double().sum().item(), windows.held_out
            ),
            before=training.measured[0],
            after=training.best,
            measured=training.measured,
            seconds=time.monotonic() - started,
        )
        output.publish(folder, tensors, training.stored, routers, asdict(result), _card(result))
        output.clean()
    return result


@dataclass(frozen=True)
class _Run:
    """What the two halves of a run share: the teacher's and the model's."""

    teacher: str
    folder: Path
    tensors: dict[str, StoredTensor]
    course: Course
    device: torch.device
    dtype: str | torch.dtype
    memory: int | None
    progress: Callable[[str, int, int], None]
    say: Callable[[str], None]

    def bytes_of(self, shape: Any) -> int:
        """What the teacher's weights take in memory."""
        return sum(p.numel() for p in shape.parameters()) * self.dtype_of(shape).itemsize

    def dtype_of(self, shape: Any) -> torch.dtype:
        """What is computed in."""
        dtype = shape.config.dtype if self.dtype == "auto" else self.dtype
        found = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return found if isinstance(found, torch.dtype) else torch.float32

    def targets(self, shape: Any, output: AdaptedOutput) -> Targets:
        """What the teacher says of every window, as far as it has not said it yet."""
        course = self.course
        windows = torch.cat([course.learn, course.held_out])
        config = shape.config.get_text_config()
        target_shape = TargetShape(
            num_windows=len(windows),
            window=windows.shape[1],
            top_k=min(TOP_K, config.vocab_size - 1),
            num_layers=len(expert_blocks(shape)) if course.layers else 0,
            num_with_layers=len(course.learn),
            hidden_size=config.hidden_size,
            dtype=self.dtype_of(shape),
        )
        model_bytes, memory = self.bytes_of(shape), self._memory(shape)
        partly = memory is not None
        copied = sum({t.file: t.file.stat().st_size for t in self.tensors.values()}.values())
        needed = target_shape.nbytes + copied + (model_bytes if partly else 0)
        output.begin(needed, self.folder, self.tensors)
        self.say(
            f"{len(course.learn)} windows of {windows.shape[1]} tokens to learn from, "
            f"{len(course.held_out)} held out; what the teacher says of them takes "
            f"{format_size(target_shape.nbytes)} of disk"
        )
        targets = Targets(output.targets, target_shape)
        if targets.is_new:
            output.keep_recorded(0)
        if output.recorded < len(windows):
            if partly:
                self.say(
                    f"the teacher takes {format_size(model_bytes)}, {format_size(memory or 0)} "
                    f"are in memory: the rest is read from {format_size(model_bytes)} of disk"
                )
            self._record(targets, windows, output, memory)
        output.forget_teacher()
        return targets

    def _memory(self, shape: Any) -> int | None:
        """What the teacher's weights may take of the device; None where all of them fit."""
        size, memory = self.bytes_of(shape), self.memory
        if memory is None:
            cuda = self.device.type == "cuda"
            free = torch.cuda.mem_get_info(self.device)[0] if cuda else available_bytes()
            memory = size if free is None else int(TEACHER_SHARE * free)
        return None if size <= memory else memory

    def _record(
        self, targets: Targets, windows: Tensor, output: AdaptedOutput, memory: int | None
    ) -> None:
        output.forget_teacher()
        where: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        if memory is None:
            model = load(self.teacher, **where)
        else:
            model = load_partly(self.teacher, memory=memory, folder=output.teacher, **where)
        kept_at = time.monotonic()

        def recorded(count: int) -> None:
            nonlocal kept_at
            last = count == len(windows)
            if last or time.monotonic() - kept_at > SECONDS_BETWEEN_FLUSHES:
                targets.flush()
                output.keep_recorded(count)
                kept_at = time.monotonic()
            self.progress("teacher", count, len(windows))

        try:
            targets.record(model, windows, output.recorded, recorded)
        finally:
            del model
            gc.collect()  # hooks and modules refer to each other
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def train(self, targets: Targets, output: AdaptedOutput) -> Training:
        """The model, once its routers have learned."""
        model = load(self.folder, device=self.device, dtype=self.dtype)
        if not quantized_modules(model):
            raise ValueError(f"{self.folder}: {_NO_EXPERTS}")
        routers = find_routers(model)
        stored = stored_routers(model, routers, self.tensors)
        training = Training(model, routers, stored, targets, self.course)
        if output.training.is_file():
            training.load(output.training)
            self.say(f"going on after step {training.step} of {self.course.steps}")
        told = len(training.measured)

        def tell(stage: str, done: int, total: int) -> None:
            nonlocal told
            self.progress(stage, done, total)
            for measured in training.measured[told:]:
                self.say(_line(measured, self.course.steps))
            told = len(training.measured)

        training.run(output.training, tell)
        tell("learn", self.course.steps, self.course.steps)
        return training


def _line(measured: Measured, steps: int) -> str:
    where = f"step {measured.step} of {steps}" if measured.step else "before"
    return f"{where}: held-out KL {measured.kl:.5f}, perplexity {measured.perplexity:.4f}"


def _adapted(result: dict[str, Any]) -> Adapted:
    """What was kept of a run as a dictionary."""
    measured = [Measured(**found) for found in result["measured"]]
    ends = {name: Measured(**result[name]) for name in ("before", "after")}
    return Adapted(**{**result, **ends, "measured": measured})


def _check_numbers(
    window: int, steps: int, batch: int, lr: float, layers: float, seed: int
) -> None:
    for name, value, least in (("window", window, 2), ("steps", steps, 1), ("batch", batch, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}")
    if not 0 < lr < 1:
        raise ValueError(f"lr={lr!r}: must lie between 0 and 1, such as 5e-4")
    if not 0 <= layers < float("inf"):
        raise ValueError(f"layers={layers!r}: must be 0 or a positive weight, such as 1")
    check_seed(seed)


def _check_window(window: int, shape: Any) -> None:
    context = getattr(shape.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and window > context:
        raise ValueError(f"window={window}: must be at most the model's context, {context}")


def _compare(folder: Path, teacher: str) -> Any:
    """The teacher's skeleton; its parameters have the names and shapes that the model's have.

    Raises:
        ValueError: they have not.
    """
    theirs, ours = skeleton(teacher), skeleton(folder)
    shapes = [{n: list(p.shape) for n, p in m.named_parameters()} for m in (theirs, ours)]
    for name in (*shapes[1], *shapes[0]):
        a, b = (shape.get(name, "missing") for shape in shapes)
        if a != b:
            raise ValueError(
                f"{teacher}: is no teacher of {folder}, {name} is {a} there and {b} here; give "
                "the checkpoint that it was converted from"
            )
    return theirs


def _tokens(folder: Path, teacher: str, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, by the model's tokenizer.

    Raises:
        ValueError: the teacher has another one.
    """
    tokenizer = load_tokenizer(str(folder))
    try:
        other = load_tokenizer(teacher)
    except ValueError:  # none: then it cannot be another one
        other = None
    tokens = [encode(tokenizer, text) for text in texts]
    if other is not None and any(
        encode(other, text) != ids for text, ids in zip(texts, tokens, strict=True)
    ):
        raise ValueError(
            f"{teacher}: its tokenizer reads the data otherwise than that of {folder}; give the "
            "checkpoint that it was converted from"
        )
    return tokens


def _only_used(windows: Windows, order: Tensor) -> tuple[Windows, Tensor]:
    """Leave out windows that no step learns from, so that the teacher does not read them."""
    used, order = order.unique(return_inverse=True)
    return Windows(windows.learn[used], windows.held_out), order


def _place(teacher: str) -> str:
    """Tells a teacher from another, or from what it was, if it is a folder."""
    folder = Path(teacher)
    return _identity(folder, open_checkpoint(folder)) if folder.is_dir() else teacher


def _identity(folder: Path, tensors: dict[str, StoredTensor]) -> str:
    """Tells a checkpoint from another, or from what it was."""
    files = sorted({tensor.file for tensor in tensors.values()} | {folder / "config.json"})
    versions = [(v.size, v.modified) for v in map(FileVersion.of, files)]
    return f"{folder.resolve()} ({hashlib.sha256(str(versions).encode()).hexdigest()[:12]})"


def _card(result: Adapted) -> str:
    """A section for the model card."""
    from qmoe import __version__

    before, after = result.before, result.after
    text = (
        "## Routers\n\n"
        f"The routers are no longer as they were: `qmoe adapt-router` {__version__} let them learn "
        f"from `{result.teacher}`, {result.steps} steps of {result.batch} windows of "
        f"{result.window} tokens. On {result.held_out_windows} held-out windows:\n\n"
        "| | before | after | teacher |\n|---|---|---|---|\n"
        f"| KL to the teacher | {before.kl:.5f} | {after.kl:.5f} | 0 |\n"
        f"| perplexity | {before.perplexity:.4f} | {after.perplexity:.4f} "
        f"| {result.teacher_perplexity:.4f} |\n"
    )
    if after.step == 0:
        text = "## Routers\n\n`qmoe adapt-router` found no better routers: these are unchanged.\n"
    return text
