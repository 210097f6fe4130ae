"""The report: well-formed, complete, true to the plan, loads nothing, and a browser paints it."""

import dataclasses
import re
from collections import Counter

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megadit.model.count import size_of
from megadit.page.style import contrast, ink_on
from megadit.planning import charts
from megadit.planning.charts import CATEGORIES, pareto_front, stack
from megadit.planning.colours import COLOURS
from megadit.planning.hardware import Efficiency, load_gpu
from megadit.planning.plan import Planner
from megadit.planning.report import ASSUMPTIONS, number, report
from megadit.planning.search import Candidate, candidates, evaluate
from megadit.planning.simulation import fake_world
from megadit.planning.summary import days, traffic
from megadit.training.config import check, load_config
from tests.page.browser import Browser, probe
from tests.page.tree import Tree, read, rows

WORLD = 8
NAME = """<script>alert("1")</script> & 'two'"""  # of a run: what a page must not take for markup
SPARE = 0.1


def parity(*overrides):
    return load_config("tests/configs/parity.yaml", ["run.dtype=float32", *overrides])


def gpu(memory):
    """An H100 with the memory of a much smaller one, so that a small model fills it."""
    return dataclasses.replace(load_gpu("h100"), memory_bytes=memory)


def planned(gpu, *overrides):
    config = parity(*overrides)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=NAME))
    with fake_world(0, WORLD):
        return Planner(gpu).plan(config, check(config, WORLD))


@pytest.fixture(scope="module")
def plans():
    """One of every schedule; the second does not fit, and the third is far from its GPU's memory."""
    return {
        "1f1b": planned(gpu(8_000_000), "parallel.pipeline=4", "parallel.tensor=2", "data.micro_batch=4"),
        "interleaved": planned(gpu(2_000_000), "parallel.pipeline=2", "parallel.schedule=interleaved"),
        "zbv": planned(load_gpu("h100"), "parallel.pipeline=2", "parallel.schedule=zbv", "model.routing_group=2"),
    }


@pytest.fixture(scope="module")
def found():
    """Some of a search, with layouts that fit, that do not, and that cannot be."""
    some = [
        config
        for config in candidates(parity(), WORLD, gpu(1))
        if config.parallel.tensor == 1 and config.data.micro_batch in (2, 8) and config.parallel.expert in (1, 2)
    ]
    found = evaluate(some, WORLD, gpu(5_500_000), SPARE, coarse=False)
    return sorted(found, key=lambda candidate: (bool(candidate.reason), candidate.plan and candidate.plan.seconds or 0))


@pytest.fixture(scope="module")
def pages(plans, found):
    pages = {name: report(plan, []) for name, plan in plans.items()}
    return pages | {"search": report(plans["1f1b"], found)}


@pytest.fixture(scope="module")
def trees(pages):
    return {name: Tree(page).open[0] for name, page in pages.items()}


def says(value):
    return pytest.approx(value, rel=0.0051)  # three digits


@pytest.mark.parametrize("page", ["1f1b", "interleaved", "zbv", "search"])
def test_the_page_is_well_formed_and_complete(trees, pages, page):
    tree = trees[page]
    sections = [section.attributes["id"] for section in tree.all("section")]
    searched = ["search"] if page == "search" else []
    assert sections == [
        *("memory", "timeline", "seconds", "communication"),
        *searched,
        *("model", "grounds", "configuration"),
    ]
    assert len(list(tree.all("svg"))) == 3 + len(searched)
    assert pages[page].startswith("<!DOCTYPE html>\n<html lang=")
    for table in tree.all("table"):
        assert len({len([cell for cell in row.children if cell.name in ("td", "th")]) for row in table.all("tr")}) == 1


@pytest.mark.parametrize("page", ["1f1b", "search"])
def test_the_page_loads_nothing_and_escapes_what_it_is_told(trees, pages, page):
    assert not re.search(r"://|@import|url\(|javascript:", pages[page])
    for element in trees[page].all():
        assert element.name not in ("script", "link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "href", "srcset", "style"} & element.attributes.keys()
        assert not [key for key in element.attributes if key.startswith("on")]
    assert trees[page].one("h1").text == f"{NAME} on 8 × h100"  # noqa: RUF001


# --- its numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv"])
def test_headline(plans, trees, name):
    plan = plans[name]
    size = size_of(plan.config.model, plan.config.text)
    told = {
        tile.one("span").text: (tile.one("b").text, tile.one("small").text) for tile in trees[name].all(class_="tile")
    }
    assert read(told["step"][0], "s") == says(plan.seconds)
    assert told["MFU"][0] == f"{plan.mfu:.1%}"
    assert told["throughput"][0] == f"{plan.images_per_second:,.0f} images/s"
    assert told["training"][0] == f"{days(plan):,.1f} days"
    assert told["cost"][0] == f"{days(plan) * 24 * WORLD:,.0f}"
    assert read(told["peak memory"][0], "B") == says(plan.peak)
    assert (told["parameters"][0], told["activated"][0]) == (f"{size.total:,}", f"{size.activated:,}")
    (verdict,) = trees[name].all(class_="verdict")
    if name == "interleaved":
        assert verdict.text.startswith("Does not fit: pipeline rank ") and "bad" in verdict.classes
    else:
        assert verdict.text.startswith(f"Fits: {plan.headroom:.0%} of ") and "good" in verdict.classes


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv"])
def test_memory(plans, trees, name):
    plan, section = plans[name], trees[name].one("section", id="memory")
    table = rows(trees[name], "memory")
    columns = [cell.text for cell in section.all("th")]
    for rank, row in zip(plan.ranks, table, strict=True):
        cells = dict(zip(columns, row, strict=True))
        assert cells["parameters"] == f"{rank.parameters:,}"
        for category in (*CATEGORIES, "peak"):
            assert read(cells[category], "B") == says(getattr(rank.memory, category))
    # Bars: as long as the bytes are many, one after the other, and the GPU's memory where it belongs.
    bars = [bar for bar in section.all("rect") if bar.one("title")]
    by_rank = {rank.rank: [bar for bar in bars if bar.text.startswith(f"rank {rank.rank},")] for rank in plan.ranks}
    first = bars[0].number("x")
    ends = [by_rank[rank.rank][-1].number("x") + by_rank[rank.rank][-1].number("width") for rank in plan.ranks]
    per_byte = (ends[0] - first) / plan.ranks[0].memory.peak
    for rank, end in zip(plan.ranks, ends, strict=True):
        parts = [part for part in stack(rank.memory) if part[1]]
        assert [bar.classes for bar in by_rank[rank.rank]] == [[f"fill-{category}"] for category, _ in parts]
        assert sum(nbytes for _, nbytes in parts) == rank.memory.peak
        assert end - first == pytest.approx(rank.memory.peak * per_byte, abs=2)
        for bar, (_, nbytes) in zip(by_rank[rank.rank], parts, strict=True):
            assert bar.number("width") == pytest.approx(nbytes * per_byte, abs=2)
    limits = [line for line in section.all("line", class_="limit")]
    assert [line.number("x1") for line in limits] == (
        [] if name == "zbv" else [pytest.approx(first + plan.gpu.memory_bytes * per_byte, rel=0.01)]
    )


def test_a_stack_of_the_update_where_that_is_the_peak(plans):
    memory = dataclasses.replace(plans["1f1b"].ranks[0].memory, updating=10**9)
    assert [name for name, _ in stack(memory)][-2:] == ["buffers", "updating"]
    assert sum(nbytes for _, nbytes in stack(memory)) == memory.peak


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv"])
def test_timeline(plans, trees, name):
    """Every action is there once, in its colour, from its start to its end; then the update."""
    plan, section = plans[name], trees[name].one("section", id="timeline")
    idle = next(section.all("rect", class_="idle"))
    per_second = idle.number("width") / plan.timeline.total
    drawn = {mark.one("title").text: mark for mark in section.all("rect") if mark.children}
    for rank, spans in zip(plan.ranks, plan.timeline.ranks, strict=True):
        for (kind, stage, microbatch), start, end in spans:
            what = {"F": "forward", "B": "backward", "I": "backward, gradient of the input"}
            what["W"] = "backward, gradients of the weights"
            title = f"rank {rank.rank}, stage {stage}, microbatch {microbatch}: {what[kind]}\n"
            (mark,) = [mark for said, mark in drawn.items() if said.startswith(title)]
            assert mark.classes == [f"fill-{kind}"]
            assert mark.number("x") - idle.number("x") == pytest.approx(start * per_second, abs=0.1)
            assert mark.number("width") == pytest.approx((end - start) * per_second, abs=0.7)
    updates = list(section.all("rect", class_="fill-update"))
    assert len(updates) == len(plan.ranks)
    assert len(drawn) == sum(map(len, plan.timeline.ranks)) + len(updates)
    for rank, update in zip(plan.ranks, updates, strict=True):
        assert update.number("x") - idle.number("x") == pytest.approx(plan.timeline.total * per_second, abs=0.1)
        assert update.number("width") == pytest.approx(rank.update_seconds * per_second, abs=0.6)


def test_a_long_timeline_is_drawn_without_hover_texts(plans, monkeypatch):
    plan = plans["zbv"]
    monkeypatch.setattr(charts, "MAX_HOVER", 10)
    section = Tree(report(plan, [])).open[0].one("section", id="timeline")
    counts = Counter()
    for path in section.all("path"):
        counts[path.classes[0]] += path.attributes["d"].count("M")
    spans = [span for spans in plan.timeline.ranks for span in spans]
    assert counts == Counter(f"fill-{span.action.kind}" for span in spans)


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv"])
def test_terms_and_communication(plans, trees, name):
    plan = plans[name]
    told = {row[0]: (read(row[1], "s"), row[2]) for row in rows(trees[name], "seconds")}
    terms = {**plan.terms, "total": plan.seconds}
    assert told.keys() == terms.keys()
    for term, seconds in terms.items():
        assert told[term][0] == says(seconds)
        assert float(told[term][1].rstrip("%")) == pytest.approx(100 * seconds / plan.seconds, abs=0.051)
    sent = {(row[0], row[2]): row for row in rows(trees[name], "communication")}
    assert sent.keys() == traffic(plan).keys()
    for key, (count, nbytes) in traffic(plan).items():
        assert (sent[key][3], sent[key][4]) == (str(plan.groups[key[0]][0]), f"{count:,}")
        assert float(sent[key][6]) == pytest.approx(nbytes / 1e9, abs=0.00051)


@pytest.mark.parametrize("name", ["1f1b", "zbv"])
def test_parameters_hardware_and_configuration(plans, trees, name):
    """Operations are for one image, also where two are routed together, as under zbv here."""
    plan, tree = plans[name], trees[name]
    size = size_of(plan.config.model, plan.config.text)
    counts = {row[0]: int(row[1].replace(",", "") or 0) for row in rows(tree, "model")}
    assert counts.pop("total") == size.total == sum(counts.values())
    operations = rows(tree, "model")[-1]
    forward_and_backward = sum(read(cell, "FLOP") for cell in operations[3:5])
    assert forward_and_backward == says(plan.flops / plan.config.data.global_batch)
    told = {row[0]: row for row in rows(tree, "grounds")}
    assert told["network for each GPU, each direction"][1:] == ["50.0 GB/s", "80%", "40.0 GB/s"]
    assert told["matrix products, float32"][1:] == ["67.0 TFLOP/s", "73%", "48.9 TFLOP/s"]
    assert told["launch of a kernel"][3] == "4.00 µs"
    assert len(told) == len(dataclasses.fields(Efficiency)) + 2, "every efficiency, memory, and GPUs of a node"
    assert [item.text for item in tree.all("li")] == list(ASSUMPTIONS)
    assert yaml.safe_load(tree.one("pre").text) == plan.config.to_dict()


def test_frozen_encoders_are_in_the_table():
    plan = planned(load_gpu("h100"), "text.kind=precomputed")
    counts = {row[0]: row[1] for row in rows(Tree(report(plan, [])).open[0], "model")}
    assert (counts["text encoder, frozen"], counts["autoencoder, frozen"]) == ("670,000,000", "84,000,000")
    assert counts["total"] == f"{size_of(plan.config.model, plan.config.text).total:,}"


# --- a search ---------------------------------------------------------------------------------------------------------


def test_search(found, trees, plans):
    section = trees["search"].one("section", id="search")
    planned = [candidate for candidate in found if candidate.plan is not None]
    fitting = [candidate for candidate in planned if not candidate.reason]
    refused = [candidate for candidate in found if candidate.reason]
    assert fitting and len(planned) > len(fitting) and len(found) > len(planned), "a search that shows everything"

    points = {point.text: point for point in section.all("circle") if point.children}
    assert Counter(point.classes[0] for point in points.values()) == {
        "fits": len(fitting),
        "refused": len(planned) - len(fitting),
    }
    best = min(fitting, key=lambda candidate: candidate.plan.seconds)
    (circle,) = section.all("circle", class_="best")
    (point,) = [point for said, point in points.items() if said.startswith(f"{best}\n")]
    assert (circle.attributes["cx"], circle.attributes["cy"]) == (point.attributes["cx"], point.attributes["cy"])
    assert len(list(section.all("circle", class_="front"))) == len(pareto_front(found))
    # More memory is to the right, more time is up.
    for one, other in zip(planned, planned[1:], strict=False):
        a, b = (next(p for said, p in points.items() if said.startswith(f"{c}\n")) for c in (one, other))
        assert (a.number("cx") < b.number("cx")) == (one.plan.peak < other.plan.peak)
        assert (a.number("cy") > b.number("cy")) == (one.plan.seconds < other.plan.seconds)

    fastest = rows(trees["search"], "search", 0)
    assert [read(row[8], "s") for row in fastest] == [
        says(candidate.plan.seconds) for candidate in sorted(fitting, key=lambda c: c.plan.seconds)[:15]
    ]
    reasons = rows(trees["search"], "search", 2)
    assert sum(int(row[0]) for row in reasons) == len(refused)
    assert {row[2] for row in reasons} <= {candidate.reason for candidate in refused}
    assert "parameters and optimizer alone" in str(reasons) and "most of it are" in str(reasons)


def test_a_search_in_which_nothing_can_be(plans):
    config = parity()
    tree = Tree(report(plans["1f1b"], [Candidate(config, None, "because <of> 3 things")])).open[0]
    assert rows(tree, "search") == [["1", str(Candidate(config, None)), "because <of> 3 things"]]
    assert len(list(tree.all("svg"))) == 3


@dataclasses.dataclass
class Costs:
    """What the front looks at of a plan."""

    peak: int
    seconds: float


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=30))
def test_pareto_front(costs):
    found = [Candidate(None, Costs(*cost)) for cost in costs] + [Candidate(None, None, "no plan")]
    front = [(candidate.plan.peak, candidate.plan.seconds) for candidate in pareto_front(found)]
    undominated = {
        (peak, seconds)
        for peak, seconds in costs
        if not any(p <= peak and s <= seconds and (p, s) != (peak, seconds) for p, s in costs)
    }
    assert front == sorted(undominated)


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_numbers_of_parameters():
    assert (number(999), number(12_345_678), number(8_270_000_000)) == ("999", "12.35 million", "8.27 billion")


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize("name", COLOURS)
def test_text_on_every_colour_can_be_read(name, scheme):
    colour = COLOURS[name][scheme]
    assert contrast(colour, ink_on(colour)) >= 4.5


# --- a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    return Browser(tmp_path_factory.mktemp("browser"))


@pytest.mark.slow
def test_a_browser_lays_out_every_plot(browser, pages):
    seen = probe(browser, pages["search"], "--window-size=1100,900")
    assert seen["loaded"] == 0
    assert len(seen["plots"]) == 4
    for plot in seen["plots"]:
        left, top, width, height = plot["box"]
        assert width > 900 and height > 30
        sized = [mark for mark in plot["marks"] if mark[2] > 0.2 and mark[3] > 0.2]
        assert len(sized) == len(plot["marks"]) > 4
        for x, y, wide, high in sized:  # nothing sticks out
            assert left - 1 <= x and x + wide <= left + width + 1
            assert top - 1 <= y and y + high <= top + height + 1


@pytest.mark.slow
def test_a_browser_paints_every_plot(browser, pages, tmp_path):
    """Where a mark is, the screenshot has its colour."""
    window = "--window-size=1100,8000"
    seen = probe(browser, pages["search"], window)
    assert seen["height"] <= 8000, "the screenshot has the whole page"
    browser(pages["search"], window, f"--screenshot={tmp_path / 'page.png'}")
    image = Image.open(tmp_path / "page.png").convert("RGB")
    for plot in seen["plots"][:3]:
        wide_enough = [bar for bar in plot["bars"] if bar[3] >= 6]
        assert len(wide_enough) >= 3
        for fill, x, y, _, height in wide_enough:
            # Near a corner, for a text may be in the middle.
            pixel = image.getpixel((round(x) + 3, round(y + height) - 3))
            assert fill == f"rgb{pixel}"
    left, top, width, height = map(round, seen["plots"][3]["box"])
    colours = {colour: count for count, colour in image.crop((left, top, left + width, top + height)).getcolors(10**6)}
    assert colours[(235, 104, 52)] > 100, "the front is painted"
    assert len(colours) > 50


@pytest.mark.slow
def test_a_narrow_dark_window(browser, pages):
    """Wide plots and tables scroll by themselves; the page does not."""
    seen = probe(browser, pages["search"], "--window-size=500,900", "--blink-settings=preferredColorScheme=0")
    assert seen["width"] <= seen["window"]
    assert seen["background"] == "rgb(13, 13, 13)"
    light = probe(browser, pages["1f1b"], "--window-size=500,900", "--blink-settings=preferredColorScheme=1")
    assert light["background"] == "rgb(246, 246, 243)"
