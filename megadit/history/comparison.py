"""Several runs side by side: their last figures, and what differs between their configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megadit.history.outcome import duration, num_starts, restarts, verdict
from megadit.history.told import Told, last_of, plain, said
from megadit.page.markup import Markup
from megadit.page.parts import note, section, table

OWN = {"run.name", "run.dir"}  # settings in which runs differ anyway


def figures(runs: Sequence[Told], now: float) -> Markup:
    rows = []
    for run in runs:
        story = run.story
        heldout = story.curve("heldout_loss")
        memory = story.curve("peak_memory_gb").finite
        known = bool(story.events)
        rows.append(
            (
                f"{run.mark} {run.label}",
                verdict(story, now).word,
                f"{story.last_step:,}",
                said(story.curve("loss").recent()),
                last_of(heldout),
                said(heldout.finite.min(initial=math.inf)),
                said(story.curve("grad_norm").recent()),
                said(story.curve("seconds").median()),
                said(story.curve("images_per_second").median()),
                said(story.curve("tflops_per_gpu").median()),
                said(memory.max(initial=-math.inf)),
                f"{num_starts(story):,}",
                duration(sum(restart.lost for restart in restarts(story.events))) if known else "–",
                f"{len(story.skipped):,}",
            )
        )
    header = (
        *("run", "state", "steps", "loss", "held out", "least", "grad. norm"),
        *("s per step", "images/s", "TFLOP/s", "peak GB", "starts", "lost", "left out"),
    )
    told = "Loss and gradient norm: medians of the last 100 steps. Times and rates: medians of all steps."
    return section("figures", "Final figures", note(told), table(header, rows, words=2))


def flat(config: Mapping[str, object]) -> dict[str, str]:
    """A configuration as "section.key" -> value, as text."""
    found: dict[str, str] = {}
    for section_name, values in config.items():
        if isinstance(values, Mapping):
            found |= {f"{section_name}.{key}": plain(value) for key, value in values.items()}
        else:
            found[str(section_name)] = plain(values)
    return found


def differences(runs: Sequence[Told]) -> list[Markup]:
    configs = [flat(run.story.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [
        (key, *(config.get(key, "–") for config in configs))
        for key in keys
        if key not in OWN and len({config.get(key) for config in configs}) > 1
    ]
    header = ("setting", *(f"{run.mark} {run.label}" for run in runs))
    body = table(header, rows, words=len(header)) if rows else note("Nothing but their names.")
    return [section("differences", "What differs between their configurations", body)]
