"""The benchmark saves what it says, on as many ranks as it is told, and reports what follows from what it measured."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from megadit import checkpoint


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("bench_checkpoint", "tools/bench_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_checkpoint"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_checkpoint"]


@pytest.mark.slow
def test_two_ranks_are_measured_and_nothing_is_left(tmp_path):
    folder, out = tmp_path / "disk", tmp_path / "out.json"
    folder.mkdir()
    command = [sys.executable, "tools/bench_checkpoint.py", "--gigabytes", "0.01", "--ranks", "2", "--repeats", "3"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--folder", str(folder), "--json", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["sync", "async", "stall"]
    assert not list(folder.iterdir()), "checkpoints are large"
    found = json.loads(out.read_text())
    assert found["bytes"] == pytest.approx(0.01e9, rel=0.01)
    assert found["setting"]["ranks"] == 2
    sync, background = found["rows"]
    assert (sync["name"], background["name"]) == ("sync", "async")
    for row in (sync, background):
        assert len(row["stall_seconds"]) == len(row["whole_seconds"]) == 3
        assert all(0 < stall <= whole for stall, whole in zip(row["stall_seconds"], row["whole_seconds"], strict=True))
        assert row["peak_bytes"] > 1e8, "a process that has imported torch"
    assert background["peak_bytes"] >= sync["peak_bytes"]
    ratios = [b / a for a, b in zip(sync["stall_seconds"], background["stall_seconds"], strict=True)]
    assert found["stall_ratio"] == sorted(ratios)[1]
    assert done.stdout.splitlines()[-1] == f"stall of async / stall of sync: {found['stall_ratio']:.3f}"


@pytest.mark.parametrize(("gigabytes", "ranks"), [(0.001, 1), (0.2, 2), (0.2, 3)])
def test_the_ranks_parts_are_whole_tensors_of_the_size_that_was_asked_for(gigabytes, ranks, tool):
    setting = tool.Setting(gigabytes, ranks, "cpu", "", 1)
    states = [tool.made_up_state(setting, rank, torch.device("cpu")) for rank in range(ranks)]
    size = 0
    for name, tensor in states[0].items():
        assert tensor.dtype == (torch.bfloat16 if name.startswith("weight.") else torch.float32)
        parts = [state[name].pieces[0] for state in states]
        assert [part.offsets[0] for part in parts] == [i * tensor.shape[0] // ranks for i in range(ranks)]
        assert sum(part.tensor.shape[0] for part in parts) == tensor.shape[0]
        size += sum(part.tensor.nbytes for part in parts)
    assert size == pytest.approx(gigabytes * 1e9, rel=0.05)
    assert len({float(state["master.layer_0000"].pieces[0].tensor[0, 0]) for state in states}) == ranks


def test_the_table_reports_medians_and_what_the_rounds_have_in_common(tool):
    rows = [
        tool.Row("sync", [4.0, 1.0, 2.0], [4.0, 1.0, 2.0], 9.0, 2_000_000_000),
        tool.Row("async", [0.4, 0.2, 0.1], [5.0, 3.0, 4.0], 0.9, 3_000_000_000),
    ]
    assert tool.stall_ratio(rows) == 0.1, "of 0.1, 0.2 and 0.05"
    lines = tool.table(8_000_000_000, rows).splitlines()
    assert lines[1].split() == ["sync", "2.000", "[1.000,", "4.000]", "9.000", "2.000", "4.00", "2.00"]
    assert lines[2].split() == ["async", "0.200", "[0.100,", "0.400]", "0.900", "4.000", "2.00", "3.00"]
    assert tool.Row("sync", [1.5], [1.5], 2.0, 1).spread() == "1.500 [1.500, 1.500]"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gigabytes", "0"], "argument --gigabytes: 0 is not more than 0"),
        (["--gigabytes", "1e9"], "this needs 3000000000.0 GB; lower --gigabytes"),
        (["--ranks", "none"], "argument --ranks: invalid int value: 'none'"),
        (["--repeats", "0"], "argument --repeats: 0 is not more than 0"),
        (["--folder", "no/such/folder"], "there is no such folder"),
        (["--json", "no/such/folder/out.json"], "there is no folder no/such/folder"),
        (["--device", "cuda"], "torch sees 0 GPUs here"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tool, argv, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_checkpoint.py", *argv])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_save_that_fails_is_no_measurement(tool, tmp_path, one_rank):
    (tmp_path / "sync").write_text("no folder")
    state = tool.made_up_state(tool.Setting(0.001, 1, "cpu", str(tmp_path), 1), 0, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="File exists"):
        tool.timed_save(checkpoint.Saver(tmp_path / "sync"), 1, state)


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
