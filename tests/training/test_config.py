"""The configuration: what wins, what a run writes down, and what every rule says of the defaults."""

import dataclasses
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megadit.model.config import PRESETS, ROUTING_PRESETS
from megadit.training.config import (
    RULES,
    SECTIONS,
    RunConfig,
    batch_divides,
    check,
    check_sizes,
    describe,
    differing,
    experts_divide,
    fit,
    key_of,
    layers_fill_stages,
    load_config,
    parse,
    patches_fit,
    tensor_divides,
    zero_keeps_precision,
)

CONFIG = "tests/configs/tiny.yaml"
EVERY_RULE = [rule for rules in RULES for rule in rules]


def write(path, text):
    path.write_text(text)
    return path


def test_an_override_beats_the_file_and_the_file_beats_the_default(tmp_path):
    path = write(tmp_path / "x.yaml", "optim: {lr: 0.5, clip: 3}\n")
    config = load_config(path, ["optim.lr=0.25"])
    assert (config.optim.lr, config.optim.clip, config.optim.warmup) == (0.25, 3.0, 0)
    assert load_config(path, ["optim.lr=0.25", "optim.lr=0.125"]).optim.lr == 0.125, "the last one wins"


def test_overrides_reach_sections_that_the_file_leaves_out_or_empty(tmp_path):
    path = write(tmp_path / "x.yaml", "data:\n")
    config = load_config(path, ["data.global_batch=8", "run.steps=3"])
    assert (config.data.global_batch, config.run.steps) == (8, 3)


FALLBACKS = ["parallel.pipeline=2", "parallel.tensor=2", "parallel.fallbacks=[{pipeline: 1}, {tensor: 1, pipeline: 1}]"]


@pytest.mark.parametrize(("world_size", "degrees"), [(8, (2, 2)), (4, (2, 2)), (2, (2, 1)), (1, (1, 1))])
def test_the_first_layout_that_fits_is_taken(world_size, degrees):
    found = fit(load_config(CONFIG, FALLBACKS), world_size).parallel
    assert (found.tensor, found.pipeline) == degrees
    assert found.fallbacks == load_config(CONFIG, FALLBACKS).parallel.fallbacks


def test_fallbacks_are_saved_and_checked_like_other_keys(tmp_path):
    config = load_config(CONFIG, FALLBACKS)
    assert load_config(write(tmp_path / "x.yaml", config.to_yaml())) == config
    with pytest.raises(ValueError, match=r"parallel.fallbacks\[0\].pipelin; the nearest is .*pipeline"):
        load_config(CONFIG, ["parallel.fallbacks=[{pipelin: 1}]"])


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load_config(write(tmp_path / "x.yaml", "")) == RunConfig()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=1e-3", 1e-3),  # YAML 1.1 takes this for a string
        ("optim.lr=1.e-3", 1e-3),
        ("optim.lr=2", 2.0),
        ("optim.betas=[0.8, 9e-1]", (0.8, 0.9)),
        ("parallel.sequence=true", True),
        ("run.seed=-7", -7),
        ("run.name=a=b", "a=b"),
        ("text.tokenizer=", ""),
        ("checkpoint.async=true", True),
    ],
)
def test_values_are_read_as_their_field_says(override, value):
    section, key = override.partition("=")[0].split(".")
    key = "async_" if key == "async" else key
    found = getattr(getattr(load_config(CONFIG, [override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_a_number_like_1e_3_in_the_file_is_a_number(tmp_path):
    assert load_config(write(tmp_path / "x.yaml", "optim:\n  lr: 1e-3\n  eps: 1e-8\n")).optim.lr == 1e-3


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim.lr=1e-07", "optim.betas=[0.1, 0.123456789012345678]", "run.name='yes: 1e-3'", "text.tokenizer=a b"],
        ["model.preset=ec-dit-m-64e", "model.layers=3"],
        ["model.routing_preset=nucleus", "model.capacity_overrides={3: 2.5}", "model.routing_group=2"],
        ["model.routing_preset=dit-moe"],
        ["checkpoint.async=true", "checkpoint.keep_every=100"],
    ],
)
def test_the_saved_configuration_reads_back_as_the_identical_one(overrides, tmp_path):
    config = load_config(CONFIG, overrides)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config
    assert parse(config.to_dict(), "again") == config, "as a checkpoint's metadata holds it"


def test_the_saved_configuration_writes_out_every_key():
    written = yaml.safe_load(RunConfig().to_yaml())
    assert {section: list(keys) for section, keys in written.items()} == {
        section: [key_of(field.name) for field in dataclasses.fields(kind)] for section, kind in SECTIONS.items()
    }


@pytest.mark.parametrize(
    ("overrides", "size", "message"),
    [
        ([], (8, 12), None),
        ([], (8, 11), "latent images of 8 x 11 cannot be cut into patches of model.patch=2"),
        (["parallel.tensor=4", "parallel.sequence=true"], (8, 12), None),
        (["parallel.tensor=4"], (8, 10), None),
        (
            ["parallel.tensor=8", "parallel.sequence=true"],
            (8, 10),
            "8 x 10 have 20 tokens, which parallel.tensor=8 does",
        ),
        (
            ["parallel.tensor=4", "parallel.sequence=true", "objective.keep_tokens=0.25"],
            (8, 12),
            "8 x 12 have 6 tokens kept in training .objective.keep_tokens., which parallel.tensor=4 does not divide",
        ),
    ],
)
def test_sizes_of_images_must_fit_patches_and_ranks(overrides, size, message):
    config = load_config(CONFIG, overrides)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_sizes(config, [(8, 8), size])


def test_what_an_older_version_called_states_is_precomputed(tmp_path):
    """In a file, in an override, and in a checkpoint's configuration, which then is no other one."""
    path = write(tmp_path / "x.yaml", "text: {kind: states, channels: 12}\n")
    config = load_config(path)
    assert config.text.kind == load_config(path, ["text.kind=states"]).text.kind == "precomputed"
    assert load_config(path, ["text.kind=t5"]).text.kind == "t5"
    now = config.to_dict()["text"]
    assert differing("text", {"kind": "states", "channels": 12}, now) == []
    assert differing("text", {"kind": "t5", "channels": 12}, now) == ["text.kind=t5 is now precomputed"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_expands_and_keys_beside_it_override_it(preset, tmp_path):
    path = write(tmp_path / "x.yaml", f"model: {{preset: {preset}, layers: 2}}\n")
    model = load_config(path, ["model.kv_heads=1"]).model
    expected = PRESETS[preset] | {"layers": 2, "kv_heads": 1}
    assert {key: getattr(model, key) for key in expected} == expected
    assert model.heads * model.head_width == model.width


@pytest.mark.parametrize("preset", ROUTING_PRESETS)
def test_a_way_to_route_goes_with_a_size_and_yields_to_keys_beside_it(preset, tmp_path):
    path = write(
        tmp_path / "x.yaml", f"model: {{routing_preset: {preset}, preset: ec-dit-xl-32e, capacity_factor: 3}}\n"
    )
    model = load_config(path).model
    expected = PRESETS["ec-dit-xl-32e"] | ROUTING_PRESETS[preset] | {"capacity_factor": 3.0}
    assert {key: getattr(model, key) for key in expected} == expected
    raw = ["data.micro_batch=2", "data.global_batch=4", "model.layers=4", f"model.routing_preset={preset}"]
    check(load_config(CONFIG, [*raw, "model.experts=4"]), 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes_the_rules(preset):
    check(replace(RunConfig(), model=parse({"model": {"preset": preset}}, "preset").model), 1)


def test_help_lists_every_key_as_an_override_that_sets_its_default(tmp_path):
    listed = [re.split(r"\s{2,}", line.strip())[0] for line in describe().splitlines() if line.startswith("  ")]
    keys = [
        f"{section}.{key_of(field.name)}" for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)
    ]
    assert [override.partition("=")[0] for override in listed] == keys
    other = write(tmp_path / "x.yaml", "optim: {lr: 5, betas: [0.1, 0.2]}\nrun: {seed: 5, dtype: float64}\n")
    assert load_config(other, listed) == RunConfig()


def test_the_run_writes_to_its_dir_or_to_runs_and_its_name():
    assert load_config(CONFIG).directory == Path("runs/tiny")
    assert load_config(CONFIG, ["run.dir=/elsewhere"]).directory == Path("/elsewhere")


@pytest.mark.parametrize("rule", EVERY_RULE, ids=lambda rule: rule.__name__)
def test_no_rule_finds_a_fault_in_the_defaults(rule):
    assert list(rule(RunConfig(), 1)) == []


def faults(rule, world_size, *overrides):
    return list(rule(load_config(CONFIG, overrides), world_size))


@pytest.mark.parametrize(
    ("rule", "world_size", "overrides"),
    [
        (tensor_divides, 8, ["parallel.tensor=8"]),
        (tensor_divides, 3, ["parallel.tensor=3", "model.heads=6", "model.kv_heads=3"]),
        (tensor_divides, 2, ["parallel.tensor=2", "parallel.sequence=true", "model.image_size=6"]),  # 9 tokens
        (experts_divide, 4, ["parallel.tensor=2", "parallel.expert=4"]),
        (patches_fit, 1, ["model.width=30"]),
        (layers_fill_stages, 5, ["parallel.pipeline=5"]),
        (zero_keeps_precision, 1, ["zero.stage=1"]),
        (batch_divides, 2, ["data.micro_batch=3"]),
        (batch_divides, 2, ["parallel.pipeline=2", "data.micro_batch=16"]),
    ],
)
def test_a_rule_finds_one_fault_and_check_passes_it_on(rule, world_size, overrides):
    (message,) = faults(rule, world_size, *overrides)
    with pytest.raises(ValueError, match=re.escape(message)):
        check(load_config(CONFIG, overrides), world_size)


@pytest.mark.parametrize("world_size", [2, 4, 6, 12])
@pytest.mark.parametrize("global_batch", [10, 17, 100])
def test_the_global_batch_that_is_proposed_is_accepted(world_size, global_batch):
    wrong = load_config(CONFIG, [f"data.global_batch={global_batch}"])
    (message,) = batch_divides(wrong, world_size)
    proposed = int(message.rpartition(" ")[2])
    check(replace(wrong, data=replace(wrong.data, global_batch=proposed)), world_size)


@pytest.mark.parametrize("tensor", [3, 5, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_tensor_degree_that_is_proposed_is_accepted(tensor, kv_heads):
    config = load_config(CONFIG, [f"parallel.tensor={tensor}", f"model.kv_heads={kv_heads}"])
    (message,) = tensor_divides(config, tensor)
    proposed = [int(number) for number in re.findall(r"\d+", message.rpartition("; use ")[2])]
    assert proposed == [degree for degree in (1, 2, 4) if degree <= kv_heads]
    for degree in proposed:
        check(replace(config, parallel=replace(config.parallel, tensor=degree)), degree)


def test_all_faults_of_a_round_are_reported_together():
    with pytest.raises(ValueError, match=r"parallel\.tensor=3 .*; parallel\.pipeline=5 "):
        check(load_config(CONFIG, ["parallel.tensor=3", "parallel.pipeline=5"]), 15)
