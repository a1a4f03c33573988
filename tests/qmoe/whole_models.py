"""Whole models, tiny: every class of the installed transformers that generates with experts.

:func:`generating_classes` reads them off transformers' modules, so that a new one is noticed, and
:func:`sweep` does with one what a user does: it is saved, converted, loaded, and generates.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import alone
import torch
import zoo
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

import qmoe
from qmoe_convert.convert import ConversionError, convert
from qmoe_kernels.quantization import WeightFormat

VOCABULARY, NUM_LAYERS, NUM_EXPERTS, HIDDEN, FEATURES = 96, 3, 16, 32, 24
# By what configurations call them, those of images and sounds included.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    **dict.fromkeys(("max_position_embeddings", "max_seq_len", "model_max_length"), 256),
    "num_hidden_layers": NUM_LAYERS,
    "n_layers": NUM_LAYERS,
    "num_layers": 2,
    "depth": 1,
    "encoder_layers": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    **dict.fromkeys(
        (
            *("hidden_size", "d_model", "moe_hidden_size", "out_hidden_size", "text_hidden_size"),
            *("projector_hidden_size", "projection_hidden_dim", "projector_input_dim"),
            *("projector_output_dim", "vision_output_dim", "output_dim", "adapter_in_dim"),
            *("adapter_out_dim", "merged_hidden_size"),
        ),
        HIDDEN,
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "intermediate_size_mlp", "dense_intermediate_size"),
            *("moe_intermediate_size", "moe_shared_expert_intermediate_size"),
            *("shared_expert_intermediate_size", "shared_experts_intermediate_size"),
            *("shared_intermediate_size", "share_expert_dim", "expert_ffn_hidden_size"),
            *("ffn_hidden_size", "encoder_ffn_dim", "projection_intermediate_size", "mlp_dim"),
        ),
        FEATURES,
    ),
    "router_hidden_size": 16,
    "hidden_size_per_layer_input": 8,
    "downsample_hidden_size": 16,
    "position_embedding_size": 64,
    "num_position_embeddings": 16,
    "enable_moe_block": True,
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), NUM_EXPERTS
    ),
    "zero_expert_num": 2,
    **dict.fromkeys(
        (
            *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k"),
            *("moe_topk", "moe_top_k", "n_group", "num_expert_group"),
        ),
        2,
    ),
    "topk_group": 1,
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_heads", "num_heads", "swa_num_attention_heads"),
            *("num_sliding_attention_heads", "encoder_attention_heads"),
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    "v_head_dim": 8,
    "use_sliding_window": True,
    "sliding_window": 8,  # shorter than a prompt with what is generated
    "sliding_window_size": 8,
    "attention_chunk_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "rotary_dim": 4,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "d_rel": 8,
    "rel_extent": 16,
    # linear attention and state spaces
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads"), 4),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_dt_rank"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 8),
    "n_groups": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
DENSE_FIRST = ["dense", "sparse", "sparse"]
DOTS3 = {"head_dim": 16, "per_layer_config": {}}
ERNIE = {
    "text_config": {
        "moe_intermediate_size": [FEATURES, 16],
        "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]},
    },
}
QWEN4 = {
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
# What a class needs beside SIZES: to be built, to have all its kinds of layers, to have two layers
# with experts.
OVERRIDES: dict[str, dict[str, Any]] = {
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": NUM_EXPERTS, "moe_top_k": 2, "ffn_hidden_size": FEATURES},
    },
    "DeepseekOcr2ForConditionalGeneration": {"text_config": {"mlp_layer_types": DENSE_FIRST}},
    "Dots3NoteForCausalLM": DOTS3,
    "Dots3NoteForConditionalGeneration": {
        "text_config": DOTS3,
        "audio_config": {"adapter_input_size": HIDDEN},
    },
    "Ernie4_5_VLMoeForConditionalGeneration": ERNIE,
    "Ernie4_5_VL_MoeForConditionalGeneration": ERNIE,
    "Glm4vMoeForConditionalGeneration": {
        "text_config": {
            "head_dim": 16,
            "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]},
        },
    },
    "Glm5NextForConditionalGeneration": {"text_config": {"index_kpool": 4, "qk_rope_head_dim": 0}},
    "GraniteMoeHybridForCausalLM": {"layer_types": LINEAR},
    "JambaForCausalLM": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "LagunaForCausalLM": {"layer_types": SLIDING},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention", "conv"]},
    "MellumForCausalLM": {"layer_types": SLIDING, "mlp_layer_types": DENSE_FIRST},
    "MuseSparkForConditionalGeneration": {
        "audio_config": {
            "num_hidden_layers": 1,
            "patch_sizes": [16],
            "hidden_sizes": [8],
            "depths": [1],
        },
    },
    "NemotronHForCausalLM": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"]
    },
    "Qwen2MoeForCausalLM": {"layer_types": SLIDING},
    "Qwen3OmniMoeThinkerForConditionalGeneration": {
        "text_config": {"mlp_only_layers": [0]},
        "vision_start_token_id": VOCABULARY - 1,  # asked for, and only a larger config has it
    },
    "Qwen4ExpForCausalLM": QWEN4,
    "Qwen4ExpForConditionalGeneration": {"text_config": QWEN4},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}
# Lists with an entry for each layer, which says of what kind it is.
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")

PROMPTS = (7, 3, 5)
NEW_TOKENS = 6


@dataclass(frozen=True)
class WholeModel:
    """A class of transformers that generates text, in a module that defines experts."""

    family: str
    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def cls(self) -> Any:
        """The class itself."""
        return getattr(_module(self.family), self.name)

    @property
    def loads_as(self) -> str | None:
        """The class that `qmoe.load` makes of its checkpoints; None where there is no such class.

        Of a model that sees, this can be the part that reads and writes.
        """
        config = self.cls.config_class
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
            if config in auto._model_mapping:
                name: str = auto._model_mapping[config].__name__
                return name
        return None

    @torch.no_grad()
    def build(self) -> PreTrainedModel:
        """The model, in fp32, every weight of which matters to its output."""
        torch.manual_seed(0)
        model = self.cls(_small(self.cls.config_class, OVERRIDES.get(self.name, {}))).eval()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            if "bias" in name or tensor.ndim > 1:
                tensor.normal_(std=0.3)  # far from zero, so that greedy choices are no near ties
            else:  # norms, and what decays in linear attention
                tensor.add_(torch.randn_like(tensor), alpha=0.2)
        model.generation_config = GenerationConfig(pad_token_id=0)
        return model


def generating_classes() -> list[WholeModel]:
    """Each class that generates, of the modules that define experts."""
    families = dict.fromkeys(experts_class.model for experts_class in zoo.experts_classes())
    return [
        WholeModel(family, name)
        for family in families
        for name, value in vars(_module(family)).items()
        if isinstance(value, type)
        and value.__module__ == _module(family).__name__
        and issubclass(value, PreTrainedModel)
        and value.can_generate()
    ]


def _module(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _small(cls: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of the class with small sizes, and layers of all kinds that it mixes."""
    default: Any = cls()
    defaults = default.to_dict()
    parts = getattr(cls, "sub_configs", {})
    values = {
        name: SIZES[name]
        for name, value in defaults.items()
        # Lists have an entry for each layer. Latent attention derives its head_dim.
        if name in SIZES
        and not isinstance(value, (list, dict))
        and (name != "head_dim" or name in {field.name for field in dataclasses.fields(cls)})
    }
    for name in parts:
        part = getattr(default, name)
        if part is not None or name in overrides:
            of = type(part) if part is not None else parts[name]
            values[name] = _small(of, overrides.get(name, {}))
    values |= {name: value for name, value in overrides.items() if name not in parts}
    if "kv_lora_rank" in defaults and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # keys are made of a latent
    kinds = [
        name for name in KINDS if isinstance(defaults.get(name), list) and name not in overrides
    ]
    if kinds:
        layers = list(zip(*(defaults[name] for name in kinds), strict=True))
        # The first of each kind, and as many of the last ones as are missing.
        chosen = {layers.index(layer) for layer in layers}
        for index in reversed(range(len(layers))):
            if len(chosen) < NUM_LAYERS:
                chosen.add(index)
        values["num_hidden_layers"] = len(chosen)
        for place, name in enumerate(kinds):
            values[name] = [layers[index][place] for index in sorted(chosen)]
    return cls(**values)


# ---- what becomes of one -----------------------------------------------------------------------


class Failure(AssertionError):
    """Other tokens than transformers', or an error where there should be a text or a refusal."""


def sweep(whole: WholeModel, folder: Path) -> tuple[str, str]:
    """Save a model, convert it, load it resident and paged, and generate in every way.

    Returns:
        How its experts are stored after the conversion, and what decodes it: ``"qmoe"``,
        ``"transformers: REASON"``, or why there is nothing to decode. A class that is loaded as
        another one is followed by that one's name.

    Raises:
        Failure: see there.
    """
    if whole.loads_as is None:
        return "-", "not loaded: no AutoModel for text has it"
    try:
        model = whole.build()
    except ImportError as error:
        return "-", f"not tried: {error}"
    model.save_pretrained(folder / "source")
    try:
        report = convert(folder / "source", folder / "converted", device="cpu", workers=1)
    except ConversionError as error:
        return "-", f"refused: {_refusal(model, error)}"
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "activations": "bf16"}
    resident = qmoe.load(folder / "converted", **options)
    if type(resident).__name__ != whole.loads_as:
        raise Failure(f"loaded as {type(resident).__name__}")
    greedy, sampled = _generate(resident), _generate(resident, seed=1)
    if len(torch.cat((greedy, sampled))[:, max(PROMPTS) :].unique()) < 4:
        raise Failure("its weights repeat few tokens, so that little is shown")
    quantized = qmoe.load(folder / "source", weights="int8", **options)
    if not torch.equal(_generate(quantized), greedy):
        raise Failure("the converted checkpoint gives other tokens than the source, quantized")
    told = _compare("resident, greedy", resident, greedy)
    told |= _compare("resident, sampled", resident, sampled, seed=1)

    sizes: dict[str, Any] = {"context": 16, "batch_size": len(PROMPTS)}
    try:
        qmoe.resize(resident, hbm_budget=1, **sizes)
    except ValueError as error:
        smallest = int(re.findall(r"\((\d+) bytes\)", str(error))[0])
    paged = qmoe.load(folder / "converted", hbm_budget=smallest, **sizes, **options)
    if not torch.equal(_generate(paged), greedy):
        raise Failure("paged: transformers' own loop gives other tokens than resident")
    told |= _compare("paged, greedy", paged, greedy)
    counts = qmoe.stats(paged)
    if not counts.misses or counts.num_slots >= counts.num_pages:
        raise Failure(f"nothing was paged: {counts}")
    loaded = f", as {whole.loads_as}" if whole.loads_as != whole.name else ""
    return report.format, (" and ".join(sorted(told)) or "qmoe") + loaded


def convert_and_load(
    whole: WholeModel, folder: Path, weights: WeightFormat = "int8", **options: Any
) -> PreTrainedModel:
    """Convert a model to ``folder``, with what `alone` expects of it there; returns it loaded."""
    with tempfile.TemporaryDirectory() as source:
        whole.build().save_pretrained(source)
        convert(source, folder, weights=weights, device="cpu", workers=1, verify=False, **options)
    model = qmoe.load(folder, device="cpu", dtype="float32", activations="bf16")
    torch.save(alone.logits(model), folder / alone.EXPECTED)
    return model


def _refusal(model: PreTrainedModel, error: ConversionError) -> str:
    """Why `qmoe.patch` refuses it too; its message names no folder."""
    try:
        qmoe.patch(model)
    except ValueError as refusal:
        return str(refusal)
    raise Failure(f"qmoe.patch takes it, the conversion does not: {error}") from error


def _compare(what: str, model: Any, expected: Tensor, seed: int | None = None) -> set[str]:
    """Generate with `qmoe.decode`; the warnings that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _generate(model, seed, custom_generate=qmoe.decode)
    if not torch.equal(found, expected):
        raise Failure(f"{what}: {found.tolist()} instead of {expected.tolist()}")
    return set(_reasons(str(warning.message) for warning in caught))


def _reasons(messages: Iterator[str]) -> Iterator[str]:
    for message in messages:
        if match := re.search(r" decodes by transformers' own loop: (.*)", message):
            yield f"transformers: {match[1]}"
        elif " decodes " in message:
            yield message


def _generate(model: Any, seed: int | None = None, **options: Any) -> Tensor:
    """Tokens after three prompts, padded on the left; greedy without a seed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, VOCABULARY, (len(PROMPTS), max(PROMPTS)), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(PROMPTS):
        mask[row, : max(PROMPTS) - length] = 0
    if seed is not None:
        torch.manual_seed(seed)
    return model.generate(
        ids * mask,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=seed is not None,
        **options,
    )
