"""Layers with adapters, and their gradients, beside torch's of the weights with what they add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiling import ARCHITECTURES, SHARED_MEMORY, run_compiler
from random_layer import DEVICE, TOLERANCE, TRITON_DTYPES, Layer, random_layer, relative_error

from qmoe_kernels import Activation, dequantize, low_rank
from qmoe_kernels.activations import apply
from qmoe_kernels.low_rank import MOST_RANK, Factors, adapted_moe, adapted_moe_supports
from qmoe_kernels.quantization import STORAGE_DTYPE, quantize_rows

pytest.importorskip("triton")

ON_HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] == 9
GATES = [
    Activation(),
    Activation("gelu_tanh"),
    Activation("relu2", gated=False),
    Activation(alpha=1.702, up_shift=1.0, limit=0.5),
    Activation(gate_softcap=0.7, up_softcap=0.4),
]
Pair = tuple[Factors | None, Factors | None]


def random_factors(
    layer: Layer, ranks: tuple[int, int] = (4, 4), dtype: torch.dtype | None = None
) -> Pair:
    """Of both projections, as large as the weights; rank 0: none. As PEFT has them, in memory."""
    torch.manual_seed(3)
    found = []
    for weight, rank, scaling in zip(
        (layer.gate_up_proj, layer.down_proj), ranks, (2.0, 0.5), strict=True
    ):
        num_experts, out_features, in_features = weight.shape
        if not rank:
            found.append(None)
            continue
        a = torch.randn(num_experts, rank, in_features) * in_features**-0.5
        b = torch.randn(out_features, rank, num_experts) * rank**-0.5
        dtype = dtype or layer.hidden_states.dtype
        # Of what kernels see, so that their own rounding is what is measured.
        a, b = (t.to(layer.hidden_states.dtype).to(dtype) for t in (a, b))
        found.append(Factors(a, b.permute(2, 0, 1), scaling))
    return found[0], found[1]


def to(pair: Pair, device: Any) -> Pair:
    first, second = (
        f and Factors(f.in_factor.to(device), f.out_factor.to(device), f.scaling) for f in pair
    )
    return first, second


def leaves(layer: Layer, pair: Pair) -> list[torch.Tensor | None]:
    """Whatever has a gradient, in the order in which it is returned."""
    factors = [tensor for f in pair for tensor in (f[:2] if f else (None, None))]
    return [layer.hidden_states, layer.topk_weights, *factors]


def with_leaves(
    layer: Layer, pair: Pair, tensors: Sequence[torch.Tensor | None]
) -> tuple[Layer, Pair]:
    x, weights, *factors = tensors
    first, second = (
        f and Factors(factors[2 * i], factors[2 * i + 1], f.scaling) for i, f in enumerate(pair)
    )
    return replace(layer, hidden_states=x, topk_weights=weights), (first, second)


def reference(layer: Layer, pair: Pair, activations: str | None = None) -> torch.Tensor:
    """Token by token, in the dtype of the rows but for the activation."""

    def project(name: str, x: torch.Tensor, expert: int, factors: Factors | None) -> torch.Tensor:
        weight, scale = getattr(layer, name), getattr(layer, f"{name}_scale")
        bias = getattr(layer, f"{name}_bias")
        weight = weight[expert].to(x) if scale is None else dequantize(
            weight[expert], scale[expert], x.dtype
        )  # fmt: skip
        rows = x
        if activations is not None:
            rows = dequantize(*quantize_rows(x[None], activations), x.dtype)[0]
        y = weight @ rows
        if bias is not None:
            y = y + bias[expert].to(x)
        if factors is not None:
            low = factors.in_factor[expert].to(x) @ x
            y = y + factors.scaling * (factors.out_factor[expert].to(x) @ low)
        return y

    rows = []
    for token, ids in enumerate(layer.topk_ids.tolist()):
        for k, expert in enumerate(ids):
            if not 0 <= expert < layer.num_experts:
                rows.append(layer.hidden_states.new_zeros(layer.down_proj.shape[1]))
                continue
            up = project("gate_up_proj", layer.hidden_states[token], expert, pair[0])
            y = project("down_proj", apply(layer.activation, up), expert, pair[1])
            rows.append(y if layer.topk_weights is None else y * layer.topk_weights[token, k])
    output = torch.stack(rows).view(*layer.topk_ids.shape, -1)
    return output if layer.topk_weights is None else output.sum(1)


def expected(
    layer: Layer, pair: Pair, gradient: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Output and gradients by torch, in fp64 but for the activation."""
    layer, pair = layer.to("cpu"), to(pair, "cpu")
    wide = [t if t is None else t.double().requires_grad_() for t in leaves(layer, pair)]
    output = reference(*with_leaves(layer, pair, wide))
    found = iter(torch.autograd.grad(output, [t for t in wide if t is not None], gradient.double()))
    return output.detach(), [None if t is None else next(found) for t in wide]


def ours(
    layer: Layer, pair: Pair, gradient: torch.Tensor, path: str, tiles: Any = None
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """By the operator or by the kernels alone, in the interpreter where there is no GPU."""
    layer, pair, gradient = layer.to(DEVICE), to(pair, DEVICE), gradient.to(DEVICE)
    if path == "kernels":
        from qmoe_kernels.low_rank_kernels import adapted_moe_backward_triton, adapted_moe_triton

        experts, routed = layer.experts(), (layer.topk_ids, layer.topk_weights)
        output = adapted_moe_triton(layer.hidden_states, experts, *routed, *pair, tiles=tiles)
        found = adapted_moe_backward_triton(
            gradient, layer.hidden_states, experts, *routed, *pair, tiles=tiles
        )
        inputs = leaves(layer, pair)
        return output, [None if t is None else g for t, g in zip(inputs, found, strict=True)]
    inputs = [t if t is None else t.clone().requires_grad_() for t in leaves(layer, pair)]
    layer, pair = with_leaves(layer, pair, inputs)
    output = adapted_moe(
        layer.hidden_states, layer.experts(), layer.topk_ids, layer.topk_weights, *pair
    )
    found = iter(torch.autograd.grad(output, [t for t in inputs if t is not None], gradient))
    return output.detach(), [None if t is None else next(found) for t in inputs]


def gradient_of(layer: Layer) -> torch.Tensor:
    shape = layer.topk_ids.shape if layer.topk_weights is None else layer.topk_ids.shape[:1]
    generator = torch.Generator().manual_seed(1)
    size = layer.down_proj.shape[1]
    return torch.randn(*shape, size, generator=generator).to(layer.hidden_states.dtype)


def check(layer: Layer, pair: Pair, path: str, tiles: Any = None) -> None:
    gradient = gradient_of(layer)
    output, found = ours(layer, pair, gradient, path, tiles)
    wanted, gradients = expected(layer, pair, gradient)
    tolerance = TOLERANCE[layer.hidden_states.dtype]
    assert output.dtype == layer.hidden_states.dtype
    assert output.isfinite().all() and relative_error(output, wanted) < tolerance
    for tensor, actual, theirs in zip(leaves(layer, pair), found, gradients, strict=True):
        assert (actual is None) == (theirs is None)
        if actual is not None:
            assert tensor is not None and actual.dtype == tensor.dtype
            assert actual.isfinite().all() and actual.shape == theirs.shape
            assert relative_error(actual, theirs) < tolerance


@pytest.fixture(autouse=True)
def operators_run_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(low_rank, "adapted_moe_supports", lambda *_: True)


PATHS = ["kernels", "operator"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("weights", ["int8", "fp8", None])
def test_formats(weights: str | None, dtype: torch.dtype, path: str) -> None:
    layer = random_layer(weights=weights, dtype=dtype, bias=True)
    check(layer, random_factors(layer), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", GATES, ids=str)
def test_gates(activation: Activation, path: str) -> None:
    layer = random_layer(activation=activation)
    check(layer, random_factors(layer), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ranks", [(1, 3), (8, 16), (16, 0), (0, 5), (0, 0), (64, 17), (128, 128)])
def test_ranks(ranks: tuple[int, int], path: str) -> None:
    layer = random_layer(bias=True)
    check(layer, random_factors(layer, ranks), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "case",
    [
        {"num_tokens": 1, "num_experts": 1, "top_k": 1},
        {"num_tokens": 90, "num_experts": 3, "top_k": 2},  # tiles of 64 rows
        {"num_tokens": 50, "num_experts": 5, "top_k": 5},
        {"hidden_size": 136, "intermediate_size": 72},
        {"hidden_size": 1, "intermediate_size": 1},
    ],
    ids=str,
)
def test_sizes(case: dict[str, int], path: str) -> None:
    layer = random_layer(**case)
    check(layer, random_factors(layer), path)


@pytest.mark.parametrize("path", PATHS)
def test_factors_of_fp32_learn_in_fp32(path: str) -> None:
    layer = random_layer(dtype=torch.float16)
    check(layer, random_factors(layer, dtype=torch.float32), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("summed", [True, False])
def test_skipped_ids_count_for_nothing(summed: bool, path: str) -> None:
    layer = random_layer(num_tokens=5, bias=True)
    layer.topk_ids[0, 0], layer.topk_ids[1, 1] = -1, layer.num_experts
    layer.topk_ids[2] = -1
    pair = random_factors(layer)
    if not summed:
        check(replace(layer, topk_weights=None), pair, path)
        return
    check(layer, pair, path)
    assert layer.topk_weights is not None
    layer.topk_weights[0, 0] = torch.nan
    output, found = ours(layer, pair, gradient_of(layer), path)
    assert all(t is not None and t.isfinite().all() for t in (output, *found))
    of_x, of_weights, *_ = found
    assert of_weights is not None and of_weights[0, 0] == 0 and of_weights[2].eq(0).all()
    assert output[2].eq(0).all() and of_x is not None and of_x[2].eq(0).all()


@pytest.mark.parametrize("path", PATHS)
def test_an_expert_without_pairs_has_gradients_of_zero(path: str) -> None:
    layer = random_layer(num_tokens=6)
    layer.topk_ids[layer.topk_ids == 3] = -1
    _, found = ours(layer, random_factors(layer), gradient_of(layer), path)
    for gradient in found[2:]:
        assert gradient is not None and gradient[3].eq(0).all() and gradient[0].ne(0).any()


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens(path: str) -> None:
    layer = random_layer(num_tokens=0)
    output, found = ours(layer, random_factors(layer), gradient_of(layer), path)
    assert output.shape == (0, 40)
    assert [tuple(g.shape) for g in found if g is not None] == [
        (0, 40), (0, 2), (6, 4, 40), (6, 48, 4), (6, 4, 24), (6, 40, 4),
    ]  # fmt: skip
    assert all(g is not None and g.eq(0).all() for g in found)


@pytest.mark.parametrize("path", PATHS)
def test_equal_inputs_give_equal_bits(path: str) -> None:
    layer = random_layer(num_tokens=64, dtype=torch.float16)
    pair, gradient = random_factors(layer), gradient_of(layer)
    runs = [ours(layer, pair, gradient, path) for _ in range(2)]
    for a, b in zip(*([output, *found] for output, found in runs), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


@pytest.mark.parametrize("num_tokens", [7, 90])
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_rows_in_8_bits_and_paged_experts(weights: str, num_tokens: int) -> None:
    """Both for inference: factors meet rows as they are, and are indexed by expert."""
    from random_layer import skip_without_fp8

    from qmoe_kernels.low_rank_kernels import adapted_moe_triton

    skip_without_fp8(DEVICE, weights)
    layer = random_layer(num_tokens=num_tokens, weights=weights)
    pair = random_factors(layer)
    wanted = reference(layer, pair, weights)
    slots = torch.tensor([3, 0, 5, 1, 4, 2])
    place = slots.argsort()
    layer.gate_up_proj, layer.down_proj = layer.gate_up_proj[place], layer.down_proj[place]
    there = replace(layer, expert_to_slot=slots.int()).to(DEVICE)
    output = adapted_moe_triton(
        there.hidden_states,
        there.experts(),
        there.topk_ids,
        there.topk_weights,
        *to(pair, DEVICE),
        activations=STORAGE_DTYPE[weights],
    )
    # A sum that ends a little off may be rounded to the next 8-bit number.
    assert relative_error(output, wanted) < 1e-2


@pytest.mark.parametrize("block_m", [8, 16, 32, 128])
@pytest.mark.parametrize("scatter", [True, False])
def test_thin_products_in_tiles_of_any_height(scatter: bool, block_m: int) -> None:
    """Also in those that are lower than what tensor cores take."""
    from qmoe_kernels.low_rank_kernels import launch_expand, launch_shrink
    from qmoe_kernels.routing import ExpertRouting

    torch.manual_seed(0)
    ids = torch.repeat_interleave(torch.arange(-1, 4), torch.tensor([5, 9, 0, 70, 136]))
    ids = ids[torch.randperm(220)].view(110, 2)
    x, factor = torch.randn(110, 200), torch.randn(4, 5, 200)
    start = torch.randn(220, 200)
    there = [t.to(DEVICE) for t in (ids, x, factor, start.clone())]
    routing = ExpertRouting.from_topk_ids(there[0], 4, block_m=block_m)
    low = launch_shrink(there[1], there[2], 3.0, routing, pairs_per_row=2)
    launch_expand(low, there[2], routing, out := there[3], scatter=scatter)
    pairs = routing.sorted_pair_ids.long().cpu()
    low_of_pair, out = torch.empty(220, 5).index_copy_(0, pairs, low.cpu()), out.cpu()
    if not scatter:
        out = torch.empty_like(out).index_copy_(0, pairs, out)
        start = torch.empty_like(start).index_copy_(0, pairs, start)
    for pair, expert in enumerate(ids.flatten().tolist()):
        wanted = start[pair]
        if 0 <= expert < 4:
            a = 3 * factor[expert] @ x[pair // 2]
            torch.testing.assert_close(low_of_pair[pair], a, rtol=1e-4, atol=1e-3)
            wanted = wanted + a @ factor[expert]
        torch.testing.assert_close(out[pair], wanted, rtol=1e-4, atol=2e-3)


def test_order_of_columns_is_that_of_hopper() -> None:
    """The activation writes what the next product reads, and zeros beyond."""
    from qmoe_kernels.hopper_gemm import launch_sort_rows, padded
    from qmoe_kernels.low_rank_kernels import ThinFactors, launch_activation
    from qmoe_kernels.routing import ExpertRouting

    layer = random_layer(num_tokens=40, intermediate_size=72, dtype=torch.float16).to(DEVICE)
    routing = ExpertRouting.from_topk_ids(layer.topk_ids, 6, block_m=16)
    up, down = (
        ThinFactors.of(f, torch.float16) for f in to(random_factors(layer.to("cpu")), DEVICE)
    )
    torch.manual_seed(0)
    rows = torch.randn(80, 144, dtype=torch.float16).to(DEVICE)
    low = torch.randn(80, 4, dtype=torch.float16).to(DEVICE)
    arguments = (rows, low, up, down, Activation(), routing)
    plain, first = launch_activation(*arguments, permute=False)
    permuted, second = launch_activation(*arguments, permute=True)
    assert permuted.shape == (80, padded(72)) and torch.equal(first, second)
    places = torch.arange(80, dtype=torch.int32, device=DEVICE)
    assert torch.equal(permuted, launch_sort_rows(plain, places, 1, permute=True))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs compute capability 9")
@pytest.mark.parametrize(("block_m", "tail_m"), [(16, 8), (64, 16), (128, 32), (256, 64)])
@pytest.mark.parametrize("sizes", [(256, 192), (720, 176), (16, 16), (80, 400)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["int8", "fp8", None])
def test_on_hopper(
    weights: str | None, dtype: torch.dtype, sizes: tuple[int, int], block_m: int, tail_m: int
) -> None:
    from qmoe_kernels.heuristic import hopper_tiles
    from qmoe_kernels.hopper_gemm import hopper_supports

    layer = random_layer(
        num_tokens=300,
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        weights=weights,
        dtype=dtype,
        bias=True,
    )
    # An expert for every height, and one for more than one tile of all of them.
    ids = torch.repeat_interleave(torch.arange(6), torch.tensor([5, 12, 25, 50, 100, 408]))
    layer.topk_ids = ids[torch.randperm(600)].view(300, 2)
    layer.topk_ids[0, 0], layer.topk_ids[1, 1] = -1, 6
    there = layer.to("cuda")
    assert hopper_supports(there.hidden_states, there.experts(), there.topk_ids)
    check(layer, random_factors(layer, (16, 8)), "kernels", hopper_tiles(block_m, dtype, 4, tail_m))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs compute capability 9")
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_rows_in_8_bits_on_hopper(weights: str) -> None:
    from qmoe_kernels.heuristic import hopper_tiles
    from qmoe_kernels.low_rank_kernels import adapted_moe_triton

    layer = random_layer(
        num_tokens=300,
        hidden_size=256,
        intermediate_size=192,
        weights=weights,
        dtype=torch.bfloat16,
    )
    pair, storage = random_factors(layer), STORAGE_DTYPE[weights]
    wide, wide_pair = with_leaves(
        layer, pair, [t if t is None else t.double() for t in leaves(layer, pair)]
    )
    wanted = reference(wide, wide_pair, weights)
    there = layer.to("cuda")
    output = adapted_moe_triton(
        there.hidden_states,
        there.experts(),
        there.topk_ids,
        there.topk_weights,
        *to(pair, "cuda"),
        activations=storage,
        tiles=hopper_tiles(128, storage, 3, 64),
    )
    assert relative_error(output, wanted) < 0.03


# ---- the operator ------------------------------------------------------------------------------


@pytest.mark.parametrize("learns", ["x", "factors"])
def test_nothing_is_computed_for_what_does_not_learn(learns: str) -> None:
    layer = random_layer().to(DEVICE)
    pair = to(random_factors(layer.to("cpu")), DEVICE)
    x, weights, *factors = leaves(layer, pair)
    tensors = [x.requires_grad_(learns == "x"), weights]
    tensors += [f.requires_grad_(learns == "factors") for f in factors]
    layer, pair = with_leaves(layer, pair, tensors)
    found = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if function is torch.ops.qmoe.adapted_moe_backward.default:
                found.extend(result)
            return result

    output = adapted_moe(
        layer.hidden_states, layer.experts(), layer.topk_ids, layer.topk_weights, *pair
    )
    with Watch():
        output.sum().backward()
    of_x, _, *of_factors = found
    assert (of_x.numel() > 0) == (learns == "x") == (x.grad is not None)
    for factor, gradient in zip(factors, of_factors, strict=True):
        assert (gradient.numel() > 0) == (learns == "factors") == (factor.grad is not None)


def test_opcheck() -> None:
    layer = random_layer(bias=True).to(DEVICE)
    up = (layer.gate_up_proj, layer.gate_up_proj_scale, layer.gate_up_proj_bias)
    down = (layer.down_proj, layer.down_proj_scale, layer.down_proj_bias)
    activation = ("silu", True, 1.0, 0.0, None, False, None, None)
    for ranks in ((4, 3), (0, 4)):
        pair = to(random_factors(layer.to("cpu"), ranks), DEVICE)
        for topk_weights in (layer.topk_weights, None):
            routed = (layer.topk_ids, topk_weights)
            factors = leaves(layer, pair)[2:]
            rest = (*factors, 2.0, 0.5, *activation)
            torch.library.opcheck(
                torch.ops.qmoe.adapted_moe.default,
                (layer.hidden_states, *up, *down, *routed, None, *rest, "bf16"),
            )
            gradient = gradient_of(replace(layer, topk_weights=topk_weights)).to(DEVICE)
            torch.library.opcheck(
                torch.ops.qmoe.adapted_moe_backward.default,
                (gradient, layer.hidden_states, *up, *down, *routed, *rest, True, True),
            )


def test_compiles_into_one_graph_with_its_gradients() -> None:
    layer = random_layer().to(DEVICE)
    pair = to(random_factors(layer.to("cpu")), DEVICE)
    inputs = [t.detach().clone().requires_grad_() for t in leaves(layer, pair) if t is not None]

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        there, factors = with_leaves(layer, pair, inputs)
        return adapted_moe(
            there.hidden_states, there.experts(), there.topk_ids, there.topk_weights, *factors
        ).sin()

    actual = torch.autograd.grad(call(*inputs).sum(), inputs)
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_paged_experts_say_what_to_do() -> None:
    layer = random_layer()
    slots = torch.arange(layer.num_experts, dtype=torch.int32)
    layer = replace(layer, expert_to_slot=slots).to(DEVICE)
    pair = to(random_factors(layer.to("cpu")), DEVICE)
    x = layer.hidden_states.requires_grad_()
    output = adapted_moe(x, layer.experts(), layer.topk_ids, layer.topk_weights, *pair)
    with pytest.raises(RuntimeError, match=r"paged.*without hbm_budget"):
        output.sum().backward()


def test_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer()
    pair = random_factors(layer)
    arguments = (layer.hidden_states, layer.experts(), layer.topk_ids, layer.topk_weights)
    assert not adapted_moe_supports(layer.hidden_states, 4, 4)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"on cpu.*\[4, 4\].*up to {MOST_RANK}.*grouped_linear"):
        adapted_moe(*arguments, *pair)
    assert pair[0] is not None and pair[1] is not None
    wrong = pair[0]._replace(out_factor=pair[0].out_factor[:, :-1])
    with pytest.raises(ValueError, match=r"factor of gate_up_proj.*\(6, 47, 4\).*\(6, 48, 4\)"):
        adapted_moe(*arguments, wrong, pair[1])
    wrong = pair[1]._replace(in_factor=pair[1].in_factor.long())
    with pytest.raises(ValueError, match=r"factor of down_proj is torch.int64"):
        adapted_moe(*arguments, pair[0], wrong)
    wrong = pair[1]._replace(in_factor=pair[1].in_factor.flatten())
    with pytest.raises(ValueError, match=r"factor of down_proj is .* of shape \(576,\)"):
        adapted_moe(*arguments, pair[0], wrong)


@pytest.mark.parametrize("only", ["gate_up", "down"])
def test_slots_of_one_projection_alone(only: str) -> None:
    """They would count for both, or for none."""
    layer = random_layer().to(DEVICE)
    experts, slots = layer.experts(), torch.arange(6, dtype=torch.int32, device=DEVICE)
    moved = replace(getattr(experts, only), expert_to_slot=slots.flip(0))
    pair = to(random_factors(layer.to("cpu")), DEVICE)
    routed = (layer.topk_ids, layer.topk_weights)
    with pytest.raises(ValueError, match=r"not the same expert_to_slot"):
        adapted_moe(layer.hidden_states, replace(experts, **{only: moved}), *routed, *pair)


# ---- compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import json
from compiling import compiling_for, spilled_bytes

for capability in ARCHITECTURES:
    with compiling_for(capability) as compiled:
        import torch
        from qmoe_kernels import ExpertRouting, low_rank_kernels as low_rank
        from qmoe_kernels.low_rank import Factors
        from random_layer import random_layer
        bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
        layer = random_layer(num_tokens=64, hidden_size=2048, intermediate_size=768)
        weights = (layer.gate_up_proj, layer.down_proj)
        for dtype, block_m, rank in (
            (bf16, 16, 16), (bf16, 128, 16), (bf16, 128, 64), (bf16, 128, 128), (f16, 64, 8),
            (f32, 16, 16), (f32, 32, 128),
        ):
            routing = ExpertRouting.from_topk_ids(layer.topk_ids, 6, block_m=block_m)
            factors = [
                Factors(torch.zeros(6, rank, w.shape[2]), torch.zeros(6, w.shape[1], rank), 2.0)
                for w in weights
            ]
            up, down = (low_rank.ThinFactors.of(f, dtype) for f in factors)
            x = torch.zeros(64, 2048, dtype=dtype)
            rows, of_hidden = x.new_empty(128, 1536), x.new_empty(128, 768)
            first = len(compiled)
            low = low_rank.launch_shrink(x, up.inner, 2.0, routing, pairs_per_row=2)
            low_rank.launch_activation(
                rows, low, up, down, layer.activation, routing, permute=dtype != f32
            )
            low_rank.launch_expand(low, down.outer, routing, x.new_empty(128, 2048), scatter=True)
            low_rank.launch_activation_gradient(
                rows, of_hidden, low, low, up, down, layer.experts(), torch.zeros(6),
                layer.topk_weights, routing, torch.zeros(64, 2), of_factors=True,
            )
            for kernel in compiled[first:]:
                print(json.dumps({
                    "capability": capability, "name": kernel.metadata.name,
                    "dtype": str(dtype), "rank": rank, "shared": kernel.metadata.shared,
                    "spilled": spilled_bytes(kernel.asm["cubin"]),
                    "tensor_cores": "mma" in kernel.asm["ptx"],
                }))
"""


@pytest.mark.slow
def test_compiles_for_every_gpu() -> None:
    kernels = run_compiler(f"ARCHITECTURES = {ARCHITECTURES}\n{COMPILE}")
    assert len(kernels) == len(ARCHITECTURES) * 7 * 4
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[kernel["capability"]] * 1024, kernel
        fp32 = kernel["dtype"] == "torch.float32"
        assert kernel["tensor_cores"] == (not fp32), kernel
        if not (fp32 and kernel["rank"] == 128):  # ieee products of that many are too much
            assert kernel["spilled"] <= (0 if kernel["capability"] == 90 else 32), kernel
