"""The page: well-formed, true to the runs' files, safe whatever they say, and a browser paints it."""

import json
import math
import random
import re
import time

import numpy as np
import pytest
from PIL import Image

from megadit.history.charts import HALF, WIDE, Series, curves_chart, level, load_chart
from megadit.history.comparison import flat
from megadit.history.curve import Curve, Loads
from megadit.history.look import COLOURS, HEAT, SCRIPT, SIGNS
from megadit.history.report import report
from megadit.history.story import Story, read_story
from megadit.history.told import labels
from megadit.page.style import contrast
from tests.history.made import EVERY_EVENT, curve, event, folder, line, settings
from tests.page.browser import Browser, probe
from tests.page.tree import Tree, rows

NAME = """<script>alert("1")</script> & 'two'"""  # what a page must not take for markup


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """One with every event, one that is long, one without events and with a hostile name."""
    path = tmp_path_factory.mktemp("runs")
    lines = curve(100, load=True)
    lines[47] |= {"loss": math.nan, "grad_norm": math.inf, "skipped": True}
    long = [event(0, "start", 0)] + [event(10 * i, "save", 100 * i, saved=True) for i in range(1, 31)]
    long.append(event(400, "stop", 3000, NAME, status=1, why=NAME))
    return {
        "every": read_story(folder(path / "every", lines, EVERY_EVENT, settings("every", 100, model={"experts": 4}))),
        "long": read_story(folder(path / "long", curve(3000), long, settings("long", 9000, model={"experts": 8}))),
        "old": read_story(folder(path / "old", curve(250, seed=3), None, settings(NAME, 900, optim={"lr": NAME}))),
        "empty": read_story(folder(path / "empty", [], [], settings("empty", 900))),
    }


@pytest.fixture(scope="module")
def pages(stories):
    now = stories["every"].changed + 5
    made = {name: report([story], now) for name, story in stories.items()}
    return made | {"three": report([stories[name] for name in ("every", "long", "old")], now)}


@pytest.fixture(scope="module")
def trees(pages):
    return {name: Tree(page).open[0] for name, page in pages.items()}


PAGES = ["every", "long", "old", "empty", "three"]


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_well_formed_loads_nothing_and_escapes_what_it_is_told(pages, trees, name):
    page, tree = pages[name], trees[name]
    assert not re.search(r"://|@import|url\(|javascript:", page.replace("http://www.w3.org/2000/svg", "", 1))
    for element in tree.all():
        assert element.name not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "href", "srcset", "style"} & element.attributes.keys()
        assert not [key for key in element.attributes if key.startswith("on")]
    assert [script.text for script in tree.all("script")] == [SCRIPT]
    assert not re.search(r"\b(nan|inf)\b", " ".join(e.attributes.get("d", "") for e in tree.all("path")))
    for table in tree.all("table"):
        assert len({len([cell for cell in row.children if cell.name in ("td", "th")]) for row in table.all("tr")}) == 1
    places = {section.attributes["id"] for section in tree.all("section")}
    if name == "every":
        assert places == {"loss", "gradient", "speed", "routing", "load", "events", "configuration"}
    if name == "three":
        assert {"figures", "differences", "loss", "routing", "load", "events-A", "events-B"} <= places
    if name == "old":
        assert tree.one("h1").text == NAME


# --- what is drawn ----------------------------------------------------------------------------------------------------


def scale(told):
    """From a place in the drawing back to the number, as `data-x` and `data-y` tell it."""
    low, high, first, last, is_log = map(float, told.split())

    def back(at):
        part = (at - first) / (last - first)
        return low * (high / low) ** part if is_log else low + part * (high - low)

    return back


def drawn(svg, name):
    """The points of a curve, as steps and values."""
    path = svg.one("path", **{"data-name": name})
    x, y = scale(svg.attributes["data-x"]), scale(svg.attributes["data-y"])
    points = re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.attributes["d"])
    return np.array([(x(float(at)), y(float(up))) for at, up in points])


def chart(tree, section, place=0):
    return [svg for svg in tree.one("section", id=section).all("svg") if "data-x" in svg.attributes][place]


def test_few_steps_are_drawn_as_they_are(stories, trees):
    loss = stories["every"].curve("loss")
    svg = chart(trees["every"], "loss")
    points = drawn(svg, "training")
    finite = loss.is_finite
    np.testing.assert_allclose(points[:, 0], loss.steps[finite], atol=0.06)
    np.testing.assert_allclose(points[:, 1], loss.values[finite], rtol=1e-3)
    assert svg.one("path", **{"data-name": "training"}).attributes["d"].count("M") == 2, "a gap where it is not finite"
    (mark,) = svg.all("path", class_="bad-value")
    assert mark.text == "training: nan at step 48"
    heldout = drawn(svg, "held out (EMA)")
    np.testing.assert_allclose(heldout[:, 1], stories["every"].curve("heldout_loss").values, rtol=1e-3)
    assert len(list(svg.all("circle", class_="dot"))) == 10


def test_many_steps_are_a_median_in_a_band_that_has_the_extremes(stories, trees):
    loss = stories["long"].curve("loss")
    svg = chart(trees["long"], "loss")
    points = drawn(svg, "training")
    assert len(points) == WIDE.columns
    np.testing.assert_allclose(points[:, 1], np.median(loss.values.reshape(-1, 5), axis=1), rtol=1e-3)
    (band,) = svg.all("path", class_="band")
    values = [scale(svg.attributes["data-y"])(float(y)) for y in re.findall(r"[\d.]+ ([\d.]+)", band.attributes["d"])]
    assert min(values) == pytest.approx(loss.values.min(), rel=1e-3)
    assert max(values) == pytest.approx(loss.values.max(), rel=1e-3)


def test_every_curve_of_the_metrics_is_drawn(stories, trees):
    names = ["lr", "seconds", "images_per_second", "tflops_per_gpu", "peak_memory_gb"]
    story = stories["every"]
    charts = [svg for svg in trees["every"].one("section", id="speed").all("svg") if "data-x" in svg.attributes]
    for name, svg in zip(names, charts, strict=True):
        np.testing.assert_allclose(drawn(svg, name)[:, 1], story.curve(name).values, rtol=1e-2)
    assert len(drawn(chart(trees["every"], "gradient"), "grad_norm")) == 99
    for place, statistic in enumerate(story.routing):
        for layer, found in story.routing[statistic].items():
            points = drawn(chart(trees["every"], "routing", place), f"layer {layer}")
            np.testing.assert_allclose(points[:, 1], found.values, rtol=1e-3)


def test_several_runs_are_told_apart_without_colour(stories, trees):
    svg = chart(trees["three"], "loss")
    lines = [path for path in svg.all("path", class_="line") if "held" not in path.attributes["data-name"]]
    assert [path.attributes["data-name"] for path in lines] == ["every", "long", NAME]
    assert len({tuple(path.classes) for path in lines}) == len({path.classes[-1] for path in lines}) == 3
    assert [mark.text for mark in svg.all("text", class_="mark") if "tick" not in mark.classes].count("B") == 1
    mean = drawn(chart(trees["three"], "routing"), NAME)[:, 1]
    layers = stories["old"].routing["entropy"].values()
    np.testing.assert_allclose(mean, np.mean([layer.values for layer in layers], axis=0), rtol=1e-3)


def test_loads_are_drawn_in_their_colours():
    loads = Loads(2)
    for step in range(10):
        loads.add(step, [0.1, 1.9] if step < 5 else [1.0, 1.0])
    svg = Tree(load_chart("3", loads, 96, 10)).open[0].one("svg")
    cells = {path.classes[0]: path.attributes["d"] for path in svg.all("path")}
    assert cells.keys() == {"fill-heat0", "fill-heat3", "fill-heat4"}
    assert [cells[f"fill-heat{shade}"].count("M") for shade in (0, 3, 4)] == [1, 2, 1], "neighbours are one"
    left, right = re.match(r"M([\d.]+) 0.0H([\d.]+)v", cells["fill-heat0"]).groups()
    assert float(right) - float(left) == pytest.approx((HALF.width - 58 - 18) / 2, abs=0.2)
    assert [level(load) for load in (0.0, 0.3, 0.7, 1.0, 1.5, 3.0, 5.0)] == list(range(len(HEAT)))


# --- events -----------------------------------------------------------------------------------------------------------


def test_every_event_is_on_the_axis_and_in_the_table(trees):
    svg = chart(trees["every"], "loss")
    x = scale(svg.attributes["data-x"])
    marks = {mark.text: mark for mark in svg.all("path", class_="event")}
    said = "\n".join(marks)
    for told in EVERY_EVENT:
        assert f"{told['event']}, step {told['step']}: {told['reason']}" in said
    for text, step, tone in (("skip, step 48: ", 48, "bad"), ("save, step 20", 20, "good"), ("eclipse", 90, "plain")):
        (mark,) = [mark for said, mark in marks.items() if said.startswith(text)]
        assert f"ev-{tone}" in mark.classes
        assert x(float(re.match(r"translate\(([\d.]+)", mark.attributes["transform"])[1])) == pytest.approx(
            step, abs=0.1
        )
    failed = next(mark for said, mark in marks.items() if "No space left" in said)
    assert failed.attributes["d"] == SIGNS["save failed"].path and "ev-bad" in failed.classes

    table = rows(trees["every"], "events")
    assert [row[2] for row in table] == [
        *("start", "2 saves", "skip", "save failed", "spike", "rewind", "flip", "lost", "stop", "layout", "resume"),
        *("2 saves", "signal", "save", "stop", "resume", "eclipse", "save", "finish"),
    ]
    assert table[0][:2] == ["2026-09-21 14:13:20", "0 s"]
    assert table[1][3] == "20 to 40"
    assert table[10][5].startswith("2 min 8 s lost; ")
    assert "of: the moon" in table[16][5]
    bad = [row.text for row in trees["every"].one("section", id="events").all("tr", class_="bad")]
    assert len(bad) == 7 and any("No space left" in text for text in bad)


def test_many_events_near_one_another_are_one_mark(tmp_path):
    events = [event(step, "skip", step, "nan") for step in range(1, 2001)]
    story = read_story(folder(tmp_path / "run", curve(2000), events, settings("mine", 2000)))
    tree = Tree(report([story], 0.0)).open[0]
    marks = list(chart(tree, "loss").all("path", class_="event"))
    assert 20 < len(marks) < 120
    assert re.search(r"and \d+ more", marks[5].text)
    table = rows(tree, "events")
    assert len(table) == 301 and any("1,700 rows" in row[2] for row in table)


def test_headline(trees):
    told = {tile.one("span").text: tile.one("b").text for tile in trees["every"].all(class_="tile")}
    assert told["steps done"] == "100" and told["step"] == "0.5 s" and told["throughput"] == "32 images/s"
    assert told["starts"] == "3" and told["lost to restarts"] == "3 min 49 s"
    assert told["steps left out"] == "1" and told["saves that failed"] == "1"
    (verdict,) = trees["every"].all(class_="verdict")
    assert verdict.text == "Finished: step 100 is done" and "good" in verdict.classes
    verdicts = [verdict.text for verdict in trees["three"].all(class_="verdict")]
    assert verdicts[1] == f"B long · Diverged: {NAME}, at step 3,000 of 9,000"
    assert verdicts[2].startswith(f"C {NAME} · Running")


def test_several_runs_are_compared(stories, trees):
    differences = rows(trees["three"], "differences")
    assert differences == [
        ["model.experts", "4", "8", "–"],
        ["run.steps", "100", "9000", "900"],
        ["optim.lr", "–", "–", NAME],
    ]
    figures = rows(trees["three"], "figures")
    assert [row[1] for row in figures] == ["Finished", "Diverged", "Running"]
    loss = stories["long"].curve("loss")
    assert float(figures[1][3]) == pytest.approx(np.median(loss.values[-100:]), rel=1e-3)
    assert float(figures[1][4]) == pytest.approx(stories["long"].curve("heldout_loss").values[-1], rel=1e-3)
    assert figures[0][11:] == ["3", "3 min 49 s", "1"] and figures[2][12] == "–"


def test_runs_of_one_name_are_told_apart(tmp_path):
    stories = [Story(tmp_path / name, config={"run": {"name": "x"}}) for name in ("a", "b", "b")]
    found = labels(stories)
    assert len(set(found)) == 3 and all(label.startswith("x (") for label in found)
    assert flat({"a": {"b": [1, None]}, "c": 3}) == {"a.b": "[1, null]", "c": "3"}


# --- whatever the numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [math.nan] * 5,
        [math.inf, -math.inf, math.nan],
        [1e308, -1e308, 5.0],
        [5e-324, 1e-300, 0.0],
        [0.0] * 7,
        [-3.0, -3.0],
        [1e-80, 1e80],
        [1.0, 1.0 + 1e-12],
        [1e99, 1e100, 1e98],
        [7.0],
        [],
    ],
)
@pytest.mark.parametrize("log_over", [2.0, math.inf])
def test_every_number_can_be_drawn(values, log_over):
    series = [Series("mine", "A", Curve.of(range(1, len(values) + 1), values), 0)]
    svg = Tree(curves_chart("t", series, (), len(values), HALF, log_over)).open[0].one("svg")
    finite = [value for value in values if abs(value) <= 1e100]
    if finite:
        points = drawn(svg, "mine")
        spread = max(map(abs, finite)) if log_over == math.inf or min(finite) <= 0 else 0
        expected = finite * 2 if len(finite) == 1 else finite
        np.testing.assert_allclose(points[:, 1], expected, rtol=0.05, atol=0.01 * spread + 1e-9)
    assert len(list(svg.all("text", class_="tick"))) < 30
    for mark in svg.all("text"):
        assert 0 <= mark.number("x") <= HALF.width


def random_thing(chance, depth=0):
    kind = chance.randrange(9 if depth < 3 else 6)
    if kind < 6:
        return [None, True, chance.randint(-5, 10**20), chance.choice([math.nan, 1e300, -1.5]), NAME, "\ud800"][kind]
    if kind == 6:
        return [random_thing(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(["1", "load", "picks", NAME]): random_thing(chance, depth + 1) for _ in range(3)}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_lines_hold_there_is_a_page(tmp_path, seed):
    chance = random.Random(seed)
    lines = curve(40)
    for changed in chance.sample(lines, 15):
        changed[chance.choice([*changed])] = random_thing(chance)
    events = [dict(told) for told in EVERY_EVENT]
    for changed in chance.sample(events, 10):
        changed[chance.choice([*changed, "status", "saved", "to_step"])] = random_thing(chance)
    story = read_story(folder(tmp_path / "run", lines, events, settings(NAME, 40)))
    page = report([story], story.changed)
    tree = Tree(page.encode("utf-8", "replace").decode()).open[0]
    assert len(list(tree.all("script"))) == 1


@pytest.mark.drill
def test_a_very_long_run_is_a_small_page(tmp_path):
    """800,000 steps: read and drawn in less than a minute, and every extreme is there."""
    told = line(1, 0.5)
    chance = random.Random(0)
    path = folder(tmp_path / "run", [], [], settings("mine", 800_000))
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, 800_001):
            told |= {"step": step, "loss": 0.5 + chance.random(), "grad_norm": 77.0 if step == 400_000 else 1.0}
            file.write(json.dumps(told) + "\n")
    begin = time.process_time()  # whatever else the machine does
    page = report([read_story(path)], 0.0)
    assert time.process_time() - begin < 60
    assert len(page) < 500_000
    svg = chart(Tree(page).open[0], "gradient")
    (band,) = svg.all("path", class_="band")
    values = [scale(svg.attributes["data-y"])(float(y)) for y in re.findall(r"[\d.]+ ([\d.]+)", band.attributes["d"])]
    assert max(values) == pytest.approx(77.0, rel=1e-2)


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize("name", [name for name in COLOURS if name not in HEAT])
def test_curves_stand_out_from_the_page(name, scheme):
    assert contrast(COLOURS[name][scheme], ("#ffffff", "#1a1a19")[scheme]) >= 4.5


# --- a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    return Browser(tmp_path_factory.mktemp("browser"))


def without_policy(page):
    """So that a test's own script may run."""
    changed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert changed != page
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["every", "three"])
def test_a_browser_lays_out_every_plot(browser, pages, name):
    seen = probe(browser, without_policy(pages[name]), "--window-size=1100,900")
    assert seen["loaded"] == 0
    assert len(seen["plots"]) > 8
    for plot in seen["plots"]:
        left, top, width, height = plot["box"]
        for x, y, wide, high in plot["marks"]:  # nothing sticks out
            assert left - 1.5 <= x and x + wide <= left + width + 1.5
            assert top - 1.5 <= y and y + high <= top + height + 1.5


@pytest.mark.slow
def test_a_narrow_dark_window(browser, pages):
    """Wide plots and tables scroll by themselves; the page does not."""
    dark = ("--window-size=500,900", "--blink-settings=preferredColorScheme=0")
    seen = probe(browser, without_policy(pages["three"]), *dark)
    assert seen["width"] <= seen["window"]
    assert seen["background"] == "rgb(13, 13, 13)"


@pytest.mark.slow
def test_the_script_reads_numbers_off_the_curves_and_the_policy_lets_it_run(browser, stories, pages):
    """A pointer over the first plot; then the page as it is, which complains of nothing but a foreign script."""
    step, value = 50, stories["every"].curve("loss").values[49]
    hover = f"""<script>
      const svg = document.querySelector("svg[data-x]"), box = svg.getBoundingClientRect();
      const [, high, first, last] = svg.dataset.x.split(" ").map(Number);
      const x = box.x + (first + {step} / high * (last - first)) * box.width / svg.viewBox.baseVal.width;
      svg.dispatchEvent(new PointerEvent("pointermove", {{clientX: x, clientY: box.y + 50}}));
    </script></body>"""
    dom, complaints = browser(without_policy(pages["every"]).replace("</body>", hover), "--dump-dom")
    assert complaints == []
    said = re.search(r'<div id="read"[^>]*>([^<]*)', dom)[1].split("\n")
    assert said[0] == "step 50"
    name, number = said[1].split("  ")
    assert (name, float(number)) == ("training", pytest.approx(value, rel=1e-3))
    dom, complaints = browser(pages["every"].replace("</body>", hover), "--dump-dom")
    assert '<div id="read" hidden' in dom, "the page's script ran, and no other"
    assert len(complaints) == 1 and "Content Security Policy" in complaints[0]


@pytest.mark.slow
def test_a_browser_paints_the_curves(browser, pages, tmp_path):
    light = ("--window-size=1100,2500", "--blink-settings=preferredColorScheme=1")
    browser(pages["three"], *light, f"--screenshot={tmp_path / 'page.png'}")
    image = Image.open(tmp_path / "page.png").convert("RGB")
    counts = {colour: count for count, colour in image.getcolors(10**6)}
    for name in ("s0", "s1", "s2"):
        colour = COLOURS[name][0]
        assert counts.get(tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)), 0) > 100
