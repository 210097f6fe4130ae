"""Training on images of several sizes with a frozen encoder's captions: made-up ones, in place of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megadit.data.batch import Batch
from megadit.runtime.launch import Process
from megadit.runtime.seed import stream
from megadit.training.build import Inputs, Run, build_run
from megadit.training.config import RunConfig, check, check_sizes, load_config
from tests.parity.training import CONFIG, init_of
from tests.training.assembled import redraw

# Two have as many tokens in other places. Half of each: 8, 12 and 8 tokens.
SIZES = ((8, 8), (8, 12), (16, 4))
OVERRIDES = (
    "run.steps=4",
    *("text.kind=t5+clip", "text.channels=10", "text.pooled=6", "text.length=7"),
    *("model.positions=rotary", "model.head_width=8"),
    *("objective.keep_tokens=0.5", "objective.shift_tokens=16", "objective.caption_dropout=0.3"),
)


@dataclass(frozen=True)
class MixedLoader:
    """One data-parallel rank's share of each step, whose images are of one size on all ranks: of `SIZES` in turn."""

    config: RunConfig
    rank: int
    size: int

    def batch(self, step: int) -> Batch:
        """Samples are a function of their id, and as large as their step's."""
        count, seed = self.config.data.global_batch, self.config.run.seed
        sample_ids = torch.arange((step - 1) * count, step * count).chunk(self.size)[self.rank]
        shape = (self.config.model.channels, *SIZES[step % len(SIZES)])
        streams = [stream(seed, "mixed", sample) for sample in sample_ids.tolist()]
        latents = [torch.randn(shape, generator=generator) for generator in streams]
        captions = [caption(self.config, generator) for generator in streams]
        condition = {key: torch.stack([caption[key] for caption in captions]) for key in captions[0]}
        return Batch(sample_ids, torch.stack(latents), condition)


def caption(config: RunConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """States of one to all of the tokens that there is room for, zeros behind them, and a pooled vector."""
    text = config.text
    count = int(torch.randint(1, text.length + 1, (), generator=generator))
    mask_L = torch.arange(text.length) < count
    states_LC = torch.randn(text.length, text.channels, generator=generator) * mask_L[:, None]
    told = {"text_states_BLC": states_LC, "text_mask_BL": mask_L}
    return told | {"text_pooled_BP": torch.randn(text.pooled, generator=generator)} if text.pooled else told


def nothing(config: RunConfig) -> Any:
    """The condition whose empty caption is one token."""
    told = {key: value[None] for key, value in caption(config, stream(0, "nothing")).items()}
    first_BL = (torch.arange(config.text.length) == 0)[None]
    told["text_states_BLC"][:, 1:] = 0
    return SimpleNamespace(nothing=told | {"text_mask_BL": first_BL})


def start(rank: int, world_size: int, overrides: Sequence[str]) -> Run:
    """A run on this rank over `SIZES`, with weights of which none is zero or one. Collective."""
    config = load_config(CONFIG, (*OVERRIDES, *overrides))
    layout = check(config, world_size)
    check_sizes(config, SIZES)
    process = Process(rank, world_size, rank, torch.device("cpu"))
    inputs: Any = Inputs(None, None, nothing(config))  # type: ignore[arg-type]  # nothing is read
    run = build_run(config, layout, inputs, process)
    loader: Any = MixedLoader(config, run.grid["dp"].rank, run.grid["dp"].size)
    run = replace(run, loader=loader)
    redraw(run, 1, init_of)
    return run
