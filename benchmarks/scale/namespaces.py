"""Two networks on this machine, joined by a cable: what runs in one reaches the other by it alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack

HOSTS = ("10.77.0.1", "10.77.0.2")


class Namespaces:
    """Two network namespaces, where root may make them.

    Attributes:
        made: whether they are there.
        hosts: the address of each; this machine's own where they are not.
        links: the name of the network interface of each.
    """

    def __init__(self, name: str) -> None:
        self._closing = ExitStack()
        self._names = [f"{name}-{os.getpid()}-{index}" for index in range(2)]
        # Names of links are short.
        self.links = [f"{name}{os.getpid()}{end}"[-15:] for end in "ab"]
        self.made = os.geteuid() == 0 and shutil.which("ip") is not None and self._make()
        self.hosts = HOSTS if self.made else ("127.0.0.1", "127.0.0.1")

    def inside(self, index: int) -> list[str]:
        """What a command begins with that runs in one of them."""
        return ["ip", "netns", "exec", self._names[index]] if self.made else []

    def processes(self, index: int) -> list[int]:
        """Ids of the processes that run in one of them."""
        command = ["ip", "netns", "pids", self._names[index]]
        return [int(one) for one in subprocess.check_output(command, text=True).split()]

    def set_link(self, index: int, state: str) -> None:
        """Take the network of one away (``"down"``), or give it back (``"up"``)."""
        self._ip(f"-n {self._names[index]} link set {self.links[index]} {state}", check=True)

    def close(self) -> None:
        """Delete them."""
        self._closing.close()

    def _make(self) -> bool:
        first, second = self._names
        commands = [
            *(f"netns add {name}" for name in self._names),
            f"link add {self.links[0]} netns {first} type veth peer name {self.links[1]} netns {second}",
        ]
        for name, host, link in zip(self._names, HOSTS, self.links, strict=True):
            commands += [
                f"-n {name} addr add {host}/24 dev {link}",
                f"-n {name} link set lo up",
                f"-n {name} link set {link} up",
            ]
        for name in self._names:
            self._closing.callback(self._ip, f"netns delete {name}")
        return all(self._ip(command) for command in commands)

    def _ip(self, command: str, *, check: bool = False) -> bool:
        ran = subprocess.run(["ip", *command.split()], capture_output=True, check=check)
        return ran.returncode == 0
