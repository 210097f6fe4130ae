"""GenEval's prompt file, its checker on planted faults, and the scorer's results by hand."""

import json
import shutil

import pytest
from PIL import Image

from megadit.evaluation import geneval
from megadit.evaluation.geneval_check import check_folder

LINES = [
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
    '{"tag": "counting", "include": [{"class": "clock", "count": 3}], "exclude": [{"class": "clock", "count": 4}], '
    '"prompt": "a photo of three clocks"}',
    '{"tag": "position", "include": [{"class": "tv", "count": 1}, {"class": "dog", "count": 1, "position": '
    '["right of", 0]}], "prompt": "a photo of a dog right of a tv"}',
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return geneval.read_prompts(path)


@pytest.fixture
def folder(tmp_path):
    """A folder as the README of GenEval describes it, made by hand."""
    root = tmp_path / "drawn"
    for i, line in enumerate(LINES):
        samples = root / f"0000{i}" / "samples"
        samples.mkdir(parents=True)
        (root / f"0000{i}" / "metadata.jsonl").write_text(line)
        for k in range(4):
            Image.new("RGB", (16, 8), (i * 60, k * 60, 7)).save(samples / f"000{k}.png")
        Image.new("RGB", (32, 16)).save(root / f"0000{i}" / "grid.png")
    return root


def test_the_lines_of_the_file_are_kept_as_they_are(prompts):
    assert [prompt.line for prompt in prompts] == LINES
    assert [prompt.text for prompt in prompts][1] == "a photo of three clocks"
    assert geneval.tally(prompts) == ("3 prompts (single_object 1, counting 1, position 1); the published file has 553")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not a JSON object"),
        ('{"include": [], "prompt": "a"}', "line 2: 'tag' must be a text"),
        ('{"tag": "x", "include": [], "prompt": " "}', "line 2: 'prompt' must be a text"),
        ('{"tag": "x", "prompt": "a"}', "line 2: 'include' is missing"),
        ('{"tag": "x", "include": [{"class": "a"}], "prompt": "a"}', "line 2: 'include' must be a list of objects"),
        ('{"tag": "x", "include": [], "exclude": 3, "prompt": "a"}', "line 2: 'exclude' must be a list"),
    ],
)
def test_a_line_that_the_scorer_would_stumble_over_is_named(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{LINES[0]}\n{line}\n")
    with pytest.raises(ValueError, match=message) as refused:
        geneval.read_prompts(path)
    assert str(path) in str(refused.value)


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl: No such file"):
        geneval.read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="no prompts"):
        geneval.read_prompts(tmp_path / "empty.jsonl")


def test_a_line_ends_at_a_line_end_alone(tmp_path, folder):
    """JSON may hold the separators U+2028 and U+0085 as they are."""
    line = LINES[0].replace("a bench", "a\u2028bench\x85")
    path = tmp_path / "odd.jsonl"
    path.write_bytes(f"{LINES[1]}\r\n{line}\n".encode())
    assert [prompt.line for prompt in geneval.read_prompts(path)] == [LINES[1], line]
    (folder / "00000/metadata.jsonl").write_text(f"{line}\n", encoding="utf-8")
    assert check_folder(folder) == []
    path.write_text('{"tag": "colors", "correct": true, "prompt": "a\u2028b"}\n', encoding="utf-8")
    assert geneval.read_scores(path).tasks == {"colors": (1, 1)}


def test_the_published_layout_has_no_fault(folder, prompts):
    assert check_folder(folder) == check_folder(folder, prompts) == []
    for path in folder.glob("*/grid.png"):
        path.unlink()
    assert check_folder(folder, prompts) == [], "grid.png is optional"
    (folder / "notes.txt").write_text("the scorer reads folders alone")
    assert check_folder(folder, prompts) == []


def test_the_five_digits_of_the_original_script_will_do(folder, prompts):
    for path in folder.glob("*/samples/*.png"):
        path.rename(path.with_name(f"0{path.name}"))
    assert check_folder(folder, prompts) == []


def missing_sample(root):
    (root / "00001/samples/0002.png").unlink()


def numbered_from_one(root):
    for k in reversed(range(4)):
        (root / f"00001/samples/000{k}.png").rename(root / f"00001/samples/000{k + 1}.png")


def one_sample_twice(root):
    shutil.copy(root / "00001/samples/0002.png", root / "00001/samples/00002.png")


def a_fifth_sample(root):
    shutil.copy(root / "00001/samples/0002.png", root / "00001/samples/0004.png")


def another_name(root):
    (root / "00001/samples/0002.png").rename(root / "00001/samples/2.png")


def a_leftover(root):
    """The scorer would take it for a picture: it compares the beginning of the name."""
    (root / "00001/samples/0002.png.new").write_bytes(b"")


def cut_png(root):
    path = root / "00001/samples/0002.png"
    path.write_bytes(path.read_bytes()[:-20])


def no_png(root):
    Image.new("RGB", (8, 8)).save(root / "00001/samples/0002.png", format="JPEG")


def grey_png(root):
    Image.new("L", (8, 8)).save(root / "00001/samples/0002.png")


def broken_grid(root):
    (root / "00001/grid.png").write_bytes(b"grid")


def swapped_metadata(root):
    (root / "00001/metadata.jsonl").write_text(LINES[2])


def another_count(root):
    (root / "00001/metadata.jsonl").write_text(LINES[1].replace('"count": 3', '"count": 2'))


def two_lines(root):
    (root / "00001/metadata.jsonl").write_text(f"{LINES[1]}\n{LINES[1]}\n")


def no_metadata(root):
    (root / "00001/metadata.jsonl").unlink()


def broken_metadata(root):
    (root / "00001/metadata.jsonl").write_text(LINES[1][:40])


def no_samples(root):
    shutil.rmtree(root / "00001/samples")


def extra_number(root):
    shutil.copytree(root / "00001", root / "00007")


def extra_name(root):
    (root / "settings").mkdir()


def four_digits(root):
    shutil.copytree(root / "00001", root / "0003")


def missing_folder(root):
    shutil.rmtree(root / "00001")


PLANTED = {
    missing_sample: [("00001/samples", "numbered 0000.png to 0003.png.*there are: 0000.png, 0001.png, 0003.png")],
    numbered_from_one: [("00001/samples", "numbered 0000.png to 0003.png")],
    one_sample_twice: [("00001/samples", "each once")],
    a_fifth_sample: [("00001/samples", "numbered 0000.png to 0003.png")],
    another_name: [("00001/samples/2.png", "not a picture's name"), ("00001/samples", "numbered")],
    a_leftover: [("00001/samples/0002.png.new", "not a picture's name")],
    cut_png: [("00001/samples/0002.png", "not a whole PNG")],
    no_png: [("00001/samples/0002.png", "not a whole PNG")],
    grey_png: [("00001/samples/0002.png", "mode L")],
    broken_grid: [("00001/grid.png", "not a whole PNG")],
    swapped_metadata: [("00001/metadata.jsonl", "its prompt is 'a photo of a dog right of a tv'")],
    another_count: [("00001/metadata.jsonl", "differ in what is asked")],
    two_lines: [("00001/metadata.jsonl", "2 lines")],
    no_metadata: [("00001/metadata.jsonl", "missing")],
    broken_metadata: [("00001/metadata.jsonl", "not JSON")],
    no_samples: [("00001/samples", "missing")],
    extra_number: [("00007", "an extra folder; the last prompt's is 00002")],
    extra_name: [("settings", "an extra folder; the scorer skips names that are not numbers")],
    four_digits: [("0003", "an extra folder; a prompt's folder has five digits")],
    missing_folder: [("00001", "missing; folders count from 00000")],
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_named_and_nothing_else(folder, prompts, plant):
    plant(folder)
    faults = check_folder(folder, prompts)
    assert len(faults) == len(PLANTED[plant]), faults
    for path, message in PLANTED[plant]:
        (fault,) = [fault for fault in faults if fault.startswith(f"{folder / path}: ")]
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(fault)


def test_without_the_prompt_file_a_gap_is_seen_too(folder):
    missing_folder(folder)
    assert sorted(fault.partition(": ")[0] for fault in check_folder(folder)) == [
        str(folder / "00001"), str(folder / "00002")
    ]  # fmt: skip


def test_fewer_folders_than_prompts_are_missing(folder, prompts):
    shutil.rmtree(folder / "00002")
    assert check_folder(folder) == []
    assert check_folder(folder, prompts) == [f"{folder / '00002'}: missing; folders count from 00000 without a gap"]


def write_results(path, tasks):
    """tasks: {tag: (correct, pictures)}."""
    lines = [
        json.dumps({"filename": "x", "tag": tag, "prompt": "p", "correct": k < correct, "reason": "", "metadata": "{}"})
        for tag, (correct, count) in tasks.items()
        for k in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_overall_score_is_the_unweighted_mean_of_the_six_tasks(tmp_path):
    """Of very different numbers of pictures, so that a mean over pictures would be another."""
    tasks = {
        "single_object": (8, 8),
        "two_object": (1, 2),
        "counting": (1, 4),
        "colors": (3, 4),
        "position": (0, 16),
        "color_attr": (1, 10),
    }
    scores = geneval.read_scores(write_results(tmp_path / "results.jsonl", tasks))
    assert scores.tasks == tasks
    assert scores.overall == pytest.approx((1 + 0.5 + 0.25 + 0.75 + 0 + 0.1) / 6, rel=1e-12)
    assert scores.lines()[-1] == "GenEval overall (mean of 6 tasks): 0.4333"
    assert scores.lines()[1].split() == ["two_object", "50.00%", "(1", "of", "2)"]
    assert scores.to_dict()["tasks"]["counting"] == {"score": 0.25, "correct": 1, "images": 4}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"single_object": (1, 2)}, "lacks color_attr, colors, counting, position, two_object"),
        ({**{tag: (1, 2) for tag in geneval.TASKS}, "mine": (1, 1)}, "has also mine"),
    ],
)
def test_there_is_no_overall_score_of_other_tasks(tmp_path, tasks, message):
    scores = geneval.read_scores(write_results(tmp_path / "results.jsonl", tasks))
    assert scores.overall is None
    assert message in scores.lines()[-1]


@pytest.mark.parametrize("line", ["{", "[]", '{"tag": "colors"}', '{"tag": "colors", "correct": "yes"}'])
def test_results_that_are_none_are_refused(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match="line 1 (is not JSON|has no 'tag')"):
        geneval.read_scores(path)
