"""OUT and what lies beside it: nothing is lost, leaked or mixed, wherever a run ends."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qmoe_convert.output as output_module
from qmoe.checkpoints.schema import QMOE, Manifest, Shard
from qmoe_convert import ConversionError
from qmoe_convert.convert import convert
from qmoe_convert.journal import Entry
from qmoe_convert.output import Output

from .conftest import build, contents

ROOT = Path(__file__).parents[2]
SMALL = {"max_shard_size": "30kB", "verify": False, "workers": 1}


class Killed(BaseException):
    """As much of kill -9 as one process can show: nothing on disk changes any more."""


@contextmanager
def killed_at(call: int, *names: str) -> Iterator[None]:
    """Let the call of that number to these functions of `os` never happen, nor any after it."""
    calls = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > call:
                raise Killed
            return real(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, wrap(getattr(os, name)))
        yield


def write(out: Path, value: str, *, resume: bool = False, overwrite: bool = False) -> None:
    """What `convert` does with an `Output`, with a shard of a few bytes."""
    output, name = Output(out), "model.safetensors"
    with output.held():
        output.open(resume=resume, overwrite=overwrite)
        if not output.published:
            output.begin(1, resume=resume)
            if name not in output.journal.shards:
                (output.new / name).write_text(value)
                output.journal.shards[name] = Entry("", sha256(value), 0, [])
                output.journal.write()
            config = '{"quantization_config": {"quant_method": "qmoe"}}'
            (output.new / "config.json").write_text(config)
            shards = {name: Shard(sha256(value), len(value))}
            files = {"config.json": sha256(config)}
            Manifest("int8", QMOE, "", "", shards, files=files).write(output.new)
            output.publish()
        output.clean()


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def value_of(folder: Path) -> str:
    return (folder / "model.safetensors").read_text()


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output that stands already."""
    write(tmp_path / "out", "old")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    folder = tmp_path_factory.mktemp("source") / "source"
    build("qwen3_moe").save_pretrained(folder, max_shard_size="50kB")
    return folder


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}, {}])
def test_a_kill_anywhere_loses_nothing(
    tmp_path: Path, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each call that changes the disk; then another run of each kind."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    seen, value = [], "afresh" if "overwrite" in options else "new"
    for at in range(200):
        folder = tmp_path / str(at)
        out = folder / "out"
        folder.mkdir()
        write(out, "old")
        alone = tree(folder)
        try:
            with killed_at(at, "rename", "unlink", "rmdir", "mkdir", "fsync"):
                write(out, "new", overwrite=True)
            break
        except Killed:
            kept = out if out.exists() else folder / "out.partial" / "old"
        before, done = value_of(kept), True
        try:
            write(out, value, **options)
        except FileExistsError:
            done = False
        assert value_of(out) == (value if done else before)
        assert tree(folder) == alone or not done
        seen.append((kept.name, before, done))
    states = list(dict.fromkeys(seen))
    if "resume" in options:  # before the journal says what was begun, and after all is done
        assert states == [
            ("out", "old", False),
            ("out", "old", True),
            ("old", "old", True),
            ("out", "new", True),
            ("out", "new", False),
        ]
    else:
        done = bool(options)
        assert states == [("out", "old", done), ("old", "old", done), ("out", "new", done)]


class TestWhatIsReplaced:
    def refused(self, out: Path, message: str, **options: bool) -> None:
        """A conversion is refused in one line, and changes nothing."""
        before = contents(out.parent)
        with pytest.raises((FileExistsError, ConversionError), match=message) as error:
            write(out, "new", **options)
        assert "\n" not in str(error.value) and contents(out.parent) == before
        assert not out.with_name("out.partial.lock").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda out: (out / "thesis.txt").write_text("x"), "holds thesis.txt besides"),
            (lambda out: (out / "a" / "b").mkdir(parents=True), None),
            (lambda out: (out / "model.safetensors").unlink(), "not what its qmoe_manifest"),
            (lambda out: (out / "model.safetensors").write_text("longer"), "not what its qmoe_man"),
            (
                lambda out: (out / "model.safetensors").write_text("own"),
                "safetensors that was chan",
            ),
            (
                lambda out: (out / "config.json").open("a").write(" "),
                "config.json that was changed",
            ),
            (lambda out: os.mkfifo(out / "card.md"), "holds card.md, which is no file"),
            (lambda out: (out / "card.md").symlink_to("gone"), "holds card.md, which is no file"),
            (lambda out: (out / "config.json").write_text("{}"), "is another folder"),
            (lambda out: [file.unlink() for file in out.iterdir()], None),
            (lambda out: (shutil.rmtree(out), out.mkdir(), (out / "x").touch()), "another folder"),
            (lambda out: (shutil.rmtree(out), out.write_text("x")), "is a file"),
            (lambda out: (out.rename(out.with_name("o")), out.symlink_to("o")), "a link to o"),
        ],
    )
    def test_only_what_we_wrote(
        self, out: Path, change: Callable[[Path], Any], message: str | None
    ) -> None:
        change(out)
        self.refused(out, "exists; choose another folder or use --overwrite")
        if message is None:
            write(out, "new", overwrite=True)
            assert value_of(out) == "new"
        else:
            self.refused(
                out, f"--overwrite replaces only what .* wrote, and .*{message}", overwrite=True
            )

    def test_what_changes_while_a_conversion_runs(self, out: Path) -> None:
        output = Output(out)
        with output.held():
            output.open(resume=False, overwrite=True)
            output.begin(1, resume=False)
            (out / "model.safetensors").write_text("own")
            with pytest.raises(ConversionError, match="has changed while this run was under way"):
                output.publish()
        assert value_of(out) == "own"

    @pytest.mark.parametrize("path", ["out/../out", "../out", "."])
    def test_a_path_that_leads_through_it(
        self, out: Path, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(out.parent if path.startswith("out") else out)
        write(Path(path), "new", overwrite=True)
        assert value_of(out) == "new" and os.listdir(out.parent) == ["out"]

    def test_no_mount_point(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
        self.refused(out, "is a mount point", overwrite=True)

    @pytest.mark.parametrize("name", ["out.replaced", "out.partial"])
    def test_folders_of_the_user(self, out: Path, name: str) -> None:
        theirs = out.with_name(name) / "thesis.txt"
        theirs.parent.mkdir()
        theirs.write_text("x")
        if name == "out.partial":
            for options in ({}, {"resume": True}, {"overwrite": True}):
                self.refused(out, "is no unfinished conversion.*move it", **options)
        else:
            write(out, "new", overwrite=True)
        assert theirs.read_text() == "x"

    def test_the_source(self, tmp_path: Path) -> None:
        """Not its folder, what holds it or lies in it, nor where a Hub cache keeps its blobs."""
        cache = tmp_path / "hub" / "models--x--y"
        snapshot, blobs = cache / "snapshots" / "main", cache / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        build("qwen3_moe").save_pretrained(blobs)
        for blob in blobs.iterdir():
            (snapshot / blob.name).symlink_to(blob)
        (tmp_path / "link").symlink_to(blobs)
        (tmp_path / "out.partial").mkdir()
        shutil.copytree(blobs, tmp_path / "out.partial" / "source")
        before = contents(tmp_path)
        outs = [snapshot, snapshot / "x", snapshot / "model.safetensors", blobs, cache.parent]
        pairs = [(snapshot, out) for out in (*outs, tmp_path / "link")]
        for source, out in (*pairs, (tmp_path / "out.partial" / "source", tmp_path / "out")):
            with pytest.raises((ConversionError, FileExistsError)):
                convert(source, out, overwrite=True)
        assert contents(tmp_path) == before


class TestLock:
    def test_a_second_thread(self, source: Path, tmp_path: Path) -> None:
        refusals = []

        def again() -> None:
            for options in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(ConversionError) as error:
                    convert(source, tmp_path / "out", weights="fp8", **options)
                refusals.append(str(error.value))

        def progress(*call: Any) -> None:
            if not refusals:
                thread = threading.Thread(target=again)
                thread.start()
                thread.join()

        convert(source, tmp_path / "out", progress=progress, verify=False)
        assert len(refusals) == 3 and "--overwrite" not in "".join(refusals)
        assert f"another run, process {os.getpid()} on " in refusals[0]
        assert Manifest.read(tmp_path / "out").weights == "int8"
        assert os.listdir(tmp_path) == ["out"]

    def test_a_process_that_is_killed(self, tmp_path: Path) -> None:
        script = (
            "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire();"
            "print('held', flush=True); time.sleep(60)"
        )
        lock = tmp_path / "out.partial.lock"
        command = [sys.executable, "-c", script, str(lock)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            with pytest.raises(ConversionError, match="is being written by another run"):
                write(tmp_path / "out", "new")
            process.kill()
        write(tmp_path / "out", "new")
        assert not lock.exists()

    def test_only_one_at_a_time(self, tmp_path: Path) -> None:
        """While lock files come and go, no two hold one."""
        holders, most, rounds = 0, 0, 0

        def hold() -> None:
            nonlocal holders, most, rounds
            for _ in range(40):
                try:
                    with Output(tmp_path / "out").held():
                        holders += 1
                        most = max(most, holders)
                        holders -= 1
                        rounds += 1
                except ConversionError:
                    pass

        threads = [threading.Thread(target=hold) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == 1 and rounds > 40 and not list(tmp_path.iterdir())

    def test_a_file_system_without_locks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def acquire(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(output_module.FileLock, "acquire", acquire)
        with pytest.raises(ConversionError, match=r"has no locks .No locks available.*another"):
            write(tmp_path / "out", "new")

    def test_a_file_of_the_user_in_its_place(self, tmp_path: Path) -> None:
        (tmp_path / "out.partial.lock").write_text("poetry")
        with pytest.raises(ConversionError, match="stands where our lock would"):
            write(tmp_path / "out", "new")
        assert (tmp_path / "out.partial.lock").read_text() == "poetry"

    def test_a_folder_in_its_place(self, tmp_path: Path) -> None:
        (tmp_path / "out.partial.lock").mkdir()
        with pytest.raises(ConversionError, match="stands where our lock would"):
            write(tmp_path / "out", "new")

    @pytest.mark.parametrize("length", [250, 300])
    def test_a_name_that_is_too_long(self, tmp_path: Path, length: int) -> None:
        with pytest.raises(ConversionError, match=rf"^x+\.\.\.: a name of {length} bytes is too"):
            write(tmp_path / ("x" * length), "new")
        assert not list(tmp_path.iterdir())


def interrupted(source: Path, out: Path, **options: Any) -> dict[str, int]:
    """Interrupt a conversion when three shards are whole; returns their inodes."""

    def progress(stage: str, done: int, total: int) -> None:
        if len(list(out.with_name("out.partial").glob("new/*.safetensors"))) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=progress, **SMALL, **options)
    return inodes(out.with_name("out.partial") / "new")


def inodes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_ino for file in folder.glob("*.safetensors")}


publish = Output.publish


def kill() -> None:
    raise Killed


class TestResume:
    @pytest.fixture
    def expected(self, source: Path, tmp_path: Path) -> dict[str, bytes]:
        """What an undisturbed conversion gives."""
        convert(source, tmp_path / "whole", **SMALL)
        found = contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "whole")
        return found

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_an_interrupted_overwrite(
        self, source: Path, out: Path, expected: dict[str, bytes], overwrite: bool
    ) -> None:
        whole = interrupted(source, out, overwrite=True)
        assert value_of(out) == "old"
        convert(source, out, resume=True, overwrite=overwrite, **SMALL)
        assert contents(out) == expected and os.listdir(out.parent) == ["out"]
        assert len(whole.items() & inodes(out).items()) >= 2

    def test_what_came_to_be_meanwhile_is_not_replaced(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        interrupted(source, out)
        write(tmp_path / "other", "theirs")
        (tmp_path / "other").rename(out)
        with pytest.raises(FileExistsError):
            convert(source, out, resume=True, **SMALL)
        assert value_of(out) == "theirs"
        convert(source, out, resume=True, overwrite=True, **SMALL)
        assert (out / "model.safetensors.index.json").exists()

    @pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EACCES])
    def test_a_name_that_cannot_be_given(
        self, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        """The old output stays, and ``--resume`` writes and verifies nothing again."""
        rename = os.rename

        def refuse(source: Any, target: Any) -> None:
            if Path(target) == out and Path(source).name == "new":
                raise OSError(code, os.strerror(code))
            rename(source, target)

        options = {"max_shard_size": "30kB"}
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", refuse)
            with pytest.raises(
                ConversionError, match=r"out: cannot be given .* is complete in .*resume"
            ):
                convert(source, out, overwrite=True, **options)
        assert value_of(out) == "old"
        monkeypatch.setattr("qmoe_convert.verify._Check", None)
        monkeypatch.setattr("qmoe_convert.write.ShardWriter", None)
        assert convert(source, out, resume=True, **options).verified
        assert os.listdir(out.parent) == ["out"] and (out / "README.md").exists() in (True, False)

    def test_a_kill_before_each_rename(
        self, source: Path, tmp_path: Path, expected: dict[str, bytes]
    ) -> None:
        out = tmp_path / "out"
        for at in range(100):
            try:
                with killed_at(at, "rename"):
                    convert(source, out, **SMALL)
                break
            except Killed:
                assert convert(source, out, resume=True, **SMALL).errors
            assert contents(out) == expected and os.listdir(tmp_path) == ["out"]
            shutil.rmtree(out)
        assert at > 10

    def test_a_report_after_a_kill_at_the_end(self, source: Path, tmp_path: Path) -> None:
        """OUT stands already; what is left is to say so."""
        out = tmp_path / "out"
        with pytest.raises(Killed), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Output, "publish", lambda self: (publish(self), kill()))
            convert(source, out, **SMALL)
        with pytest.raises(ConversionError, match="begun with --weights int8"):
            convert(source, out, resume=True, weights="fp8", **SMALL)
        assert convert(source, out, resume=True, **SMALL).errors
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize("change", ["touched", "bits"])
    def test_shards_are_what_was_written(
        self, source: Path, tmp_path: Path, expected: dict[str, bytes], change: str
    ) -> None:
        """Also without verifying: one that was touched is read again, one that differs is made."""
        whole = interrupted(source, tmp_path / "out")
        for file in (tmp_path / "out.partial" / "new").glob("*.safetensors"):
            data = bytearray(file.read_bytes())
            data[-1] ^= change == "bits"
            file.write_bytes(data)
        with ExitStack() as stack:
            for file in (tmp_path / "out.partial" / "new").iterdir():
                stack.enter_context(file.open())  # or its inode would be given to another file
            convert(source, tmp_path / "out", resume=True, **SMALL)
        assert contents(tmp_path / "out") == expected
        kept = whole.items() & inodes(tmp_path / "out").items()
        assert len(kept) >= 2 if change == "touched" else not kept

    def test_a_fault_in_one_file_of_the_source(self, source: Path, tmp_path: Path) -> None:
        """What was made of the other files is kept, and kept when that file is downloaded again."""
        folder, out = tmp_path / "copy", tmp_path / "out"
        shutil.copytree(source, folder)
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
        (file,) = (
            f for f in folder.glob("*.safetensors") if name in f.read_bytes().decode("latin1")
        )
        good, tensors = file.read_bytes(), load_file(file)
        tensors[name][0, 0] = torch.nan
        save_file(tensors, file)
        with pytest.raises(ConversionError, match=f"NaN in {name}.*--resume"):
            convert(folder, out, **SMALL)
        whole = inodes(tmp_path / "out.partial" / "new")
        file.write_bytes(good)
        convert(folder, out, resume=True, **SMALL)
        assert whole.items() & inodes(out).items()
        convert(folder, tmp_path / "afresh", **SMALL)
        assert contents(out) == contents(tmp_path / "afresh")


class TestTheSource:
    @pytest.mark.parametrize("how", ["replaced", "written", "at the end", "gone", "its folder"])
    def test_changes_while_it_is_read(self, source: Path, tmp_path: Path, how: str) -> None:
        folder, out, changed = tmp_path / "copy", tmp_path / "out", []
        shutil.copytree(source, folder)

        def change(stage: str, done: int, total: int) -> None:
            if changed or (how == "at the end" and done < total):
                return
            changed.extend(sorted(folder.glob("*.safetensors")))
            if how == "its folder":
                folder.rename(tmp_path / "before")
                shutil.copytree(tmp_path / "before", folder)
            for file in changed if how != "its folder" else ():
                if how == "gone":
                    file.unlink()
                elif how == "replaced":
                    shutil.copy2(file, tmp_path / "new")
                    (tmp_path / "new").replace(file)
                else:
                    file.write_bytes(file.read_bytes())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qmoe_convert.workers.IN_FLIGHT_BYTES", 1)
            message = r"\.safetensors: (changed while|No such file)"
            with pytest.raises(ConversionError, match=message):
                convert(folder, out, progress=change, **SMALL)
        assert not out.exists()

    def test_its_config_changes(self, source: Path, tmp_path: Path) -> None:
        folder = tmp_path / "copy"
        shutil.copytree(source, folder)

        def change(*call: Any) -> None:
            (folder / "config.json").touch()

        with pytest.raises(ConversionError, match=r"config\.json: changed while"):
            convert(folder, tmp_path / "out", progress=change, **SMALL)


class TestRoom:
    def test_a_full_disk_at_each_file(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """OUT.partial is blamed, not the source; the old output stays, and --resume goes on."""
        out, expected = tmp_path / "out", tmp_path / "expected"
        convert(source, expected, **SMALL)
        real, opened = io.open, []

        def full(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "w" in mode and "out.partial/" in str(file):
                opened.append(str(file))
                if len(opened) == at:
                    return real("/dev/full", mode, *args, **kwargs)
            return real(file, mode, *args, **kwargs)

        at = 0
        while True:
            at += 1
            opened.clear()
            with monkeypatch.context() as patch:
                patch.setattr(io, "open", full)
                patch.setattr("builtins.open", full)
                try:
                    convert(source, out, **SMALL)
                    break
                except ConversionError as error:
                    assert "out" in str(error).split(": ")[0] and "the disk is full" in str(error)
            assert not out.exists()
            convert(source, out, resume=True, **SMALL)
            assert contents(out) == contents(expected)
            shutil.rmtree(out)
        assert any("generation_config" in file for file in opened) and at > 8

    def test_a_refusal_leaves_nothing(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "copy"
        shutil.copytree(source, folder)
        shards = sum(convert(source, tmp_path / "out", dry_run=True).shards.values())
        (folder / "tokenizer.json").write_bytes(bytes(10_000_000))
        before, free = contents(tmp_path), shards + 5_000_000
        usage = type("usage", (), {"free": free})()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ConversionError, match=r"out: 1\d.* MB are needed, 5.* MB are free"):
            convert(folder, tmp_path / "out")
        assert contents(tmp_path) == before
        usage.free = 1 << 40
        interrupted(folder, tmp_path / "out")
        usage.free, before = free, contents(tmp_path)
        with pytest.raises(ConversionError, match="are needed"):
            convert(folder, tmp_path / "out", overwrite=True)
        assert contents(tmp_path) == before
