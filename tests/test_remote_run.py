"""Runs on S3-compatible storage, by the commands that take a run: what a folder gives, and no less safe."""

# ruff: noqa: F811 - fixtures of other files

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="pillow is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("typer", reason="typer is not installed")

import s3fs

import test_store
from test_cli import turnover
from test_images import folders, run  # noqa: F401 - fixtures: a run of images, with its results
from test_remote_store import child, names, server, tree, url  # noqa: F401 - likewise: an S3 server
from turnover import InputError
from turnover.runs.remote import _Mirror, mirrored
from turnover.runs.run import Run

TIMED = {"metrics.json", "fit.toml"}


def files() -> Any:
    return s3fs.S3FileSystem(use_listings_cache=False)


def contents(folder: Path) -> dict[str, bytes]:
    every = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return {str(path.relative_to(folder)): path.read_bytes() for path in every}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stored(run: Path, url: str) -> Iterator[str]:
    """The run, on the store."""
    for name, raw in contents(run).items():
        files().pipe_file(f"{url}/{name}", raw)
    return url


def same(left: dict[str, bytes], right: dict[str, bytes], *, but: set[str] = TIMED) -> None:
    assert left.keys() - but == right.keys() - but
    assert [name for name in left.keys() - but if left[name] != right[name]] == []


@pytest.mark.long
def test_a_run_is_fitted_scored_and_explained_on_the_store_as_in_a_folder(
    url: str,
    folders: tuple[Path, Path],
    tmp_path: Path,
    cache: Path,
) -> None:
    for place in (url, tmp_path / "result"):
        train, test = folders
        shape = ("--model", "vgg11", "--width", 4, "--hidden", 64, "--epochs", 2, "--no-compare")
        turnover("fit", train, "--test", test, *shape, "--batch-size", 12, "--out", place)
        assert "exists; pass --overwrite" in (
            turnover("fit", train, "--test", test, *shape, "--out", place, expect=2).stderr
        )
        turnover("influence", place, "--ghosts", 200)
        shown = turnover("explain", place, "--json")
        turnover("report", place)
        turnover("predict", place, "--out", tmp_path / "predictions.csv")
        json.loads(shown.stdout)
        shutil.rmtree(cache, ignore_errors=True)  # from now on what is there counts
    timed = TIMED | {"report.html"}
    same(tree(url), contents(tmp_path / "result"), but=timed)
    assert timed <= tree(url).keys()
    with mirrored(url) as folder:
        metrics = Run.load(folder).read_result("errors")
    assert len(metrics.scores) == json.loads(tree(url)["metrics.json"])["errors_explained"]


def test_what_did_not_change_is_not_copied_again(
    stored: str,
    server: Any,
    cache: Path,
) -> None:
    turnover("explain", stored, "--show", 0)
    got: list[str] = []
    server.fault = lambda number, method, path: got.append(f"{method} {path}")
    turnover("explain", stored, "--show", 0)
    assert not [one for one in got if one.startswith("GET") and "model.safetensors" in one]
    assert [one for one in got if one.startswith("PUT") and "explanations.json" in one]


def test_what_a_command_that_fails_has_written_is_not_copied_back(stored: str) -> None:
    before = tree(stored)

    def fail() -> None:
        with mirrored(stored) as folder:
            (folder / "results" / "explanations.json").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert tree(stored) == before
    with mirrored(stored) as folder:
        assert (folder / "results" / "explanations.json").read_text() == "half"
    assert tree(stored)["results/explanations.json"] == b"half"


def test_what_two_machines_wrote_is_not_mixed(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_here_and_there() -> None:
        with mirrored(stored) as folder:
            (folder / "metrics.json").write_text("{}")
            files().pipe_file(f"{stored}/metrics.json", b'{"other": 1}')

    before = tree(stored)
    with pytest.raises(InputError, match=r"metrics\.json was written there by somebody else"):
        write_here_and_there()
    with pytest.raises(InputError, match=r"metrics\.json was changed there, and here in"):
        write_here_and_there()
    same(tree(stored), before)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with mirrored(stored) as folder:
        assert (folder / "metrics.json").read_text() == '{"other": 1}'


def test_a_run_that_is_replaced_there_is_copied_anew(stored: str, run: Path) -> None:
    with mirrored(stored):
        pass
    files().rm(f"{stored}/results", recursive=True)
    files().pipe_file(f"{stored}/train.jsonl", b"")
    with mirrored(stored) as folder:
        assert not list(folder.glob("results/*.zarr"))
        with pytest.raises(InputError, match=r"train\.jsonl: damaged"):
            Run.load(folder)


@pytest.mark.parametrize(
    "name", ["../outside", "results/../../outside", "results//outside", "a\\b"]
)
def test_names_that_lead_out_of_the_run_are_refused(
    name: str,
    stored: str,
    cache: Path,
    server: Any,
) -> None:
    made = files()
    made.call_s3("put_object", Bucket="bucket", Key=f"{stored[12:]}/{name}", Body=b"x")
    assert "leads out of the run" in turnover("report", stored, expect=2).stderr
    assert not list(cache.rglob("*outside*")) and not list(cache.rglob("*.safetensors"))


def test_what_is_not_a_whole_run_is_refused(url: str, stored: str) -> None:
    files().rm_file(f"{stored}/digests.json")
    assert "is not a run: it has no digests.json" in turnover("report", stored, expect=2).stderr
    assert "bucket does not exist" in turnover("report", "s3://nowhere/run", expect=2).stderr
    assert "cannot be opened" in turnover("report", "nosuch://x/run", expect=2).stderr


@pytest.mark.long
@pytest.mark.parametrize("fault", [503, "cut", "lost"])
def test_a_store_that_fails_now_and_then_gives_the_same_run(
    fault: Any,
    stored: str,
    run: Path,
    server: Any,
) -> None:
    before = server.faults
    server.fault = lambda number, method, path: fault if number % 16 == 0 else None
    turnover("influence", stored, "--ghosts", 1000)
    server.fault = lambda number, method, path: None
    assert server.faults > before + 4
    same(tree(stored), contents(run))


@pytest.mark.parametrize("where", ["push", "_put"])
def test_a_fit_that_was_not_copied_back_is_by_the_next_command(
    where: str, url: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, of = [], getattr(_Mirror, where)

    def fail(*given: Any) -> None:
        calls.append(given)
        if where == "push" or len(calls) == 2:
            raise KeyboardInterrupt
        of(*given)

    def fit() -> None:
        with mirrored(url, new=True) as folder:
            shutil.copytree(run, folder, dirs_exist_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr(_Mirror, where, fail)
        with pytest.raises(KeyboardInterrupt):
            fit()
    assert "digests.json" not in tree(url)
    with mirrored(url, new=True):
        same(tree(url), contents(run), but=set())


@pytest.mark.parametrize("what", ["changed", "removed"])
def test_a_copy_that_is_deleted_removes_nothing_there(
    what: str, stored: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, interrupted = tree(stored), pytest.raises(KeyboardInterrupt)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    def work() -> None:
        with mirrored(stored) as folder:
            if what == "changed":
                (folder / "metrics.json").write_text("{}")
            else:
                shutil.rmtree(folder / "results" / "gram.zarr")

    with monkeypatch.context() as patch, interrupted:
        patch.setattr(_Mirror, "_remove", fail)
        work()
    for folder in cache.glob("turnover/*/result"):
        shutil.rmtree(folder)
    with mirrored(stored):
        pass
    there = tree(stored)
    gone = {n for n in before if what == "removed" and n.startswith("results/gram.zarr/")}
    same(there, {name: raw for name, raw in before.items() if name not in gone}, but=set())


SCORING = """
import sys, turnover.runs.remote
put, left = turnover.runs.remote._Mirror._put, int(sys.argv[2])
def slowly(self, names):
    global left
    for name in names:
        if left == 0:
            print("now", flush=True)
            sys.stdin.read()
        left -= 1
        put(self, [name])
turnover.runs.remote._Mirror._put = slowly
from turnover import cli
sys.argv = ["turnover", "influence", sys.argv[1], "--ghosts", "200"]
cli.main()
"""


@pytest.mark.long
def test_killed_while_copying_back_the_same_command_ends_it(
    stored: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    turnover("influence", whole, "--ghosts", 200)
    process = subprocess.Popen(
        [sys.executable, "-c", SCORING, stored, "9"],
        env=child(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert any(b"now" in line for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(test_store.location, "_LEASE_SECONDS", 0)
    monkeypatch.setattr(test_store.location, "_SETTLE_SECONDS", 0)
    with monkeypatch.context() as another:
        another.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
        assert "errors.zarr" in turnover("explain", stored, expect=2).stderr
    turnover("influence", stored, "--ghosts", 200)
    same(tree(stored), contents(whole))
