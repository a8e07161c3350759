"""What an installation has: versions, devices, and missing extras, from the package's metadata."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from turnover.errors import InputError, needing

PURPOSES = {
    "evaluation": "retraining, LDS and other measures of scores",
    "images": "the command line for images",
    "lightning": "training in Lightning",
    "notebook": "data frames, plots and progress widgets",
    "ray": "computations on several machines or GPUs",
    "report": "reports as HTML",
    "results": "results and runs on disk",
    "rl": "agents of Stable-Baselines3",
    "s3": "runs and results on S3",
    "sklearn": "a scikit-learn classifier for tables",
    "text": "the command line for texts, and pretrained encoders of images",
    "view": "the interactive view",
}
"""Use of each extra; those of developers are left out."""


@dataclass(frozen=True)
class Diagnosis:
    """What an installation has.

    Attributes:
        versions: of turnover, Python and the platform.
        packages: version of each package that turnover uses; ``None``: missing.
        devices: where networks can run, the fastest first.
        extras: what each extra lacks, as requirements; nothing: it is complete.
    """

    versions: dict[str, str]
    packages: dict[str, str | None]
    devices: tuple[str, ...]
    extras: dict[str, tuple[str, ...]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        extras = {
            name: {"for": PURPOSES[name], "missing": list(missing)}
            for name, missing in self.extras.items()
        }
        return {
            "versions": self.versions,
            "packages": self.packages,
            "devices": list(self.devices),
            "extras": extras,
        }


def diagnose() -> Diagnosis:
    """Examine this installation; nothing is imported or downloaded for it.

    Raises:
        InputError: turnover is not installed as a package, or packaging is missing.
    """
    with needing("reading requirements", "packaging"):
        from packaging.requirements import Requirement
    try:
        own = metadata.metadata("turnover")
    except metadata.PackageNotFoundError as error:
        raise InputError("turnover is not installed as a package: pip install it") from error
    requirements = [Requirement(one) for one in own.get_all("Requires-Dist") or ()]

    def needed(extra: str) -> list[Any]:
        """Requirements of an extra, with those of the extras that it names."""
        found = []
        for one in requirements:
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                if one.name == own["Name"]:
                    found += [inner for named in sorted(one.extras) for inner in needed(named)]
                else:
                    found.append(one)
        return found

    known = [name for name in sorted(PURPOSES) if name in (own.get_all("Provides-Extra") or ())]
    core = needed("")
    found = {one.name: _version(one.name) for name in ("", *known) for one in needed(name)}
    extras = {
        name: tuple(
            sorted(
                {
                    f"{one.name}{one.specifier}"
                    for one in needed(name)
                    if one not in core and not _fits(one, found[one.name])
                }
            )
        )
        for name in known
    }
    versions = {
        "turnover": own["Version"],
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    return Diagnosis(versions, dict(sorted(found.items())), _devices(), extras)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _fits(requirement: Any, version: str | None) -> bool:
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _devices() -> tuple[str, ...]:
    found = [
        f"cuda:{number} {one.name}, {one.total_memory / 2**30:.0f} GiB"
        for number in range(torch.cuda.device_count())
        for one in (torch.cuda.get_device_properties(number),)
    ]
    if torch.backends.mps.is_available():
        found.append("mps")
    return (*found, f"cpu, {torch.get_num_threads()} threads")
