"""A checkpoint's safetensors files: where every tensor lies, from headers alone.

Read by the converter, by the loader and by ``qmoe inspect``; no weight is touched.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

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

# What safetensors itself refuses to read.
LARGEST_HEADER = 100_000_000


class CheckpointError(ValueError):
    """A checkpoint on disk that cannot be read; the message names the file."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor's place in a file; ``offset`` counts from the start of the file, in bytes.

    ``dtype`` is safetensors' name for it.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

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


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read a safetensors header: tensor name -> its place in the file.

    Raises:
        CheckpointError: the file is empty, truncated, or not safetensors.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
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
        header.pop("__metadata__", None)
        tensors = {name: _stored_tensor(file, name, 8 + length, header[name]) for name in header}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file}: its safetensors header cannot be read; download it again"
        ) from None
    for tensor in tensors.values():
        if tensor.offset + tensor.nbytes > size:
            raise CheckpointError(
                f"{file}: truncated at {size} bytes, {tensor.name} ends at "
                f"{tensor.offset + tensor.nbytes}; download it again"
            )
    return tensors


def _stored_tensor(file: Path, name: str, data_start: int, entry: dict[str, Any]) -> StoredTensor:
    start, stop = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    dtype = str(entry["dtype"])
    wrong_size = (
        dtype in TORCH_DTYPES and math.prod(shape) * TORCH_DTYPES[dtype].itemsize != stop - start
    )
    if not 0 <= start <= stop or any(size < 0 for size in shape) or wrong_size:
        raise CheckpointError(
            f"{file}: {name}, {dtype} of shape {list(shape)}, cannot take {stop - start} bytes; "
            "download it again"
        )
    return StoredTensor(name, file, dtype, shape, data_start + start, stop - start)


def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of a checkpoint, sharded or single: tensor name -> its place.

    Raises:
        CheckpointError: no safetensors weights, an index that is broken, names a missing file or
            one outside ``folder``, or a shard that lacks a tensor which the index promises.
    """
    index_file = folder / INDEX_NAME
    if not index_file.exists():
        single = folder / SINGLE_NAME
        if single.exists():
            return read_header(single)
        pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise CheckpointError(
                f"{folder / pickles[0]}: pickled weights are never loaded; "
                "save the model as safetensors first"
            )
        raise CheckpointError(f"{folder}: holds neither {INDEX_NAME} nor {SINGLE_NAME}")
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{index_file}: not an index of safetensors shards; download it again"
        ) from None
    headers: dict[str, dict[str, StoredTensor]] = {}
    for file in dict.fromkeys(files.values()):
        # The Hub's cache links files to its blobs, so links are followed; names must not climb out.
        if Path(file).is_absolute() or ".." in Path(file).parts or "\\" in file:
            raise CheckpointError(f"{index_file}: names {file}, which lies outside its folder")
        if not (folder / file).exists():
            raise CheckpointError(
                f"{folder / file}: missing, but {INDEX_NAME} names it; download it"
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / file}: not safetensors; pickled weights are never loaded"
            )
        headers[file] = read_header(folder / file)
    for name, file in files.items():
        if name not in headers[file]:
            raise CheckpointError(f"{folder / file}: lacks {name}, which {INDEX_NAME} promises")
    return {name: headers[file][name] for name, file in files.items()}
