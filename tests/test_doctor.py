"""What ``turnover doctor`` says of an installation."""

import json
import platform
import tomllib
from importlib import metadata

import pytest
import torch

pytest.importorskip("typer")

from documents import ROOT
from test_cli import turnover
from turnover.tasks.doctor import PURPOSES

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
DEVELOPERS = {"bench", "dev", "docs", "fuzz"}


def installation(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that turnover has three extras, and that packages have these versions."""
    lines = (
        "Metadata-Version: 2.4\nName: turnover\nVersion: 7.1\nRequires-Dist: torch<3,>=2.6\n"
        "Requires-Dist: zarr>=3.1; extra == 'results'\n"
        "Requires-Dist: turnover[results]; extra == 'view'\n"
        "Requires-Dist: starlette>=0.46; extra == 'view'\n"
        "Requires-Dist: secret; extra == 'dev'\n"
        "Provides-Extra: results\nProvides-Extra: view\nProvides-Extra: dev\n\n"
    )
    import email

    def version(package: str) -> str:
        found = versions.get(package)
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(metadata, "metadata", lambda name: email.message_from_string(lines))
    monkeypatch.setattr(metadata, "version", version)


def test_versions_devices_and_missing_extras_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    installation(monkeypatch, torch="2.13.0+cpu", zarr="3.0.8", starlette="1.0")
    found = json.loads(turnover("doctor", "--json").stdout)
    assert found["versions"]["turnover"] == "7.1"
    assert found["versions"]["python"] == platform.python_version()
    assert found["packages"] == {"starlette": "1.0", "torch": "2.13.0+cpu", "zarr": "3.0.8"}
    assert found["devices"][-1].startswith("cpu, ")
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert {name: one["missing"] for name, one in found["extras"].items()} == {
        "results": ["zarr>=3.1"],
        "view": ["zarr>=3.1"],
    }
    assert found["extras"]["view"]["for"] == PURPOSES["view"]
    shown = turnover("doctor").stdout
    assert "pip install 'turnover[results,view]'" in shown and "zarr>=3.1" in shown


def test_nothing_is_to_be_installed_where_nothing_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installation(monkeypatch, torch="2.6", zarr="3.1", starlette="1.0")
    shown = turnover("doctor").stdout
    assert "pip install" not in shown and "nothing" in shown


def test_an_installation_without_metadata_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", missing)
    assert "not installed as a package" in turnover("doctor", expect=2).stderr


def test_every_extra_for_users_has_a_purpose() -> None:
    assert set(PURPOSES) == set(EXTRAS) - DEVELOPERS
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in PURPOSES)
