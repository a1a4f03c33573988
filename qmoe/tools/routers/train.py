"""Routers learn: AdamW on fp32 copies, while the model computes with what will be stored."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qmoe.checkpoints.files import StoredTensor
from qmoe.tools.routers.find import layer_outputs, read_tensor
from qmoe.tools.routers.targets import (
    Target,
    Targets,
    divergence,
    next_token_losses,
    windows_at_once,
)

WARM_UP_SHARE = 0.1  # of the steps
EVALUATIONS = 10  # on held-out windows, spread over the steps; states are saved then too


@dataclass(frozen=True)
class Measured:
    """What was measured on held-out windows, after so many steps.

    Attributes:
        step: 0 is the start.
        kl: KL(teacher || student) of a token, in nats, see `qmoe.tools.routers.targets`.
        perplexity: of the model on the text itself.
    """

    step: int
    kl: float
    perplexity: float


@dataclass(frozen=True)
class Course:
    """What each step learns from, and how fast.

    Attributes:
        order: (steps, batch) int64, numbers of windows.
        learn, held_out: (windows, window) int64; targets have them in this order.
        lr: the highest rate. It rises to it over the first tenth of the steps and falls to zero
            along a cosine.
        layers: weight of the layers' outputs in the loss.
    """

    order: Tensor
    learn: Tensor
    held_out: Tensor
    lr: float
    layers: float

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.order)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm_up = max(1, round(WARM_UP_SHARE * self.steps))
        falling = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return self.lr * min(1.0, (step + 1) / warm_up) * falling

    def is_measured(self, step: int) -> bool:
        """Whether held-out windows are measured after so many steps."""
        every = max(1, self.steps // EVALUATIONS)
        return step == self.steps or step % every == 0


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError if routers cannot learn in this dtype."""
    if dtype == torch.float16:
        raise ValueError(
            "the routers are in float16, in which small gradients vanish; give --dtype bfloat16 or "
            "float32"
        )


class Training:
    """A model whose routers learn; it belongs to this one.

    Attributes:
        stored: where each of the routers lies in the checkpoint.
        step: how many are done.
        measured: on held-out windows so far; the first is the start.
        best: which of them had the lowest KL without a higher perplexity than the start's.
    """

    def __init__(
        self,
        model: Any,
        routers: Mapping[str, nn.Parameter],
        stored: Mapping[str, StoredTensor],
        targets: Targets,
        course: Course,
    ) -> None:
        self.model, self.routers, self.stored = model, routers, stored
        self.targets, self.course = targets, course
        for parameter in routers.values():
            check_dtype(parameter.dtype)
        model.requires_grad_(False)
        for parameter in routers.values():
            parameter.requires_grad_(True)
        # As they are stored: the model may have them in fewer bits.
        self._copies = {n: read_tensor(stored[n]).float().to(p.device) for n, p in routers.items()}
        self._best = {n: copy.clone() for n, copy in self._copies.items()}
        # No decay: it would draw routers to zero, where they were trained without.
        self._optimizer = torch.optim.AdamW(self._copies.values(), lr=course.lr, weight_decay=0.0)
        self.step = 0
        self.measured: list[Measured] = []

    @property
    def best(self) -> Measured:
        """The state that is kept."""
        start = self.measured[0]
        fit = [m for m in self.measured if m.perplexity <= start.perplexity]
        return min(fit, key=lambda m: (m.kl, m.step))

    def run(self, file: Path, told: Callable[[str, int, int], None]) -> None:
        """Do the steps that are left; the state is saved to ``file`` whenever it was measured.

        Args:
            told: "learn" or "measure", and how much of how many steps or windows is done.

        Raises:
            ValueError: the loss is no number, or no router takes a gradient.
        """
        if not self.measured:
            self._measure(told)
            self.save(file)
        while self.step < self.course.steps:
            self._learn()
            self.step += 1
            told("learn", self.step, self.course.steps)
            if self.course.is_measured(self.step):
                self._measure(told)
                self.save(file)

    def routers_to_store(self) -> dict[str, Tensor]:
        """The best state's routers on the CPU, in the dtypes that the checkpoint stores."""
        return {
            n: t.to(self.stored[n].torch_dtype).cpu().contiguous() for n, t in self._best.items()
        }

    # ---- one step ------------------------------------------------------------------------------

    def _learn(self) -> None:
        rows = self.course.order[self.step]
        for copy in self._copies.values():
            copy.grad = None
        for part in rows.split(windows_at_once(self.course.learn.shape[1])):
            share = len(part) / len(rows)
            loss = self._loss(part) * share
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss.item()} in step {self.step + 1}; try a smaller --lr"
                )
            if not loss.requires_grad:
                raise ValueError(f"no router of {type(self.model).__name__} takes a gradient")
            loss.backward()
            for name, parameter in self.routers.items():
                if parameter.grad is None:  # chosen by alone, such as a correction of scores
                    continue
                copy, gradient = self._copies[name], parameter.grad.float()
                copy.grad = gradient if copy.grad is None else copy.grad + gradient
                parameter.grad = None
        self._optimizer.param_groups[0]["lr"] = self.course.rate(self.step)
        self._optimizer.step()
        self._show(self._copies)

    def _loss(self, rows: Tensor) -> Tensor:
        windows = self.course.learn[rows].to(self.model.device)
        target = self.targets.of(rows, self.model.device, layers=self.course.layers > 0)
        if not self.course.layers:
            logits = self.model(input_ids=windows, use_cache=False).logits
            return divergence(logits, target).mean()
        with layer_outputs(self.model) as outputs:
            logits = self.model(input_ids=windows, use_cache=False).logits
            distance = _distance(outputs.take(), target)
        return divergence(logits, target).mean() + self.course.layers * distance

    @torch.no_grad()
    def _show(self, copies: Mapping[str, Tensor]) -> None:
        """Let the model compute with routers as they would be stored."""
        for name, parameter in self.routers.items():
            parameter.copy_(copies[name].to(self.stored[name].torch_dtype))

    @torch.no_grad()
    def _measure(self, told: Callable[[str, int, int], None]) -> None:
        kl = loss = 0.0
        windows, first = self.course.held_out, len(self.course.learn)
        for rows in torch.arange(len(windows)).split(windows_at_once(windows.shape[1])):
            told("measure", int(rows[0]), len(windows))
            batch = windows[rows].to(self.model.device)
            target = self.targets.of(first + rows, self.model.device)
            logits = self.model(input_ids=batch, use_cache=False).logits.float()
            kl += divergence(logits, target).sum().item()
            loss += next_token_losses(logits, batch).sum().item()
        told("measure", len(windows), len(windows))
        if not math.isfinite(kl + loss):
            raise ValueError(f"the held-out loss is no number after step {self.step}")
        perplexity = perplexity_of(loss, windows)
        self.measured.append(Measured(self.step, kl / windows.numel(), perplexity))
        if self.best is self.measured[-1]:
            self._best = {name: copy.clone() for name, copy in self._copies.items()}

    # ---- the state on disk ---------------------------------------------------------------------

    def save(self, file: Path) -> None:
        """Write everything that a resumed run needs, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, copy in self._copies.items():
            tensors[f"copy.{name}"] = copy
            tensors[f"best.{name}"] = self._best[name]
            for key, value in self._optimizer.state[copy].items():
                tensors[f"{key}.{name}"] = value
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        state = {"step": self.step, "measured": [asdict(m) for m in self.measured]}
        new = file.with_name(f"{file.name}.new")
        save_file(on_cpu, new, metadata={"state": json.dumps(state)})
        with open(new, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(new, file)

    def load(self, file: Path) -> None:
        """Go on from what :meth:`save` wrote.

        Raises:
            ValueError: it is broken.
        """
        try:
            with safe_open(file, "pt") as saved:
                state = json.loads(saved.metadata()["state"])
                tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
            for name, copy in self._copies.items():
                copy.copy_(tensors[f"copy.{name}"])
                self._best[name].copy_(tensors[f"best.{name}"])
                kept = {
                    key: tensors[f"{key}.{name}"].to(copy.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in tensors
                }
                if kept:
                    self._optimizer.state[copy] = kept
            self.step = state["step"]
            self.measured = [Measured(**measured) for measured in state["measured"]]
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{file}: cannot be read ({type(error).__name__}); remove {file.parent} to start "
                "afresh"
            ) from None
        self._show(self._copies)


def perplexity_of(loss: float, windows: Tensor) -> float:
    """Of windows whose tokens but the first have this -log p in all."""
    return math.exp(loss / windows[:, 1:].numel())


def _distance(outputs: list[Tensor], target: Target) -> Tensor:
    """Mean over layers of |student - teacher|^2 / |teacher|^2."""
    distances = []
    for ours, theirs in zip(outputs, target.outputs, strict=True):
        theirs = theirs.float()
        power = theirs.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        distances.append((ours.float() - theirs).square().sum() / power)
    return torch.stack(distances).mean()
