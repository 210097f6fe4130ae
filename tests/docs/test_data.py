"""docs/data.md: the worked example from tars to samples."""

import json

import pytest
from PIL import Image

from tests.docs.page import commands, run, working_folder

pytestmark = pytest.mark.slow

COMMANDS = commands("data.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return working_folder(tmp_path_factory.mktemp("page"))


def test_the_commands_of_the_page_work_in_their_order(folder):
    """Later ones build on what earlier ones wrote."""
    for command in COMMANDS:
        if "megadit.train" in command:
            # A training on what is encoded needs neither package: here they cannot be imported.
            for package in ("diffusers", "transformers"):
                (folder / "without" / package).mkdir(parents=True)
                (folder / "without" / package / "__init__.py").write_text(f"raise ImportError({package!r})\n")
            command = f'export PYTHONPATH="$PWD/without:$PYTHONPATH"; {command}'
        run(command, folder)


def test_what_the_example_leaves_is_whole(folder):
    manifest = json.loads((folder / "data/encoded/manifest.json").read_text())
    counts = [shard["samples"] for bucket in manifest["buckets"] for shard in bucket["shards"]]
    assert sum(counts) == 240 and len(manifest["buckets"]) == 5
    lines = (folder / "runs/photographs/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))
    picture = Image.open(folder / "runs/photographs/samples.png")
    assert picture.size == (2 * (4 * (80 + 1) + 1), 2 * (2 * (48 + 1) + 1))
