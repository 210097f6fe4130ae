"""A run as its folder tells it: configuration, curves, events. Nothing but the folder itself has to be whole.

A run may still be going on, may have been killed in the middle of a line, or be older than events.jsonl. Files are read
line by line into arrays: 800,000 steps are read in seconds, and need memory for their numbers alone.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megadit.history.curve import Curve, Loads
from megadit.training.events import EVENTS_FILE

# As megadit.training names them; its modules import torch, for which nobody who looks at curves should wait.
METRICS_FILE, CONFIG_FILE = "metrics.jsonl", "config.yaml"
SCALARS = (
    *("loss", "heldout_loss", "grad_norm", "lr"),
    *("seconds", "images_per_second", "tflops_per_gpu", "peak_memory_gb"),
)
ROUTING = ("entropy", "unpicked", "busiest", "picks")  # of each mixture-of-experts layer
FARTHEST = 2**53  # steps and times beyond this are no numbers to count with


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl. time: seconds since 1970, None where the line has none."""

    time: float | None
    kind: str
    step: int
    reason: str
    more: Mapping[str, object]

    @property
    def failed(self) -> bool:
        """A save that was not written."""
        return self.kind == "save" and not self.more.get("saved", True)


@dataclass
class Story:
    """What is known of a run. `changed`: when its files were last written to, in seconds since 1970."""

    folder: Path
    changed: float = 0.0
    config: Mapping[str, Any] = field(default_factory=dict)
    last_step: int = 0
    curves: dict[str, Curve] = field(default_factory=dict)
    routing: dict[str, dict[str, Curve]] = field(default_factory=dict)  # statistic -> layer -> its curve
    loads: dict[str, Loads] = field(default_factory=dict)  # layer -> what each expert took
    events: list[Event] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)  # steps that were left out
    notes: list[str] = field(default_factory=list)  # what could not be read

    @property
    def name(self) -> str:
        """What the configuration calls the run, else its folder's name."""
        return str(self.setting("run", "name") or self.folder.resolve().name)

    @property
    def planned(self) -> int | None:
        """How many steps the run is to make, where its configuration tells."""
        steps = self.setting("run", "steps")
        return steps if isinstance(steps, int) and not isinstance(steps, bool) and 0 < steps < FARTHEST else None

    def setting(self, section: str, key: str) -> object:
        """A value of the configuration, or None."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, Mapping) else None

    def curve(self, name: str) -> Curve:
        """A curve of the metrics; without points where there is none."""
        return self.curves.get(name, Curve.of([], []))


def read_story(folder: Path) -> Story:
    """The story of the run in a folder.

    Raises ValueError when that is no run's folder, and OSError when a file of it cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    files = [path for name in (METRICS_FILE, EVENTS_FILE, CONFIG_FILE) if (path := folder / name).exists()]
    if not files:
        raise ValueError(f"{folder} is no run: it has neither {METRICS_FILE}, {EVENTS_FILE} nor {CONFIG_FILE}")
    story = Story(folder, changed=max(path.stat().st_mtime for path in files))
    _read_config(story)
    _read_metrics(story)
    _read_events(story)
    return story


def _read_config(story: Story) -> None:
    path = story.folder / CONFIG_FILE
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it has no sections")
    except FileNotFoundError:
        story.notes.append(f"There is no {CONFIG_FILE}.")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        story.notes.append(f"{CONFIG_FILE} cannot be read: {reason}.")
    else:
        story.config = found


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a file. A last one that a kill cut, or that is being written, is left out; others are counted."""
    faults = 0
    with path.open("rb") as file:
        for content in file:
            try:
                line = json.loads(content)
                if not isinstance(line, dict):
                    raise ValueError("a line is an object")
            except (ValueError, RecursionError):
                faults += content.endswith(b"\n")
                continue
            yield line
    if faults:
        notes.append(f"{faults:,} lines of {path.name} cannot be read and are left out.")


def _number(value: object) -> float:
    """A number as JSON gives it; NaN for what is none.

    >>> _number(3), _number("3"), _number(10**400)
    (3.0, nan, inf)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _step(value: object) -> int | None:
    """A step's number; None for what is none."""
    return value if type(value) is int and 0 <= value < FARTHEST else None


class _Columns:
    """Values of lines by what they are, each with the step of its line."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.found: dict[tuple[str, ...], tuple[array[int], array[float]]] = {}

    def add(self, key: tuple[str, ...], value: object) -> None:
        """A value of the line whose step came last."""
        if key not in self.found:
            self.found[key] = array("I"), array("d")
        places, values = self.found[key]
        places.append(len(self.steps) - 1)
        values.append(value if type(value) is float else _number(value))

    def curve(self, key: tuple[str, ...]) -> Curve:
        places, values = self.found[key]
        steps = np.frombuffer(self.steps, np.int64)
        return Curve.of(steps[np.frombuffer(places, np.uint32)], np.frombuffer(values, np.float64))


def _read_metrics(story: Story) -> None:
    path = story.folder / METRICS_FILE
    columns, strange = _Columns(), 0
    for line in _lines(path, story.notes) if path.exists() else ():
        step = _step(line.get("step"))
        if step is None:
            strange += 1
            continue
        columns.steps.append(step)
        for name in SCALARS:
            if name in line:
                columns.add((name,), line[name])
        if line.get("skipped") is True:
            story.skipped.add(step)
        routing = line.get("routing")
        if isinstance(routing, dict):
            _read_routing(story, columns, step, routing)
    if strange:
        story.notes.append(f"{strange:,} lines of {METRICS_FILE} have no step and are left out.")
    if not columns.steps:
        story.notes.append(f"{METRICS_FILE} tells of no step." if path.exists() else f"There is no {METRICS_FILE}.")
        return
    story.last_step = columns.steps[-1]
    for key in columns.found:
        if len(key) == 1:
            story.curves[key[0]] = columns.curve(key)
    for name in ROUTING:
        layers = sorted((key[1] for key in columns.found if len(key) == 2 and key[0] == name), key=_in_order)
        if layers:
            story.routing[name] = {layer: columns.curve((name, layer)) for layer in layers}
    story.loads = dict(sorted(story.loads.items(), key=lambda item: _in_order(item[0])))


def _read_routing(story: Story, columns: _Columns, step: int, routing: Mapping[str, object]) -> None:
    for layer, stats in routing.items():
        if not isinstance(stats, dict):
            continue
        for name in ROUTING:
            if name in stats:
                columns.add((name, layer), stats[name])
        load = stats.get("load")
        if isinstance(load, list) and load:
            story.loads.setdefault(layer, Loads(len(load))).add(step, [_number(value) for value in load])


def _in_order(layer: str) -> tuple[bool, int, str]:
    """Layers by number, and what is none behind them."""
    is_number = layer.isascii() and layer.isdigit() and len(layer) < 10
    return not is_number, int(layer) if is_number else 0, layer


def _read_events(story: Story) -> None:
    path = story.folder / EVENTS_FILE
    if not path.exists():
        story.notes.append(f"There is no {EVENTS_FILE}: starts, stops and saves are not known.")
        return
    for line in _lines(path, story.notes):
        more = {key: value for key, value in line.items() if key not in ("time", "event", "step", "reason")}
        time = _number(line.get("time"))
        story.events.append(
            Event(
                time=time if 0 <= time < 2**37 else None,  # beyond, calendars end
                kind=str(line.get("event", "?")),
                step=_step(line.get("step")) or 0,
                reason=str(line.get("reason", "")),
                more=more,
            )
        )
    story.skipped |= {event.step for event in story.events if event.kind == "skip"}
