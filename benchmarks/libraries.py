"""Other libraries' products of one token with many 8-bit experts: torch, torchao, kt-kernel.

torchao and kt-kernel are measured where they are installed; qmoe needs neither. kt-kernel asks for
another torch than ours, but its library links to none: ``pip install torchao gguf`` and ``pip
install --no-deps kt-kernel``, in an environment that nothing else needs.
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from qmoe_kernels import fused_moe, quantize

Calls = dict[str, Callable[[], object]]
FORMATS = ("int8", "fp8")
MOST_ERROR = 0.05  # of kt-kernel's INT8, whose rows are in 8 bits, too


def torch_calls(layer: list[Tensor]) -> Calls:
    """What torch has for INT8 weights: with bf16 rows, or with rows that are INT8 already.

    Args:
        layer: (experts, 2 * inner, hidden) int8, its scales, (experts, hidden, inner), its scales.
    """
    gate_up, up_scale, down, down_scale = layer
    x, h = (torch.randn(1, weight.shape[2], dtype=torch.bfloat16) for weight in (gate_up, down))
    pairs = [(x, gate_up, up_scale.bfloat16()), (h, down, down_scale.bfloat16())]

    def packed() -> None:
        for rows, weight, scale in pairs:
            for expert in range(len(weight)):
                torch._weight_int8pack_mm(rows, weight[expert], scale[expert])

    found: Calls = {"torch _weight_int8pack_mm": packed}
    onednn = getattr(torch.ops, "onednn", None)
    if not hasattr(onednn, "qlinear_pointwise"):
        return found
    prepacked = [
        (
            torch.full(rows.shape, 130, dtype=torch.uint8),
            [onednn.qlinear_prepack(one, None) for one in weight],
            scale.float(),
            torch.zeros(weight.shape[1], dtype=torch.int32),
        )
        for rows, weight, scale in pairs
    ]

    def pointwise() -> None:
        for rows, weight, scale, zeros in prepacked:
            for expert in range(len(weight)):
                onednn.qlinear_pointwise(
                    rows, 0.01, 128, weight[expert], scale[expert], zeros, None, 1.0, 0,
                    torch.float32, "none", [], "",
                )  # fmt: skip

    return found | {"oneDNN qlinear_pointwise": pointwise}


def torchao_calls(experts: int, hidden: int, inner: int) -> Calls:
    """Linear modules that torchao quantized, as they come; INT8 weights compiled, too.

    Nothing without torchao, and nothing compiled without a C++ compiler.
    """
    if find_spec("torchao") is None:
        return {}
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    x, h = (torch.randn(1, n, dtype=torch.bfloat16) for n in (hidden, inner))

    def modules(config: Any) -> Callable[[], object]:
        sizes = ((hidden, 2 * inner), (inner, hidden))
        pair = nn.ModuleList(nn.Linear(*s, bias=False, dtype=torch.bfloat16) for s in sizes)
        quantize_(pair.requires_grad_(False), config)
        pairs = [copy.deepcopy(pair) for _ in range(experts)]

        @torch.no_grad()
        def call() -> list[Tensor]:
            return [linear(rows) for up, down in pairs for linear, rows in ((up, x), (down, h))]

        return call

    weight_only = modules(Int8WeightOnlyConfig(version=2))
    found: Calls = {
        "torchao INT8": weight_only,
        "torchao INT8, rows too": modules(Int8DynamicActivationInt8WeightConfig(version=2)),
        "torchao FP8": modules(Float8WeightOnlyConfig()),
    }
    if shutil.which("g++"):
        found["torchao INT8, compiled"] = torch.compile(weight_only, options={"freezing": True})
    return found


@contextmanager
def kt_kernel_calls(experts: int, hidden: int, inner: int, threads: int) -> Iterator[Calls]:
    """kt-kernel's whole layer on so many threads; nothing where it is not installed.

    Its threads never sleep, so they are in a process of their own, which is stopped while others
    take their turn.

    Raises:
        RuntimeError: the process ended.
    """
    if find_spec("kt_kernel") is None:
        yield {}
        return
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    sizes = (experts, hidden, inner, threads)
    process = spawn.Process(target=_serve_kt_kernel, args=(theirs, *sizes), daemon=True)
    process.start()
    theirs.close()

    def answer() -> Any:
        try:
            return ours.recv()
        except EOFError:
            raise RuntimeError("kt-kernel's process ended; what it printed says why") from None

    def call(weights: str) -> None:
        os.kill(process.pid or 0, signal.SIGCONT)
        ours.send(weights)
        answer()
        os.kill(process.pid or 0, signal.SIGSTOP)

    try:
        formats = answer()
        os.kill(process.pid or 0, signal.SIGSTOP)
        yield {f"kt-kernel {weights.upper()}": partial(call, weights) for weights in formats}
    finally:
        process.kill()
        process.join()
        ours.close()


def _serve_kt_kernel(pipe: Connection, experts: int, hidden: int, inner: int, threads: int) -> None:
    """Send the formats that this processor's build has; then multiply once for each one asked."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # it prints a line for each thread and layer
    torch.set_num_threads(threads)
    layer = _KTLayer(experts, hidden, inner, threads)
    known = {"int8": layer.int8, "fp8": layer.fp8}
    layers = {weights: moe for weights, make in known.items() if (moe := make()) is not None}
    for weights, moe in layers.items():
        layer.check(weights, moe)
    pipe.send(list(layers))
    while True:
        layer.multiply(layers[pipe.recv()])
        pipe.send(None)


class _KTLayer:
    """A layer of equal experts, each in memory of its own, and one token that goes to all."""

    def __init__(self, experts: int, hidden: int, inner: int, threads: int) -> None:
        from kt_kernel import kt_kernel_ext

        self.sizes, self.extension = (experts, hidden, inner), kt_kernel_ext
        pool = kt_kernel_ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map = 1, [0]
        pool.subpool_thread_count = [threads]
        self.infer = kt_kernel_ext.CPUInfer(pool)
        torch.manual_seed(0)
        self.gate_up = (torch.randn(2 * inner, hidden) / hidden**0.5).bfloat16()
        self.down = (torch.randn(hidden, inner) / inner**0.5).bfloat16()
        self.x = torch.randn(1, hidden, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.x)
        self.count = torch.ones(1, dtype=torch.int32)
        self.ids = torch.arange(experts)[None]
        self.gates = torch.full(self.ids.shape, 1 / experts)
        self.on_gpu = torch.zeros(experts, dtype=torch.bool)

    def _config(self) -> Any:
        experts, hidden, inner = self.sizes
        address = self.on_gpu.data_ptr()
        config = self.extension.moe.MOEConfig(experts, experts, hidden, inner, address)
        config.layer_idx, config.pool, config.max_len = 0, self.infer.backend_, 64
        return config

    def _load(self, moe: Any) -> Any:
        self.infer.submit(moe.load_weights_task(self.ids.data_ptr()))
        self.infer.sync()
        return moe

    def int8(self) -> Any:
        """It quantizes bf16 weights itself."""
        if not hasattr(self.extension.moe, "AMXInt8_MOE"):
            return None
        inner = self.sizes[2]
        halves = (self.gate_up[:inner], self.gate_up[inner:], self.down)
        gate, up, down = (half.repeat(self.sizes[0], 1, 1) for half in halves)
        config = self._config()
        config.gate_proj, config.up_proj = gate.data_ptr(), up.data_ptr()
        config.down_proj = down.data_ptr()
        return self._load(self.extension.moe.AMXInt8_MOE(config))

    def fp8(self) -> Any:
        """It copies e4m3fn weights with a scale for each channel."""
        if not hasattr(self.extension.moe, "AMXFP8PerChannel_MOE"):
            return None
        experts, _, inner = self.sizes
        (gate_up, up_scale), (down, down_scale) = (
            quantize(weight, "fp8") for weight in (self.gate_up, self.down)
        )
        addresses = [
            [[tensor.data_ptr()] * experts]
            for tensor in (gate_up, gate_up[inner:], down, up_scale, up_scale[inner:], down_scale)
        ]
        config = self._config()
        config.gate_projs, config.up_projs, config.down_projs = addresses[:3]
        config.gate_scales, config.up_scales, config.down_scales = addresses[3:]
        config.quant_config.bits, config.quant_config.per_channel = 8, True
        config.quant_config.zero_point = False
        return self._load(self.extension.moe.AMXFP8PerChannel_MOE(config))

    def multiply(self, moe: Any) -> Tensor:
        """Return (1, hidden) bf16."""
        tensors = (self.ids, self.gates, self.x, self.out)
        places = [tensor.data_ptr() for tensor in tensors]
        task = moe.forward_task(self.count.data_ptr(), self.ids.shape[1], *places, False)
        self.infer.submit(task)
        self.infer.sync()
        return self.out

    def check(self, weights: str, moe: Any) -> None:
        """Compare with ours.

        Raises:
            ValueError: it computes something else.
        """
        pairs = [quantize(weight[None], weights) for weight in (self.gate_up, self.down)]
        tensors = [tensor for pair in pairs for tensor in pair]
        one = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
        ours = fused_moe(self.x, *tensors, *one).float()
        error = float((self.multiply(moe).float() - ours).norm() / ours.norm())
        if not error < MOST_ERROR:
            raise ValueError(f"kt-kernel {weights}: off by {error} of ours")
