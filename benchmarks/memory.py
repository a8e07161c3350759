"""Memory of a process on Linux."""

import os
from pathlib import Path


def peak_gib(pid: int | None = None) -> float:
    """Most memory that a process has had, shared memory that it has read included.

    Of a process begun by a larger one ``getrusage`` gives what that one had.

    Args:
        pid: of the process; ``None``: this one.
    """
    status = Path(f"/proc/{pid or os.getpid()}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20
