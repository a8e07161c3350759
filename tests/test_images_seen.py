"""Images as a person sees them: upright, over white, in their colors; numbers of a set by one range."""

from __future__ import annotations

import io
import json
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from PIL import Image, ImageCms

from test_cli import turnover
from turnover import InputError
from turnover.data.images import ImageReader, read_image, read_images
from turnover.runs.run import Run

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
RED, BLUE, WHITE, GREEN = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 128, 0)


def seen(image: Image.Image, path: Path, **options: Any) -> np.ndarray:
    """What is read of an image that was saved there."""
    image.save(path, **options)
    return read_image(path, 64)


def near(found: np.ndarray, wanted: object, by: int = 1) -> bool:
    return bool((np.abs(found.astype(int) - np.array(wanted)) <= by).all())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("16.png", (RAMP * 65535).astype(np.uint16)),
        ("16.tif", (RAMP * 65535).astype(np.uint16)),
        ("16-big.tif", (RAMP * 65535).astype(">u2")),
        ("16.pgm", (RAMP * 65535).astype(np.uint16)),
        ("16.jp2", (RAMP * 65535).astype(np.uint16)),
        ("12-of-16.png", (RAMP * 4095).astype(np.uint16)),
        ("8-of-16.png", (RAMP * 255).astype(np.uint16)),
        ("32.tif", (RAMP * 65535).astype(np.int32)),
        ("signed.tif", (RAMP * 2000 - 1000).astype(np.int32)),
        ("large.tif", (RAMP * 2**31 - 1).astype(np.int32)),
        ("unit.tif", RAMP.astype(np.float32)),
        ("255.tif", (RAMP * 255).astype(np.float32)),
        ("other.tif", (RAMP * 5000 - 1000).astype(np.float32)),
        ("huge.tif", (RAMP * 6e38 - 3e38).astype(np.float32)),
    ],
)
def test_numbers_of_more_than_8_bits_are_scaled_and_reported(
    name: str, values: np.ndarray, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=f"{name}: 1 image with (integers|floats) .*scaled"):
        found = seen(Image.fromarray(values), tmp_path / name)
    assert near(found, (RAMP * 255)[:, :, None])


def test_a_16_bit_image_whose_zero_is_white_is_turned_around(tmp_path: Path) -> None:
    image = Image.fromarray((RAMP * 65535).astype(np.uint16))
    with pytest.warns(UserWarning, match="scaled"):
        found = seen(image, tmp_path / "a.tif", tiffinfo={262: 0})
    assert near(found, 255 - (RAMP * 255)[:, :, None])


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused_by_name(hole: float, tmp_path: Path) -> None:
    values = RAMP.astype(np.float32)
    values[3, 4] = hole
    with pytest.raises(InputError, match=r"a\.tif: holds NaN or infinite numbers"):
        seen(Image.fromarray(values), tmp_path / "a.tif")


def folder(path: Path, images: Iterable[tuple[str, np.ndarray]]) -> str:
    for name, values in images:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path / name)
    return str(path)


def flat(value: float, kind: type = np.uint16) -> np.ndarray:
    return np.full((64, 64), value, kind)


def test_images_of_one_set_and_of_its_test_set_stay_comparable(tmp_path: Path) -> None:
    training = folder(
        tmp_path / "training",
        [("a/1.png", flat(200)), ("a/2.png", flat(4000)), ("b/1.png", flat(2000))],
    )
    test = folder(tmp_path / "test", [("a/1.png", flat(200)), ("b/1.png", flat(2000))])
    reader = ImageReader(64)
    with pytest.warns(
        UserWarning, match="training: 3 images with integers from 200 to 4000"
    ) as said:
        first = reader(training)
    assert len(said) == 1 and "0 is black and 4095 white" in str(said[0].message)
    second = reader(test, classes=first.classes)  # alone these would be of 11 bits
    assert [first.image(row)[0, 0, 0] for row in range(3)] == [12, 249, 125]
    assert [second.image(row)[0, 0, 0] for row in range(2)] == [12, 125]
    brighter = folder(tmp_path / "brighter", [("a/1.png", flat(5000)), ("b/1.png", flat(4000))])
    with pytest.warns(UserWarning, match="brighter: 1 image with integers beyond .*training.* cut"):
        third = reader(brighter, classes=first.classes)
    assert [third.image(row)[0, 0, 0] for row in range(2)] == [255, 249]


def test_floats_of_one_set_have_one_range(tmp_path: Path) -> None:
    images = [("a/1.tif", flat(0.5, np.float32)), ("b/1.tif", flat(200, np.float32))]
    with pytest.warns(UserWarning, match=r"2 images with floats from 0\.5 to 200"):
        data = read_images(folder(tmp_path / "set", images), 64)
    assert [data.image(row)[0, 0, 0] for row in range(2)] == [0, 200]
    images.append(("b/2.tif", flat(-100, np.float32)))
    with pytest.warns(
        UserWarning, match=r"-100 is black and 200 white \(their least and greatest\)"
    ):
        data = read_images(folder(tmp_path / "set", images), 64)
    assert [data.image(row)[0, 0, 0] for row in range(3)] == [85, 255, 0]


def test_dark_colors_of_16_bits_are_reported(tmp_path: Path) -> None:
    # Pillow writes no such file: a PNG by hand, 12 bits in 16.
    def chunk(kind: bytes, held: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + held))
        return struct.pack(">I", len(held)) + kind + held + check

    row = b"\0" + np.full((64, 3), 4095, ">u2").tobytes()
    head = struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)
    raw = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row * 64)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + raw)
    with pytest.warns(
        UserWarning, match="1 image of 16 bits a color are dark: .* 0 to 15 are used"
    ):
        read_image(tmp_path / "a.png", 64)


HALVES = np.zeros((64, 64, 3), np.uint8)
HALVES[:, :32], HALVES[:, 32:] = RED, BLUE
CORNERS = HALVES.copy()
CORNERS[32:, 32:] = GREEN


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_their_exif_says(
    orientation: int, ending: str, tmp_path: Path
) -> None:
    turned = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
    image = Image.fromarray(CORNERS)
    exif = image.getexif()
    exif[0x0112] = orientation
    found = seen(image, tmp_path / f"a.{ending}", exif=exif)
    for at in ((5, 5), (5, -5), (-5, 5), (-5, -5)):
        assert near(found[at], turned[orientation](CORNERS)[at], by=12)


@pytest.mark.parametrize("exif", [b"Exif\0\0nothing", b"Exif\0\0MM\0*\0\0\xff\xff", b"\xff" * 40])
def test_damaged_exif_refuses_no_photo(exif: bytes, tmp_path: Path) -> None:
    assert near(seen(Image.fromarray(HALVES), tmp_path / "a.jpg", exif=exif)[5, 5], RED, by=12)


def clear(mode: str) -> Image.Image:
    """Left half black and see-through, right half black."""
    alpha = Image.new("L", (64, 64), 255)
    alpha.paste(0, (0, 0, 32, 64))
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    image.putalpha(alpha)
    if mode == "P":
        palette = Image.new("P", (64, 64), 1)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.paste(0, (0, 0, 32, 64))
        return palette
    if mode in ("L", "RGB", "1"):
        return Image.merge("RGB", [alpha.point(lambda value: 9 if value == 0 else 0)] * 3).convert(
            mode
        )
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "name", "options"),
    [
        ("RGBA", "a.png", {}),
        ("RGBA", "a.webp", {"lossless": True}),
        ("RGBA", "a.tif", {}),
        ("LA", "a.png", {}),
        ("P", "a.png", {"transparency": 0}),
        ("P", "a.png", {"transparency": b"\0\xff"}),
        ("P", "a.gif", {"transparency": 0}),
        ("L", "a.png", {"transparency": 9}),
        ("RGB", "a.png", {"transparency": (9, 9, 9)}),
    ],
)
def test_what_is_transparent_is_white(
    mode: str, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    found = seen(clear(mode), tmp_path / name, **options)
    assert near(found[:, 2:30], WHITE) and near(found[:, 34:], 0)


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    assert near(seen(Image.new("RGBA", (64, 64), (*RED, 128)), tmp_path / "a.png"), (255, 127, 127))
    opaque = np.dstack([CORNERS, np.full((64, 64), 255, np.uint8)])
    assert near(seen(Image.fromarray(opaque), tmp_path / "b.png"), CORNERS, by=0)


def test_a_transparent_number_of_16_bits_is_white(tmp_path: Path) -> None:
    values = flat(60000)
    values[:, :32] = 7
    with pytest.warns(UserWarning, match="scaled"):
        found = seen(Image.fromarray(values), tmp_path / "a.png", transparency=7)
    assert near(found[:, :32], 255) and near(found[:, 32:], 233)


def test_cmyk_goes_through_its_color_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def converted(
        image: Image.Image, profile: object, screen: object, **options: Any
    ) -> Image.Image:
        asked.append((image.mode, options))
        return Image.new("RGB", image.size, GREEN)

    monkeypatch.setattr(ImageCms, "ImageCmsProfile", lambda file: file.read())
    monkeypatch.setattr(ImageCms, "profileToProfile", converted)
    image = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    assert near(seen(image, tmp_path / "a.tif", icc_profile=b"a profile"), GREEN)
    assert asked == [("CMYK", {"outputMode": "RGB"})]
    # Without one as ever, and images of other modes are left as they are.
    assert near(seen(image, tmp_path / "b.tif"), RED)
    screen = ImageCms.createProfile("sRGB")
    profile = (
        ImageCms.core.profile_tobytes(screen) if hasattr(ImageCms.core, "profile_tobytes") else b"p"
    )
    assert near(seen(Image.new("RGB", (64, 64), RED), tmp_path / "c.png", icc_profile=profile), RED)
    assert len(asked) == 1


@pytest.mark.parametrize("profile", [b"damaged", "of the screen", "no LittleCMS"])
def test_cmyk_with_a_profile_that_cannot_be_used_is_converted_without(
    profile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if profile == "no LittleCMS":
        monkeypatch.setitem(sys.modules, "PIL.ImageCms", None)
        monkeypatch.delattr("PIL.ImageCms", raising=False)
    raw = (
        profile
        if isinstance(profile, bytes)
        else ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    )
    image = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    with pytest.warns(
        UserWarning, match="1 image in CMYK with a color profile that cannot be used"
    ):
        found = seen(image, tmp_path / "a.jpg", icc_profile=raw, quality=95)
    assert near(found, RED, by=3)


@pytest.mark.parametrize("mode", ["1", "L", "YCbCr", "LAB", "CMYK"])
def test_other_modes_are_converted_as_pillow_does(mode: str, tmp_path: Path) -> None:
    if mode == "LAB":
        image = Image.new("LAB", (64, 64), (255, 128, 128))
    else:
        image = Image.new("RGB", (64, 64), WHITE).convert(mode)
    assert near(seen(image, tmp_path / "a.tif"), WHITE, by=2)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_of_several_frames_the_first_is_read_and_that_is_reported(
    name: str, tmp_path: Path
) -> None:
    frames = [Image.new("RGB", (64, 64), color) for color in (RED, BLUE)]
    with pytest.warns(UserWarning, match="1 image with several frames or pages; the first is read"):
        found = seen(frames[0], tmp_path / name, save_all=True, append_images=frames[1:])
    assert near(found, RED, by=4)


def test_photos_with_previews_are_photos(tmp_path: Path) -> None:
    image = Image.fromarray(HALVES)
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[image])
    assert near(read_image(tmp_path / "a.jpg", 64)[5, 5], RED, by=12)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of 12-bit images, each with a bright corner but for one of the test images."""
    root = tmp_path_factory.mktemp("numbers")

    def image(name: str, row: int) -> tuple[str, np.ndarray]:
        drawn = np.random.default_rng([row, len(name)]).integers(0, 900, (32, 32))
        drawn[:16] += 3000 * (name == "upper")
        return f"{name}/{row}.png", drawn.astype(np.uint16)

    folder(root / "train", [image(name, row) for name in ("upper", "no") for row in range(8)])
    folder(root / "test", [image(name, row) for name in ("upper", "no") for row in range(10, 13)])
    command = ("fit", root / "train", "--test", root / "test", "--model", "vgg11", "--width", 2)
    more = ("--hidden", 32, "--epochs", 1, "--batch-size", 8, "--no-compare", "--out", root / "run")
    said = turnover(*command, *more)
    lines = [line for line in (said.stdout + said.stderr).splitlines() if "scaled" in line]
    assert len(lines) == 1 and "16 images with integers from 0 to 38" in lines[0]
    return root / "run", root / "test"


def test_a_run_keeps_its_range_for_new_images_and_shows_images_as_trained(
    run: tuple[Path, Path],
) -> None:
    loaded = Run.load(run[0])
    assert json.loads((run[0] / "classifier.json").read_text())["ranges"] == {"integers": [0, 4095]}
    row = loaded.test.keys.index("no/10.png")  # alone it would be of 10 bits
    again = loaded.pipeline.one(run[1] / "no" / "10.png", 0, loaded.train.classes)
    stored = loaded.test.image(row)  # what report and view show
    np.testing.assert_array_equal(again.image(0), stored)
    assert 40 < stored.max() <= 56
    with pytest.warns(UserWarning, match="scaled"):
        alone = read_images(str(run[1]), 32)
    loaded.encode(alone)
    images = [("no/1.png", flat(9)), ("upper/1.png", flat(900))]
    dark = folder(run[1].parent / "dark", images)
    with pytest.warns(UserWarning, match="scaled"):
        darker = read_images(dark, 32)
    with pytest.raises(InputError, match=r"integers of these images were scaled from .*ranges="):
        loaded.encode(darker)


@pytest.mark.parametrize(
    "ranges", [[], {"integers": [1]}, {"other": [0, 1]}, {"floats": [0, None]}]
)
def test_a_damaged_range_of_a_run_is_named(
    ranges: object, run: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run[0], tmp_path / "copy"))
    shape = json.loads((copy / "classifier.json").read_text())
    (copy / "classifier.json").write_text(json.dumps({**shape, "ranges": ranges}))
    (copy / "digests.json").unlink()
    with (
        pytest.warns(UserWarning, match="digests"),
        pytest.raises(InputError, match=r"classifier\.json"),
    ):
        Run.load(copy)


def test_ids_are_those_of_the_files_bytes(tmp_path: Path) -> None:
    """Pinned: how an image is decoded changes no id."""
    image = Image.fromarray(CORNERS)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "1.bmp")
    data = read_images(str(tmp_path), 32)
    assert data.ids.tolist() == [5064761640533645824, 7688115413030895325]


def test_images_in_a_table_are_read_alike(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def raw(make: Callable[[io.BytesIO], None]) -> dict[str, Any]:
        out = io.BytesIO()
        make(out)
        return {"bytes": out.getvalue(), "path": None}

    image = Image.fromarray(HALVES)
    exif = image.getexif()
    exif[0x0112] = 6
    rows = {
        "image": [
            raw(lambda out: image.save(out, "JPEG", exif=exif, quality=95)),
            raw(lambda out: Image.fromarray(flat(65535)).save(out, "PNG")),
            raw(lambda out: clear("RGBA").save(out, "PNG")),
        ],
        "label": ["a", "b", "b"],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match=r"a\.parquet: 1 image with integers from 65535 to 65535"):
        data = read_images(str(tmp_path / "a.parquet"), 64)
    assert near(data.image(0)[5], RED, by=12) and near(data.image(1), WHITE)
    assert near(data.image(2)[:, 2:30], WHITE)


def test_on_the_command_line_a_warning_is_one_line_that_a_terminal_does_not_obey(
    tmp_path: Path,
) -> None:
    folder(tmp_path / "set", [("a/1.png", CORNERS), ("b/1.png", HALVES)])
    (tmp_path / "set" / "a" / "notes.t\x1b[2Jxt").write_text("")
    command = ("fit", tmp_path / "set", "--model", "vgg11", "--test", tmp_path / "absent.npz")
    said = turnover(*command, "--out", tmp_path / "run", expect=2)
    left, refused = said.stderr.splitlines()
    assert not said.stdout
    assert left.startswith(f"turnover: {tmp_path / 'set'}: 1 file is not an image")
    assert ".t\\x1b[2jxt (1)" in left and "absent.npz" in refused
