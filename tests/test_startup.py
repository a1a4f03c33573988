"""How both commands begin and end, each in processes of its own; few of them import torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "convert")),
}


def python(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, text=True, **streams)


def test_help_and_mistakes_import_nothing_heavy(tmp_path) -> None:
    commands = ("generate", "serve", "inspect", "cache-report", "demo", "tune")
    script = f"""
import sys
from qmoe.cli.main import main as qmoe
from qmoe_convert.cli import main as convert
codes = {{}}
for arguments in ["--help"], ["--version"], []:
    assert qmoe(arguments) == 0, arguments
for command in {commands}:
    assert qmoe([command, "--help"]) == 0
    assert qmoe([command, "--nonsense"]) == 2
assert qmoe(["nonsense"]) == 2
for command in "generate", "serve", "inspect", "cache-report":
    assert qmoe([command, "/no/such"]) == 3, command
assert qmoe(["demo", "--model=/no/such"]) == 3
assert qmoe(["tune", "--model=/no/such", "--output=o"]) == 3
assert qmoe(["generate", ".", "--prompt=a", "--hbm-budget=lots"]) == 2
assert convert(["--help"]) == convert(["--version"]) == 0
assert convert(["/no/such", "-o", "out"]) == convert([".", "-o", "/no/such/out"]) == 3
assert convert([".", "-o", "."]) == convert([]) == 2
heavy = {{"torch", "transformers", "huggingface_hub", "numpy", "pydantic", "rich"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "name"), [("qmoe", "qmoe"), ("qmoe_convert", "convert-checkpoint")]
)
def test_a_module_is_the_command(module, name) -> None:
    done = python("-m", module, "--version")
    assert done.stdout.startswith(f"{name} 0.") and done.returncode == 0


def test_formats_are_registered_whoever_is_imported_first() -> None:
    script = """
import pickle, sys, threading
from importlib import import_module
import qmoe
assert not {"torch", "transformers"} & set(sys.modules)
assert set(qmoe.__all__) <= set(dir(qmoe))

def check(auto):
    config = auto.AutoQuantizationConfig.from_dict({"quant_method": "qmoe", "weights": "int8"})
    assert type(config) is qmoe.QmoeConfig
    assert type(pickle.loads(pickle.dumps(config))) is qmoe.QmoeConfig
    assert type(auto.AutoHfQuantizer.from_config(config)).__name__ == "QmoeQuantizer"
    names = [kind.__name__ for kind in auto.LOADING_ATTRIBUTES_CONFIG_TYPES]
    assert names.count("QmoeConfig") == 1

# Two threads that come from two sides.
other = threading.Thread(target=import_module, args=["qmoe.loading.quantizer"])
other.start()
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained
from transformers.quantizers import auto
other.join()
check(auto)

# transformers first: as if qmoe had never been there.
for name in [name for name in sys.modules if name.partition(".")[0] == "qmoe"]:
    del sys.modules[name]
del sys.modules[auto.__name__]
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "_RegistryFinder"]
auto = import_module(auto.__name__)
assert "qmoe" not in auto.AUTO_QUANTIZER_MAPPING
import qmoe
qmoe._register()
check(auto)
"""
    done = python("-W", "ignore", "-c", script)
    assert done.returncode == 0, done.stderr


STRIKES = {
    # where the signal strikes: what the module of the command does
    "import": "strike()",
    "work": "with interruptible('OUT was not written'): strike(); time.sleep(9)",
    "callback": """
class Dropped:
    def __del__(self):
        strike()

with interruptible('OUT was not written'):
    Dropped()
    time.sleep(9)
""",
}


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("where", STRIKES)
@pytest.mark.parametrize(("name", "code"), [("SIGHUP", 129), ("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_in_one_line(tmp_path, where, name, code) -> None:
    work = STRIKES[where].replace("\n", "\n    ")
    (tmp_path / "command.py").write_text(f"""
import os, signal, time, typer
from qmoe.exits import interruptible, run

def strike():
    os.kill(os.getpid(), signal.{name})

{"strike()" if where == "import" else ""}
app = typer.Typer()

@app.command()
def work(json: bool = False) -> None:
    {work}

def main():
    return run(app, "program")
""")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    script += "from qmoe.start import start; start('program', 'command')"
    done = python("-c", script, "--json")
    word = {129: "hung up", 130: "interrupted", 143: "terminated"}[code]
    line = word if where == "import" else f"{word}; OUT was not written"
    assert (done.returncode, done.stderr) == (code, f"program: {line}\n")
    assert json.loads(done.stdout) == {"error": line, "exit_code": code}


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_rank_that_is_not_the_first_ends_silently(tmp_path, monkeypatch) -> None:
    (tmp_path / "command.py").write_text("import os; os.kill(os.getpid(), 15)")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    script += "from qmoe.start import start; start('program', 'command')"
    monkeypatch.setitem(ENVIRONMENT, "RANK", "1")
    for size, line in (("2", ""), ("1", "program: terminated\n")):
        monkeypatch.setitem(ENVIRONMENT, "WORLD_SIZE", size)
        done = python("-c", script, "--json")
        assert (done.returncode, done.stderr, bool(done.stdout)) == (143, line, bool(line))


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_a_stdout_that_takes_nothing() -> None:
    for arguments in ("qmoe", "--help"), ("qmoe_convert", "--version"):
        reader, writer = os.pipe()
        os.close(reader)
        left = python("-m", *arguments, stdout=writer)
        os.close(writer)
        assert (left.returncode, left.stderr) == (141, "")
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = python("-m", "qmoe", "--help", stdout=full)
        assert (done.returncode, done.stderr) == (3, "qmoe: No space left on device\n")


def test_the_docs_have_the_exit_codes() -> None:
    import qmoe.exits

    rows = [row for row in qmoe.exits.__doc__.splitlines() if row.startswith("|")]
    assert "\n".join(rows).replace("``", "`") in (ROOT / "docs" / "commands.md").read_text()
