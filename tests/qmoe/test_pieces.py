"""What may stand in for a model's own pieces, and what may not."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

import qmoe
from qmoe.decoding.pieces import PIECES, find_pieces, linear
from qmoe.decoding.shadow import Shadow

KINDS = PIECES[1:]


@pytest.fixture(scope="module")
def qwen3() -> PreTrainedModel:
    """A test that changes it takes a copy."""
    return families.build("qwen3_moe")


@pytest.fixture
def own(qwen3: PreTrainedModel) -> PreTrainedModel:
    return families.copy_of(qwen3)


def found(model: Any, kind: str) -> int:
    return len(find_pieces(model, [kind]).forwards)


def shadow_of(model: Any, kind: str | None = None) -> Shadow:
    return Shadow(model, find_pieces(model, PIECES if kind is None else [kind]).forwards)


class TestFinding:
    def test_draws_nothing_from_the_user_s_random_numbers(self, own):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        find_pieces(own)
        assert torch.equal(torch.get_rng_state(), before)

    def test_only_what_is_wanted(self, own):
        assert {kind: found(own, kind) for kind in KINDS} == {
            "norms": 9,
            "rotary": 2,
            "router": 2,
            "qkv": 6,
            "linears": 9,
        }
        assert not find_pieces(own, KINDS).attention
        nothing = find_pieces(own, [])
        assert not nothing.forwards and not nothing.attention
        with pytest.raises(ValueError, match="no piece norm; there are attention, norms"):
            find_pieces(own, ["norm"])

    def test_fires_no_hook(self, own):
        """A probe runs no module of the user's: whoever listens hears nothing."""
        fired: list[nn.Module] = []
        for module in own.modules():
            module.register_forward_hook(lambda m, i, o: fired.append(m))
            module.register_forward_pre_hook(lambda m, i: fired.append(m))
        forwards = find_pieces(own).forwards
        assert len(forwards) > 9 and not fired

    @pytest.mark.parametrize("family", families.FAMILIES)
    @torch.no_grad()
    def test_logits_stay_the_same(self, family):
        model = families.build(family)
        ids, _ = families.prompts(9)
        expected = model(ids, use_cache=False).logits
        actual = shadow_of(model)(ids, use_cache=False).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class TestAttention:
    def test_of_models_without_the_interface(self, own, monkeypatch):
        assert find_pieces(own).attention
        monkeypatch.setattr(type(own), "_supports_attention_backend", False)
        assert not find_pieces(own).attention

    def test_of_chunks(self, own):
        own.config.attention_chunk_size = 16
        assert not find_pieces(own).attention


class OtherRMSNorm(nn.Module):
    """Formulas that are none of ours, with a name and attributes as if they were."""

    def __init__(self, form: str, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.form = nn.Parameter(weight), 1e-6, form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "centered":
            x = x - x.mean(-1, keepdim=True)
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.form == "absolute":
            normed = x / x.abs().mean(-1, keepdim=True)
        if self.form == "other epsilon":
            normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
        if self.form == "weight squared":
            return normed * self.weight**2
        return normed * self.weight + (0.01 if self.form == "shifted" else 0.0)


class TestNorms:
    @pytest.mark.parametrize(
        "form, taken",
        [
            ("plain", True),
            ("centered", False),
            ("absolute", False),
            ("other epsilon", False),
            ("weight squared", False),
            ("shifted", False),
        ],
    )
    def test_of_another_formula(self, own, form, taken):
        own.model.norm = OtherRMSNorm(form, own.model.norm.weight.detach())
        assert found(own, "norms") == 8 + taken

    def test_each_has_its_own_epsilon(self, own):
        own.model.norm.variance_epsilon = 0.5
        x = torch.randn(3, 64)
        shadow = shadow_of(own, "norms")
        ours = shadow.root.model.norm
        assert "forward" in vars(ours)
        torch.testing.assert_close(ours(x), own.model.norm(x))

    def test_weights_are_read_when_it_runs(self, own):
        shadow = shadow_of(own, "norms")
        with torch.no_grad():
            own.model.norm.weight.mul_(3)
        x = torch.randn(3, 64)
        torch.testing.assert_close(shadow.root.model.norm(x), own.model.norm(x))

    def test_what_is_not_taken(self, own):
        own.model.norm.forward = own.model.norm.forward  # accelerate's hooks stand there
        own.model.layers[0].input_layernorm.to(torch.float64)
        own.model.layers[1].input_layernorm.weight = None
        assert found(own, "norms") == 6

    def test_a_norm_of_two_inputs(self):
        """Qwen3-Next's norms with a gate stay as they are."""
        model = families.build("qwen3_next")
        gated = [m for m in model.modules() if type(m).__name__.endswith("RMSNormGated")]
        assert len(gated) == 2
        assert not any(norm in find_pieces(model, ["norms"]).forwards for norm in gated)


class TestRotary:
    @pytest.mark.parametrize(
        "change",
        [
            lambda q, k: (q, k * 1.01),
            lambda q, k: (q.flip(-1), k),
            lambda q, k: (k, q),
            lambda q, k: (q.double(), k),
        ],
    )
    def test_of_another_formula(self, own, monkeypatch, change):
        module = sys.modules[type(own).__module__]
        original = module.apply_rotary_pos_emb

        def changed(q, k, cos, sin, unsqueeze_dim=1):
            return change(*original(q, k, cos, sin, unsqueeze_dim))

        assert found(own, "rotary") == 2
        monkeypatch.setattr(module, "apply_rotary_pos_emb", changed)
        assert found(own, "rotary") == 0

    def rotation(self, model: Any) -> Any:
        """What the shadow's attention looks up under the name of transformers' function."""
        (attention, *_) = find_pieces(model, ["rotary"]).forwards.values()
        return attention.__globals__["apply_rotary_pos_emb"]

    def test_another_axis_is_the_original_s(self, own):
        module = sys.modules[type(own).__module__]
        q, k = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 2, 16)
        cos, sin = own.model.rotary_emb(q, torch.arange(3).expand(2, 3))
        expected = module.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        actual = self.rotation(own)(q, k, cos, sin, unsqueeze_dim=2)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("family", ["glm4_moe", "qwen3_next"])
    def test_of_a_part_of_each_head(self, family):
        """The families below rotate some of a head's 16 numbers."""
        model = families.build(family)
        module = sys.modules[type(model).__module__]
        q, k = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16)
        cos, sin = model.model.rotary_emb(q, torch.arange(3).expand(2, 3))
        assert cos.shape[-1] < 16
        rotation = self.rotation(model)
        assert rotation is not module.apply_rotary_pos_emb
        expected = module.apply_rotary_pos_emb(q, k, cos, sin)
        torch.testing.assert_close(rotation(q, k, cos, sin), expected)

    def test_functions_that_matter_are_watched(self, own):
        """Whoever replaces one later is noticed."""
        module = sys.modules[type(own).__module__]
        watched = find_pieces(own, ["rotary"]).rests_on
        assert (module, "apply_rotary_pos_emb") in watched
        assert (module, "eager_attention_forward") in watched


class OtherRouter(nn.Module):
    """As Qwen3's, but for one thing."""

    def __init__(self, form: str, router: Any) -> None:
        super().__init__()
        self.form, self.top_k, self.weight = form, router.top_k, router.weight

    def forward(self, x: Tensor) -> Any:
        x = x.reshape(-1, x.shape[-1])
        logits = F.linear(x, self.weight)
        if self.form == "scaled logits":
            logits = logits * 2
        scores = logits.softmax(-1)
        if self.form == "sharp":
            scores = (2 * logits).softmax(-1)
        if self.form == "uneven":  # experts are not alike
            scores = scores * torch.linspace(1, 5, scores.shape[1])
        weights, ids = scores.topk(self.top_k, largest=self.form != "lowest")
        weights = weights / weights.sum(-1, keepdim=True)
        if self.form == "crossed":
            weights = weights.flip(-1)
        if self.form == "by number":  # the same pairs
            ids, order = ids.sort(-1)
            weights = weights.gather(1, order)
        if self.form == "two":
            return weights, ids
        return (ids, logits, weights) if self.form == "another order" else (logits, weights, ids)


class TestRouters:
    @pytest.mark.parametrize(
        "form, taken",
        [
            ("plain", True),
            ("another order", True),
            ("by number", True),
            ("scaled logits", False),
            ("sharp", False),
            ("uneven", False),
            ("lowest", False),
            ("crossed", False),
            ("two", False),
        ],
    )
    def test_of_another_form(self, own, form, taken):
        other = OtherRouter(form, own.model.layers[0].mlp.gate)
        own.model.layers[0].mlp.gate = other
        assert (other in find_pieces(own, ["router"]).forwards) == taken
        x = torch.randn(2, 5, 64)
        expected = other(x)
        shadow = shadow_of(own, "router")
        actual = shadow.root.model.layers[0].mlp.gate(x)
        assert len(actual) == len(expected)
        ids = next(i for i, t in enumerate(expected) if not t.is_floating_point())
        if form == "by number":
            expected = [t if t.shape[1] > 2 else t.flip(-1) for t in expected]
            order, own_order = actual[ids].argsort(-1), expected[ids].argsort(-1)
            actual = [t if t.shape[1] > 2 else t.gather(1, order) for t in actual]
            expected = [t if t.shape[1] > 2 else t.gather(1, own_order) for t in expected]
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, check_dtype=True)

    def test_beside_products_that_sum_in_another_order(self, own, monkeypatch):
        def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            assert bias is None
            return F.linear(x.double(), weight.double()).to(x.dtype)

        monkeypatch.setattr(linear, "linear", product)
        routers = [layer.mlp.gate for layer in own.model.layers]
        x = torch.randn(64, 64)
        assert not torch.equal(product(x, routers[0].weight), F.linear(x, routers[0].weight))
        assert all(gate in find_pieces(own).forwards for gate in routers)

    @torch.no_grad()
    @pytest.mark.parametrize("first", ["zeros", "all alike"])
    def test_the_first_does_not_tell_how_it_scores(self, first):
        """Softmax and sigmoid are the same where all logits are; the next layers' are not."""
        torch.manual_seed(0)
        changes = {"first_k_dense_replace": 0, "n_group": 2, "topk_group": 1}
        config = DeepseekV3Config(**families.DEEPSEEK | changes)
        model = qmoe.patch(DeepseekV3ForCausalLM(config).eval())
        gates = [layer.mlp.gate for layer in model.model.layers]
        gates[0].weight.copy_(torch.zeros(64) if first == "zeros" else torch.randn(64))
        gates[-1].weight.normal_()
        shadow = shadow_of(model, "router")
        x = torch.randn(40, 64)
        expected, actual = gates[-1](x), shadow.root.model.layers[-1].mlp.gate(x)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours.float().sort(-1)[0], theirs.float().sort(-1)[0])

    def test_a_correction_is_read_when_it_runs(self):
        model = families.build("deepseek_v3")
        shadow = shadow_of(model, "router")
        gate = model.model.layers[1].mlp.gate
        x = torch.randn(40, 64)
        before = gate(x)
        gate.e_score_correction_bias.neg_()
        expected = gate(x)
        ids = next(i for i, t in enumerate(expected) if not t.is_floating_point())
        assert not torch.equal(expected[ids].sort(-1)[0], before[ids].sort(-1)[0])
        actual = shadow.root.model.layers[1].mlp.gate(x)
        assert torch.equal(actual[ids].sort(-1)[0], expected[ids].sort(-1)[0])


class Products(nn.Module):
    """Three projections, in an order of one's own."""

    def __init__(self, **bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 12, bias=bias.get("q", False))
        self.k_proj = nn.Linear(8, 4, bias=bias.get("k", False))
        self.v_proj = nn.Linear(8, 4, bias=bias.get("v", False))


class TestLinears:
    @pytest.mark.parametrize("family", families.FAMILIES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @torch.no_grad()
    def test_weights_are_those_that_the_model_keeps(self, family, dtype, monkeypatch):
        """`linear` reads them before the kernel ahead has ended: no copy made on the way."""
        model = families.build(family, dtype=dtype)
        found: list[int] = []

        def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            found.append(weight.untyped_storage().data_ptr())
            return F.linear(x, weight, bias)

        monkeypatch.setattr(linear, "linear", spy)
        shadow_of(model)(families.prompts(5)[0], use_cache=False)
        kept = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert found and set(found) <= kept

    def test_what_is_no_plain_weight(self, own):
        """A tensor of another class may keep its numbers in a way of its own."""

        class Packed(Tensor):
            pass

        attention = own.model.layers[0].self_attn
        weight = attention.o_proj.weight.detach().as_subclass(Packed)
        attention.o_proj.weight = nn.Parameter(weight, requires_grad=False)
        assert type(attention.o_proj.weight) is Packed
        forwards = find_pieces(own).forwards
        assert attention.o_proj not in forwards and attention.q_proj in forwards


def side_by_side(products: Products) -> Products:
    """As `qmoe.patch` leaves the weights of attention."""
    linears = [products.q_proj, products.k_proj, products.v_proj]
    for name in ("weight", "bias"):
        parameters = [getattr(linear, name) for linear in linears]
        if None not in parameters:
            parts = torch.cat([p.detach() for p in parameters]).split([len(p) for p in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.data = part
    return products


class TestMergedProducts:
    @pytest.fixture
    def pair(self, own) -> Iterator[tuple[Any, Any]]:
        """Three projections and their shadow."""
        own.model.products = side_by_side(Products(q=True, k=True, v=True))
        shadow = shadow_of(own, "qkv")
        yield own.model.products, shadow.root.model.products

    @torch.no_grad()
    def test_other_inputs(self, pair):
        """Each product is of what it is given, whatever the one before was given."""
        x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        orders = [
            [("q", x), ("k", x), ("v", x)],
            [("q", x), ("k", y), ("v", x)],
            [("q", x), ("k", y), ("v", y), ("k", x)],
            [("k", x), ("v", y), ("q", y)],
            [("q", x), ("q", y), ("k", x), ("v", y)],
            [("q", x), ("k", x), ("k", x), ("v", x), ("v", x)],
            [("q", x), ("k", x.clone()), ("v", x[:1])],
        ]
        for order in orders:
            expected, actual = (
                [getattr(products, f"{name}_proj")(given) for name, given in order]
                for products in pair
            )
            for ours, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, theirs)

    def test_what_does_not_fit_together(self, own):
        def merges(products: Products) -> bool:
            own.model.products = side_by_side(products)
            return found(own, "qkv") == 9

        assert found(own, "qkv") == 6
        assert merges(Products())
        own.model.products = Products()  # somewhere each
        assert found(own, "qkv") == 6
        assert not merges(Products(q=True))
        hooked = Products()
        hooked.k_proj.forward = hooked.k_proj.forward
        assert not merges(hooked)
        listened = Products()
        listened.v_proj.register_forward_pre_hook(lambda module, args: None)
        assert not merges(listened)

        class Lora(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * 2

        adapted = Products()
        adapted.q_proj = Lora(8, 12, bias=False)
        assert not merges(adapted)

    def test_unpatched_models_are_left_as_they_are(self):
        model = families.FAMILIES["qwen3_moe"].build()
        places = [tensor.data_ptr() for tensor in model.parameters()]
        assert found(model, "qkv") == 0
        assert [tensor.data_ptr() for tensor in model.parameters()] == places
        qmoe.patch(model)
        assert found(model, "qkv") == 6

    def test_nothing_is_kept(self, pair):
        """Inputs and outputs are let go of when the last of the three has asked."""
        products = pair[1]
        x = torch.randn(3, 8)
        parts = [products.q_proj(x), products.k_proj(x), products.v_proj(x)]
        gone = weakref.ref(x)
        del x, parts
        assert gone() is None
