"""Files as nobody writes them: bytes that are damaged, and JSON values that are of another kind."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from turnover import InputError

DEEP = "[" * 100_000 + "]" * 100_000
STRANGE: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 1.5, float("nan"), float("inf")),
    *("", "x", "\ud800", "\0", "../../etc/passwd", "/dev/zero", "float64", "1", "é" * 300),
    *([], {}, [[]], [None], ["x"], [-1, 2**70], {"x": 1}, [1e308] * 3),
]


def damaged(raw: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with some flipped, cut out, put in, or twice; or cut off."""
    places = st.integers(0, max(0, len(raw) - 1))
    pieces = st.binary(min_size=1, max_size=12)

    def flip(at: int, mask: int) -> bytes:
        return raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :]

    def put(at: int, piece: bytes) -> bytes:
        return raw[:at] + piece + raw[at:]

    def over(at: int, piece: bytes) -> bytes:
        return raw[:at] + piece + raw[at + len(piece) :]

    def without(at: int, length: int) -> bytes:
        return raw[:at] + raw[at + length :]

    def twice(at: int, length: int) -> bytes:
        return raw[: at + length] + raw[at:]

    lengths = st.integers(1, 200)
    return st.one_of(
        st.builds(flip, places, st.integers(1, 255)),
        st.builds(put, places, pieces),
        st.builds(over, places, pieces),
        st.builds(without, places, lengths),
        st.builds(twice, places, lengths),
        places.map(lambda at: raw[:at]),
    )


def strange(values: Any) -> st.SearchStrategy[Any]:
    """A JSON value of which one part is another, missing or put in."""
    paths = list(_paths(values, ()))

    def changed(path: tuple[Any, ...], how: str, other: Any) -> Any:
        result = copy.deepcopy(values)
        if not path:
            return other
        parent = result
        for key in path[:-1]:
            parent = parent[key]
        if how == "other":
            parent[path[-1]] = other
        elif how == "missing":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.insert(path[-1], other)
        else:
            parent["more"] = other
        return result

    hows = st.sampled_from(["other", "other", "missing", "more"])
    return st.builds(changed, st.sampled_from(paths), hows, st.sampled_from(STRANGE))


def _paths(values: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _paths(value, (*path, key))
    elif isinstance(values, list):
        for index, value in enumerate(values[:5]):
            yield from _paths(value, (*path, index))


def written(values: Any) -> bytes:
    return json.dumps(values).encode()


def refused(act: Callable[[], Any], *names: str) -> bool:
    """Whether it was refused, naming one of the files; anything but a refusal comes through."""
    try:
        act()
    except InputError as error:
        said = str(error)
        assert not names or any(name in said for name in names), said
        assert "\n" not in said and len(said) < 2000, said
        return True
    return False
