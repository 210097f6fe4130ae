"""A finished or running run, opened for sampling: the averaged weights of its newest checkpoint, in any layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megadit import checkpoint
from megadit.data.stored import StoredCaptions
from megadit.diffusion.sampler import Progress
from megadit.encoders.condition import Captions, Condition, FrozenCaptions, Labels, Told
from megadit.encoders.tokenizer import Tokenizer
from megadit.parallel.grid import Grid
from megadit.parallel.layout import Layout, ParallelConfig
from megadit.parallel.pipeline.schedule import Pipeline
from megadit.runtime.agreement import of_main, together
from megadit.runtime.launch import Process
from megadit.sampling.config import SampleConfig
from megadit.sampling.generate import generate
from megadit.sampling.prompts import check_prompts
from megadit.sampling.share import Round, rounds_of
from megadit.training.build import TOKENIZER_FILE, build_pipeline, build_stages, named_parameters
from megadit.training.config import (
    CONFIG_FILE,
    RunConfig,
    check_sizes,
    images_per_group,
    sampling_of,
)
from megadit.training.drawn import PICTURES_PER_CALL, read_drawn
from megadit.training.encoded import open_mixture, open_text_encoders
from megadit.training.state import logical_tensor

logger = logging.getLogger("megadit")

WARNINGS_SHOWN = 10


@dataclass(frozen=True)
class Sampler:
    """A network that draws pictures from prompts: captions, or numbers of classes.

    `draw` has every data-parallel rank draw the same pictures; `shares` and `draw_all` have each draw some.
    """

    config: RunConfig
    grid: Grid
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
        image_shape, settings = self._settled(settings, size)
        return generate(
            self.pipeline,
            self.condition,
            prompts,
            image_shape,
            settings,
            seed,
            self.config.dtype,
            first_index,
            self.group,
            progress,
        )

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for no prompts, for one that is empty, and for one that means nothing to the network."""
        check_prompts(prompts)
        self.condition.check(prompts)

    @property
    def writes(self) -> bool:
        """Whether this rank is the one, of those that hold a replica of the model, that writes what `shares` yields."""
        return self.grid["pp"].rank == 0 and self.grid["tp"].rank == 0

    def shares(
        self,
        prompts: Sequence[str],
        settings: SampleConfig,
        seed: int,
        *,
        batch: int | None = None,
        progress: Progress = iter,
        size: tuple[int, int] | None = None,
        there: Container[int] = (),
        drawn: Callable[[range], object] = lambda pictures: None,
    ) -> Iterator[tuple[range, Tensor]]:
        """This data-parallel rank's pictures, call after call: (indices into the prompts, their images [n, C, H, W]).

        Collective over the world, and so is every turn of the iteration: on every rank there are as many, and one where
        a rank has nothing to draw yields an empty range. Picture i is that of `draw`, whatever the number of ranks and
        the batch: its noise is a function of (seed, i).

        batch: pictures of one call on one rank, in whole routing groups. progress: wraps the steps of each call. size:
        as of `draw`. there: indices that need not be drawn, the same on every rank: a turn in which all ranks have such
        alone is left out, so that what is drawn has the neighbours that it would have had. drawn: told, after each
        turn, which pictures all ranks have drawn in it.

        Raises ValueError as `draw`, on every rank: before anything is drawn, but for pictures that are not finite.
        """
        rank = self.grid["dp"].rank
        rounds, draw = self._plan(prompts, settings, seed, batch, progress, size)

        def shares() -> Iterator[tuple[range, Tensor]]:
            for each in rounds:
                if all(index in there for index in each.pictures):
                    drawn(each.pictures)
                    continue
                images_BCHW, kept = draw(each.drawn(rank)), each.kept(rank)
                drawn(each.pictures)
                yield kept, images_BCHW[: len(kept)]

        return shares()

    def draw_all(
        self,
        prompts: Sequence[str],
        settings: SampleConfig,
        seed: int,
        *,
        batch: int | None = None,
        progress: Progress = iter,
        size: tuple[int, int] | None = None,
        drawn: Callable[[range], object] = lambda pictures: None,
        finish: Callable[[Tensor], Tensor] = lambda images_BCHW: images_BCHW,
    ) -> Tensor:
        """All pictures in the order of their prompts, [N, C, H, W], on every rank; arguments and errors as of `shares`.

        finish: what is made of each call's images by the rank that drew them, such as pixels of latents.
        """
        data_ranks, parts = self.grid["dp"], []
        rounds, draw = self._plan(prompts, settings, seed, batch, progress, size)
        for each in rounds:
            # Every rank's are as many, and they lie in the order of the ranks.
            images_BCHW = data_ranks.all_gather(finish(draw(each.drawn(data_ranks.rank))), dim=0)
            parts.append(images_BCHW[: len(each.pictures)])
            drawn(each.pictures)
        return torch.cat(parts)

    def _plan(
        self,
        prompts: Sequence[str],
        settings: SampleConfig,
        seed: int,
        batch: int | None,
        progress: Progress,
        size: tuple[int, int] | None,
    ) -> tuple[list[Round], Callable[[range], Tensor]]:
        """The rounds, and what draws a rank's part of one, filling and all. Raises what can be refused."""
        image_shape, settings = self._settled(settings, size)
        self.check(prompts)
        if self.grid.rank == 0:  # of other ranks' prompts, too
            warn(self.condition.warnings(list(dict.fromkeys(prompts))))

        def draw(indices: range) -> Tensor:
            own = [prompts[min(index, len(prompts) - 1)] for index in indices]
            with together():  # other ranks read other prompts, perhaps from files
                told = Told(self.condition, own)
            dtype, first = self.config.dtype, indices.start
            with together():  # one rank's pictures may hold infinities, after its last collective
                return generate(
                    self.pipeline, told, own, image_shape, settings, seed, dtype, first, self.group, progress
                )

        return rounds_of(len(prompts), self.group, self.grid["dp"].size, batch or PICTURES_PER_CALL), draw

    def _settled(
        self, settings: SampleConfig, size: tuple[int, int] | None
    ) -> tuple[tuple[int, int, int], SampleConfig]:
        """(the shape of an image of this size, what draws it). Raises ValueError for a size without whole patches."""
        channels, *square = self.image_shape
        height, width = size or square
        check_sizes(self.config, [(height, width)])
        return (channels, height, width), sampling_of(self.config, settings, (height, width))


def warn(warnings: Sequence[str]) -> None:
    """In the log, the first few of them."""
    for warning in warnings[:WARNINGS_SHOWN]:
        logger.warning("%s", warning)
    if len(warnings) > WARNINGS_SHOWN:
        logger.warning("and %d more like it", len(warnings) - WARNINGS_SHOWN)


def open_sampler(
    directory: Path,
    process: Process,
    parallel: ParallelConfig | None = None,
    online: bool = False,
    *,
    sample: Mapping[str, Any] | None = None,
    reads_prompts: bool = True,
) -> Sampler:
    """The sampler of a run's folder, on this process's place in `parallel` (one rank by default). Collective.

    online: text encoders that are not on this machine are downloaded. sample: fields of section `sample` that are to
    have other values. reads_prompts: False for who reads the run's data alone; of encoded data sets no text encoder is
    opened then, and prompts are numbers of stored captions.

    Raises ValueError on every rank: for settings, and a layout that the model or the number of processes does not
    allow, before a checkpoint is read, and naming the file for a folder that holds no run or no complete checkpoint,
    and for what reads its prompts and is not there.
    """
    with together():
        config = read_drawn(directory, process.world_size, parallel, sample)
    path = of_main(lambda: newest_checkpoint(directory))
    step = of_main(lambda: int(checkpoint.read_manifest(path)["step"]))
    read = config
    if config.data.kind == "shards" and not reads_prompts:
        read = replace(config, text=replace(config.text, kind="precomputed"))
    with together():
        condition = open_condition(read, directory, process.device, online)
    grid = Grid(Layout.of(config.parallel, process.world_size), process.rank)
    stages = build_stages(config, grid, process.device)
    load_averages(path, named_parameters(stages), grid)
    return Sampler(config, grid, build_pipeline(config, stages, grid, process.device), condition, step)


def newest_checkpoint(directory: Path) -> Path:
    """Of a run's folder. Raises ValueError where none is complete."""
    path = checkpoint.latest(directory / "checkpoints")
    if path is None:
        raise ValueError(f"{directory / 'checkpoints'}: no complete checkpoint; train the run first")
    return path


def warn_of_weights(path: Path) -> None:
    """In the log, of a checkpoint without averages."""
    logger.warning("%s holds no averages (ema.*): pictures are drawn with its weights, which are noisier", path)


@torch.no_grad()
def load_averages(path: Path, named: Sequence[tuple[str, nn.Parameter]], grid: Grid) -> None:
    """Fill the parameters with the checkpoint's averages; with its weights where it holds nothing else. Collective.

    Rounded to the parameters' precision, if the checkpoint has a finer one. Raises ValueError as `checkpoint.load`.
    """
    saved = of_main(lambda: {name: entry["dtype"] for name, entry in checkpoint.read_manifest(path)["tensors"].items()})
    kind = "ema" if any(name.startswith("ema.") for name in saved) else "weight"
    if kind == "weight":
        warn_of_weights(path)
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


def open_condition(config: RunConfig, directory: Path, device: torch.device, online: bool = False) -> Condition:
    """What the run's prompts mean: text, or a class's number, or that of a caption whose encoder is not named.

    Raises ValueError naming what is not there: the tokenizer's file, an encoder, the data set with the captions.
    """
    text = config.text
    if config.model.conditioning == "class":
        return Labels(config.model.classes)
    if text.kind == "builtin":
        tokenizer = directory / TOKENIZER_FILE
        if not tokenizer.exists():
            raise ValueError(
                f"{tokenizer} is missing: the run's weights know no other tokenizer; copy it here from where the run "
                "was trained"
            )
        return Captions(Tokenizer.load(tokenizer), text.length)
    if text.kind == "precomputed":
        return StoredCaptions(open_mixture(config))
    try:
        encoders = open_text_encoders(config, device, online)
    except ValueError as error:
        where = f"text.{' and text.'.join(text.kind.split('+'))} in {directory / CONFIG_FILE}"
        raise ValueError(f"{error}; {where} may name what reads the prompts") from error
    return FrozenCaptions(encoders, text.too_long)
