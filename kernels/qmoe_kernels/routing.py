"""Which expert works on which tokens: (token, expert) pairs by expert, and their tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a CPU needs no Triton
    triton = None

# Up to so many pairs, reading all of them for every two experts is faster than a second launch.
# At most 16 * PAIRS_AT_ONCE: a thread remembers in 16 bits which of its pairs are an expert's.
FEW_PAIRS = 4096
PAIRS_AT_ONCE, FEW_WARPS = 1024, 8

# More are counted and sorted by blocks, a pair per thread. Every block adds up the counts of all
# chunks, so chunks are as many blocks long as keeps these few: MAX_COUNTS are 64 per thread.
BLOCK_PAIRS, BLOCK_WARPS = 256, 8
MAX_CHUNKS, MAX_COUNTS = 128, 16384


@dataclass(frozen=True)
class ExpertRouting:
    """The pairs of ``topk_ids`` grouped by expert.

    Pair ``p`` is token ``p // top_k`` at its ``p % top_k``-th expert. With two experts, top_k = 2
    and ``topk_ids = [[1, 0], [1, 2], [0, 1]]`` (2 is not one of the experts: that pair is
    skipped)::

        sorted_pair_ids  = [1, 4, 0, 2, 5, 3]  # expert 0: 1, 4; expert 1: 0, 2, 5; skipped: 3
        sorted_token_ids = [0, 2, 0, 1, 2, 1]
        expert_offsets   = [0, 2, 5]

    Pairs of one expert keep their order, so the result depends on nothing but ``topk_ids``.

    For products, every expert's sorted rows are cut into tiles of ``block_m``. With 2::

        positions = [2, 0, 3, 5, 1, 4]  # where sorted_pair_ids has pairs 0, 1, ...
        tiles     = [[0, 0, 0, 2],      # expert 0: two rows from sorted position 0 on
                     [1, 1, 2, 3],      # expert 1: three rows from 2 on, of which a tile takes two
                     [1, 1, 4, 1],
                     [.., .., .., 0],   # no more rows
                     [3, .., .., ..]]   # so many tiles

    Attributes:
        sorted_pair_ids: (num_tokens * top_k,) int32.
        expert_offsets: (num_experts + 1,) int32, exclusive, with a leading 0.
        top_k: experts per token.
        positions: (num_tokens * top_k,) int32; None without ``block_m``.
        tiles: (`max_tiles` + 1, 4) int32: expert, its slot, the tile's first sorted position, and
            how many rows the expert has from there on, 0 where there is no tile; first in the
            last row, the number of tiles. The rest is anything. None without ``block_m``.
        block_m: rows of a tile, a power of two.
    """

    sorted_pair_ids: torch.Tensor
    expert_offsets: torch.Tensor
    top_k: int
    positions: torch.Tensor | None = None
    tiles: torch.Tensor | None = None
    block_m: int | None = None

    @property
    def sorted_token_ids(self) -> torch.Tensor:
        """(num_tokens * top_k,) int32: the token of each sorted pair."""
        return self.sorted_pair_ids // self.top_k

    @classmethod
    def from_topk_ids(
        cls,
        topk_ids: torch.Tensor,
        num_experts: int,
        *,
        block_m: int | None = None,
        expert_to_slot: torch.Tensor | None = None,
    ) -> ExpertRouting:
        """Sort the pairs of ``topk_ids`` by expert.

        On a GPU these are one launch, or two above `FEW_PAIRS`, without a synchronization, and no
        shape depends on a device value: a CUDA graph can hold them. From compute capability 9.0
        on a kernel launched with ``launch_pdl=True`` may start while the last one still runs.

        Args:
            topk_ids: (num_tokens, top_k) int32 or int64. Ids outside [0, num_experts) are skipped;
                expert parallelism marks experts of other ranks so.
            num_experts: of this layer.
            block_m: also cut the sorted rows into tiles of so many.
            expert_to_slot: (num_experts,) int32, contiguous, for the tiles; None: an expert's slot
                is its number.
        """
        if topk_ids.is_cuda and triton is not None:
            with torch.cuda.device(topk_ids.device):
                return launch_routing(
                    topk_ids, num_experts, block_m=block_m, expert_to_slot=expert_to_slot
                )
        return _sort(topk_ids, num_experts, block_m, expert_to_slot)


def max_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Return how many tiles there can be: every expert but one may leave its last nearly empty."""
    return min(num_pairs, num_experts + max(0, num_pairs - num_experts) // block_m)


def _sort(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_m: int | None,
    expert_to_slot: torch.Tensor | None,
) -> ExpertRouting:
    ids = topk_ids.flatten()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(torch.int32)
    sorted_ids, order = torch.sort(ids, stable=True)
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=ids.device)
    offsets = torch.searchsorted(sorted_ids, experts, out_int32=True)
    sorted_pair_ids = order.to(torch.int32)
    if block_m is None:
        return ExpertRouting(sorted_pair_ids, offsets, topk_ids.shape[1])

    positions = torch.empty_like(sorted_pair_ids)
    positions[order] = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
    most = max_tiles(len(ids), num_experts, block_m)
    tiles = offsets.new_zeros(most + 1, 4)
    counts = (offsets.diff() + block_m - 1) // block_m
    ends = counts.cumsum(0)
    tile = torch.arange(most, device=ids.device)
    expert = torch.searchsorted(ends, tile, right=True).clamp(max=num_experts - 1)
    first = offsets[expert] + (tile - (ends - counts)[expert]) * block_m
    slot = expert if expert_to_slot is None else expert_to_slot[expert]
    num_rows = (offsets[expert + 1] - first).clamp(min=0)
    tiles[:most] = torch.stack((expert, slot, first, num_rows), 1)
    tiles[most, 0] = counts.sum()
    return ExpertRouting(sorted_pair_ids, offsets, topk_ids.shape[1], positions, tiles, block_m)


def launch_routing(
    topk_ids: torch.Tensor,
    num_experts: int,
    *,
    block_m: int | None = None,
    expert_to_slot: torch.Tensor | None = None,
) -> ExpertRouting:
    """Run `routing_kernel`, or `count_pairs_kernel` and `sort_pairs_kernel` above `FEW_PAIRS`.

    See `ExpertRouting.from_topk_ids`.
    """
    from qmoe_kernels.launching import has_dependent_launch, launch_options  # a CPU needs no Triton

    num_pairs = topk_ids.numel()
    ids = topk_ids.contiguous()
    sorted_pair_ids = ids.new_empty(num_pairs, dtype=torch.int32)
    expert_offsets = ids.new_empty(num_experts + 1, dtype=torch.int32)
    positions = tiles = None
    most = 0
    if block_m is not None:
        most = max_tiles(num_pairs, num_experts, block_m)
        positions = torch.empty_like(sorted_pair_ids)
        tiles = ids.new_empty((most + 1, 4), dtype=torch.int32)
    routing = ExpertRouting(
        sorted_pair_ids, expert_offsets, topk_ids.shape[1], positions, tiles, block_m
    )
    outputs = (sorted_pair_ids, expert_offsets, positions, tiles)
    block_experts = max(32, triton.next_power_of_2(num_experts))
    constants = {
        "BLOCK_M": block_m,
        "BLOCK_EXPERTS": block_experts,
        "PDL": has_dependent_launch(ids.device),
    }
    if num_pairs <= FEW_PAIRS:
        routing_kernel[(triton.cdiv(num_experts + 1, 2),)](
            ids,
            expert_to_slot,
            *outputs,
            num_pairs,
            num_experts,
            most,
            BLOCK=PAIRS_AT_ONCE,
            **constants,
            num_warps=FEW_WARPS,
        )
        return routing

    max_chunks = max(1, min(MAX_CHUNKS, MAX_COUNTS // block_experts))
    num_blocks = triton.cdiv(num_pairs, BLOCK_PAIRS)
    chunk_blocks = triton.cdiv(num_blocks, max_chunks)
    num_chunks = triton.cdiv(num_blocks, chunk_blocks)
    counts = ids.new_empty(
        (num_chunks, chunk_blocks + 1, block_experts),
        dtype=torch.int16 if chunk_blocks * BLOCK_PAIRS < 2**15 else torch.int32,
    )
    count_pairs_kernel[(num_chunks,)](
        ids,
        counts,
        num_pairs,
        num_experts,
        chunk_blocks,
        BLOCK=BLOCK_PAIRS,
        BLOCK_EXPERTS=block_experts,
        PDL=constants["PDL"],
        num_warps=BLOCK_WARPS,
    )
    sort_pairs_kernel[(num_blocks,)](
        ids,
        counts,
        expert_to_slot,
        *outputs,
        num_pairs,
        num_experts,
        most,
        num_chunks,
        chunk_blocks,
        BLOCK=BLOCK_PAIRS,
        MAX_CHUNKS=max_chunks,
        **constants,
        num_warps=BLOCK_WARPS,
        **launch_options(True, ids.device),
    )
    return routing


if triton is not None:
    from qmoe_kernels.launching import narrow

    # Not specialized: a new number of tokens, or some of a tensor's, must not compile anything.
    @triton.jit(
        do_not_specialize=["num_pairs", "num_experts", "max_tiles"],
        # Positions are aligned. Were that known, they would change their layout to be stored.
        do_not_specialize_on_alignment=["topk_ids_ptr", "expert_to_slot_ptr", "positions_ptr"],
    )
    def routing_kernel(
        topk_ids_ptr,  # (num_pairs,) int32 | int64
        expert_to_slot_ptr,  # (num_experts,) int32, or None
        sorted_pair_ids_ptr,  # (num_pairs,) int32
        expert_offsets_ptr,  # (num_experts + 1,) int32
        positions_ptr,  # (num_pairs,) int32, or None
        tiles_ptr,  # (max_tiles + 1, 4) int32, or None; see ExpertRouting
        num_pairs,  # at most 16 * BLOCK, below 2**15
        num_experts,
        max_tiles,
        BLOCK_M: tl.constexpr,  # rows of a tile, or None
        BLOCK: tl.constexpr,  # at most 32768: counts within a block are 16 bits wide
        BLOCK_EXPERTS: tl.constexpr,  # power of two, at least num_experts
        PDL: tl.constexpr,
    ):
        """Grid: (cdiv(num_experts + 1, 2),), two experts per program; the last takes skipped ids.

        Each program reads every id once: it counts those of lower experts, which is where its own
        pairs and tiles begin, and keeps a bit for each of its own. Then it writes these in order.
        What concerns the first of two is in the low 16 bits, the second in the high ones.
        """
        if PDL:
            gdc_launch_dependents()
        first = 2 * tl.program_id(0)
        lanes = tl.arange(0, BLOCK)
        experts = tl.arange(0, BLOCK_EXPERTS)
        num_blocks = tl.cdiv(num_pairs, BLOCK)
        first_slot = first
        second_slot = first + 1
        if tiles_ptr is not None and expert_to_slot_ptr is not None:
            first_slot = tl.load(expert_to_slot_ptr + first, mask=first < num_experts, other=0)
            second_slot = tl.load(
                expert_to_slot_ptr + first + 1, mask=first + 1 < num_experts, other=0
            )

        counts = tl.zeros((BLOCK_EXPERTS,), dtype=tl.int32)
        own = tl.zeros((BLOCK,), dtype=tl.int32)  # bit i, 16 + i: pair i * BLOCK + lane
        for block in range(num_blocks):
            pairs = block * BLOCK + lanes
            inside = pairs < num_pairs
            ids = narrow(tl.load(topk_ids_ptr + pairs, mask=inside, other=-1))
            exists = (ids >= 0) & (ids < num_experts)
            counts += tl.histogram(ids, BLOCK_EXPERTS, mask=exists & (ids <= first + 1))
            ids = tl.where(exists, ids, num_experts)
            ids = tl.where(inside, ids, num_experts + 2)
            own |= tl.where(ids == first, 1, tl.where(ids == first + 1, 1 << 16, 0)) << block

        numbers = tl.where(
            experts == first, counts, tl.where(experts == first + 1, counts << 16, 0)
        )
        numbers = tl.sum(numbers, 0)
        before = tl.where(experts < first, counts, 0)
        if tiles_ptr is not None:
            before += tl.cdiv(before, BLOCK_M) << 16
        before = tl.sum(before, 0)
        first_start = before & 0xFFFF
        second_start = first_start + (numbers & 0xFFFF)
        tl.store(expert_offsets_ptr + first, first_start)
        tl.store(expert_offsets_ptr + first + 1, second_start, mask=first < num_experts)
        if tiles_ptr is not None:
            # Skipped ids are not counted, and so have no tiles.
            first_tile = before >> 16
            second_tile = first_tile + tl.cdiv(numbers & 0xFFFF, BLOCK_M)
            end_tile = second_tile + tl.cdiv(numbers >> 16, BLOCK_M)
            if first + 2 > num_experts:
                tl.store(tiles_ptr + 4 * max_tiles, end_tile)
                for start in range(end_tile, max_tiles, BLOCK):
                    tl.store(tiles_ptr + 4 * (start + lanes) + 3, 0, mask=start + lanes < max_tiles)
            for start in range(first_tile, end_tile, 32):
                tile = start + tl.arange(0, 32)
                is_first = tile < second_tile
                expert = tl.where(is_first, first, first + 1)
                slot = tl.where(is_first, first_slot, second_slot)
                done = (tile - tl.where(is_first, first_tile, second_tile)) * BLOCK_M
                position = tl.where(is_first, first_start, second_start) + done
                num_rows = tl.where(is_first, numbers & 0xFFFF, numbers >> 16) - done
                mask = tile < end_tile
                tl.store(tiles_ptr + 4 * tile, expert, mask=mask)
                tl.store(tiles_ptr + 4 * tile + 1, slot, mask=mask)
                tl.store(tiles_ptr + 4 * tile + 2, position, mask=mask)
                tl.store(tiles_ptr + 4 * tile + 3, num_rows, mask=mask)

        for block in range(num_blocks):
            pairs = block * BLOCK + lanes
            mine = (own >> block) & 0x10001
            ranks = tl.cumsum(mine, 0) - mine
            positions = tl.where(
                mine == 1, first_start + (ranks & 0xFFFF), second_start + (ranks >> 16)
            )
            tl.store(sorted_pair_ids_ptr + positions, pairs, mask=mine != 0)
            if positions_ptr is not None:
                tl.store(positions_ptr + pairs, positions, mask=mine != 0)
            written = tl.sum(mine, 0)
            first_start += written & 0xFFFF
            second_start += written >> 16

    @triton.jit(
        do_not_specialize=["num_pairs", "num_experts", "chunk_blocks"],
        do_not_specialize_on_alignment=["topk_ids_ptr"],
    )
    def count_pairs_kernel(
        topk_ids_ptr,  # (num_pairs,) int32 | int64
        counts_ptr,  # (num_chunks, chunk_blocks + 1, BLOCK_EXPERTS) int16 | int32
        num_pairs,
        num_experts,
        chunk_blocks,
        BLOCK: tl.constexpr,
        BLOCK_EXPERTS: tl.constexpr,  # power of two, at least num_experts
        PDL: tl.constexpr,
    ):
        """Grid: (num_chunks,). Row i counts the experts' pairs in the chunk's first i blocks."""
        if PDL:
            gdc_launch_dependents()
        chunk = tl.program_id(0)
        experts = tl.arange(0, BLOCK_EXPERTS)
        counts_ptrs = counts_ptr + chunk * (chunk_blocks + 1) * BLOCK_EXPERTS + experts
        counts = tl.zeros((BLOCK_EXPERTS,), dtype=tl.int32)
        for i in range(chunk_blocks):
            pairs = (chunk * chunk_blocks + i) * BLOCK + tl.arange(0, BLOCK)
            ids = narrow(tl.load(topk_ids_ptr + pairs, mask=pairs < num_pairs, other=-1))
            tl.store(counts_ptrs, counts.to(counts_ptr.dtype.element_ty))
            counts_ptrs += BLOCK_EXPERTS
            exists = (ids >= 0) & (ids < num_experts)
            counts += tl.histogram(ids, BLOCK_EXPERTS, mask=exists)
        tl.store(counts_ptrs, counts.to(counts_ptr.dtype.element_ty))

    @triton.jit(
        do_not_specialize=["num_pairs", "num_experts", "max_tiles", "num_chunks", "chunk_blocks"],
        do_not_specialize_on_alignment=["topk_ids_ptr", "expert_to_slot_ptr"],
    )
    def sort_pairs_kernel(
        topk_ids_ptr,  # (num_pairs,) int32 | int64
        counts_ptr,  # (num_chunks, chunk_blocks + 1, BLOCK_EXPERTS), count_pairs_kernel's
        expert_to_slot_ptr,  # (num_experts,) int32, or None
        sorted_pair_ids_ptr,  # (num_pairs,) int32
        expert_offsets_ptr,  # (num_experts + 1,) int32
        positions_ptr,  # (num_pairs,) int32, or None
        tiles_ptr,  # (max_tiles + 1, 4) int32, or None; see ExpertRouting
        num_pairs,
        num_experts,
        max_tiles,
        num_chunks,
        chunk_blocks,
        BLOCK_M: tl.constexpr,  # rows of a tile, or None
        BLOCK: tl.constexpr,
        BLOCK_EXPERTS: tl.constexpr,
        MAX_CHUNKS: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """Grid: (cdiv(num_pairs, BLOCK),), a block of pairs per program.

        A pair comes after all pairs of lower experts, its expert's in earlier chunks, its
        expert's in earlier blocks of this chunk, and its expert's before it in this block. A tile
        is written by the program that has its first pair.
        """
        block = tl.program_id(0)
        lanes = tl.arange(0, BLOCK)
        pairs = block * BLOCK + lanes
        inside = pairs < num_pairs
        # count_pairs_kernel did not write ids: they are ranked while it runs.
        ids = tl.load(topk_ids_ptr + pairs, mask=inside, other=-1)
        # Compared as they are, so that `narrow` is not needed: it would spill on some GPUs.
        skipped = (ids < 0) | (ids >= num_experts)
        ids = tl.where(skipped, num_experts, ids).to(tl.int32)
        # Keys of an expert's pairs are BLOCK numbers in a row: those of its earlier pairs are the
        # `lane` ones below a pair's own. One comparison, as a negative difference is a large one.
        keys = ids * BLOCK + lanes
        below = ((keys - 1)[None, :] - keys[:, None]).to(tl.uint32)
        ranks = tl.sum((below < lanes.to(tl.uint32)[None, :]).to(tl.int32), 0)

        experts = tl.arange(0, BLOCK_EXPERTS)
        chunks = tl.arange(0, MAX_CHUNKS)
        chunk = block // chunk_blocks
        rows = chunks * (chunk_blocks + 1) + chunk_blocks
        counts_ptrs = counts_ptr + rows[:, None] * BLOCK_EXPERTS + experts[None, :]
        row = chunk * (chunk_blocks + 1) + block % chunk_blocks
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        counts = tl.load(counts_ptrs, mask=(chunks < num_chunks)[:, None], other=0).to(tl.int32)
        before = tl.load(counts_ptr + row * BLOCK_EXPERTS + experts).to(tl.int32)
        before += tl.sum(tl.where((chunks < chunk)[:, None], counts, 0), 0)
        totals = tl.sum(counts, 0)
        ends = tl.cumsum(totals, 0)

        experts_of_pairs = tl.where(skipped, 0, ids)
        positions = tl.gather(ends - totals + before, experts_of_pairs, 0) + ranks
        # Skipped pairs come after all experts'; what no expert has of earlier blocks was skipped.
        first_skipped = block * BLOCK + tl.sum(totals - before, 0)
        positions = tl.where(skipped, first_skipped + ranks, positions)
        tl.store(sorted_pair_ids_ptr + positions, pairs, mask=inside)
        if block == 0:
            tl.store(expert_offsets_ptr, 0)
            tl.store(expert_offsets_ptr + 1 + experts, ends, mask=experts < num_experts)
        if positions_ptr is not None:
            tl.store(positions_ptr + pairs, positions, mask=inside)
        if tiles_ptr is not None:
            num_tiles = tl.cdiv(totals, BLOCK_M)
            end_tiles = tl.cumsum(num_tiles, 0)
            end_tile = tl.sum(num_tiles, 0)
            if block == 0:
                tl.store(tiles_ptr + 4 * max_tiles, end_tile)
            for start in range(end_tile + block * BLOCK, max_tiles, tl.num_programs(0) * BLOCK):
                tl.store(tiles_ptr + 4 * (start + lanes) + 3, 0, mask=start + lanes < max_tiles)
            num_rows = tl.gather(ends, experts_of_pairs, 0) - positions
            rank = tl.gather(totals, experts_of_pairs, 0) - num_rows
            tile = tl.gather(end_tiles - num_tiles, experts_of_pairs, 0) + rank // BLOCK_M
            mask = inside & (skipped == 0) & (rank % BLOCK_M == 0)
            slot = ids
            if expert_to_slot_ptr is not None:
                slot = tl.load(expert_to_slot_ptr + ids, mask=mask, other=0)
            tl.store(tiles_ptr + 4 * tile, ids, mask=mask)
            tl.store(tiles_ptr + 4 * tile + 1, slot, mask=mask)
            tl.store(tiles_ptr + 4 * tile + 2, positions, mask=mask)
            tl.store(tiles_ptr + 4 * tile + 3, num_rows, mask=mask)
