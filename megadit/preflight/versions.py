"""Every rank runs the same code over the same libraries, on the same kind of device."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import megadit
from megadit.preflight.station import Station
from megadit.preflight.verdict import Verdict

# Variables that change what the libraries do. They may differ for a reason (a network interface's name): a warning.
VARIABLES = re.compile(
    r"NCCL_|GLOO_|TORCH_NCCL_|PYTORCH_|CUBLAS_|(OMP_NUM_THREADS|DS_ACCELERATOR|CUDA_LAUNCH_BLOCKING)$"
)
ABSENT = "not there"


def source_hash(folder: Path) -> str:
    """Of every Python file under the folder, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def pins() -> dict[str, str]:
    """package -> version, of requirements.txt beside the package, else as the package was installed."""
    beside = Path(megadit.__file__).parents[1] / "requirements.txt"
    if beside.is_file():
        return parse_pins(beside.read_text().splitlines())
    try:
        return parse_pins(importlib.metadata.requires("megadit") or [])
    except importlib.metadata.PackageNotFoundError:
        return {}


def parse_pins(lines: Iterable[str]) -> dict[str, str]:
    """
    >>> parse_pins(["# all of it", "torch==2.13.0", "pillow>=1", 'tqdm==4.70.1; extra == "plots"'])
    {'torch': '2.13.0', 'tqdm': '4.70.1'}
    """
    matches = (re.match(r"([\w.-]+)==([^\s;#]+)", line) for line in lines)
    return {match[1]: match[2] for match in matches if match}


def installed(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def measure(station: Station) -> dict[str, dict[str, str]]:
    folder = Path(megadit.__file__).parent
    found = {
        "megadit": megadit.__version__,
        "megadit's source files": source_hash(folder),
        "python": platform.python_version(),
        "torch as imported": torch.__version__,
        **{package: installed(package) for package in pins()},
        "backend": torch.distributed.get_backend(),
    }
    if station.on_gpu:
        driver = Path("/proc/driver/nvidia/version")
        match = re.search(r"Module\s+([\d.]+)", driver.read_text()) if driver.exists() else None
        properties = torch.cuda.get_device_properties(station.process.device)
        found |= {
            "CUDA": str(torch.version.cuda),
            "NCCL": ".".join(str(part) for part in torch.cuda.nccl.version()),
            "driver": match[1] if match else "unknown",
            "GPU": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
        }
    environment = {key: value for key, value in os.environ.items() if VARIABLES.match(key)}
    return {"versions": found, "environment": environment}


def deviants(values: Mapping[int, str]) -> tuple[str, dict[str, list[int]]]:
    """(what most ranks have, the ranks of every other value); of equally many, the lowest rank's counts.

    >>> deviants({0: "1", 1: "2", 2: "1"})
    ('1', {'2': [1]})
    """
    usual = Counter(values.values()).most_common(1)[0][0]
    others: dict[str, list[int]] = {}
    for rank, value in values.items():
        if value != usual:
            others.setdefault(value, []).append(rank)
    return usual, others


def judge(station: Station, found: list[Any]) -> Verdict:
    verdict, usual = Verdict(), {}
    for kind, messages in (("versions", verdict.faults), ("environment", verdict.warnings)):
        keys = dict.fromkeys(key for each in found for key in each[kind])
        for key in keys:
            usual[key], others = deviants({rank: each[kind].get(key, ABSENT) for rank, each in enumerate(found)})
            rest = len(found) - sum(len(ranks) for ranks in others.values())
            messages += [
                f"{key} is {value} on {station.names(ranks)}; {usual[key]} on {rest} ranks"
                for value, ranks in others.items()
            ]
    verdict.warnings += [
        f"{package} is {usual[package]}, requirements.txt pins {pin}: not what the tests ran with"
        for package, pin in pins().items()
        if usual[package] not in (pin, ABSENT) and usual[package].split("+")[0] != pin
    ]
    shown = ("megadit", "torch as imported", "deepspeed", "python", "CUDA", "NCCL", "GPU")
    verdict.summary = ", ".join(f"{key.split()[0]} {usual[key]}" for key in shown if key in usual)
    verdict.figures = {"usual": usual}
    return verdict
