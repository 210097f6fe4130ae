"""What was measured and how: results as JSON, with the versions of everything that can change a number."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megadit.runtime.disk import replace_file
from megadit.runtime.status import BAD_INPUT

EXTRA = "pip install -e '.[evaluation]'"
# Those that numbers go through; one that is not installed is left out.
PACKAGES = ("megadit", "torch", "torchmetrics", "torch-fidelity", "transformers", "diffusers", "pillow", "numpy")


def versions() -> dict[str, str]:
    """The installed version of each package that a result may depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check_judges() -> None:
    """Raises ValueError where what judges pictures is not installed: before they are drawn, not after."""
    try:
        import torchmetrics  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"judging pictures needs more packages: {error}; install them with {EXTRA}") from error


def beside(folder: Path, ending: str) -> Path:
    """The file of a folder's name next to it.

    >>> str(beside(Path("drawn/geneval"), "json"))
    'drawn/geneval.json'
    """
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.with_name(f"{named.name}.{ending}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file, its folder made where there is none. Raises ValueError naming one that cannot be written, also
    because a number in it is not finite, which JSON does not know.
    """
    try:
        encoded = (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise ValueError(f"{path} is not written: {error}") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, encoded)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error


def read_text(path: Path) -> str:
    """A file as UTF-8. Raises ValueError naming one that cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error


def show(tool: str, path: Path, summary: Callable[[dict[str, Any]], list[str]]) -> int:
    """Print what `summary` says of a tool's earlier result, or why the file is none; the exit status."""
    try:
        sys.stdout.write("\n".join(summary(json.loads(path.read_text()))) + "\n")
        return 0
    except (KeyError, TypeError) as error:
        why = f"it is no result of this tool ({error!r})"
    except (OSError, ValueError) as error:
        why = str(error)
    sys.stderr.write(f"{tool}: {path}: {why}\n")
    return BAD_INPUT


def lines_of(path: Path) -> list[str]:
    """The lines of a file, cut at line ends alone: JSON may hold other separators, such as U+2028. Raises as
    `read_text`.
    """
    return read_text(path).split("\n")  # \r\n is \n by now
