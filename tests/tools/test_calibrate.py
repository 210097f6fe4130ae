"""Calibration finds the rates that explain measured times, and its verdict is right."""

import importlib.util
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from megadit.planning.hardware import Efficiency, Gpu, load_gpu
from megadit.planning.timing import seconds_of_collective
from megadit.training.config import check, load_config


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("calibrate", "tools/calibrate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibrate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["calibrate"]


TRUE = Efficiency(
    matrix=0.5,
    memory=0.4,
    link=0.3,
    network=0.3,
    launch_seconds=2e-5,
    latency_seconds=2e-4,
    message_seconds=1e-4,
    network_latency_seconds=2e-4,
)
CPU = Gpu("cpu", 10**9, {"float32": 1e11}, 1e10, 2e9, 2e9, gpus_per_node=8, cores=2, efficiency=TRUE)


@pytest.fixture(scope="module")
def predictor(tool):
    return tool.Predictor(tool.MEASURED, "cpu", CPU)


def test_coordinates_and_back(tool):
    same = tool.at_coordinates(CPU, tool.coordinates(CPU))
    assert same.efficiency.__dict__ == pytest.approx(TRUE.__dict__, rel=1e-12)
    assert replace(same, efficiency=TRUE) == CPU
    for far in (-30.0, 30.0):
        gpu = tool.at_coordinates(CPU, np.full(6, far))
        assert 0 < gpu.efficiency.matrix <= 1 and gpu.efficiency.launch_seconds > 0


def test_the_fit_finds_what_made_the_times(tool):
    """More times than unknowns, each a sum of parts that differ from time to time."""
    random = np.random.default_rng(0)
    amounts, true = random.uniform(1, 10, (20, 6)), random.uniform(-3, 3, 6)

    def predict(x):
        return amounts @ np.exp(x)

    found = tool.fit(predict, predict(true), np.zeros(6), np.full(6, 100.0), noise=1e-3)
    assert found == pytest.approx(true, abs=1e-3)


def test_the_fit_keeps_to_what_is_known_where_times_say_nothing(tool):
    def predict(x):
        return np.exp(x[:1])  # of the second nothing is seen

    found = tool.fit(predict, np.array([8.0]), np.array([0.0, 5.0]), np.array([1.0, 1.0]), noise=1e-3)
    assert found == pytest.approx([np.log(8), 5.0], abs=1e-4)
    # A doubtful time moves half of the way to what is equally doubtful.
    found = tool.fit(predict, np.array([8.0]), np.array([0.0, 5.0]), np.array([0.1, 1.0]), noise=0.1)
    assert found == pytest.approx([np.log(8) / 2, 5.0], abs=1e-4)


def test_three_layouts_are_explained_and_what_is_found_is_near_the_truth(tool, predictor):
    """The plans of a machine play the measurements; the fit begins with all its costs too high."""
    wrong = [0.6, 0.6, 0.7, 1.6, 1.2, 1.3]
    start = tool.at_coordinates(CPU, tool.coordinates(CPU) + np.log(wrong))
    seconds = predictor.seconds(CPU)
    played = [tool.Measurement(case, [[second]]) for case, second in zip(tool.MEASURED, seconds, strict=True)]
    found = tool.calibrated(start, played, "cpu")
    before, after = (tool.judge(gpu, played, "cpu").errors for gpu in (start, found))
    assert min(map(abs, before)) > 0.3
    assert max(map(abs, after)) < 0.01
    error = np.abs(tool.coordinates(found) - tool.coordinates(CPU))
    assert error.max() < np.log(1.35) and np.median(error) < np.log(1.2)


def test_twice_the_cost_of_everything_is_twice_the_seconds(predictor):
    """No term has a constant that a calibration cannot reach."""
    halves = {name: getattr(TRUE, name) / 2 for name in ("matrix", "memory", "link", "network")}
    doubles = {name: 2 * value for name, value in TRUE.__dict__.items() if name.endswith("_seconds")}
    slow = replace(CPU, efficiency=replace(TRUE, **halves, **doubles))
    assert predictor.seconds(slow) == pytest.approx(2 * predictor.seconds(CPU), rel=1e-9)


def test_cores_are_shared_and_gpus_are_not(predictor):
    """With cores for all, a rank's waiting is nobody's work; with fewer, the work of all is what takes long."""
    one, two, many = (predictor.seconds(replace(CPU, cores=cores)) for cores in (1, 2, 1000))
    assert one[0] == two[0] == many[0], "one process"
    assert one[1:] == pytest.approx(2 * two[1:])
    assert one[1] == pytest.approx(2 * many[1], rel=0.05), "two ranks that never wait"
    assert many[2] < two[2] < 2 * many[2], "four on two cores, in a pipeline that waits"
    for plan in predictor.plans(replace(CPU, cores=0)):
        assert plan.seconds == plan.timeline.total + plan.update_seconds


def test_the_terms_of_a_plan_are_its_seconds(tool, predictor):
    for cores in (0, 1, 2):
        for plan in predictor.plans(replace(CPU, cores=cores)):
            assert sum(plan.terms.values()) == pytest.approx(plan.seconds, rel=1e-12)
            assert min(plan.terms.values()) >= -1e-12


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_spearmans(tool, ties):
    random = np.random.default_rng(1)
    for _ in range(20):
        one, other = random.integers(0, 5, (2, 9)) if ties else random.uniform(size=(2, 6))
        assert tool.spearman(list(one), list(other)) == pytest.approx(spearmanr(one, other).statistic)


def measurement(tool, *rounds, name="a"):
    return tool.Measurement(tool.Case(name, 2, 96), [list(steps) for steps in rounds])


def test_a_time_is_the_median_of_all_steps_and_noise_is_between_trainings(tool):
    one = measurement(tool, (1.0, 1.1, 9.0), (1.2, 1.3, 1.4))
    assert one.seconds == pytest.approx(1.25)
    assert one.noise == pytest.approx((1.3 - 1.1) / 1.25)


def test_the_verdict(tool):
    measured = [measurement(tool, (seconds,)) for seconds in (1.0, 2.0, 4.0)]
    verdict = tool.Verdict(measured, [1.5, 1.8, 4.0])
    assert verdict.errors == pytest.approx([0.5, -0.1, 0.0])
    assert verdict.median_error == pytest.approx(0.1)
    assert verdict.correlation == pytest.approx(1.0) and verdict.holds
    assert not tool.Verdict(measured, [1.5, 2.6, 4.0]).holds, "a median error of 30%"
    assert not tool.Verdict(measured, [1.0, 4.4, 4.0]).holds, "a rank correlation of 0.5"
    assert verdict.summary() == "rank correlation 1.00, median error 10%"
    assert [row.split()[-4:-1] for row in list(verdict.lines())[1:]] == [
        ["1.500", "1.000", "+50%"],
        ["1.800", "2.000", "-10%"],
        ["4.000", "4.000", "+0%"],
    ]


def test_collectives_give_latency_messages_and_bandwidth(tool):
    """All-reduces that take as long as the machine would take for them."""

    def reduced(gpu, size, nbytes):
        return gpu.slowdown(size) * seconds_of_collective("all-reduce", nbytes, size, size, gpu)

    for sizes in ((2, 4), (2, 8)):
        times = {(size, nbytes): reduced(CPU, size, nbytes) for size in sizes for nbytes in (8, 1 << 24)}
        latency, message, link = tool.messages_of(times, CPU)
        assert (latency, message) == pytest.approx((2e-4, 1e-4), rel=1e-4)
        assert link == pytest.approx(2e9 * 0.3, rel=1e-4)
    # Two GPUs do not tell a message from a collective.
    latency, message, _ = tool.messages_of({(2, n): reduced(CPU, 2, n) for n in (8, 1 << 24)}, CPU)
    assert latency == pytest.approx(2e-4 + 2 * 1e-4, rel=1e-4) and message == tool.TINY


def test_no_judged_layout_is_one_that_was_measured(tool):
    assert len(tool.MEASURED) <= 3 and len(tool.JUDGED) == 6
    assert len({(case.processes, case.width, case.options) for case in (*tool.MEASURED, *tool.JUDGED)}) == 9
    layouts = [{case.processes, *(o for o in case.options if o.startswith("parallel"))} for case in tool.MEASURED]
    for case in tool.JUDGED:
        mine = {case.processes, *(option for option in case.options if option.startswith("parallel"))}
        assert mine not in layouts or case.processes == 1


def test_the_judged_layouts_differ_widely(tool):
    seconds = tool.Predictor(tool.JUDGED, "cpu", CPU).seconds(CPU)
    assert max(seconds) > 4 * min(seconds) > 0


def test_gpus_train_larger_models(tool):
    for case in (*tool.MEASURED, *tool.JUDGED):
        config = load_config(tool.CONFIG, case.overrides("cuda"))
        assert check(config, case.processes).ranks.numel() == case.processes
        assert config.model.width == 8 * case.width and config.run.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to do; give --out FILE"),
        (["--judge"], "--judge needs a GPU"),
        (["--judge", "h10"], "unknown GPU h10; the nearest is h100"),
        (["--judge", "nowhere.yaml"], "GPU nowhere.yaml: No such file"),
        (["--out", "a.yaml", "--steps", "0"], "--steps 0 and --rounds 3 must be 1 or more"),
        (["--out", "no/such/folder/a.yaml"], "--out no/such/folder/a.yaml: that is a folder, or there is no folder"),
        (["--out", "a.json"], "--out a.json: tools/plan.py knows a file by its ending"),
        (["--judge", "h100", "--json", "tests"], "--json tests: that is a folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(tool, capsys, monkeypatch, argv, message):
    def refuse(*_):
        raise AssertionError("something was started")

    monkeypatch.setattr(tool, "torchrun", refuse)
    assert tool.main(argv) == 2
    assert capsys.readouterr().err.startswith(f"calibrate: {message}")


@pytest.mark.slow
def test_a_training_that_fails_says_why(tool, capsys, monkeypatch):
    monkeypatch.setattr(tool, "JUDGED", (tool.Case("odd", 1, 97),))
    assert tool.main(["--judge", "h100", "--rounds", "1"]) == 2
    assert "model.width=97 is not a multiple of 4" in capsys.readouterr().err


@pytest.mark.drill
def test_a_machine_is_measured_and_judged(tool, tmp_path, capsys):
    """Two short trainings in place of nine, on real processes. One training is judged by itself: what the fit saw."""
    cases = tuple(replace(case, width=64) for case in tool.MEASURED[:2])
    tool.MEASURED, tool.JUDGED, before = cases, cases, (tool.MEASURED, tool.JUDGED)
    out, numbers = tmp_path / "mine.yaml", tmp_path / "all.json"
    try:
        status = tool.main(["--out", str(out), "--judge", "--json", str(numbers), "--steps", "4", "--rounds", "1"])
    finally:
        tool.MEASURED, tool.JUDGED = before
    printed = capsys.readouterr().out
    assert status in (0, 1)
    gpu, written = load_gpu(str(out)), json.loads(numbers.read_text())
    assert gpu.cores > 0 and gpu.matrix_rate.keys() == {"bfloat16", "float32", "float64"}
    assert 1e9 < gpu.rate("float32") < 1e13 and 1e8 < gpu.memory_bandwidth < 1e12
    assert 1e-7 < gpu.efficiency.launch_seconds < 1e-3
    assert max(abs(case["error"]) for case in written["calibrated"]["cases"]) < 0.1, "the fit explains what it saw"
    assert len(written["judged"]["cases"]) == 2 and "rank correlation" in printed
    assert written["gpu"]["efficiency"]["launch_seconds"] == gpu.efficiency.launch_seconds
    comment = [line for line in out.read_text().splitlines() if line.startswith("#")]
    assert any("tensor 2" in line for line in comment) and any("torch" in line for line in comment)
