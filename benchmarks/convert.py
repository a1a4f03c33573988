"""Time and memory of ``convert-checkpoint`` beside ``cp -r``, in Qwen3-30B-A3B's shape.

``python benchmarks/convert.py`` generates a checkpoint (fewer layers, the rest as on the Hub, bf16,
shards of 4 GB), checks one conversion, then runs ``cp -r``, ``convert-checkpoint --no-verify`` and
``convert-checkpoint`` in turn, several rounds, each

- *warm*: the source is in the page cache as far as it fits, and
- *cold*: its pages are dropped first, so that it comes from the disk.

Before each run the outputs are removed and everything is synced. Time is the wall time of the whole
command, imports included; memory is the kernel's maximum resident set of the process. ``cp`` leaves
its output in the page cache while the converter's is on the disk when it ends, so the targets are
parts of the time of ``cp -r && sync``: of the run in the same round, and the median over rounds.
Results, with the targets beside them, go to ``benchmarks/results/convert.json``.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qmoe.checkpoints.files import DTYPE_NAMES
from qmoe_convert.shards import PlannedTensor, header_bytes

RESULTS = Path(__file__).parent / "results" / "convert.json"
SHARD_BYTES = 4_000_000_000
COPY = "cp -r && sync"
# Of the time of `COPY`, and bytes.
MOST_TIME = {"convert-checkpoint --no-verify": 0.8, "convert-checkpoint": 1.3}
MOST_MEMORY = 1_020_000_000
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}


def tensor_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes as on the Hub."""
    hidden, heads, kv_heads, head = 2048, 32, 4, 128
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151936, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
            at + "self_attn.q_proj.weight": (heads * head, hidden),
            at + "self_attn.k_proj.weight": (kv_heads * head, hidden),
            at + "self_attn.v_proj.weight": (kv_heads * head, hidden),
            at + "self_attn.o_proj.weight": (hidden, heads * head),
            at + "self_attn.q_norm.weight": (head,),
            at + "self_attn.k_norm.weight": (head,),
            at + "mlp.gate.weight": (128, hidden),
        }
        for expert in range(128):
            shapes |= {
                f"{at}mlp.experts.{expert}.gate_proj.weight": (768, hidden),
                f"{at}mlp.experts.{expert}.up_proj.weight": (768, hidden),
                f"{at}mlp.experts.{expert}.down_proj.weight": (hidden, 768),
            }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (151936, hidden)}


def generate(folder: Path, layers: int) -> int:
    """Write the checkpoint; return its bytes.

    Values are windows into one pool of normal numbers: drawing 5 billion would take longer than
    everything that is measured.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "num_hidden_layers": layers}, indent=2)
    )
    generator = torch.Generator().manual_seed(0)
    pool = (0.02 * torch.randn(1 << 26, generator=generator)).to(torch.bfloat16)
    raw = memoryview(pool.view(torch.uint8).numpy())
    shards: list[list[PlannedTensor]] = [[]]
    shard_bytes = 0
    for name, shape in tensor_shapes(layers).items():
        nbytes = 2 * torch.Size(shape).numel()
        if shards[-1] and shard_bytes + nbytes > SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(PlannedTensor(name, DTYPE_NAMES[torch.bfloat16], shape, nbytes))
        shard_bytes += nbytes
    weight_map = {}
    for i, tensors in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(header_bytes(tensors))
            for tensor in tensors:
                weight_map[tensor.name] = file
                left = tensor.nbytes
                while left:
                    start = 2 * int(torch.randint(1 << 20, (), generator=generator))
                    left -= stream.write(raw[start : start + min(left, len(raw) - (1 << 21))])
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(file.stat().st_size for file in folder.iterdir())


def drop_from_cache(folder: Path) -> None:
    """Ask the kernel to forget a folder's files; they must be clean."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# Runs a command from a process of its own: a child inherits the maximum resident set of its parent,
# and ours holds torch.
MEASURE = """
import json, resource, subprocess, sys, time
start = time.monotonic()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
wall = time.monotonic() - start
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({
    "code": done.returncode, "stderr": done.stderr, "wall_s": wall,
    "cpu_s": usage.ru_utime + usage.ru_stime,
    "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
}))
"""


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; wall and CPU time in seconds, maximum resident set in bytes."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, *command], capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout)
    if measured.pop("code"):
        raise SystemExit(f"{' '.join(command)} failed: {measured['stderr'].strip()}")
    del measured["stderr"]
    return {name: round(value, 2) for name, value in measured.items()}


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
        "memory_bytes": memory,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors")},
    }


def commit() -> str:
    """The commit that is measured, with ``+`` if files differ from it."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "..", ":!results"], check=False)
    return head.stdout.strip() + ("+" if dirty.returncode else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--folder", type=Path, help="where to work; 30 GB, a temporary one if absent"
    )
    parser.add_argument("--layers", type=int, default=7, help="1.2 GB each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", choices=("int8", "fp8"), default="int8")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    work = Path(tempfile.mkdtemp(prefix="qmoe-benchmark-", dir=arguments.folder))
    try:
        results = run(work, arguments.layers, arguments.rounds, arguments.weights)
    finally:
        shutil.rmtree(work)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    for target in results["targets"]:
        print(("met    " if target["met"] else "missed ") + target["what"], target)


def run(work: Path, layers: int, rounds: int, weights: str) -> dict[str, Any]:
    source, target = work / "source", work / "target"
    source_bytes = generate(source, layers)
    print(f"generated {source_bytes / 1e9:.1f} GB", flush=True)
    convert = [sys.executable, "-m", "qmoe_convert", str(source), "-o", str(target), "--json"]
    convert += ["--weights", weights, "--device", "cpu"]
    commands = {
        "cp -r": ["cp", "-r", str(source), str(target)],
        COPY: ["sh", "-c", f"cp -r '{source}' '{target}' && sync"],
        "convert-checkpoint --no-verify": [*convert, "--no-verify"],
        "convert-checkpoint": convert,
    }

    # Checked before it is timed, which also leaves the bytecode that an installed package has.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    report = json.loads(subprocess.run(convert, capture_output=True, check=True).stdout)
    assert report["verified"]
    shutil.rmtree(target)
    runs = measure_all(commands, source, target, rounds)
    medians = {
        cache: {name: medians_of(runs, name, cache) for name in commands}
        for cache in ("warm", "cold")
    }
    return {
        "benchmark": "convert",
        "commit": commit(),
        "machine": machine(),
        "checkpoint": {
            "shape": "Qwen3-30B-A3B",
            "layers": layers,
            "bytes": source_bytes,
            "weights": weights,
            "format": report["format"],
            "output_bytes": report["output_bytes"],
            "bits_per_weight": round(report["bits_per_weight"], 4),
            "median_error": report["median_error"],
            "worst_error": report["worst_error"]["error"],
            "estimated_peak_bytes": report["peak_memory_bytes"],
        },
        "runs": runs,
        "medians": medians,
        "targets": targets_of(runs),
    }


def measure_all(
    commands: dict[str, list[str]], source: Path, target: Path, rounds: int
) -> list[dict[str, Any]]:
    """Run every command in turn, with the source in the page cache and without."""
    runs = []
    for _ in range(rounds):
        for cache in ("warm", "cold"):
            for name, command in commands.items():
                os.sync()
                if cache == "cold":
                    drop_from_cache(source)
                measured = {"command": name, "cache": cache, **measure(command)}
                shutil.rmtree(target)
                runs.append(measured)
                print(measured, flush=True)
    return runs


def medians_of(runs: list[dict[str, Any]], name: str, cache: str) -> dict[str, float]:
    """Median time and memory of one command."""
    chosen = [r for r in runs if (r["command"], r["cache"]) == (name, cache)]
    keys = ("wall_s", "cpu_s", "peak_rss_bytes")
    return {key: statistics.median(r[key] for r in chosen) for key in keys}


def targets_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, and what was."""
    targets: list[dict[str, Any]] = []
    for cache in ("warm", "cold"):
        walls = {
            name: [r["wall_s"] for r in runs if (r["command"], r["cache"]) == (name, cache)]
            for name in (COPY, *MOST_TIME)
        }
        for name, most in MOST_TIME.items():
            ratio = statistics.median(map(operator.truediv, walls[name], walls[COPY]))
            targets.append(
                {
                    "what": f"{name}, {cache}, over {COPY}",
                    "target": most,
                    "measured": round(ratio, 3),
                    "met": ratio <= most,
                }
            )
    peak = max(r["peak_rss_bytes"] for r in runs if r["command"] in MOST_TIME)
    targets.append(
        {
            "what": "peak resident bytes",
            "target": MOST_MEMORY,
            "measured": peak,
            "met": peak <= MOST_MEMORY,
        }
    )
    return targets


if __name__ == "__main__":
    main()
