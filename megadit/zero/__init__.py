"""The optimizer behind one protocol: `zero.stage=0` is plain and exact, 1 and 2 are DeepSpeed's.

DeepSpeed is imported only when it is asked for: it takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from megadit.parallel.grid import Grid
from megadit.zero.groups import Engine, Fragment, NamedParameters, OptimConfig, Update, ZeroConfig
from megadit.zero.reference import ReferenceEngine

__all__ = ["Engine", "Fragment", "NamedParameters", "OptimConfig", "Update", "ZeroConfig", "create_engine"]


def create_engine(
    stage: int, named: NamedParameters, grid: Grid, config: OptimConfig, decays: Callable[[str], bool]
) -> Engine:
    """The engine of a ZeRO stage over this rank's parameters. Collective."""
    if stage == 0:
        return ReferenceEngine(named, grid, config, decays)
    from megadit.zero.engine import ZeroEngine

    return ZeroEngine(named, grid, config, decays, partition_gradients=stage == 2)
