"""Studies as they are written, and what is wrong with them before anything is trained."""

from pathlib import Path

import pytest

from megadit.model.count import forward_flops
from megadit.study.design import read_study, trials

STUDIES = sorted(path for path in Path("examples/reproduce").glob("*.yaml") if "variants:" in path.read_text())
STUDY = """
name: small
base: base.yaml
seeds: [3, 4]
set: [run.steps=5]
same_flops: true
variants:
  expert_choice: {label: expert choice}
  dense: {set: [model.experts=0, model.ffn_ratio=6.6667]}
"""


@pytest.fixture
def study(tmp_path):
    """A function that writes a study, with some of its text replaced, and returns its path."""
    (tmp_path / "base.yaml").write_text(Path("examples/shapes/train_32.yaml").read_text())

    def write(old="", new=""):
        path = tmp_path / "study.yaml"
        assert old in STUDY
        path.write_text(STUDY.replace(old, new) if old else STUDY)
        return path

    return write


def test_trials_are_every_variant_of_a_seed_before_the_next_seed(study):
    path = study()
    made = list(trials(read_study(path), path))
    assert [trial.name for trial in made] == [f"{v}_seed{s}" for s in (3, 4) for v in ("expert_choice", "dense")]
    config = made[-1].config()
    assert (config.run.seed, config.run.steps, config.model.experts, config.model.ffn_ratio) == (4, 5, 0, 6.6667)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_shipped_studies_are_sound(path):
    study = read_study(path)
    assert len(study.seeds) >= 3 and len(study.variants) >= 3


def test_the_three_of_the_comparison_do_the_same_work():
    path = Path("examples/reproduce/cpu.yaml")
    study = read_study(path)
    assert study.same_flops and set(study.variants) == {"expert_choice", "token_choice", "dense"}
    flops = {t.variant: forward_flops(t.config().model, t.config().text) for t in trials(study, path)}
    assert max(flops.values()) < 1.01 * min(flops.values())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[3, 4]", "[3]", r"seeds \[3\] must be two or more, all different"),
        ("[3, 4]", "[3, 3]", r"seeds \[3, 3\] must be two or more, all different"),
        ("ffn_ratio=6.6667", "ffn_ratio=4", r"same_flops, but a forward pass takes \(MFLOP\) expert_choice"),
        ("model.experts=0", "model.expert=0", "variant dense: unknown key model.expert; the nearest is model.experts"),
        ("base.yaml", "none.yaml", "none.yaml: No such file"),
        ("variants:", "variant:", "variants: Field required"),
        ("same_flops", "same_flop", "same_flop: Unexpected keyword argument"),
        ("{set:", "{sets:", "variants.dense.sets: Unexpected keyword argument"),
        ("seeds:", "judge: {trained: 0}\nseeds:", "judge.trained: Input should be greater than or equal to 1"),
        ("run.steps=5", "log.evaluate_every=0", "log.evaluate_every=0 leaves no held-out loss"),
        (
            "run.steps=5",
            "data.kind=digits, model.image_size=8, model.patch=2, model.channels=1",
            "the judge reads shapes",
        ),
        ("name: small", "name: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(study, old, new, message):
    path = study(old, new)
    with pytest.raises(ValueError, match=message) as raised:
        read_study(path)
    assert str(path) in str(raised.value)
