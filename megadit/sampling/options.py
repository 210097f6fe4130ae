"""Options of tools that draw: how, on which layout; each is of the name of the configuration's field that it replaces.

`given` finds what was said, and `spoken` puts messages about the configuration in the words of the options.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from megadit.parallel.layout import ParallelConfig
from megadit.sampling.config import SampleConfig

Options = TypeVar("Options", SampleConfig, ParallelConfig)

DRAWN = """pictures that a data-parallel replica takes at a time, whole groups of those that are routed together;
guidance doubles what the network sees"""


# --- values -----------------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return number


def several(text: str) -> int:
    """A whole number above 1, for argparse."""
    if positive(text) == 1:
        raise argparse.ArgumentTypeError("1 is not more than 1")
    return int(text)


def png(text: str) -> Path:
    """A PNG to be written, for argparse."""
    path = Path(text)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"{text} does not end in .png")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    return path


def height_width(text: str) -> tuple[int, int]:
    """Two sides as 256x320, for argparse."""
    height, cross, width = text.partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text} is not of the form HEIGHTxWIDTH, such as 256x320")
    return positive(height), positive(width)


def choices(kind: type, name: str) -> tuple[str, ...]:
    """What a field of a configuration can be.

    >>> choices(ParallelConfig, "schedule")
    ('1f1b', 'interleaved', 'zbv')
    """
    return get_args(get_type_hints(kind)[name])


class Interval(argparse.Action):
    """Two times, as the fields guidance_from and guidance_until."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(values, list)
        namespace.guidance_from, namespace.guidance_until = values


# --- options ----------------------------------------------------------------------------------------------------------


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """What the deepspeed launcher adds to a command; nobody needs it."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def add_drawing(parser: argparse.ArgumentParser, seed: int = 0) -> Any:
    """Options for the fields of SampleConfig, and --seed. Returns their group, for more of them."""
    group = parser.add_argument_group("how to draw it; by default as the run's section sample says")
    group.add_argument(
        "--seed",
        type=int,
        default=seed,
        help="of the noise: a picture's is that of seed and index (default: %(default)s)",
    )
    group.add_argument("--steps", type=positive, help="sampling steps; default: the run's sample.steps")
    group.add_argument("--guidance", type=float, help="guidance scale, 1 is none; default: the run's sample.guidance")
    group.add_argument(
        "--guidance-rescale",
        type=float,
        metavar="X",
        help="0 to 1: how far guidance may not change a velocity's spread, against burnt colours; default: the run's",
    )
    group.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("FROM", "UNTIL"),
        action=Interval,
        default=argparse.SUPPRESS,
        help="times between which there is guidance, 0 is the picture and 1 the noise; elsewhere a step costs half; "
        "default: the run's",
    )
    group.add_argument("--sampler", choices=choices(SampleConfig, "sampler"), help="default: the run's sample.sampler")
    return group


def add_size(group: Any) -> None:
    """The size of pictures."""
    group.add_argument("--size", type=height_width, metavar="HxW", help="in pixels; default: the model's square")


def add_autoencoder(group: Any) -> None:
    """What decodes; see megadit.training.decoder."""
    group.add_argument("--autoencoder", help="that decodes, by name or folder; default: that of the run's data")


def add_layout(parser: argparse.ArgumentParser) -> Any:
    """Options for the fields of ParallelConfig. Returns their group, for more of them."""
    group = parser.add_argument_group(
        "on how many processes; they are tensor x pipeline x expert x data, whatever the training had"
    )
    group.add_argument("--tensor", type=positive, help="ranks that a layer's heads are cut over (default: 1)")
    group.add_argument("--sequence", action="store_true", default=None, help="cut tokens over them, too")
    group.add_argument("--pipeline", type=positive, help="ranks that the layers are cut over (default: 1)")
    group.add_argument("--schedule", choices=choices(ParallelConfig, "schedule"), help="of a pipeline (default: 1f1b)")
    group.add_argument(
        "--stages-per-rank", type=positive, help="slices of the layers on a rank, if interleaved (default: 2)"
    )
    group.add_argument("--expert", type=positive, help="ranks that the experts are cut over (default: 1)")
    return group


def add_batch(group: Any, default: int, what: str = DRAWN) -> None:
    """Images of one call of the network on one rank; `what` they are, for the help."""
    group.add_argument("--batch", type=positive, default=default, help=f"{what} (default: %(default)s)")


# --- what was said ----------------------------------------------------------------------------------------------------


def given(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The fields of a configuration for which an option was given, with their values."""
    values = {field.name: getattr(args, field.name, None) for field in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def asked(args: argparse.Namespace, default: Options) -> Options:
    """A configuration with each field as the option of its name says, where that is given."""
    return replace(default, **given(args, type(default)))


# Fields of `sample` and `parallel` that are options, longer names first.
_NAMES = {
    "parallel": "stages_per_rank|pipeline|sequence|schedule|tensor|expert",
    "sample": "guidance_rescale|guidance|sampler|steps",
}
_KEY = re.compile("|".join(rf"(?<![\w./-]){section}\.(?:{names})\b=?" for section, names in _NAMES.items()))
_DEGREE = re.compile(r"(?<= x )(?:pipeline|expert)=")
_INTERVAL = re.compile(r"(?<![\w./-])sample\.guidance_from=(\S+) and sample\.guidance_until=(\S+)")


def spoken(message: str) -> str:
    """A message about a run's configuration, in the words of these options.

    >>> spoken("parallel.tensor=3 does not divide model.heads=4; use 1, 2 or 4")
    '--tensor 3 does not divide model.heads=4; use 1, 2 or 4'
    >>> spoken("parallel.tensor=2 x pipeline=1 x expert=2 = 4 does not divide the 3 processes that were started")
    '--tensor 2 x --pipeline 1 x --expert 2 = 4 does not divide the 3 processes that were started'
    >>> spoken("which parallel.tensor=2 does not divide; use parallel.sequence=false, or another size")
    'which --tensor 2 does not divide; use no --sequence, or another size'
    >>> spoken("sample.guidance_from=0.6 and sample.guidance_until=0.3 must be times; sample.guidance=1 is none")
    '--guidance-interval 0.6 0.3 must be times; --guidance 1 is none'
    >>> spoken("runs/sample.steps cannot be written, nor sample.png")
    'runs/sample.steps cannot be written, nor sample.png'
    """

    def option(match: re.Match[str]) -> str:
        return "--" + match[0].rpartition(".")[2].replace("_", "-").replace("=", " ")

    message = message.replace("parallel.sequence=false", "no --sequence")
    message = _INTERVAL.sub(r"--guidance-interval \1 \2", message)
    return _KEY.sub(option, _DEGREE.sub(option, message))
