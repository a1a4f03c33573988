from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import qmoe_convert.cli as cli
import qmoe_convert.convert as convert_module
import qmoe_convert.workers as workers_module
from qmoe_convert.verify import VerificationError
from qmoe_convert.write import _Maker

from .conftest import contents, load, rewrite


@dataclass
class Result:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run ``convert-checkpoint`` in this process, writing to ``tmp_path/out``."""

    def invoke(*arguments: object) -> Result:
        words = [str(a) for a in arguments]
        if "-o" not in words:
            words += ["-o", str(tmp_path / "out")]
        capsys.readouterr()
        return Result(cli.main(words), *capsys.readouterr())

    return invoke


def one_line(result: Result, code: int) -> str:
    """The single line on stderr of a failure."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = [
        line for line in result.stderr.splitlines() if not line.startswith(("convert:", "verify:"))
    ]
    assert len(lines) == 1 and lines[0].startswith("convert-checkpoint: ")
    return lines[0]


class TestSuccess:
    def test_summary(self, command: Callable[..., Result], qwen3_folder: Path) -> None:
        result = command(qwen3_folder)
        assert result.exit_code == 0
        assert "compressed-tensors, int8" in result.stdout and "verified" in result.stdout
        assert "bits per quantized weight" in result.stdout
        for projection in ("gate_up_proj", "down_proj"):
            (line,) = (row for row in result.stdout.splitlines() if projection in row)
            assert "median 0." in line and "worst 0." in line and "model.layers." in line
        assert "convert: " in result.stderr and "/s, 0 s left" in result.stderr
        assert "\x1b" not in result.output  # plain lines: not a terminal

    def test_json_is_all_of_stdout(
        self, command: Callable[..., Result], qwen3_folder: Path, tmp_path: Path
    ) -> None:
        result = command(qwen3_folder, "--json", "--weights", "fp8", "--no-verify")
        report = json.loads(result.stdout)
        assert report["weights"] == "fp8" and not report["verified"] and not report["dry_run"]
        assert report["out"] == str(tmp_path / "out")
        assert result.stderr == ""

    def test_dry_run(
        self, command: Callable[..., Result], qwen3_folder: Path, tmp_path: Path
    ) -> None:
        result = command(qwen3_folder, "--dry-run", "--ignore", r"layers\.0\.")
        assert result.exit_code == 0 and not list(tmp_path.iterdir())
        for words in ("1 experts modules", "keep", "->", "read by", "memory", "was written"):
            assert words in result.stdout
        assert "warning: --ignore keeps 1 of 2 experts modules" in result.stderr
        planned = json.loads(command(qwen3_folder, "--dry-run", "--json").stdout)
        assert planned["dry_run"] and planned["errors"] == {}

    def test_same_as_the_function(
        self, command: Callable[..., Result], qwen3_folder: Path, tmp_path: Path
    ) -> None:
        options = ["--format", "qmoe", "--max-shard-size", "60kB", "--workers", "1"]
        assert command(qwen3_folder, *options, "--device", "cpu").exit_code == 0
        convert_module.convert(
            qwen3_folder, tmp_path / "other", format="qmoe", max_shard_size="60kB"
        )
        assert contents(tmp_path / "out") == contents(tmp_path / "other")

    def test_on_a_terminal_there_is_a_bar(
        self, qwen3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        with cli._progress(show=True) as progress:
            assert progress is not None and not isinstance(progress, cli._Lines)
            progress("convert", 1, 2)
            progress("verify", 2, 2)


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["--weights", "int4"],
            ["--format", "gguf"],
            ["--workers", "0"],
            ["--no-such-option"],
        ],
    )
    def test_the_parser_refuses(
        self, command: Callable[..., Result], qwen3_folder: Path, arguments: list[str]
    ) -> None:
        assert command(qwen3_folder, *arguments).exit_code == 2

    def test_a_usage_error_is_one_line(
        self, qwen3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([str(qwen3_folder), "-o", str(tmp_path / "out"), "--weights", "int4"]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert "int4" in captured.err and "int8" in captured.err
        assert cli.main(["--help"]) == 0 and "--weights" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--ignore", "("], "not a regular expression"),
            (["--max-shard-size", "huge"], "'huge' is not a size"),
            (["--push-to-hub", "a/b/c"], "no name of a repository"),
            (["--revision", "main"], "revision='main' has no effect"),
            (["-o", ""], "--out is empty"),
        ],
    )
    def test_so_do_we(
        self,
        command: Callable[..., Result],
        qwen3_folder: Path,
        arguments: list[str],
        message: str,
    ) -> None:
        assert message in one_line(command(qwen3_folder, *arguments), 2)

    def test_existing_output(
        self, command: Callable[..., Result], qwen3_folder: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        assert "--overwrite" in one_line(command(qwen3_folder), 2)


class TestNotConverted:
    @pytest.mark.parametrize(
        ("break_it", "message"),
        [
            (lambda f: next(f.glob("*-00002-*")).write_bytes(b""), "00002-.*empty"),
            (lambda f: next(f.glob("*-00002-*")).write_bytes(b"\x00" * 99), "not a safetensors"),
            (lambda f: os.truncate(next(f.glob("*-00002-*")), 20_000), "00002-.*truncated"),
            (lambda f: next(f.glob("*-00002-*")).unlink(), "00002-.*missing"),
            (lambda f: (f / "config.json").write_text("{}"), "config.json"),
            (lambda f: (f / "config.json").unlink(), "config.json: missing"),
        ],
    )
    def test_broken_checkpoints(
        self,
        command: Callable[..., Result],
        source: Callable[..., Path],
        tmp_path: Path,
        break_it: Callable[[Path], Any],
        message: str,
    ) -> None:
        import re

        folder = source(max_shard_size="50kB")
        break_it(folder)
        assert re.search(message, one_line(command(folder), 3))
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

    def test_no_such_model(self, command: Callable[..., Result], tmp_path: Path) -> None:
        assert "nowhere" in one_line(command(tmp_path / "nowhere"), 3)
        assert "name is empty" in one_line(command(""), 3)

    def test_nan(
        self, command: Callable[..., Result], source: Callable[..., Path], tmp_path: Path
    ) -> None:
        folder = source()
        tensors = load(folder)
        tensors["model.layers.0.mlp.experts.3.down_proj.weight"][0, 0] = float("nan")
        rewrite(folder, tensors)
        line = one_line(command(folder), 3)
        assert "model.layers.0.mlp.experts.3.down_proj.weight, expert 3" in line

    def test_a_bug_is_one_line_too(
        self,
        command: Callable[..., Result],
        qwen3_folder: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("boom\nboom")

        monkeypatch.setattr(convert_module, "convert", fail)
        assert "RuntimeError: boom boom (--debug shows where)" in one_line(command(qwen3_folder), 1)
        assert command(qwen3_folder, "--debug").stderr.startswith("Traceback")


def test_verification_failure(
    command: Callable[..., Result],
    qwen3_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any) -> None:
        raise VerificationError("model.safetensors: SHA-256 differs")

    monkeypatch.setattr(convert_module, "verify_shards", fail)
    assert "SHA-256 differs" in one_line(command(qwen3_folder), 4)
    assert not (tmp_path / "out").exists()


class TestSignals:
    @pytest.mark.parametrize(
        ("number", "code", "word"),
        [
            (signal.SIGHUP, 129, "hung up"),
            (signal.SIGINT, 130, "interrupted"),
            (signal.SIGTERM, 143, "terminated"),
        ],
    )
    def test_one_line_and_resume(
        self,
        command: Callable[..., Result],
        qwen3_folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        number: int,
        code: int,
        word: str,
    ) -> None:
        make = _Maker.make
        calls = 0

        def signalling(self: Any, piece: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 12:
                os.kill(os.getpid(), number)
            return make(self, piece)

        arguments = [qwen3_folder, "--max-shard-size", "30kB"]
        with monkeypatch.context() as patch:
            patch.setattr(_Maker, "make", signalling)
            # Few pieces at a time, so that some are left when the signal comes.
            patch.setattr(workers_module, "IN_FLIGHT_BYTES", 1)
            line = one_line(command(*arguments), code)
        assert word in line and "go on with --resume" in line
        assert not (tmp_path / "out").exists()
        assert command(*arguments, "--resume").exit_code == 0
        assert command(*arguments, "-o", tmp_path / "undisturbed").exit_code == 0
        assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("out", ["/proc/out", "{tmp_path}/no/out", "{tmp_path}/file/out"])
def test_where_nothing_can_be_written_nothing_is_read(
    command: Callable[..., Result], qwen3_folder: Path, tmp_path: Path, out: str
) -> None:
    (tmp_path / "file").touch()
    (qwen3_folder / "config.json").rename(qwen3_folder / "moved")  # reading it would fail
    try:
        line = one_line(command(qwen3_folder, "-o", out.format(tmp_path=tmp_path)), 3)
    finally:
        (qwen3_folder / "moved").rename(qwen3_folder / "config.json")
    assert "cannot be made" in line or "no such folder" in line


def test_json_failures(command: Callable[..., Result], tmp_path: Path) -> None:
    for arguments, code in (([tmp_path, "--workers", "0"], 2), ([tmp_path / "nowhere"], 3)):
        result = command(*arguments, "--json")
        failure = json.loads(result.stdout)
        assert result.exit_code == failure["exit_code"] == code
        assert result.stderr == f"convert-checkpoint: {failure['error']}\n"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("convert-checkpoint 0.")
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--weights", "--format", "--ignore", "--max-shard-size", "--device", "--workers",
                   "--dry-run", "--resume", "--overwrite", "--no-verify", "--push-to-hub",
                   "--revision", "--json", "--debug"):  # fmt: skip
        assert option in out
