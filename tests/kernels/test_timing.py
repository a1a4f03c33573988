"""Layers and routings that are timed are what they say; a replay runs every call once."""

from __future__ import annotations

import pytest
import torch

from qmoe_kernels import fused_moe
from qmoe_kernels.tiles import LayerShape
from qmoe_kernels.timing import (
    LayerWeights,
    eager_microseconds,
    expert_elements,
    num_calls,
    random_layer,
    random_routing,
    replay_microseconds,
)

SMALL = LayerShape(num_experts=6, top_k=2, hidden_size=64, intermediate_size=32)
QWEN3 = LayerShape(128, 8, 2048, 768)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def draw(skew: float = 0.0, num_tokens: int = 2048, among: int | None = None) -> torch.Tensor:
    ids, _ = random_routing(
        QWEN3, num_tokens, skew=skew, among=among, device=DEVICE, generator=generator()
    )
    return ids.cpu()


@pytest.mark.parametrize("weights", ["int8", "fp8", "bf16", "fp32"])
@pytest.mark.parametrize("gated", [True, False])
def test_layer_has_the_shapes_that_fused_moe_takes(weights: str, gated: bool) -> None:
    shape = LayerShape(6, 2, 64, 32, gated)
    layer = random_layer(shape, weights, DEVICE, generator())
    assert layer.gate_up_proj.shape == (6, 64 if gated else 32, 64)
    assert layer.down_proj.shape == (6, 64, 32)
    assert layer.gate_up_proj.numel() + layer.down_proj.numel() == 6 * expert_elements(shape)
    scales = (layer.gate_up_proj_scale, layer.down_proj_scale)
    if weights in ("bf16", "fp32"):
        assert scales == (None, None)
        return
    assert [scale.shape for scale in scales if scale is not None] == [
        layer.gate_up_proj.shape[:2],
        layer.down_proj.shape[:2],
    ]
    if gated:
        x = torch.randn(512, 64, device=DEVICE, generator=generator())
        ids, topk_weights = random_routing(shape, 512, device=DEVICE, generator=generator())
        y = fused_moe(x, *vars(layer).values(), ids, topk_weights)
        assert 0.2 < float(y.std()) < 2


def test_formats_hold_the_same_draw_and_seeds_differ() -> None:
    layers = {w: random_layer(SMALL, w, DEVICE, generator()) for w in ("int8", "fp32")}
    scale = layers["int8"].gate_up_proj_scale
    assert scale is not None
    difference = layers["int8"].gate_up_proj * scale[..., None] - layers["fp32"].gate_up_proj
    assert float(difference.norm() / layers["fp32"].gate_up_proj.norm()) < 0.02
    other = random_layer(SMALL, "int8", DEVICE, generator(1))
    assert not torch.equal(other.gate_up_proj, layers["int8"].gate_up_proj)
    with pytest.raises(ValueError, match=r"int4.*'int8', 'fp8', 'bf16' and 'fp32'"):
        random_layer(SMALL, "int4", DEVICE, generator())


def test_a_clone_is_equal_and_elsewhere() -> None:
    layer = random_layer(SMALL, "bf16", DEVICE, generator())
    clone = layer.clone()
    assert isinstance(clone, LayerWeights) and clone.down_proj_scale is None
    assert torch.equal(clone.gate_up_proj, layer.gate_up_proj)
    assert clone.gate_up_proj.data_ptr() != layer.gate_up_proj.data_ptr()


def test_routing_has_different_experts_and_weights_that_sum_to_one() -> None:
    ids, weights = random_routing(QWEN3, 100, skew=1.0, device=DEVICE, generator=generator())
    assert ids.shape == weights.shape == (100, 8)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert ids.min() >= 0 and ids.max() < 128
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert weights.min() > 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(100, device=DEVICE))


def test_routing_is_that_of_its_seed() -> None:
    assert torch.equal(draw(1.0), draw(1.0))
    other, _ = random_routing(QWEN3, 2048, skew=1.0, device=DEVICE, generator=generator(1))
    assert not torch.equal(draw(1.0), other.cpu())


def test_uniform_routing_is_uniform() -> None:
    counts = draw().flatten().bincount(minlength=128)
    # 2048 tokens at 8 / 128: 128 each, with a deviation of 11.
    assert counts.min() > 128 - 6 * 11 and counts.max() < 128 + 6 * 11


def test_skewed_routing_follows_zipf() -> None:
    # One expert per token: without the others' competition the law is Zipf's own.
    one = LayerShape(16, 1, 64, 32)
    ids, _ = random_routing(one, 1 << 16, skew=1.0, device=DEVICE, generator=generator())
    counts = ids.cpu().flatten().bincount(minlength=16).sort(descending=True).values
    law = 1 / torch.arange(1, 17)
    torch.testing.assert_close(counts / counts.sum(), law / law.sum(), rtol=0.1, atol=0)
    # The most popular expert is not always the same one.
    most = {
        int(
            random_routing(one, 256, skew=2.0, device=DEVICE, generator=generator(seed))[0].mode(0)[
                0
            ]
        )
        for seed in range(8)
    }
    assert len(most) > 2


def test_routing_among_some_experts() -> None:
    ids = draw(among=10)
    assert len(ids.unique()) == 10 and ids.max() > 10
    with pytest.raises(ValueError, match="among=7 of 128 experts; from top_k=8"):
        draw(among=7)


def test_graphs_are_neither_short_nor_long() -> None:
    assert num_calls(QWEN3, 1) == 128
    assert num_calls(LayerShape(256, 8, 7168, 2048), 4096, 2) == 3
    assert 3 < num_calls(QWEN3, 64) < 128


@pytest.mark.parametrize("measure", [replay_microseconds, eager_microseconds])
def test_every_call_runs_equally_often_on_a_cpu(measure: object) -> None:
    ran = [0, 0, 0]

    def call(i: int) -> None:
        ran[i] += 1

    calls = [lambda i=i: call(i) for i in range(3)]
    assert measure(calls, seconds=0.0, device="cpu") > 0  # type: ignore[operator]
    assert ran[0] > 3 and len(set(ran)) == 1
    with pytest.raises(ValueError, match="no calls"):
        measure([], device="cpu")  # type: ignore[operator]


@pytest.mark.gpu
def test_a_replay_runs_each_call_and_its_time_is_one_calls() -> None:
    buffer = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
    counts = torch.zeros(4, dtype=torch.int64, device="cuda")

    def call(i: int) -> None:
        buffer.add_(1)  # 0.5 GB moved: over 50 microseconds on any GPU there is
        counts[i] += 1

    one = replay_microseconds([lambda: call(0)], seconds=0.05)
    four = replay_microseconds([lambda i=i: call(i) for i in range(4)], seconds=0.05)
    assert 50 < one < 20_000
    assert four == pytest.approx(one, rel=0.3)
    assert counts[1] == counts[2] == counts[3] > 5
