"""Tables of a study in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from megadit.study.interval import Interval
from megadit.study.summary import (
    HELDOUT_LOSS,
    SCORE,
    SCORE_HELDOUT,
    STEP_TIME,
    Measure,
    Variant,
    difference,
    task_rate,
    tasks_of,
    verdict,
)

ROUTING = ("picks", "unpicked", "busiest", "entropy", "load")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def shown(value: Interval | None, measure: Measure) -> str:
    """A mean with half of its interval.

    >>> shown(Interval(0.81234, 0.8, 0.82468), Measure("score, %", lambda record: None, True, 1, 100))
    '81.2 ± 1.2'
    """
    if value is None:
        return "–"
    return f"{value.mean * measure.scale:.{measure.digits}f} ± {value.half * measure.scale:.{measure.digits}f}"


def of_measures(variants: Sequence[Variant], measures: Sequence[Measure]) -> str:
    header = ["", *(measure.name for measure in measures)]
    rows = [[v.label, *(shown(v.interval(measure), measure) for measure in measures)] for v in variants]
    return table(header, rows)


def setup(variants: Sequence[Variant]) -> str:
    """What all trials have in common, in a sentence."""
    records = [record for variant in variants for record in variant.records]
    first, seeds = records[0], [record["seed"] for record in variants[0].records]
    where = dict.fromkeys(_where(record["machine"]) for record in records)  # of different ones, each once
    minutes = sum(r["training_seconds"] / r["machine"]["trials_side_by_side"] for r in records) / 60
    skipped = sum(record["skipped"] for record in records)
    return (
        f"{len(records)} trials: {len(variants)} variants with seeds {', '.join(map(str, seeds))}; {first['steps']:,} "
        f"steps on {first['images']:,} images each; {'; '.join(where)}; {minutes:.0f} minutes of training in all; "
        f"steps left out for numbers that were not finite: {skipped}.\n"
    )


def _where(machine: Mapping[str, Any]) -> str:
    where = ", ".join(machine["gpus"]) or f"{machine['cores']} CPU cores ({machine['cpu']})"
    return f"{where}, {machine['trials_side_by_side']} trials side by side, torch {machine['torch']}"


def sizes(variants: Sequence[Variant]) -> str:
    rows = []
    for variant in variants:
        record = variant.records[0]
        rows.append(
            [
                variant.label,
                f"{record['parameters'] / 1e6:.2f}",
                f"{record['activated_parameters'] / 1e6:.2f}",
                f"{record['forward_flops'] / 1e6:.2f}",
                shown(variant.interval(STEP_TIME), STEP_TIME),
                f"{max(record['peak_memory_gb'] for record in variant.records):.2f}",
            ]
        )
    header = ["", "parameters, M", "activated, M", "MFLOP per image", STEP_TIME.name, "peak memory, GB"]
    return table(header, rows)


def scores(variants: Sequence[Variant]) -> str:
    measures = [Measure(f"{task}, %", task_rate(task, "trained"), True, 1, 100) for task in tasks_of(variants)]
    return of_measures(variants, [HELDOUT_LOSS, SCORE, *measures])


def heldout_scores(variants: Sequence[Variant]) -> str:
    tasks = tasks_of(variants)
    measures = [Measure(f"{task}, %", task_rate(task, "heldout"), True, 1, 100) for task in tasks]
    has_some = [m for m in measures if variants[0].interval(m) is not None]
    return of_measures(variants, [SCORE_HELDOUT, *has_some])


def verdicts(variants: Sequence[Variant]) -> str:
    """Each variant beside the first, in words that follow from the intervals."""
    first, *others = variants
    measures = (SCORE, SCORE_HELDOUT, HELDOUT_LOSS, STEP_TIME)
    rows = [[other.label, *(verdict(other, first, measure) or "–" for measure in measures)] for other in others]
    return table([f"beside {first.label}", *(measure.name.removesuffix(", %") for measure in measures)], rows)


def differences(variants: Sequence[Variant]) -> str:
    """Each variant less the first one of the same seed, which shares its data and noise."""
    first, *others = variants
    measures = (SCORE, SCORE_HELDOUT, HELDOUT_LOSS)
    rows = [[other.label, *(shown(difference(other, first, m), m) for m in measures)] for other in others]
    return table([f"less {first.label}", *(measure.name for measure in measures)], rows)


def overview(variants: Sequence[Variant]) -> str:
    """Loss and score of many variants, and what may be concluded beside the first."""
    first, measures = variants[0], (HELDOUT_LOSS, SCORE)
    header = ["", "MFLOP per image", "parameters, M"]
    for measure in measures:
        header += [measure.name, f"beside {first.label}"]
    rows = []
    for variant in variants:
        record = variant.records[0]
        row = [variant.label, f"{record['forward_flops'] / 1e6:.2f}", f"{record['parameters'] / 1e6:.2f}"]
        for measure in measures:
            said = "" if variant is first else verdict(variant, first, measure)
            row += [shown(variant.interval(measure), measure), said]
        rows.append(row)
    return table(header, rows)


def routing(variants: Sequence[Variant]) -> str:
    """Means over seeds at the end of training, by layer."""
    rows = []
    for variant in variants:
        for layer in variant.records[0]["routing"]:
            stats = [record["routing"][layer] for record in variant.records]
            cells = [f"{fmean(each[key] for each in stats):.3f}" if key in stats[0] else "–" for key in ROUTING]
            rows.append([f"{variant.label}, layer {layer}", *cells])
    names = ("picks per token", "unpicked", "most picks of a token", "entropy", "busiest expert's load")
    return table(["", *names], rows)


def best(variants: Sequence[Variant]) -> str:
    """The best mean score, in a sentence: of each variant that has it, to the digits that are printed."""
    scores = [(v.label, i, round(i.mean * SCORE.scale, SCORE.digits)) for v in variants if (i := v.interval(SCORE))]
    highest = max(mean for *_, mean in scores)
    whose = ", and of ".join(f"{label}: {shown(i, SCORE)} %" for label, i, mean in scores if mean == highest)
    return f"The best mean score is that of {whose}.\n"


TABLES: dict[str, Callable[[list[Variant]], str]] = {
    table.__name__: table  # type: ignore[misc]
    for table in (setup, sizes, scores, heldout_scores, verdicts, differences, overview, routing, best)
}
