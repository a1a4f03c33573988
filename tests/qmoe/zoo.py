"""Every experts class of the installed transformers, small: found by reading its sources.

``python tests/qmoe/zoo.py`` prints docs/models.md from what it finds and runs.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import inspect
import tempfile
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
import transformers
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qmoe.experts.quantized import QuantizedExperts
from qmoe_kernels import Activation
from qmoe_kernels.quantization import WeightFormat

MODELS = Path(transformers.__file__).parent / "models"

# Experts that transformers does not dispatch through its experts interface, but qmoe takes.
UNDECORATED = {
    "dbrx": "DbrxExperts",
    "llama4": "Llama4TextExperts",
    "longcat_flash": "LongcatFlashExperts",
    "step3p7": "Step3p7Experts",
}
REFUSED = {
    "jetmoe": "JetMoeParallelExperts",
    "nllb_moe": "NllbMoeExperts",
    "switch_transformers": "SwitchTransformersExperts",
}

NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 6, 2, 48, 32
# What configurations call these sizes.
SMALL = {
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "zero_expert_num": 3,
    "hidden_size": HIDDEN,
    "moe_hidden_size": HIDDEN,
    "moe_latent_size": None,
    "intermediate_size": INTERMEDIATE,
    "moe_intermediate_size": INTERMEDIATE,
    "expert_ffn_hidden_size": INTERMEDIATE,
    "ffn_hidden_size": INTERMEDIATE,
}


@dataclass(frozen=True)
class ExpertsClass:
    """One experts class: where it stands in transformers."""

    model: str
    name: str
    decorated: bool

    def __str__(self) -> str:
        return f"{self.model}.{self.name}"

    @property
    def module(self) -> typing.Any:
        """The modeling module that defines the class."""
        return importlib.import_module(f"transformers.models.{self.model}.modeling_{self.model}")

    def build(self, seed: int = 0) -> nn.Module:
        """The experts module, small, in fp32, with random weights."""
        torch.manual_seed(seed)
        cls = getattr(self.module, self.name)
        experts = cls(self._config(cls), **self._sizes(cls))
        with torch.no_grad():
            for name, parameter in experts.named_parameters():
                spread = 1.0 if "bias" in name else HIDDEN**-0.5
                parameter.copy_(torch.randn(parameter.shape) * spread)
        return experts.eval()

    @staticmethod
    def _sizes(cls: type) -> dict[str, float]:
        """What a block hands over beside the configuration (ERNIE VL's size, Step 3.7's limit)."""
        parameters = inspect.signature(cls.__init__).parameters
        given = {"intermediate_size": INTERMEDIATE, "swiglu_limit": 1.0}
        return {name: value for name, value in given.items() if name in parameters}

    def _config(self, cls: type) -> typing.Any:
        """A configuration that this class accepts, with small sizes."""
        errors = []
        for config_class in self._config_classes(cls):
            config = config_class()
            for key, value in SMALL.items():
                # attribute_map: setting an alias sets the real name
                current = getattr(config, key, None)
                if isinstance(current, list):
                    setattr(config, key, [value] * len(current))
                elif hasattr(config, key):
                    setattr(config, key, value)
            config._experts_implementation = "eager"
            try:
                cls(config, **self._sizes(cls))
            except (AttributeError, TypeError) as error:
                errors.append(f"{config_class.__name__}: {error}")
            else:
                return config
        raise AssertionError(f"no configuration builds {self}: {errors}")

    def _config_classes(self, cls: type) -> Iterator[type]:
        module = importlib.import_module(
            f"transformers.models.{self.model}.configuration_{self.model}"
        )
        annotation = inspect.signature(cls.__init__).parameters["config"].annotation
        named = (
            getattr(module, str(annotation), None) if isinstance(annotation, str) else annotation
        )
        if isinstance(named, type) and named is not inspect.Parameter.empty:
            yield named
        for _, value in sorted(vars(module).items(), key=lambda item: "Text" not in item[0]):
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield value


def experts_classes() -> list[ExpertsClass]:
    """Every class under ``@use_experts_implementation``, and the others that qmoe takes."""
    found = []
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        model = path.parent.name
        if "use_experts_implementation" in text:
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef) and any(
                    "use_experts_implementation" in ast.dump(decorator)
                    for decorator in node.decorator_list
                ):
                    found.append(ExpertsClass(model, node.name, decorated=True))
        name = UNDECORATED.get(model)
        if name is not None and f"class {name}(" in text:
            found.append(ExpertsClass(model, name, decorated=False))
    return found


def routing(
    num_tokens: int, num_experts: int, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden states, ids without repeats, and weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    topk_ids = scores.topk(TOP_K, dim=-1).indices
    topk_weights = torch.rand(num_tokens, TOP_K, generator=generator)
    return hidden, topk_ids, topk_weights


SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts_per_tok=2,
)


def build(family: str, num_experts: int | None = None, *, num_layers: int = 2) -> PreTrainedModel:
    """A whole model, tiny, in fp32, whose experts matter to its output."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": num_layers}
    if family == "qwen3_moe":
        config = Qwen3MoeConfig(**sizes, moe_intermediate_size=32, num_experts=num_experts or 8)
        model = Qwen3MoeForCausalLM(config)
    elif family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=num_experts or 4))
    else:
        model = GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=num_experts or 4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:  # the default of 0.02 would leave nothing to see of them
                parameter.normal_(std=0.2)
    return model.eval()


TOKENS = torch.arange(18).view(2, 9)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """(2, 9, vocab_size): what the model makes of :data:`TOKENS`."""
    return model(TOKENS.to(model.device)).logits


def outputs(
    experts_class: ExpertsClass, weights: WeightFormat, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, QuantizedExperts]:
    """The quantized module's output, and eager's on the dequantized weights; fp32, random."""
    experts = experts_class.build().to(device)
    quantized = QuantizedExperts.quantized_from(experts, weights)
    layout = quantized.layout
    eager = copy.deepcopy(quantized).restore(torch.float32)
    hidden, topk_ids, topk_weights = (
        t.to(device) for t in routing(17, NUM_EXPERTS + layout.num_identity_experts)
    )
    with torch.no_grad():
        if not layout.dense:
            expected = eager(hidden, topk_ids, topk_weights)
            actual = quantized(hidden, topk_ids, topk_weights)
            # DBRX takes and returns a batch: (batch, num_tokens, hidden_size)
            return actual, expected.reshape(actual.shape), quantized
        # Llama 4 gives every expert every token, weighted beforehand, zero where not chosen.
        scores = torch.zeros(len(hidden), NUM_EXPERTS, device=device)
        scores.scatter_(1, topk_ids, topk_weights)
        dense = hidden.repeat(NUM_EXPERTS, 1) * scores.T.reshape(-1, 1)
        expected = eager(dense).unflatten(0, (NUM_EXPERTS, -1)).sum(0)
        routed = (hidden[:, None] * topk_weights[..., None]).flatten(0, 1)
        ones = torch.ones_like(topk_weights).view(-1, 1)
        actual = quantized(routed, topk_ids.view(-1, 1), ones).unflatten(0, (-1, TOP_K)).sum(1)
        return actual, expected, quantized


def document() -> str:
    """docs/models.md: what works, each row from a run of :func:`outputs`."""
    rows = []
    for experts_class in experts_classes():
        columns = []
        for weights in get_args(WeightFormat):
            actual, expected, quantized = outputs(experts_class, weights)
            columns.append(f"{(actual - expected).norm() / expected.norm():.0e}")
        layout, activation = quantized.layout, quantized.activation
        forms = {
            "transposed": layout.transposed,
            "interleaved": layout.interleaved,
            "flat": layout.flat,
            "biases": bool(layout.biases),
            "no gate": not layout.gated,
            "post-expert norm": hasattr(quantized, "post_expert_norm"),
            "identity experts": layout.num_identity_experts,
            "weighted input": layout.dense,
        }
        form = ", ".join(name for name, present in forms.items() if present) or "-"
        gate = {
            field.name: getattr(activation, field.name)
            for field in dataclasses.fields(Activation)
            if field.name not in ("name", "gated")
            and getattr(activation, field.name) != field.default
        }
        named = ", ".join(f"{key} {value}" for key, value in gate.items())
        rows.append(
            f"| {experts_class.model} | {experts_class.name} | {form} "
            f"| {activation.name}{f' ({named})' if named else ''} | {columns[0]} | {columns[1]} |"
        )
    refused = ", ".join(REFUSED)
    models = "\n".join(_whole_models())
    return f"""# Models whose experts qmoe quantizes

Every experts class of transformers {transformers.__version__}, found by reading its sources.
Each was built small, quantized and compared in fp32 with transformers' own eager forward on the
dequantized weights; the last two columns are the relative Frobenius distance of the outputs.
Generated by `make docs`; a test runs the same comparison on whatever transformers is installed.

*Stored* says where a class departs from `gate_up_proj` (experts, 2 * intermediate, hidden) and
`down_proj` (experts, hidden, intermediate). *Gate* is what qmoe's kernels compute between the two
products, with the class's default numbers.

| model | experts class | stored | gate | INT8 | FP8 |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Refused by name, because their experts are no stacked weights behind one call: {refused}. Any other
class with a stacked `down_proj` is recognized by its attributes; a gate that is none of the above
is called as it is between the two products.

## Whole models

Every class that generates text, of the modules that define these experts. Each was built small,
converted to INT8, loaded resident and paged, and generated greedily and by sampling; in each case
`qmoe.decode` gave the tokens of transformers' own loop. *Stored as* is the format of the converted
checkpoint. *Decodes by* says whose loop that is: where qmoe's cannot serve a model, transformers'
does, and a warning says why. *As* names the class that the checkpoint is loaded as, where that is
another one: a model's part for text. *Transformers alone* is what transformers does with the INT8
and the FP8 files in a process without qmoe, with the compressed-tensors package: it *reads* both,
with the same logits, or *refuses* both with an error. Files in the format `qmoe` it refuses.

| model | class | stored as | decodes by | transformers alone |
|---|---|---|---|---|
{models}
"""


def _whole_models() -> Iterator[str]:
    """The rows of all whole models."""
    import whole_models  # which imports this module

    found = {}
    for whole in whole_models.generating_classes():
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[whole] = whole_models.sweep(whole, Path(folder))
            except Exception as error:  # the test fails, and this tells where
                found[whole] = "-", f"FAILS: {type(error).__name__}: {str(error)[:80]}"
    per_expert = [whole for whole, (form, _) in found.items() if form == "compressed-tensors"]
    alone = _read_alone(per_expert)
    for whole, (form, by) in found.items():
        yield f"| {whole.family} | {whole.name} | {form} | {by} | {alone.get(whole, '-')} |"


def _read_alone(classes: Iterable[typing.Any]) -> dict[typing.Any, str]:
    """What transformers makes of both formats of these whole models in a process without qmoe."""
    import alone
    import whole_models

    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for whole in classes:
            for weights in get_args(WeightFormat):
                folder = Path(temporary) / f"{whole}-{weights}"
                whole_models.convert_and_load(whole, folder, weights)
                folders[folder] = whole
        found = alone.readings(folders)
    return {
        whole: " and ".join(sorted({found[f] for f, of in folders.items() if of == whole}))
        for whole in folders.values()
    }


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print(document(), end="")
