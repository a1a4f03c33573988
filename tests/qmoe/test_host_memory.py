"""Models whose experts do not all fit into host memory: bits, bounds, and a disk that fails."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from test_paged_loading import CONTEXT, is_paged, load, saved, smallest_budget
from test_paging_model import storage_bytes
from zoo import build, logits

import qmoe
from qmoe.checkpoints.files import CheckpointError
from qmoe.paging.frame_store import FrameStore
from qmoe.paging.host_store import HostStore
from qmoe.paging.options import PagingOptions
from qmoe_kernels.cpu import workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="readers need Linux")

PAGE = 3 * 64 * 32  # bytes of an expert of these models
DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
])]  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path) -> tuple[Path, torch.Tensor, int]:
    """A folder, the logits of its model, and the smallest budget."""
    expected = saved("qwen3_moe", "int8", "qmoe", tmp_path)
    return tmp_path, expected, smallest_budget(tmp_path)


def smallest_bound(path: Path, budget: int, **options) -> int:
    with pytest.raises(ValueError, match="smallest that works is") as refusal:
        load(path, budget, host_memory=1, **options)
    return int(re.search(r"works is (\d+) bytes", str(refusal.value))[1])


def cache_of(model):
    return model.qmoe_paging.cache


def shard(path: Path) -> Path:
    (file,) = path.glob("*.safetensors")
    return file


def readers_running() -> int:
    return sum(t.name.startswith("qmoe-reader") for t in threading.enumerate())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("form", ["qmoe", "compressed-tensors"])
def test_any_bound_gives_the_models_bits(family, form, tmp_path) -> None:
    if family == "gpt_oss" and form == "compressed-tensors":
        pytest.skip("the Hub stores its experts fused")
    expected = saved(family, "int8", form, tmp_path)
    budget = smallest_budget(tmp_path)
    everything = cache_of(load(tmp_path, budget)).host.num_bytes
    least = smallest_bound(tmp_path, budget)
    for bound in (least, (least + everything) // 2, everything - 1):
        model = load(tmp_path, budget, host_memory=bound)
        host = cache_of(model).host
        assert isinstance(host, FrameStore) and host.num_bytes <= bound
        for _ in range(2):
            assert torch.equal(logits(model), expected)
        stats = qmoe.stats(model)
        assert 0 < stats.disk_misses <= stats.misses
        assert stats.disk_bytes >= stats.disk_misses * PAGE
        assert stats.disk_waited_seconds > 0
    model = load(tmp_path, budget, host_memory=everything)
    assert isinstance(cache_of(model).host, HostStore)
    assert torch.equal(logits(model), expected) and qmoe.stats(model).disk_bytes == 0


@pytest.mark.parametrize("device", DEVICES)
def test_decodes_prompts_and_generates(checkpoint, device) -> None:
    """One token at a time, in waves, streamed, and as `qmoe.generate` and transformers do."""
    path, _, _ = checkpoint
    budget = smallest_budget(path, device=device)
    bound = smallest_bound(path, budget, device=device) + 2 * PAGE
    resident = qmoe.load(path, device=device)
    model = load(path, budget, device=device, host_memory=bound)
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (1, 2, 7, 40):
        ids = torch.randint(1, 64, (1, num_tokens), generator=generator).to(device)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, resident(ids).logits), num_tokens
    ids = torch.tensor([[5, 6, 7, 8]], device=device)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), resident.generate(ids, **options))
    assert qmoe.stats(model).disk_misses > 0
    qmoe.release(model)


def test_memory_is_bounded(checkpoint) -> None:
    path, expected, budget = checkpoint
    model = load(path, budget, host_memory=8 * PAGE)
    assert torch.equal(logits(model), expected)
    cache, seen = cache_of(model), set()
    # What is on the device, here in host memory too, is not the host's.
    storage_bytes([cache._pool.memory, *model.parameters()], seen)
    store = cache.host
    taken = storage_bytes(store.frames, seen)
    assert store.num_bytes == 8 * PAGE == taken
    assert len(store.frames) + 2 * store._num_landing == 8
    tables = [vars(cache._reads.frames), vars(cache._reads._box), vars(store.table)]
    assert storage_bytes(tables, seen) < 3 * PAGE


def test_another_budget_and_back(checkpoint) -> None:
    path, expected, budget = checkpoint
    model = load(path, budget, host_memory=8 * PAGE)
    assert torch.equal(logits(model), expected)
    for size in (budget + 4 * PAGE, budget, budget + 2 * PAGE):
        qmoe.resize(model, hbm_budget=size)
        assert torch.equal(logits(model), expected)
    assert cache_of(model).host.num_bytes == 8 * PAGE
    qmoe.resize(model, hbm_budget="1GiB")
    assert not is_paged(model) and torch.equal(logits(model), expected)
    assert not readers_running()
    with pytest.raises(ValueError, match="has all of them on the device; load it again"):
        qmoe.resize(model, hbm_budget=budget)
    assert torch.equal(logits(model), expected)


def test_a_paged_model_can_be_saved(checkpoint, tmp_path) -> None:
    path, expected, budget = checkpoint
    load(path, budget, host_memory=8 * PAGE).save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(qmoe.load(tmp_path / "saved", device="cpu")), expected)


def test_several_threads_and_two_models(checkpoint) -> None:
    path, expected, budget = checkpoint
    models = [load(path, budget, host_memory=bound * PAGE) for bound in (6, 9)]
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(logits, models[i % 2]) for i in range(24)]
        assert all(torch.equal(run.result(timeout=120), expected) for run in runs)


def test_threads_and_files_end(checkpoint) -> None:
    path, expected, budget = checkpoint
    gc.collect()
    before = readers_running(), len(os.listdir("/proc/self/fd"))
    model = load(path, budget, host_memory=8 * PAGE)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
        assert readers_running() > before[0]
        qmoe.release(model)
        assert (readers_running(), len(os.listdir("/proc/self/fd"))) == before
    logits(model)
    del model
    gc.collect()
    assert (readers_running(), len(os.listdir("/proc/self/fd"))) == before


def test_ctrl_c_while_readers_are_told_to_end(checkpoint, monkeypatch) -> None:
    path, expected, budget = checkpoint
    model = load(path, budget, host_memory=8 * PAGE)
    logits(model)
    cache_of(model)._reads._seconds = 0.5

    def interrupted(*given) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workers.Team, "close", interrupted)
        qmoe.release(model)
    cache_of(model).forget()
    assert torch.equal(logits(model), expected)


# ---- a disk that fails -------------------------------------------------------------------------


def truncate(file: Path) -> None:
    os.truncate(file, 1000)


def overwrite(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-100, os.SEEK_END)
        stream.write(b"x" * 100)


@pytest.mark.parametrize("harm", [truncate, overwrite])
def test_a_file_that_is_harmed_midway(checkpoint, harm) -> None:
    path, expected, budget = checkpoint
    model = load(path, budget, host_memory=6 * PAGE)
    assert torch.equal(logits(model), expected)
    for parameter in model.parameters():  # on the CPU safetensors has mapped them from the file
        parameter.data = parameter.data.clone()
    file = shard(path)
    content, status = file.read_bytes(), file.stat()
    harm(file)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            logits(model)
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):
        assert torch.equal(logits(model), expected)


def test_a_file_that_is_replaced_is_not_taken_for_it(checkpoint) -> None:
    path, expected, budget = checkpoint
    model = load(path, budget, host_memory=6 * PAGE)
    assert torch.equal(logits(model), expected)
    file = shard(path)
    kept = file.rename(path / "kept")
    shutil.copy(kept, file)
    # The threads have the file open that it was.
    assert torch.equal(logits(model)[:1], expected[:1])
    qmoe.release(model)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(file))}.*load the model again"):
        logits(model)
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(file))}.*put it back"):
        logits(model)
    kept.rename(file)
    assert torch.equal(logits(model), expected)


def test_a_disk_that_hangs_ends_in_an_error(checkpoint, monkeypatch) -> None:
    path, expected, budget = checkpoint
    monkeypatch.setattr(workers, "JOIN_SECONDS", 0.1)
    model = load(path, budget, host_memory=6 * PAGE)
    assert torch.equal(logits(model), expected)
    reads = cache_of(model)._reads
    reads._seconds = 0.1
    answers = workers.wait_for_answer
    hanging = True

    def wait(words, number, seconds):
        return not hanging and answers(words, number, seconds)

    monkeypatch.setattr(workers, "wait_for_answer", wait)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"did not give its experts within 0\.1 s"):
            logits(model)
    hanging = False
    for _ in range(2):
        assert torch.equal(logits(model), expected)


def test_ctrl_c_while_pages_are_read(checkpoint, monkeypatch) -> None:
    path, expected, budget = checkpoint
    model = load(path, budget, host_memory=6 * PAGE)
    assert torch.equal(logits(model), expected)
    answers, calls = workers.wait_for_answer, []

    def wait(words, number, seconds):
        calls.append(number)
        if len(calls) % 3 == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        return answers(words, number, seconds)

    for _ in range(3):
        monkeypatch.setattr(workers, "wait_for_answer", wait)
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            logits(model)
        monkeypatch.setattr(workers, "wait_for_answer", answers)
        assert torch.equal(logits(model), expected)


def test_ctrl_c_while_threads_start(checkpoint, monkeypatch) -> None:
    path, expected, budget = checkpoint
    model = load(path, budget, host_memory=6 * PAGE)
    start, calls = threading.Thread.start, []

    def interrupted(thread) -> None:
        start(thread)
        calls.append(thread)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert torch.equal(logits(model), expected), "nothing failed"


def test_a_text_that_another_call_s_failure_may_have_spoilt_is_not_given_out(checkpoint) -> None:
    path, _, budget = checkpoint
    model = load(path, budget, host_memory=6 * PAGE)
    file, given = shard(path), []

    class Streamer:
        def put(self, value) -> None:
            given.append(value)
            if len(given) == 3:  # the prompt, and two tokens
                qmoe.release(model)  # the next call opens the file
                hidden = file.rename(path / "hidden")
                with pytest.raises(CheckpointError):
                    logits(model)
                hidden.rename(file)

        def end(self) -> None: ...

    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    with pytest.raises(RuntimeError, match="not valid; call again"):
        streamer = Streamer()
        decode = partial(qmoe.decode, streamer=streamer)
        model.generate(ids, custom_generate=decode, streamer=streamer, **options)
    assert len(given) == 3
    resident = qmoe.load(path, device="cpu")
    found = model.generate(ids, custom_generate=qmoe.decode, **options)
    assert torch.equal(found, resident.generate(ids, **options))


def test_a_failure_in_the_middle_of_resize(checkpoint, monkeypatch) -> None:
    path, expected, budget = checkpoint
    model = load(path, budget, host_memory=6 * PAGE)
    assert torch.equal(logits(model), expected)
    file = shard(path)
    hidden = file.rename(path / "hidden")
    for size in (budget + 2 * PAGE, "1GiB"):
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            qmoe.resize(model, hbm_budget=size)
    hidden.rename(file)
    assert torch.equal(logits(model), expected)
    qmoe.resize(model, hbm_budget=budget + 2 * PAGE)
    assert torch.equal(logits(model), expected)


def test_a_forked_child_reads_with_threads_of_its_own(checkpoint) -> None:
    path, expected, budget = checkpoint
    model = load(path, budget, host_memory=6 * PAGE)
    assert torch.equal(logits(model), expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a child has none of torch's threads, and torch waits for them
    child = os.fork()
    if child == 0:
        os._exit(7 if torch.equal(logits(model), expected) else 1)
    for _ in range(200):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    torch.set_num_threads(threads)
    assert pid and os.waitstatus_to_exitcode(status) == 7
    assert torch.equal(logits(model), expected)


def test_a_process_ends_while_threads_run(checkpoint) -> None:
    path, _, budget = checkpoint
    code = (
        "import qmoe, torch\n"
        f"model = qmoe.load({str(path)!r}, hbm_budget={budget}, context={CONTEXT}, device='cpu', "
        f"host_memory={6 * PAGE})\n"
        "model(torch.tensor([[1, 2, 3]]))\n"
        "print(qmoe.stats(model).disk_misses > 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "Error" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_captured_step_that_cannot_read_is_an_error(checkpoint) -> None:
    path, _, _ = checkpoint
    budget = smallest_budget(path, device="cuda")
    bound = smallest_bound(path, budget, device="cuda")
    model = load(path, budget, device="cuda", host_memory=bound)
    ids = torch.tensor([[5, 6, 7, 8]], device="cuda")
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
    expected = model.generate(ids, **options)
    file = shard(path)
    content, status = file.read_bytes(), file.stat()
    truncate(file)
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        model.generate(ids, **options)
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(model.generate(ids, **options), expected)


# ---- what is refused ---------------------------------------------------------------------------


def test_refusals(checkpoint, tmp_path) -> None:
    path, _, budget = checkpoint
    least = smallest_bound(path, budget)
    assert cache_of(load(path, budget, host_memory=least)).host.num_bytes == least
    with pytest.raises(ValueError, match="smallest that works"):
        load(path, budget, host_memory=least - 1)
    with pytest.raises(ValueError, match=r"host_memory: 'much' is not a size"):
        load(path, budget, host_memory="much")
    with pytest.raises(ValueError, match="has no effect without hbm_budget"):
        qmoe.load(path, device="cpu", host_memory="1GiB")
    with pytest.raises(ValueError, match=r"host_memory leaves experts in files.*'link' works"):
        load(path, budget, host_memory=least, misses="host")
    plain = tmp_path / "plain"
    build("qwen3_moe", 12).save_pretrained(plain)
    with pytest.raises(ValueError, match=r"convert it with convert-checkpoint first"):
        load(plain, "1GiB", weights="int8", host_memory="1MB")
    with pytest.raises(ValueError, match=r"convert it with convert-checkpoint first"):
        config = qmoe.QmoeConfig(paging=PagingOptions("1GiB", CONTEXT, host_memory="1MB"))
        type(build("qwen3_moe", 12)).from_pretrained(
            plain, quantization_config=config, device_map="cpu"
        )


def test_auto_leaves_all_to_the_link(checkpoint, caplog) -> None:
    path, expected, budget = checkpoint
    model = load(path, budget, host_memory=6 * PAGE, misses="auto")
    assert cache_of(model).sharing is None and torch.equal(logits(model), expected)


def test_without_native_loops_it_is_refused(checkpoint, monkeypatch) -> None:
    path, _, budget = checkpoint
    monkeypatch.setattr("qmoe_kernels.cpu.native.address_of", lambda name: None)
    with pytest.raises(ValueError, match=r"host_memory cannot bound.*native loops"):
        load(path, budget, host_memory=6 * PAGE)
