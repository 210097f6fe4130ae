"""Save and load whole, named, logical tensors, whatever layout the ranks hold them in.

Of torch.distributed.checkpoint we use the planning, not the storage: its metadata reader unpickles, and its safetensors
writer keeps one shard per tensor and rank. So boxes go to plain safetensors files, one per rank, and the rest is JSON.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megadit.checkpoint.folder import clear, latest, read_manifest, step_path
from megadit.checkpoint.storage import (
    DTYPES,
    LogicalTensor,
    Piece,
    Reader,
    StrictLoadPlanner,
    TilingSavePlanner,
    Writer,
)

__all__ = ["DTYPES", "LogicalTensor", "Piece", "SaveError", "latest", "load", "load_tensors", "read_manifest", "save"]


class SaveError(RuntimeError):
    """A rank could not write its part of a checkpoint; the earlier ones and `latest` are as they were."""


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, LogicalTensor],
    metadata: Mapping[str, object],
    keep: int = 0,
    keep_every: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Save a checkpoint of `step` under `folder` and make it the latest. Collective; returns its path.

    Each rank passes the pieces that it owns: over all ranks they must tile every tensor exactly once. A rank may pass
    names that others do not have, or none. `metadata` is JSON (the resolved config, versions); rank 0's is written.
    With `keep` > 0 this checkpoint and the `keep` - 1 newest others stay, and with `keep_every` > 0 those whose step
    is a multiple of it. `group`: all ranks in their order, the default group unless given.

    Raises on all ranks: ValueError, naming the tensor and before anything is written, if a tensor is not tiled;
    SaveError if a rank could not write. The earlier checkpoints and `latest` are then as they were, and what was
    written is removed.
    """
    folder = Path(folder)
    writer = Writer(folder, step, metadata, keep, keep_every)
    try:
        dcp.save({}, storage_writer=writer, planner=TilingSavePlanner(tensors), process_group=group)
    except CheckpointException as error:
        if dist.get_rank(group) == 0:
            with contextlib.suppress(OSError):  # the next save tries again
                clear(folder)
        dist.barrier(group)  # on every rank the room is free again when this returns
        raise _of_first_rank(error, of_files=SaveError) from None
    return step_path(folder, step)


def load(path: Path, tensors: Mapping[str, LogicalTensor], verify: bool = False) -> None:
    """Fill the pieces that this rank needs from the checkpoint at `path`, in place. Collective.

    Any layout and any number of ranks; replicas are fine. `verify` also checks the files' sha256, each on one rank.

    Raises ValueError on all ranks, before anything is written into a piece, for a tensor that is missing or has another
    shape or dtype in the checkpoint, and for a file that is missing, or is not what the manifest says.
    """
    reader = Reader(Path(path), verify, dist.get_rank(), dist.get_world_size())
    with _one_error_for_all_ranks():
        dcp.load({}, storage_reader=reader, planner=StrictLoadPlanner(tensors))


def load_tensors(path: Path, names: Iterable[str] | None = None, prefix: str = "") -> dict[str, torch.Tensor]:
    """Whole tensors of the checkpoint at `path`, on the CPU, in one process and without a process group.

    `names` (default: all), of which those that start with `prefix`. Raises ValueError for a name or a file that is
    missing.
    """
    table = read_manifest(path)["tensors"]
    chosen = [name for name in (table if names is None else names) if name.startswith(prefix)]
    if missing := [name for name in chosen if name not in table]:
        raise ValueError(f"{', '.join(missing)}: not in the checkpoint {path}")
    whole = {name: torch.empty(table[name]["shape"], dtype=DTYPES[table[name]["dtype"]]) for name in chosen}
    logical = {
        name: LogicalTensor(tuple(tensor.shape), tensor.dtype, (Piece((0,) * tensor.ndim, tensor),))
        for name, tensor in whole.items()
    }
    with warnings.catch_warnings(), _one_error_for_all_ranks():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        dcp.load({}, storage_reader=Reader(Path(path)), planner=StrictLoadPlanner(logical), no_dist=True)
    return whole


@contextmanager
def _one_error_for_all_ranks() -> Iterator[None]:
    """DCP's exception carries every rank's failure and is not an `Exception`: raise the first rank's own instead."""
    try:
        yield
    except CheckpointException as error:
        raise _of_first_rank(error) from None


def _of_first_rank(error: CheckpointException, of_files: type[RuntimeError] = RuntimeError) -> Exception:
    """What the first rank that failed raised; `of_files`: what an OSError becomes."""
    rank, (cause, _) = min(error.failures.items())
    kind: type[Exception] = RuntimeError
    if isinstance(cause, ValueError):
        kind = ValueError
    elif isinstance(cause, OSError):
        kind = of_files
    raised = kind(f"rank {rank}: {cause}")
    raised.__cause__ = cause
    return raised
