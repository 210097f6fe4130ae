"""Tars, folders, captions.jsonl and parquet, read in units: each sample once, in order, and faults named."""

import errno
import io
import json
import os
import random
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megadit.data.images import MAX_PIXELS, bytes_limit
from megadit.data.quarantine import REASONS, Bad
from megadit.data.sources import Readers, find, units
from megadit.data.tables import Columns, Tables
from megadit.data.told import Told
from megadit.data.units import Raw
from tests.data.planted import JPEG, Planted, plant, write_tar

LIMIT = bytes_limit(MAX_PIXELS)


def read(*sources, unit=3, columns=None, max_bytes=LIMIT):
    """Every sample of the sources, in the units' order. Each unit is read by a reader that has read nothing before."""
    files = find(sources)
    contents = [Readers(columns or Columns(), max_bytes).index(file, unit) for file in files]
    found = units(files, contents, unit)
    assert [each.number for each in found] == list(range(len(found)))
    assert all(0 < each.count <= unit for each in found)
    samples = []
    for each in found:
        part = list(Readers(columns or Columns(), max_bytes).read(each))
        assert len(part) == each.count
        samples += part
    return samples


def told(samples):
    return {sample.key: (sample.told if isinstance(sample, Raw) else sample.reason) for sample in samples}


def one(text, weight=1.0, label=None):
    return Told((text,), (weight,), label)


def test_a_tars_consecutive_members_are_a_sample_up_to_the_first_dot(tmp_path):
    fields = json.dumps({"captions": ["a", "b"], "weights": [2, 0.5], "label": 7}).encode()
    write_tar(
        tmp_path / "a.tar",
        [
            ("x/1.jpg", b"one"), ("x/1.txt", b"first"), ("x/1.seg.png", b"mask"),
            ("./2.PNG", b"two"), ("2.json", fields),
            ("._2.jpg", b"of macOS"),
            ("3.v1.jpg", b"no image: its suffix is v1.jpg"), ("3.webp", b"three"), ("3.txt", b"third"),
            ("3.json", b'{"label": 1}'),
            ("4.jpeg", b"four"),
            ("notes.md", b"no sample"),
        ],
    )  # fmt: skip
    samples = read(tmp_path / "a.tar", unit=2)
    assert told(samples) == {
        "a.tar/x/1": one("first"),
        "a.tar/2": Told(("a", "b"), (2.0, 0.5), 7),
        "a.tar/3": one("third", label=1),
        "a.tar/4": Told(),
        "a.tar/notes": "no image",
    }
    assert [sample.image for sample in samples[:4]] == [b"one", b"two", b"three", b"four"]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("unit", [1, 2, 5, 1000])
def test_units_begin_at_long_names_too(kind, unit, tmp_path):
    """Names of more than 100 bytes have headers of their own, before the member's."""
    names = [f"{'long' * 24}/{'ä' * (number % 3 * 20)}{number:03d}" for number in range(7)]
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        for name in names:
            (tmp_path / "file").write_bytes(name.encode())
            tar.add(tmp_path / "file", f"{name}.jpg")
    samples = read(tmp_path / "a.tar", unit=unit)
    assert [(sample.key, sample.image) for sample in samples] == [(f"a.tar/{name}", name.encode()) for name in names]


def test_agrees_with_tarfile_on_a_tar_of_the_command_line(tmp_path):
    import subprocess

    (tmp_path / "in").mkdir()
    for number in range(20):
        (tmp_path / "in" / f"{number:02d}.jpg").write_bytes(b"x" * 700 * number)
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"text {number}")
    subprocess.run(["tar", "-cf", tmp_path / "a.tar", "--sort=name", "-C", tmp_path / "in", "."], check=True)
    samples = read(tmp_path / "a.tar")
    assert [(s.key, s.told.captions[0], len(s.image)) for s in samples] == [
        (f"a.tar/{n:02d}", f"text {n}", 700 * n) for n in range(20)
    ]


@pytest.mark.parametrize("unit", [1, 4, 1000])
def test_damage_of_a_tar_costs_the_samples_that_it_hits(unit, tmp_path):
    planted = Planted()
    plant(tmp_path / "a.tar", planted, 0, 9, twice=True, torn=True, cut=True, pictures=[JPEG])
    samples = read(tmp_path / "a.tar", unit=unit)
    assert [sample.key for sample in samples if isinstance(sample, Raw)] == planted.good
    assert {sample.key: sample.reason for sample in samples if isinstance(sample, Bad)} == planted.bad


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sources") / "a.tar"
    write_tar(path, [(f"{n}{suffix}", f"{n}{suffix}".encode() * 99) for n in range(8) for suffix in (".jpg", ".txt")])
    return path


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_reported_alike_in_units_of_any_size(data, sound, tmp_path):
    content = bytearray(sound.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        begin = data.draw(st.integers(0, len(content) - 1))
        content[begin : begin + data.draw(st.sampled_from([1, 600]))] = data.draw(
            st.sampled_from([b"", b"\xff", b"\0" * 512])
        )
    damaged = tmp_path / "a.tar"
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    whole = read(damaged, unit=1000)
    assert read(damaged, unit=1) == read(damaged, unit=3) == whole
    assert all(sample.reason in REASONS for sample in whole if isinstance(sample, Bad))
    hit = {key for key in map(str, range(8)) if f"a.tar/{key}" not in {s.key for s in whole if isinstance(s, Raw)}}
    empty = not any(damaged.read_bytes()) and damaged.stat().st_size >= 1024  # a tar of nothing, by all signs
    assert not hit or any(isinstance(sample, Bad) for sample in whole) or empty, "nothing is lost in silence"


@pytest.mark.parametrize("content", [b"", b"no tar at all", b"\xff" * 5000])
def test_what_is_no_tar_is_one_bad_sample(content, tmp_path):
    (tmp_path / "a.tar").write_bytes(content)
    (sample,) = read(tmp_path / "a.tar")
    assert sample.reason in ("truncated archive", "bad tar member")


@pytest.mark.parametrize("unit", [1, 1000])
def test_a_header_of_a_negative_size_is_damage(unit, tmp_path):
    """It would lead back to the member before it, for ever."""
    places = write_tar(tmp_path / "a.tar", [(f"{n}.jpg", b"x" * 700) for n in range(4)])
    content = bytearray((tmp_path / "a.tar").read_bytes())
    info = tarfile.TarInfo("2.jpg")
    info.size = -1536
    content[places[2] : places[2] + 512] = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(content)
    assert told(read(tmp_path / "a.tar", unit=unit)) == {
        "a.tar/0": Told(), "a.tar/1": Told(), f"a.tar/@{places[2]}": "bad tar member", "a.tar/3": Told()
    }  # fmt: skip


def test_an_image_of_too_many_bytes_is_not_read(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x" * 1001), ("2.jpg", b"x" * 1000)])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jpg").write_bytes(b"x" * 1001)
    samples = read(tmp_path / "a.tar", tmp_path / "b", max_bytes=1000)
    assert told(samples) == {"a.tar/1": "decompression bomb", "a.tar/2": Told(), "b/1": "decompression bomb"}


def test_a_folders_images_with_what_lies_beside_them(tmp_path):
    root = tmp_path / "photos"
    (root / "below" / ".hidden").mkdir(parents=True)
    (root / "below" / ".hidden" / "no.jpg").write_bytes(b"")
    for name, content in {
        "b.jpg": b"b", "b.txt": b"\xef\xbb\xbfa dog\n",
        "a.2024.png": b"a", "a.2024.json": b'{"caption": "a cat", "label": 3}',
        "c.jpg": b"c", "c.webp": b"also c", "c.txt": b"c",
        "d.JPG": b"d",
        "e.jpg": b"e", "e.json": b"[1]",
        "README.txt": b"no caption of anything",
        "below/b.jpg": b"below", "below/b.txt": b"below",
    }.items():  # fmt: skip
        (root / name).write_bytes(content)
    samples = read(root)
    assert [sample.key for sample in samples] == [
        f"photos/{key}" for key in ("a.2024", "b", "c", "c", "d", "e", "below/b")
    ]
    assert told(samples) == {
        "photos/a.2024": one("a cat", label=3),
        "photos/b": one("\ufeffa dog\n".strip("\ufeff")),
        "photos/c": "duplicate key",
        "photos/d": Told(),
        "photos/e": "unreadable json",
        "photos/below/b": one("below"),
    }
    assert isinstance(samples[2], Raw), "the first of two is good"


def test_a_captions_file_says_which_images_there_are(tmp_path):
    (tmp_path / "set" / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg", "unnamed.jpg"):
        (tmp_path / "set" / name).write_bytes(name.encode())
    lines = [
        {"file": "sub/b.jpg", "captions": ["one", "two"], "weights": [1, 0], "label": 0},
        {"file": "a.jpg", "caption": "a"},
        {"file": "gone.jpg", "caption": "gone"},
        {"file": "a.jpg", "caption": "a again"},
        {"caption": "of nothing"},
        {"file": "a.jpg/..", "caption": "no file"},
    ]
    text = "\n\n".join(json.dumps(line) for line in lines) + "\n{cut"
    (tmp_path / "set" / "captions.jsonl").write_text(text)
    samples = read(tmp_path / "set", unit=2)
    assert [sample.reason if isinstance(sample, Bad) else sample.image.decode() for sample in samples] == [
        "sub/b.jpg", "a.jpg", "no image", "duplicate key", "unreadable json", "no image", "unreadable json"
    ]  # fmt: skip
    assert samples[0].told == Told(("one",), (1.0,), 0), "a caption of weight 0 is never drawn"
    assert samples[0].key == "set/captions.jsonl/sub/b.jpg"
    assert told(read(tmp_path / "set" / "captions.jsonl"))["captions.jsonl/a.jpg"] == "duplicate key"


def test_files_that_cannot_be_read_cost_their_samples(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    for stem in "abc":
        (root / f"{stem}.jpg").write_bytes(b"")
    (root / "a.txt").mkdir()
    (root / "b.json").symlink_to("b.json")
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "none.jpg").symlink_to("gone")
    (root / "folder.jpg").mkdir()
    longest = "n" * 251
    (root / f"{longest}.jpg").write_bytes(b"")  # no .json has room beside it
    assert told(read(root)) == {
        "set/a": "unreadable caption",
        "set/b": "unreadable json",
        "set/c": Told(),
        "set/loop": "no image",
        f"set/{longest}": Told(),
    }
    names = ["\ud800.jpg", "n" * 300, "loop.jpg", "folder.jpg", "c.jpg"]
    (root / "captions.jsonl").write_text("".join(json.dumps({"file": name}) + "\n" for name in names))
    samples = read(root)
    assert [sample.reason if isinstance(sample, Bad) else sample.key for sample in samples] == [
        "no image", "no image", "no image", "no image", "set/captions.jsonl/c.jpg"
    ]  # fmt: skip
    assert samples[0].key == "set/captions.jsonl/\ufffd.jpg"
    for sample in samples[:-1]:
        f"{sample.key} {sample.detail}".encode()


def test_a_disk_that_fails_costs_no_sample(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jpg").write_bytes(b"")

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read(tmp_path / "set")


def table(path, rows, **options):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)


@pytest.mark.parametrize("group", [1, 4, 100])
@pytest.mark.parametrize("unit", [1, 3, 64])
def test_parquet_rows_whatever_their_groups(group, unit, tmp_path):
    rows = [{"image": f"{n}".encode(), "caption": f"row {n}", "label": n} for n in range(70)]
    table(tmp_path / "a.parquet", rows, row_group_size=group)
    samples = read(tmp_path / "a.parquet", unit=unit)
    assert [(s.key, s.image, s.told) for s in samples] == [
        (f"a.parquet/{n}", f"{n}".encode(), one(f"row {n}", label=n)) for n in range(70)
    ]


def test_parquet_as_the_hub_has_it_under_other_names(tmp_path):
    rows = [
        {"jpg": {"bytes": b"one", "path": "1.jpg"}, "texts": ["a", "b"], "w": [1.0, 3.0], "other": 1},
        {"jpg": {"bytes": None, "path": "2.jpg"}, "texts": ["c"], "w": None, "other": 1},
        {"jpg": None, "texts": None, "w": None, "other": 1},
        {"jpg": {"bytes": b"four", "path": None}, "texts": None, "w": None, "other": 1},
    ]
    table(tmp_path / "a.parquet", rows)
    columns = Columns(image="jpg", captions="texts", weights="w")
    assert list(told(read(tmp_path / "a.parquet", columns=columns)).values()) == [
        Told(("a", "b"), (1.0, 3.0)), "no image", "no image", Told()
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"has no column 'image' for images, but jpg, other, texts, w; name it with"):
        read(tmp_path / "a.parquet")


def test_parquet_that_is_damaged_costs_its_row_group(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"image": bytes([n]) * 5000, "caption": "x"} for n in range(30)]
    table(path, rows, row_group_size=10, use_dictionary=False, compression="none", write_page_checksum=False)
    place = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)
    for unit in (7, 1000):
        samples = read(path, unit=unit)
        assert [sample.key for sample in samples] == [f"a.parquet/{n}" for n in range(30)]
        assert {int(s.key[10:]) for s in samples if isinstance(s, Bad)} == set(range(10, 20))
        assert {sample.reason for sample in samples if isinstance(sample, Bad)} == {"unreadable file"}
    path.write_bytes(b"no parquet")
    assert told(read(path)) == {"a.parquet/@0": "unreadable file"}


def test_a_parquet_footer_that_is_damaged_costs_its_file(tmp_path):
    path = tmp_path / "a.parquet"
    table(path, [{"image": b"x", "caption": "x"}] * 3)
    content = bytearray(path.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little")
    content[-8 - footer : -8] = b"\xff" * footer
    path.write_bytes(content)
    assert told(read(path)) == {"a.parquet/@0": "unreadable file"}


@pytest.mark.parametrize("unit", [2, 1000])
def test_a_caption_in_parquet_that_is_no_text_costs_its_row(unit, tmp_path):
    captions = pyarrow.array([b"one", b"tw\xff", b"three"]).cast(pyarrow.string(), safe=False)
    columns = {"image": pyarrow.array([b"x"] * 3), "caption": captions}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert told(read(tmp_path / "a.parquet", unit=unit)) == {
        "a.parquet/0": one("one"), "a.parquet/1": "unreadable caption", "a.parquet/2": one("three")
    }  # fmt: skip


def test_a_disk_that_fails_under_a_parquet_is_told_from_damage(tmp_path, monkeypatch):
    class Failing(io.FileIO):
        fails = False

        def read(self, size=-1):
            if self.fails:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(size)

    table(tmp_path / "a.parquet", [{"image": b"x", "caption": "x"}] * 3, row_group_size=1)
    actual, disk = pyarrow.parquet.ParquetFile, Failing(tmp_path / "a.parquet")
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", lambda path, **options: actual(disk, **options))
    samples = Tables(Columns()).read(tmp_path / "a.parquet", 0, 3, LIMIT)
    with pytest.raises(OSError, match="Input/output error"):
        for _ in samples:
            disk.fails = True


def test_parquet_is_not_in_memory_as_a_whole(tmp_path):
    rows = [{"image": random.Random(n).randbytes(10_000), "caption": "x"} for n in range(5000)]
    table(tmp_path / "a.parquet", rows, compression="none", use_dictionary=False)
    assert pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    before, most = pyarrow.total_allocated_bytes(), 0
    for sample in Tables(Columns()).read(tmp_path / "a.parquet", 0, 5000, LIMIT):
        assert len(sample.image) == 10_000
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 15e6, "of 50 MB"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"caption": 3}, "unreadable json"),
        ({"captions": ["a", None]}, "unreadable json"),
        ({"caption": "a", "label": -1}, "unreadable json"),
        ({"caption": "a", "label": True}, "unreadable json"),
        ({"captions": ["a", "b"], "weights": [1]}, "bad weights"),
        ({"captions": ["a", "b"], "weights": [1, -1]}, "bad weights"),
        ({"captions": ["a", "b"], "weights": [0, 0]}, "bad weights"),
        ({"captions": ["a", "b"], "weights": ["x", 1]}, "bad weights"),
        ({"captions": ["a"], "weights": [1e300]}, "bad weights"),
        ({"caption": "\ud800"}, "unreadable caption"),
    ],
)
def test_fields_of_another_form_are_named(fields, reason, tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b""), ("1.json", json.dumps(fields).encode())])
    assert told(read(tmp_path / "a.tar")) == {"a.tar/1": reason}


def test_nan_as_a_weight_is_bad(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b""), ("1.json", b'{"caption": "a", "weights": [NaN]}')])
    assert told(read(tmp_path / "a.tar")) == {"a.tar/1": "bad weights"}


def test_a_folder_stands_for_all_that_is_in_it_in_order(tmp_path):
    (tmp_path / "set" / "b").mkdir(parents=True)
    (tmp_path / "set" / "lines").mkdir()
    for name in ("z.tar", "b/a.tar"):
        write_tar(tmp_path / "set" / name, [("1.jpg", b"")])
    table(tmp_path / "set" / "a.parquet", [{"image": b""}])
    (tmp_path / "set" / "b" / "x.jpg").write_bytes(b"")
    (tmp_path / "set" / "lines" / "captions.jsonl").write_text('{"file": "x.jpg"}\n')
    (tmp_path / "set" / "lines" / "y.jpg").write_bytes(b"")
    assert [(file.name, file.kind) for file in find([tmp_path / "set"])] == [
        ("set/a.parquet", "parquet"),
        ("set/z.tar", "tar"),
        ("set/b", "folder"),
        ("set/b/a.tar", "tar"),
        ("set/lines/captions.jsonl", "jsonl"),
    ]


def test_sources_that_are_none_are_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar.gz").write_bytes(b"")
    write_tar(tmp_path / "a.tar", [("1.jpg", b"")])
    for sources, words in (
        ([tmp_path / "none.tar"], "none.tar: there is no such file"),
        ([tmp_path / "empty"], "empty has no images, captions.jsonl, .tar or .parquet in it"),
        ([tmp_path / "a.tar.gz"], "unpack a tar that is compressed"),
        ([tmp_path / "a.tar", tmp_path], "a.tar is among the sources twice"),
        ([], "no sources"),
    ):
        with pytest.raises(ValueError, match=words):
            find(sources)


def test_a_source_that_cannot_be_looked_at_is_refused(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    for name in ("is_dir", "is_file"):
        with monkeypatch.context() as patched, pytest.raises(ValueError, match=r"a.tar cannot be read: Permission"):
            patched.setattr(Path, name, fail)
            find([tmp_path / "a.tar"])


@pytest.mark.parametrize("kind", ["tar", "parquet", "folder", "jsonl"])
def test_a_source_that_has_changed_is_not_read(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        write_tar(path, [(f"{n}.jpg", b"") for n in range(2)])
    elif kind == "parquet":
        table(path, [{"image": b""}] * 2)
    elif kind == "jsonl":
        path.write_text('{"file": "x.jpg"}\n{"file": "y.jpg"}\n')
    else:
        path.mkdir()
        for name in ("1.jpg", "2.jpg"):
            (path / name).write_bytes(b"")
    (file,) = find([path])
    last = units([file], [Readers(Columns(), LIMIT).index(file, 1)], 1)[-1]
    assert len(list(Readers(Columns(), LIMIT).read(last))) == 1
    if kind == "folder":
        (path / "0.jpg").write_bytes(b"")
    else:
        path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(OSError, match=f"a.{kind} has changed since the encoding began"):
        list(Readers(Columns(), LIMIT).read(last))


def test_the_same_files_elsewhere_have_the_same_keys(tmp_path):
    keys = []
    for place in ("here", "there/below"):
        for part in ("train", "more"):
            (tmp_path / place / part).mkdir(parents=True)
            write_tar(tmp_path / place / part / "0.tar", [("1.jpg", b"")])
        keys.append([s.key for s in read(tmp_path / place / "train", tmp_path / place / "more" / "0.tar")])
    assert keys == [["train/0.tar/1", "more/0.tar/1"]] * 2
