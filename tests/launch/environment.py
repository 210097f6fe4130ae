"""What the processes of these tests are started with, and what a machine must have for them."""

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

# What a launcher may have left in the environment of the tests themselves.
LAUNCHERS_KEYS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ENVIRONMENT", "HOSTFILE", "NPROC", "PORT")
LAUNCHERS_PREFIXES = ("SLURM_", "MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_")
REQUIRED = "MEGADIT_REQUIRE_HOST_TESTS"  # set by .ci/run, which installs what these tests need


def environ(**extra):
    """The environment of a shell that knows where this Python's programs are, and of no launcher."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in LAUNCHERS_KEYS and not key.startswith(LAUNCHERS_PREFIXES)
    }
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    # On the CPU also where there is a GPU, so that losses compare.
    kept |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return kept | {key: str(value) for key, value in extra.items()}


def lack(what: str):
    """Skip: the machine lacks `what`. Where these tests are required, fail."""
    if os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, but {what}")
    pytest.skip(what)


def need_programs(packages: dict[str, Iterable[str]]):
    """Skip, or fail, unless root runs on Linux and all programs are there. `packages`: their Debian package each."""
    if sys.platform != "linux" or os.geteuid() != 0:
        lack("only root on Linux can start the daemons and make the namespaces of these tests")
    os.environ["PATH"] += os.pathsep + "/usr/sbin:/sbin"
    missing = [package for package, programs in packages.items() if not all(map(shutil.which, programs))]
    if missing:
        lack(f"not installed: {' '.join(missing)} (apt-get install --no-install-recommends {' '.join(missing)})")
