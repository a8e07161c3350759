"""Image encoders of transformers: fitted with LoRA and a wide head, scored, saved, and refused."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers", reason="pip install 'turnover[images,text]'")
pytest.importorskip("peft")
pytest.importorskip("typer")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from safetensors.torch import load_file, save_file  # noqa: E402

import encoders  # noqa: E402
from test_cli import turnover  # noqa: E402
from test_images import folder_of, picture  # noqa: E402
from turnover.data.images import read_images  # noqa: E402
from turnover.dropout.network import attach  # noqa: E402
from turnover.errors import InputError  # noqa: E402
from turnover.models.pipeline import build, config_class, load  # noqa: E402
from turnover.models.vision import ImageEncoderConfig  # noqa: E402
from turnover.runs.run import Run  # noqa: E402
from viewing import serving  # noqa: E402

SIZE = 16
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 4,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
SWIN = {
    "image_size": SIZE,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,  # one window in the last stage, whose attention runs row by row
    "drop_path_rate": 0.0,
}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
# Configuration of each kind, and how many layers get LoRA.
ENCODERS: dict[str, tuple[Callable[[], Any], int]] = {
    "vit": (lambda: transformers.ViTConfig(**VIT), 4),
    "deit": (lambda: transformers.DeiTConfig(**VIT), 4),
    "swin": (lambda: transformers.SwinConfig(**SWIN), 9),
    "convnext": (lambda: transformers.ConvNextConfig(**CONVNEXT), 4),
    "resnet": (lambda: transformers.ResNetConfig(**RESNET), 0),
}


def encoder(kind: str, where: Path, *, size: int = SIZE) -> Path:
    """Save a small encoder with random weights and its image processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(ENCODERS[kind][0]())
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                torch.nn.init.normal_(value, std=0.1)
        model.save_pretrained(where)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": size, "width": size},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
    }
    (where / "preprocessor_config.json").write_text(json.dumps(processor))
    return where


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images to train on, and some to test on, of which a few have a wrong class."""
    root = tmp_path_factory.mktemp("photos")
    test = folder_of(root / "test", 4, start=100)
    for number in range(3):
        Image.fromarray(picture("red", 200 + number)).save(test / "green" / f"wrong{number}.png")
    return folder_of(root / "train", 10), test


def fitted(kind: str, photos: tuple[Path, Path], root: Path, *options: object) -> Path:
    model = encoder(kind, root / kind)
    turnover(
        *("fit", photos[0], "--test", photos[1], "--model", model, "--head-units", 64),
        *("--lora-rank", 2, "--epochs", 2, "--batch-size", 8, "--out", root / "run", *options),
    )
    return root / "run"


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_run_on_an_encoder_is_scored_explained_and_reported(
    kind: str, photos: tuple[Path, Path], tmp_path: Path
) -> None:
    run = fitted(kind, photos, tmp_path)
    given = transformers.AutoModel.from_pretrained(tmp_path / kind).state_dict()
    (tmp_path / kind).rename(tmp_path / "away")  # a run is whole without it
    metrics = json.loads((run / "metrics.json").read_text())
    lora = 2 * ENCODERS[kind][1]
    assert metrics["mask_units"] == 64 + lora
    assert metrics["audit"]["clean"] and metrics["audit"]["leaking_share"] == 0
    loaded = Run.load(run)
    kept = {name.replace(".base_layer", ""): one for name, one in loaded.model.state_dict().items()}
    for name, value in given.items():
        assert torch.equal(kept[f"encoder.{name}"], value), name
    assert loaded.train.pixels.shape[1:] == (SIZE, SIZE, 3)
    turnover("influence", run, "--ghosts", 100)
    assert json.loads((run / "metrics.json").read_text())["errors_explained"] > 0
    turnover("explain", run, "--show", 1)
    turnover("report", run)
    assert (run / "report.html").stat().st_size > 10_000
    new = json.loads(
        turnover(
            "explain", run, "--image", photos[1] / "red" / "100.png", "--label", "red", "--json"
        ).stdout
    )
    assert new[0]["true_label"] == "red"


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_row_is_computed_alone_and_only_lora_and_the_head_are_trained(
    kind: str, photos: tuple[Path, Path], tmp_path: Path
) -> None:
    config = ImageEncoderConfig(str(encoder(kind, tmp_path)), head_units=8, lora_rank=2)
    data = config.reader()(str(photos[0]))
    pipeline, model = build(config, data)
    network = attach(model, config.sites)
    assert len(network.sites) == ENCODERS[kind][1] + 1
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert all(name.startswith("head.") or ".lora_" in name for name in trained)
    encoded = pipeline.encode(data)
    pipeline.prepare(model, encoded)
    batch = encoded.batch(range(6))
    assert network.audit(batch).clean
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    ids = batch.ids
    with network.exposed(ids), torch.no_grad():
        together = model(batch.inputs)
    for row in range(2):
        with network.exposed(ids[row : row + 1]), torch.no_grad():
            alone = model(batch.inputs[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_pixels_are_those_of_the_image_processor(photos: tuple[Path, Path], tmp_path: Path) -> None:
    where = encoder("vit", tmp_path)
    config = ImageEncoderConfig(str(where), head_units=8)
    data = config.reader()(str(photos[0]))
    pipeline, _ = build(config, data)
    theirs = transformers.AutoImageProcessor.from_pretrained(where)
    images = [Image.open(photos[0] / name) for name in data.names[:3]]
    wanted = theirs(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pipeline.encode(data).batch(range(3)).inputs, wanted)


def test_all_other_commands_take_such_a_run(photos: tuple[Path, Path], tmp_path: Path) -> None:
    run = fitted("vit", photos, tmp_path, "--memorization", "--no-compare")
    turnover("influence", run, "--ghosts", 100)
    with serving(run) as server:
        answer = server.ask(f"/{server.token}/image/train/2.png")
        pixels = np.asarray(Image.open(io.BytesIO(answer.body)))
        np.testing.assert_array_equal(pixels, Run.load(run).train.image(2))
    turnover("memorize", run)
    turnover("predict", run)
    turnover("predict", run, "--hidden", "--out", tmp_path / "hidden.csv")
    assert len((tmp_path / "hidden.csv").read_text().splitlines()) == 31
    turnover("review", run)
    cleaned = tmp_path / "cleaned.npz"
    validation = folder_of(tmp_path / "validation", 4, start=700)
    turnover(
        *("cleanse", run, "--validation", validation, "--out", cleaned, "--seeds", 1),
        *("--fraction", 0.1),
    )
    assert read_images(str(cleaned), SIZE).pixels.shape[1:] == (SIZE, SIZE, 3)
    again = tmp_path / "again"
    turnover("fit", "--config", run / "fit.toml", "--out", again)
    one, other = (load_file(folder / "model.safetensors") for folder in (run, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_planning_knows_the_mask_units_of_images(photos: tuple[Path, Path], tmp_path: Path) -> None:
    command = ("plan", photos[0], "--head-units", 64, "--json", "--model")
    found = json.loads(turnover(*command, encoder("resnet", tmp_path)).stdout)
    assert found["asked"]["units"] == 64 and found["pilot"] is None
    measured = turnover(*command, encoder("vit", tmp_path / "vit"), "--pilot", "--lora-rank", 2)
    assert json.loads(measured.stdout)["pilot"]["noise_floor"] > 0
    refused = turnover(*command, "vgg11", expect=2).stderr
    assert "from scratch has none: give --weights" in refused


def test_what_does_not_fit_is_refused_in_one_line(
    photos: tuple[Path, Path], tmp_path: Path
) -> None:
    vit = encoder("vit", tmp_path / "vit")
    bare = encoder("vit", tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    larger = encoder("vit", tmp_path / "larger", size=32)
    texts = encoders.folder(
        transformers.BertModel(transformers.BertConfig(**encoders.SHAPE)), tmp_path / "bert"
    )
    lacking = encoder("resnet", tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    gone = next(name for name in weights if name.endswith("running_mean"))
    save_file(
        {name: value for name, value in weights.items() if name != gone},
        lacking / "model.safetensors",
        {"format": "pt"},
    )
    pickled = encoder("vit", tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    kernel = encoder("vit", tmp_path / "kernel")
    config = json.loads((kernel / "config.json").read_text())
    (kernel / "config.json").write_text(json.dumps(config | {"attn_implementation": "some/code"}))
    rows = encoders.write_texts(tmp_path / "train.csv")
    for data, model, options, said in (
        (photos[0], bare, (), "has no image processor (preprocessor_config.json)"),
        (photos[0], texts, (), "holds images: give --model vgg11"),
        (rows, vit, (), "is an encoder of images: give an encoder of texts"),
        (photos[0], larger, (), "with images of 32 x 32, as its image processor makes them"),
        (photos[0], lacking, (), gone),
        (photos[0], pickled, (), "pickle"),
        (photos[0], kernel, (), "asks for the attention 'some/code'"),
        (photos[0], vit, ("--image-size", 64), "--image-size is for VGG"),
        (photos[0], vit, ("--weights", vit / "model.safetensors"), "--weights is for VGG"),
    ):
        command = ("fit", data, "--model", model, *options, "--out", tmp_path / "run")
        stderr = turnover(*command, expect=2).stderr
        assert said in stderr and len(stderr.splitlines()) <= 2, stderr
    assert not list(tmp_path.glob("*run*"))


def test_the_kind_of_a_model_is_read_without_its_code(tmp_path: Path) -> None:
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    config_class(str(tmp_path), "train.csv")
    (tmp_path / "images" / "red").mkdir(parents=True)
    np.save(tmp_path / "images" / "red" / "1.png", np.zeros(3))
    (tmp_path / "images" / "red" / "1.png.npy").rename(tmp_path / "images" / "red" / "1.png")
    with pytest.raises(InputError, match="cannot be loaded"):
        config_class(str(tmp_path), str(tmp_path / "images"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ({"features": 7}, "is needed"),
        ({"targets": ["layers.9.attention.q_proj"]}, "damaged"),
        ({"processor": {"size": 16}}, "damaged"),
        ({"processor": None}, "damaged"),
        ({"depths": [10**9]}, "tensors of weights"),
        ({"num_hidden_layers": 10**9}, "tensors of weights"),
    ],
)
def test_a_damaged_run_is_named(
    spoil: dict[str, Any], said: str, vit_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(vit_run, run)
    own, config = run / "classifier.json", run / "encoder" / "config.json"
    where = own if spoil.keys() <= json.loads(own.read_text()).keys() else config
    where.write_text(json.dumps(json.loads(where.read_text()) | spoil))
    with pytest.raises(InputError, match=said):
        load(run)


@pytest.fixture(scope="module")
def vit_run(photos: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted("vit", photos, tmp_path_factory.mktemp("vit"), "--no-compare")
