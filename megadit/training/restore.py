"""A finished or running run, opened for sampling: the averaged weights of its newest checkpoint, in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megadit import checkpoint
from megadit.diffusion.sampler import Progress
from megadit.encoders.tokenizer import Tokenizer
from megadit.parallel.grid import Grid, ParallelConfig
from megadit.parallel.pipeline.schedule import Pipeline
from megadit.runtime.launch import Process
from megadit.sampling.generate import SampleConfig, generate
from megadit.training.build import TOKENIZER_FILE, build_model, build_pipeline
from megadit.training.config import CONFIG_FILE, RunConfig, check, load_config
from megadit.training.state import logical_tensor


@dataclass(frozen=True)
class Sampler:
    """A network that draws pictures from captions."""

    config: RunConfig
    pipeline: Pipeline
    tokenizer: Tokenizer
    step: int  # of the checkpoint

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        model = self.config.model
        return model.channels, model.image_size, model.image_size

    def draw(
        self, prompts: Sequence[str], settings: SampleConfig, seed: int, first_index: int = 0, progress: Progress = iter
    ) -> Tensor:
        """One image per prompt, [B, C, H, W]; see `generate`."""
        return generate(
            self.pipeline,
            self.tokenizer,
            prompts,
            self.image_shape,
            self.config.text.length,
            settings,
            seed,
            self.config.dtype,
            first_index,
            progress,
        )


def open_sampler(directory: Path, process: Process, parallel: ParallelConfig | None = None) -> Sampler:
    """The sampler of a run's folder, on this process's place in `parallel` (one rank by default). Collective.

    Raises ValueError naming the file for a folder that holds no run or no complete checkpoint.
    """
    config = load_config(directory / CONFIG_FILE)
    path = checkpoint.latest(directory / "checkpoints")
    if path is None:
        raise ValueError(f"{directory / 'checkpoints'}: no complete checkpoint; train the run first")
    # The batch of training has no meaning here; any that fits the layout will do.
    data = replace(config.data, global_batch=process.world_size, micro_batch=1)
    config = replace(config, parallel=parallel or ParallelConfig(), data=data)
    grid = Grid(check(config, process.world_size), process.rank)
    model = build_model(config, grid, process.device)
    wanted = {f"ema.{name}": logical_tensor(parameter, grid) for name, parameter in model.named_parameters()}
    checkpoint.load(path, wanted)
    tokenizer = Tokenizer.load(directory / TOKENIZER_FILE)
    step = int(checkpoint.read_manifest(path)["step"])
    return Sampler(config, build_pipeline(config, model, grid, process.device), tokenizer, step)
