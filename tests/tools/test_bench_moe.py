"""The benchmark's contestants compute what they say, and what it measures of them is right."""

import importlib.util
import json
import sys
import time

import pytest
import torch

from megadit.model.moe import MoE


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("bench_moe", "tools/bench_moe.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_moe"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_moe"]


@pytest.fixture
def make(tool):
    """A function that makes a small problem in float64: 3 images of 24 tokens, 4 experts that take 12 each."""
    with tool.group_of_one() as group:
        sizes = {"width": 24, "experts": 4, "images": 3, "tokens": 24, "dtype": "float64"}
        yield lambda **changes: tool.Problem(tool.Setting(**(sizes | changes)), group)


@pytest.fixture
def problem(make):
    return make()


def results(tool, problem, name):
    return tool.CONTESTANTS[name](problem).step()


def same(found, wanted, tolerance=1e-12):
    for mine, want in zip(found, wanted, strict=True):
        assert want.norm() > 0.01
        torch.testing.assert_close(mine, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("capacity_factor", [2.0, 0.7, 9.0])
def test_the_einsum_form_computes_our_expert_choice_and_its_gradients(tool, make, capacity_factor):
    problem = make(capacity_factor=capacity_factor)
    same(results(tool, problem, "einsum"), results(tool, problem, "ours"))


def test_diffusers_layer_computes_our_layer_in_its_configuration(tool, problem):
    out, x, plain, time_, router, up, gate, down, shared_up, shared_gate, shared_down = results(
        tool, problem, "ours-nucleus"
    )
    assert all(gradient.norm() > 0.01 for gradient in (x, plain, time_)), "the router reads tokens and timestep"
    theirs = [torch.cat([gate, up], 2), down, torch.cat([shared_up, shared_gate]), shared_down]
    # It takes the softmax in float32.
    same(results(tool, problem, "nucleus-loop"), [out, x, plain, time_, router, *theirs], tolerance=1e-5)


def test_grouped_products_compute_what_the_loop_does(tool, make):
    problem = make(dtype="float32")
    same(results(tool, problem, "nucleus-grouped"), results(tool, problem, "nucleus-loop"), tolerance=1e-4)


def test_deepspeeds_layer_computes_our_token_choice_as_gshard_has_it(tool, make):
    problem = make(capacity_factor=1.0)  # some tokens are dropped
    gshard = {"routing": "token_choice", "capacity_factor": 0.5, "normalise_gates": True, "routing_group": 3}
    out, x, router, up, down = tool.ours(problem, **gshard).step()
    assert (out == 0).all(dim=-1).any(), "nobody was dropped"
    experts = [matrix for pair in zip(up.mT, down.mT, strict=True) for matrix in pair]
    # Its gate computes in float32.
    same(results(tool, problem, "deepspeed"), [out, x, router, *experts], tolerance=1e-5)


def test_token_choice_has_room_for_as_many_tokens_as_expert_choice(tool, problem):
    choice = tool.CONTESTANTS["ours-token-choice"](problem)
    assert tool.count_flops(choice.step) == tool.count_flops(tool.ours(problem).step)
    assert not torch.equal(choice.step()[0], results(tool, problem, "ours")[0])


def test_the_floor_is_the_products_of_the_experts_and_no_more(tool, make):
    problem = make(capacity_factor=0.9)  # ceil(24 x 0.9 / 4) = 6 tokens of each image
    assert problem.setting.picks == 3 * 6
    products = 2 * 3  # of two matrices, forward and the gradients of input and weight
    flops = tool.count_flops(tool.floor(problem).step)
    assert flops == products * 2 * (4 * 18) * 24 * 96
    router = 3 * 2 * (3 * 24) * 24 * 4
    assert tool.count_flops(tool.ours(problem).step) == flops + router


def test_rivals_have_equal_flops(tool, problem):
    flops = {
        name: tool.count_flops(build(problem).step) for name, build in tool.CONTESTANTS.items() if "gro" not in name
    }
    assert flops["dense"] == flops["floor"]
    assert flops["ours-token-choice"] == flops["ours"]
    picking_gates = 2 * 2 * (2 * 3 * 24 * 4)  # it takes each of a token's two gates by a product with a mask
    assert flops["deepspeed"] == flops["ours"] + picking_gates
    rows, timestep, masks = 3 * 24, 2 * 3 * 24 * 4, 2 * (4 * 12) * 24 * 24
    assert flops["nucleus-loop"] - 3 * 2 * rows * 48 * 4 == flops["ours-nucleus"] - 3 * (2 * rows * 24 * 4 + timestep)
    assert flops["nucleus-loop"] - 3 * 2 * rows * 48 * 4 == flops["floor"] + 3 * 2 * rows * 3 * 24 * 64, "shared expert"
    assert flops["einsum"] > flops["ours"] + 4 * 3 * masks


def test_grouped_products_are_counted_like_the_loops(tool, make):
    problem = make(dtype="float32")
    loop, grouped = (tool.count_flops(tool.nucleus(problem, grouped).step) for grouped in (False, True))
    assert grouped == loop


def test_a_smaller_problem_of_a_sweep_uses_the_first_experts_of_the_largest(tool, make):
    large = make(experts=8)
    small = large.of_fewer_experts(2)
    assert small.setting.experts == 2
    assert all(part.data_ptr() == large.gelu[name].data_ptr() for name, part in small.gelu.items())
    assert [tuple(part.shape) for part in small.gelu.values()] == [(2, 24), (2, 24, 96), (2, 96, 24)]
    moe = tool.our_layer(small.setting.config(), small.group)
    assert isinstance(moe, MoE) and moe.config.capacity(0, 24) == 24
    assert results(tool, small, "ours")[0].shape == (3, 24, 24)


def test_peak_memory_counts_what_is_held_at_once(tool):
    x = torch.zeros(1000, 1000)

    def step():
        first = x + 1
        second = first + 1
        del first
        third = second.exp_()
        return [third + 1]

    assert tool.peak_bytes(step, "cpu") == pytest.approx(2 * 4_000_000, abs=1000)
    assert tool.peak_bytes(lambda: [x.add_(1)], "cpu") < 1000


def test_peak_memory_of_a_step_holds_the_gradients_of_all_weights(tool, problem):
    weights = sum(weight.numel() for weight in problem.gelu.values()) * 8
    hidden = 4 * problem.setting.picks * 96 * 8
    measured = tool.peak_bytes(tool.ours(problem).step, "cpu")
    assert weights + 2 * hidden < measured < weights + 10 * hidden


def test_times_are_the_steps_own(tool):
    inner = []

    def step():
        inner.append(time.perf_counter())
        time.sleep(0.05)
        inner.append(time.perf_counter())
        return []

    start = time.perf_counter()
    seconds = tool.seconds_of(step, "cpu")
    assert inner[1] - inner[0] <= seconds <= time.perf_counter() - start


def test_ratios_are_formed_within_rounds(tool):
    slow = tool.Row("slow", seconds=[2.0, 40.0, 6.0, 10.0, 3.0])
    fast = tool.Row("fast", seconds=[1.0, 10.0, 2.0, 10.0, 2.0])
    assert slow.over(fast) == (2.0, 1.5, 3.0)
    assert str(slow.over(fast)) == "2.000 (1.500-3.000)"
    assert tool.Row("one", seconds=[3.0]).over(tool.Row("other", seconds=[2.0])) == (1.5, 1.5, 1.5)
    assert slow.over(tool.Row("missing", missing="no")) is None


def test_contestants_take_turns_and_who_cannot_run_says_why(tool):
    turns = []

    def contestant(name):
        def step():
            turns.append(name)
            return []

        return lambda: tool.Contestant(step)

    def absent():
        raise tool.CannotRun("not installed")

    def broken():
        return tool.Contestant(lambda: torch.zeros(2) @ torch.zeros(3))

    rows = tool.measure({"a": contestant("a"), "b": absent, "c": broken, "d": contestant("d")}, "cpu", repeats=3)
    assert turns == ["a", "a", "d", "d", "a", "d", "d", "a", "a", "d"]  # each counted, weighed, and three rounds
    assert [len(row.seconds) for row in rows] == [3, 0, 0, 3]
    assert rows[1].missing == "not installed"
    assert rows[2].missing.startswith("RuntimeError: ")
    lines = tool.table(rows).splitlines()
    assert lines[2].split(None, 1) == ["b", "cannot run: not installed"]
    with pytest.raises(RuntimeError):
        tool.measure({"ours": broken}, "cpu", repeats=1)


@pytest.fixture
def main(tool, monkeypatch, capsys):
    """The tool's main with this command line: (exit status, standard output, standard error)."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["bench_moe.py", *map(str, argv)])
        try:
            status = tool.main()
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


SMALL = ("--width", 16, "--experts", 4, "--images", 2, "--tokens", 8, "--repeats", 2, "--device", "cpu")


def test_a_contest_prints_a_table_and_writes_everything(main, tool, tmp_path):
    status, out, err = main(*SMALL, "--dtype", "float64", "--json", tmp_path / "out.json")
    assert status == 0, err
    names = [line.split()[0] for line in out.splitlines()[2:]]
    assert names == list(tool.CONTESTANTS)
    assert "nucleus-grouped   cannot run: RuntimeError" in out, "torch has no grouped products in float64"
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["setting"] == {
        **{"width": 16, "experts": 4, "images": 2, "tokens": 8, "capacity_factor": 2.0},
        **{"dtype": "float64", "device": "cpu"},
    }
    assert written["hardware"]["cores"] > 0 and written["hardware"]["threads"] > 0
    assert set(written["versions"]) == {"python", "torch", "deepspeed", "diffusers", "megadit"}
    rows = {row["name"]: row for row in written["rows"]}
    assert list(rows) == names
    grouped = rows.pop("nucleus-grouped")
    assert grouped["missing"] and grouped["over_ours"] is None and grouped["median_seconds"] is None
    for name, row in rows.items():
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0, name
        assert row["flops"] > 0 and row["peak_bytes"] > 0, name
        ratios = [a / b for a, b in zip(row["seconds"], rows["floor"]["seconds"], strict=True)]
        assert row["over_floor"]["median"] == pytest.approx(sum(ratios) / 2), name
        assert row["rival"] == ("ours-nucleus" if "nucleus" in name else "ours"), name
    assert rows["ours"]["over_ours"] == {"median": 1, "low": 1, "high": 1}


def test_a_sweep_compares_numbers_of_experts(main, tmp_path):
    status, out, err = main(*SMALL, "--sweep", "2,4,8", "--json", tmp_path / "out.json")
    assert status == 0, err
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["2", "4", "8", "floor:", "ours:"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["sweep"] == [2, 4, 8]
    rows = {row["name"]: row for row in written["rows"]}
    assert list(rows) == ["floor-2", "ours-2", "floor-4", "ours-4", "floor-8", "ours-8"]
    assert rows["floor-2"]["flops"] == rows["floor-8"]["flops"] > 0, "as many tokens for all"
    pairs = zip(rows["ours-8"]["seconds"], rows["floor-8"]["seconds"], strict=True)
    assert rows["ours-8"]["over_floor"]["median"] == pytest.approx(sum(a / b for a, b in pairs) / 2)


def test_a_library_that_is_not_installed_is_named(main, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed.moe.layer", None)
    monkeypatch.setitem(sys.modules, "diffusers.models.transformers.transformer_nucleusmoe_image", None)
    status, out, _ = main(*SMALL, "--only", "floor,deepspeed,nucleus-loop")
    assert status == 0
    assert "deepspeed         cannot run: deepspeed is not installed" in out
    assert "nucleus-loop      cannot run: diffusers with its NucleusMoELayer is not installed" in out


def test_one_expert_cannot_be_two_tokens_choices(main):
    status, out, _ = main(*SMALL, "--experts", 1, "--only", "ours,ours-token-choice")
    assert status == 0
    assert "cannot run: a token asks for 2 experts" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--experts", "0"], "argument --experts: 0 is not more than 0"),
        (["--width", "wide"], "argument --width: invalid int value: 'wide'"),
        (["--capacity-factor", "-1"], "argument --capacity-factor: -1 is not more than 0"),
        (["--capacity-factor", "inf"], "argument --capacity-factor: inf"),
        (["--repeats", "0"], "argument --repeats: 0 is not more than 0"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--only", "ours,megablocks"], "there is no contestant 'megablocks'; there are floor, dense, ours"),
        (["--sweep", "8,0"], "argument --sweep: 8,0 has a number that is not more than 0"),
        (["--sweep", "8,many"], "argument --sweep: invalid experts_list value: '8,many'"),
        (["--json", "no/such/folder/out.json"], "there is no folder no/such/folder"),
        (["--json", "tests"], "--json tests: that is a folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_timed(main, argv, message):
    status, out, err = main(*argv)
    assert status == 2 and out == ""
    assert message in err


def test_a_gpu_that_is_not_there_is_said(main, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = main("--device", "cuda")
    assert status == 2 and "torch sees no GPU here" in err
