"""Trainings over two hosts, each with a network of its own: the same numbers as on one, and going on without one."""

import json
import subprocess
import time

import pytest

from megadit.training.events import EVENTS_FILE
from tests.launch.environment import need_programs
from tests.launch.hosts import PROGRAMS, SSH_PROGRAMS, Network, start_ssh

pytestmark = pytest.mark.slow

LIMIT = 300  # seconds


@pytest.fixture
def hosts(tmp_path):
    need_programs(PROGRAMS)
    network = Network(tmp_path)
    try:
        yield network.hosts
    finally:
        network.stop()


def read_events(run):
    return [json.loads(line) for line in (run / EVENTS_FILE).read_text().splitlines()]


def said(tmp_path):
    return "\n".join(f"{path.name}:\n{path.read_text()[-5000:]}" for path in sorted(tmp_path.glob("*.out")))


def start(hosts, tmp_path, script, arguments, **variables):
    """The script on both hosts, as processes."""
    common = {"HEAD_NODE": "alpha", "NPROC": 2, "INTERFACE": "eth0"} | variables
    return [
        host.start("bash", script, *arguments, output=tmp_path / f"{host.name}.out", **common) for host in hosts
    ]  # fmt: skip


def statuses(processes, tmp_path):
    try:
        return [process.wait(timeout=LIMIT) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail(said(tmp_path))


@pytest.mark.timeout(600)
def test_torchrun_on_two_hosts(hosts, training, tmp_path):
    arguments = [*training.arguments, f"run.dir={tmp_path}/run"]
    processes = start(hosts, tmp_path, "examples/launch/torchrun_many_nodes.sh", arguments, NNODES=2)
    assert statuses(processes, tmp_path) == [0, 0], said(tmp_path)
    assert training.curve(tmp_path / "run") == training.expected


@pytest.mark.drill
def test_elastic_goes_on_without_a_host(hosts, training, tmp_path):
    """All processes of a host are killed. The other one goes on from the last checkpoint, in a layout that fits."""
    layouts = ["parallel.expert=2", "parallel.fallbacks=[{expert: 1}]"]
    arguments = [*training.arguments, f"run.dir={tmp_path}/run", "checkpoint.every=5", *layouts]
    script = "examples/launch/torchrun_elastic.sh"
    # torchrun counts a host as gone after two seconds of silence, and waits two seconds for one more to come.
    rendezvous = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=2"
    both = {"MIN_NODES": 1, "MAX_NODES": 2, "RENDEZVOUS": rendezvous}
    alpha, beta = start(hosts, tmp_path, script, arguments, **both)
    deadline = time.monotonic() + LIMIT
    while training.done(tmp_path / "run") < 8:
        assert time.monotonic() < deadline and alpha.poll() is None, said(tmp_path)
        time.sleep(0.1)
    hosts[1].kill_all()
    assert training.done(tmp_path / "run") < training.steps, "too late to kill a host"
    assert beta.wait(timeout=10) != 0
    assert statuses([alpha], tmp_path) == [0], said(tmp_path)
    starts = [event for event in read_events(tmp_path / "run") if event["event"] in ("start", "layout", "resume")]
    assert [event["event"] for event in starts] == ["start", "layout", "resume"]
    assert [(start["world_size"], start["hosts"]) for start in (starts[0], starts[2])] == [
        (4, ["alpha", "beta"]), (2, ["alpha"]),
    ]  # fmt: skip
    curve = training.curve(tmp_path / "run")
    assert curve == [pytest.approx(pair, rel=1e-9, abs=0) for pair in training.expected]


@pytest.mark.drill
def test_deepspeed_on_two_hosts(hosts, training, tmp_path):
    """The launcher reaches the hosts of a hostfile with pdsh over ssh, and takes its environment along."""
    need_programs(SSH_PROGRAMS)
    start_ssh(hosts, tmp_path / "ssh")
    (tmp_path / "hostfile").write_text("alpha slots=2\nbeta slots=2\n")
    (tmp_path / "exported").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\n")
    variables = {"HOSTFILE": tmp_path / "hostfile", "DS_ENV_FILE": tmp_path / "exported"}
    arguments = [*training.arguments, f"run.dir={tmp_path}/run"]
    launcher = hosts[0].start("bash", "examples/launch/deepspeed.sh", *arguments, output=tmp_path / "launcher.out",
                              **variables)  # fmt: skip
    assert statuses([launcher], tmp_path) == [0], said(tmp_path)
    assert all(f"{host.name}: " in (tmp_path / "launcher.out").read_text() for host in hosts)
    assert training.curve(tmp_path / "run") == training.expected
