"""OUT, and what lies beside it while routers learn; `AdaptedOutput` is the one owner of all of it.

::

    OUT.partial.lock     held for the whole run
    OUT.partial/
        run.json             what was asked for, how far the teacher came, and what came out
        training.safetensors the routers and their optimizer
        targets/             what the teacher said
        teacher/             its weights, where they do not fit into memory
        new/                 what OUT will be

OUT is complete or absent. It gets its name as a conversion's does, see `qmoe_convert.output`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe.checkpoints.files import INDEX_NAME, CheckpointError, StoredTensor, read_json
from qmoe.checkpoints.schema import MANIFEST_NAME, Manifest, Shard
from qmoe.sizes import format_size
from qmoe_convert.card import CARD_NAME
from qmoe_convert.convert import find_source
from qmoe_convert.output import Output, files_in, remove
from qmoe_convert.shards import sha256_of
from qmoe_convert.small_files import small_files

__all__ = ["AdaptedOutput", "find_source"]


# Of this machine, or long.
_NOT_KEPT = ("out", "seconds", "measured")


class AdaptedOutput:
    """The folder OUT, and its `OUT.partial`.

    Attributes:
        recorded: how many windows the teacher has read.
        result: what :meth:`publish` was told, once OUT is whole; None before.
    """

    def __init__(self, out: Path) -> None:
        self._output = Output(out)
        self.work = self._output.work
        self.targets, self.teacher = self.work / "targets", self.work / "teacher"
        self.training = self.work / "training.safetensors"
        self._run = self.work / "run.json"
        self._options: dict[str, str] = {}
        self.recorded = 0
        self.result: dict[str, Any] | None = None

    @property
    def out(self) -> Path:
        """The folder to write."""
        return self._output.out

    def held(self) -> AbstractContextManager[None]:
        """Keep every other process and thread out."""
        return self._output.held()

    def open(self, options: dict[str, str], *, resume: bool) -> None:
        """Find out what is there, and whether this run may go on with it.

        Args:
            options: what decides the result, for a run that is resumed.

        Raises:
            FileExistsError: OUT is there, or what an interrupted run left.
            CheckpointError: the latter is another run's, or something else.
        """
        self._options = options
        if os.path.lexists(self.work):
            self._open_work(options, resume=resume)
        if os.path.lexists(self.out) and self.result is None:
            raise FileExistsError(f"{self.out} exists; choose another folder")

    def _open_work(self, options: dict[str, str], *, resume: bool) -> None:
        known = {"run.json", "run.json.new", "training.safetensors", "training.safetensors.new"}
        known |= {"targets", "teacher", "new"}
        is_folder = self.work.is_dir() and not self.work.is_symlink()
        names = set(os.listdir(self.work)) if is_folder else {"a file"}
        if not names <= known or not (names <= {"run.json.new"} or self._run.is_file()):
            raise CheckpointError(
                f"{self.work}: is no unfinished run of adapt-router, but would lie in the way of "
                "one; move it, or choose another OUT"
            )
        if not resume:
            raise FileExistsError(
                f"{self.work} is left from an interrupted run; use --resume to go on with it, or "
                "remove it to start afresh"
            )
        if not self._run.is_file():
            return
        run = read_json(self._run)
        before: dict[str, str] = run.get("options", {})
        for name, now in options.items():
            if before.get(name) != now:
                raise CheckpointError(
                    f"{self.work} was begun with {name} {before.get(name)}, and this is {name} "
                    f"{now}; repeat it with the former to go on, or remove {self.work} to start "
                    "afresh"
                )
        self.recorded = int(run.get("recorded", 0))
        # OUT is published in one step, so `new` is gone once it is.
        if os.path.lexists(self.out) and not os.path.lexists(self._output.new):
            self.result = run.get("result")

    def begin(self, needed: int, source: Path, files: Mapping[str, StoredTensor]) -> None:
        """Make room for the run.

        Args:
            needed: bytes that will be written at most.
            source: the folder of the converted checkpoint.
            files: its tensors.

        Raises:
            CheckpointError: the disk has less room, or OUT would lie in the source.
        """
        self._output.check_apart(source, {tensor.file for tensor in files.values()})
        there = self.work if self.work.exists() else self.out.absolute().parent
        has = sum(path.lstat().st_size for path in files_in(self.work))
        free = shutil.disk_usage(there).free + has
        if needed > free:
            raise CheckpointError(
                f"{self.out}: {format_size(needed)} are needed, {format_size(free)} are free; "
                "make room or choose another disk. Less data, or none of --layers, needs less"
            )
        self.work.mkdir(exist_ok=True)
        self._write_run()

    def keep_recorded(self, count: int) -> None:
        """Remember that the teacher has read so many windows, which are on the disk."""
        self.recorded = count
        self._write_run()

    def _write_run(self) -> None:
        run = {"options": self._options, "recorded": self.recorded, "result": self.result}
        new = self._run.with_name("run.json.new")
        new.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        os.replace(new, self._run)

    # ---- the end -------------------------------------------------------------------------------

    def publish(
        self,
        source: Path,
        tensors: Mapping[str, StoredTensor],
        stored: Mapping[str, StoredTensor],
        routers: Mapping[str, Tensor],
        result: dict[str, Any],
        told: str,
    ) -> None:
        """Write OUT: the source's files, with the routers' bytes replaced.

        Args:
            source: the folder of the converted checkpoint.
            tensors: all of them.
            stored: where each router lies in it.
            routers: each in the dtype that it is stored in.
            result: kept for a run that is resumed after this, and most of it in the manifest.
            told: a paragraph for the card.
        """
        new = self._output.new
        remove(new)
        new.mkdir()
        versions = {place.file: place.version for place in tensors.values()}
        for file in sorted(versions):
            shutil.copyfile(file, new / file.name)
        for name, tensor in routers.items():
            with open(new / stored[name].file.name, "r+b") as stream:
                stream.seek(stored[name].offset)
                stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for file, version in versions.items():
            if version is not None:  # what was copied is what was trained
                version.check(file)
        others = [f for f in (source / "config.json", source / INDEX_NAME) if f.is_file()]
        for file in (*small_files(source), *others):
            target = new / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        if (source / CARD_NAME).is_file():
            card = (source / CARD_NAME).read_text(encoding="utf-8", errors="replace")
            (new / CARD_NAME).write_text(f"{card.rstrip()}\n\n{told}", encoding="utf-8")
        if (source / MANIFEST_NAME).is_file():
            self._write_manifest(Manifest.read(source), result)
        self.result = result
        self._write_run()
        self._output.publish()

    def _write_manifest(self, manifest: Manifest, result: dict[str, Any]) -> None:
        new = self._output.new
        sums = {f.relative_to(new).as_posix(): sha256_of(f) for f in sorted(files_in(new))}
        replace(
            manifest,
            shards={
                name: Shard(sums[name], shard.bytes) for name, shard in manifest.shards.items()
            },
            files={name: s for name, s in sums.items() if name not in manifest.shards},
            routers={key: value for key, value in result.items() if key not in _NOT_KEPT},
        ).write(new)

    def forget_teacher(self) -> None:
        """Remove the teacher's weights; what it said is kept."""
        remove(self.teacher)

    def clean(self) -> None:
        """Remove what lies beside OUT; run.json goes last, for it says whose all that is."""
        training = (self.training.with_name("training.safetensors.new"), self.training)
        for path in (self.targets, self.teacher, self._output.new, *training):
            remove(path)
        for path in (self._run.with_name("run.json.new"), self._run):
            remove(path)
        if self.work.exists():
            self.work.rmdir()
