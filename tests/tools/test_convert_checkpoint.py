"""The command that users type: what it prints, how it fails, and how much memory it takes."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megadit.checkpoint.folder import latest
from tests.commands import run_python
from tests.conversion.made import files_in, make_run
from tests.ranks import heed_interrupts

TOOL = "tools/convert_checkpoint.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL_MODULE = load_tool()


@pytest.fixture
def convert(capsys):
    """Runs the tool in this process: (exit status, output, errors)."""

    def run(*argv):
        status = TOOL_MODULE.main([str(word) for word in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tool") / "run"
    make_run(folder, kinds=("weight", "ema"), dtypes={"weight": torch.bfloat16})
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tool") / "dense"
    make_run(folder, "model.experts=0", kinds=("weight",))
    return folder


def test_by_command_it_exports_without_a_progress_bar_where_there_is_no_terminal(run, tmp_path):
    done = run_python(TOOL, "export", run, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "100KB")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'out'}: weights 'ema' of step 3, from {latest(run / 'checkpoints')}\n"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_help_comes_at_once_and_names_every_command():
    script = f"import sys, runpy; sys.argv = ['x', '--help']; runpy.run_path({TOOL!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert "torch" not in [line.split("|")[-1].strip() for line in done.stderr.splitlines()]
    for command in ("inspect", "verify", "export", "import", "upcycle", "average"):
        assert f"\n    {command} " in done.stdout
        with pytest.raises(SystemExit) as end:
            TOOL_MODULE.main([command, "--help"])
        assert end.value.code == 0


def test_inspect_prints_json_or_a_table(convert, run):
    status, out, _ = convert("inspect", run, "--json", "--names", "ema.blocks.1.feedforward.*")
    found = json.loads(out)
    assert status == 0
    assert len(found["tensors"]) == 3
    status, out, _ = convert("inspect", run, "--names", "ema.blocks.1.feedforward.*")
    assert status == 0
    assert "ema.blocks.1.feedforward.experts.up" in out
    assert "step 3" in out


@pytest.mark.slow
def test_output_that_nobody_reads_on_is_no_error(run):
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} {TOOL} inspect {run} --json | head -c 10"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr, len(done.stdout)) == (0, "", 10)


def test_verify_ends_with_status_2_and_names_the_bad_file(convert, tmp_path):
    make_run(tmp_path / "run", kinds=("weight",))
    path = latest(tmp_path / "run" / "checkpoints")
    assert convert("verify", tmp_path / "run") == (0, f"good: {path}\n", "")
    (file,) = path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 128
    file.write_bytes(content)
    (path.parent / "step_00000005.partial").mkdir()
    status, out, _ = convert("verify", tmp_path / "run")
    assert status == 2
    assert out.splitlines()[0] == f"bad: {file} is damaged: its sha256 is not the one that was saved"
    assert out.splitlines()[1].startswith(f"note: {path.parent / 'step_00000005.partial'} was left")


def test_import_upcycle_and_average_make_runs_folders(convert, run, dense, tmp_path):
    assert convert("export", run, tmp_path / "out", "--weights", "model")[0] == 0
    status, out, _ = convert("import", tmp_path / "out", tmp_path / "imported")
    assert (status, "run.init_from=" in out) == (0, True)
    assert convert("average", run, tmp_path / "out", tmp_path / "mean", "--weights", "model", "--ratios", 1, 2)[0] == 0
    status, out, _ = convert("upcycle", dense, tmp_path / "exact", "model.experts=2", "model.capacity_factor=2")
    assert (status, out.splitlines()[-1]) == (0, "the model computes what the dense one did, but for rounding")
    status, out, _ = convert("upcycle", dense, tmp_path / "other", "model.experts=2", "--noise", 0.1, "--seed", 1)
    assert status == 0
    assert out.splitlines()[-1] == "the model starts elsewhere than the dense one: experts differ by noise of 0.1"
    for name in ("imported", "mean", "exact", "other"):
        assert latest(tmp_path / name / "checkpoints") is not None
        assert convert("verify", tmp_path / name)[0] == 0


def test_a_cut_export_has_a_folder_for_each_rank(convert, run, tmp_path):
    assert convert("export", run, tmp_path / "out", "--tensor", 2)[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tensor_00_expert_00", "tensor_01_expert_00"]
    assert convert("export", run, tmp_path / "out", "--expert", 4, "--overwrite")[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 4


# --- bad input --------------------------------------------------------------------------------------------------------


def spoilt(tmp_path, how):
    """(a source that is spoilt, what the error must name)."""
    run = tmp_path / "source"
    make_run(run, "model.experts=0", kinds=("weight",))
    (file,) = latest(run / "checkpoints").glob("*.safetensors")
    if how == "no checkpoint":
        return tmp_path, "is no checkpoint"
    if how == "nothing there":
        return tmp_path / "none", "none does not exist"
    if how == "cut short":
        file.write_bytes(file.read_bytes()[:-1])
        return run, f"{file} has "
    if how == "missing file":
        file.unlink()
        return run, f"{file} is missing"
    if how == "header garbage":
        content = bytearray(file.read_bytes())
        content[8:20] = b"garbage here"
        file.write_bytes(content)
        return run, f"{file} is damaged: "
    manifest = file.parent / "manifest.json"
    content = json.loads(manifest.read_text())
    name = "weight.head.linear.bias"
    if how == "unknown dtype":
        content["tensors"][name]["dtype"] = "float8_e4m3fn"
    elif how == "missing tensor":
        del content["tensors"][name]
    elif how == "extra tensor":
        content["tensors"]["weight.extra"] = {"shape": [0], "dtype": "float32", "boxes": []}
    elif how == "wrong shape":
        content["tensors"][name].update(shape=[0], boxes=[])
    manifest.write_text(json.dumps(content))
    return run, "weight.extra" if how == "extra tensor" else "head.linear.bias"


HOW = [
    "no checkpoint", "nothing there", "cut short", "missing file", "header garbage", "unknown dtype", "missing tensor",
    "extra tensor", "wrong shape",
]  # fmt: skip
COMMANDS = {
    "export": lambda source, out: ["export", source, out],
    "import": lambda source, out: ["import", source, out],
    "upcycle": lambda source, out: ["upcycle", source, out, "model.experts=2"],
    "average": lambda source, out: ["average", source, source, out],
}


@pytest.mark.parametrize("how", HOW)
def test_a_spoilt_source_is_refused_by_every_command_and_leaves_nothing(how, convert, tmp_path):
    source, named = spoilt(tmp_path, how)
    before = files_in(tmp_path)
    for command in COMMANDS.values():
        status, out, errors = convert(*command(source, tmp_path / "out"))
        assert (status, out) == (2, ""), errors
        assert errors.startswith("convert_checkpoint: ")
        assert named.removeprefix("weight.") in errors
        assert files_in(tmp_path) == before
        assert not list(tmp_path.glob("out*"))
    status, out, errors = convert("verify", source)
    assert status == (0 if how == "extra tensor" else 2), out
    status, _, _ = convert("inspect", source)
    assert status == (0 if how in ("missing tensor", "extra tensor", "wrong shape", "header garbage") else 2)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_refused_and_its_code_does_not_run(name, convert, tmp_path):
    mark, folder = tmp_path / "mark", tmp_path / "theirs"
    folder.mkdir()
    torch.save({"weight": Payload(mark)}, folder / name)
    (folder / "config.json").write_text('{"_class_name": "PixArtTransformer2DModel"}')
    for argv in (
        ["inspect", folder],
        ["verify", folder],
        *(make(folder, tmp_path / "out") for make in COMMANDS.values()),
    ):
        status, out, errors = convert(*argv)
        assert status == 2
        assert name in out + errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
    call, arguments = Payload(mark).__reduce__()  # what unpickling would do
    call(*arguments)
    assert mark.exists(), "the payload works"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_destination_in_use_or_out_of_reach_is_refused(command, convert, dense, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    for out, message in (
        (tmp_path / "full", "full is there already, and not empty"),
        (tmp_path / "file", "file is a file"),
        (tmp_path / "file" / "under", "file"),
    ):
        status, _, errors = convert(*COMMANDS[command](dense, out))
        assert status == 2
        assert message in errors
        assert "None" not in errors
        assert sorted(files_in(tmp_path)) == ["file", "full/mine"]


def test_damage_is_not_copied_under_a_new_sha256(convert, tmp_path):
    make_run(tmp_path / "run", "model.experts=0", kinds=("weight",))
    (file,) = latest(tmp_path / "run" / "checkpoints").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for name in ("export", "upcycle", "average"):
        status, _, errors = convert(*COMMANDS[name](tmp_path / "run", tmp_path / "out"))
        assert (status, f"{file} is damaged" in errors) == (2, True)
        assert not list(tmp_path.glob("out*"))
    assert convert("export", tmp_path / "run", tmp_path / "out", "--no-verify")[0] == 0


def test_overwrite_replaces_exports_of_ours_alone(convert, run, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"_class_name": "PixArtTransformer2DModel"}')
    (theirs / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    status, _, errors = convert("export", run, theirs, "--overwrite")
    assert (status, "theirs is there already" in errors) == (2, True)
    assert (theirs / "diffusion_pytorch_model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    "argv",
    [
        ["export", "a", "b", "--max-shard-size", "many"],
        ["export", "a", "b", "--max-shard-size", "0"],
        ["export", "a", "b", "--tensor", "0"],
        ["export", "a", "b", "--dtype", "int8"],
        ["upcycle", "a", "b"],
        ["unknown"],
        [],
    ],
)
def test_a_wrong_command_line_is_refused(argv):
    with pytest.raises(SystemExit) as end:
        TOOL_MODULE.main(argv)
    assert end.value.code == 2


def test_average_needs_two_sources(convert, run, tmp_path):
    status, _, errors = convert("average", run, tmp_path / "out")
    assert (status, errors) == (2, "convert_checkpoint: average needs at least two sources and a folder to make\n")


def test_ctrl_c_leaves_nothing(tmp_path):
    make_run(tmp_path / "run", "model.width=256", "model.layers=24", "model.experts=8", kinds=("weight",))
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    tool = subprocess.Popen(
        [sys.executable, TOOL, "export", tmp_path / "run", tmp_path / "out"],
        stderr=subprocess.PIPE,
        env=environment,
        preexec_fn=heed_interrupts,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial/*")):
        assert tool.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    tool.send_signal(signal.SIGINT)
    errors = tool.communicate(timeout=60)[1].decode()
    assert (tool.returncode, errors) == (130, "convert_checkpoint: interrupted; nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURED = """
import json, runpy, sys
from pathlib import Path
tool = runpy.run_path("tools/convert_checkpoint.py")
for argv in json.loads(sys.argv[1]):
    assert tool["main"](argv) == 0
# Not ru_maxrss, which begins with that of the process that started this one.
print([line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")][0].split()[1])
"""
DENSE = ["model.experts=0", "model.width=512"]
SPARSE = ["model.layers=2", "model.width=256"]
COMPARED = {
    "layers": (
        [*DENSE, "model.layers=2"],
        [*DENSE, "model.layers=32"],
        ["upcycle", "run", "moe", "model.experts=4"],
    ),
    # An expert tensor of 32 is more than one part already.
    "experts": (
        [*SPARSE, "model.experts=32"],
        [*SPARSE, "model.experts=160"],
        ["export", "run", "cut", "--expert", "2"],
    ),
}


def peak_memory(folder, commands):
    """Bytes that a process needs which runs them all, one after the other."""
    commands = [
        [str(folder / word) if word in ("run", "out", "imported", "moe", "mean", "cut") else word for word in command]
        for command in commands
    ]
    # What is freed goes back at once: what is measured is what is held, not what glibc keeps for the next time.
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, json.dumps(commands)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory as Linux tells it")
@pytest.mark.parametrize("what", COMPARED)
def test_memory_does_not_grow_with_the_number_of_layers_or_experts(what, tmp_path):
    *models, more = COMPARED[what]
    commands = [
        ["verify", "run"],
        ["export", "run", "out", "--dtype", "bfloat16"],
        ["import", "out", "imported"],
        ["average", "run", "run", "mean"],
        more,
    ]
    peaks, sizes = [], []
    for name, model in zip(("small", "large"), models, strict=True):
        folder = tmp_path / name
        make_run(folder / "run", *model, kinds=("weight",), dtypes={"weight": torch.float32})
        sizes.append(sum(path.stat().st_size for path in (folder / "run").rglob("*.safetensors")))
        peaks.append(peak_memory(folder, commands))
    assert sizes[1] - sizes[0] > 220e6
    assert peaks[1] - peaks[0] < 20e6, (peaks, sizes)
