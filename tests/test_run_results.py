"""Results in a run folder: of the settings that were given last, all of them, or of none."""

# ruff: noqa: F811 - fixtures of other files

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="pillow is not installed")
pytest.importorskip("typer", reason="typer is not installed")

from test_cli import turnover
from test_images import folders, run  # noqa: F401 - fixtures: a run of images, with its results
from turnover import InputError
from turnover.io.parsing import read_json, write_json
from turnover.report.from_run import content
from turnover.results.reader import open_result
from turnover.runs.run import Run
from turnover.tasks import cleanse
from turnover.tasks import score as scoring
from turnover.tasks.explain import explain_errors
from turnover.tasks.review import review
from turnover.tasks.score import ScoreConfig, score

BASE = {"ghosts": 50, "gram": False, "sites": ("*",)}
CHANGES = {
    "objective": {"objective": "cross_entropy"},
    "ghosts": {"ghosts": 60},
    "method": {"method": "exact"},
    "sites": {},
    "gram": {"gram": True},
}


@pytest.fixture(scope="module")
def scored(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(run, tmp_path_factory.mktemp("scored") / "run"))
    score(Run.load(folder), ScoreConfig(**BASE))
    return folder


@pytest.fixture
def copy(scored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scored, tmp_path / "run"))


def numbers(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted((folder / "results").glob("*.zarr")):
        result = open_result(path).load()
        found[f"{path.name} {result.method} {result.objective} {result.sites}"] = np.concatenate(
            [result.scores.ravel(), result.floor.sd.ravel()]
        )
    return found


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def one_site(folder: Path) -> dict[str, object]:
    return {"sites": (Run.load(folder).network.sites[0],)}


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_of_one_setting_nothing_of_the_old_one_is_left(
    change: str, copy: Path, tmp_path: Path
) -> None:
    changed = BASE | (one_site(copy) if change == "sites" else CHANGES[change])
    fresh = Path(shutil.copytree(copy, tmp_path / "fresh"))
    shutil.rmtree(fresh / "results")
    score(Run.load(fresh), ScoreConfig(**changed))
    before = numbers(copy)
    turnover("explain", copy, "--show", 0)
    score(Run.load(copy), ScoreConfig(**BASE))
    assert (copy / "results" / "explanations.json").exists(), "it is of these results"
    score(Run.load(copy), ScoreConfig(**changed))
    assert_same(numbers(copy), numbers(fresh))
    assert not (copy / "results" / "explanations.json").exists()
    assert before.keys() != numbers(copy).keys() or any(
        (before[name] != values).any() for name, values in numbers(copy).items()
    )


class Cut(Exception):
    pass


@pytest.mark.parametrize("stage", ["_fresh", "_overall", "write_result", "_metrics", "write_json"])
def test_cut_off_anywhere_results_of_two_settings_are_not_read_together(
    stage: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = content(Run.load(copy), title="", commands=())

    with monkeypatch.context() as patch:
        where = Run if stage == "write_result" else scoring
        calls = [0]
        of = getattr(where, stage)

        def later(*given: object, **named: object) -> object:
            calls[0] += 1
            # What is measured is also looked at before anything is computed.
            if calls[0] == 1 and stage == "_metrics":
                return of(*given, **named)
            raise Cut

        patch.setattr(where, stage, later)
        with pytest.raises(Cut):
            score(Run.load(copy), ScoreConfig(**BASE | {"objective": "cross_entropy"}))
    now = Run.load(copy)
    if stage in ("_fresh", "_overall"):
        assert content(now, title="", commands=()).errors == old.errors
        assert now.read_result("aggregate").objective == "margin"
    else:
        with pytest.raises(InputError, match="run `turnover influence"):
            content(now, title="", commands=())
    score(Run.load(copy), ScoreConfig(**BASE | {"objective": "cross_entropy"}))
    stored = Run.load(copy)
    for name in ("errors", "aggregate", "self"):
        assert stored.read_result(name).objective == "cross_entropy"
    assert read_json(copy / "metrics.json")["influence"]["objective"] == "cross_entropy"


def relabelled(folder: Path, name: str) -> None:
    """Other data in the run, as a user may put there; digests are deleted, as the message says."""
    path = folder / f"{name}.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[0])
    classes = read_json(folder / "config.json")["classes"]
    row["label"] = next(one for one in classes if one != row["label"])
    path.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    (folder / "digests.json").unlink()


@pytest.mark.filterwarnings("ignore:.*has no digests")
@pytest.mark.parametrize("name", ["train", "test"])
def test_results_of_other_rows_than_the_run_has_now_are_refused(name: str, copy: Path) -> None:
    assert explain_errors(Run.load(copy))
    relabelled(copy, name)
    with pytest.raises(InputError, match="other training or test rows than the run has now"):
        explain_errors(Run.load(copy))
    said = turnover("explain", copy, "--show", 0, expect=2).stderr
    assert "run `turnover influence" in said
    score(Run.load(copy), ScoreConfig(**BASE))
    assert explain_errors(Run.load(copy))


@pytest.mark.filterwarnings("ignore:.*has no digests")
def test_self_influence_of_other_labels_is_refused_by_review_and_cleanse(copy: Path) -> None:
    relabelled(copy, "train")
    run = Run.load(copy)
    with pytest.raises(InputError, match="other training or test rows than the run has now"):
        review(run)
    with pytest.raises(InputError, match="other training or test rows than the run has now"):
        cleanse._known(run, "self", None)
    score(run, ScoreConfig(**BASE))
    assert review(Run.load(copy)).rows
    assert cleanse._known(Run.load(copy), "self", None) is not None


@pytest.mark.filterwarnings("ignore:.*has no digests")
def test_what_was_begun_for_other_test_rows_is_not_gone_on_with(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "_fresh", cut)
        with pytest.raises(Cut):
            score(Run.load(copy), ScoreConfig(**BASE))
    # Another row is an error now, or one no longer is.
    relabelled(copy, "test")
    score(Run.load(copy), ScoreConfig(**BASE))
    assert explain_errors(Run.load(copy))


def test_targets_of_an_older_version_are_read(copy: Path) -> None:
    path = copy / "results" / "targets.json"
    targets = read_json(path)
    del targets["data"]
    write_json(path, targets, sealed=True)
    assert explain_errors(Run.load(copy))
