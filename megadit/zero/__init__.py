"""The optimizer behind one protocol: `zero.stage=0` is plain and exact, 1 and 2 are DeepSpeed's.

Engines are imported when one is created: the configuration is readable before torch, and DeepSpeed takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megadit.zero.config import OptimConfig, ZeroConfig

if TYPE_CHECKING:
    from megadit.parallel.grid import Grid
    from megadit.zero.groups import Engine, NamedParameters

__all__ = ["OptimConfig", "ZeroConfig", "create_engine"]


def create_engine(
    stage: int, named: NamedParameters, grid: Grid, config: OptimConfig, decays: Callable[[str], bool]
) -> Engine:
    """The engine of a ZeRO stage over this rank's parameters. Collective."""
    if stage == 0:
        from megadit.zero.reference import ReferenceEngine

        return ReferenceEngine(named, grid, config, decays)
    from megadit.zero.engine import ZeroEngine

    return ZeroEngine(named, grid, config, decays, partition_gradients=stage == 2)
