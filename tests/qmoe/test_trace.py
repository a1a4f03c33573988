from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import qmoe
from qmoe.traces.trace import NONE, RoutingTrace, synthetic_trace, tile_trace

SHIPPED = (
    Path(__file__).resolve().parents[2] / "benchmarks" / "data" / "tiny_moe_routing.safetensors"
)


def small_trace(**changes) -> RoutingTrace:
    ids = torch.tensor([[[0, 1], [3, 2]], [[1, 0], [2, NONE]], [[2, 3], [0, 1]]])
    fields = {"topk_ids": ids.short(), "num_experts": 4, "page_bytes": (10, 20), **changes}
    return RoutingTrace(**fields)


class TestRoutingTrace:
    def test_sizes_and_shares(self):
        trace = small_trace()
        assert (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_pages) == (3, 2, 2, 8)
        assert trace.popularity().tolist() == [[2, 2, 1, 1], [1, 1, 2, 1]]
        assert trace.reuse().tolist() == [2 / 4, 1 / 3]

    def test_a_file_keeps_everything(self, tmp_path):
        trace = small_trace(metadata={"source": "a test"})
        trace.save(tmp_path / "trace.safetensors")
        loaded = RoutingTrace.load(tmp_path / "trace.safetensors")
        assert torch.equal(loaded.topk_ids, trace.topk_ids)
        assert (loaded.num_experts, loaded.page_bytes) == (4, (10, 20))
        assert loaded.metadata == {"source": "a test"}

    def test_a_file_with_predictions_is_read_without_them(self, tmp_path):
        trace, path = small_trace(), tmp_path / "trace.safetensors"
        trace.save(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = {"topk_ids": trace.topk_ids, "predicted_ids": trace.topk_ids.clone()}
        save_file(tensors, path, metadata)
        assert torch.equal(RoutingTrace.load(path).topk_ids, trace.topk_ids)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_experts": 3}, "ids from -1 to 3; 3 experts"),
            ({"topk_ids": torch.zeros(2, 2, dtype=torch.int16)}, r"shape \(2, 2\)"),
            ({"topk_ids": torch.zeros(0, 2, 2, dtype=torch.int16)}, "none of them 0"),
            ({"topk_ids": torch.zeros(3, 2, 2, dtype=torch.int64)}, "expected torch.int16"),
            ({"page_bytes": (10,)}, "page_bytes"),
        ],
    )
    def test_refuses_what_does_not_fit(self, changes, message):
        with pytest.raises(ValueError, match=message):
            small_trace(**changes)

    def test_refuses_files_that_are_no_traces(self, tmp_path):
        path = tmp_path / "trace.safetensors"
        with pytest.raises(ValueError, match="no such file"):
            RoutingTrace.load(path)
        path.write_bytes(b"{}")
        with pytest.raises(ValueError, match="no usable routing trace"):
            RoutingTrace.load(path)
        save_file({"topk_ids": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="no routing trace, though"):
            RoutingTrace.load(path)
        header = {"format": "qmoe-routing-trace", "num_experts": "4", "page_bytes": "7"}
        for metadata in (header, {**header, "num_experts": "many"}, {"format": header["format"]}):
            save_file({"topk_ids": torch.zeros(1, 1, 1, dtype=torch.int16)}, path, metadata)
            with pytest.raises(ValueError, match="no usable routing trace"):
                RoutingTrace.load(path)


class TestSynthetic:
    @pytest.mark.parametrize("reuse", [0.4, 0.6])
    def test_popularity_and_reuse_are_those_asked_for(self, reuse):
        trace = synthetic_trace(15000, 3, 128, 8, zipf=0.65, reuse=reuse, seed=3)
        share = trace.popularity().sort(1, descending=True).values.double().mean(0)
        rank = torch.arange(1, 129, dtype=torch.float64)
        slope = torch.linalg.lstsq(
            torch.stack([rank.log(), torch.ones(128)], 1), share.log()[:, None]
        ).solution[0]
        assert float(slope) == pytest.approx(-0.65, abs=0.02)
        expected = rank**-0.65
        # Not only in the mean: the head, the middle and the tail. (The last ranks of a sorted
        # sample are low by chance.)
        assert share[:100] / share.sum() == pytest.approx(expected[:100] / expected.sum(), rel=0.06)
        assert trace.reuse() == pytest.approx(torch.full((3,), reuse).double(), abs=0.01)

    def test_every_layer_has_its_own_favourites(self):
        popularity = synthetic_trace(2000, 6, 128, 8, seed=4).popularity().double()
        assert (torch.corrcoef(popularity) - torch.eye(6)).abs().max() < 0.35

    def test_experts_of_a_token_differ(self):
        ids = synthetic_trace(200, 3, 16, 8).topk_ids.sort(-1).values
        assert (ids[..., 1:] > ids[..., :-1]).all()
        assert ids.min() >= 0

    def test_extremes(self):
        assert not synthetic_trace(50, 2, 16, 4, reuse=0).reuse().any()
        assert synthetic_trace(50, 2, 16, 4, reuse=1).reuse().eq(1).all()
        assert synthetic_trace(5, 2, 8, 8).popularity().eq(5).all()
        assert synthetic_trace(4000, 1, 8, 1, zipf=0).popularity() == pytest.approx(500, rel=0.2)

    def test_a_seed_gives_the_same_trace(self):
        first, same, other = (synthetic_trace(9, 2, 16, 4, seed=s) for s in (1, 1, 2))
        assert torch.equal(first.topk_ids, same.topk_ids)
        assert not torch.equal(first.topk_ids, other.topk_ids)

    def test_refuses_shares_that_cannot_be(self):
        with pytest.raises(ValueError, match=r"reuse=1\.1: must be from 0 to 1"):
            synthetic_trace(5, 2, 16, 4, reuse=1.1)
        with pytest.raises(ValueError, match="top_k=17"):
            synthetic_trace(5, 2, 16, 17)


class TestTile:
    def test_is_the_rule_that_the_docstring_states(self):
        trace = synthetic_trace(90, 4, 5, 3)
        tiled = tile_trace(trace, 8, 15, 6, num_tokens=50, page_bytes=7)
        assert tiled.page_bytes == (7,) * 8
        assert tiled.topk_ids.shape == (50, 8, 6)
        # Layers 0 1 2 3 1 2 3 1: three rounds of three groups, nine starting points.
        for layer, (source, round_) in enumerate(
            [(0, 0), (1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (3, 1), (1, 2)]
        ):
            for group in range(3):
                start = (round_ * 3 + group) * 10
                for token in range(50):
                    want = trace.topk_ids[(start + token) % 90, source, :2] + 5 * group
                    assert torch.equal(
                        tiled.topk_ids[token, layer, 2 * group : 2 * group + 2], want
                    )

    def test_keeps_what_was_recorded(self):
        trace = RoutingTrace.load(SHIPPED)
        tiled = tile_trace(trace, 48, 128, 8)
        assert (tiled.num_tokens, tiled.num_layers, tiled.top_k) == (trace.num_tokens, 48, 8)
        first = RoutingTrace(trace.topk_ids[..., :1], 16, trace.page_bytes)
        copies = [0, *[1 + i % 5 for i in range(47)]]
        # Rings have one seam each, where the last token is followed by the first.
        assert tiled.reuse() == pytest.approx(first.reuse()[copies], abs=2e-3)
        groups = tiled.popularity().unflatten(1, (8, 16))
        assert torch.equal(groups, first.popularity()[copies][:, None].expand_as(groups))
        assert not torch.equal(tiled.topk_ids[:, 1], tiled.topk_ids[:, 6])

    @pytest.mark.parametrize(
        "shape", [(4, 18, 6), (4, 15, 5), (4, 15, 12), (0, 15, 6), (4, 0, 6), (4, 3, 1)]
    )
    def test_refuses_shapes_that_are_no_whole_copies(self, shape):
        with pytest.raises(ValueError, match=r"whole copies|at least 1"):
            tile_trace(synthetic_trace(9, 4, 5, 3), *shape)
        with pytest.raises(ValueError, match="no more tokens than the trace's 9"):
            tile_trace(synthetic_trace(9, 4, 5, 3), 4, 5, 3, num_tokens=10)


def router_choices(model, tokens):
    """The ids of every layer's router, (num_tokens, num_layers, top_k) int16, without hooks."""
    logits = model(tokens, output_router_logits=True).router_logits
    top_k = model.config.num_experts_per_tok
    return torch.stack([layer.topk(top_k).indices for layer in logits], 1).short()


class TestRecording:
    TOKENS = torch.arange(24).view(2, 12) * 7 % 200

    @pytest.fixture(autouse=True)
    def _no_grad(self):
        with torch.no_grad():
            yield

    def test_is_what_the_routers_chose(self, model):
        with qmoe.record_routing(model) as recording:
            model(self.TOKENS)
        trace = recording.trace({"source": "a test"})
        assert torch.equal(trace.topk_ids, router_choices(model, self.TOKENS))
        assert trace.num_experts == 8
        assert trace.page_bytes == (3 * 64 * 32,) * 2
        assert trace.metadata == {"source": "a test"}

    def test_passes_follow_one_another_and_nothing_stays_behind(self, model):
        with qmoe.record_routing(model) as recording:
            model(self.TOKENS[:1])
            model(self.TOKENS[1:, :5])
        model(self.TOKENS)
        expected = [router_choices(model, t) for t in (self.TOKENS[:1], self.TOKENS[1:, :5])]
        assert torch.equal(recording.trace().topk_ids, torch.cat(expected))
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_quantized_experts(self, checkpoint):
        model = qmoe.load(checkpoint, device="cpu", weights="int8")
        with qmoe.record_routing(model) as recording:
            model(self.TOKENS)
        assert torch.equal(recording.trace().topk_ids, router_choices(model, self.TOKENS))

    def test_ids_without_a_page_are_none(self, model):
        experts = model.model.layers[0].mlp.experts
        with qmoe.record_routing(experts) as recording:
            ids = torch.tensor([[3, 8], [0, 1]])
            experts(torch.zeros(2, 64), top_k_index=ids, top_k_weights=torch.ones(2, 2))
        assert recording.trace().topk_ids.tolist() == [[[3, NONE]], [[0, 1]]]

    @pytest.mark.parametrize("where", [0, 1])
    def test_an_interrupted_pass_is_left_out(self, model, where, monkeypatch):
        monkeypatch.setattr("qmoe.traces.record._MANY", 3)

        def interrupt(module, args, output):
            raise KeyboardInterrupt

        passes = [self.TOKENS[:1, i : i + 2] for i in range(0, 10, 2)]
        with (
            pytest.raises(KeyboardInterrupt),
            qmoe.record_routing(model) as recording,
        ):
            for tokens in passes:
                model(tokens)
            # After layer 0 or layer 1 has been recorded, while it computes.
            hook = model.model.layers[where].mlp.experts.register_forward_hook(interrupt)
            try:
                model(self.TOKENS)
            finally:
                hook.remove()
        trace = recording.trace()
        expected = torch.cat([router_choices(model, tokens) for tokens in passes])
        if where == 1:  # by then it has been through all layers
            expected = torch.cat([expected, router_choices(model, self.TOKENS)])
        assert torch.equal(trace.topk_ids, expected)

    def test_refuses_in_words(self, model):
        with (
            pytest.raises(ValueError, match="Linear has no experts"),
            qmoe.record_routing(torch.nn.Linear(2, 2)),
        ):
            pass
        with qmoe.record_routing(model) as recording:
            pass
        with pytest.raises(ValueError, match="has not run"):
            recording.trace()
        with qmoe.record_routing(model) as recording, pytest.raises(RuntimeError):
            model(self.TOKENS)
            recording._topk_ids[1].clear()
            raise RuntimeError
        with pytest.raises(ValueError, match="layers saw 0 to 24 tokens"):
            recording.trace()


def test_the_shipped_trace():
    trace = RoutingTrace.load(SHIPPED)
    assert trace.topk_ids.shape == (2048, 6, 2)
    assert trace.num_experts == 16
    assert trace.page_bytes == (3 * 192 * 48,) * 6
    # Learned routing: far more reuse than 12.5 %.
    assert trace.reuse().min() > 0.17
