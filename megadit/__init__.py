"""megadit: train, convert and sample EC-DiT over tensor, pipeline, expert and data parallelism."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`from megadit import ECDiTPipeline`: imported by its name when it is asked for, for it stands on all the rest."""
    if name == "ECDiTPipeline":
        return importlib.import_module("megadit.pipeline").ECDiTPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
