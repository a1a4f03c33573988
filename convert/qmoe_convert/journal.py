"""What an unfinished conversion has finished: the shards that are whole, on disk beside them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qmoe.checkpoints.files import StoredTensor, read_json
from qmoe_convert import ConversionError
from qmoe_convert.plan import Options, Plan
from qmoe_convert.shards import sha256_of

JOURNAL_NAME = "journal.json"


@dataclass
class Entry:
    """A whole shard.

    Attributes:
        fingerprint: what decided its bytes.
        sha256, modified: of the file, and when it was last written, in nanoseconds.
        squares: [module, projection, squared error, squared norm] of what is quantized in it.
        verified: whether it was read again and compared with the source.
    """

    fingerprint: str
    sha256: str
    modified: int
    squares: list[tuple[str, str, float, float]]
    verified: bool = False

    def __post_init__(self) -> None:
        """Refuse what a journal that somebody else wrote may hold; raises TypeError."""
        found = [type(v) for v in (self.fingerprint, self.sha256, self.modified, self.verified)]
        if found != [str, str, int, bool] or not self.sha256.isalnum():
            raise TypeError
        for module, projection, error, norm in self.squares:
            if not isinstance(module, str) or not projection.isidentifier():
                raise TypeError
            if not math.isfinite(error + norm) or min(error, norm) < 0:
                raise TypeError


@dataclass
class Journal:
    """What ``--resume`` goes by.

    Attributes:
        file: where it is kept.
        overwrite: whether OUT is to be replaced.
        options: of the run, what decides the bytes, as the command line has it; see `choices`.
        shards: by name.
    """

    file: Path
    overwrite: bool = False
    options: dict[str, str] = field(default_factory=dict)
    shards: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Journal | None:
        """The journal in ``file``; None if there is none, or it is something else."""
        try:
            stored = read_json(file)
            shards = {name: Entry(**entry) for name, entry in stored["shards"].items()}
            options = {str(name): str(value) for name, value in stored.get("options", {}).items()}
            return cls(file, bool(stored["overwrite"]), options, shards)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return None

    def write(self) -> None:
        """Replace the journal on disk in one step."""
        shards = {name: asdict(entry) for name, entry in self.shards.items()}
        new = self.file.with_name(f"{self.file.name}.new")
        with new.open("w", encoding="utf-8") as stream:
            stored = {"overwrite": self.overwrite, "options": self.options, "shards": shards}
            stream.write(json.dumps(stored))
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(new, self.file)

    def keep(
        self, plan: Plan, options: dict[str, str], fingerprints: dict[str, str], folder: Path
    ) -> None:
        """Forget the shards that are not those of ``plan``, or not in ``folder`` any more.

        Raises:
            ConversionError: other ``options`` would make other shards, which is named; or no shard
                is left, since the source is another one.
        """
        fit = {n: e for n, e in self.shards.items() if fingerprints.get(n) == e.fingerprint}
        if len(fit) < len(self.shards):
            for name, now in options.items():
                if (before := self.options.get(name, now)) != now:
                    raise ConversionError(
                        f"{folder.parent} was begun with {name} {before}, and this is {name} {now}"
                        f"; repeat it with {before} to keep what is finished, or start afresh with "
                        "--overwrite"
                    )
        if self.shards and not fit:
            raise ConversionError(
                f"{folder.parent} was made from another source, or from one that has changed since;"
                " start afresh with --overwrite"
            )
        sizes, modules = {s.name: s.nbytes for s in plan.shards}, plan.report.quantized_modules
        self.shards = {
            name: entry
            for name, entry in fit.items()
            if {module for module, *_ in entry.squares} <= set(modules)
            and _is_whole(folder / name, sizes[name], entry)
        }

    def strike(self, shard: str) -> None:
        """Forget a shard, so that ``--resume`` writes it again."""
        del self.shards[shard]
        self.write()

    def errors(self, plan: Plan) -> dict[str, dict[str, float]]:
        """Experts module -> projection -> relative error, from the sums that the shards left."""
        sums: dict[str, dict[str, list[float]]] = {m: {} for m in plan.report.quantized_modules}
        for shard in plan.shards:
            for module, projection, error, norm in self.shards[shard.name].squares:
                pair = sums[module].setdefault(projection, [0.0, 0.0])
                pair[0] += error
                pair[1] += norm
        # Five digits: more would depend on the order in which a device adds.
        return {
            module: {
                name: float(f"{math.sqrt(error / norm) if norm else 0.0:.5g}")
                for name, (error, norm) in projections.items()
            }
            for module, projections in sums.items()
        }


def choices(plan: Plan, options: Options, source_name: str) -> dict[str, str]:
    """What a run may be repeated with another value of, and then makes other shards."""
    from qmoe import __version__

    return {
        "MODEL": source_name,
        "--weights": options.weights,
        "--format": plan.report.format,
        "--ignore": " ".join(map(repr, options.ignore)) or "nothing",
        "--max-shard-size": f"{options.max_shard_size}",
        "qmoe": __version__,
    }


def _is_whole(file: Path, size: int, entry: Entry) -> bool:
    """Whether a shard is what was written: untouched since, or of the same bytes."""
    if not file.is_file() or file.stat().st_size != size:
        return False
    return file.stat().st_mtime_ns == entry.modified or sha256_of(file) == entry.sha256


def fingerprints(
    plan: Plan, tensors: dict[str, StoredTensor], config: bytes, source_name: str
) -> dict[str, str]:
    """Shard -> what decides its bytes: its header, and the source's files by size and time.

    Args:
        plan: what is written.
        tensors: the source's tensors.
        config: the source's config.json, which says how quantized weights are read.
        source_name: as the manifest has it.
    """
    from qmoe import __version__

    common = f"{__version__} {source_name} {plan.report.format} {plan.report.weights}".encode()
    found = {}
    for shard in plan.shards:
        digest = hashlib.sha256(common + config + shard.header)
        sources = (tensors[name] for names in {p.sources for p in shard.pieces} for name in names)
        versions = {(t.file.name, t.version.size, t.version.modified) for t in sources if t.version}
        digest.update(str(sorted(versions)).encode())
        found[shard.name] = digest.hexdigest()
    return found
