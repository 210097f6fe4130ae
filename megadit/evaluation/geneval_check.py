"""Whether a folder is what GenEval's scorer expects: written from the description in its README alone.

The scorer leaves out what it does not recognise without a word, and a missing picture only moves the mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from megadit.evaluation.geneval import (
    GRID_FILE,
    METADATA_FILE,
    SAMPLES,
    SAMPLES_FOLDER,
    Prompt,
    parse_metadata,
    prompt_folder,
)
from megadit.evaluation.results import lines_of

_SAMPLE = re.compile(r"\d{4,5}\.png")  # the README has four digits, its script five


def check_folder(root: Path, prompts: Sequence[Prompt] | None = None, samples: int = SAMPLES) -> list[str]:
    """What is wrong with a folder, each fault beginning with the path it is about; nothing if it is as published.

    prompts: those that it was drawn from; without them, each folder's metadata is checked by itself. samples: pictures
    of each prompt. Raises ValueError for a folder that cannot be read at all.
    """
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
    except OSError as error:
        raise ValueError(f"{root}: {error.strerror or error}") from error
    expected = [prompt_folder(root, i) for i in range(len(prompts) if prompts else len(folders))]
    if not expected:
        return [f"{root}: no folders; GenEval's are 00000, 00001, ..."]
    faults = [f"{path}: missing; folders count from 00000 without a gap" for path in expected if path not in folders]
    faults += [f"{path}: an extra folder; {_why_extra(path, expected)}" for path in folders if path not in expected]
    for index, path in enumerate(tqdm(expected, desc="prompts", unit="prompt", dynamic_ncols=True)):
        if path in folders:
            faults += _metadata_faults(path, prompts[index] if prompts else None)
            faults += _sample_faults(path, samples)
    return faults


def _why_extra(path: Path, expected: Sequence[Path]) -> str:
    if not path.name.isdecimal():
        return "the scorer skips names that are not numbers; move it elsewhere"
    if path.name != f"{int(path.name):05d}":
        return "a prompt's folder has five digits"
    return f"the last prompt's is {expected[-1].name}"


def _metadata_faults(folder: Path, prompt: Prompt | None) -> Iterator[str]:
    path = folder / METADATA_FILE
    if not path.is_file():
        yield f"{path}: missing; it holds the prompt file's line of this number"
        return
    try:
        lines = [line for line in lines_of(path) if line.strip()]
        if len(lines) != 1:
            yield f"{path}: {len(lines)} lines; it must hold one JSON object"
            return
        metadata = parse_metadata(lines[0], str(path))
    except ValueError as error:
        yield str(error)
        return
    if prompt is not None and metadata != prompt.metadata:
        yield (
            f"{path}: its prompt is {metadata['prompt']!r} (tag {metadata['tag']}), the prompt file's line has "
            f"{prompt.text!r} (tag {prompt.metadata['tag']}), or they differ in what is asked of the picture"
        )


def _sample_faults(folder: Path, samples: int) -> Iterator[str]:
    inside = folder / SAMPLES_FOLDER
    if not inside.is_dir():
        yield f"{inside}: missing; the pictures belong there"
        return
    names = sorted(path.name for path in inside.iterdir())
    for name in names:
        if not _SAMPLE.fullmatch(name):
            yield f"{inside / name}: not a picture's name, such as 0000.png; remove it"
    pictures = [name for name in names if _SAMPLE.fullmatch(name)]
    numbers = sorted(int(name.removesuffix(".png")) for name in pictures)
    if numbers != list(range(samples)):
        found = ", ".join(pictures) or "none"
        yield f"{inside}: pictures must be numbered 0000.png to {samples - 1:04d}.png, each once; there are: {found}"
    grid = [folder / GRID_FILE] if (folder / GRID_FILE).exists() else []
    for path in [*(inside / name for name in pictures), *grid]:
        yield from _picture_faults(path)


def _picture_faults(path: Path) -> Iterator[str]:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            picture.verify()  # the checksums and the end, which decoding forgives; the picture is of no use afterwards
        with Image.open(path, formats=("PNG",)) as picture:
            picture.load()
            if picture.mode != "RGB":
                yield f"{path}: mode {picture.mode}; the scorer's detector reads RGB"
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's of files that are damaged
        yield f"{path}: not a whole PNG: {error}"
