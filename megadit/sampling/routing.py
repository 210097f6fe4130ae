"""How many experts took each patch of the pictures that are being drawn, call by call of the network.

What is recorded stays on the device until it is read: drawing waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from megadit.diffusion.guidance import Guidance
from megadit.diffusion.sampler import Progress
from megadit.diffusion.timesteps import sampling_times
from megadit.model.config import ECDiTConfig
from megadit.model.ecdit import ECDiT
from megadit.model.moe import MoE
from megadit.parallel.grid import Group
from megadit.parallel.pipeline.schedule import Listener
from megadit.runtime.agreement import gathered
from megadit.sampling.config import Branch, SampleConfig

NO_BRANCH = (
    "there is no {} branch: no step is drawn without the prompt; set a guidance other than 1, between times that "
    "steps begin at"
)


class Recordable(Protocol):
    """What draws and can be recorded, such as a `Pipeline` (megadit.parallel.pipeline.schedule).

    stages: this process's. group: the ranks that hold the others. listeners: who is told of each call.
    """

    @property
    def stages(self) -> Sequence[nn.Module]: ...

    @property
    def group(self) -> Group: ...

    @property
    def listeners(self) -> list[Listener]: ...


class Call(NamedTuple):
    """One evaluation of the network, on the device.

    step: of sampling, from 0. timesteps_B: the time of each image. x_BCHW: what the network saw. takers: of each layer
    with experts on this rank, by global index, the number of experts that took each token, [B, T]. With guidance the
    first half of B are the conditional images and the second half the unconditional ones.
    """

    step: int
    timesteps_B: Tensor
    x_BCHW: Tensor
    takers: dict[int, Tensor]


@dataclass(frozen=True)
class Trace:
    """The routing of pictures that were drawn together, of all stages, on the host.

    grid: rows and columns of patches. layers: those with experts, by global index. steps, times: of each of N calls.
    x_NBCHW: what the network saw. conditional_NLBT: experts that took each patch. unconditional_NLBT: the same without
    a prompt, NaN for calls that had no such images.
    """

    experts: int
    grid: tuple[int, int]
    layers: tuple[int, ...]
    steps: tuple[int, ...]
    times: tuple[float, ...]
    x_NBCHW: Tensor
    conditional_NLBT: np.ndarray
    unconditional_NLBT: np.ndarray

    @property
    def firsts(self) -> list[int]:
        """The call that each step begins with, at the step's own time; Heun's second one looks ahead."""
        return [i for i, step in enumerate(self.steps) if i == 0 or step != self.steps[i - 1]]

    @property
    def is_guided(self) -> bool:
        """Whether any step began with unconditional images."""
        return not np.isnan(self.unconditional_NLBT[self.firsts]).all()

    def maps(self, branch: Branch = "conditional", image: int = 0) -> np.ndarray:
        """Experts that took each patch of an image in each step's first call, [S, L, T]; NaN where there was none.

        Raises ValueError if no step has the branch.
        """
        conditional_SLT = self.conditional_NLBT[self.firsts, :, image]
        unconditional_SLT = self.unconditional_NLBT[self.firsts, :, image]
        if branch != "conditional" and not self.is_guided:
            raise ValueError(NO_BRANCH.format(branch))
        return {
            "conditional": conditional_SLT,
            "unconditional": unconditional_SLT,
            "difference": conditional_SLT - unconditional_SLT,
        }[branch]


class Recording:
    """What `recorded` collects: a `Call` for each evaluation of the network."""

    def __init__(self, pipeline: Recordable) -> None:
        self.pipeline = pipeline
        self.calls: list[Call] = []
        self.size = (0, 0)  # of the images
        self._step = -1
        self._seen: dict[int, list[Tensor]] = {}

    def steps(self, progress: Progress = iter) -> Progress:
        """The progress to give a sampler, so that each call is known to belong to its step."""

        def counted(steps: Iterable[int]) -> Iterator[int]:
            for step in progress(steps):
                self._step = step
                yield step

        return counted

    def take(self, layer: int, moe: nn.Module, _: Any, output: Any) -> None:
        """A hook on a mixture of experts: keep who took its microbatch's tokens."""
        assert isinstance(moe, MoE)
        takers_GS = output[1].takers_GS
        # As int16: there are fewer experts than that, and there may be many calls.
        takers_BT = takers_GS.unflatten(1, (moe.images, -1)).flatten(0, 1).to(torch.int16)
        self._seen.setdefault(layer, []).append(takers_BT)

    def close_call(self, batch_BCHW: Tensor, keywords: dict[str, Any], microbatches: int) -> None:
        """A listener of the pipeline: the last `microbatches` of each layer are the call's."""
        assert self._step >= 0, "give the sampler Recording.steps(...) as its progress"
        takers = {layer: torch.cat(seen[-microbatches:])[: len(batch_BCHW)] for layer, seen in self._seen.items()}
        self._seen.clear()
        self.size = keywords["size"]
        self.calls.append(Call(self._step, keywords["timesteps_B"], batch_BCHW.detach(), takers))

    def trace(self, images: int) -> Trace:
        """All that was recorded of one drawing of so many images, those that filled its last group among them.

        On every rank. Collective over the pipeline's ranks.
        """
        calls, group = self.calls, self.pipeline.group
        assert calls and all(len(call.x_BCHW) in (images, 2 * images) for call in calls)
        own = [{layer: takers_BT.cpu().numpy() for layer, takers_BT in call.takers.items()} for call in calls]
        parts = gathered(own, group.handle) if group.size > 1 else [own]
        layers = sorted(layer for part in parts for layer in part[0])
        whole = [{layer: each for part in parts for layer, each in part[i].items()} for i in range(len(calls))]
        stacked = [np.stack([call[layer] for layer in layers]).astype(np.float32) for call in whole]
        config = _config_of(self.pipeline)
        return Trace(
            experts=config.experts,
            grid=(self.size[0] // config.patch, self.size[1] // config.patch),
            layers=tuple(layers),
            steps=tuple(call.step for call in calls),
            times=tuple(torch.stack([call.timesteps_B[0] for call in calls]).tolist()),
            x_NBCHW=torch.stack([call.x_BCHW[:images] for call in calls]).float().cpu(),
            conditional_NLBT=np.stack([each[:, :images] for each in stacked]),
            unconditional_NLBT=np.stack([_second_half(each, images) for each in stacked]),
        )


def _second_half(takers_LBT: np.ndarray, images: int) -> np.ndarray:
    """Those of the unconditional images; NaN if there are none."""
    return takers_LBT[:, images:] if takers_LBT.shape[1] > images else np.full_like(takers_LBT, np.nan)


def _config_of(pipeline: Recordable) -> ECDiTConfig:
    first = pipeline.stages[0]
    assert isinstance(first, ECDiT)
    return first.config


def check_experts(config: ECDiTConfig) -> None:
    """Raises ValueError, naming the key, for a model in which no layer has experts."""
    if config.has_experts:
        return
    why = f"model.experts={config.experts}"
    if config.experts and config.routing == "dense":
        why = "model.routing=dense"
    elif config.experts:
        why = f"model.moe_every={config.moe_every} and model.dense_first={config.dense_first} of {config.layers} layers"
    raise ValueError(
        f"no layer of this model has experts ({why}), so nothing is routed; "
        "take a run with model.experts of at least 1, in at least one layer"
    )


def check_branch(branch: Branch, settings: SampleConfig) -> None:
    """Raises ValueError for a branch that pictures of these settings have no map of, before they are drawn."""
    guidance = Guidance(settings.guidance, begin=settings.guidance_from, end=settings.guidance_until)
    begins = sampling_times(settings.steps, settings.shift)[:-1].tolist()
    if branch != "conditional" and not any(map(guidance.applies, begins)):
        raise ValueError(NO_BRANCH.format(branch))


@contextmanager
def recorded(pipeline: Recordable) -> Iterator[Recording]:
    """Records the routing of what `pipeline` draws inside the block; see `Recording`.

    Give `Recording.steps` to the sampler as its progress. Of the pipeline, not of its stages, for it alone knows which
    runs of a stage make up one call. Blocks that are compiled run as they are written meanwhile. Raises ValueError for
    a model without experts.
    """
    check_experts(_config_of(pipeline))
    recording = Recording(pipeline)
    with ExitStack() as stack:
        stack.enter_context(_eager(pipeline.stages))
        for layer, moe in _mixtures(pipeline.stages):
            stack.callback(moe.register_forward_hook(partial(recording.take, layer)).remove)
        pipeline.listeners.append(recording.close_call)
        stack.callback(pipeline.listeners.remove, recording.close_call)
        yield recording


def _mixtures(stages: Sequence[nn.Module]) -> Iterator[tuple[int, MoE]]:
    """This rank's mixtures of experts, by global layer index."""
    for stage in stages:
        assert isinstance(stage, ECDiT)
        for layer, block in stage.blocks.items():
            if isinstance(block.feedforward, MoE):
                yield int(layer), block.feedforward


def _eager(stages: Sequence[nn.Module]) -> AbstractContextManager[Any]:
    """A graph that was compiled before knows nothing of hooks."""
    compiled = any(module._compiled_call_impl is not None for stage in stages for module in stage.modules())
    # Not without need: importing the compiler takes seconds.
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
