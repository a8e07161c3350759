"""Cleaning labels in the view: doubts, the effect of decisions, and fifty of them by keys in a browser."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.nn import functional

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("PIL")

import uvicorn

from test_cli import encoder, fit_arguments, sentences, turnover, write_csv  # noqa: F401
from test_images import folders  # noqa: F401 - a fixture
from test_images import run as image_run  # noqa: F401 - a fixture
from test_view_browser import until, visit  # noqa: F401 - a fixture
from turnover.errors import InputError
from turnover.runs.run import Run
from turnover.tasks.label_errors import doubts
from turnover.tasks.linear_probe import frozen
from turnover.tasks.review import read_decisions
from turnover.tasks.stored_doubts import open_doubts, read_doubts
from turnover.view import open_view
from turnover.view.effect import Effect
from viewing import serving

ROWS, WRONG, DECIDED = 240, 60, 50
OTHER = {"pos": "neg", "neg": "pos"}


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:  # noqa: F811
    """A run with a wrong label on every fourth training row, and on some test rows."""
    folder = tmp_path_factory.mktemp("noisy")
    every = {"train": (ROWS, 0, ROWS // WRONG), "test": (40, 500, 5)}
    for name, (count, start, step) in every.items():
        rows = [
            (i, text, OTHER[label] if (i // 2) % step == 0 else label)
            for i, text, label in sentences(count, start)
        ]
        write_csv(folder / f"{name}.csv", rows)
    out = folder / "run"
    more = ("--test", folder / "test.csv", "--id-column", "id", "--no-compare")
    turnover(*fit_arguments(folder / "train.csv", encoder, out, *more))
    turnover("influence", out, "--ghosts", 100, "--no-gram")
    return out


@pytest.fixture
def run(noisy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(noisy, tmp_path / "run"))


def wrong(row: int) -> bool:
    return (row // 2) % (ROWS // WRONG) == 0


def test_doubts_are_estimated_once_and_read_afterwards(run: Path) -> None:
    loaded = Run.load(run)
    assert read_doubts(loaded) is None
    made, expected = open_doubts(loaded), doubts(loaded)
    path = run / "results" / "label_errors.safetensors"
    stamp = path.stat().st_mtime_ns
    read = open_doubts(loaded)
    assert path.stat().st_mtime_ns == stamp
    for one in (made, read):
        assert one.source == expected.source
        assert one.errors.likelihood == expected.errors.likelihood
        for name in ("posterior", "labels", "suspicion", "transition"):
            np.testing.assert_array_equal(getattr(one.errors, name), getattr(expected.errors, name))
    for data in (loaded.test, loaded.train):
        data.labels[0] = 1 - data.labels[0]
        assert read_doubts(loaded) is None, "those of other labels"
        data.labels[0] = 1 - data.labels[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"label_errors\.safetensors: missing or damaged"):
        read_doubts(loaded)


def test_training_instances_are_listed_by_doubt(run: Path) -> None:
    found = open_doubts(Run.load(run)).errors
    order = found.order().tolist()
    with serving(run) as server:
        about = server.get("about")["doubts"]
        assert about["likely"] == order[: found.likely]
        assert about["expected"] == pytest.approx(found.expected)
        items = server.get("train?sort=doubt")["items"]
        assert [one["row"] for one in items] == order[:50]
        shown = server.get(f"train/{order[0]}")
    for one in (items[0], shown):
        assert one["wrong"] == pytest.approx(found.probability[order[0]])
        assert one["suggested"] == OTHER[one["label"]]
        assert one["probability_of_suggested"] == pytest.approx(
            found.posterior[order[0]].max(), rel=1e-6
        )
    assert np.mean([wrong(row) for row in about["likely"]]) > 0.9


def test_a_review_is_read_by_the_report(run: Path) -> None:
    report = run / "report.html"
    turnover("report", run)
    assert "Doubtful labels" not in report.read_text()
    turnover("review", run, "--budget", 5)
    turnover("report", run)
    found = open_doubts(Run.load(run)).errors
    said = " ".join(report.read_text().split())
    assert f"About {found.expected:.0f} of the {ROWS} training labels are wrong" in said
    assert "the 50 most doubtful ones" in said


def test_the_effect_is_that_of_training_on_the_decided_rows(run: Path) -> None:
    loaded, effect = Run.load(run), Effect(Run.load(run))
    names = [loaded.train.classes[one] for one in loaded.train.labels]
    without = effect.of({})
    assert without["after"] == without["before"] > 0.6
    assert (without["decisions"], without["training_rows"], without["test_rows"]) == (0, ROWS, 40)
    kept = effect.of(dict.fromkeys(range(9), "keep"))
    assert kept["after"] == kept["before"] == without["before"], "keeping changes nothing"
    turned = effect.of({row: OTHER[name] for row, name in enumerate(names)})
    assert turned["after"] < 0.5 and turned["before"] == without["before"]
    assert turned["after"] - turned["before"] == pytest.approx(
        (turned["gained"] - turned["lost"]) / 40
    )
    one_class = effect.of({row: "remove" for row, name in enumerate(names) if name == "pos"})
    negative = loaded.test.classes.index("neg")
    assert one_class["after"] == pytest.approx(np.mean(np.array(loaded.test.labels) == negative))
    with pytest.raises(InputError, match="the decisions remove every row"):
        effect.of(dict.fromkeys(range(ROWS), "remove"))


def test_rows_beyond_those_drawn_count_once_they_are_decided_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turnover.view.effect._TRAINING_ROWS", 100)
    monkeypatch.setattr("turnover.view.effect._TEST_ROWS", 30)
    effect = Effect(Run.load(run))
    first = effect.of({})
    assert (first["training_rows"], first["test_rows"]) == (100, 30)
    removed = dict.fromkeys(range(ROWS), "remove")
    found = [effect.of(removed | {0: name, 1: name}) for name in ("pos", "neg")]
    assert {one["training_rows"] for one in found} == {ROWS}
    assert sum(one["after"] for one in found) == pytest.approx(1), "each predicts its one class"


def test_the_effect_is_prepared_while_the_view_opens(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Effect(Run.load(run)).of({0: "remove"})
    made: list[Effect] = []

    class Watched(Effect):
        def __init__(self, run: Run) -> None:
            super().__init__(run)
            made.append(self)

    prepared = threading.Event()
    prepare = Effect.prepare
    monkeypatch.setattr(Watched, "prepare", lambda self: (prepare(self), prepared.set()))
    monkeypatch.setattr("turnover.view.server.Effect", Watched)
    waited: list[bool] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: waited.append(prepared.wait(60)))
    open_view(Run.load(run), show=lambda _: None, browser=False)
    assert waited == [True]
    monkeypatch.delattr("turnover.view.effect.frozen")
    found = made[0].of({0: "remove"})
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    closed = Effect(Run.load(run))
    closed.close()
    with pytest.raises(InputError, match="the view is closing"):
        closed.of({})


def test_neighbors_are_the_rows_with_the_most_similar_features(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Run.load(run)
    features = frozen(loaded, loaded.train).features
    features = functional.normalize(features - features.mean(dim=0))
    row = 7
    similar = features @ features[row]
    similar[row] = -2
    with serving(run) as server:
        found = server.get(f"train/{row}/neighbors")["neighbors"]
        assert server.ask(f"/{server.token}/train/{ROWS}/neighbors").status == 400
    assert len(found) == 5
    values, order = similar.topk(5)
    assert [one["similarity"] for one in found] == pytest.approx(values.tolist(), abs=1e-5)
    assert found[0]["key"] == loaded.train.keys[int(order[0])]
    monkeypatch.setattr("turnover.view.effect._TRAINING_ROWS", 100)
    few = Effect(loaded)
    drawn = {one for one, _ in few.nearest(0, 200)}
    outside = next(one for one in range(1, ROWS) if one not in drawn)
    nearest = few.nearest(outside, 200)
    assert len(nearest) == 100 and outside not in dict(nearest), "of the rows that were drawn"


def test_a_run_without_its_pretrained_encoder_has_no_effect_to_show(
    image_run: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    with serving(Path(shutil.copytree(image_run, tmp_path / "run"))) as server:
        said = server.get("about")["no_effect"]
        assert "does not keep" in said and "\n" not in said
        answer = server.ask(f"/{server.token}/effect")
        assert answer.status == 400 and answer.json["error"] == said


def press(page: Any, key: str, row: int | None) -> None:
    """Press a key, and wait until the pane shows a row."""
    page.keyboard.press(key)
    if row is not None:
        until(page, f"document.querySelector('#instance-pane').dataset.shown === '{row}'")
        until(page, "!document.querySelector('#instance-pane').ariaBusy")


@pytest.mark.browser
@pytest.mark.long
def test_fifty_decisions_by_keys_undone_counted_and_their_effect_seen(
    visit: Any,  # noqa: F811
    run: Path,
) -> None:
    with serving(run) as server:
        about = server.get("about")
        likely = about["doubts"]["likely"]
        total = len(likely)
        assert total > DECIDED
        page = visit(server, "#/train")
        left = page.locator("#left")
        said = "Decided {}, left {} of the {} labels more probably wrong than right."
        assert left.inner_text() == said.format(0, total, total)
        first = page.locator("#entries .entry").first.get_attribute("href")
        assert first == f"#/train/{likely[0]}", "the most doubtful label is listed first"
        assert page.locator("#undo").is_disabled()
        press(page, "n", likely[0])
        tile = page.locator("#instance-pane .tile").first.inner_text()
        assert "Probability that the label is wrong" in tile
        page.locator("#effect[data-decisions='0']").wait_for()
        near = server.get(f"train/{likely[0]}/neighbors")["neighbors"]
        page.locator("#nearest .entry").first.wait_for()
        keys = page.locator("#nearest code").all_inner_texts()
        assert keys == [one["key"] for one in near]
        made: dict[int, str] = {}
        for at, row in enumerate(likely[:DECIDED]):
            key = "k" if at % 10 == 3 else "x" if at % 10 == 7 else "r"
            words = {"k": "keep", "x": "remove", "r": server.get(f"train/{row}")["suggested"]}
            made[row] = words[key]
            press(page, key, likely[at + 1])
        decided = time.perf_counter()
        page.locator(f"#effect[data-decisions='{DECIDED}']").wait_for()
        taken = time.perf_counter() - decided
        sys.stdout.write(f"effect of {DECIDED} decisions after {taken:.1f} s\n")
        assert taken < 5
        effect = page.inner_text("#effect")
        assert f"right with {DECIDED} decisions" in effect and f"on {ROWS} rows" in effect
        assert left.inner_text() == said.format(DECIDED, total - DECIDED, total)
        path = run / "results" / "decisions.csv"
        assert read_decisions(Run.load(run), path) == made

        press(page, "u", likely[DECIDED - 1])
        press(page, "u", likely[DECIDED - 2])
        assert left.inner_text() == said.format(DECIDED - 2, total - DECIDED + 2, total)
        page.locator(f"#effect[data-decisions='{DECIDED - 2}']").wait_for()
        press(page, "n", likely[DECIDED - 1])
        press(page, "p", likely[DECIDED - 2])
        page.click("#undo")
        until(
            page,
            f"document.querySelector('#instance-pane').dataset.shown === '{likely[DECIDED - 3]}'",
        )
        page.locator(f"#effect[data-decisions='{DECIDED - 3}']").wait_for()
        kept = dict(list(made.items())[: DECIDED - 3])
        assert read_decisions(Run.load(run), path) == kept


@pytest.mark.browser
def test_keys_are_left_to_fields_and_can_be_turned_off(visit: Any, run: Path) -> None:  # noqa: F811
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with serving(run) as server:
        likely = server.get("about")["doubts"]["likely"]
        page = visit(server, f"#/train/{likely[0]}")
        page.locator("#effect[data-decisions='0']").wait_for()
        page.locator("#train-filter [type=search]").focus()
        page.keyboard.type("kxr")
        page.keyboard.press("Control+k")
        assert page.input_value("#train-filter [type=search]") == "kxr"
        page.fill("#train-filter [type=search]", "")
        page.focus("#train-filter [name=sort]")
        page.keyboard.press("k")
        page.uncheck("#keys")
        page.keyboard.press("k")
        page.wait_for_timeout(300)
        assert server.get("about")["decisions"] == []
        page.check("#keys")
        press(page, "r", likely[1])
        assert [row for row, _ in server.get("about")["decisions"]] == [likely[0]]
        page.locator("#effect[data-decisions='1']").wait_for()
        until(page, "!document.querySelector('[aria-busy]')")
        page.locator("#nearest .entry").first.wait_for()
        found = axe.run(page).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found] == []
