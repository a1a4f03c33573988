"""Pages in host memory: where they lie, what fills them, what refuses, what is given back."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from qmoe.checkpoints.files import CheckpointError
from qmoe.experts.pages import LayerPages
from qmoe.paging import host_store
from qmoe.paging.host_store import HostStore, PageRead, available_bytes

# Page sizes that are no multiple of the alignment, and layers that differ.
LAYERS = [
    LayerPages("layers.0", 3, torch.int8, (6, 5), (5, 7)),
    LayerPages("layers.1", 5, torch.float8_e4m3fn, (8, 16), (16, 8)),
]


def reads_of(file: Path) -> tuple[list[PageRead], list[torch.Tensor]]:
    """A file of random bytes that holds every page in two pieces, and the pages themselves.

    All first pieces of a layer lie before its second ones, as a fused checkpoint has them.
    """
    generator = torch.Generator().manual_seed(0)
    reads, pages, content = [], [], b"header."
    for index, layer in enumerate(LAYERS):
        size = (layer.num_experts, layer.page_bytes)
        values = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        pages.append(values)
        for start, stop in ((0, layer.down_offset), (layer.down_offset, layer.page_bytes)):
            for expert in range(layer.num_experts):
                reads.append(PageRead(index, expert, start, file, len(content), stop - start))
                content += bytes(values[expert, start:stop].tolist())
    file.write_bytes(content)
    return reads, pages


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_pages_lie_where_the_addresses_say() -> None:
    store = HostStore(LAYERS, pin=False)
    assert store.first_page == (0, 3)
    assert store.addresses.dtype == torch.int64 and store.addresses.shape == (8,)
    for layer, geometry in enumerate(LAYERS):
        pages = store.pages(layer)
        assert pages.shape == (geometry.num_experts, geometry.page_stride)
        for expert in range(geometry.num_experts):
            address = store.addresses[store.first_page[layer] + expert]
            assert address == pages[expert].data_ptr() and address % 128 == 0
    assert store.num_bytes == 3 * 128 + 5 * 256


def test_weights_are_views_of_the_pages() -> None:
    store = HostStore(LAYERS, pin=False)
    gate_up, down = store.weights(1)
    assert gate_up.shape == (5, 8, 16) and down.shape == (5, 16, 8)
    assert gate_up.dtype == down.dtype == torch.float8_e4m3fn
    down[4] = 2.0
    gate_up[4] = 1.0
    expected = torch.tensor([1.0] * 128 + [2.0] * 128).to(torch.float8_e4m3fn)
    assert torch.equal(store.pages(1)[4], expected.view(torch.uint8))
    assert not store.pages(1)[:4].any()


@pytest.mark.parametrize("run_bytes", [1, 64 << 20])
def test_files_fill_pages(run_bytes, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(host_store, "_BATCH_BYTES", run_bytes)
    reads, pages = reads_of(tmp_path / "shard")
    store = HostStore(LAYERS, pin=False)
    store.fill(reads[::-1])
    for layer, expected in enumerate(pages):
        assert torch.equal(store.pages(layer)[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("run_bytes", [1, 64 << 20])
def test_a_truncated_file_is_an_error(run_bytes, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(host_store, "_BATCH_BYTES", run_bytes)
    file = tmp_path / "shard"
    reads, _ = reads_of(file)
    os.truncate(file, file.stat().st_size - 1)
    store = HostStore(LAYERS, pin=False)
    with pytest.raises(CheckpointError, match=r"shard: ends at byte .*truncated"):
        store.fill(reads)


def test_a_file_that_vanishes_midway_is_an_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(host_store, "_BATCH_BYTES", 1)
    monkeypatch.setattr(host_store, "_NUM_THREADS", 1)
    file = tmp_path / "shard"
    reads, pages = reads_of(file)
    store = HostStore(LAYERS, pin=False)
    read = store._read

    def vanish_after_the_first(run):
        count = read(run)
        file.unlink(missing_ok=True)
        return count

    monkeypatch.setattr(store, "_read", vanish_after_the_first)
    with pytest.raises(CheckpointError, match="shard: vanished"):
        store.fill(reads)
    assert torch.equal(store.pages(0)[0, : LAYERS[0].down_offset], pages[0][0, :30])
    assert not store.pages(1).any()
    reads, pages = reads_of(file)
    monkeypatch.undo()
    store.fill(reads)
    assert torch.equal(store.pages(1), pages[1])


def test_too_little_memory_is_refused_before_anything_is_taken(monkeypatch) -> None:
    monkeypatch.setenv(host_store.AVAILABLE_VARIABLE, "0.5")
    monkeypatch.setattr(host_store, "_allocate", lambda nbytes: pytest.fail("allocated"))
    large = LayerPages("large", 256, torch.int8, (1024, 2048), (2048, 1024))
    with pytest.raises(ValueError, match=r"1\.08 GB of host memory, 537 MB are available"):
        HostStore([large], pin=False)


def test_available_memory_can_be_overridden(monkeypatch) -> None:
    assert 0 < available_bytes() < 1 << 50
    monkeypatch.setenv(host_store.AVAILABLE_VARIABLE, "1.5")
    assert available_bytes() == 3 << 29
    monkeypatch.setenv(host_store.AVAILABLE_VARIABLE, "plenty")
    with pytest.raises(ValueError, match="QMOE_HOST_MEMORY_GIB='plenty'"):
        available_bytes()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize("how", ["close", "drop"])
def test_memory_is_given_back(how) -> None:
    layer = LayerPages("layer", 64, torch.int8, (1024, 1024), (1024, 1024))
    before = resident_bytes()
    store = HostStore([layer, layer], pin=False)
    view = store.pages(1)
    for index in range(2):
        store.pages(index).fill_(7)
    assert resident_bytes() - before > 250 << 20
    if how == "close":
        store.close()
        store.close()
        with pytest.raises(ValueError, match="closed"):
            store.pages(0)
    else:
        del store
        gc.collect()
    assert view[0, 0] == 7  # what is still looked at stays
    assert resident_bytes() - before < 150 << 20
    del view
    assert resident_bytes() - before < 20 << 20


def test_pinning_that_fails_gives_everything_back(monkeypatch) -> None:
    """A driver that pins one layer and refuses the other."""
    registered, unregistered = [], []

    def register(address: int, nbytes: int, device: int) -> str | None:
        if registered:
            return "out of memory"
        registered.append(address)
        return None

    class Cudart:
        cudaHostUnregister = unregistered.append

    monkeypatch.setattr(host_store, "_register", register)
    monkeypatch.setattr(host_store, "_NUM_THREADS", 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart)
    with pytest.raises(ValueError, match=r"cannot pin 1\.67 kB.*out of memory after 1 of 2 lay"):
        HostStore(LAYERS, pin=True)
    assert unregistered == registered and len(registered) == 1


@pytest.mark.gpu
def test_pinned_pages_are_read_by_the_gpu(tmp_path) -> None:
    reads, pages = reads_of(tmp_path / "shard")
    store = HostStore(LAYERS, pin=True)
    store.fill(reads)
    for layer, expected in enumerate(pages):
        memory = store.pages(layer)
        assert memory.is_pinned()
        copied = memory.to("cuda", non_blocking=True)
        assert torch.equal(copied.cpu()[:, : expected.shape[1]], expected)
    view = store.pages(0)
    store.close()
    assert not view.is_pinned() and torch.equal(view[:, :65], pages[0])


@pytest.mark.gpu
def test_a_refused_registration_leaves_cuda_usable() -> None:
    store = HostStore(LAYERS, pin=True)
    memory = store.pages(0)
    assert host_store._register(memory.data_ptr(), memory.nbytes, 0)  # registered already
    assert torch.ones(3, device="cuda").sum().item() == 3
    store.close()
