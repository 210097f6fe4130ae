"""From a configuration to a run: model stage, pipeline, engine, data, on this process's place in the grid."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megadit import checkpoint
from megadit.data.loader import Dataset, Loader, open_dataset
from megadit.diffusion.objective import velocity_loss
from megadit.encoders.tokenizer import Tokenizer
from megadit.model.count import stage_costs
from megadit.model.ecdit import ECDiT
from megadit.model.weights import decays, init_of
from megadit.parallel.grid import Grid, Layout
from megadit.parallel.init import initialise
from megadit.parallel.pipeline.partition import partition
from megadit.parallel.pipeline.schedule import LossFunction, Pipeline
from megadit.parallel.tensor.mappings import CutTokens, Region, ReplicatedTokens
from megadit.runtime.launch import Process
from megadit.training.config import RunConfig, num_microbatches
from megadit.training.ema import Ema
from megadit.zero import Engine, create_engine

logger = logging.getLogger("megadit")

TOKENIZER_FILE = "tokenizer.model"


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it starts: both splits and the tokenizer."""

    train: Dataset
    heldout: Dataset
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Run:
    """Everything that a step touches on this process."""

    config: RunConfig
    process: Process
    grid: Grid
    model: ECDiT
    pipeline: Pipeline
    engine: Engine
    ema: Ema
    inputs: Inputs
    loader: Loader
    heldout_loader: Loader

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters under their global names."""
        return list(self.model.named_parameters())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.inputs.train.image_shape


def read_inputs(config: RunConfig) -> Inputs:
    """Open the data and the tokenizer. Writes nothing, communicates nothing.

    Raises ValueError naming the file or key for data that cannot be read or does not fit the model.
    """
    train, heldout = open_dataset(config.data, "train"), open_dataset(config.data, "heldout")
    model = config.model
    wanted = (model.channels, model.image_size, model.image_size)
    if train.image_shape != wanted:
        channels, height, width = train.image_shape
        source = config.data.path or f"data.kind={config.data.kind}"
        square = f"set model.channels={channels} and model.image_size={height}"
        raise ValueError(
            f"{source} has images of {channels} x {height} x {width}, the model expects "
            f"{model.channels} x {model.image_size} x {model.image_size}; "
            f"{square if height == width else 'only square images can be trained on'}"
        )
    corpus, kept = train.corpus(), config.directory / TOKENIZER_FILE
    if config.text.tokenizer:
        tokenizer = Tokenizer.load(Path(config.text.tokenizer).expanduser())
    elif kept.exists() and checkpoint.latest(config.directory / "checkpoints"):
        tokenizer = Tokenizer.load(kept)
    else:
        tokenizer = Tokenizer.train(corpus, config.text.vocabulary)
    if len(tokenizer) > config.text.vocabulary:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} pieces, text.vocabulary={config.text.vocabulary} has no room for "
            f"them; set text.vocabulary={len(tokenizer)}"
        )
    cut = tokenizer.too_long(corpus, config.text.length)
    if cut:
        logger.warning("%d captions are cut to text.length=%d tokens, such as %r", len(cut), config.text.length, cut[0])
    return Inputs(train, heldout, tokenizer)


def region_of(config: RunConfig, grid: Grid) -> Region:
    """How tokens lie between layers."""
    return CutTokens(grid["tp"]) if config.parallel.sequence else ReplicatedTokens(grid["tp"])


def build_model(config: RunConfig, grid: Grid, device: torch.device) -> ECDiT:
    """This rank's stage, cut, its weights not yet drawn or loaded."""
    layers = partition(stage_costs(config.model, config.text), grid["pp"].size)[grid["pp"].rank]
    recompute = config.run.recompute == "block"
    model = ECDiT(config.model, config.text, layers, region_of(config, grid), grid["ep"], recompute)
    model = model.to(device, config.dtype)
    if config.run.compile:
        for block in model.blocks.values():
            block.compile(fullgraph=True, dynamic=False)
    return model


def mean_over(samples: int) -> LossFunction:
    """The loss of a microbatch: its samples' losses over the number of `samples` of the whole local batch."""

    def loss(prediction_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        return velocity_loss(prediction_BCHW, target_BCHW).sum() / samples

    return loss


def build_pipeline(config: RunConfig, model: ECDiT, grid: Grid, device: torch.device) -> Pipeline:
    """The stage under its schedule."""
    local_batch = config.data.global_batch // grid["dp"].size
    return Pipeline(model, grid["pp"], device, num_microbatches(config, grid.layout), mean_over(local_batch))


def build_run(config: RunConfig, layout: Layout, inputs: Inputs, process: Process) -> Run:
    """Assemble a run. Collective over the world."""
    grid = Grid(layout, process.rank)
    model = build_model(config, grid, process.device)
    named = list(model.named_parameters())
    # Weights depend on run.seed and their names alone. The engine copies them, so they come first.
    initialise(named, grid, config.run.seed, lambda name: init_of(name, config.model))
    engine = create_engine(config.zero.stage, named, grid, config.optim, decays)

    def loader(dataset: Dataset) -> Loader:
        return Loader(
            dataset,
            inputs.tokenizer,
            config.text.length,
            config.run.seed,
            config.data.global_batch,
            grid["dp"].rank,
            grid["dp"].size,
        )

    return Run(
        config=config,
        process=process,
        grid=grid,
        model=model,
        pipeline=build_pipeline(config, model, grid, process.device),
        engine=engine,
        ema=Ema(named, config.ema),
        inputs=inputs,
        loader=loader(inputs.train),
        heldout_loader=loader(inputs.heldout),
    )
