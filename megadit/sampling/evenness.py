"""How evenly experts pick the patches of a picture: numbers for each layer."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Evenness:
    """How evenly experts pick patches; 0 and 1 are the ends of what is possible unless said otherwise.

    mean, most: experts of a patch, 0 to the number of experts. cv: coefficient of variation over patches, standard
    deviation over mean, from 0. gini: 0 where all patches have as many, near 1 where one has all. unpicked:
    fraction of patches that no expert picked. entropy: of the picks' distribution over patches, over the logarithm of
    their number; 1 where all have as many.
    """

    mean: float
    most: float
    cv: float
    gini: float
    unpicked: float
    entropy: float


def evenness(takers_T: np.ndarray) -> Evenness:
    """Of one map.

    >>> evenness(np.array([0, 0, 4, 4]))
    Evenness(mean=2.0, most=4.0, cv=1.0, gini=0.5, unpicked=0.5, entropy=0.5)
    >>> evenness(np.array([3, 3, 3, 3]))
    Evenness(mean=3.0, most=3.0, cv=0.0, gini=0.0, unpicked=0.0, entropy=1.0)
    >>> evenness(np.array([0, 0]))
    Evenness(mean=0.0, most=0.0, cv=0.0, gini=0.0, unpicked=1.0, entropy=1.0)
    """
    values, count = np.sort(takers_T.astype(np.float64)), len(takers_T)
    mean, total = float(values.mean()), float(values.sum())
    share = values[values > 0] / max(total, 1.0)
    ranks = 2 * np.arange(1, count + 1) - count - 1
    return Evenness(
        mean=mean,
        most=float(values[-1]),
        cv=float(values.std()) / mean if total else 0.0,
        gini=float((ranks * values).sum()) / (count * total) if total else 0.0,
        unpicked=float((values == 0).mean()),
        entropy=float(-(share * np.log(share)).sum() / np.log(count)) if total and count > 1 else 1.0,
    )


@dataclass(frozen=True)
class Row:
    """A layer's means over the steps (most: the most of them), and by how much the branches differ.

    differs: mean over patches and steps of the difference between the experts of a patch with and without the prompt;
    None where nothing was drawn without one.
    """

    layer: int
    evenness: Evenness
    differs: float | None

    @property
    def columns(self) -> dict[str, float | int | None]:
        return {"layer": self.layer, **asdict(self.evenness), "differs": self.differs}


def table(maps_SLT: np.ndarray, layers: Sequence[int], difference_SLT: np.ndarray | None = None) -> list[Row]:
    """A row for each layer, the most uneven (by cv) first. Steps that have no map (NaN) count nowhere."""
    rows = []
    for i, layer in enumerate(layers):
        each = [evenness(takers_T) for takers_T in maps_SLT[:, i] if not np.isnan(takers_T).any()]
        means = {field.name: float(np.mean([getattr(one, field.name) for one in each])) for field in fields(Evenness)}
        means["most"] = max(one.most for one in each)
        differs = None if difference_SLT is None else float(np.nanmean(np.abs(difference_SLT[:, i])))
        rows.append(Row(layer, Evenness(**means), differs))
    return sorted(rows, key=lambda row: (-row.evenness.cv, row.layer))


def printed(rows: Sequence[Row]) -> str:
    """The table for people, the most uneven layer first."""
    lines = ["layer   mean  most     cv   gini  unpicked  entropy  differs"]
    for row in rows:
        one, differs = row.evenness, "-" if row.differs is None else f"{row.differs:.3f}"
        lines.append(
            f"{row.layer:5d} {one.mean:6.2f} {one.most:5.0f} {one.cv:6.3f} {one.gini:6.3f} {one.unpicked:9.1%} "
            f"{one.entropy:8.3f} {differs:>8}"
        )
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """The table for spreadsheets, every digit."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0].columns))
        writer.writeheader()
        writer.writerows(row.columns for row in rows)


def write_json(
    rows: Sequence[Row],
    maps_SLT: np.ndarray,
    layers: Sequence[int],
    times: Sequence[float],
    about: Mapping[str, Any],
    path: Path,
) -> None:
    """`about`, the table, and for each layer and step the time, the same numbers and the experts of each patch."""
    steps = {
        str(layer): [
            None if np.isnan(one).any() else {"time": time, **asdict(evenness(one)), "takers": one.astype(int).tolist()}
            for time, one in zip(times, maps_SLT[:, i], strict=True)
        ]
        for i, layer in enumerate(layers)
    }
    content = {**about, "layers": [row.columns for row in rows], "steps": steps}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
