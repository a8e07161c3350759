"""Weights of the classes in the training loss: what they do, and what stays unweighted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

pytest.importorskip("transformers")
pytest.importorskip("typer")

import encoders
import test_cli
from encoders import SHAPE
from test_cli import turnover
from turnover import InputError
from turnover.runs.run import Run
from turnover.tasks.class_weights import class_weights, parse_class_weights, weights_of_run
from turnover.tasks.linear_probe import frozen, train_head
from turnover.tasks.training import TrainingConfig, evaluate, logits_of_rows
from turnover.training import mean_cross_entropy


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    where = tmp_path_factory.mktemp("encoder")
    return encoders.folder(transformers.BertConfig(**SHAPE), where)


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One row in eight is of the class x=1."""
    words = encoders.WORDS
    lines = [
        f"{words[i % 15]} {words[i * 7 % 15]} {words[i * i % 15]},{'x=1' if i % 8 == 0 else 'common'}"
        for i in range(96)
    ]
    path = tmp_path_factory.mktemp("data") / "rare.csv"
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


def fit(data: Path, encoder: Path, out: Path, *more: object, expect: int = 0) -> test_cli.Finished:
    rates = ("--epochs", 3, "--batch-size", 16, "--head-learning-rate", 0.01, "--no-compare")
    size = ("--head-units", 64, "--lora-rank", 2, *rates)
    return turnover(
        "fit", data, "--model", encoder, "--test", data, "--out", out, *size, *more, expect=expect
    )


def predicted(out: Path) -> float:
    """Mean probability of the rare class over the training rows."""
    run = Run.load(out)
    logits = logits_of_rows(
        run.model, run.encode(run.train), range(len(run.train)), lambda _: run.network.mean()
    )
    return float(logits.softmax(dim=1)[:, run.train.classes.index("x=1")].mean())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, rare: Path, encoder: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    asked = {
        "plain": (),
        "balanced": ("--class-weights", "balanced"),
        "named": ("--class-weights", "x=1=4", "--class-weights", f"common={4 / 7}"),
        "ones": ("--class-weights", "x=1=1"),
    }
    for name, options in asked.items():
        fit(rare, encoder, folder / name, *options)
    return {name: folder / name for name in asked}


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_a_balanced_network_expects_the_rare_class_as_often(runs: dict[str, Path]) -> None:
    plain, balanced = (predicted(runs[name]) for name in ("plain", "balanced"))
    assert balanced > plain + 0.08
    assert abs(balanced - 0.5) < 0.1
    # Balanced is no more than rows / (classes x rows of the class).
    assert weights(runs["balanced"]) == weights(runs["named"])
    assert weights(runs["ones"]) == weights(runs["plain"]) != weights(runs["balanced"])


def test_weights_are_kept_and_the_run_can_be_made_again(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    metrics, config = (
        json.loads((runs["balanced"] / name).read_text())
        for name in ("metrics.json", "config.json")
    )
    assert metrics["class_weights"] == pytest.approx({"common": 4 / 7, "x=1": 4})
    assert config["training"]["class_weights"] == "balanced"
    named = json.loads((runs["named"] / "config.json").read_text())
    assert named["training"]["class_weights"] == {"x=1": 4.0, "common": 4 / 7}
    for name in ("balanced", "named"):
        turnover("fit", "--config", runs[name] / "fit.toml", "--out", tmp_path / name)
        assert weights(tmp_path / name) == weights(runs[name])
    assert "class_weights" not in json.loads((runs["plain"] / "metrics.json").read_text())


def test_what_is_measured_is_not_weighted(runs: dict[str, Path]) -> None:
    run = Run.load(runs["balanced"])
    data = run.encode(run.test)
    rows = range(len(data))
    found = evaluate(run.model, data, rows, lambda _: run.network.mean())
    logits = logits_of_rows(run.model, data, rows, lambda _: run.network.mean())
    plain = functional.cross_entropy(logits, torch.tensor(data.labels))
    assert found.mean()[0] == pytest.approx(float(plain))
    metrics = json.loads((runs["balanced"] / "metrics.json").read_text())
    assert metrics["loss"]["test_mean"] == pytest.approx(float(plain), rel=1e-5)


def test_what_a_row_teaches_does_not_depend_on_the_classes_beside_it() -> None:
    logits, given = torch.randn(4, 2, requires_grad=True), torch.tensor([1.0, 9.0])
    steps = []
    for labels in ([0, 0, 0, 0], [0, 1, 1, 1]):
        loss = mean_cross_entropy(logits, torch.tensor(labels), given[labels])
        steps.append(torch.autograd.grad(loss, logits)[0][0])
    torch.testing.assert_close(steps[0], steps[1])


def test_heads_of_a_cleansing_weigh_the_classes_as_the_run_does(runs: dict[str, Path]) -> None:
    plain, balanced = (Run.load(runs[name]) for name in ("plain", "balanced"))
    assert weights_of_run(plain) is None
    data = frozen(balanced, balanced.train)
    torch.testing.assert_close(data.weights, torch.tensor([4 / 7, 4.0]))
    shares = []
    for one in (frozen(plain, plain.train), data):
        head = train_head(one, range(len(one)), seed=0)
        shares.append(float(head(one.features).detach().softmax(dim=1)[:, 1].mean()))
    assert shares[0] < 0.25 and shares[1] > 0.35


def test_a_pilot_takes_them_too(rare: Path, encoder: Path) -> None:
    options = ("--pilot", "--pilot-rows", 80, "--head-units", 64, "--top", 3, "--json")
    said = turnover(
        "plan", rare, "--model", encoder, *options, "--class-weights", "nobody=2", expect=2
    ).stderr
    assert "no class 'nobody'" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["x=1=4", "x=1=5"], "names the class 'x=1' twice"),
        (["balanced", "x=1=5"], "balanced alone, or NAME=WEIGHT"),
        (["heavy"], "balanced alone, or NAME=WEIGHT"),
        (["x=1=much"], "balanced alone, or NAME=WEIGHT"),
        (["x=1=0"], "must be a finite number above 0"),
        (["x=1=inf"], "must be a finite number above 0"),
        (["x=1=1e39"], "must be a finite number above 0"),
        (["x=1=1e-50"], "must be a finite number above 0"),
        (["comon=2"], "no class 'comon'; closest: common"),
    ],
)
def test_weights_that_cannot_be_are_refused_before_training(
    rare: Path, encoder: Path, tmp_path: Path, given: list[str], message: str
) -> None:
    options = [one for value in given for one in ("--class-weights", value)]
    said = fit(rare, encoder, tmp_path / "run", *options, expect=2).stderr
    assert message in said
    assert not list(tmp_path.iterdir())


def test_from_python() -> None:
    from turnover.data.text import TextData

    data = TextData(["a", "b", "c"], [0, 0, 2], torch.arange(3), ["a", "b", "c"], ["p", "q", "r"])
    assert parse_class_weights(None) is None
    torch.testing.assert_close(class_weights("balanced", data), torch.tensor([0.75, 1.0, 1.5]))
    torch.testing.assert_close(class_weights({"r": 3}, data), torch.tensor([1.0, 1.0, 3.0]))
    with pytest.raises(InputError, match="'balanced' or NAME=WEIGHT"):
        TrainingConfig(class_weights="even")  # type: ignore[arg-type]
