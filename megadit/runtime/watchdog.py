"""A watchdog over ranks: when one dies, hangs, stops or raises, all end soon, and say which one it was.

Without it the others wait in a collective until its timeout, half an hour later, and then each blames another.

Two threads of each process watch. One talks to the others over a `Board`: it may itself hang, since rank 0 may serve
the store and be the one that stopped. The other never leaves the process, and has the last word: it ends the process
when the first one is stuck. Both end it by os._exit, because the main thread may be inside a collective, in C++.

    a rank raises               it says so itself; the others hear of it within a second
    a collective lost its peer  that rank complains; who does not beat any more is the one that is gone
    a rank stops or vanishes    no heartbeat for `silent` seconds
    a rank hangs                it beats, but nobody made a step for `hang` seconds

Then every rank writes its stacks and its last collectives to <run>/faults/<UTC time>/rank_<n>.txt, and says what it
waits for; the rank that found the fault puts these together, prints one summary and tells the run's events.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType, TracebackType

from megadit.runtime import flight
from megadit.runtime.board import Beat, Board, Verdict, Watched, where
from megadit.runtime.config import WatchdogConfig
from megadit.runtime.launch import Process
from megadit.runtime.status import LOST

BEAT_S = 1.0  # between heartbeats
TICK_S = 0.25  # between looks of the thread that stays at home
COMPLAINT_S = 3.0  # without a heartbeat, once some collective says that a peer vanished
BLAME_S = 6.0  # after a complaint, when every heart beats: then it is the complaint that counts
SETTLE_S = 1.5  # for a rank that still computes to come to the collective that it will wait in
GATHER_S = 3.0  # for the others to say what they wait for
END_S = 8.0  # from a verdict until the process ends, whatever is stuck
MARGIN_S = 3.0  # after its own limit, for rank 0 to have noticed
PEER_LOST = re.compile(r"gloo/transport|NCCL|Connection (closed|reset)|Broken pipe|remote process exited")

Tell = Callable[..., None]  # tell(step, reason, ranks=..., collective=..., ...)


class AwakeClock:
    """Seconds that this process was awake. A job that is suspended and goes on did not hang meanwhile."""

    def __init__(self) -> None:
        self._last, self._seconds = time.monotonic(), 0.0

    def tick(self) -> None:
        """Time passed; of a longer gap than a busy machine makes, a little counts."""
        now = time.monotonic()
        self._seconds += min(now - self._last, 8 * TICK_S)
        self._last = now

    def now(self) -> float:
        return self._seconds


class Watchdog:
    """Watches between `watch` and the end of the `with` block; before that, and with hang=0, it is not there.

    An exception that leaves the block ends this rank and all others with LOST; a world of one lets it pass.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._watching = False
        self._threads: list[threading.Thread] = []
        self._last_words = Verdict("", (), process.rank, "", "")
        self._clock = AwakeClock()
        self._stop, self._wake = threading.Event(), threading.Event()
        self._ending = threading.Lock()  # held from the first thread's decision to end the process
        self._end_by = math.inf  # monotonic
        self._step, self._doing, self._started = 0, "starting", False
        self._progressed = self._talked = 0.0  # on the awake clock
        self._complaint, self._complained = "", 0.0
        self._raised = ""
        self._sight: flight.Sight | None = None  # where an exception left the block
        self._others = Watched()
        self._count = 0
        self._orderly = False  # rank 0 has left, and well: its store may be gone
        self._dumped = False

    def __enter__(self) -> Watchdog:
        return self

    def watch(self, config: WatchdogConfig, folder: Path, tell: Tell) -> None:
        """From here on. `folder`: the run's; `tell(step, reason, **more)` writes an event, on one rank only."""
        if config.hang == 0:
            return
        self._config, self._folder, self._tell = config, folder, tell
        self._first_record = flight.newest_record()
        self._token = uuid.uuid4().hex
        self._watching = True
        for name, target in (("guard", self._guard), ("talk", self._talk)):
            thread = threading.Thread(target=target, name=f"watchdog {name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def progress(self, step: int, doing: str = "training") -> None:
        """`step` is done, and now comes `doing`: what is not "training" is waited for as the start is."""
        self._step, self._doing = step, doing
        self._started = True
        self._progressed = self._clock.now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._watching:
            return
        if error is not None and not isinstance(error, SystemExit):  # Ctrl-C, too
            self._fall(error, trace)
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(END_S)
        self._watching = False

    def _fall(self, error: BaseException, trace: TracebackType | None) -> None:
        """An exception left the block. Returns in a world of one only."""
        frames = [frame for frame, _ in traceback.walk_tb(trace)][::-1]
        message = " ".join(f"{type(error).__name__}: {error}".split())
        self._sight = self._look(frames)
        if self._process.world_size == 1:
            self._voice(f"rank 0 raised {message}", [0], "raised", "")
            return
        if lost_a_peer(error):
            self._complained, self._complaint = self._clock.now(), message
        else:
            traceback.print_exception(error)
            sys.stderr.flush()
            self._raised = message
        self._wake.set()
        for thread in self._threads:  # they end the process
            thread.join(BLAME_S + END_S)
        traceback.print_exception(error)
        os._exit(LOST)

    # --- the thread that stays at home ----------------------------------------------------------------------------

    def _guard(self) -> None:
        while not self._stop.wait(TICK_S):
            self._clock.tick()
            if time.monotonic() > self._end_by:
                self._end_alone(self._last_words)
            elif not self._ending.locked():
                self._look_at_store()

    def _look_at_store(self) -> None:
        """End when the store's server does not answer: there is nobody to ask."""
        now = self._clock.now()
        quiet = now - self._talked
        late = now - self._progressed > self._limit() + MARGIN_S
        patience = BLAME_S if self._complaint or self._raised else MARGIN_S if late else self._config.silent
        if quiet > patience + BEAT_S and not self._orderly and self._ending.acquire(blocking=False):
            self._end_alone(self._server_gone("does not answer"))

    def _server_gone(self, how: str) -> Verdict:
        ranks: tuple[int, ...]
        if self._process.meeting.main_serves:
            ranks, words = (0,), f"{where(0, self._others.beats.get(0))} {how}, nor does the store that it serves"
        else:
            ranks, words = (), f"the launcher's store at {self._process.meeting.address} {how}"
        if self._raised:
            ranks, words = (self._process.rank,), f"rank {self._process.rank} raised {self._raised}"
        return Verdict("gone", ranks, self._process.rank, words, "")

    # --- the thread that talks ------------------------------------------------------------------------------------

    def _talk(self) -> None:
        try:
            board = Board(self._process.meeting.connect(), self._process.rank, self._process.world_size)
            self._token, main = board.meet(self._token, self._own_beat())
            self._others.update({0: main}, self._clock.now())
            while True:
                self._exchange(board)
                if self._stop.is_set():
                    break
                self._wake.wait(BEAT_S)
                self._wake.clear()
            self._leave(board)
        except Exception as error:  # of the store: its server is gone
            if self._stop.is_set() or self._orderly:
                return
            if time.monotonic() < self._end_by < math.inf:
                self._end_alone(self._last_words)
            if self._ending.acquire(blocking=False):
                self._end_alone(self._server_gone(f"is gone ({' '.join(str(error).split())[:80]})"))

    def _exchange(self, board: Board) -> None:
        """One round: say that this rank lives, hear what is to be heard, judge when it is this rank's turn."""
        board.beat(self._own_beat())
        verdict = board.verdict()
        if verdict is None and not self._stop.is_set():
            proposal = self._judge(board)
            if proposal is not None:
                board.propose(proposal)
                verdict = board.verdict()
        self._talked = self._clock.now()
        if verdict is not None and self._ending.acquire(blocking=False):
            self._end_together(board, verdict)

    def _limit(self) -> float:
        patient = not self._started or self._doing != "training"
        return max(self._config.hang, self._config.startup) if patient else self._config.hang

    def _own_beat(self) -> Beat:
        self._count += 1
        now = self._clock.now()
        return Beat(
            self._count,
            socket.gethostname(),
            os.getpid(),
            self._step,
            self._doing,
            now - self._progressed,
            self._limit(),
            self._complaint,
            now - self._complained,
            self._stop.is_set(),
        )

    def _judge(self, board: Board) -> Verdict | None:
        """What this rank finds. Rank 0 looks at everyone; the others at rank 0 and at themselves."""
        rank, now = self._process.rank, self._clock.now()
        if self._raised:
            return self._found("raised", [rank], f"{where(rank, self._own_beat())} raised {self._raised}")
        observes = self._process.is_main
        self._others.update(board.beats(None if observes else [0]), now)
        beats = self._others.beats
        if not observes and 0 in beats:
            self._orderly = beats[0].left
        complaints = {other: beat for other, beat in beats.items() if beat.complaint and not beat.left}
        if self._complaint:
            complaints[rank] = self._own_beat()
        patience = COMPLAINT_S if complaints else self._config.silent
        silent = self._others.silent(now, patience)
        if silent:
            names = ", ".join(where(other, beats[other]) for other in silent)
            return self._found("gone", silent, f"no sign of life from {names}")
        lasting = sorted(other for other, beat in complaints.items() if beat.complained > BLAME_S)
        if lasting:
            first = lasting[0]
            words = f"{where(first, complaints[first])} raised {complaints[first].complaint}"
            return self._found("raised", [first], words)
        margin = 0.0 if observes else MARGIN_S
        late = [other for other, beat in beats.items() if beat.is_late] if observes else []
        if late or now - self._progressed > self._limit() + margin:
            idle = max([now - self._progressed, *(beats[other].idle for other in late)])
            return self._found("hung", [], f"no progress for {idle:.0f} s, after step {self._step}")
        return None

    def _found(self, kind: str, ranks: list[int], words: str) -> Verdict:
        folder = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        return Verdict(kind, tuple(ranks), self._process.rank, words, folder)

    def _leave(self, board: Board) -> None:
        """Say goodbye. The one that serves the store waits a little, so that the others can, too."""
        board.beat(self._own_beat())  # the last one may have been on its way when this rank left
        board.leave()
        deadline = time.monotonic() + END_S / 2
        while self._process.is_main and time.monotonic() < deadline and not board.all_left():
            time.sleep(0.02)

    # --- the end --------------------------------------------------------------------------------------------------

    def _end_together(self, board: Board, verdict: Verdict) -> None:
        """Dump, say what this rank waits for, hear the summary, end the process."""
        self._last_words = verdict
        self._end_by = time.monotonic() + END_S
        mine = self._process.rank == verdict.by
        sight = self._sight or self._settled(verdict)
        self._dump(self._folder / "faults" / verdict.folder, sight, verdict.words)
        board.report(sight.to_json())
        summary = None
        if mine:
            summary = self._summarise(board, verdict)
            board.finish(summary)
        else:
            while summary is None and time.monotonic() < self._end_by - 1:
                time.sleep(0.1)
                summary = board.summary()
        self._say(f"rank {self._process.rank} ends: {summary or verdict.words}{self._own_wait(sight)}", mine)
        if self._process.is_main:
            time.sleep(2.5 * BEAT_S if verdict.kind != "gone" or mine else BEAT_S)  # the others may hear from its store
        os._exit(LOST)

    def _look(self, frames: list[FrameType] | None = None) -> flight.Sight:
        try:
            return flight.look(self._first_record, frames)
        except Exception as error:  # of a recorder that writes in another way: no reason to stay
            return flight.Sight("", "", (), "", -1, {}, f"a place that cannot be told ({error!r})")

    def _settled(self, verdict: Verdict) -> flight.Sight:
        """Where this rank is, once it waits: of a rank that raised it may hear while it still computes."""
        sight, deadline = self._look(), time.monotonic() + SETTLE_S
        while verdict.kind != "hung" and not sight.waiting and time.monotonic() < deadline:
            time.sleep(TICK_S)
            sight = self._sight or self._look()
        return sight

    def _own_wait(self, sight: flight.Sight) -> str:
        return f"; this rank was in {sight.waiting}" if sight.waiting else f"; this rank was at {sight.place}"

    def _summarise(self, board: Board, verdict: Verdict) -> str:
        """Put together what the ranks say; print it, and tell the run's events."""
        deadline = time.monotonic() + GATHER_S
        expected = self._process.world_size - (len(verdict.ranks) if verdict.kind == "gone" else 0)
        while board.reported() < expected and time.monotonic() < deadline:
            time.sleep(0.05)
        sights = {rank: flight.Sight.from_json(plain) for rank, plain in board.reports().items()}
        beats = board.some_beats()
        mute = [rank for rank in range(self._process.world_size) if rank not in sights]
        summary, ranks, collective = summarise(verdict, sights, beats, mute)
        self._voice(summary, ranks, verdict.kind, collective, folder=verdict.folder)
        return summary

    def _end_alone(self, verdict: Verdict) -> None:
        """The end without a word from the others: the store is stuck or gone."""
        sight = self._sight or self._look()
        name, first = claim(self._folder / "faults", self._token, verdict.folder or self._found("", [], "").folder)
        self._dump(self._folder / "faults" / name, sight, verdict.words)
        summary = verdict.words + (f"; the others wait in {sight.waiting}" if sight.waiting else "")
        if first:
            self._voice(summary, list(verdict.ranks), verdict.kind, sight.waiting, folder=name, claimed=True)
        self._say(f"rank {self._process.rank} ends: {verdict.words}{self._own_wait(sight)}", first)
        os._exit(LOST)

    def _voice(
        self, summary: str, ranks: list[int], kind: str, collective: str, folder: str = "", claimed: bool = False
    ) -> None:
        """The one summary of all ranks."""
        folder = folder or self._found("", [], "").folder
        if not claimed and not claim(self._folder / "faults", self._token, folder)[1]:
            return
        self._say(f"lost: {summary}", False)
        with contextlib.suppress(Exception):  # a full disk must not keep the process
            dumps = f"faults/{folder}"
            self._tell(self._step, summary, ranks=ranks, kind=kind, collective=collective, dumps=dumps)
            (self._folder / dumps).mkdir(parents=True, exist_ok=True)
            (self._folder / dumps / "summary.txt").write_text(summary + "\n")

    def _say(self, text: str, silent: bool) -> None:
        """A line on stderr by its number: the stream's lock may be the main thread's."""
        if not silent:
            with contextlib.suppress(OSError):
                os.write(2, f"megadit: {text}\n".encode())

    def _dump(self, folder: Path, sight: flight.Sight, words: str) -> None:
        """What this rank was doing, in a file of its own."""
        if self._dumped:
            return
        self._dumped = True
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank_{self._process.rank}.txt").open("w") as file:
                head = [
                    f"rank {self._process.rank} of {self._process.world_size}, {socket.gethostname()}, "
                    f"process {os.getpid()}, after step {self._step}, {self._doing}",
                    f"verdict: {words}",
                    f"waits in: {sight.waiting or 'nothing'}",
                    f"at: {sight.place}",
                    "",
                    "Python stacks of all threads, the innermost call first:",
                ]
                file.write("\n".join(head) + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\nThe last collectives, the newest last:\n")
                for each in flight.collectives(self._first_record)[-100:]:
                    file.write(f"  {'waits ' if each.pending else 'done  '} {each.number:6d} {each}\n")


def lost_a_peer(error: BaseException | None) -> bool:
    """Whether an exception, or one that it was raised from, is a collective's that lost its peer.

    >>> try:
    ...     raise ValueError("in stage 0") from RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer")
    ... except ValueError as error:
    ...     lost_a_peer(error), lost_a_peer(ValueError("in stage 0"))
    (True, False)
    """
    while error is not None:
        if PEER_LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def summarise(
    verdict: Verdict, sights: dict[int, flight.Sight], beats: dict[int, Beat], mute: list[int]
) -> tuple[str, list[int], str]:
    """(one sentence or two, the ranks to blame, the collective that the others wait for)."""
    blamed = set(verdict.ranks)
    others = {rank: sight for rank, sight in sights.items() if rank not in blamed}
    suspects, collective = flight.blame(others if blamed else sights, sorted(blamed | set(mute)))
    text = verdict.words
    ranks = sorted(blamed) if verdict.kind != "hung" else suspects
    unheard = [rank for rank in mute if rank not in blamed]
    if verdict.kind == "hung":
        for rank in ranks:
            at = f"it is at {sights[rank].place}" if rank in sights else "it does not answer"
            have = f"has not joined {collective}" if collective else "makes no progress"
            text += f"; {where(rank, beats.get(rank))} {have}, {at}"
        unheard = [rank for rank in unheard if rank not in ranks]
    waiting = sorted(rank for rank, sight in sights.items() if sight.waiting == collective and rank not in ranks)
    if collective and waiting:
        who = f"rank {waiting[0]} waits" if len(waiting) == 1 else f"ranks {flight.ranks_text(waiting)} wait"
        text += f"; {who} in {collective}"
    if unheard:
        text += f"; no word from {', '.join(where(rank, beats.get(rank)) for rank in unheard[:8])}"
    return text, ranks, collective


def claim(folder: Path, token: str, name: str) -> tuple[str, bool]:
    """(the name that the first rank gave, whether this rank is the first). `token` is the same on all ranks.

    By a file, which is there also when the store is not. Where no file can be written every rank is the first.
    """
    path, draft = folder / f".{token}", folder / f".{token}.{socket.gethostname()}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft.write_text(name)
        try:
            os.link(draft, path)
        except FileExistsError:
            return path.read_text(), False
        finally:
            draft.unlink()
    except OSError:
        pass
    return name, True
