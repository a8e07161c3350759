"""A cleansing whose heads Ray trains is that of one process, bit for bit."""

import shutil

import pytest
import torch

pytest.importorskip("ray", reason="needs ray: pip install 'turnover[ray]'")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from test_cleanse import SHARE, harmed, validation  # noqa: F401 - fixtures
from test_cli import encoder, turnover, turnover_process  # noqa: F401 - a fixture


@pytest.mark.long
def test_a_cleansing_by_many_workers_writes_the_same_files(
    harmed,  # noqa: F811
    validation,  # noqa: F811
    tmp_path,
):
    def arguments(name):
        folder = shutil.copytree(harmed, tmp_path / name)
        given = ("--validation", validation, "--out", folder / "cleaned.csv", "--seeds", 2)
        return "cleanse", folder, *given, "--fraction", SHARE, "--ranking", "turn-over"

    def files(name):
        written = ("cleaned.csv", "results/removed.csv", "results/cleanse.json")
        return [(tmp_path / name / path).read_bytes() for path in written]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    turnover(*arguments("one"))
    torch.set_num_threads(threads)
    done = turnover_process(*arguments("many"), "--engine", "ray")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cleansing: 100%" in done.stderr
    assert files("many") == files("one")


def test_an_address_without_ray_and_an_unknown_engine_are_refused(
    harmed,  # noqa: F811
    validation,  # noqa: F811
    tmp_path,
):
    given = ("cleanse", harmed, "--validation", validation, "--out", tmp_path / "cleaned.csv")
    refused = turnover(*given, "--address", "127.0.0.1:1", expect=2)
    assert "give --engine ray as well" in refused.stderr
    refused = turnover(*given, "--engine", "dask", expect=2)
    assert "'process', 'ray'" in refused.stderr
    assert not list(tmp_path.iterdir())
