"""examples/shapes/run.sh and examples/reproduce/run.sh, from nothing to a score and a report."""

import json
import shutil
import subprocess

import pytest
from PIL import Image

from megadit.study.page import fill


@pytest.mark.drill
@pytest.mark.timeout(1200)
def test_shapes_are_trained_drawn_judged_and_their_routing_shown(tmp_path):
    run = tmp_path / "run"
    small = ["run.steps=6", "data.global_batch=8", "sample.steps=2", "log.evaluate_every=0", "log.sample_every=0"]
    command = ["bash", "examples/shapes/run.sh", f"run.dir={run}", *small]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("score: 0.")
    result = json.loads((run / "shapes.json").read_text())
    assert list(result["tasks"]) == ["single_object", "colors", "position"] and result["step"] == 6
    assert Image.open(run / "samples.png").mode == "RGB"
    assert any(path.suffix == ".png" for path in (run / "heatmap").iterdir())


@pytest.mark.drill
@pytest.mark.timeout(1200)
def test_a_study_is_run_and_reported_and_a_second_time_costs_nothing(tmp_path):
    study = tmp_path / "tried.yaml"
    shutil.copy("examples/shapes/train_32.yaml", tmp_path / "base.yaml")
    overrides = "run.steps=3, data.global_batch=4, log.evaluate_every=3, log.sample_every=0, sample.steps=1"
    variants = "{a: {label: experts}, b: {label: dense, set: [model.experts=0, model.ffn_ratio=6]}}"
    judge = "{trained: 2, heldout: 1}"
    study.write_text(
        f"name: tried\nbase: base.yaml\nseeds: [0, 1]\nset: [{overrides}]\nvariants: {variants}\njudge: {judge}\n"
    )
    out = tmp_path / "out"
    for _ in range(2):
        done = subprocess.run(
            ["bash", "examples/reproduce/run.sh", study, "--out", out], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{out / 'report.md'}\n"
    assert "0 of 4 trials" in done.stderr
    assert fill(out / "report.md", write=False) == []
