"""The audit of installed packages, with a pip-audit that says what it is told to."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import ModuleType

import pytest

from documents import ROOT

SCRIPT = ROOT / ".ci" / "audit.py"
CLEAN = {"name": "packaging", "version": "1.0", "vulns": []}
FLAW = {
    "id": "PYSEC-2030-1",
    "aliases": ["CVE-2030-11111"],
    "fix_versions": ["2.1"],
    "description": "Runs what it reads.",
}
FLAWED = {"name": "reader", "version": "2.0", "vulns": [FLAW]}
UNKNOWN = {"name": "ours", "skip_reason": "Dependency not found on PyPI: ours (0.1)"}
STUB = """
import json, os, sys
said = json.loads(os.environ["SAID"])["one" if "--requirement" in sys.argv else "all"]
if isinstance(said, str):
    sys.exit("Traceback\\n" + said)
json.dump({"dependencies": said, "fixes": []}, sys.stdout)
sys.exit(any(one.get("vulns") for one in said))
"""


def audited(tmp_path: Path, one: object, everything: object) -> tuple[int, str]:
    (tmp_path / "pip_audit.py").write_text(STUB)
    said = json.dumps({"one": one, "all": everything})
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "SAID": said}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_flaw_is_listed_and_ends_with_1(tmp_path: Path) -> None:
    code, said = audited(tmp_path, [CLEAN], [CLEAN, FLAWED, UNKNOWN])
    assert code == 1
    assert "FOUND: reader 2.0: PYSEC-2030-1, mended in 2.1: Runs what it reads." in said
    assert "not audited: Dependency not found on PyPI: ours (0.1)" in said
    assert "2 of 3 packages audited, 1 flaws found" in said


def test_packages_without_known_flaws_end_with_0(tmp_path: Path) -> None:
    code, said = audited(tmp_path, [CLEAN], [CLEAN, UNKNOWN])
    assert code == 0 and "1 of 2 packages audited, 0 flaws found" in said
    assert "NOT DONE" not in said and "FOUND:" not in said


@pytest.mark.parametrize(
    ("one", "everything", "why"),
    [
        ("ConnectionError: no route to pypi.org", [CLEAN], "ConnectionError: no route to pypi.org"),
        ([CLEAN], "ReadTimeout: pypi.org", "ReadTimeout: pypi.org"),
        ([UNKNOWN], [CLEAN], "not found on PyPI"),  # a mirror that has no list of flaws
        ([CLEAN], [UNKNOWN, UNKNOWN], "not found on PyPI"),
    ],
)
def test_an_audit_that_could_not_be_done_says_so(
    one: object, everything: object, why: str, tmp_path: Path
) -> None:
    code, said = audited(tmp_path, one, everything)
    assert code == 0
    assert (
        said.startswith("audit: NOT DONE") and why in said and "audited" not in said.split(why)[1]
    )


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit_of_packages", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its data classes look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("named", ["PYSEC-2030-1", "CVE-2030-11111"])
def test_a_flaw_is_ignored_until_its_day_is_over(audit: ModuleType, named: str) -> None:
    until = date(2030, 5, 1)
    ignored = [audit.Ignored(named, "we never hand it what it would run", until)]
    lines, count = audit.judged([FLAWED], ignored, until)
    assert count == 0 and "we never hand it what it would run" in lines[0]
    lines, count = audit.judged([FLAWED], ignored, date(2030, 5, 2))
    assert count == 1 and "ignored until 2030-05-01, which is over" in lines[0]
    other = [audit.Ignored("CVE-2030-22222", "we never hand it what it would run", until)]
    assert audit.judged([FLAWED], other, until)[1] == 1


def test_nothing_is_ignored_without_a_reason(audit: ModuleType) -> None:
    for reason in ("", "not used"):
        with pytest.raises(ValueError, match="for a reason"):
            audit.Ignored("CVE-2030-11111", reason, date(2030, 1, 1))
