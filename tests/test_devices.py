"""Devices: which one a name means, and that everything of a run is on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from turnover import Batch, InputError
from turnover.data.encoded import made_ahead
from turnover.dropout.modules import choose_device

HERE = Path(__file__).parent


def cards(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto_is_a_card_if_there_is_one_and_never_mps(monkeypatch):
    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)
    cards(monkeypatch, 0)
    assert choose_device("auto") == torch.device("cpu")
    cards(monkeypatch, 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("mps") == torch.device("mps")
    assert choose_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "gpu", "cuda:x", "cpu:1", "auto:0", ""])
def test_a_device_that_is_not_there_is_refused_in_one_line(name, monkeypatch):
    cards(monkeypatch, 0)
    monkeypatch.setattr(torch.mps, "device_count", lambda: 0)
    with pytest.raises(InputError, match="auto") as error:
        choose_device(name)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_card_beyond_the_last_is_refused(monkeypatch):
    cards(monkeypatch, 2)
    with pytest.raises(InputError, match="'cuda:2': this machine has 2 cuda devices"):
        choose_device("cuda:2")


@pytest.mark.parametrize(
    "command",
    [
        ("fit", "none.csv", "--model", "none", "--out", "none"),
        ("plan", "none.csv", "--model", "none"),
        ("influence", "none"),
        ("explain", "none"),
        ("groups", "none"),
        ("predict", "none"),
        ("review", "none"),
        ("cleanse", "none", "--validation", "none.csv", "--out", "none.csv"),
        ("fairness", "none", "--attributes", "none.csv", "--positive", "none"),
        ("demo", "--out", "none"),
    ],
)
def test_commands_refuse_a_missing_card_before_they_read_anything(command, monkeypatch, tmp_path):
    pytest.importorskip("typer")
    pytest.importorskip("transformers")
    from test_cli import turnover

    cards(monkeypatch, 0)
    monkeypatch.chdir(tmp_path)
    error = turnover(*command, "--device", "cuda", expect=2).stderr
    assert error.count("\n") == 1
    assert "device 'cuda': this machine has no cuda device" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_batches_made_ahead_are_the_same_in_the_same_order(device, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(1) or self.clone())

    def made():
        generator = torch.Generator().manual_seed(0)
        for row in range(7):
            yield Batch(torch.rand(4, 2, generator=generator), ids=torch.arange(4) + row)

    wanted = [batch.inputs for batch in made()]
    found = list(made_ahead(made(), torch.device(device)))
    assert [batch.ids[0].item() for batch in found] == list(range(7))
    assert all(map(torch.equal, [batch.inputs for batch in found], wanted))
    assert len(pinned) == (14 if device == "cuda" else 0)


def test_what_fails_in_a_batch_made_ahead_fails_in_the_loop():
    def made():
        yield Batch(torch.zeros(1, 1))
        raise InputError("an image cannot be read")

    taken = made_ahead(made(), torch.device("mps"))
    next(taken)
    with pytest.raises(InputError, match="cannot be read"):
        next(taken)


@pytest.mark.long
def test_a_run_on_a_simulated_card_is_that_of_the_cpu(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("typer")
    backend = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(backend, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices written in Python")
    from test_cli import sentences, write_csv

    wrong = [
        (i, t, "neg" if n < 4 else label) for n, (i, t, label) in enumerate(sentences(24, 500))
    ]
    write_csv(tmp_path / "train.csv", sentences(48))
    write_csv(tmp_path / "test.csv", wrong)
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "src")])
    done = subprocess.run(
        [sys.executable, HERE / "on_a_card.py", tmp_path],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "card" / "metrics.json").read_text())
    assert metrics["device"] == metrics["influence"]["device"] == "card:0"
