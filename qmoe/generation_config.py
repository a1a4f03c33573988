"""What a call of generate() is configured by: the model's own generation config, and options."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMode

ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
BEAMS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p")
# What must be on, and the options that have no effect without it.
_NEEDED: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "do_sample=True": (lambda c: c.do_sample, (*_SAMPLING, "epsilon_cutoff", "eta_cutoff")),
    "num_beams > 1": (lambda c: (c.num_beams or 1) > 1, ("early_stopping", "length_penalty")),
    "prompt_lookup_num_tokens": (
        lambda c: c.prompt_lookup_num_tokens,
        ("max_matching_ngram_size",),
    ),
    "cache_implementation": (lambda c: c.cache_implementation, ("cache_config", "max_cache_len")),
}
# What values can be, where transformers goes on with others, or fails in a way that says nothing.
_WHOLE = "a whole number, at least"
_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "do_sample": ("True or False", lambda v: isinstance(v, bool)),
    **dict.fromkeys(
        ("num_beams", "num_return_sequences"),
        (f"{_WHOLE} 1", lambda v: _is_number(v, int) and v >= 1),
    ),
    **dict.fromkeys(
        ("top_k", "min_new_tokens", "no_repeat_ngram_size"),
        (f"{_WHOLE} 0", lambda v: _is_number(v, int) and v >= 0),
    ),
    **dict.fromkeys(
        ("temperature", "repetition_penalty"),
        ("a number above 0", lambda v: _is_number(v) and 0 < v < math.inf),
    ),
    **dict.fromkeys(
        ("top_p", "min_p", "top_h", "typical_p"),
        ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    ),
    "length_penalty": ("a number", lambda v: _is_number(v) and math.isfinite(v)),
    "stop_strings": ("a string, or a list of strings", lambda v: _are_strings(v)),
}
# Fields of GenerationConfig that are no choice of a caller who wants texts. In a model's own
# configuration they are passed over.
_PASSED_OVER = frozenset(
    {
        "max_length",  # counts the prompt too; max_new_tokens says what is meant
        "return_dict_in_generate",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "is_assistant",
        "continuous_batching_config",
    }
)
# Fields that mean nothing here: for an assistant model, for encoders, or of strategies that have
# left transformers.
_NOT_AN_OPTION = _PASSED_OVER.union(
    ("assistant_confidence_threshold", "assistant_ensemble_weight", "assistant_lookbehind"),
    ("num_assistant_tokens", "num_assistant_tokens_schedule", "speculation_type"),
    ("target_lookbehind", "decoder_start_token_id", "transformers_version"),
    ("constraints", "diversity_penalty", "dola_layers", "force_words_ids", "low_memory"),
    ("num_beam_groups", "penalty_alpha"),
)


class _Complete(GenerationConfig):
    """A configuration that holds the model's own values already.

    transformers adds the model's values wherever the given configuration has None; what was taken
    out of it on purpose would come back.
    """

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **values: Any
    ) -> dict[str, Any]:
        if allow_custom_entries:  # only the model's values come in this way
            return {}
        return super().update(defaults_only, allow_custom_entries, **values)


def configuration(
    model: Any, tokenizer: Any, max_new_tokens: int, options: dict[str, Any]
) -> GenerationConfig:
    """The model's own generation config with the caller's options; the model keeps its own.

    Raises:
        ValueError: a model that generates no text, an unknown option, one that would have no
            effect, or something that no loop serves.
    """
    _check_model(model)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r}: must be a whole number, at least 1")
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - _NOT_AN_OPTION
    for name in options:
        if name not in known:
            raise ValueError(
                f"{name}: no option of generate(); options are named as in transformers' "
                "GenerationConfig (do_sample, temperature, top_k, top_p, num_beams ...)"
            )
    options = {name: value for name, value in options.items() if value is not None}
    for name, (what, fits) in _VALUES.items():
        if name in options and not fits(options[name]):
            raise ValueError(f"{name}={options[name]!r}: must be {what}")
    config = _Complete()
    config.__dict__.update(copy.deepcopy(vars(model.generation_config)))
    config.__dict__.update(dict.fromkeys(_PASSED_OVER | {"max_new_tokens"}))
    config.update(**options)
    for needed, (given, names) in _NEEDED.items():
        if not given(config):
            for name in filter(names.__contains__, options):
                raise ValueError(f"{name}={options[name]!r} has no effect without {needed}")
    _refuse_unserved(config)
    config.pad_token_id = _pad_token(model, tokenizer, config)
    return config


def _is_number(value: Any, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _are_strings(value: Any) -> bool:
    strings = [value] if isinstance(value, str) else value
    return isinstance(strings, (list, tuple)) and all(isinstance(s, str) and s for s in strings)


def _check_model(model: Any) -> None:
    if not getattr(model, "generation_config", None):
        raise ValueError(
            f"{type(model).__name__} cannot generate text: it has no generation_config"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; generate() takes decoders")


def _refuse_unserved(config: GenerationConfig) -> None:
    """Refuse what no loop serves, be it an option or in the model's own configuration."""
    mode = config.get_generation_mode()
    # top_k is 50 where nobody sets it, and the mode then another than is told here.
    if (
        mode is GenerationMode.GREEDY_SEARCH
        and (config.penalty_alpha or 0) > 0
        and config.top_k is None
    ):
        mode = GenerationMode.CONTRASTIVE_SEARCH
    refused = None
    if mode not in (*ONE_BY_ONE, *BEAMS, GenerationMode.ASSISTED_GENERATION):
        refused = f"{mode.value} has left transformers"
    elif config.token_healing:
        refused = "token_healing=True rewrites the prompts"
    elif config.assistant_early_exit is not None:
        refused = f"assistant_early_exit={config.assistant_early_exit!r} changes the model's config"
    elif config.cache_implementation == "paged":
        refused = "cache_implementation='paged' is continuous batching (model.generate_batch)"
    if refused:
        raise ValueError(
            f"{refused}; generate() cannot serve that, take it out of the options or of "
            "model.generation_config"
        )


def _pad_token(model: Any, tokenizer: Any, config: GenerationConfig) -> int:
    """What texts that have ended go on with, so it must be in the vocabulary; it is never shown."""
    size = getattr(model.config.get_text_config(), "vocab_size", None) or float("inf")
    candidates = (config.pad_token_id, tokenizer.pad_token_id, config.eos_token_id)
    ids = [token for candidate in candidates for token in as_list(candidate)]
    return next((token for token in ids if 0 <= token < size), 0)


def as_list(value: int | Sequence[int] | torch.Tensor | None) -> list[int]:
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return [value] if isinstance(value, int) else list(value)
