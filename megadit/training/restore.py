"""A finished or running run, opened for sampling: the averaged weights of its newest checkpoint, in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from megadit import checkpoint
from megadit.data.stored import StoredCaptions
from megadit.diffusion.sampler import Progress
from megadit.encoders.condition import Captions, Condition, FrozenCaptions, Labels
from megadit.encoders.tokenizer import Tokenizer
from megadit.parallel.grid import Grid, ParallelConfig
from megadit.parallel.pipeline.schedule import Pipeline
from megadit.runtime.agreement import of_main
from megadit.runtime.launch import Process
from megadit.sampling.generate import SampleConfig, generate
from megadit.training.build import TOKENIZER_FILE, build_pipeline, build_stages, named_parameters
from megadit.training.config import (
    CONFIG_FILE,
    RunConfig,
    check,
    check_inputs,
    check_sizes,
    images_per_group,
    load_config,
    sampling_of,
)
from megadit.training.encoded import open_mixture, open_text_encoders
from megadit.training.state import logical_tensor


@dataclass(frozen=True)
class Sampler:
    """A network that draws pictures from prompts: captions, or numbers of classes."""

    config: RunConfig
    pipeline: Pipeline
    condition: Condition
    step: int  # of the checkpoint

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image of the size that positions are scaled to."""
        model = self.config.model
        return model.channels, model.image_size, model.image_size

    @property
    def group(self) -> int:
        """Images that are routed together, so that a batch which is not the last must be a multiple of it."""
        return images_per_group(self.config)

    def draw(
        self,
        prompts: Sequence[str],
        settings: SampleConfig,
        seed: int,
        first_index: int = 0,
        progress: Progress = iter,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """One image per prompt, [B, C, H, W]; see `generate`.

        size: (H, W), None for a square of model.image_size. Raises ValueError for one that has no whole patches.
        """
        channels, *square = self.image_shape
        height, width = size or square
        check_sizes(self.config, [(height, width)])
        return generate(
            self.pipeline,
            self.condition,
            prompts,
            (channels, height, width),
            sampling_of(self.config, settings, (height, width)),
            seed,
            self.config.dtype,
            first_index,
            self.group,
            progress,
        )


def open_sampler(
    directory: Path, process: Process, parallel: ParallelConfig | None = None, online: bool = False
) -> Sampler:
    """The sampler of a run's folder, on this process's place in `parallel` (one rank by default). Collective.

    `online`: text encoders that are not on this machine are downloaded. Raises ValueError naming the file for a folder
    that holds no run or no complete checkpoint.
    """
    config = as_drawn(load_config(directory / CONFIG_FILE), process.world_size, parallel or ParallelConfig())
    check_inputs(config)
    path = of_main(lambda: checkpoint.latest(directory / "checkpoints"))
    if path is None:
        raise ValueError(f"{directory / 'checkpoints'}: no complete checkpoint; train the run first")
    grid = Grid(check(config, process.world_size), process.rank)
    stages = build_stages(config, grid, process.device)
    load_averages(path, named_parameters(stages), grid)
    condition = open_condition(config, directory, process.device, online)
    step = int(checkpoint.read_manifest(path)["step"])
    return Sampler(config, build_pipeline(config, stages, grid, process.device), condition, step)


@torch.no_grad()
def load_averages(path: Path, named: Sequence[tuple[str, nn.Parameter]], grid: Grid) -> None:
    """Fill the parameters with the checkpoint's averages; with its weights where it holds nothing else. Collective.

    Rounded to the parameters' precision, if the checkpoint has a finer one. Raises ValueError as `checkpoint.load`.
    """
    saved = of_main(lambda: {name: entry["dtype"] for name, entry in checkpoint.read_manifest(path)["tensors"].items()})
    kind = "ema" if any(name.startswith("ema.") for name in saved) else "weight"
    flats, state = [], {}
    for name, parameter in named:
        key = f"{kind}.{name}"
        dtype = checkpoint.DTYPES[saved[key]] if key in saved else parameter.dtype
        # The parameter's own memory, unless it must be rounded.
        flats.append(parameter.data.view(-1).to(dtype))
        state[key] = logical_tensor(parameter, grid, flat=flats[-1])
    checkpoint.load(path, state, verify=True)
    for flat, (_, parameter) in zip(flats, named, strict=True):
        if flat.dtype != parameter.dtype:
            parameter.copy_(flat.view_as(parameter))


def as_drawn(trained: RunConfig, world_size: int, parallel: ParallelConfig) -> RunConfig:
    """The configuration of a training, made one of drawing on another layout."""
    model = trained.model
    # Without a capacity images do not compete: a group as large as a training's batch would be work for nothing.
    apart = model.routing == "token_choice" and model.dropless
    group = 1 if apart else images_per_group(trained)
    # The batch of training has no other meaning here; any that fits the layout will do.
    data = replace(trained.data, global_batch=world_size * group, micro_batch=group, verify=False)
    model, objective = replace(model, routing_group=group), replace(trained.objective, keep_tokens=1.0)
    return replace(trained, model=model, objective=objective, data=data, parallel=parallel)


def open_condition(config: RunConfig, directory: Path, device: torch.device, online: bool = False) -> Condition:
    """What the run's prompts mean: text, or a class's number, or that of a caption whose encoder is not named.

    Raises ValueError naming what is not there: the tokenizer's file, an encoder, the data set with the captions.
    """
    text = config.text
    if config.model.conditioning == "class":
        return Labels(config.model.classes)
    if text.kind == "builtin":
        return Captions(Tokenizer.load(directory / TOKENIZER_FILE), text.length)
    if text.kind == "precomputed":
        return StoredCaptions(open_mixture(config))
    return FrozenCaptions(open_text_encoders(config, device, online), text.too_long)
