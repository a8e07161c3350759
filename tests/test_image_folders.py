"""Which files of a folder of images are read, and what is said of those that are not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("datasets")

from PIL import Image, features

from turnover import InputError
from turnover.data.images import read_image, read_images

PIXELS = np.arange(40 * 36 * 3, dtype=np.uint32).reshape(40, 36, 3).astype(np.uint8)


def put(path: Path, kind: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS).save(path, kind)
    return path


def other(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"something else")
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("cat/1.png", "dog/1.png"):
        put(tmp_path / "photos" / name)
    return tmp_path / "photos"


def test_hidden_folders_and_files_are_neither_classes_nor_images(photos: Path) -> None:
    for name in (
        ".ipynb_checkpoints/1-checkpoint.png",
        "cat/.ipynb_checkpoints/1-checkpoint.png",
        "cat/deep/.thumbnails/1.png",
        "cat/._1.png",
        "__MACOSX/cat/1.png",
        "dog/__MACOSX/1.png",
    ):
        put(photos / name)
    other(photos / ".DS_Store")
    other(photos / "cat" / ".DS_Store")
    data = read_images(str(photos), 32)  # a warning of ours would be an error
    assert data.classes == ["cat", "dog"] and data.names == ["cat/1.png", "dog/1.png"]


def test_a_folder_within_a_hidden_one_is_read(photos: Path) -> None:
    hidden = photos.parent / ".cache"
    photos.rename(hidden)
    assert len(read_images(str(hidden), 32)) == 2


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        *(("jfif", "JPEG"), ("jpe", "JPEG"), ("JPG", "JPEG"), ("pgm", "PPM"), ("pnm", "PPM")),
        *(("ppm", "PPM"), ("dib", "DIB"), ("apng", "PNG"), ("avif", "AVIF"), ("jp2", "JPEG2000")),
        *(("j2k", "JPEG2000"), ("webp", "WEBP")),
    ],
)
def test_images_of_many_endings_are_read(ending: str, kind: str, photos: Path) -> None:
    codec = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}.get(kind)
    if codec and not features.check(codec):
        pytest.skip(f"this Pillow is built without {codec}")
    put(photos / "cat" / f"2.{ending}", kind)
    data = read_images(str(photos), 32)
    assert data.names[1] == f"cat/2.{ending}"
    assert np.abs(data.image(1).astype(int) - data.image(0)).mean() < 30


def test_files_that_are_not_images_are_counted_by_ending(photos: Path) -> None:
    for name in ("cat/a.txt", "dog/b.TXT", "dog/deep/c.heic", "dog/README"):
        other(photos / name)
    wanted = (
        r"photos: 4 files are not images .* left out: \.txt \(2\), (\.heic|without an ending) \(1\)"
    )
    with pytest.warns(UserWarning, match=wanted) as said:
        assert len(read_images(str(photos), 32)) == 2
    assert len(said) == 1 and ".heic (1)" in str(said[0].message)


def test_files_beside_the_folders_of_the_classes_are_named(photos: Path) -> None:
    put(photos / "loose.png")
    other(photos / "labels.csv")
    with pytest.warns(
        UserWarning, match=r"2 files are beside .* left out: labels\.csv, loose\.png"
    ):
        read_images(str(photos), 32)
    for number in range(9):
        put(photos / f"{number}.png")
    with pytest.warns(UserWarning, match=r"11 files .*: 0\.png, .* 4\.png and 6 more"):
        read_images(str(photos), 32)


def test_a_class_without_an_image_is_refused(photos: Path) -> None:
    other(photos / "bird" / "1.heic")
    with pytest.raises(
        InputError, match=r"bird: no images of this class, only \.heic \(1\); put images"
    ):
        read_images(str(photos), 32)
    with pytest.raises(InputError, match=r"bird: no images of this class"):
        read_images(str(photos), 32, classes=["bird", "cat", "dog"])
    (photos / "bird" / "1.heic").unlink()
    with pytest.raises(InputError, match=r"bird: no images of this class, nothing"):
        read_images(str(photos), 32)
    # Test data may lack a class.
    assert len(read_images(str(photos), 32, classes=["bird", "cat", "dog"])) == 2


def test_a_folder_without_classes_says_what_it_holds(tmp_path: Path) -> None:
    put(tmp_path / "1.png")
    put(tmp_path / "2.png")
    with pytest.raises(InputError, match=r"one folder of images for each class .* \.png \(2\)"):
        read_images(str(tmp_path), 32)


def test_what_has_the_ending_of_an_image_is_read_or_refused(photos: Path) -> None:
    (photos / "cat" / "2.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match=r"2\.png"):
        read_images(str(photos), 32)
    (photos / "cat" / "2.png").unlink()
    os.mkfifo(photos / "cat" / "3.png")
    with pytest.raises(InputError, match=r"3\.png: missing or damaged"):
        read_images(str(photos), 32)


def test_links_to_folders_within_a_class_are_counted(photos: Path) -> None:
    put(photos / "dog" / "deep" / "2.png")
    (photos / "cat" / "deep").symlink_to("../dog/deep")
    with pytest.warns(UserWarning, match=r"1 file is not an image .* links to folders \(1\)"):
        assert len(read_images(str(photos), 32)) == 3


def test_another_format_is_refused_with_those_that_are_read(tmp_path: Path) -> None:
    image = other(tmp_path / "a.heic")
    with pytest.raises(
        InputError, match=r"a\.heic: not an image that can be read: none of PNG, JPEG"
    ):
        read_image(image, 32)


def test_a_folder_of_splits_is_no_folder_of_classes(tmp_path: Path) -> None:
    for split in ("Train", "val", "test"):
        for name in ("cat/1.png", "dog/1.png"):
            put(tmp_path / split / name)
    with pytest.raises(InputError, match=r"holds splits, Train, test, val, .* give one of them"):
        read_images(str(tmp_path), 32)
    assert read_images(str(tmp_path / "Train"), 32).classes == ["cat", "dog"]


def test_classes_may_have_the_names_of_splits(tmp_path: Path) -> None:
    for name in ("train/1.png", "bus/new/1.png", "validation/new/1.png"):
        put(tmp_path / "vehicles" / name)
        put(tmp_path / "stamps" / name.replace("bus", "test").replace("new/", ""))
    assert read_images(str(tmp_path / "vehicles"), 32).classes == ["bus", "train", "validation"]
    assert read_images(str(tmp_path / "stamps"), 32).classes == ["test", "train", "validation"]


def test_classes_whose_folders_look_alike_are_refused(photos: Path) -> None:
    put(photos / "caf\u00e9" / "1.png")
    try:
        put(photos / "cafe\u0301" / "2.png")
        alike = len(list(photos.iterdir())) == 4
    except OSError:
        alike = False
    if not alike:
        pytest.skip("this file system knows only one of the two")
    with pytest.raises(InputError, match="look alike"):
        read_images(str(photos), 32)


def test_arrays_may_have_an_ending_in_upper_case(tmp_path: Path) -> None:
    arrays = {"image": np.zeros((2, 32, 32), np.uint8), "label": np.array(["a", "b"])}
    np.savez(tmp_path / "a.npz", **arrays)
    (tmp_path / "a.npz").rename(tmp_path / "a.NPZ")
    assert read_images(str(tmp_path / "a.NPZ"), 32).classes == ["a", "b"]


def test_paths_in_a_table_are_named_for_what_they_are(photos: Path) -> None:
    path = photos / "a.csv"
    path.write_text("image,label\ncat/1.png,cat\ndog/1.png,dog\n")
    with pytest.raises(
        InputError, match=r"no image in column 'image', but 'cat/1\.png'.* a folder for each class"
    ):
        read_images(str(path), 32)
