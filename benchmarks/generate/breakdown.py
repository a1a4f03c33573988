"""Section breakdown: what a decode step's time goes to, by kind of kernel.

qmoe's own kernels are known by name: the module that defines one says what it is for. Products, by
our kernels or cuBLAS', all have the same few names and are told apart by their place: the step's
last one is the head, the one before the experts are chosen is the router, the others are the
attention's linear layers. What comes after the head is sampling.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import qmoe_kernels
from benchmarks.generate.bench import SHORT, Benchmark
from benchmarks.model import synchronize

KINDS = (
    "experts",
    "routing",
    "attention",
    "norms",
    "linear layers",
    "head",
    "sampling",
    "other",
    "gaps",
)
MODULE_KINDS = {
    "attention": "attention",
    "linear": "product",
    "norm": "norms",
    "rope": "attention",
    "router": "routing",
    "routing": "routing",
}
KERNEL_KINDS = {"sort_rows_kernel": "routing"}
REDUCTION = re.compile(r"split_?k.*reduce", re.IGNORECASE)  # the second half of a product
PRODUCT = re.compile(r"nvjet|gemm|gemv|cublas|cutlass|xmma|^aten::linear$", re.IGNORECASE)
TORCH_KINDS = (
    ("experts", re.compile(r"^qmoe::fused_moe")),  # on a CPU
    ("attention", re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE)),
    ("routing", re.compile(r"topk|sort|^qmoe::select_experts", re.IGNORECASE)),
)
END_OF_STEP = re.compile(r"Memcpy DtoH|^aten::argmax$")
NUM_LARGEST = 16


@dataclass(frozen=True)
class Kernel:
    """One launch: times are in microseconds."""

    name: str
    start: float
    end: float


def run_breakdown(bench: Benchmark) -> None:
    """Milliseconds of each kind of kernel in a decode step, and of no kernel at all."""
    for batch in bench.sizes.batches:
        run = bench.ours(batch, bench.sizes.prompt)
        ms = 1e3 * bench.time_steps(run, bench.sizes.new, repeats=1).step
        count = bench.sizes.profiled
        steps = split(profile(partial(run, SHORT + count), bench.device))
        steps = sorted(steps[-count:], key=lambda kernels: sum(busy(kernels)))
        kernels = steps[len(steps) // 2]
        bench.results.add(
            "cells",
            {
                "batch": batch,
                "ms": round(ms, 4),
                "kernels": len(kernels),
                "profiled_busy_ms": round(sum(busy(kernels)) / 1e3, 4),
                "kinds_ms": breakdown(kernels, ms),
                "largest": largest(kernels),
            },
        )


def profile(function: Callable[[], object], device: torch.device) -> list[Kernel]:
    """What a call launches, in order; on a CPU torch's operators."""
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    synchronize(device)
    with torch.profiler.profile(activities=[activity]) as profiler:
        function()
        synchronize(device)
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if (event.device_type == DeviceType.CUDA if cuda else event.cpu_parent is None)
    ]
    return sorted(kernels, key=lambda kernel: kernel.start)


def split(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """The kernels of each step: one ends where its tokens go to the host.

    Raises:
        ValueError: none does.
    """
    steps: list[list[Kernel]] = [[]]
    for kernel in kernels:
        steps[-1].append(kernel)
        if END_OF_STEP.search(kernel.name):
            steps.append([])
    if len(steps) < 3:
        raise ValueError(f"{len(kernels)} kernels, but none ends a step")
    return steps[1:-1]  # the first has read the prompt


def busy(kernels: Sequence[Kernel]) -> list[float]:
    """Microseconds of each kernel during which no earlier one was running: they may overlap."""
    found, covered = [], float("-inf")
    for kernel in kernels:
        found.append(max(0.0, kernel.end - max(kernel.start, covered)))
        covered = max(covered, kernel.end)
    return found


def breakdown(kernels: Sequence[Kernel], ms: float) -> dict[str, float]:
    """Milliseconds of each of `KINDS`; together they are a step's ``ms``.

    Where kernels took longer under the profiler than the whole step takes without, all of them are
    scaled down to it.
    """
    each = busy(kernels)
    factor = min(1e-3, ms / max(sum(each), 1e-9))
    found = dict.fromkeys(KINDS, 0.0)
    for kind, us in zip(kinds_of([k.name for k in kernels]), each, strict=True):
        found[kind] += us * factor
    found["gaps"] = max(0.0, ms - sum(found.values()))
    return {kind: round(value, 4) for kind, value in found.items()}


def largest(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """The kernels that take longest, all launches of one name and kind together."""
    found: dict[tuple[str, str], list[float]] = {}
    kinds = kinds_of([k.name for k in kernels])
    for kernel, kind, us in zip(kernels, kinds, busy(kernels), strict=True):
        found.setdefault((kernel.name, kind), []).append(us)
    order = sorted(found.items(), key=lambda item: -sum(item[1]))
    return [
        {"name": name[:120], "kind": kind, "launches": len(us), "us": round(sum(us), 2)}
        for (name, kind), us in order[:NUM_LARGEST]
    ]


def kinds_of(names: Sequence[str]) -> list[str]:
    """The kind of every kernel of one step, from their names in the order of launches."""
    own = own_kernels()
    kinds = [own.get(name) or _kind_of_torch(name) for name in names]
    products = [i for i, kind in enumerate(kinds) if kind == "product"]
    for this, following in pairwise([*products, len(names)]):
        routes = "routing" in kinds[this + 1 : following]
        kinds[this] = "routing" if routes else "linear layers"
    if products:
        head = products[-1]
        kinds[head] = "head"
        for i in range(head + 1, len(kinds)):
            kinds[i] = "reduction" if kinds[i] == "reduction" and i == head + 1 else "sampling"
    for i, kind in enumerate(kinds):
        if kind == "reduction":
            kinds[i] = kinds[i - 1] if i else "other"
    return kinds


def own_kernels() -> dict[str, str]:
    """Kinds of qmoe's kernels, by name."""
    found = {}
    for info in pkgutil.iter_modules(qmoe_kernels.__path__):
        with suppress(ImportError):  # there is no Triton, or no Gluon in it
            module = import_module(f"qmoe_kernels.{info.name}")
            for value in vars(module).values():
                function = getattr(value, "fn", None)  # of a triton.jit
                if getattr(function, "__module__", None) == module.__name__:
                    kind = MODULE_KINDS.get(info.name, "experts")
                    found[function.__name__] = KERNEL_KINDS.get(function.__name__, kind)
    return found


def _kind_of_torch(name: str) -> str:
    for kind, pattern in TORCH_KINDS:
        if pattern.search(name):
            return kind
    if REDUCTION.search(name):
        return "reduction"
    return "product" if PRODUCT.search(name) else "other"
