"""Heat maps: the colours of patches, where they lie, and the frames of an animation."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from megadit.sampling.heatmap import (
    Plan,
    Scene,
    animation,
    cell_size,
    coloured,
    decoded,
    mean_over_steps,
    overlay,
    save_animation,
    sheet,
)
from megadit.sampling.picture import as_png
from tests.sampling.test_routing import COUNTS

# Matplotlib's viridis at 0, 1/4, 1/2, 3/4 and 1.
VIRIDIS = [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]
WHITE = Image.new("L", (8, 8), 255)
# The planted routing of a drawing of three steps: early, early, late.
PLANTED = np.array([[COUNTS[layer, when] for layer in (1, 3)] for when in ("early", "early", "late")], dtype=np.float32)


def scene_of(**changes):
    frames = [Image.new("L", (8, 8), value) for value in (10, 90, 170, 250)]
    given = {
        "maps_SLT": PLANTED,
        "layers": [1, 3],
        "times": [1.0, 0.75, 0.5],
        "grid": (4, 4),
        "experts": 4,
        "branch": "conditional",
        "frames": frames,
        "title": "seven",
        "about": "run",
        "alpha": 1.0,
    }
    return Scene(**{**given, **changes})


def middles(pixels, grid):
    """The pixel in the middle of each patch, and whether its whole inside is alike."""
    rows, columns = grid
    parts = [part for row in np.split(pixels, rows) for part in np.split(row, columns, axis=1)]
    assert all((part == part[0, 0]).all() for part in parts), "patches have sharp edges"
    return [tuple(part[0, 0].tolist()) for part in parts]


@pytest.mark.parametrize(("layer", "when"), COUNTS)
def test_a_patch_has_the_colour_of_its_count(layer, when):
    counts = COUNTS[layer, when]
    map_ = overlay(None, counts, (4, 4), 4)
    assert map_.mode == "RGB" and min(map_.size) >= 256
    assert middles(np.asarray(map_), (4, 4)) == [VIRIDIS[count] for count in counts]


@pytest.mark.parametrize(("grey", "under"), [(0, 64), (255, 191)])
def test_over_a_picture_the_colours_are_mixed_with_its_softened_grey(grey, under):
    map_ = overlay(Image.new("RGB", (8, 8), (grey,) * 3), torch.tensor(COUNTS[3, "early"]), (4, 4), 4, alpha=0.75)
    for found, count in zip(middles(np.asarray(map_), (4, 4)), COUNTS[3, "early"], strict=True):
        assert found == pytest.approx([0.75 * colour + 0.25 * under for colour in VIRIDIS[count]], abs=1)


def test_of_an_oblong_picture_rows_come_first():
    counts = [0, 1, 2, 3, 4, 0]
    map_ = overlay(Image.new("L", (12, 8)), counts, (2, 3), 4, alpha=1.0)
    assert map_.size == (264, 176)
    assert middles(np.asarray(map_), (2, 3)) == [VIRIDIS[count] for count in counts]


def test_colours_end_at_the_ends_of_the_scale_and_what_is_missing_is_grey():
    colours = coloured(np.array([-1.0, 9.0, np.nan]), 0, 4)
    assert [tuple(colour) for colour in colours.tolist()] == [VIRIDIS[0], VIRIDIS[4], (200, 200, 200)]


def luminance(colours):
    """Relative luminance of sRGB (WCAG 2.2)."""
    part = colours / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_more_experts_are_lighter_and_differences_darker_on_both_sides():
    """So that they are told apart without seeing hue."""
    assert (np.diff(luminance(coloured(np.linspace(0, 8, 65), 0, 8).astype(float))) > 0).all()
    both = luminance(coloured(np.linspace(-8, 8, 65), -8, 8, "PuOr_r").astype(float))
    assert both.argmax() in (31, 32, 33) and (np.diff(both[3:31]) > 0).all() and (np.diff(both[33:62]) < 0).all()


def test_another_number_of_patches_is_refused():
    with pytest.raises(ValueError, match="15 patches are not 4 rows of 4"):
        overlay(WHITE, [0] * 15, (4, 4), 4)


@pytest.mark.parametrize("grid", [(4, 4), (16, 16), (3, 5), (64, 48)])
def test_every_patch_of_a_cell_has_whole_pixels(grid):
    width, height = cell_size(grid)
    assert width % grid[1] == height % grid[0] == 0 and width // grid[1] == height // grid[0]


def inside(picture, box):
    left, top, width, height = box
    return np.asarray(picture)[top : top + height, left : left + width]


def test_the_sheet_has_layers_in_rows_steps_in_columns_and_their_mean_last(tmp_path):
    picture, plan = sheet(scene_of(), [0, 2], ["even", "uneven"])
    picture.save(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as read:
        assert read.size == (plan.width, plan.height)
        for row, layer in enumerate((1, 3)):
            for column, when in enumerate(("early", "late")):
                found = middles(inside(read, plan.box(row, column)), (4, 4))
                assert found == [VIRIDIS[count] for count in COUNTS[layer, when]]
            mean = (2 * np.array(COUNTS[layer, "early"]) + np.array(COUNTS[layer, "late"])) / 3
            wanted = coloured(mean, 0, 4)
            assert middles(inside(read, plan.box(row, 2)), (4, 4)) == [tuple(colour) for colour in wanted.tolist()]
        shown = inside(read, (plan.margin, plan.top, *plan.picture))
        assert (shown == 250).all(), "the finished picture"


def test_the_scale_is_one_of_all_maps_and_of_a_difference_even_around_nothing():
    assert scene_of().scale == (0.0, 4.0)
    assert scene_of(maps_SLT=PLANTED * 0).scale == (0.0, 1.0)
    assert scene_of(branch="difference", maps_SLT=PLANTED - 3).scale == (-3.0, 3.0)
    assert "of 4" in scene_of().label and "without the prompt" in scene_of(branch="unconditional").label
    assert "with the prompt than without" in scene_of(branch="difference").label


def test_words_and_cells_do_not_lie_on_one_another():
    """Names of rows are narrower than their room; cells begin below the names of columns and do not touch."""
    plan = Plan((128, 128), rows=3, columns=4, picture=(280, 280), names=96)
    boxes = [plan.box(row, column) for row in range(3) for column in range(4)]
    for left, top, width, height in boxes:
        assert left >= plan.margin + plan.picture[0] + plan.names and top >= plan.margin + plan.head
        assert left + width + plan.margin <= plan.width and top + height + plan.margin <= plan.height
    lefts, tops = (sorted({box[i] for box in boxes}) for i in range(2))
    assert min(np.diff(lefts)) > 128 and min(np.diff(tops)) > 128


def rendered_text(canvas):
    """The box of each word on a figure, in pixels."""
    renderer = canvas.agg.get_renderer()
    return {text.get_text(): text.get_window_extent(renderer) for text in canvas.figure.texts if text.get_text()}


@pytest.mark.parametrize("layers", [1, 2, 14])
def test_no_words_of_a_sheet_overlap_or_are_cut(layers, monkeypatch):
    from megadit.sampling import heatmap

    canvases = []

    class Watched(heatmap.Canvas):
        def __init__(self, plan):
            super().__init__(plan)
            canvases.append(self)

    monkeypatch.setattr(heatmap, "Canvas", Watched)
    maps = np.repeat(PLANTED[:, :1], layers, axis=1)
    long = scene_of(
        maps_SLT=maps, layers=[2 * i + 11 for i in range(layers)], title="“a $5 bill, or $6 " * 20, about="run " * 90
    )
    sheet(long, [0, 1, 2], ["up to 44 of 64\ncv 10.25"] * layers)
    next(animation(long))
    for canvas in canvases:
        boxes = list(rendered_text(canvas).values())
        for i, one in enumerate(boxes):
            assert one.x0 >= 0 and one.y0 >= 0 and one.x1 <= canvas.plan.width and one.y1 <= canvas.plan.height
            assert not any(one.overlaps(other) for other in boxes[:i])
            for axes in canvas.figure.axes:
                assert not one.overlaps(axes.get_window_extent())


def test_the_mean_leaves_steps_without_a_map_out():
    maps = np.array([[[1.0, 3.0]], [[math.nan, math.nan]], [[3.0, 3.0]]])
    assert mean_over_steps(maps).tolist() == [[2.0, 3.0]]


def test_an_animation_has_a_frame_for_each_step_and_one_of_the_finished_picture():
    frames = list(animation(scene_of()))
    assert len(frames) == 4 and len({frame.size for frame in frames}) == 1
    plan = Plan(cell_size((4, 4), 280 - 16), rows=1, columns=2, picture=(280, 280), names=32)
    for frame, grey, when in zip(frames, (10, 90, 170, 250), ("early", "early", "late", None), strict=True):
        assert frame.size == (plan.width, plan.height)
        assert (inside(frame, (plan.margin, plan.top, 280, 280)) == grey).all()
        for column, layer in enumerate((1, 3)):
            if when is not None:
                found = middles(inside(frame, plan.box(0, column)), (4, 4))
                assert found == [VIRIDIS[count] for count in COUNTS[layer, when]]


@pytest.mark.parametrize("kind", ["gif", "webp", "apng"])
def test_an_animation_is_written_with_all_its_frames(kind, tmp_path):
    path, seen = tmp_path / f"steps.{kind}", []
    save_animation(scene_of(), path, lambda frames: (seen.append(1) or frame for frame in frames))
    assert len(seen) == 4, "the progress bar sees each"
    with Image.open(path) as read:
        frames = []
        for i in range(read.n_frames):
            read.seek(i)
            read.load()
            frames.append((int(np.asarray(read.convert("RGB"))[120, 60, 0]), read.info["duration"]))
    greys, durations = zip(*frames, strict=True)
    assert greys == pytest.approx((10, 90, 170, 250), abs=4)
    assert durations[-1] == 2000 > durations[0] == durations[1] == durations[2]


def test_pictures_are_those_of_the_decoder_one_by_one():
    latents = torch.linspace(-1, 1, 3 * 2 * 2 * 2).view(3, 2, 2, 2)
    shapes = []

    def decode(latent):
        shapes.append(tuple(latent.shape))
        return latent[:, :1].expand(-1, 3, -1, -1)

    pictures = decoded(latents, decode)
    assert shapes == [(1, 2, 2, 2)] * 3 and [picture.mode for picture in pictures] == ["RGB"] * 3
    assert np.asarray(as_png(latents[0])).tolist() == np.asarray(pictures[0])[..., 0].tolist()
