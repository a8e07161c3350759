"""A newcomer goes through the first pages with a file of their own: what is printed is run, and is true."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from documents import ROOT, commands
from test_cli import encoder, sentences, turnover  # noqa: F401 - a fixture
from turnover.runs.run import Run
from turnover.tasks.stored_doubts import open_doubts

pytestmark = pytest.mark.long

TRAIN, TEST, SENDERS, BUDGET = 120, 40, 8, 100
HEADER = ["uid", "sender", "body", "mood", "note"]
OTHER = {"pos": "neg", "neg": "pos"}
NAMED = ["--text-column", "body", "--label-column", "mood"]
SMALL = ["--head-units", 64, "--lora-rank", 4, "--batch-size", 8, "--head-learning-rate", 0.01]
PAGES = ("README.md", "docs/quickstart.md", "docs/labels.md", "docs/groups.md")


def messages(count: int, start: int, wrong: int) -> list[list[str]]:
    """Rows, of which every ``wrong``-th has the other label."""
    return [
        [
            f"m-{start + i:04}",
            f"vendor {i % SENDERS}",
            text,
            OTHER[label] if i % wrong == 0 else label,
            f'said, "{i}"',
        ]
        for i, (_, text, label) in enumerate(sentences(count, start))
    ]


def write(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([HEADER, *rows])


def table(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def mine(name: str, arguments: list[str], encoder: Path) -> list[Any]:  # noqa: F811
    """A page's command, with the names of this file's columns and a small encoder."""
    given: list[Any] = [name, *arguments]
    if name in ("fit", "plan"):
        if "--model" in given:
            at = given.index("--model")
            del given[at : at + 2]
        given += ["--model", encoder, *SMALL, "--epochs", 2, *NAMED, "--id-column", "uid"]
    given = ["sender" if word == "source" else word for word in given]
    if name == "fit":
        given += [] if "--test" in given else ["--test", "test.csv"]
        given += ["--overwrite"]
    if name == "cleanse":
        given += [*NAMED, "--seeds", 1, "--fraction", 0.1]
    return given


def next_steps(said: str) -> list[list[str]]:
    """The commands that an output names as the next ones."""
    found = re.findall(r"turnover [a-z]+(?: (?!turnover)[^\s,;]+)*", said)
    return [shlex.split(one)[1:] for one in found]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> dict[str, Any]:  # noqa: F811
    """What the pages' commands printed, by command, in the folder that they were run in."""
    desk = tmp_path_factory.mktemp("desk")
    write(desk / "train.csv", messages(TRAIN, 0, 10))
    for number, name in enumerate(("test", "validation", "other_domain"), start=1):
        write(desk / f"{name}.csv", messages(TEST, 500 * number, 5))
    outputs: dict[str, Any] = {"desk": desk}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        for page in PAGES:
            for name, *arguments in commands(ROOT / page, to_run=True):
                if name in ("demo", "view", "attribute") or name.startswith("-"):
                    continue
                if arguments[1:3] == ["--decisions", "review.csv"]:
                    decide(desk)
                given = mine(name, arguments, encoder)
                outputs[" ".join([name, *arguments])] = turnover(*given).stdout
    return outputs


def decide(desk: Path) -> None:
    """Fill in the list: relabel the first row, remove the second, keep the third."""
    rows = table(desk / "runs/mine/results/review.csv")
    for row, decision in zip(rows, (rows[0]["suggested"], "remove", "keep"), strict=False):
        row["decision"] = decision
    with (desk / "review.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def one_of(said: dict[str, Any], beginning: str) -> str:
    text: str = next(text for command, text in said.items() if command.startswith(beginning))
    return " ".join(text.split())


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in: {text}"
    return [float(one) for one in found.groups()]


def test_what_fit_says_is_true(said: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(said["desk"])
    text = one_of(said, "fit train.csv")
    assert numbers(r"rows read: (\d+) training and (\d+) test; (\d+) classes", text) == [
        TRAIN,
        TEST,
        2,
    ]
    accuracy, majority = numbers(r"accuracy ([\d.]+).*, majority class ([\d.]+);", text)
    predicted = table(json.loads(turnover("predict", "runs/mine", "--json").stdout)["file"])
    right = np.mean([one["predicted"] == one["label"] for one in predicted])
    assert accuracy == pytest.approx(right, abs=6e-4)
    labels = Counter(one[3] for one in messages(TRAIN, 0, 10)).most_common(1)[0][0]
    share = np.mean([one["label"] == labels for one in predicted])
    assert majority == pytest.approx(share, abs=6e-4)


def test_what_influence_and_explain_say_is_true(
    said: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(said["desk"])
    run = Run.load(Path("runs/mine"))
    errors = run.read_result("errors")
    predicted = table(json.loads(turnover("predict", "runs/mine", "--json").stdout)["file"])
    wrong = {one["key"] for one in predicted if one["predicted"] != one["label"]}
    found = numbers(
        r"(\d+) errors x (\d+) training instances: (\d+) pairs with q <= 0.05, on (\d+) errors",
        one_of(said, "influence runs/mine"),
    )
    significant = errors.q <= 0.05
    assert found == [len(wrong), TRAIN, significant.sum(), significant.any(axis=1).sum()]
    explained = json.loads(Path("runs/mine/results/explanations.json").read_text())["errors"]
    assert {one["key"] for one in explained} == wrong
    keys = {one[0] for one in messages(TRAIN, 0, 10)}
    assert all(item["key"] in keys for one in explained for item in one["helpful"])


def test_what_review_says_is_true(said: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(said["desk"])
    found = open_doubts(Run.load(Path("runs/mine"))).errors
    text = one_of(said, "review runs/mine")
    expected, rows, likely = numbers(
        r"about (\d+) of (\d+) labels are wrong \((\d+) more probably than not\)", text
    )
    assert (expected, rows, likely) == (round(found.expected), TRAIN, found.likely)
    assert numbers(r"the (\d+) most doubtful rows of (\d+)", text) == [BUDGET, TRAIN]
    listed = table("runs/mine/results/review.csv")
    assert [one["key"] for one in listed] == [
        f"m-{row:04}" for row in found.order()[:BUDGET].tolist()
    ]


def test_the_file_after_decisions_is_the_users_own(
    said: dict[str, Any],
    encoder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(said["desk"])
    kept, removed, changed = numbers(
        r"(\d+) kept, (\d+) removed, (\d+) relabelled",
        one_of(said, "review runs/mine --decisions review.csv"),
    )
    with Path("cleaned.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file, delimiter=";"))
    before = {one[0]: one for one in messages(TRAIN, 0, 10)}
    assert header == HEADER and [one[0] for one in rows] == [
        key for key in before if key in {one[0] for one in rows}
    ]
    assert TRAIN - len(rows) == removed == 1
    assert sum(one != before[one[0]] for one in rows) == changed == 1
    assert all(one[:3] + one[4:] == before[one[0]][:3] + before[one[0]][4:] for one in rows)
    assert kept == TRAIN - 2
    arguments = next(one for one in commands(ROOT / PAGES[1], to_run=True) if one[0] == "fit")[1:]
    arguments = ["cleaned.csv" if one == "train.csv" else one for one in arguments]
    again = turnover(*mine("fit", arguments, encoder)[:-1], "--out", "runs/again")
    assert f"{len(rows)} training" in again.stdout


def test_what_groups_says_is_true(said: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(said["desk"])
    assert f"x {SENDERS} groups of {TRAIN} training rows" in one_of(said, "influence runs/sources")
    text = one_of(said, "groups runs/sources")
    found = json.loads(Path("runs/sources/results/groups.json").read_text())
    significant = sum(one["q"] <= 0.05 for one in found["groups"])
    assert numbers(r"(\d+) of (\d+) groups have q <= 0.05", text) == [significant, SENDERS]
    assert {one["key"]: one["rows"] for one in found["groups"]} == {
        f"vendor {i}": TRAIN // SENDERS for i in range(SENDERS)
    }
    one = found["groups"][0]
    file = json.loads(
        turnover("predict", "runs/sources", "--without", one["key"], "--json").stdout
    )["file"]
    without = np.mean([row["predicted"] == row["label"] for row in table(file)])
    assert one["accuracy_without"] == pytest.approx(without)


def test_every_next_step_runs(said: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(said["desk"])
    waiting = [
        step
        for text in said.values()
        if isinstance(text, str)
        for step in next_steps(" ".join(text.split()))
    ]
    done: list[list[str]] = []
    while waiting:
        step = waiting.pop(0)
        if step in done or step[0] == "view":
            continue
        done.append(step)
        waiting += next_steps(" ".join(turnover(*step).stdout.split()))
    assert {step[0] for step in done} >= {"influence", "explain", "report", "groups", "review"}
