"""Which layouts a cluster is tried in: those that are asked for, or a few that bring every axis on."""

from __future__ import annotations

from dataclasses import replace

from pydantic import TypeAdapter, ValidationError

from megadit.parallel.layout import Layout, ParallelConfig
from megadit.training.config import check_known

KEYS = ("tensor", "pipeline", "expert", "sequence", "schedule", "stages_per_rank")


def label(config: ParallelConfig, world_size: int) -> str:
    """What a report calls a layout.

    >>> label(ParallelConfig(tensor=2, pipeline=2, sequence=True, schedule="zbv"), 8)
    'tensor 2 x pipeline 2 x data 2, sequence, zbv'
    >>> label(ParallelConfig(), 1)
    'one process'
    """
    data = Layout.of(config, world_size).edp
    degrees = {"tensor": config.tensor, "pipeline": config.pipeline, "expert": config.expert, "data": data}
    words = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
    options = ["sequence"] * config.sequence + [config.schedule] * (config.schedule != "1f1b")
    return ", ".join([" x ".join(words) or "one process", *options])


def parse_layout(text: str, world_size: int) -> ParallelConfig:
    """The layout that `tensor=2,expert=2` stands for. Raises ValueError that says what to change.

    >>> layout = parse_layout("tensor=2,expert=2", 4)
    >>> layout.tensor, layout.pipeline, layout.expert
    (2, 1, 2)
    """
    values = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        check_known(key.strip(), KEYS, "key of a layout")
        if not equals:
            raise ValueError(f"--layout {text}: {key} has no value; use key=value,key=value")
        values[key.strip()] = value.strip()
    try:
        config = TypeAdapter(ParallelConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"--layout {text}: {first['loc'][-1]}={first['input']}: {first['msg']}") from error
    if min(config.tensor, config.pipeline, config.expert, config.stages_per_rank) < 1:
        raise ValueError(f"--layout {text}: degrees must be 1 or more")
    try:
        Layout.of(config, world_size)
    except ValueError as error:
        raise ValueError(f"--layout {text}: {error}") from error
    return config


def default_layouts(world_size: int) -> list[ParallelConfig]:
    """Every axis that so many ranks can have in one layout or another; tensor stays 2, experts go up to eight ways.

    >>> [label(config, 4) for config in default_layouts(4)]
    ['data 4', 'tensor 2 x expert 2', 'pipeline 2 x expert 2', 'tensor 2 x pipeline 2, sequence']
    >>> [label(config, 3) for config in default_layouts(3)], [label(config, 1) for config in default_layouts(1)]
    (['data 3', 'pipeline 3'], ['one process'])
    """
    found = [ParallelConfig()]
    if world_size % 2:
        if world_size > 1:
            smallest = next(degree for degree in range(3, world_size + 1) if world_size % degree == 0)
            found += [ParallelConfig(pipeline=smallest)] if smallest <= 16 else []
        return found
    half = world_size // 2
    experts = max(degree for degree in (1, 2, 4, 8) if half % degree == 0)
    found += [ParallelConfig(tensor=2, expert=min(experts, 4)), ParallelConfig(pipeline=2, expert=experts)]
    if half % 2 == 0:
        found.append(ParallelConfig(tensor=2, pipeline=2, sequence=True))
    elif experts == 1:
        found.append(ParallelConfig(expert=2))
    return [replace(config) for config in dict.fromkeys(found)]
