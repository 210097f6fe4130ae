"""Writing checkpoints and folders of safetensors a part at a time."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from megadit.checkpoint import load_tensors, read_manifest
from megadit.checkpoint.folder import check_file, latest
from megadit.checkpoint.source import open_source
from megadit.checkpoint.stream import Outgoing, appearing, plan_files, write_checkpoint, write_folder
from megadit.runtime.tensor_file import CODES, Spec, TensorFileWriter
from tests.ranks import heed_interrupts

TENSORS = {
    "byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "matrix": torch.randn(7, 10, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "large": torch.randn(9, 4, 5, dtype=torch.float64),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "no_rows": torch.zeros(3, 0),
    "last": torch.arange(4),
}


def outgoing(name, tensor, rows=2):
    """A tensor that comes two rows at a time."""

    def parts():
        return iter(tensor.split(rows) if tensor.ndim else [tensor])

    return Outgoing(name, tuple(tensor.shape), tensor.dtype, parts)


ALL = [outgoing(name, tensor) for name, tensor in TENSORS.items()]
BYTES = sum(tensor.numel() * tensor.element_size() for tensor in TENSORS.values())


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(found[name], tensor), name


class Counter:
    total = 0

    def __call__(self, count):
        self.total += count


@pytest.mark.parametrize("file_bytes", [1, 100, 300, 1 << 30])
def test_a_checkpoint_holds_the_tensors_in_files_of_a_given_size(file_bytes, tmp_path):
    counted = Counter()
    path = write_checkpoint(tmp_path / "run", 7, ALL, {"config": {}}, counted, file_bytes)
    assert path == latest(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step_00000007"
    assert counted.total == BYTES
    manifest = read_manifest(path)
    assert (manifest["step"], manifest["metadata"]) == (7, {"config": {}})
    for file in manifest["files"]:
        check_file(path / file["name"], file["size"], file["sha256"])
    longest_row = 160
    data = {name: sum(t.numel() * t.element_size() for t in load_file(path / name).values()) for name in files_of(path)}
    assert max(data.values()) <= max(file_bytes, longest_row)
    assert (len(data) > 1) == (file_bytes < BYTES)
    assert_same(load_tensors(path), TENSORS)  # the ranks' way to read it
    source = open_source(path)
    assert_same({name: source.read(name) for name in source.tensors}, TENSORS)


def files_of(path):
    return sorted(file.name for file in path.glob("*.safetensors"))


@pytest.mark.parametrize("shard_bytes", [1, 100, 300, 1 << 30])
def test_a_folder_holds_the_tensors_in_shards_and_an_index(shard_bytes, tmp_path):
    counted = Counter()
    write_folder(tmp_path / "out", ALL, {"format": "megadit"}, counted, shard_bytes, stem="weights")
    names = files_of(tmp_path / "out")
    found = {}
    for name in names:
        found |= load_file(tmp_path / "out" / name)
    assert_same(found, TENSORS)
    assert counted.total == BYTES
    index = tmp_path / "out" / "weights.safetensors.index.json"
    if shard_bytes > BYTES:
        assert names == ["weights.safetensors"]
        assert not index.exists()
        return
    assert names == [f"weights-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)]
    content = json.loads(index.read_text())
    assert content["metadata"] == {"total_size": BYTES}
    assert content["weight_map"].keys() == TENSORS.keys()
    for name, file in content["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 12), st.booleans())
def test_every_row_is_in_one_file_and_files_keep_their_limit(rows, limit, split):
    specs = [Spec((count, 2), torch.uint8) for count in rows]
    plan = plan_files(specs, limit, split)
    places = [(slot.tensor, row) for file in plan for slot in file for row in range(slot.begin, slot.end)]
    assert places == [(index, row) for index, count in enumerate(rows) for row in range(count)]
    for file in plan:
        filled = [2 * (slot.end - slot.begin) for slot in file if slot.end > slot.begin]
        assert sum(filled) <= limit or (len(filled) == 1 and (not split or filled == [2]))


def test_a_file_is_what_the_library_writes(tmp_path):
    """The widest first, aligned; the library reads it, and every dtype."""
    tensors = {f"{dtype}": torch.tensor([0, 1, 1]).to(dtype) for dtype in CODES}
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with TensorFileWriter(tmp_path / "f.safetensors", specs) as file:
        for name in file.order:
            file.write(tensors[name])
    assert_same(load_file(tmp_path / "f.safetensors"), tensors)
    header = json.loads((tmp_path / "f.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    for name, entry in header.items():
        assert entry["data_offsets"][0] % specs[name].dtype.itemsize == 0


@pytest.mark.parametrize("rows", [6, 8])
def test_a_tensor_that_brings_other_rows_than_promised_is_our_mistake(rows, tmp_path):
    wrong = outgoing("matrix", torch.zeros(rows, 10))._replace(shape=(7, 10))
    with pytest.raises((AssertionError, RuntimeError, StopIteration)):
        write_folder(tmp_path / "out", [wrong], {}, Counter())


# --- folders that appear when they are complete -----------------------------------------------------------------------


def test_a_folder_appears_with_all_that_is_in_it(tmp_path):
    with appearing(tmp_path / "deep" / "out") as partial:
        assert partial == tmp_path / "deep" / "out.partial"
        (partial / "file").write_text("content")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "content"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_after_an_error_nothing_stays(error, tmp_path):
    with pytest.raises(error), appearing(tmp_path / "out") as partial:
        write_folder(partial / "inner", ALL, {}, Counter())
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    left = tmp_path / "out.partial"
    (left / "inner").mkdir(parents=True)
    (left / "inner" / "file").write_text("")
    (left / "link").symlink_to(tmp_path)
    (left / "file").write_text("")
    with appearing(tmp_path / "out") as partial:
        assert list(partial.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_destination_that_is_in_use_is_refused(tmp_path):
    def attempt(folder, **options):
        with appearing(folder, **options) as partial:
            (partial / "new").write_text("")

    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file"):
        attempt(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        attempt(tmp_path / "file" / "under")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old").write_text("")
    with pytest.raises(ValueError, match="full is there already, and not empty"):
        attempt(tmp_path / "full")
    with pytest.raises(ValueError, match="full is there already"):
        attempt(tmp_path / "full", may_replace=lambda folder: False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "old"]
    attempt(tmp_path / "full", may_replace=lambda folder: (folder / "old").exists())
    (tmp_path / "bare").mkdir()
    attempt(tmp_path / "bare")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bare", "file", "full", "new", "new"]


def test_two_writers_of_one_folder_do_not_meet(tmp_path):
    with appearing(tmp_path / "out") as partial:
        (partial / "first").write_text("")
        with (
            pytest.raises(ValueError, match=r"out\.partial is being written by another process"),
            appearing(tmp_path / "out"),
        ):
            pass
        assert (partial / "first").exists()
    assert (tmp_path / "out" / "first").exists()


KILLED = """
import sys, time
from pathlib import Path
from megadit.checkpoint.stream import appearing
with appearing(Path(sys.argv[1])) as partial:
    (partial / "begun").write_text("")
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_writer_leaves_no_folder(sent, tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=heed_interrupts,
    )
    assert writer.stdout.readline() == b"begun\n"
    writer.send_signal(sent)
    assert writer.wait(30) != 0
    assert [path.name for path in tmp_path.iterdir()] == (["out.partial"] if sent == signal.SIGKILL else [])
    with appearing(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


LIMITED = """
import resource, sys, torch
from pathlib import Path
from megadit.checkpoint.stream import Outgoing, appearing, write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
tensor = Outgoing("a", (100, 100), torch.float32, lambda: iter(torch.zeros(100, 100).split(10)))
try:
    with appearing(Path(sys.argv[1])) as partial:
        write_checkpoint(partial, 1, [tensor], {}, lambda count: None)
except OSError as error:
    print(error.filename, error.strerror)
"""


def test_a_disk_error_names_the_file_and_leaves_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path / "out"], capture_output=True, text=True, check=True)
    expected = tmp_path / "out.partial" / "checkpoints" / "step_00000001.partial" / "part_00000.safetensors"
    assert done.stdout == f"{expected} File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_a_failed_checkpoint_leaves_the_older_one(tmp_path):
    write_checkpoint(tmp_path, 1, ALL, {}, Counter())

    def fails():
        yield torch.zeros(1, 2)
        raise ValueError("broken")

    broken = Outgoing("x", (4, 2), torch.float32, fails)
    with pytest.raises(ValueError, match="broken"):
        write_checkpoint(tmp_path, 2, [*ALL, broken], {}, Counter())
    assert latest(tmp_path / "checkpoints").name == "step_00000001"
    write_checkpoint(tmp_path, 3, ALL, {}, Counter())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step_00000001",
        "step_00000003",
    ]
