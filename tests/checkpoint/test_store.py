import errno
import hashlib
import itertools
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from megadit.checkpoint import (
    LogicalTensor,
    Piece,
    SaveError,
    flat_range_boxes,
    go_back,
    latest,
    load,
    load_tensors,
    newest_before,
    read_manifest,
    save,
)
from tests.ranks import run_ranks

TENSORS = {
    "matrix": ((7, 10), torch.float64),
    "cube": ((3, 4, 6), torch.float32),
    "deep": ((2, 3, 4, 5), torch.bfloat16),
    "vector": ((11,), torch.bfloat16),
    "scalar": ((), torch.float32),
    "count": ((2, 3), torch.int64),
    "mask": ((3,), torch.bool),
    "empty": ((0, 3), torch.float32),
}
LAYOUTS = ("rows", "columns", "flat", "columns_flat")


def reference(name):
    """The whole tensor `name`: random bytes, so floats include NaNs, infinities and subnormals."""
    shape, dtype = TENSORS[name]
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return (raw % 2).bool().reshape(shape) if dtype == torch.bool else raw.view(dtype).reshape(shape)


def as_bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def cut(whole, layout, rank, world):
    """This rank's pieces of `whole`, as views: rows, columns (not contiguous), flat ranges, flat ranges of columns."""
    if whole.ndim == 0:
        return (Piece((), whole),) if rank == 0 else ()
    first, last = whole.shape[0], whole.shape[-1]
    if layout == "rows":
        begin, end = first * rank // world, first * (rank + 1) // world
        return (Piece((begin,) + (0,) * (whole.ndim - 1), whole[begin:end]),)
    if layout == "columns":
        begin, end = last * rank // world, last * (rank + 1) // world
        return (Piece((0,) * (whole.ndim - 1) + (begin,), whole[..., begin:end]),)
    tensor_ranks = 2 if layout == "columns_flat" and world > 1 else 1
    column, flat = rank % tensor_ranks, rank // tensor_ranks
    begin, end = last * column // tensor_ranks, last * (column + 1) // tensor_ranks
    local = whole[..., begin:end].contiguous()  # as a tensor-parallel rank would hold it
    num_ranges = world // tensor_ranks
    start, stop = local.numel() * flat // num_ranges, local.numel() * (flat + 1) // num_ranges
    owned = local.view(-1)[start:stop].clone()  # as ZeRO would: one flat buffer, of which every piece is a view
    return tuple(
        Piece(
            (*box.offsets[:-1], box.offsets[-1] + begin),
            owned[inside : inside + math.prod(box.sizes)].view(box.sizes),
        )
        for box, inside in flat_range_boxes(tuple(local.shape), start, stop - start)
    )


def held(make, layout, rank, world):
    return {
        name: LogicalTensor(shape, dtype, cut(make(name), layout, rank, world))
        for name, (shape, dtype) in TENSORS.items()
    }


def unset(name):
    shape, dtype = TENSORS[name]
    return torch.zeros(shape, dtype=dtype)


def one_piece(tensor):
    return LogicalTensor(tuple(tensor.shape), tensor.dtype, (Piece((0,) * tensor.ndim, tensor),))


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def reshard(rank, world, sources, out):
    """Load every source into every layout and check it; save every layout once."""
    for layout in LAYOUTS:
        for source in sources:
            tensors = held(unset, layout, rank, world)
            load(source, tensors, verify=True)
            wanted = held(reference, layout, rank, world)
            for name, tensor in tensors.items():
                for piece, expected in zip(tensor.pieces, wanted[name].pieces, strict=True):
                    assert torch.equal(as_bits(piece.tensor), as_bits(expected.tensor)), (source, layout, name)
        save(out / layout, 1, tensors, {"layout": layout})


def test_any_layout_loads_into_any_other_byte_for_byte(tmp_path, one_rank):
    save(tmp_path / "start", 1, held(reference, "rows", 0, 1), {})
    sources = [tmp_path / "start" / "step_00000001"]
    for turn, world in enumerate((1, 4, 2, 1)):
        out = tmp_path / f"turn_{turn}"
        if world == 1:
            reshard(0, 1, sources, out)
        else:
            run_ranks(reshard, world, sources, out)
        sources = [latest(out / layout) for layout in LAYOUTS]
        for source in sources:
            for name, tensor in load_tensors(source).items():
                assert torch.equal(as_bits(tensor), as_bits(reference(name)))


def save_own_names(rank, world, folder):
    tensors = {f"stage_{rank}": one_piece(torch.full((2,), rank))} if rank else {}
    save(folder, 7, tensors, {"of": rank})
    everything = {f"stage_{other}": one_piece(torch.zeros(2, dtype=torch.int64)) for other in range(1, world)}
    load(latest(folder), everything if rank == 1 else {})  # one rank needs all, the others nothing
    return {name: tensor.pieces[0].tensor.tolist() for name, tensor in everything.items()}


def test_ranks_may_hold_different_names_or_none(tmp_path):
    assert run_ranks(save_own_names, 4, tmp_path)[1] == {"stage_1": [1, 1], "stage_2": [2, 2], "stage_3": [3, 3]}
    assert read_manifest(latest(tmp_path))["metadata"] == {"of": 0}


def test_replicas_and_overlapping_pieces_load(tmp_path, one_rank):
    whole = torch.arange(12.0).reshape(3, 4)
    path = save(tmp_path, 1, {"w": one_piece(whole)}, {})
    pieces = (torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2, 2), torch.zeros(4, 3).T)  # the last: transposed
    load(path, {"w": LogicalTensor((3, 4), torch.float32, tuple(Piece((0, 0), piece) for piece in pieces))})
    assert all(torch.equal(piece, whole[: piece.shape[0], : piece.shape[1]]) for piece in pieces)


def test_parameters_load_in_place(tmp_path, one_rank):
    path = save(tmp_path, 1, {"w": one_piece(torch.ones(3, requires_grad=True))}, {})
    parameter = torch.nn.Parameter(torch.zeros(3))
    load(path, {"w": one_piece(parameter)})
    assert parameter.tolist() == [1, 1, 1] and parameter.grad_fn is None


def test_the_manifest_and_the_files_tell_all(tmp_path, one_rank):
    tensors = {"w": one_piece(torch.ones(2, 3, dtype=torch.bfloat16)), "n": one_piece(torch.tensor(5))}
    path = save(tmp_path, 10, tensors, {"config": {"run": {"seed": 1}}})
    assert path == tmp_path / "step_00000010" == latest(tmp_path)
    manifest = read_manifest(path)
    assert manifest["step"] == 10 and manifest["metadata"] == {"config": {"run": {"seed": 1}}}
    assert manifest["tensors"]["w"]["shape"] == [2, 3] and manifest["tensors"]["w"]["dtype"] == "bfloat16"
    (entry,) = manifest["files"]
    content = (path / entry["name"]).read_bytes()
    assert entry["size"] == len(content) and entry["sha256"] == hashlib.sha256(content).hexdigest()
    with safe_open(path / entry["name"], framework="pt") as file:  # a plain safetensors file
        assert file.get_tensor("w@0,0").tolist() == [[1, 1, 1]] * 2 and file.get_tensor("n@").item() == 5


def test_load_tensors_chooses(tmp_path, one_rank):
    path = save(tmp_path, 1, {name: one_piece(torch.ones(1)) for name in ("ema.a", "ema.b", "model.a")}, {})
    assert set(load_tensors(path)) == {"ema.a", "ema.b", "model.a"}
    assert set(load_tensors(path, prefix="ema.")) == {"ema.a", "ema.b"}
    assert set(load_tensors(path, names=["ema.b", "model.a"], prefix="ema.")) == {"ema.b"}
    with pytest.raises(ValueError, match="ema.c: not in the checkpoint"):
        load_tensors(path, names=["ema.c"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda good: {"absent": good}, "absent: it is not in the checkpoint"),
        (lambda good: {"w": replace(good, shape=(5, 4))}, r"w: shape \(4, 4\) in the checkpoint, \(5, 4\) here"),
        (lambda good: {"w": one_piece(torch.zeros(4, 4, dtype=torch.float64))}, "w: torch.float32 in the checkpoint"),
        (lambda good: {"w": replace(good, pieces=(Piece((1, 0), torch.zeros(4, 4)),))}, "w: a piece .* outside"),
        (lambda good: {"w": replace(good, pieces=(Piece((0,), torch.zeros(4, 4)),))}, "w: a piece .* outside"),
    ],
)
def test_what_does_not_match_is_named_and_nothing_is_written(tmp_path, one_rank, change, message):
    path = save(tmp_path, 1, {"a": one_piece(torch.ones(3)), "w": one_piece(torch.ones(4, 4))}, {})
    untouched, good = torch.zeros(3), one_piece(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=message):
        load(path, {"a": one_piece(untouched), **change(good)})
    assert untouched.tolist() == [0, 0, 0] and not good.pieces[0].tensor.any()


def load_wrong_on_one_rank(rank, world, path):
    first, second = torch.zeros(3), torch.zeros(3, dtype=torch.float32 if rank == 0 else torch.float64)
    with pytest.raises(ValueError, match="rank 1: b: torch.float32 in the checkpoint, torch.float64 here"):
        load(path, {"a": one_piece(first), "b": one_piece(second)})
    return first.tolist() + second.tolist()


def test_an_error_on_one_rank_is_raised_on_all_and_nothing_is_written(tmp_path, one_rank):
    path = save(tmp_path, 1, {"a": one_piece(torch.ones(3)), "b": one_piece(torch.ones(3))}, {})
    assert run_ranks(load_wrong_on_one_rank, 2, path) == [[0.0] * 6] * 2


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (Piece((0,), torch.ones(3)),),
        (Piece((0,), torch.ones(2)), Piece((1,), torch.ones(2))),
        (Piece((0,), torch.ones(2)), Piece((0,), torch.ones(2))),
        (Piece((0,), torch.ones(4)), Piece((0,), torch.ones(4))),
    ],
    ids=["nothing", "hole", "overlap and hole", "one place twice", "replica"],
)
def test_pieces_that_do_not_tile_are_refused(tmp_path, one_rank, pieces):
    with pytest.raises(ValueError, match="w"):
        save(tmp_path / "new", 1, {"w": LogicalTensor((4,), torch.float32, pieces)}, {})
    assert not (tmp_path / "new").exists()


def save_with_a_hole(rank, world, folder):
    with pytest.raises(ValueError, match="head.weight: the pieces of all ranks have 4 elements"):
        save(folder, 1, {"head.weight": LogicalTensor((6,), torch.float32, (Piece((rank * 3,), torch.ones(2)),))}, {})
    with pytest.raises(ValueError, match="head.weight: the ranks disagree"):
        save(folder, 1, {"head.weight": one_piece(torch.ones(rank + 1))}, {})


def test_a_hole_between_ranks_is_refused(tmp_path):
    run_ranks(save_with_a_hole, 2, tmp_path)
    assert latest(tmp_path) is None and not list(tmp_path.iterdir())


def save_on_a_full_disk(rank, world, folder):
    tensors = {"w": LogicalTensor((4,), torch.float32, (Piece((rank * 2,), torch.ones(2)),))}
    save(folder, 1, tensors, {})

    def full(_):
        raise OSError("No space left on device")

    if rank == 1:
        sync, os.fsync = os.fsync, full
    with pytest.raises(SaveError, match="rank 1: No space left on device"):
        save(folder, 2, tensors, {})
    if rank == 1:
        os.fsync = sync
    dist.barrier()
    found = latest(folder).name, len(list(folder.glob("*.partial")))
    dist.barrier()
    save(folder, 3, tensors, {})
    return found


def test_a_rank_that_cannot_write_fails_the_save_on_all(tmp_path):
    assert run_ranks(save_on_a_full_disk, 2, tmp_path) == [("step_00000001", 0)] * 2
    assert latest(tmp_path).name == "step_00000003" and not list(tmp_path.glob("*.partial"))


def test_metadata_must_be_json(tmp_path, one_rank):
    with pytest.raises(ValueError, match="metadata must be JSON"):
        save(tmp_path / "new", 1, {}, {"path": tmp_path})
    with pytest.raises(ValueError, match="w: a checkpoint cannot hold torch.complex64"):
        save(tmp_path / "new", 1, {"w": one_piece(torch.ones(1, dtype=torch.complex64))}, {})
    assert not (tmp_path / "new").exists()


def test_damaged_files_are_named(tmp_path, one_rank):
    path = save(tmp_path, 1, {"w": one_piece(torch.ones(100))}, {})
    file = path / "rank_00000.safetensors"
    content, target = file.read_bytes(), torch.zeros(100)

    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="rank_00000.safetensors is damaged"):
        load(path, {"w": one_piece(target)}, verify=True)
    file.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="rank_00000.safetensors has .* bytes, not"):
        load(path, {"w": one_piece(target)})
    with pytest.raises(ValueError, match="rank_00000.safetensors has .* bytes, not"):
        load_tensors(path)
    file.unlink()
    with pytest.raises(ValueError, match="rank_00000.safetensors is missing"):
        load(path, {"w": one_piece(target)})
    (path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="not of format 1"):
        load(path, {"w": one_piece(target)})
    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        load(path, {"w": one_piece(target)})
    assert not target.any()


def test_latest(tmp_path, one_rank):
    assert latest(tmp_path) is None and latest(tmp_path / "absent") is None
    for step in (5, 30, 100_000_000):
        save(tmp_path, step, {}, {})
    shutil.copytree(tmp_path / "step_00000030", tmp_path / "step_00000040.partial")
    (tmp_path / "step_00000050").mkdir()  # no manifest
    assert latest(tmp_path).name == "step_100000000"
    (tmp_path / "latest").write_text("step_00000005")  # going back
    assert latest(tmp_path).name == "step_00000005"
    for stale in ("step_00000050", "step_00000060", "", "../elsewhere"):
        (tmp_path / "latest").write_text(stale)
        assert latest(tmp_path).name == "step_100000000"
    (tmp_path / "latest").unlink()
    assert latest(tmp_path).name == "step_100000000"


def test_keep(tmp_path, one_rank):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, {}, {}, keep=2)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000003", "step_00000004"]
    save(tmp_path, 2, {}, {}, keep=2)  # gone back to an older run: what was just saved stays
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000004"]
    assert latest(tmp_path).name == "step_00000002"


@pytest.mark.parametrize(
    ("keep", "keep_every", "expected"),
    [
        (2, 0, [9, 10]),
        (2, 4, [4, 8, 9, 10]),
        (1, 5, [5, 10]),  # the newest is a multiple itself
        (3, 100, [8, 9, 10]),
        (0, 4, list(range(1, 11))),
    ],
)
def test_keep_every_spares_the_multiples(keep, keep_every, expected, tmp_path, one_rank):
    for step in range(1, 11):
        save(tmp_path, step, {}, {}, keep, keep_every)
    assert [int(path.name.removeprefix("step_")) for path in sorted(tmp_path.glob("step_*"))] == expected


def test_going_back_removes_the_later_checkpoints_alone(tmp_path, one_rank):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, {}, {})
    assert newest_before(tmp_path, 3).name == "step_00000002"
    assert newest_before(tmp_path, 1) is None
    go_back(tmp_path, 2)
    assert latest(tmp_path).name == "step_00000002"
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000001", "step_00000002"]


def test_a_disk_that_is_full_at_any_write_leaves_the_old_state_and_its_room(tmp_path, one_rank, monkeypatch):
    """The k-th call of fsync finds no room: every file has one after its last byte, and every folder."""
    sync = os.fsync
    save(tmp_path, 1, {"w": one_piece(torch.ones(1000))}, {})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for at in range(4):  # the safetensors file, the manifest, its folder, the next `latest`
        calls = itertools.count()

        def full(handle, calls=calls, at=at):
            if next(calls) == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(SaveError, match="rank 0: .*No space left on device"):
                save(tmp_path, 2, {"w": one_piece(torch.zeros(1000))}, {}, keep=1)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    save(tmp_path, 2, {"w": one_piece(torch.zeros(1000))}, {}, keep=1)
    assert not load_tensors(latest(tmp_path))["w"].any()


class KillSwitch:
    """Stops the run at the k-th change of the disk, in the middle of it if it is a removal."""

    def __init__(self, monkeypatch, at):
        self.left = at
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree")):
            monkeypatch.setattr(owner, name, self.guard(name, getattr(owner, name)))

    def guard(self, name, change):
        def guarded(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                if name == "rmtree" and self.left == -1:
                    next(Path(args[0]).glob("*.safetensors")).unlink()
                raise KeyboardInterrupt("killed")
            return change(*args, **kwargs)

        return guarded


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "a step saved before"])
def test_a_kill_at_any_moment_leaves_the_old_state_or_the_new(tmp_path, one_rank, monkeypatch, step):
    outcomes = []
    for at in itertools.count():
        folder = tmp_path / str(at)
        for earlier in (1, 2):
            save(folder, earlier, {"w": one_piece(torch.tensor([earlier]))}, {})
        shutil.copytree(folder / "step_00000001", folder / "step_00000009.partial")  # of a kill before this one
        with monkeypatch.context() as patch:
            switch = KillSwitch(patch, at)
            try:
                save(folder, step, {"w": one_piece(torch.tensor([30]))}, {}, keep=2)
            except (RuntimeError, KeyboardInterrupt) as error:  # the latter when cleaning up is cut short too
                assert "killed" in str(error)
        resumed = torch.zeros(1, dtype=torch.int64)
        load(latest(folder), {"w": one_piece(resumed)}, verify=True)
        outcomes.append(resumed.item())
        save(folder, 4, {"w": one_piece(torch.tensor([4]))}, {})
        assert not list(folder.glob("*.partial")) and not list(folder.glob("*.replaced"))
        for path in folder.glob("step_*"):
            load(path, {"w": one_piece(resumed)}, verify=True)
        if switch.left >= 0:
            break
    changed = outcomes.index(30)
    assert changed > 5 and outcomes == [2] * changed + [30] * (len(outcomes) - changed)
