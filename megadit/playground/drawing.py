"""A picture of a wish, with what its routing looked like: maps, colours, and numbers for each layer."""

from __future__ import annotations

import base64
import importlib.util
import io
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from megadit.pipeline.pipeline import ECDiTPipeline, PipelineOutput
from megadit.playground.wish import Wish
from megadit.sampling.config import BRANCHES, Branch
from megadit.sampling.evenness import Row, table
from megadit.sampling.heatmap import COLOURS, Scene, coloured, enlarged, mean_over_steps
from megadit.sampling.picture import as_png
from megadit.sampling.routing import Trace, check_experts

logger = logging.getLogger("megadit")

SHOWN = 384  # pixels of a map's longer side, at least
RAMP = 17  # colours that the page mixes a scale of
OnStep = Callable[[int], None]  # steps that are done


@dataclass(frozen=True)
class Drawing:
    """What was drawn. maps: of each branch that was evaluated; none where nothing is routed. rows: for each layer.

    seconds: that drawing took. warnings: what whoever wrote the wish should know.
    """

    wish: Wish
    picture: Image.Image
    seconds: float
    warnings: list[str]
    maps: Mapping[Branch, Scene] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def overlay(self, branch: Branch, layer: int, step: int | None) -> Image.Image:
        """The map of a layer over the picture; of a step from 0, or (None) the mean over all.

        Raises ValueError naming what there is not.
        """
        if branch not in self.maps:
            raise ValueError(f"there is no map {branch!r}; this drawing has: {', '.join(self.maps) or 'none'}")
        scene = self.maps[branch]
        if layer not in scene.layers:
            known = ", ".join(map(str, scene.layers))
            raise ValueError(f"layer {layer} has no experts; those of this model have: {known}")
        if step is not None and not 0 <= step < len(scene.times):
            raise ValueError(f"there is no step {step}; this drawing has steps 0 to {len(scene.times) - 1}")
        row = scene.layers.index(layer)
        values_T = mean_over_steps(scene.maps_SLT)[row] if step is None else scene.maps_SLT[step, row]
        return scene.cell(values_T, enlarged(self.picture.size, SHOWN))

    def told(self) -> dict[str, Any]:
        """What the page is told, as JSON has it."""
        scenes = list(self.maps.values())
        return {
            **asdict(self.wish),
            "pictures": [data_url(self.picture)],
            "size": self.picture.size,
            "seconds": self.seconds,
            "warnings": self.warnings,
            "layers": list(scenes[0].layers) if scenes else [],
            "times": list(scenes[0].times) if scenes else [],
            "branches": {branch: scale_of(scene) for branch, scene in self.maps.items()},
            "evenness": [row.columns for row in sorted(self.rows, key=lambda row: row.layer)],
        }


def no_maps(pipe: ECDiTPipeline) -> str:
    """Why this model has no heat maps; "" if it has."""
    try:
        check_experts(pipe.parts.config.model)
    except ValueError as error:
        return str(error).partition(";")[0]
    if importlib.util.find_spec("matplotlib") is None:
        return "the colours of the maps need matplotlib: pip install -e '.[plots]'"
    return ""


def draw(pipe: ECDiTPipeline, wish: Wish, on_step: OnStep) -> Drawing:
    """Draw a wish as `pipe` draws it, and record its routing, if there is any.

    on_step: told after each step how many are done. Raises ValueError for a prompt that means nothing and for a
    picture that is not finite.
    """
    began = time.monotonic()
    with warnings_heard() as warnings:
        if no_maps(pipe):
            picture, trace = picture_of(pipe, wish, on_step), None
        else:
            with pipe.recorded() as recording:
                picture = picture_of(pipe, wish, on_step)
            trace = recording.trace(images=pipe.group)
    drawing = Drawing(wish, picture, time.monotonic() - began, warnings)
    return drawing if trace is None else with_maps(drawing, trace)


def picture_of(pipe: ECDiTPipeline, wish: Wish, on_step: OnStep) -> Image.Image:
    """One picture; of latents that nothing here decodes, their first channel."""
    default = pipe.scheduler
    is_shown = pipe.parts.autoencoder is not None or pipe.parts.config.model.channels in (1, 3)

    def callback(pipe: ECDiTPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        on_step(step + 1)

    try:
        pipe.sampler = wish.sampler
        output = pipe(
            wish.prompt,
            negative_prompt=wish.negative or None,
            num_inference_steps=wish.steps,
            guidance_scale=wish.guidance,
            generator=wish.seed,
            output_type="pil" if is_shown else "latent",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=(),
        )
    finally:
        pipe.scheduler = default
    assert isinstance(output, PipelineOutput)
    (image,) = output.images
    if is_shown:
        return image
    logger.warning("the picture is the first of %d channels of latents: no autoencoder is named", len(image))
    return as_png(image)


def with_maps(drawing: Drawing, trace: Trace) -> Drawing:
    """A drawing with its routing."""
    branches = BRANCHES if trace.is_guided else BRANCHES[:1]
    maps: dict[Branch, Scene] = {
        branch: Scene(
            maps_SLT=trace.maps(branch),
            layers=trace.layers,
            times=[trace.times[i] for i in trace.firsts],
            grid=trace.grid,
            experts=trace.experts,
            branch=branch,
            frames=[drawing.picture],
            title=drawing.wish.prompt,
            about="",
        )
        for branch in branches
    }
    rows = table(trace.maps(), trace.layers, trace.maps("difference") if trace.is_guided else None)
    return replace(drawing, maps=maps, rows=rows)


def scale_of(scene: Scene) -> dict[str, Any]:
    """Of a branch: what its colours stand for, and in which steps there is a map."""
    low, high = scene.scale
    ramp = coloured(np.linspace(low, high, RAMP), low, high, COLOURS[scene.branch])
    # Mixed with grey as those of the maps are, on average.
    mixed = np.rint(scene.alpha * ramp + (1 - scene.alpha) * 127).astype(int)
    return {
        "low": low,
        "high": high,
        "label": scene.label.replace("\n", " "),
        "colours": ["#" + "".join(f"{part:02x}" for part in colour) for colour in mixed.tolist()],
        "steps": (~np.isnan(scene.maps_SLT).any(axis=(1, 2))).tolist(),
    }


def png_of(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


def data_url(picture: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png_of(picture)).decode()


class Hearer(logging.Handler):
    """Collects what is warned of in one thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []
        self.thread_id = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread_id:
            self.heard.append(record.getMessage())


@contextmanager
def warnings_heard() -> Iterator[list[str]]:
    """What this thread warns of, inside the block, in the log of megadit."""
    hearer = Hearer()
    logger.addHandler(hearer)
    try:
        yield hearer.heard
    finally:
        logger.removeHandler(hearer)
