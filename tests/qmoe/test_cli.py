from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeForCausalLM

import qmoe
from qmoe.checkpoints.files import read_header
from qmoe.checkpoints.inspection import inspect_checkpoint
from qmoe.checkpoints.schema import MANIFEST_NAME, Manifest, Shard, compressed_tensors_config
from qmoe.cli.main import main
from qmoe.generation import generate, load_tokenizer
from qmoe.traces.trace import RoutingTrace

REPOSITORY = Path(__file__).resolve().parents[2]


def command(*arguments, **options):
    """Start ``qmoe ...`` as its users do, in a process of its own."""
    path = os.pathsep.join(str(REPOSITORY / folder) for folder in ("", "kernels", "convert"))
    return subprocess.Popen(
        [sys.executable, "-m", "qmoe", *map(str, arguments)],
        stdin=options.pop("stdin", subprocess.DEVNULL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        **options,
    )


@pytest.fixture(scope="module")
def greedy(checkpoint):
    """What Python generates for "Hello": the command must print the same."""
    return generate(
        qmoe.load(checkpoint, device="cpu"),
        load_tokenizer(str(checkpoint)),
        ["Hello", "Good day"],
        max_new_tokens=10,
        do_sample=False,
    )


class TestGenerate:
    def test_prints_the_text_and_statistics_apart(self, checkpoint, greedy, capsys):
        arguments = ["--prompt", "Hello", "--prompt", "Good day", "--max-new-tokens", "10"]
        assert main(["generate", str(checkpoint), *arguments, "--device", "cpu"]) == 0
        out, err = capsys.readouterr()
        first, second = greedy.texts
        assert out == f"--- prompt 1\n{first}\n--- prompt 2\n{second}\n"
        assert "prompt 13 tokens" in err
        assert "new 20 tokens" in err
        assert "experts 197 kB" in err
        assert len(err.splitlines()) == 1

    def test_reads_stdin(self, checkpoint, greedy):
        process = command(
            "generate", checkpoint, "--max-new-tokens", 10, "--device=cpu", stdin=subprocess.PIPE
        )
        out, err = process.communicate(b"Hello\n", timeout=60)
        assert process.returncode == 0, err
        single = generate(
            qmoe.load(checkpoint, device="cpu"),
            load_tokenizer(str(checkpoint)),
            "Hello",
            max_new_tokens=10,
            do_sample=False,
        )
        assert out.decode() == single.texts[0] + "\n"

    def test_json_is_one_document(self, checkpoint, greedy, capfd):
        arguments = ["--prompt=Hello", "--prompt=Good day", "--max-new-tokens=10", "--json"]
        assert main(["generate", str(checkpoint), *arguments, "--device", "cpu"]) == 0
        out, err = capfd.readouterr()
        document = json.loads(out)
        assert document["texts"] == greedy.texts
        assert document["prompts"] == ["Hello", "Good day"]
        assert document["statistics"]["new_tokens"] == 20
        assert document["interrupted"] is False
        assert err == ""

    def test_quantizes_on_load(self, checkpoint, capsys):
        arguments = ["--prompt=Hello", "--max-new-tokens=3", "--json", "--weights=int8"]
        assert main(["generate", str(checkpoint), *arguments]) == 0
        statistics = json.loads(capsys.readouterr().out)["statistics"]
        # Two layers of eight experts: one byte per weight, four per output channel.
        assert statistics["expert_bytes"] == 2 * 8 * (3 * 64 * 32 + 4 * (2 * 32 + 64))

    def test_pages_within_a_budget(self, checkpoint, capsys, monkeypatch):
        arguments = ["generate", str(checkpoint), "--prompt=Hello", "--prompt=Good day"]
        arguments += ["--max-new-tokens=10", "--weights=int8", "--no-do-sample", "--device=cpu"]
        assert main([*arguments, "--json"]) == 0
        resident = json.loads(capsys.readouterr().out)["texts"]
        assert main([*arguments, "--hbm-budget=1", "--context=64"]) == 3
        refusal = capsys.readouterr().err
        assert "smallest that works" in refusal and "batch_size=2" in refusal
        smallest = re.search(r"\((\d+) bytes\)", refusal)[1]
        assert main([*arguments, f"--hbm-budget={smallest}", "--context=16", "--batch-size=1"]) == 3
        assert "give --context 18 --batch-size 2, and --hbm-budget" in capsys.readouterr().err
        paging = [f"--hbm-budget={smallest}", "--context=64", "--stats"]

        assert main([*arguments, *paging]) == 0
        out, err = capsys.readouterr()
        assert out == "--- prompt 1\n{}\n--- prompt 2\n{}\n".format(*resident)
        statistics, cache = err.splitlines()
        assert "new 20 tokens" in statistics and "experts 107 kB" in statistics
        assert re.match(r"8 of 16 experts in slots \| hit rate \d+\.\d% \| misses \d+ ", cache)

        assert main([*arguments, *paging, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["texts"] == resident
        assert document["cache"]["num_slots"] == 8
        assert 0 < document["cache"]["hit_rate"] < 1
        assert document["cache"]["bytes"] > 0
        assert len(document["cache"]["layers"]) == 2

        monkeypatch.setattr("qmoe.cli.status_line.StatusLine.due", lambda self: True)
        assert main([*arguments, *paging]) == 0
        lines = re.findall(r"hit rate (\S+)% ", capsys.readouterr().err)
        assert len(lines) > 10  # one for every token, and the last

        assert main([*arguments, *paging, "--hbm-budget=1GiB"]) == 0
        assert capsys.readouterr().err.splitlines()[-1] == "all experts are resident"

    @pytest.fixture
    def record(self, checkpoint, capsys, tmp_path):
        def run(*options):
            arguments = ["--prompt=Hello", "--prompt=Good day", "--max-new-tokens=10"]
            arguments += ["--no-do-sample", "--json", *options]
            path = tmp_path / "routing.safetensors"
            assert main(["generate", str(checkpoint), *arguments, f"--record-routing={path}"]) == 0
            return json.loads(capsys.readouterr().out), RoutingTrace.load(path)

        return run

    def test_records_routing(self, checkpoint, greedy, record):
        document, trace = record("--device=cpu")
        assert document["texts"] == greedy.texts
        # Two prompts padded to 8 tokens; the last new token goes nowhere.
        assert trace.topk_ids.shape == (2 * (8 + 9), 2, 2)
        assert (trace.num_experts, trace.page_bytes) == (8, (3 * 64 * 32,) * 2)
        assert trace.metadata == {"source": f"{checkpoint.name}: 2 prompts, 34 tokens"}
        with torch.no_grad():
            tokens = load_tokenizer(str(checkpoint))("Good day", return_tensors="pt").input_ids
            logits = qmoe.load(checkpoint, device="cpu")(tokens, output_router_logits=True)
        chosen = torch.stack([layer.topk(2).indices for layer in logits.router_logits], 1)
        assert torch.equal(trace.topk_ids[8:16].long(), chosen)

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_records_the_same_when_paged(self, checkpoint, capsys, record, device):
        options = ["--weights=int8", f"--device={device}"]
        resident, whole = record(*options)
        paging = ["--hbm-budget=1", "--context=64", "--batch-size=2"]
        assert main(["generate", str(checkpoint), "--prompt=a", *options, *paging]) == 3
        smallest = re.search(r"\((\d+) bytes\)", capsys.readouterr().err)[1]
        paging[0] = f"--hbm-budget={smallest}"
        paged, part = record(*options, "--stats", *paging)
        assert 8 <= paged["cache"]["num_slots"] < 16
        assert paged["texts"] == resident["texts"]
        assert torch.equal(part.topk_ids, whole.topk_ids)

    @pytest.mark.skipif(sys.platform == "win32", reason="signals")
    def test_records_up_to_an_interrupt(self, checkpoint, tmp_path):
        path = tmp_path / "routing.safetensors"
        process = command(
            "generate",
            checkpoint,
            "--prompt=Hello",
            "--max-new-tokens=100000",
            "--no-do-sample",
            "--device=cpu",
            f"--record-routing={path}",
        )
        process.stdout.read(8)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        new = int(re.search(rb"new (\d+) tokens", err)[1])
        # The interrupt may come between a pass and its token.
        assert RoutingTrace.load(path).num_tokens - (5 + new) in (-1, 0)

    def test_nothing_is_recorded_of_a_run_without_tokens(
        self, checkpoint, tmp_path, capsys, monkeypatch
    ):
        def interrupted(self, *args, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(Qwen3MoeForCausalLM, "forward", interrupted)
        path = tmp_path / "routing.safetensors"
        arguments = ["generate", str(checkpoint), "--prompt=Hello", f"--record-routing={path}"]
        assert main(arguments) == 130
        assert f"{path}: not written, nothing was recorded" in capsys.readouterr().err
        assert not path.exists()

    def test_sampling_options_arrive(self, checkpoint, capsys):
        texts = []
        for options in (
            ["--temperature=2"],
            ["--temperature=2"],
            ["--top-k=1"],
            ["--no-do-sample"],
        ):
            arguments = ["--prompt=Hello", "--max-new-tokens=12", "--json", "--seed=5", *options]
            assert main(["generate", str(checkpoint), *arguments]) == 0
            texts.append(json.loads(capsys.readouterr().out)["texts"])
        assert texts[0] == texts[1] != texts[2] == texts[3]

    def test_beams_print_at_the_end(self, checkpoint, capsys):
        arguments = ["--prompt=Hello", "--max-new-tokens=4", "--num-beams=2"]
        assert main(["generate", str(checkpoint), *arguments]) == 0
        assert capsys.readouterr().out.strip()

    @pytest.mark.skipif(sys.platform == "win32", reason="signals")
    def test_interrupt_keeps_the_text_and_counts(self, checkpoint):
        process = command(
            "generate",
            checkpoint,
            "--prompt=Hello",
            "--max-new-tokens=100000",
            "--no-do-sample",
            "--device=cpu",
        )
        begun = process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert len(begun + rest) > 3
        assert len(err.splitlines()) == 1
        assert b"prompt 5 tokens" in err

    @pytest.mark.skipif(sys.platform == "win32", reason="pipes")
    def test_a_reader_that_leaves_is_told_nothing(self, checkpoint):
        process = command(
            "generate", checkpoint, "--prompt=Hello", "--max-new-tokens=300", "--device=cpu"
        )
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["generate"], 2, "Missing argument 'PATH'"),
            (["generate", "{checkpoint}", "--nonsense"], 2, "No such option"),
            (["generate", "{checkpoint}", "--prompt=a", "--weights=int3"], 2, "int3"),
            (["generate", "{checkpoint}", "--prompt=a", "--context=9"], 2, "need --hbm-budget"),
            (["generate", "{checkpoint}", "--prompt=a", "--batch-size=2"], 2, "need --hbm-budget"),
            (
                ["generate", "{checkpoint}", "--prompt=a", "--weights=int8", "--hbm-budget=lots"],
                2,
                "hbm_budget='lots'; write a size",
            ),
            (["nonsense"], 2, "nonsense"),
            (["generate", "no/such/folder", "--prompt=a"], 3, "no/such/folder: no such folder"),
            (["generate", "{checkpoint}/config.json"], 3, "is a file; give the folder"),
            (["generate", "{checkpoint}", "--prompt="], 3, "prompt 0 is empty"),
            (["generate", "{checkpoint}", "--prompt=a", "--chat"], 3, "no chat template"),
            (
                ["generate", "{checkpoint}", "--prompt=a", "--record-routing=no/folder/file"],
                3,
                "no/folder/file: there is no folder no/folder to write it into",
            ),
            (["generate", "{checkpoint}", "--record-routing=."], 3, ".: is a folder"),
            (
                ["generate", "{checkpoint}", "--prompt=a", "--max-new-tokens=0"],
                2,
                "'--max-new-tokens'",
            ),
            (["generate", "{checkpoint}", "--prompt=a", "--device=tpu9"], 2, "tpu9"),
            (["generate", "{checkpoint}", "--prompt=a", "--dtype=int5"], 2, "int5"),
            *(
                (["generate", "{checkpoint}", "--prompt=a", option], 2, option.partition("=")[0])
                for option in ("--seed=1e23", "--top-p=2", "--num-beams=0", "--context=8k")
            ),
            (["cache-report", "no-such-file"], 3, "no-such-file: no such file"),
            (["inspect", "no-such-folder"], 3, "no-such-folder: no such folder"),
        ],
    )
    def test_failures_are_one_line(self, checkpoint, capsys, arguments, code, message):
        assert main([a.format(checkpoint=checkpoint) for a in arguments]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("qmoe: ")
        assert message in err
        assert len(err.splitlines()) == 1

    def test_debug_shows_where(self, checkpoint, capsys):
        assert main(["generate", str(checkpoint), "--prompt=", "--debug"]) == 3
        *traceback, line = capsys.readouterr().err.splitlines()
        assert traceback[0].startswith("Traceback") and "prompt 0 is empty" in traceback[-1]
        assert line.startswith("qmoe: prompt 0 is empty")

    @pytest.mark.parametrize(
        ("data", "message"), [(b"", "stdin: empty"), (b"\xff\xfe", "stdin: not UTF-8")]
    )
    def test_stdin_that_is_empty_or_no_text(self, checkpoint, capsys, monkeypatch, data, message):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert main(["generate", str(checkpoint)]) == 3
        assert message in capsys.readouterr().err

    def test_nothing_to_continue(self, checkpoint, capsys, monkeypatch):
        terminal = io.TextIOWrapper(io.BytesIO())
        monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stdin", terminal)
        assert main(["generate", str(checkpoint)]) == 2
        assert "give --prompt TEXT, or pipe" in capsys.readouterr().err

    def test_json_says_it_as_well(self, checkpoint, capsys):
        for arguments, code in ((["generate"], 2), (["inspect", "no-such-folder"], 3)):
            assert main([*arguments, "--json"]) == code
            out, err = capsys.readouterr()
            failure = json.loads(out)
            assert failure["exit_code"] == code
            assert err == f"qmoe: {failure['error']}\n"

    def test_a_small_model_runs_on_one_thread(self, checkpoint, capsys, monkeypatch):
        def threads(self, index, piece):
            seen.add(torch.get_num_threads())

        seen: set[int] = set()
        monkeypatch.setattr("qmoe.cli.generate._Writer.__call__", threads)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            for given, used in ((None, 1), ("2", 2)):
                monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
                if given is not None:
                    monkeypatch.setenv("OMP_NUM_THREADS", given)
                seen.clear()
                assert main(["generate", str(checkpoint), "--prompt=a", "--max-new-tokens=2"]) == 0
                assert seen == {used}
                assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qmoe {qmoe.__version__}\n"
    assert main(["generate", "--help"]) == 0
    assert "--max-new-tokens" in capsys.readouterr().out
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert "Usage: qmoe" in out and "inspect" in out
    assert err == ""


class TestInspect:
    def test_sixteen_bit(self, checkpoint):
        i = inspect_checkpoint(checkpoint)
        weights = 2 * 8 * 3 * 64 * 32
        assert (i.architecture, i.num_layers, i.expert_layers) == ("Qwen3MoeForCausalLM", 2, 2)
        assert (i.num_experts, i.top_k, i.format) == ([8], 2, "bf16")
        assert (i.expert_weights, i.expert_bytes) == (weights, 2 * weights)
        assert i.bits_per_expert_weight == 16
        total = sum(t.nbytes for t in load_file(checkpoint / "model.safetensors").values())
        assert i.expert_bytes + i.rest_bytes == i.memory_bytes == total
        model = qmoe.load(checkpoint, device="cpu")
        assert i.memory_bytes == sum(p.nbytes for p in model.parameters())

    def test_agrees_with_what_load_holds(self, checkpoint, tmp_path):
        for weights in ("int8", "fp8"):
            model = qmoe.load(checkpoint, device="cpu", weights=weights)
            model.save_pretrained(tmp_path / weights)
            i = inspect_checkpoint(tmp_path / weights)
            assert weights in i.format
            assert (i.expert_layers, i.num_experts, i.top_k) == (2, [8], 2)
            assert i.expert_weights == 2 * 8 * 3 * 64 * 32
            assert 8 < i.bits_per_expert_weight < 9
            loaded = qmoe.load(tmp_path / weights, device="cpu")
            assert i.memory_bytes == sum(p.nbytes for p in loaded.parameters())

    def test_compressed_tensors_and_manifest(self, checkpoint, tmp_path, capsys):
        config = json.loads((checkpoint / "config.json").read_text())
        config["quantization_config"] = compressed_tensors_config("int8", ["lm_head"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = {"lm_head.weight": torch.zeros(4, 4, dtype=torch.bfloat16)}
        for layer in (1, 2):
            for expert in range(3):
                name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
                tensors[name] = torch.zeros(6, 4, dtype=torch.int8)
                tensors[name + "_scale"] = torch.ones(6, 1)
        save_file(tensors, tmp_path / "model.safetensors")
        Manifest(
            weights="int8",
            format="compressed-tensors",
            source="somebody/model",
            qmoe_version="0",
            shards={
                "model.safetensors": Shard("", (tmp_path / "model.safetensors").stat().st_size)
            },
            errors={"layers.1": {"up_proj": 0.002}, "layers.2": {"up_proj": 0.004}},
        ).write(tmp_path)
        i = inspect_checkpoint(tmp_path)
        assert i.format == "compressed-tensors int8 per channel"
        assert (i.expert_layers, i.num_experts) == (2, [3])
        assert i.expert_bytes == 6 * (24 + 24)
        assert i.bits_per_expert_weight == 16
        assert i.memory_bytes == i.expert_bytes + 32
        assert i.source == "somebody/model"
        worst = {"median": pytest.approx(0.003), "worst": 0.004, "worst_module": "layers.2"}
        assert i.errors == {"up_proj": worst}
        assert main(["inspect", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert "worst 0.400% in layers.2" in out
        assert "somebody/model" in out

    def test_prints_and_json(self, checkpoint, capsys):
        assert main(["inspect", str(checkpoint)]) == 0
        out = capsys.readouterr().out
        for expected in ("Qwen3MoeForCausalLM", "2, 2 with experts", "bf16", "197 kB", "16.00"):
            assert expected in out
        assert main(["inspect", str(checkpoint), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["num_experts"] == [8]
        assert (document["errors"], document["source"]) == (None, None)

    def test_prints_on_every_terminal(self, checkpoint, tmp_path, monkeypatch):
        folder = tmp_path / "[bold]\x1b[31m-caf\u00e9"
        folder.symlink_to(checkpoint)
        monkeypatch.setenv("COLUMNS", "20")
        stdout = io.TextIOWrapper(io.BytesIO(), "ascii", errors="replace")
        monkeypatch.setattr(stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setenv("TERM", "dumb")
        assert main(["inspect", str(folder)]) == 0
        stdout.flush()
        printed = stdout.buffer.getvalue()
        cells = b"".join(line.split(b"|")[-2].strip() for line in printed.splitlines()[1:-1])
        assert b"[bold]?[31m-caf?" in cells and b"Qwen3MoeForCausalLM" in cells
        assert max(map(len, printed.splitlines())) <= 20

    def test_fused_experts_in_shards(self, tmp_path):
        (tmp_path / "config.json").write_text(
            json.dumps(
                {"architectures": ["M"], "text_config": {"moe_topk": [4, 4]}, "dtype": "float16"}
            )
        )
        experts = "language_model.layers.0.mlp.experts."
        fused = {"gate_up_proj": (5, 8, 4), "down_proj": (5, 4, 4), "gate_up_proj_bias": (5, 8)}
        weight_map = {experts + name: "one.safetensors" for name in fused}
        weight_map["norm"] = "two.safetensors"
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
        save_file(
            {experts + name: torch.zeros(shape) for name, shape in fused.items()},
            tmp_path / "one.safetensors",
        )
        save_file({"norm": torch.zeros(4)}, tmp_path / "two.safetensors")
        i = inspect_checkpoint(tmp_path)
        assert (i.expert_layers, i.num_experts, i.top_k, i.shards) == (1, [5], 4, 2)
        assert i.expert_weights == 5 * (32 + 16)
        assert (i.format, i.rest_bytes) == ("f32", 16)
        assert i.memory_bytes == (i.expert_bytes + 16) // 2

    def test_packed_weights_count_as_many(self, tmp_path):
        (tmp_path / "config.json").write_text(
            json.dumps({"architectures": ["M"], "quantization_config": {"quant_method": "mxfp4"}})
        )
        experts = "model.layers.0.mlp.experts.gate_up_proj_"
        save_file(
            {
                experts + "blocks": torch.zeros(4, 8, 2, 16, dtype=torch.uint8),
                experts + "scales": torch.zeros(4, 8, 2, dtype=torch.uint8),
            },
            tmp_path / "model.safetensors",
        )
        i = inspect_checkpoint(tmp_path)
        assert (i.format, i.num_experts, i.memory_bytes) == ("mxfp4", [4], None)
        assert i.expert_weights == 4 * 8 * 64
        assert i.bits_per_expert_weight == 4.25

    @pytest.mark.parametrize(
        ("config", "names"),
        [
            ({}, ["block_sparse_moe.experts.3.w1.weight", "block_sparse_moe.experts.0.w2.weight"]),
            ({}, ["ffn.experts.expert_3.wi.weight"]),
            ({"ffn_config": {"moe_num_experts": 4, "moe_top_k": 2}}, ["ffn.experts.mlp.w1"]),
            ({"num_local_experts": 4}, ["block_sparse_moe.input_linear.weight"]),
        ],
        ids=["mixtral", "nllb", "dbrx", "granite"],
    )
    def test_other_families(self, tmp_path, config, names):
        config = {"architectures": ["M"], "moe_topk": 2, **config}
        (tmp_path / "config.json").write_text(json.dumps(config))
        shape = (4, 6, 2) if "input_linear" in names[0] else (24, 2)
        tensors = {f"layers.{n}.{name}": torch.zeros(shape) for n in range(3) for name in names}
        shared = {"layers.0.shared_experts.up_proj.weight": torch.zeros(5, 7)}
        save_file({**tensors, **shared}, tmp_path / "model.safetensors")
        i = inspect_checkpoint(tmp_path)
        assert (i.expert_layers, i.num_experts, i.top_k) == (3, [4], 2)
        assert i.rest_bytes == 5 * 7 * 4

    def test_a_dense_model_is_said_to_be_one(self, tmp_path, capsys):
        config = Qwen3Config(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
        )
        Qwen3ForCausalLM(config).save_pretrained(tmp_path)
        assert inspect_checkpoint(tmp_path).dense
        assert main(["inspect", str(tmp_path)]) == 0
        assert "a dense model" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("break_it", "message"),
        [
            (lambda f: (f / "config.json").unlink(), "config.json: not found"),
            (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
            (lambda f: (f / "config.json").write_text("[]"), "config.json: holds no JSON object"),
            (lambda f: (f / "model.safetensors").unlink(), "holds neither"),
            (
                lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
                "pickled weights",
            ),
            (
                lambda f: (f / "model.safetensors").write_bytes(b""),
                "model.safetensors: the file is empty",
            ),
            (
                lambda f: (f / "model.safetensors").write_bytes(b"x" * 99),
                "model.safetensors: not a",
            ),
            (
                lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"null"),
                "model.safetensors: its safetensors header cannot be read",
            ),
            (
                lambda f: os.truncate(f / "model.safetensors", 20000),
                "model.safetensors: truncated at 20000 bytes",
            ),
            (
                lambda f: (f / "model.safetensors.index.json").write_text(
                    '{"weight_map": {"a": "../other.safetensors"}}'
                ),
                "outside its folder",
            ),
            (
                lambda f: (
                    (f / "model.safetensors")
                    .rename(f / "model.safetensors.index.json")
                    .write_text('{"weight_map": {"a": "absent.safetensors"}}')
                ),
                "absent.safetensors: missing",
            ),
            (lambda f: (f / MANIFEST_NAME).write_text("{}"), "not a qmoe manifest"),
        ],
    )
    def test_broken_checkpoints(self, checkpoint, tmp_path, break_it, message):
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
        break_it(tmp_path)
        with pytest.raises(ValueError, match=message):
            inspect_checkpoint(tmp_path)

    def test_a_hub_id_reads_headers_only(self, checkpoint, tmp_path, monkeypatch):
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.utils import (
            SafetensorsFileMetadata,
            SafetensorsRepoMetadata,
            TensorInfo,
        )

        asked = []

        def download(repo, name):
            asked.append(name)
            if name != "config.json":
                raise EntryNotFoundError(name)
            return shutil.copy(checkpoint / name, tmp_path)

        tensors = {
            t.name: TensorInfo(dtype=t.dtype, shape=list(t.shape), data_offsets=(0, t.nbytes))
            for t in read_header(checkpoint / "model.safetensors").values()
        }
        file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
        metadata = SafetensorsRepoMetadata(
            metadata={}, sharded=False, weight_map={}, files_metadata={"model.safetensors": file}
        )
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda repo: metadata)
        remote, local = inspect_checkpoint("owner/name"), inspect_checkpoint(checkpoint)
        assert remote.path == "owner/name"
        assert (remote.expert_bytes, remote.rest_bytes) == (local.expert_bytes, local.rest_bytes)
        assert asked == ["config.json", MANIFEST_NAME]

    def test_offline_a_cached_snapshot_serves(self, checkpoint, tmp_path, monkeypatch):
        import huggingface_hub

        repo = tmp_path / "models--owner--name"
        shutil.copytree(checkpoint, repo / "snapshots" / "abc")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("abc")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        cached, local = inspect_checkpoint("owner/name"), inspect_checkpoint(checkpoint)
        assert (cached.expert_bytes, cached.rest_bytes) == (local.expert_bytes, local.rest_bytes)
        with pytest.raises(ValueError, match="owner/other: cannot be read from the Hub"):
            inspect_checkpoint("owner/other")

    def test_a_hub_that_cannot_be_reached(self, monkeypatch):
        import huggingface_hub

        def download(repo, name):
            raise ConnectionError("no route\nmore")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        with pytest.raises(
            ValueError, match=r"owner/name: cannot be read from the Hub \(no route\)"
        ):
            inspect_checkpoint("owner/name")
