"""How much of what rounding cost the shipped model its routers can win back.

``python -m benchmarks.adapt_router`` converts examples/tiny-moe to INT8 and FP8, and rounds INT8's
values further: to 4 and 3 bits per channel, and to MXFP4's values (blocks of 32 along K with a
power of two each; of 16 where K is no multiple of 32). Each is then given to `adapt_router` with
the 16-bit model as its teacher. It learns from the standard library's sources that
examples/train_tiny_moe.py chose its best step by: neither model was trained on them. Perplexities
are of examples/tiny-moe/heldout.txt, none of whose files are among them. Results go to
``benchmarks/results/adapt_router.json``. Needs no GPU.
"""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qmoe
from benchmarks.options import check_sections, parser_of
from benchmarks.record import Results, facts, run_sections
from qmoe.generation import load_tokenizer
from qmoe.tools.adapt_router import adapt_router
from qmoe.tools.demo import HELD_OUT, SHIPPED_MODEL
from qmoe_convert.convert import convert
from qmoe_kernels.quantization import quantize

RESULTS = Path(__file__).parent / "results" / "adapt_router.json"
WINDOW = 512
MAX_TOKENS = 16384
FORMATS = ("int8", "fp8", "4bit", "3bit", "mxfp4")
# e2m1, whose largest exponent is 2.
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
WON_BACK = 0.5  # of the perplexity that fewer than 8 bits lost


def round_to_bits(values: Tensor, bits: int) -> Tensor:
    """INT8 values of a channel, rounded to those of fewer bits with the same largest one."""
    most = 2 ** (bits - 1) - 1
    return torch.round(torch.round(values.float() * most / 127) * 127 / most).to(torch.int8)


def round_to_mxfp4(weights: Tensor) -> Tensor:
    """(rows, K) fp32 with the nearest values of MXFP4, scales rounded down as its standard does."""
    size = 16 if weights.shape[1] % 32 else 32
    blocks = weights.view(len(weights), -1, size)
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.exp2(torch.floor(torch.log2(largest)) - 2)
    nearest = ((blocks / scale).abs()[..., None] - MAGNITUDES).abs().argmin(-1)
    return (MAGNITUDES[nearest] * blocks.sign() * scale).view_as(weights)


def round_experts(folder: Path, how: str) -> None:
    """Round the experts of an INT8 checkpoint further, in the same format."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, values in tensors.items():
        if values.dtype != torch.int8:
            continue
        if how == "mxfp4":
            scale = tensors[f"{name}_scale"]
            q, new_scale = quantize(round_to_mxfp4(values.float() * scale)[None], "int8")
            values.copy_(q[0])
            scale.copy_(new_scale[0, :, None])
        else:
            values.copy_(round_to_bits(values, int(how[0])))
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "qmoe_manifest.json").unlink()  # its checksums are those of before


@contextmanager
def routed_by(model: Any, teacher: Any) -> Iterator[None]:
    """Give every token of the model the experts and weights that the teacher's routers choose.

    This bounds what routers that choose as before could win back.
    """
    chosen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: chosen.update({name: output})

    def give(name: str) -> Any:
        return lambda module, args, output: chosen[name]

    hooks = [model.register_forward_pre_hook(lambda _, args, kwargs: (teacher(**kwargs), None)[1],
                                             with_kwargs=True)]  # fmt: skip
    for of, hook in ((teacher, keep), (model, give)):
        for name, module in of.named_modules():
            if name.endswith("mlp.gate"):
                hooks.append(module.register_forward_hook(hook(name)))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def training_text() -> str:
    """The files of this Python's library that examples/train_tiny_moe.py validates on."""
    sys.path.insert(0, str(SHIPPED_MODEL.parent))
    try:
        from train_tiny_moe import split_sources
    finally:
        sys.path.pop(0)
    return split_sources(Path(sysconfig.get_path("stdlib")))["validation"].joined


def run(results: Results, name: str, tiny: bool, learning: dict[str, Any]) -> None:
    """Perplexities of one format, before and after."""
    tokenizer = load_tokenizer(str(SHIPPED_MODEL))
    held_out = (SHIPPED_MODEL / HELD_OUT).read_text(encoding="utf-8")

    def perplexity(path: Path, model: Any = None) -> float:
        tokens = 1024 if tiny else MAX_TOKENS
        model = model or qmoe.load(path, device="cpu")
        return qmoe.perplexity(model, tokenizer, held_out, window=WINDOW, max_tokens=tokens)

    with tempfile.TemporaryDirectory() as temporary:
        data, folder, out = (Path(temporary) / leaf for leaf in ("text.txt", "model", "out"))
        data.write_text(training_text()[: 60_000 if tiny else None], encoding="utf-8")
        weights = name if name in ("int8", "fp8") else "int8"
        convert(SHIPPED_MODEL, folder, weights=weights, device="cpu")
        if name != weights:
            round_experts(folder, name)
        adapted = adapt_router(
            folder, out, teacher=SHIPPED_MODEL, data=data, device="cpu", **learning
        )
        teacher, before, after = map(perplexity, (SHIPPED_MODEL, folder, out))
        model = qmoe.load(folder, device="cpu")
        with routed_by(model, qmoe.load(SHIPPED_MODEL, device="cpu")):
            routed = perplexity(folder, model)
    results.set(
        **learning,
        teacher=teacher,
        before=before,
        after=after,
        with_the_teachers_routing=routed,
        won_back=round((before - after) / (before - teacher), 4),
        kl_before=adapted.before.kl,
        kl_after=adapted.after.kl,
        best_step=adapted.after.step,
        learning_seconds=round(adapted.seconds, 1),
        measured=[asdict(measured) for measured in adapted.measured],
    )


def targets(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached, and was measured."""
    found = []
    for name, section in sections.items():
        if "after" not in section:
            continue
        if name in ("int8", "fp8"):
            row = {"what": f"{name}: perplexity after over before", "target": 1.0}
            measured = round(section["after"] / section["before"], 5)
            found.append(row | {"measured": measured, "met": measured <= 1.0})
        else:
            row = {"what": f"{name}: share won back", "target": WON_BACK}
            measured = section["won_back"]
            found.append(row | {"measured": measured, "met": measured >= WON_BACK})
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 if it failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = parser_of(__doc__, FORMATS, RESULTS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args(arguments)
    if options.draw:
        parser.error("there is no picture of these")
    only = check_sections(parser, options, FORMATS)
    learning = {"steps": options.steps, "batch": options.batch, "lr": options.lr}
    if options.tiny:
        learning |= {"steps": 1, "batch": 1}
    common = facts("adapt_router", arguments, options.commit)
    results = Results("adapt_router", options.out, common, targets)
    formats = {name: partial(run, results, name, options.tiny, learning) for name in only}
    return run_sections(results, formats)


if __name__ == "__main__":
    sys.exit(main())
