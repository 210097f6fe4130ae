"""From a configuration to a run: model stage, pipeline, engine, data, on this process's place in the grid."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from megadit import checkpoint
from megadit.checkpoint.source import locate
from megadit.data.encoded import EncodedLoader
from megadit.data.loader import Dataset, Loader, open_dataset
from megadit.data.mixture import Mixture
from megadit.data.stored import StoredCaptions, largest, numbers
from megadit.diffusion.objective import velocity_loss
from megadit.encoders.condition import Captions, Condition, Labels
from megadit.encoders.tokenizer import Tokenizer
from megadit.model.count import stage_costs
from megadit.model.ecdit import ECDiT
from megadit.model.weights import decays, init_of
from megadit.parallel.grid import Grid
from megadit.parallel.init import Init, initialise
from megadit.parallel.layout import Layout
from megadit.parallel.pipeline.partition import partition, stage_indices
from megadit.parallel.pipeline.schedule import LossFunction, Pipeline
from megadit.parallel.tensor.mappings import CutTokens, Region, ReplicatedTokens
from megadit.runtime.launch import Process
from megadit.training.config import RunConfig, check_inputs, images_per_group, num_microbatches, training_tokens
from megadit.training.ema import Ema
from megadit.training.encoded import open_mixture
from megadit.zero import create_engine
from megadit.zero.groups import Engine

logger = logging.getLogger("megadit")

TOKENIZER_FILE = "tokenizer.model"


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it starts: both splits, and what makes the network's input of their captions.

    Encoded data sets have both splits in one.
    """

    train: Dataset | Mixture
    heldout: Dataset | Mixture
    condition: Condition

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the pictures along the way."""
        return largest(self.train).latent if isinstance(self.train, Mixture) else self.train.image_shape

    def prompts(self, count: int) -> list[str]:
        """Of the pictures along the way, held out where any are."""
        if not isinstance(self.heldout, Mixture):
            return self.heldout.prompts(count)
        return numbers(self.condition, count)


@dataclass(frozen=True)
class Run:
    """Everything that a step touches on this process."""

    config: RunConfig
    process: Process
    grid: Grid
    stages: list[ECDiT]
    pipeline: Pipeline
    engine: Engine
    ema: Ema
    saver: checkpoint.Saver
    inputs: Inputs
    loader: Loader | EncodedLoader
    heldout_loader: Loader | EncodedLoader

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters under their global names."""
        return named_parameters(self.stages)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.inputs.image_shape


def named_parameters(stages: Sequence[ECDiT]) -> list[tuple[str, nn.Parameter]]:
    """The parameters of several stages; their names are global, so none comes twice."""
    return [named for stage in stages for named in stage.named_parameters()]


def read_inputs(config: RunConfig) -> Inputs:
    """Open the data and, for captions, the tokenizer. Writes nothing, communicates nothing.

    Raises ValueError naming the file or key for data that cannot be read or does not fit the model.
    """
    check_inputs(config)
    model = config.model
    if config.data.kind == "shards":
        mixture = open_mixture(config)
        by_class = model.conditioning == "class"
        return Inputs(mixture, mixture, Labels(model.classes) if by_class else StoredCaptions(mixture))
    train, heldout = (open_dataset(config.data, split, model.conditioning) for split in ("train", "heldout"))
    source = config.data.path or f"data.kind={config.data.kind}"
    wanted = (model.channels, model.image_size, model.image_size)
    if train.image_shape != wanted:
        channels, height, width = train.image_shape
        square = f"set model.channels={channels} and model.image_size={height}"
        raise ValueError(
            f"{source} has images of {channels} x {height} x {width}, the model expects "
            f"{model.channels} x {model.image_size} x {model.image_size}; "
            f"{square if height == width else 'only square images can be trained on'}"
        )
    if model.conditioning == "text":
        return Inputs(train, heldout, Captions(read_tokenizer(config, train.corpus()), config.text.length))
    largest = max(int(label) for dataset in (train, heldout) for label in dataset.corpus())
    if largest >= model.classes:
        raise ValueError(
            f"{source} has classes up to {largest}, model.classes={model.classes} has no room for them; "
            f"set model.classes={largest + 1}"
        )
    return Inputs(train, heldout, Labels(model.classes))


def read_tokenizer(config: RunConfig, corpus: Sequence[str]) -> Tokenizer:
    """The tokenizer that is named, else the one that the run began with, else that of `run.init_from`, whose weights
    know no other, else a new one of the corpus.
    """
    kept = config.directory / TOKENIZER_FILE
    if config.text.tokenizer:
        tokenizer = Tokenizer.load(Path(config.text.tokenizer).expanduser())
    elif kept.exists() and checkpoint.latest(config.directory / "checkpoints"):
        tokenizer = Tokenizer.load(kept)
    elif config.run.init_from:
        weights = Path(config.run.init_from).expanduser()
        locate(weights)  # a path that leads nowhere is another fault than a missing tokenizer
        beside = tokenizer_beside(weights)
        if beside is None:
            raise ValueError(
                f"run.init_from={weights} comes without {TOKENIZER_FILE}; set text.tokenizer to the one that it was "
                "trained with"
            )
        tokenizer = Tokenizer.load(beside)
    else:
        tokenizer = Tokenizer.train(corpus, config.text.vocabulary, config.text.pieces)
    if len(tokenizer) > config.text.vocabulary:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} pieces, text.vocabulary={config.text.vocabulary} has no room for "
            f"them; set text.vocabulary={len(tokenizer)}"
        )
    cut = tokenizer.too_long(corpus, config.text.length)
    if cut:
        logger.warning("%d captions are cut to text.length=%d tokens, such as %r", len(cut), config.text.length, cut[0])
    return tokenizer


def tokenizer_beside(weights: Path) -> Path | None:
    """The tokenizer of a run's folder, of an export, or of the run that a checkpoint, or its folder of them, is in."""
    for path in (weights.absolute(), weights.resolve()):  # a link's own place, and where it leads
        for folder in (path, path.parent, path.parent.parent):
            if (folder / TOKENIZER_FILE).is_file():
                return folder / TOKENIZER_FILE
    return None


def region_of(config: RunConfig, grid: Grid) -> Region:
    """How tokens lie between layers."""
    return CutTokens(grid["tp"]) if config.parallel.sequence else ReplicatedTokens(grid["tp"])


def build_stages(config: RunConfig, grid: Grid, device: torch.device) -> list[ECDiT]:
    """This rank's pipeline stages, cut, their weights not yet drawn or loaded."""
    parallel, group = config.parallel, grid["pp"]
    model = replace(config.model, routing_group=images_per_group(config))
    layers = partition(stage_costs(model, config.text, training_tokens(config)), group.size * parallel.stages_on_rank)
    if config.run.compile:
        prepare_compiler(device)
    stages = []
    for index in stage_indices(parallel.schedule, group.rank, group.size, parallel.stages_on_rank):
        stage = ECDiT(model, config.text, layers[index], region_of(config, grid), grid["ep"], config.run.recompute)
        stages.append(stage.to(device, config.dtype))
        if config.run.compile:
            for block in stage.blocks.values():
                block.compile(fullgraph=True, dynamic=False)
    return stages


def prepare_compiler(device: torch.device) -> None:
    """Settings of torch.compile that blocks need."""
    # Graphs of one block's code: kinds of block x sizes of images x with and without gradients. The defaults, 8 and
    # 256, are fewer than a data set of many aspect ratios makes.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 4096
    if device.type == "cpu":
        # torch 2.13's kernels for CPUs forget that they read what a scatter wrote; this pass then reads it too early.
        import torch._inductor.config as inductor  # seconds

        inductor.reorder_for_peak_memory = False


def mean_over(samples: int, balance_weight: float) -> LossFunction:
    """The loss of a microbatch: its samples' losses over the number of `samples` of the whole local batch."""

    def loss(output: Tensor | tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        if isinstance(output, Tensor):
            return velocity_loss(output, target).sum() / samples
        prediction, balance = output
        return (velocity_loss(prediction, target).sum() + balance_weight * balance.sum()) / samples

    return loss


def build_pipeline(
    config: RunConfig,
    stages: list[ECDiT],
    grid: Grid,
    device: torch.device,
    after_backward: Callable[[], None] = lambda: None,
) -> Pipeline:
    """The stages under their schedule; `after_backward` is told of each microbatch's gradients."""
    local_batch = config.data.global_batch // grid["dp"].size
    return Pipeline(
        stages,
        grid["pp"],
        device,
        num_microbatches(config, grid.layout),
        mean_over(local_batch, config.model.balance_loss),
        config.parallel.schedule,
        after_backward,
    )


def build_run(config: RunConfig, layout: Layout, inputs: Inputs, process: Process) -> Run:
    """Assemble a run, its groups first. Collective over the world."""
    grid = Grid(layout, process.rank)
    saver = checkpoint.Saver(
        config.directory / "checkpoints",
        config.checkpoint.keep,
        config.checkpoint.keep_every,
        config.checkpoint.async_,
    )
    return assemble_run(config, grid, inputs, process, saver, lambda name: init_of(name, config.model, config.text))


def assemble_run(
    config: RunConfig,
    grid: Grid,
    inputs: Inputs,
    process: Process,
    saver: checkpoint.Saver,
    start_of: Callable[[str], Init],
) -> Run:
    """A run over groups that exist; `start_of` says how the parameter of a global name starts. Collective over the
    grid.
    """
    stages = build_stages(config, grid, process.device)
    named = named_parameters(stages)
    # Weights depend on run.seed and their names alone. The engine copies them, so they come first.
    initialise(named, grid, config.run.seed, start_of)
    engine = create_engine(config.zero.stage, named, grid, config.optim, decays)

    def loader(dataset: Dataset | Mixture) -> Loader | EncodedLoader:
        seed, data, rank, size = config.run.seed, config.data, grid["dp"].rank, grid["dp"].size
        if isinstance(dataset, Mixture):
            return EncodedLoader(dataset, seed, rank, size, data.threads, data.ahead)
        return Loader(dataset, inputs.condition, seed, data.global_batch, rank, size)

    return Run(
        config=config,
        process=process,
        grid=grid,
        stages=stages,
        pipeline=build_pipeline(config, stages, grid, process.device, engine.accumulate),
        engine=engine,
        ema=Ema(engine, config.ema),
        saver=saver,
        inputs=inputs,
        loader=loader(inputs.train),
        heldout_loader=loader(inputs.heldout),
    )
