"""Results whose description or chunks somebody else wrote: the same numbers, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("zarr")

import fuzzing
import tiny
import turnover
from turnover import Batch, open_result
from turnover.results.manifest import ATTRIBUTE, manifest_of, seal
from turnover.results.store import save

KINDS = ["dense", "top", "aggregate", "self"]


def estimated(kind: str) -> turnover.Result:
    model = tiny.randomise(tiny.mlp(bias=False))
    network = turnover.attach(model.eval(), ["mlp"], turnover.MaskSpec(seed=1))
    influence = turnover.Influence(network, turnover.objectives.margin, "linear", ghosts=1000)
    batch = Batch(tiny.features(4), tiny.labels(4), torch.arange(4))
    ids = torch.arange(10)
    if kind == "aggregate":
        return influence.aggregate([batch], ids)
    if kind == "self":
        return influence.self_influence([batch])
    return influence.estimate([batch], ids, **({"top": 3} if kind == "top" else {}))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("results")
    for kind in KINDS:
        save(folder / f"{kind}.zarr", estimated(kind))
    return {kind: folder / f"{kind}.zarr" for kind in KINDS}


@pytest.fixture(scope="module")
def copies(stored: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("copies")
    return {kind: Path(shutil.copytree(path, folder / path.name)) for kind, path in stored.items()}


def described(path: Path) -> dict[str, Any]:
    return json.loads((path / "zarr.json").read_text())


def reseal(path: Path, document: Any) -> None:
    """As somebody would who knows the format: the checksum fits."""
    try:
        raw = seal(document, manifest_of(document))
    except (KeyError, TypeError, ValueError, AttributeError):
        raw = fuzzing.json_text(document)
    (path / "zarr.json").write_bytes(raw)


def loaded(path: Path) -> turnover.Result:
    found = open_result(path).load()
    assert np.isfinite(found.scores).any() and found.z.shape == found.q.shape == found.scores.shape
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_that_is_sealed_anew_is_read(kind: str, copies: dict[str, Path]) -> None:
    before = loaded(copies[kind])
    reseal(copies[kind], described(copies[kind]))
    tiny.assert_same(before, loaded(copies[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_description_that_says_something_else_is_refused_or_read(
    kind: str, stored: dict[str, Path], copies: dict[str, Path]
) -> None:
    path, whole = copies[kind], described(stored[kind])

    @fuzzing.bounded(200)
    @given(document=fuzzing.changed(whole))
    def any_description(document: Any) -> None:
        reseal(path, document)
        fuzzing.refused(lambda: open_result(path).load(), str(path))

    any_description()


@pytest.mark.parametrize("kind", ["dense", "self"])
def test_damaged_bytes_of_a_result_are_named_or_change_nothing(
    kind: str, stored: dict[str, Path], copies: dict[str, Path]
) -> None:
    path, before = copies[kind], loaded(stored[kind])
    shutil.copy(stored[kind] / "zarr.json", path / "zarr.json")
    files = [one.relative_to(path) for one in sorted(path.rglob("*")) if one.is_file()]

    @fuzzing.bounded(100)
    @given(drawn=st.data())
    def any_damage(drawn: st.DataObject) -> None:
        name = drawn.draw(st.sampled_from(files))
        whole = (stored[kind] / name).read_bytes()
        try:
            (path / name).write_bytes(drawn.draw(fuzzing.damaged(whole)))
            found: list[turnover.Result] = []
            if fuzzing.refused(lambda: found.append(loaded(path)), str(path)) is None:
                tiny.assert_same(before, found[0])
        finally:
            (path / name).write_bytes(whole)

    any_damage()


def change_shape(array: dict[str, Any]) -> None:
    array["shape"] = [2**40, *array["shape"][1:]]
    array["chunk_grid"]["configuration"]["chunk_shape"][0] = 1


def change_chunks(array: dict[str, Any]) -> None:
    array["chunk_grid"]["configuration"]["chunk_shape"] = [2**20, 2**20]


def change_codec(array: dict[str, Any]) -> None:
    array["codecs"][1]["name"] = "blosc"


def change_type(array: dict[str, Any]) -> None:
    array["data_type"] = "int32"


def change_dims(array: dict[str, Any]) -> None:
    array["dimension_names"] = ["target", "target"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_shape, "chunks"),
        (change_chunks, "chunks of more than 1 GiB"),
        (change_codec, "blosc"),
        (change_type, "cannot be int32"),
        (change_dims, "one dimension twice"),
    ],
)
def test_arrays_that_no_result_has_are_refused_before_they_are_opened(
    change: Callable[[dict[str, Any]], None], said: str, copies: dict[str, Path]
) -> None:
    path = copies["dense"]
    document = described(path)
    whole = (path / "zarr.json").read_bytes()
    change(document["consolidated_metadata"]["metadata"]["score"])
    reseal(path, document)
    found = fuzzing.refused(lambda: open_result(path), str(path))
    (path / "zarr.json").write_bytes(whole)
    assert found is not None and said in found


@pytest.mark.parametrize("missing", ["score", "noise_floor", "null", "train"])
def test_a_result_without_what_it_is_made_of_is_refused(
    missing: str, copies: dict[str, Path]
) -> None:
    path = copies["dense"]
    document = described(path)
    whole = (path / "zarr.json").read_bytes()
    del document["consolidated_metadata"]["metadata"][missing]
    reseal(path, document)
    found = fuzzing.refused(lambda: open_result(path), str(path))
    (path / "zarr.json").write_bytes(whole)
    assert found is not None and f"{missing} must have the dimensions" in found


def test_a_mark_without_a_manifest_is_refused(copies: dict[str, Path]) -> None:
    path = copies["aggregate"]
    document = described(path)
    for begun_with in ([], None, 1, {}):
        document["attributes"][ATTRIBUTE]["manifest"] = begun_with
        raw = seal(document, {}) if begun_with == {} else json.dumps(document).encode()
        (path / "zarr.json").write_bytes(raw)
        assert fuzzing.refused(lambda: open_result(path), str(path))


@pytest.mark.parametrize(
    "change",
    [
        {"fill_value": None},
        {"storage_transformers": True},
        {"chunk_key_encoding": None},
        {"codecs": [{"name": "bytes", "configuration": 1}]},
        {"node_type": "group"},
        {"zarr_format": 2},
    ],
)
def test_an_array_that_zarr_does_not_open_is_named(
    change: dict[str, Any], copies: dict[str, Path]
) -> None:
    path = copies["dense"]
    document = described(path)
    whole = (path / "zarr.json").read_bytes()
    document["consolidated_metadata"]["metadata"]["score"] |= change
    reseal(path, document)
    found = fuzzing.refused(lambda: open_result(path).load(), str(path))
    (path / "zarr.json").write_bytes(whole)
    assert found is not None
