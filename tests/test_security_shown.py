"""Texts, labels, ids and names of somebody else's are shown and obeyed nowhere: terminal, pages, tables."""

from __future__ import annotations

import csv
import json
import re
import shutil
import socket
import time
import webbrowser
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import uvicorn

from edited import made_whole
from test_cli import data, encoder, fit_arguments, run, turnover, write_csv  # noqa: F401 - fixtures
from test_report import make_content
from turnover.cli.output import visible
from turnover.report import render
from turnover.runs.run import Run, write_digests
from turnover.tasks.review import read_decisions
from turnover.view import open_view
from turnover.view.decisions import Decisions
from viewing import serving, serving_process

OBEYED = (
    "\x1b[2J\x1b]0;title\x07\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\"
    "\x1b]52;c;cm0=\x07\x9b31m\x90q\x9c\x00\x08\x7f\roverwritten\u202eturned\u2066"
)
SCRIPTS = (
    "<script>owned = 1</script><img src=//evil.example/x onerror=owned=1></script><svg onload=owned=1>"
    "javascript:owned=1 \"'><a href=javascript:owned=1>x</a> \u2028owned = 1;\u2029 {{ 7*7 }} {% for %} "
    "[link=http://evil.example]x[/link] &lt;b&gt;"
)
HTML = "text/html"
OF_A_TERMINAL = re.compile(r"\x1b\[[\d;]*m")
"""Colours, which Rich writes itself."""


def rewritten(folder: Path, inside: str) -> Path:
    """Every text, key and class of a run with something in it; what was learned from the rows stays."""
    config = json.loads((folder / "config.json").read_text())
    classes = {name: f"{name}{inside}" for name in config["classes"]}
    config["classes"] = list(classes.values())
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("train", "test"):
        path = folder / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["label"] = classes[line["label"]]
            line["key"], line["text"] = f"{line['key']}{inside}", f"{inside}{line['text']}"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    made_whole(folder)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:  # noqa: F811
    return Path(shutil.copytree(run, tmp_path / "run"))


def obeyed_in(said: str) -> list[str]:
    rest = OF_A_TERMINAL.sub("", said)
    return [one for one in rest if one != "\n" and (ord(one) < 32 or visible(one) != one)]


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert visible("\x1b]8;;\x07 \x9b \ud800 \u202e") == r"\x1b]8;;\x07 \x9b \ud800 \u202e"
    plain = "Größe\n\ttab 漢字 עברית \u200f \U0001f600 \\x1b [bold] \u2028"
    assert visible(plain) == plain


@pytest.mark.parametrize("colours", [True, False])
def test_no_text_of_the_data_reaches_the_terminal_raw(
    colours: bool, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten(copy, OBEYED + "\ud800")
    if colours:
        monkeypatch.setenv("FORCE_COLOR", "1")
    said = turnover("explain", copy, "--show", 2).stdout
    assert r"\x1b]8;;http://evil.example" in said.replace("\n", "")
    assert bool(OF_A_TERMINAL.search(said)) == colours
    assert obeyed_in(said) == []
    with_json = turnover("explain", copy, "--show", 2, "--json")
    assert obeyed_in(with_json.stdout) == [] and obeyed_in(with_json.stderr) == []
    assert OBEYED in json.loads(with_json.stdout)[0]["text"]
    key = Run.load(copy).train.keys[0]
    for refused in (
        turnover("explain", copy, "--text", "a fine film", "--label", OBEYED, expect=2),
        turnover("predict", copy, "--without", f"{key}?", expect=2),
    ):
        assert obeyed_in(refused.stderr) == []


def test_labels_in_a_refusal_are_written_out(encoder: Path, tmp_path: Path) -> None:  # noqa: F811
    labels = ("a\x1b[2J", "b\x07")
    train = write_csv(tmp_path / "train.csv", [(i, f"text {i}", labels[i % 2]) for i in range(8)])
    test = write_csv(tmp_path / "test.csv", [(1, "text", "c\x1b]0;x\x07")])
    arguments = fit_arguments(train, encoder, tmp_path / "run", "--test", test)
    said = turnover(*arguments, expect=2).stderr
    assert r"a\x1b[2J" in said and obeyed_in(said) == []


def test_templates_in_the_data_are_text() -> None:
    content = make_content(1)
    asked = "{{ 7*7 }}{% raw %}{{ self.__init__.__globals__ }}"
    error = replace(content.errors[0], text=asked, key=asked, true_label=asked)
    overall = replace(content.harmful_overall[0], text=asked, label=asked, key=asked)
    page = render(
        replace(
            content, title=asked, classes=(asked, "b"), errors=(error,), harmful_overall=(overall,)
        )
    )
    assert page.count("{{ 7*7 }}{% raw %}") > 5 and "49{%" not in page


def test_the_view_listens_on_loopback_alone(copy: Path) -> None:
    with serving_process(copy) as (server, _):
        for other in ("127.0.0.2", "::1"):
            family = socket.AF_INET6 if ":" in other else socket.AF_INET
            elsewhere = socket.socket(family)
            with elsewhere, pytest.raises(OSError, match=r"refused|assign|supported|reachable"):
                elsewhere.connect((other, server.port))


def test_another_page_can_neither_read_nor_write(copy: Path) -> None:
    with serving(copy) as server:
        path = f"/{server.token}/about"
        for origin in ("http://evil.example", "null", f"https://127.0.0.1:{server.port}"):
            answer = server.ask(path, Origin=origin)
            assert answer.status == 403 and b"classes" not in answer.body
            assert not any(name.startswith("access-control") for name in answer.headers)
        assert server.ask(path, Origin=server.origin).status == 200
        asked = {
            "Origin": "http://evil.example",
            "Access-Control-Request-Method": "PUT",
            "Access-Control-Request-Private-Network": "true",
        }
        answer = server.ask(f"/{server.token}/train/0/decision", "OPTIONS", **asked)
        assert answer.status == 403
        assert not any(name.startswith("access-control") for name in answer.headers)
        for kind in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
        ):
            answer = server.decide(0, "remove", **{"Content-Type": kind})
            assert answer.status == 400 and "the body must be JSON" in answer.json["error"]
        assert server.get("about")["decisions"] == []


def test_what_stands_on_the_command_line_of_the_browser_works_once(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    shown: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(webbrowser, "open", opened.append)
        patch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
        open_view(Run.load(copy), show=shown.append)
    for _ in range(100):
        if opened:
            break
        time.sleep(0.05)
    (address,), (door,) = shown, opened
    assert address.split("/")[2] == door.split("/")[2]
    assert address.split("/")[3] not in door and len(door.split("/")[3]) > 20
    with serving(copy) as server:
        assert server.ask("/once", Origin="http://evil.example").status == 403
        first, second = server.ask("/once"), server.ask("/once")
        assert first.status == 303 and first.headers["location"] == f"/{server.token}/"
        assert second.status == 403 and "location" not in second.headers


FORMULAS = ["=1+1", "@user", "'=x", "+cmd|' /C calc'!A0", "-2+3", "\tx", "-5", "'plain", "=x"]


def test_lists_to_be_filled_in_hold_no_formula_and_are_read_back(
    copy: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in (copy / "train.jsonl").read_text().splitlines()]
    for line, key in zip(lines, FORMULAS, strict=False):
        line["key"], line["text"] = key, f"{key} as text"
    (copy / "train.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    write_digests(copy)
    loaded = Run.load(copy)
    decisions = Decisions(loaded, {int(loaded.train.ids[6]): (-1.5, 0.2)})
    for row in range(len(FORMULAS)):
        decisions.set(row, "keep")
    with decisions.path.open(newline="") as file:
        written = list(csv.DictReader(file))
    for line, key in zip(written, FORMULAS, strict=True):
        for cell in (line["key"], line["text"]):
            assert cell == "-5" or not cell.startswith(("=", "+", "-", "@", "\t", "\r")), key
    assert written[6]["self_influence_z"] == "-1.50"
    assert read_decisions(loaded, decisions.path) == dict.fromkeys(range(len(FORMULAS)), "keep")
    by_hand = tmp_path / "by_hand.csv"
    by_hand.write_text("key,decision\n=1+1,remove\n'=x,keep\n")
    assert read_decisions(loaded, by_hand) == {0: "remove", 8: "keep"}
    turnover("review", copy, "--decisions", decisions.path, "--out", tmp_path / "all.csv")
    with (tmp_path / "all.csv").open(newline="") as file:
        texts = [line["text"] for line in csv.DictReader(file)]
    assert texts[: len(FORMULAS)] == [f"{key} as text" for key in FORMULAS], "data stay as they are"


class Watched:
    """A page, and what it did that it should not have."""

    def __init__(self, page: Any, own: str) -> None:
        self.page = page
        self.done: list[str] = []
        page.on("dialog", lambda dialog: (self.done.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda message: self.done.append(message.text))
        page.on("pageerror", lambda error: self.done.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(own) else self.done.append(r.url))

    def check(self) -> None:
        """No script of the data ran, nothing of it became an element, nothing was asked for elsewhere."""
        assert self.page.evaluate("typeof owned") == "undefined"
        assert (
            self.page.locator("a[href^='javascript' i], [onerror], [onload], svg[onload]").count()
            == 0
        )
        assert self.page.locator("img:not([src^='data:'])").count() == 0
        assert self.done == []


@pytest.fixture
def watched(browser: Any) -> Iterator[Any]:
    pages = []

    def watch(own: str, address: str) -> Watched:
        pages.append(browser.new_page(viewport={"width": 1440, "height": 900}))
        one = Watched(pages[-1], own)
        one.page.goto(address)
        return one

    yield watch
    for page in pages:
        page.close()


@pytest.mark.browser
def test_a_browser_runs_no_script_of_the_data(run: Path, tmp_path: Path, watched: Any) -> None:  # noqa: F811
    name = "<img src=x onerror=owned=1>"
    copy = rewritten(Path(shutil.copytree(run, tmp_path / name)), SCRIPTS)
    with serving(copy) as server:
        view = watched(server.address, server.address)
        page = view.page
        page.locator("#entries .entry").first.click()
        page.locator("#error-pane[data-shown] .helpful .entry").first.click()
        page.locator("#instance-pane[data-shown] .decision button").first.click()
        page.locator("#instance-pane [aria-pressed=true]").wait_for()
        assert SCRIPTS.split("\u2028")[0].strip() in page.inner_text("#instance-pane .text")
        view.check()
        page.goto(f"{server.address}#/train")
        page.fill("#train-filter [type=search]", "<script>")
        page.locator("#entries .entry").first.click()
        page.locator("#instance-pane[data-shown] h2").wait_for()
        view.check()
    turnover("report", copy)
    address = (copy / "report.html").as_uri()
    report = watched(address, address)
    page = report.page
    for entry in page.locator("details.error summary").all()[:3]:
        entry.click()
    page.locator("details.error .influential").first.wait_for()
    page.fill("#search", "<script>")
    assert page.locator("details.error").count() > 0
    assert "<script>owned = 1</script>" in page.inner_text("#list")
    assert "<script>owned = 1</script>" in page.inner_text("#ranking")
    report.check()


@pytest.mark.browser
def test_the_page_of_another_site_gets_nothing(copy: Path, browser: Any) -> None:
    with serving(copy) as server:
        page = browser.new_page()
        page.route(
            "http://evil.example/**",
            lambda route: route.fulfill(body="<p>", content_type="text/html"),
        )
        page.goto("http://evil.example/")
        asked = """async ([address, method]) => {
          const body = method === "GET" ? undefined : '{"decision": "remove"}';
          try {
            const answer = await fetch(address, { method, body, mode: "cors" });
            return await answer.text();
          } catch (error) { return "refused"; }
        }"""
        about, decision = server.address + "about", server.address + "train/0/decision"
        for address, method in ((about, "GET"), (decision, "PUT"), (decision, "POST")):
            assert page.evaluate(asked, [address, method]) == "refused"
        page.evaluate(
            """(address) => new Promise((done) => {
              const script = document.createElement("script");
              script.onload = script.onerror = done;
              script.src = address;
              document.body.append(script);
            })""",
            server.address + "view.js",
        )
        framed = page.evaluate(
            """(address) => new Promise((done) => {
              const frame = document.createElement("iframe");
              frame.onload = () => done(frame.contentDocument === null ? "another site" : "blank");
              frame.src = address;
              document.body.append(frame);
            })""",
            server.address,
        )
        assert framed == "another site"
        (_, inside) = page.frames
        assert inside.locator("#entries").count() == 0, "it cannot be framed"
        page.close()
        assert server.get("about")["decisions"] == []
