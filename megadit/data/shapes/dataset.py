"""Scenes as a data set: the training split has no end, each sample being a function of its index."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megadit.data.config import Shape, Task
from megadit.data.shapes.captions import TEMPLATES, caption_of
from megadit.data.shapes.drawing import draw
from megadit.data.shapes.scene import SHAPES, TASKS, Scene, Split, requests_with, scene

HELDOUT = 600  # scenes of the held-out split
SMALLEST = 32  # side in pixels: below it shapes cannot be told apart


class Shapes:
    """One split, "train" or "heldout", of some tasks and shapes, in squares of `size` pixels."""

    def __init__(self, split: Split, size: int, tasks: Sequence[Task] = (), shapes: Sequence[Shape] = ()) -> None:
        """No tasks are all six, and so are no shapes. Raises ValueError for pictures that are too small, and for too
        few shapes for a task.
        """
        if size < SMALLEST:
            raise ValueError(f"data.resolution={size} is too small for shapes; use {SMALLEST} or more")
        self.size, self.tasks, self.shapes = size, tuple(tasks) or TASKS, tuple(shapes) or SHAPES
        for task in self.tasks:
            if not requests_with("train", task, self.shapes):
                raise ValueError(
                    f"data.shapes={list(self.shapes)} are too few for data.tasks={task}; name more of {list(SHAPES)}"
                )
        self.is_endless = split == "train"
        # An image and its caption are asked for one after the other.
        self.scene = lru_cache(4096)(lambda index: scene(split, index, self.tasks, self.shapes))

    def __len__(self) -> int:
        """Of the held-out split; samples of the training split are told apart by any index."""
        assert not self.is_endless
        return HELDOUT

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, size, size)."""
        return 3, self.size, self.size

    def images(self, ids_B: Tensor) -> Tensor:
        """float32 [B, 3, size, size] in [-1, 1]."""
        pictures = np.stack([draw(self.scene(index).things, self.size) for index in ids_B.tolist()])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1

    def caption(self, index: int, generator: torch.Generator) -> str:
        """The scene's request, in words that `generator` chooses."""
        template = int(torch.randint(len(TEMPLATES), (), generator=generator))
        sample: Scene = self.scene(index)
        return caption_of(sample.request, template)

    def corpus(self) -> list[str]:
        """Every caption that training shows."""
        requests = [request for task in self.tasks for request in requests_with("train", task, self.shapes)]
        return [caption_of(request, template) for request in requests for template in range(len(TEMPLATES))]

    def prompts(self, count: int) -> list[str]:
        """Captions of the first scenes: tasks in turn."""
        return [caption_of(self.scene(index).request, index) for index in range(count)]
