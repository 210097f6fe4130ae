"""The checks on the ranks of a test, with a fault planted on some of them."""

import importlib.metadata
import os
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist

from megadit.model.ecdit import ECDiT
from megadit.preflight import compute, hops, memory
from megadit.preflight.checks import CHECKS
from megadit.preflight.layouts import parse_layout
from megadit.preflight.rollcall import RollCall
from megadit.preflight.runner import run_checks
from megadit.preflight.station import Settings, Station
from megadit.runtime.launch import Process


def settings(world_size, *layouts, **others):
    return Settings(tuple(parse_layout(text, world_size) for text in layouts), quick=True, **others)


def examined(rank, world_size, plant, names, chosen):
    """(the report as plain data, its lines) of the checks of these names, with what `plant(rank)` does to this rank."""
    lines = []
    station = Station(Process(rank, world_size, rank, torch.device("cpu")), chosen)
    with plant(rank):
        rollcall = RollCall(rank, world_size)
        report = run_checks(station, [check for check in CHECKS if check.name in names], rollcall, lines.append)
        rollcall.dismiss(30)
        # What hangs must end before the groups do.
        for thread in threading.enumerate():
            if thread.name in names:
                thread.join(30)
    return report.to_dict(), lines


def by_name(report):
    return {check["name"]: check for check in report["checks"]}


@contextmanager
def nothing(rank):
    yield


@contextmanager
def slow_ranks(rank):
    """Rank 2 sleeps in its forward pass, rank 1 in matrix products."""
    forward, make = ECDiT.forward, compute.products

    def slow_forward(*args, **kwargs):
        time.sleep(0.4)
        return forward(*args, **kwargs)

    def slow_products(station):
        work = make(station)

        def slower():
            time.sleep(0.2)
            work()

        return slower

    with (
        patch.object(ECDiT, "forward", slow_forward if rank == 2 else forward),
        patch.object(compute, "products", slow_products if rank == 1 else make),
    ):
        yield


@contextmanager
def odd_hosts(rank):
    """Two hosts, the second five seconds ahead; another DeepSpeed on rank 1, broken memory on rank 2."""
    version, now, fill, seen = importlib.metadata.version, time.time, memory.fill, []

    def other_version(package):
        return "0.0.1" if package == "deepspeed" else version(package)

    def broken(words, first):
        fill(words, first)
        seen.append(first)
        if len(seen) == 1:  # what is written, not what it is compared with
            words[1234] ^= 8

    with ExitStack() as stack:
        stack.enter_context(patch.object(socket, "gethostname", lambda: f"host{rank // 2}"))
        if rank >= 2:
            stack.enter_context(patch.object(time, "time", lambda: now() + 5))
        if rank == 1:
            stack.enter_context(patch.object(importlib.metadata, "version", other_version))
            stack.enter_context(patch.dict(os.environ, NCCL_DEBUG="INFO"))
        if rank == 2:
            stack.enter_context(patch.object(memory, "fill", broken))
        yield


@contextmanager
def crossed_all_to_all(rank):
    """Rank 1 sends its blocks to the wrong ranks."""
    exchange = dist.all_to_all_single

    def crossed(out, x, *splits, **kwargs):
        return exchange(out, x.flip(0) if not splits else x, *splits, **kwargs)

    with patch.object(dist, "all_to_all_single", crossed if rank == 1 else exchange):
        yield


@contextmanager
def lost_share(rank):
    """Rank 2 adds nothing to a sum."""
    reduce = dist.all_reduce

    def without(x, *args, **kwargs):
        return reduce(x.zero_(), *args, **kwargs)

    with patch.object(dist, "all_reduce", without if rank == 2 else reduce):
        yield


@contextmanager
def slow_link(rank):
    """Long messages of rank 3 take long in all-to-alls."""
    exchange = dist.all_to_all_single

    def slow(out, x, **kwargs):
        time.sleep(0.06 if x.numel() > 1000 else 0)
        return exchange(out, x, **kwargs)

    with patch.object(dist, "all_to_all_single", slow if rank == 3 else exchange):
        yield


@contextmanager
def late_rank(rank):
    """Rank 3 comes late to its first all-to-all among hops."""
    start = hops.start_all_to_all

    def late(*args):
        if not os.environ.get("CAME_LATE"):
            os.environ["CAME_LATE"] = "1"
            time.sleep(6)
        return start(*args)

    with patch.object(hops, "start_all_to_all", late if rank == 3 else start):
        yield


@contextmanager
def raising_rank(rank):
    """Rank 2 has no memory to look at."""

    def raising():
        raise OSError("no such device")

    with patch.object(memory, "host_memory", raising if rank == 2 else memory.host_memory):
        yield
