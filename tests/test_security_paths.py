"""Names and paths in what somebody else made lead nowhere else: runs, results, images."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("PIL")

from test_cli import data, encoder  # noqa: F401 - fixtures
from test_cli import run as text_run  # noqa: F401 - a fixture
from test_images import folder_of, folders  # noqa: F401 - a fixture
from test_images import run as image_run  # noqa: F401 - a fixture
from test_security import copy, copy_of_images  # noqa: F401 - fixtures
from turnover import InputError, open_result
from turnover.data.images import read_images
from turnover.io.parsing import write_json
from turnover.runs.run import Run, write_digests

_OPENED: list[str] = []
_LISTENING = False


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _LISTENING and event == "open" and isinstance(arguments[0], str | bytes):
        _OPENED.append(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode())


sys.addaudithook(_note)  # there is no taking it off again


@contextmanager
def opening() -> Iterator[list[str]]:
    """The names of files that Python opens while the body runs."""
    global _LISTENING
    _OPENED.clear()
    _LISTENING = True
    try:
        yield _OPENED
    finally:
        _LISTENING = False


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "secret.json"
    path.parent.mkdir()
    path.write_text('{"model_type": "bert", "architectures": ["secret"]}')
    return path


@pytest.mark.parametrize("absolute", [True, False])
def test_a_path_in_the_description_of_a_model_is_not_followed(
    absolute: bool,
    copy: Path,  # noqa: F811
    copy_of_images: Path,  # noqa: F811
    secret: Path,
) -> None:
    for folder in (copy, copy_of_images):
        path = str(secret) if absolute else f"../../{secret.parent.name}/{secret.name}"
        described = json.loads((folder / "classifier.json").read_text())
        field = "weights" if folder == copy_of_images else "model"
        described["classifier"][field] = path
        (folder / "classifier.json").write_text(json.dumps(described))
        write_digests(folder)
        with opening() as opened:
            if field == "weights":  # weights were none: the network is another one
                with pytest.raises(InputError, match="missing or damaged"):
                    Run.load(folder)
            else:
                Run.load(folder)
        assert opened and not any("secret.json" in one for one in opened)


@pytest.mark.parametrize("name", ["../../elsewhere/secret.json", "score/../../x", "/etc", ".."])
def test_an_array_that_lies_outside_its_result_is_not_read(
    name: str,
    copy: Path,  # noqa: F811
    secret: Path,
) -> None:
    path = copy / "results" / "aggregate.zarr" / "zarr.json"
    described = json.loads(path.read_text())
    arrays = described["consolidated_metadata"]["metadata"]
    arrays[name] = arrays["score"]
    path.write_text(json.dumps(described))
    with opening() as opened:
        try:
            result = open_result(path.parent)
            result.part(name)
            result.dataset.load()
        except (InputError, ValueError):
            pass
        else:
            raise AssertionError("it was read as a part of the result")
    inside = str(copy.resolve())
    assert not any("secret" in one for one in opened)
    zarrs = [one for one in opened if ".zarr" in one]
    assert zarrs and all(str(Path(one).resolve()).startswith(inside) for one in zarrs)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "photos", 2)


@pytest.fixture
def private(tmp_path: Path, photos: Path) -> Path:
    folder = tmp_path / "private"
    folder.mkdir()
    return Path(shutil.copy(photos / "red" / "000.png", folder / "mine.png"))


def test_links_within_a_folder_of_images_are_followed(photos: Path) -> None:
    (photos / "red" / "again.png").symlink_to("../red/000.png")
    (photos / "crimson").symlink_to("red")
    assert len(read_images(str(photos), 32)) == 3 * 2 + 1 + 3
    (photos.parent / "link").symlink_to(photos)
    assert len(read_images(str(photos.parent / "link"), 32)) == 3 * 2 + 1 + 3


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_out_of_a_folder_of_images_are_refused(
    what: str, absolute: bool, photos: Path, private: Path
) -> None:
    target = private if what == "file" else private.parent
    link = photos / "red" / "999.png" if what == "file" else photos / "yellow"
    link.symlink_to(target if absolute else os.path.relpath(target, link.parent))
    named = link if what == "file" else link / "mine.png"
    with opening() as opened, pytest.raises(InputError, match="leads out of") as refused:
        read_images(str(photos), 32)
    assert str(named) in str(refused.value)
    assert not any("mine.png" in one for one in opened)


def table_of_paths(folder: Path, paths: list[Path]) -> Path:
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": None, "path": str(path)} for path in paths]
    labels = ["a" if i % 2 else "b" for i in range(len(paths))]
    out = folder / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": labels}), out)
    return out


def test_paths_in_a_table_that_lead_out_of_its_folder_are_refused(
    photos: Path, private: Path
) -> None:
    own = [photos / "red" / "000.png", photos / "blue" / "001.png"]
    assert len(read_images(str(table_of_paths(photos, own)), 32)) == 2
    for path in (private, photos / "red" / ".." / ".." / "private" / "mine.png", Path("/dev/zero")):
        table = table_of_paths(photos, [*own, path])
        with opening() as opened, pytest.raises(InputError, match="row 3") as refused:
            read_images(str(table), 32)
        assert "leads out of" in str(refused.value)
        assert not any("mine.png" in one or "/dev/zero" in one for one in opened)


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("name", ["fit.toml", "encoder", "results/aggregate.zarr/score", "new"])
def test_links_out_of_a_run_are_refused(
    name: str,
    absolute: bool,
    copy: Path,  # noqa: F811
    secret: Path,
) -> None:
    link = copy / name
    target = secret if name == "fit.toml" else secret.parent
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(target if absolute else os.path.relpath(target, link.parent))
    with opening() as opened, pytest.raises(InputError, match="leads out of") as refused:
        Run.load(copy)
    assert str(link) in str(refused.value)
    assert not any("secret" in one for one in opened)


def test_links_within_a_run_are_followed(copy: Path) -> None:  # noqa: F811
    (copy / "test.jsonl").rename(copy / "results" / "held.jsonl")
    (copy / "test.jsonl").symlink_to("results/held.jsonl")
    (copy.parent / "link").symlink_to(copy)
    Run.load(copy.parent / "link")


def test_a_pipe_or_device_is_not_written_over(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="a device or a pipe; give the path of a file"):
        write_json(pipe, {"a": 1})
    assert stat.S_ISFIFO(pipe.stat().st_mode) and list(tmp_path.iterdir()) == [pipe]
