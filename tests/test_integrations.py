"""Adapters to other tools, where the tool is absent."""

import subprocess
import sys

import pytest
import torch

import turnover
from turnover import InputError


@pytest.mark.parametrize("package", ["dattri", "opendataval", "quanda"])
def test_an_adapter_without_its_package_says_what_to_install(package, monkeypatch):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"turnover.integrations.{package}", raising=False)
    with pytest.raises(InputError, match=f"pip install '{package}'"):
        __import__(f"turnover.integrations.{package}")


def test_label_issues_without_cleanlab_say_what_to_install(monkeypatch):
    from turnover.integrations.cleanlab import label_issues

    monkeypatch.setitem(sys.modules, "cleanlab.classification", None)
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    network = turnover.attach(torch.nn.Sequential(turnover.WideHead(4, 8, 2)), ["head"])
    with pytest.raises(InputError, match="pip install 'cleanlab'"):
        label_issues(network, [], [])


def test_the_core_imports_none_of_them():
    code = (
        "import sys, turnover\n"
        "print([name for name in ('cleanlab', 'dattri', 'opendataval', 'quanda') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
