"""One rank's samples of one step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B consecutive samples of the global batch. Everything random about a sample is keyed by its id.

    sample_ids_B: int64, places in the run's order of samples; an image that comes twice has two.
    latents_BCHW: float32, about unit variance. condition: what the network is told, [B, ...] by keyword.
    """

    sample_ids_B: Tensor
    latents_BCHW: Tensor
    condition: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.sample_ids_B)
