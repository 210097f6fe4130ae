"""EC-DiT as a pipeline stage: a slice of the layers, with the two ends where the slice reaches them.

Layers sit in a ModuleDict under their global index, so a parameter has the same name in every layout. What is handed
from stage to stage (the carry) is what trains: tokens, conditioning, the shared modulation where it is shared, text
states where there are any, and the balance loss so far where there is one. Everything else reaches every stage as a
keyword argument.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from megadit.model.block import Block, recomputed
from megadit.model.config import ECDiTConfig, TextConfig
from megadit.model.embed import MODULATION_OUTPUTS, Embedding, Head
from megadit.model.positions import rotary_positions
from megadit.model.router import RouterStats
from megadit.model.text import readable
from megadit.parallel.grid import Group
from megadit.parallel.pipeline.anchor import anchored
from megadit.parallel.tensor.mappings import Region, ReplicatedTokens, enter

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
        self.config, self.layers, self.recompute, self.region = config, layers, recompute, region
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
        text_states_BLC: Tensor | None = None,
        text_pooled_BP: Tensor | None = None,
        kept_BT: Tensor | None = None,
    ) -> tuple[Tensor | tuple[Tensor, ...], dict[int, RouterStats]]:
        """A pure function of the carry: (the next carry, statistics of each router by global layer index).

        The first stage takes the noisy image [B, C, H, W], the others the carry. The last one returns the velocity, and
        with a balance loss (velocity, balance_1): summed over layers and images, not yet weighted.
        timesteps_B: times in [0, 1], 1 is pure noise. text_ids_BL, text_mask_BL: token ids and True where there is a
        token, with text_states_BLC in place of ids for a frozen encoder's captions, and text_pooled_BP for text.pooled;
        or labels_B: class indices. size: (H, W) of the image, the same for the whole batch. kept_BT: the places of the
        tokens that the network sees, in training on a part of each image: the velocity then is that of their patches,
        [B, T, C p p], in this order.
        """
        if self.embed is not None:
            (image_BCHW,) = carry
            told = (text_ids_BL, text_mask_BL, labels_B, text_states_BLC, text_pooled_BP)
            carry = self.embed(image_BCHW, timesteps_B, *told, kept_BT)
            if self.has_balance_loss:
                carry += (image_BCHW.new_zeros(1, dtype=torch.promote_types(image_BCHW.dtype, torch.float32)),)
        x_BTD, cond_BD, *rest = carry
        balance = rest.pop() if self.has_balance_loss else None
        shared_BVD = rest.pop(0) if self.config.modulation == "shared" else None
        text_BLX = rest[0] if rest else None
        # Conditioning and text are whole on every rank, but a rank's cut layers send back only their part of the
        # gradient. Entering once per stage makes one sum of it instead of one per layer.
        entered_BD = enter(cond_BD, self.region.group)
        entered_BLX = None if text_BLX is None else enter(text_BLX, self.region.group)
        entered_BVD = None if shared_BVD is None else self.region.enter_between(shared_BVD)
        readable_BL = None if text_mask_BL is None else readable(text_mask_BL)
        rotary_2BHTK = self._rotary(size, x_BTD, kept_BT) if self.config.positions == "rotary" else None
        stats: dict[int, RouterStats] = {}
        recompute = self.recompute == "block" and torch.is_grad_enabled()
        for layer, block in self.blocks.items():
            run = partial(recomputed, block) if recompute else block
            assert isinstance(block, Block)
            layer_BD = entered_BD
            if block.embedder is not None:
                own_BD = block.embedder(timesteps_B, labels_B, x_BTD.dtype)
                layer_BD = enter(anchored(own_BD, cond_BD), self.region.group)
            x_BTD, routing = run(x_BTD, layer_BD, entered_BLX, readable_BL, entered_BVD, rotary_2BHTK)
            if routing is not None:
                stats[int(layer)] = routing.stats
            if routing is not None and routing.balance is not None:
                balance = balance + routing.balance
        if self.head is not None:
            head_BD = entered_BD if shared_BVD is None else self.region.enter_between(cond_BD)
            velocity = self.head(x_BTD, head_BD, size if kept_BT is None else None)
            return velocity if balance is None else (velocity, balance), stats
        return tuple(part for part in (x_BTD, cond_BD, shared_BVD, text_BLX, balance) if part is not None), stats

    def _rotary(self, size: tuple[int, int], x_BTD: Tensor, kept_BT: Tensor | None) -> Tensor:
        """[2, 1, 1, T, K], of all tokens of images of this size; or of each image's own, [2, B, 1, T, K]."""
        config = self.config
        rows, columns = size[0] // config.patch, size[1] // config.patch
        scale = config.position_scale(size)
        rotary_2TK = rotary_positions(rows, columns, config.head_width, scale, x_BTD.device, x_BTD.dtype)
        return rotary_2TK[:, None, None] if kept_BT is None else rotary_2TK[:, kept_BT].unsqueeze(2)

    def take_stats(self, num_microbatches: int) -> dict[int, RouterStats]:
        """Means over the last so many training forwards, by global layer index; forgets them all."""
        # Earlier ones were the schedule's, to learn shapes.
        taken, self._stats = self._stats[-num_microbatches:], []
        layers = taken[0] if taken else {}
        return {
            layer: RouterStats(*(torch.stack(values).mean(dim=0) for values in zip(*each, strict=True)))
            for layer, each in ((layer, [stats[layer] for stats in taken]) for layer in layers)
        }


def carry_like(
    config: ECDiTConfig, text: TextConfig, image_BCHW: Tensor, region: Region, tokens: int
) -> tuple[Tensor, ...]:
    """Uninitialised tensors of the shapes that one stage hands the next for these images, of each so many tokens."""
    images, width = len(image_BCHW), config.width
    carry = [image_BCHW.new_empty(images, tokens // region.token_parts, width), image_BCHW.new_empty(images, width)]
    if config.modulation == "shared":
        carry.append(image_BCHW.new_empty(images, MODULATION_OUTPUTS["shared"], width))
    if config.conditioning == "text":
        carry.append(image_BCHW.new_empty(images, text.length, text.width))
    if config.has_balance_loss:
        carry.append(image_BCHW.new_empty(1, dtype=torch.promote_types(image_BCHW.dtype, torch.float32)))
    return tuple(part.requires_grad_() for part in carry)


def whole_model(config: ECDiTConfig, text: TextConfig) -> ECDiT:
    """The entire network on the meta device, in one process and without a process group.

    It holds no numbers: tools learn the names, logical shapes and placements of its parameters from it.
    """
    if config.routing_group == "batch":
        config = replace(config, routing_group="sample")  # no parameter depends on it
    alone = Group(None, 1, 0)  # type: ignore[arg-type]  # a group of one never communicates
    with torch.device("meta"):
        return ECDiT(config, text, range(config.layers), ReplicatedTokens(alone), alone)
