"""OUT, and what lies beside it while it is written; `Output` is the one owner of all of it.

::

    OUT.partial.lock     held for the whole run; who holds it stands in it
    OUT.partial/
        journal.json     the shards that are whole
        new/             what OUT will be
        old/             what OUT was, while it is replaced
        removed/         the same once it is out of use

Publishing is three renames: OUT becomes ``old``, ``new`` becomes OUT, ``old`` becomes ``removed``.
Wherever a run is killed, what is there tells the next one how far it came, so nothing else keeps
track of it: OUT is absent, the old output or the new one, and the old one is never lost before the
new one stands in its place.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from qmoe.checkpoints import schema
from qmoe.checkpoints.files import FileVersion, read_json
from qmoe.sizes import format_size
from qmoe_convert import ConversionError
from qmoe_convert.journal import JOURNAL_NAME, Journal
from qmoe_convert.shards import PARTIAL_SUFFIX, sha256_of
from qmoe_convert.workers import Progress, counting

# What the lock file begins with.
HOLDER = "convert-checkpoint, process "
# For the moment in which the run before takes its lock file away.
LOCK_SECONDS = 0.3


def _silent(stage: str, done: int, total: int) -> None:
    """Tell nobody how far it is."""


class Output:
    """The folder OUT, and its `OUT.partial`.

    Attributes:
        out: the folder to write.
        work: what lies beside it meanwhile.
        new, old, removed: see above.
        journal: of the run that is under way, or was interrupted.
    """

    def __init__(self, out: Path, progress: Progress = _silent) -> None:
        if out.name in ("", ".."):
            out = out.resolve()
        if ".." in out.parts:  # its own path may lead through OUT, which is renamed
            out = out.parent.resolve() / out.name
        if not out.name:
            raise ValueError(f"out={str(out)!r}; give the name of a folder")
        self.out = out
        self._progress = progress
        # What is to be replaced, since it was found to be as we left it.
        self._replaced: dict[Path, FileVersion] | None = None
        self.work = out.with_name(out.name + PARTIAL_SUFFIX)
        self.new, self.old, self.removed = (self.work / n for n in ("new", "old", "removed"))
        self.journal = Journal(self.work / JOURNAL_NAME)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process and thread out; a kill ends it too.

        Raises:
            ConversionError: another one writes OUT, or its file system has no locks.
        """
        if not self.out.absolute().parent.is_dir():
            raise ConversionError(f"{self.out.parent}: no such folder; create it first")
        file = self.work.with_name(self.work.name + ".lock")
        if os.path.isdir(file) or ((text := _text(file)) and not text.startswith(HOLDER)):
            raise ConversionError(
                f"{file}: stands where our lock would; move it, or choose another OUT"
            )
        lock = FileLock(file, timeout=LOCK_SECONDS, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            holder = _text(file).removeprefix(HOLDER) or "unknown"
            raise ConversionError(
                f"{self.out}: is being written by another run, process {holder}; wait until "
                "it is done, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise ConversionError(
                    f"{self.out.parent}: its file system has no locks ({error.strerror}), so two "
                    "conversions could mix; write to another one"
                ) from None
            if error.errno == errno.ENAMETOOLONG:
                raise ConversionError(
                    f"{self.out.name:.20}...: a name of {len(os.fsencode(self.out.name))} bytes is "
                    f"too long, {file.name.removeprefix(self.out.name)} is put behind it; choose a "
                    "shorter one"
                ) from None
            raise
        try:
            with suppress(OSError):
                file.write_text(f"{HOLDER}{os.getpid()} on {socket.gethostname()}")
            yield
        finally:
            try:
                # Before the lock is let go: who waits for this file then finds that it is gone.
                with suppress(OSError):
                    os.unlink(file)
            finally:
                lock.release()

    # Before anything is read

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Find out what is there, and whether this run may go on with it or replace it.

        Raises:
            FileExistsError: something is there that was not asked to be.
            ConversionError: something is there that we did not write.
        """
        if os.path.lexists(self.work):
            self._open_work()
            if self.published and not resume:
                self.clean()
                self.journal = Journal(self.journal.file)
        if os.path.lexists(self.work) and not (resume or overwrite):
            raise FileExistsError(
                f"{self.work} is left from an interrupted run; use --resume to go on with it "
                "or --overwrite to start afresh"
            )
        self.journal.overwrite |= overwrite
        if os.path.lexists(self.out) and not self.published:
            if not self.journal.overwrite:
                raise FileExistsError(
                    f"{self.out} exists; choose another folder or use --overwrite"
                )
            self._check_replaceable()

    def _open_work(self) -> None:
        """Read the journal that an earlier run left, and put back what it had moved away."""
        is_folder = self.work.is_dir() and not self.work.is_symlink()
        names = set(os.listdir(self.work)) if is_folder else {"a file"}
        journal = Journal.read(self.journal.file)
        first = {f"{JOURNAL_NAME}.new"}  # killed before there was a journal
        known = {JOURNAL_NAME, *first, self.new.name, self.old.name, self.removed.name}
        if not names <= (known if journal else first):
            raise ConversionError(
                f"{self.work}: is no unfinished conversion, but would lie in the way of one; "
                "move it, or choose another OUT"
            )
        self.journal = journal or self.journal
        if os.path.lexists(self.old):
            if not os.path.lexists(self.out):
                os.rename(self.old, self.out)
            elif not self.published:
                raise ConversionError(
                    f"{self.old} is what {self.out} was before a run that was interrupted, and "
                    "something else is there now; move one of them"
                )

    @property
    def published(self) -> bool:
        """Whether OUT is what the journal tells of."""
        if os.path.lexists(self.new) or not self.journal.shards or why_not_ours(self.out):
            return False
        shards = schema.Manifest.read(self.out).shards
        ours = {name: entry.sha256 for name, entry in self.journal.shards.items()}
        return {name: shard.sha256 for name, shard in shards.items()} == ours

    def _check_replaceable(self) -> None:
        """Refuse to replace what is not ours, byte for byte, or is not any more what it was."""
        why = why_not_ours(self.out)
        if why is None:
            found = {path: FileVersion.of(path) for path in files_in(self.out)}
            if self._replaced is None:
                why = self._why_changed()
            elif found != self._replaced:
                why = "has changed while this run was under way"
            self._replaced = found
        if why is not None:
            raise FileExistsError(
                f"{self.out}: --overwrite replaces only what convert-checkpoint wrote, and it {why}"
            )

    def _why_changed(self) -> str | None:
        """Which file of OUT has other bytes than we wrote; all of it is read."""
        if not any(self.out.iterdir()):
            return None
        manifest = schema.Manifest.read(self.out)
        written = {name: shard.sha256 for name, shard in manifest.shards.items()} | manifest.files
        total = sum((self.out / name).stat().st_size for name in written)
        advance = counting(self._progress, "check OUT", total)
        for name, sha256 in written.items():
            file = self.out / name
            if sha256_of(file) != sha256:
                return f"holds a {name} that was changed since; move that away"
            advance(file.stat().st_size)
        return None

    def check_apart(self, source: Path, files: Iterable[Path]) -> None:
        """Refuse to write where anything of the checkpoint lies.

        Args:
            source: its folder.
            files: of its weights; links may lead to other folders, such as a Hub cache's blobs.

        Raises:
            ConversionError: OUT or OUT.partial holds a part of it, or lies in its folder.
        """
        folder = source.resolve()
        # Not Path.resolve, which raises where links go round in a circle.
        parts = {folder, *(Path(os.path.realpath(p)) for p in (*source.iterdir(), *files))}
        places = {place for part in parts for place in (part, *part.parents)}
        parent = self.out.absolute().parent.resolve()
        for target in (parent / self.out.name, parent / self.work.name):
            if target in places or folder in target.parents:
                raise ConversionError(
                    f"{self.out}: lies in the checkpoint that is read, {source}, or would replace "
                    "a part of it; choose another folder"
                )

    # While it is written

    def begin(self, needed: int, *, resume: bool) -> None:
        """Make room for the run; without ``resume``, in place of what an earlier one left.

        Args:
            needed: bytes that will be written.
            resume: keep the shards that the journal names.

        Raises:
            ConversionError: the disk has less room; nothing was made.
        """
        whole = self.journal.shards if resume else {}
        left = [path for path in files_in(self.work) if not (resume and path.name in whole)]
        there = self.work if self.work.exists() else self.out.absolute().parent
        free = shutil.disk_usage(there).free + sum(path.lstat().st_size for path in left)
        if needed > free:
            raise ConversionError(
                f"{self.out}: {format_size(needed)} are needed, {format_size(free)} are free; "
                "the disk is full, make room or choose another"
            )
        if not resume:
            self.clean()
        self.journal.shards = whole
        self.work.mkdir(exist_ok=True)
        self.journal.write()
        self.new.mkdir(exist_ok=True)
        for path in self.new.iterdir():
            if path.name not in whole:
                remove(path)

    def publish(self) -> None:
        """Give the finished folder its name; what stood there before goes only then.

        Raises:
            ConversionError: OUT cannot be given that name; ``--resume`` then does only this.
        """
        for path in (*self.new.rglob("*"), self.new, self.work):
            _sync(path)
        try:
            if os.path.lexists(self.out):
                if not self.journal.overwrite:
                    raise FileExistsError(errno.EEXIST, "something else is there by now")
                self._check_replaceable()
                os.rename(self.out, self.old)
            os.rename(self.new, self.out)
        except OSError as error:
            raise ConversionError(
                f"{self.out}: cannot be given its name ({error.strerror or error}); the checkpoint "
                f"is complete in {self.new}, clear the way and go on with --resume"
            ) from None
        finally:
            if os.path.lexists(self.old) and not os.path.lexists(self.out):
                os.rename(self.old, self.out)
        _sync(self.out.absolute().parent)

    def clean(self) -> None:
        """Remove what lies beside OUT; the journal goes last, for it says whose all that is."""
        if os.path.lexists(self.old):
            # What is removed in part must not be put back.
            os.rename(self.old, self.removed)
        first = self.journal.file.with_name(f"{JOURNAL_NAME}.new")
        for path in (self.removed, self.new, first, self.journal.file):
            remove(path)
        if self.work.exists():
            self.work.rmdir()


def why_not_ours(out: Path) -> str | None:
    """Why a folder is not as convert-checkpoint leaves it, or empty; None if it is."""
    if out.is_symlink():
        return f"is a link to {os.readlink(out)}"
    if not out.is_dir():
        return "is a file"
    if os.path.ismount(out):
        return "is a mount point; write to a folder inside it"
    if strange := [path.name for path in files_in(out) if not path.is_file()]:
        return f"holds {min(strange)}, which is no file"
    there = {str(path.relative_to(out)) for path in files_in(out)}
    if not there and not any(out.iterdir()):
        return None
    try:
        manifest = schema.Manifest.read(out)
        method = schema.format_of(read_json(out / "config.json")["quantization_config"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return "is another folder"
    sizes = {name: (out / name).stat().st_size for name in there & manifest.shards.keys()}
    said = {name: shard.bytes for name, shard in manifest.shards.items()}
    if method != manifest.format or sizes != said or not manifest.files.keys() <= there:
        return f"is not what its {schema.MANIFEST_NAME} says"
    if manifest.routers is not None:
        return "has routers that qmoe adapt-router trained; move it away"
    if not manifest.files:  # written before manifests named them
        return None
    more = there - {*manifest.files, *manifest.shards, schema.MANIFEST_NAME}
    return f"holds {min(more)} besides; move that away" if more else None


def _text(file: Path) -> str:
    """What a lock file says; nothing if it is not there."""
    try:
        return file.read_bytes()[:200].decode(errors="replace")
    except OSError:
        return ""


def files_in(folder: Path) -> list[Path]:
    """Everything in a folder and the folders below it but those folders themselves."""
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make a file's contents, or a folder's entries, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
