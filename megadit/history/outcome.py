"""What became of a run: how it ended or that it goes on, how often it started, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megadit.history.story import Event, Story
from megadit.runtime.status import BAD_INPUT, DIVERGED, FINISHED, LOST, STOPPED, UNSAVED

STARTS = ("start", "resume")
ENDINGS = {
    FINISHED: "Finished",
    DIVERGED: "Diverged",
    BAD_INPUT: "Refused",
    UNSAVED: "Finished, but its last checkpoint was not saved",
    STOPPED: "Stopped",
    LOST: "Lost",
}
SILENCE_S = 600.0  # for how long a run may write nothing and still pass for one that goes on; longer where steps are


@dataclass(frozen=True)
class Verdict:
    """word: how it ended, or that it goes on. is_good: whether nobody has to look after it."""

    word: str
    reason: str
    is_good: bool

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}" if self.reason else self.word


def verdict(story: Story, now: float) -> Verdict:
    """What became of a run, as far as its files tell at `now` (seconds since 1970)."""
    since = [event for event in story.events if event.kind != "save"]
    starts = [place for place, event in enumerate(since) if event.kind in STARTS]
    latest = since[starts[-1] + 1 :] if starts else since
    done = f"at step {_of_planned(story)}"
    for event in reversed(latest):  # the last word of the last start
        if event.kind == "finish":
            return Verdict("Finished", f"step {event.step:,} is done", True)
        if event.kind == "stop":
            return _stopped(event, done)
        if event.kind == "lost":
            return Verdict("Lost", f"{event.reason}, {done}", False)
    if not story.events and story.planned and story.last_step >= story.planned:
        return Verdict("Finished", f"step {story.last_step:,} is done", True)
    loss = story.curve("loss")
    if len(loss) and not loss.is_finite[-1] and story.last_step not in story.skipped:
        return Verdict("Diverges", f"the last loss is {loss.values[-1]}, {done}", False)
    quiet = now - story.changed
    if quiet <= patience(story):
        return Verdict("Running", done, True)
    return Verdict(
        "No end was told",
        f"nothing was written for {duration(quiet)}, {done}: the run was killed, or hangs",
        False,
    )


def _stopped(event: Event, done: str) -> Verdict:
    status = event.more.get("status")
    word = ENDINGS.get(status, "Stopped") if isinstance(status, int) else "Stopped"
    return Verdict(word, f"{event.reason}, {done}" if event.reason else done, status in (FINISHED, STOPPED))


def _of_planned(story: Story) -> str:
    return f"{story.last_step:,} of {story.planned:,}" if story.planned else f"{story.last_step:,}"


def patience(story: Story) -> float:
    """Seconds without a word after which a run does not pass for one that goes on: some steps, and looks at them."""
    every = story.setting("log", "every")
    looks = every if isinstance(every, int) and every > 0 else 1
    seconds = story.curve("seconds").median()
    return max(SILENCE_S, 5 * looks * seconds) if math.isfinite(seconds) else SILENCE_S


@dataclass(frozen=True)
class Restart:
    """A start after the first. lost: seconds of which nothing stayed: work that was done again, waiting, starting."""

    step: int
    lost: float


def restarts(events: Sequence[Event]) -> list[Restart]:
    """Every start but the first with the time that it cost.

    A start from a checkpoint of step R repeats, or waits for, all that came after the moment at which step R was first
    reported done: by its save, or by what was told next. Without any such word, after the last word.
    """
    found: list[Restart] = []
    told: list[tuple[float, int]] = []  # (time, step) since the run last began or went back
    began = False
    for event in events:
        if event.kind in STARTS:
            if began:
                done = next((time for time, step in told if step >= event.step), told[-1][0] if told else math.inf)
                found.append(Restart(event.step, max(0.0, (event.time or 0.0) - done)))
            began, told = True, []
        step = event.step
        if event.kind == "rewind":
            to_step = event.more.get("to_step")
            step, told = to_step if isinstance(to_step, int) else step, []
        if event.time is not None and event.kind != "layout":  # of the next start, as yet without a step of its own
            told.append((event.time, step))
    return found


def num_starts(story: Story) -> int:
    """How often the run was started; at least once, where there are steps but no events."""
    told = sum(event.kind in STARTS for event in story.events)
    return told or int(len(story.curve("loss")) > 0)


def duration(seconds: float) -> str:
    """A stretch of time in its two largest units.

    >>> duration(0.4), duration(75), duration(7265), duration(200_000)
    ('0.4 s', '1 min 15 s', '2 h 1 min', '2 d 7 h')
    """
    if seconds == 0:
        return "0 s"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days:,} d {hours} h"
