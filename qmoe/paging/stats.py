"""What a cache did so far, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerStats:
    """One layer's counts since the cache was made; all but the last in pages.

    Attributes:
        hits: experts that were in a slot when they were routed to, once per admission.
        misses: experts that were not.
        streamed_bytes: copied for long prompts, past the slots.
    """

    hits: int
    misses: int
    streamed_bytes: int


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
    def hit_rate(self) -> float | None:
        """hits / (hits + misses); None before the first admission."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else None

    @property
    def bytes(self) -> int:
        """Copied to the device: missed and streamed."""
        return sum(
            layer.misses * page_bytes + layer.streamed_bytes
            for layer, page_bytes in zip(self.layers, self.page_bytes, strict=True)
        )
