"""A SLURM cluster on this machine: munged, slurmctld and two slurmd, with all of their files in one folder."""

import os
import secrets
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tests.launch.environment import environ
from tests.ranks import free_port

PROGRAMS = {"slurm-wlm": ["slurmctld", "slurmd", "sbatch"], "munge": ["munged"], "util-linux": ["setpriv"]}
START_LIMIT = 30  # seconds
# Addresses of the loopback network as names: ranks find their first node by its name.
NODES = ("127.0.0.1", "127.0.0.2")
KILL_WAIT = 20  # seconds between SIGTERM and SIGKILL
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits for as long as credentials last.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={kill_wait}
PartitionName=low-without-grace Nodes=ALL PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Two nodes of four CPUs and two GPUs that nothing looks for. Partition `high` preempts `low`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # short, since a socket lies in it
        self.config = folder / "slurm.conf"
        self.daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start the daemons. Raises RuntimeError, with what they wrote, unless both nodes become idle."""
        for name in ("state", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        lines = [CONFIG.format(folder=self.folder, host=host, port=free_port(), kill_wait=KILL_WAIT)]
        for node in NODES:
            lines.append(f"NodeName={node} NodeAddr={node} NodeHostname={host} Port={free_port()} CPUs=4 Gres=gpu:2")
        # Partitions name their nodes, which must come first.
        self.config.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
        for gpu in range(2):
            (self.folder / f"gpu{gpu}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = ("socket", "key-file=key", "pid-file=pid", "seed-file=seed", "log-file=log")
        paths = [(option.partition("=")[0], option.rpartition("=")[2]) for option in files]
        self._daemon("munged", "--foreground", "--force", *(f"--{key}={self.folder}/munge.{end}" for key, end in paths))
        self._await("munged", (self.folder / "munge.socket").exists)
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        states = ("sinfo", "--noheader", "--format=%T %D")
        self._await("nodes", lambda: self.run(*states, check=False).split() == ["idle", "2"])

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}-{len(self.daemons)}.out", "w") as output:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],  # whatever becomes of the test
                env=self.environ(), stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.daemons.append(process)

    def _await(self, what: str, ready) -> None:
        deadline = time.monotonic() + START_LIMIT
        while not ready():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self.daemons):
                said = "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.out")))
                raise RuntimeError(f"SLURM's {what} did not come up\n{said}")
            time.sleep(0.1)

    def environ(self, **extra: object) -> dict[str, str]:
        return environ(SLURM_CONF=self.config, **extra)

    def run(self, *command: str, check: bool = True, **variables: object) -> str:
        """What a command prints that finds this cluster."""
        done = subprocess.run(command, env=self.environ(**variables), capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, **variables: object) -> "Job":
        number = self.run("sbatch", "--parsable", f"--output={self.folder}/%j.out", *arguments, **variables).strip()
        return Job(self, number)

    def wait_for_all(self, limit: float = 300) -> None:
        """Until no job is left in the queue."""
        deadline = time.monotonic() + limit
        while jobs := self.run("squeue", "--noheader"):
            assert time.monotonic() < deadline, jobs
            time.sleep(0.2)

    def stop(self) -> None:
        """End jobs and daemons, and whatever still has this cluster in its environment."""
        with suppress(subprocess.TimeoutExpired):
            self.run("scancel", "--user", "root", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self.left_over():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def left_over(self) -> list[int]:
        """Processes that were started from this cluster."""
        mark, found = f"SLURM_CONF={self.config}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found


class Job:
    """A job of a cluster."""

    def __init__(self, cluster: Cluster, number: str) -> None:
        self.cluster, self.number = cluster, number

    def field(self, name: str) -> str:
        """One of the fields that `scontrol show job` prints."""
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number)
        return dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)[name]

    def output(self) -> str:
        return "\n".join(path.read_text() for path in self.cluster.folder.glob(f"{self.number}*.out"))

    def wait(self, limit: float = 300) -> str:
        """The state that the job ends in."""
        deadline = time.monotonic() + limit
        while (state := self.field("JobState")) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"):
            assert time.monotonic() < deadline, f"job {self.number} is still {state}\n{self.output()}"
            time.sleep(0.2)
        return state
