"""What a process is doing with the others: its collectives as torch's flight recorder has them, and its Python frames.

The recorder keeps the last collectives of every process group, gloo's as well as NCCL's; a finished one is `retired`.
gloo's messages between two ranks are not in it: those show in the frames of the thread that waits for them. Looking
reads them all, a fifth of a second for a full memory, and asks nothing of the device: for the end of a run only, but
then also while another thread is stuck.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import torch._C._distributed_c10d as _native
import torch.distributed as dist

RECORDS = 2000  # collectives that are remembered
DTYPES = {"Float": "float32", "Double": "float64", "BFloat16": "bfloat16", "Half": "float16", "Byte": "uint8",
          "Long": "int64", "Int": "int32", "Bool": "bool"}  # fmt: skip
PIPELINE = os.path.join("distributed", "pipelining", "")
C10D = "distributed_c10d.py"
# The package's own folder: a path with "megadit" in it may be that of an environment inside a clone.
PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


def remember_collectives() -> None:
    """Have the recorder keep enough. Before the first process group; newer torch records by itself."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDS))


@dataclass(frozen=True)
class Collective:
    """One collective as one rank sees it.

    group: the process group's unique name; label: what it is called, an axis or "world"; number: it is the
    group's so-and-so-manieth; pending: not finished.
    """

    name: str
    group: str
    label: str
    members: tuple[int, ...]
    number: int
    elements: int
    dtype: str
    pending: bool

    def __str__(self) -> str:
        what = f"{self.name} of {self.elements} x {self.dtype}" if self.dtype else self.name
        return f"{what} in group {self.label} {ranks_text(self.members)}"


def ranks_text(ranks: Sequence[int]) -> str:
    """A list of ranks, short.

    >>> ranks_text([1, 3]), ranks_text(range(64)), ranks_text(range(0, 64, 2))
    ('[1, 3]', '[0 to 63]', '[0, 2, 4, ..., 62: 32 ranks]')
    """
    ranks = list(ranks)
    if len(ranks) <= 8:
        return str(ranks)
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"[{ranks[0]} to {ranks[-1]}]"
    return f"[{', '.join(map(str, ranks[:3]))}, ..., {ranks[-1]}: {len(ranks)} ranks]"


def _records() -> list[dict[str, Any]]:
    """The recorder's entries, the oldest first; none where this torch has no recorder."""
    dump = getattr(_native, "_dump_fr_trace_json", None) or getattr(_native, "_dump_nccl_trace_json", None)
    if dump is None:
        return []
    return sorted(json.loads(dump()).get("entries", []), key=lambda entry: int(entry["record_id"]))


def newest_record() -> int:
    """The number of the last record; -1 when there is none. What came before belongs to a life before this one."""
    records = _records()
    return int(records[-1]["record_id"]) if records else -1


def process_groups() -> dict[str, tuple[str, tuple[int, ...]]]:
    """{unique name: (label, members)} of this process's groups."""
    world = getattr(dist.distributed_c10d, "_world", None)
    found = {}
    for handle, ranks in dict(getattr(world, "pg_group_ranks", {})).items():
        description = str(getattr(handle, "group_desc", "") or "undefined")
        label = {"default_pg": "default", "undefined": "unnamed"}.get(description, description)
        found[str(handle.group_name)] = (label, tuple(sorted(ranks)))
    return found


def collectives(after: int = -1) -> list[Collective]:
    """What the recorder remembers of records later than `after`, the oldest first."""
    groups = process_groups()
    return [_parsed(entry, groups) for entry in _records() if int(entry["record_id"]) > after]


def _parsed(entry: Mapping[str, Any], groups: Mapping[str, tuple[str, tuple[int, ...]]]) -> Collective:
    group, description = (str(part) for part in entry["process_group"])
    label, members = groups.get(group, (description, ()))
    number = int(entry["p2p_seq_id"] if entry.get("is_p2p") else entry["collective_seq_id"])
    dtypes = entry.get("input_dtypes") or [""]
    return Collective(
        name=str(entry["profiling_name"]).rpartition(":")[2],
        group=group,
        label=label,
        members=members,
        number=-1 if entry.get("is_p2p") else number,
        elements=sum(math.prod(int(size) for size in sizes) for sizes in entry.get("input_sizes") or []),
        dtype=DTYPES.get(dtypes[0], str(dtypes[0]).lower()),
        pending=not entry.get("retired") and entry.get("state") != "completed",
    )


@dataclass(frozen=True)
class Sight:
    """What one rank is doing, as the others are told.

    waiting: the collective or message that it waits in, as words; empty when it waits in none. group, number: which one
    that is, when the recorder knows. joined: {group: the last collective of it that this rank has entered}.
    place: the line of ours that its main thread is at.
    """

    waiting: str
    label: str
    members: tuple[int, ...]
    group: str
    number: int
    joined: dict[str, int]
    place: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Sight:
        return cls(**{**plain, "members": tuple(plain["members"])})


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _main_frames() -> list[FrameType]:
    """The main thread's, the innermost first."""
    return list(_callers(sys._current_frames().get(threading.main_thread().ident or 0)))


def _is_ours(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    return path.startswith(PACKAGE) and path != os.path.join(PACKAGE, "runtime", "watchdog.py")


def _place(frame: FrameType) -> str:
    path = frame.f_code.co_filename
    short = os.path.relpath(path, os.path.join(PACKAGE, os.pardir)) if path.startswith(PACKAGE) else path
    return f"{short}:{frame.f_lineno} in {frame.f_code.co_name}"


def look(after: int = -1, frames: Sequence[FrameType] | None = None) -> Sight:
    """What this process is doing; `frames`: or was doing in these, the innermost first, when an exception left them.

    A collective that is pending while no thread waits for it (one that overlaps with work) counts on a GPU only, where
    the host runs ahead of it.
    """
    history = collectives(after)
    joined: dict[str, int] = {}
    for each in history:
        joined[each.group] = max(joined.get(each.group, -1), each.number)
    ended = frames is not None
    frames = _main_frames() if frames is None else frames
    place = next((_place(frame) for frame in frames if _is_ours(frame)), _place(frames[0]) if frames else "")
    # The public function that was called: gloo's record of a reduce_scatter, for one, says all_reduce.
    call = next((frame for frame in frames if frame.f_code.co_filename.endswith(C10D)), None)
    message = next((frame for frame in frames if PIPELINE in frame.f_code.co_filename), None)
    called = [frame.f_code.co_name for frame in frames if frame.f_code.co_filename.endswith(C10D)]
    pending = [each for each in history if each.pending] or ([history[-1]] if ended and call and history else [])
    waits = bool(call) or any(record.name for record in pending if record.members) and not _on_host_only()
    if pending and waits:
        oldest = pending[0]
        if len(called) and not called[0].startswith("_") and len(pending) == 1 and called[0] != "wait":
            oldest = Collective(**{**asdict(oldest), "name": called[0], "members": oldest.members})
        return Sight(str(oldest), oldest.label, oldest.members, oldest.group, oldest.number, joined, place)
    if message is not None and (frames[0] is message or call is not None):
        group, (label, members) = next(
            ((name, about) for name, about in process_groups().items() if about[0] == "pp"), ("", ("pp", ()))
        )
        text = f"a message between pipeline stages in group {label} {ranks_text(members)}"
        return Sight(text, label, members, group, -1, joined, place)
    if call is not None:
        return Sight(f"{call.f_code.co_name}, which is not recorded", "", (), "", -1, joined, place)
    return Sight("", "", (), "", -1, joined, place)


def _on_host_only() -> bool:
    """Whether the default group's collectives block the thread that calls them, as gloo's do."""
    return not dist.is_initialized() or dist.get_backend() == "gloo"


def blame(sights: Mapping[int, Sight], silent: Sequence[int]) -> tuple[list[int], str]:
    """(the ranks that keep the others waiting, the collective that these wait for).

    Of a collective that a rank waits in, its members who never entered it; `silent`: ranks that do not answer, who
    are to blame wherever they are a member. A rank that waits itself is to blame only when nobody else is. The words
    are empty when nobody waits.

    >>> waits = Sight("barrier in group dp [0, 1]", "dp", (0, 1), "g", 7, {"g": 7}, "loop.py:3 in train")
    >>> blame({0: waits, 1: Sight("", "", (), "", -1, {"g": 6}, "loader.py:9 in batch")}, [])
    ([1], 'barrier in group dp [0, 1]')
    >>> blame({0: waits}, [1])
    ([1], 'barrier in group dp [0, 1]')
    """
    found: dict[str, set[int]] = {}
    for sight in sights.values():
        if not sight.waiting:
            continue
        absent = {rank for rank in sight.members if rank in silent}
        for member in sight.members:
            other = sights.get(member)
            if other is None:
                continue
            behind = sight.number >= 0 and other.joined.get(sight.group, -1) < sight.number
            if behind or (sight.number < 0 and not other.waiting):
                absent.add(member)
        found.setdefault(sight.waiting, set()).update(absent)
    busy = {rank for rank, sight in sights.items() if not sight.waiting} | set(silent)
    for guilty in (lambda absent: absent & busy, lambda absent: absent):
        for words, absent in found.items():
            if guilty(absent):
                return sorted(guilty(absent)), words
    words = next(iter(found), "")
    return sorted(silent) or sorted(busy if found else sights), words
