"""Every field of transformers' GenerationConfig, as a model's own default: served or refused.

Served means: the texts are those of transformers' own generate with the same configuration.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import GenerationConfig, Qwen3MoeForCausalLM, WatermarkingConfig
from transformers.generation import CompileConfig

from qmoe.generation import GenerationResult, generate

PROMPT, NEW = "Hello", 12
SAMPLED = {"do_sample": True}

# field -> (a value that matters, other values that it needs). The text is transformers'.
SERVED = {
    "min_length": (16, {"eos_token_id": 6}),
    "min_new_tokens": (11, {"eos_token_id": 6}),
    "early_stopping": (True, {"num_beams": 3}),
    "max_time": (1e-9, {}),
    "stop_strings": (["no", "&"], {}),
    "do_sample": (True, {}),
    "num_beams": (8, {}),
    "use_cache": (False, {}),
    "cache_implementation": ("static", {}),
    "cache_config": ({"backend": "quanto"}, {}),
    "max_cache_len": (64, {"cache_implementation": "static"}),
    "temperature": (3.0, SAMPLED),
    "top_k": (2, SAMPLED),
    "top_p": (0.3, SAMPLED),
    "min_p": (0.3, SAMPLED),
    "top_h": (0.3, SAMPLED),
    "typical_p": (0.3, SAMPLED),
    "epsilon_cutoff": (0.02, SAMPLED),
    "eta_cutoff": (0.02, SAMPLED),
    "repetition_penalty": (1.8, {}),
    "encoder_repetition_penalty": (1.8, {}),
    "length_penalty": (-30.0, {"num_beams": 3}),
    "no_repeat_ngram_size": (1, {}),
    "bad_words_ids": ([[token] for token in range(100, 200)], {}),
    "renormalize_logits": (True, SAMPLED),
    "forced_bos_token_id": (70, {}),
    "forced_eos_token_id": (0, {}),
    "remove_invalid_values": (True, {}),
    "exponential_decay_length_penalty": ((3, 9.0), {}),
    "suppress_tokens": (list(range(100, 200)), {}),
    "begin_suppress_tokens": (list(range(200, 264)), {}),
    "sequence_bias": ([[[70], 30.0]], {}),
    "guidance_scale": (3.0, {}),
    "watermarking_config": (WatermarkingConfig(bias=30.0), {}),
    "num_return_sequences": (3, SAMPLED),
    "pad_token_id": (5, {}),
    "bos_token_id": (5, {}),
    "eos_token_id": (list(range(1, 60)), {}),
    "encoder_no_repeat_ngram_size": (1, {"sequence_bias": [[[76], 30.0]]}),
    "decoder_start_token_id": (5, {}),
    "num_assistant_tokens": (3, {"prompt_lookup_num_tokens": 2}),
    "num_assistant_tokens_schedule": ("heuristic", {"prompt_lookup_num_tokens": 2}),
    "assistant_confidence_threshold": (0.9, {"prompt_lookup_num_tokens": 2}),
    "prompt_lookup_num_tokens": (3, {}),
    "max_matching_ngram_size": (2, {"prompt_lookup_num_tokens": 2}),
    "assistant_lookbehind": (3, {}),
    "target_lookbehind": (3, {}),
    "assistant_ensemble_weight": (0.5, {}),
    "speculation_type": ("dflash", {}),
    "compile_config": (CompileConfig(), {}),
    "disable_compile": (True, {}),
    "low_memory": (True, {}),
    "diversity_penalty": (0.5, {}),
    "prefill_chunk_size": (2, {}),
    "transformers_version": ("5.0.0", {}),
    "_from_model_config": (True, {}),
}
# field -> (value, other values that it needs). The text is the one without the value.
PASSED_OVER = {
    "max_length": (7, {}),
    "max_new_tokens": (3, {}),
    "output_attentions": (True, {}),
    "output_hidden_states": (True, {}),
    "output_scores": (True, {}),
    "output_logits": (True, {}),
    "return_dict_in_generate": (True, {"num_beams": 3}),
    "is_assistant": (True, {}),
    "continuous_batching_config": ({}, {}),
}
# field -> (value, other values that it needs, what the one line says)
REFUSED = {
    "use_mtp": (True, {}, "MTP|mtp"),
    "token_healing": (True, {}, "token_healing=True rewrites"),
    "assistant_early_exit": (1, {}, "assistant_early_exit=1 changes"),
    "penalty_alpha": (0.6, {}, "contrastive_search has left transformers"),
    "dola_layers": ("low", {}, "dola_generation has left transformers"),
    "num_beam_groups": (2, {"num_beams": 4}, "group_beam_search has left transformers"),
    "constraints": ([1], {"num_beams": 3}, "constrained_beam_search has left transformers"),
    "force_words_ids": ([[5]], {"num_beams": 3}, "constrained_beam_search has left transformers"),
}
# Where a field has a second value that ends in another way.
ALSO_REFUSED = [
    ("cache_implementation", "paged", {}, "continuous batching"),
    ("penalty_alpha", 0.6, {"top_k": 4}, "contrastive_search has left transformers"),
    ("num_return_sequences", 3, {}, "num_return_sequences"),
]


def with_defaults(model: Qwen3MoeForCausalLM, values: dict) -> Qwen3MoeForCausalLM:
    """The same model with a generation config that says this; as a file of the Hub might."""
    changed = copy.copy(model)
    changed.generation_config = copy.deepcopy(model.generation_config)
    vars(changed.generation_config).update(values)
    return changed


def plainly(model, tokenizer):
    """What transformers' own generate makes of it."""
    own = with_defaults(model, {"max_length": None})
    inputs = tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(7)
    rows = own.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=NEW,
        tokenizer=tokenizer,
    )
    return [
        tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row in rows
    ]


def test_every_field_is_accounted_for():
    fields = {name for name in vars(GenerationConfig()) if name != "_commit_hash"}  # until 5.20
    assert fields <= {*SERVED, *PASSED_OVER, *REFUSED}
    assert not (
        SERVED.keys() & PASSED_OVER.keys() or (SERVED | PASSED_OVER).keys() & REFUSED.keys()
    )


# They are about speed and memory, about other models, or about longer texts.
WITHOUT_EFFECT = {
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "renormalize_logits"),
    *("remove_invalid_values", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config"),
    *("disable_compile", "low_memory", "diversity_penalty", "prefill_chunk_size"),
    *("transformers_version", "_from_model_config", "early_stopping", "forced_bos_token_id"),
}


@pytest.fixture(scope="module")
def without(model, tokenizer):
    """What is generated without a field's value, by the other values."""
    results: dict[str, GenerationResult] = {}

    def generated(others: dict) -> GenerationResult:
        if repr(others) not in results:
            own = with_defaults(model, others)
            results[repr(others)] = generate(own, tokenizer, PROMPT, max_new_tokens=NEW, seed=7)
        return results[repr(others)]

    return generated


@pytest.mark.parametrize("field", SERVED)
def test_served(model, tokenizer, without, field):
    value, others = SERVED[field]
    own = with_defaults(model, {**others, field: value})
    before = set(vars(own.generation_config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = generate(own, tokenizer, PROMPT, max_new_tokens=NEW, seed=7)
        assert result.texts == plainly(own, tokenizer)
    assert set(vars(own.generation_config)) == before
    plain = without(others)
    same = result.texts == plain.texts and result.new_tokens == plain.new_tokens
    assert same == (field in WITHOUT_EFFECT)


@pytest.mark.parametrize("field", PASSED_OVER)
def test_passed_over(model, tokenizer, without, field):
    value, others = PASSED_OVER[field]
    own = with_defaults(model, {**others, field: value})
    result = generate(own, tokenizer, PROMPT, max_new_tokens=NEW, seed=7)
    assert result.texts == without(others).texts
    assert result.new_tokens == without(others).new_tokens


@pytest.mark.parametrize(
    ("field", "value", "others", "message"),
    [*((field, *rest) for field, rest in REFUSED.items()), *ALSO_REFUSED],
)
def test_refused(model, tokenizer, field, value, others, message):
    own = with_defaults(model, {**others, field: value})
    with pytest.raises(ValueError, match=message):
        generate(own, tokenizer, PROMPT, max_new_tokens=NEW)


@pytest.mark.parametrize("as_option", [False, True])
@pytest.mark.parametrize("pad", [-1, 264, 10**9])
def test_a_pad_token_outside_the_vocabulary(model, tokenizer, pad, as_option):
    own = model if as_option else with_defaults(model, {"pad_token_id": pad})
    options = {"pad_token_id": pad} if as_option else {}
    prompts = ["Hello", "a longer one"]
    # One text ends long before the other.
    result = generate(own, tokenizer, prompts, max_new_tokens=NEW, eos_token_id=6, **options)
    alone = [generate(model, tokenizer, p, max_new_tokens=NEW, eos_token_id=6) for p in prompts]
    assert result.texts == [single.texts[0] for single in alone]
    assert len(set(result.new_tokens)) == 2


def test_padding_is_no_token_of_a_text(model, tokenizer):
    """Some penalties look at all that stands in a row, padding too."""
    prompts = ["Hello", "a much longer prompt"]
    options = {"max_new_tokens": 24, "encoder_repetition_penalty": 2.0, "pad_token_id": 6}
    batch = generate(model, tokenizer, prompts, **options)
    alone = [generate(model, tokenizer, prompt, **options).texts[0] for prompt in prompts]
    assert batch.texts == alone


@pytest.mark.parametrize("beams", [{}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("field", ["no_repeat_ngram_size", "encoder_no_repeat_ngram_size"])
def test_padding_repeats_nothing(model, tokenizer, field, beams):
    """What stands there is the first token, again and again, which the model is drawn to."""
    prompts = [[70], [70, 70, 71], [72, 73, 74, 75, 76]]
    options = {"max_new_tokens": 9, field: 2, "sequence_bias": [[[70], 30.0]], **beams}
    batch = generate(model, tokenizer, prompts, **options)
    alone = [generate(model, tokenizer, [prompt], **options) for prompt in prompts]
    assert batch.texts == [text for result in alone for text in result.texts]


def test_an_option_without_effect_is_named(model, tokenizer):
    for option, needed in (
        ({"max_matching_ngram_size": 3}, "prompt_lookup_num_tokens"),
        ({"max_cache_len": 64}, "cache_implementation"),
        ({"top_h": 0.3}, "do_sample=True"),
    ):
        with pytest.raises(ValueError, match=f"has no effect without {needed}"):
            generate(model, tokenizer, PROMPT, **option)
    for option in ("num_assistant_tokens", "penalty_alpha", "is_assistant", "min_new_tokes"):
        with pytest.raises(ValueError, match=f"{option}: no option"):
            generate(model, tokenizer, PROMPT, **{option: 1})
