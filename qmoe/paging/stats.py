"""What a cache did so far, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerStats:
    """One layer's counts since the cache was made; in pages, if nothing else is said.

    Attributes:
        hits: experts that were in a slot when they were routed to, once per admission.
        misses: experts that were not, whoever then served them.
        streamed_bytes: copied for long prompts, past the slots.
        host_misses: those of the misses that the host computed where they lay.
        waited_ns: nanoseconds that the device waited for the host.
        disk_misses: those of the misses whose pages were read from files first, and pages that a
            read which failed was to bring.
        disk_bytes: asked of files, for misses and for long prompts.
        disk_waited_ns: nanoseconds that the device waited for the disk, long prompts aside.
    """

    hits: int
    misses: int
    streamed_bytes: int
    host_misses: int = 0
    waited_ns: int = 0
    disk_misses: int = 0
    disk_bytes: int = 0
    disk_waited_ns: int = 0


@dataclass(frozen=True)
class CacheStats:
    """A cache's counters at one moment.

    Attributes:
        layers: in the order in which the model runs them.
        page_bytes: of each layer's pages.
        num_slots: pages that fit on the device.
        num_pages: pages of the model.
    """

    layers: tuple[LayerStats, ...]
    page_bytes: tuple[int, ...]
    num_slots: int
    num_pages: int

    @property
    def hits(self) -> int:
        """Of all layers."""
        return sum(layer.hits for layer in self.layers)

    @property
    def misses(self) -> int:
        """Of all layers."""
        return sum(layer.misses for layer in self.layers)

    @property
    def host_misses(self) -> int:
        """Misses that the host computed, of all layers."""
        return sum(layer.host_misses for layer in self.layers)

    @property
    def waited_seconds(self) -> float:
        """How long the device waited for the host, in all layers."""
        return sum(layer.waited_ns for layer in self.layers) / 1e9

    @property
    def disk_misses(self) -> int:
        """Misses whose pages were read from files first, of all layers."""
        return sum(layer.disk_misses for layer in self.layers)

    @property
    def disk_bytes(self) -> int:
        """Read from files, for misses and for long prompts, of all layers."""
        return sum(layer.disk_bytes for layer in self.layers)

    @property
    def disk_waited_seconds(self) -> float:
        """How long the device waited for the disk, in all layers, long prompts aside."""
        return sum(layer.disk_waited_ns for layer in self.layers) / 1e9

    @property
    def hit_rate(self) -> float | None:
        """hits / (hits + misses); None before the first admission."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else None

    @property
    def bytes(self) -> int:
        """Copied to the device: missed, but for what only the host computed, and streamed."""
        return sum(
            (layer.misses - layer.host_misses) * page_bytes + layer.streamed_bytes
            for layer, page_bytes in zip(self.layers, self.page_bytes, strict=True)
        )
