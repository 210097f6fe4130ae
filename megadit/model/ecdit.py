"""EC-DiT as a pipeline stage: a slice of the layers, with the two ends where the slice reaches them.

Layers sit in a ModuleDict under their global index, so a parameter has the same name in every layout. What is handed
from stage to stage (the carry) is what trains: tokens, conditioning, text states where there are any, and the balance
loss so far where there is one. Everything else reaches every stage as a keyword argument.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from megadit.model.block import Block, recomputed
from megadit.model.config import ECDiTConfig
from megadit.model.embed import Embedding, Head
from megadit.model.router import RouterStats
from megadit.model.text import TextConfig
from megadit.parallel.grid import Group
from megadit.parallel.tensor.mappings import Region, enter

Recompute = Literal["none", "block", "moe"]


class ECDiT(nn.Module):
    """Layers `layers` of an EC-DiT of `config`. A stage that holds all of them is the whole network."""

    def __init__(
        self,
        config: ECDiTConfig,
        text: TextConfig,
        layers: range,
        region: Region,
        expert_group: Group,
        recompute: Recompute = "none",
    ) -> None:
        """`recompute`: of each block, or of each mixture of experts, keep the inputs only and run it again backward."""
        super().__init__()
        self.config, self.recompute, self.tensor_group = config, recompute, region.group
        self.has_balance_loss = config.has_balance_loss  # asked once: it looks at every layer
        self.embed = Embedding(config, text, region) if layers.start == 0 else None
        self.blocks = nn.ModuleDict(
            {str(layer): Block(config, text.width, layer, region, expert_group, recompute == "moe") for layer in layers}
        )
        self.head = Head(config, region) if layers.stop == config.layers else None
        self._stats: list[dict[int, RouterStats]] = []

    def forward(self, *carry: Tensor, **keywords: Tensor | tuple[int, int]) -> Tensor | tuple[Tensor, ...]:
        """`compute`, and the routers' statistics are kept for `take_stats` while training."""
        out, stats = self.compute(*carry, **keywords)  # type: ignore[arg-type]
        if torch.is_grad_enabled():
            self._stats.append(stats)
        return out

    def compute(
        self,
        *carry: Tensor,
        timesteps_B: Tensor,
        size: tuple[int, int],
        text_ids_BL: Tensor | None = None,
        text_mask_BL: Tensor | None = None,
        labels_B: Tensor | None = None,
    ) -> tuple[Tensor | tuple[Tensor, ...], dict[int, RouterStats]]:
        """A pure function of the carry: (the next carry, statistics of each router by global layer index).

        The first stage takes the noisy image [B, C, H, W], the others the carry. The last one returns the velocity, and
        with a balance loss (velocity, balance_1): summed over layers and images, not yet weighted.
        timesteps_B: times in [0, 1], 1 is pure noise. text_ids_BL, text_mask_BL: token ids and True where there is a
        token; or labels_B: class indices. size: (H, W) of the image, the same for the whole batch.
        """
        if self.embed is not None:
            (image_BCHW,) = carry
            carry = self.embed(image_BCHW, timesteps_B, text_ids_BL, text_mask_BL, labels_B)
            if self.has_balance_loss:
                carry += (image_BCHW.new_zeros(1, dtype=torch.promote_types(image_BCHW.dtype, torch.float32)),)
        x_BTD, cond_BD, *rest = carry
        balance = rest.pop() if self.has_balance_loss else None
        text_BLX = rest[0] if rest else None
        # Conditioning and text are whole on every rank, but a rank's cut layers send back only their part of the
        # gradient. Entering once per stage makes one sum of it instead of one per layer.
        entered_BD = enter(cond_BD, self.tensor_group)
        entered_BLX = None if text_BLX is None else enter(text_BLX, self.tensor_group)
        stats: dict[int, RouterStats] = {}
        recompute = self.recompute == "block" and torch.is_grad_enabled()
        for layer, block in self.blocks.items():
            run = partial(recomputed, block) if recompute else block
            x_BTD, routing = run(x_BTD, entered_BD, entered_BLX, text_mask_BL)
            if routing is not None:
                stats[int(layer)] = routing.stats
            if routing is not None and routing.balance is not None:
                balance = balance + routing.balance
        if self.head is not None:
            velocity_BCHW = self.head(x_BTD, entered_BD, size)
            return velocity_BCHW if balance is None else (velocity_BCHW, balance), stats
        return tuple(part for part in (x_BTD, cond_BD, text_BLX, balance) if part is not None), stats

    def take_stats(self, num_microbatches: int) -> dict[int, RouterStats]:
        """Means over the last so many training forwards, by global layer index; forgets them all."""
        # Earlier ones were the schedule's, to learn shapes.
        taken, self._stats = self._stats[-num_microbatches:], []
        layers = taken[0] if taken else {}
        return {
            layer: RouterStats(*(torch.stack(values).mean(dim=0) for values in zip(*each, strict=True)))
            for layer, each in ((layer, [stats[layer] for stats in taken]) for layer in layers)
        }
