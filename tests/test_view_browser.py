"""The view in a browser: pointer, keyboard, phone, dark, and how long an answer takes to be seen."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("PIL")

from test_cli import GOOD, encoder, turnover  # noqa: F401 - a fixture
from test_images import folders  # noqa: F401 - a fixture
from test_images import run as image_run  # noqa: F401 - a fixture
from test_view import HOSTILE, text_run, with_texts  # noqa: F401 - a fixture
from turnover.data.text import TextData
from turnover.io.parsing import write_json
from turnover.results.calibration import NoiseFloor, NullDistribution
from turnover.results.result import Result
from turnover.runs.run import Run, write_digests
from viewing import Server, serving, serving_process

pytestmark = pytest.mark.browser
LARGE, ERRORS = 10_000, 1_000


@dataclass
class Visit:
    """A page, and what it should not have done."""

    page: Any
    said: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    visits: list[Visit] = []

    def open_at(server: Server, fragment: str = "", **options: Any) -> Any:
        page = browser.new_page(**{"viewport": {"width": 1440, "height": 900}, **options})
        one = Visit(page)
        page.on("console", lambda message: one.said.append(message.text))
        page.on("pageerror", lambda error: one.said.append(str(error)))
        page.on(
            "request",
            lambda r: None if r.url.startswith(server.address) else one.foreign.append(r.url),
        )
        visits.append(one)
        page.goto(server.address + fragment)
        page.locator("#entries .entry").first.wait_for()
        return page

    yield open_at
    for one in visits:
        one.page.close()
        assert one.said == []
        assert one.foreign == []


@pytest.fixture
def run(text_run: Path, tmp_path: Path) -> Path:  # noqa: F811
    copy = Path(shutil.copytree(text_run, tmp_path / "run"))
    with_texts(copy, "train", {row: f"{HOSTILE} number {row}" for row in range(48)})
    with_texts(copy, "test", dict.fromkeys(range(24), f"{HOSTILE} tested"))
    return copy


@pytest.fixture
def server(run: Path) -> Iterator[Server]:
    with serving(run) as server:
        yield server


def opened(page: Any, pane: str) -> Any:
    page.locator(f"#{pane}[data-shown] h2").wait_for()
    return page.locator(f"#{pane}")


def until(page: Any, condition: str) -> None:
    """Playwright's own way of waiting for one compiles a string, which the page's policy forbids."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(condition)


def focused(page: Any) -> Any:
    return page.locator(":focus")


def test_an_error_leads_to_an_instance_and_that_to_a_decision(
    visit: Any, server: Server, run: Path, tmp_path: Path
) -> None:
    page = visit(server)
    entries = page.locator("#entries .entry")
    assert page.title() == "run: turnover view"
    total = server.get("about")["errors"]
    assert page.inner_text("#found") == f"{total} of {total} errors"
    page.select_option("#errors-filter [name=true]", "pos")
    until(page, f"document.querySelector('#entries').children.length < {total}")
    assert {"true: pos"} == set(entries.locator(".chip").filter(has_text="true").all_inner_texts())
    page.select_option("#errors-filter [name=true]", "")
    until(page, f"document.querySelector('#entries').children.length == {total}")
    page.fill("#errors-filter [type=search]", "no such words")
    page.get_by_text("No entry matches the filter.").wait_for()
    page.fill("#errors-filter [type=search]", "")
    entries.first.click()
    error = opened(page, "error-pane")
    shown = server.get(f"errors/{error.get_attribute('data-shown')}")
    assert error.locator(".text").inner_text() == f"{HOSTILE} tested", "markup stays text"
    assert page.locator("#panes script, #panes img").count() == 0
    for side in ("helpful", "harmful"):
        keys = error.locator(f".{side} .entry code").all_inner_texts()
        assert keys == [one["key"] for one in shown[side]]
    first = error.locator(".helpful .entry").first.inner_text()
    assert f"{shown['helpful'][0]['score']:+.3f}" in first and "gram" in first
    error.locator("select").first.select_option("gram")
    error.get_by_text("± gram").first.wait_for()

    error.locator(".harmful .entry").first.click()
    instance = opened(page, "instance-pane")
    row = int(instance.get_attribute("data-shown"))
    numbers = server.get(f"train/{row}")
    assert f"{numbers['own']['score']:+.3f}" in instance.inner_text()
    assert instance.locator(".helpful .entry").count() == min(6, len(numbers["helpful"]))
    assert page.locator("#export").is_hidden()
    instance.get_by_role("button", name="remove").click()
    page.get_by_text("Export 1 decision").wait_for()
    pressed = instance.locator("[aria-pressed=true]")
    assert pressed.all_inner_texts() == ["remove"]
    assert "remove" in error.locator(f'[href$="/train/{row}"] .badge').first.inner_text()
    page.reload()
    assert opened(page, "instance-pane").locator("[aria-pressed=true]").inner_text() == "remove"
    with page.expect_download() as download:
        page.click("#export")
    saved = tmp_path / "decisions.csv"
    download.value.save_as(saved)
    said = turnover("review", run, "--decisions", saved, "--out", tmp_path / "clean.csv").stdout
    assert "47 kept, 1 removed, 0 relabelled" in said
    assert f"number {row}\n" not in (tmp_path / "clean.csv").read_text().replace(",", "\n")
    pressed.click()
    page.locator("#export").wait_for(state="hidden")
    assert server.get("about")["decisions"] == []


def test_everything_is_reached_by_keys(visit: Any, server: Server) -> None:
    page = visit(server)
    page.keyboard.press("Tab")
    assert focused(page).inner_text() == "Skip to the list"
    page.keyboard.press("Enter")
    entries = page.locator("#entries .entry")
    assert focused(page).get_attribute("href") == entries.first.get_attribute("href")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    page.keyboard.press("ArrowUp")
    assert focused(page).get_attribute("href") == entries.nth(-2).get_attribute("href")
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    error = opened(page, "error-pane")
    until(page, "document.activeElement.tagName == 'H2'")
    assert entries.first.get_attribute("aria-current") == "true"
    for _ in range(12):
        page.keyboard.press("Tab")
        if focused(page).evaluate("node => node.matches('.helpful .entry')"):
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    harmful = error.locator(".harmful .entry").nth(1).get_attribute("href")
    assert focused(page).get_attribute("href") == harmful
    page.keyboard.press("Enter")
    instance = opened(page, "instance-pane")
    until(page, "document.activeElement.closest('#instance-pane')")
    for word in ("keep", "remove", "relabel"):
        for _ in range(4):
            page.keyboard.press("Tab")
            if focused(page).inner_text().startswith(word):
                break
        assert focused(page).inner_text().startswith(word)
    page.keyboard.press("Enter")
    instance.locator("[aria-pressed=true]").wait_for()
    page.keyboard.press("Escape")
    instance.wait_for(state="hidden")
    assert focused(page).get_attribute("href") == harmful, "back to where it was opened from"
    page.keyboard.press("Escape")
    error.wait_for(state="hidden")
    assert focused(page).get_attribute("href") == entries.first.get_attribute("href")
    page.go_back()
    opened(page, "error-pane")


def test_more_is_shown_on_demand_and_focus_stays(visit: Any, server: Server) -> None:
    page = visit(server, "#/train")
    assert page.locator("#entries .entry").count() == 48
    page.select_option("#train-filter [name=sort]", "self")
    until(
        page,
        "document.querySelector('#entries .entry').getAttribute('href') == "
        f"'#/train/{server.get('train?sort=self')['items'][0]['row']}'",
    )
    page.goto(f"{server.address}#/errors/0")
    error = opened(page, "error-pane")
    assert error.locator(".helpful .entry").count() == 10
    error.locator("button.more").press("Enter")
    until(page, "document.querySelectorAll('.helpful .entry').length > 10")
    eleventh = error.locator(".helpful .entry").nth(10).get_attribute("href")
    until(page, f"document.activeElement.getAttribute('href') == '{eleventh}'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_one_pane_at_a_time_within_its_width(
    visit: Any, server: Server, scheme: str
) -> None:
    phone = {"viewport": {"width": 375, "height": 812}, "has_touch": True, "color_scheme": scheme}
    page = visit(server, **phone)
    back = page.get_by_text("← Back").locator("visible=true")

    def only(pane: str) -> None:
        page.locator(f"#{pane}").wait_for()
        for other in ("list-pane", "error-pane", "instance-pane"):
            assert page.locator(f"#{other}").is_visible() == (other == pane)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        small = page.evaluate(
            "[...document.querySelectorAll('button, .button, select, input, a.entry, nav a')]"
            ".filter((node) => node.offsetParent && !node.matches('.skip'))"
            ".filter((node) => node.getBoundingClientRect().height < 36).length"
        )
        assert small == 0

    only("list-pane")
    page.locator("#entries .entry").nth(2).tap()
    opened(page, "error-pane").locator(".harmful .entry").first.tap()
    opened(page, "instance-pane")
    only("instance-pane")
    back.tap()
    only("error-pane")
    back.tap()
    only("list-pane")
    assert focused(page).get_attribute("href") == page.locator("#entries .entry").nth(
        2
    ).get_attribute("href")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"
    assert light == (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1440])
def test_axe_finds_nothing_against_it(visit: Any, server: Server, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit(server, viewport={"width": width, "height": 900}, color_scheme=scheme)
    for fragment in ("#/errors", "#/errors/1/train/7", "#/train"):
        page.goto(server.address + fragment)
        until(page, "!document.querySelector('[aria-busy]')")
        if fragment == "#/train":
            page.click("#help-button")
        found = axe.run(page).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found] == []


def test_images_stand_in_place_of_texts(
    visit: Any,
    image_run: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    with serving(Path(shutil.copytree(image_run, tmp_path / "run"))) as server:
        page = visit(server)
        page.locator("#entries .entry img").first.click()
        error = opened(page, "error-pane")
        error.locator(".harmful .entry img").first.click()
        instance = opened(page, "instance-pane")
        pictures = [*error.locator("img").all(), *instance.locator("img").all()]
        assert len(pictures) > 10
        for one in pictures:
            one.scroll_into_view_if_needed()
            one.evaluate("node => node.decode()")
            assert one.evaluate("node => node.naturalWidth") == 32
            assert one.get_attribute("alt")
        page.close()


def test_a_server_that_is_gone_is_said(visit: Any, browser: Any, run: Path) -> None:
    page = browser.new_page()
    with serving(run) as server:
        page.goto(server.address)
        page.locator("#entries .entry").first.wait_for()
    page.locator("#entries .entry").first.click()
    page.get_by_role("alert").get_by_text("is `turnover view` still running?").wait_for()
    page.close()


@pytest.fixture(scope="module")
def large_run(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run of 10,000 training instances and 1,000 errors, in the format of any run."""
    folder = Path(shutil.copytree(text_run, tmp_path_factory.mktemp("large") / "run"))
    shutil.rmtree(folder / "results")
    small = Run.load(folder)
    generator = np.random.default_rng(0)

    def texts(count: int) -> TextData:
        rows = [f"{' '.join(generator.choice(GOOD, 4))} number {i}" for i in range(count)]
        labels = generator.integers(2, size=count).tolist()
        keys = [f"key-{i}" for i in range(count)]
        return TextData(rows, labels, torch.arange(count), keys, small.train.classes)

    train, test = texts(LARGE), texts(2 * ERRORS)
    train.save(folder, "train")
    test.save(folder, "test")
    write_digests(folder)
    run = Run.load(folder)
    null = NullDistribution(generator.standard_normal(100_000))

    def result(shape: tuple[int, ...], ids: np.ndarray, error: float | None = None) -> Result:
        scores = generator.standard_normal(shape).astype(np.float32)
        scores.reshape(-1)[generator.integers(scores.size, size=scores.size // 500)] *= 6
        floors = shape[:1] if ids.ndim > 1 or len(shape) > 1 else ()
        if ids.ndim > 1:
            scores = -np.sort(-scores, axis=1)
        return Result(
            scores=scores,
            floor=NoiseFloor(np.zeros(floors), np.ones(floors)),
            null=null,
            train_ids=ids,
            target_ids=None,
            method="linear" if error is None else "gram",
            objective="margin",
            sites=("head",),
            network=run.network.digest(),
            considered=LARGE,
            standard_error=None if error is None else np.full(shape, error, dtype=np.float32),
        )

    ids = np.arange(LARGE)
    (folder / "results").mkdir()
    run.write_result("errors", result((ERRORS, LARGE), ids))
    extremes = np.stack([generator.choice(LARGE, 100, replace=False) for _ in range(ERRORS)])
    run.write_result("gram", result((ERRORS, 100), extremes, error=0.1))
    run.write_result("aggregate", result((LARGE,), ids))
    run.write_result("self", result((LARGE,), ids))
    rows = np.sort(generator.choice(2 * ERRORS, ERRORS, replace=False)).tolist()
    targets = {
        "rows": rows,
        "predicted": [1 - test.labels[row] for row in rows],
        "confidence": generator.uniform(0.5, 1, ERRORS).round(6).tolist(),
    }
    write_json(folder / "results" / "targets.json", targets)
    return folder


_TIMED = """
async ([pane, expected]) => {
  const node = document.getElementById(pane);
  const start = performance.now();
  ACT;
  const frame = () => new Promise(requestAnimationFrame);
  do {
    await frame();
    if (performance.now() - start > 20000) throw new Error(`${expected} never came`);
  } while (node.hasAttribute("aria-busy") || !node.dataset.shown?.startsWith(expected));
  await frame();
  return performance.now() - start;
}
"""


def slowdown() -> float:
    """How much longer work takes here than on a machine that does nothing else."""
    wall, own = time.perf_counter(), time.process_time()
    while time.process_time() - own < 0.3:
        pass
    return (time.perf_counter() - wall) / 0.3


@pytest.mark.long
def test_a_large_run_answers_within_200_ms(visit: Any, large_run: Path) -> None:
    for _ in range(3):  # other work on this machine comes and goes, and only ever adds
        slow = too_slow(*timings(visit, large_run))
        if not slow:
            break
    assert not slow


def too_slow(limit: float, taken: dict[str, list[float]]) -> dict[str, float]:
    """Medians that are not below the limit; all are printed."""
    sys.stdout.write(f"limit {limit:.0f} ms, as other work on this machine takes its share\n")
    medians = {what: statistics.median(times) for what, times in taken.items()}
    for what, median in medians.items():
        times = taken[what]
        sys.stdout.write(f"{what}: {median:.0f} ms, worst {max(times):.0f} of {len(times)}\n")
    return {what: median for what, median in medians.items() if median >= limit}


def timings(visit: Any, large_run: Path) -> tuple[float, dict[str, list[float]]]:
    """200 ms times what other work slows this machine by, and milliseconds from click to rendered."""
    with serving_process(large_run) as (server, _):
        page = visit(server)
        page.evaluate("Object.assign(window, {one: (css) => document.querySelector(css)})")
        taken: dict[str, list[float]] = {}
        crowded = [slowdown()]

        def timed(what: str, act: str, pane: str, expected: str = "") -> None:
            milliseconds = page.evaluate(_TIMED.replace("ACT", act), [pane, expected])
            taken.setdefault(what, []).append(milliseconds)

        hrefs = page.eval_on_selector_all(
            "#entries .entry", "nodes => nodes.map((node) => node.getAttribute('href'))"
        )
        for href in hrefs[:25]:
            number = href.rsplit("/", 1)[1]
            timed(
                "open an error", f"one('#entries [href=\"{href}\"]').click()", "error-pane", number
            )
            inner = page.get_attribute("#error-pane .harmful .entry", "href")
            click = f"one('#error-pane [href=\"{inner}\"]').click()"
            timed("open a training instance", click, "instance-pane", inner.rsplit("/", 1)[1])
            until(page, "!document.querySelector('[aria-busy]')")
        for value in ("pos", "neg", "") * 5:
            choose = "one('#errors-filter [name=true]')"
            change = (
                f"{choose}.value = '{value}'; {choose}.dispatchEvent(new Event('input', "
                "{bubbles: true}))"
            )
            found = server.get(f"errors?true={value}")["found"]
            timed("filter errors", change, "list-pane", f"errors {found}")
        for words in ("wise great", "number 77", "fun", "key-5", "") * 3:
            field = "one('#errors-filter [type=search]')"
            change = (
                f"{field}.value = '{words}'; {field}.dispatchEvent(new Event('input', "
                "{bubbles: true}))"
            )
            found = server.get(f"errors?words={words.replace(' ', '+')}")["found"]
            timed("search errors", change, "list-pane", f"errors {found}")
        for _ in range(5):
            timed("list training instances", "location.hash = '#/train'", "list-pane", "train")
            timed("list errors", "location.hash = '#/errors'", "list-pane", "errors")
        page.goto(f"{server.address}#/errors/3/train/77")
        page.locator("#instance-pane[data-shown='77']").wait_for()
        for _ in range(10):
            begun = page.locator("#instance-pane [aria-pressed=true]").count()
            milliseconds = page.evaluate(
                """async (begun) => {
                  const start = performance.now();
                  const [button] = document.querySelectorAll("#instance-pane .decision button");
                  button.click();
                  const frame = () => new Promise(requestAnimationFrame);
                  do {
                    await frame();
                    if (performance.now() - start > 20000) throw new Error("no decision");
                  } while ((button.getAttribute("aria-pressed") === "true") === begun);
                  await frame();
                  return performance.now() - start;
                }""",
                bool(begun),
            )
            taken.setdefault("decide", []).append(milliseconds)
        crowded.append(slowdown())
    return 200 * max(1.0, statistics.mean(crowded)), taken
