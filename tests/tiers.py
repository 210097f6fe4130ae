"""Tiers of parametrised tests: a few parameters are quick, the others are slow."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], parameters: Iterable[Any], unpack: bool = False) -> list[Any]:
    """Parameters of which all but those in `quick` are marked slow. unpack: each is a tuple of several arguments.

    Raises ValueError for one in `quick` that is no parameter.

    >>> [each.values[0] if hasattr(each, "values") else each for each in slow_but({"b"}, "abc")]
    ['a', 'b', 'c']
    """
    parameters = list(parameters)
    if unknown := [each for each in quick if each not in parameters]:
        raise ValueError(f"{unknown} are none of the parameters {parameters}")
    return [
        each if each in quick else pytest.param(*(each if unpack else [each]), marks=pytest.mark.slow)
        for each in parameters
    ]
