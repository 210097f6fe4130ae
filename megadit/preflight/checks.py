"""All checks, in the order in which they are run: each may rely on those before it."""

from __future__ import annotations

from megadit.preflight import bandwidth, clock, collectives, compute, groups, hops, memory, parity, versions
from megadit.preflight.runner import Check

CHECKS = (
    Check("versions", versions.measure, versions.judge),
    Check("clock", clock.measure, clock.judge),
    Check("memory", memory.measure, memory.judge),
    Check("compute", compute.measure, compute.judge),
    Check("groups", groups.measure, groups.judge),
    Check("collectives", collectives.measure, collectives.judge),
    Check("bandwidth", bandwidth.measure, bandwidth.judge),
    Check("hops", hops.measure, hops.judge),
    Check("parity", parity.measure, parity.judge),
)
