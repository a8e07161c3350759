"""The command ``doctor``: what is installed."""

from __future__ import annotations

from turnover.cli.output import Output
from turnover.cli.parameters import command
from turnover.data.demo import model_folder
from turnover.errors import InputError
from turnover.tasks.doctor import PURPOSES, diagnose


@command()
def doctor(output: Output) -> None:
    """Print versions, devices, which optional packages are missing, and where the demo's model is."""
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
    try:
        model = str(model_folder())
        output.say(f"the demo's model, for fit --model: {model}")
    except InputError as error:
        model = None
        output.say(str(error))
    output.document(found.to_dict() | {"demo_model": model})
