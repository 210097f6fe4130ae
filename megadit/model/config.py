"""The model's shape, the sizes that the paper names, and the ways to route of its neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ECDiTConfig:
    """Everything that fixes the network; the defaults are EC-DiT-XL-32E's."""

    preset: str = ""  # a size of `PRESETS`; the other fields override it
    routing_preset: str = ""  # a way to route, of `ROUTING_PRESETS`; the other fields override it

    layers: int = 28
    width: int = 1152
    heads: int = 18
    kv_heads: int = 6
    head_width: int = 64
    feedforward: Literal["gelu", "swiglu"] = "gelu"  # of dense layers, experts and shared experts
    ffn_ratio: float = 4.0  # hidden width of a feed-forward layer, in model widths
    qk_norm: bool = True
    bias: bool = False  # of the linear layers inside the blocks and of experts; not of routers and shared experts
    # Of each layer its own linear layer; shared: one for all layers, with gates, and a table of offsets for each.
    modulation: Literal["scale_shift", "gated", "shared"] = "scale_shift"
    embedders: Literal["shared", "per_layer"] = "shared"  # of time and class; per_layer: each layer has its own
    conditioning: Literal["text", "class"] = "text"  # class: DiT's, a label in place of a caption
    classes: int = 0  # of conditioning=class

    routing: Literal["expert_choice", "token_choice", "dense"] = "expert_choice"
    experts: int = 32  # 0: the dense twin
    expert_ratio: float = 0.0  # hidden width of an expert, in model widths; 0: ffn_ratio
    moe_every: int = 2  # the last of every so many layers is a mixture of experts
    dense_first: int = 0  # so many first layers have no experts
    capacity_factor: float = 2.0  # expert choice: mean experts per token; token choice: slots per pick
    capacity_overrides: dict[int, float] = field(default_factory=dict)  # capacity factors of single layers
    routing_group: int | Literal["sample", "batch"] = "sample"  # images that compete; batch: a whole microbatch
    gate: Literal["softmax", "sigmoid", "identity"] = "softmax"  # from a router's logit to an affinity
    normalise_gates: bool = False  # to sum 1 over the experts that took the token
    route_scale: float = 1.0  # times the gates
    router_input: Literal["modulated", "timestep"] = "modulated"  # timestep: it joins the unmodulated token
    shared_experts: int = 0  # that every token passes
    shared_ratio: float = 0.0  # hidden width of a shared expert, in model widths; 0: an expert's
    top_k: int = 2  # token choice: experts that a token asks for
    dropless: bool = False  # token choice: no capacity; shapes then follow the data
    balance_loss: float = 0.0  # token choice: weight of the load-balancing loss
    balance_counts: Literal["picks", "first"] = "picks"  # load that it evens out: of all picks, or first choices

    image_size: int = 32  # height and width of the latent image that positions are scaled to
    channels: int = 8
    out_channels: int = 0  # of the output; 0: as channels
    patch: int = 2
    positions: Literal["sincos", "rotary"] = "sincos"  # added to tokens; rotary: of queries and keys in self-attention
    position_interpolation: float = 1.0  # divides the coordinates of the positions
    time_frequency_shift: Literal[0, 1] = 0  # 1: the last of the time's frequencies is 1 / 10000, not a step above it
    attention_norm_eps: float = 1e-6  # of the norm before self-attention
    feedforward_norm_eps: float = 1e-6  # of the norm before the feed-forward layer

    @property
    def output_channels(self) -> int:
        """Channels of the output."""
        return self.out_channels or self.channels

    @property
    def hidden(self) -> int:
        """Hidden width of a dense feed-forward layer."""
        return round(self.ffn_ratio * self.width)

    @property
    def expert_hidden(self) -> int:
        """Hidden width of an expert."""
        return round((self.expert_ratio or self.ffn_ratio) * self.width)

    @property
    def shared_hidden(self) -> int:
        """Hidden width of all shared experts side by side, which is one feed-forward layer."""
        return self.shared_experts * round((self.shared_ratio or self.expert_ratio or self.ffn_ratio) * self.width)

    @property
    def tokens(self) -> int:
        """Tokens of one square image of `image_size`."""
        return (self.image_size // self.patch) ** 2

    def tokens_of(self, size: tuple[int, int]) -> int:
        """Tokens of an image of (height, width)."""
        return (size[0] // self.patch) * (size[1] // self.patch)

    def position_scale(self, size: tuple[int, int]) -> float:
        """What multiplies rows and columns of an image of (height, width): its longer edge spans `image_size`."""
        return self.image_size / max(size) / self.position_interpolation

    @property
    def has_experts(self) -> bool:
        """Whether any layer has experts."""
        return any(self.is_moe(layer) for layer in range(self.layers))

    @property
    def has_balance_loss(self) -> bool:
        """Whether the stages hand a load-balancing loss on."""
        return self.routing == "token_choice" and self.balance_loss > 0 and self.has_experts

    @property
    def group_images(self) -> int:
        """Images of a routing group."""
        assert self.routing_group != "batch", "assembly puts the number of images of a microbatch there"
        return 1 if self.routing_group == "sample" else self.routing_group

    def is_moe(self, layer: int) -> bool:
        """Whether the layer (counted from 0) has experts: layers 1, 3, 5, ... when `moe_every` is 2."""
        routed = self.routing != "dense" and self.experts > 0
        return routed and layer >= self.dense_first and (layer + 1) % self.moe_every == 0

    def capacity_factor_of(self, layer: int) -> float:
        """The capacity factor of one layer."""
        return self.capacity_overrides.get(layer, self.capacity_factor)

    def capacity(self, layer: int, tokens: int) -> int:
        """Tokens that each expert of a layer takes of a routing group of `tokens`."""
        return self.slots(self.capacity_factor_of(layer), tokens)

    def slots(self, factor: float, tokens: int) -> int:
        """Tokens that an expert of this capacity factor takes of a routing group of `tokens`.

        Expert choice: min(S, ceil(S f_c / E)). Token choice: min(S, ceil(S k f_c / E)), as GShard (arXiv 2006.16668).
        """
        picks = self.top_k if self.routing == "token_choice" else 1
        exact = tokens * picks * factor / self.experts
        return min(tokens, math.ceil(exact - 1e-9))  # 100 x 1.1 / 10 is a little more than 11 in floating point


@dataclass(frozen=True)
class TextConfig:
    """The caption's way into the model."""

    # All but builtin are states of frozen encoders, through two layers to text.width. precomputed: by whatever encoded
    # the data set. t5+clip: T5's states and CLIP's pooled vector, as FLUX.
    kind: Literal["builtin", "t5", "clip", "t5+clip", "precomputed"] = "builtin"
    tokenizer: str = ""  # a sentencepiece model file; empty: one is trained on the data set's captions
    vocabulary: int = 256
    pieces: Literal["unigram", "bpe"] = "unigram"  # of a tokenizer that is trained; bpe: few words stay whole
    length: int = 16  # tokens of a caption, padded or cut to it
    width: int = 64
    layers: int = 2
    heads: int = 4
    init_std: float = 0.02  # of the embeddings of builtin's tokens and their positions
    channels: int = 4096  # of a frozen encoder's states
    pooled: int = 0  # width of the frozen encoder's vector of the whole caption, which joins the time; 0: none
    t5: str = ""  # the frozen encoder's name or folder
    t5_revision: str = ""
    clip: str = ""
    clip_revision: str = ""
    too_long: Literal["cut", "error"] = "cut"  # what becomes of a caption of more than `length` tokens

    @property
    def is_frozen(self) -> bool:
        """Whether captions come as a frozen encoder's states."""
        return self.kind != "builtin"


def _size(layers: int, width: int, kv_heads: int, experts: int) -> dict[str, Any]:
    return {"layers": layers, "width": width, "heads": width // 64, "kv_heads": kv_heads, "experts": experts}


# What PixArt and DiT have in common, in their XL/2 sizes: plain attention with biases, no experts, a learned variance.
_XL_2: dict[str, Any] = {
    **{"layers": 28, "width": 1152, "heads": 16, "kv_heads": 16, "head_width": 72, "experts": 0},
    **{"qk_norm": False, "bias": True, "patch": 2, "channels": 4, "out_channels": 8},
}

# EC-DiT's sizes (arXiv 2410.02098), of which the dense M has 46 layers and the sparse one 38; and its neighbours.
PRESETS: dict[str, dict[str, Any]] = {
    "ec-dit-xl": _size(28, 1152, 6, 0),
    "ec-dit-xl-32e": _size(28, 1152, 6, 32),
    "ec-dit-xxl": _size(38, 1536, 6, 0),
    "ec-dit-xxl-8e": _size(38, 1536, 6, 8),
    "ec-dit-xxl-16e": _size(38, 1536, 6, 16),
    "ec-dit-xxl-32e": _size(38, 1536, 6, 32),
    "ec-dit-3xl": _size(42, 2304, 6, 0),
    "ec-dit-3xl-32e": _size(42, 2304, 6, 32),
    "ec-dit-m": _size(46, 3072, 12, 0),
    "ec-dit-m-64e": _size(38, 3072, 12, 64),
    # PixArt-alpha (arXiv 2310.00426) at 512 pixels, as the transformer's config.json of PixArt-XL-2-512x512 has it. Its
    # captions are states of T5: text.kind=precomputed, text.channels=4096, text.width=1152, text.length=120.
    "pixart-xl-2": {**_XL_2, "modulation": "shared", "image_size": 64},
    # DiT (arXiv 2212.09748) at 256 pixels, as the transformer's config.json of DiT-XL-2-256 has it.
    "dit-xl-2": {
        **_XL_2,
        **{"modulation": "gated", "embedders": "per_layer", "conditioning": "class", "classes": 1000},
        **{"image_size": 32, "time_frequency_shift": 1, "feedforward_norm_eps": 1e-5},
    },
}

# Parameters, (total, activated) with a frozen text encoder and autoencoder, as the paper gives them; 0: it does not.
PAPER_SIZES: dict[str, tuple[float, float]] = {
    "ec-dit-xl": (1.47e9, 0),
    "ec-dit-xl-32e": (6.08e9, 0),
    "ec-dit-xxl": (2.35e9, 0),
    "ec-dit-xxl-32e": (13.47e9, 0),
    "ec-dit-3xl": (4.50e9, 0),
    "ec-dit-3xl-32e": (32.15e9, 0),
    "ec-dit-m": (8.03e9, 0),
    "ec-dit-m-64e": (97.21e9, 8.27e9),
}

# How others route, with any size of model.
ROUTING_PRESETS: dict[str, dict[str, Any]] = {
    "ec-dit": {"routing": "expert_choice", "capacity_factor": 2.0},
    # Nucleus-Image (arXiv 2604.12163), as diffusers has it: shared expert, normalised gates, unmodulated router input.
    "nucleus": {
        "routing": "expert_choice",
        "feedforward": "swiglu",
        "experts": 64,
        "expert_ratio": 0.65625,
        "moe_every": 1,
        "dense_first": 3,
        "capacity_factor": 8.0,
        "normalise_gates": True,
        "route_scale": 2.5,
        "router_input": "timestep",
        "shared_experts": 1,
    },
    # DiT-MoE (arXiv 2407.11633): top-2 without a capacity, balanced over a rank's whole microbatch, two shared experts.
    "dit-moe": {
        "routing": "token_choice",
        "routing_group": "batch",
        "feedforward": "swiglu",
        "experts": 8,
        "moe_every": 1,
        "top_k": 2,
        "dropless": True,
        "balance_loss": 0.005,
        "shared_experts": 2,
        "shared_ratio": 1.0,
    },
    # GShard (arXiv 2006.16668): top-2 with a capacity, gates normalised over what was not dropped. The second expert
    # is always asked, not at random.
    "gshard": {
        "routing": "token_choice",
        "top_k": 2,
        "capacity_factor": 1.0,
        "normalise_gates": True,
        "balance_loss": 0.01,
        "balance_counts": "first",
    },
}
