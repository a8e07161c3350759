"""Runs that somebody else made or damaged: loaded as they were, or refused by name."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("PIL")

from safetensors.torch import load_file, save_file

import fuzzing
from test_cli import data, encoder  # noqa: F401 - fixtures
from test_cli import run as text_run  # noqa: F401 - a fixture
from test_images import folders  # noqa: F401 - a fixture
from test_images import run as image_run  # noqa: F401 - a fixture
from turnover import InputError
from turnover.cli.output import Output
from turnover.cli.report import _write_report
from turnover.io.tensors import opened, read_weights
from turnover.runs.run import DIGESTS, Run
from turnover.tasks.memorize import memorization

pytestmark = pytest.mark.filterwarnings("ignore:.*has no digests:UserWarning")
DESCRIBED = ["config.json", "masks.json", "classifier.json"]
MEASURED = ["metrics.json", "results/targets.json"]
BYTES = [*DESCRIBED, "model.safetensors", "test.jsonl", "test.npy"]


@pytest.fixture(scope="module")
def images(image_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A copy without digests, so that what is in the files is looked at."""
    out = Path(shutil.copytree(image_run, tmp_path_factory.mktemp("images") / "run"))
    (out / DIGESTS).unlink()
    return out


@pytest.fixture(scope="module")
def texts(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    out = Path(shutil.copytree(text_run, tmp_path_factory.mktemp("texts") / "run"))
    (out / DIGESTS).unlink()
    return out


@pytest.fixture
def restored() -> Iterator[Callable[[Path], None]]:
    """Takes a file that is as it was when the test ends."""
    whole: dict[Path, bytes] = {}
    yield lambda path: whole.update({path: path.read_bytes()})
    for path, raw in whole.items():
        path.write_bytes(raw)


def any_of(
    others: st.SearchStrategy[bytes],
    path: Path,
    folder: Path,
    act: Callable[[], object],
    count: int,
) -> None:
    """With any other bytes in a file what is done with the run succeeds, or is refused by name."""

    @fuzzing.bounded(count)
    @given(raw=others)
    def each(raw: bytes) -> None:
        path.write_bytes(raw)
        fuzzing.refused(act, str(folder))

    each()


def values_like(path: Path, *without: str) -> st.SearchStrategy[bytes]:
    """JSON of which something is another than in the file."""
    whole = json.loads(path.read_text())
    for key in without:
        del whole[key]
    return fuzzing.changed(whole).map(fuzzing.json_text)


def used(folder: Path) -> None:
    """What commands do with a run."""
    run = Run.load(folder)
    batch = run.encode(run.test).batch([0])
    with torch.no_grad():
        logits = batch.call(run.model)
    assert logits.shape == (1, len(run.test.classes)) and torch.isfinite(logits).all()


@pytest.mark.parametrize("name", BYTES)
def test_damaged_bytes_of_a_run_are_read_or_refused(
    name: str, images: Path, restored: Callable[[Path], None]
) -> None:
    path = images / name
    restored(path)
    any_of(fuzzing.damaged(path.read_bytes()), path, images, lambda: used(images), 15)


@pytest.mark.parametrize("name", DESCRIBED)
def test_another_description_of_a_run_is_read_or_refused(
    name: str, images: Path, restored: Callable[[Path], None]
) -> None:
    path = images / name
    restored(path)
    any_of(values_like(path), path, images, lambda: used(images), 25)


@pytest.mark.parametrize("name", MEASURED)
def test_other_measurements_are_reported_or_refused(
    name: str, images: Path, restored: Callable[[Path], None]
) -> None:
    path, run = images / name, Run.load(images)
    restored(path)

    def report() -> None:
        _write_report(Output(as_json=True), run, images / "report.html", texts=True)

    any_of(values_like(path, "checksum"), path, images, report, 40)


@pytest.mark.parametrize("name", ["classifier.json", "masks.json", "encoder/config.json"])
def test_another_description_of_a_model_of_texts_is_read_or_refused(
    name: str, texts: Path, restored: Callable[[Path], None]
) -> None:
    path = texts / name
    restored(path)
    any_of(values_like(path), path, texts, lambda: used(texts), 12)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("classifier.json", {"classifier": {"model": "x", "head_units": 10**10}}),
        ("classifier.json", {"classes": 10**9}),
        ("encoder/config.json", {"num_hidden_layers": 10**9}),
        ("encoder/config.json", {"vocab_size": 10**11}),
        ("encoder/config.json", {"hidden_size": 2**30}),
        ("encoder/config.json", {"num_labels": 10**9}),
    ],
)
def test_a_model_larger_than_its_weights_is_refused_at_once(
    name: str, change: dict[str, Any], texts: Path, restored: Callable[[Path], None]
) -> None:
    path = texts / name
    restored(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert fuzzing.refused(lambda: Run.load(texts), str(texts))


def test_an_image_model_larger_than_its_weights_is_refused_at_once(
    images: Path, restored: Callable[[Path], None]
) -> None:
    path = images / "classifier.json"
    restored(path)
    whole = json.loads(path.read_text())
    for change in ({"width": 10**6}, {"hidden": 10**9}, {"size": 32 * 10**8}):
        other = whole | {"classifier": whole["classifier"] | change}
        path.write_text(json.dumps(other))
        assert fuzzing.refused(lambda: Run.load(images), str(images))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(
    bad: float, images: Path, texts: Path, restored: Callable[[Path], None]
) -> None:
    for folder in (images, texts):
        path = folder / "model.safetensors"
        restored(path)
        tensors = load_file(path)
        name = next(name for name, value in tensors.items() if value.is_floating_point())
        tensors[name] = tensors[name].clone().fill_(bad)
        save_file(tensors, path)
        said = fuzzing.refused(lambda folder=folder: Run.load(folder), str(path))
        assert said is not None and name in said and "NaN or infinite" in said


def test_losses_over_training_that_are_none_are_named(
    images: Path, restored: Callable[[Path], None]
) -> None:
    path, run = images / "memorization.safetensors", Run.load(images)
    restored(path)
    whole = load_file(path)
    shape = whole["exposed"].shape
    for values in (
        {"exposed": whole["exposed"]},
        {name: torch.zeros(shape, dtype=torch.int64) for name in whole},
        {name: torch.zeros(0, shape[1]) for name in whole},
        {name: torch.full(shape, torch.nan) for name in whole},
        {"exposed": whole["exposed"], "hidden": torch.zeros(1, 1)},
    ):
        save_file(values, path)
        assert fuzzing.refused(lambda: memorization(run), str(path))


MODEL = torch.nn.Linear(3, 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(MODEL.state_dict(), path)
    return path


def header(values: Any, held: bytes = b"\0" * 64) -> bytes:
    raw = fuzzing.json_text(values)
    return struct.pack("<Q", len(raw)) + raw + held


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        header({"weight": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 24]}}),
        header({"weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 2**40]}}),
        header({"weight": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}}, b"\0" * 3),
        header({"weight": {"dtype": "I32", "shape": [2, 3], "data_offsets": [0, 24]}}, b"\0" * 24),
        header([[]] * 100),
        b"",
        b"\x80\x02}q\x00.",
    ],
)
def test_headers_that_lie_are_refused(raw: bytes, small: Path) -> None:
    path = small.with_name("lying.safetensors")
    path.write_bytes(raw)
    assert fuzzing.refused(lambda: read_weights(path, MODEL.state_dict()), str(path))


@fuzzing.bounded(200)
@given(drawn=st.data())
def test_damaged_weights_fit_or_are_refused(small: Path, drawn: st.DataObject) -> None:
    path = small.with_name("damaged.safetensors")
    path.write_bytes(drawn.draw(fuzzing.damaged(small.read_bytes())))
    own = MODEL.state_dict()

    def load() -> None:
        found = read_weights(path, own)
        assert {name: value.shape for name, value in found.items()} == {
            name: value.shape for name, value in own.items()
        }
        assert all(torch.isfinite(value).all() for value in found.values())

    fuzzing.refused(load, str(path))


def test_a_tensor_that_is_not_there_is_refused(small: Path) -> None:
    with (
        pytest.raises(InputError, match=r"model\.safetensors: missing or damaged"),
        opened(small) as tensors,
    ):
        tensors.get_tensor("another")
    assert np.isfinite(read_weights(small, MODEL.state_dict())["weight"].numpy()).all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"classes": ["blue", "green"]}),
        ("config.json", {"classes": ["blue", "green", "red", "blue"]}),
        ("config.json", {"classes": "blue"}),
        ("classifier.json", {"mean": [0.5, 1e308, 0.5]}),
        ("classifier.json", {"deviation": [0.5, 0, 0.5]}),
        ("classifier.json", {"deviation": [0.5, 0.5]}),
        ("metrics.json", {"curves": {"steps": [0], "losses": {"train": [[1, 2], [3, 4]]}}}),
        ("metrics.json", {"seconds": None}),
    ],
)
def test_values_that_do_not_fit_the_model_are_refused(
    name: str, change: dict[str, Any], images: Path, restored: Callable[[Path], None]
) -> None:
    path = images / name
    restored(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    def report() -> None:
        run = Run.load(images)
        _write_report(Output(as_json=True), run, images / "report.html", texts=True)

    values = json.loads(path.read_text())
    values.pop("checksum", None)
    path.write_text(json.dumps(values))
    assert fuzzing.refused(report, str(path))
