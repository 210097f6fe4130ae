"""docs/checkpoints.md: every command on the page works, one after the other, as a reader would type them."""

import re

import pytest
from diffusers import PixArtTransformer2DModel

from tests.docs.page import commands, run, working_folder

COMMANDS = commands("checkpoints.md")
SUBCOMMANDS = {"inspect", "verify", "export", "import", "upcycle", "average"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the one model that the page presupposes."""
    folder = working_folder(tmp_path_factory.mktemp("page"))
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


@pytest.mark.slow
def test_the_commands_of_the_page_work_in_their_order(folder):
    """Later ones build on what earlier ones wrote."""
    for command in COMMANDS:
        run(command, folder)
