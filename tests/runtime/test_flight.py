"""What a rank says of its collectives, and whom a set of such words blames."""

import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

import megadit
from megadit.parallel.grid import Grid, Layout
from megadit.runtime import flight
from tests.ranks import run_ranks


def waits(label, members, number, group=None):
    group = group or f"{label}{members}"
    words = f"all_reduce of 1 x float32 in group {label} {flight.ranks_text(members)}"
    return flight.Sight(words, label, tuple(members), group, number, {group: number}, "step.py:1 in train_step")


def busy(**joined):
    return flight.Sight("", "", (), "", -1, joined, "loader.py:1 in batch")


def late(rank, world_size):
    """Rank 1 comes a second late; the others see meanwhile what they wait in."""
    grid = Grid(Layout(pp=1, edp=1, ep=2, tp=2), rank)
    start = flight.newest_record()
    assert flight.collectives(start) == []
    group = grid["tp"]
    group.reduce_scatter(torch.ones(4, 3), dim=0)
    seen = []
    watcher = threading.Thread(target=lambda: (time.sleep(0.6), seen.append(flight.look(start))))
    watcher.start()
    if rank == 1:
        time.sleep(1.2)
    group.all_gather(torch.ones(2, 5), dim=0)
    watcher.join()
    dist.barrier()
    return [seen[0].to_json(), str(flight.collectives(start)[0]), flight.collectives(start)[1].pending]


def frame_of(path):
    """A frame of code that lies, as far as Python knows, at `path`."""
    names = {"sys": sys}
    exec(compile("frame = sys._getframe()", str(path), "exec"), names)
    return names["frame"]


def test_the_place_is_in_the_package_and_not_in_an_environment_inside_a_clone():
    package = Path(megadit.__file__).parent
    ours = frame_of(package / "parallel" / "grid.py")
    theirs = frame_of("/home/me/megadit/.venv/lib/python3.11/site-packages/torch/nn/modules/module.py")
    watchdog = frame_of(package / "runtime" / "watchdog.py")
    assert flight.look(frames=[theirs, watchdog, ours]).place == "megadit/parallel/grid.py:1 in <module>"
    assert flight.look(frames=[theirs]).place.startswith("/home/me/megadit/.venv/lib/")


def test_a_rank_tells_which_collective_of_which_axis_it_waits_in():
    results = run_ranks(late, 4, limit=120)
    waiting, first, pending = results[0]
    assert waiting["waiting"].startswith("all_gather")
    assert waiting["waiting"].endswith("of 10 x float32 in group tp [0, 1]")
    assert "parallel/grid.py" in waiting["place"]
    assert waiting["joined"][waiting["group"]] == waiting["number"]
    assert "in group tp [0, 1]" in first and not pending
    absent = results[1][0]
    assert absent["waiting"] == "" and absent["joined"][waiting["group"]] == waiting["number"] - 1
    sights = {rank: flight.Sight.from_json(result[0]) for rank, result in enumerate(results)}
    assert flight.blame(sights, []) == ([1], waiting["waiting"])


def message(rank, world_size):
    """Nobody sends what rank 0 waits for, until it has said so."""
    x = torch.ones(3)
    seen = []
    watcher = threading.Thread(target=lambda: (time.sleep(0.7), seen.append(flight.look().waiting)))
    watcher.start()
    if rank == 0:
        dist.recv(x, 1)
    else:
        time.sleep(3)
        dist.send(x, 0)
    watcher.join()
    return seen[0]


def test_a_message_that_the_recorder_does_not_know_is_named_by_the_call():
    assert run_ranks(message, 2, limit=120)[0].startswith("recv")


def test_of_a_chain_of_waiting_ranks_the_one_that_waits_for_nobody_is_blamed():
    sights = {
        0: waits("pp", [0, 2], 4),
        1: waits("pp", [1, 3], 4),
        2: waits("ep", [2, 3], 9),
        3: busy(**{"ep[2, 3]": 8}),
    }
    sights[2].joined["pp[0, 2]"] = 3
    sights[3].joined["pp[1, 3]"] = 3
    ranks, collective = flight.blame(sights, [])
    assert ranks == [3] and "in group" in collective


def test_a_rank_that_does_not_answer_is_blamed_where_it_is_a_member():
    sights = {rank: waits("dp", [0, 1, 2], 5) for rank in (0, 1)}
    assert flight.blame(sights, [2]) == ([2], sights[0].waiting)
    assert flight.blame({0: busy()}, []) == ([0], "")


def test_looking_is_cheap():
    began = time.perf_counter()
    for _ in range(5):
        flight.look()
    assert (time.perf_counter() - began) / 5 < 1
