"""GenEval (Ghosh et al., arXiv 2310.11513): its prompt file, its folders, and what its scorer found.

Its README describes the folder: <dir>/00000/metadata.jsonl is the prompt file's line of that number, and
<dir>/00000/samples/0000.png and so on are its pictures; a grid.png beside them is for people.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megadit.evaluation.results import lines_of, read_text

# The scorer's name of each task, and how many of the published 553 prompts are of it.
TASKS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
SAMPLES = 4  # pictures of a prompt, as published
METADATA_FILE = "metadata.jsonl"
SAMPLES_FOLDER = "samples"
GRID_FILE = "grid.png"


class Prompt(NamedTuple):
    """A line of the prompt file, as it is and as it is meant."""

    line: str
    metadata: Mapping[str, Any]

    @property
    def text(self) -> str:
        """What to draw."""
        return str(self.metadata["prompt"])


def prompt_folder(root: Path, index: int) -> Path:
    """Where a prompt's pictures are.

    >>> str(prompt_folder(Path("out"), 7))
    'out/00007'
    """
    return root / f"{index:05d}"


def sample_path(root: Path, index: int, sample: int) -> Path:
    """A picture of a prompt.

    >>> str(sample_path(Path("out"), 7, 2))
    'out/00007/samples/0002.png'
    """
    return prompt_folder(root, index) / SAMPLES_FOLDER / f"{sample:04d}.png"


def read_prompts(path: Path) -> list[Prompt]:
    """The lines of evaluation_metadata.jsonl. Raises ValueError naming the file, the line and what it lacks."""
    prompts = []
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            prompts.append(Prompt(line.strip(), parse_metadata(line, f"{path}: line {number}")))
    if not prompts:
        raise ValueError(f"{path}: no prompts; GenEval's file has a JSON object in each line")
    return prompts


def read_metadata(folder: Path) -> Prompt:
    """What a prompt's folder says that it is of. Raises ValueError naming a file that cannot be read."""
    path = folder / METADATA_FILE
    line = read_text(path).strip()
    return Prompt(line, parse_metadata(line, str(path)))


def parse_metadata(line: str, source: str) -> dict[str, Any]:
    """One prompt's metadata: tag, include, prompt, and exclude where it counts.

    Raises ValueError, beginning with `source`, for what GenEval's scorer would stumble over.
    """
    try:
        metadata = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{source}: not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{source}: not a JSON object")
    for key in ("tag", "prompt"):
        if not isinstance(metadata.get(key), str) or not metadata[key].strip():
            raise ValueError(f"{source}: {key!r} must be a text that is not empty")
    if "include" not in metadata:
        raise ValueError(f"{source}: 'include' is missing: the objects that a picture must show")
    for key in ("include", "exclude"):
        wanted = metadata.get(key, [])
        if not isinstance(wanted, list) or not all(_is_object(one) for one in wanted):
            raise ValueError(f"{source}: {key!r} must be a list of objects with a 'class' and a 'count'")
    return metadata


def _is_object(one: object) -> bool:
    return isinstance(one, dict) and isinstance(one.get("class"), str) and isinstance(one.get("count"), int)


class Scores(NamedTuple):
    """What GenEval's scorer found: per task (correct, pictures), in the order of the file."""

    tasks: dict[str, tuple[int, int]]

    @property
    def overall(self) -> float | None:
        """The unweighted mean of the six tasks; None unless exactly those are there."""
        if self.tasks.keys() != TASKS.keys():
            return None
        return sum(correct / count for correct, count in self.tasks.values()) / len(TASKS)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        tasks = {
            tag: {"score": correct / count, "correct": correct, "images": count}
            for tag, (correct, count) in self.tasks.items()
        }
        return {"tasks": tasks, "overall": self.overall, "images": sum(count for _, count in self.tasks.values())}

    def lines(self) -> list[str]:
        """For people; the last line is the overall score, or why there is none."""
        told = [
            f"{tag:<14} {correct / count:7.2%}  ({correct} of {count})" for tag, (correct, count) in self.tasks.items()
        ]
        if self.overall is not None:
            return [*told, f"GenEval overall (mean of {len(TASKS)} tasks): {self.overall:.4f}"]
        lacking, others = sorted(TASKS.keys() - self.tasks.keys()), sorted(self.tasks.keys() - TASKS.keys())
        why = [f"{name} {', '.join(tags)}" for name, tags in (("lacks", lacking), ("has also", others)) if tags]
        return [*told, f"no overall score: the file {' and '.join(why)}"]


def read_scores(path: Path) -> Scores:
    """The scorer's results.jsonl: a JSON object for each picture, with its tag and whether it is correct.

    Raises ValueError naming the file, the line and the key at fault.
    """
    found: dict[str, list[bool]] = {}
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        try:
            result = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
        tag, correct = (result.get("tag"), result.get("correct")) if isinstance(result, dict) else (None, None)
        if not isinstance(tag, str) or not isinstance(correct, bool):
            raise ValueError(
                f"{path}: line {number} has no 'tag' with a text and 'correct' with true or false; give the file that "
                "GenEval's evaluate_images.py wrote"
            )
        found.setdefault(tag, []).append(correct)
    if not found:
        raise ValueError(f"{path}: no results")
    return Scores({tag: (sum(correct), len(correct)) for tag, correct in found.items()})


def tally(prompts: Sequence[Prompt]) -> str:
    """How many prompts of each task, in one line, and whether these are as many as were published."""
    counts: dict[str, int] = {}
    for prompt in prompts:
        tag = str(prompt.metadata["tag"])
        counts[tag] = counts.get(tag, 0) + 1
    told = ", ".join(f"{tag} {count}" for tag, count in counts.items())
    published = "" if counts == TASKS else f"; the published file has {sum(TASKS.values())}"
    return f"{len(prompts)} prompts ({told}){published}"
