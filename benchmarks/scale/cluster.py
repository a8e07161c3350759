"""A Ray cluster of two nodes on this machine, each with a network of its own where root may make one."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from benchmarks.scale.namespaces import Namespaces

ROOT = Path(__file__).resolve().parents[2]
_STORE_BYTES = 100 * 2**20
_PATIENCE = 60.0


class Node:
    """A raylet and what it has started."""

    def __init__(self, inside: list[str], address: str) -> None:
        self._inside, self.address = inside, address
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        """Start it, with one CPU."""
        ray = Path(sys.executable).with_name("ray")
        fixed = ["--block", "--node-ip-address", self.address, "--num-cpus", "1"]
        size = ["--object-store-memory", str(_STORE_BYTES)]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*self._inside, str(ray), "start", *fixed, *size, *arguments],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def processes(self) -> list[psutil.Process]:
        """All of its processes."""
        if self._process is None or self._process.poll() is not None:
            return []
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]

    def workers(self) -> list[psutil.Process]:
        """Its processes that run tasks, or have run some."""
        found = []
        for process in self.processes():
            try:
                title = "".join(process.cmdline()[:1])
            except psutil.NoSuchProcess:
                continue
            if title.startswith("ray::") and not title.endswith("Agent"):
                found.append(process)
        return found

    def kill(self) -> None:
        """SIGKILL to everything of it at once, as when its power fails."""
        for process in self.processes():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        if self._process is not None:
            self._process.wait()


class Cluster:
    """A head node, with which drivers connect, and one more that comes and goes.

    Attributes:
        address: of the head, host:port.
        head: the node of the drivers.
        other: the second one; not there before :meth:`join`.
        namespaces: whether each node has a network of its own.
    """

    def __init__(self) -> None:
        self._closing = ExitStack()
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self._closing.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self._networks = Namespaces("ray")
        self._closing.callback(self._networks.close)
        self.namespaces = self._networks.made
        self.head, self.other = (
            Node(self._networks.inside(index), host)
            for index, host in enumerate(self._networks.hosts)
        )
        self.address = f"{self.head.address}:{6379 if self.namespaces else _free_port()}"
        # Drivers and nodes must show each other the token: whoever reaches a Ray cluster can run code on it.
        self._environment = {
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), str(ROOT / "tests")]),
        }

    def __enter__(self) -> Self:
        port = self.address.split(":")[1]
        head = ["--head", "--port", port, "--include-dashboard", "false"]
        self.head.start([*head, "--temp-dir", str(self._folder / "r")], self._environment, self.log)
        self._closing.callback(self.head.kill)
        self._closing.callback(self.other.kill)
        self._wait("Ray runtime started", 1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()

    @property
    def log(self) -> Path:
        """What the nodes print."""
        return self._folder / "log"

    def join(self) -> None:
        """Start the other node and wait until it is of the cluster."""
        started = self.log.read_text().count("Ray runtime started")
        self.other.start(["--address", self.address], self._environment, self.log)
        self._wait("Ray runtime started", started + 1)

    def cut(self) -> None:
        """Take the other node's network away, and leave its processes at work."""
        self._networks.set_link(1, "down")

    def mend(self) -> None:
        """Give it back."""
        self._networks.set_link(1, "up")

    def driver(self, *command: str, **options: object) -> subprocess.Popen[str]:
        """A Python process on the head node.

        Args:
            command: arguments of the interpreter.
            options: of ``subprocess.Popen``.
        """
        process: subprocess.Popen[str] = subprocess.Popen(
            [*self._networks.inside(0), sys.executable, *command],
            env=self._environment,
            cwd=ROOT,
            text=True,
            **options,  # type: ignore[call-overload]
        )
        return process

    def _wait(self, text: str, times: int) -> None:
        limit = time.monotonic() + _PATIENCE
        while self.log.read_text().count(text) < times:
            if time.monotonic() > limit:
                raise TimeoutError(f"Ray did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
