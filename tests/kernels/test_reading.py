"""Pages that are read from files into frames: which, what they hold then, and what may go wrong.

The reading threads are real in all of it; on a machine without a GPU the device is Triton's
interpreter, or plain Python over the same tensors.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from compiling import run_compiler
from graphs import capture
from random_layer import DEVICE
from test_paging import Reference, Step, expected_tables

from qmoe_kernels import reading, reading_kernels
from qmoe_kernels.cpu import readers, workers
from qmoe_kernels.cpu.readers import FileState, PageTable, Readers
from qmoe_kernels.paging import HITS, MISSES, CopyList, Residency, Transfer, admit
from qmoe_kernels.reading import Frames, ReadBox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="readers need Linux")

IMPLEMENTATIONS = ["cpu", "triton"]
NUM_LAYERS, NUM_EXPERTS, TOP_K, NUM_FRAMES, NUM_SLOTS = 3, 8, 2, 9, 4
PAGE_BYTES = 384
NUM_PAGES = NUM_LAYERS * NUM_EXPERTS


def state_of(file: Path) -> FileState:
    status = file.stat()
    return FileState(file, status.st_size, status.st_mtime_ns)


def make_files(folder: Path) -> tuple[torch.Tensor, PageTable]:
    """Pages at random, the halves of each in two files, in another order than pages have."""
    generator = torch.Generator().manual_seed(0)
    pages = torch.randint(0, 256, (NUM_PAGES, PAGE_BYTES), generator=generator).to(torch.uint8)
    half, order = PAGE_BYTES // 2, torch.randperm(NUM_PAGES, generator=generator).tolist()
    files = [folder / name for name in ("first", "second")]
    for number, file in enumerate(files):
        halves = pages[order, number * half : (number + 1) * half]
        file.write_bytes(b"header" + halves.contiguous().numpy().tobytes())
    rows = [
        [(number, 6 + order.index(page) * half, number * half, half) for number in (0, 1)]
        for page in range(NUM_PAGES)
    ]
    return pages, PageTable.of(rows, [state_of(file) for file in files])


@dataclass
class Disk:
    """Frames, slots, a mailbox and the threads that read."""

    implementation: str
    table: PageTable
    num_threads: int | None = 3

    def __post_init__(self) -> None:
        device = DEVICE if self.implementation == "triton" else torch.device("cpu")
        self.device, on_gpu = device, device.type == "cuda"
        self.memory = torch.zeros(NUM_FRAMES, PAGE_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
        self.box = ReadBox.empty(NUM_EXPERTS, device)
        self.frames = Frames.empty(NUM_PAGES, NUM_LAYERS, NUM_EXPERTS, self.memory, device)
        self.slots = Residency.empty(NUM_PAGES, NUM_SLOTS, NUM_LAYERS, device)
        self.copies = CopyList.empty(NUM_EXPERTS, device)
        self.readers: Readers | None = None
        if self.num_threads:
            memory = (self.box.words, self.box.status, self.box.pages, self.box.frames)
            self.readers = Readers(self.table, self.memory, *memory, self.num_threads)
            self.readers.start()

    def read(self, layer: int, ids: torch.Tensor, seconds: float = 5.0, experts=None) -> None:
        triton = self.implementation == "triton"
        run = reading_kernels.launch_read_pages if triton else reading._read_pages_cpu
        low, high = experts or (0, NUM_EXPERTS)
        where = (layer, layer * NUM_EXPERTS, NUM_EXPERTS, low, high)
        run(ids, *where, self.slots.page_to_slot, self.frames, self.box, seconds)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def frame_of(self, page: int) -> torch.Tensor:
        frame = int(self.frames.residency.page_to_slot[page])
        assert frame >= 0
        address = self.memory.data_ptr() + frame * PAGE_BYTES
        assert int(self.frames.addresses[page]) == address
        return self.memory[frame]

    def ids(self, *experts: int) -> torch.Tensor:
        return torch.tensor([experts], device=self.device)


@pytest.fixture
def disks(tmp_path) -> Iterator[list[Disk]]:
    """Disks whose threads end with the test."""
    made: list[Disk] = []
    yield made
    for disk in made:
        if disk.readers is not None:
            assert disk.readers.close()


def make_disk(disks: list[Disk], implementation: str, table: PageTable, **options) -> Disk:
    disk = Disk(implementation, table, **options)
    disks.append(disk)
    return disk


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_routed_pages_are_in_slots_or_in_frames(disks, implementation, tmp_path) -> None:
    """Against the cache of `test_paging`, of pages that are in no slot."""
    pages, table = make_files(tmp_path)
    disk = make_disk(disks, implementation, table)
    generator = torch.Generator().manual_seed(1)
    reference = Reference(NUM_EXPERTS, NUM_LAYERS, NUM_FRAMES)
    for step in range(30):
        layer = step % NUM_LAYERS
        ids = torch.rand(2, NUM_EXPERTS, generator=generator).topk(TOP_K).indices.to(disk.device)
        in_slots = frozenset((disk.slots.page_to_slot >= 0).nonzero().flatten().tolist())
        of_step = Step(layer, ids.tolist(), elsewhere=in_slots)
        reference.admit(of_step)
        disk.read(layer, ids)
        for page in set(reference.wanted(of_step)) - in_slots:
            assert torch.equal(disk.frame_of(page), pages[page]), (step, page)
        held = disk.frames.residency
        found = {f.name: getattr(held, f.name).tolist() for f in fields(Residency)}
        assert found == expected_tables(reference), step
        admit(ids, layer, layer * NUM_EXPERTS, NUM_EXPERTS, disk.slots, disk.copies)
    counters = disk.frames.residency.counters.sum(0)
    assert int(counters[HITS]) > 0 < int(counters[MISSES]) and not int(disk.frames.failed)


def test_both_implementations_agree(disks, tmp_path) -> None:
    _, table = make_files(tmp_path)
    both = [make_disk(disks, name, table) for name in IMPLEMENTATIONS]
    generator = torch.Generator().manual_seed(2)
    for step in range(12):
        layer = step % NUM_LAYERS
        ids = torch.randint(-1, NUM_EXPERTS + 1, (2, TOP_K), generator=generator)
        for disk in both:
            disk.read(layer, ids.to(disk.device), experts=(0, 7) if step % 3 else None)
        states = [
            [t.cpu() for t in vars(d.frames.residency).values()]
            + [d.memory, d.frames.number.cpu(), d.frames.reads.count.cpu()]
            for d in both
        ]
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True)), step


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_is_posted_where_nothing_is_absent(disks, implementation, tmp_path) -> None:
    _, table = make_files(tmp_path)
    disk = make_disk(disks, implementation, table)
    disk.read(0, disk.ids(1, 2))
    assert workers.load_word(disk.box.words, workers.POSTED) == 1
    disk.read(0, disk.ids(2, 1))
    assert workers.load_word(disk.box.words, workers.POSTED) == 1
    admit(disk.ids(5, 6), 0, 0, NUM_EXPERTS, disk.slots, disk.copies)
    disk.read(0, disk.ids(5, 6))  # in slots
    assert workers.load_word(disk.box.words, workers.POSTED) == 1


def test_a_page_is_read_in_parts(disks, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(readers, "PART_BYTES", 50)
    pages, table = make_files(tmp_path)
    assert len(table.parts) == NUM_PAGES * 2 * 4
    disk = make_disk(disks, "cpu", table, num_threads=7)
    for layer in range(NUM_LAYERS):
        disk.read(layer, disk.ids(7, 0, 3))
        for expert in (7, 0, 3):
            page = layer * NUM_EXPERTS + expert
            assert torch.equal(disk.frame_of(page), pages[page])


# ---- what may go wrong -------------------------------------------------------------------------


def truncate(file: Path) -> None:
    os.truncate(file, 7)


def overwrite(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.write(b"other!")
    os.utime(file, ns=(0, 12345))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("harm", "code"), [(truncate, readers.ENDED), (overwrite, readers.CHANGED)]
)
def test_a_file_that_is_not_what_it_was(disks, implementation, harm, code, tmp_path) -> None:
    _, table = make_files(tmp_path)
    disk = make_disk(disks, implementation, table)
    disk.read(0, disk.ids(0, 1))
    harm(table.files[1].path)
    disk.read(1, disk.ids(0, 1))
    assert reading.has_failed(disk.box) and int(disk.frames.failed) == 1
    number, found = divmod(int(disk.box.status), 1 << readers.FILE_BIT)
    assert number == 1 and found in (code, readers.CHANGED)
    # The others may have left theirs before they began: frames that nobody has used are zeros.
    frames = [disk.frame_of(NUM_EXPERTS + expert)[PAGE_BYTES // 2 :] for expert in (0, 1)]
    assert not any(frame.any() for frame in frames), "it holds what another file has"
    posted = workers.load_word(disk.box.words, workers.POSTED)
    disk.read(2, disk.ids(0, 1))
    assert workers.load_word(disk.box.words, workers.POSTED) == posted, "it posted after a failure"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_error_of_the_system_is_told_by_its_number(disks, implementation, tmp_path) -> None:
    _, table = make_files(tmp_path)
    (tmp_path / "folder").mkdir()
    folder = PageTable(table.first, table.parts, (table.files[0], state_of(tmp_path / "folder")))
    disk = make_disk(disks, implementation, folder)
    disk.read(0, disk.ids(3))
    assert divmod(int(disk.box.status), 1 << readers.FILE_BIT) == (1, 21)  # EISDIR


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pages_that_do_not_come_are_waited_for_once(disks, implementation, tmp_path) -> None:
    _, table = make_files(tmp_path)
    disk = make_disk(disks, implementation, table, num_threads=None)
    disk.read(0, disk.ids(3), seconds=0.05)
    assert reading.has_failed(disk.box) and int(disk.frames.failed) == 1
    began = time.monotonic()
    disk.read(0, disk.ids(4), seconds=60)
    assert time.monotonic() - began < 30


def test_a_missing_file_starts_no_thread(tmp_path) -> None:
    _, table = make_files(tmp_path)
    table.files[1].path.unlink()
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError) as caught:
        Disk("cpu", table)
    assert caught.value.filename == str(table.files[1].path)
    del caught
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_no_thread_and_no_file_is_left(tmp_path) -> None:
    _, table = make_files(tmp_path)
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for close in (True, False):
        disk = Disk("cpu", table)
        disk.read(0, disk.ids(1))
        assert threading.active_count() == before[0] + 3
        if close:
            assert disk.readers.close()
        del disk
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


# ---- on a GPU ----------------------------------------------------------------------------------


def graph_of(disk: Disk, ids: torch.Tensor, slots: torch.Tensor, seconds: float):
    """A captured admission that begins with reading."""

    def step() -> torch.Tensor:
        where = (0, 0, NUM_EXPERTS)
        reading.read_pages(ids, *where, disk.slots.page_to_slot, disk.frames, disk.box,
                           seconds=seconds)  # fmt: skip
        transfer = Transfer(disk.frames.addresses, slots, PAGE_BYTES)
        admit(ids, *where, disk.slots, disk.copies, transfer=transfer)
        return slots[disk.slots.page_to_slot[ids[0]].long()]

    step()
    return capture(step)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU")
def test_a_graph_reads_what_it_needs(disks, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "NUM_FRAMES", NUM_EXPERTS - 3)
    pages, table = make_files(tmp_path)
    disk = make_disk(disks, "triton", table)
    ids = disk.ids(0, 1)
    slots = torch.zeros(NUM_SLOTS, PAGE_BYTES, dtype=torch.uint8, device=DEVICE)
    graph, output = graph_of(disk, ids, slots, 5.0)
    generator = torch.Generator().manual_seed(3)
    for step in range(50):
        wanted = torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K]
        ids.copy_(wanted[None])
        if step % 10 == 5:
            time.sleep(0.02)  # the threads sleep
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output.cpu(), pages[wanted]), step
    assert not reading.has_failed(disk.box)
    assert int(disk.frames.residency.counters[0, MISSES]) > NUM_EXPERTS


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU")
def test_a_graph_sees_errors_and_does_not_wait_for_ever(disks, tmp_path) -> None:
    _, table = make_files(tmp_path)
    disk = make_disk(disks, "triton", table)
    ids = disk.ids(0, 1)
    slots = torch.zeros(NUM_SLOTS, PAGE_BYTES, dtype=torch.uint8, device=DEVICE)
    graph, _ = graph_of(disk, ids, slots, 0.2)
    truncate(table.files[0].path)
    ids.copy_(torch.tensor([[6, 7]]))
    graph.replay()
    torch.cuda.synchronize()
    assert reading.has_failed(disk.box) and int(disk.box.status) != 0
    disk.box.status.zero_()
    disk.frames.failed.zero_()
    disk.readers.close()
    disk.box.status.zero_()
    ids.copy_(torch.tensor([[4, 5]]))
    for least, most in ((0.1, 2), (0, 0.1)):  # it waits once
        began = time.monotonic()
        graph.replay()
        torch.cuda.synchronize()
        assert least <= time.monotonic() - began < most
        assert workers.load_word(disk.box.words, workers.FAILED)


# ---- compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import json
from compiling import compiling_for, spilled_bytes

with compiling_for(CAPABILITY) as compiled:
    import torch
    from qmoe_kernels.reading import Frames, ReadBox
    from qmoe_kernels.reading_kernels import launch_read_pages
    for num_frames, experts, dtype in ((900, 128, torch.int64), (3072, 256, torch.int32)):
        memory = torch.zeros(num_frames, 128, dtype=torch.uint8)
        frames = Frames.empty(48 * experts, 48, experts, memory, torch.device("cpu"))
        box = ReadBox.empty(experts, torch.device("cpu"))
        ids, slots = torch.zeros(1, 8, dtype=dtype), torch.zeros(48 * experts, dtype=torch.int32)
        launch_read_pages(ids, 0, 0, experts, 0, experts, slots, frames, box, 30.0)
for kernel in compiled:
    ptx = kernel.asm["ptx"]
    print(json.dumps({
        "name": kernel.metadata.name, "spilled": spilled_bytes(kernel.asm["cubin"]),
        "released": "st.release.sys" in ptx, "acquired": "ld.acquire.sys" in ptx,
        "timed": "globaltimer" in ptx, "volatile": "ld.volatile.global" in ptx,
    }))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int) -> None:
    kernels = run_compiler(f"CAPABILITY = {capability}\n{COMPILE}")
    assert [kernel["name"] for kernel in kernels] == 2 * ["read_kernel"]
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert all(kernel[name] for name in ("released", "acquired", "timed", "volatile")), kernel
