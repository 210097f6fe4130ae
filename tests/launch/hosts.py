"""Hosts of a network on this machine: each has its network, host name, /etc/hosts, mounts and process numbers.

A host is a set of Linux namespaces that lives as long as its first process, which ends when its standard input does:
with the test, however that ends. Nothing of it is seen or left outside.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.launch.environment import environ, lack

PROGRAMS = {"iproute2": ["ip"], "util-linux": ["unshare", "nsenter"]}
SSH_PROGRAMS = {"openssh-server": ["sshd"], "openssh-client": ["ssh", "ssh-keygen"], "pdsh": ["pdsh"]}
# /run and /etc/ssh are a host's own: sshd and ssh find what the test puts there.
FIRST = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind "$2/ssh" /etc/ssh
ip link set lo up
echo up
exec cat
"""


class Host:
    """A host that is up, without a link to others."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.first = subprocess.Popen(
            ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
             "sh", "-c", FIRST, "sh", name, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ(),
        )  # fmt: skip
        if self.first.stdout.readline() != "up\n":
            said = self.first.communicate()[1].strip()
            lack(f"this machine makes no namespaces: {said}")
        self.inside = int(Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text())

    def entered(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on this host, in the folder of the test."""
        return ["nsenter", f"--target={self.inside}", "--net", "--uts", "--ipc", "--mount", "--pid",
                "env", f"--chdir={os.getcwd()}", *map(str, command)]  # fmt: skip

    def run(self, *command: str) -> None:
        subprocess.run(self.entered(command), check=True, capture_output=True, env=environ(), timeout=30)

    def start(self, *command: str, output: Path, **variables: object) -> subprocess.Popen:
        """Start a command there, which writes to the file `output`."""
        with output.open("w") as file:
            return subprocess.Popen(self.entered(command), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                    env=environ(**variables))  # fmt: skip

    def kill_all(self) -> None:
        """End all that runs there, at once, as a crash would; the host itself and its network stay."""
        self.run("sh", "-c", "kill -KILL -1")

    def stop(self) -> None:
        self.first.stdin.close()
        self.first.wait(timeout=10)


class Network:
    """Two hosts, `alpha` and `beta`, with a link between them."""

    def __init__(self, folder: Path) -> None:
        addresses = {"alpha": "10.77.0.1", "beta": "10.77.0.2"}
        known = [f"{address} {name}\n" for name, address in addresses.items()]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(known))
        (folder / "ssh").mkdir(exist_ok=True)
        self.hosts: list[Host] = []
        try:
            for name in addresses:
                self.hosts.append(Host(name, folder))
            alpha, beta = self.hosts
            # Made outside of their process numbers, for `netns` takes a number of here.
            subprocess.run(
                ["nsenter", f"--target={alpha.inside}", "--net", "ip", "link", "add", "eth0", "type", "veth",
                 "peer", "name", "eth0", "netns", str(beta.inside)],
                check=True, capture_output=True, text=True, env=environ(), timeout=30,
            )  # fmt: skip
            for host in self.hosts:
                host.run("ip", "address", "add", f"{addresses[host.name]}/24", "dev", "eth0")
                host.run("ip", "link", "set", "eth0", "up")
        except subprocess.CalledProcessError as error:
            self.stop()
            lack(f"this machine makes no network for namespaces: {error.stderr}")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        for host in self.hosts:
            host.stop()


def start_ssh(hosts: Sequence[Host], folder: Path) -> None:
    """An sshd on each host, and a key that lets root of one into the other. `folder` is their /etc/ssh."""
    for key in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "authorized").write_text((folder / "key.pub").read_text())
    (folder / "ssh_config").write_text(
        "Host alpha beta\n  IdentityFile /etc/ssh/key\n  IdentitiesOnly yes\n  BatchMode yes\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    (folder / "sshd_config").write_text(
        "HostKey /etc/ssh/host_key\nAuthorizedKeysFile /etc/ssh/authorized\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\n"
    )
    for host in hosts:
        host.run(shutil.which("sshd"))  # goes into the background, and ends with the host
