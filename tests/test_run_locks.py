"""Who may write a run: fits that begin at once, wait, end or are cut off, and what scores it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("filelock")

from test_store import wait_for
from turnover import InputError
from turnover.io.files import alone
from turnover.runs import run as runs
from turnover.runs.run import writing_run

WRITTEN = "is being written by another process; wait for it to end"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "mine"


def fit(folder: Path, weights: str, **options: bool) -> None:
    with writing_run(folder, **({"overwrite": True} | options)) as draft:
        (draft / "masks.json").write_text("{}")
        (draft / "model.safetensors").write_text(weights)


def weights(folder: Path) -> str:
    return (folder / "model.safetensors").read_text()


def hidden(folder: Path) -> list[str]:
    """What was left beside a run."""
    return [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


@contextmanager
def scoring(folder: Path) -> Iterator[None]:
    lock = folder / "results" / ".lock"
    with alone(lock, str(folder)):
        yield
        lock.unlink()


def test_a_fit_that_waits_for_what_scores_the_run_keeps_others_out(folder: Path) -> None:
    fit(folder, "old")
    first = threading.Thread(target=fit, args=(folder, "first"))
    draft = folder.with_name(".mine.partial")
    with scoring(folder):
        first.start()
        wait_for(lambda: (draft / "model.safetensors").exists())
        for options in ({}, {"overwrite": False}):
            with pytest.raises(InputError, match=WRITTEN if not options else "--overwrite"):
                fit(folder, "second", **options)
        assert weights(folder) == "old" and weights(draft) == "first"
    first.join(20)
    assert weights(folder) == "first" and hidden(folder) == []


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_fit_that_begins_as_another_one_ends_replaces_it_only_if_asked_to(
    overwrite: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, first = runs.check_new_run, iter([lambda: fit(folder, "first")])

    def slow(*given: Path, **options: bool) -> None:
        check(*given, **options)
        next(first, lambda: None)()  # it ends between the question and the lock

    monkeypatch.setattr(runs, "check_new_run", slow)
    if overwrite:
        fit(folder, "second")
        assert weights(folder) == "second"
    else:
        with pytest.raises(InputError, match="pass --overwrite"):
            fit(folder, "second", overwrite=False)
        assert weights(folder) == "first"
    assert hidden(folder) == []


def test_of_many_fits_at_once_one_is_let_in_at_a_time(folder: Path) -> None:
    inside, refused, most = [], [], []
    start = threading.Barrier(8)

    def one(name: str) -> None:
        start.wait()
        try:
            with writing_run(folder, overwrite=True) as draft:
                inside.append(name)
                most.append(len(inside))
                (draft / "masks.json").write_text("{}")
                (draft / "model.safetensors").write_text(name)
                assert weights(draft) == name
                inside.remove(name)
        except InputError as error:
            assert WRITTEN in str(error)  # noqa: PT017
            refused.append(name)

    threads = [threading.Thread(target=one, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(refused) < 8 and max(most) == 1
    assert weights(folder) not in refused and hidden(folder) == []


def test_a_lock_that_its_holder_removes_lets_one_in_at_a_time(tmp_path: Path) -> None:
    inside, most, lock = [], [], tmp_path / ".lock"

    def some() -> None:
        for _ in range(20):
            with alone(lock, "it", wait=True):
                inside.append(0)
                most.append(len(inside))
                inside.pop()
                lock.unlink()

    threads = [threading.Thread(target=some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(most) == 80 and max(most) == 1


def cut_off(folder: Path, *, kept: tuple[str, ...] = (), left: tuple[str, ...] = ()) -> set[str]:
    """A fit that is killed after it has written some files; what it had found there."""
    with suppress(KeyboardInterrupt), writing_run(folder, overwrite=False, kept=kept) as draft:
        found = {path.name for path in draft.iterdir()}
        for name in left:
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text("another's")
        raise KeyboardInterrupt
    return found


def test_what_another_fit_left_is_no_part_of_the_run(folder: Path) -> None:
    kept, checkpoint = "memorization.safetensors", "turnover.checkpoint"
    left = (kept, checkpoint, "without_turnover/model.safetensors", "train.npy", ".unfinished")
    assert cut_off(folder, left=left) == set()
    assert hidden(folder) == [".mine.partial"]
    assert cut_off(folder, kept=(kept,)) == {kept, checkpoint}
    assert cut_off(folder) == {checkpoint}
    with writing_run(folder, overwrite=False) as draft:
        (draft / checkpoint).unlink()
        (draft / "masks.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["masks.json"] and hidden(folder) == []


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt, MemoryError])
def test_a_fit_that_fails_lets_the_next_one_in(error: type[BaseException], folder: Path) -> None:
    with pytest.raises(error), writing_run(folder, overwrite=False):
        raise error("here")
    assert ".mine.lock" not in hidden(folder)
    fit(folder, "next", overwrite=False)
    assert weights(folder) == "next" and hidden(folder) == []


def test_a_lock_of_a_killed_fit_keeps_nobody_out(folder: Path) -> None:
    for name in (".mine.lock", ".mine.partial/.lock", ".mine.partial/turnover.checkpoint"):
        (folder.parent / name).parent.mkdir(exist_ok=True)
        (folder.parent / name).touch()
    fit(folder, "next", overwrite=False)
    assert weights(folder) == "next" and hidden(folder) == []


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / ".mine.partial").touch()
    for place in (tmp_path / "file" / "mine", tmp_path / "mine"):
        with pytest.raises(InputError, match="mine cannot be written"):
            fit(place, "any", overwrite=False)
