"""One decode step of a whole model: run, captured as a CUDA graph, replayed.

The step reads a token of each row and leaves the logits of the next. Everything in it has a fixed
place, and what changes from step to step (columns, positions, tokens) is a value on the device, so
that one graph serves all steps.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qmoe.static_cache import DecodeCache
from qmoe.substitution import (
    SUBSTITUTIONS,
    Substitutions,
    UnknownAttention,
    has_attention_interface,
)

# Steps that run before the capture: the first compiles kernels, the second is watched for what
# a graph cannot do.
_WARM_UP = 2
_OWN_MASKS = ("eager", "sdpa")  # implementations that a mask over a static cache is enough for


class DecodeStep:
    """A model's decode step for a number of rows and of columns.

    Attributes:
        cache: what the model remembers.
        input_ids: (rows, 1) int64, the tokens that the next step reads.
        position_ids: (rows, 1) int64, their positions.
        logits: (rows, vocab_size) in the model's dtype, of the last step or prompt.
        trouble: why there is no graph, once it was tried; None otherwise.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        length: int,
        substitutions: Iterable[str] = SUBSTITUTIONS,
    ) -> None:
        """Allocate little; the cache grows with the first prompt.

        Args:
            model: a causal language model of transformers, on one device.
            rows: texts at a time.
            length: tokens of each at most, prompt and padding included.
            substitutions: see `qmoe.substitution`.

        Raises:
            ValueError: the model cannot be run like this; the message says why.
        """
        config = model.config.get_text_config()
        own = config._attn_implementation
        if not has_attention_interface(model) and own not in _OWN_MASKS:
            raise ValueError(f"its attention is {own!r}, which takes no static cache")
        self.model, self.device = model, model.device
        self.substitutions = Substitutions(model, substitutions)
        self.cache = DecodeCache(model.config, rows, length, self.device)
        self.rows, self.length = rows, length
        self.input_ids = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        self.position_ids = torch.zeros_like(self.input_ids)
        self.logits: Tensor = torch.empty(0)
        self.trouble: str | None = None
        # For a model that makes its masks itself; new columns are never masked.
        self._attention_mask = torch.ones(rows, length, dtype=torch.int64, device=self.device)
        self._last_only = (
            {"logits_to_keep": 1}
            if "logits_to_keep" in inspect.signature(model.forward).parameters
            else {}
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0
        self._paging = getattr(model, "qmoe_paging", None)

    @torch.no_grad()
    def read(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, chunk: int | None
    ) -> None:
        """Read prompts, and forget what was before; `logits` are those of their last tokens.

        Args:
            input_ids, attention_mask, position_ids: (rows, columns) int64, padded on the left.
            chunk: columns at a time; None for all at once.
        """
        cache, columns = self.cache, input_ids.shape[1]
        cache.begin(attention_mask)
        self._attention_mask.fill_(1)
        self._attention_mask[:, :columns] = attention_mask
        with self.substitutions.active(cache):
            for ids, positions in zip(
                input_ids.split(chunk or columns, 1),
                position_ids.split(chunk or columns, 1),
                strict=True,
            ):
                output = self.model(
                    input_ids=ids,
                    attention_mask=attention_mask[:, : cache.filled + ids.shape[1]],
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    return_dict=True,
                    **self._last_only,
                )
                cache.extend(ids.shape[1])
        self._keep(output.logits)
        cache.begin_decoding()
        self.position_ids.copy_(position_ids[:, -1:] + 1)

    @torch.no_grad()
    def run(self) -> None:
        """One step, kernel by kernel."""
        try:
            self._run()
        except UnknownAttention:
            # What the layers before have stored is stored again.
            self.substitutions.attention = False
            self._run()

    def _run(self) -> None:
        with self.substitutions.active(self.cache):
            output = self.model(
                input_ids=self.input_ids,
                attention_mask=None if self.substitutions.attention else self._attention_mask,
                position_ids=self.position_ids,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
            )
        self._keep(output.logits)
        self.cache.advance()
        self.position_ids.add_(1)

    def capture(self) -> None:
        """Capture the step into a graph without running it; kernels must have been compiled.

        Raises:
            RuntimeError: the step does what a graph cannot; nothing has changed.
        """
        self._graph = capture(self.run, self.device)

    def replay(self) -> None:
        """One step, by the graph."""
        assert self._graph is not None
        self._graph.replay()

    def release(self) -> None:
        """Drop the graph; it is captured again when enough steps have run without."""
        self._graph, self._steps, self.trouble = None, 0, None

    def advance(self) -> None:
        """One step: by the graph, or by itself on a CPU, at first, and where a graph cannot be."""
        if (paging := getattr(self.model, "qmoe_paging", None)) is not self._paging:
            self._paging = paging  # another budget, since the last step
            self.release()
        if self._graph is None and self._steps == _WARM_UP and self.trouble is None:
            self._try_capture()
        if self._graph is not None:
            self._graph.replay()
        elif self._steps == _WARM_UP - 1 and self.device.type == "cuda":
            self.trouble = _watched(self.run)
            self._steps += 1
        else:
            self.run()
            self._steps += self._steps < _WARM_UP

    def _try_capture(self) -> None:
        if self.device.type != "cuda":
            return
        try:
            self.capture()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's forward may do
            self.trouble = next(iter(str(error).strip().splitlines()), type(error).__name__)

    def _keep(self, logits: Tensor) -> None:
        logits = logits[:, -1]
        if self.logits.shape != logits.shape:
            self.logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        self.logits.copy_(logits)


def capture(function: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``function``, which is not run; its kernels must have been compiled."""
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # torch.cuda.graph would collect garbage first, which takes longer than the capture;
            # and another thread may go on using the device.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
    return graph


def _watched(step: Callable[[], object]) -> str | None:
    """Run a step; what in it makes the host wait for the device, which a graph cannot do."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchroniz" in str(warning.message):
            return f"{warning.filename.rpartition('/')[2]}:{warning.lineno} waits for the device"
    return None
