"""Where this process stands among the others, from what torchrun, the deepspeed launcher or srun left behind.

Functions of the environment's variables alone: a command line that is refused needs to know no more, nor torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


class LaunchError(ValueError):
    """The launcher's environment variables contradict one another, or some are missing."""


class NotMet(LaunchError):
    """Other processes did not come in time; they may the next time."""


def discover(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world_size, local_rank) from the launcher's environment variables.

    Order: RANK and WORLD_SIZE (torchrun, deepspeed), then SLURM_PROCID and SLURM_NTASKS (srun), else (0, 1, 0). The
    script of an sbatch job and the shell of salloc carry SLURM_NTASKS too, yet are one process: the former has
    ENVIRONMENT=BATCH and no step, the latter no SLURM_PROCID.
    Raises LaunchError when only half of a pair is set, or when the rank is not below the world size.
    """
    for rank_key, world_key, local_key in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        in_batch_script = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ
        if rank_key == "SLURM_PROCID" and (in_batch_script or rank_key not in environ):
            continue
        present = [key for key in (rank_key, world_key) if key in environ]
        if len(present) == 1:
            missing = world_key if present[0] == rank_key else rank_key
            raise LaunchError(f"the environment sets {present[0]} but not {missing}; a launcher sets both")
        if present:
            rank, world_size, local_rank = (_number(environ, key) for key in (rank_key, world_key, local_key))
            if not 0 <= rank < world_size:
                raise LaunchError(f"{rank_key}={rank} is not below {world_key}={world_size}")
            return rank, world_size, local_rank
    return 0, 1, 0


def _number(environ: Mapping[str, str], key: str) -> int:
    value = environ.get(key, "0")
    if not value.isdecimal():
        raise LaunchError(f"{key}={value!r} is not a number")
    return int(value)


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list.

    >>> first_host("gpu[007-012,020],login1"), first_host("node3"), first_host("a-1,b-2"), first_host("r[1-2]n[3-4]-ib")
    ('gpu007', 'node3', 'a-1', 'r1n3-ib')
    """
    match = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist)
    if match is None:
        raise LaunchError(f"cannot read a host name from the node list {nodelist!r}; set MASTER_ADDR")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def rendezvous(environ: Mapping[str, str]) -> tuple[str, int]:
    """(address, port) of rank 0. Under srun the address is the step's first node and the port follows the job's id."""
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if "MASTER_ADDR" in environ:
        address = environ["MASTER_ADDR"]
    elif nodelist:
        address = first_host(nodelist)
    else:
        raise LaunchError("several processes, but MASTER_ADDR is not set: start with torchrun, deepspeed or srun")
    if "MASTER_PORT" in environ:
        return address, _number(environ, "MASTER_PORT")
    return address, 20000 + _number(environ, "SLURM_JOB_ID") % 20000  # jobs that share a node need different ports


def gpu_of(local_rank: int, visible: int, environ: Mapping[str, str]) -> int:
    """The index of this process's GPU. srun may show each process its own GPU only, as number 0.

    Raises LaunchError when there is none: two processes of one NCCL group cannot share a GPU.
    """
    if visible == 1 and "SLURM_LOCALID" in environ:
        return 0
    if local_rank >= visible:
        raise LaunchError(
            f"process {local_rank} of this machine has no GPU, {visible} are visible; start {visible} processes, or "
            'hide the GPUs with CUDA_VISIBLE_DEVICES=""'
        )
    return local_rank
