"""Which expert works on which tokens: (token, expert) pairs sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents
except ImportError:  # a CPU needs no Triton
    triton = None

# Up to so many pairs a small block has them all; a large one reads 16 per thread at once.
SMALL_BLOCK, SMALL_WARPS = 1024, 4
LARGE_BLOCK, LARGE_WARPS = 8192, 16
# A thread remembers in 16 bits which of its pairs are an expert's. Beyond, to read all pairs for
# every expert costs more than a radix sort.
MAX_PAIRS = 16 * LARGE_BLOCK


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

        On a GPU this is one launch (a few above `MAX_PAIRS`) without a synchronization, and no
        shape depends on a device value: a CUDA graph can hold it. From compute capability 9.0 on
        a kernel launched with ``launch_pdl=True`` may start while this one still runs.

        Args:
            topk_ids: (num_tokens, top_k) int32 or int64. Ids outside [0, num_experts) are skipped;
                expert parallelism marks experts of other ranks so.
            num_experts: of this layer.
        """
        if topk_ids.is_cuda and triton is not None and topk_ids.numel() <= MAX_PAIRS:
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
    """Run `routing_kernel`; for at most `MAX_PAIRS` pairs. See `ExpertRouting.from_topk_ids`."""
    num_pairs = topk_ids.numel()
    sorted_pair_ids = topk_ids.new_empty(num_pairs, dtype=torch.int32)
    expert_offsets = topk_ids.new_empty(num_experts + 1, dtype=torch.int32)
    small = num_pairs <= SMALL_BLOCK
    routing_kernel[(triton.cdiv(num_experts + 1, 2),)](
        topk_ids.contiguous(),
        sorted_pair_ids,
        expert_offsets,
        num_pairs,
        num_experts,
        BLOCK=SMALL_BLOCK if small else LARGE_BLOCK,
        PDL=topk_ids.is_cuda and torch.cuda.get_device_capability(topk_ids.device) >= (9, 0),
        num_warps=SMALL_WARPS if small else LARGE_WARPS,
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
