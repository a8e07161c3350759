"""The commands that a Ray cluster does the work of, by real processes."""

import shutil

import pytest
import torch

pytest.importorskip("ray", reason="needs ray: pip install 'turnover[ray]'")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from test_cli import data, encoder, run, turnover, turnover_process  # noqa: F401 - fixtures


@pytest.mark.long
def test_influence_by_many_workers_stores_the_same_scores(run, tmp_path):  # noqa: F811
    def arguments(name):
        return "influence", shutil.copytree(run, tmp_path / name), "--ghosts", 100, "--no-gram"

    def stored(name):
        folder = tmp_path / name / "results" / "errors.zarr"
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder): path.read_bytes() for path in files}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    turnover(*arguments("one"), "--method", "exact")
    torch.set_num_threads(threads)
    done = turnover_process(*arguments("many"), "--method", "exact", "--engine", "ray")
    assert done.returncode == 0, done.stderr[-3000:]
    assert stored("many") == stored("one") != {}


def test_a_cluster_that_is_not_there_is_said_at_once(run, tmp_path):  # noqa: F811
    copy = shutil.copytree(run, tmp_path / "run")
    before = sorted(copy.rglob("*"))
    given = ("influence", copy, "--engine", "ray", "--address")
    assert (
        "no connection to Ray at 127.0.0.1:9: " in turnover(*given, "127.0.0.1:9", expect=2).stderr
    )
    assert "is host:port, not 'nowhere'" in turnover(*given, "nowhere", expect=2).stderr
    refused = turnover("influence", copy, "--address", "127.0.0.1:9", expect=2).stderr
    assert "give --engine ray as well" in refused
    assert sorted(copy.rglob("*")) == before
