"""The page about groups of experiences: numbers as they are found, safe with any label, in one file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from test_report import HOSTILE, Page

pytest.importorskip("stable_baselines3")

from stable_baselines3 import DQN

from turnover.errors import InputError
from turnover.integrations.sb3 import Difference, ExperienceInfluence, attach
from turnover.integrations.sb3.effects import Effects
from turnover.report.experiences import render, write


def effects(values: Sequence[float], se: float) -> Effects:
    effect = np.array(values, dtype=float)
    error = np.where(np.isnan(effect), np.nan, se)
    p = np.array([math.erfc(abs(one) / 2**0.5) for one in effect / error])
    return Effects(effect, error, effect / error, p)


def sides(exposed: Sequence[float], hidden: Sequence[float], mean: float, spread: float) -> Any:
    inside, outside = np.array(exposed, dtype=float), np.array(hidden, dtype=float)
    z = (outside - inside - mean) / spread
    full = np.ones_like(z)
    return Difference(inside, outside, z, full, full, mean * full, spread * full)


def found(labels: Sequence[int | str] = (0, 1, 2, 3)) -> ExperienceInfluence:
    """Four groups: one harms, one helps, one is noise, and one was learned by every block."""
    on_return = effects([-120.4, 90.0, 3.0, math.nan], 20.0)
    ghosts = effects([*[0.0] * 960, *[100.0] * 40], 20.0)
    return ExperienceInfluence(
        labels=list(labels),
        transitions=np.array([1000, 1000, 1000, 500]),
        blocks=np.array([24, 27, 25, 32]),
        whole=-1204.3,
        whole_se=12.6,
        episodes=10,
        on_return=on_return,
        q=np.array([0.0002, 0.002, 0.9, math.nan]),
        on_bias=effects([1.5, 2.5, -0.5, math.nan], 1.0),
        ghost_return=ghosts,
        returns=sides([-1200, -1190, -1201, math.nan], [-1100, -1290, -1210, math.nan], -5, 20),
        bias=sides([0, 0, 0, math.nan], [1, 1, 1, math.nan], 0, 1),
        loss=sides([1, 1, 1, math.nan], [3, 2, 1, math.nan], 0, 0.5),
    )


def plain(text: str) -> str:
    return " ".join(text.replace("\N{MINUS SIGN}", "-").split())


def test_the_numbers_are_those_found() -> None:
    words = plain(Page(render(found())).visible)
    assert "return is -1,204 ± 13 (mean and standard error of 10 episodes)" in words
    assert (
        "3,500 stored transitions are in 4 groups, each learned by 24 to 32 of its blocks" in words
    )
    assert "1 of the groups lowered the return and 1 raised it at q < 0.1" in words
    assert "Of 1,000 ghosts, groups that never existed, 4.0% have p < 0.05" in words
    assert "0 1,000 24 -120 ± 20 -6.0 < 0.001 -1,100 -1,200 +5.2 +1.5 +4.0" in words


def test_the_worst_come_first_and_noise_is_marked() -> None:
    page = Page(render(found(["harmful", "helpful", "nothing", "unknown"])))
    table = page.visible.split("Loss z")[1]
    assert table.index("harmful") < table.index("nothing") < table.index("helpful")
    assert "unknown" not in table, "a group without an effect is not ranked"
    assert [value for tag, name, value in page.attributes if (tag, name) == ("tr", "class")] == [
        "noise"
    ]


def test_at_most_twenty_groups_are_listed() -> None:
    few = found()
    grown = {
        name: replace(
            getattr(few, name), **{k: np.tile(v, 10) for k, v in vars(getattr(few, name)).items()}
        )
        for name in ("returns", "bias", "loss")
    }
    for name in ("on_return", "on_bias"):
        grown[name] = Effects(*(np.tile(one, 10) for one in getattr(few, name)))
    for name in ("transitions", "blocks", "q"):
        grown[name] = np.tile(getattr(few, name), 10)
    page = Page(render(replace(few, labels=list(range(40)), **grown)))
    headers = [value for tag, name, value in page.attributes if (tag, name) == ("th", "scope")]
    assert headers.count("row") == 20
    assert len(page.data["labels"]) == 40


def test_charts_get_both_returns_the_noise_of_ghosts_and_intervals() -> None:
    data = Page(render(found())).data
    assert data["whole"] == -1204.3
    assert data["returns"] == {
        "without": [-1100, -1290, -1210, None],
        "with": [-1200, -1190, -1201, None],
        "low": [-1245, -1235, -1246, None],
        "high": [-1165, -1155, -1166, None],
        "z": [5.25, -4.75, -0.2, None],
    }
    assert data["effects"] == {
        "effect": [-120.4, 90, 3, None],
        "half_width": [40, 40, 40, None],
        "kind": ["harmful", "helpful", "noise", "noise"],
    }


def test_contents_are_a_column_only_when_given() -> None:
    page = Page(render(found(), contents={0: "by the novice", 7: "no group", 1: "by the expert"}))
    words = plain(page.visible)
    assert "Loss z Contains" in words
    assert "+4.0 by the novice" in words and "+2.0 by the expert" in words
    assert "+0.0 \N{EN DASH}" in words, "a group without a text"
    assert "no group" not in words
    assert "Contains" not in Page(render(found())).visible
    with pytest.raises(InputError, match="none of the groups"):
        render(found(), contents={"0": "a text of a label that is a number"})


def test_labels_contents_and_title_cannot_become_markup() -> None:
    hostile = found([HOSTILE, "<img src=x>", "a", "b"])
    html = render(hostile, contents={HOSTILE: HOSTILE, "a": "<script>alert(1)"}, title=HOSTILE)
    page = Page(html)
    assert "<script>alert" not in html and "<img" not in html
    assert len(page.scripts) == 2
    assert page.data["labels"][0] == HOSTILE
    assert page.visible.count(HOSTILE) == 4, "title of the window and the page, label, contents"


def test_numbers_that_are_unknown_are_dashes() -> None:
    whole = found()
    nothing = np.full(4, math.nan)
    blank = replace(
        whole,
        whole_se=math.nan,
        on_return=Effects(nothing, nothing, nothing, nothing),
        q=nothing,
        returns=sides(nothing, nothing, math.nan, math.nan),
    )
    page = Page(render(blank))
    words = plain(page.visible)
    assert "-1,204.3 ± \N{EN DASH}" in words
    assert "No group has an effect with a standard error" in words
    assert page.data["returns"]["low"] == [None] * 4
    assert "nan" not in words.lower() and "inf" not in words.replace("Influence", "")


def test_small_returns_keep_their_digits() -> None:
    small = found()
    on_return = Effects(*(np.array(one) for one in effects([-0.012, 0.0, 0.01, math.nan], 0.0021)))
    words = plain(Page(render(replace(small, on_return=on_return, whole=0.5))).visible)
    assert "return is 0.5000 ±" in words and "-0.0120 ± 0.0021" in words


def test_the_page_needs_nothing_but_itself() -> None:
    page = Page(render(found()))
    links = [value for _, name, value in page.attributes if name in ("src", "href", "action")]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "url(" not in page.styles and "@import" not in page.styles
    plotly, own = page.scripts
    assert "plotly.js" in plotly[:100] and "://" not in own
    policy = [value for tag, name, value in page.attributes if (tag, name) == ("meta", "content")]
    assert any("default-src 'none'" in value for value in policy)


def test_a_failed_write_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "agent.html"
    write(found(["\ud800", 1, 2, 3]), path)
    before = path.read_bytes()
    assert before.startswith(b"<!doctype html>")

    def fail(*_: object) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write(found(), path)
    assert [one.name for one in tmp_path.iterdir()] == ["agent.html"]
    assert path.read_bytes() == before
    with pytest.raises(InputError, match="no folder"):
        write(found(), tmp_path / "nowhere" / "agent.html")


def test_an_agent_says_what_its_groups_contain() -> None:
    def episode(steps: int, reward: float, *, terminal: bool) -> SimpleNamespace:
        last = np.arange(steps) == steps - 1
        return SimpleNamespace(
            observations=np.zeros((steps + 1, 4), np.float32),
            actions=np.zeros(steps, np.int64),
            rewards=np.full(steps, reward),
            terminations=last & terminal,
            truncations=last & (not terminal),
        )

    agent = attach(DQN("MlpPolicy", "CartPole-v1", buffer_size=2000), blocks=4)
    assert agent.contents() == {}
    agent.add([episode(3, 2.0, terminal=True), episode(5, -2.0, terminal=False)], "both")
    agent.add([episode(1, 0.5, terminal=True)], "one")
    agent.buffer.number("none")
    agent.add([episode(1200, 0.0, terminal=False)], "many")
    assert agent.contents() == {
        "both": "8 transitions, 2 episodes ended, mean reward -0.5, 12.5% terminal",
        "one": "1 transition, 1 episode ended, mean reward 0.5, 100.0% terminal",
        "none": "no stored transitions",
        "many": "1,200 transitions, 1 episode ended, mean reward 0, 0.0% terminal",
    }


@pytest.mark.browser
def test_the_page_works_in_a_browser(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "agent.html"
    label = "<b>bold</b> <a href='https://example.org'>away</a>"
    write(found([label, "expert", "novice", 3]), path, contents={label: HOSTILE})
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    said: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.locator("#effects-plot .scatterlayer").wait_for()
    names = page.locator("#returns-plot .legendtext").all_text_contents()
    assert names == ["“without” by chance", "whole agent", "with", "without"]
    assert page.locator("#returns-plot .barlayer .point").count() == 3
    kinds = page.locator("#effects-plot .legendtext").all_text_contents()
    assert kinds == ["may be chance", "lowered the return", "raised the return"]
    assert page.locator("#effects-plot .xtick").first.text_content() == "<b>bold</b> <…"
    assert page.locator("main a").count() == 0, "a label is no link"
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert said == []
    assert requests == [path.as_uri()]
    page.close()
