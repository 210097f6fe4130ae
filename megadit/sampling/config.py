"""The configuration of sampling, readable before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

# Maps of the experts' picks: with the prompt, without it, and by how many experts more a patch is picked with it.
Branch = Literal["conditional", "unconditional", "difference"]
BRANCHES: tuple[Branch, ...] = get_args(Branch)
OURS = ("euler", "heun")  # samplers that need no other package


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn. Heun evaluates the network twice a step, the others once."""

    sampler: Literal["euler", "heun", "dpm++", "unipc"] = "heun"  # the last two are diffusers': good from 10 steps on
    steps: int = 20
    guidance: float = 3.0  # 1: none, at half the cost
    shift: float = 1.0  # more than 1 spends more steps near the noise; see objective.shift_tokens
    guidance_rescale: float = 0.0  # 0 to 1: how far guidance may not change a velocity's spread (arXiv 2305.08891)
    guidance_from: float = 0.0  # guided are times between these two, 1 is noise; elsewhere a step costs half
    guidance_until: float = 1.0


def check_installed(sampler: str) -> None:
    """Raises ValueError, without an import of seconds, for a sampler whose package is not there."""
    if sampler not in OURS and find_spec("diffusers") is None:
        raise ValueError(
            f"sample.sampler={sampler} needs diffusers; install it with pip install -e '.[encoders]', or use "
            f"{' or '.join(OURS)}"
        )
