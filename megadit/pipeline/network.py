"""The whole network on one device, without a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megadit.conversion.weights import Weights
from megadit.model.ecdit import ECDiT, whole_model
from megadit.parallel.grid import Group
from megadit.parallel.pipeline.schedule import Listener
from megadit.training.config import RunConfig


class Whole:
    """What `generate` runs and `recorded` records: the network, which needs no ranks.

    listeners: who is told of each call.
    """

    def __init__(self, network: ECDiT) -> None:
        self.network = network
        self.group = Group(None, 1, 0)  # type: ignore[arg-type]  # of one, whose handle nobody looks at
        self.listeners: list[Listener] = []

    @property
    def stages(self) -> list[nn.Module]:
        """The network is the only one."""
        return [self.network]

    @property
    def parameter(self) -> Tensor:
        return next(self.network.parameters())

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    @torch.no_grad()
    def forward(self, batch: Tensor, keywords: dict[str, Any], *, multiple: int) -> Tensor:
        """The velocity of a batch, which is whole groups of `multiple` images."""
        assert len(batch) % multiple == 0, f"{len(batch)} images are no groups of {multiple}"
        out = self.network(batch, **keywords)
        for listener in self.listeners:
            listener(batch, keywords, 1)
        return out[0] if isinstance(out, tuple) else out


def build_network(config: RunConfig, weights: Weights, dtype: torch.dtype, device: torch.device) -> ECDiT:
    """The network of `config` with these weights, rounded to `dtype`. Raises ValueError for a file that is damaged."""
    network = whole_model(config.model, config.text).to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(weights.source.read(weights.tensors[name]))
    # Its parameters require gradients, as those of a sampler do: by that torch.matmul decides whether it multiplies a
    # strided batch as one matrix, and the two ways round differently.
    return network.to(device).eval()
