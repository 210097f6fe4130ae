"""Images and captions to shards, on any number of ranks; a kill at any moment loses units that are not done, no more.

Each rank encodes every world-size-th unit of those that are left; whoever does a unit, and whenever, it has the same
bytes. Between the beginning and the end ranks share nothing but a few counts in the store that they met in.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import torch.distributed as dist

from megadit.data.encode_folder import EncodingFolder, Report
from megadit.data.encode_unit import EncodeConfig, UnitEncoder
from megadit.data.frozen import Frozen
from megadit.data.images import bytes_limit
from megadit.data.manifest import Manifest
from megadit.data.shards import Caption
from megadit.data.sources import Readers, SourceFile, Unit, find, units
from megadit.data.units import OF_THE_FILE, Contents
from megadit.runtime.agreement import gathered, of_main, together
from megadit.runtime.launch import Process
from megadit.runtime.lock import hold

logger = logging.getLogger("megadit")

SILENCE_S = 3600.0  # without an image of any rank, at the end: one has died
LOOK_S = 0.5  # between looks at what other ranks left in the store
Made = TypeVar("Made")


class Stops(Protocol):
    """What the encoding needs of `megadit.runtime.stopping.StopRequests`."""

    def begin(self) -> object:
        """From now on there is something to keep."""

    @property
    def reason(self) -> str | None:
        """Why this process should stop, or None."""


class Stopped(Exception):
    """Asked to stop. What is done is kept."""


class Lost(Exception):
    """A rank or the disk failed."""


class Silent(Lost):
    """A rank neither goes on nor says why: a collective would wait for it."""


class Tally:
    """What ranks tell one another while they work: images that are done, who is through, and that all should stop."""

    def __init__(self, process: Process, stops: Stops) -> None:
        self.process, self.stops = process, stops
        self._store = process.meeting.connect()
        self._looked = 0.0

    def add(self, images: int) -> None:
        """So many more are done. Raises as `heed`."""
        self._store.add("encode/images", images)
        self.heed()

    def images(self) -> int:
        """Done by all ranks, since this start."""
        return self._store.add("encode/images", 0)

    def heed(self) -> None:
        """Raises Stopped when this or another rank was asked to stop, Lost when another rank failed."""
        why = self.stops.reason
        if why is not None:
            self._store.set("encode/stop", why)
            raise Stopped(why)
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        for key, error in (("encode/silent", Silent), ("encode/failed", Lost), ("encode/stop", Stopped)):
            if self._store.check([key]):
                raise error(self._store.get(key).decode())

    def fail(self, error: Exception) -> None:
        """Have the other ranks raise Lost soon, for what happened here; of what came from there, they know."""
        if not isinstance(error, Lost):
            with contextlib.suppress(dist.DistError):
                self._store.set("encode/failed", f"process {self.process.rank} failed: {error}")

    def wait_for_all(self, show: Callable[[], object]) -> None:
        """Until every rank is here. A collective would give up on ranks that have hours more to do.

        Raises as `heed`, and Silent when nothing happens for an hour.
        """
        self._store.add("encode/through", 1)
        before, changed = -1, time.monotonic()
        while self._store.add("encode/through", 0) < self.process.world_size:
            self.heed()
            show()
            images = self.images()
            if images != before:
                before, changed = images, time.monotonic()
            elif time.monotonic() - changed > SILENCE_S:
                why = f"no image for {SILENCE_S:.0f} seconds, and not every process is through"
                self._store.set("encode/silent", why)
                raise Silent(why)
            time.sleep(LOOK_S / 5)


def encode(
    process: Process,
    sources: Sequence[str | Path],
    out: Path,
    config: EncodeConfig,
    frozen: Frozen,
    stops: Stops,
    show: Callable[[int, int, int], object],
    threads: int = 4,
    patience_s: float = 600.0,
) -> Report:
    """Make the data set `out`, or go on making it. Collective; the report is the same on every rank.

    `stops`: is begun when there is something to keep. `show(done, total, before)`: called on rank 0 now and then with
    the samples that are done on all ranks, those there are, and those that were done when it started. `patience_s`: for
    another encoding in the folder to end. Raises ValueError for a user's mistake, the same on every rank, and Stopped;
    when a rank or the disk fails, Lost, but on that rank what it failed of.
    """
    folder = EncodingFolder(out)
    files: list[SourceFile] = of_main(lambda: find(sources))
    readers = Readers(config.columns, bytes_limit(config.max_pixels))
    settings = of_main(lambda: _settings(files, readers, config, frozen, process.device.type))
    on_main(lambda: folder.begun(settings))  # refused before anything is written
    with contextlib.closing(_Lock(out, patience_s)):
        contents = on_main(lambda: folder.begun(settings))
        if contents is None:
            contents = index(process, files, readers, config.unit)
            begun = contents
            if not any(content.samples for content in contents):
                raise ValueError(f"no samples in {', '.join(map(str, sources))}")
            on_main(lambda: folder.begin(settings, begun))
        todo = units(files, contents, config.unit)
        if not on_main(lambda: folder.finished):
            _encode_all(process, folder, todo, readers, config, frozen, stops, show, threads)
            told, empty = _manifest(config, frozen), _empty(frozen, config)
            on_main(lambda: folder.finish(todo, told, empty))
        if process.is_main:
            with contextlib.suppress(OSError):
                (out / "lock").unlink()
        return on_main(lambda: folder.report(todo))


def _encode_all(
    process: Process,
    folder: EncodingFolder,
    todo: Sequence[Unit],
    readers: Readers,
    config: EncodeConfig,
    frozen: Frozen,
    stops: Stops,
    show: Callable[[int, int, int], object],
    threads: int,
) -> None:
    """Encode the units that are left, this rank's share of them, and wait for the others."""
    done: set[int] = on_main(lambda: folder.clear(todo))
    remaining = [unit for unit in todo if unit.number not in done]
    total = sum(unit.count for unit in todo)
    before = total - sum(unit.count for unit in remaining)
    tally = Tally(process, stops)
    dist.barrier()  # whoever counts from here on counts in the same store

    def look() -> None:
        if process.is_main:
            show(before + tally.images(), total, before)

    def tick(images: int) -> None:
        tally.add(images)
        look()

    look()
    stops.begin()
    why: str | None = None
    fault: Exception | None = None
    try:
        with UnitEncoder(frozen, config, process.device, threads) as encoder:
            for unit in remaining[process.rank :: process.world_size]:
                tally.heed()
                folder.commit(unit, encoder.encode(readers.read(unit), tick))
        tally.wait_for_all(look)
    except Stopped as stopped:
        why = str(stopped)
    except Silent:
        raise
    except Exception as error:
        tally.fail(error)
        fault = error
    _leave_together(why, fault)
    look()


def _leave_together(why: str | None, fault: Exception | None) -> None:
    """All leave, or none: one may have heard of a request when another was through, and rank 0 may serve the store.

    why: of a request to stop. Collective. Raises the rank's own fault, Lost for another's, Stopped for any request.
    """
    is_own = fault is not None and not isinstance(fault, Lost)  # not what was heard of another
    told = gathered((why, str(fault) if is_own else None))
    if isinstance(fault, ValueError):  # of this rank alone
        raise Lost(str(fault)) from fault
    if fault is not None:
        raise fault
    for rank, (_, failed) in enumerate(told):
        if failed is not None:
            raise Lost(f"process {rank} failed: {failed}")
    first = next((each for each, _ in told if each is not None), None)
    if first is not None:
        raise Stopped(first)


def index(process: Process, files: Sequence[SourceFile], readers: Readers, unit: int) -> list[Contents]:
    """What is in each file, each looked at by one rank. Collective. Raises ValueError."""
    if process.is_main:
        logger.info("looking through %d files", len(files))
    own: dict[int, Contents] = {}
    with together():
        for number in range(process.rank, len(files), process.world_size):
            own[number] = readers.index(files[number], unit)
    found = {number: content for part in gathered(own) for number, content in part.items()}
    return [found[number] for number in range(len(files))]


def on_main(make: Callable[[], Made]) -> Made:
    """What `make` gives on rank 0, on every rank. Collective.

    Raises what it raises there, the same on every rank: ValueError, also for a path that cannot be written, and Lost
    for a disk that fails or is full.
    """

    def attempt() -> tuple[Any, str | None]:
        try:
            return make(), None
        except OSError as error:
            fault = f"{error.filename or 'the disk'}: {error.strerror or error}"
            if error.errno in OF_THE_FILE | {errno.EEXIST, errno.EROFS}:
                raise ValueError(f"{fault}; choose another folder, or give this one the permissions") from error
            return None, fault

    made, fault = of_main(attempt)
    if fault is not None:
        raise Lost(fault)
    return made


class _Lock:
    """Rank 0 alone works in the folder, as far as its ranks do. Collective."""

    def __init__(self, out: Path, patience_s: float) -> None:
        self._file: IO[str] | None = None

        def take() -> None:
            out.mkdir(parents=True, exist_ok=True)
            self._file = hold(out / "lock", patience_s)

        on_main(take)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _settings(
    files: Sequence[SourceFile], readers: Readers, config: EncodeConfig, frozen: Frozen, device: str
) -> dict[str, Any]:
    """All that the data set's bytes depend on, as JSON. device: its kind, such as "cuda"."""
    simple = {name: value for name, value in asdict(config).items() if name not in ("rule", "dtype", "computed")}
    return {
        **simple,
        "dtype": name_of(config.dtype),
        "computed in": name_of(config.computed),
        "device": device,
        "buckets": asdict(config.rule),
        "autoencoder": frozen.autoencoder.identity or "pixels",
        "text": [encoder.identity for encoder in frozen.text],
        "source": {file.name: f"{file.kind}, {readers.mark(file)}" for file in files},
    }


def name_of(dtype: Any) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _manifest(config: EncodeConfig, frozen: Frozen) -> Manifest:
    return Manifest(
        dtype=name_of(config.dtype),
        autoencoder=frozen.autoencoder.identity or None,
        latents=config.latents,
        text_kind=frozen.text_kind,
        text=tuple(encoder.identity for encoder in frozen.text),
        buckets=(),
        resolutions=asdict(config.rule),
    )


def _empty(frozen: Frozen, config: EncodeConfig) -> Caption | None:
    return frozen.captions([""], [1.0], config.dtype)[0] if frozen.text else None
