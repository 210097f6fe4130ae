"""How often a run draws what it is asked for, on scenes of shapes, by task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megadit.data.config import Shape, Task
from megadit.data.shapes.captions import caption_of
from megadit.data.shapes.judge import judge
from megadit.data.shapes.scene import SHAPES, Request, requests_with
from megadit.runtime.seed import stream
from megadit.sampling.picture import to_bytes

Kind = Literal["trained", "heldout"]


class Ask(NamedTuple):
    """A prompt, and the request that it puts in words. kind: whether training shows the combination."""

    kind: Kind
    request: Request
    prompt: str


def asks(tasks: Iterable[Task], trained: int, heldout: int, shapes: Sequence[Shape] = SHAPES) -> list[Ask]:
    """So many prompts of each task, of combinations that training shows and, where there are any, of held-out ones.

    Each takes its task's requests of these shapes in one shuffled order, again and again; captions take turns.
    """
    found = []
    for task in tasks:
        for kind, split, count in (("trained", "train", trained), ("heldout", "heldout", heldout)):
            requests = requests_with(split, task, tuple(shapes))  # type: ignore[arg-type]
            order = torch.randperm(len(requests), generator=stream(0, "asks", task, kind)).tolist()
            for number in range(count if requests else 0):
                request = requests[order[number % len(order)]]
                found.append(Ask(kind, request, caption_of(request, number)))  # type: ignore[arg-type]
    return found


def score(pictures_BCHW: Tensor, asked: Sequence[Ask]) -> dict[str, Any]:
    """What the judge says of pictures in [-1, 1]: right and asked by task and kind, and the commonest faults.

    score: the mean over tasks of the fraction that is right, of combinations that training shows; score_heldout: of
    the others.
    """
    tasks: dict[str, dict[str, dict[str, int]]] = {}
    faults: Counter[str] = Counter()
    for picture_CHW, (kind, request, _) in zip(to_bytes(pictures_BCHW), asked, strict=True):
        verdict = judge(picture_CHW.permute(1, 2, 0).numpy(), request)
        count = tasks.setdefault(request.task, {}).setdefault(kind, {"right": 0, "asked": 0})
        count["right"] += verdict.right
        count["asked"] += 1
        if not verdict.right:
            faults["shows other things" if verdict.why.startswith("shows") else verdict.why] += 1
    return {
        "score": mean_over_tasks(tasks, "trained"),
        "score_heldout": mean_over_tasks(tasks, "heldout"),
        "tasks": tasks,
        "faults": dict(faults.most_common(8)),
    }


def mean_over_tasks(tasks: dict[str, dict[str, dict[str, int]]], kind: Kind) -> float | None:
    """As GenEval's overall score: each task weighs alike. None where no task has the kind.

    >>> mean_over_tasks({"colors": {"trained": {"right": 1, "asked": 2}}, "position": {}}, "trained")
    0.5
    """
    rates = [kinds[kind]["right"] / kinds[kind]["asked"] for kinds in tasks.values() if kind in kinds]
    return sum(rates) / len(rates) if rates else None
