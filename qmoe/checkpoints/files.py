"""A checkpoint's safetensors files: where every tensor lies, from headers alone.

Read by the converter, by the loader and by ``qmoe inspect``; no weight is touched.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# The number of one shard, and how many there are.
_SHARD = re.compile(r"-\d+(-of-\d+\.safetensors)$")

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# What safetensors itself refuses to read. No JSON file of a checkpoint is as large either.
LARGEST_HEADER = 100_000_000
# What torch itself refuses to make.
MOST_DIMENSIONS = 64
LONGEST_NAME = 500


class CheckpointError(ValueError):
    """A checkpoint on disk that cannot be read; the message names the file."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of somebody else says, or else of what kind it is."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@dataclass(frozen=True)
class FileVersion:
    """What tells a file from another that has come in its place since, or from what it was."""

    device: int
    inode: int
    size: int
    modified: int  # nanoseconds

    @classmethod
    def of(cls, file: Path | int) -> FileVersion:
        """The version that a path or a descriptor has now; links are followed."""
        status = os.stat(file)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self, file: Path, descriptor: int | None = None) -> None:
        """Refuse ``file``, or its open ``descriptor``, if it is another version by now.

        Raises:
            CheckpointError: it was replaced or changed, or is gone.
        """
        try:
            now = FileVersion.of(file if descriptor is None else descriptor)
        except FileNotFoundError:
            raise CheckpointError(f"{file}: vanished while it was read; start again") from None
        if now != self:
            raise CheckpointError(f"{file}: changed while it was read; start again")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor's place in a file; ``offset`` counts from the start of the file, in bytes.

    ``dtype`` is safetensors' name for it, ``version`` the file's when its header was read.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    version: FileVersion | None = None

    @property
    def numel(self) -> int:
        """Elements, packed ones counted as one."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it.

        Raises:
            CheckpointError: torch has no such dtype.
        """
        try:
            return TORCH_DTYPES[self.dtype]
        except KeyError:
            raise CheckpointError(
                f"{self.file}: {self.name} has dtype {self.dtype}, which torch cannot read"
            ) from None


def open_file(path: Path) -> BinaryIO:
    """Open a file of a checkpoint for reading, unbuffered.

    Raises:
        CheckpointError: there is no such file, or it is none: opening a FIFO would wait for ever.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file; put the file itself there")
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


# What git leaves in a file's place if git-lfs is not installed.
_POINTER = b"version https://git-lfs"


def _check_no_pointer(path: Path, start: bytes) -> None:
    if start.startswith(_POINTER):
        raise CheckpointError(
            f"{path}: is only a pointer of git-lfs; run git lfs pull there, or download it again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file that somebody else wrote.

    Raises:
        CheckpointError: no such file, or anything else than a JSON object in it.
    """
    with open_file(path) as stream:
        raw = stream.read(LARGEST_HEADER + 1)
    _check_no_pointer(path, raw)
    if raw.startswith(codecs.BOM_UTF8):
        raise CheckpointError(
            f"{path}: begins with a byte order mark, which transformers does not read; save it as "
            "UTF-8 without one"
        )
    if len(raw) > LARGEST_HEADER:
        raise CheckpointError(f"{path}: larger than {LARGEST_HEADER} bytes; download it again")
    try:
        value = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise CheckpointError(
            f"{path}: JSON that is nested too deeply; download it again"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object; download it again")
    return value


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read a safetensors header: tensor name -> its place in the file.

    Raises:
        CheckpointError: the file is empty, truncated, or not safetensors.
    """
    with open_file(file) as stream:
        version = FileVersion.of(stream.fileno())
        size = version.size
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start == _POINTER[:8]:
            _check_no_pointer(file, start + stream.read(99))
        if size == 0:
            raise CheckpointError(f"{file}: the file is empty; download it again")
        if size < 8 or length < 2 or length > LARGEST_HEADER:
            raise CheckpointError(f"{file}: not a safetensors file; download it again")
        if 8 + length > size:
            raise CheckpointError(
                f"{file}: truncated inside its header ({size} bytes); download it again"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError
        tensors = {
            name: replace(_stored_tensor(file, name, 8 + length, entry), version=version)
            for name, entry in header.items()
        }
    except CheckpointError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise CheckpointError(
            f"{file}: its safetensors header cannot be read; download it again"
        ) from None
    for tensor in tensors.values():
        if tensor.offset + tensor.nbytes > size:
            raise CheckpointError(
                f"{file}: truncated at {size} bytes, {tensor.name} ends at "
                f"{tensor.offset + tensor.nbytes}; download it again"
            )
    # As safetensors has it: nothing lies between two tensors, and no byte is of two.
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{file}: {tensor.name} begins at {tensor.offset}, what lies before it ends at "
                f"{end}; download it again"
            )
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(f"{file}: {size - end} bytes too long; download it again")
    return tensors


def _stored_tensor(file: Path, name: str, data_start: int, entry: dict[str, Any]) -> StoredTensor:
    """Check one entry of a header; raises TypeError or ValueError if it is malformed."""
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS:
        raise TypeError
    if any(type(size) is not int or abs(size) >= 1 << 63 for size in (*shape, start, stop)):
        raise TypeError
    if not _is_name(name) or not _is_name(dtype):
        raise ValueError
    wrong_size = (
        dtype in TORCH_DTYPES and math.prod(shape) * TORCH_DTYPES[dtype].itemsize != stop - start
    )
    if not 0 <= start <= stop or min(shape, default=0) < 0 or wrong_size:
        raise CheckpointError(
            f"{file}: {name}, {dtype} of shape {shape}, cannot take {stop - start} bytes; "
            "download it again"
        )
    return StoredTensor(name, file, dtype, tuple(shape), data_start + start, stop - start)


def _is_name(text: str) -> bool:
    """Whether a name can be in messages of one line, in headers and in JSON."""
    return text.isprintable() and len(text) <= LONGEST_NAME


# Of a config, how many modules a model is built of: a number, or a list with an item for each.
_COUNT = re.compile(
    r"(n|num)_(\w+_)?(layers?|blocks|labels|experts)|depth|\w+coder_layers"
    r"|\w*(layer|block)\w*types?|\w+_pattern"
)


def check_config(file: Path, config: dict[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a config that asks for more layers or experts than the checkpoint can hold, or for -1.

    A module costs time and memory even on the meta device, so this comes before a model is built.
    Layers and experts are numbered in the tensors' names, or are a dimension. A tower that is not
    in the checkpoint has to be as small as real ones.

    Args:
        file: the config's, for the message.
        config: as JSON.
        tensors: every tensor of the checkpoint.

    Raises:
        CheckpointError: naming the number.
    """
    numbers = {n for name in tensors for n in re.findall(r"(?<![^._])\d{1,6}(?![^._])", name)}
    most_layers = 256 + min(len(tensors), 2 * max(map(int, numbers), default=0))
    most_experts = max([4096, most_layers, *(n for t in tensors.values() for n in t.shape)])
    parts = [config]
    while parts:
        for key, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            elif key == "quantization_config" and value is not None:
                raise CheckpointError(
                    f"{file}: {key} is {value!r:.40} and no object; if the weights are in 16 bit, "
                    "take it out"
                )
            elif key == "num_hidden_layers" and isinstance(value, int) and value < 0:
                raise CheckpointError(f"{file}: {key} is {value}; download it again")
            elif _COUNT.fullmatch(key):
                count = len(value) if isinstance(value, (str, list)) else value
                most = most_experts if key.endswith(("experts", "labels")) else most_layers
                if isinstance(count, (int, float)) and count > most:
                    raise CheckpointError(
                        f"{file}: {key} stands for {count!s:.20}, more than the checkpoint's "
                        f"tensors could fill ({most}); check that it belongs to these weights"
                    )


def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of a checkpoint, sharded or single: tensor name -> its place.

    What transformers would load is taken: ``model.safetensors``, or else every tensor of every
    shard that the index names. What others would read otherwise is refused.

    Raises:
        CheckpointError: no safetensors weights, an index that is broken, names a missing file or
            one outside ``folder``, or a shard that lacks a tensor which the index promises; or two
            files that may both be meant.
    """
    index_file, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if not index_file.exists():
        if single.exists():
            return read_header(single)
        raise _no_weights(folder)
    try:
        weight_map = read_json(index_file)["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
        if not all(map(_is_name, (*files, *files.values()))):
            raise KeyError
    except (KeyError, AttributeError):
        raise CheckpointError(
            f"{index_file}: not an index of safetensors shards; download it again"
        ) from None
    shards: dict[str, list[str]] = {file: [] for file in sorted(set(files.values()))}
    for name, file in files.items():
        shards[file].append(name)
    for file in shards:
        # The Hub's cache links files to its blobs, so links are followed; names must not climb out.
        if Path(file).is_absolute() or ".." in Path(file).parts or "\\" in file:
            raise CheckpointError(f"{index_file}: names {file}, which lies outside its folder")
    if single.exists():
        _check_single(folder, [file for file in shards if file != SINGLE_NAME])
        return read_header(single)
    return _open_shards(folder, shards)


def _check_single(folder: Path, shards: list[str]) -> None:
    """Refuse shards beside ``model.safetensors``: transformers takes the latter, others both."""
    there = [file for file in shards if (folder / file).exists()]
    if there:
        raise CheckpointError(
            f"{folder}: holds {SINGLE_NAME} and {there[0]}, each said to be the model's weights; "
            f"remove {SINGLE_NAME}, or {INDEX_NAME} and its shards"
        )


def _open_shards(folder: Path, shards: dict[str, list[str]]) -> dict[str, StoredTensor]:
    """Every tensor of ``shards``: file name -> the tensors that the index says are there."""
    tensors: dict[str, StoredTensor] = {}
    for file, promised in shards.items():
        if not (folder / file).exists():
            raise CheckpointError(
                f"{folder / file}: missing, but {INDEX_NAME} names it; download it"
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / file}: not safetensors; pickled weights are never loaded"
            )
        header = read_header(folder / file)
        for name in promised:
            if name not in header:
                raise CheckpointError(f"{folder / file}: lacks {name}, which {INDEX_NAME} promises")
        # Of a tensor in two shards transformers takes the last, whatever the index says.
        if twice := (header.keys() & tensors.keys()) - set(promised):
            name = min(twice)
            raise CheckpointError(
                f"{folder / file}: holds {name}, and so does {tensors[name].file.name}; "
                "download both again"
            )
        tensors |= header
    _check_beside(folder, shards)
    return tensors


def _check_beside(folder: Path, shards: Collection[str]) -> None:
    """Refuse a shard of the same set that the index does not name."""
    sets = {_SHARD.sub(r"-*\1", file) for file in shards if _SHARD.search(file)}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in shards and _SHARD.sub(r"-*\1", path.name) in sets:
            raise CheckpointError(
                f"{path}: lies beside the shards that {INDEX_NAME} names, but is not named itself; "
                "download the index again, or remove the file"
            )


def check_mxfp4(tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse MXFP4 scales in another dtype than the bytes that transformers takes them for.

    Of F8_E8M0 it takes the powers of two, nearly all below one, for exponents: weights of zero.

    Raises:
        CheckpointError: naming the scales.
    """
    for name, scales in tensors.items():
        stem = name.removesuffix("_scales")
        if stem != name and f"{stem}_blocks" in tensors and scales.dtype != "U8":
            raise CheckpointError(
                f"{scales.file}: {name} is {scales.dtype}, and transformers reads MXFP4 scales "
                "as U8; save the same bytes as that"
            )


def ends_in_cut_block(size: int, num_scales: int, block: int) -> bool:
    """Whether a dimension of an FP8 weight, with so many scales, ends inside of a block.

    transformers divides the size by the number of scales there: 192 rows in blocks of 128 have two
    scales, and it takes them for two blocks of 96.
    """
    return size % block != 0 and 1 < num_scales == -(-size // block)


def check_folder(folder: Path) -> None:
    """Refuse a folder that nothing should try to build a model of; only headers are read.

    Raises:
        CheckpointError: its config, its index or a shard cannot be read, or they do not go
            together.
    """
    tensors = open_checkpoint(folder)
    index = folder / INDEX_NAME
    sharded = index.exists() and not (folder / SINGLE_NAME).exists()
    if sharded and not isinstance(read_json(index).get("metadata"), dict):
        raise CheckpointError(
            f'{index}: lacks "metadata", an object that transformers reads; download it again'
        )
    file = folder / "config.json"
    check_config(file, read_json(file), tensors)
    check_generation_config(folder)


def check_generation_config(folder: Path) -> None:
    """Refuse a generation_config.json that cannot be read: transformers would do without it.

    Raises:
        CheckpointError: naming the file.
    """
    file = folder / "generation_config.json"
    if file.exists():
        read_json(file)


# Weights in other forms, by how their names begin or end, and what to do about them.
_OTHER_WEIGHTS = (
    (r"adapter_model\.\w+|adapter_config\.json", "an adapter and not a model; merge it into its "
     "base model (qmoe merge), and take the merged one"),
    (r"consolidated.*", "weights under their authors' own names, which transformers does not "
     "read; take the repository's model*.safetensors"),
    (r".*\.gguf", "GGUF, which is not read here; take the safetensors original"),
    (rf"{re.escape(SINGLE_NAME)}.+", "a part of a download; download the rest"),
    (r".*\.safetensors", f"weights that neither {INDEX_NAME} nor the name {SINGLE_NAME} tells "
     "to be all of a model; download the index, or give the file that name"),
    (r".*\.(bin|pt|pth|pkl|ckpt)", "pickled weights are never loaded; save the model as "
     "safetensors first"),
    (r".*\.(h5|msgpack|onnx|npz)|.*\.ckpt\..*", "weights of another framework; save the model as "
     "safetensors first"),
)  # fmt: skip


def _no_weights(folder: Path) -> CheckpointError:
    """Say what a folder holds instead of safetensors weights that can be read."""
    names = sorted(path.name for path in folder.iterdir())
    for pattern, text in _OTHER_WEIGHTS:
        for name in names:
            if re.fullmatch(pattern, name):
                empty = (folder / name).is_file() and (folder / name).stat().st_size == 0
                return CheckpointError(f"{folder / name}: {'empty; ' if empty else ''}{text}")
    config = "" if "config.json" in names else "no config.json, and "
    return CheckpointError(f"{folder}: holds {config}neither {INDEX_NAME} nor {SINGLE_NAME}")
