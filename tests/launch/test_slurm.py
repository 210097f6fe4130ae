"""The batch scripts on a real SLURM: two nodes on this machine, whose jobs are stopped, preempted and requeued."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from PIL import Image

from megadit.data.manifest import open_manifest, shard_path
from megadit.data.shards import ShardReader
from megadit.runtime.status import BAD_INPUT, DIVERGED, LOST, STOPPED
from tests.launch.environment import environ, need_programs
from tests.launch.slurm import NODES, PROGRAMS, Cluster
from tools.tiny_encoders import make_autoencoder

pytestmark = pytest.mark.slow

TRAIN = "examples/slurm/train.sbatch"
FOUR_TASKS = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
ONE_TASK = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]


@pytest.fixture(scope="module")
def cluster():
    need_programs(PROGRAMS)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)
    assert cluster.left_over() == []


@pytest.fixture(scope="module")
def activate(tmp_path_factory):
    """What ACTIVATE names: this Python's programs first."""
    path = tmp_path_factory.mktemp("site") / "activate"
    path.write_text(f"export PATH={environ()['PATH']}\n")
    return path


@pytest.fixture
def pretend(tmp_path):
    """An ACTIVATE file, given what `python` shall do in place of training."""

    def write(script):
        python = tmp_path / "bin" / "python"
        python.parent.mkdir(exist_ok=True)
        python.write_text(f"#!/usr/bin/env bash\n{script}\n")
        python.chmod(0o755)
        (tmp_path / "activate").write_text(f"PATH={python.parent}:$PATH\n")
        return tmp_path / "activate"

    return write


def wait_for(job, condition, limit=300):
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline and job.field("JobState") != "FAILED", job.output()
        time.sleep(0.1)


@pytest.mark.timeout(900)  # three starts of four ranks, and the reference
def test_stopped_by_a_signal_and_preempted_it_computes_the_same(cluster, activate, training, tmp_path):
    """SIGUSR1, as before the time limit; then the partition `high` takes the nodes, for another of the scripts."""
    folder = tmp_path / "run"
    job = cluster.submit(*FOUR_TASKS, TRAIN, *training.arguments, RUN_DIR=folder, ACTIVATE=activate)
    wait_for(job, lambda: training.done(folder) >= 5)
    cluster.run("scancel", "--signal=USR1", job.number)
    wait_for(job, lambda: job.field("Restarts") == "1")
    first = training.done(folder)
    assert (folder / "checkpoints/latest").read_text().strip() == f"step_{first:08d}"
    wait_for(job, lambda: training.done(folder) >= first + 5)
    inspect = ["examples/slurm/convert.sbatch", "tools/convert_checkpoint.py", "inspect", folder]
    tool = cluster.submit("--partition=high", "--mem=0", "--cpus-per-task=1", *inspect, ACTIVATE=activate)
    wait_for(job, lambda: job.field("Restarts") == "2")
    second = training.done(folder)
    assert first < second < training.steps
    assert (folder / "checkpoints/latest").read_text().strip() == f"step_{second:08d}"
    assert tool.wait() == "COMPLETED", tool.output()
    assert f"step {second}" in tool.output()
    assert job.wait() == "COMPLETED", job.output()
    assert "PREEMPTION" in job.output() or "DUE TO" in job.output()
    assert job.output().count(f"status {STOPPED}: queued again") >= 1
    assert all(node in job.output() for node in NODES)
    assert training.curve(folder) == training.expected


def test_ablations(cluster, activate, training, tmp_path):
    (tmp_path / "lines.txt").write_text("# two\nbase\n\ncapacity  model.capacity_factor=1.0 optim.lr=1e-3\n")
    array = ["--array=1-2", *ONE_TASK, "examples/slurm/ablations.sbatch", training.arguments[0], tmp_path / "lines.txt"]
    job = cluster.submit(*array, *training.arguments[1:], "parallel.tensor=1", "run.steps=2", RUN_DIR=tmp_path / "runs",
                         ACTIVATE=activate)  # fmt: skip
    cluster.wait_for_all()
    configs = {name: (tmp_path / "runs" / name / "config.yaml").read_text() for name in ("base", "capacity")}
    assert "capacity_factor: 2.0" in configs["base"], job.output()
    assert "capacity_factor: 1.0" in configs["capacity"]
    assert len(list((tmp_path / "runs").glob("*/checkpoints/step_00000002"))) == 2, job.output()


@pytest.mark.timeout(600)
def test_an_encoding_is_stopped_and_goes_on(cluster, activate, tmp_path):
    """On four tasks of two nodes; SIGUSR1, as before the time limit, when some units are done."""
    images, out = tmp_path / "images", tmp_path / "encoded"
    images.mkdir()
    for number in range(120):
        picture = Image.effect_noise((64, 64), 50 + number).convert("RGB")
        picture.save(images / f"{number:03d}.jpg")
        (images / f"{number:03d}.json").write_text(f'{{"label": {number % 3}}}')
    make_autoencoder(tmp_path / "vae", downscale=8, width=4, layers=0)
    options = ["--autoencoder", tmp_path / "vae", "--resolution", "64", "--unit", "2", "--batch", "2"]
    command = [*FOUR_TASKS, "examples/slurm/encode.sbatch", images, *options]
    job = cluster.submit(*command, OUT=out, ACTIVATE=activate)
    wait_for(job, lambda: len(list(out.glob("units/*.json"))) >= 4)
    cluster.run("scancel", "--signal=USR1", job.number)
    assert job.wait() == "COMPLETED", job.output()
    assert job.field("Restarts") == "1", job.output()
    assert f"status {STOPPED}: queued again" in job.output()
    manifest = open_manifest(out, verify=True)
    keys = [reader.key(i) for reader in shard_readers(out, manifest) for i in range(len(reader))]
    assert sorted(keys) == [f"images/{number:03d}" for number in range(120)]


def shard_readers(folder, manifest):
    return [ShardReader(shard_path(folder, shard.file)) for bucket in manifest.buckets for shard in bucket.shards]


def test_what_would_come_again_is_not_queued_again(cluster, pretend, tmp_path):
    job = cluster.submit(*FOUR_TASKS, TRAIN, "X", RUN_DIR=tmp_path / "run", ACTIVATE=pretend(f"exit {DIVERGED}"))
    assert job.wait() == "FAILED"
    assert (job.field("ExitCode"), job.field("Restarts")) == (f"{DIVERGED}:0", "0")


def test_starts_without_a_checkpoint_are_counted(cluster, pretend, tmp_path):
    """A rank is killed again and again; only the first start brings a checkpoint."""
    dies = """
        if [[ $SLURM_PROCID == 0 && ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
            mkdir -p "$RUN_DIR/checkpoints" && echo step_00000001 >"$RUN_DIR/checkpoints/latest"
        fi
        [[ $SLURM_PROCID != 3 ]] || kill -KILL $$
        exit %d
    """
    variables = {"RUN_DIR": tmp_path / "run", "ACTIVATE": pretend(dies % LOST), "MAX_FRUITLESS": 2}
    job = cluster.submit(*FOUR_TASKS, TRAIN, "X", **variables)
    assert job.wait() == "FAILED"
    assert job.field("Restarts") == "2", job.output()
    assert "no new checkpoint in 2 starts: not queued again" in job.output()
    assert job.field("ExitCode") == "137:0", job.output()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_processes_that_do_not_end_are_ended(cluster, pretend, tmp_path):
    waits = f"[[ $SLURM_PROCID != 0 ]] || exit {LOST}; exec sleep 100"
    variables = {"RUN_DIR": tmp_path / "run", "ACTIVATE": pretend(waits), "MAX_FRUITLESS": 1, "PATIENCE_S": 2}
    started = time.monotonic()
    job = cluster.submit(*FOUR_TASKS, TRAIN, "X", **variables)
    assert job.wait() == "FAILED"
    assert time.monotonic() - started < 30
    assert "not queued again" in job.output()


def test_a_cancelled_job_stays_cancelled(cluster, pretend, tmp_path):
    stops = f"trap 'sleep 1; exit {STOPPED}' TERM; touch {tmp_path}/up; while true; do sleep 0.1; done"
    job = cluster.submit(*FOUR_TASKS, TRAIN, "X", RUN_DIR=tmp_path / "run", ACTIVATE=pretend(stops))
    wait_for(job, (tmp_path / "up").exists)
    cluster.run("scancel", job.number)
    assert job.wait() == "CANCELLED"
    time.sleep(1)
    assert (job.field("JobState"), job.field("Restarts")) == ("CANCELLED", "0")


def test_a_refused_job_says_what_to_set(cluster, tmp_path):
    job = cluster.submit(*ONE_TASK, TRAIN, "X", RUN_DIR=tmp_path / "run")
    assert job.wait() == "FAILED"
    assert job.field("ExitCode") == f"{BAD_INPUT}:0"
    assert "set ACTIVATE to the file that activates the environment" in job.output()


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "message"),
    [
        (TRAIN, ["X"], {"ACTIVATE": "/dev/null"}, "ACTIVATE=/dev/null is not a file on"),
        (TRAIN, ["X"], {"CONTAINER": "pyxis"}, "CONTAINER=pyxis needs IMAGE"),
        (TRAIN, ["X"], {"CONTAINER": "docker", "IMAGE": "i"}, "CONTAINER=docker is neither pyxis nor apptainer"),
        (TRAIN, ["X"], {"ACTIVATE": "setup.py", "CONTAINER": "apptainer", "IMAGE": "i"}, "set RUN_DIR to the run's"),
        (TRAIN, [], {"CONTAINER": "apptainer", "IMAGE": "i", "RUN_DIR": "r"}, "usage: sbatch"),
        ("examples/slurm/convert.sbatch", ["X"], {"CONTAINER": "pyxis", "IMAGE": "i"}, "usage: sbatch"),
        ("examples/slurm/encode.sbatch", ["X"], {"CONTAINER": "pyxis", "IMAGE": "i"}, "set OUT to the data set"),
        ("examples/slurm/encode.sbatch", [], {"CONTAINER": "pyxis", "IMAGE": "i", "OUT": "o"}, "usage: sbatch"),
        ("examples/slurm/ablations.sbatch", ["X", "README.md"], {"RUN_DIR": "r"}, "not a job array"),
        ("examples/slurm/ablations.sbatch", ["X"], {"RUN_DIR": "r", "SLURM_ARRAY_TASK_ID": 1}, "usage: sbatch"),
        ("examples/slurm/ablations.sbatch", ["X", "examples/slurm/ablations.txt"],
         {"RUN_DIR": "r", "SLURM_ARRAY_TASK_ID": 9}, "ablations.txt has no line 9"),
    ],
)  # fmt: skip
def test_site_facts_that_are_missing(script, arguments, variables, message):
    done = subprocess.run(["bash", script, *arguments], env=environ(**variables), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (BAD_INPUT, "")
    assert done.stderr.startswith("megadit: ") and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ("pyxis", "{options} --container-image=i --container-mounts={mounts} --container-workdir={here} {command}"),
        ("apptainer", "{options} apptainer exec --nv --bind {mounts} --pwd {here} i {command}"),
    ],
)
def test_what_srun_is_asked_for_with_a_container(container, expected, tmp_path):
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\necho "$@"\necho "$SRUN_CPUS_PER_TASK $GLOO_SOCKET_IFNAME"\n')
    (tmp_path / "srun").chmod(0o755)
    run, here = tmp_path / "run", Path.cwd()
    variables = {"CONTAINER": container, "IMAGE": "i", "MOUNTS": "/d:/d", "RUN_DIR": run, "INTERFACE": "ib0"}
    job = {"SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_PER_TASK": 8}
    variables |= job | {"PATH": f"{tmp_path}:{environ()['PATH']}"}
    done = subprocess.run(["bash", TRAIN, "X", "a.b=c"], env=environ(**variables), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = expected.format(
        options="--kill-on-bad-exit=0 --wait=120", mounts=f"{here}:{here},{run}:{run},/d:/d", here=here,
        command=f"python -m megadit.train --config X run.dir={run} a.b=c",
    )  # fmt: skip
    assert done.stdout.splitlines()[1:] == [asked, "8 ib0"]


@pytest.mark.drill
def test_the_time_limit(cluster, activate, training, tmp_path):
    """SLURM itself sends the signal of --signal. Its clock of limits has minutes: 25 to 85 seconds before the limit."""
    folder = tmp_path / "run"
    limit = ["--time=2", "--signal=USR1@60"]
    # So many steps that the limit comes first.
    arguments = [*training.arguments, "run.steps=100000"]
    job = cluster.submit(*FOUR_TASKS, *limit, TRAIN, *arguments, RUN_DIR=folder, ACTIVATE=activate)
    wait_for(job, lambda: job.field("Restarts") == "1")
    first = training.done(folder)
    assert (folder / "checkpoints/latest").read_text().strip() == f"step_{first:08d}"
    wait_for(job, lambda: training.done(folder) > first)
    cluster.run("scancel", job.number)
    assert job.wait() == "CANCELLED", job.output()
    assert f"status {STOPPED}: queued again" in job.output()


@pytest.mark.drill
def test_requeued_by_hand(cluster, activate, training, tmp_path):
    """SIGTERM reaches the batch script too, which dies of it; the ranks still write their checkpoint."""
    folder = tmp_path / "run"
    job = cluster.submit(*FOUR_TASKS, TRAIN, *training.arguments, RUN_DIR=folder, ACTIVATE=activate)
    wait_for(job, lambda: training.done(folder) >= 5)
    cluster.run("scontrol", "requeue", job.number)
    wait_for(job, lambda: job.field("JobState") == "PENDING")
    stopped = training.done(folder)
    assert (folder / "checkpoints/latest").read_text().strip() == f"step_{stopped:08d}", job.output()
    assert job.wait() == "COMPLETED", job.output()
    assert training.curve(folder) == training.expected


@pytest.mark.drill
def test_a_rank_is_killed(cluster, activate, training, tmp_path):
    """Steps since the last checkpoint are made again, and come out the same."""
    folder = tmp_path / "run"
    arguments = [*training.arguments, "checkpoint.every=4"]
    job = cluster.submit(*FOUR_TASKS, TRAIN, *arguments, RUN_DIR=folder, ACTIVATE=activate, PATIENCE_S=20)
    wait_for(job, lambda: training.done(folder) >= 6)
    pids = [line.split() for line in cluster.run("scontrol", "listpids", job.number, check=False).splitlines()]
    ranks = [int(pid) for pid, _, step, *_ in pids if step == "0"]
    os.kill(ranks[-1], signal.SIGKILL)
    assert job.wait() == "COMPLETED", job.output()
    assert job.field("Restarts") == "1", job.output()
    assert training.curve(folder) == training.expected
