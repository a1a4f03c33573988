"""What may stand in for a model's own pieces, what may not, and what is left of it."""

from __future__ import annotations

import copy
import sys
import weakref
from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qmoe.decoding import pieces as substitution
from qmoe.decoding.kv_cache import DecodeCache
from qmoe.decoding.pieces import SUBSTITUTIONS, Substitutions

KINDS = SUBSTITUTIONS[1:]


@pytest.fixture(scope="module")
def qwen3() -> PreTrainedModel:
    """A test that changes it takes a copy."""
    return families.build("qwen3_moe")


@pytest.fixture
def own(qwen3: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(qwen3)


def found(model: Any, kind: str) -> int:
    return len(Substitutions(model, [kind]).places)


def cache_of(model: Any) -> DecodeCache:
    return DecodeCache(model.config, 1, 8, model.device)


def state(model: Any) -> list[Any]:
    """All that a substitution could have changed, by identity."""
    owners = [*model.modules(), model.config, sys.modules[type(model).__module__]]
    return [{name: id(value) for name, value in vars(owner).items()} for owner in owners]


class TestActive:
    def test_everything_is_restored(self, own):
        substitutions = Substitutions(own)
        before, cache = state(own), cache_of(own)
        cache.decoding = True
        with substitutions.active(cache):
            assert own.config._attn_implementation == "qmoe"
            assert state(own) != before
            changed = [a != b for a, b in zip(state(own), before, strict=True)]
            assert sum(changed) == 9 + 1 + 2 + 9 + 1  # qkv are among the linears
        assert state(own) == before
        assert own.config._attn_implementation == "sdpa"

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_after_an_error_too(self, own, error):
        substitutions, before = Substitutions(own), state(own)
        with pytest.raises(error), substitutions.active(cache_of(own)):
            raise error
        assert state(own) == before
        with substitutions.active(cache_of(own)):
            assert state(own) != before
        assert state(own) == before

    def test_what_stood_there_before(self, own):
        """An attribute that hid the class's is there again afterwards."""
        substitutions = Substitutions(own, ["norms"])
        norm = own.model.norm
        norm.forward = own_forward = lambda x: x * 2
        with substitutions.active(cache_of(own)):
            assert norm.forward is not own_forward
        assert norm.forward is own_forward

    def test_prompts_are_read_with_the_model_s_attention(self, own):
        with Substitutions(own).active(cache_of(own)):
            assert own.config._attn_implementation == "sdpa"

    def test_finding_draws_nothing_from_the_user_s_random_numbers(self, own):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        Substitutions(own)
        assert torch.equal(torch.get_rng_state(), before)

    def test_only_what_is_wanted(self, own):
        assert {kind: found(own, kind) for kind in KINDS} == {
            "norms": 9,
            "rotary": 1,
            "router": 2,
            "qkv": 6,
            "linears": 9,
        }
        assert not Substitutions(own, KINDS).attention
        nothing = Substitutions(own, [])
        assert not nothing.places and not nothing.attention
        with pytest.raises(ValueError, match="no substitution norm; there are attention, norms"):
            Substitutions(own, ["norm"])

    @pytest.mark.parametrize("family", families.FAMILIES)
    @torch.no_grad()
    def test_logits_stay_the_same(self, family):
        model = families.build(family)
        ids, _ = families.prompts(9)
        expected = model(ids, use_cache=False).logits
        substitutions = Substitutions(model)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)  # merged now
        with substitutions.active(cache_of(model)):
            actual = model(ids, use_cache=False).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class TestAttention:
    def test_of_models_without_the_interface(self, own, monkeypatch):
        assert Substitutions(own).attention
        monkeypatch.setattr(type(own), "_supports_attention_backend", False)
        assert not Substitutions(own).attention

    def test_of_chunks(self, own):
        own.config.attention_chunk_size = 16
        assert not Substitutions(own).attention


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
        expected = own.model.norm(x)
        with Substitutions(own, ["norms"]).active(cache_of(own)):
            torch.testing.assert_close(own.model.norm(x), expected)
            assert "forward" in vars(own.model.norm)

    def test_weights_are_read_when_it_runs(self, own):
        substitutions = Substitutions(own, ["norms"])
        with torch.no_grad():
            own.model.norm.weight.mul_(3)
        x = torch.randn(3, 64)
        expected = own.model.norm(x)
        with substitutions.active(cache_of(own)):
            torch.testing.assert_close(own.model.norm(x), expected)

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
        owners = [owner for owner, _, _ in Substitutions(model, ["norms"]).places]
        assert not any(owner in gated for owner in owners)


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

        assert found(own, "rotary") == 1
        monkeypatch.setattr(module, "apply_rotary_pos_emb", changed)
        assert found(own, "rotary") == 0

    def test_another_axis_is_the_original_s(self, own):
        module = sys.modules[type(own).__module__]
        q, k = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 2, 16)
        cos, sin = own.model.rotary_emb(q, torch.arange(3).expand(2, 3))
        expected = module.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        with Substitutions(own, ["rotary"]).active(cache_of(own)):
            actual = module.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("family", ["glm4_moe", "qwen3_next"])
    def test_of_a_part_of_each_head(self, family):
        """The families below rotate some of a head's 16 numbers."""
        model = families.build(family)
        module = sys.modules[type(model).__module__]
        q, k = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16)
        cos, sin = model.model.rotary_emb(q, torch.arange(3).expand(2, 3))
        assert cos.shape[-1] < 16
        expected = module.apply_rotary_pos_emb(q, k, cos, sin)
        with Substitutions(model, ["rotary"]).active(cache_of(model)):
            assert module.apply_rotary_pos_emb.__module__ == "qmoe.decoding.pieces"
            torch.testing.assert_close(module.apply_rotary_pos_emb(q, k, cos, sin), expected)


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
        router = OtherRouter(form, own.model.layers[0].mlp.gate)
        own.model.layers[0].mlp.gate = router
        substitutions = Substitutions(own, ["router"])
        assert (router in [owner for owner, _, _ in substitutions.places]) == taken
        x = torch.randn(2, 5, 64)
        expected = router(x)
        with substitutions.active(cache_of(own)):
            actual = router(x)
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

        monkeypatch.setattr(substitution, "linear", product)
        routers = [layer.mlp.gate for layer in own.model.layers]
        x = torch.randn(64, 64)
        assert not torch.equal(product(x, routers[0].weight), F.linear(x, routers[0].weight))
        owners = [owner for owner, _, _ in Substitutions(own).places]
        assert all(router in owners for router in routers)

    def test_a_correction_is_read_when_it_runs(self):
        model = families.build("deepseek_v3")
        substitutions = Substitutions(model, ["router"])
        router = model.model.layers[1].mlp.gate
        x = torch.randn(40, 64)
        before = router(x)
        router.e_score_correction_bias.neg_()
        expected = router(x)
        ids = next(i for i, t in enumerate(expected) if not t.is_floating_point())
        assert not torch.equal(expected[ids].sort(-1)[0], before[ids].sort(-1)[0])
        with substitutions.active(cache_of(model)):
            actual = router(x)
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

        monkeypatch.setattr(substitution, "linear", spy)
        substitutions = Substitutions(model)
        with substitutions.active(cache_of(model)):
            model(families.prompts(5)[0], use_cache=False)
        kept = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert found and set(found) <= kept


class TestMergedProducts:
    @pytest.fixture
    def merged(self, own) -> tuple[Products, Substitutions, DecodeCache]:
        own.model.products = products = Products(q=True, k=True, v=True)
        return products, Substitutions(own, ["qkv"]), cache_of(own)

    @torch.no_grad()
    def test_other_inputs(self, merged):
        """Each product is of what it is given, whatever the one before was given."""
        products, substitutions, cache = merged
        q, k, v = products.q_proj, products.k_proj, products.v_proj
        x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        orders = [
            [(q, x), (k, x), (v, x)],
            [(q, x), (k, y), (v, x)],
            [(q, x), (k, y), (v, y), (k, x)],
            [(k, x), (v, y), (q, y)],
            [(q, x), (q, y), (k, x), (v, y)],
            [(q, x), (k, x), (k, x), (v, x), (v, x)],
            [(q, x), (k, x.clone()), (v, x[:1])],
        ]
        for order in orders:
            expected = [linear(given) for linear, given in order]
            with substitutions.active(cache):
                actual = [linear(given) for linear, given in order]
            for ours, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, theirs)

    def test_memory_is_that_of_before(self, own):
        attention = own.model.layers[0].self_attn
        linears = [attention.q_proj, attention.k_proj, attention.v_proj]
        before = [linear.weight.detach().clone() for linear in linears]
        Substitutions(own, ["qkv"])
        after = [linear.weight for linear in linears]
        assert len({weight.untyped_storage().data_ptr() for weight in after}) == 1
        assert after[0].untyped_storage().nbytes() == sum(w.nbytes for w in before)
        assert all(isinstance(weight, nn.Parameter) for weight in after)
        for ours, theirs in zip(after, before, strict=True):
            assert torch.equal(ours, theirs) and ours.is_contiguous()

    def test_once(self, own):
        Substitutions(own)
        places = [tensor.data_ptr() for tensor in own.parameters()]
        Substitutions(own)
        assert [tensor.data_ptr() for tensor in own.parameters()] == places

    def test_what_does_not_fit_together(self, own):
        def merges(products: nn.Module) -> bool:
            own.model.products = products
            return found(own, "qkv") == 9

        assert found(own, "qkv") == 6
        assert merges(Products())
        assert not merges(Products(q=True))
        wide = Products()
        wide.v_proj = nn.Linear(9, 4, bias=False)
        assert not merges(wide)
        mixed = Products()
        mixed.k_proj.double()
        assert not merges(mixed)
        hooked = Products()
        hooked.k_proj.forward = hooked.k_proj.forward
        assert not merges(hooked)

        class Lora(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * 2

        adapted = Products()
        adapted.q_proj = Lora(8, 12, bias=False)
        assert not merges(adapted)

    def test_nothing_is_kept(self, merged):
        """Inputs and outputs are let go of when the last of the three has asked."""
        products, substitutions, cache = merged
        x = torch.randn(3, 8)
        with substitutions.active(cache):
            parts = [products.q_proj(x), products.k_proj(x), products.v_proj(x)]
        gone = weakref.ref(x)
        del x, parts
        assert gone() is None
