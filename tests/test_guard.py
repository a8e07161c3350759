"""Chunks of a result that would fill the memory, or are none: refused by name."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

import test_store
from turnover import InputError, open_result
from turnover.results.guard import decompressed_bytes


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    test_store.save(tmp_path / "result.zarr", test_store.expected())
    return tmp_path / "result.zarr"


def load(folder: Path) -> Any:
    result = open_result(folder).load()
    return result.z, result.q, result.train_ids


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
    assert decompressed_bytes(Zstd().encode(raw)) == len(raw)


@given(st.binary(max_size=20))
def test_what_is_no_frame_says_nothing(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"Zstandard|does not declare"):
        decompressed_bytes(raw)


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
