"""Options of tools that draw: what they change of a configuration, and what they refuse."""

import argparse
from dataclasses import fields

import pytest

from megadit.parallel.layout import ParallelConfig
from megadit.sampling import options
from megadit.sampling.generate import SampleConfig


def parsed(*argv):
    parser = argparse.ArgumentParser()
    options.add_launcher(parser)
    group = options.add_drawing(parser, seed=4)
    options.add_size(group)
    options.add_autoencoder(group)
    options.add_batch(options.add_layout(parser), 16)
    return parser.parse_args([str(one) for one in argv])


def test_what_is_not_said_stays():
    args = parsed("--local_rank", 1)
    assert options.given(args, SampleConfig) == options.given(args, ParallelConfig) == {}
    own = SampleConfig("unipc", steps=7, guidance_from=0.1)
    assert options.asked(args, own) == own
    assert (args.seed, args.batch, args.size, args.autoencoder) == (4, 16, None, None)


def test_every_option_is_a_field():
    how = ["--steps", 5, "--guidance", 1.5, "--sampler", "euler", "--guidance-rescale", 0.7]
    where = ["--tensor", 2, "--sequence", "--pipeline", 3, "--schedule", "zbv", "--stages-per-rank", 4, "--expert", 5]
    args = parsed(*how, "--guidance-interval", 0.2, 0.8, *where, "--size", "8x12")
    assert options.asked(args, SampleConfig(shift=3.0)) == SampleConfig("euler", 5, 1.5, 3.0, 0.7, 0.2, 0.8)
    layout = ParallelConfig(tensor=2, pipeline=3, expert=5, sequence=True, schedule="zbv", stages_per_rank=4)
    assert options.asked(args, ParallelConfig()) == layout
    assert args.size == (8, 12)
    # The others cannot be said: a shift is of the run's objective, fallbacks are for trainings.
    said = options.given(args, SampleConfig) | options.given(args, ParallelConfig)
    assert {field.name for kind in (SampleConfig, ParallelConfig) for field in fields(kind)} - said.keys() == {
        "shift",
        "fallbacks",
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", 0], "0 is not more than 0"),
        (["--size", "8"], "8 is not of the form HEIGHTxWIDTH, such as 256x320"),
        (["--size", "0x8"], "0 is not more than 0"),
        (["--sampler", "ddim"], "invalid choice: 'ddim'"),
        (["--guidance-interval", 0.5], "expected 2 arguments"),
        (["--schedule", "gpipe"], "invalid choice: 'gpipe'"),
    ],
)
def test_values_that_cannot_be_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        parsed(*argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (options.png, "grid.jpg", "grid.jpg does not end in .png"),
        (options.png, "grid", "grid does not end in .png"),
        (options.png, "{folder}", "is a folder; name a file in it"),
        (options.several, "1", "1 is not more than 1"),
        (options.several, "0", "0 is not more than 0"),
    ],
)
def test_kinds_of_values(kind, text, message, tmp_path):
    folder = tmp_path / "folder.png"
    folder.mkdir()
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(text.format(folder=folder))
    assert options.png(str(folder / "new/grid.png")) == folder / "new/grid.png" and options.several("2") == 2


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("use parallel.stages_per_rank=3 or parallel.schedule=zbv", "use --stages-per-rank 3 or --schedule zbv"),
        ("sample.guidance_rescale=2.0 must be between 0 and 1", "--guidance-rescale 2.0 must be between 0 and 1"),
        ("sample.sampler=unipc needs diffusers", "--sampler unipc needs diffusers"),
        ("sample.shift=-1.0 must be more than 0", "sample.shift=-1.0 must be more than 0"),
        ("parallel.fallbacks[0]: parallel.tensor=3", "parallel.fallbacks[0]: --tensor 3"),
        ("/data/parallel.expert/sample.steps.png: gone", "/data/parallel.expert/sample.steps.png: gone"),
    ],
)
def test_messages_speak_of_options_that_there_are(message, words):
    assert options.spoken(message) == words
