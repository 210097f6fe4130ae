"""The process group of this process and the others that its launcher started.

A process started by no launcher is a world of one, on the same code path: it too has a process group.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megadit.runtime.environment import NotMet, discover, gpu_of, rendezvous
from megadit.runtime.flight import remember_collectives


@dataclass(frozen=True)
class Meeting:
    """Where the processes met, for whoever wants to leave word there."""

    connect: Callable[[], dist.Store] = dist.HashStore  # a connection of one's own: a call may block the one it is on
    main_serves: bool = True  # rank 0, and not the launcher's agent, serves it
    address: str = "this process"


@dataclass(frozen=True)
class Process:
    """This process: its rank, the number of processes, its rank on its node, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    meeting: Meeting = Meeting()

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and speaks."""
        return self.rank == 0


RENDEZVOUS_LIMIT = timedelta(minutes=5)


def end_with_parent() -> None:
    """Have the kernel end this process when its parent dies (Linux; elsewhere nothing).

    torchrun gives each rank a session of its own: when it is killed itself, the ranks would train on unseen.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def run_in_turns() -> None:
    """Have the kernel treat this process, and the threads that it starts, as batch work (Linux; elsewhere nothing).

    For ranks that share cores. A message that arrives wakes its receiver, which would take the core from a rank that is
    still computing, many times in each collective.
    """
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def call_roll(store: dist.Store, rank: int, world_size: int, patience: timedelta) -> None:
    """Return when every process has come. Raises NotMet naming those that have not, on all that have.

    torch's own rendezvous only counts, and gloo waits for its first neighbour that is missing, half an hour by default.
    """
    store.set(f"came/{rank}", "")
    if rank == 0:
        deadline, missing = time.monotonic() + patience.total_seconds(), list(range(world_size))
        while missing and time.monotonic() < deadline:
            missing = [each for each in missing if not store.check([f"came/{each}"])]
            time.sleep(0.01 if missing else 0)
        store.set("missing", ",".join(str(each) for each in missing))
    try:
        store.wait(["missing"], patience + timedelta(seconds=10))
        missing_ranks = store.get("missing").decode()
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise NotMet(f"process {rank} waited for process 0 in vain: {error}") from error
    if missing_ranks:
        seconds = patience.total_seconds()
        raise NotMet(f"of {world_size} processes these did not come in {seconds:.0f} s: {missing_ranks}")


@contextmanager
def process_group(
    timeout: timedelta = timedelta(minutes=30), patience: timedelta = RENDEZVOUS_LIMIT
) -> Iterator[Process]:
    """Join the others (NCCL where there is a CUDA device, else gloo), yield this `Process`, leave at the end.

    `patience`: how long the others may take to start. `timeout`: of each collective.
    DeepSpeed picks its accelerator from DS_ACCELERATOR, so that is set here too, before anything imports it. Raises
    LaunchError when the environment does not say who is who, NotMet when some did not come.
    """
    rank, world_size, local_rank = discover(os.environ)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    if torch.cuda.is_available():
        device = torch.device("cuda", gpu_of(local_rank, torch.cuda.device_count(), os.environ))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        if world_size > 1:
            run_in_turns()
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    remember_collectives()
    meeting = Meeting()
    if world_size == 1:
        store: dist.Store = dist.HashStore()
    else:
        address, port = rendezvous(os.environ)
        # torchrun's agent already serves the store on MASTER_PORT; everyone is a client then.
        agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        serves = rank == 0 and not agent_serves
        try:
            store = dist.TCPStore(
                address, port, world_size, is_master=serves, timeout=RENDEZVOUS_LIMIT, wait_for_workers=False
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise NotMet(f"process {rank} did not meet process 0 at {address}:{port}: {error}") from error
        # A restarted group must not read the keys of the group before it, in an agent's store. Where process 0 serves,
        # the store is new, and a machine that came later has another count.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent_serves else "0"
        prefix = f"megadit/{attempt}/{world_size}"
        store = dist.PrefixStore(prefix, store)

        def connect() -> dist.Store:
            client = dist.TCPStore(address, port, is_master=False, timeout=RENDEZVOUS_LIMIT, wait_for_workers=False)
            return dist.PrefixStore(prefix, client)

        meeting = Meeting(connect, not agent_serves, f"{address}:{port}")
        call_roll(store, rank, world_size, patience)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        yield Process(rank, world_size, local_rank, device, meeting)
    finally:
        dist.destroy_process_group()
