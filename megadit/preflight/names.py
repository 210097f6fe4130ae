"""The checks by name, in the order in which they are run; readable before torch is imported."""

NAMES = ("versions", "clock", "memory", "compute", "groups", "collectives", "bandwidth", "hops", "parity")
