"""A page's figures follow from records, and only from them."""

import json
from pathlib import Path

import pytest

from megadit.study.figures import curves_of
from megadit.study.page import fill
from megadit.study.summary import read_records
from megadit.study.tables import TABLES
from tests.study.made import record, write_records

PAGE = """# A page

Words stay.

<!-- study records: scores -->
old
<!-- end -->

<!-- study records: verdicts -->
<!-- end -->

<!-- study records: curves images/curves.png -->
<!-- end -->
"""


@pytest.fixture
def page(tmp_path):
    write_records(tmp_path / "records")
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_parts_are_filled_and_the_rest_stays(page):
    assert len(fill(page)) == 3
    text = page.read_text()
    assert text.startswith("# A page\n\nWords stay.\n\n<!-- study records: scores -->\n|")
    assert "old" not in text
    # 0.9, 0.8, 0.9: mean 86.7, half of the interval 4.302653 x 5.7735 / sqrt(3).
    assert "| expert choice | 0.1010 ± 0.0025 | 86.7 ± 14.3 | 86.7 ± 14.3 | 86.7 ± 14.3 |" in text
    assert "| dense | inconclusive | inconclusive | worse | inconclusive |" in text
    assert (page.parent / "images/curves.png").stat().st_size > 10_000
    assert "](images/curves.png)" in text
    assert fill(page) == []
    (page.parent / "images/curves.png").unlink()
    assert fill(page, write=False) == ["<!-- study records: curves images/curves.png -->"]


def test_differences_are_of_the_same_seed(tmp_path):
    write_records(tmp_path / "records")
    text = TABLES["differences"](read_records(tmp_path / "records"))
    # -10, 0, 0 points: mean -3.3, half of the interval 4.302653 x 5.7735 / sqrt(3); each loss is 0.02 more.
    assert "| dense | -3.3 ± 14.3 |" in text and "| 0.0200 ± 0.0000 |" in text


@pytest.mark.parametrize(
    ("right", "whose"),
    [
        ((8, 8, 9), "expert choice: 86.7 ± 14.3 %"),
        ((9, 10, 7), "expert choice: 86.7 ± 14.3 %, and of dense: 86.7 ± 37.9 %"),
        ((9, 9, 9), "dense: 90.0 ± 0.0 %"),
    ],
)
def test_the_best_score_is_that_of_all_that_have_it(right, whose, tmp_path):
    write_records(tmp_path / "records")
    for seed, count in enumerate(right):
        made = record("dense", "dense", 1, seed, 0.12, count, 3)
        (tmp_path / "records" / f"dense_seed{seed}.json").write_text(json.dumps(made))
    text = TABLES["best"](read_records(tmp_path / "records"))
    assert text == f"The best mean score is that of {whose}.\n"


def test_a_run_that_missed_a_look_has_a_curve(tmp_path):
    write_records(tmp_path / "records")
    path = tmp_path / "records" / "dense_seed1.json"
    made = json.loads(path.read_text())
    path.write_text(json.dumps(made | {"heldout_curve": [[100, made["heldout_loss"]]]}))
    steps, losses = curves_of(read_records(tmp_path / "records")[1])
    assert steps == [100] and losses.tolist() == [[0.120], [0.121], [0.122]]


@pytest.mark.parametrize(("old", "new"), [("old\n<!-- end -->", "old"), ("records: scores", "records scores")])
def test_a_part_that_is_not_whole_loses_no_words(page, old, new):
    page.write_text(PAGE.replace(old, new))
    with pytest.raises(ValueError, match=r"page.md: <!-- study records:? scores --> is no part"):
        fill(page)
    assert page.read_text() == PAGE.replace(old, new)


def test_a_figure_that_was_changed_by_hand_is_found(page):
    fill(page)
    sound = page.read_text()
    page.write_text(sound.replace("86.7 ± 14.3", "96.7 ± 14.3", 1))
    assert fill(page, write=False) == ["<!-- study records: scores -->"]
    assert "96.7" in page.read_text()
    fill(page)
    assert page.read_text() == sound


@pytest.mark.parametrize("what", TABLES)
def test_every_table_is_of_one_shape(what, page):
    text = TABLES[what](read_records(page.parent / "records"))
    lines = text.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert text.endswith("\n") and "nan" not in text and "inf" not in text


def test_records_that_are_not_there_or_not_whole_are_named(page):
    folder = page.parent / "records"
    (folder / "dense_seed2.json").unlink()
    with pytest.raises(ValueError, match="not every variant has every seed"):
        fill(page)
    (folder / "dense_seed2.json").write_text("{")
    with pytest.raises(ValueError, match="dense_seed2.json"):
        fill(page)
    page.write_text("<!-- study elsewhere: scores -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="elsewhere: no records"):
        fill(page)
    page.write_text("<!-- study records: prices -->\n<!-- end -->\n")
    (folder / "dense_seed2.json").write_text(json.dumps(record("dense", "dense", 1, 2, 0.1, 8, 3)))
    with pytest.raises(ValueError, match="prices --> is of no kind; there are setup"):
        fill(page)


def test_the_figures_of_the_documentation_are_those_of_its_records():
    page = Path("docs/reproduction.md")
    assert page.read_text().count("<!-- study ") >= 8
    assert fill(page, write=False) == []
