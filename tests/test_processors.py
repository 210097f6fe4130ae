"""The quick tests under settings that stand in for other processors: libraries choose their kernels by them."""

import os
import subprocess
import sys

import pytest

# MKL's kernels for every x86 processor and for those of 2013, torch's without vectors and with those of 2013, and sums
# that are cut among two threads.
SETTINGS = [
    {"MKL_CBWR": "COMPATIBLE"},
    {"MKL_CBWR": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"OMP_NUM_THREADS": "2"},
]
TIME_LIMIT = 1700  # seconds: less than a drill's own


def name_of(setting):
    return "=".join(*setting.items())


@pytest.mark.drill
@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_the_quick_tests_pass_on_kernels_of_another_processor(setting, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-n", "2", "--dist", "loadfile"]
    command += [f"--basetemp={tmp_path / 'tests'}"]
    done = subprocess.run(
        command, env=os.environ | setting, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=TIME_LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"quick tests fail with {name_of(setting)}. One that passes without compares two ways of computing to the bit; "
        f"compare to 1e-12 in float64:\n{done.stdout[-20_000:]}"
    )
