"""Pictures of a routing: how many experts pick each patch, as colours over the picture that was drawn.

As in EC-DiT (arXiv 2410.02098), whose heat maps show which parts of a picture get more computation. The colours of
counts differ in lightness too, so that they are told apart without seeing hue, and in print.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megadit.sampling.picture import as_png
from megadit.sampling.routing import Branch

COLOURS = {"conditional": "viridis", "unconditional": "viridis", "difference": "PuOr_r"}
MISSING = (200, 200, 200)  # where a step has no map
ALPHA = 0.65  # of the colours over the picture
SECOND = "#52514e"  # ink of what is read second

Bar = Callable[[Iterable[Any]], Iterable[Any]]


def coloured(values: np.ndarray, low: float, high: float, colours: str = "viridis") -> np.ndarray:
    """The colour of each value on a scale from `low` to `high`, uint8 [..., 3]; grey for NaN."""
    import matplotlib

    part = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
    rgb = (matplotlib.colormaps[colours](np.nan_to_num(part))[..., :3] * 255).round().astype(np.uint8)
    return np.where(np.isnan(values)[..., None], np.array(MISSING, np.uint8), rgb)


def resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """To (width, height): larger pixels with sharp edges, or means of several."""
    larger = size[0] >= picture.width and size[1] >= picture.height
    return picture.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.BOX)


def overlay(
    picture: Image.Image | None,
    takers_T: np.ndarray | Tensor,
    grid: tuple[int, int],
    experts: float,
    *,
    low: float = 0.0,
    colours: str = "viridis",
    alpha: float = ALPHA,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """The map of one layer and step in colours over the picture in grey, RGB; without a picture, the colours alone.

    takers_T: experts that picked each of grid = (rows, columns) patches, row by row. experts: what the brightest colour
    stands for: the model's experts, or the most that any patch has, to see more; `low`: the darkest one. size: (width,
    height) of the result; default: whole pixels of picture and patches, at least 256 on the longer side.

    Raises ValueError for a grid that has another number of patches.
    """
    rows, columns = grid
    takers = np.asarray(takers_T, dtype=np.float64)
    if takers.size != rows * columns:
        raise ValueError(f"{takers.size} patches are not {rows} rows of {columns}")
    width, height = size or enlarged((columns, rows) if picture is None else picture.size)
    map_ = resized(Image.fromarray(coloured(takers.reshape(grid), low, experts, colours)), (width, height))
    if picture is None:
        return map_
    return Image.blend(softened(resized(picture.convert("L"), (width, height))).convert("RGB"), map_, alpha)


def softened(grey: Image.Image) -> Image.Image:
    """Half of the contrast: a picture under colours is there to be recognised, and should not change what they say."""
    return grey.point([64 + value // 2 for value in range(256)])


def enlarged(size: tuple[int, int], least: int = 256) -> tuple[int, int]:
    """A whole multiple of (width, height) whose longer side has `least` pixels or more.

    >>> enlarged((8, 4)), enlarged((10, 10)), enlarged((300, 200))
    ((256, 128), (260, 260), (300, 200))
    """
    times = max(1, math.ceil(least / max(size)))
    return size[0] * times, size[1] * times


@dataclass(frozen=True)
class Scene:
    """What the figures show. Of S steps and L layers.

    maps_SLT: experts of each patch, or differences. frames: S + 1, what each step began from and the finished picture.
    title, about: what was drawn, and how. alpha: of the colours over the picture; 1 is the colours alone.
    """

    maps_SLT: np.ndarray
    layers: Sequence[int]
    times: Sequence[float]
    grid: tuple[int, int]
    experts: int
    branch: Branch
    frames: Sequence[Image.Image]
    title: str
    about: str
    alpha: float = ALPHA

    @property
    def scale(self) -> tuple[float, float]:
        """What the two ends of the colours stand for: the same in all maps of the scene."""
        if self.branch == "difference":
            most = max(1.0, float(np.nanmax(np.abs(self.maps_SLT))))
            return -most, most
        return 0.0, max(1.0, float(np.nanmax(self.maps_SLT)))

    @property
    def label(self) -> str:
        """Of the colour bar."""
        if self.branch == "difference":
            return "experts more (+) or fewer (−)\nwith the prompt than without"
        told = "" if self.branch == "conditional" else " (drawn without the prompt)"
        return f"experts that pick a patch, of {self.experts}{told}"

    def cell(self, values_T: np.ndarray, size: tuple[int, int]) -> Image.Image:
        """One map, over the finished picture."""
        (low, high), colours, alpha = self.scale, COLOURS[self.branch], self.alpha
        picture = self.frames[-1] if alpha < 1 else None
        return overlay(picture, values_T, self.grid, high, low=low, colours=colours, alpha=alpha, size=size)


def mean_over_steps(maps_SLT: np.ndarray) -> np.ndarray:
    """[L, T]; steps without a map count nowhere."""
    with_map = ~np.isnan(maps_SLT).any(axis=(1, 2))
    return maps_SLT[with_map].mean(axis=0)


def spread_steps(steps: int, count: int) -> list[int]:
    """`count` of the steps, the first and the last among them, evenly between.

    >>> spread_steps(20, 5), spread_steps(3, 5), spread_steps(9, 1)
    ([0, 5, 10, 14, 19], [0, 1, 2], [0])
    """
    return sorted({round(place) for place in np.linspace(0, steps - 1, min(count, steps)).tolist()})


@dataclass(frozen=True)
class Plan:
    """Where things lie on a figure, all in pixels from its upper left corner. Cells are (width, height)."""

    cell: tuple[int, int]
    rows: int
    columns: int
    picture: tuple[int, int]
    names: int  # width of the rows' names
    head: int = 74  # height of title and columns' names
    gap: int = 8
    margin: int = 24
    under: int = 16  # between rows, for names above cells

    @property
    def left(self) -> int:
        """Where the cells begin."""
        return self.margin + self.picture[0] + self.names

    @property
    def top(self) -> int:
        """Where cells and picture begin."""
        return self.margin + self.head

    @property
    def width(self) -> int:
        return self.left + self.columns * (self.cell[0] + self.gap) - self.gap + self.margin

    @property
    def height(self) -> int:
        cells = self.rows * (self.cell[1] + self.under) - self.under
        return self.top + max(cells, self.picture[1] + 104) + self.margin

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """(left, top, width, height) of a cell."""
        left = self.left + column * (self.cell[0] + self.gap)
        return left, self.top + row * (self.cell[1] + self.under), *self.cell


def cell_size(grid: tuple[int, int], longer: int = 128) -> tuple[int, int]:
    """(width, height) of a map in which every patch has the same whole number of pixels.

    >>> cell_size((4, 4)), cell_size((16, 24)), cell_size((10, 10))
    ((128, 128), (144, 96), (130, 130))
    """
    return enlarged((grid[1], grid[0]), longer)


class Canvas:
    """A figure whose things lie at whole pixels, so that patches and pixels stay sharp."""

    DPI = 100

    def __init__(self, plan: Plan) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.plan = plan
        self.figure = Figure(figsize=(plan.width / self.DPI, plan.height / self.DPI), dpi=self.DPI, facecolor="white")
        self.agg = FigureCanvasAgg(self.figure)

    def axes(self, box: tuple[int, int, int, int]) -> Any:
        """Axes in a box of (left, top, width, height)."""
        left, top, width, height = box
        whole = self.plan
        bottom = whole.height - top - height
        return self.figure.add_axes(
            (left / whole.width, bottom / whole.height, width / whole.width, height / whole.height)
        )

    def image(self, picture: Image.Image, box: tuple[int, int, int, int]) -> Any:
        """Show a picture in a box of its own size, pixel by pixel. Returns what `show` changes."""
        axes = self.axes(box)
        axes.set_axis_off()
        return axes.imshow(np.asarray(picture.convert("RGB")), interpolation="none", aspect="auto")

    def text(self, left: float, top: float, words: str, **style: Any) -> Any:
        """Words at a place; by default they hang from it."""
        style = {"fontsize": 9, "va": "top", "parse_math": False, **style}  # a prompt's dollars are no formula
        return self.figure.text(left / self.plan.width, 1 - top / self.plan.height, words, **style)

    def drawn(self) -> Image.Image:
        self.agg.draw()
        return Image.fromarray(np.asarray(self.agg.buffer_rgba())[..., :3].copy())


def _colour_bar(canvas: Canvas, scene: Scene) -> None:
    """Below the picture, with numbers. Its colours are mixed with grey as those of the maps are on average."""
    from matplotlib.ticker import MaxNLocator

    plan, (low, high) = canvas.plan, scene.scale
    width, height = plan.picture[0], 12
    ramp = coloured(np.linspace(low, high, width)[None].repeat(height, axis=0), low, high, COLOURS[scene.branch])
    axes = canvas.axes((plan.margin, plan.top + plan.picture[1] + 30, width, height))
    mixed = Image.blend(Image.new("RGB", (width, height), (127, 127, 127)), Image.fromarray(ramp), scene.alpha)
    axes.imshow(np.asarray(mixed), interpolation="none", aspect="auto", extent=(low, high, 0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=9, length=3)
    axes.set_yticks([])
    axes.set_frame_on(False)
    axes.set_xlabel(scene.label, fontsize=9)


def _picture_size(picture: Image.Image, longer: int = 280) -> tuple[int, int]:
    """(width, height) in which it is shown: its pixels a whole number of times, or fewer of them."""
    times = longer / max(picture.size)
    times = math.floor(times) if times >= 1 else times
    return round(picture.width * times), round(picture.height * times)


def _frame_work(scene: Scene, plan: Plan) -> tuple[Canvas, Any, Any]:
    """A canvas with title, picture and colour bar: (canvas, the picture, the words above it)."""
    canvas, room = Canvas(plan), plan.width - 2 * plan.margin
    canvas.text(plan.margin, plan.margin - 8, _short(scene.title, room // 10), fontsize=13)
    canvas.text(plan.margin, plan.margin + 16, _short(scene.about, room // 7), color=SECOND)
    box = (plan.margin, plan.top, *plan.picture)
    picture = canvas.image(resized(scene.frames[-1], plan.picture), box)
    above = canvas.text(plan.margin, plan.top - 6, "the finished picture", va="bottom")
    _colour_bar(canvas, scene)
    return canvas, picture, above


def _short(words: str, letters: int) -> str:
    return textwrap.shorten(words, letters, placeholder=" …") if len(words) > letters else words


def sheet(scene: Scene, steps: Sequence[int], notes: Sequence[str]) -> tuple[Image.Image, Plan]:
    """A row for each layer, a column for each of `steps`, then their mean over all steps; and where things lie.

    notes: what is said below the name of each layer.
    """
    cell, mean_LT = cell_size(scene.grid), mean_over_steps(scene.maps_SLT)
    plan = Plan(cell, len(scene.layers), len(steps) + 1, _picture_size(scene.frames[-1]), names=96)
    canvas, _, _ = _frame_work(scene, plan)
    titles = [f"step {step + 1}\nt = {scene.times[step]:.2f}" for step in steps]
    for column, title in enumerate([*titles, f"mean of all\n{len(scene.times)} steps"]):
        left, top, width, _ = plan.box(0, column)
        canvas.text(left + width / 2, top - 6, title, ha="center", va="bottom")
    for row, (layer, note) in enumerate(zip(scene.layers, notes, strict=True)):
        left, top, _, height = plan.box(row, 0)
        canvas.text(left - 10, top + height / 2 - 2, f"layer {layer}", ha="right", va="bottom", fontsize=10)
        canvas.text(left - 10, top + height / 2 + 2, note, ha="right", va="top", fontsize=8, color=SECOND)
        for column, values_T in enumerate([*(scene.maps_SLT[step, row] for step in steps), mean_LT[row]]):
            canvas.image(scene.cell(values_T, cell), plan.box(row, column))
    return canvas.drawn(), plan


def animation(scene: Scene) -> Iterator[Image.Image]:
    """A frame for each step, the picture beside the layers' maps; and one of the finished picture and the means."""
    count = len(scene.layers)
    columns = min(count, max(2, math.ceil(math.sqrt(2 * count))))
    rows = -(-count // columns)
    size = _picture_size(scene.frames[-1])
    cell = cell_size(scene.grid, max(120, size[1] // rows - Plan.under))  # as high as the picture, if they are few
    plan = Plan(cell, rows, columns, size, names=32)
    canvas, picture, above = _frame_work(scene, plan)
    shown = []
    for place, layer in enumerate(scene.layers):
        left, top, width, height = plan.box(*divmod(place, columns))
        shown.append(canvas.image(Image.new("RGB", cell), (left, top, width, height)))
        canvas.text(left + width / 2, top - 2, f"layer {layer}", ha="center", va="bottom", fontsize=8)
    steps = len(scene.times)
    maps = [*scene.maps_SLT, mean_over_steps(scene.maps_SLT)]
    names = [f"step {i + 1} of {steps}, t = {time:.2f}" for i, time in enumerate(scene.times)]
    for maps_LT, frame, name in zip(maps, scene.frames, [*names, "finished; maps: means over steps"], strict=True):
        above.set_text(name)
        picture.set_data(np.asarray(resized(frame, size).convert("RGB")))
        for image, values_T in zip(shown, maps_LT, strict=True):
            image.set_data(np.asarray(scene.cell(values_T, cell)))
        yield canvas.drawn()


def save_animation(scene: Scene, path: Path, progress: Bar = iter, seconds: float = 8.0) -> None:
    """Write a GIF, WebP or APNG, as the name's ending says, that plays again and again; its last frame stays longest.

    seconds: of the steps together, about.
    """
    frames = list(progress(animation(scene)))
    each = int(min(600, max(60, 1000 * seconds / len(frames))))
    durations = [*[each] * (len(frames) - 1), 2000]  # milliseconds
    kinds: dict[str, dict[str, Any]] = {".webp": {"lossless": True}, ".apng": {"format": "PNG"}}
    special = kinds.get(path.suffix, {})
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0, duration=durations, **special)


def decoded(frames_SCHW: Tensor, decode: Callable[[Tensor], Tensor], progress: Bar = iter) -> list[Image.Image]:
    """Pictures of latents, one after the other; `decode` takes and gives [1, C, H, W]."""
    with torch.no_grad():
        return [as_png(decode(latent)[0]) for latent in progress(frames_SCHW.split(1))]
