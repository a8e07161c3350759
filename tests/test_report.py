"""The HTML report: self-contained, safe with any text, honest about noise, usable in a browser."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from turnover.errors import InputError
from turnover.report import ReportContent, render, write
from turnover.report.content import (
    AccuracyRow,
    Curve,
    DoubtfulLabel,
    Fact,
    HarmfulOverall,
    LabelSummary,
    NoiseSummary,
)
from turnover.tasks.explain import Explanation, GramExplanation, GramInfluential, Influential

HOSTILE = "</script><script>alert('from a text')</script><!-- <b>bold</b> & \u2028"
CURVE_NAMES = ("train exposed", "train hidden", "test exposed", "test hidden")


def influential(sign: int, rank: int, target: int) -> Influential:
    z = sign * (6.0 - rank)
    return Influential(
        key=f"train-{target}-{sign}-{rank}",
        label="positive" if rank % 2 else "negative",
        score=0.02 * z,
        z=z,
        q=0.001 if rank < 2 else 0.4,
        text=f"training text {target} {sign} {rank}",
    )


def explained(target: int) -> Explanation:
    return Explanation(
        key=f"test-{target:03d}",
        true_label="negative",
        predicted_label="positive",
        confidence=0.5 + target / 100,
        noise_floor=0.02 / (1 + target),
        n_significant=4 if target % 2 else 0,
        text=f"target text number {target}",
        helpful=tuple(influential(+1, rank, target) for rank in range(5)),
        harmful=tuple(influential(-1, rank, target) for rank in range(5)),
    )


def with_gram(target: int) -> Explanation:
    def listed(sign: int) -> tuple[GramInfluential, ...]:
        return tuple(
            GramInfluential(f"gram-{sign}-{i}", "negative", f"by gram {sign} {i}", sign * s, 0.25)
            for i, s in enumerate((0.5, 0.1))
        )

    return replace(explained(target), gram=GramExplanation(listed(+1), listed(-1)))


def overall(rank: int) -> HarmfulOverall:
    return HarmfulOverall(
        key=f"harmful-{rank}",
        label="positive",
        score=-0.05 / (1 + rank),
        z=-6.0 + rank,
        q=0.001 if rank < 3 else 0.6,
        self_influence=None if rank == 1 else 0.1 * rank,
        self_influence_q=None if rank == 1 else 0.01,
        text=f"overall text {rank}",
    )


def make_content(errors: int = 40) -> ReportContent:
    steps = tuple(range(0, 500, 50))
    return ReportContent(
        title="Movie reviews",
        objective="cross-entropy loss",
        classes=("negative", "positive"),
        curves=tuple(
            Curve(
                name,
                steps,
                tuple(0.7 * math.exp(-step / (200 + 80 * place)) for step in steps),
                (0.01,) * len(steps),
            )
            for place, name in enumerate(CURVE_NAMES)
        ),
        accuracy=(AccuracyRow("mean network", 0.91, 0.89, 0.93, "one forward pass"),),
        deploy="Deploy the mean network.",
        errors=tuple(explained(target) for target in range(errors)),
        harmful_overall=tuple(overall(rank) for rank in range(6)),
        noise=NoiseSummary(0.012, 0.004, 0.031, 80, 40_000, 0.0004, 20_000, 0.97),
        facts=(Fact("Time", "12 s", "wall clock"),),
        commands=("turnover report run --out report.html",),
    )


class Page(HTMLParser):
    """The page as a browser takes it apart: attributes, data, scripts and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[str] = []
        self.styles = ""
        self.visible = ""
        self.data: dict[str, Any] = {}
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in ("script", "style"):
            self._inside = "data" if ("id", "data") in attrs else tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data = json.loads(data)
        elif self._inside == "script":
            self.scripts.append(data)
        elif self._inside == "style":
            self.styles += data
        else:
            self.visible += data


@pytest.fixture(scope="module")
def html() -> str:
    return render(make_content())


def test_the_page_needs_nothing_but_itself(html: str) -> None:
    page = Page(html)
    links = [value for _, name, value in page.attributes if name in ("src", "href", "action")]
    assert links, "the page has links to its own sections"
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    assert "https://cdn" not in "".join(page.scripts[:1] + page.scripts[2:])
    policy = [value for tag, name, value in page.attributes if (tag, name) == ("meta", "content")]
    assert any("default-src 'none'" in value for value in policy)


def test_sections_come_in_their_order(html: str) -> None:
    sections = [v for tag, name, v in Page(html).attributes if (tag, name) == ("section", "id")]
    expected = "meaning errors curves accuracy harmful noise nothing facts commands"
    assert sections == expected.split()


def test_plotly_is_inlined_once_and_only_when_there_are_curves(html: str) -> None:
    assert len(Page(html).scripts) == 3
    bare = render(replace(make_content(1), curves=()))
    assert len(Page(bare).scripts) == 1
    assert "No loss curve was recorded" in bare


def test_texts_cannot_become_markup() -> None:
    content = make_content(1)
    error = content.errors[0]
    hostile = replace(
        content,
        title=HOSTILE,
        errors=(
            replace(
                error,
                text=HOSTILE,
                true_label=HOSTILE,
                helpful=(replace(error.helpful[0], text=HOSTILE),),
            ),
        ),
        harmful_overall=(replace(content.harmful_overall[0], text=HOSTILE, key=HOSTILE),),
        commands=(HOSTILE,),
    )
    html = render(hostile)
    page = Page(html)
    assert "<script>alert" not in html
    assert "\\u003c/script>\\u003cscript>alert" in html
    assert "&lt;/script&gt;&lt;script&gt;alert" in html
    assert len(page.scripts) == 3
    assert page.data["errors"][0]["text"] == HOSTILE
    assert page.data["instances"][0][2] == HOSTILE


def test_without_texts_leaves_no_text_in_the_page(tmp_path: Path) -> None:
    content = make_content(5)
    texts = [item.text for item in content.harmful_overall]
    for error in content.errors:
        texts += [error.text, *(item.text for item in error.helpful + error.harmful)]
    write(content, tmp_path / "all.html")
    write(content, tmp_path / "bare.html", texts=False)
    with_texts = (tmp_path / "all.html").read_text(encoding="utf-8")
    without = (tmp_path / "bare.html").read_text(encoding="utf-8")
    assert all(text is not None and text in with_texts for text in texts)
    assert not any(text is not None and text in without for text in texts)
    assert "Texts were left out of this report" in without
    assert "Texts were left out of this report" not in with_texts
    assert Page(without).data["errors"][0]["id"] == "test-000"
    assert content.errors[0].text is not None, "the content itself keeps its texts"


def test_gram_stands_beside_with_its_errors_and_what_it_means(tmp_path: Path) -> None:
    content = replace(make_content(2), errors=(with_gram(0), explained(1)))
    page = Page(render(content))
    first, second = page.data["errors"]
    signs = [one["score"].replace("\N{MINUS SIGN}", "-") for one in first["gram"]["harmful"]]
    assert signs == ["-0.500", "-0.100"]
    assert first["gram"]["helpful"][0]["error"] == "0.250"
    assert (
        first["gram"]["helpful"][0]["bar"] == 100 and first["gram"]["helpful"][0]["error_at"] == 50
    )
    assert second["gram"] is None
    assert "Gram:" in page.visible and "Turn-over:" in page.visible
    assert "Gram:" not in Page(render(make_content(2))).visible
    write(content, tmp_path / "bare.html", texts=False)
    assert "by gram 1 0" not in (tmp_path / "bare.html").read_text(encoding="utf-8")


def test_doubtful_labels_are_listed_where_they_were_estimated(tmp_path: Path, html: str) -> None:
    rows = tuple(
        DoubtfulLabel(f"doubt-{i}", "positive", HOSTILE, 0.9 - 0.2 * i, "negative", 0.8 - 0.2 * i)
        for i in range(3)
    )
    labels = LabelSummary(rows, 41.6, 2, 3000, "left-out predictions")
    content = replace(make_content(1), labels=labels)
    page = Page(render(content))
    words = " ".join(page.visible.split())
    assert "About 42 of the 3,000 training labels are wrong, 2 of them more probably" in words
    assert words.index("doubt-0") < words.index("90.0%") < words.index("doubt-1")
    assert HOSTILE in page.visible, "a text stays a text"
    assert ("section", "id", "labels") in page.attributes
    write(content, tmp_path / "bare.html", texts=False)
    bare = (tmp_path / "bare.html").read_text(encoding="utf-8")
    assert "doubt-0" in bare and "from a text" not in bare
    assert "Doubtful labels" not in html


@pytest.mark.parametrize(
    ("q", "noise"), [(0.0, False), (0.05, False), (0.0501, True), (1.0, True), (math.nan, True)]
)
def test_what_is_not_significant_is_marked(q: float, noise: bool) -> None:
    content = make_content(1)
    error = content.errors[0]
    shown = replace(
        content,
        errors=(replace(error, helpful=(replace(error.helpful[0], q=q),), harmful=()),),
        harmful_overall=(replace(content.harmful_overall[0], q=q),),
    )
    page = Page(render(shown))
    assert page.data["errors"][0]["helpful"][0]["noise"] is noise
    assert ("not distinguishable from noise" in page.visible) is noise
    assert "not distinguishable from noise" in page.scripts[0]


def test_undefined_numbers_do_not_break_the_page() -> None:
    content = make_content(1)
    error = content.errors[0]
    odd = replace(error.helpful[0], score=math.nan, z=math.inf, q=math.nan)
    page = Page(
        render(
            replace(
                content,
                errors=(replace(error, noise_floor=math.nan, helpful=(odd,), harmful=()),),
                curves=(Curve("train exposed", (0, 1), (math.nan, 0.5), (0.1, math.inf)),),
                noise=replace(content.noise, pairs=0, significant_pairs=0, median=math.nan),
            )
        )
    )
    assert page.data["errors"][0]["sort"]["noise"] is None
    assert page.data["curves"][0] == {
        "name": "train exposed",
        "steps": [1],
        "mean": [0.5],
        "half_width": [0.0],
    }


def test_an_unmeasured_share_is_not_shown_as_zero() -> None:
    content = make_content(1)
    noise = replace(content.noise, pairs=0, significant_pairs=0, ghost_pairs=0)
    noise = replace(noise, ghost_false_positive_rate=0.0)
    visible = Page(render(replace(content, noise=noise))).visible
    assert "was not measured" in visible
    assert "0.00%" not in visible


def test_a_training_text_travels_once() -> None:
    content = make_content(3)
    shared = content.errors[0].helpful
    same = tuple(replace(error, helpful=shared, harmful=()) for error in content.errors)
    assert len(Page(render(replace(content, errors=same))).data["instances"]) == len(shared)


def test_no_errors_is_said_in_words() -> None:
    html = render(make_content(0))
    assert "There is no misclassified target to explain" in html
    assert 'id="search"' not in html


def test_meaning_is_qualified(html: str) -> None:
    words = " ".join(Page(html).visible.split())
    assert "an estimate, not a proof" in words
    assert "received no direct gradient from the training instance" in words
    assert "no proof of unlearning" in words
    assert "√(mask units / training instances)" in words


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("the report before", encoding="utf-8")

    def fail(*_: object) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write(make_content(1), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == "the report before"


def test_a_missing_folder_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        write(make_content(1), tmp_path / "nowhere" / "report.html")


@pytest.mark.parametrize("module", ["jinja2", "plotly.offline"])
def test_a_missing_package_names_the_mend(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"pip install 'turnover\[report\]'"):
        render(make_content(1))


def test_a_curve_with_uneven_columns_is_refused() -> None:
    with pytest.raises(InputError, match="equally long"):
        Curve("train exposed", (0, 1), (0.5,), (0.1,))


@pytest.mark.browser
def test_the_page_works_in_a_browser(browser: Any, tmp_path: Path) -> None:
    content = make_content()
    first = replace(with_gram(7), text=HOSTILE)
    path = tmp_path / "report.html"
    write(replace(content, errors=(first, *content.errors[:7], *content.errors[8:])), path)
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    said: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    cards = page.locator("details.error")
    ids = page.locator("details.error summary code")

    assert cards.count() == 25
    page.click("#more")
    assert cards.count() == 40
    assert page.locator("#more").is_hidden()

    page.fill("#search", "NUMBER 12")
    assert ids.all_inner_texts() == ["test-012"]
    page.fill("#search", "no such words")
    assert "No error matches" in page.inner_text("#shown")
    page.fill("#search", "")
    page.check("#only-significant")
    assert "of 20 errors" in page.inner_text("#shown")
    page.uncheck("#only-significant")

    page.select_option("#sort", "confidence")
    assert ids.first.inner_text() == "test-039"
    page.click("#direction")
    assert ids.first.inner_text() == "test-000"
    page.select_option("#sort", "noise")
    assert ids.first.inner_text() == "test-039"

    page.fill("#search", "test-007")
    assert cards.first.locator(".influential").count() == 0, "drawn only when opened"
    cards.first.locator("summary").focus()
    page.keyboard.press("Enter")
    cards.first.locator(".influential").first.wait_for()
    assert cards.first.locator(".helpful .influential").count() == 5 + 2
    assert cards.first.locator(".harmful .influential").count() == 5 + 2
    assert cards.first.locator("h3.method").all_inner_texts() == ["By turn-over", "By gram"]
    assert "standard error 0.250 nats" in cards.first.inner_text().replace("\n", " ")
    noise = cards.first.locator(".influential.noise")
    assert noise.count() == 6
    assert all("not distinguishable from noise" in text for text in noise.all_inner_texts())
    assert cards.first.locator(".body > .text").inner_text().startswith("</script><script>")

    rows = page.locator("#ranking tbody tr code")
    assert rows.first.inner_text() == "harmful-0"
    page.click("#ranking th[data-key=self] button")
    assert rows.first.inner_text() == "harmful-5"
    assert rows.last.inner_text() == "harmful-1", "unknown values come last"
    assert page.get_attribute("#ranking th[data-key=self]", "aria-sort") == "descending"

    page.locator("#plot .scatterlayer").wait_for()
    assert {name: page.get_by_text(name, exact=True).count() > 0 for name in CURVE_NAMES} == (
        dict.fromkeys(CURVE_NAMES, True)
    )
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert said == []
    assert requests == [path.as_uri()]
    page.close()


@pytest.mark.browser
def test_shared_words_are_marked_and_images_stand_in_place_of_texts(
    browser: Any, tmp_path: Path
) -> None:
    texts = replace(explained(1), text="A number of Fine words")
    said = replace(influential(+1, 0, 1), text="what fine NUMBER, finer <b>of</b> all")
    others = tuple(replace(explained(i), text="all the same") for i in range(2, 8))
    content = replace(
        make_content(0), errors=(replace(texts, helpful=(said, *texts.helpful[1:])), *others)
    )
    path = tmp_path / "words.html"
    write(content, path)
    page = browser.new_page()
    page.goto(path.as_uri())
    page.fill("#search", "test-001")
    page.locator("details.error summary").first.click()
    first = page.locator(".helpful .influential").first
    first.wait_for()
    assert first.locator("mark").all_inner_texts() == ["fine", "NUMBER", "of"]
    assert first.locator("b").count() == 0, "markup in a text stays text"

    link = (
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwAD"
        "hgGAWjR9awAAAABJRU5ErkJggg=="
    )
    path = tmp_path / "images.html"
    images = replace(content, train_images={said.key: link}, test_images={texts.key: link})
    write(images, path)
    page.goto(path.as_uri())
    page.fill("#search", "test-001")
    card = page.locator("details.error").first
    assert card.locator("summary img").get_attribute("src") == link
    card.locator("summary").click()
    card.locator(".influential").first.wait_for()
    assert card.locator(".helpful .influential").first.locator("img").count() == 1
    assert card.locator(".helpful .influential").nth(1).locator("img").count() == 0
    assert link not in render(images.without_texts())
    page.close()
