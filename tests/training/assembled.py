"""A run assembled on one rank of a test, as `megadit.train` assembles it."""

import torch

from megadit.runtime.launch import Process
from megadit.training.build import Run, build_run, read_inputs
from megadit.training.config import check, load_config

CONFIG = "tests/configs/tiny.yaml"


def assembled(rank: int, world_size: int, *overrides: str) -> Run:
    """The run of tiny.yaml with `overrides`, before its first step. Collective."""
    config = load_config(CONFIG, overrides)
    process = Process(rank, world_size, rank, torch.device("cpu"))
    return build_run(config, check(config, world_size), read_inputs(config), process)
