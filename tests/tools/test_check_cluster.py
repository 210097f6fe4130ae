"""The preflight as users start it: it passes on healthy ranks, and survives one that dies."""

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys

import pytest

from tests.ranks import _Ranks, launcher_environ

NAMES = ["arrival", "versions", "clock", "memory", "compute", "groups", "collectives", "bandwidth", "hops", "parity"]


def load():
    spec = importlib.util.spec_from_file_location("check_cluster", "tools/check_cluster.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clean_environ():
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_", "TORCHELASTIC"))
    }
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def torchrun(ranks, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*command, "tools/check_cluster.py", *arguments], env=clean_environ(), capture_output=True, text=True
    )


@pytest.mark.drill
def test_four_ranks_of_torchrun_pass_in_every_default_layout(tmp_path):
    out = tmp_path / "out.json"
    done = torchrun(4, "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("PASS  ", "SKIP  ", "FAIL  "))]
    assert [line.split()[1] for line in lines] == NAMES, "each check has one line, from rank 0"
    assert done.stdout.splitlines()[-1].startswith("PASS: 10 checks")
    found = json.loads(out.read_text())
    assert found["passed"] and [member["rank"] for member in found["members"]] == [0, 1, 2, 3]
    assert len(found["checks"][-1]["figures"]["deviations"]) == 4


def _main(rank, environ, victim, argv):
    """The tool on this rank of a launcher; the victim dies among the hops."""
    from megadit.preflight import hops

    os.environ.update({key: value.format(rank=rank) for key, value in environ.items()})
    if rank == victim:
        hops.start_hops = lambda *args: os._exit(9)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = load().main(argv)
    return status, said.getvalue()


def run_tool(world_size, victim, *argv):
    """What each rank returned, or how it ended."""
    ranks = _Ranks()
    try:
        ranks.ask(world_size, _main, launcher_environ(world_size), victim, argv)
        return [ranks.receive(rank)[:2] for rank in range(world_size)]
    finally:
        ranks.kill()


def test_ranks_of_a_launcher_pass(tmp_path):
    out = tmp_path / "out.json"
    answers = run_tool(2, None, "--quick", "--only", "versions,groups", "--layout", "expert=2", "--json", str(out))
    assert [(good, answer[0]) for good, answer in answers] == [(True, 0), (True, 0)]
    said, silence = answers[0][1][1], answers[1][1][1]
    assert said.startswith("check_cluster: 2 ranks, gloo") and "PASS  versions" in said and silence == ""
    found = json.loads(out.read_text())
    assert found["passed"] and [check["name"] for check in found["checks"]] == ["arrival", "versions", "groups"]
    assert found["settings"]["quick"] and len(found["members"]) == 2


def test_a_rank_that_dies_is_named_and_every_other_ends_with_status_1(tmp_path):
    out = tmp_path / "out.json"
    chosen = ["--only", "hops", "--layout", "pipeline=2,expert=2", "--limit", "3"]
    answers = run_tool(4, 2, *chosen, "--json", str(out))
    for rank, (good, answer) in enumerate(answers):
        assert not good and str(answer).endswith(f"exit code {9 if rank == 2 else 1}"), "not an endless wait"
    found = json.loads(out.read_text())
    assert found["hung"] and not found["passed"]
    (fault,) = found["checks"][-1]["faults"]
    assert fault.startswith("rank 2 (") and "said nothing" in fault


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layout", "tensor=3"], "does not divide the 4 processes"),
        (["--layout", "tensr=2"], "the nearest is tensor"),
        (["--layout", "tensor"], "has no value"),
        (["--layout", "tensor=0"], "degrees must be 1 or more"),
        (["--layout", "schedule=fast"], "schedule=fast"),
        (["--only", "hops,colectives"], "--only colectives: the checks are"),
        (["--limit", "0"], "--limit 0.0 must be more than 0"),
        (["--slow-factor", "nan"], "--slow-factor nan must be more than 0"),
        (["--memory-test", "-1"], "must be 0 or more"),
        (["--json", "no/such/folder/out.json"], "there is no folder"),
    ],
)
def test_bad_arguments_are_refused_before_anyone_is_met(argv, message, monkeypatch, capsys):
    for key, value in {"RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(key, value)
    assert load().main(argv) == 2
    assert message in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert load().main(argv) == 2
    assert capsys.readouterr() == ("", ""), "one rank says it for all"
