"""The command ``doctor``: what is installed."""

from __future__ import annotations

from turnover.cli.output import Output
from turnover.cli.parameters import command
from turnover.tasks.doctor import PURPOSES, diagnose


@command()
def doctor(output: Output) -> None:
    """Print versions, devices, and which optional packages are missing and what they are for."""
    found = diagnose()
    packages = ((name, version or "missing") for name, version in found.packages.items())
    output.table(("package", "version"), [*found.versions.items(), *packages])
    output.table(("device",), ((device,) for device in found.devices))
    output.table(
        ("extra", "for", "missing"),
        (
            (name, PURPOSES[name], ", ".join(missing) or "nothing")
            for name, missing in found.extras.items()
        ),
    )
    lacking = [name for name, missing in found.extras.items() if missing]
    if lacking:
        output.say(f"to install what is missing: pip install 'turnover[{','.join(lacking)}]'")
    output.document(found.to_dict())
