"""The machine that a study runs on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import megadit


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine(side_by_side: int) -> dict[str, Any]:
    """What the figures of a trial depend on besides its settings."""
    import torch  # seconds, which the other functions need not wait for

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "gpus": gpus,
        "trials_side_by_side": side_by_side,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megadit": megadit.__version__,
    }


def cpu_name() -> str:
    """As the kernel has it, or the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
