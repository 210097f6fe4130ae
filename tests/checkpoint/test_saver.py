"""Saves in the background hold what was there when they began, one at a time, and survive a full disk."""

import itertools
import resource
import threading
import time

import pytest
import torch
import torch.distributed as dist

from megadit.checkpoint import LogicalTensor, Piece, Saver, latest, load_tensors, read_manifest, saver
from megadit.checkpoint.saver import Staging
from tests.ranks import run_ranks

WORLD = 2
SIZE = 1 << 16  # elements of each rank
BACKGROUND = pytest.mark.parametrize("background", [False, True], ids=["at once", "background"])


def rows(rank, world_size, elements):
    """This rank's row of a tensor [world_size, SIZE], of which `elements` is the live storage."""
    return {"w": LogicalTensor((world_size, elements.numel()), elements.dtype, (Piece((rank, 0), elements[None]),))}


def change_while_saving(rank, world_size, folder, background):
    """Change the tensors right after each save has returned, with collectives of the training's in between."""
    held = Saver(folder, background=background)
    elements = torch.empty(SIZE, dtype=torch.float64)
    for step in range(1, 6):
        elements.fill_(step)
        held.save(step, rows(rank, world_size, elements), {"of": step})
        elements.fill_(torch.nan)
        for turn in range(20):
            total = torch.tensor(float(turn))
            dist.all_reduce(total)
            assert total == turn * world_size
    held.wait()
    assert threading.active_count() < 20, "threads pile up"
    return held.failure


@BACKGROUND
def test_a_checkpoint_holds_what_was_there_when_its_save_began(background, tmp_path):
    assert run_ranks(change_while_saving, WORLD, tmp_path, background) == [None] * WORLD
    for step in range(1, 6):
        path = tmp_path / f"step_{step:08d}"
        assert (load_tensors(path)["w"] == step).all()
        assert read_manifest(path)["metadata"] == {"of": step}


def save_slowly(rank, world_size, folder, background):
    """How many saves ran at the same time, at most; seconds that training waited for the first and the second."""
    running, most, write = 0, 0, saver.save

    def slow(*args):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.5)
        path = write(*args)
        running -= 1
        return path

    saver.save = slow
    try:
        held, elements, waited = Saver(folder, background=background), torch.zeros(SIZE), []
        for step in (1, 2):
            start = time.perf_counter()
            held.save(step, rows(rank, world_size, elements), {})
            waited.append(time.perf_counter() - start)
        held.wait()
    finally:
        saver.save = write
    assert latest(folder).name == "step_00000002"
    return most, *waited


@BACKGROUND
def test_a_save_waits_for_the_one_before_it_and_training_for_none(background, tmp_path):
    for most, first, second in run_ranks(save_slowly, WORLD, tmp_path, background):
        assert most == 1
        assert (first < 0.25) == background
        assert second > 0.4


def save_without_room(rank, world_size, folder, background, without):
    """Reasons of failure of three saves, the second without room on the ranks `without`, and what the disk held."""
    held, found = Saver(folder, background=background), []
    for step in (1, 2, 3):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step == 2 and rank in without:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE * 4, hard))  # half of this rank's file
        held.save(step, rows(rank, world_size, torch.full((SIZE,), step, dtype=torch.float64)), {})
        held.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        found.append((held.failure, sorted(path.name for path in folder.iterdir())))
        dist.barrier()
    return found


@BACKGROUND
@pytest.mark.parametrize("without", [[0], [1], [0, 1]], ids=str)
def test_a_save_without_room_fails_on_all_ranks_and_gives_its_room_back(without, background, tmp_path, capfd):
    results = run_ranks(save_without_room, WORLD, tmp_path, background, without)
    for first, second, third in results:
        assert first == (None, ["latest", "step_00000001"])
        failure, files = second
        assert f"step 2 was not saved in {tmp_path}: rank {without[0]}: " in failure and "File too large" in failure
        assert files == first[1]
        assert third == (None, ["latest", "step_00000001", "step_00000003"])
    assert (load_tensors(latest(tmp_path))["w"] == 3).all()


def save_into_a_file(rank, world_size, folder, background):
    held = Saver(folder / "occupied", background=background)
    held.save(1, rows(rank, world_size, torch.zeros(4)), {})
    held.wait()
    return held.failure


@BACKGROUND
def test_a_folder_that_cannot_be_made_is_said_by_name(background, tmp_path):
    (tmp_path / "occupied").write_text("a file")
    for failure in run_ranks(save_into_a_file, WORLD, tmp_path, background):
        assert str(tmp_path / "occupied") in failure and "File exists" in failure


def save_a_hole(rank, world_size, folder, background):
    held = Saver(folder, background=background)
    tensors = rows(0, world_size, torch.zeros(4))  # nobody has the second row
    with pytest.raises(ValueError, match="w: the pieces of all ranks have"):
        held.save(1, tensors if rank == 0 else {}, {})
        held.wait()
    held.wait()  # said once
    held.save(2, rows(rank, world_size, torch.ones(4)), {})
    held.wait()
    return held.failure


@BACKGROUND
def test_what_is_no_fault_of_the_disk_is_raised(background, tmp_path):
    assert run_ranks(save_a_hole, WORLD, tmp_path, background) == [None] * WORLD
    assert latest(tmp_path).name == "step_00000002"


def lose_a_peer(rank, world_size, folder):
    """What the others raise when rank 0 never comes to the save, and leaves."""
    held = Saver(folder, background=True)
    if rank == 0:
        dist.barrier()
        dist.destroy_process_group()
        return None
    held.save(1, rows(rank, world_size, torch.zeros(4)), {})
    dist.barrier()
    with pytest.raises(RuntimeError) as lost:
        held.wait()
    return type(lost.value).__name__


def test_a_peer_that_is_lost_ends_the_wait(tmp_path):
    nobody, raised = run_ranks(lose_a_peer, WORLD, tmp_path, limit=120)
    assert nobody is None and raised
    assert latest(tmp_path) is None


PIECES = [
    ((3, 5), torch.float64),
    ((7,), torch.bfloat16),
    ((), torch.float32),
    ((3,), torch.bool),
    ((0, 2), torch.int64),
]


def logical(seed):
    """Several pieces of several types; some are not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, (shape, dtype) in enumerate(PIECES):
        whole = torch.randint(0, 2, (*shape, 2), generator=generator).to(dtype)
        views = [whole[..., half] for half in range(2)]
        pieces = tuple(Piece((*(0 for _ in shape),), view) for view in views)
        tensors[str(index)] = LogicalTensor(tuple(shape), dtype, pieces)
    return tensors


def test_staging_copies_every_piece_into_memory_that_it_uses_again():
    staging, pointers = Staging(), []
    for seed in (1, 2):
        source = logical(seed)
        copies = staging.copy(source)
        assert copies.keys() == source.keys()
        flat = []
        for name, tensor in source.items():
            assert (copies[name].shape, copies[name].dtype) == (tensor.shape, tensor.dtype)
            for piece, other in zip(tensor.pieces, copies[name].pieces, strict=True):
                assert piece.offsets == other.offsets and torch.equal(piece.tensor, other.tensor)
                flat.append(other.tensor)
        spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in flat if tensor.numel())
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans)), "pieces overlap"
        pointers.append([tensor.data_ptr() for tensor in flat])
    assert pointers[0] == pointers[1]
