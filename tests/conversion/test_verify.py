"""Finding damage in checkpoints and folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadit.conversion.export import Export, export_weights
from megadit.conversion.verify import verify
from tests.conversion.made import make_run, silent


@pytest.fixture
def checkpoint(tmp_path):
    make_run(tmp_path / "run", file_bytes=500_000)
    path = tmp_path / "run" / "checkpoints" / "step_00000003"
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


@pytest.fixture
def exported(tmp_path):
    make_run(tmp_path / "run", kinds=("weight",))
    export_weights(tmp_path / "run", tmp_path / "out", Export(max_shard_bytes=300_000), silent)
    return tmp_path / "out"


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_sound_checkpoint_has_no_faults_and_every_byte_is_read(checkpoint):
    read = []

    def bar(total):
        read.append(-total)
        return read.append

    for path in (checkpoint, checkpoint.parent, checkpoint.parent.parent):
        findings = verify(path, bar)
        assert (findings.path, findings.faults, findings.notes) == (checkpoint, [], [])
    assert sum(read) == 0
    assert -read[0] == sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


@pytest.mark.parametrize("place", [0, 9, -1, 3000])
def test_one_flipped_bit_anywhere_names_the_file(place, checkpoint):
    damaged = checkpoint / "part_00002.safetensors"
    flip(damaged, place)
    assert verify(checkpoint, silent).faults == [f"{damaged} is damaged: its sha256 is not the one that was saved"]


def test_every_bad_file_is_named(checkpoint):
    flip(checkpoint / "part_00000.safetensors", 100)
    (checkpoint / "part_00001.safetensors").unlink()
    short = checkpoint / "part_00002.safetensors"
    short.write_bytes(short.read_bytes()[:-1])
    faults = verify(checkpoint, silent).faults
    assert len(faults) == 3
    assert "part_00000.safetensors is damaged" in faults[0]
    assert "part_00001.safetensors cannot be read: No such file" in faults[1]
    assert "part_00002.safetensors has" in faults[2]


def change_manifest(checkpoint, change):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    change(manifest)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


BIAS = "weight.head.linear.bias"
STRANGE = {"shape": [], "dtype": "int8", "boxes": [[[], [], "part_00000.safetensors"]]}
CHANGES = {
    "a box is lost": (lambda m: m["tensors"][BIAS]["boxes"].pop(), f"{BIAS}: its boxes hold 0 of its 4"),
    "a tensor is lost": (lambda m: m["tensors"].pop(BIAS), f"{BIAS}@0 is not in the manifest"),
    "dtype": (lambda m: m["tensors"][BIAS].update(dtype="float32"), "is float64 [4], the manifest says float32 [4]"),
    "a tensor too many": (lambda m: m["tensors"].update(x=STRANGE), "x@ is missing"),
    "a file is lost": (lambda m: m["files"].pop(0), "lies in part_00000.safetensors, which is not listed"),
    "format": (lambda m: m.update(format=99), "is not of format 1"),
    "no tensors": (lambda m: m.pop("tensors"), "manifest.json is damaged"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_manifest_that_does_not_match_is_a_fault(what, checkpoint):
    change, message = CHANGES[what]
    change_manifest(checkpoint, change)
    faults = verify(checkpoint, silent).faults
    assert faults
    assert message in "\n".join(faults)


def test_what_is_left_over_is_a_note(checkpoint):
    (checkpoint.parent / "step_00000009.partial").mkdir()
    (checkpoint / "stray").write_text("")
    findings = verify(checkpoint.parent.parent, silent)
    assert findings.faults == []
    assert [note.split(" ")[0] for note in findings.notes] == [
        str(checkpoint / "stray"),
        str(checkpoint.parent / "step_00000009.partial"),
    ]


def test_a_sound_export_has_no_faults_and_its_partial_folder_is_a_note(exported):
    assert verify(exported, silent).faults == []
    (exported.parent / "out.partial").mkdir()
    (exported.parent / "unrelated.partial").mkdir()
    (note,) = verify(exported, silent).notes
    assert "out.partial was left" in note


def test_every_bad_file_of_an_export_is_named(exported):
    first, second, third = sorted(exported.glob("*.safetensors"))[:3]
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(b"garbage!" * 9)
    tensors = load_file(third)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file({**tensors, "other": torch.zeros(1)}, third)
    faults = verify(exported, silent).faults
    assert len(faults) == 4
    for fault, message in zip(
        faults,
        [f"{first} is damaged: ", f"{second} is no whole", f"{third} lacks {lost}", f"{third} has other, which"],
        strict=True,
    ):
        assert fault.startswith(message)


def test_a_lost_index_entry_file_or_config_is_a_fault(exported):
    index = exported / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = sorted(exported.glob("*.safetensors"))[0]
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file != first.name}
    index.write_text(json.dumps(content))
    findings = verify(exported, silent)
    assert (findings.faults, findings.notes) == ([], [f"{first} is not in the index"])
    index.write_text("{")
    (fault,) = verify(exported, silent).faults
    assert fault == f"{index} is damaged: not JSON"


def test_what_is_no_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint"):
        verify(tmp_path, silent)
    with pytest.raises(ValueError, match="does not exist"):
        verify(tmp_path / "none", silent)
