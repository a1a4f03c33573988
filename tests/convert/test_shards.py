from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qmoe.checkpoints.files import (
    DTYPE_NAMES,
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointError,
    StoredTensor,
    open_checkpoint,
    read_header,
)
from qmoe_convert.shards import (
    DIRECT_BYTES,
    BufferPool,
    PlannedTensor,
    Reader,
    ShardWriter,
    _memory,
    header_bytes,
    read_past_cache,
    sha256_of,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(
        {"a": torch.arange(6).reshape(2, 3), "b": torch.ones(4)}, tmp_path / "one.safetensors"
    )
    save_file({"c": torch.zeros(3)}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


class TestReading:
    def test_headers_agree_with_safetensors(self, folder: Path) -> None:
        tensors = open_checkpoint(folder)
        reader = Reader(tensors)
        assert set(tensors) == {"a", "b", "c"}
        for name, tensor in tensors.items():
            with safe_open(tensor.file, "pt") as file:
                assert torch.equal(reader.read(name), file.get_tensor(name))

    def test_rows(self, folder: Path) -> None:
        reader = Reader(open_checkpoint(folder))
        assert reader.read("a", slice(1, 2)).tolist() == [[3, 4, 5]]

    def test_memory_is_used_again_only_after_reserve(self, folder: Path) -> None:
        reader = Reader(open_checkpoint(folder))
        reader.reserve(1024)
        a, b = reader.read("a"), reader.read("b")
        assert a.tolist() == [[0, 1, 2], [3, 4, 5]] and b.tolist() == [1, 1, 1, 1]
        reader.reserve(1024)
        assert reader.read("b").data_ptr() == a.data_ptr()

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "empty"),
            (b"abc", "not a safetensors file"),
            (b"\xff" * 100, "not a safetensors file"),
            ((1000).to_bytes(8, "little") + b"{", "truncated inside its header"),
            ((4).to_bytes(8, "little") + b"[1,2", "header cannot be read"),
            ((4).to_bytes(8, "little") + b"[12]", "header cannot be read"),
            ((8).to_bytes(8, "little") + b'{"a": 1}', "header cannot be read"),
        ],
    )
    def test_files_that_are_no_safetensors(self, tmp_path: Path, data: bytes, message: str) -> None:
        file = tmp_path / "broken.safetensors"
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=message) as error:
            read_header(file)
        assert str(file) in str(error.value)

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        ],
    )
    def test_sizes_that_do_not_add_up(self, tmp_path: Path, entry: dict[str, object]) -> None:
        text = json.dumps({"a": entry}).encode()
        file = tmp_path / "model.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
        with pytest.raises(CheckpointError, match="a, F32 of shape"):
            read_header(file)

    def test_truncated_data_name_the_tensor(self, folder: Path) -> None:
        file = folder / "one.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=r"one\.safetensors: truncated .* [ab] ends at"):
            open_checkpoint(folder)

    @settings(
        max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(st.data())
    def test_damage_is_an_error_or_harmless(self, tmp_path: Path, data: st.DataObject) -> None:
        file = tmp_path / "damaged.safetensors"
        save_file({"x": torch.ones(3), "y": torch.ones(2, 2).bfloat16()}, file)
        raw = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
        try:
            tensors = read_header(file)
        except CheckpointError:
            return
        for tensor in tensors.values():
            assert tensor.offset + tensor.nbytes <= file.stat().st_size


class TestOpening:
    @pytest.mark.parametrize("name", ["/etc/passwd", "../one.safetensors", "a/../../b", "..\\x"])
    def test_no_path_leaves_the_folder(self, folder: Path, name: str) -> None:
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="outside its folder"):
            open_checkpoint(folder)

    def test_links_to_blobs_are_followed(self, folder: Path, tmp_path: Path) -> None:
        (folder / "one.safetensors").rename(folder / "blob")
        (folder / "one.safetensors").symlink_to("blob")
        assert "a" in open_checkpoint(folder)

    def test_missing_file(self, folder: Path) -> None:
        (folder / "two.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"two\.safetensors: missing"):
            open_checkpoint(folder)

    def test_promised_tensor(self, folder: Path) -> None:
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"z": "one.safetensors"}}))
        with pytest.raises(CheckpointError, match="lacks z"):
            open_checkpoint(folder)

    def test_a_single_file_comes_first_as_in_transformers(self, folder: Path) -> None:
        """An index that names it, or shards that are gone, does not contradict it."""
        (folder / "one.safetensors").rename(folder / SINGLE_NAME)
        (folder / "two.safetensors").rename(folder / "x")
        assert set(open_checkpoint(folder)) == {"a", "b"}
        index = {"weight_map": {"a": SINGLE_NAME, "b": SINGLE_NAME}}
        (folder / INDEX_NAME).write_text(json.dumps(index))
        assert set(open_checkpoint(folder)) == {"a", "b"}

    def test_a_single_file_beside_shards(self, folder: Path) -> None:
        """transformers takes the one, vLLM the others."""
        save_file({"a": torch.ones(1)}, folder / SINGLE_NAME)
        with pytest.raises(CheckpointError, match=rf"{SINGLE_NAME} and one\.safetensors.*remove"):
            open_checkpoint(folder)

    def test_a_tensor_that_the_index_does_not_name(self, folder: Path) -> None:
        index = {"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}
        (folder / INDEX_NAME).write_text(json.dumps(index))
        assert set(open_checkpoint(folder)) == {"a", "b", "c"}  # as transformers

    @pytest.mark.parametrize("named", ["one", "two", None])
    def test_a_tensor_in_two_shards(self, folder: Path, named: str | None) -> None:
        """Of both transformers takes the second."""
        save_file({"a": torch.ones(5), "c": torch.zeros(3)}, folder / "two.safetensors")
        index = {"b": "one.safetensors", "c": "two.safetensors"}
        index |= {"a": f"{named}.safetensors"} if named else {}
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": index}))
        if named == "two":
            assert open_checkpoint(folder)["a"].shape == (5,)
        else:
            with pytest.raises(
                CheckpointError, match=r"two\.safetensors: holds a, and so does one"
            ):
                open_checkpoint(folder)

    def test_a_shard_that_the_index_does_not_name(self, folder: Path) -> None:
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        save_file({"a": torch.ones(1)}, folder / names[0])
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": names[0]}}))
        # Of another set, or no shard at all
        save_file({"z": torch.ones(1)}, folder / "model-00003-of-00003.safetensors")
        assert set(open_checkpoint(folder)) == {"a"}
        save_file({"z": torch.ones(1)}, folder / names[1])
        with pytest.raises(CheckpointError, match=f"{names[1]}: lies beside .* not named itself"):
            open_checkpoint(folder)

    def test_a_file_that_is_replaced_after_its_header_was_read(self, folder: Path) -> None:
        reader = Reader(open_checkpoint(folder))
        file = folder / "two.safetensors"
        save_file({"c": torch.ones(3)}, folder / "new")
        (folder / "new").replace(file)
        with pytest.raises(CheckpointError, match=r"two\.safetensors: changed while"):
            reader.read("c")
        assert reader.read("a").tolist() == [[0, 1, 2], [3, 4, 5]]

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', "\x00"])
    def test_broken_index(self, folder: Path, text: str) -> None:
        (folder / INDEX_NAME).write_text(text)
        with pytest.raises(CheckpointError, match=r"not an index|not JSON|no JSON object"):
            open_checkpoint(folder)

    def test_pickles_are_refused(self, folder: Path) -> None:
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
        (folder / INDEX_NAME).write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
        with pytest.raises(CheckpointError, match="pickled weights are never loaded"):
            open_checkpoint(folder)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ([], "holds no config.json, and neither"),
            (["README.md"], "holds no config.json, and neither"),
            (["pytorch_model.bin", "config.json"], r"pytorch_model\.bin: empty; pickled weights"),
            (["pytorch_model.bin.index.json", "a.bin"], r"a\.bin: empty; pickled weights"),
            (["consolidated.00.safetensors", "params.json"], "own names, which transformers does"),
            (["x-Q4_K_M.gguf"], "GGUF"),
            (["model-00001-of-00002.safetensors"], "download the index"),
            (["model.safetensors.incomplete"], "a part of a download"),
            (["adapter_config.json", "adapter_model.safetensors"], "an adapter .* merge it into"),
            (["tf_model.h5"], "another framework"),
        ],
    )
    def test_what_is_there_instead_is_named(
        self, tmp_path: Path, names: list[str], message: str
    ) -> None:
        for name in names:
            (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)

    @pytest.mark.parametrize("name", ["one.safetensors", INDEX_NAME])
    @pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
    def test_what_is_no_file(self, folder: Path, name: str, kind: str) -> None:
        """Opening a FIFO would wait for a writer, reading /dev/zero would never end."""
        (folder / name).unlink()
        if kind == "fifo":
            os.mkfifo(folder / name)
        elif kind == "folder":
            (folder / name).mkdir()
        else:
            (folder / name).symlink_to("/dev/zero")
        with pytest.raises(CheckpointError, match=rf"{name}: not a regular file"):
            open_checkpoint(folder)

    @pytest.mark.parametrize("gap", [-1, 1])
    def test_bytes_of_no_tensor_or_of_two(self, tmp_path: Path, gap: int) -> None:
        entries = {
            "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
            "b": {"dtype": "U8", "shape": [4], "data_offsets": [4 + gap, 8 + gap]},
        }
        text = json.dumps(entries).encode()
        file = tmp_path / "model.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8 + gap))
        with pytest.raises(CheckpointError, match=r"b begins at"):
            read_header(file)
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(20))
        with pytest.raises(CheckpointError, match=r"begins at|too long"):
            read_header(file)


class TestWriting:
    @settings(
        max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(
        st.integers(0, 40),
        st.lists(st.tuples(st.sampled_from(["F32", "BF16", "I64"]), st.integers(0, 5)), max_size=5),
    )
    def test_every_reader_reads_it(
        self, tmp_path: Path, leading: int, others: list[tuple[str, int]]
    ) -> None:
        """Whatever the bytes of one-byte items before them, wider items stay aligned."""
        dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
        others.sort(key=lambda other: -dtypes[other[0]].itemsize)
        expected = {"q": torch.randint(-9, 9, (leading,), dtype=torch.int8)}
        planned = [PlannedTensor("q", "I8", (leading,), leading)]
        for i, (dtype, size) in enumerate(others):
            tensor = torch.randint(-9, 9, (size, 3)).to(dtypes[dtype])
            expected[f"t{i}"] = tensor
            planned.append(PlannedTensor(f"t{i}", dtype, (size, 3), tensor.nbytes))
        header = header_bytes(planned)
        file = tmp_path / "model.safetensors"
        with ShardWriter(file, len(header) + sum(t.nbytes for t in planned)) as writer:
            writer.write(header)
            for name in expected:
                writer.write(expected[name])
            assert not file.exists() or file.stat().st_ino != writer.partial.stat().st_ino
            sha256 = writer.finish()
        assert sha256 == hashlib.sha256(file.read_bytes()).hexdigest() == sha256_of(file)
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, expected[name])
        for name, stored in read_header(file).items():
            assert stored.offset % expected[name].itemsize == 0

    def test_memory_is_used_again_only_once_it_is_hashed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("qmoe_convert.shards.UNHASHED_BYTES", 1 << 20)
        data, digest = torch.empty(9 << 20, dtype=torch.uint8), hashlib.sha256()
        with ShardWriter(tmp_path / "x.safetensors", 4 * data.numel()) as writer:
            for value in range(4):
                digest.update(data.fill_(value).numpy())
                writer.write(data)
                hashed = threading.Event()
                writer.after(hashed.set)
                assert hashed.wait(60)
            assert writer.finish() == digest.hexdigest() == sha256_of(writer.file)

    def test_a_file_has_its_name_only_when_whole(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path / "x.safetensors", 4) as writer:
            writer.write(b"ab")
        assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors.partial"]


def test_unknown_dtype_names_the_tensor() -> None:
    tensor = StoredTensor("w", Path("f.safetensors"), "F4", (2,), 8, 1)
    with pytest.raises(CheckpointError, match=r"f\.safetensors: w has dtype F4"):
        _ = tensor.torch_dtype


def test_buffers_are_used_again() -> None:
    pool = BufferPool()
    first, second = pool.take(10), pool.take(10)
    assert first.data_ptr() != second.data_ptr()
    pool.give(second)
    assert pool.take(5).data_ptr() == second.data_ptr()
    pool.give(first)
    assert pool.take(11).numel() == 11 and pool.nbytes == 21  # `first` was too small: dropped
    assert pool.take(1).data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_hashing_is_over_all_chunks(tmp_path: Path) -> None:
    data = random.Random(0).randbytes((1 << 22) + 17)
    (tmp_path / "f").write_bytes(data)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(data).hexdigest()


class TestPastTheCache:
    """What does not go through the system's cache, and file systems that know no such thing."""

    @pytest.fixture(params=["direct", "refused by open", "refused by write", "unknown"])
    def way(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        if not hasattr(os, "O_DIRECT"):
            pytest.skip("this system has no direct writes")
        way: str = request.param
        opened, refuse = os.open, OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        direct = os.O_DIRECT

        def open_(file: Any, flags: int, *mode: int) -> int:
            if flags & direct:
                raise refuse
            return opened(file, flags, *mode)

        def write(descriptor: int, data: memoryview) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct:
                raise refuse
            return len(data[:1000]) and written(descriptor, data[:1000])

        written = os.write
        if way == "refused by open":
            monkeypatch.setattr(os, "open", open_)
        elif way == "refused by write":
            monkeypatch.setattr(os, "write", write)
        elif way == "unknown":
            monkeypatch.delattr(os, "O_DIRECT")
        return way

    @pytest.mark.parametrize("size", [0, 1, 4096, 4097, (4 << 20) + 5, 8 << 20])
    def test_the_bytes_are_the_same(self, way: str, size: int, tmp_path: Path) -> None:
        data = torch.randint(0, 256, (size,), dtype=torch.uint8)
        with ShardWriter(tmp_path / "x", size) as writer:
            for part in data.split(1_000_003):
                writer.write(part)
            writer.finish()
        assert (tmp_path / "x").read_bytes() == data.numpy().tobytes()
        for start in (0, 1, 4095, 5000):
            for stop in (start, start + 1, min(start + 4096, size), size):
                if start <= stop <= size:
                    room = _memory(stop - start + 2 * DIRECT_BYTES)
                    read = read_past_cache(tmp_path / "x", start, stop, room)
                    assert torch.equal(read, data[start:stop])
        with pytest.raises(CheckpointError, match="ends early"):
            read_past_cache(tmp_path / "x", size, size + 1, _memory(3 * DIRECT_BYTES))

    def test_a_full_disk_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where the file system takes a part that is no whole block."""
        room = [4 << 20, 777, 0]

        def write(descriptor: int, data: memoryview) -> int:
            if left := room.pop(0):
                return left
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", write)
        with (
            pytest.raises(OSError, match=r"No space left on device: .*x\.partial"),
            ShardWriter(tmp_path / "x", 9 << 20) as writer,
        ):
            writer.write(torch.zeros(9 << 20, dtype=torch.uint8))
