"""Shapes of layers and of the tiles that their products run with."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerShape:
    """What a layer's speed depends on, its number of tokens apart."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gated: bool = True


@dataclass(frozen=True)
class TileConfig:
    """Tile of one program: block_m rows of one expert, block_n channels, block_k per step.

    ``block_m == 1`` stands for the kernel without tensor cores, one row per program. With a gate,
    ``block_n`` counts gate and up channels together: a tile of 128 writes 64 columns. ``tail_m``:
    an expert's last tile is only so high if no more rows are left for it; 0 for none. In
    `qmoe_kernels.hopper_gemm` it is the lowest of several heights, each twice the one before.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tail_m: int = 0


@dataclass(frozen=True)
class LayerTiles:
    """Tiles of a layer's two products.

    Attributes:
        gate_up, down: of one product.
        sort: pairs are sorted by a launch of its own first, which also cuts them into tiles, of
            the same block_m for both products. Otherwise each program looks for the rows of its
            expert in ``topk_ids`` itself, which pays while these are few.
        tma: products are those of `qmoe_kernels.hopper_gemm`, for sorted pairs. Of ``gate_up``,
            which is also ``down``, block_m, num_stages and tail_m count; the rest is the kernel's.
    """

    gate_up: TileConfig
    down: TileConfig
    sort: bool
    tma: bool = False

    def __post_init__(self) -> None:
        """Raise a ValueError if products of sorted pairs have different block_m."""
        if self.sort and self.gate_up.block_m != self.down.block_m:
            raise ValueError(
                f"block_m is {self.gate_up.block_m} in gate_up and {self.down.block_m} in down; "
                "with sorted pairs both are the same"
            )

    def sorted(self) -> LayerTiles:
        """Return these for sorted pairs: block_m and tail_m of gate_up in both products."""
        gate_up = self.gate_up
        down = replace(self.down, block_m=gate_up.block_m, tail_m=gate_up.tail_m)
        return replace(self, down=down, sort=True)
