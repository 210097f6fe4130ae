"""Reading boxes of checkpoints and of safetensors folders, and refusing what is damaged."""

import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megadit.checkpoint import LogicalTensor, Piece, flat_range_boxes, save
from megadit.checkpoint.source import (
    CheckpointSource,
    FolderSource,
    Spec,
    StoredBox,
    find_checkpoint,
    open_source,
    tiling_fault,
)
from megadit.runtime.tensor_file import CODES, read_header
from tests.ranks import run_ranks

SHAPES = {"cube": (6, 4, 5), "matrix": (7, 8), "vector": (11,), "scalar": (), "empty": (0, 3), "experts": (4, 3, 6)}


def whole(name, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(dtype)


def pieces(tensor, rank, world):
    """Columns over two ranks, then flat ranges over the others: the cut of a tensor-parallel layer under ZeRO."""
    if not tensor.ndim:
        return (Piece((), tensor),) if rank == 0 else ()
    columns, ranges = (2, world // 2) if tensor.shape[-1] % 2 == 0 else (1, world)
    width = tensor.shape[-1] // columns
    column, part = rank % columns, rank // columns
    local = tensor[..., column * width : (column + 1) * width].contiguous()
    start, stop = local.numel() * part // ranges, local.numel() * (part + 1) // ranges
    return tuple(
        Piece(
            (*box.offsets[:-1], box.offsets[-1] + column * width),
            local.view(-1)[start + begin : start + begin + math.prod(box.sizes)].view(box.sizes),
        )
        for box, begin in flat_range_boxes(tuple(local.shape), start, stop - start)
    )


def save_cut(rank, world_size, folder):
    tensors = {}
    for name in SHAPES:
        for kind, dtype in (("weight", torch.bfloat16), ("master", torch.float32)):
            tensor = whole(name, dtype)
            tensors[f"{kind}.{name}"] = LogicalTensor(SHAPES[name], dtype, pieces(tensor, rank, world_size))
    save(folder, 3, tensors, {"config": {"model": {"layers": 2}}})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with a checkpoint that four ranks wrote."""
    run = tmp_path_factory.mktemp("source") / "run"
    run_ranks(save_cut, 4, run / "checkpoints")
    return run


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved / "checkpoints" / "step_00000003", tmp_path / "checkpoint")


@pytest.fixture
def exported(tmp_path):
    path = tmp_path / "exported"
    path.mkdir()
    (path / "config.json").write_text('{"format": "megadit"}')
    for file, names in (("model-00001-of-00002", ["cube", "scalar"]), ("model-00002-of-00002", ["matrix", "empty"])):
        save_file({name: whole(name) for name in names}, path / f"{file}.safetensors")
    weight_map = {
        "cube": "model-00001-of-00002.safetensors",
        "scalar": "model-00001-of-00002.safetensors",
        "matrix": "model-00002-of-00002.safetensors",
        "empty": "model-00002-of-00002.safetensors",
    }
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def as_bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same(found, expected):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.is_contiguous()
    assert torch.equal(as_bits(found), as_bits(expected))


@pytest.mark.parametrize("name", SHAPES)
def test_a_tensor_in_boxes_is_read_whole_bit_for_bit(name, saved):
    source = open_source(saved)
    assert isinstance(source, CheckpointSource)
    assert source.tensors[f"weight.{name}"] == Spec(SHAPES[name], torch.bfloat16)
    assert_same(source.read(f"weight.{name}"), whole(name, torch.bfloat16))
    assert_same(source.read(f"master.{name}"), whole(name))


@settings(deadline=None)
@given(st.data())
def test_any_box_is_the_box_of_the_whole_tensor(saved, data):
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    offsets = tuple(data.draw(st.integers(0, size)) for size in SHAPES[name])
    sizes = tuple(data.draw(st.integers(0, size - o)) for o, size in zip(offsets, SHAPES[name], strict=True))
    expected = whole(name)[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
    assert_same(CheckpointSource(find_checkpoint(saved)).read(f"master.{name}", offsets, sizes), expected)


def test_a_checkpoint_says_its_step_its_configuration_and_its_parameters(saved):
    source = open_source(saved / "checkpoints")
    assert (source.step, source.config) == (3, {"model": {"layers": 2}})
    assert source.parameters("master") == {name: Spec(shape, torch.float32) for name, shape in SHAPES.items()}
    assert source.parameters("ema") == {}


def test_a_folder_in_two_files_is_read_by_the_box(exported):
    source = open_source(exported)
    assert isinstance(source, FolderSource)
    assert source.config == {"format": "megadit"}
    assert source.tensors.keys() == {"cube", "scalar", "matrix", "empty"}
    for name in source.tensors:
        assert_same(source.read(name), whole(name))
    assert_same(source.read("matrix", (2, 3), (4, 2)), whole("matrix")[2:6, 3:5])


def test_a_large_tensor_is_read_in_chunks_of_rows(tmp_path):
    """Rows beyond a chunk, with and without a cut inside of them."""
    (tmp_path / "config.json").write_text("{}")
    tensor = torch.arange(3 * 2100 * 2100, dtype=torch.float32).view(3, 2100, 2100)
    save_file({"t": tensor, "flat": tensor.view(3, -1).clone()}, tmp_path / "model.safetensors")
    source = FolderSource(tmp_path)
    assert_same(source.read("t", (1, 5, 7), (2, 2000, 11)), tensor[1:3, 5:2005, 7:18])
    assert_same(source.read("flat", (1, 9), (2, 20)), tensor.view(3, -1)[1:3, 9:29])
    assert_same(source.read("t", (2, 0, 0), (1, 2100, 2100)), tensor[2:3])


def test_every_dtype_is_read(tmp_path):
    tensors = {str(dtype): torch.tensor([0, 1, 1]).to(dtype) for dtype in CODES}
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    source = FolderSource(tmp_path)
    for name, tensor in tensors.items():
        assert_same(source.read(name), tensor)


def test_an_unknown_name_is_refused(saved, exported):
    for source in (open_source(saved), open_source(exported)):
        with pytest.raises(ValueError, match=r"no tensor weight\.other"):
            source.read("weight.other")


# --- what is no source ------------------------------------------------------------------------------------------------


def test_what_is_no_checkpoint_is_refused_by_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="none does not exist"):
        open_source(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name the folder"):
        find_checkpoint(tmp_path / "file")
    (tmp_path / "run" / "checkpoints" / "step_00000001.partial").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no manifest\.json\) and no run .* and no folder of safetensors"):
        open_source(tmp_path / "run")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no model\.safetensors or diffusion_pytorch_model\.safetensors"):
        open_source(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin is pickled"):
        open_source(tmp_path)


def test_a_pipeline_of_diffusers_is_refused_with_the_folder_to_name(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="name the folder of its network, .*transformer"):
        open_source(tmp_path)


# --- damaged files ----------------------------------------------------------------------------------------------------


def file_of(header, data=b"", length=None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    {
        "nothing": (b"", "no whole safetensors file"),
        "a few bytes": (b"abc", "no whole safetensors file"),
        "a header beyond the file": (file_of({}, length=1 << 40), "no whole safetensors file"),
        "garbage": (file_of(b"\xff\xfe garbage"), "not JSON"),
        "deep": (file_of(b"[" * 100_000), "not JSON"),
        "a list": (file_of([1]), "no table of tensors"),
        "no dict": (file_of({"a": 3}), "tensor a: damaged header entry"),
        "no shape": (file_of({"a": {"dtype": "F32"}}), "tensor a: damaged header entry"),
        "negative shape": (file_of({"a": entry([-1, -2], 0, 8)}, bytes(8)), "tensor a: damaged header entry"),
        "a shape of booleans": (file_of({"a": entry([True], 0, 4)}, bytes(4)), "tensor a: damaged header entry"),
        "unknown dtype": (file_of({"a": entry([2], 0, 2, "F8_E4M3")}, bytes(2)), "tensor a is of dtype F8_E4M3; known"),
        "dtype of a list": (file_of({"a": entry([2], 0, 2, ["F32"])}, bytes(2)), "tensor a is of dtype"),
        "backwards": (file_of({"a": entry([1], 4, 0)}, bytes(4)), "does not fill the bytes"),
        "three offsets": (
            file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(4)),
            "does not fill the bytes",
        ),
        "too large a shape": (file_of({"a": entry([1 << 40], 0, 4)}, bytes(4)), "does not fill the bytes"),
        "overlap": (file_of({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "tensor b begins at byte"),
        "hole": (file_of({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "tensor b begins at byte"),
        "cut short": (file_of({"a": entry([2], 0, 8)}, bytes(7)), "its tensors end at byte"),
        "too long": (file_of({"a": entry([2], 0, 8)}, bytes(9)), "its tensors end at byte"),
    }.values(),
)
def test_a_damaged_safetensors_file_is_named(content, message, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_file_or_an_error_that_names_it(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    try:
        assert read_header(path) == {}
    except ValueError as error:
        assert str(path) in str(error)


def test_a_checkpoints_files_must_be_there_and_whole(copied):
    file = copied / "rank_00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"rank_00001\.safetensors has \d+ bytes, not the \d+ that were saved"):
        open_source(copied)
    file.unlink()
    with pytest.raises(ValueError, match=r"rank_00001\.safetensors is missing"):
        open_source(copied)


def test_a_file_with_another_box_is_named(copied):
    """Two files of one size, exchanged."""
    a, b = copied / "rank_00001.safetensors", copied / "rank_00003.safetensors"
    manifest = json.loads((copied / "manifest.json").read_text())
    content = a.read_bytes(), b.read_bytes()
    a.write_bytes(content[1])
    b.write_bytes(content[0])
    for file in manifest["files"]:
        file["size"] = (copied / file["name"]).stat().st_size
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"rank_0000[13]\.safetensors: master\.cube@.* is (missing|float32)"):
        open_source(copied).read("master.cube")


@pytest.mark.parametrize(
    ("damage", "message"),
    {
        "no tensors": (lambda m: m.pop("tensors"), "damaged: KeyError"),
        "no metadata": (lambda m: m.update(metadata=None), "damaged"),
        "files of another type": (lambda m: m.update(files=[3]), "damaged"),
        "tensors of another type": (lambda m: m.update(tensors=["weight.cube"]), "damaged"),
        "another folder": (lambda m: m["files"][0].update(name="../other"), "lies outside its folder"),
        "an unlisted file": (lambda m: m["files"].pop(), "which is not listed"),
        "unknown dtype": (lambda m: m["tensors"]["weight.cube"].update(dtype="complex64"), "weight.cube is of dtype"),
        "shape": (lambda m: m["tensors"]["weight.cube"].update(shape=[6, 4.0, 5]), "weight.cube has the shape"),
        "other shape": (lambda m: m["tensors"]["weight.cube"].update(shape=[6, 4, 4]), "weight.cube: the box at"),
        "lost box": (
            lambda m: m["tensors"]["weight.cube"]["boxes"].pop(),
            r"weight.cube: its boxes hold \d+ of its 120",
        ),
        "no box": (lambda m: m["tensors"]["weight.cube"].update(boxes=3), "damaged"),
        "box of words": (lambda m: m["tensors"]["weight.cube"]["boxes"][0].__setitem__(0, "abc"), "damaged|outside"),
    }.values(),
)
def test_a_damaged_manifest_is_named(damage, message, copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    damage(manifest)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message) as error:
        open_source(copied)
    assert str(copied) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xff", b"[]", b"{" * 9, b"[" * 200_000])
def test_a_manifest_or_config_that_is_no_json_is_named(content, copied, exported):
    (copied / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint/manifest\.json|checkpoint is not a complete"):
        open_source(copied)
    (exported / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"exported/config\.json is damaged"):
        open_source(exported)


def test_tiling():
    def box(*ranges):
        return StoredBox(tuple(low for low, _ in ranges), tuple(high - low for low, high in ranges), "f")

    assert tiling_fault((4, 4), [box((0, 4), (0, 2)), box((2, 4), (2, 4)), box((0, 2), (2, 4))]) is None
    assert tiling_fault((), [StoredBox((), (), "f")]) is None
    assert tiling_fault((0, 3), []) is None
    assert "0 of its 1" in tiling_fault((), [])
    assert "overlap" in tiling_fault((), [StoredBox((), (), "f")] * 2)
    assert "overlap" in tiling_fault((4, 4), [box((0, 4), (0, 2)), box((0, 2), (2, 4)), box((1, 3), (2, 4))])
    assert "hold 12 of its 16" in tiling_fault((4, 4), [box((0, 4), (0, 2)), box((0, 2), (2, 4))])
    assert "outside" in tiling_fault((4,), [box((0, 5))])
    assert "outside" in tiling_fault((4,), [box((0, 2), (0, 2))])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map does not say"),
        ({"weight_map": {"cube": 3}}, "weight_map does not say"),
        ({"weight_map": {"cube": "../model-00001-of-00002.safetensors"}}, "weight_map does not say"),
        ({"weight_map": {"cube": "model-00009.safetensors"}}, r"model-00009\.safetensors cannot be read"),
        (
            {"weight_map": {"cube": "model-00001-of-00002.safetensors", "other": "model-00001-of-00002.safetensors"}},
            "lacks other; .*00001-of-00002.safetensors has scalar, which the index does not",
        ),
    ],
)
def test_an_index_that_does_not_match_its_files_is_refused(index, message, exported):
    (exported / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        open_source(exported)


def test_weights_of_two_kinds_in_one_folder_are_refused(exported):
    save_file({"a": torch.zeros(1)}, exported / "model.safetensors")
    with pytest.raises(ValueError, match=r"has both model\.safetensors and model\.safetensors\.index\.json"):
        open_source(exported)
