"""Where a pretrained encoder's files lie: in a local folder, or in the cache of the Hugging Face Hub under a name.

Nothing is unpickled: weights are safetensors or they are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
EXTRA = "pip install -e '.[encoders]'"


@dataclass(frozen=True)
class Source:
    """What a user names: a folder, or a model on the Hub, of which `revision` is a branch, tag or commit.

    online: whether what the cache lacks may be downloaded.
    """

    name: str
    revision: str = ""
    online: bool = False

    def fetch(self, patterns: Sequence[str]) -> Path:
        """The folder that holds those of the model's files that match `patterns`, or fewer when it is incomplete.

        Raises ValueError that says how to get the model when it is not here.
        """
        folder = Path(self.name).expanduser()
        if self.name and folder.is_dir():
            if self.revision:
                raise ValueError(f"{self.name} is a folder, which has no revision {self.revision!r}; name none")
            return folder
        if not HUB_NAME.fullmatch(self.name):
            raise ValueError(f"there is no folder {self.name!r}, and a model on the Hub is named owner/model")
        return self._download(patterns)

    def commit(self, folder: Path) -> str:
        """The commit that the Hub's copy at `folder` is of; "" for a folder of the user's."""
        ours = folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name)
        return folder.name if ours and not Path(self.name).expanduser().is_dir() else ""

    def _download(self, patterns: Sequence[str]) -> Path:
        try:
            import httpx
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import IncompleteSnapshotError
        except ImportError as error:
            raise missing_package(error) from error
        revision = self.revision or None
        try:
            found = snapshot_download(
                self.name, revision=revision, local_files_only=not self.online, allow_patterns=list(patterns)
            )
        except IncompleteSnapshotError as error:  # whoever reads the folder names the file that it lacks
            found = error.snapshot_path
        except (OSError, ValueError, httpx.HTTPError) as error:
            raise ValueError(self._absent(error)) from error
        return Path(found)

    def _absent(self, error: Exception) -> str:
        at = f" at revision {self.revision!r}" if self.revision else ""
        if self.online:
            return f"{self.name}{at} cannot be downloaded: {type(error).__name__}: {error}"
        option = f" --revision {self.revision}" if self.revision else ""
        return (
            f"{self.name}{at} is neither a folder nor in the Hub's cache on this machine; run `hf download "
            f"{self.name}{option}` where there is a network (HF_HOME says where the cache is), or name a folder"
        )


def missing_package(error: ImportError) -> ValueError:
    """What to install when an encoder's library is not."""
    return ValueError(f"frozen encoders need diffusers and transformers: {error}; install them with {EXTRA}")


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError naming the file unless it holds a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def weight_patterns(folder: str, stem: str) -> list[str]:
    """The files to download from `folder` of a model: one file or numbered ones, no copies in other precisions."""
    begin = f"{folder}/{stem}" if folder else stem
    return [f"{begin}.safetensors", f"{begin}.safetensors.index.json", f"{begin}-*-of-*.safetensors"]


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that a model's weights are in. Raises ValueError naming the folder or the file that lacks."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        also = f"; {pickled[0]} is a pickle, which is not read: name a model in safetensors" if pickled else ""
        raise ValueError(f"{folder} has no {whole.name}{also}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} lists no files of weights")
    paths = [folder / name for name in sorted(set(names.values()))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing: {index.name} lists it; copy or download the model again")
    return paths


def fingerprint(paths: Iterable[Path]) -> str:
    """16 hexadecimal digits of the sha256 over the names and the contents of files, in the order of their names.

    It costs a read of every byte: seconds for the 10 GB of T5-XXL's encoder.
    """
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
