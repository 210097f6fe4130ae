"""The dry run as a command, and as a function."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megadit.planning.dry_run import dry_run, ranks_to_play
from megadit.train import main
from megadit.training.config import load_config

CONFIG = "tests/configs/parity.yaml"
LAYOUT = ("parallel.pipeline=2", "parallel.expert=2", "parallel.tensor=2", "parallel.sequence=true")


def play(*argv):
    return main(["--config", CONFIG, "--dry-run", *argv])


def test_every_stage_reports_what_it_holds_and_sends(capsys):
    assert play("--world", "8", "--all-stages", *LAYOUT) == 0
    out = capsys.readouterr().out
    assert "rank 0 of 8 (tp 2, pp 2, ep 2, edp 1): layers 0-3" in out
    assert "rank 4 of 8" in out and "layers 4-7" in out
    for word in ("weights", "moments", "activations", "all-to-all", "reduce-scatter", "send", "bytes each"):
        assert word in out


def test_one_rank_is_played(capsys):
    assert play("--world", "8", "--as-rank", "5", *LAYOUT) == 0
    assert "rank 5 of 8" in capsys.readouterr().out


def test_one_process_is_the_default(capsys):
    assert play() == 0
    out = capsys.readouterr().out
    assert "rank 0 of 1" in out and "all-reduce" not in out


def test_the_world_is_the_launchers(capsys, monkeypatch):
    for key, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    assert play() == 0
    assert "rank 0 of 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--world", "8", "--as-rank", "8"), "rank 8 is not below the 8 processes"),
        (("--world", "8", "--as-rank", "1", "--all-stages"), "--as-rank"),
        (("--world", "0"), "--world 0 must be 1 or more"),
        (("--world", "8", "parallel.tensor=3"), "parallel.tensor=3"),
        (("model.routing=token_choice", "model.dropless=true"), "model.dropless=true"),
    ],
)
def test_bad_input_is_refused(capsys, argv, message):
    assert play(*argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_nothing_is_written(tmp_path, capsys):
    assert play(f"run.dir={tmp_path}/run") == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_dry_run_does_not_import_deepspeed():
    code = (
        "import sys; from megadit.train import main; "
        f"main(['--config', '{CONFIG}', '--dry-run', 'zero.stage=1', 'run.dtype=bfloat16']); "
        "assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_ranks_of_one_pipeline_rank_hold_and_send_as_much():
    config = load_config(CONFIG, LAYOUT)
    played = [dry_run(config, 8, rank) for rank in (0, 1, 3)]
    assert len({run.parameters for run in played}) == 1
    assert len({run.memory for run in played}) == 1
    assert played[0].collectives == played[1].collectives == played[2].collectives


def test_all_stages_are_one_rank_of_each():
    assert ranks_to_play(load_config(CONFIG, LAYOUT), 8, None, all_stages=True) == [0, 4]
