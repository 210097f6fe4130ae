"""Pictures with their captions, as folders hold them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megadit.evaluation import geneval
from megadit.evaluation.images import images_in
from megadit.evaluation.results import read_text


class Pair(NamedTuple):
    """A picture's file, and what it should show."""

    picture: Path
    caption: str


def pairs_in(folder: Path) -> list[Pair]:
    """Of a folder: name.png with name.txt beside it; or GenEval's folder, whose metadata has the prompts.

    Raises ValueError naming a picture without a caption.
    """
    if geneval.prompt_folder(folder, 0).is_dir():
        return geneval_pairs(folder)
    pairs = []
    for picture in images_in(folder):
        told = picture.with_suffix(".txt")
        if not told.is_file():
            raise ValueError(f"{picture} has no caption: {told.name} is not beside it")
        pairs.append(Pair(picture, " ".join(read_text(told).split())))
        if not pairs[-1].caption:
            raise ValueError(f"{told}: no caption in it")
    return pairs


def geneval_pairs(folder: Path) -> list[Pair]:
    """The pictures of GenEval's folder, prompt by prompt. Raises ValueError naming what cannot be read."""
    prompts = sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())
    return [
        Pair(picture, geneval.read_metadata(prompt).text)
        for prompt in prompts
        for picture in images_in(prompt / geneval.SAMPLES_FOLDER)
    ]
