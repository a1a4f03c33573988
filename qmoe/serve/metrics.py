"""What ``/metrics`` says, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from qmoe.generation import peak_resident_bytes
from qmoe.serve.engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts requests, and reads the rest off the engine when it is asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "qmoe_requests", "Answers, by path and status.", ["path", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "qmoe_time_to_first_token_seconds", "From a request to its first new token.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "qmoe_request_seconds", "From a request to the end of its answer.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.registry.register(_OfEngine(engine))


class _OfEngine:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        """Yield what the engine and the model say now."""
        engine, counts = self.engine, self.engine.counts
        for name, text, value in (
            ("qmoe_prompt_tokens", "Tokens of prompts that were read.", counts.prompt_tokens),
            ("qmoe_new_tokens", "Tokens that were generated.", counts.new_tokens),
            ("qmoe_batches", "Batches that were run.", counts.batches),
            ("qmoe_cancelled", "Texts whose client went away.", counts.cancelled),
        ):
            yield CounterMetricFamily(name, text, value=value)
        rate = counts.decode_tokens_per_second
        for name, text, number in (
            ("qmoe_waiting", "Texts that wait.", engine.num_waiting),
            ("qmoe_running", "Texts that are being generated.", len(engine.running)),
            ("qmoe_decode_tokens_per_second", "New tokens per second, last batch.", rate),
            (
                "qmoe_memory_bytes",
                "On the GPU; without one, the process's most.",
                _memory(engine),
            ),
        ):
            yield GaugeMetricFamily(name, text, value=number)
        yield from _experts(engine.model)


def _memory(engine: Engine) -> int:
    device = engine.model.device
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return peak_resident_bytes() or 0


def _experts(model: Any) -> Iterator[Any]:
    """Where a paged model's experts came from."""
    from qmoe.paging.model import stats

    if getattr(model, "qmoe_paging", None) is None or model.qmoe_paging.budget.all_resident:
        return
    found = stats(model)
    experts = CounterMetricFamily(
        "qmoe_experts",
        "Experts asked for, by who had them: the GPU, or else a copy from the host, "
        "or the host's processor, or a copy that was read from a file first.",
        labels=["source"],
    )
    experts.add_metric(["gpu"], found.hits)
    # Pages of reads that failed are no misses.
    from_host = max(0, found.misses - found.host_misses - found.disk_misses)
    experts.add_metric(["host"], from_host)
    experts.add_metric(["processor"], found.host_misses)
    experts.add_metric(["disk"], found.disk_misses)
    yield experts
    yield CounterMetricFamily("qmoe_paged_bytes", "Copied from host memory.", value=found.bytes)
