"""Images in, and runs of them: real files, real commands, a small VGG."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("PIL")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from PIL import Image
from safetensors.torch import load_file, save_file

from test_cli import turnover
from turnover import InputError
from turnover.data.base import Columns
from turnover.data.images import ImageData, Pixels, read_images
from turnover.models.vgg import VGG
from turnover.report.pictures import thumbnails
from turnover.runs.run import Run
from turnover.tasks.training import TrainingConfig, train

COLOURS = {"blue": (30, 40, 200), "green": (40, 190, 60), "red": (200, 40, 30)}


def picture(name: str, number: int, width: int = 32, height: int = 32) -> np.ndarray:
    generator = np.random.default_rng([number, len(name)])
    noise = generator.integers(-30, 30, (height, width, 3))
    return np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)


def folder_of(path: Path, each: int, start: int = 0) -> Path:
    for name in COLOURS:
        (path / name).mkdir(parents=True)
        for number in range(start, start + each):
            Image.fromarray(picture(name, number)).save(path / name / f"{number:03}.png")
    return path


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    test = folder_of(root / "test", 6, start=500)
    # Images in the wrong folder are errors to explain, whatever the network learns.
    for number in range(4):
        Image.fromarray(picture("red", 900 + number)).save(test / "green" / f"wrong{number}.png")
    return folder_of(root / "train", 12), test


@pytest.fixture(scope="session")
def run(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "colours"
    turnover(
        *("fit", folders[0], "--test", folders[1], "--model", "vgg11", "--width", 4),
        *("--hidden", 64, "--epochs", 6, "--batch-size", 12, "--memorization", "--out", out),
    )
    turnover("influence", out, "--ghosts", 1000)
    return out


def test_a_folder_gives_images_labels_and_names(folders: tuple[Path, Path]) -> None:
    data = read_images(str(folders[0]), 32)
    assert data.classes == ["blue", "green", "red"] and len(data) == 36
    assert data.keys[0] == "blue/000.png" and data.shown(12) == "green/000.png"
    np.testing.assert_array_equal(data.image(0), picture("blue", 0))
    assert data.take([13]).shown(0) == "green/001.png"
    assert data.take([13]).pixels is data.pixels


def test_ids_follow_the_files_and_not_their_names_or_order(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    before = read_images(str(folders[0]), 32)
    shutil.copytree(folders[0], tmp_path / "copy")
    (tmp_path / "copy" / "red" / "000.png").rename(tmp_path / "copy" / "red" / "zzz.png")
    after = read_images(str(tmp_path / "copy"), 64)
    assert set(before.ids.tolist()) == set(after.ids.tolist())
    assert (
        before.ids[before.keys.index("red/000.png")] == after.ids[after.keys.index("red/zzz.png")]
    )


@pytest.mark.parametrize(("width", "height"), [(64, 32), (30, 50), (200, 131), (33, 500)])
def test_the_middle_of_an_image_is_kept(tmp_path: Path, width: int, height: int) -> None:
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = 200
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "1.png")
    image = read_images(str(tmp_path), 32).image(0)
    assert image.shape == (32, 32, 3) and (image[2:-2, 2:-2] == 200).all()


def arrays(path: Path, **other: object) -> Path:
    pixels = np.stack([picture(name, 0) for name in COLOURS for _ in range(2)])
    labels = np.array([name for name in COLOURS for _ in range(2)])
    np.savez(path, **{"image": pixels, "label": labels, "id": np.arange(10, 16)} | other)
    return path


def test_arrays_with_ids_and_grey_images(tmp_path: Path) -> None:
    data = read_images(str(arrays(tmp_path / "a.npz")), 32, Columns("image", "label", "id"))
    assert data.ids.tolist() == list(range(10, 16)) and data.keys[0] == "10"
    grey = np.arange(6, dtype=np.uint8)[:, None, None].repeat(32, 1).repeat(32, 2)
    data = read_images(str(arrays(tmp_path / "b.npz", image=grey)), 32)
    assert data.image(5).tolist() == np.full((32, 32, 3), 5).tolist()
    assert len(set(data.ids.tolist())) == 6


def test_what_is_written_can_be_read_again(tmp_path: Path) -> None:
    data = read_images(str(arrays(tmp_path / "a.npz")), 32).take([4, 1])
    data.export(tmp_path / "out.npz")
    again = read_images(str(tmp_path / "out.npz"), 32, Columns("image", "label", "key"))
    assert again.keys == data.keys and again.classes[again.labels[0]] == "red"
    np.testing.assert_array_equal(again.image(1), data.image(1))


def test_what_is_written_does_not_depend_on_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = read_images(str(arrays(tmp_path / "a.npz")), 32)
    for name, now in (("today", None), ("lost", 0.0)):  # before 1980 a zip file has no dates
        if now is not None:
            monkeypatch.setattr("time.time", lambda now=now: now)
        data.export(tmp_path / f"{name}.npz")
    assert (tmp_path / "today.npz").read_bytes() == (tmp_path / "lost.npz").read_bytes()


def test_a_parquet_file_with_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = [name for name in COLOURS for _ in range(3)]
    pictures = [Image.fromarray(picture(name, i)) for i, name in enumerate(names)]
    table = datasets.Dataset.from_dict({"image": pictures, "label": names}).cast_column(
        "image", datasets.Image()
    )
    table.to_parquet(str(tmp_path / "images.parquet"))
    data = read_images(str(tmp_path / "images.parquet"), 32)
    assert data.classes == sorted(COLOURS)
    np.testing.assert_array_equal(data.image(4), picture("green", 4))


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "red" / "000.png").write_bytes(b"no image"), "000.png"),
        (lambda f: (f / "red" / "001.png").write_bytes(png(picture("red", 1))[:200]), "001.png"),
        (lambda f: [shutil.rmtree(f / name) for name in ("red", "green")], "one class"),
        (lambda f: [shutil.rmtree(f / name) for name in COLOURS], "no images"),
    ],
)
def test_bad_folders_are_refused_by_name(folders, tmp_path, spoil, said) -> None:
    shutil.copytree(folders[0], tmp_path / "bad")
    spoil(tmp_path / "bad")
    command = ("fit", tmp_path / "bad", "--model", "vgg11", "--out", tmp_path / "run")
    assert said in turnover(*command, expect=2).stderr
    assert not list(tmp_path.glob("*run*"))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"image": np.zeros((6, 32, 32), dtype=np.float32)}, "uint8"),
        ({"image": np.zeros((6, 32, 32, 4), dtype=np.uint8)}, "uint8"),
        ({"label": np.array(["a", "b"])}, "one for each image"),
        ({"label": np.array([None] * 6, dtype=object)}, "cannot be read"),
        ({"label": np.linspace(0.1, 0.9, 6)}, "regression"),
        ({"id": np.array([1, 1, 2, 3, 4, 5])}, "duplicate ids"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, other: dict[str, np.ndarray], said: str) -> None:
    path = arrays(tmp_path / "bad.npz", **other)
    with pytest.raises(InputError, match=said):
        read_images(str(path), 32, Columns("image", "label", "id"))


def test_missing_files_columns_and_classes_are_named(folders, tmp_path: Path) -> None:
    path = arrays(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"no column 'picture'; it has image, label, id"):
        read_images(str(path), 32, Columns("picture", "label"))
    with pytest.raises(InputError, match=r"absent\.npz: no such file"):
        read_images(str(tmp_path / "absent.npz"), 32)
    with pytest.raises(InputError, match="unknown label 'green'"):
        read_images(str(folders[1]), 32, classes=["blue", "red"])
    with pytest.raises(InputError, match="no column of ids"):
        read_images(str(folders[0]), 32, Columns("image", "label", group="source"))
    (tmp_path / "b.npz").write_bytes(b"PK damaged")
    with pytest.raises(InputError, match="cannot be read"):
        read_images(str(tmp_path / "b.npz"), 32)


def pixels(count: int, size: int, augment: bool) -> Pixels:
    values = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    rows = list(range(count))
    return Pixels(values, rows, rows, torch.arange(count), (0.5,) * 3, (0.25,) * 3, augment)


@given(st.integers(0, 10**6))
def test_an_augmented_image_is_its_own_shifted_or_mirrored_and_keeps_its_id(seed: int) -> None:
    data = pixels(4, 16, augment=True)
    batch = data.training_batch([2, 0], torch.Generator().manual_seed(seed))
    again = data.training_batch([2, 0], torch.Generator().manual_seed(seed))
    assert torch.equal(batch.inputs, again.inputs)
    assert batch.ids.tolist() == [2, 0] and batch.labels.tolist() == [2, 0]
    for image, plain in zip(batch.inputs, data.batch([2, 0]).inputs, strict=True):
        reach = 2
        padded = torch.nn.functional.pad(plain[None], (reach,) * 4, mode="reflect")[0]
        views = [
            view[:, top : top + 16, left : left + 16]
            for view in (padded, padded.flip(2))
            for top in range(2 * reach + 1)
            for left in range(2 * reach + 1)
        ]
        assert any(torch.equal(image, view) for view in views)


def test_augmentation_varies_and_can_be_left_out() -> None:
    drawn = torch.Generator().manual_seed(0)
    data = pixels(8, 16, augment=True)
    first, second = (data.training_batch(range(8), drawn).inputs for _ in range(2))
    assert not torch.equal(first, second)
    plain = pixels(8, 16, augment=False)
    assert torch.equal(plain.training_batch(range(8), drawn).inputs, plain.batch(range(8)).inputs)


def test_a_training_with_augmented_images_resumes_bit_for_bit(run: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def weights(folder: Path, interrupted: bool) -> dict[str, torch.Tensor]:
        folder.mkdir()
        for attempt in range(2 if interrupted else 1):
            loaded = Run.load(run)
            torch.manual_seed(1)
            for module in loaded.model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()

            def follow(epoch: int, attempt: int = attempt) -> None:
                if interrupted and attempt == 0 and epoch == 2:
                    raise Killed

            try:
                train(
                    loaded.model,
                    loaded.encode(loaded.train),
                    TrainingConfig(epochs=3, batch_size=12),
                    loaded.network.exposed,
                    name="test",
                    checkpoint=folder / "checkpoint",
                    identity="test",
                    follow=follow,
                )
            except Killed:
                continue
        return loaded.model.state_dict()

    whole, resumed = weights(tmp_path / "a", False), weights(tmp_path / "b", True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_of_images_is_whole_and_reads_alike(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["audit"]["clean"] and metrics["n_train"] == 36 and metrics["n_test"] == 22
    assert metrics["errors_explained"] > 0
    loaded = Run.load(run)
    assert isinstance(loaded.train, ImageData)
    np.testing.assert_array_equal(loaded.train.image(0), picture("blue", 0))
    assert not list(run.glob("*.pkl")) and (run / "train.npy").exists()
    (run / "train.npy").rename(run / "kept.npy")
    try:
        assert "train.npy" in turnover("predict", run, "--hidden", expect=2).stderr
    finally:
        (run / "kept.npy").rename(run / "train.npy")


def test_errors_are_explained_on_a_contact_sheet_and_in_the_report(
    run: Path, tmp_path: Path
) -> None:
    sheet = tmp_path / "sheet.png"
    shown = turnover("explain", run, "--show", 3, "--top", 4, "--sheet", sheet, "--json").stdout
    found = json.loads(shown)
    with Image.open(sheet) as image:
        assert image.width > 8 * 112 and image.height > len(found) * 112
        colours = np.asarray(image.convert("RGB"))
    target = np.asarray(Run.load(run).test.image(Run.load(run).test.keys.index(found[0]["key"])))
    assert (colours == target[16, 16]).all(axis=2).any()
    (link,) = thumbnails(Run.load(run).test, [found[0]["key"]]).values()
    turnover("report", run, "--out", tmp_path / "with.html")
    assert link in (tmp_path / "with.html").read_text()
    turnover("report", run, "--out", tmp_path / "without.html", "--no-text")
    assert link not in (tmp_path / "without.html").read_text()


@pytest.mark.parametrize("among", ["predicted", "true"])
def test_explanations_of_one_class_list_it_alone(run: Path, among: str) -> None:
    found = json.loads(turnover("explain", run, "--show", 9, "--among", among, "--json").stdout)
    assert found
    for one in found:
        wanted = one[f"{among}_label"]
        listed = [
            *one["helpful"],
            *one["harmful"],
            *one["gram"]["helpful"],
            *one["gram"]["harmful"],
        ]
        assert listed and {item["label"] for item in listed} == {wanted}


def test_a_new_image_is_explained(run: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    image = folders[1] / "red" / "501.png"
    sheet = tmp_path / "one.png"
    command = ("explain", run, "--image", image, "--label", "red", "--sheet", sheet, "--json")
    (found,) = json.loads(turnover(*command).stdout)
    assert found["true_label"] == "red" and found["key"] == "501.png" and sheet.exists()


def test_commands_refuse_what_does_not_fit_images(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"none")
    for arguments, said in (
        (("--image", broken), "broken.png"),
        (("--image", tmp_path / "absent.png"), "absent.png"),
        (("--text", "a text"), "--image"),
        (("--sheet", tmp_path / "sheet.jpg"), ".png"),
        (("--sheet", tmp_path / "no" / "sheet.png"), "make the folder"),
        (("--among", "other"), "'predicted', 'true'"),
    ):
        assert said in turnover("explain", run, *arguments, expect=2).stderr
    assert not list(tmp_path.glob("sheet*"))


def test_labels_of_images_are_reviewed_and_the_cleaned_set_is_read_again(
    run: Path, tmp_path: Path
) -> None:
    decisions = tmp_path / "decisions.csv"
    decisions.write_text("key,decision\nblue/000.png,remove\nred/001.png,green\n")
    turnover("review", run, "--decisions", decisions, "--out", tmp_path / "clean.npz")
    cleaned = read_images(str(tmp_path / "clean.npz"), 32, Columns("image", "label", "key"))
    assert len(cleaned) == 35 and "blue/000.png" not in cleaned.keys
    assert cleaned.classes[cleaned.labels[cleaned.keys.index("red/001.png")]] == "green"
    turnover("memorize", run)
    turnover("predict", run, "--hidden", "--out", tmp_path / "hidden.csv")
    assert len((tmp_path / "hidden.csv").read_text().splitlines()) == 37


def test_images_without_an_image_model_and_bad_shapes_are_refused(folders, tmp_path) -> None:
    for model, options, said in (
        ("bert", (), "vgg11"),
        ("vgg11", ("--image-size", 48), "multiple of 32"),
        ("vgg11", ("--width", 0), "width"),
        ("vgg11", ("--epochs", 0), "epochs"),
    ):
        command = ("fit", folders[0], "--model", model, *options, "--out", tmp_path / "run")
        assert said in turnover(*command, expect=2).stderr
    assert not list(tmp_path.glob("*run*"))


def test_a_network_that_learned_nothing_of_its_inputs_is_named(folders, tmp_path: Path) -> None:
    said = turnover(
        *("fit", folders[0], "--test", folders[1], "--model", "vgg11", "--width", 1, "--hidden", 1),
        *("--epochs", 1, "--no-compare", "--out", tmp_path / "run"),
    ).stdout
    assert "not better than the majority class" in said.replace("\n", " ")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = VGG(11, 5, size=32, width=4, hidden=8)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_pretrained_convolutions_stay_frozen_below_a_wide_head(
    folders: tuple[Path, Path], weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    turnover(
        *("fit", folders[0], "--test", folders[1], "--model", "vgg11", "--width", 4),
        *("--weights", weights, "--head-units", 512, "--epochs", 3, "--no-compare", "--out", out),
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["audit"]["clean"] and metrics["mask_units"] == 512
    given = load_file(weights)
    weights.unlink()  # the run is whole without it
    loaded = Run.load(out)
    kept = dict(loaded.model.named_parameters())
    assert torch.equal(kept["encoder.0.weight"], given["features.0.weight"])
    trained = {name for name, parameter in kept.items() if parameter.requires_grad}
    assert trained and all(name.startswith("head.") for name in trained)
    turnover("influence", out, "--ghosts", 1000)
    assert json.loads((out / "metrics.json").read_text())["errors_explained"] > 0


@pytest.mark.long
def test_a_set_of_images_is_cleansed_for_a_validation_set(
    run: Path, folders: tuple[Path, Path], weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    turnover(
        *("fit", folders[0], "--test", folders[1], "--model", "vgg11", "--width", 4),
        *("--weights", weights, "--head-units", 256, "--epochs", 1, "--no-compare", "--out", out),
    )
    validation = folder_of(tmp_path / "validation", 4, start=700)
    cleaned = tmp_path / "cleaned.npz"
    command = ("cleanse", out, "--validation", validation, "--out", cleaned, "--seeds", 1)
    turnover(*command, "--fraction", 0.1)
    found = json.loads((out / "results" / "cleanse.json").read_text())
    assert len(read_images(str(cleaned), 32)) == 36 - found["removed"]
    same = ("--validation", folders[1], "--out", cleaned)
    assert "among the run's test rows" in turnover("cleanse", out, *same, expect=2).stderr
    # What was trained from scratch has no features that know none of the rows.
    scratch = ("cleanse", run, "--validation", validation, "--out", cleaned)
    assert "--weights" in turnover(*scratch, expect=2).stderr


def test_weights_that_do_not_fit_are_refused(folders, weights: Path, tmp_path: Path) -> None:
    with_norms = tmp_path / "bn.safetensors"
    save_file(VGG(11, 5, size=32, width=4, hidden=8, batch_norm=True).state_dict(), with_norms)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"none")
    for file, model, width, said in (
        (tmp_path / "absent", "vgg11", 4, "cannot be read as safetensors"),
        (damaged, "vgg11", 4, "cannot be read as safetensors"),
        (weights, "vgg11", 8, "--width"),
        (weights, "vgg16", 4, "--model"),
        (with_norms, "vgg11", 4, "--model"),
    ):
        command = ("fit", folders[0], "--model", model, "--width", width, "--weights", file)
        assert said in turnover(*command, "--out", tmp_path / "run", expect=2).stderr
    assert not list(tmp_path.glob("*run*"))
