"""A study from its YAML to its report, by the commands that users type, with a kill on the way."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import run_python

STUDY = """
name: small
base: base.yaml
seeds: [0, 1]
set: [run.steps=4, data.global_batch=4, log.evaluate_every=2, log.sample_every=0, sample.steps=1]
variants:
  expert_choice: {label: expert choice}
  dense: {label: dense, set: [model.experts=0, model.ffn_ratio=6]}
judge: {trained: 2, heldout: 1, seed: 1}
"""


@pytest.fixture
def study(tmp_path):
    shutil.copy("examples/shapes/train_32.yaml", tmp_path / "base.yaml")
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def reproduce(*argv):
    return run_python("tools/reproduce.py", *argv)


def no_times(record):
    """What must repeat; peak memory and times do not."""
    kept = {key: value for key, value in record.items() if "seconds" not in key and "memory" not in key}
    return kept | {"score": {key: value for key, value in record["score"].items() if key != "faults"}}


@pytest.mark.drill
@pytest.mark.timeout(1800)
def test_a_killed_study_goes_on_to_the_same_records(study, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = reproduce("run", study, "--out", whole, "--workers", 2)
    assert (done.returncode, done.stdout) == (0, f"{whole / 'records'}\n"), done.stderr
    records = {path.name: json.loads(path.read_text()) for path in (whole / "records").iterdir()}
    assert sorted(records) == [
        f"{variant}_seed{seed}.json" for variant in ("dense", "expert_choice") for seed in (0, 1)
    ]
    assert {r["heldout_curve"][-1][0] for r in records.values()} == {4}
    command = [sys.executable, "tools/reproduce.py", "run", str(study), "--out", str(killed), "--workers", "2"]
    with (tmp_path / "stderr").open("w") as told:
        process = subprocess.Popen(command, stderr=told)
    while not any((killed / "records").glob("*.json")):
        time.sleep(0.5)
        assert process.poll() is None, (tmp_path / "stderr").read_text()
    process.send_signal(signal.SIGKILL)  # what it started ends with it
    process.wait()
    first = next((killed / "records").glob("*.json"))
    written = first.stat().st_mtime_ns
    resumed = reproduce("run", study, "--out", killed, "--workers", 2)
    assert resumed.returncode == 0, resumed.stderr
    assert first.stat().st_mtime_ns == written, "what is finished is not repeated"
    for name, record in records.items():
        again = json.loads((killed / "records" / name).read_text())
        del record["machine"], again["machine"]  # other trials beside it
        assert no_times(again) == no_times(record)
    shutil.copy("examples/reproduce/report.md", whole / "report.md")
    reported = reproduce("report", whole / "report.md")
    assert (reported.returncode, reported.stdout) == (0, f"{whole / 'report.md'}\n"), reported.stderr
    assert (whole / "measures.png").stat().st_size > 10_000
    assert reproduce("report", whole / "report.md", "--check").returncode == 0
    study.write_text(STUDY.replace("ffn_ratio=6", "ffn_ratio=5"))
    other = reproduce("run", study, "--out", whole)
    assert other.returncode == 2
    assert other.stderr.endswith(
        f"reproduce: {whole} holds dense_seed0 with other settings (model.ffn_ratio=6.0 is now 5.0); "
        "use another --out, or remove it from there\n"
    )


def test_bad_input_is_one_line_before_anything_is_trained(study, tmp_path):
    study.write_text(STUDY.replace("model.experts=0", "model.expert=0"))
    done = reproduce("run", study, "--out", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr == (
        f"reproduce: {study}: variant dense: unknown key model.expert; the nearest is model.experts\n"
    )
    done = reproduce("report", tmp_path / "none.md")
    assert done.returncode == 2 and done.stderr.startswith(f"reproduce: {tmp_path / 'none.md'}: No such file")


@pytest.mark.drill
@pytest.mark.timeout(1800)
def test_a_trial_that_fails_is_named_with_the_end_of_its_log(study, tmp_path):
    out = tmp_path / "out"
    (out / "dense_seed0").mkdir(parents=True)
    (out / "dense_seed0" / "metrics.jsonl").mkdir()  # the run cannot write its metrics
    done = reproduce("run", study, "--out", out, "--workers", 1)
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("reproduce: dense_seed0 ended with status") and "metrics.jsonl" in line
    assert Path(out / "records" / "expert_choice_seed0.json").exists()
