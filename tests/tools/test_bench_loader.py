"""The benchmark of the loader, with tiny numbers: what it prints follows from what it measured, and nothing is left."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from megadit.model.config import PRESETS, ECDiTConfig
from megadit.model.count import PAPER_TEXT, forward_flops
from tools.bench_loader import Row, consumed


@pytest.mark.slow
def test_both_kinds_of_text_are_measured_and_nothing_is_left(tmp_path):
    folder, out = tmp_path / "disk", tmp_path / "out.json"
    folder.mkdir()
    # A new interpreter: the peak of memory of a forked one begins with that of its parent.
    command = [sys.executable, "tools/bench_loader.py", "--gigabytes", "0.02", "--batch", "4"]
    done = subprocess.run([*command, "--folder", folder, "--json", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir()), "data sets are large"
    lines = done.stdout.splitlines()
    found = json.loads(out.read_text())
    assert [line[:10].strip() for line in lines[4:6]] == ["77 x 1024", "256 x 4096"]
    for row, tokens, channels in zip(found["rows"], (77, 256), (1024, 4096), strict=True):
        assert row["sample_bytes"] == 2 * (8 * 32 * 32 + tokens * channels)
        assert row["samples"] * row["sample_bytes"] == pytest.approx(0.02e9, rel=0.3)
        assert min(row["cold"], row["warm"], row["cpu"]) > 0
        assert row["wanted"] == consumed(tokens, channels)
    small, large = found["index"]
    assert (small["entries"], large["entries"]) == (10_000, 10**7)
    assert 0 <= large["grown"] < 20e6, "two bytes a sample"
    assert lines[2].startswith("index of 10,000,000 samples in shards of 4,096: ")


@pytest.mark.parametrize(("tokens", "channels", "expected"), [(77, 1024, 643.8), (256, 4096, 605.6)])
def test_what_a_gpu_consumes_is_its_rate_over_a_steps_operations(tokens, channels, expected):
    text = replace(PAPER_TEXT, length=tokens, channels=channels)
    operations = 3 * forward_flops(ECDiTConfig(**PRESETS["ec-dit-xl"]), text)
    assert consumed(tokens, channels) == pytest.approx(0.5 * 989e12 / operations)
    assert consumed(tokens, channels) == pytest.approx(expected, abs=0.1)


def test_a_row_tells_how_many_times_the_gpus_number_it_is():
    row = Row("77 x 1024", 100, 200_000, wanted=500.0, cold=1000.0, warm=5000.0, disk=10_000_000, cpu=150e-6)
    numbers = "77 x 1024 500 1000 0.20 2.0x 5000 1.00 10.0x 50 % 150"
    assert row.line().split() == numbers.split()
