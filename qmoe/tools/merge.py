"""merge(): an adapter that PEFT trained becomes a part of a checkpoint's weights.

What takes seconds to import is imported after arguments are checked.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from qmoe.exits import printable
from qmoe.sizes import format_size

if TYPE_CHECKING:
    from qmoe_kernels.quantization import WeightFormat

MAX_SHARD_SIZE = "5GB"


def merge(
    checkpoint: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    weights: WeightFormat | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Path:
    """Write a checkpoint with an adapter merged into its weights, experts' adapters too.

    Everything happens on the CPU, in 16 bit: the whole model must fit into memory in the dtype that
    its checkpoint has (two bytes a weight), and what the adapter adds to the experts of one layer
    twice beside it. ``output`` is complete or absent.

    An adapter that was trained on 8-bit experts may be merged into the 16-bit checkpoint that they
    were made of, which loses less than merging it into the converted one: there each weight has
    been rounded to 8 bits already.

    Args:
        checkpoint: a model's folder, 16 bit or converted.
        adapter: a folder that PEFT saved a LoRA adapter to, trained on 8-bit experts or on 16 bit.
        output: the folder to write; it must not exist. Beside it there is room for the merged
            checkpoint in 16 bit.
        weights: None writes a 16-bit checkpoint; ``"int8"`` or ``"fp8"`` one whose experts are
            quantized again, as ``convert-checkpoint`` writes it.
        progress: told what is being done, one line at a time.

    Returns:
        ``output``.

    Raises:
        FileExistsError: ``output`` is there.
        FileNotFoundError: no such folder.
        ValueError: a checkpoint that cannot be loaded, no adapter, one that is no LoRA, does not
            fit the model or holds NaN, an unknown format, or PEFT is not installed.
        OSError: the disk has too little room, or cannot be written.

    Example:
        >>> import qmoe
        >>> qmoe.merge("qwen3-int8", "my-adapter", "qwen3-mine", weights="int8")  # doctest: +SKIP
    """
    checkpoint, adapter, output = Path(checkpoint), Path(adapter), Path(output)
    check_arguments(checkpoint, adapter, output, weights)
    from qmoe.checkpoints.inspection import inspect_checkpoint

    inspect_checkpoint(checkpoint)  # its headers: whatever is wrong with them is said at once
    config = _read_config(adapter)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.merging-", dir=output.absolute().parent))
    try:
        merged = work / f"{checkpoint.resolve().name}-{adapter.resolve().name}"
        _write_merged(checkpoint, adapter, config, merged, weights is not None, progress)
        if weights is None:
            _check_absent(output)
            os.rename(merged, output)
        else:
            from qmoe_convert.convert import convert

            progress(f"quantizing experts to {weights} and verifying them")
            convert(merged, output, weights=weights, max_shard_size=MAX_SHARD_SIZE)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return output


def check_arguments(checkpoint: Path, adapter: Path, output: Path, weights: str | None) -> None:
    """Raise what `merge` raises of arguments that cannot work; nothing is loaded."""
    if weights not in (None, "int8", "fp8"):
        raise ValueError(f"weights={weights!r}; None, 'int8' and 'fp8' work")
    for folder in (checkpoint, adapter, output.absolute().parent):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    if not (adapter / "adapter_config.json").is_file():
        named = sorted(file.parent.name for file in adapter.glob("*/adapter_config.json"))
        raise ValueError(
            f"{adapter}: no adapter, it has no adapter_config.json; give "
            + (
                f"one of those in it: {', '.join(named[:5])}"
                if named
                else "the folder that save_pretrained of PEFT wrote"
            )
        )
    _check_absent(output)
    if find_spec("peft") is None:
        raise ValueError("merging an adapter needs PEFT, which is not installed: pip install peft")


def _check_absent(output: Path) -> None:
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists; choose another folder")


def _write_merged(
    checkpoint: Path,
    adapter: Path,
    config: Any,
    folder: Path,
    converted_later: bool,
    progress: Callable[[str], None],
) -> None:
    """Write the merged model to ``folder``, in 16 bit."""
    from qmoe.experts.quantized import quantized_modules
    from qmoe.loading.load import load
    from qmoe.loading.patch import unpatch
    from qmoe_convert.small_files import copy_small_file, small_files

    progress(f"loading {checkpoint.name}")
    model: Any = load(checkpoint, device="cpu")
    if quantized_modules(model):
        model = unpatch(model)
    progress(f"merging {adapter.name}")
    model = _merged(model, adapter, config)
    num_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    num_bytes += num_bytes // 2 if converted_later else 0
    free = shutil.disk_usage(folder.parent).free
    if num_bytes > free:
        raise OSError(
            f"{folder.parent.parent}: the disk has {format_size(free)} free, and the merged "
            f"checkpoint takes {format_size(num_bytes)}; make room"
        )
    progress("writing the merged checkpoint")
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    for file in small_files(checkpoint):
        target = folder / file.relative_to(checkpoint)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            copy_small_file(file, target)


def _read_config(adapter: Path) -> Any:
    """The configuration of a LoRA adapter; its weights are looked at, not read."""
    import peft
    from safetensors import SafetensorError, safe_open

    try:
        config = peft.PeftConfig.from_pretrained(str(adapter))
    except (TypeError, ValueError, KeyError) as error:
        why = printable(str(error))
        raise ValueError(f"{adapter / 'adapter_config.json'}: cannot be read: {why}") from None
    if config.peft_type != peft.PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{adapter}: an adapter of the kind {kind}; LORA can be merged")
    if config.layer_replication:
        raise ValueError(
            f"{adapter}: it repeats layers (layer_replication), which then share weights; one "
            "without that can be merged"
        )
    config.inference_mode = True
    file = adapter / "adapter_model.safetensors"
    if file.is_file():
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file}: cannot be read: {printable(str(error))}") from None
    elif not (adapter / "adapter_model.bin").is_file():
        raise ValueError(f"{adapter}: no weights, adapter_model.safetensors is not there")
    return config


def _merged(model: Any, adapter: Path, config: Any) -> Any:
    """The model with the adapter in its weights."""
    import peft
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    try:
        adapted = peft.PeftModel(model, config)
        found = adapted.load_adapter(str(adapter), "default")
        tokens = Counter(
            id(module.get_base_layer().weight)
            for module in adapted.modules()
            if isinstance(module, TrainableTokensLayer)
        )
        for module in adapted.modules():
            if isinstance(module, LoraLayer | TrainableTokensLayer):
                weight = getattr(module.get_base_layer(), "weight", None)
                tied = names.get(id(weight), [])
                # Tokens of an embedding are learned for all that share its weight, as PEFT has it.
                if len(tied) > 1 and tokens[id(weight)] != len(tied):
                    raise ValueError(
                        f"it adapts one of {' and '.join(tied)}, which are one weight in this "
                        "model; an adapter without it can be merged"
                    )
        if found.missing_keys or found.unexpected_keys:
            few = (*found.missing_keys, *found.unexpected_keys)[:2]
            raise ValueError(
                f"{len(found.missing_keys)} of its tensors are missing and "
                f"{len(found.unexpected_keys)} belong to nothing ({', '.join(few)})"
            )
        return adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, KeyError, TypeError, UnpicklingError) as error:
        raise ValueError(
            f"{adapter}: does not fit {type(model).__name__}: {printable(str(error))[:300]}"
        ) from None
