"""A rank is lost: the others end soon, with one status, and name it and what they waited for."""

import contextlib
import gc
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megadit.runtime.board import Beat, Board, Verdict, Watched
from megadit.runtime.launch import Meeting, Process
from megadit.runtime.lines import read_lines
from megadit.runtime.status import LOST
from megadit.runtime.watchdog import AwakeClock, Watchdog, WatchdogConfig, claim
from megadit.training.events import EVENTS_FILE
from tests.launch.test_launchers import environ
from tests.lost_ranks import steps_of, train_and_lose
from tests.ranks import free_port

SOON = 10  # seconds, beyond the configured ones
QUICK = ["watchdog.hang=4", "watchdog.silent=3"]


def at_batch(rank, culprit, folder, what):
    """Have the culprit do `what` instead of reading the batch of step 4."""
    from megadit.data.loader import Loader

    read = Loader.batch

    def batch(self, step):
        if rank == culprit and step == 4:
            (folder.parent / "fault").touch()
            what()
        return read(self, step)

    Loader.batch = batch


def loop_for_ever():
    while True:
        time.sleep(0.01)


def fail():
    raise ArithmeticError("the planted fault")


def looping(rank, folder):
    at_batch(rank, 1, folder, loop_for_ever)


def raising(rank, folder):
    at_batch(rank, 1, folder, fail)


def raising_first(rank, folder):
    at_batch(rank, 0, folder, fail)


def raising_while_the_other_computes(rank, folder):
    at_batch(rank, rank, folder, fail if rank == 1 else lambda: time.sleep(1.2))


def looping_last(rank, folder):
    at_batch(rank, 3, folder, loop_for_ever)


def skipping(rank, folder):
    """Rank 1 leaves out the all-reduces from step 4 on, and trains on by itself."""
    import torch.distributed as dist

    def skip():
        dist.all_reduce = lambda *args, **kwargs: time.sleep(0.01)

    at_batch(rank, 1, folder, skip)


def survivors(outcome, lost):
    return [rank for rank in range(len(outcome.statuses)) if rank != lost]


def judge(outcome, lost, seconds, collective="all_reduce of"):
    """All others ended in time, with the status of a loss, and said whom they lost and what they waited for."""
    assert outcome.seconds < seconds, outcome.errors
    for rank in survivors(outcome, lost):
        assert outcome.statuses[rank] == LOST, outcome.errors
        assert f"rank {lost} (" in outcome.errors[rank] and str(outcome.pids[lost]) in outcome.errors[rank]
        assert f"rank_{rank}.txt" in outcome.dumps()
    event = outcome.lost()
    assert event["ranks"] == [lost] and collective in event["collective"], event
    assert f"rank {lost} (" in event["reason"]
    assert any(collective in outcome.errors[rank] for rank in survivors(outcome, lost))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_the_others_end(victim, tmp_path):
    outcome = train_and_lose(2, tmp_path / "run", *QUICK, send=(victim, signal.SIGSTOP), gone=[victim])
    judge(outcome, victim, 4 + SOON)
    assert outcome.statuses[victim] is None


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_and_the_others_end(victim, tmp_path):
    outcome = train_and_lose(2, tmp_path / "run", send=(victim, signal.SIGKILL))
    judge(outcome, victim, SOON)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "culprit"), [(raising, 1), (raising_first, 0), (raising_while_the_other_computes, 1)]
)
def test_a_rank_that_raises_says_so_and_the_others_name_it(plant, culprit, tmp_path):
    outcome = train_and_lose(2, tmp_path / "run", plant=plant)
    judge(outcome, culprit, SOON)
    assert outcome.statuses == [LOST, LOST]
    assert "the planted fault" in outcome.errors[1 - culprit]
    assert outcome.errors[culprit].lstrip().startswith("Traceback") or "Traceback" in outcome.errors[culprit]


@pytest.mark.slow
def test_a_hung_rank_is_named_and_every_rank_says_where_it_is(tmp_path):
    outcome = train_and_lose(2, tmp_path / "run", *QUICK, plant=looping)
    judge(outcome, 1, 4 + SOON)
    assert outcome.statuses == [LOST, LOST]
    assert "loop_for_ever" in outcome.dumps()["rank_1.txt"]
    assert "has not joined" in outcome.lost()["reason"]


@pytest.mark.slow
def test_a_rank_that_left_out_a_collective_is_found(tmp_path):
    outcome = train_and_lose(2, tmp_path / "run", *QUICK, plant=skipping)
    judge(outcome, 1, 4 + SOON)
    assert outcome.lost()["kind"] == "hung" and "has not joined all_reduce" in outcome.lost()["reason"]


@pytest.mark.parametrize(
    "send",
    [pytest.param(None, marks=pytest.mark.drill), pytest.param((3, signal.SIGSTOP), marks=pytest.mark.slow)],
    ids=["hung", "stopped"],
)
def test_of_four_ranks_of_a_pipeline_with_experts_the_right_one_is_named(send, tmp_path):
    layout = ["parallel.pipeline=2", "parallel.expert=2"]
    plant = looping_last if send is None else None
    gone = [] if send is None else [3]
    outcome = train_and_lose(4, tmp_path / "run", *QUICK, *layout, plant=plant, send=send, gone=gone)
    judge(outcome, 3, 4 + SOON, collective="in group ")


def hung_alone(rank, folder):
    at_batch(rank, 0, folder, loop_for_ever)


@pytest.mark.slow
def test_one_process_that_hangs_ends_too(tmp_path):
    outcome = train_and_lose(1, tmp_path / "run", "watchdog.hang=2", plant=hung_alone)
    assert outcome.statuses == [LOST] and outcome.seconds < 4 + SOON
    assert outcome.lost()["ranks"] == [0] and "loop_for_ever" in outcome.dumps()["rank_0.txt"]


def in_store(store, rank, world_size):
    def connect():
        return dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)

    return Process(rank, world_size, rank, torch.device("cpu"), Meeting(connect, True, "127.0.0.1"))


def open_handles():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_watchdog_that_is_no_longer_needed_leaves_nothing(tmp_path):
    told = []
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    before = open_handles()
    dogs = [Watchdog(in_store(store, rank, 2)) for rank in range(2)]
    for dog in dogs:
        dog.watch(WatchdogConfig(), tmp_path, lambda *args, **more: told.append(args))
        dog.progress(1)
    time.sleep(1.5)
    leaving = [threading.Thread(target=dog.__exit__, args=(None, None, None)) for dog in dogs]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join(10)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("watchdog")]
    del dogs, leaving, dog, thread
    gc.collect()
    assert open_handles() <= before and not told and not list(tmp_path.iterdir())


def test_alone_an_exception_is_told_and_goes_on(tmp_path):
    told = []
    with pytest.raises(ArithmeticError), Watchdog(Process(0, 1, 0, torch.device("cpu"))) as dog:
        dog.watch(WatchdogConfig(), tmp_path, lambda step, reason, **more: told.append((step, reason, more["ranks"])))
        dog.progress(7)
        raise ArithmeticError("planted")
    assert told == [(7, "rank 0 raised ArithmeticError: planted", [0])]


def test_no_watchdog_costs_no_thread(tmp_path):
    with Watchdog(Process(0, 1, 0, torch.device("cpu"))) as dog:
        dog.watch(WatchdogConfig(hang=0), tmp_path, print)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("watchdog")]


def test_a_suspended_job_did_not_hang(monkeypatch):
    clock = AwakeClock()
    time_now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: time_now + 10_000)
    clock.tick()
    assert clock.now() <= 2


def test_one_claim_is_the_first(tmp_path):
    assert claim(tmp_path / "faults", "token", "a") == ("a", True)
    assert claim(tmp_path / "faults", "token", "b") == ("a", False)
    assert claim(tmp_path / "faults", "another", "c") == ("c", True)
    (tmp_path / "file").write_text("")
    assert claim(tmp_path / "file", "token", "d") == ("d", True)  # no folder can be made there


def beat(rank, count, **more):
    return Beat(count, "host", 1, 5, "training", **({"idle": 0.0, "limit": 10.0} | more))


def test_of_1024_ranks_rank_0_reads_all_heartbeats_in_one_call():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    boards = [Board(store, rank, 1024) for rank in range(1024)]
    assert boards[0].beats() == {}
    for rank, board in enumerate(boards):
        board.beat(beat(rank, 1))
    began = time.perf_counter()
    found = boards[0].beats()
    assert len(found) == 1024 and time.perf_counter() - began < 1
    watched = Watched()
    watched.update(found, 0.0)
    boards[3].beat(beat(3, 2))
    boards[4].beat(beat(4, 2, left=True))
    watched.update(boards[0].beats(), 5.0)
    silent = watched.silent(6.0, 3.0)
    assert 3 not in silent and 4 not in silent and len(silent) == 1022
    assert watched.silent(6.0, 7.0) == []


def test_the_first_verdict_counts():
    store = dist.HashStore()
    first, second = Board(store, 0, 2), Board(store, 1, 2)
    assert first.verdict() is None
    second.propose(Verdict("gone", (0,), 1, "words", "folder"))
    first.propose(Verdict("hung", (), 0, "others", "folder"))
    assert first.verdict() == second.verdict() == Verdict("gone", (0,), 1, "words", "folder")


@pytest.mark.drill
@pytest.mark.parametrize(
    ("victim", "sent"),
    [(0, signal.SIGSTOP), (1, signal.SIGSTOP), (1, signal.SIGKILL)],
    ids=["0 stop", "1 stop", "kill"],
)
def test_torchrun_starts_again_and_finds_nothing_of_the_life_before(victim, sent, tmp_path):
    """The store is the agent's: it outlives the group that lost a rank, with its heartbeats and its verdict."""
    run = tmp_path / "run"
    command = ["torchrun", "--nnodes=1", "--nproc-per-node=2", "--max-restarts=1", "--master-port", str(free_port())]
    command += [
        "-m",
        "megadit.train",
        "--config",
        "tests/configs/tiny.yaml",
        f"run.dir={run}",
        "checkpoint.every=5",
        *QUICK,
    ]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen([*command, "run.steps=60"], stderr=errors, stdout=errors, env=environ())
        try:
            while steps_of(run) < 12:
                time.sleep(0.02)
                assert process.poll() is None, (tmp_path / "errors").read_text()
            os.kill(ranks_of(process.pid)[victim], sent)
            status = process.wait(200)
        finally:
            process.kill()
    assert status == 0, (tmp_path / "errors").read_text()
    assert steps_of(run) == 60
    if sent == signal.SIGSTOP:  # of a kill torchrun hears itself, and ends the other rank before that one could speak
        assert [line["ranks"] for line in read_lines(run / EVENTS_FILE) if line["event"] == "lost"] == [[victim]]


def ranks_of(agent):
    """The processes that a torchrun has started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == agent:
                variables = dict(line.partition("=")[::2] for line in (path / "environ").read_text().split("\0"))
                if "RANK" in variables:
                    found[int(variables["RANK"])] = int(path.name)
    return found
