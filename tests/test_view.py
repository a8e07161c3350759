"""The view from outside: a real process, plain requests, and files in the run."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("PIL")

from PIL import Image

from edited import made_whole
from test_cli import encoder, fit_arguments, sentences, turnover, write_csv  # noqa: F401
from test_images import folders  # noqa: F401 - a fixture
from test_images import run as image_run  # noqa: F401 - a fixture
from turnover.errors import InputError
from turnover.runs.run import Run
from turnover.tasks.explain import explain_errors
from turnover.tasks.review import read_decisions
from turnover.tasks.stored_doubts import open_doubts
from turnover.view import open_view
from turnover.view.columns import open_columns
from viewing import Server, serving, serving_process

HOSTILE = "<script>alert('from a text')</script><img src=x onerror=alert(1)>"


def with_texts(run: Path, name: str, texts: dict[int, str]) -> None:
    """Other texts in a run's file: what was learned from the rows stays."""
    path = run / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for row, text in texts.items():
        lines[row]["text"] = text
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    made_whole(run)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:  # noqa: F811
    """A run with errors whatever the network learns: half of the test labels are wrong."""
    folder = tmp_path_factory.mktemp("viewed")
    train = write_csv(folder / "train.csv", sentences(48))
    other = {"pos": "neg", "neg": "pos"}
    rows = [
        (i, t, other[label] if i % 4 in (1, 2) else label) for i, t, label in sentences(24, 500)
    ]
    test = write_csv(folder / "test.csv", rows)
    out = folder / "run"
    turnover(
        *fit_arguments(train, encoder, out, "--test", test, "--id-column", "id", "--no-compare")
    )
    turnover("influence", out, "--ghosts", 200)
    return out


@dataclass(frozen=True)
class Viewed:
    run: Path
    server: Server


@pytest.fixture(scope="module")
def viewed(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewed]:
    copy = Path(shutil.copytree(text_run, tmp_path_factory.mktemp("view") / "run"))
    open_doubts(Run.load(copy))  # no tokenizer takes a lone surrogate
    with_texts(copy, "train", {3: HOSTILE, 4: "a lone surrogate \ud800 in it"})
    with serving(copy) as server:
        yield Viewed(copy, server)


@pytest.fixture
def copy_of_run(text_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_run, tmp_path / "run"))


def test_the_page_and_its_parts_are_served_under_a_strict_policy(viewed: Viewed) -> None:
    server = viewed.server
    kinds = {"": "text/html", "view.js": "text/javascript", "panes.js": "text/javascript"}
    kinds |= {"cleaning.js": "text/javascript"}
    kinds |= {"elements.js": "text/javascript", "view.css": "text/css", "colours.css": "text/css"}
    for name, kind in (kinds | {"icon.svg": "image/svg+xml"}).items():
        answer = server.ask(f"/{server.token}/{name}")
        assert answer.status == 200 and answer.headers["content-type"].startswith(kind), name
    policy = server.ask(f"/{server.token}/").headers
    assert policy["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy["content-security-policy"]
    assert policy["x-content-type-options"] == "nosniff"
    assert policy["referrer-policy"] == "no-referrer"
    assert policy["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in policy


def test_an_error_shows_the_instances_that_explain_lists(viewed: Viewed) -> None:
    explained = explain_errors(Run.load(viewed.run), top=4)
    for number, one in enumerate(explained):
        shown = viewed.server.get(f"errors/{number}?top=4")
        assert (shown["key"], shown["text"]) == (one.key, one.text)
        assert (shown["true"], shown["predicted"]) == (one.true_label, one.predicted_label)
        assert shown["significant"] == one.n_significant
        by_gram = viewed.server.get(f"errors/{number}?top=4&by=gram")
        assert one.gram is not None
        for side in ("helpful", "harmful"):
            ours, theirs = shown[side], getattr(one, side)
            assert [item["key"] for item in ours] == [item.key for item in theirs]
            for item, other in zip(ours, theirs, strict=True):
                assert item["score"] == pytest.approx(other.score)
                assert item["z"] == pytest.approx(other.z)
                assert item["q"] == pytest.approx(other.q)
                assert item["significant_here"] == other.significant
            beside = getattr(one.gram, side)
            for item, other in zip(by_gram[side], beside, strict=True):
                assert item["key"] == other.key
                assert item["gram"]["score"] == pytest.approx(other.score)
                assert item["gram"]["error"] == pytest.approx(other.standard_error)
    of_class = viewed.server.get("errors/0?label=neg&top=100")
    assert {item["label"] for item in of_class["helpful"] + of_class["harmful"]} == {"neg"}


def test_an_instance_shows_its_column_of_the_pairs(viewed: Viewed) -> None:
    run = Run.load(viewed.run)
    errors, own = run.read_result("errors"), run.read_result("self")
    overall = run.read_result("aggregate")
    for row in (0, 17, 47):
        shown = viewed.server.get(f"train/{row}?top=100")
        column = errors.train_ids.tolist().index(int(run.train.ids[row]))
        listed = shown["helpful"] + shown["harmful"][::-1]
        scores = errors.scores[:, column]
        order = np.argsort(-scores, kind="stable")
        assert [item["error"] for item in listed] == order[scores[order] != 0].tolist()
        for item in listed:
            at = item["error"], column
            assert item["score"] == pytest.approx(errors.scores[at])
            assert item["z"] == pytest.approx(errors.z[at], rel=1e-5)
            assert item["q"] == pytest.approx(errors.q[at], rel=1e-5)
        sure = errors.q[:, column] <= 0.05
        assert shown["helped"] == (sure & (scores > 0)).sum()
        assert shown["hurt"] == (sure & (scores < 0)).sum()
        assert shown["overall"]["score"] == pytest.approx(overall.scores[column])
        assert shown["overall"]["rank"] == 1 + (overall.scores < overall.scores[column]).sum()
        at = own.train_ids.tolist().index(int(run.train.ids[row]))
        assert shown["own"]["z"] == pytest.approx(own.z[at])
        assert shown["own"]["rank"] == 1 + (own.scores > own.scores[at]).sum()


def test_gram_stands_beside_the_errors_of_an_instance(viewed: Viewed) -> None:
    gram = Run.load(viewed.run).read_result("gram")
    shown = viewed.server.get("train/5?top=100")
    for item in shown["helpful"] + shown["harmful"]:
        (rank,) = np.flatnonzero(gram.train_ids[item["error"]] == 5)
        assert item["gram"]["score"] == pytest.approx(gram.scores[item["error"], rank])


def test_errors_are_filtered_and_sorted(viewed: Viewed) -> None:
    def found(**wanted: object) -> list[dict[str, Any]]:
        answer = viewed.server.get(f"errors?{urlencode(wanted)}")
        assert answer["found"] == len(answer["items"])
        return answer["items"]

    everyone = found(sort="row")
    rows = [one["row"] for one in everyone]
    assert len(everyone) > 5 and rows == sorted(rows)
    for field in ("true", "predicted"):
        names = [one["key"] for one in everyone if one[field] == "neg"]
        assert [one["key"] for one in found(sort="row", **{field: "neg"})] == names
    middle = sorted(one["confidence"] for one in everyone)[len(everyone) // 2]
    assert {one["key"] for one in found(low=middle)} == {
        one["key"] for one in everyone if one["confidence"] >= middle
    }
    assert {one["key"] for one in found(high=middle)} == {
        one["key"] for one in everyone if one["confidence"] <= middle
    }
    sure = {one["key"] for one in everyone if one["significant"]}
    assert {one["key"] for one in found(q=0.05)} == sure
    first = everyone[0]
    assert [one["key"] for one in found(words=f"NUMBER {first['key']}")] == [first["key"]]
    assert found(words="no such words") == []
    for sort, field in (("confidence", "confidence"), ("z", "largest_z")):
        values = [one[field] for one in found(sort=sort)]
        assert values == sorted(values, reverse=True)
    assert viewed.server.get("errors?start=2&sort=row")["items"] == everyone[2:]


def test_training_instances_are_filtered_and_sorted(viewed: Viewed) -> None:
    def found(query: str) -> list[dict[str, Any]]:
        return viewed.server.get(f"train?{query}")["items"]

    harmful = [one["overall_score"] for one in found("sort=harmful")]
    assert len(harmful) == 48 and harmful == sorted(harmful)
    by_heart = [one["self_score"] for one in found("sort=self")]
    assert by_heart == sorted(by_heart, reverse=True)
    reach = [one["helped"] + one["hurt"] for one in found("sort=errors")]
    assert reach == sorted(reach, reverse=True)
    assert {one["label"] for one in found("label=pos")} == {"pos"}
    assert [one["row"] for one in found("words=onerror")] == [3]
    assert found("words=onerror")[0]["text"] == HOSTILE
    assert found("words=surrogate")[0]["text"] == "a lone surrogate \ud800 in it"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("errors/1000", "none is number 1000"),
        ("train/48", "there are 48 training rows"),
        ("errors?true=none", "unknown class 'none'"),
        ("errors?sort=none", "unknown order 'none'"),
        ("errors?low=none", "low must be a number"),
        ("errors?start=-1", "start must be >= 0"),
        ("errors?nothing=1", "unknown filter 'nothing'"),
        ("errors/0?by=none", "unknown ranking 'none'"),
        ("errors/0?top=0", "top must be from 1"),
        ("errors/0?top=1000000", "top must be from 1"),
        ("train?decision=none+of", "unknown kind of decision"),
        ("image/train/0.png", "there is no image"),
        ("image/elsewhere/0.png", "images of train and test"),
    ],
)
def test_what_cannot_be_answered_is_said(viewed: Viewed, path: str, said: str) -> None:
    answer = viewed.server.ask(f"/{viewed.server.token}/{path}")
    assert answer.status == 400 and said in answer.json["error"]


def test_without_the_secret_nothing_is_answered(viewed: Viewed) -> None:
    server = viewed.server
    for path in ("/", "/about", "/errors", "/train/0", f"/{server.token[:-1]}/about", "//about"):
        answer = server.ask(path)
        assert answer.status == 403 and b"turnover view" in answer.body
        assert "content-security-policy" in answer.headers
    body = json.dumps({"decision": "remove"}).encode()
    origin = {"Origin": server.origin}
    assert server.ask("/train/0/decision", "PUT", body, **origin).status == 403


def test_a_rebound_name_is_refused(viewed: Viewed) -> None:
    server = viewed.server
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", ""):
        answer = server.ask(f"/{server.token}/about", Host=host)
        assert answer.status == 400 and b"training" not in answer.body
    assert server.ask(f"/{server.token}/about", Host=f"localhost:{server.port}").status == 200


def test_another_page_cannot_write_decisions(viewed: Viewed) -> None:
    server = viewed.server
    body = json.dumps({"decision": "remove"}).encode()
    path = f"/{server.token}/train/0/decision"
    foreign = ("http://evil.example", "null", f"http://127.0.0.1:{server.port + 1}")
    for origin in (*foreign, f"https://127.0.0.1:{server.port}"):
        assert server.ask(path, "PUT", body, Origin=origin).status == 403
    assert server.ask(path, "PUT", body).status == 403
    assert server.ask(path, "POST", body, Origin=server.origin).status == 405
    assert server.ask(path).status == 405
    asked = server.ask(path, "OPTIONS", Origin="http://evil.example")
    assert asked.status == 403 and "access-control-allow-origin" not in asked.headers
    assert server.get("about")["decisions"] == []


def test_no_path_leads_out_of_the_page(viewed: Viewed) -> None:
    token = viewed.server.token
    for path in (
        "../config.json",
        "..%2fconfig.json",
        "view.css/../../run.py",
        "%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "image/train/..%2f..%2fconfig.json",
        "image/..%2f..%2ftrain/0.png",
        "image/train/0.png/../../../config.json",
        "image/train/-1.png",
        "decisions.csv/../../config.json",
        "assets/../server.py",
        "server.py",
        "page.html%00.css",
    ):
        answer = viewed.server.ask(f"/{token}/{path}")
        assert answer.status in (400, 404), path
        assert b"head_units" not in answer.body and b"root:" not in answer.body


def test_it_listens_on_loopback_alone(viewed: Viewed) -> None:
    elsewhere = socket.socket()
    with elsewhere, pytest.raises(ConnectionRefusedError):
        elsewhere.connect(("127.0.0.2", viewed.server.port))  # what 0.0.0.0 would answer


def test_decisions_outlive_the_process_as_the_list_that_review_takes(
    copy_of_run: Path, tmp_path: Path
) -> None:
    with serving_process(copy_of_run) as (server, process):
        assert server.decide(0, "remove").status == 200
        assert server.decide(1, "keep").status == 200
        assert server.decide(2, "pos").status == 200
        assert server.decide(5, "remove").status == 200
        made = server.decide(5, None).json["decisions"]
        assert made == [[0, "remove"], [1, "keep"], [2, "pos"]]
        # What was answered is on disk, however the process ends.
        kept = read_decisions(Run.load(copy_of_run), copy_of_run / "results" / "decisions.csv")
        assert sorted(kept.items()) == [tuple(one) for one in made]
        assert server.token != "token" and len(server.token) > 20
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in said and "interrupted" not in said
    with serving(copy_of_run) as server:
        assert server.get("about")["decisions"] == made
        for kind, rows in (("remove", [0]), ("keep", [1]), ("relabel", [2]), ("made", [0, 1, 2])):
            items = server.get(f"train?decision={kind}&sort=row")["items"]
            assert [one["row"] for one in items] == rows
        assert server.get("train?decision=none")["found"] == 45
        exported = server.ask(f"/{server.token}/decisions.csv")
    assert 'filename="decisions.csv"' in exported.headers["content-disposition"]
    path = tmp_path / "decisions.csv"
    path.write_bytes(exported.body)
    assert path.read_bytes() == (copy_of_run / "results" / "decisions.csv").read_bytes()
    lines = list(csv.DictReader(io.StringIO(exported.body.decode())))
    assert [line["decision"] for line in lines] == ["remove", "keep", "pos"]
    assert all(line["self_influence_z"] and line["text"] for line in lines)
    said = turnover("review", copy_of_run, "--decisions", path, "--out", tmp_path / "clean.csv")
    assert "46 kept, 1 removed, 1 relabelled" in said.stdout
    with (tmp_path / "clean.csv").open(newline="") as file:
        labels = {row["text"]: row["label"] for row in csv.DictReader(file)}
    assert lines[0]["text"] not in labels and labels[lines[2]["text"]] == "pos"


def test_the_list_of_decisions_has_the_columns_of_a_review(
    copy_of_run: Path, tmp_path: Path
) -> None:
    from turnover.view.decisions import Decisions

    Decisions(Run.load(copy_of_run), {}).set(0, "keep")
    turnover("review", copy_of_run, "--out", tmp_path / "review.csv")
    headers = [
        path.read_text().splitlines()[0]
        for path in (tmp_path / "review.csv", copy_of_run / "results" / "decisions.csv")
    ]
    assert headers[0] == headers[1]


def test_decisions_that_cannot_be_meant_change_nothing(viewed: Viewed) -> None:
    server, path = viewed.server, f"/{viewed.server.token}/train/0/decision"
    for row, decision, said in (
        (0, "maybe", "unknown decision 'maybe'"),
        (0, "", "unknown decision ''"),
        (48, "keep", "none is number 48"),
    ):
        answer = server.decide(row, decision)
        assert answer.status == 400 and said in answer.json["error"]
    headers = {"Origin": server.origin, "Content-Type": "application/json"}
    for body in (b"", b"keep", b"[]", b'{"decision": 1}', b'{"decision": "' + b"x" * 5000 + b'"}'):
        answer = server.ask(path, "PUT", body, **headers)
        assert answer.status == 400 and "the body must be JSON" in answer.json["error"]
    assert not (viewed.run / "results" / "decisions.csv").exists()
    assert server.ask(f"/{server.token}/decisions.csv").status == 400


def test_decisions_of_two_views_are_all_kept(copy_of_run: Path) -> None:
    from turnover.view.decisions import Decisions

    run = Run.load(copy_of_run)
    one, other = Decisions(run, {}), Decisions(run, {})
    one.set(0, "keep")
    other.set(1, "remove")
    one.set(2, "neg")
    assert one.all() == other.all() == {0: "keep", 1: "remove", 2: "neg"}
    assert read_decisions(run, one.path) == one.all()
    one.path.write_text("key,decision\nnobody,keep\n")
    with pytest.raises(InputError, match="no training row has the key 'nobody'"):
        other.set(1, "keep")
    assert one.path.read_text() == "key,decision\nnobody,keep\n"


def test_rows_of_a_group_are_shown_and_decided_on(
    encoder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    rows = [(f"s{i % 6}", text, label) for i, text, label in sentences(48)]
    train, run = write_csv(tmp_path / "grouped.csv", rows), tmp_path / "run"
    test = write_csv(tmp_path / "test.csv", [(i, text, "neg") for i, text, _ in sentences(12)])
    more = ("--group-column", "id", "--epochs", 1, "--no-compare")
    turnover(*fit_arguments(train, encoder, run, "--test", test, *more))
    turnover("influence", run, "--ghosts", 100)
    with serving(run) as server:
        about = server.get("about")
        assert about["doubts"] is not None
        assert [about[why] for why in ("refusal", "undoubted", "no_effect")] == [None] * 3
        assert len(server.get("train?sort=doubt")["items"]) == 48
        shown = server.get("train/7")
        assert (shown["key"], shown["group"], shown["own"]) == ("8", "s1", None)
        same = server.get("train/13")
        assert [one["score"] for one in same["helpful"]] == [
            one["score"] for one in shown["helpful"]
        ]
        error = server.get("errors/0")
        assert {one["key"] for side in ("helpful", "harmful") for one in error[side]} <= {
            f"s{i}" for i in range(6)
        }
        assert server.decide(7, "remove").status == 200
    assert read_decisions(Run.load(run), run / "results" / "decisions.csv") == {7: "remove"}


def test_images_are_served_as_they_are(image_run: Path, tmp_path: Path) -> None:  # noqa: F811
    run = Run.load(image_run)
    with serving(Path(shutil.copytree(image_run, tmp_path / "run"))) as server:
        assert server.get("about")["images"]
        for side, images in (("train", run.train), ("test", run.test)):
            answer = server.ask(f"/{server.token}/image/{side}/2.png")
            assert answer.headers["content-type"] == "image/png"
            pixels = np.asarray(Image.open(io.BytesIO(answer.body)))
            np.testing.assert_array_equal(pixels, images.image(2))
        assert server.ask(f"/{server.token}/image/train/36.png").status == 400


def test_pairs_are_laid_out_once_and_anew_after_another_estimate(copy_of_run: Path) -> None:
    run = Run.load(copy_of_run)
    first = open_columns(run)
    stamp = (copy_of_run / "results" / "columns.zarr" / "zarr.json").stat().st_mtime_ns
    again = open_columns(run)
    assert (Path(again.url) / "zarr.json").stat().st_mtime_ns == stamp
    errors = run.read_result("errors")
    np.testing.assert_array_equal(first.part("score").T, errors.scores)
    turnover("influence", copy_of_run, "--ghosts", 300, "--no-gram")
    other, errors = open_columns(run), run.read_result("errors")
    np.testing.assert_allclose(other.part("q").T, errors.q, rtol=1e-6)
    assert other.attributes["source"] != first.attributes["source"]
    assert not list((copy_of_run / "results").glob(".*.zarr"))


def test_a_pair_that_was_damaged_on_disk_is_named(copy_of_run: Path) -> None:
    with serving(copy_of_run) as server:
        chunk = copy_of_run / "results" / "columns.zarr" / "score" / "c" / "0" / "0"
        chunk.write_bytes(b"x" + chunk.read_bytes()[1:])
        answer = server.ask(f"/{server.token}/train/0")
        assert answer.status == 400 and "score/c/0/0 is damaged" in answer.json["error"]


def test_what_cannot_be_viewed_ends_with_a_sentence(copy_of_run: Path, tmp_path: Path) -> None:
    def refused(*more: object) -> str:
        return turnover("view", copy_of_run, "--no-open", *more, expect=2).stderr

    results = copy_of_run / "results"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on port {port}" in refused("--port", port)
    decisions = results / "decisions.csv"
    decisions.write_text("key,decision\n0,perhaps\n")
    assert "unknown decision 'perhaps'" in refused()
    decisions.unlink()
    shutil.rmtree(results / "columns.zarr")
    chunk = results / "errors.zarr" / "score" / "c" / "0" / "0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "score/c/0/0 is damaged" in refused()
    chunk.write_bytes(whole)
    targets = (results / "targets.json").read_text()
    for damaged, said in (
        ("{", "missing or damaged"),
        ('{"rows": [0]}', "damaged"),
        ('{"rows": [], "predicted": [], "confidence": []}', "no misclassified test rows"),
        ('{"rows": [900], "predicted": [0], "confidence": [0.5]}', "does not fit the run"),
        ('{"rows": [0], "predicted": [0], "confidence": [0.5]}', "1 are listed"),
    ):
        (results / "targets.json").write_text(damaged)
        assert said in refused(), damaged
    (results / "targets.json").write_text(targets)
    shutil.rmtree(results)
    assert "run `turnover influence" in refused()
    assert "is not a run" in turnover("view", tmp_path / "none", "--no-open", expect=2).stderr


def test_a_missing_package_names_the_mend(
    copy_of_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=r"pip install 'turnover\[view\]'"):
        open_view(Run.load(copy_of_run), browser=False)
