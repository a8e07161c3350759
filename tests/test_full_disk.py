"""A disk that is full, or may not be written: it is said, nothing is lost, and the same call goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pillow is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("typer", reason="typer is not installed")

import test_store
import tiny
from test_cli import data, encoder, fit_arguments, turnover  # noqa: F401 - fixtures
from test_images import folders, run  # noqa: F401 - fixtures: a run of images, with its results
from turnover import Influence, InputError
from turnover.data.images import read_images
from turnover.errors import WriteError
from turnover.evaluation import Recipe, Retraining, draw_subsets, retrain
from turnover.influence.gram.disk import Limits
from turnover.io.files import mapped
from turnover.io.parsing import write_json
from turnover.runs.run import Run
from turnover.view.decisions import Decisions

FULL = "No space left on device; make room there, and run again"
READ_ONLY = "cannot be written: Read-only file system; make it writable, and run again"


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path, self._filler = path, path / "filler"

    def fill(self, *, leave: int = 0) -> None:
        """All but ``leave`` bytes, in whole pages."""
        with self._filler.open("wb", buffering=0) as file:
            with suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            file.truncate(max(0, file.tell() - leave))

    def free(self) -> None:
        self._filler.unlink()

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", self.path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    made = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", path], capture_output=True
    )
    if not made or made.returncode:
        pytest.skip("a small file system cannot be mounted here (only root can)")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", path], check=True)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_result_goes_on_once_there_is_room(disk: Disk, tmp_path: Path) -> None:
    test_store.write(tmp_path / "whole")
    folder, whole = disk.path / "result", contents(tmp_path / "whole")
    room = 0
    while True:
        disk.fill(leave=room)
        try:
            test_store.write(folder)
            break
        except InputError as error:
            assert isinstance(error, WriteError) and FULL in str(error)  # noqa: PT017
        room = 4 * 4096  # a few files each time
        with pytest.raises(InputError, match=r"not finished: repeat|there is no result"):
            test_store.open_result(folder)
        # What another thread was still writing is no chunk, and nobody reads it.
        kept = {k: v for k, v in contents(folder).items() if not k.endswith(".partial")}
        assert all(whole[name] == kept[name] for name in kept if name.startswith("score/c/"))
    assert contents(folder) == whole


def test_a_result_that_does_not_fit_leaves_the_one_that_is_there(disk: Disk) -> None:
    folder = disk.path / "result"
    test_store.save(folder, test_store.expected())
    before = contents(folder)
    disk.fill(leave=5 * 4096)
    with pytest.raises(WriteError, match=FULL):
        test_store.save(folder, test_store.expected(test_store.TOP))
    assert contents(folder) == before
    disk.free()
    test_store.save(folder, test_store.expected(test_store.TOP))
    tiny.assert_same(test_store.open_result(folder).load(), test_store.expected(test_store.TOP))


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits of a process are Unix's")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    test_store.save(tmp_path / "result", test_store.expected())
    before = contents(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    try:
        with pytest.raises(WriteError, match="File too large; make room there, and run again"):
            test_store.save(tmp_path / "result", test_store.expected(test_store.TOP))
        with pytest.raises(WriteError, match="File too large; make room there, and run again"):
            write_json(tmp_path / "large.json", {"text": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    draft = {name for name in contents(tmp_path) if name.startswith(".")}
    assert {k: v for k, v in contents(tmp_path).items() if k not in draft} == before
    test_store.save(tmp_path / "result", test_store.expected(test_store.TOP))
    tiny.assert_same(
        test_store.open_result(tmp_path / "result").load(), test_store.expected(test_store.TOP)
    )


def fit_of(kind: str, request: pytest.FixtureRequest, out: Path) -> list[object]:
    if kind == "images":
        train, test = request.getfixturevalue("folders")
        arguments = ["fit", train, "--model", "vgg11", "--width", 4, "--hidden", 64, "--epochs", 2]
        return [*arguments, "--test", test, "--batch-size", 12, "--memorization", "--out", out]
    train, test = request.getfixturevalue("data")
    return fit_arguments(train, request.getfixturevalue("encoder"), out, "--test", test)


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_fit_goes_on_once_there_is_room(
    kind: str, disk: Disk, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    turnover(*fit_of(kind, request, tmp_path / "whole"))
    whole, refused = contents(tmp_path / "whole"), set()
    # Room for some of the files that a fit leaves, the larger ones of which it writes first.
    rooms = np.cumsum([0, *(4096 * -(-len(raw) // 4096) for raw in whole.values())])
    for room in [*rooms[:-1:2].tolist(), sum(map(len, whole.values())) + 2**21]:
        disk.fill(leave=room)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(tmp_path))
            done = attempt(*fit_of(kind, request, disk.path / "run"))
        if done is None:
            break
        assert FULL in done
        refused.add(done)
        assert not (disk.path / "run").exists()
    assert len(refused) > 2
    made = contents(disk.path / "run")
    assert made.keys() == whole.keys()
    timed = {"metrics.json", "fit.toml"}
    assert all(made[name] == whole[name] for name in whole.keys() - timed)


def attempt(*arguments: object) -> str | None:
    """What a command says that ends with code 2; nothing where it ends well."""
    try:
        return turnover(*arguments, expect=2).stderr
    except AssertionError as error:
        assert "0 or 0" in str(error), error  # noqa: PT017
        return None


@pytest.fixture
def small(run: Path, disk: Disk) -> Path:  # noqa: F811
    return Path(shutil.copytree(run, disk.path / "run"))


COMMANDS = {
    "influence": ("--ghosts", 1000),
    "explain": ("--show", 0),
    "memorize": ("--show", 0),
    "predict": ("--hidden",),
    "review": (),
    "report": (),
}


@pytest.mark.parametrize("how", ["full", "read-only"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_cannot_write_stays_as_it_was(
    command: str, how: str, disk: Disk, small: Path
) -> None:
    arguments = (command, small, *COMMANDS[command])
    turnover(*arguments)
    before = contents(small)
    if how == "full":
        disk.fill()
        assert FULL in turnover(*arguments, expect=2).stderr
        disk.free()
    else:
        disk.remount("ro")
        assert READ_ONLY in turnover(*arguments, expect=2).stderr
        disk.remount("rw")
    timed = {"metrics.json", "results/.lock"}
    after = contents(small)
    assert all(after.get(name) == before[name] for name in before.keys() - timed)
    # What influence goes on from.
    assert all("/." in name for name in after.keys() - before.keys())
    turnover(*arguments)
    again = contents(small)
    assert {name: again[name] for name in before.keys() - timed} == {
        name: before[name] for name in before.keys() - timed
    }
    json.loads(again["metrics.json"])


def test_gram_says_that_the_temporary_folder_is_full(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    network, batches = tiny.mlp(), [(tiny.features(200), tiny.labels(200), torch.arange(200))]
    for limits, room in ((Limits(memory=0), 0), (Limits(rows=10, landmarks=5), 2**14)):
        gram = Influence(network, method="gram")
        gram._driver._limits = limits
        disk.fill(leave=room)
        with pytest.raises(WriteError, match=f"temporary folder {disk.path}.*TMPDIR.*{FULL}"):
            gram.fit(batches)
        disk.free()
        gram.fit(batches)


def test_retraining_keeps_what_it_has_finished_when_the_disk_is_full(disk: Disk) -> None:
    inputs, labels = tiny.features(20), tiny.labels(20)
    subsets = draw_subsets(20, 4)
    recipe = Recipe(epochs=1, batch_size=5, learning_rate=0.1)

    def train(cache: Path | None) -> np.ndarray:
        retraining = Retraining(
            lambda seed: tiny.randomise(tiny.mlp(), seed),
            *(inputs, labels, recipe, inputs[:3]),
            cache=cache,
        )
        return retrain(retraining, subsets, [1])

    (disk.path / "cache").mkdir()
    disk.fill(leave=2 * 4096)
    with pytest.raises(WriteError, match=FULL):
        train(disk.path / "cache")
    kept = contents(disk.path / "cache")
    assert len(kept) == 2 and all(name.endswith(".safetensors") for name in kept)
    disk.free()
    np.testing.assert_array_equal(train(disk.path / "cache"), train(None))
    assert kept.items() < contents(disk.path / "cache").items()


def test_a_decision_that_cannot_be_written_is_not_taken(disk: Disk, small: Path) -> None:
    decisions = Decisions(Run.load(small), {})
    decisions.set(1, "keep")
    for write, mend, said in (
        (disk.fill, disk.free, FULL),
        (lambda: disk.remount("ro"), lambda: disk.remount("rw"), "Read-only file system"),
    ):
        write()
        with pytest.raises(InputError, match=said):
            decisions.set(2, "remove")
        assert decisions.all() == {1: "keep"}
        mend()
    assert decisions.set(2, "remove") == {1: "keep", 2: "remove"}


def test_images_say_that_the_temporary_folder_is_full(
    disk: Disk,
    folders: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    pixels = np.zeros((200, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", image=pixels, label=np.arange(200) % 2)
    for source in (folders[0], tmp_path / "a.npz"):
        for room in (0, 2**16):  # the second is for a part of the pixels
            disk.fill(leave=room)
            with pytest.raises(WriteError, match=f"temporary folder {disk.path}.*TMPDIR.*{FULL}"):
                read_images(str(source), 64)
            disk.free()
    assert len(read_images(str(folders[0]), 64)) == 36
    said = ("fit", folders[0], "--model", "vgg11", "--image-size", 64, "--out", tmp_path / "run")
    disk.fill()
    assert FULL in turnover(*said, expect=2).stderr
    assert not list(tmp_path.glob(".run*")) and not (tmp_path / "run").exists()


def test_a_map_takes_its_room_where_files_cannot_be_allocated(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    for how in ("refused", "missing"):
        if how == "refused":
            monkeypatch.setattr(os, "posix_fallocate", unsupported)
        else:
            monkeypatch.delattr(os, "posix_fallocate")
        disk.fill(leave=2**20)
        with (
            pytest.raises(OSError, match="No space left"),
            (disk.path / how).open("w+b") as file,
        ):
            mapped(file, (2**20,), np.float32)
        (disk.path / how).unlink()
        disk.free()
        with (disk.path / how).open("w+b") as file:
            file.write(b"head")
            values = mapped(file, (2**20,), np.float32)
        assert (disk.path / how).stat().st_blocks * 512 >= 2**22
        assert not values.any()
        values[-1] = 1
        (disk.path / how).unlink()


@pytest.mark.parametrize("gone", ["full", "removed"])
def test_without_a_temporary_folder_it_is_said(
    gone: str,
    folders: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    if gone == "full":
        monkeypatch.setattr(tempfile, "gettempdir", none)
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "removed"))
    with pytest.raises(WriteError, match=r"temporary folder .*TMPDIR"):
        read_images(str(folders[0]), 32)
    gram = Influence(tiny.mlp(), method="gram")
    gram._driver._limits = Limits(memory=0)
    with pytest.raises(WriteError, match=r"temporary folder .*TMPDIR"):
        gram.fit([(tiny.features(20), tiny.labels(20), torch.arange(20))])
