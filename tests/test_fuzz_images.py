"""Images that anybody may have made: decoded, or refused by name before they fill the memory."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("PIL")
pytest.importorskip("datasets")

from PIL import Image, ImageCms, features

import fuzzing
from turnover.data.base import Columns
from turnover.data.images import read_image, read_images
from turnover.data.text import read

PIXELS = np.arange(40 * 36 * 3, dtype=np.uint32).reshape(40, 36, 3).astype(np.uint8)
ENDINGS = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "gif": "GIF", "ppm": "PPM", "tif": "TIFF"}
ENDINGS |= {"webp": "WEBP"}
ENDINGS |= {"avif": "AVIF"} if features.check("avif") else {}
ENDINGS |= {"jp2": "JPEG2000"} if features.check("jpg_2000") else {}


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, kind)
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.mark.parametrize("ending", ENDINGS)
def test_damaged_images_are_decoded_or_refused(ending: str, folder: Path) -> None:
    path, whole = folder / f"a.{ending}", encoded(ENDINGS[ending])
    path.write_bytes(whole)
    assert read_image(path, 32).shape == (32, 32, 3)

    @fuzzing.bounded(40)
    @given(raw=fuzzing.damaged(whole))
    def any_damage(raw: bytes) -> None:
        path.write_bytes(raw)

        def decode() -> None:
            image = read_image(path, 32)
            assert image.shape == (32, 32, 3) and image.dtype == np.uint8

        fuzzing.refused(decode, str(path))

    any_damage()


def others() -> dict[str, bytes]:
    """Images whose orientation, profile, numbers or frames are read too."""
    image, exif = Image.fromarray(PIXELS), Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = PIXELS[:, :, 0]
    found = {}
    for name, made, kind, options in (
        ("turned.jpg", image, "JPEG", {"exif": exif}),
        ("turned.tif", image, "TIFF", {"exif": exif}),
        ("ink.jpg", image.convert("CMYK"), "JPEG", {"icc_profile": profile}),
        ("deep.png", Image.fromarray(grey.astype(np.uint16) * 257), "PNG", {"transparency": 257}),
        ("floats.tif", Image.fromarray(grey.astype(np.float32)), "TIFF", {}),
        ("clear.png", image.convert("P"), "PNG", {"transparency": b"\0\7"}),
        ("frames.gif", image, "GIF", {"save_all": True, "append_images": [image.rotate(90)]}),
        ("pages.tif", image, "TIFF", {"save_all": True, "append_images": [image.rotate(90)]}),
    ):
        out = io.BytesIO()
        made.save(out, kind, **options)
        found[name] = out.getvalue()
    return found


@pytest.mark.parametrize("name", others())
def test_damage_to_what_tells_how_an_image_is_seen_is_read_or_refused(
    name: str, folder: Path
) -> None:
    path, whole = folder / name, others()[name]

    @fuzzing.bounded(40)
    @given(raw=fuzzing.damaged(whole))
    def any_damage(raw: bytes) -> None:
        path.write_bytes(raw)

        def decode() -> None:
            image = read_image(path, 32)
            assert image.shape == (32, 32, 3) and image.dtype == np.uint8

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fuzzing.refused(decode, str(path))

    any_damage()


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A file that says it holds so many pixels."""

    def chunk(kind: bytes, held: bytes) -> bytes:
        return (
            struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held))
        )

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(data)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [2**13 + 1, 2**15, 2**20, 2**30])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    side: int, tmp_path: Path
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side))
    limit = Image.MAX_IMAGE_PIXELS
    with fuzzing.limited(gib=1):
        said = fuzzing.refused(lambda: read_image(path, 32), str(path))
    assert said is not None and ("more than 67108864" in said or "bomb" in said)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_largest_image_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (2**13, 2**13), 1).save(path)
    assert (read_image(path, 32) == 255).all()


def test_a_long_and_narrow_image_is_refused_before_it_is_made_wider(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    Image.new("1", (1, 2**17)).save(path)
    with fuzzing.limited(gib=1):
        said = fuzzing.refused(lambda: read_image(path, 32), str(path))
    assert said is not None and "too long and narrow" in said


def test_no_other_program_is_asked_to_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import EpsImagePlugin

    def ghostscript(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was asked")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path, "EPS")
    said = fuzzing.refused(lambda: read_image(path, 32), str(path))
    assert said is not None and "not an image that can be read" in said


def arrays(path: Path, **other: Any) -> bytes:
    pixels = np.stack([PIXELS] * 4)
    np.savez(path, **({"image": pixels, "label": np.array(["a", "b"] * 2)} | other))
    return path.read_bytes()


@fuzzing.bounded(100)
@given(drawn=st.data())
def test_damaged_arrays_are_read_or_refused(folder: Path, drawn: st.DataObject) -> None:
    path = folder / "a.npz"
    path.write_bytes(drawn.draw(fuzzing.damaged(arrays(folder / "whole.npz"))))
    fuzzing.refused(lambda: read_images(str(path), 32), str(path))


@fuzzing.bounded(60)
@given(
    header=fuzzing.damaged(b"{'descr': '|u1', 'fortran_order': False, 'shape': (4, 40, 36, 3), }\n")
)
def test_other_headers_of_arrays_are_read_or_refused(folder: Path, header: bytes) -> None:
    """The checksum of the archive fits."""
    path = folder / "header.npz"
    start = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header
    arrays(path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other.npy", start + PIXELS.tobytes() * 4)
    fuzzing.refused(lambda: read_images(str(path), 32, Columns("other", "label")), str(path))


@pytest.mark.parametrize(
    "change",
    [
        {"image": np.zeros((4, 0, 36, 3), np.uint8)},
        {"image": np.zeros((0, 36, 36, 3), np.uint8)},
        {"image": np.zeros((4, 36, 36, 3), np.float32)},
        {"image": np.array(7, np.uint8)},
        {"label": np.array(["a", "b", "a"])},
        {"label": np.full(4, np.nan)},
        {"label": np.zeros(4, "M8[s]")},
        {"label": np.zeros(4, [("a", "i4")])},
        {"label": np.zeros(4, complex)},
        {"label": np.array([b"a", b"b"] * 2)},
        {"label": np.array(["a", "\ud800"] * 2)},
    ],
)
def test_arrays_of_another_kind_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    arrays(path, **change)
    assert fuzzing.refused(lambda: read_images(str(path), 32), str(path))


def parquet(path: Path, images: list[Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = {"image": images, "label": ["ab"[i % 2] for i in range(len(images))]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)


@pytest.mark.parametrize(
    "cell",
    [
        {"bytes": b"", "path": None},
        {"bytes": None, "path": ""},
        {"bytes": None, "path": "a\0b"},
        {"bytes": b"no image", "path": None},
        {"bytes": png(2**15, 2**15), "path": None},
        {"bytes": None, "path": "/dev/zero"},
    ],
)
def test_cells_that_hold_no_image_are_named(cell: dict[str, Any], tmp_path: Path) -> None:
    path, good = tmp_path / "a.parquet", {"bytes": encoded("PNG"), "path": None}
    parquet(path, [good, good, cell])
    said = fuzzing.refused(lambda: read_images(str(path), 32), f"{path}: row 3")
    assert said


def test_images_in_json_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(fuzzing.json_text([{"image": {"bytes": "x"}, "label": i} for i in range(2)]))
    assert fuzzing.refused(lambda: read_images(str(path), 32), f"{path}: row 1")


def test_a_column_of_images_is_not_decoded_for_texts_or_labels(tmp_path: Path) -> None:
    import datasets

    bomb = {"bytes": png(2**13 + 1, 2**13), "path": None}
    features = datasets.Features(
        {name: datasets.Image() for name in ("image", "text")} | {"label": datasets.Value("string")}
    )
    good = {"bytes": encoded("PNG"), "path": None}
    rows = {"image": [good] * 2, "text": [bomb] * 2, "label": ["a", "b"]}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    assert len(read_images(str(path), 32)) == 2
    said = fuzzing.refused(lambda: read(str(path), Columns()), str(path))
    assert said is not None and "not plain values" in said


@fuzzing.bounded(60)
@given(drawn=st.data())
def test_damaged_tables_of_images_are_read_or_refused(folder: Path, drawn: st.DataObject) -> None:
    whole = folder / "whole.parquet"
    parquet(whole, [{"bytes": encoded("PNG"), "path": None}] * 4)
    path = folder / "a.parquet"
    path.write_bytes(drawn.draw(fuzzing.damaged(whole.read_bytes())))
    fuzzing.refused(lambda: read_images(str(path), 32), str(path))
