"""examples/real_images/run.sh, from tars to samples."""

import json
import os
import subprocess

import pytest
from PIL import Image


@pytest.mark.drill
@pytest.mark.timeout(1200)
def test_from_photographs_to_pictures(tmp_path):
    environment = os.environ | {"CROPS": "200"}
    command = ["bash", "examples/real_images/run.sh", tmp_path / "data", "run.steps=6", "data.global_batch=8"]
    for _ in range(2):  # the second finds all but the pictures done
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "data/encoded/manifest.json").read_text())
    assert sum(shard["samples"] for bucket in manifest["buckets"] for shard in bucket["shards"]) == 200
    lines = (tmp_path / "data/run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert Image.open(tmp_path / "data/samples.png").size == (2 * (4 * 65 + 1), 2 * (2 * 65 + 1))
