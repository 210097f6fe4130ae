"""docs/checkpoints.md: every command on the page works, one after the other, as a reader would type them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import PixArtTransformer2DModel

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "checkpoints.md"
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
SUBCOMMANDS = {"inspect", "verify", "export", "import", "upcycle", "average"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder that sees the tools and the examples, with the one model that the page presupposes."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("tools", "examples"):
        (folder / name).symlink_to(ROOT / name)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=16,
    )
    model.save_pretrained(folder / "models" / "pixart")
    return folder


def test_every_tool_has_an_example():
    shown = {match[1] for match in re.finditer(r"convert_checkpoint\.py (\w+)", "\n".join(COMMANDS))}
    assert shown == SUBCOMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_works(folder, command):
    """In the order of the page: later ones build on what earlier ones wrote."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
