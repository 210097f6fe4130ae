"""All checks, in the order in which they are run: each may rely on those before it."""

from __future__ import annotations

from megadit.preflight import bandwidth, clock, collectives, compute, groups, hops, memory, parity, versions
from megadit.preflight.names import NAMES
from megadit.preflight.runner import Check

MODULES = (versions, clock, memory, compute, groups, collectives, bandwidth, hops, parity)
CHECKS = tuple(Check(name, each.measure, each.judge) for name, each in zip(NAMES, MODULES, strict=True))
