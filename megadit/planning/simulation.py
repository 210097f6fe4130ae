"""One process plays one rank of a world of any size: production code, torch's fake process group, the meta device.

Everything is the code that trains, but for four things that cannot run without numbers or neighbours: the weights are
not drawn, the batch is blank, pipeline stages are told their shapes instead of asking one another, and DeepSpeed's
engine is replaced by `SimulatedZero`, which holds and sends the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megadit.data.batch import Batch
from megadit.model.ecdit import carry_like
from megadit.model.positions import rotary_positions, sincos_positions
from megadit.model.weights import decays
from megadit.parallel.grid import Grid
from megadit.parallel.layout import Layout
from megadit.parallel.pipeline.schedule import Pipeline, Stage
from megadit.planning.meter import Meter, Peaks, fused_attention
from megadit.runtime.launch import Process
from megadit.training.build import Inputs, Run, build_stages, mean_over, named_parameters, region_of
from megadit.training.config import RunConfig, num_microbatches, training_tokens
from megadit.training.ema import Ema
from megadit.zero import create_engine
from megadit.zero.simulated import SimulatedZero

META = torch.device("meta")
Carries = tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """A process group in which this process is `rank` and the others do not exist: collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg

    # torch's own name for it does not list the meta device, which batched sends ask for.
    dist.Backend.register_backend("simulated", _create_fake_pg, extended_api=True, devices=["cpu", "meta"])
    if dist.is_initialized():
        raise RuntimeError("this process has a process group already; a simulation needs one of its own")
    dist.init_process_group("simulated", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Stage(Stage):
    """A stage that was told its shapes, as all of them were: there is nothing to vote on."""

    meter: Meter

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        return torch.ones(1, dtype=torch.int32)

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        return torch.ones(1, dtype=torch.int32)

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        self._claim(self.args_recv_info)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(num_microbatches)
        self._claim(self.grad_recv_info)

    def _claim(self, infos: dict[int, tuple[Any, ...]]) -> None:
        """The places for what is received are made before the first step, for every microbatch, and stay."""
        self.meter.claim("buffers", [i.buffer for row in infos.values() for i in row if i.buffer is not None])


class SimulatedPipeline(Pipeline):
    """A pipeline whose stages are told the shapes that they hand on."""

    stage_class = _Stage

    def __init__(self, *args: Any, carries: Carries, meter: Meter, **kwargs: Any) -> None:
        """`carries`: of a microbatch, the first stage's input, what stages hand on, the last one's output."""
        super().__init__(*args, **kwargs)
        self.carries, self.meter = carries, meter
        self.peaks: Peaks | None = None  # of the last step's forward and backward passes

    def _stage(self, index: int, module: nn.Module, **shapes: tuple[Tensor, ...]) -> Stage:
        image, between, output = self.carries
        shapes = {
            "input_args": image if index == 0 else between,
            "output_args": output if index == self.num_stages - 1 else between,
        }
        stage = super()._stage(index, module, **shapes)
        assert isinstance(stage, _Stage)
        stage.meter = self.meter
        return stage

    def train(self, batch: Tensor, target: Tensor, keywords: dict[str, Any]) -> Tensor:
        self.meter.take_peaks()
        loss = super().train(batch, target, keywords)
        self.peaks = self.meter.take_peaks()  # those of the optimizer are looked at by themselves
        return loss


@dataclass(frozen=True)
class _Nothing:
    """The condition of a blank batch."""

    nothing: dict[str, Tensor]


class _BlankLoader:
    """Batches of zeros in the shapes of this rank's share."""

    def __init__(self, config: RunConfig, grid: Grid) -> None:
        self.config, self.size = config, config.data.global_batch // grid["dp"].size
        self.condition = _Nothing(blank_condition(config, 1))

    def batch(self, step: int) -> Batch:
        model = self.config.model
        latents = torch.zeros(self.size, model.channels, model.image_size, model.image_size)
        return Batch(torch.arange(self.size), latents, blank_condition(self.config, self.size))


def blank_condition(config: RunConfig, images: int) -> dict[str, Tensor]:
    """What the network is told of so many images, all zeros."""
    text = config.text
    if config.model.conditioning == "class":
        return {"labels_B": torch.zeros(images, dtype=torch.int64)}
    mask = torch.ones(images, text.length, dtype=torch.bool)
    told = {"text_mask_BL": mask}
    if text.is_frozen:
        told["text_states_BLC"] = torch.zeros(images, text.length, text.channels, dtype=config.dtype)
    else:
        told["text_ids_BL"] = torch.zeros(images, text.length, dtype=torch.int64)
    if text.pooled:
        told["text_pooled_BP"] = torch.zeros(images, text.pooled, dtype=config.dtype)
    return told


@contextmanager
def simulated(config: RunConfig, layout: Layout, rank: int) -> Iterator[tuple[Run, Meter]]:
    """The run that this rank would build, on the meta device, watched by a meter from its first tensor on.

    `train_step(run, step)` then makes a step. Needs a process group (`fake_world`).
    """
    grid = Grid(layout, rank)
    meter = Meter(grid, META)
    for positions in (sincos_positions, rotary_positions):
        positions.cache_clear()  # so that the meter sees them
    images = config.data.global_batch // layout.dp // num_microbatches(config, layout)
    shapes = carries(config, images, grid)
    with meter, fused_attention():
        yield build_simulated(config, grid, meter, shapes), meter


def build_simulated(config: RunConfig, grid: Grid, meter: Meter, shapes: Carries) -> Run:
    """As `training.build.build_run`, without numbers."""
    with META:
        stages = build_stages(config, grid, META)
    named = named_parameters(stages)
    meter.claim("weights", [parameter for _, parameter in named])
    for _, parameter in named:
        parameter.register_post_accumulate_grad_hook(lambda p: meter.claim("gradients", [p.grad]))
    if config.zero.stage == 0:
        engine: Any = create_engine(0, named, grid, config.optim, decays)
        meter.claim("moments", [fragment.flat for fragment in engine.fragments()])
    else:
        engine = SimulatedZero(named, grid, config.optim, decays, config.zero.stage, claim=meter.claim)
    ema = Ema(engine, config.ema)
    meter.claim("ema", [average.flat for average in ema.averages])

    def after_backward() -> None:
        # The halves of a split backward pass put gradients there by hand.
        meter.claim("gradients", [p.grad for _, p in named if p.grad is not None])
        with meter.making("gradients"):
            engine.accumulate()

    loader: Any = _BlankLoader(config, grid)
    pipeline = SimulatedPipeline(
        stages,
        grid["pp"],
        META,
        num_microbatches(config, grid.layout),
        mean_over(loader.size, config.model.balance_loss),
        config.parallel.schedule,
        after_backward,
        carries=shapes,
        meter=meter,
    )
    return Run(
        config=config,
        process=Process(grid.rank, grid["world"].size, 0, META),
        grid=grid,
        stages=stages,
        pipeline=pipeline,
        engine=engine,
        ema=ema,
        saver=None,  # type: ignore[arg-type]  # nothing is saved
        inputs=Inputs(None, None, loader.condition),  # type: ignore[arg-type]  # a blank batch needs no data set
        loader=loader,
        heldout_loader=loader,
    )


def output_like(config: RunConfig, image_BCHW: Tensor) -> Tensor:
    """What the network makes of these images in training, uninitialised: images, or the patches that it sees."""
    model, tokens = config.model, training_tokens(config)
    images, _, height, width = image_BCHW.shape
    if tokens < model.tokens:
        return image_BCHW.new_empty(images, tokens, model.output_channels * model.patch**2)
    return image_BCHW.new_empty(images, model.output_channels, height, width)


def carries(config: RunConfig, images: int, grid: Grid) -> Carries:
    """Of a microbatch: the first stage's input, the carry, the last stage's output; on the meta device."""
    model = config.model
    size = model.image_size
    with META:
        image = torch.empty(images, model.channels, size, size, dtype=config.dtype)
        between = carry_like(model, config.text, image, region_of(config, grid), training_tokens(config))
        output = output_like(config, image).requires_grad_()
    balance = between[-1:] if model.has_balance_loss else ()
    return (image,), between, (output, *balance)
