"""Files that somebody else wrote, broken at random: each ends in a result or in one line.

QMOE_FUZZ_SECONDS makes it go on for longer; a failure names the seed that repeats it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qmoe
from qmoe.checkpoints.files import check_folder
from qmoe.checkpoints.inspection import inspect_checkpoint
from qmoe.checkpoints.schema import MANIFEST_NAME, Manifest
from qmoe.traces.trace import RoutingTrace, synthetic_trace
from qmoe_convert.convert import convert

from .conftest import build

SECONDS = float(os.environ.get("QMOE_FUZZ_SECONDS", "8"))
SECONDS_PER_CASE = 5.0
BYTES_IN_ALL = 400e6
SIZES = [0, 1, -1, 3, 10**5, 2**31, 2**63, 10**30, 1e308, float("inf"), float("nan"), 0.5]
VALUES: list[Any] = [
    *SIZES,
    *([size] for size in SIZES),
    *(None, True, "", "x", "a\nb\x1b[31m", "\ud800", "9" * 5000, "../up", "x" * 10_000),
    *([], {}, [[]], {"a": {}}, [None], {"quant_method": "fp8"}, ["x"] * 2000, [0] * 2000),
]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def mutate_json(text: str, rng: random.Random) -> str:
    """The text with one value replaced, removed, renamed or nested deeply."""
    try:
        root = {"": json.loads(text)}
    except (ValueError, RecursionError):  # broken before
        return text
    places: list[tuple[Any, Any]] = []
    parts: list[Any] = [root]
    while parts:
        part = parts.pop()
        items = list(part.items() if isinstance(part, dict) else enumerate(part))
        places += [(part, key) for key, _ in items]
        parts += [value for _, value in items if isinstance(value, (dict, list))]
    part, key = rng.choice(places)
    what = rng.random()
    if what < 0.1 and part is not root:
        del part[key]
    elif what < 0.2 and isinstance(part, dict) and part is not root:
        part[rng.choice(["\n", "__metadata__", "x" * 5000, *root[""]])] = part.pop(key)
    elif what < 0.25:
        part[key] = "DEEP"
        depth = rng.choice([90, 950, 50_000])
        return json.dumps(root[""]).replace('"DEEP"', "[" * depth + "]" * depth, 1)
    else:
        part[key] = rng.choice(VALUES)
    return json.dumps(root[""])


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw or b"\0")
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(min(len(changed), 2000))] = rng.randrange(256)
    return bytes(changed[: rng.choice([len(changed), rng.randrange(len(changed))])])


def mutate_header(raw: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, whose length fits."""
    length = int.from_bytes(raw[:8], "little")
    header = mutate_json(raw[8 : 8 + length].decode(errors="replace"), rng).encode()
    return len(header).to_bytes(8, "little") + header + raw[8 + length :]


def break_file(file: Path, rng: random.Random) -> None:
    what = rng.random()
    if what < 0.06:
        file.unlink()
        rng.choice(
            [
                lambda: None,
                lambda: os.mkfifo(file),
                lambda: file.mkdir(),
                lambda: file.symlink_to("/dev/zero"),
                lambda: file.symlink_to(file.name),
                lambda: file.write_bytes(b""),
            ]
        )()
    elif what < 0.2:
        file.write_bytes(mutate_bytes(file.read_bytes(), rng))
    elif file.suffix == ".safetensors":
        file.write_bytes(mutate_header(file.read_bytes(), rng))
    else:
        file.write_text(mutate_json(file.read_text(errors="replace"), rng))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards, what it becomes, a run that was interrupted, and a trace."""
    folder = tmp_path_factory.mktemp("fuzz")
    build("qwen3_moe", hidden_size=32, moe_intermediate_size=16).save_pretrained(
        folder / "source", max_shard_size="40kB"
    )
    (folder / "source" / "tokenizer_config.json").write_text('{"auto_map": {"a": ["b.C", null]}}')
    (folder / "source" / "README.md").write_text("---\nlicense: mit\n---\n")

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder / "source", folder / "out", progress=interrupt, max_shard_size="40kB")
    convert(folder / "source", folder / "done", max_shard_size="40kB")
    synthetic_trace(4, 2, 4, 2).save(folder / "trace.safetensors")
    return folder


def targets(folder: Path) -> list[tuple[str, Callable[[], Any]]]:
    """A pattern of files that may be broken, and what reads them."""
    source, out = folder / "source", folder / "out"
    return [
        ("source/*", lambda: convert(source, folder / "new", dry_run=True)),
        ("source/config.json", lambda: convert(source, folder / "new", dry_run=True)),
        ("source/*", lambda: convert(source, folder / "new", workers=1)),
        ("source/*.safetensors", lambda: convert(source, folder / "new", dry_run=True)),
        ("out.partial/journal.json", lambda: convert(
            source, out, resume=True, max_shard_size="40kB", workers=1)),
        ("source/*", lambda: inspect_checkpoint(source)),
        ("done/*", lambda: inspect_checkpoint(folder / "done")),
        ("done/" + MANIFEST_NAME, lambda: Manifest.read(folder / "done")),
        ("trace.safetensors", lambda: RoutingTrace.load(folder / "trace.safetensors")),
        ("done/*", lambda: check_folder(folder / "done")),
        ("done/*", lambda: load(folder / "done")),
    ]  # fmt: skip


def load(folder: Path) -> None:
    """After what `check_folder` sees to, transformers has the word: no more than that it ends."""
    with contextlib.suppress(Exception):
        qmoe.load(folder, device="cpu")


def run_case(seed: int, whole: Path, folder: Path) -> None:
    rng = random.Random(seed)
    shutil.copytree(whole, folder)
    pattern, read = rng.choice(targets(folder))
    before = set(folder.rglob("*"))
    for _ in range(rng.choice([1, 1, 2])):
        files = [file for file in sorted(folder.glob(pattern)) if file.is_file()]
        if files:
            break_file(rng.choice(files), rng)
    start = time.monotonic()
    try:
        read()
    except (ValueError, FileExistsError) as error:
        message = str(error)
        assert message.isprintable() and len(message) < 1500, f"seed {seed}: {message[:3000]!r}"
        assert "this is a bug" not in message
        left = {path for path in folder.rglob("*")} - before
        assert not left, f"seed {seed}: left {left}"
    except Exception as error:
        raise AssertionError(f"seed {seed}, {pattern}: {type(error).__name__}: {error}") from error
    assert time.monotonic() - start < SECONDS_PER_CASE, f"seed {seed}, {pattern}: too slow"


def test_a_broken_file_ends_in_one_line(whole: Path, tmp_path: Path) -> None:
    memory, end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic() + SECONDS
    seed = int(os.environ.get("QMOE_FUZZ_SEED", "0"))
    while time.monotonic() < end:
        run_case(seed, whole, tmp_path / "case")
        shutil.rmtree(tmp_path / "case")
        seed += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    assert grown < BYTES_IN_ALL
