"""Choosing experts: torch's way by its formula, the kernel against torch's way."""

from __future__ import annotations

import itertools
import sys
from dataclasses import astuple, replace

import pytest
import torch
from compiling import ARCHITECTURES, SHARED_MEMORY, run_compiler
from graphs import capture, no_synchronization
from random_layer import DEVICE

from qmoe_kernels.router import RouterSpec, launch_select_experts, select_experts

DEEPSEEK_V3 = RouterSpec(
    8, "sigmoid", scaling_factor=2.5, num_groups=8, topk_groups=4, group_score="top2"
)
CASES = [
    # num_experts, with a correction bias, spec
    (128, False, RouterSpec(8)),
    (8, False, RouterSpec(2, normalize=False)),
    (1, False, RouterSpec(1)),
    (5, True, RouterSpec(5)),  # odd; every expert
    (64, True, RouterSpec(6, "sigmoid", normalize=False, scaling_factor=1.5)),
    (512, False, RouterSpec(10, "sigmoid")),
    (1000, True, RouterSpec(3, "sigmoid")),  # more than one warp
    (256, True, DEEPSEEK_V3),
    (160, False, RouterSpec(6, num_groups=8, topk_groups=3, normalize=False)),  # DeepSeek-V2
    (36, False, RouterSpec(4, num_groups=3, topk_groups=2, group_score="top2")),
    (12, True, RouterSpec(4, "sigmoid", num_groups=6, topk_groups=3)),
    (12, True, RouterSpec(4, "sigmoid", num_groups=12, topk_groups=4)),  # groups of one
    (16, True, RouterSpec(4, "sigmoid", num_groups=2, topk_groups=2, group_score="top2")),
]


def random_logits(num_tokens: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    return (2 * torch.randn(num_tokens, num_experts)).to(dtype)


def random_bias(num_experts: int) -> torch.Tensor:
    return 0.2 * torch.randn(num_experts, generator=torch.Generator().manual_seed(1))


def select_by_kernel(
    logits: torch.Tensor, spec: RouterSpec, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    bias = None if bias is None else bias.to(DEVICE)
    top_k, scoring, normalize, scaling_factor, epsilon, *groups = astuple(spec)
    ids, weights = launch_select_experts(
        logits.to(DEVICE),
        bias,
        top_k,
        scoring,
        normalize,
        scaling_factor,
        epsilon,
        *groups,
        weights_dtype=torch.float32,
    )
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    return ids.cpu(), weights.cpu()


def select_slowly(
    logits: list[float], spec: RouterSpec, bias: list[float]
) -> tuple[list[int], list[float]]:
    """One token in Python's own floats, written a second time."""
    l64 = torch.tensor(logits, dtype=torch.float64)
    scores = (l64.softmax(0) if spec.scoring == "softmax" else l64.sigmoid()).tolist()
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(choice) // spec.num_groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(spec.num_groups)]
    summed = 2 if spec.group_score == "top2" else 1
    best = [sum(sorted((choice[e] for e in m), reverse=True)[:summed]) for m in members]
    groups = sorted(range(spec.num_groups), key=lambda g: (-best[g], g))[: spec.topk_groups]
    candidates = [e for g in groups for e in members[g]]
    ids = sorted(candidates, key=lambda e: (-choice[e], e))[: spec.top_k]
    total = sum(scores[e] for e in ids) if spec.normalize else 1.0
    return ids, [scores[e] / total * spec.scaling_factor for e in ids]


@pytest.mark.parametrize("num_experts, with_bias, spec", CASES)
def test_formula(num_experts: int, with_bias: bool, spec: RouterSpec) -> None:
    logits = random_logits(17, num_experts, torch.float32)
    bias = random_bias(num_experts) if with_bias else None
    ids, weights = select_experts(logits, spec, bias)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    biases = torch.zeros(num_experts) if bias is None else bias
    for token, row in enumerate(logits.tolist()):
        expected_ids, expected = select_slowly(row, spec, biases.tolist())
        assert ids[token].tolist() == expected_ids
        torch.testing.assert_close(weights[token], torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts, with_bias, spec", CASES)
def test_kernel(num_experts: int, with_bias: bool, spec: RouterSpec, dtype: torch.dtype) -> None:
    # 16-bit logits are often equal: the lower id wins on both sides.
    logits = random_logits(17, num_experts, dtype)
    bias = random_bias(num_experts) if with_bias else None
    expected_ids, expected = select_experts(logits, spec, bias)
    ids, weights = select_by_kernel(logits, spec, bias)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights(dtype: torch.dtype) -> None:
    logits, spec = random_logits(17, 16, torch.float32), RouterSpec(4)
    ids, weights = select_experts(logits, spec)
    for device in ("cpu", DEVICE):
        found_ids, rounded = select_experts(logits.to(device), spec, None, dtype)
        assert torch.equal(found_ids.cpu(), ids) and rounded.dtype == dtype
        # The kernel's fp32 weights differ in their last bits, so some round to the neighbour.
        torch.testing.assert_close(
            rounded.float().cpu(), weights, rtol=torch.finfo(dtype).eps, atol=0
        )


@pytest.mark.parametrize("select", [select_experts, select_by_kernel])
def test_the_lower_id_wins(select) -> None:
    zeros = torch.zeros(2, 12)
    zeros[1, ::2] = -0.0  # no less than zero
    for spec in (RouterSpec(3), RouterSpec(3, "sigmoid")):
        assert select(zeros, spec, None)[0].tolist() == [[0, 1, 2]] * 2
        assert select(zeros, spec, torch.ones(12))[0].tolist() == [[0, 1, 2]] * 2
    grouped = RouterSpec(3, num_groups=4, topk_groups=2)
    logits = torch.zeros(1, 12)
    logits[0, 9:] = 1.0  # the last group, then the first of the others
    assert select(logits, replace(grouped, top_k=5), None)[0].tolist() == [[9, 10, 11, 0, 1]]
    # Sigmoids that round to 1 are no tie where the choice is made by logits.
    logits = torch.tensor([[30.0, 40.0, 50.0]])
    assert select(logits, RouterSpec(2, "sigmoid"), None)[0].tolist() == [[2, 1]]


@pytest.mark.parametrize("select", [select_experts, select_by_kernel])
def test_ids_are_experts_whatever_the_logits(select) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    logits[0], logits[1], logits[2] = nan, -inf, inf
    logits[3, 5], logits[4, 5], logits[5, 5] = nan, -inf, inf
    for spec, bias in itertools.product(
        (
            RouterSpec(8),
            RouterSpec(8, "sigmoid"),
            RouterSpec(8, num_groups=4, topk_groups=2, group_score="top2"),
        ),
        (None, torch.zeros(16)),
    ):
        ids = select(logits, spec, bias)[0]
        assert ids.min() >= 0 and ids.max() < 16
        assert all(len(set(row)) == 8 for row in ids.tolist())
    masked = select(logits, RouterSpec(15), None)
    assert 5 not in masked[0][4].tolist()


@pytest.mark.parametrize("select", [select_experts, select_by_kernel])
def test_scores_that_vanish_give_no_nan(select) -> None:
    weights = select(torch.full((1, 4), -200.0), RouterSpec(2, "sigmoid"), None)[1]
    assert weights.tolist() == [[0.0, 0.0]]


def test_softmax_after_top_k_is_softmax_normalized() -> None:
    logits = random_logits(50, 32, torch.float32)
    values, ids = logits.topk(4)
    for select in (select_experts, select_by_kernel):
        ours, weights = select(logits, RouterSpec(4), None)
        assert torch.equal(ours, ids)
        torch.testing.assert_close(weights, values.softmax(-1), rtol=1e-5, atol=0)


def test_no_tokens_and_strides() -> None:
    for select in (select_experts, select_by_kernel):
        ids, weights = select(torch.zeros(0, 8), RouterSpec(2), None)
        assert ids.shape == weights.shape == (0, 2)
        logits = random_logits(16, 6, torch.float32)
        for view in (logits.t(), logits[::2], logits[1:]):
            expected = select(view.contiguous(), RouterSpec(2), None)
            assert torch.equal(select(view, RouterSpec(2), None)[0], expected[0])


def test_operator() -> None:
    logits = random_logits(4, 8, torch.float32).to(DEVICE)
    arguments = (logits, None, *astuple(RouterSpec(2)), torch.bfloat16)
    torch.library.opcheck(torch.ops.qmoe.select_experts.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scoring": "tanh"}, "unknown scoring 'tanh'; softmax and sigmoid work"),
        ({"group_score": "mean"}, "unknown group_score 'mean'"),
        ({"top_k": 0}, "top_k=0"),
        ({"topk_groups": 2}, "topk_groups=2 of num_groups=1"),
    ],
)
def test_specs_that_do_not_work(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RouterSpec(2), **change)


def test_arguments_that_do_not_fit() -> None:
    logits = torch.zeros(3, 8)
    for arguments, message in [
        ((logits[0], RouterSpec(2)), "expected a float tensor"),
        ((logits.int(), RouterSpec(2)), "torch.int32"),
        ((logits, RouterSpec(9)), "top_k=9 experts of 8"),
        ((logits, RouterSpec(2, num_groups=3)), "8 experts do not divide into 3 groups"),
        ((logits, RouterSpec(3, num_groups=4)), "top_k=3 experts of 2"),
        ((logits, RouterSpec(1, num_groups=8, group_score="top2")), "groups of two experts"),
        ((logits, RouterSpec(2), torch.zeros(7)), "correction_bias is"),
    ]:
        with pytest.raises(ValueError, match=message):
            select_experts(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 33, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts, with_bias, spec", CASES)
def test_on_the_device(
    num_experts: int, with_bias: bool, spec: RouterSpec, dtype: torch.dtype, num_tokens: int
) -> None:
    logits = random_logits(num_tokens, num_experts, dtype)
    bias = random_bias(num_experts) if with_bias else None
    expected_ids, expected = select_experts(logits, spec, bias)
    on_device = (logits.cuda(), spec, None if bias is None else bias.cuda())
    ids, weights = select_experts(*on_device)
    # Exponentials differ in their last bits: among sums and biased scores there are near ties.
    same = (ids.cpu() == expected_ids).all(1)
    assert same.float().mean() > 0.999
    if bias is None and (spec.num_groups == 1 or spec.group_score == "max"):
        assert same.all()
    torch.testing.assert_close(weights.cpu()[same], expected[same], rtol=1e-5, atol=1e-37)
    again = select_experts(*on_device)
    assert torch.equal(ids, again[0]) and torch.equal(weights, again[1])


@pytest.mark.gpu
def test_cuda_graph_and_no_synchronization() -> None:
    logits = random_logits(33, 256, torch.float32).cuda()
    bias = random_bias(256).cuda()
    select_experts(logits, DEEPSEEK_V3, bias)
    with no_synchronization():
        select_experts(logits, DEEPSEEK_V3, bias)
    graph, (ids, weights) = capture(lambda: select_experts(logits, DEEPSEEK_V3, bias))
    for _ in range(3):
        logits.normal_()
        graph.replay()
        expected = select_experts(logits, DEEPSEEK_V3, bias)
        assert torch.equal(ids, expected[0]) and torch.equal(weights, expected[1])


@pytest.mark.gpu
def test_compiled() -> None:
    logits = random_logits(5, 64, torch.bfloat16).cuda()

    @torch.compile(fullgraph=True)
    def route(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return select_experts(x * 2, RouterSpec(4))

    for ours, expected in zip(
        route(logits), select_experts(logits * 2, RouterSpec(4)), strict=True
    ):
        assert torch.equal(ours, expected)


# ---- compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qmoe_kernels.router import select_experts_kernel

names = select_experts_kernel.arg_names
QWEN3 = dict(TOP_K=8, SIGMOID=False, BY_LOGITS=True, NORMALIZE=True, NUM_GROUPS=1, GROUP_SIZE=128,
             TOPK_GROUPS=1, TOP2=False, TOP_K_BLOCK=8, GROUPS_BLOCK=1, GROUP_BLOCK=128,
             bias_ptr=None)
DEEPSEEK_V3 = dict(TOP_K=8, SIGMOID=True, BY_LOGITS=False, NORMALIZE=True, NUM_GROUPS=8,
                   GROUP_SIZE=32, TOPK_GROUPS=4, TOP2=True, TOP_K_BLOCK=8, GROUPS_BLOCK=8,
                   GROUP_BLOCK=32)
WIDE = dict(QWEN3, TOP_K=10, NORMALIZE=False, GROUP_SIZE=1000, TOP_K_BLOCK=16, GROUP_BLOCK=1024)
for capability in ARCHITECTURES:
    for constants, logits in ((QWEN3, "*bf16"), (DEEPSEEK_V3, "*fp32"), (WIDE, "*fp16")):
        constants["PDL"] = capability >= 90
        types = dict(logits_ptr=logits, bias_ptr="*fp32", topk_ids_ptr="*i64",
                     topk_weights_ptr="*fp32", scaling_factor="fp32", epsilon="fp32")
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            select_experts_kernel, {n: types[n] for n in names},
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]]
                   for i, n in enumerate(names) if n.endswith("_ptr") and types[n] != "constexpr"},
        )
        kernel = triton.compile(
            source, target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 4 if constants is WIDE else 1},
        )
        ptx = kernel.asm["ptx"]
        print(json.dumps({
            "capability": capability, "shared": kernel.metadata.shared,
            "local_memory": len(re.findall(r"(ld|st)\\.local", ptx)),
        }))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_compiles_for_every_architecture() -> None:
    kernels = run_compiler(f"ARCHITECTURES = {ARCHITECTURES}\n{COMPILE}")
    assert len(kernels) == 3 * len(ARCHITECTURES)
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[kernel["capability"]] * 1024, kernel
        assert kernel["local_memory"] == 0, kernel
