"""Results that are damaged, or made to do harm: refused by name, in bounded time and memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzzing
import test_store
import tiny
from turnover import InputError, open_result
from turnover.influence.begun import seal
from turnover.influence.chunks import unpacked_bytes

many = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
KINDS = {"dense": test_store.DENSE, "top": test_store.TOP}


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "result.zarr"
    test_store.save(folder, test_store.expected(KINDS[request.param]))
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "result.zarr"))


def resealed(values: Any) -> bytes:
    """As somebody writes it who knows the checksum."""
    try:
        return seal(values, values["attributes"]["turnover"]["manifest"])
    except (KeyError, TypeError, AttributeError, ValueError):
        return fuzzing.written(values)


def load(folder: Path) -> Any:
    result = open_result(folder).load()
    return result.z, result.q, result.train_ids


@many
@given(st.data())
def test_a_description_of_another_kind_is_refused(copy: Path, data: st.DataObject) -> None:
    root = copy / "zarr.json"
    before = root.read_bytes()
    root.write_bytes(resealed(data.draw(fuzzing.strange(json.loads(before)))))
    fuzzing.refused(lambda: load(copy), str(copy))
    root.write_bytes(before)


@many
@given(st.data())
def test_damaged_bytes_are_refused_or_change_nothing(copy: Path, data: st.DataObject) -> None:
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    path = data.draw(st.sampled_from(files))
    before = path.read_bytes()
    path.write_bytes(data.draw(fuzzing.damaged(before)))
    if not fuzzing.refused(lambda: load(copy), str(copy)):
        name = "top" if "train_id" in {p.name for p in copy.iterdir()} else "dense"
        tiny.assert_same(open_result(copy).load(), test_store.expected(KINDS[name]))
    path.write_bytes(before)


def test_a_chunk_that_would_fill_the_memory_is_refused(copy: Path) -> None:
    from numcodecs import Zstd

    path = copy / "score" / "c" / "0" / "0"
    bomb = Zstd(level=1).encode(bytes(2**31 - 2**16))
    assert len(bomb) < 2**20
    path.write_bytes(bomb + google_crc32c.value(bomb).to_bytes(4, "little"))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"score/c/0/0 is damaged .* where 1073741824 is the most"):
        load(copy)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


@given(st.binary(min_size=1, max_size=300), st.sampled_from([1, 10, 1000]))
def test_a_frame_says_how_large_it_is_unpacked(piece: bytes, times: int) -> None:
    from numcodecs import Zstd

    raw = piece * times
    assert unpacked_bytes(Zstd().encode(raw)) == len(raw)


@given(st.binary(max_size=20))
def test_what_is_no_frame_says_nothing(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"Zstandard|does not say"):
        unpacked_bytes(raw)


def test_chunks_of_any_size_are_not_believed(copy: Path) -> None:
    root = copy / "zarr.json"
    values = json.loads(root.read_bytes())
    score = values["consolidated_metadata"]["metadata"]["score"]
    score["shape"] = [2**20, 2**20]
    score["chunk_grid"]["configuration"]["chunk_shape"] = [2**20, 2**20]
    root.write_bytes(resealed(values))
    with pytest.raises(InputError, match="delete it and estimate again"):
        load(copy)


@pytest.mark.parametrize("name", ["zarr.json", "score/c/0/0"])
def test_a_link_out_of_a_result_is_refused(name: str, copy: Path, tmp_path: Path) -> None:
    inside = tmp_path / "elsewhere"
    (copy / name).rename(inside)
    (copy / name).symlink_to(inside)
    with pytest.raises(InputError, match="leads out of"):
        load(copy)


def test_a_result_may_be_reached_by_a_link(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    load(tmp_path / "link")


@pytest.mark.parametrize("name", ["zarr.json", "score/c/0/0"])
def test_a_pipe_in_place_of_a_file_is_refused(name: str, copy: Path) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(InputError, match="a device or a pipe"):
        load(copy)


DEEP = """
import sys
from turnover import InputError, open_result
try:
    open_result(sys.argv[1])
except InputError as error:
    print(error)
"""


def test_a_description_that_is_nested_without_end_is_refused(copy: Path) -> None:
    (copy / "zarr.json").write_text(fuzzing.DEEP)
    source = str(Path(__file__).parents[1] / "src")
    done = subprocess.run(
        [sys.executable, "-c", DEEP, copy],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
        check=True,
    )
    assert "nested too deeply" in done.stdout
