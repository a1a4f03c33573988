"""What the teacher said of each window, on disk: it runs once, and need not be there afterwards.

Of a token's distribution the `TOP_K` most likely next tokens are kept, and what all others weigh
together. With these sets as outcomes, ``q`` the student's probabilities and ``p`` the teacher's,

    KL(p || q) = sum_i p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest)

which is at most the divergence over the whole vocabulary, and is zero where the two are equal.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qmoe.tools.routers.find import layer_outputs

TOP_K = 64
# Tokens of one forward pass, so that memory does not grow with --batch.
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Target:
    """What the teacher said of some windows; on the device that asks.

    Attributes:
        ids: (windows, window, k) int64, the most likely next tokens.
        log_probs: (windows, window, k) fp32.
        rest: (windows, window) fp32, the logarithm of what all other tokens weigh.
        outputs: for each layer with experts (windows * window, hidden_size), or none.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor
    outputs: Sequence[Tensor]


class Targets:
    """The teacher's word on every window, in files of a folder that are as large from the start.

    Attributes:
        num_windows: of all; the first ``num_with_layers`` have layers' outputs too.
        is_new: whether a file had to be made, so that nothing of it was recorded before.
        losses: (num_windows,) fp32, the teacher's own -log p of each window's tokens, summed.
    """

    def __init__(self, folder: Path, shape: TargetShape) -> None:
        """Open the files, or make them.

        Raises:
            OSError: the disk has no room for them.
        """
        self.shape = shape
        self.is_new = False
        n, window, k = shape.num_windows, shape.window, shape.top_k
        folder.mkdir(exist_ok=True)
        self._files = [folder / name for name in ("ids", "log_probs", "rest", "losses", "layers")]
        ids, log_probs, rest, losses, layers = self._files
        self._ids = self._open(ids, torch.int32, n, window, k)
        self._log_probs = self._open(log_probs, torch.float32, n, window, k)
        self._rest = self._open(rest, torch.float32, n, window)
        self.losses = self._open(losses, torch.float32, n)
        self._outputs = (
            self._open(layers, shape.dtype, shape.num_with_layers, shape.num_layers, window,
                    shape.hidden_size)
            if shape.num_layers
            else None
        )  # fmt: skip

    def _open(self, file: Path, dtype: torch.dtype, *shape: int) -> Tensor:
        """A tensor whose memory is a file, which takes its room on the disk at once.

        A write into a mapped file on a full disk would kill the process.
        """
        count = math.prod(shape)
        with open(file, "ab") as stream:
            if stream.tell() != count * dtype.itemsize:
                self.is_new = True
                stream.truncate(0)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(stream.fileno(), 0, count * dtype.itemsize)
                else:
                    stream.truncate(count * dtype.itemsize)
        return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)

    @torch.no_grad()
    def record(
        self, teacher: Any, windows: Tensor, done: int, recorded: Callable[[int], None]
    ) -> None:
        """Let the teacher read every window from number ``done`` on.

        Args:
            teacher: a causal language model.
            windows: (num_windows, window) int64.
            done: how many were recorded before.
            recorded: told how many are recorded, after each forward pass.

        Raises:
            ValueError: the teacher's logits are no numbers.
        """
        device = input_device(teacher)
        at_once = windows_at_once(self.shape.window)
        with layer_outputs(teacher) as outputs:
            while done < len(windows):
                batch = windows[done : done + at_once]
                logits = teacher(input_ids=batch.to(device), use_cache=False).logits.float()
                if not torch.isfinite(logits.amax()):
                    raise ValueError("the teacher's logits are NaN or infinite; check its files")
                self._put(done, batch, logits, outputs.take())
                done += len(batch)
                recorded(done)

    def _put(self, first: int, batch: Tensor, logits: Tensor, outputs: list[Tensor]) -> None:
        rows = slice(first, first + len(batch))
        total = logits.logsumexp(-1, keepdim=True)
        top = logits.topk(self.shape.top_k)
        self._ids[rows] = top.indices.int().cpu()
        self._log_probs[rows] = (top.values - total).cpu()
        self._rest[rows] = log_rest(logits, top.indices, total).cpu()
        self.losses[rows] = next_token_losses(logits, batch).cpu()
        with_layers = min(len(batch), self.shape.num_with_layers - first)
        if self._outputs is not None and with_layers > 0:
            for layer, output in enumerate(outputs):
                values = output.unflatten(0, (len(batch), -1))[:with_layers]
                self._outputs[first : first + with_layers, layer] = values.cpu()

    def flush(self) -> None:
        """Wait until what was recorded is on the disk."""
        for file in filter(Path.exists, self._files):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def of(self, rows: Tensor, device: torch.device, *, layers: bool = False) -> Target:
        """The teacher's word on the windows of these numbers."""
        outputs: list[Tensor] = []
        if layers and self._outputs is not None:
            outputs = [
                self._outputs[rows, layer].flatten(0, 1).to(device)
                for layer in range(self.shape.num_layers)
            ]
        return Target(
            self._ids[rows].to(device).long(),
            self._log_probs[rows].to(device),
            self._rest[rows].to(device),
            outputs,
        )


@dataclass(frozen=True)
class TargetShape:
    """How much is kept of how many windows.

    Attributes:
        num_windows, window: as tokens.
        top_k: most likely tokens of each position.
        num_layers: with experts, whose outputs are kept; 0: none are.
        num_with_layers: windows whose layers' outputs are kept, the first ones.
        hidden_size, dtype: of these outputs.
    """

    num_windows: int
    window: int
    top_k: int
    num_layers: int
    num_with_layers: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of all files."""
        outputs = self.num_with_layers * self.num_layers * self.hidden_size * self.dtype.itemsize
        tokens = self.num_windows * self.window
        return tokens * (8 * self.top_k + 4) + 4 * self.num_windows + outputs * self.window


def divergence(logits: Tensor, target: Target) -> Tensor:
    """KL(teacher || student) of each token, see the module's formula.

    Args:
        logits: (windows, window, vocab_size), the student's.

    Returns:
        (windows, window) fp32.
    """
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    ours = logits.gather(-1, target.ids) - total
    of_top = (target.log_probs.exp() * (target.log_probs - ours)).sum(-1)
    rest = target.rest.exp() * (target.rest - log_rest(logits, target.ids, total))
    # Where the rest weighs nothing its logarithm may be -inf, and 0 * inf is no number.
    return of_top + torch.where(target.rest > -80, rest, 0.0)


def log_rest(logits: Tensor, ids: Tensor, total: Tensor) -> Tensor:
    """The logarithm of what all tokens but ``ids`` weigh: (windows, window) fp32."""
    return logits.scatter(-1, ids, -math.inf).logsumexp(-1) - total.squeeze(-1)


def next_token_losses(logits: Tensor, windows: Tensor) -> Tensor:
    """-log p of each window's tokens but the first, summed: (windows,) fp32."""
    targets = windows[:, 1:].to(logits.device)
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return losses.sum(-1)


def windows_at_once(window: int) -> int:
    """How many windows one forward pass takes."""
    return max(1, TOKENS_AT_ONCE // window)


def input_device(model: Any) -> torch.device:
    """Where a model takes tokens; accelerate knows of one whose weights wait on disk."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)
