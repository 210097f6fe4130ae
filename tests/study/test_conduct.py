"""What is finished, what may stand beside it, and where trials run."""

import json
import shutil
from dataclasses import replace

import pytest

from megadit.study.conduct import Place, check_no_others, is_finished, places, record_path
from megadit.study.design import JudgeConfig, Trial, fingerprint
from megadit.study.hardware import cores

JUDGE = JudgeConfig(trained=10, heldout=5, seed=1)


@pytest.fixture
def trial(tmp_path):
    shutil.copy("examples/shapes/train_32.yaml", tmp_path / "base.yaml")
    return Trial(1, "dense", 3, tmp_path / "base.yaml", ("model.experts=0", "run.seed=3"))


@pytest.fixture
def finished(trial, tmp_path):
    """The folder of a study with the run and the record of this trial."""
    out = tmp_path / "out"
    (out / "records").mkdir(parents=True)
    (out / trial.name).mkdir()
    (out / trial.name / "config.yaml").write_text(trial.config().to_yaml())
    counts = {"trained": {"right": 1, "asked": 10}, "heldout": {"right": 0, "asked": 5}}
    record = {"place": 1, "label": "dense", "fingerprint": fingerprint(trial.config())}
    record |= {"score": {"seed": 1, "tasks": {"colors": counts}}}
    record_path(out, trial).write_text(json.dumps(record))
    return out


def test_a_trial_is_finished_when_its_record_is_there(trial, finished):
    written = record_path(finished, trial).read_bytes()
    assert is_finished(finished, trial, "dense", JUDGE)
    assert record_path(finished, trial).read_bytes() == written
    record_path(finished, trial).unlink()
    assert not is_finished(finished, trial, "dense", JUDGE)


@pytest.mark.parametrize("judge", [replace(JUDGE, trained=20), replace(JUDGE, heldout=6), replace(JUDGE, seed=2)])
def test_pictures_that_are_to_be_judged_otherwise_are(trial, finished, judge):
    assert not is_finished(finished, trial, "dense", judge)


def test_a_record_takes_the_studys_label_and_place(trial, finished):
    assert is_finished(finished, replace(trial, place=0), "no experts", JUDGE)
    record = json.loads(record_path(finished, trial).read_text())
    assert (record["place"], record["label"], record["score"]["seed"]) == (0, "no experts", 1)


def test_other_settings_are_refused_by_key(trial, finished):
    other = replace(trial, overrides=(*trial.overrides, "optim.lr=0.5"))
    with pytest.raises(ValueError, match=r"holds dense_seed3 with other settings \(optim.lr=0.004 is now 0.5\); use"):
        is_finished(finished, other, "dense", JUDGE)
    shutil.rmtree(finished / trial.name)
    assert is_finished(finished, trial, "dense", JUDGE)
    with pytest.raises(ValueError, match=r"with other settings \(unknown which: its folder is gone\)"):
        is_finished(finished, other, "dense", JUDGE)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"fingerprint": "a", "score": {}}'])
def test_a_record_that_is_none_is_named(trial, finished, text):
    record_path(finished, trial).write_text(text)
    with pytest.raises(ValueError, match=r"dense_seed3.json is no record of a trial"):
        is_finished(finished, trial, "dense", JUDGE)


def test_records_of_other_trials_are_refused(trial, finished):
    check_no_others(finished, [trial])
    with pytest.raises(ValueError, match=r"records holds dense_seed3.json, not of this study; use another --out"):
        check_no_others(finished, [replace(trial, seed=4)])


def test_places_share_what_there_is():
    assert [place.gpu for place in places(0, gpus=2, trials=9)] == [0, 1]
    assert [place.gpu for place in places(3, gpus=2, trials=9)] == [0, 1, 0]
    assert places(0, gpus=0, trials=1) == [Place(cores(), None)]
    assert places(0, gpus=0, trials=1000) == [Place(1, None)] * cores()
    assert places(0, gpus=0, trials=0) == places(0, gpus=0, trials=1)


def test_a_trial_sees_its_gpu_among_those_that_the_user_chose(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Place(1, 1).environment["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5a")
    assert Place(1, 1).environment["CUDA_VISIBLE_DEVICES"] == "GPU-5a"
    environment = Place(2, None).environment
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["DS_ACCELERATOR"]) == ("", "cpu")
    assert environment["OMP_NUM_THREADS"] == "2"
