"""Which expert works on which tokens: (token, expert) pairs sorted by expert."""

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
PAIRS_AT_ONCE, FEW_WARPS = 1024, 4

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

    Attributes:
        sorted_pair_ids: (num_tokens * top_k,) int32.
        expert_offsets: (num_experts + 1,) int32, exclusive, with a leading 0.
        top_k: experts per token.
    """

    sorted_pair_ids: torch.Tensor
    expert_offsets: torch.Tensor
    top_k: int

    @property
    def sorted_token_ids(self) -> torch.Tensor:
        """(num_tokens * top_k,) int32: the token of each sorted pair."""
        return self.sorted_pair_ids // self.top_k

    @classmethod
    def from_topk_ids(cls, topk_ids: torch.Tensor, num_experts: int) -> ExpertRouting:
        """Sort the pairs of ``topk_ids`` by expert.

        On a GPU these are one launch, or two above `FEW_PAIRS`, without a synchronization, and no
        shape depends on a device value: a CUDA graph can hold them. From compute capability 9.0
        on a kernel launched with ``launch_pdl=True`` may start while the last one still runs.

        Args:
            topk_ids: (num_tokens, top_k) int32 or int64. Ids outside [0, num_experts) are skipped;
                expert parallelism marks experts of other ranks so.
            num_experts: of this layer.
        """
        if topk_ids.is_cuda and triton is not None:
            with torch.cuda.device(topk_ids.device):
                return launch_routing(topk_ids, num_experts)
        return _sort(topk_ids, num_experts)


def _sort(topk_ids: torch.Tensor, num_experts: int) -> ExpertRouting:
    ids = topk_ids.flatten().to(torch.int32)
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    sorted_ids, order = torch.sort(ids, stable=True)
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=ids.device)
    offsets = torch.searchsorted(sorted_ids, experts, out_int32=True)
    return ExpertRouting(order.to(torch.int32), offsets, topk_ids.shape[1])


def launch_routing(topk_ids: torch.Tensor, num_experts: int) -> ExpertRouting:
    """Run `routing_kernel`, or `count_pairs_kernel` and `sort_pairs_kernel` above `FEW_PAIRS`.

    See `ExpertRouting.from_topk_ids`.
    """
    from qmoe_kernels.launching import has_dependent_launch, launch_options  # a CPU needs no Triton

    num_pairs = topk_ids.numel()
    ids = topk_ids.contiguous()
    sorted_pair_ids = ids.new_empty(num_pairs, dtype=torch.int32)
    expert_offsets = ids.new_empty(num_experts + 1, dtype=torch.int32)
    pdl = has_dependent_launch(ids.device)
    if num_pairs <= FEW_PAIRS:
        routing_kernel[(triton.cdiv(num_experts + 1, 2),)](
            ids,
            sorted_pair_ids,
            expert_offsets,
            num_pairs,
            num_experts,
            BLOCK=PAIRS_AT_ONCE,
            PDL=pdl,
            num_warps=FEW_WARPS,
        )
        return ExpertRouting(sorted_pair_ids, expert_offsets, topk_ids.shape[1])

    block_experts = max(32, triton.next_power_of_2(num_experts))
    max_chunks = max(1, min(MAX_CHUNKS, MAX_COUNTS // block_experts))
    num_blocks = triton.cdiv(num_pairs, BLOCK_PAIRS)
    chunk_blocks = triton.cdiv(num_blocks, max_chunks)
    num_chunks = triton.cdiv(num_blocks, chunk_blocks)
    counts = ids.new_empty(
        (num_chunks, chunk_blocks + 1, block_experts),
        dtype=torch.int16 if chunk_blocks * BLOCK_PAIRS < 2**15 else torch.int32,
    )
    constants = {"BLOCK": BLOCK_PAIRS, "BLOCK_EXPERTS": block_experts, "PDL": pdl}
    count_pairs_kernel[(num_chunks,)](
        ids,
        counts,
        num_pairs,
        num_experts,
        chunk_blocks,
        **constants,
        num_warps=BLOCK_WARPS,
    )
    sort_pairs_kernel[(num_blocks,)](
        ids,
        counts,
        sorted_pair_ids,
        expert_offsets,
        num_pairs,
        num_experts,
        num_chunks,
        chunk_blocks,
        MAX_CHUNKS=max_chunks,
        **constants,
        num_warps=BLOCK_WARPS,
        **launch_options(True, ids.device),
    )
    return ExpertRouting(sorted_pair_ids, expert_offsets, topk_ids.shape[1])


if triton is not None:
    # Not specialized: a new number of tokens, or some of a tensor's, must not compile anything.
    @triton.jit(
        do_not_specialize=["num_pairs", "num_experts"],
        do_not_specialize_on_alignment=["topk_ids_ptr"],
    )
    def routing_kernel(
        topk_ids_ptr,  # (num_pairs,) int32 | int64
        sorted_pair_ids_ptr,  # (num_pairs,) int32
        expert_offsets_ptr,  # (num_experts + 1,) int32
        num_pairs,  # at most 16 * BLOCK
        num_experts,
        BLOCK: tl.constexpr,  # at most 32768: counts within a block are 16 bits wide
        PDL: tl.constexpr,
    ):
        """Grid: (cdiv(num_experts + 1, 2),), two experts per program; the last takes skipped ids.

        Each program reads every id once: it counts those of lower experts, which is where its own
        pairs begin, and keeps a bit for each of its own. Then it writes these in order. What
        concerns the first of the two experts is in the low 16 bits, the second in the high ones.
        """
        if PDL:
            gdc_launch_dependents()
        first = 2 * tl.program_id(0)
        lanes = tl.arange(0, BLOCK)
        num_blocks = tl.cdiv(num_pairs, BLOCK)

        before_first = tl.zeros((BLOCK,), dtype=tl.int32)
        before_second = tl.zeros((BLOCK,), dtype=tl.int32)
        own = tl.zeros((BLOCK,), dtype=tl.int32)  # bit i, 16 + i: pair i * BLOCK + lane
        for block in range(num_blocks):
            pairs = block * BLOCK + lanes
            inside = pairs < num_pairs
            ids = tl.load(topk_ids_ptr + pairs, mask=inside, other=-1).to(tl.int32)
            ids = tl.where((ids >= 0) & (ids < num_experts), ids, num_experts)
            ids = tl.where(inside, ids, num_experts + 2)
            before_first += (ids < first).to(tl.int32)
            before_second += (ids <= first).to(tl.int32)
            own |= tl.where(ids == first, 1, tl.where(ids == first + 1, 1 << 16, 0)) << block

        first_end = tl.sum(before_first, 0)
        second_end = tl.sum(before_second, 0)
        tl.store(expert_offsets_ptr + first, first_end)
        tl.store(expert_offsets_ptr + first + 1, second_end, mask=first < num_experts)
        for block in range(num_blocks):
            mine = (own >> block) & 0x10001
            ranks = tl.cumsum(mine, 0) - mine
            positions = tl.where(
                mine == 1, first_end + (ranks & 0xFFFF), second_end + (ranks >> 16)
            )
            tl.store(sorted_pair_ids_ptr + positions, block * BLOCK + lanes, mask=mine != 0)
            counts = tl.sum(mine, 0)
            first_end += counts & 0xFFFF
            second_end += counts >> 16

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
            ids = tl.load(topk_ids_ptr + pairs, mask=pairs < num_pairs, other=-1).to(tl.int32)
            tl.store(counts_ptrs, counts.to(counts_ptr.dtype.element_ty))
            counts_ptrs += BLOCK_EXPERTS
            exists = (ids >= 0) & (ids < num_experts)
            counts += tl.histogram(ids, BLOCK_EXPERTS, mask=exists)
        tl.store(counts_ptrs, counts.to(counts_ptr.dtype.element_ty))

    @triton.jit(
        do_not_specialize=["num_pairs", "num_experts", "num_chunks", "chunk_blocks"],
        do_not_specialize_on_alignment=["topk_ids_ptr"],
    )
    def sort_pairs_kernel(
        topk_ids_ptr,  # (num_pairs,) int32 | int64
        counts_ptr,  # (num_chunks, chunk_blocks + 1, BLOCK_EXPERTS), count_pairs_kernel's
        sorted_pair_ids_ptr,  # (num_pairs,) int32
        expert_offsets_ptr,  # (num_experts + 1,) int32
        num_pairs,
        num_experts,
        num_chunks,
        chunk_blocks,
        BLOCK: tl.constexpr,
        BLOCK_EXPERTS: tl.constexpr,
        MAX_CHUNKS: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """Grid: (cdiv(num_pairs, BLOCK),), a block of pairs per program.

        A pair comes after all pairs of lower experts, its expert's in earlier chunks, its
        expert's in earlier blocks of this chunk, and its expert's before it in this block.
        """
        block = tl.program_id(0)
        lanes = tl.arange(0, BLOCK)
        pairs = block * BLOCK + lanes
        inside = pairs < num_pairs
        # count_pairs_kernel did not write ids: they are ranked while it runs.
        ids = tl.load(topk_ids_ptr + pairs, mask=inside, other=-1).to(tl.int32)
        skipped = (ids < 0) | (ids >= num_experts)
        ids = tl.where(skipped, num_experts, ids)
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

        positions = tl.gather(ends - totals + before, tl.where(skipped, 0, ids), 0)
        # Skipped pairs come after all experts'; what no expert has of earlier blocks was skipped.
        first_skipped = block * BLOCK + tl.sum(totals - before, 0)
        positions = tl.where(skipped, first_skipped, positions) + ranks
        tl.store(sorted_pair_ids_ptr + positions, pairs, mask=inside)
        if block == 0:
            tl.store(expert_offsets_ptr, 0)
            tl.store(expert_offsets_ptr + 1 + experts, ends, mask=experts < num_experts)
