"""Damaged and hostile files: what a file is changed into, and what may come of it."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from turnover import InputError

SECONDS = 20
"""What no damaged file may take longer than."""


def bounded(examples: int) -> settings:
    """The same examples each time, and so many; others, and TURNOVER_FUZZ times as many, where it is set."""
    times = int(os.environ.get("TURNOVER_FUZZ", "1"))
    return settings(
        max_examples=examples * times,
        derandomize=times == 1,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


class Late(BaseException):
    """What no reader catches."""


HOSTILE = [
    *(b"", b"\0", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b"null", b"[]", b"{}"),
    *(b'"\\ud800"', b"1" * 5000, b"1e999", b"\xef\xbb\xbf{}", b"[[[]]]", b'{"":{}}', b"\n\n\n"),
]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400]),
    st.sampled_from([0.5, -0.0, 1e308, float("nan"), float("inf")]),
    st.sampled_from(["", "\0", "..", "/etc/passwd", "\ud800", "é" * 300, "NaN", "1e999"]),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.sampled_from(["a", "", "name", ".."]), SCALARS, max_size=3),
    st.integers(1, 200).map(lambda depth: _nested(depth)),
)


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file's bytes with bits flipped, a part cut out or put in, or something else altogether."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "head", "hostile", "any"]))
    at = draw(st.integers(0, max(0, len(whole) - 1)))
    if kind == "hostile" or not whole:
        return draw(st.sampled_from(HOSTILE))
    if kind == "any":
        return draw(st.binary(max_size=64))
    if kind == "flip":
        changed = bytearray(whole)
        for _ in range(draw(st.integers(1, 8))):
            changed[draw(st.integers(0, len(whole) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    length = draw(st.integers(1, 64))
    if kind == "cut":
        return whole[:at] + whole[at + length :]
    if kind == "head":
        return whole[:at]
    if kind == "repeat":
        return whole[:at] + whole[at : at + length] * draw(st.integers(2, 50)) + whole[at:]
    put = draw(st.one_of(st.binary(min_size=1, max_size=16), st.sampled_from(HOSTILE)))
    return whole[:at] + put + whole[at:]


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one place in it removed, or holding something else."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(range(len(value)) if isinstance(value, list) else list(value)))
        copy = list(value) if isinstance(value, list) else dict(value)
        if draw(st.integers(0, 5)):
            copy[key] = draw(changed(value[key]))
        else:
            del copy[key]
        return copy
    return draw(VALUES)


def json_text(value: Any) -> bytes:
    return json.dumps(value).encode()


@contextmanager
def limited(seconds: int = SECONDS, gib: int = 6) -> Iterator[None]:
    """The body may not hang, nor take memory beside what the process has."""

    def late(*_: object) -> None:
        raise Late(f"it took more than {seconds} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + gib * 2**30, before[1]))
    earlier = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused(act: Callable[[], object], *named: str) -> str | None:
    """What a call refuses its input with, where it does; anything else it raises is a failure.

    Args:
        named: one of these must be in the message.
    """
    try:
        with limited():
            act()
    except InputError as error:
        said = str(error)
        assert any(one in said for one in named), f"{named[0]} is not named in: {said[:500]}"
        return said
    return None
