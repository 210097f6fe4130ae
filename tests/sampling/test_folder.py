"""A folder of pictures goes on where it was, and is never a mixture of two drawings."""

import json
from dataclasses import replace

import pytest
import torch

from megadit.sampling.folder import PictureFolder, check_writable
from megadit.sampling.picture import read_picture, to_bytes

PROMPTS = ["a seven", "a seven", "eine schöne Drei\u2028in Tinte"]
SETTINGS = {"steps": 3, "guidance": 2.0}


@pytest.fixture
def folder(tmp_path):
    return PictureFolder(tmp_path / "new" / "drawn", PROMPTS, 5, SETTINGS)


def images(count, channels=1):
    return torch.rand(count, channels, 4, 6, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1


@pytest.mark.parametrize("channels", [1, 3, 4], ids=["grey", "rgb", "latents"])
def test_what_is_written_is_read_and_listed(folder, channels):
    drawn = images(3, channels)
    assert folder.begin() == set()
    folder.write(range(1, 3), drawn[1:])
    assert folder.begin() == {1, 2}
    folder.write([0], drawn[:1])
    expected = to_bytes(drawn if channels == 3 else drawn[:, :1])
    assert torch.equal(torch.stack(folder.read()), expected)
    names = ["00000.png", "00001.png", "00002.png"]
    lines = (folder.path / "prompts.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"index": i, "prompt": prompt, "seed": 5, "file": names[i]} for i, prompt in enumerate(PROMPTS)
    ]
    assert sorted(path.name for path in folder.path.iterdir()) == [*names, "prompts.jsonl", "settings.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["a seven", "a six", PROMPTS[2]]}, "line 2 has the prompt 'a seven', which is 'a six' now"),
        ({"seed": 6}, "line 1 has the seed 5, which is 6 now"),
        ({"prompts": PROMPTS[:2]}, "lists 3 pictures, which are 2 now"),
        ({"prompts": [*PROMPTS, "four"]}, "lists 3 pictures, which are 4 now"),
        ({"settings": {"steps": 3, "guidance": 3.0}}, "guidance was 2.0 and is 3.0 now"),
        ({"settings": {**SETTINGS, "new": 1}}, "new was None and is 1 now"),
    ],
)
def test_other_pictures_are_refused_unless_all_are_drawn_again(folder, change, message):
    folder.begin()
    folder.write(range(3), images(3))
    (folder.path / "notes.png").write_bytes(b"of the user")
    other = replace(folder, **change)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(ValueError, match=message) as refused:
        other.begin()
    assert str(folder.path) in str(refused.value) and "--overwrite" in str(refused.value)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before
    assert other.begin(overwrite=True) == set()
    assert sorted(path.name for path in folder.path.iterdir()) == ["notes.png", "prompts.jsonl", "settings.json"]
    assert other.begin() == set()


def test_pictures_of_unknown_prompts_are_refused(folder):
    folder.path.mkdir(parents=True)
    (folder.path / "00001.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds pictures, but no prompts.jsonl"):
        folder.begin()
    assert folder.begin(overwrite=True) == set()


def test_only_pictures_that_are_listed_are_removed(folder, tmp_path):
    outside = tmp_path / "precious.png"
    outside.write_bytes(b"precious")
    folder.begin()
    line = {"index": 0, "prompt": "", "seed": 0, "file": "../../precious.png"}
    (folder.path / "prompts.jsonl").write_text(f"{json.dumps(line)}\n[1]\nnot JSON\n")
    folder.begin(overwrite=True)
    assert outside.read_bytes() == b"precious"


def test_what_cannot_be_written_is_named(folder, tmp_path):
    check_writable(folder.path)
    assert not folder.path.parent.exists()
    (tmp_path / "file").write_bytes(b"")
    check_writable(tmp_path / "file")
    for path in (tmp_path / "file" / "drawn", tmp_path / "file" / "deep" / "drawn"):
        with pytest.raises(ValueError, match=f"{tmp_path / 'file'} is not a folder"):
            check_writable(path)
        with pytest.raises(ValueError, match=str(tmp_path / "file")):
            replace(folder, path=path).begin()
    folder.begin()
    folder.path.joinpath("00001.png").mkdir()
    with pytest.raises(ValueError, match=r"00001.png.* cannot be written"):
        folder.write([1], images(1))


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "00000.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"00000.png cannot be read"):
        read_picture(tmp_path / "00000.png")
