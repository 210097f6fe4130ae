"""Real processes: whatever starts them, the same training has the same losses."""

import json
import subprocess
import sys
from contextlib import ExitStack

import pytest

from megadit.training.events import EVENTS_FILE
from megadit.training.metrics import METRICS_FILE, read_metrics
from tests.launch.environment import environ
from tests.ranks import free_port

pytestmark = pytest.mark.slow

CONFIG = "tests/configs/tiny.yaml"
STEPS = 3
TIME_LIMIT = 240  # seconds


def run(folder, *starts):
    """Start (command, variables) together on one training in `folder`; its metrics once all have ended well."""
    arguments = [f"run.steps={STEPS}", f"run.dir={folder}", "checkpoint.every=100"]
    with ExitStack() as stack:
        processes = []
        for command, variables in starts:
            process = subprocess.Popen(
                [*command, *arguments],
                env=environ(**variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            stack.callback(process.kill)
            processes.append(process)
        outputs = [process.communicate(timeout=TIME_LIMIT)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(starts), "\n".join(outputs)
    return read_metrics(folder / METRICS_FILE)


TRAIN = [sys.executable, "-m", "megadit.train", "--config", CONFIG]


def alone(folder):
    return run(folder, (TRAIN, {}))


def torchrun(folder):
    return run(folder, (["bash", "examples/launch/torchrun_one_node.sh", CONFIG], {"NPROC": 2}))


def deepspeed(folder):
    return run(folder, (["bash", "examples/launch/deepspeed.sh", CONFIG], {"NPROC": 2, "PORT": free_port()}))


def srun(folder):
    port = free_port()
    job = {"SLURM_NTASKS": 2, "SLURM_STEP_ID": 0, "SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "127.0.0.1"}
    tasks = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_PORT": port} for rank in range(2)]
    return run(folder, *[(TRAIN, job | task) for task in tasks])


def by_hand(folder):
    world = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return run(folder, *[(TRAIN, world | {"RANK": rank}) for rank in range(2)])


LAUNCHERS = [torchrun, deepspeed, srun, by_hand]


def curve(lines):
    """Losses and gradient norms."""
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines], [line["grad_norm"] for line in lines]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return curve(alone(tmp_path_factory.mktemp("alone") / "run"))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Every launcher's curve, each of one training on two processes."""
    curves = {}
    for start in LAUNCHERS:
        folder = tmp_path_factory.mktemp(start.__name__) / "run"
        curves[start.__name__] = curve(start(folder))
        begun = json.loads((folder / EVENTS_FILE).read_text().splitlines()[0])
        assert (begun["event"], begun["world_size"]) == ("start", 2), start.__name__
    return curves


def test_one_process_repeats_itself(one_process, tmp_path):
    assert curve(alone(tmp_path / "run")) == one_process


def test_every_launcher_starts_the_same_training(two_processes):
    for launcher, found in two_processes.items():
        assert found == two_processes["torchrun"], launcher


def test_two_processes_train_as_one_does(one_process, two_processes):
    for found, expected in zip(two_processes["torchrun"], one_process, strict=True):
        assert found == pytest.approx(expected, rel=1e-9, abs=0)
