"""Two hosts on this machine: network namespaces joined by a cable that can be slow and can be cut."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
"""What is needed, and the Debian package that has it."""

EXCHANGE = [sys.executable, "-P", str(Path(__file__).with_name("exchange_for_ever.py"))]
"""A command that exchanges until something breaks; pipes on stdin and stdout let the ranks begin together, see `join`."""

ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Refused(Exception):
    """This machine cannot do it; the message says why."""


class Hosts:
    """Two network namespaces, each with `eth0` on the one cable between them. Only the network is apart: files are shared."""

    def __init__(self) -> None:
        """Raises Refused with the reason where the machine does not allow it."""
        missing = sorted({f"{tool} (Debian package {package})" for tool, package in TOOLS.items() if not shutil.which(tool)})
        if os.geteuid() != 0 or missing:
            raise Refused(f"two hosts with a slow link need {', '.join(missing) or 'root'}")
        # A host is there as long as a process is in it.
        self.holders = [subprocess.Popen(["unshare", "--net", "sleep", "1800"], stderr=subprocess.PIPE) for _ in ADDRESSES]
        self.processes: list[subprocess.Popen[str]] = []
        try:
            self._connect()
        except (subprocess.SubprocessError, OSError) as error:
            self.close()
            raise Refused(f"network namespaces are refused here: {getattr(error, 'stderr', None) or error}") from error

    def _connect(self) -> None:
        for holder in self.holders:
            self._wait_for_namespace(holder)
        self._on(0, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(self.holders[1].pid))
        for host, address in enumerate(ADDRESSES):
            self._on(host, "ip", "link", "set", "lo", "up")
            self._on(host, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            self._on(host, "ip", "link", "set", "eth0", "up")
        # So that a kernel without the token bucket is found here.
        self.limit("10gbit")

    def _wait_for_namespace(self, holder: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 10
        while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            if holder.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(holder.stderr.read().decode().strip() if holder.stderr and holder.poll() else "no answer")
            time.sleep(0.01)

    def _on(self, host: int, *command: str) -> None:
        subprocess.run(self._inside(host, command), check=True, capture_output=True, text=True, timeout=20)

    def _inside(self, host: int, command: Sequence[str]) -> list[str]:
        return ["nsenter", "--target", str(self.holders[host].pid), "--net", "--", *command]

    def limit(self, rate: str) -> None:
        """Both directions to a rate in tc's words, for example 50mbit."""
        for host in range(len(ADDRESSES)):
            self._on(host, *f"tc qdisc replace dev eth0 root tbf rate {rate} burst 256k latency 100ms".split())

    def cut(self) -> None:
        """Takes the cable out: neither side is told."""
        self._on(1, "ip", "link", "set", "eth0", "down")

    def start(self, command: Sequence[str], ranks_per_host: int = 1, **environment: str) -> list[subprocess.Popen[str]]:
        """Starts the command as `ranks_per_host` ranks on each host, as torchrun would set their variables -> by rank.

        stdin, stdout and stderr are pipes of text.
        """
        world = ranks_per_host * len(ADDRESSES)
        common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(ranks_per_host), "MASTER_ADDR": ADDRESSES[0]}
        # The port is free: nothing else is in the namespace.
        common |= {"MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        started = []
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank % ranks_per_host), "GROUP_RANK": str(rank // ranks_per_host)}
            inside = self._inside(rank // ranks_per_host, command)
            variables = {**os.environ, **common, **own, **environment}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(inside, env=variables, **pipes))
        self.processes += started
        return started

    def run(
        self, command: Sequence[str], ranks_per_host: int = 1, timeout: float = 120, **environment: str
    ) -> list[subprocess.CompletedProcess[str]]:
        """`start`, and what each rank printed when all have ended. Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        done = []
        for process in self.start(command, ranks_per_host, **environment):
            out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            done.append(subprocess.CompletedProcess(command, process.returncode, out, err))
        return done

    def close(self) -> None:
        """Ends every process in them, and with the last one the hosts and the cable."""
        for process in (*self.processes, *self.holders):
            process.kill()
            process.communicate()


def join(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Lets ranks that run EXCHANGE begin together. Raises RuntimeError with what one says that ends."""
    _expect("imported", processes)
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    _expect("ready", processes)


def _expect(word: str, processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.stdout.readline() != f"{word}\n":
            raise RuntimeError(process.stderr.read())


@contextlib.contextmanager
def connected_hosts() -> Iterator[Hosts]:
    """Two hosts for the body. Raises Refused."""
    hosts = Hosts()
    try:
        yield hosts
    finally:
        hosts.close()
