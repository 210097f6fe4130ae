"""EC-DiT as a pipeline stage: a slice of the layers, with the two ends where the slice reaches them.

Layers sit in a ModuleDict under their global index, so a parameter has the same name in every layout. What is handed
from stage to stage (the carry) is what trains: tokens, conditioning and text states. Everything else reaches every
stage as a keyword argument.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megadit.model.block import Block
from megadit.model.config import ECDiTConfig
from megadit.model.embed import Embedding, Head
from megadit.model.moe import ExpertChoiceMoE
from megadit.model.router import RouterStats
from megadit.model.text import TextConfig
from megadit.parallel.grid import Group
from megadit.parallel.tensor.mappings import Region, enter

Carry = tuple[Tensor, Tensor, Tensor]


class ECDiT(nn.Module):
    """Layers `layers` of an EC-DiT of `config`. A stage that holds all of them is the whole network."""

    def __init__(
        self,
        config: ECDiTConfig,
        text: TextConfig,
        layers: range,
        region: Region,
        expert_group: Group,
        recompute: bool = False,
    ) -> None:
        """`recompute`: keep only the blocks' inputs for the backward pass, and run each block again there."""
        super().__init__()
        self.recompute = recompute
        self.tensor_group = region.group
        self.embed = Embedding(config, text, region) if layers.start == 0 else None
        self.blocks = nn.ModuleDict(
            {str(layer): Block(config, text.width, layer, region, expert_group) for layer in layers}
        )
        self.head = Head(config, region) if layers.stop == config.layers else None

    def forward(
        self,
        *carry: Tensor,
        timesteps_B: Tensor,
        text_ids_BL: Tensor,
        text_mask_BL: Tensor,
        size: tuple[int, int],
    ) -> Tensor | Carry:
        """The first stage takes the noisy image [B, C, H, W], the others the carry; the last returns the velocity.

        timesteps_B: times in [0, 1], 1 is pure noise. text_ids_BL, text_mask_BL: token ids and True where there is a
        token. size: (H, W) of the image, the same for the whole batch.
        """
        if self.embed is not None:
            (image_BCHW,) = carry
            x_BTD, cond_BD, text_BLX = self.embed(image_BCHW, timesteps_B, text_ids_BL, text_mask_BL)
        else:
            x_BTD, cond_BD, text_BLX = carry
        # Conditioning and text are whole on every rank, but a rank's cut layers send back only their part of the
        # gradient. Entering once per stage makes one sum of it instead of one per layer.
        entered_BD, entered_BLX = enter(cond_BD, self.tensor_group), enter(text_BLX, self.tensor_group)
        recompute = self.recompute and torch.is_grad_enabled()
        for block in self.blocks.values():
            run = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False) if recompute else block
            x_BTD = run(x_BTD, entered_BD, entered_BLX, text_mask_BL)
        if self.head is not None:
            return self.head(x_BTD, entered_BD, size)
        return x_BTD, cond_BD, text_BLX

    def router_stats(self) -> dict[int, RouterStats]:
        """What each mixture-of-experts layer of this stage did in its latest forward, by global layer index."""
        return {
            int(layer): block.feedforward.stats
            for layer, block in self.blocks.items()
            if isinstance(block.feedforward, ExpertChoiceMoE) and block.feedforward.stats is not None
        }
