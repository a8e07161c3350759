"""Known flaws of the installed packages, as pip-audit finds them.

Exits with 1 where one is found, with 2 where pip-audit is not installed, and with 0 where nothing is
found, or where no list of flaws can be had: then it says that the audit was not done, and why.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SECONDS = 900
_PROBED = "packaging"


@dataclass(frozen=True)
class Ignored:
    """A flaw that does no harm here.

    Attributes:
        flaw: its id, or one of its other names.
        reason: why it does none.
        until: the last day on which that is taken for granted.
    """

    flaw: str
    reason: str
    until: date

    def __post_init__(self) -> None:
        if len(self.reason.split()) < 5:
            raise ValueError(f"{self.flaw} is ignored for a reason, in a sentence")


IGNORED: tuple[Ignored, ...] = ()


class NotDoneError(Exception):
    """No list of flaws could be had."""


def report(*options: str) -> list[dict[str, Any]]:
    """What pip-audit says of every package.

    Raises:
        NotDoneError: it did not come to an end, or did not know any of them.
    """
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise NotDoneError(f"no answer in {_SECONDS} seconds") from None
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise NotDoneError(said[-1]) from None
    if not any("vulns" in one for one in packages):
        raise NotDoneError(packages[0]["skip_reason"] if packages else "there are no packages")
    return packages


def judged(
    packages: Sequence[dict[str, Any]], ignored: Sequence[Ignored], today: date
) -> tuple[list[str], int]:
    """Lines to print, and how many flaws are not ignored."""
    lines: list[str] = []
    count = 0
    for package in packages:
        if "vulns" not in package:
            lines.append(f"not audited: {package['skip_reason']}")
        for flaw in package.get("vulns", ()):
            names = {flaw["id"], *flaw.get("aliases", ())}
            known = [one for one in ignored if one.flaw in names]
            what = f"{package['name']} {package['version']}: {flaw['id']}"
            if any(today <= one.until for one in known):
                lines.append(f"ignored until {known[0].until}: {what}: {known[0].reason}")
                continue
            count += 1
            mended = ", ".join(flaw["fix_versions"]) or "no release yet"
            over = f" (ignored until {known[0].until}, which is over)" if known else ""
            lines.append(f"FOUND{over}: {what}, mended in {mended}: {flaw['description'][:200]}")
    return lines, count


def main() -> int:
    """Audit, print, and say how it went."""
    if find_spec("pip_audit") is None:
        sys.stdout.write("audit: pip-audit is not installed: pip install '.[dev]'\n")
        return 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            # Where one package cannot be asked about, the other two hundred need not be.
            one = Path(folder) / "requirements.txt"
            one.write_text(f"{_PROBED}=={version(_PROBED)}\n")
            report("--no-deps", "--disable-pip", "--requirement", str(one))
        packages = report("--local")
    except NotDoneError as error:
        sys.stdout.write(f"audit: NOT DONE, so nothing is known of flaws: {error}\n")
        return 0
    lines, count = judged(packages, IGNORED, date.today())
    audited = sum("vulns" in one for one in packages)
    lines.append(f"{audited} of {len(packages)} packages audited, {count} flaws found")
    sys.stdout.write("".join(f"audit: {line}\n" for line in lines))
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
