"""Time and check candidates' tiles on one GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial

import torch

from qmoe_kernels.experts import Experts, Projection
from qmoe_kernels.precompile import activation_of, rows_dtype
from qmoe_kernels.tile_search import Cell, Measure
from qmoe_kernels.tiles import LayerShape, LayerTiles
from qmoe_kernels.timing import (
    LayerWeights,
    num_calls,
    random_layer,
    random_routing,
    replay_microseconds,
)

# Relative Frobenius distance between outputs of two tiles: sums in another order, rounded to bf16
# twice. With 8-bit rows the second rounding moves whole steps of 1/127 or 1/16.
TOLERANCE = 4e-2
# A candidate slower than the best by this factor is not replayed; launching it takes so long, too,
# where other processes compile.
TOO_SLOW, LAUNCH_MICROSECONDS = 1.5, 1000.0
# A graph with more takes longer to capture than to replay.
MOST_CALLS = 64
# Two copies of weights up to this size, so that L2 has less of what comes next; see
# `replay_microseconds`.
SMALL_LAYER = 4e9


class LayerTimer:
    """Random weights of one layer on a GPU, and tiles' times with them.

    Args:
        shape: of the layer.
        weights: ``"int8"``, ``"fp8"`` or ``"bf16"``.
        device: a CUDA device; on the CPU, times mean nothing.
    """

    def __init__(self, shape: LayerShape, weights: str, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)
        layer = random_layer(shape, weights, device, self.generator)
        self.layers = [layer]
        if layer.gate_up_proj.nbytes + layer.down_proj.nbytes <= SMALL_LAYER:
            self.layers.append(layer.clone())
        gc.freeze()  # a capture collects garbage: not among what imports have left

    def cell(self, cell: Cell) -> tuple[Measure, list[str]]:
        """Draw one cell's input; what times it, and a list that gets each failure's reason."""
        from qmoe_kernels.layer import fused_moe_triton

        shape = cell.kind.shape
        draw = partial(torch.randn, device=self.device, generator=self.generator)
        calls: list[Callable[[LayerTiles], torch.Tensor]] = []
        number = num_calls(shape, cell.num_tokens, self.layers[0].down_proj.itemsize)
        for index in range(min(number, MOST_CALLS)):
            topk_ids, topk_weights = random_routing(
                shape, cell.num_tokens, device=self.device, generator=self.generator
            )
            hidden_states = draw(cell.num_tokens, shape.hidden_size).to(torch.bfloat16)
            layer: LayerWeights = self.layers[index % len(self.layers)]
            calls.append(
                partial(
                    _call,
                    fused_moe_triton,
                    hidden_states,
                    layer,
                    topk_ids,
                    topk_weights,
                    shape,
                    rows_dtype(cell.kind.activations),
                )
            )
        errors: list[str] = []
        expected: list[torch.Tensor] = []

        def measure(tiles: LayerTiles, seconds: float, bound: float | None) -> float | None:
            try:
                actual = calls[0](tiles).float()
                if not expected:  # the baseline comes first
                    expected.append(actual)
                error = float((actual - expected[0]).norm() / expected[0].norm())
                if not error <= TOLERANCE:
                    raise ArithmeticError(f"relative error {error:.1e}")
                if bound is not None and self._launched(calls[0], tiles) > (
                    TOO_SLOW * bound + LAUNCH_MICROSECONDS
                ):
                    return None
                timed = [partial(call, tiles) for call in calls]
                return replay_microseconds(timed, seconds=seconds, device=self.device)
            except Exception as failure:  # Triton's and the compilers' have no common base
                errors.append(f"{tiles}: {type(failure).__name__}: {failure}")
                try:
                    self._synchronize()
                except RuntimeError as broken:  # nothing runs in this process any more
                    raise RuntimeError(f"{tiles} broke the GPU's context: {broken}") from None
                return None

        return measure, errors

    def _launched(self, call: Callable[[LayerTiles], object], tiles: LayerTiles) -> float:
        """Microseconds from a launch to its end, the host's part included; the better of two."""
        best = float("inf")
        for _ in range(2):
            self._synchronize()
            start = time.perf_counter()
            call(tiles)
            self._synchronize()
            best = min(best, 1e6 * (time.perf_counter() - start))
        return best

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _call(
    fused_moe_triton: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    layer: LayerWeights,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    shape: LayerShape,
    activations: torch.dtype | None,
    tiles: LayerTiles,
) -> torch.Tensor:
    experts = Experts(
        Projection(layer.gate_up_proj, layer.gate_up_proj_scale),
        Projection(layer.down_proj, layer.down_proj_scale),
        activation_of(shape),
    )
    return fused_moe_triton(
        hidden_states, experts, topk_ids, topk_weights, activations=activations, tiles=tiles
    )
