"""DPG-Bench (Hu et al., arXiv 2403.05135): a folder of prompts, name.txt, to a folder of 2 x 2 grids, name.png."""

from __future__ import annotations

from pathlib import Path

from megadit.evaluation.results import read_text

SAMPLES = 4  # pictures of a prompt, row by row in its grid
COLUMNS = 2


def read_prompts(folder: Path) -> dict[str, str]:
    """The prompt of each name, by name. Raises ValueError naming the folder or file that cannot be used."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".txt")
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror or error}") from error
    if not paths:
        raise ValueError(f"{folder}: no prompts; DPG-Bench's are files name.txt")
    prompts = {path.stem: " ".join(read_text(path).split()) for path in paths}
    empty = [name for name, prompt in prompts.items() if not prompt]
    if empty:
        raise ValueError(f"{folder / empty[0]}.txt: no prompt in it")
    return prompts


def grid_path(root: Path, name: str) -> Path:
    """Where a prompt's grid is.

    >>> str(grid_path(Path("out"), "partiprompts7"))
    'out/partiprompts7.png'
    """
    return root / f"{name}.png"
